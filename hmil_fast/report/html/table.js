"use strict";
// the page's own data are JSON elements; nothing here makes HTML of text
const $ = id => document.getElementById(id);
const read = id => JSON.parse($(id).textContent);
const make = (tag, text, name) => Object.assign(document.createElement(tag), {textContent: text ?? "", className: name ?? ""});
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const tree = read("tree");

// ---- the table: sorted by its heads, filtered by text, by right and wrong, by a cell of a confusion matrix
const table = $("slide-table");
const heads = Array.from(table.tHead.rows[0].cells);
const rows = () => Array.from(table.tBodies[0].rows);
let pair = null;

function sortBy(column) {
  const head = heads[column];
  if (!head || !head.querySelector("button")) return;
  const up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => row.cells[column].textContent;
  const order = head.classList.contains("n")
    ? (a, b) => Number(key(a)) - Number(key(b))
    : (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true});
  // a sort keeps equal rows in order
  table.tBodies[0].append(...rows().sort((a, b) => up ? order(a, b) : order(b, a)));
  heads.forEach(h => h.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}
heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortBy(column)));

function filter() {
  const text = $("find").value.trim().toLowerCase(), which = $("which").value;
  let shown = 0;
  for (const row of rows()) {
    const wrong = row.classList.contains("wrong");
    const hit = (which === "all" || (which === "wrong") === wrong)
      && (!text || row.textContent.toLowerCase().includes(text))
      && (!pair || (row.dataset.true.split(",")[pair.level] === pair.true && row.dataset.predicted.split(",")[pair.level] === pair.predicted));
    row.hidden = !hit;
    shown += hit;
  }
  const names = pair && tree.names[pair.level];
  $("shown").textContent = (shown === rows().length ? "" : `${shown} of ${rows().length} shown`)
    + (pair ? `: true ${names[pair.true]}, predicted ${names[pair.predicted]}` : "");
  $("clear").hidden = !pair && !text && which === "all";
}
$("find").addEventListener("input", filter);
$("which").addEventListener("change", filter);
$("clear").addEventListener("click", () => { pair = null; $("find").value = ""; $("which").value = "all"; filter(); });
document.querySelectorAll("button[data-level]").forEach(button => button.addEventListener("click", () => {
  pair = {level: button.dataset.level, true: button.dataset.true, predicted: button.dataset.predicted};
  filter();
  $("slides").scrollIntoView();
}));


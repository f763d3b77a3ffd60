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
      && (!pair || (row.dataset.true.split(",")[pair.level] === pair.true && row.dataset.said.split(",")[pair.level] === pair.said));
    row.hidden = !hit;
    shown += hit;
  }
  const names = pair && tree.names[pair.level];
  $("shown").textContent = (shown === rows().length ? "" : `${shown} of ${rows().length} shown`)
    + (pair ? `: true ${names[pair.true]}, predicted ${names[pair.said]}` : "");
  $("clear").hidden = !pair && !text && which === "all";
}
$("find").addEventListener("input", filter);
$("which").addEventListener("change", filter);
$("clear").addEventListener("click", () => { pair = null; $("find").value = ""; $("which").value = "all"; filter(); });
document.querySelectorAll("button[data-level]").forEach(button => button.addEventListener("click", () => {
  pair = {level: button.dataset.level, true: button.dataset.true, said: button.dataset.said};
  filter();
  $("slides").scrollIntoView();
}));

// ---- the viewer: one slide, moved and zoomed, under the attention paid for one node
const dialog = $("viewer"), stage = $("stage"), ink = stage.getContext("2d");
const colours = bytes(tree.colours);
let open = null; // the slide that is shown
const at = {x: 0, y: 0, zoom: 1}; // the picture's px in the stage's corner; CSS px per px of the picture

function picture(data) {
  const image = new Image();
  image.src = "data:image/webp;base64," + data;
  return image.decode().then(() => image);
}

async function show(row) {
  const view = read(`view-${row.dataset.view}`);
  const slide = {view, row, map: null, cuts: {}, said: JSON.parse(row.dataset.p)};
  open = slide;
  $("viewer-name").textContent = row.dataset.slide;
  const wrong = row.classList.contains("wrong");
  const {label: truth, answer: said} = row.dataset;
  $("viewer-answer").replaceChildren("predicted ", make("b", said), wrong ? `, labelled ${truth} ✗` : " as labelled ✓");
  $("viewer-answer").className = wrong ? "wrong" : "";
  const near = neighbours();
  $("before").disabled = !near[0];
  $("after").disabled = !near[1];
  listNodes();
  if (!dialog.open) dialog.showModal();
  slide.image = await picture(view.picture);
  if (open !== slide) return;
  slide.scale = slide.image.naturalWidth / view.size[0]; // px of the picture per level-0 px
  slide.layer = layOut(slide);
  fit();
  choose(slide.map);
  for (const [tile, data] of Object.entries(view.cuts)) {
    slide.cuts[tile] = await picture(data);
    if (open !== slide) return;
  }
  listTops();
  draw();
}

// what the overlay is painted on, in px of the picture: a px per cell where the cells lie in a grid, which keeps
// them sharp and in place at any zoom; else, and where they overlap, a px per px of the picture
function layOut(slide) {
  const {view, scale, image} = slide, xy = new Uint16Array(bytes(view.cells).buffer), side = view.cell_side * scale;
  const places = Array.from({length: xy.length / 2}, (_, i) => [xy[2 * i], xy[2 * i + 1]].map(v => v * view.unit * scale));
  const least = [0, 1].map(axis => places.reduce((low, place) => Math.min(low, place[axis]), Infinity));
  const grid = places.map(place => place.map((v, axis) => (v - least[axis]) / side));
  const near = v => Math.abs(v - Math.round(v)) < 0.1;
  const taken = new Set(grid.map(place => place.map(Math.round).join()));
  if (places.length && taken.size === places.length && grid.flat().every(near)) {
    const cells = grid.map(place => place.map(Math.round)).map(([x, y]) => [x, y, x + 1, y + 1]);
    const most = axis => cells.reduce((high, cell) => Math.max(high, cell[axis]), 0);
    return {cells, x: least[0], y: least[1], px: side, w: most(2), h: most(3)};
  }
  // both edges are rounded, not the size: neighbours keep touching
  const cells = places.map(([x, y]) => {
    const a = Math.round(x), b = Math.round(y);
    return [a, b, Math.max(a + 1, Math.round(x + side)), Math.max(b + 1, Math.round(y + side))];
  });
  return {cells, x: 0, y: 0, px: 1, w: image.naturalWidth, h: image.naturalHeight};
}

function neighbours() {
  const shown = rows().filter(row => !row.hidden && row.querySelector("button.look"));
  const place = shown.indexOf(open.row);
  return [shown[place - 1], shown[place + 1]];
}

// the nodes as the tree has them, with their probabilities; those with a map can be chosen
function listNodes() {
  const {view, row, said} = open;
  const box = $("nodes");
  box.replaceChildren(box.firstElementChild);
  const truth = row.dataset.true.split(",").map(Number), answer = row.dataset.said.split(",").map(Number);
  const line = (deep, level, node, name, p, map) => {
    const label = make(map ? "label" : "div");
    label.style.setProperty("--deep", deep);
    if (map) {
      const input = Object.assign(make("input"), {type: "radio", name: "node"});
      input.map = map;
      input.addEventListener("change", () => choose(map));
      label.append(input);
    } else label.append(make("span"));
    const text = make("span", name);
    if (node === answer[level]) text.classList.add("said");
    if (node === truth[level]) { text.classList.add("true"); text.title = "the label"; }
    label.append(text, make("span", p === null ? "" : p.toFixed(2), "p"));
    if (p !== null) {
      const meter = make("span", "", "meter"), fill = make("i");
      fill.style.width = `${100 * p}%`;
      meter.append(fill);
      label.append(meter);
    }
    box.append(label);
  };
  for (const map of view.maps) if (map.node === null) line(0, 0, null, "all nodes", null, map);
  for (const {level, node, title, deep} of tree.nodes)
    line(deep, level, node, title, said[level][node], view.maps.find(m => m.level === level && m.node === node));
  const last = tree.names.length - 1;
  open.map = view.maps.find(m => m.level === last && m.node === answer[last]) ?? view.maps[0] ?? null;
  for (const part of ["overlay", "colour", "spread", "key", "tops-name"]) $(part).style.display = open.map ? "" : "none";
}

function choose(map) {
  open.map = map;
  document.querySelectorAll("#nodes input").forEach(input => { input.checked = input.map === map; });
  if (map) paint();
  $("spread").textContent = map ? `${map.spread} (even: 10 %)` : "";
  drawKey();
  listTops();
  draw();
}

function drawKey() {
  const {limit} = open.view, times = [`≤ 1/${limit}`, "1", `≥ ${limit}`];
  const [text, , ticks] = $("key").children;
  text.textContent = tree.keys[by()];
  ticks.replaceChildren(...(by() === "rank" ? ["0", "0.5", "1"] : times).map(tick => make("span", tick)));
}

// a place among the colours, 0 to 1, and what it stands for: times the even share, or a rank
const by = () => $("by").value;
const meant = place => by() === "rank" ? place : open.view.limit ** (2 * place - 1);
const placed = value => by() === "rank" ? value : 0.5 + Math.log(value) / (2 * Math.log(open.view.limit));

// the mean of the cells on every px of the layer, as colours; and a mask to take the tissue's own away
function paint() {
  const {layer: {cells, w, h}, map} = open;
  const places = bytes(map.places[by()]), total = new Float64Array(w * h), times = new Uint16Array(w * h);
  cells.forEach(([a, b, c, d], i) => {
    if (places[i] === 255) return;
    const value = meant(places[i] / 254);
    for (let y = Math.max(b, 0); y < Math.min(d, h); y++)
      for (let x = Math.max(a, 0); x < Math.min(c, w); x++) { total[y * w + x] += value; times[y * w + x]++; }
  });
  open.value = (x, y) => x >= 0 && y >= 0 && x < w && y < h && times[y * w + x] ? total[y * w + x] / times[y * w + x] : null;
  const tint = new ImageData(w, h), mask = new ImageData(w, h);
  for (let i = 0; i < w * h; i++) {
    if (!times[i]) continue;
    const colour = 3 * Math.round(255 * placed(total[i] / times[i]));
    tint.data.set([colours[colour], colours[colour + 1], colours[colour + 2], 255], 4 * i);
    mask.data[4 * i + 3] = 255;
  }
  [open.tint, open.mask] = [tint, mask].map(data => {
    const layer = Object.assign(document.createElement("canvas"), {width: w, height: h});
    layer.getContext("2d").putImageData(data, 0, 0);
    return layer;
  });
}

function listTops() {
  const {view, map, image, scale, cuts} = open;
  $("tops").replaceChildren(...(map?.top ?? []).map(([tile, x, y, share], place) => {
    const button = Object.assign(make("button"), {type: "button"});
    const canvas = Object.assign(make("canvas"), {width: 160, height: 160});
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    if (cuts[tile]) pen.drawImage(cuts[tile], 0, 0, 160, 160);
    else if (image) pen.drawImage(image, x * scale, y * scale, view.side * scale, view.side * scale, 0, 0, 160, 160);
    const text = `${place + 1} · ${percent(share)}`;
    button.setAttribute("aria-label", `tile ${text} of the attention, at ${x}, ${y} px: look at it`);
    button.title = `at ${x.toLocaleString("en")}, ${y.toLocaleString("en")} px`;
    button.append(canvas, text);
    button.addEventListener("click", () => lookAt(x, y));
    const item = make("li");
    item.append(button);
    return item;
  }));
  $("tops-note").textContent = !map ? "This model has no attention to show."
    : `Share of the slide's attention; even attention would give each of ${view.tiles.toLocaleString("en")} tiles ${percent(1 / view.tiles)}.`
    + (view.cut ? "" : " Cut from the thumbnail: hmil-fast report with --slides takes them from the slide.");
}

function said(value) {
  if (by() === "rank") return `rank ${value.toFixed(2)}`;
  const {limit} = open.view, end = value >= limit ? "≥ " : value <= 1 / limit ? "≤ " : "";
  return `${end}${Number(value.toPrecision(2))} × even`;
}

function percent(share) {
  return share < 1e-5 ? "< 0.001 %" : `${(100 * share).toPrecision(share < 0.1 ? 2 : 3)} %`;
}

// ---- drawing, moving, zooming
function draw() {
  if (!open?.image) return;
  const {view, image, layer, map, tint, mask, scale, cuts} = open;
  const sharp = window.devicePixelRatio || 1, box = stage.getBoundingClientRect();
  const [w, h] = [Math.round(box.width * sharp), Math.round(box.height * sharp)];
  if (stage.width !== w || stage.height !== h) Object.assign(stage, {width: w, height: h});
  const z = at.zoom * sharp;
  ink.setTransform(1, 0, 0, 1, 0, 0);
  ink.clearRect(0, 0, w, h);
  ink.setTransform(z, 0, 0, z, -at.x * z, -at.y * z);
  ink.imageSmoothingQuality = "high";
  ink.drawImage(image, 0, 0);
  const side = view.side * scale, opacity = $("opacity").value / 100;
  for (const [tile, x, y] of map?.top ?? []) if (cuts[tile]) ink.drawImage(cuts[tile], x * scale, y * scale, side, side);
  if (tint && opacity) {
    ink.imageSmoothingEnabled = false;
    ink.globalAlpha = opacity;
    ink.globalCompositeOperation = "saturation"; // grey tissue below keeps the tint's meaning
    ink.drawImage(mask, layer.x, layer.y, layer.w * layer.px, layer.h * layer.px);
    ink.globalCompositeOperation = "source-over";
    ink.drawImage(tint, layer.x, layer.y, layer.w * layer.px, layer.h * layer.px);
    ink.globalAlpha = 1;
    ink.imageSmoothingEnabled = true;
  }
  (map?.top ?? []).forEach(([, x, y], place) => {
    for (const [colour, wide] of [["#fff", 3.5], ["#111", 1.5]]) {
      Object.assign(ink, {strokeStyle: colour, lineWidth: wide * sharp / z});
      ink.strokeRect(x * scale, y * scale, side, side);
    }
    if (side * at.zoom < 22) return;
    Object.assign(ink, {font: `600 ${12 * sharp / z}px system-ui, sans-serif`, lineWidth: 3 * sharp / z, strokeStyle: "#fff", fillStyle: "#111"});
    ink.strokeText(place + 1, x * scale + 4 * sharp / z, y * scale + 14 * sharp / z);
    ink.fillText(place + 1, x * scale + 4 * sharp / z, y * scale + 14 * sharp / z);
  });
  drawScale();
}

function drawScale() {
  const {view, scale} = open;
  $("scale").style.display = view.mpp ? "" : "none";
  if (!view.mpp) return;
  const px = at.zoom * scale / view.mpp; // CSS px per µm
  const most = Math.min(160, stage.clientWidth / 3) / px, power = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].map(step => step * power).find(length => length <= most) ?? power;
  $("scale").querySelector("span").textContent = um >= 1000 ? `${um / 1000} mm` : `${Number(um.toPrecision(1))} µm`;
  $("scale").querySelector("i").style.width = `${um * px}px`;
}

function frame(x, y, w, h, share) {
  at.zoom = Math.min(64, share * Math.min(stage.clientWidth / w, stage.clientHeight / h));
  at.x = x + w / 2 - stage.clientWidth / at.zoom / 2;
  at.y = y + h / 2 - stage.clientHeight / at.zoom / 2;
}

function fit() {
  const {layer, image} = open;
  const all = layer.cells.length ? layer.cells : [[0, 0, image.naturalWidth, image.naturalHeight]];
  const [left, top] = [0, 1].map(i => all.reduce((low, cell) => Math.min(low, cell[i]), Infinity));
  const [right, bottom] = [2, 3].map(i => all.reduce((high, cell) => Math.max(high, cell[i]), 0));
  frame(layer.x + left * layer.px, layer.y + top * layer.px, (right - left) * layer.px, (bottom - top) * layer.px, 0.88);
  open.least = at.zoom / 3;
  draw();
}

function lookAt(x, y) {
  const side = open.view.side * open.scale;
  frame(x * open.scale, y * open.scale, side, side, 0.45);
  draw();
}

function zoom(times, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const next = Math.min(64, Math.max(open.least, at.zoom * times));
  at.x += x / at.zoom - x / next;
  at.y += y / at.zoom - y / next;
  at.zoom = next;
  draw();
}

function move(dx, dy) {
  at.x += dx / at.zoom;
  at.y += dy / at.zoom;
  draw();
}

function toggle() {
  const slider = $("opacity");
  slider.value = Number(slider.value) ? 0 : slider.dataset.last ?? 55;
  opacityChanged();
}

function opacityChanged() {
  const slider = $("opacity");
  if (Number(slider.value)) slider.dataset.last = slider.value;
  slider.nextElementSibling.textContent = `${slider.value} %`;
  draw();
}

const fingers = new Map();
stage.addEventListener("pointerdown", event => {
  stage.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  stage.classList.add("held");
});
stage.addEventListener("pointermove", event => {
  if (!open?.image) return;
  const before = fingers.get(event.pointerId), box = stage.getBoundingClientRect();
  if (!before) {
    const x = at.x + (event.clientX - box.left) / at.zoom, y = at.y + (event.clientY - box.top) / at.zoom, {layer} = open;
    const value = open.map && open.value(Math.floor((x - layer.x) / layer.px), Math.floor((y - layer.y) / layer.px));
    const [px, py] = [x, y].map(v => Math.round(v / open.scale).toLocaleString("en"));
    $("here").textContent = typeof value === "number" ? `${said(value)} · ${px}, ${py} px` : "";
    return;
  }
  const other = [...fingers.values()].find(finger => finger.pointerId !== event.pointerId);
  if (other) {
    const apart = finger => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY) || 1;
    zoom(apart(event) / apart(before), other.clientX - box.left, other.clientY - box.top);
  } else move(before.clientX - event.clientX, before.clientY - event.clientY);
  fingers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, event => {
  fingers.delete(event.pointerId);
  if (!fingers.size) stage.classList.remove("held");
});
stage.addEventListener("pointerleave", () => { $("here").textContent = ""; });
stage.addEventListener("wheel", event => {
  event.preventDefault();
  const box = stage.getBoundingClientRect(), step = event.deltaMode ? event.deltaY * 30 : event.deltaY;
  if (open?.image) zoom(Math.exp(-Math.max(-240, Math.min(240, step)) / 400), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
const step = to => { const row = neighbours()[to]; if (row) show(row); };
const keys = {
  ArrowLeft: () => move(-60, 0), ArrowRight: () => move(60, 0), ArrowUp: () => move(0, -60), ArrowDown: () => move(0, 60),
  "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), "0": fit, o: toggle, O: toggle,
  PageUp: () => step(0), PageDown: () => step(1),
};
dialog.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || !open?.image) return;
  if (event.target.matches("select") || event.target.matches("input") && event.key.startsWith("Arrow")) return; // they have their own
  event.preventDefault();
  keys[event.key]();
});
$("closer").addEventListener("click", () => zoom(1.4));
$("farther").addEventListener("click", () => zoom(1 / 1.4));
$("fit").addEventListener("click", fit);
$("opacity").addEventListener("input", opacityChanged);
$("by").addEventListener("change", () => choose(open.map));
$("before").addEventListener("click", () => step(0));
$("after").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => {
  const row = open?.row;
  open = null;
  row?.querySelector("button.look").focus(); // also of a slide that was stepped to
});
new ResizeObserver(draw).observe(stage);
$("key").querySelector("i").style.background = `linear-gradient(90deg, ${[0, 32, 64, 96, 128, 160, 192, 224, 255].map(i => `rgb(${colours.slice(3 * i, 3 * i + 3).join()})`).join()})`;
document.querySelectorAll("button.look").forEach(button => button.addEventListener("click", () => show(button.closest("tr"))));

// #sort-3 in the address sorts by a column, #slide-0 opens a slide
const wanted = /^#(sort|slide)-(\d+)$/.exec(location.hash);
if (wanted?.[1] === "sort") sortBy(Number(wanted[2]));
if (wanted?.[1] === "slide") document.querySelector(`tr[data-row="${wanted[2]}"] button.look`)?.click();

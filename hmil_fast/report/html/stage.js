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
    $("here").textContent = typeof value === "number" ? `${valueText(value)} · ${px}, ${py} px` : "";
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

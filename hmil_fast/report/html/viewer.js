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
  const slide = {view, row, map: null, cuts: {}, probabilities: JSON.parse(row.dataset.p)};
  open = slide;
  $("viewer-name").textContent = row.dataset.slide;
  const wrong = row.classList.contains("wrong");
  const {label: truth, answer} = row.dataset;
  $("viewer-answer").replaceChildren("predicted ", make("b", answer), wrong ? `, labelled ${truth} ✗` : " as labelled ✓");
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
  const {view, row, probabilities} = open;
  const box = $("nodes");
  box.replaceChildren(box.firstElementChild);
  const truth = row.dataset.true.split(",").map(Number), answer = row.dataset.predicted.split(",").map(Number);
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
    if (node === answer[level]) text.classList.add("predicted");
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
    line(deep, level, node, title, probabilities[level][node], view.maps.find(m => m.level === level && m.node === node));
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

function valueText(value) {
  if (by() === "rank") return `rank ${value.toFixed(2)}`;
  const {limit} = open.view, end = value >= limit ? "≥ " : value <= 1 / limit ? "≤ " : "";
  return `${end}${Number(value.toPrecision(2))} × even`;
}

function percent(share) {
  return share < 1e-5 ? "< 0.001 %" : `${(100 * share).toPrecision(share < 0.1 ? 2 : 3)} %`;
}


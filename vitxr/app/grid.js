// A small picture made of cells: shifts, patches, images. Pointed at, or walked with the keys.

const STYLE = `
.vx-grid { display: flex; flex-direction: column; width: 100%; }
.vx-grid h3 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
.vx-grid .about { font-size: 12px; color: var(--vx-soft, #555); margin: 0 0 6px; }
.vx-grid .stage { position: relative; align-self: flex-start; width: 100%; }
.vx-grid canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.vx-grid .back { background: var(--vx-empty, #e4e4e4); border-radius: 3px; }
.vx-grid .over { position: absolute; inset: 0; touch-action: none; }
.vx-grid .over.active { cursor: pointer; }
.vx-grid .over:focus-visible { outline: 3px solid var(--vx-focus, #e69f00); outline-offset: 2px; }
.vx-grid .key { display: flex; align-items: center; gap: 6px; font-size: 12px; margin-top: 6px;
  color: var(--vx-soft, #555); }
.vx-grid .key canvas { width: 90px; height: 9px; image-rendering: auto; }
.vx-grid .said { font-size: 12px; min-height: 1.4em; margin-top: 3px; color: var(--vx-soft, #555); }`;

const number = v => Number.isNaN(v) ? "nothing" : Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3)
  ? v.toExponential(2) : String(Number(v.toPrecision(3)));

export function render({ model }) {
  const root = document.createElement("div");
  root.className = "vx-grid";
  root.innerHTML = `<style>${STYLE}</style><h3></h3><p class="about"></p>
    <div class="stage"><canvas class="back" role="img"></canvas><canvas class="over"></canvas></div>
    <div class="key"><span></span><canvas width="256" height="1" aria-hidden="true"></canvas><span></span><span></span></div>
    <div class="said" role="status" aria-live="polite"></div>`;
  const [back, over, ramp] = root.querySelectorAll("canvas"), pen = over.getContext("2d");
  const [low, high, unit] = root.querySelectorAll(".key span");
  const said = root.querySelector(".said"), stage = root.querySelector(".stage");
  let values = new Float32Array(0), from = null, to = null;

  function paint() {
    const [height, width] = model.shape;
    root.querySelector("h3").textContent = model.title;
    const about = root.querySelector(".about");
    about.textContent = model.about; about.hidden = !model.about;
    stage.style.maxWidth = `${model.most}px`;
    stage.style.aspectRatio = `${width} / ${height}`;
    back.width = width; back.height = height;
    if (model.pixels.byteLength === width * height * 4)
      back.getContext("2d").putImageData(
        new ImageData(new Uint8ClampedArray(model.pixels), width, height), 0, 0);
    back.setAttribute("aria-label", `${model.title}. ${model.about}`);
    values = new Float32Array(model.values);
    const rgb = new Uint8Array(model.scale);
    root.querySelector(".key").hidden = !rgb.length;
    root.querySelector(".key").style.display = rgb.length ? "flex" : "none";
    if (rgb.length) {
      const row = new ImageData(256, 1);
      for (let i = 0; i < 256; i++) row.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
      ramp.getContext("2d").putImageData(row, 0, 0);
      [low.textContent, high.textContent] = model.limits.map(number);
      unit.textContent = model.key_unit || model.unit;
    }
    const active = model.mode !== "none";
    over.classList.toggle("active", active);
    if (active) {
      over.tabIndex = 0; over.setAttribute("role", "application");
      const doing = model.mode === "box" ? "Shift and arrow keys draw a box, Enter selects it"
        : "Enter chooses";
      over.setAttribute("aria-label", `${model.title}. Arrow keys move over ${model.rows} rows and ` +
        `${model.cols} columns. ${doing}.`);
    } else over.setAttribute("aria-hidden", "true");
    root.dataset.serial = model.serial;
    mark();
  }
  function mark() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(stage.clientWidth * ratio), height = Math.round(stage.clientHeight * ratio);
    if (!width) return;
    over.width = width; over.height = height;
    const w = width / model.cols, h = height / model.rows;
    const frame = ([r0, r1, c0, c1], dash) => {
      for (const [color, thick] of [["#000", 4], ["#fff", 2]]) {
        pen.strokeStyle = color; pen.lineWidth = thick * ratio;
        pen.setLineDash(dash ? [4 * ratio, 3 * ratio] : []);
        pen.strokeRect(c0 * w + ratio, r0 * h + ratio, (c1 - c0 + 1) * w - 2 * ratio, (r1 - r0 + 1) * h - 2 * ratio);
      }
    };
    if (model.box.length === 4) frame(model.box);
    if (model.cell.length === 2) frame([model.cell[0], model.cell[0], model.cell[1], model.cell[1]]);
    if (from && to) frame(spanned(), true);
  }
  const spanned = () => [Math.min(from[0], to[0]), Math.max(from[0], to[0]),
                         Math.min(from[1], to[1]), Math.max(from[1], to[1])];
  function tell([r, c]) {
    const v = values[r * model.cols + c];
    said.textContent = `${model.row_name} ${model.row_labels[r] ?? r}, ${model.col_name} ` +
      `${model.col_labels[c] ?? c}` + (v === undefined ? "" : `: ${number(v)} ${v === 1 && model.unit === "neurons" ? "neuron" : model.unit}`);
  }
  const under = e => {
    const box = over.getBoundingClientRect();
    const at = (v, size, k) => Math.max(0, Math.min(k - 1, Math.floor(v / size * k)));
    return [at(e.clientY - box.top, box.height, model.rows), at(e.clientX - box.left, box.width, model.cols)];
  };
  function done() {
    if (!from) return;
    if (model.mode === "box") model.send_msg({ box: spanned() });
    else model.send_msg({ cell: to });
    from = to = null; mark();
  }
  over.addEventListener("pointermove", e => {
    const at = under(e); tell(at);
    if (from && e.buttons) { to = at; if (model.mode === "box") mark(); }
  });
  over.addEventListener("pointerdown", e => {
    if (model.mode === "none") return;
    over.setPointerCapture(e.pointerId); over.focus({ preventScroll: true });
    from = to = under(e); mark();
  });
  over.addEventListener("pointerup", done);
  over.addEventListener("pointerleave", () => { if (!from) said.textContent = ""; });
  over.addEventListener("keydown", e => {
    if (model.mode === "none") return;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (step) {
      const start = to || (model.cell.length ? model.cell : model.box.length ? [model.box[0], model.box[2]] : [0, 0]);
      to = from || model.mode === "cell" || !e.shiftKey
        ? [0, 1].map(k => Math.max(0, Math.min([model.rows, model.cols][k] - 1, start[k] + step[k]))) : start;
      if (!from || !e.shiftKey || model.mode === "cell") from = to;
      tell(to);
    } else if (e.key === "Enter" || e.key === " ") done();
    else if (e.key === "Escape") from = to = null;
    else return;
    e.preventDefault(); mark();
  });
  const watch = new ResizeObserver(mark);
  watch.observe(stage);
  model.on("serial", paint);
  model.on("box", mark);
  model.on("cell", mark);
  model.on("remove", () => watch.disconnect());
  paint();
  return root;
}

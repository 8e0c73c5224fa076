// Points of an embedding in WebGL, 2-D and 3-D: moved, turned, zoomed, and lassoed.
//
// A lasso sends the polygon and the camera, never the points inside; the mask comes back as
// bits. The arithmetic of `project` and `inside` is that of geometry.py, in the same order.

const VERTEX = `
attribute vec3 place; attribute vec3 color; attribute float chosen;
uniform vec4 row0, row1, row2; uniform vec2 aspect; uniform float size, pass, any;
uniform vec3 muted; uniform float lift; varying vec4 shade;
void main() {
  vec4 p = vec4(1.0, place);
  gl_Position = vec4(dot(row0, p) * aspect.x, dot(row1, p) * aspect.y, -dot(row2, p), 1.0);
  bool hide = pass != chosen;
  if (hide) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
  bool dim = any > 0.5 && chosen < 0.5;
  shade = dim ? vec4(muted, 0.35) : vec4(mix(color, vec3(1.0), lift), 0.9);
  gl_PointSize = dim ? size * 0.8 : size;
}`;
const FRAGMENT = `
precision mediump float; varying vec4 shade;
void main() {
  vec2 d = gl_PointCoord - 0.5;
  if (dot(d, d) > 0.25) discard;
  gl_FragColor = vec4(shade.rgb * shade.a, shade.a);
}`;
const STYLE = `
.vx-points { position: relative; display: flex; flex-direction: column; width: 100%; height: 100%; }
.vx-points .tools { display: flex; flex-wrap: wrap; gap: 4px; padding: 0 0 6px; }
.vx-points button { font: inherit; font-size: 13px; color: inherit; background: transparent;
  border: 1px solid var(--vx-line, #bbb); border-radius: 5px; padding: 3px 9px; cursor: pointer; }
.vx-points button[aria-pressed=true] { background: var(--vx-accent, #0072b2); color: #fff;
  border-color: transparent; }
.vx-points .stage { position: relative; flex: 1 1 auto; min-height: 240px; overflow: hidden;
  border: 1px solid var(--vx-line, #bbb); border-radius: 8px; background: var(--vx-card, #fff); }
.vx-points canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; }
.vx-points canvas.over { cursor: crosshair; }
.vx-points canvas.over.move { cursor: grab; }
.vx-points canvas:focus-visible, .vx-points button:focus-visible {
  outline: 3px solid var(--vx-focus, #e69f00); outline-offset: 1px; }
.vx-points .said { font-size: 12px; padding-top: 4px; color: var(--vx-soft, #555); min-height: 1.4em; }
.vx-points .none { padding: 24px; font-size: 15px; }`;

export function project(places, camera, n, axes) {
  // x and y of every point, in float64: c0 + c1 p1 + c2 p2 (+ c3 p3), added from the left.
  const out = [new Float64Array(n), new Float64Array(n)];
  for (let row = 0; row < 2; row++) {
    const c = camera[row];
    for (let i = 0; i < n; i++) {
      let total = c[0] + c[1] * places[3 * i];
      for (let axis = 1; axis < axes; axis++) total = total + c[axis + 1] * places[3 * i + axis];
      out[row][i] = total;
    }
  }
  return out;
}

export function inside(x, y, polygon) {
  const n = x.length, k = polygon.length, out = new Uint8Array(n);
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const [a, b] of polygon) {
    x0 = Math.min(x0, a); x1 = Math.max(x1, a); y0 = Math.min(y0, b); y1 = Math.max(y1, b);
  }
  for (let i = 0; i < n; i++) {
    const px = x[i], py = y[i];
    if (!(px >= x0 && px <= x1 && py >= y0 && py <= y1)) continue;
    let odd = 0;
    for (let a = 0, b = k - 1; a < k; b = a++) {
      const [xi, yi] = polygon[a], [xj, yj] = polygon[b];
      if ((yi > py) !== (yj > py) && px < (xj - xi) * (py - yi) / (yj - yi) + xi) odd ^= 1;
    }
    out[i] = odd;
  }
  return out;
}

function unpacked(buffer, n) {
  const bits = new Uint8Array(buffer), out = new Uint8Array(n);
  if (bits.length * 8 >= n) for (let i = 0; i < n; i++) out[i] = (bits[i >> 3] >> (i & 7)) & 1;
  return out;
}

const rounded = v => Number(v.toPrecision(9));

class Camera {
  // Parallel projection: turn, then scale, then move. `rows` is what is sent and stored.
  constructor(middle, scale) {
    this.middle = middle; this.home = scale; this.reset();
  }
  reset() {
    this.turn = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]; this.scale = this.home; this.move = [0, 0];
  }
  row(k) {
    const r = this.turn[k].map(v => v * this.scale);
    const c = (k < 2 ? this.move[k] : 0) - r.reduce((t, v, a) => t + v * this.middle[a], 0);
    return [c, ...r];
  }
  rows(axes) { return [0, 1].map(k => this.row(k).slice(0, axes + 1).map(rounded)); }
  take(rows) {
    // A camera that was stored: its rows are at right angles and of one length.
    const full = rows.map(r => [...r.slice(1), 0].slice(0, 3));
    this.scale = Math.hypot(...full[0]) || this.home;
    const [a, b] = full.map(r => r.map(v => v / this.scale));
    this.turn = [a, b, [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2],
                        a[0] * b[1] - a[1] * b[0]]];
    this.move = [0, 1].map(k => rows[k][0] + full[k].reduce((t, v, j) => t + v * this.middle[j], 0));
  }
  rotate(right, up) {
    const spin = (m, i, j, angle) => {
      const c = Math.cos(angle), s = Math.sin(angle), [p, q] = [m[i], m[j]];
      m[i] = p.map((v, k) => c * v + s * q[k]); m[j] = q.map((v, k) => -s * p[k] + c * v);
    };
    spin(this.turn, 0, 2, right); spin(this.turn, 1, 2, up);
  }
  zoom(factor, at = [0, 0]) {
    factor = Math.max(factor, this.home * 0.2 / this.scale);
    factor = Math.min(factor, this.home * 400 / this.scale);
    this.scale *= factor;
    this.move = this.move.map((m, k) => at[k] + (m - at[k]) * factor);
  }
}

export function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "vx-points";
  root.innerHTML = `<style>${STYLE}</style>
    <div class="tools" role="toolbar" aria-label="Tools of the embedding"></div>
    <div class="stage"><canvas class="gl" aria-hidden="true"></canvas>
      <canvas class="over" tabindex="0" role="application"></canvas></div>
    <div class="said" role="status" aria-live="polite"></div>`;
  const [base, over] = root.querySelectorAll("canvas");
  const stage = root.querySelector(".stage"), tools = root.querySelector(".tools");
  const said = root.querySelector(".said");
  const gl = base.getContext("webgl", { antialias: false, preserveDrawingBuffer: true });
  if (!gl) {
    stage.innerHTML = `<p class="none" role="alert">This browser gives no WebGL, which the picture
      of the embedding needs. Switch hardware acceleration or WebGL on, or take another browser.
      Selections by feature map, row and column work without it.</p>`;
    root.dataset.webgl = "missing";
    return root;
  }
  const pen = over.getContext("2d");
  let n = 0, axes = 2, places = new Float32Array(0), bounds = null, camera = null;
  let chosen = new Uint8Array(0), path = null, tool = "lasso", frame = 0, stale = true, started = 0;
  let drawn = { polygon: [], camera: [] };

  const program = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text); gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program); gl.useProgram(program);
  const buffers = {}, at = name => gl.getUniformLocation(program, name);
  function upload(name, data, size, type, normal) {
    buffers[name] ??= gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    const where = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(where);
    gl.vertexAttribPointer(where, size, type, normal, 0, 0);
  }
  const uniforms = ["row0", "row1", "row2", "aspect", "size", "pass", "any", "muted", "lift"];
  const uniform = Object.fromEntries(uniforms.map(name => [name, at(name)]));
  gl.enable(gl.BLEND); gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA); gl.depthFunc(gl.LEQUAL);

  function draw() {
    frame = 0;
    if (!stale) return outline();
    stale = false;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(stage.clientWidth * ratio);
    const height = Math.round(stage.clientHeight * ratio);
    if (!width || !height || !camera) return;
    for (const canvas of [base, over]) if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width; canvas.height = height;
    }
    const less = Math.min(width, height);
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const rows = camera.rows(axes).map(r => [...r, 0].slice(0, 4));
    gl.uniform4fv(uniform.row0, rows[0]); gl.uniform4fv(uniform.row1, rows[1]);
    // Depth only orders the points: a tenth of it keeps them inside what is drawn.
    const depth = axes === 3 ? camera.row(2).map(v => v * 0.05 * camera.home / camera.scale) : [0, 0, 0, 0];
    gl.uniform4fv(uniform.row2, depth);
    gl.uniform2f(uniform.aspect, less / width, less / height);
    gl.uniform1f(uniform.size, ratio * Math.max(2, Math.min(9, 9 - 2.2 * Math.log10(n / 100 + 1))));
    gl.uniform3fv(uniform.muted, model.dark ? [0.45, 0.47, 0.5] : [0.68, 0.69, 0.71]);
    gl.uniform1f(uniform.lift, model.dark ? 0.25 : 0);
    const any = chosen.some(v => v) ? 1 : 0;
    gl.uniform1f(uniform.any, any);
    for (const pass of any ? [0, 1] : [0]) {
      gl[axes === 3 ? "enable" : "disable"](gl.DEPTH_TEST);
      if (pass) gl.clear(gl.DEPTH_BUFFER_BIT);
      gl.uniform1f(uniform.pass, pass);
      gl.drawArrays(gl.POINTS, 0, n);
    }
    outline();
  }
  function outline() {
    if (!camera) return;
    const { width, height } = over, less = Math.min(width, height);
    const ratio = width / (stage.clientWidth || 1);
    over.width = width;  // clears it: after clearRect alone Chromium may still show what was there
    const shown = path || (same(drawn.camera, camera.rows(axes)) ? drawn.polygon : []);
    if (shown.length < 2) return;
    pen.beginPath();
    for (const [x, y] of shown) pen.lineTo(width / 2 + x * less / 2, height / 2 - y * less / 2);
    if (!path) pen.closePath();
    pen.lineWidth = 1.6 * ratio; pen.setLineDash(path ? [] : [5 * ratio, 4 * ratio]);
    pen.strokeStyle = model.dark ? "#ffd27a" : "#b35a00"; pen.stroke();
  }
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  // Points are drawn again only when they have changed: a lasso is drawn over them.
  const soon = () => { frame ||= requestAnimationFrame(draw); };
  const later = () => { stale = true; soon(); };

  function take() {
    axes = model.axes;
    places = new Float32Array(model.positions);
    n = places.length / 3;
    const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
    for (let i = 0; i < 3 * n; i++) {
      const v = places[i], a = i % 3;
      if (v < low[a]) low[a] = v;
      if (v > high[a]) high[a] = v;
    }
    const middle = low.map((v, a) => (v + high[a]) / 2 || 0);
    const span = Math.max(...high.map((v, a) => v - low[a] || 0)) || 1;
    camera = new Camera(middle, 1.8 / span);
    if (axes === 3) camera.rotate(0.6, 0.4);
    drawn = { polygon: [], camera: [] };
    restore();
    gl.bindBuffer(gl.ARRAY_BUFFER, null);
    upload("place", places, 3, gl.FLOAT, false);
    recolor(); remask(); describe();
  }
  function restore() {
    // A lasso that was not drawn here, as from the address, is seen through its own camera.
    const [polygon, rows] = model.outline.length ? model.outline : [[], []];
    const known = same(polygon, drawn.polygon);
    drawn = { polygon, camera: rows };
    if (!known && rows.length === 2 && rows[0].length === axes + 1) camera.take(rows);
    later();
  }
  function recolor() { upload("color", new Uint8Array(model.colors), 3, gl.UNSIGNED_BYTE, true); later(); }
  function remask() {
    restore(); // selected in another way than by a lasso drawn here: that lasso is no more
    show(unpacked(model.mask, n));
    root.dataset.served = model.serial;
    if (started) requestAnimationFrame(() => requestAnimationFrame(() => {
      root.dataset.elapsed = performance.now() - started; started = 0;
    }));
  }
  function show(mask) {
    chosen = mask;
    upload("chosen", chosen, 1, gl.UNSIGNED_BYTE, false);
    const count = chosen.reduce((t, v) => t + v, 0);
    root.dataset.count = count;
    said.textContent = `${count.toLocaleString("en")} of ${n.toLocaleString("en")} neurons selected`;
    later();
  }
  function describe() {
    over.setAttribute("aria-label", `${model.label}. Arrow keys ${axes === 3 ? "turn" : "move"} ` +
      "it, plus and minus zoom, 0 shows all, Escape drops a lasso. To select without a pointer " +
      "use the selection by feature map, row and column.");
  }

  function press(name) {
    tool = name;
    for (const b of tools.querySelectorAll("[data-tool]"))
      b.setAttribute("aria-pressed", String(b.dataset.tool === name));
    over.classList.toggle("move", name === "move");
  }
  function button(text, act, data = {}) {
    const b = document.createElement("button");
    b.type = "button"; b.textContent = text; Object.assign(b.dataset, data);
    b.addEventListener("click", act); tools.append(b);
  }
  button("Lasso", () => press("lasso"), { tool: "lasso" });
  button("Move", () => press("move"), { tool: "move" });
  button("Zoom in", () => { camera.zoom(1.3); later(); });
  button("Zoom out", () => { camera.zoom(1 / 1.3); later(); });
  button("Show all", () => { camera.reset(); later(); });
  press("lasso");

  const place = e => {
    const box = over.getBoundingClientRect(), less = Math.min(box.width, box.height);
    return [(2 * (e.clientX - box.left) - box.width) / less,
            (box.height - 2 * (e.clientY - box.top)) / less];
  };
  let last = null;
  over.addEventListener("pointerdown", e => {
    over.focus({ preventScroll: true }); over.setPointerCapture(e.pointerId); last = place(e);
    if (tool === "lasso" && e.button === 0 && !e.shiftKey) path = [last];
  });
  over.addEventListener("pointermove", e => {
    if (!last) return;
    const p = place(e);
    if (path) {
      if (Math.hypot(p[0] - path.at(-1)[0], p[1] - path.at(-1)[1]) > 0.006) path.push(p);
    } else if (axes === 3 && !e.ctrlKey) camera.rotate((p[0] - last[0]) * 1.5, (p[1] - last[1]) * 1.5);
    else camera.move = camera.move.map((m, k) => m + p[k] - last[k]);
    last = p;
    if (path) soon(); else later();
  });
  over.addEventListener("pointerup", () => { last = null; if (path) lasso(); });
  over.addEventListener("pointercancel", () => { last = path = null; later(); });
  over.addEventListener("wheel", e => {
    e.preventDefault(); camera.zoom(Math.exp(-e.deltaY * 0.0015), place(e)); later();
  }, { passive: false });
  over.addEventListener("keydown", e => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[e.key];
    if (step && axes === 3 && !e.shiftKey) camera.rotate(step[0] * 0.08, step[1] * 0.08);
    else if (step) camera.move = camera.move.map((m, k) => m - step[k] * 0.08);
    else if (e.key === "+" || e.key === "=") camera.zoom(1.2);
    else if (e.key === "-") camera.zoom(1 / 1.2);
    else if (e.key === "0") camera.reset();
    else if (e.key === "Escape") path = last = null;
    else return;
    e.preventDefault(); later();
  });

  function lasso() {
    let corners = path;
    path = null;
    const step = Math.ceil(corners.length / 160);
    corners = corners.filter((_, i) => i % step === 0)
      .map(p => p.map(v => Math.round(v * 1e4) / 1e4));
    if (corners.length < 3) { soon(); return; }
    started = performance.now();
    const rows = camera.rows(axes);
    // What the browser itself finds inside, to compare with what the server says.
    root.own = () => inside(...project(places, rows, n, axes), corners);
    drawn = { polygon: corners, camera: rows };
    model.send_msg({ polygon: corners, camera: rows });
  }

  root.chosen = () => chosen;
  // Places and axes come one after the other, in either order.
  model.on("positions", take);
  model.on("axes", take);
  model.on("colors", recolor);
  model.on("serial", remask);
  model.on("dark", later);
  model.on("label", describe);
  model.on("outline", restore);
  const watch = new ResizeObserver(later);
  watch.observe(stage);
  model.on("remove", () => { watch.disconnect(); gl.getExtension("WEBGL_lose_context")?.loseContext(); });
  take();
  return root;
}

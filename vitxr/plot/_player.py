"""The page that plays a movie: styles and script, with places for a title and the data."""

from __future__ import annotations

__all__ = ["PLAYER"]

PLAYER = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --soft: #595959; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16181b; --soft: #b0b0b0; }
}
body { margin: 0; padding: 12px; font: 14px/1.4 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 16px; margin: 0 0 8px; }
#stage { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
#maps { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr));
  flex: 1 1 260px; min-width: 0; max-width: 760px; }
#maps.one { max-width: 280px; grid-template-columns: 1fr; }
figure { margin: 0; }
figcaption { font-size: 12px; color: var(--soft); }
canvas { width: 100%; display: block; image-rendering: pixelated; }
#shown { flex: 0 0 200px; }
#controls { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 10px 0; }
#controls input[type=range] { flex: 1 1 200px; min-width: 120px; }
button, select { font: inherit; padding: 3px 12px; }
#bar { height: 10px; width: 160px; }
#key { display: flex; gap: 8px; align-items: center; font-size: 12px; color: var(--soft); }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<div id="controls">
<button id="play" type="button" aria-pressed="false">Play</button>
<input id="at" type="range" min="0" value="0" step="1" aria-label="Frame">
<label>Frames a second <select id="rate"></select></label>
<output id="where" for="at"></output>
</div>
<div id="stage"></div>
<div id="key"><span id="low"></span><div id="bar" role="img"></div><span id="high"></span>
<span>response</span></div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const [count, maps, rows, cols] = data.shape;
const codes = Uint8Array.from(atob(data.codes), c => c.charCodeAt(0));
const colors = new Uint32Array(256);
const little = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
data.palette.forEach(([r, g, b], k) => {
  colors[k] = little ? (255 << 24 | b << 16 | g << 8 | r) >>> 0
                     : (r << 24 | g << 16 | b << 8 | 255) >>> 0;
});
const get = id => document.getElementById(id);
const stage = get("stage"), slider = get("at"), play = get("play"), rate = get("rate");

function panel(parent, caption, width, height, words) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const below = document.createElement("figcaption");
  canvas.width = width; canvas.height = height;
  canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", words);
  below.textContent = caption;
  figure.append(canvas, below); parent.append(figure);
  return canvas.getContext("2d");
}

let shown = null, picture = null;
if (data.image) {
  const side = document.createElement("div");
  side.id = "shown"; stage.append(side);
  picture = new Image();
  picture.onload = () => {
    shown = panel(side, "image as shifted", picture.width, picture.height, "The shifted image");
    draw();
  };
  picture.src = data.image;
}
const grid = document.createElement("div");
grid.id = "maps"; if (maps === 1) grid.className = "one";
stage.append(grid);
const panels = data.maps.map(n =>
  panel(grid, `map ${n}`, cols, rows, `Response of feature map ${n} on the patch grid`));
const cells = panels.map(context => context.createImageData(cols, rows));
const words = cells.map(cell => new Uint32Array(cell.data.buffer));

get("low").textContent = data.low; get("high").textContent = data.high;
get("bar").style.background = "linear-gradient(to right, " +
  data.palette.filter((_, k) => k % 16 === 0).map(c => `rgb(${c})`).join(", ") + ")";
get("bar").setAttribute("aria-label", `Colours from ${data.low} to ${data.high}`);
const rates = [...new Set([1, 2, 5, 10, 15, 30, 60, data.rate])].sort((a, b) => a - b);
for (const r of rates) rate.add(new Option(r, r, r === data.rate, r === data.rate));
slider.max = count - 1;

let at = 0, playing = false, last = 0, drawn = 0;
function draw() {
  const size = rows * cols;
  for (let m = 0; m < maps; m++) {
    const from = (at * maps + m) * size, into = words[m];
    for (let k = 0; k < size; k++) into[k] = colors[codes[from + k]];
    panels[m].putImageData(cells[m], 0, 0);
  }
  const dy = data.offsets[0][at], dx = data.offsets[1][at];
  if (shown) {
    const w = picture.width, h = picture.height;
    const wrap = (a, n) => ((a % n) + n) % n;
    const x = wrap(dx / data.periods[1] * w, w), y = wrap(dy / data.periods[0] * h, h);
    shown.imageSmoothingEnabled = false;
    for (const left of [x, x - w])
      for (const top of [y, y - h]) shown.drawImage(picture, left, top);
  }
  const where = `${at + 1} of ${count}: down ${dy} px, right ${dx} px`;
  get("where").textContent = where;
  slider.value = at; slider.setAttribute("aria-valuetext", "frame " + where);
  document.body.dataset.frame = at; document.body.dataset.drawn = ++drawn;
}
function step(now) {
  if (!playing) return;
  const wait = 1000 / Number(rate.value);
  if (now - last >= wait) {
    // on time on average; after a pause of the page, from now
    last = now - last > 4 * wait ? now : last + wait;
    at = (at + 1) % count; draw();
  }
  requestAnimationFrame(step);
}
play.addEventListener("click", () => {
  playing = !playing;
  play.textContent = playing ? "Pause" : "Play";
  play.setAttribute("aria-pressed", String(playing));
  last = performance.now();
  if (playing) requestAnimationFrame(step);
});
slider.addEventListener("input", () => { at = Number(slider.value); draw(); });
draw();
})();
</script>
</body>
</html>
"""

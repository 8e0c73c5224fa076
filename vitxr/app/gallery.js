// The images and how strongly each is responded to: buttons with a thumbnail and a bar.

const STYLE = `
.vx-gallery h3 { font-size: 14px; font-weight: 600; margin: 0 0 2px; }
.vx-gallery .about { font-size: 12px; color: var(--vx-soft, #555); margin: 0 0 6px; }
.vx-gallery ul { list-style: none; margin: 0; padding: 2px; display: grid; gap: 6px;
  grid-template-columns: repeat(auto-fill, minmax(var(--wide), 1fr)); max-height: var(--tall);
  overflow-y: auto; }
.vx-gallery button { display: block; width: 100%; padding: 4px; font: inherit; font-size: 11px;
  color: inherit; text-align: left; cursor: pointer; border-radius: 6px;
  border: 1px solid var(--vx-line, #ccc); background: var(--vx-card, #fff); }
.vx-gallery button[aria-pressed=true] { border-color: var(--vx-accent, #0072b2);
  box-shadow: inset 0 0 0 1px var(--vx-accent, #0072b2); }
.vx-gallery button:focus-visible { outline: 3px solid var(--vx-focus, #e69f00); }
.vx-gallery canvas { display: block; width: 100%; aspect-ratio: var(--ratio); image-rendering: pixelated;
  background: var(--vx-empty, #ddd); border-radius: 3px; }
.vx-gallery .name { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  padding-top: 3px; }
.vx-gallery .bar { display: block; height: 6px; border-radius: 3px; margin-top: 3px;
  background: var(--vx-empty, #ddd); overflow: hidden; }
.vx-gallery .bar i { display: block; height: 100%; background: var(--vx-accent, #0072b2); }
.vx-gallery .value { color: var(--vx-soft, #555); }`;

export function render({ model }) {
  const root = document.createElement("div");
  root.className = "vx-gallery";
  root.innerHTML = `<style>${STYLE}</style><h3></h3><p class="about"></p><ul></ul>`;
  const list = root.querySelector("ul");
  let items = [];

  function build() {
    root.querySelector("h3").textContent = model.title;
    const [height, width] = model.size, step = height * width * 4;
    root.style.setProperty("--ratio", `${width} / ${height}`);
    root.style.setProperty("--wide", `${model.tile}px`);
    root.style.setProperty("--tall", model.tall ? `${model.tall}px` : "none");
    list.setAttribute("aria-label", model.title);
    const bytes = new Uint8ClampedArray(model.thumbs);
    list.replaceChildren();
    items = model.names.map((name, i) => {
      const li = document.createElement("li"), b = document.createElement("button");
      b.type = "button"; b.title = name; b.dataset.name = name;
      b.innerHTML = `<canvas width="${width}" height="${height}" aria-hidden="true"></canvas>
        <span class="name"></span><span class="bar" aria-hidden="true"><i></i></span><span class="value"></span>`;
      b.querySelector(".name").textContent = name;
      if (bytes.length >= (i + 1) * step)
        b.querySelector("canvas").getContext("2d").putImageData(
          new ImageData(bytes.slice(i * step, (i + 1) * step), width, height), 0, 0);
      b.addEventListener("click", () => model.send_msg({ name }));
      li.append(b); list.append(li);
      return b;
    });
    fill(); mark();
  }
  function fill() {
    const values = new Float32Array(model.values), top = Math.max(0, ...values.filter(v => v === v));
    root.querySelector(".about").textContent = model.about;
    items.forEach((b, i) => {
      const v = values[i], known = v !== undefined && !Number.isNaN(v);
      b.querySelector(".bar").hidden = !values.length;
      b.querySelector(".bar").style.display = values.length ? "block" : "none";
      b.querySelector("i").style.width = known && top > 0 ? `${Math.max(0, v / top * 100)}%` : "0";
      b.querySelector(".value").textContent = known ? v.toPrecision(3) : "";
    });
    root.dataset.serial = model.serial;
  }
  function mark() {
    for (const b of items) b.setAttribute("aria-pressed", String(b.dataset.name === model.chosen));
  }
  model.on("names", build); model.on("thumbs", build);
  model.on("serial", fill);
  model.on("chosen", mark);
  build();
  return root;
}

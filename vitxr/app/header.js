// The head of the page: its title, tabs as a tab list, light and dark; and the page's own style.

const STYLE = `
.vx-head { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 18px; padding: 8px 16px;
  border-bottom: 1px solid var(--vx-line); background: var(--vx-card); }
.vx-head h1 { font-size: 16px; margin: 0; font-weight: 650; max-width: 100%; overflow-wrap: anywhere; }
.vx-head h1 small { font-weight: 400; color: var(--vx-soft); }
.vx-head [role=tablist] { display: flex; flex-wrap: wrap; gap: 2px; flex: 1 1 auto; }
.vx-head button { font: inherit; font-size: 14px; color: inherit; background: none; border: 0;
  border-radius: 6px; padding: 6px 11px; cursor: pointer; }
.vx-head button:hover { background: var(--vx-empty); }
.vx-head [role=tab][aria-selected=true] { background: var(--vx-accent); color: #fff; }
.vx-head button:focus-visible { outline: 3px solid var(--vx-focus); outline-offset: 1px; }
.vx-head .theme { border: 1px solid var(--vx-line); }
.vx-head .busy { font-size: 13px; color: var(--vx-soft); min-width: 6em; }
.vx-head .busy:not(:empty)::before { content: ""; display: inline-block; width: 10px; height: 10px;
  margin-right: 7px; border-radius: 50%; border: 2px solid var(--vx-accent);
  border-right-color: transparent; animation: vx-turn 0.8s linear infinite; }
@media (max-width: 1280px) {
  .vx-head .busy { margin-left: auto; }
  .vx-head .theme { order: 1; }
  .vx-head [role=tablist] { order: 2; flex-basis: 100%; }
}
@keyframes vx-turn { to { transform: rotate(1turn); } }
@media (prefers-reduced-motion: reduce) { .vx-head .busy::before { animation: none; } }`;

export function render({ model }) {
  let sheet = document.getElementById("vx-page");
  if (!sheet) {
    sheet = document.createElement("style");
    sheet.id = "vx-page"; document.head.append(sheet);
  }
  sheet.textContent = model.page_style;
  const root = document.createElement("header");
  root.className = "vx-head";
  root.innerHTML = `<style>${STYLE}</style><h1></h1><div role="tablist" aria-label="Views"></div>
    <span class="busy" role="status" aria-live="polite"></span><button type="button" class="theme"></button>`;
  const [name, what] = model.heading, h1 = root.querySelector("h1");
  h1.textContent = name + " ";
  const small = document.createElement("small");
  small.textContent = what; h1.append(small);
  const list = root.querySelector("[role=tablist]");
  const tabs = model.tabs.map(([key, label]) => {
    const b = document.createElement("button");
    b.type = "button"; b.textContent = label; b.dataset.key = key;
    b.setAttribute("role", "tab");
    b.addEventListener("click", () => { model.tab = key; });
    list.append(b);
    return b;
  });
  list.addEventListener("keydown", e => {
    const at = tabs.findIndex(b => b.dataset.key === model.tab), k = tabs.length;
    const to = { ArrowRight: (at + 1) % k, ArrowLeft: (at + k - 1) % k, Home: 0, End: k - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault(); model.tab = tabs[to].dataset.key; tabs[to].focus();
  });
  const mark = () => {
    for (const b of tabs) {
      const on = b.dataset.key === model.tab;
      b.setAttribute("aria-selected", String(on)); b.tabIndex = on ? 0 : -1;
    }
  };
  const button = root.querySelector(".theme");
  const paint = () => {
    document.documentElement.dataset.vx = model.theme;
    button.textContent = model.theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `Show the page in ${button.textContent.toLowerCase()} colours`);
  };
  button.addEventListener("click", () => { model.theme = model.theme === "dark" ? "light" : "dark"; });
  const work = () => { root.querySelector(".busy").textContent = model.busy; };
  model.on("tab", mark); model.on("theme", paint); model.on("busy", work);
  mark(); paint(); work();
  return root;
}

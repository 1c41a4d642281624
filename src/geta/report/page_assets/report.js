"use strict";
// Values under the pointer, the theme, copying, and the graph on request. Names are only ever set as text.

const byId = (id) => document.getElementById(id);
const charts = JSON.parse(byId("charts").textContent);
const tip = byId("tip");
const SVG = "http://www.w3.org/2000/svg";

function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

const shown = (value) => Math.abs(value) >= 1e4 ? value.toLocaleString("en-US", { maximumFractionDigits: 0 }) : String(Number(value.toPrecision(4)));

class Plot {
  constructor(svg) {
    this.svg = svg;
    this.data = charts[svg.dataset.chart];
    this.at = -1;
    const number = (key) => Number(svg.dataset[key]);
    Object.assign(this, { left: number("left"), right: number("right"), low: number("low"), high: number("high"), top: number("top"), bottom: number("bottom") });
    this.cursor = document.createElementNS(SVG, "line");
    this.cursor.setAttribute("class", "cursor");
    this.cursor.setAttribute("y1", this.top);
    this.cursor.setAttribute("y2", this.bottom);
    this.cursor.setAttribute("visibility", "hidden");
    svg.append(this.cursor);
    svg.addEventListener("pointermove", (event) => this.under(event));
    svg.addEventListener("pointerdown", (event) => this.under(event));
    svg.addEventListener("pointerleave", () => this.hide());
    svg.addEventListener("blur", () => this.hide());
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  place(x) { return this.left + (x - this.low) / (this.high - this.low) * (this.right - this.left); }

  under(event) {
    if (!this.data.x.length) return;
    const box = this.svg.getBoundingClientRect(), wide = this.svg.viewBox.baseVal.width;
    const wanted = (event.clientX - box.left) / box.width * wide;
    let best = 0;
    this.data.x.forEach((x, place) => { if (Math.abs(this.place(x) - wanted) < Math.abs(this.place(this.data.x[best]) - wanted)) best = place; });
    this.show(best, event.clientX, event.clientY);
  }

  key(event) {
    const last = this.data.x.length - 1, from = this.at < 0 ? last + 1 : this.at;
    const next = { ArrowLeft: from - 1, ArrowRight: this.at < 0 ? 0 : from + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.hide();
    if (next === undefined || last < 0) return;
    event.preventDefault();
    const place = Math.min(last, Math.max(0, next)), box = this.svg.getBoundingClientRect();
    this.show(place, box.left + this.place(this.data.x[place]) / this.svg.viewBox.baseVal.width * box.width, box.top + box.height / 2);
  }

  show(place, x, y) {
    this.at = place;
    const { data } = this, at = this.place(data.x[place]);
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    const name = data.names.length ? data.names[place] : `${data.xLabel} ${shown(data.x[place])}`;
    const rows = data.series.filter((series) => series.y[place] !== null).map((series) => {
      const key = make("span", `key ${series.style}`);
      return make("div", "", null, make("span", "", null, key, series.label), make("span", "", `${shown(series.y[place])} ${data.unit}`.trim()));
    });
    tip.replaceChildren(make("strong", "", data.stages[place] ? `${name}, ${data.stages[place]}` : name), ...rows);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
    tip.style.top = `${Math.max(6, y - box.height - 12)}px`;
  }

  hide() {
    this.at = -1;
    this.cursor.setAttribute("visibility", "hidden");
    tip.hidden = true;
  }
}

for (const svg of document.querySelectorAll("svg.plot")) new Plot(svg);

// What the tiles count: every button shows its panel and hides the others.
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    for (const panel of document.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== button.dataset.show;
  });
}

const THEMES = ["", "light", "dark"], KEY = "geta-theme";

function remembered(value) {
  try {
    if (value === undefined) return localStorage.getItem(KEY) || "";
    localStorage.setItem(KEY, value);
  } catch { /* a file without storage forgets */ }
  return value || "";
}

function setTheme(theme) {
  const button = byId("theme"), root = document.documentElement;
  if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
  button.textContent = { "": "Auto", light: "Light", dark: "Dark" }[theme];
  button.setAttribute("aria-label", `Colours: ${theme || "as the system has them"}`);
  const inside = document.querySelector("#graph-frame iframe")?.contentWindow;
  if (inside?.document?.documentElement) {
    if (theme) inside.document.documentElement.dataset.theme = theme; else delete inside.document.documentElement.dataset.theme;
    inside.dispatchEvent(new inside.Event("themechange"));
  }
}

setTheme(THEMES.includes(remembered()) ? remembered() : "");
byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % THEMES.length];
  remembered(next);
  setTheme(next);
});

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // without permission: the way of before
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const done = await copy(byId(button.dataset.copy).textContent);
    button.focus();
    button.textContent = done ? "Copied" : "Select and copy it yourself";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

// The graph is put together only when somebody asks for it, so that the report opens fast.
byId("open-graph")?.addEventListener("click", (event) => {
  const [before, after] = JSON.parse(byId("graph-shell").textContent), frame = make("iframe");
  frame.title = "Dependency graph";
  frame.srcdoc = before + byId("graph-data").textContent + after;
  frame.addEventListener("load", () => setTheme(document.documentElement.dataset.theme || ""));
  byId("graph-frame").append(frame);
  byId("graph-frame").hidden = false;
  event.currentTarget.remove();
  frame.focus();
});

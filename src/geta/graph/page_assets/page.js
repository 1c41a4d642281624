// Table, search and details. Every name comes from the user's model, so it is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const MOST_HITS = 40, MOST_MEMBERS = 150;

data.families.forEach((family, place) => { family.place = place; family.colour = -1; });
data.families.filter((family) => family.prunable).forEach((family, place) => { family.colour = place; });
data.nodes = data.nodes.map(([name, op, module, shapes, dtype, inputs, parameters, families, branch, x, y, column], place) => {
  const node = { place, name, op: data.texts[op], module: data.texts[module], shapes, dtype: data.texts[dtype], inputs, families, branch, x, y, column };
  node.parameters = parameters.map((text) => data.texts[text]);
  node.ends = node.op === "input" || node.op === "output";
  node.short = node.ends ? (node.op === "input" ? `input ${name}` : "output") : node.op.split("::").pop();
  node.caption = node.ends ? shapeText(node) : node.module || shapeText(node);
  node.colours = families.map((family) => data.families[family].colour).filter((colour) => colour >= 0);
  node.readers = [];
  node.words = [node.op, name, node.module, ...node.parameters, ...families.map((family) => data.families[family].name)].join("\n").toLowerCase();
  return node;
});
data.nodes.forEach((node) => node.inputs.forEach((source) => data.nodes[source].readers.push(node.place)));
data.families.forEach((family) => {
  family.members = family.members.map(([text, dim, rows, role, zero]) => ({ param: data.texts[text], dim, rows, role, zero }));
  family.words = [family.name, family.unit, family.reason, family.inexact, family.suggestion, ...family.members.map((m) => m.param)].join("\n").toLowerCase();
  family.nodes = [];
});
data.nodes.forEach((node) => node.families.forEach((family) => data.families[family].nodes.push(node.place)));

const state = { query: "", filter: "all", key: "", down: false, family: -1, node: -1 };

function shapeText(node) {
  const shown = node.shapes.slice(0, 3).map((shape) => (shape.length ? shape.join(" \u00d7 ") : "scalar")).join(", ");
  return node.shapes.length > 3 ? `${shown} and ${node.shapes.length - 3} more` : shown;
}

const count = (places) => `${number(places)} ${places === 1 ? "operator" : "operators"}`;

function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

// A path that may be broken after its dots.
function breakable(tag, path) {
  const element = make(tag);
  path.split(/(?<=\.)/).forEach((part, place) => element.append(...(place ? [make("wbr"), part] : [part])));
  return element;
}

function link(text, act) {
  const button = make("button", "link", text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

function chip(family) {
  const mark = make("span", family.prunable ? "chip" : "chip stuck");
  if (family.prunable) {
    mark.dataset.colour = family.colour;
    mark.style.setProperty("--chip", familyColour(family.colour));
  }
  mark.setAttribute("aria-hidden", "true");
  return mark;
}

function pill(family) {
  if (!family.prunable) return make("span", "pill", "no");
  return family.inexact ? make("span", "pill warn", "inexactly") : make("span", "pill yes", "yes");
}

function showHead() {
  byId("model").textContent = data.model;
  const prunable = data.families.filter((family) => family.prunable).length, share = Math.round(data.share * 100);
  const tiles = [
    ["parameters", number(data.parameters)],
    ["operators", number(data.operators)],
    ["prunable groups", number(data.groups)],
    ["families prunable", `${number(prunable)} of ${number(data.families.length)}`],
    ["of parameters in tensors that can shrink", `${share}%`],
    ["removal", data.exact ? "exact" : "inexact allowed"],
  ];
  for (const [word, value] of tiles) {
    const tile = make("div", "", null, make("dt", "", word), make("dd", "", value));
    if (value.endsWith("%")) {
      const bar = make("i");
      bar.style.width = value;
      tile.querySelector("dt").append(make("span", "meter", null, bar));
    }
    byId("tiles").append(tile);
  }
  if (data.notes.length) {
    const notes = byId("notes");
    notes.hidden = false;
    notes.querySelector("summary").textContent = data.notes.length === 1 ? "1 note" : `${data.notes.length} notes`;
    notes.querySelector("ul").append(...data.notes.map((note) => make("li", "", note)));
  }
  for (const entry of document.querySelectorAll("#legend li[data-branch]")) {
    entry.hidden = !data.nodes.some((node) => String(node.branch) === entry.dataset.branch);
  }
}

function makeRow(family) {
  const pick = make("button", "pick", null, chip(family), breakable("span", family.name));
  pick.type = "button";
  pick.setAttribute("aria-pressed", "false");
  const verdict = family.prunable ? (family.inexact ? `inexactly: it ${family.inexact}` : "") : `stays: it ${family.reason}`;
  const share = data.parameters ? (100 * family.touched) / data.parameters : 0;
  const row = make("tbody", "", null, make("tr", "", null, make("td", "", null, pick),
    make("td", "number", number(family.size), make("small", "", family.unit)),
    make("td", "number wide", number(family.members.length)),
    make("td", "number", number(family.touched), make("small", "", `${share >= 10 || share === 0 ? share.toFixed(0) : share.toFixed(1)}%`)),
    make("td", "wide", null, pill(family))));
  if (verdict || family.suggestion) {
    const why = make("td", "verdict", verdict);
    why.colSpan = 5;
    if (family.suggestion) why.append(make("div", "hint", family.suggestion));
    row.append(make("tr", "", null, why));
  }
  row.dataset.family = family.place;
  row.addEventListener("click", () => chooseFamily(state.family === family.place ? -1 : family.place));
  return row;
}

const rows = data.families.map(makeRow);

function sortRows() {
  const value = { name: (f) => f.name, size: (f) => f.size, members: (f) => f.members.length, touched: (f) => f.touched, prunable: (f) => (f.prunable ? (f.inexact ? 1 : 2) : 0) }[state.key];
  const order = [...data.families];
  if (value) {
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    order.sort((a, b) => (state.down ? -1 : 1) * compare(value(a), value(b)) || a.place - b.place);
  }
  byId("families").append(...order.map((family) => rows[family.place]));
  for (const button of document.querySelectorAll("th button")) {
    const own = button.dataset.key === state.key;
    button.parentElement.setAttribute("aria-sort", own ? (state.down ? "descending" : "ascending") : "none");
  }
}

function update() {
  const query = state.query.trim().toLowerCase();
  let shown = 0;
  data.families.forEach((family, place) => {
    const fits = (state.filter === "all" || (state.filter === "yes") === family.prunable) && family.words.includes(query);
    rows[place].hidden = !fits;
    rows[place].classList.toggle("chosen", place === state.family);
    rows[place].querySelector(".pick").setAttribute("aria-pressed", String(place === state.family));
    shown += fits ? 1 : 0;
  });
  byId("no-families").hidden = shown > 0;
  const family = state.family < 0 ? null : data.families[state.family];
  const hits = query ? data.nodes.filter((node) => node.words.includes(query)) : [];
  let lit = null;
  if (family ? family.nodes.length : query) {  // a family that runs through no operator dims nothing
    lit = new Uint8Array(data.nodes.length);
    for (const place of family ? family.nodes : hits.map((node) => node.place)) lit[place] = 1;
  }
  showHits(query, hits);
  const counts = `${number(shown)} of ${number(data.families.length)} families`;
  const operators = family ? `; in ${count(family.nodes.length)}: ${family.name}` : query ? `; ${count(hits.length)} found` : "";
  byId("status").textContent = counts + operators;
  drawing.show(lit, state.node);
  return hits;
}

function showHits(query, hits) {
  byId("hits-block").hidden = !hits.length;
  byId("hits").replaceChildren(...hits.slice(0, MOST_HITS).map((node) => {
    const button = make("button", "", null, make("strong", "", node.short), make("span", "where", node.module || node.name));
    button.type = "button";
    button.addEventListener("click", () => chooseNode(node.place, true));
    return make("li", "", null, button);
  }));
  if (hits.length > MOST_HITS) byId("hits").append(make("li", "more", `and ${number(hits.length - MOST_HITS)} more; all are highlighted in the graph`));
}

function chooseFamily(place) {
  state.family = place;
  state.node = -1;
  update();
  showDetails();
  if (place >= 0) drawing.frame(data.families[place].nodes);
}

function chooseNode(place, centre) {
  state.node = place;
  update();
  showDetails();
  if (place >= 0 && centre) drawing.centre(place);
}

function showDetails() {
  const panel = byId("details"), node = data.nodes[state.node], family = data.families[state.family];
  panel.hidden = !node && !family;
  if (panel.hidden) {
    panel.replaceChildren();
    drawing.reserve(0, 0);
    return;
  }
  const close = make("button", "close", "\u00d7");
  close.type = "button";
  close.setAttribute("aria-label", "Close details");
  close.addEventListener("click", () => (state.node >= 0 ? chooseNode(-1, false) : chooseFamily(-1)));
  const head = make("header", "", null, breakable("h3", node ? node.short : family.name), close);
  panel.replaceChildren(head, ...(node ? nodeDetails(node) : familyDetails(family)));
  panel.scrollTop = 0;
  const paper = byId("drawing").getBoundingClientRect(), narrow = matchMedia("(max-width: 860px)").matches;
  drawing.reserve(narrow ? 0 : panel.offsetWidth + 12, narrow ? Math.max(0, Math.min(paper.height / 2, paper.bottom - panel.getBoundingClientRect().top)) : 0);
}

function facts(pairs) {
  const list = make("dl");
  for (const [word, value] of pairs) {
    if (value === "" || value === null || (Array.isArray(value) && !value.length)) continue;
    list.append(make("dt", "", word), Array.isArray(value) ? make("dd", "", null, ...value.map((item) => make("div", "", null, item))) : make("dd", "", value));
  }
  return list;
}

function nodeLink(place) {
  const node = data.nodes[place];
  return link(node.ends ? node.short : `${node.short} \u00b7 ${node.module || node.name}`, () => chooseNode(place, true));
}

function few(links, most = 30) {
  return links.length > most ? [...links.slice(0, most), make("span", "", `and ${links.length - most} more`)] : links;
}

function nodeDetails(node) {
  const branch = ["", "quantizer of a parameter: an attached branch", "quantizer of an activation: an inserted branch"][node.branch];
  const families = node.families.map((place) => {
    const family = data.families[place];
    return make("span", "", null, chip(family), link(`${family.name} (${number(family.size)} ${family.unit})`, () => chooseFamily(place)));
  });
  return [facts([
    ["operator", node.ends ? `model ${node.op}` : [make("code", "", node.op)]],
    ["role", branch],
    ["module", node.ends ? "" : node.module ? [make("code", "", node.module)] : "the model itself"],
    ["node", [make("code", "", node.name)]],
    ["shape", shapeText(node)],
    ["type", node.dtype],
    ["reads", node.parameters.map((name) => make("code", "", name))],
    ["families", families.length ? few(families) : "none"],
    ["from", few(node.inputs.map(nodeLink))],
    ["to", few(node.readers.map(nodeLink))],
  ])];
}

function familyDetails(family) {
  const verdict = family.prunable ? (family.inexact ? `yes, inexactly: it ${family.inexact}` : "yes") : `no: it ${family.reason}`;
  const parts = [facts([
    ["groups", `${number(family.size)} ${family.unit}`],
    ["prunable", verdict],
    ["suggestion", family.suggestion],
    ["parameters", number(family.touched)],
    ["operators", family.nodes.length ? few(family.nodes.slice(0, 8).map(nodeLink)).concat(family.nodes.length > 8 ? [make("span", "", `and ${number(family.nodes.length - 8)} more`)] : []) : "none"],
  ]), make("h4", "", `What one group owns (${number(family.members.length)})`)];
  for (const member of family.members.slice(0, MOST_MEMBERS)) {
    const slices = `${number(member.rows)} ${member.rows === 1 ? "index" : "indices"} of dim ${member.dim}, ${member.role}${member.zero ? ", zeroed" : ""}`;
    parts.push(make("div", "member", null, make("code", "", member.param), make("div", "verdictless", slices)));
  }
  if (family.members.length > MOST_MEMBERS) parts.push(make("p", "", `and ${number(family.members.length - MOST_MEMBERS)} more`));
  return parts;
}

function walk(node, key) {
  const beside = (step) => {
    const row = data.nodes.filter((other) => other.column === node.column && other.y === node.y).sort((a, b) => a.x - b.x);
    return row[row.indexOf(node) + step]?.place;
  };
  return { ArrowUp: () => node.inputs[0], ArrowDown: () => node.readers[0], ArrowLeft: () => beside(-1), ArrowRight: () => beside(1) }[key]();
}

function clearAll() {
  Object.assign(state, { query: "", family: -1, node: -1 });
  byId("search").value = "";
  update();
  showDetails();
}

const drawing = new Drawing(byId("drawing"), data, (place) => chooseNode(place, false));

byId("search").addEventListener("input", (event) => {
  state.query = event.target.value;
  state.family = -1;
  state.node = -1;
  const hits = update();
  showDetails();
  if (hits.length) drawing.frame(hits.map((node) => node.place));
});
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") byId("hits").querySelector("button")?.click();
});
byId("filter").addEventListener("change", (event) => { state.filter = event.target.value; update(); });
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const key = button.dataset.key, again = state.key === key;
    Object.assign(state, { key, down: again ? !state.down : key !== "name" });
    sortRows();
  });
}
byId("zoom-in").addEventListener("click", () => drawing.zoom(1.4));
byId("zoom-out").addEventListener("click", () => drawing.zoom(1 / 1.4));
byId("zoom-fit").addEventListener("click", () => drawing.fit());
byId("clear").addEventListener("click", clearAll);
byId("drawing").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (step && state.node >= 0) {
    const next = walk(data.nodes[state.node], event.key);
    if (next !== undefined) chooseNode(next, true);
  } else if (step) drawing.pan(...step);
  else if (event.key === "+" || event.key === "=") drawing.zoom(1.4);
  else if (event.key === "-") drawing.zoom(1 / 1.4);
  else if (event.key === "0") drawing.fit();
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") clearAll(); });
onTheme(() => {
  for (const mark of document.querySelectorAll(".chip[data-colour]")) mark.style.setProperty("--chip", familyColour(Number(mark.dataset.colour)));
});
showHead();
sortRows();
update();

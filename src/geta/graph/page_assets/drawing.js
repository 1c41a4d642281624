"use strict";
// The drawing: a canvas with pan and zoom. Only what is in view is drawn, and text only where it can be read.

const BOX_W = 172, BOX_H = 42, ROW_H = 62;
const LABEL_FONT = "600 11px system-ui, sans-serif";
const ATTACHED = 1, INSERTED = 2;

// A page that shows this one in a frame may set a theme of its own.
function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function onTheme(act) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", act);
  addEventListener("themechange", act);
}

// Neighbouring numbers get far-apart hues; three tones tell apart what the golden angle brings near again.
function familyColour(place, dark = isDark()) {
  const hue = (205 + place * 137.508) % 360, tone = Math.floor(place / 12) % 3;
  return `hsl(${hue.toFixed(1)} 62% ${(dark ? [64, 74, 54] : [43, 33, 54])[tone]}%)`;
}

class Drawing {
  constructor(canvas, data, onPick) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.nodes = data.nodes;
    this.bands = data.bands;
    this.gutters = data.gutters;
    this.onPick = onPick;
    this.lit = null;         // null = nothing is dimmed; else one flag per node
    this.chosen = -1;
    this.hover = -1;
    this.view = { x: 0, y: 0, k: 1 };
    this.pointers = new Map();
    this.waiting = false;
    this.fitted = true;
    this.free = { right: 0, bottom: 0 };  // what the details panel covers
    this.box = this.extent();
    this.edges = this.makeEdges();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
    onTheme(() => { this.readColours(); this.redraw(); });
    this.readColours();
    this.resize();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    this.colour = {};
    const dark = isDark();
    for (const node of this.nodes) node.paints = node.colours.slice(0, 4).map((place) => familyColour(place, dark));
    for (const name of ["page", "surface", "line", "ink", "soft", "faint", "accent", "stuck"]) this.colour[name] = style.getPropertyValue(`--${name}`).trim();
  }

  extent() {
    let left = Infinity, top = Infinity, right = -Infinity, bottom = -Infinity;
    for (const node of this.nodes) {
      left = Math.min(left, node.x); right = Math.max(right, node.x);
      top = Math.min(top, node.y); bottom = Math.max(bottom, node.y);
    }
    if (!this.nodes.length) return { left: 0, top: 0, right: 1, bottom: 1 };
    return { left: left - BOX_W * 0.6, top: top - BOX_H, right: right + BOX_W * 0.8, bottom: bottom + BOX_H };
  }

  // Control points of every edge: straight down, round the boxes in between, or through the strip beside a column.
  makeEdges() {
    const edges = [];
    this.nodes.forEach((node, to) => node.inputs.forEach((from) => {
      const source = this.nodes[from], y0 = source.y + BOX_H / 2, y1 = node.y - BOX_H / 2;
      const edge = { from, to, dashed: source.branch === ATTACHED };
      if (source.column !== node.column) {
        const strip = this.gutters[node.column];
        const down = y1 > y0 + 80 ? 1 : -1, a = y0 + 30 * down, b = y1 - 30 * down;
        edge.points = [source.x, y0, source.x, y0 + 34, strip, y0 + (down > 0 ? 0 : 34), strip, a, strip, a, strip, b, strip, b, strip, y1 - (down > 0 ? 0 : 34), node.x, y1 - 34, node.x, y1];
      } else if (node.y - source.y > 1.5 * ROW_H) {
        const out = Math.max(source.x, node.x) + BOX_W * (0.62 + Math.min(0.5, (node.y - source.y) / ROW_H * 0.03));
        edge.points = [source.x, y0, out, y0 + 14, out, y1 - 14, node.x, y1];
      } else {
        const bend = Math.max(8, (y1 - y0) / 2);
        edge.points = [source.x, y0, source.x, y0 + bend, node.x, y1 - bend, node.x, y1];
      }
      const xs = edge.points.filter((_, place) => place % 2 === 0), ys = edge.points.filter((_, place) => place % 2 === 1);
      Object.assign(edge, { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) });
      edges.push(edge);
    }));
    return edges;
  }

  resize() {
    const size = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    this.width = size.width; this.height = size.height; this.ratio = ratio;
    this.canvas.width = Math.round(size.width * ratio);
    this.canvas.height = Math.round(size.height * ratio);
    if (this.fitted) this.fit(); else this.draw();
  }

  fit() {
    const wide = this.box.right - this.box.left, tall = this.box.bottom - this.box.top;
    const labels = Math.min(this.labelRoom(), this.width / 4), toolbar = 48;  // labels keep their size, whatever the zoom
    const k = Math.min(1, (this.width - labels) / wide, (this.height - toolbar) / tall);
    this.view = { k, x: (this.width + labels) / 2 - k * (this.box.left + wide / 2), y: (this.height + toolbar) / 2 - k * (this.box.top + tall / 2) };
    this.fitted = true;
    this.redraw();
  }

  // What the labels of the first column need, in pixels of the screen.
  labelRoom() {
    this.context.font = LABEL_FONT;
    const first = this.bands.filter((band) => band[1] < this.box.left + 2 * BOX_W);
    return first.reduce((room, [label]) => Math.max(room, this.context.measureText(label).width + 12), 0);
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const k = Math.min(3, Math.max(0.01, this.view.k * factor)), change = k / this.view.k;
    this.view = { k, x: x - (x - this.view.x) * change, y: y - (y - this.view.y) * change };
    this.fitted = false;
    this.redraw();
  }

  pan(dx, dy) {
    this.view.x += dx; this.view.y += dy;
    this.fitted = false;
    this.redraw();
  }

  reserve(right, bottom) { this.free = { right, bottom }; }

  centre(place) {
    const node = this.nodes[place];
    this.view.k = Math.max(this.view.k, 0.8);
    this.view.x = (this.width - this.free.right) / 2 - node.x * this.view.k;
    this.view.y = (this.height - this.free.bottom) / 2 - node.y * this.view.k;
    this.fitted = false;
    this.redraw();
  }

  // Bring a set of operators into view, but never closer than life size.
  frame(places) {
    const chosen = places.map((place) => this.nodes[place]);
    if (!chosen.length) return;
    const xs = chosen.map((node) => node.x), ys = chosen.map((node) => node.y);
    const left = xs.reduce((a, b) => Math.min(a, b)) - BOX_W, right = xs.reduce((a, b) => Math.max(a, b)) + BOX_W;
    const top = ys.reduce((a, b) => Math.min(a, b)) - 2 * BOX_H, bottom = ys.reduce((a, b) => Math.max(a, b)) + 2 * BOX_H;
    const width = this.width - this.free.right, height = this.height - this.free.bottom;
    const k = Math.min(1, width / (right - left), height / (bottom - top));
    this.view = { k, x: width / 2 - k * (left + right) / 2, y: height / 2 - k * (top + bottom) / 2 };
    this.fitted = false;
    this.redraw();
  }

  show(lit, chosen) {
    this.lit = lit; this.chosen = chosen;
    this.redraw();
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const c = this.context, { x, y, k } = this.view;
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.fillStyle = this.colour.page;
    c.fillRect(0, 0, this.width, this.height);
    c.translate(x, y);
    c.scale(k, k);
    const seen = { left: -x / k, top: -y / k, right: (this.width - x) / k, bottom: (this.height - y) / k };
    this.drawBands(seen);
    this.drawEdges(seen);
    for (let place = 0; place < this.nodes.length; place++) {
      const node = this.nodes[place];
      if (node.x + BOX_W < seen.left || node.x - BOX_W > seen.right || node.y + BOX_H < seen.top || node.y - BOX_H > seen.bottom) continue;
      this.drawNode(node, place);
    }
    c.globalAlpha = 1;
    this.drawBandLabels(seen);
  }

  drawBands(seen) {
    const c = this.context;
    this.bands.forEach(([, left, top, right, bottom]) => {
      if (right < seen.left || left > seen.right || bottom < seen.top || top > seen.bottom) return;
      c.fillStyle = this.colour.surface;
      c.globalAlpha = 0.75;
      c.beginPath();
      c.roundRect(left - 4, top + 2, right - left + 8, bottom - top - 4, 10);
      c.fill();
      c.globalAlpha = 1;
      c.strokeStyle = this.colour.line;
      c.lineWidth = Math.min(1 / this.view.k, 6);
      c.stroke();
    });
  }

  // Labels keep their size on the screen; one that would run into a neighbour's band is left out.
  drawBandLabels(seen) {
    const c = this.context, k = this.view.k;
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.font = LABEL_FONT;
    c.textBaseline = "top";
    const taken = [], around = this.bands.filter((b) => b[3] > seen.left - 200 / k && b[1] < seen.right && b[4] > seen.top && b[2] < seen.bottom);
    for (const [label, left, top, right, bottom] of around) {
      if (right < seen.left || (bottom - top) * k < 13) continue;
      const width = c.measureText(label).width + 8, y = Math.max(top * k + this.view.y + 4, 4), beside = left * k + this.view.x - width - 6;
      const free = ([x0, y0, x1, y1]) => !taken.some((t) => t[0] < x1 && x0 < t[2] && t[1] < y1 && y0 < t[3]);
      const clear = (x) => !around.some((b) => b[1] * k < x + width - this.view.x && (x - this.view.x) < b[3] * k && b[2] * k < y + 14 - this.view.y && y - this.view.y < b[4] * k);
      const x = clear(beside) ? beside : left * k + this.view.x + 1;
      const area = [x, y, x + width, y + 14];
      if (y + 14 > bottom * k + this.view.y || (x !== beside && (k * BOX_W > 60 || k * BOX_W < 26)) || !free(area)) continue;
      taken.push(area);
      c.globalAlpha = 0.85;
      c.fillStyle = this.colour.page;
      c.fillRect(x, y, width, 14);
      c.globalAlpha = 1;
      c.fillStyle = this.colour.soft;
      c.fillText(label, x + 4, y + 2);
    }
  }

  isLit(place) { return this.lit === null || this.lit[place] === 1; }

  drawEdges(seen) {
    const c = this.context, width = Math.max(1.2, 0.7 / this.view.k), groups = { faint: [], plain: [], dashed: [], strong: [] };
    for (const edge of this.edges) {
      if (edge.right < seen.left || edge.left > seen.right || edge.bottom < seen.top || edge.top > seen.bottom) continue;
      const near = edge.from === this.chosen || edge.to === this.chosen;
      const bright = this.isLit(edge.from) && this.isLit(edge.to);
      groups[near ? "strong" : !bright ? "faint" : edge.dashed ? "dashed" : "plain"].push(edge);
    }
    const stroke = (edges, colour, alpha, line, dash) => {
      c.strokeStyle = colour; c.globalAlpha = alpha; c.lineWidth = line; c.setLineDash(dash);
      c.beginPath();
      for (const { points: p } of edges) {
        c.moveTo(p[0], p[1]);
        if (this.view.k < 0.15) for (let at = 6; at < p.length; at += 6) c.lineTo(p[at], p[at + 1]);
        else for (let at = 2; at < p.length; at += 6) c.bezierCurveTo(p[at], p[at + 1], p[at + 2], p[at + 3], p[at + 4], p[at + 5]);
      }
      c.stroke();
      c.setLineDash([]);
    };
    stroke(groups.faint, this.colour.faint, 0.16, width, []);
    stroke(groups.plain, this.colour.faint, 0.75, width, []);
    stroke(groups.dashed, this.colour.faint, 0.9, width, [4, 3]);
    stroke(groups.strong, this.colour.accent, 1, width * 1.8, []);
    c.globalAlpha = 1;
  }

  outline(node) {
    const c = this.context, x = node.x - BOX_W / 2, y = node.y - BOX_H / 2, nip = 14;
    c.beginPath();
    if (node.branch === INSERTED) {
      c.moveTo(x + nip, y); c.lineTo(x + BOX_W - nip, y); c.lineTo(x + BOX_W, node.y);
      c.lineTo(x + BOX_W - nip, y + BOX_H); c.lineTo(x + nip, y + BOX_H); c.lineTo(x, node.y);
      c.closePath();
    } else {
      c.roundRect(x, y, BOX_W, BOX_H, node.branch === ATTACHED || node.ends ? BOX_H / 2 : 6);
    }
  }

  drawNode(node, place) {
    const c = this.context, k = this.view.k, x = node.x - BOX_W / 2, y = node.y - BOX_H / 2, lit = this.isLit(place);
    const strip = node.paints[0] ?? (node.families.length ? this.colour.stuck : null);
    const readable = BOX_W * k > 60;
    c.globalAlpha = lit ? 1 : 0.2;
    c.fillStyle = node.ends ? this.colour.ink : readable ? this.colour.surface : strip ?? this.colour.line;
    if (BOX_W * k < 26 && place !== this.chosen && place !== this.hover) {
      c.fillRect(x, y, BOX_W, BOX_H);
      return;
    }
    this.outline(node);
    c.fill();
    if (readable && strip && !node.ends) {
      c.save();
      c.clip();
      c.globalAlpha *= 0.17;
      c.fillStyle = strip;
      c.fillRect(x, y, BOX_W, BOX_H);
      this.drawStrips(node, x, y, strip, lit);
      c.restore();
      this.outline(node);
    }
    c.globalAlpha = lit ? 1 : 0.2;
    c.setLineDash(node.branch === ATTACHED ? [5, 3] : []);
    c.strokeStyle = node.branch ? this.colour.ink : strip || this.colour.faint;
    c.lineWidth = node.branch === INSERTED ? 2.2 : node.branch === ATTACHED ? 1.6 : 1;
    if (readable || node.branch) c.stroke();
    c.setLineDash([]);
    if (place === this.chosen || place === this.hover) {
      c.globalAlpha = 1;
      c.strokeStyle = this.colour.accent;
      c.lineWidth = Math.max(2.5, (place === this.chosen ? 2.5 : 1.5) / k);
      c.stroke();
    }
    if (readable) this.drawText(node, x, y);
  }

  // One upright strip for each of the first families, so that a node between several shows them all.
  drawStrips(node, x, y, strip, lit) {
    const c = this.context, colours = node.paints.length ? node.paints : [strip];
    c.globalAlpha = lit ? 1 : 0.2;
    colours.forEach((colour, number) => {
      c.fillStyle = colour;
      c.fillRect(x + number * 6 + (node.branch === INSERTED ? 9 : 0), y, 5, BOX_H);
    });
  }

  drawText(node, x, y) {
    const c = this.context, inset = node.ends ? 20 : node.branch === INSERTED ? 16 + 6 * Math.min(4, Math.max(0, node.colours.length)) : 10 + 6 * Math.min(4, Math.max(1, node.colours.length));
    const room = BOX_W - inset - (node.branch === INSERTED ? 18 : 8);
    c.textBaseline = "alphabetic";
    c.fillStyle = node.ends ? this.colour.surface : this.colour.ink;
    c.font = "600 12px system-ui, sans-serif";
    c.fillText(fitText(c, node.short, room, false), x + inset, y + 17);
    c.fillStyle = node.ends ? this.colour.surface : this.colour.soft;
    c.font = "11px system-ui, sans-serif";
    c.fillText(fitText(c, node.caption, room, true), x + inset, y + 32);
  }

  at(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect(), { x, y, k } = this.view;
    const px = (clientX - box.left - x) / k, py = (clientY - box.top - y) / k;
    return this.nodes.findIndex((node) => Math.abs(node.x - px) <= BOX_W / 2 && Math.abs(node.y - py) <= BOX_H / 2);
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect(), step = event.deltaMode === 1 ? event.deltaY * 16 : event.deltaY;
      this.zoom(Math.exp(-step * 0.0016), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      this.moved = this.pointers.size > 1 ? Infinity : 0;
    });
    canvas.addEventListener("pointermove", (event) => this.move(event));
    const up = (event) => {
      if (!this.pointers.delete(event.pointerId)) return;
      canvas.classList.remove("moving");
      if (event.type === "pointerup" && this.moved < 5) this.onPick(this.at(event.clientX, event.clientY));
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      const over = this.at(event.clientX, event.clientY);
      if (over !== this.hover) {
        this.hover = over;
        this.canvas.style.cursor = over >= 0 ? "pointer" : "";
        this.redraw();
      }
      return;
    }
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
    const box = this.canvas.getBoundingClientRect();
    if (others.length) {
      const far = (point) => Math.max(10, Math.hypot(point.x - others[0].x, point.y - others[0].y));
      this.zoom(far({ x: event.clientX, y: event.clientY }) / far(before), (event.clientX + others[0].x) / 2 - box.left, (event.clientY + others[0].y) / 2 - box.top);
    } else {
      this.moved += Math.abs(event.clientX - before.x) + Math.abs(event.clientY - before.y);
      this.canvas.classList.add("moving");
      this.pan(event.clientX - before.x, event.clientY - before.y);
    }
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  }
}

const fitted = new Map();

// Shortens at the end, or at the start for paths, whose end says most.
function fitText(context, text, room, fromStart) {
  const key = `${room}|${fromStart}|${text}`, known = fitted.get(key);
  if (known !== undefined) return known;
  let shown = text;
  for (let keep = text.length; keep > 1 && context.measureText(shown).width > room; keep--) {
    shown = fromStart ? `\u2026${text.slice(text.length - keep + 1)}` : `${text.slice(0, keep - 1)}\u2026`;
  }
  fitted.set(key, shown);
  return shown;
}

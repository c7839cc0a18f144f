// The heat map: units by steps of one gate or state, on a canvas; only the visible part is drawn.

import { behind, button, choice, make, numberBox, plural, replaceChildren, select, setChoices, shown, table } from "./dom.js";
import { Plane } from "./data.js";
import { clipped, colourBar, fitted, inkOn, LEFT, palette, RIGHT, scaleOf, ticks } from "./draw.js";
import { keepingOf } from "./formulas.js";
import { byLikeness, byNumber, bySize, halfLives, variances } from "./seriation.js";
import { paintTiles } from "./tiles.js";
import { isGate, meaningOf } from "./view.js";
import { Wave } from "./wave.js";

const LEAST_HALF = 2 ** -24; // above 0, of a float16
const MOST_HIGH = 440; // height of the map, at most
const ROW = 30; // height of a unit's row, at most
const LETTER = 7.4; // width of one in a table, about
const WIDEST = 150; // margin for names, at most
const ORDERS = [["number", "number"], ["memory", "memory length"], ["variance", "variance"], ["likeness", "similarity"]];

// The ranges where flags have a value: [from, to) pairs.
function runsOf(flags, value) {
  const runs = [];
  for (let at = 0; at < flags.length; at += 1) {
    if (Boolean(flags[at]) !== Boolean(value)) continue;
    const from = at;
    while (at < flags.length && Boolean(flags[at]) === Boolean(value)) at += 1;
    runs.push([from, at]);
  }
  return runs;
}

export class HeatMap {
  constructor(view) {
    this.view = view;
    this.plane = null;
    this.positions = byNumber(0); // the unit of each row
    this.rowHeight = 0; // in CSS pixels
    this.top = 0; // CSS pixels scrolled away above
    this.marking = false;
    this.hover = null;
    this.frames = 0;
    this.image = null;
    this.asked = 0;

    this.place = select("Layer", [], "", (key) => this.view.set({ place: this.view.places.find((one) => one.key === key), unit: 0 }));
    this.field = choice("Gate or state", (field) => this.view.set({ field }));
    this.order = select("Units by", ORDERS, "number", (order) => this.view.set({ order }));
    this.rows = select("Row", [], 0, (row) => this.view.set({ row: Number(row) }));
    this.shows = select("Show", [["after", "changed"], ["difference", "difference"], ["trace", "as traced"]], "trace", (shows) => this.view.set({ shows }));
    this.shows.element.hidden = true;
    this.stepBox = numberBox("Step", (text) => this.goToStep(text), { step: 1 });
    this.unitBox = numberBox("Unit", (text) => this.goToUnit(text), { step: 1 });
    this.mark = button("Mark a range", () => this.toggleMarking(), { "aria-pressed": "false", title: "Drag over the map afterwards, or drag with Shift" });
    this.unmark = button("Clear", () => this.view.set({ range: null, matches: [] }), { hidden: true, title: "Clear the marked range" });
    const zooms = make(
      "div",
      { class: "buttons", role: "group", "aria-label": "Zoom" },
      button("−", () => this.zoom(2), { "aria-label": "Zoom out", title: "Zoom out (−)" }),
      button("+", () => this.zoom(0.5), { "aria-label": "Zoom in", title: "Zoom in (+)" }),
      button("All", () => this.all(), { title: "Show all steps and units (0)" }),
      button("↕", () => this.taller(1.5), { "aria-label": "Taller rows", title: "Taller rows" }),
      this.mark,
      this.unmark,
    );
    this.about = make("p", { class: "about" });
    this.wave = new Wave(view);
    this.ruler = make("canvas", { class: "ruler", "aria-hidden": "true" });
    this.cells = make("canvas", { "aria-hidden": "true" });
    this.over = make("canvas", { "aria-hidden": "true" });
    this.stack = make("div", { class: "stack", tabindex: "0", role: "application", "aria-roledescription": "heat map" }, this.cells, this.over);
    this.whole = make("canvas", { class: "whole", "aria-hidden": "true" });
    this.readout = make("p", { class: "readout", role: "status", "aria-live": "polite" });
    this.legend = make("div", { class: "legend" });
    this.extremes = make("span", { class: "extent", hidden: true }, "several steps per pixel: the upper half of a row shows the largest value, the lower half the smallest");
    this.behind = behind("what is around the cursor", () => this.fillTable());
    this.element = make(
      "div",
      { class: "map" },
      make(
        "div",
        { class: "toolbar" },
        make("div", { class: "together" }, this.place.element, this.rows.element),
        this.field.element,
        make("div", { class: "together" }, this.order.element, this.stepBox.element, this.unitBox.element, this.shows.element),
      ),
      this.about,
      this.wave.element,
      this.ruler,
      this.stack,
      this.whole,
      make("div", { class: "under" }, this.readout, zooms),
      this.legend,
      this.behind.element,
    );
    this.listen();
    view.on((changed) => this.update(changed));
  }

  // ── content ────────────────────────────────────────────────────────────────────────────────────────────────────────

  async start() {
    const { view } = this;
    const { description } = view;
    setChoices(this.place.box, view.places.map((place) => [place.key, place.title]), view.place.key);
    setChoices(this.rows.box, description.row_numbers.map((_, n) => [n, view.rowTitle(n)]), view.row);
    this.rows.element.hidden = description.rows < 2;
    if (description.audio !== null) await this.wave.read();
    view.move(0, view.steps, this.plotWidth());
    new ResizeObserver(() => this.resized()).observe(this.stack);
    await this.load();
  }

  plotWidth() {
    return Math.max(50, this.stack.clientWidth - this.view.left - RIGHT);
  }

  resized() {
    const { from, span } = this.view.window;
    this.view.move(from, span, this.plotWidth());
    this.layOut();
    this.draw();
  }

  async update(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("place", "field", "row", "shows", "result", "order", "theme")) await this.load();
    else if (has("window", "step", "unit", "range", "matches")) this.draw();
    if (has("step", "unit", "place", "field", "row")) this.say();
  }

  // Read the selected numbers, and draw them.
  async load() {
    const { view } = this;
    const asked = (this.asked += 1);
    const plane = await view.plane();
    const positions = await this.sorted(plane);
    const mask = await view.mask(view.place);
    const resets = await view.resets(view.place);
    if (asked !== this.asked) return; // a newer request has started
    this.plane = plane;
    this.left = mask === null ? [] : runsOf(mask, 0); // masked steps
    this.resets = resets === null ? [] : runsOf(resets, 1);
    this.positions = positions;
    this.rowOf = new Int32Array(positions.length);
    positions.forEach((unit, row) => (this.rowOf[unit] = row));
    if (view.unit >= plane.units) view.set({ unit: 0 });
    this.place.box.value = view.place.key;
    this.order.box.value = view.order;
    this.shows.box.value = view.shows;
    this.shows.element.hidden = view.result === null;
    this.rows.box.value = String(view.row);
    const form = view.place.cell?.form;
    this.field.set(view.place.fields.map((field) => [field, field, meaningOf(form, field)]), view.field);
    const each = form?.heads ? (plane.units === form.heads ? "a head" : "a number of a head") : "a unit";
    this.about.textContent = `${view.field}: ${meaningOf(form, view.field)}. Each row is ${each}, each column a step.`;
    this.scale = scaleOf(view.shows !== "difference" && isGate(form, view.field), plane.range);
    this.layOut();
    this.setMargin();
    this.drawLegend();
    this.draw();
    this.say();
    this.fillTable();
  }

  // Set the margin: wider for names than for numbers.
  setMargin() {
    const { view } = this;
    this.names = view.namesOf(view.place, view.field);
    const pen = this.cells.getContext("2d");
    pen.font = "11px system-ui, sans-serif";
    const widest = Math.max(0, ...(this.names ?? []).slice(0, 1000).map((name) => pen.measureText(name).width));
    const left = Math.max(LEFT, Math.min(widest + 12, WIDEST, 0.3 * this.stack.clientWidth));
    if (left === view.left) return;
    view.left = left;
    view.move(view.window.from, view.window.span, this.plotWidth());
  }

  async sorted(plane) {
    const { view } = this;
    const { place, field } = view;
    if (view.order === "variance") return bySize(variances(plane));
    if (view.order === "likeness") return byLikeness(plane);
    const keeping = view.order === "memory" && place.kind === "cell" && field !== "x" ? keepingOf(place.cell.form) : null;
    if (keeping !== null) {
      const planes = await Promise.all(keeping.fields.map((name) => view.traced(place, name)));
      const [{ units, steps }] = planes;
      const share = (n) => keeping.of((name) => planes[keeping.fields.indexOf(name)].data[n])[0];
      const kept = new Plane(Float64Array.from({ length: units * steps }, (_, n) => share(n)), units, steps);
      if (units === plane.units) return bySize(halfLives(kept, keeping.kept, await view.mask(place), view.description.rounded === "float16" ? LEAST_HALF / 2 : 0));
    }
    return byNumber(plane.units);
  }

  // Set the height of the map and its rows.
  layOut() {
    if (this.plane === null) return;
    const { units } = this.plane;
    const high = Math.max(ROW, Math.min(MOST_HIGH, units * ROW));
    this.stack.style.height = `${high}px`;
    this.rowHeight = Math.max(this.rowHeight, high / Math.max(1, units));
    if (this.laidOut !== units) this.rowHeight = high / Math.max(1, units);
    this.laidOut = units;
    this.scrollTo(this.top);
  }

  scrollTo(top) {
    const all = this.rowHeight * (this.plane?.units ?? 0);
    this.top = Math.max(0, Math.min(top, all - this.stack.clientHeight));
  }

  taller(times) {
    const least = this.stack.clientHeight / Math.max(1, this.plane.units);
    const before = this.rowHeight;
    this.rowHeight = Math.max(least, Math.min(ROW, before * times));
    const row = this.rowOf[this.view.unit] ?? 0;
    this.scrollTo((row + 0.5) * this.rowHeight - this.stack.clientHeight / 2);
    this.draw();
  }

  zoom(times, at = null) {
    const { from, span } = this.view.window;
    const place = at ?? Math.max(from, Math.min(this.view.step + 0.5, from + span));
    const wide = span * times;
    this.view.move(place - ((place - from) / span) * wide, wide, this.plotWidth());
  }

  all() {
    this.rowHeight = 0;
    this.laidOut = -1;
    this.top = 0;
    this.layOut();
    this.view.move(0, this.view.steps, this.plotWidth());
    this.draw();
  }

  goToStep(text) {
    const { view } = this;
    const step = view.description.steps.indexOf(Number(text));
    if (text.trim() !== "" && step >= 0) {
      view.set({ step });
      view.follow();
    } else this.say();
  }

  goToUnit(text) {
    const { view } = this;
    const unit = this.positions.findIndex((one) => view.unitNumber(view.place, view.field, one) === Number(text));
    if (text.trim() !== "" && unit >= 0) {
      view.set({ unit: this.positions[unit] });
      this.reveal(unit);
      this.draw();
    } else this.say();
  }

  // Scroll to a row of the map.
  reveal(row) {
    const [above, below] = [row * this.rowHeight, (row + 1) * this.rowHeight];
    if (above < this.top) this.scrollTo(above);
    else if (below > this.top + this.stack.clientHeight) this.scrollTo(below - this.stack.clientHeight);
  }

  // ── drawing ────────────────────────────────────────────────────────────────────────────────────────────────────────

  // A plane whose number of steps differs from the run's is stretched to it.
  get stretch() {
    return this.plane.steps === this.view.steps || !this.view.steps ? 1 : this.plane.steps / this.view.steps;
  }

  draw() {
    if (this.plane === null || !this.stack.clientWidth) return;
    this.frames += 1;
    this.drawCells();
    this.drawOver();
    this.drawRuler();
    this.drawWhole();
    this.wave.draw();
    this.fillTable();
  }

  drawCells() {
    const { context: pen, width, height, ratio } = fitted(this.cells);
    const { view, plane, scale } = this;
    const left = Math.round(this.view.left * ratio);
    const wide = Math.max(1, width - left - Math.round(RIGHT * ratio));
    if (this.image === null || this.image.width !== wide || this.image.height !== height) {
      this.image = pen.createImageData(wide, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const { pixels } = this;
    pixels.fill(0);
    const colours = palette(scale.kind, view.theme);
    const times = 255 / (scale.high - scale.low || 1);
    const { from, span } = view.window;
    const { stretch } = this;
    const first = from * stretch;
    const perPixel = (span * stretch) / wide;
    const rowHeight = this.rowHeight * ratio;
    const offset = this.top * ratio;
    this.extremes.hidden = perPixel <= 1;
    const apart = 1 / perPixel >= 9 * ratio && rowHeight >= 9 * ratio; // large enough for gaps
    paintTiles(pixels, wide, height, { plane, positions: this.positions, first, perPixel, rowHeight, offset, scale, colours, apart });
    pen.clearRect(0, 0, width, height);
    pen.putImageData(this.image, left, 0);
    this.drawNumbers(pen, left, perPixel, first, rowHeight, offset, height, ratio, colours, times);
    this.drawUnitNumbers(pen, left, rowHeight, offset, height, ratio);
  }

  // Write the numbers where they fit.
  drawNumbers(pen, left, perPixel, first, rowHeight, offset, height, ratio, colours, times) {
    if (1 / perPixel < 44 * ratio || rowHeight < 15 * ratio) return;
    const { plane, scale } = this;
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    const from = Math.max(0, Math.floor(first));
    const to = Math.min(plane.steps, Math.ceil(first + (this.cells.width - left) * perPixel));
    for (let row = Math.floor(offset / rowHeight); row < plane.units && row * rowHeight - offset < height; row += 1) {
      for (let step = from; step < to; step += 1) {
        const value = plane.at(this.positions[row], step);
        const place = Math.max(0, Math.min(255, (value - scale.low) * times)) | 0;
        const x = left + (step + 0.5 - first) / perPixel;
        const y = (row + 0.5) * rowHeight - offset;
        const space = 1 / perPixel - 6 * ratio;
        const text = [3, 2, 1].map((digits) => shown(value, digits)).find((one) => pen.measureText(one).width <= space);
        if (text === undefined) continue;
        if (Number.isFinite(value)) pen.fillStyle = inkOn(colours[place]);
        else {
          pen.fillStyle = "#000";
          pen.fillRect(x - 18 * ratio, y - 8 * ratio, 36 * ratio, 16 * ratio);
          pen.fillStyle = "#fff";
        }
        pen.fillText(text, x, y);
      }
    }
  }

  drawUnitNumbers(pen, left, rowHeight, offset, height, ratio) {
    const { view, plane } = this;
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = view.colours.muted;
    const every = Math.max(1, Math.ceil((13 * ratio) / rowHeight));
    for (let row = Math.ceil(offset / rowHeight / every) * every; row < plane.units; row += every) {
      const y = (row + 0.5) * rowHeight - offset;
      if (y > height - 4 * ratio) break;
      const unit = this.positions[row];
      const text = this.names?.[unit] ?? String(view.unitNumber(view.place, view.field, unit));
      if (y >= 5 * ratio) pen.fillText(clipped(pen, text, left - 8 * ratio), left - 6 * ratio, y);
    }
  }

  // The cursor, the marked range, the matches and the chosen unit.
  drawOver() {
    const { context: pen, width, height, ratio } = fitted(this.over);
    const { view } = this;
    pen.clearRect(0, 0, width, height);
    const left = Math.round(this.view.left * ratio);
    const wide = width - left - Math.round(RIGHT * ratio);
    const across = (step) => left + ((step - view.window.from) / view.window.span) * wide;
    pen.save();
    pen.beginPath();
    pen.rect(left, 0, wide, height);
    pen.clip();
    for (const run of this.left) {
      const [a, b] = run.map((step) => across(step / this.stretch));
      if (b < left || a > left + wide) continue;
      pen.fillStyle = view.colours.ground;
      pen.globalAlpha = 0.8;
      pen.fillRect(a, 0, b - a, height);
      pen.globalAlpha = 1;
    }
    if (view.range !== null) {
      const [a, b] = view.range.map(across);
      pen.fillStyle = view.colours.veil;
      pen.fillRect(left, 0, a - left, height);
      pen.fillRect(b, 0, left + wide - b, height);
      pen.strokeStyle = view.colours.accent;
      pen.lineWidth = 2 * ratio;
      pen.strokeRect(a, 1, b - a, height - 2);
    }
    const row = this.rowOf[view.unit];
    if (row !== undefined) {
      const y = row * this.rowHeight * ratio - this.top * ratio;
      const high = Math.max(this.rowHeight * ratio, 3 * ratio);
      for (const [colour, size] of [[view.colours.ground, 3], [view.colours.cursor, 1.5]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = size * ratio;
        pen.strokeRect(left + ratio, y, Math.min(across(view.steps), left + wide) - left - 2 * ratio, high - (this.rowHeight > 9 ? ratio : 0));
      }
    }
    const [a, b] = [across(view.step), across(view.step + 1)];
    for (const [colour, size] of [[view.colours.ground, 3], [view.colours.cursor, 1.5]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = size * ratio;
      if (b - a > 6 * ratio) pen.strokeRect(a, 1, b - a - (b - a > 9 * ratio ? ratio : 0), height - 2);
      else {
        pen.beginPath();
        pen.moveTo((a + b) / 2, 0);
        pen.lineTo((a + b) / 2, height);
        pen.stroke();
      }
    }
    pen.restore();
  }

  drawRuler() {
    const { context: pen, width, height, ratio } = fitted(this.ruler);
    const { view } = this;
    pen.clearRect(0, 0, width, height);
    const left = this.view.left * ratio;
    const wide = width - left - RIGHT * ratio;
    const { from, span } = view.window;
    const perStep = wide / span;
    const across = (step) => left + (step - from) * perStep;
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.save();
    pen.beginPath();
    pen.rect(left - 10 * ratio, 0, wide + (10 + RIGHT) * ratio, height);
    pen.clip();
    for (const [a, b, row] of view.matches) {
      if (row !== view.row) continue;
      pen.fillStyle = view.colours.accent;
      pen.fillRect(across(a), height - 3 * ratio, Math.max(2, across(b) - across(a)), 3 * ratio);
    }
    pen.fillStyle = view.colours.warm;
    for (const [a, b] of this.resets) {
      for (let step = a; step < b; step += 1) {
        const x = across(step / this.stretch);
        pen.beginPath();
        pen.moveTo(x - 4 * ratio, height - 8 * ratio);
        pen.lineTo(x + 4 * ratio, height - 8 * ratio);
        pen.lineTo(x, height - 1);
        pen.fill();
      }
    }
    const numbered = view.labels.kind === null || view.labels.kind === "text";
    pen.fillStyle = view.colours.muted;
    const first = Math.max(0, Math.floor(from));
    const last = Math.min(view.steps - 1, Math.ceil(from + span) - 1);
    const gap = view.labels.kind === "date" ? 150 : 64;
    for (const step of ticks(first, Math.max(first, last), Math.max(2, wide / (gap * ratio)))) {
      if (step !== Math.round(step) || step > last) continue;
      const text = numbered ? String(view.description.steps[step]) : view.labels.short(view.row, step);
      const half = pen.measureText(text).width / 2;
      pen.fillText(text, Math.max(left - 8 * ratio + half, Math.min(across(step + 0.5), width - half)), 8 * ratio);
    }
    if (view.labels.kind === "text" && perStep >= 7 * ratio) {
      pen.fillStyle = view.colours.ink;
      pen.font = `${13 * ratio}px system-ui, sans-serif`;
      const fits = Math.max(1, Math.floor(perStep / (7 * ratio)));
      for (let step = first; step <= last; step += 1) {
        const text = view.labels.short(view.row, step);
        if (text.length > fits && fits < 4) continue; // a word that doesn't fit
        pen.fillText(text.length > fits ? `${text.slice(0, Math.max(1, fits - 1))}${fits > 1 ? "…" : ""}` : text, across(step + 0.5), 24 * ratio);
      }
    }
    pen.restore();
    pen.textAlign = "left";
    pen.fillStyle = view.colours.muted;
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    pen.fillText(numbered ? "step" : view.labels.kind === "date" ? "date" : "label", 0, 8 * ratio);
  }

  // An overview of all steps, with the visible window.
  drawWhole() {
    const { context: pen, width, height, ratio } = fitted(this.whole);
    const { view } = this;
    const left = this.view.left * ratio;
    const wide = width - left - RIGHT * ratio;
    pen.clearRect(0, 0, width, height);
    this.whole.hidden = view.window.span >= view.steps;
    if (this.whole.hidden) return;
    pen.fillStyle = view.colours.grid;
    pen.fillRect(left, 0, wide, height);
    const across = (step) => left + (step / view.steps) * wide;
    for (const [a, b, row] of view.matches) {
      if (row !== view.row) continue;
      pen.fillStyle = view.colours.accent;
      pen.fillRect(across(a), 0, Math.max(2, across(b) - across(a)), height);
    }
    pen.fillStyle = view.colours.accent;
    const { from, span } = view.window;
    pen.fillRect(across(from), 0, Math.max(6 * ratio, across(from + span) - across(from)), height);
    pen.fillStyle = view.colours.cursor;
    pen.fillRect(across(view.step + 0.5) - ratio, 0, 2 * ratio, height);
  }

  drawLegend() {
    const { view, scale, plane } = this;
    replaceChildren(
      this.legend,
      ...colourBar(scale, view.theme),
      plane.range.broken ? make("span", { class: "broken" }, make("span", { class: "striped" }), "NaN", make("span", { class: "chequered" }), "infinite") : null,
      make("span", { class: "extent" }, `${plural(plane.units, "unit")} × ${plural(plane.steps, "step")}`),
      this.left.length ? make("span", { class: "extent" }, "pale: masked steps") : null,
      this.resets.length ? make("span", { class: "extent" }, "▾: the state was reset") : null,
      this.extremes,
    );
  }

  // ── text ───────────────────────────────────────────────────────────────────────────────────────────────────────────

  say() {
    const { view, plane } = this;
    if (plane === null) return;
    const at = this.hover ?? { unit: view.unit, step: view.step };
    const own = Math.min(plane.steps - 1, Math.floor(at.step * this.stretch));
    if (own < 0 || at.unit >= plane.units) return;
    const unit = view.unitTitle(view.place, view.field, at.unit);
    const value = plane.at(at.unit, own);
    const what = view.shows === "difference" ? `change of ${view.field}` : view.field;
    const out = this.left.some(([a, b]) => own >= a && own < b) ? " · masked" : "";
    this.readout.textContent = `${view.labels.full(view.row, at.step)} · ${unit} · ${what} = ${shown(value, 5)}${out}`;
    this.stepBox.box.value = String(view.description.steps[view.step]);
    this.unitBox.box.value = String(view.unitNumber(view.place, view.field, view.unit));
    this.stack.setAttribute(
      "aria-label",
      `${view.field} of ${view.place.title}, ${plural(plane.units, "unit")} by ${plural(plane.steps, "step")}. ` +
        "Arrow keys move through steps and units, plus and minus zoom, Shift with the arrows marks steps.",
    );
  }

  // The visible part as a table: at most 12 units, and 12 steps or as many as fit.
  fillTable() {
    const { view, plane } = this;
    if (!this.behind.element.open || plane === null) return;
    const headOf = (step) => view.labels.full(view.row, step).slice("step ".length);
    const widest = Math.max(9, ...Array.from({ length: view.steps }, (_, n) => headOf(n).length).slice(0, 1000));
    const most = Math.max(2, Math.min(12, Math.floor((this.behind.body.clientWidth - Math.max(view.left, 76) - 20) / (16 + LETTER * widest))));
    const first = Math.max(0, Math.min(view.step - Math.floor(most / 2), view.steps - most));
    const steps = Array.from({ length: Math.min(most, view.steps) }, (_, n) => first + n);
    const top = Math.max(0, Math.min((this.rowOf[view.unit] ?? 0) - 5, plane.units - 12));
    const rows = Array.from({ length: Math.min(12, plane.units) }, (_, n) => this.positions[top + n]);
    const caption = `${view.field} of ${view.place.title}: ${plural(rows.length, "unit")} and ${plural(steps.length, "step")} around the cursor`;
    replaceChildren(
      this.behind.body,
      table(
        ["unit, step", ...steps.map(headOf)],
        rows.map((unit) => [
          this.names?.[unit] ?? String(view.unitNumber(view.place, view.field, unit)),
          ...steps.map((step) => shown(plane.at(unit, Math.min(plane.steps - 1, Math.floor(step * this.stretch))), 4)),
        ]),
        { caption },
      ),
    );
  }

  // ── pointer and keys ───────────────────────────────────────────────────────────────────────────────────────────────

  toggleMarking() {
    this.marking = !this.marking;
    this.mark.setAttribute("aria-pressed", String(this.marking));
    this.stack.classList.toggle("marking", this.marking);
  }

  stepUnder(event) {
    const at = this.stack.getBoundingClientRect();
    const { from, span } = this.view.window;
    return from + ((event.clientX - at.left - this.view.left) / this.plotWidth()) * span;
  }

  under(event) {
    const at = this.stack.getBoundingClientRect();
    const row = Math.floor((event.clientY - at.top + this.top) / this.rowHeight);
    const step = Math.floor(this.stepUnder(event));
    if (row < 0 || row >= this.plane.units || step < 0 || step >= this.view.steps) return null;
    return { unit: this.positions[row], step };
  }

  listen() {
    const { stack, view } = this;
    const pointers = new Map();
    let drag = null;
    let pinch = null;
    stack.addEventListener("pointerdown", (event) => {
      if (this.plane === null || (event.pointerType === "mouse" && event.button !== 0)) return;
      stack.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      if (pointers.size === 2) {
        const [a, b] = [...pointers.values()];
        pinch = { apart: Math.abs(a.clientX - b.clientX) || 1, span: view.window.span, middle: (this.stepUnder(a) + this.stepUnder(b)) / 2 };
        drag = null;
      } else {
        drag = { x: event.clientX, y: event.clientY, from: view.window.from, top: this.top, moved: false, mark: this.marking || event.shiftKey, step: this.stepUnder(event) };
      }
    });
    stack.addEventListener("pointermove", (event) => {
      if (this.plane === null) return;
      if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event);
      if (pinch !== null && pointers.size === 2) {
        const [a, b] = [...pointers.values()];
        const span = (pinch.span * pinch.apart) / (Math.abs(a.clientX - b.clientX) || 1);
        const share = ((a.clientX + b.clientX) / 2 - stack.getBoundingClientRect().left - this.view.left) / this.plotWidth();
        view.move(pinch.middle - share * span, span, this.plotWidth());
      } else if (drag !== null) {
        const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
        if (Math.hypot(dx, dy) > 4) drag.moved = true;
        if (drag.moved && drag.mark) this.markBetween(drag.step, this.stepUnder(event));
        else if (drag.moved) {
          view.move(drag.from - (dx / this.plotWidth()) * view.window.span, view.window.span, this.plotWidth());
          this.scrollTo(drag.top - dy);
          this.draw();
        }
      } else {
        this.hover = this.under(event);
        this.say();
      }
    });
    const up = (event) => {
      if (drag !== null && !drag.moved && event.type === "pointerup") {
        const found = this.under(event);
        if (found !== null) {
          if (drag.mark) view.set({ range: [found.step, found.step + 1] });
          view.set(found);
        }
      }
      pointers.delete(event.pointerId);
      if (pointers.size < 2) pinch = null;
      drag = null;
    };
    stack.addEventListener("pointerup", up);
    stack.addEventListener("pointercancel", up);
    stack.addEventListener("pointerleave", () => {
      this.hover = null;
      this.say();
    });
    stack.addEventListener("dblclick", (event) => this.zoom(0.5, this.stepUnder(event)));
    stack.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    stack.addEventListener("keydown", (event) => this.key(event));
    const jump = (event) => {
      const at = this.whole.getBoundingClientRect();
      const share = (event.clientX - at.left - this.view.left) / this.plotWidth();
      view.move(share * view.steps - view.window.span / 2, view.window.span, this.plotWidth());
    };
    this.whole.addEventListener("pointerdown", (event) => {
      this.whole.setPointerCapture(event.pointerId);
      jump(event);
    });
    this.whole.addEventListener("pointermove", (event) => {
      if (event.buttons) jump(event);
    });
    view.on((changed) => {
      if (changed.has("range")) this.unmark.hidden = view.range === null;
    });
  }

  markBetween(a, b) {
    const low = Math.max(0, Math.floor(Math.min(a, b)));
    const high = Math.min(this.view.steps, Math.max(low + 1, Math.ceil(Math.max(a, b))));
    this.view.set({ range: [low, high] });
  }

  wheel(event) {
    const { view } = this;
    const across = event.shiftKey && !event.deltaX ? event.deltaY : event.deltaX;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(Math.exp(event.deltaY * 0.004), this.stepUnder(event));
    } else if (Math.abs(across) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
      event.preventDefault();
      view.move(view.window.from + (across / this.plotWidth()) * view.window.span, view.window.span, this.plotWidth());
    } else if (this.rowHeight * this.plane.units > this.stack.clientHeight + 1) {
      const before = this.top;
      this.scrollTo(this.top + event.deltaY);
      if (this.top !== before) {
        event.preventDefault();
        this.draw();
      }
    }
  }

  key(event) {
    const { view } = this;
    if (this.plane === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(view.window.span * 0.8));
    const across = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity }[event.key];
    const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (across !== undefined) {
      const step = Math.max(0, Math.min(view.steps - 1, view.step + across));
      if (event.shiftKey) {
        this.anchor ??= view.step;
        this.markBetween(Math.min(this.anchor, step), Math.max(this.anchor, step) + 1);
      } else this.anchor = null;
      view.set({ step });
      view.follow();
    } else if (down !== undefined) {
      const row = Math.max(0, Math.min(this.plane.units - 1, (this.rowOf[view.unit] ?? 0) + down));
      view.set({ unit: this.positions[row] });
      this.reveal(row);
    } else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0") this.all();
    else if (event.key === "Escape" && view.range !== null) view.set({ range: null, matches: [] });
    else return;
    event.preventDefault();
  }
}

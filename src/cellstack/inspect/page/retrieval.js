// What the query of a head of an mLSTM reads: the weight of each earlier step, at the cursor, and as a map of all queries.

import { Plane } from "./data.js";
import { make, replaceChildren, shown, table } from "./dom.js";
import { drawBars, fitted, LEFT, palette, RIGHT, scaleOf } from "./draw.js";
import { memoryOf } from "./cell.js";
import { readOfStart, unitsOf, weightsAt } from "./mlstm.js";
import { paintTiles } from "./tiles.js";

const MOST_PRODUCTS = 6.4e7; // of numbers of queries and keys, for the map of all queries
const ABOUT = "The query q of a head reads the values v of earlier steps. The weight of a step is q·k/√(width of k), times the input gate i of that step and the forget gates f since, divided as h is.";

export class Retrieval {
  constructor(view) {
    this.view = view;
    this.title = make("h3", {});
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.readout = make("p", { class: "readout" });
    this.about = make("p", { class: "note" });
    this.map = make("canvas", { class: "chart", role: "img" });
    this.list = make("div", { class: "scroll" });
    this.element = make("div", { class: "retrieval" }, make("p", { class: "note" }, ABOUT), this.title, this.chart, this.readout, this.about, this.map, this.list);
    this.key = "";
    const inside = (step) => step >= 0 && step < view.steps;
    this.chart.addEventListener("click", ({ offsetX }) => inside(this.stepOf(offsetX)) && view.set({ step: this.stepOf(offsetX) }));
    this.map.addEventListener("click", ({ offsetY }) => inside(this.rowOf(offsetY)) && view.set({ step: this.rowOf(offsetY) }));
    this.chart.addEventListener("pointermove", ({ offsetX }) => this.say(view.step, this.stepOf(offsetX)));
    this.map.addEventListener("pointermove", ({ offsetX, offsetY }) => this.say(this.rowOf(offsetY), this.stepOf(offsetX)));
    for (const canvas of [this.chart, this.map]) canvas.addEventListener("pointerleave", () => (this.readout.textContent = this.sum));
  }

  // Show a memory; `current()` is false once another selection is shown.
  async draw(place, current) {
    const { view } = this;
    const { spec, form, fields } = place.cell;
    const changed = view.shows !== "trace" && view.result !== null;
    const get = async (field) => [field, (changed ? view.after(place, field) : null) ?? (await view.traced(place, field))];
    const planes = Object.fromEntries(await Promise.all(Object.keys(fields).map(get)));
    const memory = await memoryOf(view, place, planes);
    if (!current()) return;
    this.map.hidden = this.chart.hidden = memory === null;
    if (memory === null) {
      this.title.textContent = "No weights to show";
      this.readout.textContent = "The trace covers only part of the run, so earlier steps are unknown.";
      this.about.textContent = "";
      replaceChildren(this.list);
      return;
    }
    const { step } = view;
    const units = unitsOf(place.cell);
    const unit = units.unit(view.unitsOf(place, view.field), view.unit);
    const head = units.index(form.heads, unit);
    const index = units.index(spec.units, unit) ?? head * spec.value_size;
    const [value, name] = [units.title(units.unit(spec.units, index)), (at) => view.labels.full(view.row, at)];
    Object.assign(this, { head, memory, ...weightsAt(memory, head, step) });
    const { weights, left } = this;
    this.title.textContent = `The weight of each step in what the query of head ${head} reads at ${name(step)}`;
    const window_ = { ...view.window, steps: view.description.steps };
    this.stepOf = drawBars(this.chart, view.colours, weights, window_, { cursor: step, positive: view.colours.warm, negative: view.colours.cold }).step;
    const start = readOfStart(memory, step, left, index);
    const v = (at) => planes.v.at(index, at);
    const sum = weights.reduce((all, weight, at) => all + weight * v(at), start);
    const gate = planes.o?.at(index, step);
    this.sum = `Sum of weight · v, ${value}: ${shown(sum - start, 5)} · from the initial state: ${shown(start, 5)}${gate === undefined ? "" : ` · times o = ${shown(gate, 5)}: ${shown(gate * sum, 5)}`} · h of the run: ${shown(planes.h.at(index, step), 5)}`;
    this.readout.textContent = this.sum;
    const largest = [...weights.keys()].filter((at) => weights[at] !== 0).sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a])).slice(0, 8);
    this.chart.setAttribute("aria-label", `Bars: the weights of the steps. ${largest.length ? `The largest is that of ${name(largest[0])}: ${shown(weights[largest[0]], 4)}.` : "All are 0."}`);
    const rows = largest.map((at) => [name(at), shown(weights[at], 4), shown(v(at), 4), shown(weights[at] * v(at), 4)]);
    replaceChildren(this.list, table(["step", "weight", `v, ${value}`, "weight · v"], rows, { caption: "The steps with the largest weights" }));
    this.drawMap(`${view.row} ${place.key} ${head} ${changed}`);
  }

  // The weights of all queries: rows are the steps of the queries, columns the steps that they read.
  drawMap(key) {
    const { view, head, memory, map } = this;
    const steps = memory.planes.q.steps;
    map.hidden = steps ** 2 * memory.spec.key_size > MOST_PRODUCTS;
    this.about.textContent = map.hidden ? "Too many steps for a map of all queries." : "All queries: each row is the step of a query, each column a step that it reads. A click chooses a query.";
    if (map.hidden) return;
    if (this.key !== key || this.result !== view.result) {
      this.all = new Plane(new Float64Array(steps * steps), steps, steps);
      for (let step = 0; step < steps; step += 1) this.all.data.set(weightsAt(memory, head, step).weights, step * steps);
      Object.assign(this, { key, result: view.result });
    }
    map.style.height = `${Math.max(120, Math.min(360, 14 * steps))}px`;
    map.setAttribute("aria-label", `A map of the weights of head ${head}: the steps of the queries by the steps that they read`);
    const { context: pen, width, height, ratio } = fitted(map);
    const left = Math.round(LEFT * ratio);
    const wide = Math.max(1, width - left - Math.round(RIGHT * ratio));
    const image = pen.createImageData(wide, height);
    const scale = scaleOf(false, this.all.range);
    const { from, span } = view.window;
    const rowHeight = height / steps;
    const positions = Int32Array.from({ length: steps }, (_, n) => n);
    paintTiles(new Uint32Array(image.data.buffer), wide, height, { plane: this.all, positions, first: from, perPixel: span / wide, rowHeight, offset: 0, scale, colours: palette(scale.kind, view.theme), apart: false });
    pen.clearRect(0, 0, width, height);
    pen.putImageData(image, left, 0);
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = view.colours.muted;
    const every = Math.max(1, Math.ceil((14 * ratio) / rowHeight));
    for (let row = 0; row < steps; row += every) pen.fillText(String(view.description.steps[row]), left - 6 * ratio, Math.max(6 * ratio, (row + 0.5) * rowHeight));
    pen.strokeStyle = view.colours.cursor;
    pen.lineWidth = 1.5 * ratio;
    pen.strokeRect(left, view.step * rowHeight, Math.min(wide, ((steps - from) / span) * wide), Math.max(2 * ratio, rowHeight));
    this.rowOf = (y) => Math.floor((y * ratio) / rowHeight);
  }

  // The weight under the pointer: of step `at`, for the query of a step.
  say(step, at) {
    const { view } = this;
    if (!(step >= 0 && step < view.steps && at >= 0 && at <= step)) return;
    const weight = step === view.step ? this.weights[at] : this.all.at(step, at);
    this.readout.textContent = `Query of ${view.labels.full(view.row, step)}, ${view.labels.full(view.row, at)}: weight ${shown(weight, 5)}`;
  }
}

// The contributions to c: what each past step wrote, and the share that later gates kept until the cursor; and to what the query
// of an mLSTM reads, with their weights.

import { memoryOf } from "./cell.js";
import { Plane } from "./data.js";
import { make, replaceChildren, shown, table } from "./dom.js";
import { drawBars, drawTiles, LEFT, RIGHT, scaleOf } from "./draw.js";
import { keepingOf } from "./formulas.js";
import { weightsAt } from "./heads.js";

const MOST_QUERIES = 200; // steps in the map of all queries

// c at a step, unrolled: entry s is the write of step s times the product of the later keep factors, and `start` the rest
// of the initial state. Up to rounding, they sum to the state. In the order of time.
export function contributionsOf({ kept, written, rate, start, fresh, mask, reset, reverse, step }) {
  const parts = new Float64Array(kept.length);
  const way = reverse ? 1 : -1;
  let left = 1;
  let rest = start;
  for (let at = step; at >= 0 && at < kept.length; at += way) {
    const used = mask === null || mask[at];
    if (used) {
      parts[at] = (1 - rate) * written[at] * left;
      left *= rate + (1 - rate) * kept[at];
    }
    if (reset !== null && reset[at]) {
      rest = fresh;
      break;
    }
  }
  return { parts, start: rest * left };
}

export class Memory {
  constructor(view) {
    this.view = view;
    this.about = make("p", { class: "about" });
    this.title = make("h3", {});
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.sum = make("p", { class: "readout", "data-sum": "" });
    this.queries = make("div", {}, make("p", { class: "note" }, "The weights of all queries: each row is the step of a query, each column a step that it reads."));
    this.map = make("canvas", { class: "chart", role: "img", "aria-label": "A map of the weights of all queries: their steps by the steps that they read" });
    this.queries.append(this.map);
    this.list = make("div", { class: "scroll" });
    this.element = make("div", {}, this.about, this.title, this.chart, this.sum, this.queries, this.list);
    this.open = false;
    this.asked = 0;
    // A click chooses a step: of a bar, or of a query. The number under the pointer is shown.
    for (const [canvas, stepAt] of [[this.chart, (event) => this.stepOf?.(event.offsetX)], [this.map, (event) => this.underMap(event)[0]]]) {
      canvas.addEventListener("click", (event) => {
        const step = stepAt(event);
        if (step >= 0 && step < view.steps) view.set({ step });
      });
      canvas.addEventListener("pointerleave", () => (this.sum.textContent = this.said));
    }
    this.chart.addEventListener("pointermove", (event) => this.say("", this.bars?.[this.stepOf?.(event.offsetX)], this.stepOf?.(event.offsetX)));
    this.map.addEventListener("pointermove", (event) => {
      const [query, step] = this.underMap(event);
      this.say(`query of ${view.labels.full(view.row, query)}, `, this.all.at(query, step), step);
    });
    view.on((changed) => {
      if (["step", "row", "place", "field", "unit", "result", "shows", "theme", "window"].some((name) => changed.has(name))) this.draw();
    });
  }

  // The query and the step under the pointer.
  underMap({ offsetX, offsetY }) {
    const { units } = this.all;
    const places = [offsetY / this.map.clientHeight, (offsetX - LEFT) / (this.map.clientWidth - LEFT - RIGHT)];
    return places.map((place) => Math.max(0, Math.min(units - 1, Math.floor(place * units))));
  }

  say(what, value, step) {
    if (value !== undefined) this.sum.textContent = `${what}${this.view.labels.full(this.view.row, step)}: ${shown(value, 5)}`;
  }

  refuse(why) {
    this.title.textContent = "No contributions to show";
    this.sum.textContent = this.said = why;
    this.about.textContent = "";
    this.chart.hidden = this.queries.hidden = true;
    replaceChildren(this.list);
    return null;
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const { place } = view;
    const current = () => asked === this.asked;
    const found = place.kind !== "cell" ? this.refuse("Choose a layer with a cell in the network.")
      : !place.cell.whole ? this.refuse("The trace covers only part of the run, so earlier writes are unknown.")
      : await (place.cell.form.heads ? this.weights(place, current) : this.contributions(place, current));
    if (found === null) return;
    const { about, title, bars, parts, start, state, unit, name, columns, row, caption } = found;
    this.about.textContent = about;
    this.chart.hidden = false;
    this.queries.hidden = found.all === null;
    Object.assign(this, { bars, all: found.all });
    const step = view.stepAt(place);
    this.title.textContent = `${title}, ${view.labels.full(view.row, view.step)}`;
    const { from, span } = view.window;
    const stretch = state.steps === view.steps ? 1 : state.steps / view.steps;
    this.stepOf = drawBars(this.chart, view.colours, bars, { from: from * stretch, span: span * stretch, steps: stretch === 1 ? view.description.steps : null }, { cursor: step, positive: view.colours.warm, negative: view.colours.cold }).step;
    if (found.all !== null) drawTiles(this.map, view, found.all, scaleOf(false, found.all.range), view.description.steps.map(String), step);
    const total = parts.reduce((all, part) => all + part, start);
    this.said = `Sum of the steps: ${shown(total - start, 5)} · from the initial state: ${shown(start, 5)} · together: ${shown(total, 5)} · ${name} of the run: ${shown(state.at(unit, step), 5)}`;
    this.sum.textContent = this.said;
    this.sum.dataset.sum = String(total);
    const largest = Array.from(bars.keys()).filter((n) => bars[n] !== 0).sort((a, b) => Math.abs(bars[b]) - Math.abs(bars[a])).slice(0, 8);
    this.chart.setAttribute("aria-label", `Bars: ${title}. The contributions sum to ${shown(total, 5)}.`);
    replaceChildren(this.list, table(["step", ...columns], largest.map((n) => [view.labels.full(view.row, n), ...row(n)]), { caption }));
  }

  // The field of the run that is shown.
  plane(place, field) {
    const { view } = this;
    return (view.shows !== "trace" && view.result !== null ? view.after(place, field) : null) ?? view.traced(place, field);
  }

  // What the query of a head reads.
  async weights(place, current) {
    const { view } = this;
    const planes = Object.fromEntries(await Promise.all(Object.keys(place.cell.fields).map(async (field) => [field, await this.plane(place, field)])));
    const memory = await memoryOf(view, place, planes);
    if (!current()) return null;
    const [unit, step, { h: state, v, o }] = [view.nearestIn("h"), view.stepAt(place), planes];
    const { weights, start } = weightsAt(memory, step, unit);
    const gate = o?.at(unit, step) ?? 1;
    const parts = weights.map((weight, n) => gate * weight * v.at(unit, n));
    const all = state.steps > MOST_QUERIES || state.steps !== view.steps ? null : new Plane(new Float64Array(state.steps ** 2), state.steps, state.steps);
    for (let query = 0; query < all?.units; query += 1) all.data.set(weightsAt(memory, query, unit).weights, query * all.units);
    const name = view.unitTitle(place, "h", unit);
    return {
      about: "What a query reads is a sum of all earlier v; the bars are their weights.",
      title: `The weight of each step in what the query of ${name.split(" [")[0]} reads`,
      bars: weights, parts, start: gate * start, state, unit, name: `h, ${name},`, all,
      columns: ["weight", "v", `${o ? "o · " : ""}v · weight`],
      row: (n) => [weights[n], v.at(unit, n), parts[n]].map((value) => shown(value, 4)),
      caption: "The steps with the largest weights",
    };
  }

  // What a state is a sum of.
  async contributions(place, current) {
    const { view } = this;
    const { cell } = place;
    const { spec, form } = cell;
    if (spec.layer_norm === "joint" && "c" in form.states) return this.refuse("This cell's state is normalised, so it isn't a sum of writes.");
    if (spec.cell_clip !== null) return this.refuse("This cell is clipped, so its state isn't a sum of writes.");
    const keeping = keepingOf(form);
    if (keeping === null) return this.refuse(`A ${form.title} has no gate that keeps a state, so its state isn't a sum of writes.`);
    if (form.scalar) return this.refuse(`The number ${form.scalar} scales what this cell writes, so its state isn't a sum of what the gates write.`);
    if (view.patches.some((patch) => patch.node === place.name && patch.cell === place.number && Object.hasOwn(form.states, patch.gate))) {
      return this.refuse("A patch changes this state, so it isn't a sum of what the gates wrote.");
    }
    const { name, fields } = keeping;
    const [state, ...planes] = await Promise.all([name, ...fields].map((field) => this.plane(place, field)));
    const mask = await view.mask(place);
    const row = ({ data, shape }) => data.subarray(view.row * shape[1], (view.row + 1) * shape[1]);
    const before = row(await view.store.get(cell.before[name]));
    const learned = cell.weights?.[`initial_${name}`];
    const fresh = learned === undefined ? null : (await view.store.get(learned)).data;
    const reset = await view.resets(place);
    if (!current()) return null;
    const unit = Math.min(view.unit, state.units - 1);
    const shares = Array.from({ length: state.steps }, (_, n) => keeping.of((field) => planes[fields.indexOf(field)].at(unit, n)));
    const [kept, written] = [0, 1].map((part) => Float64Array.from(shares, (share) => share[part]));
    const { parts, start } = contributionsOf({
      kept, written, rate: keeping.kept, start: before[unit], fresh: fresh === null ? 0 : fresh[unit], mask, reset, reverse: cell.reverse, step: view.stepAt(place),
    });
    return {
      about: `${name} is a sum: what each past step wrote, times the share that all later steps kept. These are the terms at the cursor.`,
      title: `The contribution of each step to ${name} of unit ${cell.units[unit]}`,
      bars: parts, parts, start, state, unit, name, all: null,
      columns: ["written", "share kept", "contribution"],
      row: (n) => [shown(written[n], 4), written[n] ? shown(parts[n] / written[n], 4) : "–", shown(parts[n], 4)],
      caption: "The steps with the largest contributions",
    };
  }
}

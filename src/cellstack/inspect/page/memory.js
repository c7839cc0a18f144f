// The contributions to c: what each past step wrote, and the share that later gates kept until the cursor; or what the query
// of an mLSTM reads.

import { make, replaceChildren, shown, table } from "./dom.js";
import { drawBars } from "./draw.js";
import { keepingOf } from "./formulas.js";
import { Retrieval } from "./retrieval.js";

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
    this.title = make("h3", {});
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.sum = make("p", { class: "readout", "data-sum": "" });
    this.list = make("div", { class: "scroll" });
    this.sums = make("div", {}, this.title, this.chart, this.sum, this.list);
    this.retrieval = new Retrieval(view);
    this.element = make("div", {}, this.sums, this.retrieval.element);
    this.open = false;
    this.asked = 0;
    this.chart.addEventListener("click", (event) => {
      const step = this.stepOf?.(event.offsetX);
      if (step >= 0 && step < view.steps) view.set({ step });
    });
    view.on((changed) => {
      if (["step", "row", "place", "unit", "field", "result", "shows", "theme", "window"].some((name) => changed.has(name))) this.draw();
    });
  }

  refuse(why) {
    this.title.textContent = "No contributions to show";
    this.sum.textContent = why;
    this.chart.hidden = true;
    replaceChildren(this.list);
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const { place } = view;
    const ofMatrix = Boolean(place.cell?.form.heads);
    this.sums.hidden = ofMatrix;
    this.retrieval.element.hidden = !ofMatrix;
    if (ofMatrix) return this.retrieval.draw(place, () => asked === this.asked);
    if (place.kind !== "cell") return this.refuse("Choose a layer with a cell in the network.");
    const { cell } = place;
    const { spec, form } = cell;
    if (spec.layer_norm === "joint" && "c" in form.states) return this.refuse("This cell's state is normalised, so it isn't a sum of writes.");
    if (spec.cell_clip !== null) return this.refuse("This cell is clipped, so its state isn't a sum of writes.");
    const keeping = keepingOf(form);
    if (keeping === null) return this.refuse(`A ${form.title} has no gate that keeps a state, so its state isn't a sum of writes.`);
    if (form.scalar) return this.refuse(`The number ${form.scalar} scales what this cell writes, so its state isn't a sum of what the gates write.`);
    if (!cell.whole) return this.refuse("The trace covers only part of the run, so earlier writes are unknown.");
    const changed = view.shows !== "trace" && view.result !== null;
    if (view.patches.some((patch) => patch.node === place.name && patch.cell === place.number && Object.hasOwn(form.states, patch.gate))) {
      return this.refuse("A patch changes this state, so it isn't a sum of what the gates wrote.");
    }
    const { name, fields } = keeping;
    const get = async (field) => (changed ? view.after(place, field) : null) ?? view.traced(place, field);
    const [state, ...planes] = await Promise.all([name, ...fields].map(get));
    const mask = await view.mask(place);
    const row = ({ data, shape }) => data.subarray(view.row * shape[1], (view.row + 1) * shape[1]);
    const before = row(await view.store.get(cell.before[name]));
    const learned = cell.weights?.[`initial_${name}`];
    const fresh = learned === undefined ? null : (await view.store.get(learned)).data;
    const reset = await view.resets(place);
    if (asked !== this.asked) return undefined;
    const unit = Math.min(view.unit, state.units - 1);
    const step = view.stepAt(place);
    const shares = Array.from({ length: state.steps }, (_, n) => keeping.of((field) => planes[fields.indexOf(field)].at(unit, n)));
    const [kept, written] = [0, 1].map((part) => Float64Array.from(shares, (share) => share[part]));
    const { parts, start } = contributionsOf({
      kept, written, rate: keeping.kept, start: before[unit], fresh: fresh === null ? 0 : fresh[unit], mask, reset, reverse: cell.reverse, step,
    });
    this.chart.hidden = false;
    this.title.textContent = `The contribution of each step to ${name} of unit ${cell.units[unit]}, ${view.labels.full(view.row, view.step)}`;
    const { from, span } = view.window;
    const stretch = state.steps === view.steps ? 1 : state.steps / view.steps;
    this.stepOf = drawBars(this.chart, view.colours, parts, { from: from * stretch, span: span * stretch, steps: stretch === 1 ? view.description.steps : null }, { cursor: step, positive: view.colours.warm, negative: view.colours.cold }).step;
    const total = parts.reduce((all, part) => all + part, start);
    this.sum.textContent = `Sum of the steps: ${shown(total - start, 5)} · from the initial state: ${shown(start, 5)} · together: ${shown(total, 5)} · ${name} of the run: ${shown(state.at(unit, step), 5)}`;
    this.sum.dataset.sum = String(total);
    const largest = Array.from(parts.keys()).filter((n) => parts[n] !== 0).sort((a, b) => Math.abs(parts[b]) - Math.abs(parts[a])).slice(0, 8);
    this.chart.setAttribute("aria-label", `Bars: the contribution of each past step to ${name}. They sum to ${shown(total, 5)}.`);
    replaceChildren(
      this.list,
      table(
        ["step", "written", "share kept", "contribution"],
        largest.map((n) => [view.labels.full(view.row, n), shown(written[n], 4), written[n] ? shown(parts[n] / written[n], 4) : "–", shown(parts[n], 4)]),
        { caption: "The steps with the largest contributions" },
      ),
    );
    return undefined;
  }
}

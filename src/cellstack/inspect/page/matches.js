// Find similar steps, after Strobelt et al. 2018, "LSTMVis": the units that are on throughout a marked range, and other
// ranges in the data where they are on together.

import { button, checkbox, make, plural, replaceChildren, shown } from "./dom.js";

const MOST_MATCHES = 200; // matches listed

// Units that are at least `threshold` at every step of [from, to); with `edges`, and below it just outside.
export function unitsOn(plane, from, to, threshold, edges) {
  const found = [];
  for (let unit = 0; unit < plane.units; unit += 1) {
    const line = plane.line(unit);
    let on = true;
    for (let step = from; step < to && on; step += 1) on = line[step] >= threshold;
    if (on && edges) on = !(from > 0 && line[from - 1] >= threshold) && !(to < plane.steps && line[to] >= threshold);
    if (on) found.push(unit);
  }
  return found;
}

// Ranges of steps throughout which all of these units are on: [from, to) pairs.
export function rangesOn(plane, units, threshold) {
  const ranges = [];
  if (!units.length) return ranges;
  let from = -1;
  for (let step = 0; step <= plane.steps; step += 1) {
    const on = step < plane.steps && units.every((unit) => plane.at(unit, step) >= threshold);
    if (on && from < 0) from = step;
    else if (!on && from >= 0) {
      ranges.push([from, step]);
      from = -1;
    }
  }
  return ranges;
}

export class Matches {
  constructor(view) {
    this.view = view;
    this.threshold = null; // null: the default of the shown field
    this.edges = false;
    this.left = new Set(); // units that the reader deselected
    this.slider = make("input", { type: "range", min: "-1", max: "1", step: "0.01", "aria-label": "Threshold", oninput: () => { this.threshold = Number(this.slider.value); this.draw(); } });
    this.name = make("span", {}, "Threshold");
    this.level = make("output", {});
    this.here = button("Mark the steps around the cursor", () => view.set({ range: [Math.max(0, view.step - 1), Math.min(view.steps, view.step + 2)] }), { title: "The cursor's step, the one before it and the one after it" });
    const edges = checkbox("only units that are off just before and after these steps", false, (on) => { this.edges = on; this.draw(); });
    this.said = make("p", { class: "note" });
    this.units = make("div", { class: "pills", role: "group", "aria-label": "Units that are on throughout the range" });
    this.list = make("ol", { class: "found" });
    this.element = make(
      "div",
      {},
      make("div", { class: "toolbar" }, this.here, make("label", { class: "field" }, this.name, this.slider), this.level, edges.element),
      this.said,
      this.units,
      this.list,
    );
    this.open = false;
    this.asked = 0;
    view.on((changed) => {
      if (["range", "place", "field"].some((name) => changed.has(name))) this.left.clear();
      if (["place", "field"].some((name) => changed.has(name))) this.threshold = null;
      if (["range", "row", "place", "field", "result", "shows"].some((name) => changed.has(name))) this.draw();
    });
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const plane = await view.plane();
    if (asked !== this.asked) return;
    const { low, high } = plane.range;
    const size = Math.max(Math.abs(low), Math.abs(high), 1e-9);
    const usual = "ifozr".includes(view.field) ? 0.5 : 0.3 * size;
    const threshold = this.threshold ?? usual;
    this.slider.min = String(low < 0 ? -size : 0);
    this.slider.max = String(size);
    this.slider.step = String(size / 200);
    this.slider.value = String(threshold);
    this.level.textContent = shown(threshold, 3);
    this.name.textContent = `A unit is on where ${view.field} is at least`;
    if (view.range === null || plane.steps !== view.steps) {
      this.said.textContent =
        plane.steps === view.steps ? "No steps are marked yet. Press “Mark a range” below the map and drag over the steps; or hold Shift, and drag or press the arrow keys." : `${view.place.title} doesn't have a step for each step of the input.`;
      replaceChildren(this.units);
      replaceChildren(this.list);
      view.set({ matches: [] });
      return;
    }
    const [from, to] = view.range;
    const on = unitsOn(plane, from, to, threshold, this.edges);
    const used = on.filter((unit) => !this.left.has(unit));
    replaceChildren(
      this.units,
      ...on.map((unit) =>
        button(
          String(view.unitNumber(view.place, view.field, unit)),
          () => {
            if (this.left.has(unit)) this.left.delete(unit);
            else this.left.add(unit);
            view.set({ unit });
            this.draw();
          },
          { "aria-pressed": String(!this.left.has(unit)), title: "Include or exclude this unit" },
        ),
      ),
    );
    // Every row of the page is searched.
    const found = [];
    for (let row = 0; row < view.description.rows; row += 1) {
      const own = row === view.row ? plane : await view.traced(view.place, view.field, row);
      for (const [a, b] of rangesOn(own, used, threshold)) found.push([a, b, row]);
    }
    if (asked !== this.asked) return;
    const length = to - from;
    found.sort((a, b) => Math.abs(a[1] - a[0] - length) - Math.abs(b[1] - b[0] - length) || a[2] - b[2] || a[0] - b[0]);
    const others = found.filter(([a, b, row]) => row !== view.row || b <= from || a >= to);
    const range = `${view.labels.full(view.row, from)} to ${view.labels.full(view.row, to - 1)}`;
    this.said.textContent = on.length
      ? `${plural(on.length, "unit")} with ${view.field} ≥ ${shown(threshold, 3)} at every step from ${range}${used.length < on.length ? `, ${used.length} of them included` : ""}: on together in ${plural(others.length, "other place")}${others.length > MOST_MATCHES ? `, of which ${MOST_MATCHES} are listed` : ""}.`
      : `No unit has ${view.field} ≥ ${shown(threshold, 3)} at every step from ${range}. Lower the threshold, or mark fewer steps.`;
    replaceChildren(
      this.list,
      ...others.slice(0, MOST_MATCHES).map(([a, b, row]) =>
        make(
          "li",
          {},
          button(
            "",
            () => {
              view.set({ row, step: a });
              view.follow();
            },
            { class: "plain" },
          ),
          ...this.context(row, a, b),
        ),
      ),
    );
    for (const item of this.list.children) {
      const [a, b, row] = others[Array.prototype.indexOf.call(this.list.children, item)];
      item.firstChild.textContent = `${view.description.rows > 1 ? `row ${view.rowTitle(row)}, ` : ""}${b - a === 1 ? `step ${view.description.steps[a]}` : `steps ${view.description.steps[a]} to ${view.description.steps[b - 1]}`}`;
    }
    view.set({ matches: [[from, to, view.row], ...others] });
  }

  // The labels around a match.
  context(row, from, to) {
    const { view } = this;
    if (view.labels.kind === null) return [];
    const text = (a, b) => Array.from({ length: Math.max(0, b - a) }, (_, n) => view.labels.short(row, a + n)).join(view.labels.kind === "text" ? "" : " ");
    if (view.labels.kind !== "text") return [make("span", { class: "context" }, make("mark", {}, `${view.labels.short(row, from)} – ${view.labels.short(row, to - 1)}`))];
    const end = Math.min(to, from + 40);
    return [make("span", { class: "context" }, text(Math.max(0, from - 12), from), make("mark", {}, text(from, end)), end < to ? "…" : text(to, Math.min(view.steps, to + 12)))];
  }
}

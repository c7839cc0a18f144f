// A unit over time: its gates and states as lines over the steps.

import { checkbox, make, replaceChildren, shown } from "./dom.js";
import { drawLines, lineColour } from "./draw.js";
import { meaningOf } from "./view.js";

export class UnitLines {
  constructor(view) {
    this.view = view;
    this.hidden = new Set();
    this.title = make("h3", {});
    this.legend = make("div", { class: "choices" });
    this.gates = make("canvas", { class: "chart", role: "img" });
    this.states = make("canvas", { class: "chart", role: "img" });
    this.values = make("p", { class: "readout" });
    this.element = make("div", {}, this.title, this.legend, this.gates, this.states, this.values);
    this.open = false;
    this.asked = 0;
    view.on((changed) => {
      if (["step", "row", "place", "unit", "result", "shows", "theme", "window", "range"].some((name) => changed.has(name))) this.draw();
    });
    for (const canvas of [this.gates, this.states]) {
      canvas.addEventListener("click", (event) => {
        const step = this.stepOf?.(event.offsetX);
        if (step >= 0 && step < view.steps) view.set({ step });
      });
      canvas.addEventListener("pointermove", (event) => {
        const step = this.stepOf?.(event.offsetX);
        if (step >= 0 && step < view.steps) this.say(step);
      });
      canvas.addEventListener("pointerleave", () => this.say(null));
    }
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const { place } = view;
    const fields = place.fields.filter((field) => field !== "x" || place.kind !== "cell");
    const wanted = fields.filter((field) => view.unitIn(field) < view.unitsOf(place, field));
    const before = await Promise.all(wanted.map((field) => view.traced(place, field)));
    const changed = view.result !== null && view.shows !== "trace";
    if (asked !== this.asked) return;
    const title = place.cell?.form.heads ? `, ${view.unitTitle(place, view.field, view.unit)}` : ` ${view.unitNumber(place, view.field, view.unit)}`;
    this.title.textContent = `Unit${title} of ${place.title}`;
    const lines = wanted.flatMap((field, n) => {
      const colour = lineColour(field, view.theme);
      const after = changed ? view.after(place, field) : null;
      return [
        { field, plane: after ?? before[n], unit: view.unitIn(field), colour },
        ...(after === null ? [] : [{ field, plane: before[n], unit: view.unitIn(field), colour, dash: [3, 3] }]),
      ];
    });
    this.drawLegend(wanted, lines);
    const gates = lines.filter((line) => "ifozr".includes(line.field) && !this.hidden.has(line.field));
    const states = lines.filter((line) => !"ifozr".includes(line.field) && !this.hidden.has(line.field));
    this.gates.hidden = !gates.length;
    this.states.hidden = !states.length;
    const stretch = before.length && before[0].steps !== view.steps ? before[0].steps / view.steps : 1;
    const window_ = { ...view.window, from: view.window.from * stretch, span: view.window.span * stretch, steps: stretch === 1 ? view.description.steps : null };
    const options = { cursor: view.stepAt(place), range: view.range };
    const inside = gates.every(({ plane }) => plane.range.low >= 0 && plane.range.high <= 1);
    if (gates.length) this.stepOf = this.over(drawLines(this.gates, view.colours, gates, window_, { ...options, ends: inside ? { low: -0.02, high: 1.02 } : null }), stretch);
    if (states.length) this.stepOf = this.over(drawLines(this.states, view.colours, states, window_, options), stretch);
    this.lines = lines;
    this.say(null);
  }

  // The values of the lines at a step: the one under the pointer, or the cursor's.
  say(pointed) {
    const { view, lines } = this;
    const { place } = view;
    const number = view.unitNumber(place, view.field, view.unit);
    const at = pointed ?? view.step;
    const own = view.steps === view.stepsOf(place) ? at : Math.floor((at * view.stepsOf(place)) / view.steps);
    const said = lines.filter((line) => !line.dash).map((line) => `${line.field} = ${shown(line.plane.at(line.unit, own), 4)}`);
    const changed = lines.some((line) => line.dash);
    this.values.textContent = `${view.labels.full(view.row, at)}: ${said.join("   ")}${changed ? "   (dashed: as traced)" : ""}`;
    for (const canvas of [this.gates, this.states]) canvas.setAttribute("aria-label", `Lines over the steps of unit ${number}. ${said.join(", ")}`);
  }

  over(chart, stretch) {
    return (x) => Math.floor(chart.step(x) / stretch);
  }

  drawLegend(fields, lines) {
    const key = fields.join() + this.view.theme;
    if (this.drawnLegend === key) return;
    this.drawnLegend = key;
    replaceChildren(
      this.legend,
      ...fields.map((field) => {
        const { colour } = lines.find((line) => line.field === field);
        const { element } = checkbox(field, !this.hidden.has(field), (on) => {
          if (on) this.hidden.delete(field);
          else this.hidden.add(field);
          this.draw();
        });
        element.title = meaningOf(this.view.place.cell?.form, field);
        element.style.setProperty("--line", colour);
        element.classList.add("key");
        return element;
      }),
    );
  }
}

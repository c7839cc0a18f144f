// The gradient of a chosen number with respect to the inputs: the influence of each step of the input.

import { checkbox, make, replaceChildren, select, setChoices, shown, table } from "./dom.js";
import { Plane } from "./data.js";
import { drawBars, drawLines } from "./draw.js";

const SMALLEST = 1e-12; // smallest value on the logarithmic scale

export class Gradients {
  constructor(view, rerun, changes) {
    this.view = view;
    this.rerun = rerun;
    this.changes = changes;
    this.of = select("Gradient of", [], "", () => this.compute());
    this.unit = select("Output unit", [], "", () => this.compute());
    this.by = select("With respect to", [], "", () => this.compute());
    this.feature = select("Feature", [], "", () => this.draw());
    const logarithm = checkbox("logarithm", false, (on) => { this.logarithm = on; this.draw(); });
    this.logarithm = false;
    this.title = make("h3", {});
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.said = make("p", { class: "readout" });
    this.list = make("div", { class: "scroll" });
    this.controls = make("div", { class: "toolbar" }, this.of.element, this.unit.element, this.by.element, this.feature.element, logarithm.element);
    this.element = make("div", {}, this.controls, this.title, this.chart, this.said, this.list);
    this.open = false;
    this.asked = 0;
    this.found = null;
    this.stale = true; // the selection has changed since the last computation
    this.chart.addEventListener("click", (event) => {
      const step = this.stepOf?.(event.offsetX);
      if (step >= 0 && step < view.steps) view.set({ step });
    });
    view.on((changed) => {
      if (["step", "row", "result", "shows", "field", "place", "unit"].some((name) => changed.has(name))) this.compute();
      else if (["window", "theme"].some((name) => changed.has(name))) this.draw();
    });
  }

  // The numbers that have a gradient: the outputs, and the field that the map shows.
  choices() {
    const { view } = this;
    const { description, place, field } = view;
    const outputs = description.outputs.map((name) => [`value ${name}`, `output ${name}`]);
    return place.kind === "cell" && field !== "x" ? [...outputs, ["shown", `${field} of ${place.title}, as in the map`]] : outputs;
  }

  async compute() {
    this.stale = !this.open;
    if (!this.open) return;
    const { view, rerun } = this;
    const why = rerun.why ?? rerun.whyNoGradient;
    if (why !== null) {
      this.controls.hidden = true;
      this.chart.hidden = true;
      this.title.textContent = "This page can't compute gradients";
      this.said.textContent = why;
      return;
    }
    const asked = (this.asked += 1);
    const { description } = view;
    setChoices(this.of.box, this.choices(), this.choices().some(([own]) => own === this.of.box.value) ? this.of.box.value : this.choices()[0][0]);
    const inputs = description.inputs.filter((input) => input.value !== null);
    setChoices(this.by.box, inputs.map((input) => input.name), inputs.some((input) => input.name === this.by.box.value) ? this.by.box.value : inputs[0].name);
    this.by.element.hidden = inputs.length < 2;
    const chosen = this.of.box.value;
    let of;
    let what;
    if (chosen === "shown") {
      const { place } = view;
      this.unit.element.hidden = true;
      of = { node: place.name, cell: place.number, gate: view.field, row: 0, step: view.stepAt(place), unit: view.unit };
      what = `${view.field} of ${view.unitTitle(place, view.field, view.unit)} of ${place.title}, ${view.labels.full(view.row, view.step)}`;
    } else {
      const name = chosen.slice("value ".length);
      const node = description.nodes.find((one) => one.name === name);
      const shape = description.arrays[node.value.array].shape;
      const width = shape[1];
      const names = view.namesFrom(name);
      setChoices(this.unit.box, Array.from({ length: width }, (_, n) => [n, names?.[n] ?? String(n)]), Number(this.unit.box.value || width) < width ? this.unit.box.value : view.firstUnit(node));
      this.unit.element.hidden = width < 2;
      const unit = Number(this.unit.box.value);
      const step = node.timed ? view.stepOfNode(node, shape[2]) : undefined;
      of = { value: name, row: 0, unit, ...(node.timed ? { step } : {}) };
      what = `output ${names?.[unit] ?? `${name}[${unit}]`}${node.timed ? `, ${view.labels.full(view.row, view.runStep(node, shape[2]))}` : ""}`;
    }
    this.title.textContent = `How much the input of each step affects ${what}`;
    this.said.textContent = "Computing …";
    try {
      const given = await this.changes.given();
      const found = await rerun.runner.latest("gradient", { ...given, of });
      if (found === null || asked !== this.asked) return;
      this.found = found;
      this.draw();
    } catch (error) {
      if (asked !== this.asked) return;
      this.found = null;
      this.chart.hidden = true;
      replaceChildren(this.list);
      this.said.textContent = `${error.message}`;
    }
  }

  draw() {
    if (!this.open) return;
    if (this.stale) this.compute();
    if (this.found === null) return;
    const { view } = this;
    const value = this.found[this.by.box.value];
    this.chart.hidden = false;
    if (value === null || value === undefined || value.shape.length < 3) {
      this.chart.hidden = true;
      this.said.textContent = value ? `${Array.from(value.data.slice(0, 24), (one) => shown(one, 4)).join("  ")}` : "Ids have no gradient.";
      replaceChildren(this.list);
      return;
    }
    const [, steps, ...rest] = value.shape;
    const width = rest.reduce((a, b) => a * b, 1);
    const names = view.namesFrom(this.by.box.value);
    const features = [["all", "all, their norm"], ...Array.from({ length: Math.min(width, 200) }, (_, n) => [n, names?.[n] ?? String(n)])];
    if (this.feature.box.options.length !== features.length || this.feature.box.options[1].text !== features[1][1]) setChoices(this.feature.box, features, "all");
    this.feature.element.hidden = width < 2;
    const chosen = width < 2 ? "0" : this.feature.box.value;
    const values = Float64Array.from({ length: steps }, (_, step) => {
      if (chosen !== "all") return value.data[step * width + Number(chosen)];
      let sum = 0;
      for (let k = 0; k < width; k += 1) sum += value.data[step * width + k] ** 2;
      return Math.sqrt(sum);
    });
    const stretch = steps === view.steps ? 1 : steps / view.steps;
    const window_ = { from: view.window.from * stretch, span: view.window.span * stretch, steps: stretch === 1 ? view.description.steps : null };
    if (this.logarithm) {
      const logs = new Plane(values.map((one) => Math.log10(Math.max(Math.abs(one), SMALLEST))), 1, steps);
      this.stepOf = drawLines(this.chart, view.colours, [{ plane: logs, unit: 0, colour: view.colours.accent }], window_, { cursor: view.step, zero: false }).step;
    } else {
      this.stepOf = drawBars(this.chart, view.colours, values, window_, { cursor: view.step, positive: view.colours.warm, negative: view.colours.cold }).step;
    }
    const order = Array.from(values.keys()).filter((n) => values[n] !== 0).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, 8);
    this.said.textContent = order.length
      ? `The input affects it most at ${view.labels.full(view.row, order[0])}: ${shown(values[order[0]], 5)}${this.logarithm ? ". The chart shows powers of ten." : ""}`
      : "No step of this input affects it.";
    this.chart.setAttribute("aria-label", this.said.textContent);
    replaceChildren(this.list, table(["step", chosen === "all" ? "norm of the gradient" : `gradient by ${names?.[chosen] ?? `feature ${chosen}`}`], order.map((n) => [view.labels.full(view.row, n), shown(values[n], 5)]), { caption: "The steps with the largest influence" }));
  }
}

// The playground: a small network that learns a task live.

import { Plane, planeOf } from "./data.js";
import { button, choice, make, numberBox, plural, replaceChildren, select, shown, table } from "./dom.js";
import { colourBar, drawLines, drawTiles, scaleOf } from "./draw.js";
import { TASKS } from "./engine/training.js";
import { isGate, keepsOf, meaningOf } from "./view.js";

/* global cellKinds */ // the form of each kind of cell, which html.py inserts before the modules

const MOST_LEARNING = 48;
const TURN = { milliseconds: 60, most: 50 }; // training between two redraws
const KINDS = Object.entries(cellKinds).map(([name, { title }]) => [name, title]);

export class Playground {
  constructor(view, runner) {
    this.view = view;
    this.runner = runner;
    this.open = false;
    this.running = false;
    this.losses = [];
    this.rights = [];
    this.example = null;
    this.field = null;
    this.task = select("Task", Object.entries(TASKS).map(([name, task]) => [name, task.title]), "echo", () => this.begin());
    this.kind = select("Cell", KINDS, KINDS[0][0], () => this.begin());
    this.units = numberBox("Units", () => this.begin(), { value: 12, min: 1, max: MOST_LEARNING, step: 1 });
    this.delay = numberBox("Delay in steps", () => this.begin(), { value: 3, min: 0, max: 15, step: 1 });
    this.rate = select("Learning rate", ["0.001", "0.003", "0.01", "0.03", "0.1"], "0.01", () => this.begin());
    this.seed = numberBox("Seed", () => this.begin(), { value: 1, min: 0, max: 9999, step: 1 });
    this.go = button("Learn", () => this.toggle(), { class: "main" });
    this.one = button("One batch", () => this.turn({ milliseconds: 0, most: 1 }));
    this.restart = button("Restart", () => this.begin());
    this.about = make("p", { class: "note" });
    this.said = make("p", { class: "readout", role: "status" });
    this.loss = make("canvas", { class: "chart", role: "img" });
    this.answer = make("canvas", { class: "chart", role: "img" });
    this.inputs = make("canvas", { class: "tiles", role: "img" });
    this.gates = make("canvas", { class: "tiles", role: "img" });
    this.legend = make("div", { class: "legend" });
    this.gate = choice("Gate or state", (field) => { this.field = field; this.draw(); });
    this.table = make("div", { class: "behind" });
    this.behind = make("details", { ontoggle: () => this.draw() }, make("summary", {}, "Show as a table"), this.table);
    const group = (title, ...children) => make("div", { class: "group" }, make("h3", {}, title), ...children);
    this.element = make(
      "div",
      {},
      make("div", { class: "toolbar" }, this.task.element, this.kind.element, this.units.element, this.delay.element, this.rate.element, this.seed.element, this.go, this.one, this.restart),
      this.about,
      this.said,
      make(
        "div",
        { class: "columns" },
        make("div", {}, group("Logarithm of the loss, base 10", this.loss), group("A sequence outside the training data: the target is dashed", this.answer)),
        make("div", {}, group("Input", this.inputs), group("Units over time", this.gate.element, this.gates, this.legend, this.behind)),
      ),
    );
    view.on((changed) => {
      if (changed.has("theme")) this.draw();
    });
  }

  get options() {
    const whole = (box, low, high) => Math.max(low, Math.min(high, Math.round(Number(box.value) || 0)));
    const task = this.task.box.value;
    return {
      task,
      kind: this.kind.box.value,
      units: whole(this.units.box, 1, MOST_LEARNING),
      rate: Number(this.rate.box.value),
      seed: whole(this.seed.box, 0, 9999),
      ...(task === "echo" ? { delay: whole(this.delay.box, 0, 15) } : {}),
    };
  }

  async begin() {
    this.running = false;
    const options = this.options;
    this.units.box.value = String(options.units);
    if ("delay" in options) this.delay.box.value = String(options.delay);
    this.seed.box.value = String(options.seed);
    this.delay.element.hidden = !("delay" in options);
    this.about.textContent = TASKS[options.task].text;
    this.form = cellKinds[options.kind];
    const fields = this.form.trace;
    if (!fields.includes(this.field)) this.field = keepsOf(this.form) ?? fields[0];
    this.gate.set(fields.map((field) => [field, field, meaningOf(this.form, field)]), this.field);
    this.losses = [];
    this.rights = [];
    const begun = (this.begun = this.runner.ask("trainer", options));
    const { example } = await begun;
    if (begun !== this.begun) return;
    this.example = example;
    this.draw();
  }

  toggle() {
    this.running = !this.running;
    this.draw();
    if (this.running) this.learn();
  }

  async learn() {
    while (this.running && this.open) {
      await this.turn(TURN);
      await new Promise((resolve) => requestAnimationFrame(resolve));
    }
    this.running = false;
    this.draw();
  }

  async turn(given) {
    const { begun } = this;
    await begun;
    const { losses, example } = await this.runner.ask("train", given);
    if (begun !== this.begun) return; // it was restarted in the meantime
    for (const { loss, accuracy } of losses) {
      this.losses.push(loss);
      this.rights.push(accuracy);
    }
    this.example = example;
    if (losses.some(({ loss }) => !Number.isFinite(loss))) this.running = false;
    this.draw();
  }

  draw() {
    if (!this.open) return;
    if (this.example === null) {
      if (this.begun === undefined) this.begin();
      return;
    }
    const { view, example } = this;
    const task = TASKS[this.task.box.value];
    this.go.textContent = this.running ? "Pause" : "Learn";
    const count = this.losses.length;
    const last = this.losses.slice(-20);
    const mean = last.reduce((sum, one) => sum + one, 0) / Math.max(1, last.length);
    const rights = this.rights.slice(-20).filter((one) => one !== null);
    const right = rights.reduce((sum, one) => sum + one, 0) / Math.max(1, rights.length);
    this.said.textContent = count
      ? `after ${plural(count, "batch", "batches")}: loss ${shown(mean, 3)}${rights.length ? `, ${shown(100 * right, 3)} % of the answers right` : ""}${Number.isFinite(mean) ? "" : ": it has diverged, restart with a smaller learning rate"}`
      : "It hasn't learned yet.";
    this.said.dataset.batches = String(count);
    const logs = new Plane(Float64Array.from(this.losses, (loss) => Math.log10(Math.max(loss, 1e-12))), 1, count);
    drawLines(this.loss, view.colours, count ? [{ plane: logs, unit: 0, colour: view.colours.accent }] : [], { from: 0, span: Math.max(50, count) }, { zero: false, ends: count ? null : { low: -2, high: 0 } });
    this.loss.setAttribute("aria-label", `The loss of each batch. ${this.said.textContent}`);
    const steps = example.target.shape[1];
    const whole = { from: 0, span: steps };
    const target = planeOf(example.target, 0);
    const weight = planeOf(example.weight, 0);
    const asked = new Plane(target.data.map((value, n) => (weight.data[n] ? value : NaN)), target.units, steps);
    const output = planeOf(example.output, 0);
    drawLines(this.answer, view.colours, [
      { plane: output, unit: 0, colour: view.colours.warm },
      { plane: asked, unit: 0, colour: view.colours.muted, dash: [4, 3], gaps: true },
    ], whole);
    this.answer.setAttribute("aria-label", `The network's output at each step, and the target: ${task.outputs.join(", ")}`);
    const given = planeOf(example.input, 0);
    drawTiles(this.inputs, view, given, scaleOf(false, given.range), task.inputs);
    this.inputs.setAttribute("aria-label", `The input of the sequence: ${task.inputs.join(", ")}, over ${steps} steps`);
    const shownPlane = planeOf(example.cells[this.field], 0);
    const scale = scaleOf(isGate(this.form, this.field), shownPlane.range);
    drawTiles(this.gates, view, shownPlane, scale, null);
    replaceChildren(this.legend, ...colourBar(scale, view.theme), make("span", { class: "extent" }, `${this.field}: ${meaningOf(this.form, this.field)}`));
    this.gates.setAttribute("aria-label", `${this.field} of ${shownPlane.units} units over ${steps} steps`);
    if (!this.behind.open) return;
    const rows = [
      ...task.inputs.map((name, n) => [name, ...Array.from(given.line(n), (value) => shown(value, 3))]),
      ...Array.from({ length: shownPlane.units }, (_, unit) => [`${this.field} ${unit}`, ...Array.from(shownPlane.line(unit), (value) => shown(value, 3))]),
    ];
    this.table.replaceChildren(table(["", ...Array.from({ length: steps }, (_, step) => `step ${step}`)], rows, { caption: "The input and the units, by step" }));
  }
}

// The playground: a small network that learns a task live.

import { Plane, planeOf } from "./data.js";
import { behind, button, choice, make, numberBox, plural, replaceChildren, select, shown, table } from "./dom.js";
import { colourBar, drawLines, drawTiles, scaleOf } from "./draw.js";
import { TASKS } from "./engine/training.js";
import { isGate, keepsOf, meaningOf } from "./view.js";

/* global cellKinds */ // the form of each kind of cell, which html.py inserts before the modules

const MOST_LEARNING = 48;
const TURN = { milliseconds: 60, most: 50 }; // training between two redraws
const ANNOUNCED_EVERY = 10000; // milliseconds between announcements to screen readers while it learns
const LOSS_ROWS = 20; // most rows of the table of losses
const KINDS = Object.entries(cellKinds).map(([name, { title }]) => [name, title]);

export class Playground {
  constructor(view, runner) {
    this.view = view;
    this.runner = runner;
    this.open = false;
    this.running = false; // as the reader wants it
    this.busy = false; // until the last batches are done
    this.losses = [];
    this.rights = [];
    this.announcedAt = -Infinity; // the time of the last announcement while it learns
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
    this.said = make("p", { class: "readout" });
    this.announcement = make("p", { class: "screen-reader-only", role: "status" });
    this.loss = make("canvas", { class: "chart", role: "img" });
    this.answer = make("canvas", { class: "chart", role: "img" });
    this.inputs = make("canvas", { class: "tiles", role: "img" });
    this.gates = make("canvas", { class: "tiles", role: "img" });
    this.legend = make("div", { class: "legend" });
    this.gate = choice("Gate or state", (field) => { this.field = field; this.draw(); });
    const tableOf = (title) => behind(title, () => this.draw());
    this.tables = { loss: tableOf("the loss"), answer: tableOf("the sequence outside the training data"), units: tableOf("units over time") };
    const group = (title, ...children) => make("div", { class: "group" }, make("h3", {}, title), ...children);
    this.element = make(
      "div",
      {},
      make("div", { class: "toolbar" }, this.task.element, this.kind.element, this.units.element, this.delay.element, this.rate.element, this.seed.element, this.go, this.one, this.restart),
      this.about,
      this.said,
      this.announcement,
      make(
        "div",
        { class: "columns" },
        make("div", {}, group("Logarithm of the loss, base 10", this.loss, this.tables.loss.element), group("A sequence outside the training data: the target is dashed", this.answer, this.tables.answer.element)),
        make("div", {}, group("Input", this.inputs), group("Units over time", this.gate.element, this.gates, this.legend, this.tables.units.element)),
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
    if (this.running && !this.busy) this.learn();
    this.draw();
  }

  async learn() {
    this.busy = true;
    while (this.running && this.open) {
      await this.turn(TURN);
      await new Promise((resolve) => requestAnimationFrame(resolve));
    }
    this.running = this.busy = false;
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
    const scored = count > 0 && this.rights[0] !== null;
    const mean = (all, from, to) => all.slice(from, to).reduce((sum, one) => sum + one, 0) / (to - from);
    const means = (from, to) => [shown(mean(this.losses, from, to), 3), ...(scored ? [`${shown(100 * mean(this.rights, from, to), 3)} %`] : [])];
    const [loss, right] = means(Math.max(0, count - 20), count);
    this.said.textContent = count
      ? `after ${plural(count, "batch", "batches")}: loss ${loss}${scored ? `, ${right} of the answers right` : ""}${Number.isFinite(this.losses.at(-1)) ? "" : ": it has diverged, restart with a smaller learning rate"}`
      : "It hasn't learned yet.";
    this.said.dataset.batches = String(count);
    this.tell();
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
    const list = ({ element, body }, head, rows) => { if (element.open) body.replaceChildren(table(head, rows())); };
    const part = Math.max(1, Math.ceil(count / LOSS_ROWS));
    list(this.tables.loss, ["batches", "loss", ...(scored ? ["answers right"] : [])], () => Array.from({ length: Math.ceil(count / part) }, (_, n) => {
      const [from, to] = [n * part, Math.min(count, (n + 1) * part)];
      return [to - from > 1 ? `${from + 1} to ${to}` : String(to), ...means(from, to)];
    }));
    const byStep = ["step", ...Array.from({ length: steps }, (_, step) => String(step))];
    const rowsOf = (plane, nameOf) => Array.from({ length: plane.units }, (_, n) => [nameOf(n), ...Array.from(plane.line(n), (value) => (Number.isNaN(value) ? "–" : shown(value, 3)))]);
    list(this.tables.answer, byStep, () => [...rowsOf(given, (n) => task.inputs[n]), ...rowsOf(output, () => "output"), ...rowsOf(asked, () => "target")]);
    list(this.tables.units, byStep, () => rowsOf(shownPlane, (unit) => `${this.field} ${unit}`));
  }

  // Announce the state to screen readers: when learning begins or ends, and now and then in between.
  tell() {
    const now = performance.now();
    if (this.busy && now < this.announcedAt + ANNOUNCED_EVERY) return;
    this.announcedAt = this.busy ? now : -Infinity;
    const text = `${this.busy ? "Learning: " : ""}${this.said.textContent}`;
    if (this.announcement.textContent !== text) this.announcement.textContent = text;
  }
}

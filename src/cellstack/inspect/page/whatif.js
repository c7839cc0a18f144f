// What if: change an input, patch a gate, reset the state, edit a weight; and see the result.

import { countOf, sentenceOf } from "./changes.js";
import { Plane, planeOf } from "./data.js";
import { button, checkbox, make, replaceChildren, select, setChoices, shown, table } from "./dom.js";
import { drawLines, lineColour } from "./draw.js";
import { columnOf } from "./engine/products.js";
import { keepsOf, meaningOf } from "./view.js";

const MOST_SLIDERS = 12; // features of an input at a time
const MOST_WEIGHTS = 24; // weights of one column at a time
const HOWS = [["set", "set to"], ["add", "add"], ["scale", "multiply by"], ["freeze", "freeze"]];

export class WhatIf {
  constructor(view, rerun, changes) {
    this.view = view;
    this.rerun = rerun;
    this.changes = changes;
    this.open = false;
    this.asked = 0;
    this.built = false;
    this.warning = make("p", { class: "note" });
    this.whole = make("div", { class: "columns" });
    this.element = make("div", {}, this.warning, this.whole);
    // inputs
    this.input = select("Input", [], "", () => this.fillInputs(true));
    this.wide = checkbox("over the marked range", false, () => {});
    this.sliders = make("div", { class: "sliders" });
    this.feature = 0; // of the input that the chart shows
    this.inputTitle = make("p", { class: "note" });
    this.inputChart = make("canvas", { class: "chart dragged", role: "img" });
    this.listenToDrags();
    // patches
    this.gate = select("Patch", [], "", () => this.fillPatchForm());
    this.units = select("of", [["unit", ""], ["all", "all units"]], "unit", () => {});
    this.steps = select("at", [["all", "all steps"]], "all", () => {});
    this.how = select("how", HOWS, "set", () => this.fillPatchForm());
    this.value = make("input", { type: "number", step: "any", value: "1", "aria-label": "Value" });
    this.valueField = make("label", { class: "field" }, make("span", {}, "value"), this.value);
    this.add = button("Add patch", () => this.addPatch(), { class: "main" });
    this.patches = make("ul", { class: "patches", "aria-label": "Patches" });
    // resets
    this.reset = button("", () => this.toggleReset());
    // weights
    this.weightGate = select("Weights into", [], "", () => this.fillWeights(true));
    this.weights = make("div", { class: "scroll weights" });
    // outputs
    this.output = select("Output", [], "", () => this.draw());
    this.outputUnit = select("Output unit", [], "", () => this.draw());
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.table = make("div", { class: "scroll" });
    this.status = make("p", { class: "status", role: "status" });
    this.code = make("pre", { tabindex: "0", "aria-label": "The changes as Python" });
    this.copy = button("Copy as Python", () => this.copyCode());
    this.undo = button("Undo all", () => this.changes.undo().then(() => this.refill()));
    changes.listeners.push(() => this.draw());
    view.on((changed) => {
      if (changed.has("row") && changes.any) {
        changes.inputs.clear();
        changes.apply();
      }
      if (["step", "row", "place", "unit", "range"].some((name) => changed.has(name))) this.refill();
      else if (["result", "shows", "theme", "window"].some((name) => changed.has(name))) {
        this.draw();
        if (this.open && this.built && rerun.why === null && !changed.has("result")) this.fillInputs(false);
      }
    });
  }

  build() {
    const { description } = this.view;
    this.built = true;
    if (this.rerun.why !== null) {
      replaceChildren(this.whole);
      this.warning.textContent = this.rerun.why;
      return;
    }
    setChoices(this.input.box, description.inputs.map((input) => input.name), description.inputs[0].name);
    this.input.element.hidden = description.inputs.length < 2;
    setChoices(this.output.box, description.outputs, description.outputs[0]);
    this.output.element.hidden = description.outputs.length < 2;
    const group = (title, ...children) => make("div", { class: "group" }, make("h3", {}, title), ...children);
    this.patchGroup = group("Patch a gate or a state", make("div", { class: "toolbar" }, this.gate.element, this.units.element, this.steps.element, this.how.element, this.valueField, this.add), this.patches);
    this.weightGroup = group("Edit a weight", make("div", { class: "toolbar" }, this.weightGate.element), this.weights);
    replaceChildren(
      this.whole,
      make(
        "div",
        {},
        group("Change an input value", make("div", { class: "toolbar" }, this.input.element, this.wide.element), this.inputTitle, this.inputChart, this.sliders),
        this.patchGroup,
        group("Reset the state", make("p", {}, this.reset)),
        this.weightGroup,
      ),
      make(
        "div",
        { class: "outcome" },
        group("Before and after", make("div", { class: "toolbar" }, this.output.element, this.outputUnit.element), this.chart, this.status, this.table),
        group("The same in Python", make("div", { class: "buttons" }, this.copy, this.undo), this.code),
      ),
    );
    this.fillInputs(true);
    this.fillPatchForm();
    this.fillPatches();
    this.fillWeights(false);
    if (this.changes.difference === null && this.rerun.live) {
      this.changes.check().then(() => this.draw(), (error) => this.changes.say(`This can't be computed: ${error.message}`));
    }
  }

  refill() {
    if (!this.open || this.rerun.why !== null) return;
    this.fillInputs(false);
    this.fillPatchForm();
    this.fillPatches();
    this.fillWeights(false);
    this.draw();
  }

  // ── an input ───────────────────────────────────────────────────────────────────────────────────────────────────────

  async fillInputs(rebuild) {
    const { view, changes } = this;
    const name = this.input.box.value;
    const input = view.description.inputs.find((one) => one.name === name);
    const given = await changes.given();
    const value = given.inputs[name];
    const base = changes.base.get(view.row).inputs[name];
    const width = value.shape.slice(input.timed ? 2 : 1).reduce((a, b) => a * b, 1);
    const [low, high] = base.data.reduce(([a, b], one) => [Math.min(a, one), Math.max(b, one)], [0, 0]);
    const margin = input.ids ? 0 : 0.5 * (high - low) || 1;
    const count = Math.min(width, MOST_SLIDERS);
    const names = view.namesFrom(name);
    this.wide.element.hidden = view.range === null || !input.timed;
    if (rebuild || this.sliderCount !== `${name} ${count}`) {
      this.sliderCount = `${name} ${count}`;
      this.feature = 0;
      this.rows = Array.from({ length: count }, (_, k) => {
        const step = input.ids ? 1 : (high - low + 2 * margin) / 400;
        const title = names?.[k] ?? `${name}[${k}]`;
        const slider = make("input", { type: "range", min: String(low - margin), max: String(high + margin), step: String(step), "aria-label": names?.[k] ?? `${name} ${k}` });
        const number = make("output", {});
        slider.addEventListener("input", () => {
          this.feature = k;
          this.setInput(name, k, width, Number(slider.value), input.timed);
        });
        return { slider, number, head: make("span", {}, title) };
      });
      replaceChildren(this.sliders, ...this.rows.flatMap(({ slider, number, head }) => [head, slider, number]), width > count ? make("span", {}, `and ${width - count} more`) : null);
    }
    this.rows.forEach(({ slider, number }, k) => {
      const at = input.timed ? view.step * width + k : k;
      slider.value = String(value.data[at]);
      number.textContent = shown(value.data[at], 4) + (changes.inputs.get(name)?.has(at) ? ` (was ${shown(base.data[at], 4)})` : "");
    });
    this.inputChart.hidden = this.inputTitle.hidden = !input.timed;
    if (!input.timed) return;
    const planes = [value, base].map((one) => planeOf({ data: one.data, shape: [1, view.steps, width] }, 0));
    const lines = [
      { plane: planes[0], unit: this.feature, colour: view.colours.accent },
      ...(value === base ? [] : [{ plane: planes[1], unit: this.feature, colour: view.colours.muted, dash: [4, 3] }]),
    ];
    const window_ = { ...view.window, steps: view.description.steps };
    const named = names?.[this.feature] ?? `${name}[${this.feature}]`;
    this.inputTitle.textContent = `${named}: drag its line to change it`;
    const chart = drawLines(this.inputChart, view.colours, lines, window_, { cursor: view.step, range: view.range, ends: { low: low - (margin || 0.5), high: high + (margin || 0.5) } });
    this.inputChart.setAttribute("aria-label", `${named} over the steps, to be dragged; the sliders do the same`);
    this.dragged = { name, width, low: low - margin, high: high + margin, ids: input.ids, ...chart };
  }

  // Drag the line of a feature up and down at the step under the pointer.
  listenToDrags() {
    const { inputChart, view } = this;
    const drag = (event) => {
      const { name, width, low, high, ids, value } = this.dragged;
      const at = Math.max(low, Math.min(high, value(event.offsetY)));
      this.setInput(name, this.feature, width, ids ? Math.round(at) : Number(at.toPrecision(4)), true);
    };
    inputChart.addEventListener("pointerdown", (event) => {
      const step = this.dragged?.step(event.offsetX) ?? -1;
      if (step < 0 || step >= view.steps) return;
      inputChart.setPointerCapture(event.pointerId);
      view.set({ step });
      drag(event);
    });
    inputChart.addEventListener("pointermove", (event) => {
      if (inputChart.hasPointerCapture(event.pointerId)) drag(event);
    });
  }

  setInput(name, feature, width, number, timed) {
    const { view, changes } = this;
    if (!changes.inputs.has(name)) changes.inputs.set(name, new Map());
    const own = changes.inputs.get(name);
    const [from, to] = timed && this.wide.box.checked && view.range !== null ? view.range : [view.step, view.step + 1];
    if (!timed) own.set(feature, number);
    else for (let step = from; step < to; step += 1) own.set(step * width + feature, number);
    this.fillInputs(false);
    this.after();
  }

  // After a change: show the result, at once where that is fast.
  after() {
    this.changes.apply();
    this.draw();
  }

  // ── patching a gate or a state ─────────────────────────────────────────────────────────────────────────────────────

  // The selected cell, or the first one.
  get cellPlace() {
    const { view } = this;
    const cells = view.places.filter((place) => place.kind === "cell");
    return cells.find((place) => place === view.place) ?? cells.find((place) => place.name === view.place.name) ?? cells[0] ?? null;
  }

  // The unit of the gate to patch: the selected one, or in another field of an mLSTM one of the same head.
  unitOf(place) {
    const { view } = this;
    const gate = this.gate.box.value;
    return place === view.place && place.cell.form.heads ? view.nearestIn(gate) : Math.min(view.unit, view.unitsOf(place, gate) - 1);
  }

  fillPatchForm() {
    const { view } = this;
    const place = this.cellPlace;
    this.patchGroup.hidden = place === null;
    this.weightGroup.hidden = place === null || Boolean(place.cell.form.heads);
    this.warning.textContent = place?.cell.form.heads ? "The memory of an mLSTM has no weights." : "";
    if (place === null) return;
    const fields = Object.keys(place.cell.fields);
    setChoices(this.gate.box, fields.map((field) => [field, `${field}, ${meaningOf(place.cell.form, field).split(":")[0]}`]), fields.includes(this.gate.box.value) ? this.gate.box.value : keepsOf(place.cell.form) ?? fields[0]);
    setChoices(this.units.box, [["unit", `${view.unitTitle(place, this.gate.box.value, this.unitOf(place))} of ${place.title}`], ["all", "all units"]], this.units.box.value || "unit");
    const { steps } = view.description;
    const choices = [["all", "all steps"], ["cursor", `step ${steps[view.step]}`], ["on", `from step ${steps[view.step]} on`]];
    if (view.range !== null) choices.unshift(["range", `steps ${steps[view.range[0]]} to ${steps[view.range[1] - 1]}, marked`]);
    setChoices(this.steps.box, choices, choices.some(([own]) => own === this.steps.box.value) ? this.steps.box.value : choices[0][0]);
    this.valueField.hidden = this.how.box.value === "freeze";
  }

  addPatch() {
    const { view, changes } = this;
    const place = this.cellPlace;
    const steps = { all: null, cursor: [view.step, view.step + 1, 1], on: [view.step, view.steps, 1], range: view.range === null ? null : [...view.range, 1] }[this.steps.box.value];
    const gate = this.gate.box.value;
    const how = this.how.box.value;
    const value = Number(this.value.value);
    if (how !== "freeze" && (this.value.value.trim() === "" || !Number.isFinite(value))) {
      changes.say("Expected a number as the value.");
      this.value.focus();
      return;
    }
    const unit = this.unitOf(place);
    changes.patches.push({ node: place.name, cell: place.number, gate, units: this.units.box.value === "all" ? null : [unit], rows: null, steps, how, value: how === "freeze" ? null : value });
    this.fillPatches();
    this.after();
  }

  fillPatches() {
    const { changes } = this;
    replaceChildren(
      this.patches,
      ...changes.patches.map((patch, n) => {
        const text = make("span", {}, sentenceOf(patch));
        const most = Math.max(2, Math.abs(patch.value ?? 0) * 2);
        const gate = "ifozr".includes(patch.gate) && patch.how === "set";
        const slider = patch.how === "freeze" ? null : make("input", { type: "range", min: gate ? "0" : String(-most), max: gate ? "1" : String(most), step: String(gate ? 0.01 : most / 100), "aria-label": `Value: ${sentenceOf(patch)}` });
        if (slider !== null) {
          slider.value = String(patch.value);
          slider.addEventListener("input", () => {
            patch.value = Number(slider.value);
            text.textContent = sentenceOf(patch);
            this.after();
          });
        }
        return make("li", {}, text, make("span", { class: "buttons" }, slider, button("Remove", () => {
          changes.patches.splice(n, 1);
          this.fillPatches();
          this.after();
        })));
      }),
    );
  }

  toggleReset() {
    const { view, changes } = this;
    if (changes.resets.has(view.step)) changes.resets.delete(view.step);
    else changes.resets.add(view.step);
    this.after();
  }

  // ── editing a weight ───────────────────────────────────────────────────────────────────────────────────────────────

  async fillWeights(rebuild) {
    const { view, changes } = this;
    const place = this.cellPlace;
    if (place === null || place.cell.form.heads) return;
    if (place.cell.weights === null) {
      replaceChildren(this.weights, make("p", { class: "note" }, "This page has no weights of a cell for this layer."));
      this.weightGate.element.hidden = true;
      return;
    }
    const { spec, form: { blocks } } = place.cell;
    if (rebuild !== true) setChoices(this.weightGate.box, blocks, blocks.includes(this.weightGate.box.value) ? this.weightGate.box.value : blocks[0]);
    const gate = this.weightGate.box.value;
    const unit = Math.min(view.unit, spec.units - 1);
    const key = `${place.key} ${gate} ${unit}`;
    if (this.weightKey === key && !rebuild) {
      this.showWeights?.();
      return;
    }
    this.weightKey = key;
    const column = blocks.indexOf(gate) * spec.units + unit;
    const entries = [];
    const names = view.namesOf(place, "x");
    for (const [name, letter] of [["kernel", "x"], ["recurrent_kernel", "h_prev"], ["bias", "bias"]]) {
      if (place.cell.weights[name] === undefined) continue;
      const stored = await view.store.get(place.cell.weights[name]);
      const { row, rows, at: first, wide } = columnOf(stored.shape.length > 1 ? stored.shape : [1, stored.shape[0]], spec.units, column);
      for (let k = 0; k < rows; k += 1) {
        const at = first + k * wide;
        const title = name === "bias" ? (rows > 1 ? `bias ${k}` : "bias") : (name === "kernel" ? names?.[k] : null) ?? `${letter}[${row + k}]`;
        entries.push({ name, title, at, was: stored.data[at] });
      }
    }
    const some = entries.slice(0, MOST_WEIGHTS);
    const valueOfEdit = ({ name, at, was }) => changes.edits.find((edit) => edit.node === place.name && edit.cell === place.number && edit.name === name && edit.at === at)?.value ?? was;
    const boxes = some.map((entry) => {
      const box = make("input", { type: "number", step: "0.05", "aria-label": `Weight of ${entry.title} into ${gate} of unit ${unit}` });
      box.addEventListener("input", () => {
        const value = Number(box.value);
        if (box.value.trim() === "" || !Number.isFinite(value)) return;
        changes.edits = changes.edits.filter((edit) => !(edit.node === place.name && edit.cell === place.number && edit.name === entry.name && edit.at === entry.at));
        if (value !== entry.was) changes.edits.push({ node: place.name, cell: place.number, name: entry.name, at: entry.at, value });
        this.after();
      });
      return box;
    });
    this.showWeights = () => boxes.forEach((box, n) => {
      if (box.getRootNode().activeElement !== box) box.value = String(Number(valueOfEdit(some[n]).toPrecision(4)));
    });
    this.showWeights();
    this.weightGate.element.hidden = false;
    replaceChildren(
      this.weights,
      make("p", { class: "note" }, `Into ${gate} of unit ${unit} of ${place.title}${entries.length > some.length ? `, the first ${some.length} of ${entries.length}` : ""}:`),
      make("div", { class: "buttons" }, ...some.map((entry, n) => make("label", { class: "field", title: entry.title }, make("span", {}, entry.title), boxes[n]))),
    );
  }

  // ── the result ─────────────────────────────────────────────────────────────────────────────────────────────────────

  async draw() {
    if (!this.open) return;
    if (!this.built) this.build();
    if (this.rerun.why !== null) return;
    const asked = (this.asked += 1);
    const { view, changes } = this;
    const set = changes.resets.has(view.step);
    this.reset.textContent = set ? `Don't reset before ${view.labels.full(view.row, view.step)}` : `Reset the state before ${view.labels.full(view.row, view.step)}`;
    this.reset.setAttribute("aria-pressed", String(set));
    this.code.textContent = changes.any ? changes.python() : "No changes yet.";
    this.copy.disabled = this.undo.disabled = !changes.any;
    const name = this.output.box.value;
    const node = view.description.nodes.find((one) => one.name === name);
    const stored = await view.store.get(node.value);
    if (asked !== this.asked) return;
    const width = stored.shape[1];
    const names = view.namesFrom(name);
    const title = (k) => names?.[k] ?? `${name}[${k}]`;
    if (this.outputUnit.box.options.length !== width || this.outputUnit.box.options[0].text !== title(0)) setChoices(this.outputUnit.box, Array.from({ length: width }, (_, n) => [n, title(n)]), view.firstUnit(node));
    this.outputUnit.element.hidden = width < 2 || !node.timed;
    const unit = Number(this.outputUnit.box.value || 0);
    const after = view.result?.run.values[name] ?? null;
    const step = node.timed ? view.stepOfNode(node, stored.shape[2]) : 0;
    const steps = node.timed ? stored.shape[2] : 1;
    const inUnits = await view.inUnits(node);
    if (asked !== this.asked) return;
    const traced = (k) => stored.data[view.row * width * steps + k * steps + step];
    const computed = (k) => (after === null ? traced(k) : after.data[step * width + k]);
    const before = (k) => inUnits(traced(k), step, k);
    const now = (k) => inUnits(computed(k), step, k);
    this.chart.hidden = !node.timed;
    if (node.timed) {
      const place = view.places.find((one) => one.name === name && one.kind !== "input");
      const raw = await this.outputPlanes(node, place, after);
      const planes = raw.map((plane) => plane && new Plane(Float64Array.from(plane.data, (value, n) => inUnits(value, n % plane.steps, Math.floor(n / plane.steps))), plane.units, plane.steps));
      if (asked !== this.asked) return;
      const stretch = planes[0].steps === view.steps ? 1 : planes[0].steps / view.steps;
      const colour = lineColour("y", view.theme);
      const lines = [
        ...(planes[1] === null ? [] : [{ plane: planes[1], unit, colour: view.colours.warm }]),
        { plane: planes[0], unit, colour: planes[1] === null ? colour : view.colours.muted, dash: planes[1] === null ? null : [4, 3] },
      ];
      drawLines(this.chart, view.colours, lines, { from: view.window.from * stretch, span: view.window.span * stretch, steps: stretch === 1 ? view.description.steps : null }, { cursor: step, range: view.range });
      this.chart.setAttribute("aria-label", `${title(unit)} over the steps: ${shown(before(unit), 5)} at the cursor as traced, ${shown(now(unit), 5)} after the changes`);
    }
    const change = (k) => (Math.abs(computed(k) - traced(k)) <= view.rounding ? 0 : now(k) - before(k)); // ignore rounding
    const rows = Array.from({ length: Math.min(width, 12) }, (_, k) => [title(k), shown(before(k), 5), shown(now(k), 5), shown(change(k), 4)]);
    replaceChildren(this.table, table(["output", "before", "after", "change"], rows, { caption: node.timed ? `At ${view.labels.full(view.row, view.runStep(node, steps))}${width > 12 ? `, the first 12 of ${width}` : ""}` : "Of the row" }));
    const said = [];
    if (changes.status) said.push(changes.status);
    else if (after !== null) said.push(`${countOf(changes)} changed; dashed: before.`);
    if (changes.difference !== null) said.push(`Without changes, this page reproduces the trace to within ${shown(changes.difference, 2)}.`);
    this.status.textContent = said.join(" ");
  }

  async outputPlanes(node, place, after) {
    const { view } = this;
    // For a node with one cell, the map shows the cell's fields; this reads the node's value.
    const own = place?.kind === "value" ? place : { key: `value ${node.name}`, name: node.name, kind: "value", node };
    return [await view.traced(own, "y"), after === null ? null : view.after(own, "y")];
  }

  async copyCode() {
    const text = this.changes.python();
    try {
      await navigator.clipboard.writeText(text);
      this.copy.textContent = "Copied";
    } catch {
      const range = document.createRange(); // a page from a file can't write to the clipboard, but the reader can
      range.selectNodeContents(this.code);
      const selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      this.copy.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (this.copy.textContent = "Copy as Python"), 2500);
  }
}

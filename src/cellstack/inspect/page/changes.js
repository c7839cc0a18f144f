// What the reader has changed, the run that comes of it, and the same in words and in Python.

import { plural, shown } from "./dom.js";

// All that the reader has changed. The run that it leads to goes to the view.
export class Changes {
  constructor(view, rerun) {
    this.view = view;
    this.rerun = rerun;
    this.inputs = new Map(); // name -> Map of a place in the input's array -> number
    this.patches = [];
    this.resets = new Set();
    this.edits = []; // { node, cell, name, at, value }
    this.status = "";
    this.listeners = [];
    this.difference = null; // of a run without changes from the trace
    this.base = new Map(); // row -> what its run takes
  }

  get any() {
    return this.patches.length > 0 || this.resets.size > 0 || this.edits.length > 0 || [...this.inputs.values()].some((own) => own.size > 0);
  }

  // What a run with these changes takes.
  async given() {
    const { row } = this.view;
    if (!this.base.has(row)) this.base.set(row, await this.rerun.given(row));
    const { inputs, options } = this.base.get(row);
    const changed = {};
    for (const [name, value] of Object.entries(inputs)) {
      const own = this.inputs.get(name);
      if (own === undefined || own.size === 0) changed[name] = value;
      else {
        const data = Float64Array.from(value.data);
        for (const [at, number] of own) data[at] = number;
        changed[name] = { ...value, data };
      }
    }
    let { reset } = options;
    if (this.resets.size) {
      reset = reset === null ? new Uint8Array(this.view.steps) : Uint8Array.from(reset);
      for (const step of this.resets) reset[step] = 1;
    }
    return { inputs: changed, options: { ...options, reset, patches: this.patches.map((patch) => ({ ...patch })) }, edits: this.edits };
  }

  say(status) {
    this.status = status;
    for (const listener of this.listeners) listener();
  }

  // Run the network with the changes, and show what it does.
  async apply() {
    const { view } = this;
    if (!this.any) {
      view.set({ result: null, shows: "trace" });
      this.say("");
      return;
    }
    this.say(this.rerun.live ? this.status : "Computing …");
    const row = view.row;
    const given = await this.given();
    const patches = given.options.patches;
    const edits = this.edits.map((edit) => ({ ...edit }));
    try {
      const run = await this.rerun.runner.latest("run", given);
      if (run === null || row !== view.row || !this.any) return;
      const weights = {};
      for (const { node, cell, name, at, value } of edits) {
        const key = `${node}/${cell}`;
        const place = view.places.find((one) => one.key === key);
        weights[key] ??= {};
        if (weights[key][name] === undefined) {
          const stored = await view.store.get(place.cell.weights[name]);
          weights[key][name] = { data: Float64Array.from(stored.data), shape: stored.shape };
        }
        weights[key][name].data[at] = value;
      }
      view.set({ result: { run, planes: new Map(), patches, reset: given.options.reset, weights }, shows: view.shows === "trace" ? "after" : view.shows });
      this.say("");
    } catch (error) {
      this.say(`This can't be computed: ${error.message}`);
    }
  }

  // Run it without a change, and say how far that is from the trace.
  async check() {
    const { view } = this;
    const given = await this.given();
    const run = await this.rerun.runner.ask("run", { ...given, options: { ...given.options, patches: [] }, edits: [] });
    let most = 0;
    for (const name of view.description.outputs) {
      const node = view.description.nodes.find((one) => one.name === name);
      const stored = await view.store.get(node.value);
      const value = run.values[name];
      const [, width, steps] = node.timed ? stored.shape : [0, stored.shape[1], 1];
      for (let step = 0; step < steps; step += 1) {
        for (let k = 0; k < width; k += 1) {
          const before = stored.data[view.row * width * steps + k * steps + step];
          const apart = Math.abs(before - value.data[step * width + k]);
          if (apart > most) most = apart;
        }
      }
    }
    this.difference = most;
    view.rounding = 4 * most;
  }

  undo() {
    this.inputs.clear();
    this.patches = [];
    this.resets.clear();
    this.edits = [];
    return this.apply();
  }

  // The changes as Python.
  python() {
    const { view } = this;
    const row = view.description.row_numbers[view.row];
    const lines = ["import cellstack as cs", ""];
    const step = (at) => view.description.steps[at];
    const several = view.description.inputs.length > 1;
    for (const [name, own] of this.inputs) {
      const { shape } = this.base.get(view.row).inputs[name];
      const width = shape.slice(2).reduce((a, b) => a * b, 1);
      const array = several ? `x[${quoted(name)}]` : "x";
      for (const [at, value] of own) lines.push(shape.length > 2 ? `${array}[${row}, ${step(Math.floor(at / width))}, ${at % width}] = ${plain(value)}` : `${array}[${row}, ${at}] = ${plain(value)}`);
    }
    if (this.resets.size) {
      lines.push("reset = np.zeros(x.shape[:2], bool)");
      lines[0] = "import cellstack as cs\nimport numpy as np";
      for (const at of [...this.resets].sort((a, b) => a - b)) lines.push(`reset[${row}, ${step(at)}] = True`);
    }
    for (const { node, cell, name, at, value } of this.edits) {
      const stored = view.places.find((one) => one.key === `${node}/${cell}`).cell.weights[name];
      const { shape } = view.description.arrays[stored.array];
      const place = shape.length > 1 ? `${Math.floor(at / shape[1])}, ${at % shape[1]}` : at;
      lines.push(`weights = dict(net.nodes[net.names.index(${quoted(node)})].cells[${cell}].arrays)  # then: ${name}[${place}] = ${plain(value)}`);
    }
    if (this.patches.length) {
      lines.push("edited = net.edit(", "    [", ...this.patches.map((patch) => `        ${pythonOf(patch)},`), "    ]", ")");
    }
    lines.push(`t = ${this.patches.length ? "edited" : "net"}.trace(x${this.resets.size ? ", reset=reset" : ""})`);
    return lines.join("\n");
  }
}

function plain(value) {
  return Number.isInteger(value) ? `${value}.0` : String(Number(value.toPrecision(6)));
}

function quoted(text) {
  return JSON.stringify(text);
}

// A patch as `cs.Patch(…)`.
export function pythonOf(patch) {
  const parts = [quoted(patch.node), `gate="${patch.gate}"`];
  if (patch.cell) parts.push(`cell=${patch.cell}`);
  if (patch.units !== null) parts.push(`units=[${patch.units.join(", ")}]`);
  if (patch.steps !== null) parts.push(`steps=slice(${patch.steps[0]}, ${patch.steps[1]})`);
  if (patch.how !== "set") parts.push(`how="${patch.how}"`);
  if (patch.how !== "freeze") parts.push(`value=${plain(patch.value)}`);
  return `cs.Patch(${parts.join(", ")})`;
}

export function countOf(changes) {
  const inputs = [...changes.inputs.values()].reduce((sum, own) => sum + own.size, 0);
  return [
    inputs ? plural(inputs, "input value") : null,
    changes.patches.length ? plural(changes.patches.length, "patch", "patches") : null,
    changes.resets.size ? plural(changes.resets.size, "reset") : null,
    changes.edits.length ? plural(changes.edits.length, "weight") : null,
  ].filter((text) => text !== null).join(", ");
}

// "f of unit 2 of layer_0 is set to 1 at steps 3 to 7".
export function sentenceOf(patch) {
  const units = patch.units === null ? "all units" : `unit ${patch.units.join(", ")}`;
  const steps = patch.steps === null ? "at all steps" : patch.steps[1] - patch.steps[0] === 1 ? `at step ${patch.steps[0]}` : `at steps ${patch.steps[0]} to ${patch.steps[1] - 1}`;
  const value = patch.value === null ? "" : shown(patch.value, 3);
  const how = { set: `set to ${value}`, add: `raised by ${value}`, scale: `multiplied by ${value}`, freeze: "frozen" }[patch.how];
  return `${patch.gate} of ${units} of ${patch.node}${patch.cell ? `, cell ${patch.cell}` : ""}, ${how} ${steps}`;
}

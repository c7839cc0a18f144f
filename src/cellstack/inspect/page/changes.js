// The reader's changes, the run that results from them, and the same changes in words and in Python.

import { plural, shown } from "./dom.js";

// All changes of the reader. The resulting run goes to the view.
export class Changes {
  constructor(view, rerun) {
    this.view = view;
    this.rerun = rerun;
    this.inputs = new Map(); // name -> Map from an index into the input's array -> number
    this.patches = [];
    this.resets = new Set();
    this.edits = []; // { node, cell, name, at, value }
    this.status = "";
    this.listeners = [];
    this.difference = null; // between a run without changes and the trace
    this.base = new Map(); // row -> the arguments of its run
  }

  get any() {
    return this.patches.length > 0 || this.resets.size > 0 || this.edits.length > 0 || [...this.inputs.values()].some((own) => own.size > 0);
  }

  // The arguments of a run with these changes.
  async given() {
    const { row } = this.view;
    if (!this.base.has(row)) this.base.set(row, await this.rerun.given(row));
    const { inputs, options, row: number } = this.base.get(row);
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
    return { inputs: changed, options: { ...options, reset, patches: this.patches.map((patch) => ({ ...patch })) }, edits: this.edits, row: number };
  }

  say(status) {
    this.status = status;
    for (const listener of this.listeners) listener();
  }

  // Run the network with the changes, and show the result.
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

  // Run it without changes, and report the difference from the trace.
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

  cellsOf(name) {
    return this.view.description.nodes.find((node) => node.name === name).cells.length;
  }

  // The changes as Python, for `net` and its input `x`.
  python() {
    const { view } = this;
    const { description } = view;
    const row = description.row_numbers[view.row];
    const lines = [];
    const several = description.inputs.length > 1;
    for (const [name, own] of this.inputs) {
      const { shape } = this.base.get(view.row).inputs[name];
      const width = shape.slice(2).reduce((a, b) => a * b, 1);
      const array = several ? `x[${quoted(name)}]` : "x";
      for (const [at, value] of own) {
        const place = shape.length > 2 ? `${Math.floor(at / width)}, ${at % width}` : at;
        lines.push(`${array}[${row}, ${place}] = ${plain(value)}`);
      }
    }
    if (this.resets.size) {
      const timed = several ? `x[${quoted(description.inputs.find((input) => input.timed).name)}]` : "x";
      lines.push(`reset = np.zeros(${timed}.shape[:2], bool)`);
      for (const at of [...this.resets].sort((a, b) => a - b)) lines.push(`reset[${row}, ${at}] = True`);
    }
    if (this.edits.length) lines.push(...this.editsInPython());
    if (this.patches.length) {
      lines.push("net = net.edit(", "    [", ...this.patches.map((patch) => `        ${pythonOf(patch, this.cellsOf(patch.node) > 1)},`), "    ]", ")");
    }
    lines.push(`t = net.trace(x${this.resets.size ? ", reset=reset" : ""})`);
    const needed = [this.edits.length ? ["import dataclasses", ""] : [], this.resets.size ? ["import numpy as np", ""] : [], ["import cellstack as cs", ""]];
    return [...needed.flat(), ...lines].join("\n");
  }

  // Networks are immutable: one with other weights is built from its parts.
  editsInPython() {
    const { view } = this;
    const lines = ["nodes = list(net.nodes)"];
    for (const place of view.places.filter((one) => one.kind === "cell")) {
      const own = this.edits.filter((edit) => edit.node === place.name && edit.cell === place.number);
      if (!own.length) continue;
      const half = place.node.cells.length / 2;
      const way = place.node.kind !== "Bidirectional" ? "" : place.number < half ? "forward" : "backward";
      const at = way === "backward" ? place.number - half : place.number;
      const stack = way === "" ? "node" : `node.${way}`;
      lines.push(
        `place = net.names.index(${quoted(place.name)})`,
        "node = nodes[place]",
        `cells = list(${stack}.cells)`,
        `arrays = {name: array.copy() for name, array in cells[${at}].arrays.items()}`,
        ...own.map(({ name, at: n, value }) => {
          const { shape } = view.description.arrays[place.cell.weights[name].array];
          return `arrays[${quoted(name)}][${shape.length > 1 ? `${Math.floor(n / shape[1])}, ${n % shape[1]}` : n}] = ${plain(value)}`;
        }),
        `cells[${at}] = cs.nodes.Cell(cells[${at}].spec, **arrays)`,
        way === ""
          ? "nodes[place] = dataclasses.replace(node, cells=tuple(cells))"
          : `nodes[place] = dataclasses.replace(node, ${way}=dataclasses.replace(${stack}, cells=tuple(cells)))`,
      );
    }
    lines.push(
      "inputs = {name: net.shapes[name] for name in net.inputs}",
      "net = cs.Network(nodes, net.names, net.metadata, inputs=inputs, wires=net.wires, outputs=net.outputs)",
    );
    return lines;
  }
}

function plain(value) {
  return Number.isInteger(value) ? `${value}.0` : String(value);
}

function quoted(text) {
  return JSON.stringify(text);
}

// A patch as `cs.Patch(…)`; several: the node has several cells.
function pythonOf(patch, several) {
  const parts = [quoted(patch.node), `gate="${patch.gate}"`];
  if (patch.units !== null) parts.push(`units=[${patch.units.join(", ")}]`);
  if (patch.steps !== null) parts.push(`steps=slice(${patch.steps[0]}, ${patch.steps[1]})`);
  if (patch.how !== "freeze") parts.push(`value=${plain(patch.value)}`);
  if (patch.how !== "set") parts.push(`how="${patch.how}"`);
  if (several) parts.push(`cell=${patch.cell}`);
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

// The selection: row, layer, gate, unit and step, the window of steps, the marked range; and its numbers. Listeners are
// notified of changes once per animation frame.

import { Labels, Plane, planeOf, visible } from "./data.js";
import { LEFT } from "./draw.js";
import { placeIn } from "./heads.js";

// What a gate, a state, or the value of a place is.
export const meaningOf = (form, field) => form?.meanings[field] ?? { x: "input of the cell", y: "output" }[field];

// Whether a field is a gate between closed and open.
export const isGate = (form, field) => Object.hasOwn(form?.gates ?? {}, field) && form.gates[field] !== "candidate";

// The gate that keeps the state, if there is one.
export const keepsOf = ({ gates }) => Object.keys(gates).find((gate) => gates[gate] === "keep");

// Everything the map can show, in the order of the network: { key, title, kind, node, cell, fields }.
function placesOf(description) {
  const places = [];
  for (const input of description.inputs) {
    if (input.value !== null && input.timed) {
      places.push({ key: `input ${input.name}`, title: `${input.name} (input)`, kind: "input", node: input, name: input.name, fields: ["x"], inStep: input.in_step });
    }
  }
  for (const node of description.nodes) {
    node.cells.forEach((cell, number) => {
      const several = node.cells.length > 1;
      const way = node.kind === "Bidirectional" ? (number < node.cells.length / 2 ? ", forward" : ", backward") : "";
      places.push({
        key: `${node.name}/${number}`,
        title: several ? `${node.name}, cell ${number}${way}` : node.name,
        kind: "cell",
        node,
        name: node.name,
        number,
        cell,
        lowest: node.kind === "Bidirectional" ? number % (node.cells.length / 2) === 0 : number === 0,
        fields: [...Object.keys(cell.fields), ...(cell.x === null || cell.form.heads ? [] : ["x"])],
        inStep: node.aligned,
      });
    });
    if (node.value !== null && node.timed && node.cells.length !== 1) {
      places.push({ key: node.name, title: node.cells.length ? `${node.name}, output` : node.name, kind: "value", node, name: node.name, fields: ["y"], inStep: node.in_step });
    }
  }
  return places;
}

export class View {
  constructor(store) {
    this.store = store;
    this.description = store.description;
    const { forms, numbers } = this.description.cells;
    for (const { name, cells } of this.description.nodes) cells.forEach((cell, n) => Object.assign(cell, { form: forms[numbers[name][n]] }));
    this.places = placesOf(store.description);
    this.labels = new Labels(store.description);
    this.steps = store.description.steps.length;
    const first = this.places.find((place) => place.kind === "cell") ?? this.places[0] ?? null;
    this.row = 0;
    this.place = first;
    this.field = first === null ? null : first.fields.includes("h") ? "h" : first.fields[0];
    this.unit = 0;
    this.step = 0;
    this.window = { from: 0, span: Math.max(1, this.steps) };
    this.range = null; // [from, to) of steps, marked
    this.left = LEFT; // the margin of the map, wider for names
    this.order = "number";
    this.theme = "light";
    this.result = null; // the result after a change: { planes: Map, run }
    this.shows = "trace"; // or "after", or "difference"
    this.rounding = 0; // difference between an unchanged run and the trace; smaller ones count as 0
    this.matches = []; // [from, to, row] of steps
    this.planes = new Map();
    this.listeners = [];
    this.changed = new Set();
    this.waiting = false;
    this.drawn = Promise.resolve();
  }

  on(listener) {
    this.listeners.push(listener);
  }

  // Change the selection: { step: 3 }; dependent values are kept in bounds.
  set(changes) {
    const moves = this.place?.cell?.form.heads && "field" in changes && !("unit" in changes) && !("place" in changes);
    if (moves) changes = { ...changes, unit: this.nearestIn(changes.field) };
    for (const [name, value] of Object.entries(changes)) {
      if (this[name] !== value) {
        this[name] = value;
        this.changed.add(name);
      }
    }
    if ("place" in changes && !this.place.fields.includes(this.field)) this.field = this.place.fields.includes("h") ? "h" : this.place.fields[0];
    if (this.changed.size && !this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => this.notify());
    }
  }

  notify() {
    const changed = this.changed;
    this.changed = new Set();
    this.waiting = false;
    for (const listener of this.listeners) listener(changed);
  }

  // The number of steps of a place: as the first input, or different.
  stepsOf(place) {
    if (place === null) return this.steps;
    const reference = place.kind === "cell" ? Object.values(place.cell.fields)[0] : place.node.value;
    return this.description.arrays[reference.array].shape[2];
  }

  unitsOf(place, field) {
    const reference = place.kind === "cell" ? (field === "x" ? place.cell.x : place.cell.fields[field]) : place.node.value;
    return this.description.arrays[reference.array].shape[1];
  }

  // The step of a place at the cursor: the same index where it has as many steps as the run, else in proportion.
  stepAt(place) {
    const own = this.stepsOf(place);
    if (own === this.steps || !this.steps) return Math.min(this.step, own - 1);
    return Math.min(own - 1, Math.floor((this.step * own) / this.steps));
  }

  // The step at the cursor of a node with `own` steps; the output of a forecast has only the last steps of the run.
  stepOfNode(node, own) {
    if (own === this.steps) return this.step;
    if (this.forecasts(node)) return Math.max(0, this.step - (this.steps - own));
    return Math.min(own - 1, Math.floor((this.step * own) / this.steps));
  }

  // The run's step to which that step belongs.
  runStep(node, own) {
    return this.forecasts(node) ? Math.max(this.step, this.steps - own) : this.step;
  }

  // Whether a node's output is a forecast.
  forecasts(node) {
    const { answer, outputs } = this.description;
    return answer.task === "forecast" && outputs.includes(node.name);
  }

  // The unit of an output to show first: the median of a forecast.
  firstUnit(node) {
    return this.forecasts(node) ? Math.max(0, this.description.answer.quantiles.indexOf(0.5)) : 0;
  }

  // A function of a value, its step and its unit, which returns the value of an output in its original units.
  async inUnits(node) {
    const { answer, outputs, arrays } = this.description;
    if (answer.rescale === null || !outputs.includes(node.name)) return (value) => value;
    const [scale, offset] = await Promise.all(answer.rescale.map((one) => this.store.get(one)));
    const [rows, ...rest] = arrays[answer.rescale[0].array].shape;
    const size = scale.data.length / rows;
    const width = rest.at(-1);
    return (value, step, unit) => {
      const at = this.row * size + step * width + unit;
      return value * scale.data[at] + offset.data[at];
    };
  }

  // The names of the units of a field: the channels of an input, the classes of an output; null where it has none.
  namesOf(place, field) {
    if (place.kind !== "cell") return this.shownNames(place.node.names);
    const { heads } = place.cell.form;
    if (heads && field !== "x") {
      const length = this.unitsOf(place, field);
      const each = length / heads;
      return Array.from({ length }, (_, unit) => `head ${Math.floor(unit / each)}${each > 1 ? ` [${unit % each}]` : ""}`);
    }
    return field === "x" && place.lowest ? this.namesFrom(place.node.sources[0]) : null;
  }

  // The names of the features of an input or a node.
  namesFrom(name) {
    const { inputs, nodes } = this.description;
    return this.shownNames([...inputs, ...nodes].find((one) => one.name === name)?.names ?? null);
  }

  shownNames(names) {
    return names === null || this.description.answer.task !== "text" ? names : names.map(visible);
  }

  // "0", or "0 (customer 17)".
  rowTitle(row) {
    const { row_numbers: numbers, row_ids: ids } = this.description;
    return `${numbers[row]}${ids === null || ["", String(numbers[row])].includes(ids[row]) ? "" : ` (${ids[row]})`}`;
  }

  // "unit 3", or the feature's name.
  unitTitle(place, field, unit) {
    return this.namesOf(place, field)?.[unit] ?? `unit ${this.unitNumber(place, field, unit)}`;
  }

  // The step and the unit where h changes most: the page opens there. The start is left out, where each state leaves its
  // initial value: the first eighth of the steps that aren't masked.
  async opening() {
    const { place } = this;
    if (place?.kind !== "cell") return { step: 0, unit: 0 };
    const plane = await this.traced(place, "h");
    const mask = await this.mask(place);
    const used = Array.from({ length: plane.steps }, (_, step) => step).filter((step) => mask === null || mask[step]);
    if (place.cell.reverse) used.reverse();
    const start = Math.max(1, Math.ceil(used.length / 8));
    const changes = new Float64Array(used.length); // of all units together, squared
    for (let unit = 0; unit < plane.units; unit += 1) {
      const line = plane.line(unit);
      for (let n = start; n < used.length; n += 1) {
        const change = line[used[n]] - line[used[n - 1]];
        if (Number.isFinite(change)) changes[n] += change * change;
      }
    }
    const at = changes.reduce((best, change, n) => (change > changes[best] ? n : best), 0);
    const found = { step: used[at] ?? 0, unit: 0 };
    if (at > 0) {
      const sizes = Array.from({ length: plane.units }, (_, unit) => Math.abs(plane.at(unit, used[at]) - plane.at(unit, used[at - 1])));
      found.unit = sizes.reduce((best, size, unit) => (size > sizes[best] || !Number.isFinite(sizes[best]) ? unit : best), 0);
    }
    if (plane.steps !== this.steps) found.step = Math.floor((found.step * this.steps) / plane.steps);
    return found;
  }

  // The place of the selected unit in another field of its layer; undefined where that has none.
  unitIn(field) {
    const { place } = this;
    return placeIn(place.cell?.form.heads, this.unit, this.unitsOf(place, this.field), this.unitsOf(place, field));
  }

  // The same in an mLSTM, or the first place of the same head.
  nearestIn(field) {
    return this.unitIn(field) ?? (this.unitIn("m") * this.unitsOf(this.place, field)) / this.place.cell.form.heads;
  }

  // The number of a unit in its layer: a trace may cover only some of them.
  unitNumber(place, field, unit) {
    if (place === null || place.kind !== "cell" || field === "x") return unit;
    const { cell } = place;
    return field === "h" && cell.spec.proj_size ? unit : (cell.units[unit] ?? unit);
  }

  // One row's plane of a field in the trace.
  async traced(place, field, row = this.row) {
    const key = `${row} ${place.key} ${field}`;
    if (!this.planes.has(key)) {
      const reference = place.kind === "cell" ? (field === "x" ? place.cell.x : place.cell.fields[field]) : place.node.value;
      this.planes.set(
        key,
        this.store.get(reference).then(({ data, shape: [, units, steps] }) => {
          const size = units * steps;
          return new Plane(data.subarray(row * size, (row + 1) * size), units, steps);
        }),
      );
    }
    return this.planes.get(key);
  }

  // The field after the changes; null without changes.
  after(place, field) {
    const { result } = this;
    if (result === null) return null;
    const key = `${place.key} ${field}`;
    if (!result.planes.has(key)) {
      const { cells, values } = result.run;
      let value = null;
      if (place.kind !== "cell") value = values[place.name];
      else if (field !== "x") value = cells[place.name][place.number][field];
      else if (place.lowest) value = values[place.node.sources[0]];
      result.planes.set(key, value && value.shape.length >= 3 ? planeOf(value, 0) : null);
    }
    return result.planes.get(key);
  }

  // The plane that the map shows.
  async plane(place = this.place, field = this.field) {
    const traced = await this.traced(place, field);
    const after = this.shows === "trace" ? null : this.after(place, field);
    if (after === null) return traced;
    if (this.shows === "after") return after;
    const difference = after.data.map((value, n) => (Math.abs(value - traced.data[n]) <= this.rounding ? 0 : value - traced.data[n]));
    return new Plane(difference, after.units, after.steps);
  }

  // The mask of a cell's row: True at used steps; null = all.
  async mask(place) {
    if (place.kind !== "cell" || place.cell.mask === null) return null;
    const { data, shape } = await this.store.get(place.cell.mask);
    return data.subarray(this.row * shape[1], (this.row + 1) * shape[1]);
  }

  // The patches of the shown run: the network's own, and the reader's.
  get patches() {
    const own = this.description.patches;
    return this.shows !== "trace" && this.result !== null ? [...own, ...this.result.patches] : own;
  }

  // The steps before which a cell's state was reset in the shown run; null = none.
  async resets(place) {
    if (place.kind !== "cell") return null;
    if (this.shows !== "trace" && this.result !== null) return this.result.reset;
    const stored = await this.store.get(place.cell.reset);
    return stored === null ? null : stored.data.subarray(this.row * stored.shape[1], (this.row + 1) * stored.shape[1]);
  }

  // Keep a window in bounds: all steps, or as many as fit with cells of a readable size. A short trace fills the width,
  // unless its cells would be very wide.
  move(from, span, width) {
    const most = Math.max(this.steps, width / 200);
    const wide = Math.min(most, Math.max(Math.min(4, most), width / 72, span));
    const start = Math.max(0, Math.min(from, this.steps - wide));
    this.set({ window: { from: start, span: wide, steps: this.description.steps } });
  }

  // Bring the cursor into the window.
  follow() {
    const { from, span } = this.window;
    if (this.step < from || this.step + 1 > from + span) {
      const start = Math.max(0, Math.min(this.step - span / 2, this.steps - span));
      this.set({ window: { ...this.window, from: start } });
    }
  }
}

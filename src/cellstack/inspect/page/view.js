// What is looked at: which row, layer, gate, unit and step, which window of steps, which range is marked; and the numbers
// of it. Whoever shows something is told what has changed, once a frame.

import { Labels, Plane, planeOf } from "./data.js";

export const MEANINGS = {
  i: "input gate: how much of the candidate is written",
  f: "forget gate: how much of the cell is kept",
  g: "candidate: what may be written",
  o: "output gate: how much of the cell is shown",
  c: "cell: what the unit remembers",
  h: "output of the unit, which the next step sees too",
  z: "update gate: how much of the state is kept",
  r: "reset gate: how much of the state the candidate sees",
  x: "what goes into the cell",
  y: "what comes out",
};

// Everything that a map can show, in the order of the network: { key, title, kind, node, cell, fields }.
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
      const way = node.kind === "Bidirectional" ? (number < node.cells.length / 2 ? ", forwards" : ", backwards") : "";
      places.push({
        key: `${node.name}/${number}`,
        title: several ? `${node.name}, cell ${number}${way}` : node.name,
        kind: "cell",
        node,
        name: node.name,
        number,
        cell,
        lowest: node.kind === "Bidirectional" ? number % (node.cells.length / 2) === 0 : number === 0,
        fields: [...Object.keys(cell.fields), ...(cell.x === null ? [] : ["x"])],
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
    this.order = "number";
    this.theme = "light";
    this.result = null; // what the network does after a change: { planes: Map, run }
    this.shows = "trace"; // or "after", or "difference"
    this.rounding = 0; // how far a run without a change is from the trace: what is no difference
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

  // Change what is looked at: { step: 3 }; what it leads to is kept in bounds.
  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      if (this[name] !== value) {
        this[name] = value;
        this.changed.add(name);
      }
    }
    if ("place" in changes && !this.place.fields.includes(this.field)) this.field = this.place.fields.includes("h") ? "h" : this.place.fields[0];
    if (this.changed.size && !this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => this.tell());
    }
  }

  tell() {
    const changed = this.changed;
    this.changed = new Set();
    this.waiting = false;
    for (const listener of this.listeners) listener(changed);
  }

  // How many steps a place has: as the first input, or its own number.
  stepsOf(place) {
    if (place === null) return this.steps;
    const reference = place.kind === "cell" ? Object.values(place.cell.fields)[0] : place.node.value;
    return this.description.arrays[reference.array].shape[2];
  }

  unitsOf(place, field) {
    const reference = place.kind === "cell" ? (field === "x" ? place.cell.x : place.cell.fields[field]) : place.node.value;
    return this.description.arrays[reference.array].shape[1];
  }

  // The step of a place at the cursor: its own number where it has as many as the run, else in proportion.
  stepAt(place) {
    const own = this.stepsOf(place);
    if (own === this.steps || !this.steps) return Math.min(this.step, own - 1);
    return Math.min(own - 1, Math.floor((this.step * own) / this.steps));
  }

  // The number of a unit in its layer: a trace may hold some of them.
  unitNumber(place, field, unit) {
    if (place === null || place.kind !== "cell" || field === "x") return unit;
    const { cell } = place;
    return field === "h" && cell.spec.output_size !== cell.spec.units ? unit : (cell.units[unit] ?? unit);
  }

  // One row's plane of a field as it was traced.
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

  // What the field is after the changes; null where nothing was changed.
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

  // What the map shows.
  async plane(place = this.place, field = this.field) {
    const traced = await this.traced(place, field);
    const after = this.shows === "trace" ? null : this.after(place, field);
    if (after === null) return traced;
    if (this.shows === "after") return after;
    const difference = after.data.map((value, n) => (Math.abs(value - traced.data[n]) <= this.rounding ? 0 : value - traced.data[n]));
    return new Plane(difference, after.units, after.steps);
  }

  // The mask of a cell's row: which steps were used; null = all.
  async mask(place) {
    if (place.kind !== "cell" || place.cell.mask === null) return null;
    const { data, shape } = await this.store.get(place.cell.mask);
    return data.subarray(this.row * shape[1], (this.row + 1) * shape[1]);
  }

  // The patches that what is shown now was run with: the network's own, and the reader's.
  get patches() {
    const own = this.description.patches;
    return this.shows !== "trace" && this.result !== null ? [...own, ...this.result.patches] : own;
  }

  // Before which steps the state of a cell was reset, in what is shown now; null = none.
  async resets(place) {
    if (place.kind !== "cell") return null;
    if (this.shows !== "trace" && this.result !== null) return this.result.reset;
    const stored = await this.store.get(place.cell.reset);
    return stored === null ? null : stored.data.subarray(this.row * stored.shape[1], (this.row + 1) * stored.shape[1]);
  }

  // Keep a window in bounds: as wide as there are steps, or as wide as cells of a good size make it.
  move(from, span, width) {
    const most = Math.max(this.steps, width / 72);
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

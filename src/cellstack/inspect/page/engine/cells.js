// Cells over time: an interpreter of their recorded step, with patches. A cell is { spec, form, arrays }, see
// `form_of` in views/recorded.py.

import { numbersIn } from "./shapes.js";
import { cellActivation } from "./activations.js";
import { OPERATIONS, startOf } from "./operations.js";
import { productParts } from "./products.js";
import { compiledPatches, patched } from "./patches.js";

// The length of an axis that is `count` blocks of a width.
function lengthOf([count, letter], { form, spec: { units, input_size: inputs, proj_size: projected, heads, backbone_units: backbone } }) {
  const widths = { H: units, P: projected, I: inputs - (form.scalar ? 1 : 0), X: inputs, D: units / heads, U: backbone };
  return count * (widths[letter] ?? 1);
}

export function copy(to, at, from, start, count) {
  for (let n = 0; n < count; n += 1) to[at + n] = from[start + n];
}

export const byName = (entries, of) => Object.fromEntries(Object.entries(entries).map(([name, one]) => [name, of(one, name)]));

// The shape of each array, and the width of each state, of a cell, by name.
export const cellShapes = (cell) => byName(cell.form.shapes, (axes) => axes.map((axis) => lengthOf(axis, cell)));
export const stateSizes = (cell) => byName(cell.form.states, ({ width }) => lengthOf(width, cell));

// Values that are parts of others, and read from where they are.
export const isPart = ({ operation }) => ["split", "features", "part"].includes(operation);
const isGiven = ({ operation }) => ["x", "state", "weight"].includes(operation);

// A forward pass of a cell: `fields`, its traced gates and states [B, T, ·] and their pre-activations; `after`, its states after
// the last step; and with `keep`, what the backward pass needs.
export class CellPass {
  // x [B, T, I]; state { h, … } of Float64Arrays or null; mask and reset [B·T] or null; patches of this cell.
  constructor(cell, x, B, T, { state, mask, reset, reverse, patches, pre, keep }) {
    const { spec, form } = cell;
    Object.assign(this, { cell, x, B, T, state, mask, reset, reverse, keep });
    this.sizes = stateSizes(cell);
    const plane = (width) => ({ data: new Float64Array(B * T * width), shape: [B, T, width] });
    const widths = Object.fromEntries(form.values.flatMap(({ operation, name, width }) => (operation === "record" ? [[name, lengthOf(width, cell)]] : [])));
    this.fields = Object.fromEntries(form.trace.map((name) => [name, plane(this.sizes[name] ?? widths[name])]));
    this.patches = compiledPatches(patches, byName(this.fields, ({ shape }) => shape[2]), B, T);
    this.pre = pre ? Object.fromEntries(form.blocks.map((gate) => [gate, plane(spec.units)])) : {};
    this.after = byName(this.sizes, (size) => new Float64Array(B * size));
    this.now = byName(this.sizes, (size) => new Float64Array(size));
    this.compile();
    this.states = Object.entries(form.states).map(([name, { kept }], n) => this.stateOf(name, kept, n));
    for (let row = 0; row < B; row += 1) this.runRow(row);
    if (pre) this.fields.pre = this.pre;
  }

  // Where each value of the step is stored, and the operations that compute them. A record without patches is stored
  // where its operand is.
  compile() {
    const { cell, fields, keep, patches } = this;
    const { values } = cell.form;
    const users = values.map((_, n) => values.flatMap(({ of }, user) => (of.includes(n) ? [user] : [])));
    const isSame = ({ operation, of: [source], name }) =>
      operation === "record" && !patches[name] && users[source].length === 1 && Object.hasOwn(OPERATIONS, values[source].operation);
    const same = values.map(isSame);
    const isRead = (n) =>
      OPERATIONS[values[n].operation]?.returns ||
      users[n].some((user) => OPERATIONS[values[user].operation]?.reads || ((same[user] || isPart(values[user])) && isRead(user)));
    this.vectors = [];
    this.operations = [];
    values.forEach((value, n) => {
      const [a, b, c] = value.of.map((source) => this.vectors[source]);
      const named = same[users[n][0]] ? values[users[n][0]] : value; // the record that is stored here
      const field = named.operation === "record" && !(named.name in this.sizes) ? fields[named.name].data : null;
      this.vectors[n] = same[n] ? a : this.vectorOf(value, a, field, keep && isRead(n));
      if (isPart(value) || isGiven(value)) return;
      const known = OPERATIONS[value.operation] ?? this.recordOf(value);
      this.operations.push({ run: known.run, back: known.back, y: this.vectors[n], a, b, c, given: known.given ?? this.givenOf(value) });
    });
  }

  // The vector of a value; `kept`: at every position, else only at the current one.
  vectorOf({ operation, name, part, width: axis }, source, field, kept) {
    const { cell, x, B, T, keep } = this;
    const width = lengthOf(axis, cell);
    const vector = { data: null, from: 0, stride: 0, width, slopes: null, slopesFrom: 0, slopesStride: 0 };
    const first = operation === "part" ? part : (part ?? 0) * width;
    if (isPart({ operation })) return { ...vector, data: source.data, from: source.from + first, stride: source.stride };
    if (operation === "weight") return { ...vector, data: cell.arrays[name].data, from: (part ?? 0) * width };
    if (operation === "x") return { ...vector, data: x, stride: width };
    const every = field !== null || kept || (operation === "state" && keep);
    return { ...vector, data: field ?? new Float64Array(every ? B * T * width : width), stride: every ? width : 0 };
  }

  // What an operation needs in addition to its operands.
  givenOf({ operation, name, part, numbers }) {
    const { cell, keep, B, T } = this;
    const { units, norm_epsilon: epsilon } = cell.spec;
    if (operation === "product") {
      const { data: matrix, shape } = cell.arrays[name];
      return { name, matrix, slopes: null, wide: shape.at(-1), parts: productParts(shape, units, part) };
    }
    if (operation === "activation") return cellActivation(cell.form.activations[name]);
    if (operation === "clip") return numbers[0];
    if (operation === "affine") return numbers;
    if (["outer", "contract"].includes(operation)) return cell.form.heads;
    if (operation !== "norm") return null;
    const ends = numbers.map((_, n) => numbers.slice(0, n + 1).reduce((sum, one) => sum + one) * units);
    const parts = ends.map((end, n) => [end - numbers[n] * units, numbers[n] * units]);
    const every = keep ? parts.length : 0;
    return { parts, epsilon, every, deviations: new Float64Array(keep ? B * T * parts.length : parts.length) };
  }

  // A record as an operation: a copy of its operand with its patches, and the pre-activations of a gate.
  recordOf({ name, of: [source] }) {
    const list = this.patches[name] ?? null;
    const { states, before: places } = this.cell.form;
    const before = name in states ? this.vectors[places[Object.keys(states).indexOf(name)]] : null;
    const sums = this.sumsOf(source, name);
    const pre = sums === null ? null : (this.pre[name]?.data ?? null);
    const run = ({ y, a }, at) => {
      if (pre !== null) copy(pre, at * y.width, sums.data, startOf(sums, at), y.width);
      if (y !== a) copy(y.data, startOf(y, at), a.data, startOf(a, at), y.width);
      if (list === null) return;
      const from = before !== null ? startOf(before, at) : this.last < 0 ? -1 : startOf(y, this.last);
      patched(list, y.data, startOf(y, at), this.row, this.t, (before ?? y).data, from);
    };
    return { run, back: null, given: { name, list, before, kept: states[name]?.kept ?? 0 } };
  }

  // The vector of the pre-activations of a gate, before a clip. Where value n isn't its activation, they are the gate's part
  // of the sums that the step begins with; null if it has none.
  sumsOf(n, name) {
    const { values, blocks } = this.cell.form;
    const { operation, of: [source] } = values[n];
    if (operation !== "activation") {
      return this.vectors[values.findIndex((value) => value.operation === "split" && value.part === blocks.indexOf(name))] ?? null;
    }
    return this.vectors[values[source].operation === "clip" ? values[source].of[0] : source];
  }

  // A state after the step: `value` after zoneout, which keeps a part of the state before; patched, unless the step has
  // done so.
  stateOf(name, kept, n) {
    const { form } = this.cell;
    const after = form.after[n];
    const { operation, name: own, of } = form.values[after];
    const recorded = operation === "record" && own === name;
    const value = this.vectors[recorded && kept ? of[0] : after];
    const patches = recorded && !kept ? null : (this.patches[name] ?? null);
    return { name, size: this.sizes[name], kept, recorded, value, patches, before: this.vectors[form.before[n]], now: this.now[name], plane: this.fields[name]?.data };
  }

  begin(row, state) {
    for (const { name, size, now } of this.states) {
      const learned = this.cell.arrays[`initial_${name}`];
      if (state !== null) now.set(state[name].subarray(row * size, (row + 1) * size));
      else if (learned) now.set(learned.data);
      else now.fill(0);
    }
  }

  runRow(row) {
    const { T, mask, reset, states, operations } = this;
    this.begin(row, this.state);
    this.row = row;
    this.last = -1; // the position of the previous used step
    for (let n = 0; n < T; n += 1) {
      const t = this.reverse ? T - 1 - n : n;
      const at = row * T + t;
      if (reset !== null && reset[at]) this.begin(row, null);
      if (mask === null || mask[at]) {
        this.t = t;
        for (let k = 0; k < states.length; k += 1) states[k].before.data.set(states[k].now, startOf(states[k].before, at));
        for (let k = 0; k < operations.length; k += 1) operations[k].run(operations[k], at);
        for (let k = 0; k < states.length; k += 1) this.finish(states[k], at);
        this.last = at;
      }
      for (let k = 0; k < states.length; k += 1) states[k].plane?.set(states[k].now, at * states[k].size);
    }
    for (const { name, size, now } of states) this.after[name].set(now, row * size);
  }

  finish({ kept, value, before, now, patches }, at) {
    const [i, j] = [startOf(value, at), startOf(before, at)];
    if (kept === 0) copy(now, 0, value.data, i, now.length);
    else for (let u = 0; u < now.length; u += 1) now[u] = kept * before.data[j + u] + (1 - kept) * value.data[i + u];
    if (patches !== null) patched(patches, now, 0, this.row, this.t, before.data, j);
  }
}

// Cells over time: the equations of reference.py, and patches.

import { floats, numbersIn, shapeText, slicedEntries } from "./shapes.js";
import { betweenOf, cellActivation } from "./activations.js";
import { addNumbers, addProduct, normaliseRow } from "./products.js";

export const GATE_NAMES = { lstm: ["i", "f", "g", "o"], gru: ["z", "r", "g"], rnn: ["g"] };

// The fields of CellSpec that a description may omit, with their defaults.
export const USUAL_SPEC = {
  kind: "lstm",
  activation: "tanh",
  recurrent_activation: "sigmoid",
  use_bias: true,
  gate_activations: {},
  peepholes: false,
  coupled: false,
  proj_size: 0,
  layer_norm: false,
  norm_epsilon: 1e-5,
  clip: null,
  cell_clip: null,
  zoneout: 0,
  zoneout_cell: 0,
  reset_after: true,
  learn_initial_state: false,
};

// Gates with a block of H columns in the arrays, in order.
const weighedGates = (spec) => GATE_NAMES[spec.kind].filter((gate) => !(spec.coupled && gate === "f"));
export const outputSize = (spec) => spec.proj_size || spec.units;

// The name of the activation of a gate, or of an LSTM's "cell".
export function slotActivation(spec, slot) {
  const usual = slot === "g" || slot === "cell" ? spec.activation : spec.recurrent_activation;
  return spec.gate_activations[slot] ?? usual;
}

// The shape of each array of a cell, by name, in the order of a native file.
export function cellShapes(spec) {
  const [H, P, lstm] = [spec.units, outputSize(spec), spec.kind === "lstm"];
  const wide = weighedGates(spec).length * H;
  const shapes = { kernel: [spec.input_size, wide], recurrent_kernel: [P, wide] };
  if (spec.use_bias) shapes.bias = spec.kind === "gru" && spec.reset_after ? [2, wide] : [wide];
  if (spec.peepholes) shapes.peepholes = [wide / H - 1, H];
  if (spec.proj_size) shapes.projection = [H, P];
  if (spec.layer_norm) Object.assign(shapes, { kernel_gain: [wide], recurrent_gain: [wide] });
  if (spec.layer_norm && lstm) Object.assign(shapes, { cell_gain: [H], cell_bias: [H] });
  if (spec.learn_initial_state) shapes.initial_h = [P];
  if (spec.learn_initial_state && lstm) shapes.initial_c = [H];
  return shapes;
}

// The indices of an axis that a patch names, in their order: all of them, a list, or a slice { start, stop, step }.
function patchedEntries(patch, name, index, length) {
  if (index === null || index === undefined) return Array.from({ length }, (_, n) => n);
  const found = Array.isArray(index) ? index : slicedEntries([index.start, index.stop, index.step], length);
  const bad = found.find((entry) => !Number.isInteger(entry) || entry < 0 || entry >= length);
  if (bad !== undefined) {
    throw new Error(`patch of ${patch.node}: expected ${name} from 0 to ${length - 1}, got ${bad}`);
  }
  return found;
}

// The position of each index of an axis among the entries of a patch; -1 where it isn't one.
function placesAmong(entries, length) {
  const places = new Int32Array(length).fill(-1);
  entries.forEach((entry, place) => {
    places[entry] = place;
  });
  return places;
}

// The patches of one cell by gate, in order, in the form that `patched` takes. `value` is a number, or a
// value that broadcasts to the patch's [rows, steps, units].
function compiledPatches(patches, gates, H, P, B, T) {
  const found = {};
  for (const patch of patches) {
    const { node, gate, how, value } = patch;
    if (!gates.includes(gate)) {
      throw new Error(`patch of ${node}: expected gate to be one of ${gates.join(", ")}, got ${gate}`);
    }
    if (!["set", "add", "scale", "freeze"].includes(how)) {
      throw new Error(`patch of ${node}: expected how to be set, add, scale or freeze, got ${how}`);
    }
    if (how !== "freeze" && typeof value !== "number" && !Array.isArray(value?.shape)) {
      throw new Error(`patch of ${node}: expected a number or numbers as value to ${how}, got ${value}`);
    }
    // A list of three, as in a what-if, is a slice; patches of a file name the fields of the slice.
    const steps = Array.isArray(patch.steps)
      ? { start: patch.steps[0], stop: patch.steps[1], step: patch.steps[2] }
      : (patch.steps?.numbers ?? patch.steps);
    const named = [
      patchedEntries(patch, "rows", patch.rows, B),
      patchedEntries(patch, "steps", steps, T),
      patchedEntries(patch, "units", patch.units, gate === "h" ? P : H),
    ];
    const { data, shape } = typeof value === "number" || how === "freeze" ? { data: [value], shape: [] } : value;
    const whole = [...new Array(Math.max(0, 3 - shape.length)).fill(1), ...shape];
    const fits = (length, n, axis) => length === 1 || length === n || (axis === 1 && length > n); // a slice clipped to the run
    if (whole.length > 3 || !whole.every((length, axis) => fits(length, named[axis].length, axis))) {
      const expected = named.map((entries) => entries.length).join(", ");
      throw new Error(`patch of ${node}: expected a value that fits [${expected}], got ${shapeText(shape)}`);
    }
    const strides = whole.map((length, axis) => (length === 1 ? 0 : numbersIn(whole.slice(axis + 1))));
    const [rows, times] = [placesAmong(named[0], B), placesAmong(named[1], T)];
    const units = Int32Array.from(named[2]);
    (found[gate] ??= []).push({ units, rows, steps: times, how, data: floats(data), strides });
  }
  return found;
}

// Apply patches to v[at…] at a step of a row; before[from…] is its value at the previous step, if any.
function patched(list, v, at, row, t, before, from) {
  for (const { units, rows, steps, how, data, strides } of list) {
    if (rows[row] < 0 || steps[t] < 0) continue;
    const first = rows[row] * strides[0] + steps[t] * strides[1];
    for (let n = 0; n < units.length; n += 1) {
      const u = units[n];
      const value = data[first + n * strides[2]];
      if (how === "set") v[at + u] = value;
      else if (how === "add") v[at + u] += value;
      else if (how === "scale") v[at + u] = value === 0 ? 0 : v[at + u] * value;
      else if (from >= 0) v[at + u] = before[from + u];
    }
  }
}

// Backward pass of `patched`: dv[at…] becomes the gradient of its input; frozen parts go to dbefore[0…].
export function patchedBack(list, dv, at, row, t, dbefore, from) {
  for (let p = list.length - 1; p >= 0; p -= 1) {
    const { units, rows, steps, how, data, strides } = list[p];
    if (rows[row] < 0 || steps[t] < 0 || how === "add") continue;
    const first = rows[row] * strides[0] + steps[t] * strides[1];
    for (let n = 0; n < units.length; n += 1) {
      const d = at + units[n];
      if (how === "set") dv[d] = 0;
      else if (how === "scale") dv[d] *= data[first + n * strides[2]];
      else if (from >= 0) {
        dbefore[units[n]] += dv[d];
        dv[d] = 0;
      }
    }
  }
}

// A forward pass of a cell: its fields [B, T, H], and with `keep`, what the backward pass needs.
export class CellPass {
  // x [B, T, I]; state { h, c } of Float64Arrays or null; mask and reset [B·T] or null; patches of this cell.
  constructor(cell, x, B, T, { state, mask, reset, reverse, patches, pre, keep }) {
    const spec = cell.spec;
    Object.assign(this, { cell, spec, x, B, T, state, mask, reset, reverse, keep });
    const H = (this.H = spec.units);
    const P = (this.P = outputSize(spec));
    this.lstm = spec.kind === "lstm";
    this.names = GATE_NAMES[spec.kind];
    this.weighed = weighedGates(spec);
    const G = (this.G = this.weighed.length);
    this.patches = compiledPatches(patches, [...this.names, ...(this.lstm ? ["c", "h"] : ["h"])], H, P, B, T);
    const plane = () => new Float64Array(B * T * H);
    this.gates = Object.fromEntries(this.names.map((gate) => [gate, plane()]));
    this.pre = pre || keep ? Object.fromEntries(this.weighed.map((gate) => [gate, plane()])) : null;
    this.c = this.lstm ? plane() : null;
    this.h = new Float64Array(B * T * P);
    this.after = { h: new Float64Array(B * P), c: this.lstm ? new Float64Array(B * H) : null };
    this.act = Object.fromEntries(this.weighed.map((gate) => [gate, this.activationAt(gate)]));
    if (this.lstm) this.act.cell = this.activationAt("cell");
    if (keep) {
      this.hBefore = new Float64Array(B * T * P);
      this.cBefore = this.lstm ? plane() : null;
      this.slopes = Object.fromEntries(Object.keys(this.act).map((slot) => [slot, plane()]));
      if (this.lstm) Object.assign(this, { seen: plane(), cAct: plane(), inside: new Uint8Array(B * T * H).fill(1) });
      if (spec.kind === "gru" && spec.reset_after) this.q = plane();
      if (spec.layer_norm) {
        const wide = () => new Float64Array(B * T * G * H);
        const parts = () => new Float64Array(B * T * 2);
        this.units = { a: wide(), b: wide(), c: plane() };
        this.deviations = { a: parts(), b: parts(), c: new Float64Array(B * T) };
      }
    }
    const numbers = (n) => new Float64Array(n);
    this.scratch = { a: numbers(G * H), b: numbers(G * H), v: numbers(H), w: numbers(H) };
    this.now = { h: new Float64Array(P), c: new Float64Array(H) };
    this.before = { h: new Float64Array(P), c: new Float64Array(H) };
    for (let row = 0; row < B; row += 1) this.runRow(row);
  }

  activationAt(slot) {
    return cellActivation(slotActivation(this.spec, slot));
  }

  begin(row, state) {
    const { now, P, H, cell } = this;
    for (const [name, size] of this.lstm ? [["h", P], ["c", H]] : [["h", P]]) {
      const learned = cell.arrays[`initial_${name}`];
      if (state !== null) now[name].set(state[name].subarray(row * size, (row + 1) * size));
      else if (learned) now[name].set(learned.data);
      else now[name].fill(0);
    }
  }

  runRow(row) {
    const { T, P, H, now, before, mask, reset, lstm } = this;
    this.begin(row, this.state);
    let last = -1; // the previous used step
    for (let n = 0; n < T; n += 1) {
      const t = this.reverse ? T - 1 - n : n;
      const at = row * T + t;
      if (reset !== null && reset[at]) this.begin(row, null);
      if (mask === null || mask[at]) {
        before.h.set(now.h);
        before.c.set(now.c);
        if (this.keep) this.hBefore.set(now.h, at * P);
        if (this.keep && lstm) this.cBefore.set(now.c, at * H);
        if (lstm) this.stepLSTM(row, t, at, last);
        else if (this.spec.kind === "gru") this.stepGRU(row, t, at, last);
        else this.stepRNN(row, t, at, last);
        last = at;
      }
      this.h.set(now.h, at * P);
      if (lstm) this.c.set(now.c, at * H);
    }
    this.after.h.set(now.h, row * P);
    if (lstm) this.after.c.set(now.c, row * H);
  }

  // z[0…] = LN(v·w)⊙gain, without LN where the cell has none; for a GRU, z and r separately from g.
  product(z, name, v, vAt, n, at, columns = this.G * this.H) {
    const { arrays } = this.cell;
    const wide = this.G * this.H;
    addProduct(z, 0, v, vAt, n, arrays[name].data, 0, wide, columns);
    if (!this.spec.layer_norm) return;
    const [key, gain] = name === "kernel" ? ["a", arrays.kernel_gain.data] : ["b", arrays.recurrent_gain.data];
    const cuts = this.spec.kind === "gru" ? [0, 2 * this.H, wide] : [0, wide];
    for (let part = 0; part + 1 < cuts.length; part += 1) {
      const [from, to] = [cuts[part], cuts[part + 1]];
      const unit = this.keep ? this.units[key] : null;
      const epsilon = this.spec.norm_epsilon;
      const deviation = normaliseRow(z, from, to - from, gain, from, null, epsilon, unit, at * wide + from);
      if (this.keep) this.deviations[key][at * 2 + part] = deviation;
    }
  }

  // The activation of a gate with pre-activations z[zAt…], including its patches.
  activate(gate, z, zAt, row, t, at, last) {
    const { H } = this;
    const { f, slope, alpha, beta } = this.act[gate];
    const clip = this.spec.clip ?? Infinity;
    const y = this.gates[gate];
    const pre = this.pre === null ? null : this.pre[gate];
    const slopes = this.keep ? this.slopes[gate] : null;
    for (let u = 0; u < H; u += 1) {
      const sum = z[zAt + u];
      const cut = clip === Infinity ? sum : betweenOf(sum, -clip, clip);
      const value = f(cut, alpha, beta);
      y[at * H + u] = value;
      if (pre !== null) pre[at * H + u] = sum;
      if (slopes !== null) slopes[at * H + u] = Math.abs(sum) < clip ? slope(cut, value, alpha, beta) : 0;
    }
    this.patch(gate, y, at * H, row, t, y, last < 0 ? -1 : last * H);
  }

  patch(gate, v, at, row, t, before, from) {
    const list = this.patches[gate];
    if (list !== undefined) patched(list, v, at, row, t, before, from);
  }

  // h after zoneout, of h_new in v, with its patches.
  leave(v, row, t) {
    const { P, now, before } = this;
    const kept = this.spec.zoneout;
    for (let u = 0; u < P; u += 1) now.h[u] = kept === 0 ? v[u] : kept * before.h[u] + (1 - kept) * v[u];
    this.patch("h", now.h, 0, row, t, before.h, 0);
  }

  stepLSTM(row, t, at, last) {
    const { H, P, G, spec, gates, now, before, keep, x } = this;
    const { arrays } = this.cell;
    const { a: z, b, v: seen, w: m } = this.scratch;
    z.fill(0);
    this.product(z, "kernel", x, at * spec.input_size, spec.input_size, at);
    if (spec.layer_norm) {
      b.fill(0);
      this.product(b, "recurrent_kernel", before.h, 0, P, at);
      addNumbers(z, 0, b, 0, G * H);
    } else {
      this.product(z, "recurrent_kernel", before.h, 0, P, at);
    }
    if (spec.use_bias) addNumbers(z, 0, arrays.bias.data, 0, G * H);
    const o = (G - 1) * H; // start of o's block; f's block precedes g's unless coupled
    if (spec.peepholes) {
      const p = arrays.peepholes.data;
      for (let u = 0; u < H; u += 1) z[u] += p[u] * before.c[u];
      if (!spec.coupled) for (let u = H; u < 2 * H; u += 1) z[u] += p[u] * before.c[u - H];
    }
    this.activate("i", z, 0, row, t, at, last);
    if (spec.coupled) {
      for (let u = at * H; u < (at + 1) * H; u += 1) gates.f[u] = 1 - gates.i[u];
      this.patch("f", gates.f, at * H, row, t, gates.f, last < 0 ? -1 : last * H);
    } else {
      this.activate("f", z, H, row, t, at, last);
    }
    this.activate("g", z, o - H, row, t, at, last);
    const kept = spec.zoneout_cell;
    const bound = spec.cell_clip ?? Infinity;
    for (let u = 0; u < H; u += 1) {
      const n = at * H + u;
      const c = gates.f[n] * before.c[u] + gates.i[n] * gates.g[n];
      seen[u] = bound === Infinity ? c : betweenOf(c, -bound, bound);
      now.c[u] = kept === 0 ? seen[u] : kept * before.c[u] + (1 - kept) * seen[u];
      if (keep && bound !== Infinity) this.inside[n] = Math.abs(c) < bound ? 1 : 0;
    }
    this.patch("c", seen, 0, row, t, before.c, 0); // the c that o and φ use
    this.patch("c", now.c, 0, row, t, before.c, 0); // the kept c: the same except for zoneout
    if (spec.peepholes) {
      const p = arrays.peepholes.data;
      for (let u = 0; u < H; u += 1) z[o + u] += p[o - H + u] * seen[u];
    }
    this.activate("o", z, o, row, t, at, last);
    if (keep) this.seen.set(seen, at * H);
    if (spec.layer_norm) {
      const { cell_gain: gain, cell_bias: bias } = arrays;
      const unit = keep ? this.units.c : null;
      const deviation = normaliseRow(seen, 0, H, gain.data, 0, bias.data, spec.norm_epsilon, unit, at * H);
      if (keep) this.deviations.c[at] = deviation;
    }
    const { f, slope, alpha, beta } = this.act.cell;
    for (let u = 0; u < H; u += 1) {
      const y = f(seen[u], alpha, beta);
      if (keep) {
        this.cAct[at * H + u] = y;
        this.slopes.cell[at * H + u] = slope(seen[u], y, alpha, beta);
      }
      m[u] = gates.o[at * H + u] * y;
    }
    if (spec.proj_size) {
      seen.fill(0); // no longer needed
      addProduct(seen, 0, m, 0, H, arrays.projection.data, 0, P, P);
      this.leave(seen, row, t);
    } else {
      this.leave(m, row, t);
    }
  }

  stepGRU(row, t, at, last) {
    const { H, spec, gates, before, x } = this;
    const { arrays } = this.cell;
    const { a, b: q, v, w: h } = this.scratch;
    const wide = 3 * H;
    a.fill(0);
    q.fill(0);
    this.product(a, "kernel", x, at * spec.input_size, spec.input_size, at);
    this.product(q, "recurrent_kernel", before.h, 0, H, at, spec.reset_after ? wide : 2 * H);
    if (spec.use_bias) {
      addNumbers(a, 0, arrays.bias.data, 0, wide);
      if (spec.reset_after) addNumbers(q, 0, arrays.bias.data, wide, wide);
    }
    addNumbers(a, 0, q, 0, 2 * H);
    this.activate("z", a, 0, row, t, at, last);
    this.activate("r", a, H, row, t, at, last);
    if (spec.reset_after) {
      if (this.keep) this.q.set(q.subarray(2 * H), at * H);
      for (let u = 0; u < H; u += 1) a[2 * H + u] += gates.r[at * H + u] * q[2 * H + u];
    } else {
      for (let u = 0; u < H; u += 1) v[u] = gates.r[at * H + u] * before.h[u];
      addProduct(a, 2 * H, v, 0, H, arrays.recurrent_kernel.data, 2 * H, wide, H);
    }
    this.activate("g", a, 2 * H, row, t, at, last);
    for (let u = 0; u < H; u += 1) {
      const z = gates.z[at * H + u];
      h[u] = z * before.h[u] + (1 - z) * gates.g[at * H + u];
    }
    this.leave(h, row, t);
  }

  stepRNN(row, t, at, last) {
    const { H, spec, gates, before, x } = this;
    const { a: z, b } = this.scratch;
    z.fill(0);
    b.fill(0);
    this.product(z, "kernel", x, at * spec.input_size, spec.input_size, at);
    this.product(b, "recurrent_kernel", before.h, 0, H, at);
    addNumbers(z, 0, b, 0, H);
    if (spec.use_bias) addNumbers(z, 0, this.cell.arrays.bias.data, 0, H);
    this.activate("g", z, 0, row, t, at, last);
    this.leave(gates.g.subarray(at * H, (at + 1) * H), row, t);
  }

  get fields() {
    const { B, T, H, P } = this;
    const found = {};
    for (const gate of this.names) found[gate] = { data: this.gates[gate], shape: [B, T, H] };
    if (this.lstm) found.c = { data: this.c, shape: [B, T, H] };
    found.h = { data: this.h, shape: [B, T, P] };
    if (this.pre !== null) {
      const of = ([gate, data]) => [gate, { data, shape: [B, T, H] }];
      found.pre = Object.fromEntries(Object.entries(this.pre).map(of));
    }
    return found;
  }
}

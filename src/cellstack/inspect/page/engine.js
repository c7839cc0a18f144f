// The engine: a network run in the browser, forward and backward, in float64 and plain typed arrays.
//
// The equations are those of src/cellstack/reference.py, which every result is held against in the tests. It makes no
// request, reads no document and keeps nothing between calls, so the same text runs in a page and in a worker.
//
// WHAT GOES IN
//
//   payload   what `cellstack.inspect.payload.payload_of(network)` returns: { description, arrays }, the description of
//             docs/format.md and its arrays by name, { dtype, shape, data }, where data is base64 or a typed array.
//   network   readNetwork(payload):
//             { inputs: [{ name, shape }], outputs: [name], nodes: [{ name, type, sources: [name], settings: {…},
//               arrays: { name: { data, shape } },
//               cells: [{ spec: {…every field of CellSpec…}, arrays: { kernel: { data, shape }, … } }] }],
//               patches: as of the options }
//             A bidirectional node's cells are the forward half's, then the backward half's.
//   a value   { data: Float64Array (or any array of numbers), shape: [B, …] }; the last axis runs fastest.
//   inputs    { name: value }, one for each of network.inputs; ids of an embedding are numbers too, [B, T].
//   options   all of them may be left out:
//     state     one entry for each cell, in the order of the nodes and of their cells: { h: value [B, P], c: value
//               [B, H] } (c of an LSTM), or null for the cell's own initial state.
//     mask      [B, T] of 0 and 1 (an array of B·T numbers, or a value), 1 where a step counts; for every input that
//               has a time axis, or { name: mask } for each its own.
//     reset     [B, T] likewise, 1 where a new piece begins.
//     patches   [{ node, cell, gate, units, rows, steps, how, value }], which act after those that the network has:
//               gate "i" "f" "g" "o" "c" "h" of an LSTM, "z" "r" "g" "h" of a GRU, "g" "h" of a SimpleRNN; units and
//               rows lists of numbers or { start, stop, step }, steps [start, stop, step] or { start, stop, step } as
//               Python slices, or { numbers: [number] }, counted in the order of time; all of them where it is null or
//               left out; how "set", "add", "scale" or "freeze"; value a number, or a value that broadcasts to the
//               rows, steps and units named. A gate is changed right after its activation, c after the cell clip and
//               zoneout, before o and h see it, h last of all. "freeze": what it was after the step before; at a
//               row's first step the state begun with, and for a gate its own value. Steps that the mask leaves out
//               stay as they are.
//     pre       false: leave the pre-activations out, which saves memory.
//
// WHAT COMES OUT
//
//   unsupported(network)             [sentence, …]: what isn't served, by name. Empty: all of it is.
//   multiplications(network, steps)  how many one row's run over so many steps takes: some 10^9 a second.
//   run(network, inputs, options)
//     { values: { name: value },     of every input, in the memory that was given, and of every node
//       cells: { node: [{ i, f, g, o, c, h, pre: { i, f, g, o } }] },
//                                    of each node that has cells: z, r, g, h of a GRU, g, h of a SimpleRNN; values
//                                    [B, T, H] in the order of time whichever way the cell ran. `pre`: what the gates
//                                    are activations of, before a clip; a coupled f has none. Where the mask leaves a
//                                    step out, gates and pre are 0, and c and h are carried.
//       state: [{ h, c }] }          after the last step, as options.state
//   gradient(network, inputs, options, of)
//     of    { value: name, row, step, unit } one number of an input's or a node's value; step is left out of [B, W];
//           { node, cell, gate, row, step, unit } one number of a gate or state ("c", "h") of a cell;
//           { seeds: { name: array or value } } the gradient of a loss by what nodes return.
//     { inputs: { name: value },     null for ids
//       values: { name: value },     of every node, what it returned; null where the number doesn't depend on it
//       cells: { node: [{ i, f, g, o, c, h }] },  by each gate after its activation, and by each state, of every step
//       state: [{ h, c }],           by the state before the first step
//       arrays: { node: [{ kernel, … }] } }       one entry a cell; of a node without cells one entry, or none
//   createTrainer(options)           the playground: see there
//   cellActivation(text)             what an activation of a cell such as "hard_sigmoid(0.2, 0.5)" is: { name, f, slope,
//                                    alpha, beta }, y = f(z, alpha, beta) and dy/dz = slope(z, y, alpha, beta); or null
//
// All of these throw an Error whose message is a sentence, where what goes in doesn't fit.

// ── activations ─────────────────────────────────────────────────────────────────────────────────────────────────────

const identityOf = (z) => z;
const sigmoidOf = (z) => 0.5 * (1 + Math.tanh(0.5 * z)); // that of exp(-z) overflows
const betweenOf = (z, low, high) => Math.min(Math.max(z, low), high); // a NaN stays one
const SELU_ALPHA = 1.6732632423543772;
const SELU_SCALE = 1.0507009873554805;
const GELU_ROOT = Math.sqrt(2 / Math.PI);

// The error function, for z >= 0 and below 6 by 2/sqrt(pi)·e^(-z²)·(z + 2z³/3 + 4z⁵/15 + …), whose terms are all of one
// sign, and 1 to double precision beyond. Ref: Abramowitz and Stegun 1964, 7.1.6.
function errorFunction(z) {
  const x = Math.abs(z);
  if (!(x < 6)) return Number.isNaN(z) ? z : Math.sign(z);
  let term = x;
  let sum = x;
  for (let n = 1; term > sum * 1e-17; n += 1) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return Math.sign(z) * 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

const geluShare = (z) => 0.5 + 0.5 * errorFunction(z * Math.SQRT1_2);
const geluTanh = (z) => Math.tanh(GELU_ROOT * (z + 0.044715 * z * z * z));

// name -> [y of z, alpha, beta; its slope dy/dz of z, y, alpha, beta]
const ACTIVATION_TABLE = {
  sigmoid: [sigmoidOf, (z, y) => y * (1 - y)],
  tanh: [(z) => Math.tanh(z), (z, y) => 1 - y * y],
  linear: [identityOf, () => 1],
  relu: [(z) => (z <= 0 ? 0 : z), (z) => (z > 0 ? 1 : 0)],
  hard_sigmoid: [(z, a, b) => betweenOf(a * z + b, 0, 1), (z, y, a) => (y > 0 && y < 1 ? a : 0)],
  softsign: [(z) => z / (1 + Math.abs(z)), (z) => 1 / (1 + Math.abs(z)) ** 2],
  softplus: [(z) => Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z))), (z) => sigmoidOf(z)],
  elu: [(z, a) => (z > 0 ? z : a * Math.expm1(Math.min(z, 0))), (z, y, a) => (z > 0 ? 1 : y + a)],
  affine: [(z, a, b) => a * z + b, (z, y, a) => a],
  leaky_relu: [(z, a) => (z > 0 ? z : a * z), (z, y, a) => (z > 0 ? 1 : a)],
  thresholded_relu: [(z, a) => (z <= a ? 0 : z), (z, y, a) => (z > a ? 1 : 0)],
  scaled_tanh: [(z, a, b) => a * Math.tanh(b * z), (z, y, a, b) => a * b * (1 - (y / a) ** 2)],
};

// Those that nodes have beside these; softmax and log_softmax, which take a row together, are in `activateRows`.
const NODE_ACTIVATION_TABLE = {
  silu: [(z) => z * sigmoidOf(z), (z) => sigmoidOf(z) * (1 + z * (1 - sigmoidOf(z)))],
  gelu: [(z) => z * geluShare(z), (z) => geluShare(z) + z * Math.exp(-0.5 * z * z) / Math.sqrt(2 * Math.PI)],
  gelu_tanh: [
    (z) => 0.5 * z * (1 + geluTanh(z)),
    (z) => 0.5 * (1 + geluTanh(z)) + 0.5 * z * (1 - geluTanh(z) ** 2) * GELU_ROOT * (1 + 3 * 0.044715 * z * z),
  ],
  selu: [
    (z) => SELU_SCALE * (z > 0 ? z : SELU_ALPHA * Math.expm1(Math.min(z, 0))),
    (z, y) => (z > 0 ? SELU_SCALE : y + SELU_SCALE * SELU_ALPHA),
  ],
  exponential: [(z) => Math.exp(z), (z, y) => y],
  relu6: [(z) => betweenOf(z, 0, 6), (z) => (z > 0 && z < 6 ? 1 : 0)],
};
const ROW_ACTIVATIONS = ["softmax", "log_softmax"];
const USUAL_PARAMETERS = {
  hard_sigmoid: [1 / 6, 0.5],
  elu: [1],
  affine: [1, 0],
  leaky_relu: [0.2],
  thresholded_relu: [1],
  scaled_tanh: [1, 1],
};

// What a text such as "hard_sigmoid(0.2, 0.5)" names: { name, f, slope, alpha, beta }; null where it isn't in `table`.
function namedActivation(text, table) {
  const match = /^\s*(\w+)\s*(?:\(([^()]*)\))?\s*$/.exec(text);
  if (match === null || !Object.hasOwn(table, match[1])) return null;
  const usual = USUAL_PARAMETERS[match[1]] ?? [];
  const given = match[2] === undefined ? usual : match[2].split(",").map(Number);
  if (given.length !== usual.length || !given.every(Number.isFinite)) return null;
  const [f, slope] = table[match[1]];
  return { name: match[1], f, slope, alpha: given[0] ?? 0, beta: given[1] ?? 0 };
}

export const cellActivation = (text) => namedActivation(text, ACTIVATION_TABLE);
const nodeActivation = (text) => namedActivation(text, { ...ACTIVATION_TABLE, ...NODE_ACTIVATION_TABLE });
const knowsNodeActivation = (text) => ROW_ACTIVATIONS.includes(text) || nodeActivation(text) !== null;

// y of rows z of so many numbers.
function activateRows(text, z, width) {
  const y = new Float64Array(z.length);
  if (!ROW_ACTIVATIONS.includes(text)) {
    const { f, alpha, beta } = nodeActivation(text);
    for (let n = 0; n < z.length; n += 1) y[n] = f(z[n], alpha, beta);
    return y;
  }
  for (let at = 0; at < z.length; at += width) {
    let most = -Infinity;
    let sum = 0;
    for (let n = at; n < at + width; n += 1) most = Math.max(most, z[n]);
    for (let n = at; n < at + width; n += 1) sum += Math.exp(z[n] - most);
    for (let n = at; n < at + width; n += 1) {
      y[n] = text === "softmax" ? Math.exp(z[n] - most) / sum : z[n] - most - Math.log(sum);
    }
  }
  return y;
}

// The gradient by z of what `activateRows` made of it.
function activateRowsBack(text, z, y, width, dy) {
  const dz = new Float64Array(z.length);
  if (!ROW_ACTIVATIONS.includes(text)) {
    const { slope, alpha, beta } = nodeActivation(text);
    for (let n = 0; n < z.length; n += 1) dz[n] = dy[n] * slope(z[n], y[n], alpha, beta);
    return dz;
  }
  for (let at = 0; at < z.length; at += width) {
    let sum = 0;
    for (let n = at; n < at + width; n += 1) sum += text === "softmax" ? dy[n] * y[n] : dy[n];
    for (let n = at; n < at + width; n += 1) {
      dz[n] = text === "softmax" ? y[n] * (dy[n] - sum) : dy[n] - Math.exp(y[n]) * sum;
    }
  }
  return dz;
}

// ── products ────────────────────────────────────────────────────────────────────────────────────────────────────────

// y[yAt…] += x[xAt…]·w, where w has n rows of `stride` numbers, of which m from wAt on are used. Four rows a turn: y is
// then read and written a quarter as often.
function addProduct(y, yAt, x, xAt, n, w, wAt, stride, m) {
  let k = 0;
  for (; k + 4 <= n; k += 4) {
    const x0 = x[xAt + k];
    const x1 = x[xAt + k + 1];
    const x2 = x[xAt + k + 2];
    const x3 = x[xAt + k + 3];
    const w0 = wAt + k * stride;
    const w1 = w0 + stride;
    const w2 = w1 + stride;
    const w3 = w2 + stride;
    for (let j = 0; j < m; j += 1) {
      y[yAt + j] += x0 * w[w0 + j] + x1 * w[w1 + j] + x2 * w[w2 + j] + x3 * w[w3 + j];
    }
  }
  for (; k < n; k += 1) {
    const x0 = x[xAt + k];
    const w0 = wAt + k * stride;
    for (let j = 0; j < m; j += 1) y[yAt + j] += x0 * w[w0 + j];
  }
}

// dx[xAt…] += w·dy[yAt…], the way back of `addProduct` to x.
function addProductBack(dx, xAt, n, w, wAt, stride, m, dy, yAt) {
  for (let k = 0; k < n; k += 1) {
    const row = wAt + k * stride;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    let j = 0;
    for (; j + 4 <= m; j += 4) {
      s0 += w[row + j] * dy[yAt + j];
      s1 += w[row + j + 1] * dy[yAt + j + 1];
      s2 += w[row + j + 2] * dy[yAt + j + 2];
      s3 += w[row + j + 3] * dy[yAt + j + 3];
    }
    for (; j < m; j += 1) s0 += w[row + j] * dy[yAt + j];
    dx[xAt + k] += s0 + s1 + (s2 + s3);
  }
}

// dw += x·dy, the way back of `addProduct` to w.
function addOuter(dw, wAt, stride, x, xAt, n, dy, yAt, m) {
  for (let k = 0; k < n; k += 1) {
    const xk = x[xAt + k];
    const row = wAt + k * stride;
    for (let j = 0; j < m; j += 1) dw[row + j] += xk * dy[yAt + j];
  }
}

function addNumbers(y, yAt, x, xAt, n) {
  for (let j = 0; j < n; j += 1) y[yAt + j] += x[xAt + j];
}

// v[at…] becomes LN(v)⊙gain + bias; LN(v) goes to `unit` at the same place where there is one. Returns the deviation.
function normaliseRow(v, at, n, gain, gainAt, bias, epsilon, unit, unitAt) {
  let mean = 0;
  for (let j = 0; j < n; j += 1) mean += v[at + j];
  mean /= n;
  let variance = 0;
  for (let j = 0; j < n; j += 1) variance += (v[at + j] - mean) ** 2;
  const deviation = Math.sqrt(variance / n + epsilon);
  for (let j = 0; j < n; j += 1) {
    const u = (v[at + j] - mean) / deviation;
    if (unit !== null) unit[unitAt + j] = u;
    v[at + j] = (gain === null ? u : u * gain[gainAt + j]) + (bias === null ? 0 : bias[gainAt + j]);
  }
  return deviation;
}

// dv[at…], the gradient by what `normaliseRow` returned, becomes that by what it took; dgain and dbias are added to.
function normaliseRowBack(dv, at, n, gain, gainAt, dgain, dbias, unit, unitAt, deviation) {
  let mean = 0;
  let along = 0;
  for (let j = 0; j < n; j += 1) {
    const d = dv[at + j];
    const u = unit[unitAt + j];
    if (dgain !== null) dgain[gainAt + j] += d * u;
    if (dbias !== null) dbias[gainAt + j] += d;
    dv[at + j] = gain === null ? d : d * gain[gainAt + j];
    mean += dv[at + j];
    along += dv[at + j] * u;
  }
  mean /= n;
  along /= n;
  for (let j = 0; j < n; j += 1) dv[at + j] = (dv[at + j] - mean - unit[unitAt + j] * along) / deviation;
}

// ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const GATE_NAMES = { lstm: ["i", "f", "g", "o"], gru: ["z", "r", "g"], rnn: ["g"] };

// The fields of CellSpec that a description may leave out, with what they are then.
const USUAL_SPEC = {
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

// Gates that have a block of H columns in the arrays, in order.
const weighedGates = (spec) => GATE_NAMES[spec.kind].filter((gate) => !(spec.coupled && gate === "f"));
const outputSize = (spec) => spec.proj_size || spec.units;

// The text of the activation of a gate, or of an LSTM's "cell".
function slotActivation(spec, slot) {
  const usual = slot === "g" || slot === "cell" ? spec.activation : spec.recurrent_activation;
  return spec.gate_activations[slot] ?? usual;
}

// The shape of each array of a cell, by name, in the order of a native file.
function cellShapes(spec) {
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

// The numbers that a patch names of an axis, in their order: all of them, a list, or a slice { start, stop, step }.
function patchedEntries(patch, name, index, length) {
  if (index === null || index === undefined) return Array.from({ length }, (_, n) => n);
  const found = Array.isArray(index) ? index : slicedEntries([index.start, index.stop, index.step], length);
  const bad = found.find((entry) => !Number.isInteger(entry) || entry < 0 || entry >= length);
  if (bad !== undefined) {
    throw new Error(`patch of ${patch.node}: expected ${name} from 0 to ${length - 1}, got ${bad}`);
  }
  return found;
}

// Which place each number of an axis has among the entries of a patch; -1 where it isn't one.
function placesAmong(entries, length) {
  const places = new Int32Array(length).fill(-1);
  entries.forEach((entry, place) => {
    places[entry] = place;
  });
  return places;
}

// The patches of one cell by gate, later ones after earlier ones, as `patched` takes them. `value` is a number, or a
// value that broadcasts to [rows, steps, units], those that the patch names.
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
    // A list of three, as a what-if says steps, is a slice; a patch of a file has them by name.
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
    const fits = (length, n, axis) => length === 1 || length === n || (axis === 1 && length > n); // a slice cut to the run
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

// What patches make of v[at…] at a step of a row; before[from…] is what it was at the step before, if there was one.
function patched(list, v, at, row, t, before, from) {
  for (const { units, rows, steps, how, data, strides } of list) {
    if (rows[row] < 0 || steps[t] < 0) continue;
    const first = rows[row] * strides[0] + steps[t] * strides[1];
    for (let n = 0; n < units.length; n += 1) {
      const u = units[n];
      const value = data[first + n * strides[2]];
      if (how === "set") v[at + u] = value;
      else if (how === "add") v[at + u] += value;
      else if (how === "scale") v[at + u] *= value;
      else if (from >= 0) v[at + u] = before[from + u];
    }
  }
}

// The way back of `patched`: dv[at…] becomes the gradient by what it took; what froze goes to dbefore[0…].
function patchedBack(list, dv, at, row, t, dbefore, from) {
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

// What a pass over a cell takes and keeps: its fields [B, T, H], and for the way back what `keep` asks for.
class CellPass {
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
    let last = -1; // the step used before
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

  // z[0…] = LN(v·w)⊙gain, without LN where the cell has none; for a GRU z and r apart from g.
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

  // The activation of a gate whose pre-activations are z[zAt…], its patches with it.
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
    const o = (G - 1) * H; // where o's block begins; f has one before g's unless it is coupled
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
    this.patch("c", seen, 0, row, t, before.c, 0); // what o and φ see
    this.patch("c", now.c, 0, row, t, before.c, 0); // what is kept: the same but for zoneout
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

// Backpropagation through a `CellPass` that was kept: the chain rule on its lines, last to first.
class CellBack {
  // dh [B, T, P] by h as it goes out, dafter [B, P] by h after the last step, dfields { gate, c, h: [B, T, ·] } by the
  // fields themselves; each may be null.
  constructor(pass, dh, dafter, dfields) {
    const { B, T, H, P, G, cell, spec } = pass;
    Object.assign(this, { pass, dh, dfields: dfields ?? {} });
    this.dx = new Float64Array(pass.x.length);
    this.darrays = Object.fromEntries(
      Object.entries(cell.arrays).map(([name, { data }]) => [name, new Float64Array(data.length)]),
    );
    this.dstate = { h: new Float64Array(B * P), c: pass.lstm ? new Float64Array(B * H) : null };
    this.by = Object.fromEntries(pass.names.map((gate) => [gate, new Float64Array(B * T * H)]));
    if (pass.lstm) this.by.c = new Float64Array(B * T * H);
    this.by.h = new Float64Array(B * T * P);
    this.froze = Object.fromEntries(pass.names.map((gate) => [gate, new Float64Array(H)]));
    this.now = { h: new Float64Array(P), c: new Float64Array(H) };
    this.to = { h: new Float64Array(P), c: new Float64Array(H) }; // by the state before the step
    this.scratch = {
      dz: new Float64Array(G * H),
      dq: new Float64Array(G * H),
      m: new Float64Array(H),
      dm: new Float64Array(H),
      dseen: new Float64Array(H),
      dhNew: new Float64Array(P),
      dgate: new Float64Array(H),
    };
    for (let row = 0; row < B; row += 1) {
      this.now.h.fill(0);
      this.now.c.fill(0);
      if (dafter !== null) addNumbers(this.now.h, 0, dafter, row * P, P);
      this.backRow(row);
      this.dstate.h.set(this.now.h, row * P);
      if (pass.lstm) this.dstate.c.set(this.now.c, row * H);
      if (pass.state === null && spec.learn_initial_state) this.toInitial();
    }
  }

  toInitial() {
    addNumbers(this.darrays.initial_h, 0, this.now.h, 0, this.pass.P);
    if (this.pass.lstm) addNumbers(this.darrays.initial_c, 0, this.now.c, 0, this.pass.H);
  }

  backRow(row) {
    const { pass, now, to, dfields } = this;
    const { T, P, H, mask, reset, lstm, spec } = pass;
    for (const gate of pass.names) this.froze[gate].fill(0);
    const lasts = this.lastsOf(row);
    for (let n = T - 1; n >= 0; n -= 1) {
      const t = pass.reverse ? T - 1 - n : n;
      const at = row * T + t;
      if (this.dh !== null) addNumbers(now.h, 0, this.dh, at * P, P);
      if (dfields.h) addNumbers(now.h, 0, dfields.h, at * P, P);
      if (lstm && dfields.c) addNumbers(now.c, 0, dfields.c, at * H, H);
      this.by.h.set(now.h, at * P);
      if (lstm) this.by.c.set(now.c, at * H);
      if (mask === null || mask[at]) {
        to.h.fill(0);
        to.c.fill(0);
        this.leaveBack(row, t);
        if (lstm) this.backLSTM(row, t, at, lasts[t]);
        else if (spec.kind === "gru") this.backGRU(row, t, at, lasts[t]);
        else this.backRNN(row, t, at, lasts[t]);
        now.h.set(to.h);
        now.c.set(to.c);
      }
      if (reset !== null && reset[at]) {
        if (spec.learn_initial_state) this.toInitial();
        now.h.fill(0);
        now.c.fill(0);
      }
    }
  }

  // For each step, the step used before it; -1 where there is none.
  lastsOf(row) {
    const { T, mask, reverse } = this.pass;
    const lasts = new Int32Array(T);
    let last = -1;
    for (let n = 0; n < T; n += 1) {
      const t = reverse ? T - 1 - n : n;
      lasts[t] = last;
      if (mask === null || mask[row * T + t]) last = t;
    }
    return lasts;
  }

  patchBack(gate, dv, at, row, t, dbefore, from) {
    const list = this.pass.patches[gate];
    if (list !== undefined) patchedBack(list, dv, at, row, t, dbefore, from);
  }

  // now.h, by h as it left the step, to dhNew and to the h before.
  leaveBack(row, t) {
    const { now, to, scratch } = this;
    const { P, spec } = this.pass;
    this.patchBack("h", now.h, 0, row, t, to.h, 0);
    const kept = spec.zoneout;
    for (let u = 0; u < P; u += 1) {
      scratch.dhNew[u] = (1 - kept) * now.h[u];
      to.h[u] += kept * now.h[u];
    }
  }

  // By a gate, dgate as its step's equations say, to its pre-activations in dz[zAt…]; null where it has none.
  activateBack(gate, dgate, dz, zAt, row, t, at, last) {
    const { H, slopes } = this.pass;
    const froze = this.froze[gate];
    const own = this.dfields[gate];
    for (let u = 0; u < H; u += 1) {
      dgate[u] += froze[u] + (own ? own[at * H + u] : 0);
      froze[u] = 0;
    }
    this.by[gate].set(dgate, at * H);
    this.patchBack(gate, dgate, 0, row, t, froze, last);
    if (dz !== null) for (let u = 0; u < H; u += 1) dz[zAt + u] = dgate[u] * slopes[gate][at * H + u];
  }

  // dout, by the product that `CellPass.product` made, to its array and to dv[vAt…]; dout is overwritten.
  productBack(name, dout, v, vAt, n, at, dv, dvAt, columns = this.pass.G * this.pass.H) {
    const { pass, darrays } = this;
    const { arrays } = pass.cell;
    const wide = pass.G * pass.H;
    if (pass.spec.layer_norm) {
      const [key, gain] = name === "kernel" ? ["a", "kernel_gain"] : ["b", "recurrent_gain"];
      const cuts = pass.spec.kind === "gru" ? [0, 2 * pass.H, wide] : [0, wide];
      const unit = pass.units[key];
      for (let part = 0; part + 1 < cuts.length; part += 1) {
        const [from, to] = [cuts[part], cuts[part + 1]];
        const deviation = pass.deviations[key][at * 2 + part];
        const [g, dg] = [arrays[gain].data, darrays[gain]];
        normaliseRowBack(dout, from, to - from, g, from, dg, null, unit, at * wide + from, deviation);
      }
    }
    addOuter(darrays[name], 0, wide, v, vAt, n, dout, 0, columns);
    addProductBack(dv, dvAt, n, arrays[name].data, 0, wide, columns, dout, 0);
  }

  backLSTM(row, t, at, last) {
    const { pass, darrays, now, to } = this;
    const { H, P, G, spec, gates } = pass;
    const { arrays } = pass.cell;
    const { dz, dq, m, dm, dseen, dhNew, dgate } = this.scratch;
    const n = at * H;
    if (spec.proj_size) {
      for (let u = 0; u < H; u += 1) m[u] = gates.o[n + u] * pass.cAct[n + u];
      dm.fill(0);
      addOuter(darrays.projection, 0, P, m, 0, H, dhNew, 0, P);
      addProductBack(dm, 0, H, arrays.projection.data, 0, P, P, dhNew, 0);
    } else {
      dm.set(dhNew);
    }
    for (let u = 0; u < H; u += 1) {
      dgate[u] = dm[u] * pass.cAct[n + u];
      dseen[u] = dm[u] * gates.o[n + u] * pass.slopes.cell[n + u];
    }
    if (spec.layer_norm) {
      const [gain, dgain] = [arrays.cell_gain.data, darrays.cell_gain];
      normaliseRowBack(dseen, 0, H, gain, 0, dgain, darrays.cell_bias, pass.units.c, n, pass.deviations.c[at]);
    }
    const o = (G - 1) * H;
    this.activateBack("o", dgate, dz, o, row, t, at, last);
    if (spec.peepholes) {
      const [p, dp] = [arrays.peepholes.data, darrays.peepholes];
      for (let u = 0; u < H; u += 1) {
        dp[o - H + u] += dz[o + u] * pass.seen[n + u];
        dseen[u] += dz[o + u] * p[o - H + u];
      }
    }
    const kept = spec.zoneout_cell;
    if (kept === 0) addNumbers(this.by.c, n, dseen, 0, H); // what o and φ see is the c that is kept
    this.patchBack("c", dseen, 0, row, t, to.c, 0);
    this.patchBack("c", now.c, 0, row, t, to.c, 0);
    for (let u = 0; u < H; u += 1) {
      const inside = pass.inside[n + u];
      const dc = inside ? dseen[u] + (1 - kept) * now.c[u] : 0; // by f⊙c_prev + i⊙g
      to.c[u] += kept * now.c[u] + dc * gates.f[n + u];
      dseen[u] = dc;
    }
    for (let u = 0; u < H; u += 1) dgate[u] = dseen[u] * pass.cBefore[n + u];
    this.activateBack("f", dgate, spec.coupled ? null : dz, H, row, t, at, last);
    for (let u = 0; u < H; u += 1) dm[u] = dseen[u] * gates.g[n + u] - (spec.coupled ? dgate[u] : 0);
    this.activateBack("i", dm, dz, 0, row, t, at, last);
    for (let u = 0; u < H; u += 1) dgate[u] = dseen[u] * gates.i[n + u];
    this.activateBack("g", dgate, dz, o - H, row, t, at, last);
    if (spec.peepholes) {
      const [p, dp] = [arrays.peepholes.data, darrays.peepholes];
      for (let u = 0; u < (spec.coupled ? H : 2 * H); u += 1) {
        const unit = u < H ? u : u - H;
        dp[u] += dz[u] * pass.cBefore[n + unit];
        to.c[unit] += dz[u] * p[u];
      }
    }
    this.sumsBack(at, dz, dq);
  }

  // dz by kernel's product plus recurrent_kernel's plus bias, to all of these.
  sumsBack(at, dz, dq) {
    const { pass, darrays } = this;
    const { spec, P } = pass;
    if (spec.use_bias) addNumbers(darrays.bias, 0, dz, 0, dz.length);
    dq.set(dz);
    this.productBack("kernel", dq, pass.x, at * spec.input_size, spec.input_size, at, this.dx, at * spec.input_size);
    this.productBack("recurrent_kernel", dz, pass.hBefore, at * P, P, at, this.to.h, 0);
  }

  backGRU(row, t, at, last) {
    const { pass, darrays, to } = this;
    const { H, spec, gates } = pass;
    const { arrays } = pass.cell;
    const { dz: da, dq, m, dm, dseen: dr, dhNew, dgate } = this.scratch;
    const n = at * H;
    const wide = 3 * H;
    for (let u = 0; u < H; u += 1) dgate[u] = dhNew[u] * (pass.hBefore[n + u] - gates.g[n + u]);
    this.activateBack("z", dgate, da, 0, row, t, at, last);
    for (let u = 0; u < H; u += 1) {
      dgate[u] = dhNew[u] * (1 - gates.z[n + u]);
      to.h[u] += dhNew[u] * gates.z[n + u];
    }
    this.activateBack("g", dgate, da, 2 * H, row, t, at, last);
    if (spec.reset_after) {
      for (let u = 0; u < H; u += 1) {
        dr[u] = da[2 * H + u] * pass.q[n + u];
        dq[2 * H + u] = da[2 * H + u] * gates.r[n + u];
      }
    } else {
      for (let u = 0; u < H; u += 1) m[u] = gates.r[n + u] * pass.hBefore[n + u];
      dm.fill(0);
      addOuter(darrays.recurrent_kernel, 2 * H, wide, m, 0, H, da, 2 * H, H);
      addProductBack(dm, 0, H, arrays.recurrent_kernel.data, 2 * H, wide, H, da, 2 * H);
      for (let u = 0; u < H; u += 1) {
        dr[u] = dm[u] * pass.hBefore[n + u];
        to.h[u] += dm[u] * gates.r[n + u];
      }
    }
    this.activateBack("r", dr, da, H, row, t, at, last);
    for (let u = 0; u < 2 * H; u += 1) dq[u] = da[u];
    if (spec.use_bias) {
      addNumbers(darrays.bias, 0, da, 0, wide);
      if (spec.reset_after) addNumbers(darrays.bias, wide, dq, 0, wide);
    }
    this.productBack("recurrent_kernel", dq, pass.hBefore, n, H, at, to.h, 0, spec.reset_after ? wide : 2 * H);
    this.productBack("kernel", da, pass.x, at * spec.input_size, spec.input_size, at, this.dx, at * spec.input_size);
  }

  backRNN(row, t, at, last) {
    const { dz, dq, dhNew, dgate } = this.scratch;
    dgate.set(dhNew);
    this.activateBack("g", dgate, dz, 0, row, t, at, last);
    this.sumsBack(at, dz, dq);
  }
}

// ── stacks of cells ─────────────────────────────────────────────────────────────────────────────────────────────────

// The last step of each piece but the last one: what a pass from the end comes to first in it.
function fromTheEnd(reset, B, T) {
  if (reset === null) return null;
  const back = new Uint8Array(B * T);
  for (let row = 0; row < B; row += 1) for (let t = 0; t + 1 < T; t += 1) back[row * T + t] = reset[row * T + t + 1];
  return back;
}

// For each step, the last one used up to it since the row or its piece began; -1 where there is none.
function lastUsed(mask, reset, B, T, reverse) {
  const found = new Int32Array(B * T);
  for (let row = 0; row < B; row += 1) {
    let last = -1;
    for (let n = 0; n < T; n += 1) {
      const at = row * T + (reverse ? T - 1 - n : n);
      if (reset !== null && reset[at]) last = -1;
      if (mask === null || mask[at]) last = at;
      found[at] = last;
    }
  }
  return found;
}

// A stack over a flow: its layers, and y [B, T, W] in the order of time, or [B, W] of its last step.
function runStack(cells, settings, flow, states, patches, { pre, keep }) {
  const [B, T] = flow.x.shape;
  const { mask } = flow;
  const reverse = settings.go_backwards;
  const reset = reverse ? fromTheEnd(flow.reset, B, T) : flow.reset;
  let x = flow.x.data;
  const layers = cells.map((cell, n) => {
    const options = { state: states[n], mask, reset, reverse, patches: patches[n], pre, keep };
    const pass = new CellPass(cell, x, B, T, options);
    const added = settings.residual && n > 0 && cell.spec.input_size === pass.P;
    const from = added ? lastUsed(mask, reset, B, T, reverse) : null;
    if (added) {
      const y = new Float64Array(B * T * pass.P);
      for (let at = 0; at < B * T; at += 1) {
        for (let u = 0; u < pass.P; u += 1) {
          const source = from[at] * pass.P + u;
          y[at * pass.P + u] = from[at] < 0 ? pass.h[at * pass.P + u] : pass.h[source] + x[source];
        }
      }
      x = y;
    } else {
      x = pass.h;
    }
    return { pass, from };
  });
  const W = layers.at(-1).pass.P;
  const zeroed = settings.zero_output_for_mask && mask !== null;
  if (settings.return_sequences) {
    const y = x.slice();
    for (let at = 0; zeroed && at < B * T; at += 1) if (!mask[at]) y.fill(0, at * W, (at + 1) * W);
    return { layers, y: { data: y, shape: [B, T, W] } };
  }
  if (T === 0) return { layers, y: { data: layers.at(-1).pass.after.h.slice(), shape: [B, W] } };
  const y = new Float64Array(B * W);
  for (let row = 0; row < B; row += 1) {
    const at = row * T + (reverse ? 0 : T - 1);
    if (!zeroed || mask[at]) y.set(x.subarray(at * W, (at + 1) * W), row * W);
  }
  return { layers, y: { data: y, shape: [B, W] } };
}

// The way back through `runStack`: dy by its y, or null; dfields: for each cell what is asked for by its own fields.
function backStack(layers, settings, flow, dy, dfields) {
  const [B, T] = flow.x.shape;
  const { mask } = flow;
  const W = layers.at(-1).pass.P;
  const zeroed = settings.zero_output_for_mask && mask !== null;
  let above = dy === null ? null : new Float64Array(B * T * W);
  let after = null;
  if (dy !== null && settings.return_sequences) {
    above.set(dy);
    for (let at = 0; zeroed && at < B * T; at += 1) if (!mask[at]) above.fill(0, at * W, (at + 1) * W);
  } else if (dy !== null && T === 0) {
    after = dy;
  } else if (dy !== null) {
    for (let row = 0; row < B; row += 1) {
      const at = row * T + (settings.go_backwards ? 0 : T - 1);
      if (!zeroed || mask[at]) above.set(dy.subarray(row * W, (row + 1) * W), at * W);
    }
  }
  const found = [];
  for (let n = layers.length - 1; n >= 0; n -= 1) {
    const { pass, from } = layers[n];
    let dh = above;
    let dx = null;
    if (from !== null && above !== null) {
      dh = new Float64Array(B * T * pass.P);
      dx = new Float64Array(B * T * pass.P);
      for (let at = 0; at < B * T; at += 1) {
        for (let u = 0; u < pass.P; u += 1) {
          const source = (from[at] < 0 ? at : from[at]) * pass.P + u;
          dh[source] += above[at * pass.P + u];
          if (from[at] >= 0) dx[source] += above[at * pass.P + u];
        }
      }
    }
    const back = new CellBack(pass, dh, n === layers.length - 1 ? after : null, dfields[n]);
    if (dx !== null) addNumbers(back.dx, 0, dx, 0, dx.length);
    found[n] = back;
    above = back.dx;
  }
  return found;
}

// ── nodes without cells ─────────────────────────────────────────────────────────────────────────────────────────────

const numbersIn = (shape) => shape.reduce((product, length) => product * length, 1);
const lastAxis = (shape) => shape[shape.length - 1];
const shapeText = (shape) => `[${shape.map((length) => length ?? "any").join(", ")}]`;

// Where Python's slice start:stop:step of n entries begins, ends and how it goes.
function slicedRange([start, stop, given], n) {
  const step = given ?? 1;
  const [least, most] = step > 0 ? [0, n] : [-1, n - 1];
  const end = (value, usual) => {
    if (value === null || value === undefined) return usual;
    return value < 0 ? Math.max(value + n, least) : Math.min(value, most);
  };
  return [end(start, step > 0 ? least : most), end(stop, step > 0 ? most : least), step];
}

function slicedEntries(slice, n) {
  const [start, stop, step] = slicedRange(slice, n);
  const found = [];
  for (let at = start; step > 0 ? at < stop : at > stop; at += step) found.push(at);
  return found;
}

// Which axis of a value that is, counted from 0, the batch; an axis that isn't there is an error.
function axisOf(node, shape) {
  const axis = node.settings.axis > 0 ? node.settings.axis : shape.length + node.settings.axis;
  if (axis < 1 || axis >= shape.length) {
    throw new Error(`${node.name}: expected a value with an axis ${node.settings.axis}, got [${shape.join(", ")}]`);
  }
  return axis;
}

// How many entries stand before and after each entry of an axis.
const around = (shape, axis) => [numbersIn(shape.slice(0, axis)), numbersIn(shape.slice(axis + 1))];

// A node that moves numbers: what comes out at n is x[map[n]], or `value` where that is -1.
function moved(x, shape, map, value = 0) {
  const data = new Float64Array(map.length);
  for (let n = 0; n < map.length; n += 1) data[n] = map[n] < 0 ? value : x.data[map[n]];
  return { data, shape };
}

function movedBack(length, map, dy) {
  const dx = new Float64Array(length);
  for (let n = 0; n < map.length; n += 1) if (map[n] >= 0) dx[map[n]] += dy[n];
  return dx;
}

// The map of `moved` that takes these entries of an axis, -1 standing for none.
function takenMap(shape, axis, entries) {
  const [outer, inner] = around(shape, axis);
  const map = new Int32Array(outer * entries.length * inner);
  let n = 0;
  for (let o = 0; o < outer; o += 1) {
    for (const entry of entries) {
      for (let i = 0; i < inner; i += 1, n += 1) map[n] = entry < 0 ? -1 : (o * shape[axis] + entry) * inner + i;
    }
  }
  return map;
}

const withAxis = (shape, axis, length) => shape.map((old, n) => (n === axis ? length : old));

// A node that moves numbers, from `plan(node, shape)`: the shape that comes out, and the map.
function movingNode(settings, plan, flags) {
  return {
    settings,
    arrays: [],
    run(node, [flow]) {
      const { shape, map, value } = plan(node, flow.x.shape);
      return { x: moved(flow.x, shape, map, value), ...flags(node, flow, shape), kept: map };
    },
    back: (node, [flow], { kept }, dy) => [movedBack(flow.x.data.length, kept, dy)],
  };
}

const noFlags = () => ({ mask: null, reset: null });
const inOrder = (length) => Int32Array.from({ length }, (_, n) => n);
const flagsOf = ({ mask, reset }) => ({ mask, reset });

// A node that works number by number or row by row: `run(node, x)` and `back(node, x, y, dy, darrays)` on rows.
function stepwiseNode(settings, arrays, run, back) {
  return {
    settings,
    arrays,
    run: (node, [flow]) => ({ x: run(node, flow.x), ...flagsOf(flow) }),
    back: (node, [flow], { x }, dy, darrays) => [back(node, flow.x, x, dy, darrays)],
  };
}

// x·kernel + bias of every row, before the activation.
function denseSums(node, x) {
  const { kernel, bias } = node.arrays;
  const [I, O] = kernel.shape;
  const rows = x.data.length / I;
  const z = new Float64Array(rows * O);
  for (let row = 0; row < rows; row += 1) {
    addProduct(z, row * O, x.data, row * I, I, kernel.data, 0, O, O);
    if (bias) addNumbers(z, row * O, bias.data, 0, O);
  }
  return { z, rows, I, O };
}

const denseNode = stepwiseNode(
  ["input_size", "units", "use_bias", "activation"],
  ["kernel", "bias"],
  (node, x) => {
    const { z, O } = denseSums(node, x);
    return { data: activateRows(node.settings.activation, z, O), shape: [...x.shape.slice(0, -1), O] };
  },
  (node, x, y, dy, darrays) => {
    const { z, rows, I, O } = denseSums(node, x);
    const dz = activateRowsBack(node.settings.activation, z, y.data, O, dy);
    const dx = new Float64Array(rows * I);
    for (let row = 0; row < rows; row += 1) {
      addOuter(darrays.kernel, 0, O, x.data, row * I, I, dz, row * O, O);
      addProductBack(dx, row * I, I, node.arrays.kernel.data, 0, O, O, dz, row * O);
      if (darrays.bias) addNumbers(darrays.bias, 0, dz, row * O, O);
    }
    return dx;
  },
);

const activationNode = stepwiseNode(
  ["activation"],
  [],
  (node, x) => ({ data: activateRows(node.settings.activation, x.data, lastAxis(x.shape)), shape: x.shape }),
  (node, x, y, dy) => activateRowsBack(node.settings.activation, x.data, y.data, lastAxis(x.shape), dy),
);

const clipNode = stepwiseNode(
  ["low", "high"],
  [],
  (node, x) => {
    const [low, high] = [node.settings.low ?? -Infinity, node.settings.high ?? Infinity];
    return { data: x.data.map((value) => betweenOf(value, low, high)), shape: x.shape };
  },
  (node, x, y, dy) => {
    const [low, high] = [node.settings.low ?? -Infinity, node.settings.high ?? Infinity];
    return dy.map((d, n) => (x.data[n] > low && x.data[n] < high ? d : 0));
  },
);

const standardiseNode = stepwiseNode(
  ["input_size"],
  ["mean", "scale"],
  (node, x) => {
    const { mean, scale } = node.arrays;
    const W = mean.data.length;
    return { data: x.data.map((value, n) => (value - mean.data[n % W]) / scale.data[n % W]), shape: x.shape };
  },
  (node, x, y, dy, darrays) => {
    const { scale } = node.arrays;
    const W = scale.data.length;
    for (let n = 0; n < dy.length; n += 1) {
      darrays.mean[n % W] -= dy[n] / scale.data[n % W];
      darrays.scale[n % W] -= (dy[n] * y.data[n]) / scale.data[n % W];
    }
    return dy.map((d, n) => d / scale.data[n % W]);
  },
);

const scaleNode = stepwiseNode(
  ["input_size"],
  ["scale", "shift"],
  (node, x) => {
    const { scale, shift } = node.arrays;
    const W = scale.data.length;
    return { data: x.data.map((value, n) => value * scale.data[n % W] + shift.data[n % W]), shape: x.shape };
  },
  (node, x, y, dy, darrays) => {
    const { scale } = node.arrays;
    const W = scale.data.length;
    for (let n = 0; n < dy.length; n += 1) {
      darrays.scale[n % W] += dy[n] * x.data[n];
      darrays.shift[n % W] += dy[n];
    }
    return dy.map((d, n) => d * scale.data[n % W]);
  },
);

// Every row normalised: with LN(x) and the deviations, which the way back needs.
function layerNormRows(node, x) {
  const W = lastAxis(x.shape);
  const [gain, bias] = ["gain", "bias"].map((name) => node.arrays[name]?.data ?? null);
  const y = x.data.slice();
  const unit = new Float64Array(y.length);
  const deviations = new Float64Array(y.length / W || 0);
  for (let row = 0; row < deviations.length; row += 1) {
    deviations[row] = normaliseRow(y, row * W, W, gain, 0, bias, node.settings.epsilon, unit, row * W);
  }
  return { y, unit, deviations, gain, W };
}

const layerNormNode = stepwiseNode(
  ["input_size", "use_gain", "use_bias", "epsilon"],
  ["gain", "bias"],
  (node, x) => ({ data: layerNormRows(node, x).y, shape: x.shape }),
  (node, x, y, dy, darrays) => {
    const { unit, deviations, gain, W } = layerNormRows(node, x);
    const dx = dy.slice();
    const [dgain, dbias] = [darrays.gain ?? null, darrays.bias ?? null];
    for (let row = 0; row < deviations.length; row += 1) {
      normaliseRowBack(dx, row * W, W, gain, 0, dgain, dbias, unit, row * W, deviations[row]);
    }
    return dx;
  },
);

// A mask that a node makes itself, within the one that what it takes has.
const withOwnMask = (mask, own) => (mask === null ? own : own.map((kept, at) => kept & mask[at]));

const embeddingNode = {
  settings: ["ids", "units", "mask_zero"],
  arrays: ["table"],
  run(node, [flow]) {
    const { data: table, shape: [V, E] } = node.arrays.table;
    const ids = Float64Array.from(flow.x.data, (id, at) => (flow.mask === null || flow.mask[at] ? id : 0));
    const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= V);
    if (bad !== undefined) throw new Error(`${node.name}: expected ids to be integers from 0 to ${V - 1}, got ${bad}`);
    const data = new Float64Array(ids.length * E);
    ids.forEach((id, at) => data.set(table.subarray(id * E, (id + 1) * E), at * E));
    const own = node.settings.mask_zero ? Uint8Array.from(flow.x.data, (id) => (id !== 0 ? 1 : 0)) : null;
    const mask = own === null ? flow.mask : withOwnMask(flow.mask, own);
    return { x: { data, shape: [...flow.x.shape, E] }, mask, reset: flow.reset, kept: ids };
  },
  back(node, flows, { kept: ids }, dy, darrays) {
    const E = node.arrays.table.shape[1];
    ids.forEach((id, at) => addNumbers(darrays.table, id * E, dy, at * E, E));
    return [null];
  },
};

const maskingNode = {
  settings: ["value"],
  arrays: [],
  run(node, [flow], { dtype }) {
    const W = lastAxis(flow.x.shape);
    const value = dtype === "float32" ? Math.fround(node.settings.value) : node.settings.value;
    const own = new Uint8Array(flow.x.data.length / W || 0);
    for (let at = 0; at < own.length; at += 1) {
      for (let u = 0; u < W; u += 1) if (flow.x.data[at * W + u] !== value) own[at] = 1;
    }
    const data = flow.x.data.map((number, n) => (own[Math.floor(n / W)] ? number : 0));
    return { x: { data, shape: flow.x.shape }, mask: withOwnMask(flow.mask, own), reset: flow.reset, kept: own };
  },
  back(node, [flow], { kept: own }, dy) {
    const W = lastAxis(flow.x.shape);
    return [dy.map((d, n) => (own[Math.floor(n / W)] ? d : 0))];
  },
};

// Steps put before a sequence and after it, for windows of `span` steps.
function paddingOf(padding, steps, span, strides) {
  if (Array.isArray(padding)) return padding;
  if (padding === "causal") return [span - 1, 0];
  if (padding === "valid") return [0, 0];
  const missing = Math.max(0, (Math.ceil(steps / strides) - 1) * strides + span - steps);
  return [Math.floor(missing / 2), missing - Math.floor(missing / 2)];
}

// How many windows there are, and at which step the first one begins.
function windowsOf({ padding, strides }, steps, span) {
  const [before, after] = paddingOf(padding, steps, span, strides);
  return { count: Math.max(0, Math.floor((steps + before + after - span) / strides) + 1), first: -before };
}

// Each product of a convolution: visit(row, t of y, t of x, tap).
function eachTap(node, B, T, visit) {
  const { taps, strides, dilation } = node.settings;
  const { count, first } = windowsOf(node.settings, T, (taps - 1) * dilation + 1);
  for (let row = 0; row < B; row += 1) {
    for (let to = 0; to < count; to += 1) {
      for (let tap = 0; tap < taps; tap += 1) {
        const from = first + to * strides + tap * dilation;
        if (from >= 0 && from < T) visit(row * count + to, row * T + from, tap);
      }
    }
  }
  return count;
}

function convolutionSums(node, x) {
  const [B, T, C] = x.shape;
  const { units: F, groups, taps, dilation } = node.settings;
  const { count } = windowsOf(node.settings, T, (taps - 1) * dilation + 1);
  const [channels, filters] = [C / groups, F / groups];
  const z = new Float64Array(B * count * F);
  const { kernel, bias } = node.arrays;
  eachTap(node, B, T, (to, from, tap) => {
    for (let g = 0; g < groups; g += 1) {
      const w = tap * channels * F + g * filters;
      addProduct(z, to * F + g * filters, x.data, from * C + g * channels, channels, kernel.data, w, F, filters);
    }
  });
  if (bias) for (let at = 0; at < B * count; at += 1) addNumbers(z, at * F, bias.data, 0, F);
  return { z, B, T, C, F, groups, channels, filters, count };
}

const convolutionNode = {
  settings: ["taps", "input_size", "units", "strides", "dilation", "groups", "padding", "use_bias", "activation"],
  arrays: ["kernel", "bias"],
  mixesSteps: ({ taps, strides, padding }) => taps > 1 || strides > 1 || Array.isArray(padding),
  run(node, [flow]) {
    const { z, B, F, count } = convolutionSums(node, flow.x);
    const data = activateRows(node.settings.activation, z, F);
    return { x: { data, shape: [B, count, F] }, mask: null, reset: flow.reset };
  },
  back(node, [flow], { x: y }, dy, darrays) {
    const { z, B, T, C, F, groups, channels, filters, count } = convolutionSums(node, flow.x);
    const dz = activateRowsBack(node.settings.activation, z, y.data, F, dy);
    const dx = new Float64Array(flow.x.data.length);
    const { kernel } = node.arrays;
    eachTap(node, B, T, (to, from, tap) => {
      for (let g = 0; g < groups; g += 1) {
        const [w, at, out] = [tap * channels * F + g * filters, from * C + g * channels, to * F + g * filters];
        addOuter(darrays.kernel, w, F, flow.x.data, at, channels, dz, out, filters);
        addProductBack(dx, at, channels, kernel.data, w, F, filters, dz, out);
      }
    });
    if (darrays.bias) for (let at = 0; at < B * count; at += 1) addNumbers(darrays.bias, 0, dz, at * F, F);
    return [dx];
  },
};

// One number of places of x: their sum, mean, greatest or least, 0 of none. `best` is the place that it was, of max and
// min the first; a NaN among them comes out.
function pooled(mode, x, places, best, at) {
  if (mode === "sum" || mode === "mean") {
    let sum = 0;
    for (const place of places) sum += x[place];
    return mode === "mean" ? sum / Math.max(places.length, 1) : sum;
  }
  best[at] = -1;
  for (const place of places) {
    const better = best[at] < 0 || (mode === "max" ? x[place] > x[best[at]] : x[place] < x[best[at]]);
    if (better || Number.isNaN(x[place])) best[at] = place;
    if (Number.isNaN(x[place])) break;
  }
  return best[at] < 0 ? 0 : x[best[at]];
}

// A node that takes numbers together; plan(node, flow): { mode, shape, places(n): those that number n is made of }.
function poolingNode(settings, plan, flags, mixesSteps) {
  return {
    settings,
    arrays: [],
    mixesSteps,
    run(node, [flow]) {
      const { mode, shape, places } = plan(node, flow);
      const data = new Float64Array(numbersIn(shape));
      const best = new Int32Array(data.length);
      for (let n = 0; n < data.length; n += 1) data[n] = pooled(mode, flow.x.data, places(n), best, n);
      return { x: { data, shape }, ...flags(node, flow), kept: best };
    },
    back(node, [flow], { kept: best }, dy) {
      const { mode, places } = plan(node, flow);
      const dx = new Float64Array(flow.x.data.length);
      for (let n = 0; n < dy.length; n += 1) {
        if (mode === "sum" || mode === "mean") {
          const found = places(n);
          for (const place of found) dx[place] += mode === "mean" ? dy[n] / found.length : dy[n];
        } else if (best[n] >= 0) dx[best[n]] += dy[n];
      }
      return [dx];
    },
  };
}

// The places of an axis of length n that number `at` of the result is made of, those that used(o, entry) is true of.
const alongAxis = (at, n, inner, used) => {
  const [o, i] = [Math.floor(at / inner), at % inner];
  const found = [];
  for (let entry = 0; entry < n; entry += 1) if (used(o, entry)) found.push((o * n + entry) * inner + i);
  return found;
};

const usedSteps = ({ mask, x }) => (mask === null ? () => true : (o, entry) => mask[o * x.shape[1] + entry]);

const globalPoolNode = poolingNode(
  ["mode"],
  (node, flow) => {
    const [B, T, W] = flow.x.shape;
    const { mode } = node.settings;
    const all = (at) => alongAxis(at, T, W, usedSteps(flow));
    const places = mode === "last" ? (at) => all(at).slice(-1) : all;
    return { mode: mode === "last" ? "sum" : mode, shape: [B, W], places };
  },
  noFlags,
  () => false,
);

const reducedShape = ({ settings }, shape, axis) =>
  settings.keepdims ? withAxis(shape, axis, 1) : shape.filter((_, n) => n !== axis);

const reduceNode = poolingNode(
  ["mode", "axis", "keepdims"],
  (node, flow) => {
    const { shape } = flow.x;
    const axis = axisOf(node, shape);
    const [, inner] = around(shape, axis);
    const used = axis === 1 ? usedSteps(flow) : () => true;
    const places = (at) => alongAxis(at, shape[axis], inner, used);
    return { mode: node.settings.mode, shape: reducedShape(node, shape, axis), places };
  },
  (node, flow) => {
    const axes = flow.x.shape.length - 1;
    return axisOf(node, flow.x.shape) > 1 && (node.settings.keepdims || axes > 2) ? flagsOf(flow) : noFlags();
  },
  ({ axis }) => axis === 1 || axis < -1,
);

const windowPoolNode = poolingNode(
  ["mode", "size", "strides", "padding"],
  (node, flow) => {
    const [B, T, W] = flow.x.shape;
    const { mode, size, strides } = node.settings;
    const { count, first } = windowsOf(node.settings, T, size);
    const places = (at) => {
      const [row, to, u] = [Math.floor(at / (count * W)), Math.floor(at / W) % count, at % W];
      const found = [];
      for (let t = first + to * strides; t < first + to * strides + size; t += 1) {
        if (t >= 0 && t < T) found.push((row * T + t) * W + u);
      }
      return found;
    };
    return { mode, shape: [B, count, W], places };
  },
  noFlags,
  () => true,
);

const reshapeNode = (settings, lengths) => ({
  ...movingNode(
    settings,
    (node, shape) => {
      const numbers = numbersIn(shape.slice(1));
      const wanted = lengths(node);
      const rest = wanted.reduce((product, length) => (length === -1 ? product : product * length), 1);
      if (wanted.includes(-1) ? numbers % rest : numbers !== rest) {
        throw new Error(`${node.name}: expected ${numbers} numbers to fit into [${wanted.join(", ")}], they don't`);
      }
      const full = [shape[0], ...wanted.map((length) => (length === -1 ? numbers / rest : length))];
      return { shape: full, map: inOrder(numbersIn(shape)) };
    },
    noFlags,
  ),
  mixesSteps: (given) => (given.shape ?? []).length > 1,
  shapesOnly: true,
});

const permuteNode = {
  ...movingNode(
    ["dims"],
    (node, shape) => {
      const order = [0, ...node.settings.dims];
      const to = order.map((axis) => shape[axis]);
      const strides = shape.map((_, axis) => numbersIn(shape.slice(axis + 1)));
      const map = new Int32Array(numbersIn(shape));
      for (let n = 0; n < map.length; n += 1) {
        let left = n;
        for (let axis = to.length - 1; axis >= 0; axis -= 1) {
          map[n] += (left % to[axis]) * strides[order[axis]];
          left = Math.floor(left / to[axis]);
        }
      }
      return { shape: to, map };
    },
    noFlags,
  ),
  mixesSteps: () => true,
  shapesOnly: true,
};

const repeatNode = movingNode(
  ["times"],
  (node, [B, W]) => {
    const { times } = node.settings;
    return { shape: [B, times, W], map: takenMap([B, 1, W], 1, new Array(times).fill(0)) };
  },
  noFlags,
);

const selectNode = {
  ...movingNode(
    ["start", "stop", "step", "axis"],
    (node, shape) => {
      const axis = axisOf(node, shape);
      const { start, stop, step } = node.settings;
      const entries = slicedEntries([start, stop, step], shape[axis]);
      return { shape: withAxis(shape, axis, entries.length), map: takenMap(shape, axis, entries) };
    },
    (node, flow) => {
      if (axisOf(node, flow.x.shape) !== 1) return flagsOf(flow);
      const [B, T] = flow.x.shape;
      const { start, stop, step } = node.settings;
      const entries = slicedEntries([start, stop, step], T);
      const cut = (flags) => Uint8Array.from(takenMap([B, T], 1, entries), (at) => flags[at]);
      return { mask: flow.mask && cut(flow.mask), reset: flow.reset && begunAt(flow.reset, B, T, entries) };
    },
  ),
  mixesSteps: ({ step }) => step < 0,
  shapesOnly: true,
};

// At which of these steps a piece begins: one that began at a step left out begins at the next.
function begunAt(reset, B, T, entries) {
  const begun = new Uint8Array(B * entries.length);
  for (let row = 0; row < B; row += 1) {
    let next = 0;
    entries.forEach((entry, n) => {
      for (; next <= entry; next += 1) begun[row * entries.length + n] |= reset[row * T + next];
    });
  }
  return begun;
}

const padNode = {
  ...movingNode(
    ["before", "after", "value", "axis"],
    (node, shape) => {
      const axis = axisOf(node, shape);
      const { before, after, value } = node.settings;
      const entries = [...new Array(before).fill(-1), ...inOrder(shape[axis]), ...new Array(after).fill(-1)];
      return { shape: withAxis(shape, axis, entries.length), map: takenMap(shape, axis, entries), value };
    },
    (node, flow) => (axisOf(node, flow.x.shape) === 1 ? noFlags() : flagsOf(flow)),
  ),
  mixesSteps: ({ axis }) => axis === 1 || axis < -1,
};

// For each number of a value of shape `to`, the place of the number of `shape` that is broadcast there.
function broadcastMap(shape, to) {
  const map = new Int32Array(numbersIn(to));
  const strides = shape.map((length, axis) => (length === 1 ? 0 : numbersIn(shape.slice(axis + 1))));
  for (let n = 0; n < map.length; n += 1) {
    let left = n;
    for (let axis = to.length - 1; axis >= 0; axis -= 1) {
      map[n] += (left % to[axis]) * strides[axis];
      left = Math.floor(left / to[axis]);
    }
  }
  return map;
}

const NEUTRAL = { mul: 1, max: -Infinity, min: Infinity };

// What a merge of values number by number takes: their maps, and where each one's own mask leaves it out.
function mergePlan(node, flows) {
  const shapes = flows.map((flow) => flow.x.shape);
  const shape = shapes[0].map((_, axis) => {
    const lengths = shapes.map((one) => one[axis]);
    return lengths.find((length) => length !== 1) ?? 1;
  });
  shapes.forEach((one) => {
    if (one.length !== shape.length || one.some((length, axis) => length !== 1 && length !== shape[axis])) {
      throw new Error(`${node.name}: expected values that fit each other, got ${shapes.map(shapeText).join(", ")}`);
    }
  });
  const maps = shapes.map((one) => broadcastMap(one, shape));
  const heeds = node.settings.mode in NEUTRAL;
  const out = flows.map(({ mask, x }, k) => {
    if (!heeds || mask === null) return null;
    const width = numbersIn(x.shape.slice(2));
    return Uint8Array.from(maps[k], (place) => (mask[Math.floor(place / width)] ? 0 : 1));
  });
  return { shape, maps, out };
}

// Flags of values together, 1 where one of them is; where the steps of one are broadcast, so are its flags.
function eitherFlags(flags, shapes, shape) {
  const found = new Uint8Array(shape[0] * shape[1]);
  flags.forEach((one, k) => {
    const map = broadcastMap(shapes[k].slice(0, 2), shape.slice(0, 2));
    map.forEach((place, n) => {
      found[n] |= one[place];
    });
  });
  return found;
}

function joinedFlags(flows, name, without) {
  const B = flows[0].x.shape[0];
  const lengths = flows.map((flow) => flow.x.shape[1]);
  const T = lengths.reduce((sum, length) => sum + length, 0);
  const found = new Uint8Array(B * T);
  let begin = 0;
  flows.forEach((flow, k) => {
    const n = lengths[k];
    for (let row = 0; row < B; row += 1) {
      for (let t = 0; t < n; t += 1) {
        found[row * T + begin + t] = flow[name] === null ? without : flow[name][row * n + t];
      }
    }
    begin += n;
  });
  return found;
}

function mergedFlags(node, flows, shape) {
  const along = node.settings.mode === "concat" && shape.length > 2 && axisOf(node, shape) === 1;
  const masks = flows.map((flow) => flow.mask);
  const resets = flows.map((flow) => flow.reset);
  const shapes = flows.map((flow) => flow.x.shape);
  const [someMask, someReset] = [masks, resets].map((flags) => flags.some((one) => one !== null));
  if (along) {
    return {
      mask: someMask ? joinedFlags(flows, "mask", 1) : null,
      reset: someReset ? joinedFlags(flows, "reset", 0) : null,
    };
  }
  const zeros = resets.map((one, k) => one ?? new Uint8Array(shapes[k][0] * shapes[k][1]));
  return {
    mask: masks.every((one) => one !== null) ? eitherFlags(masks, shapes, shape) : null,
    reset: someReset ? eitherFlags(zeros, shapes, shape) : null,
  };
}

// Values put end to end: the shape, and for each value where its numbers go.
function concatPlan(node, flows) {
  const shapes = flows.map((flow) => flow.x.shape);
  const axis = axisOf(node, shapes[0]);
  const length = shapes.reduce((sum, shape) => sum + shape[axis], 0);
  const shape = withAxis(shapes[0], axis, length);
  const [outer, inner] = around(shape, axis);
  let begin = 0;
  const maps = shapes.map((one) => {
    const entries = inOrder(one[axis]).map((entry) => entry + begin);
    begin += one[axis];
    if (numbersIn(one) !== outer * one[axis] * inner) {
      throw new Error(`${node.name}: expected values that fit each other, got ${shapes.map(shapeText).join(", ")}`);
    }
    return takenMap(shape, axis, entries);
  });
  return { shape, maps };
}

const mergeNode = {
  settings: ["mode", "axis"],
  arrays: [],
  run(node, flows) {
    const { mode } = node.settings;
    if (mode === "concat") {
      const { shape, maps } = concatPlan(node, flows);
      const data = new Float64Array(numbersIn(shape));
      flows.forEach(({ x }, k) => x.data.forEach((value, n) => {
        data[maps[k][n]] = value;
      }));
      return { x: { data, shape }, ...mergedFlags(node, flows, shape) };
    }
    const { shape, maps, out } = mergePlan(node, flows);
    const data = new Float64Array(numbersIn(shape));
    const values = flows.map((flow) => flow.x.data);
    for (let n = 0; n < data.length; n += 1) {
      const takes = (k) => (out[k] !== null && out[k][n] ? NEUTRAL[mode] : values[k][maps[k][n]]);
      let y = takes(0);
      for (let k = 1; k < values.length; k += 1) {
        if (mode === "sub") y -= takes(k);
        else if (mode === "mul") y *= takes(k);
        else if (mode === "max") y = Math.max(y, takes(k));
        else if (mode === "min") y = Math.min(y, takes(k));
        else y += takes(k);
      }
      if (out.every((one) => one !== null && one[n])) y = mode === "mul" ? 0 : values[0][maps[0][n]];
      data[n] = mode === "ave" ? y / values.length : y;
    }
    return { x: { data, shape }, ...mergedFlags(node, flows, shape) };
  },
  back(node, flows, { x: y }, dy) {
    const { mode } = node.settings;
    if (mode === "concat") {
      return concatPlan(node, flows).maps.map((map) => Float64Array.from(map, (place) => dy[place]));
    }
    const { maps, out } = mergePlan(node, flows);
    const values = flows.map((flow) => flow.x.data);
    const dxs = values.map((value) => new Float64Array(value.length));
    const count = values.length;
    for (let n = 0; n < dy.length; n += 1) {
      const used = (k) => out[k] === null || !out[k][n];
      const value = (k) => values[k][maps[k][n]];
      const none = out.every((one) => one !== null && one[n]);
      let won = false; // of max and min, the first that is the answer
      for (let k = 0; k < count; k += 1) {
        let d = 0;
        if (mode === "add") d = 1;
        else if (mode === "ave") d = 1 / count;
        else if (mode === "sub") d = k === 0 ? 1 : -1;
        else if (none) d = mode !== "mul" && k === 0 ? 1 : 0;
        else if (!used(k)) d = 0;
        else if (mode === "mul") {
          d = 1;
          for (let other = 0; other < count; other += 1) if (other !== k && used(other)) d *= value(other);
        } else if (!won && value(k) === y.data[n]) {
          d = 1;
          won = true;
        }
        dxs[k][maps[k][n]] += d * dy[n];
      }
    }
    return dxs;
  },
};

// ── nodes with cells ────────────────────────────────────────────────────────────────────────────────────────────────

const STACK_SETTINGS = ["cells", "return_sequences", "go_backwards", "zero_output_for_mask", "residual"];

function reversedSteps(data, B, T, width) {
  const turned = data.slice();
  for (let at = 0; at < B * T; at += 1) {
    const to = at - (at % T) + T - 1 - (at % T);
    turned.set(data.subarray(at * width, (at + 1) * width), to * width);
  }
  return turned;
}

const recurrentNode = {
  settings: STACK_SETTINGS,
  arrays: [],
  run(node, [flow], options) {
    const { layers, y } = runStack(node.cells, node.settings, flow, options.states, options.patches, options);
    const { return_sequences: sequences, go_backwards: backwards } = node.settings;
    if (!sequences) return { x: y, ...noFlags(), kept: layers };
    if (!backwards) return { x: y, ...flagsOf(flow), kept: layers };
    const [B, T, W] = y.shape;
    const turned = (flags) => flags && reversedSteps(flags, B, T, 1);
    return {
      x: { data: reversedSteps(y.data, B, T, W), shape: y.shape },
      mask: turned(flow.mask),
      reset: turned(fromTheEnd(flow.reset, B, T)),
      kept: layers,
    };
  },
  passes: ({ kept }) => kept.map((layer) => layer.pass),
  back(node, [flow], { x: y, kept }, dy, darrays, dfields) {
    const { return_sequences: sequences, go_backwards: backwards } = node.settings;
    const turns = dy !== null && sequences && backwards;
    const own = turns ? reversedSteps(dy, ...y.shape) : dy;
    const cells = backStack(kept, node.settings, flow, own, dfields);
    return { dxs: [cells[0].dx], cells };
  },
};

const bidirectionalNode = {
  settings: ["forward", "backward", "merge_mode"],
  arrays: [],
  run(node, [flow], { states, patches, ...options }) {
    const { forward, backward, merge_mode: mode } = node.settings;
    const half = forward.cells.length;
    const cut = (list) => [list.slice(0, half), list.slice(half)];
    const [[ahead, back], [first, second], [one, other]] = [node.cells, states, patches].map(cut);
    const a = runStack(ahead, forward, flow, first, one, options);
    const b = runStack(back, backward, flow, second, other, options);
    const [W, V] = [lastAxis(a.y.shape), lastAxis(b.y.shape)];
    const rows = numbersIn(a.y.shape.slice(0, -1));
    const wide = mode === "concat" ? W + V : W;
    const data = new Float64Array(rows * wide);
    for (let row = 0; row < rows; row += 1) {
      for (let u = 0; u < wide; u += 1) {
        const [p, q] = [a.y.data[row * W + u], b.y.data[row * V + u]];
        if (mode === "concat") data[row * wide + u] = u < W ? p : b.y.data[row * V + u - W];
        else if (mode === "mul") data[row * wide + u] = p * q;
        else data[row * wide + u] = mode === "sum" ? p + q : (p + q) * 0.5;
      }
    }
    const flags = forward.return_sequences ? flagsOf(flow) : noFlags();
    return { x: { data, shape: [...a.y.shape.slice(0, -1), wide] }, ...flags, kept: [a, b] };
  },
  passes: ({ kept }) => kept.flatMap(({ layers }) => layers.map((layer) => layer.pass)),
  back(node, [flow], { kept: [a, b] }, dy, darrays, dfields) {
    const { forward, backward, merge_mode: mode } = node.settings;
    const half = forward.cells.length;
    const [W, V] = [lastAxis(a.y.shape), lastAxis(b.y.shape)];
    const wide = mode === "concat" ? W + V : W;
    const share = mode === "ave" ? 0.5 : 1;
    const part = (width, begin, other) =>
      dy && Float64Array.from({ length: (dy.length / wide) * width }, (_, n) => {
        const d = dy[Math.floor(n / width) * wide + begin + (n % width)];
        return mode === "mul" ? d * other.y.data[n] : d * share;
      });
    const ahead = backStack(a.layers, forward, flow, part(W, 0, b), dfields.slice(0, half));
    const back = backStack(b.layers, backward, flow, part(V, wide - V, a), dfields.slice(half));
    const dx = ahead[0].dx;
    addNumbers(dx, 0, back[0].dx, 0, dx.length);
    return { dxs: [dx], cells: [...ahead, ...back] };
  },
};

// Every kind of node, by what files call it: its settings and arrays in a description; `run` a flow to a flow, with
// what is kept for the way back; `back` from the gradient by what it returned to those by what it took.
const NODE_KINDS = {
  recurrent: recurrentNode,
  bidirectional: bidirectionalNode,
  standardise: standardiseNode,
  scale: scaleNode,
  layer_norm: layerNormNode,
  dense: denseNode,
  activation: activationNode,
  clip: clipNode,
  embedding: embeddingNode,
  masking: maskingNode,
  conv1d: convolutionNode,
  pool1d: windowPoolNode,
  pool: globalPoolNode,
  reduce: reduceNode,
  pad: padNode,
  flatten: reshapeNode([], () => [-1]),
  reshape: reshapeNode(["shape"], (node) => node.settings.shape),
  permute: permuteNode,
  repeat: repeatNode,
  select: selectNode,
  merge: mergeNode,
};

// ── networks ────────────────────────────────────────────────────────────────────────────────────────────────────────

const FORMAT_VERSION = 1;

function readArray({ dtype, shape, data }) {
  if (typeof data !== "string") return { data: new Float64Array(data), shape };
  if (!["float32", "float64"].includes(dtype)) throw new Error(`expected arrays of float32 or float64, got ${dtype}`);
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n += 1) bytes[n] = text.charCodeAt(n);
  const numbers = dtype === "float32" ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
  return { data: new Float64Array(numbers), shape };
}

// A network of a payload: see the head of this file. What it doesn't know, it leaves to `unsupported` to say.
export function readNetwork({ description, arrays }) {
  if (description.version !== FORMAT_VERSION) {
    throw new Error(`expected a description of version ${FORMAT_VERSION}, got ${description.version}`);
  }
  const groups = {};
  for (const [name, array] of Object.entries(arrays)) {
    const cut = name.lastIndexOf("/");
    (groups[name.slice(0, cut)] ??= {})[name.slice(cut + 1)] = readArray(array);
  }
  const nodes = description.nodes.map(({ name, wires, type, ...settings }) => {
    const stacks = [];
    if (type === "recurrent") stacks.push(["", settings]);
    if (type === "bidirectional") stacks.push(["forward/", settings.forward], ["backward/", settings.backward]);
    const cells = stacks.flatMap(([prefix, stack]) =>
      stack.cells.map((spec, n) => ({
        spec: { ...USUAL_SPEC, ...spec },
        arrays: groups[`${name}/${prefix}${n}`] ?? {},
      })),
    );
    return { name, type, sources: wires, settings, arrays: groups[name] ?? {}, cells };
  });
  const patches = (description.patches ?? []).map((patch, n) => ({
    ...patch,
    steps: Array.isArray(patch.steps) ? { numbers: patch.steps } : patch.steps,
    value: groups[`patch/${n}`]?.value ?? null,
  }));
  const weights = Object.entries(arrays).filter(([name]) => !name.startsWith("patch/"));
  const dtype = weights.some(([, array]) => array.dtype === "float64") ? "float64" : "float32";
  const known = ["version", "inputs", "nodes", "outputs", "metadata", "patches"];
  const others = Object.keys(description).filter((key) => !known.includes(key));
  return { inputs: description.inputs, outputs: description.outputs, dtype, nodes, patches, others };
}

// Sentences that say what of a network isn't served; none: all of it is.
export function unsupported(network) {
  const found = (network.others ?? []).map((key) => `The network's ${key} aren't supported.`);
  for (const { name, type, settings, arrays, cells } of network.nodes) {
    if (!Object.hasOwn(NODE_KINDS, type)) {
      found.push(`${name}: a node of the type ${type} isn't supported.`);
      continue;
    }
    const kind = NODE_KINDS[type];
    for (const key of Object.keys(settings)) {
      if (!kind.settings.includes(key)) found.push(`${name}: the setting ${key} of ${type} isn't supported.`);
    }
    for (const key of Object.keys(arrays)) {
      if (!kind.arrays.includes(key)) found.push(`${name}: the array ${key} of ${type} isn't supported.`);
    }
    if ("activation" in settings && !knowsNodeActivation(settings.activation)) {
      found.push(`${name}: the activation ${settings.activation} isn't supported.`);
    }
    for (const stack of type === "bidirectional" ? [settings.forward, settings.backward] : []) {
      for (const key of Object.keys(stack)) {
        if (![...STACK_SETTINGS, "type"].includes(key)) found.push(`${name}: the setting ${key} isn't supported.`);
      }
    }
    cells.forEach((cell, n) => found.push(...unsupportedCell(`${name}, cell ${n}`, cell)));
  }
  return found;
}

function unsupportedCell(where, { spec, arrays }) {
  if (!Object.hasOwn(GATE_NAMES, spec.kind)) return [`${where}: a cell of the kind ${spec.kind} isn't supported.`];
  const found = [];
  for (const key of Object.keys(spec)) {
    if (!["input_size", "units", ...Object.keys(USUAL_SPEC)].includes(key)) {
      found.push(`${where}: the setting ${key} isn't supported.`);
    }
  }
  for (const slot of [...GATE_NAMES[spec.kind], ...(spec.kind === "lstm" ? ["cell"] : [])]) {
    const text = slotActivation(spec, slot);
    if (cellActivation(text) === null) found.push(`${where}: the activation ${text} of ${slot} isn't supported.`);
  }
  const shapes = cellShapes(spec);
  for (const [name, shape] of Object.entries(shapes)) {
    const got = arrays[name]?.shape ?? [];
    if (got.join() !== shape.join()) {
      found.push(`${where}: expected the array ${name} [${shape.join(", ")}], got [${got.join(", ")}].`);
    }
  }
  for (const name of Object.keys(arrays)) {
    if (!Object.hasOwn(shapes, name)) found.push(`${where}: the array ${name} isn't supported.`);
  }
  return found;
}

// How many multiplications by numbers of its own one row's run over so many steps takes, each node as often as there
// are steps: a good measure of the time, some 10^9 a second.
export function multiplications(network, steps) {
  const added = ["bias", "cell_bias", "initial_h", "initial_c", "table", "mean", "shift"];
  let sum = 0;
  for (const node of network.nodes) {
    for (const arrays of [node.arrays, ...node.cells.map((cell) => cell.arrays)]) {
      for (const [name, { data }] of Object.entries(arrays)) if (!added.includes(name)) sum += data.length;
    }
  }
  return sum * steps;
}

// Inputs that are looked up in a table, past nodes that only move numbers: a mask goes with them too.
function takesIds(network, name) {
  const takers = network.nodes.filter((node) => node.sources.includes(name));
  const past = (node) =>
    node.type === "embedding" || (NODE_KINDS[node.type].shapesOnly === true && takesIds(network, node.name));
  return takers.length > 0 && !network.outputs.includes(name) && takers.every(past);
}

const floats = (data) => (data instanceof Float64Array ? data : new Float64Array(data));

// Flags [B, T] as they are given, of one input: an array or a value for all inputs, or one of each name.
function givenFlags(what, given, name, B, T) {
  if (given === null || given === undefined) return null;
  const whole = Array.isArray(given) || ArrayBuffer.isView(given) || Array.isArray(given.shape);
  const own = whole ? given : given[name];
  if (own === null || own === undefined) return null;
  const flags = Uint8Array.from(own.data ?? own, (flag) => (flag ? 1 : 0));
  if (flags.length !== B * T) {
    throw new Error(`expected ${what} of ${name} [B=${B}, T=${T}], got ${flags.length} numbers`);
  }
  return flags;
}

function inputFlows(network, inputs, { mask, reset }) {
  const flows = {};
  for (const { name, shape } of network.inputs) {
    const value = inputs[name];
    if (value === undefined) throw new Error(`expected the input ${name}, got none`);
    if (!Array.isArray(value?.shape) || value.data === undefined) {
      throw new Error(`expected the input ${name} as { data, shape }, got ${typeof value}`);
    }
    const [, ...axes] = value.shape;
    const fits = axes.length === shape.length && shape.every((length, n) => length === null || length === axes[n]);
    const expected = ["B", ...shape];
    if (!fits) throw new Error(`expected ${name} ${shapeText(expected)}, got ${shapeText(value.shape)}`);
    if (value.data.length !== numbersIn(value.shape)) {
      throw new Error(`expected ${name} of ${numbersIn(value.shape)} numbers, got ${value.data.length}`);
    }
    const timed = shape.length === 2 || (shape.length === 1 && takesIds(network, name));
    const flags = (what, given) => (timed ? givenFlags(what, given, name, value.shape[0], value.shape[1]) : null);
    const x = { data: floats(value.data), shape: value.shape };
    flows[name] = { x, mask: flags("mask", mask), reset: flags("reset", reset) };
  }
  const rows = new Set(Object.values(flows).map((flow) => flow.x.shape[0]));
  if (rows.size > 1) throw new Error(`expected inputs of as many rows as each other, got ${[...rows].join(" and ")}`);
  return flows;
}

// One state a cell, as Float64Arrays, or null.
function givenStates(network, state, B) {
  const specs = network.nodes.flatMap((node) => node.cells.map((cell) => cell.spec));
  if (state === null || state === undefined) return specs.map(() => null);
  if (state.length !== specs.length) throw new Error(`expected ${specs.length} states, got ${state.length}`);
  return state.map((one, n) => {
    if (one === null) return null;
    const sizes = { h: outputSize(specs[n]), ...(specs[n].kind === "lstm" ? { c: specs[n].units } : {}) };
    const of = ([name, size]) => {
      const data = one[name] && floats(one[name].data ?? one[name]);
      if (!data || data.length !== B * size) {
        throw new Error(`expected ${name} of state ${n} [B=${B}, ${size}], got another`);
      }
      return [name, data];
    };
    return Object.fromEntries(Object.entries(sizes).map(of));
  });
}

function givenPatches(network, given) {
  const found = new Map(network.nodes.map((node) => [node.name, node.cells.map(() => [])]));
  for (const patch of [...(network.patches ?? []), ...(given ?? [])]) {
    const own = found.get(patch.node)?.[patch.cell ?? 0];
    if (own === undefined) {
      throw new Error(`patch: expected a cell of the network, got cell ${patch.cell} of ${patch.node}`);
    }
    own.push(patch);
  }
  return found;
}

// All nodes run in their order; `keep`: with what the way back needs.
function runNodes(network, inputs, options, keep) {
  const [problem] = unsupported(network);
  if (problem !== undefined) throw new Error(problem);
  const flows = inputFlows(network, inputs, options);
  const B = Object.values(flows)[0].x.shape[0];
  const states = givenStates(network, options.state, B);
  const patches = givenPatches(network, options.patches);
  let place = 0;
  for (const node of network.nodes) {
    const taken = node.sources.map((source) => flows[source]);
    const kind = NODE_KINDS[node.type];
    checkTaken(node, kind, taken);
    flows[node.name] = kind.run(node, taken, {
      states: states.slice(place, place + node.cells.length),
      patches: patches.get(node.name),
      dtype: network.dtype,
      pre: options.pre ?? true,
      keep,
    });
    place += node.cells.length;
  }
  return flows;
}

function checkTaken(node, kind, taken) {
  const width = node.cells.length ? node.cells[0].spec.input_size : (node.settings.input_size ?? null);
  const ranks = { recurrent: 3, bidirectional: 3, conv1d: 3, pool1d: 3, pool: 3, masking: 3, repeat: 2, embedding: 2 };
  const rank = ranks[node.type] ?? null;
  for (const { x, reset } of taken) {
    if ((width !== null && lastAxis(x.shape) !== width) || (rank !== null && x.shape.length !== rank)) {
      const expected = rank === 3 ? ["B", "T"] : rank === 2 ? ["B"] : ["…"];
      throw new Error(`${node.name}: expected ${shapeText([...expected, width])}, got ${shapeText(x.shape)}`);
    }
    if (reset !== null && kind.mixesSteps?.(node.settings)) {
      throw new Error(`${node.name}: expected no reset, as it takes steps together, of one piece and of the next`);
    }
  }
}

const passesOf = (node, flow) => (node.cells.length ? NODE_KINDS[node.type].passes(flow) : []);
const statesOf = ({ h, c }, { B, P, H }) => ({
  h: { data: h, shape: [B, P] },
  ...(c === null ? {} : { c: { data: c, shape: [B, H] } }),
});

// Run the network: see the head of this file.
export function run(network, inputs, options) {
  return answersOf(network, runNodes(network, inputs, options ?? {}, false));
}

function answersOf(network, flows) {
  const cells = {};
  const state = [];
  for (const node of network.nodes) {
    const passes = passesOf(node, flows[node.name]);
    if (passes.length) cells[node.name] = passes.map((pass) => pass.fields);
    state.push(...passes.map((pass) => statesOf(pass.after, pass)));
  }
  return { values: Object.fromEntries(Object.entries(flows).map(([name, { x }]) => [name, x])), cells, state };
}

// Where one number of an array of this shape lies; `of` has its row, step and unit.
function placeOf(what, shape, { row, step, unit }) {
  const at = shape.length === 3 ? [row, step, unit] : shape.length === 2 ? [row, unit] : [];
  if (!at.length || at.some((entry, axis) => !Number.isInteger(entry) || entry < 0 || entry >= shape[axis])) {
    throw new Error(`gradient: expected row, step and unit within ${what} ${shapeText(shape)}, got ${at.join(", ")}`);
  }
  return at.reduce((place, entry, axis) => place * shape[axis] + entry, 0);
}

// The gradient by what nodes returned, and by fields of cells, that a call of `gradient` asks for.
function seedsOf(network, flows, of) {
  const dvalues = {};
  const dfields = Object.fromEntries(network.nodes.map((node) => [node.name, node.cells.map(() => null)]));
  const valueOf = (name) => {
    if (!Object.hasOwn(flows, name)) throw new Error(`gradient: expected a node or an input, got ${name}`);
    return flows[name].x;
  };
  if (of.seeds) {
    for (const [name, seed] of Object.entries(of.seeds)) {
      const [data, size] = [new Float64Array(seed.data ?? seed), valueOf(name).data.length];
      if (data.length !== size) {
        throw new Error(`gradient: expected ${size} numbers as the seed of ${name}, got ${data.length}`);
      }
      dvalues[name] = data;
    }
  } else if (of.value !== undefined) {
    const { data, shape } = valueOf(of.value);
    dvalues[of.value] = new Float64Array(data.length);
    dvalues[of.value][placeOf(of.value, shape, of)] = 1;
  } else {
    const node = network.nodes.find((one) => one.name === of.node);
    const pass = node && passesOf(node, flows[node.name])[of.cell ?? 0];
    const field = pass?.fields[of.gate];
    if (!field || of.gate === "pre") {
      throw new Error(`gradient: expected a gate or state of a cell, got ${of.gate} of ${of.node}`);
    }
    const seed = new Float64Array(field.data.length);
    seed[placeOf(`${of.node}, ${of.gate}`, field.shape, of)] = 1;
    dfields[of.node][of.cell ?? 0] = { [of.gate]: seed };
  }
  return { dvalues, dfields };
}

// The gradient of one number, or of a loss: see the head of this file.
export function gradient(network, inputs, options, of) {
  const flows = runNodes(network, inputs, options ?? {}, true);
  return backNodes(network, flows, seedsOf(network, flows, of));
}

function zerosLike(arrays) {
  return Object.fromEntries(Object.entries(arrays).map(([name, { data }]) => [name, new Float64Array(data.length)]));
}

function backNodes(network, flows, { dvalues, dfields }) {
  const arrays = {};
  const cells = {};
  const states = [];
  const shaped = (found, like) =>
    Object.fromEntries(Object.entries(found).map(([name, data]) => [name, { data, shape: like[name].shape }]));
  for (const node of [...network.nodes].reverse()) {
    const flow = flows[node.name];
    const dy = dvalues[node.name] ?? null;
    const passes = passesOf(node, flow);
    const darrays = zerosLike(node.arrays);
    arrays[node.name] = Object.keys(darrays).length ? [shaped(darrays, node.arrays)] : [];
    if (passes.length) {
      arrays[node.name] = passes.map(({ cell }) => shaped(zerosLike(cell.arrays), cell.arrays));
      cells[node.name] = null;
    }
    let ends = passes.map((pass) => {
      const { h, c } = pass.after;
      return statesOf({ h: new Float64Array(h.length), c: c && new Float64Array(c.length) }, pass);
    });
    if (dy !== null || dfields[node.name].some((one) => one !== null)) {
      const taken = node.sources.map((source) => flows[source]);
      const back = NODE_KINDS[node.type].back(node, taken, flow, dy, darrays, dfields[node.name]);
      const dxs = passes.length ? back.dxs : back;
      if (passes.length) {
        arrays[node.name] = back.cells.map(({ darrays: own, pass }) => shaped(own, pass.cell.arrays));
        cells[node.name] = back.cells.map(({ by, pass }) => shaped(by, pass.fields));
        ends = back.cells.map(({ dstate, pass }) => statesOf(dstate, pass));
      }
      node.sources.forEach((source, k) => {
        if (dxs[k] === null) return;
        if (dvalues[source]) addNumbers(dvalues[source], 0, dxs[k], 0, dxs[k].length);
        else dvalues[source] = dxs[k];
      });
    }
    states.unshift(ends);
  }
  const valueOf = (name) => (dvalues[name] ? { data: dvalues[name], shape: flows[name].x.shape } : null);
  const inputOf = ({ name }) => {
    const zeros = { data: new Float64Array(flows[name].x.data.length), shape: flows[name].x.shape };
    return [name, valueOf(name) ?? (takesIds(network, name) ? null : zeros)];
  };
  return {
    inputs: Object.fromEntries(network.inputs.map(inputOf)),
    values: Object.fromEntries(network.nodes.map(({ name }) => [name, valueOf(name)])),
    cells,
    state: states.flat(),
    arrays,
  };
}

// ── the playground ──────────────────────────────────────────────────────────────────────────────────────────────────

// Numbers from 0 to below 1 by mulberry32, the same for the same seed on every machine.
// Ref: Tommy Ettinger 2017, mulberry32, in the public domain.
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// A task draws a sequence: x(t, feature, number), target(t, number, counted = true) where a number is asked for.
// kind: "bits", targets are 0 or 1 and the output is the probability of a 1; "numbers", and `whole` where they are
// counted in ones.
export const TASKS = {
  echo: {
    title: "Echo",
    text: "Say at every step which bit came some steps before: the network has to hold several bits at once.",
    kind: "bits",
    inputs: ["bit"],
    outputs: ["the bit before"],
    steps: 20,
    draw(random, T, { delay }, x, target) {
      const bits = Array.from({ length: T }, () => (random() < 0.5 ? 0 : 1));
      bits.forEach((bit, t) => {
        x(t, 0, 2 * bit - 1);
        if (t >= delay) target(t, bits[t - delay]);
      });
    },
  },
  parity: {
    title: "Parity",
    text: "Say at every step whether the ones so far are odd: one bit of state, flipped by every one.",
    kind: "bits",
    inputs: ["bit"],
    outputs: ["odd"],
    steps: 12,
    draw(random, T, options, x, target) {
      let odd = 0;
      for (let t = 0; t < T; t += 1) {
        const bit = random() < 0.5 ? 0 : 1;
        odd ^= bit;
        x(t, 0, 2 * bit - 1);
        target(t, odd);
      }
    },
  },
  // Ref: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", sec. 5.4, experiment 4.
  adding: {
    title: "Adding",
    text: "Add the two numbers that were marked, at the end of the sequence.",
    kind: "numbers",
    inputs: ["number", "mark"],
    outputs: ["sum"],
    steps: 20,
    draw(random, T, options, x, target) {
      const half = Math.floor(T / 2);
      const marked = [Math.floor(random() * half), half + Math.floor(random() * (T - half))];
      let sum = 0;
      for (let t = 0; t < T; t += 1) {
        const number = random();
        x(t, 0, number);
        if (marked.includes(t)) {
          x(t, 1, 1);
          sum += number;
        }
      }
      target(T - 1, sum);
    },
  },
  wave: {
    title: "A wave with pulses",
    text: "Hold what the wave was when the last pulse came; nothing before the first.",
    kind: "numbers",
    inputs: ["wave", "pulse"],
    outputs: ["held"],
    steps: 30,
    draw(random, T, options, x, target) {
      const [period, phase] = [8 + 16 * random(), 2 * Math.PI * random()];
      let held = 0;
      for (let t = 0; t < T; t += 1) {
        const wave = Math.sin((2 * Math.PI * t) / period + phase);
        const pulse = random() < 0.12;
        if (pulse) held = wave;
        x(t, 0, wave);
        x(t, 1, pulse ? 1 : 0);
        target(t, held);
      }
    },
  },
  brackets: {
    title: "Brackets",
    text: "Count how many brackets are open: a unit that counts up and down.",
    kind: "numbers",
    whole: true,
    inputs: ["(", ")", "other"],
    outputs: ["open"],
    steps: 24,
    draw(random, T, options, x, target) {
      let open = 0;
      for (let t = 0; t < T; t += 1) {
        const drawn = random();
        const symbol = drawn < 0.4 && open < 6 ? 0 : drawn >= 0.6 && open > 0 ? 1 : 2;
        open += symbol === 0 ? 1 : symbol === 1 ? -1 : 0;
        x(t, symbol, 1);
        target(t, open);
      }
    },
  },
};

// `rows` sequences of a task: input and target, and a weight of 1 where a number is asked for, 0 elsewhere.
function drawnTask(task, options, random, rows) {
  const { steps: T } = options;
  const [I, O] = [task.inputs.length, task.outputs.length];
  const made = (width) => ({ data: new Float64Array(rows * T * width), shape: [rows, T, width] });
  const [input, target, weight] = [made(I), made(O), made(O)];
  for (let row = 0; row < rows; row += 1) {
    const x = (t, feature, number) => {
      input.data[(row * T + t) * I + feature] = number;
    };
    const asked = (t, number) => {
      target.data[row * T + t] = number;
      weight.data[row * T + t] = 1;
    };
    task.draw(random, T, options, x, asked);
  }
  return { input, target, weight };
}

// A cell and a head, drawn evenly within ±1/sqrt(H), an LSTM's forget bias 1.
// Ref: Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", sec. 5.
function newPlayground(task, kind, units, random) {
  const O = task.outputs.length;
  const spec = { ...USUAL_SPEC, kind, input_size: task.inputs.length, units };
  const even = () => (2 * random() - 1) / Math.sqrt(units);
  const drawn = (shape) => ({ data: Float64Array.from({ length: numbersIn(shape) }, even), shape });
  const arrays = Object.fromEntries(Object.entries(cellShapes(spec)).map(([name, shape]) => [name, drawn(shape)]));
  if (kind === "lstm") arrays.bias.data.fill(1, units, 2 * units);
  const bits = task.kind === "bits";
  const nodes = [
    {
      name: kind,
      type: "recurrent",
      sources: ["input"],
      settings: { return_sequences: true, go_backwards: false, zero_output_for_mask: false, residual: false },
      arrays: {},
      cells: [{ spec, arrays }],
    },
    {
      name: "head",
      type: "dense",
      sources: [kind],
      settings: { input_size: units, units: O, use_bias: true, activation: "linear" },
      arrays: { kernel: drawn([units, O]), bias: { data: new Float64Array(O), shape: [O] } },
      cells: [],
    },
  ];
  if (bits) {
    const settings = { activation: "sigmoid" };
    nodes.push({ name: "output", type: "activation", sources: ["head"], settings, arrays: {}, cells: [] });
  }
  const inputs = [{ name: "input", shape: [null, task.inputs.length] }];
  return { inputs, outputs: [bits ? "output" : "head"], dtype: "float64", nodes };
}

// The loss, the mean over the numbers asked for: of bits the cross-entropy in nats, of numbers the square of the error;
// its gradient by what the head returns; and which share of the answers is right, null where they aren't counted.
function taskLoss(task, head, target, weight) {
  const dhead = new Float64Array(head.length);
  let [loss, asked, right] = [0, 0, 0];
  for (let n = 0; n < head.length; n += 1) asked += weight[n];
  for (let n = 0; n < head.length; n += 1) {
    if (weight[n] === 0) continue;
    const [z, wanted] = [head[n], target[n]];
    if (task.kind === "bits") {
      loss += Math.max(z, 0) - z * wanted + Math.log1p(Math.exp(-Math.abs(z)));
      dhead[n] = (sigmoidOf(z) - wanted) / asked;
      right += z > 0 === (wanted === 1) ? 1 : 0;
    } else {
      loss += (z - wanted) ** 2;
      dhead[n] = (2 * (z - wanted)) / asked;
      right += Math.round(z) === wanted ? 1 : 0;
    }
  }
  const counted = task.kind === "bits" || task.whole === true;
  return { loss: loss / asked, accuracy: counted ? right / asked : null, dhead };
}

// createTrainer({ task, kind, units, rate, batch, steps, delay, clip, seed }): a small network that learns one of TASKS
// by Adam, all by seeded draws. Each of these may be left out:
//   task "echo"; kind "lstm", "gru" or "rnn"; units 12; rate 0.01, Adam's; batch 32; steps: the task's own; delay 3, of
//   an echo; clip 1, the most that the gradient's norm may be; seed 1.
// Returns { network, options, iteration, step(), example(seed) }:
//   network        as `run` takes it; its arrays change with every step
//   step()         trains on one batch of new sequences: { loss, accuracy, norm, iteration }. Accuracy is null where
//                  the task's answers aren't counted; norm is the gradient's before it is cut
//   example(seed)  one more sequence, which the training doesn't see: { input, target, weight, output: values
//                  [1, T, …], cells: the cell's fields as `run` has them, loss, accuracy }; weight is 1 where a number
//                  is asked for
// Ref: Kingma and Ba 2015, "Adam", alg. 1; Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent
// neural networks", alg. 1.
export function createTrainer(given = {}) {
  const usual = { task: "echo", kind: "lstm", units: 12, rate: 0.01, batch: 32, delay: 3, clip: 1, seed: 1 };
  const options = { ...usual, ...given };
  for (const [name, choices] of [["task", TASKS], ["kind", GATE_NAMES]]) {
    if (!Object.hasOwn(choices, options[name])) {
      const [names, got] = [Object.keys(choices).join(", "), options[name]];
      throw new Error(`createTrainer: expected ${name} to be one of ${names}, got ${got}`);
    }
  }
  const task = TASKS[options.task];
  options.steps ??= task.steps;
  for (const name of ["units", "batch", "steps"]) {
    if (!Number.isInteger(options[name]) || options[name] < 1) {
      throw new Error(`createTrainer: expected ${name} to be a whole number above 0, got ${options[name]}`);
    }
  }
  const { delay, steps } = options;
  if (options.task === "echo" && !(Number.isInteger(delay) && delay >= 0 && delay < steps)) {
    throw new Error(`createTrainer: expected delay from 0 to below steps=${steps}, got ${delay}`);
  }
  for (const name of ["rate", "clip"]) {
    if (!(options[name] > 0)) throw new Error(`createTrainer: expected ${name} above 0, got ${options[name]}`);
  }
  const random = randomNumbers(options.seed);
  const network = newPlayground(task, options.kind, options.units, random);
  const [cell, head] = [network.nodes[0].cells[0], network.nodes[1]];
  const weights = [...Object.values(cell.arrays), ...Object.values(head.arrays)].map(({ data }) => data);
  const moments = weights.map((data) => [new Float64Array(data.length), new Float64Array(data.length)]);
  const lossOf = (flows, { target, weight }) => taskLoss(task, flows.head.x.data, target.data, weight.data);
  const trainer = {
    network,
    options,
    iteration: 0,
    step() {
      const drawn = drawnTask(task, options, random, options.batch);
      const flows = runNodes(network, { input: drawn.input }, {}, true);
      const { loss, accuracy, dhead } = lossOf(flows, drawn);
      const { arrays } = backNodes(network, flows, seedsOf(network, flows, { seeds: { head: dhead } }));
      const found = [arrays[options.kind][0], arrays.head[0]].flatMap(Object.values);
      const slopes = found.map(({ data }) => data);
      const norm = Math.sqrt(slopes.reduce((sum, slope) => slope.reduce((own, d) => own + d * d, sum), 0));
      trainer.iteration += 1;
      const cut = Math.min(1, options.clip / (norm + 1e-12));
      const [first, second] = [1 - 0.9 ** trainer.iteration, 1 - 0.999 ** trainer.iteration];
      weights.forEach((data, k) => {
        const [mean, square] = moments[k];
        for (let n = 0; n < data.length; n += 1) {
          const d = slopes[k][n] * cut;
          mean[n] = 0.9 * mean[n] + 0.1 * d;
          square[n] = 0.999 * square[n] + 0.001 * d * d;
          data[n] -= (options.rate * mean[n]) / first / (Math.sqrt(square[n] / second) + 1e-8);
        }
      });
      return { loss, accuracy, norm, iteration: trainer.iteration };
    },
    example(seed = 0) {
      const drawn = drawnTask(task, options, randomNumbers(seed ^ 0x5eed5eed), 1);
      const flows = runNodes(network, { input: drawn.input }, {}, false);
      const { loss, accuracy } = lossOf(flows, drawn);
      const answers = answersOf(network, flows);
      const [cells, output] = [answers.cells[options.kind][0], answers.values[network.outputs[0]]];
      return { ...drawn, output, cells, loss, accuracy };
    },
  };
  return trainer;
}

// Every activation of a cell or a node, with its slope.

const identityOf = (z) => z;
export const sigmoidOf = (z) => 0.5 * (1 + Math.tanh(0.5 * z)); // 1/(1 + exp(-z)) overflows
export const betweenOf = (z, low, high) => Math.min(Math.max(z, low), high); // NaN stays NaN
const SELU_ALPHA = 1.6732632423543772;
const SELU_SCALE = 1.0507009873554805;
const GELU_ROOT = Math.sqrt(2 / Math.PI);

// The error function, for 0 <= z < 6 by 2/sqrt(pi)·e^(-z²)·(z + 2z³/3 + 4z⁵/15 + …), whose terms all have the same sign;
// beyond, it is 1 to double precision. Ref: Abramowitz and Stegun 1964, 7.1.6.
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
  positive: [(z) => (z < 0 ? sigmoidOf(z) : z + 0.5), (z, y) => (z < 0 ? y * (1 - y) : 1)],
  scaled_tanh: [(z, a, b) => a * Math.tanh(b * z), (z, y, a, b) => a * b * (1 - (y / a) ** 2)],
  silu: [(z) => z * sigmoidOf(z), (z) => sigmoidOf(z) * (1 + z * (1 - sigmoidOf(z)))],
  gelu: [(z) => z * geluShare(z), (z) => geluShare(z) + z * Math.exp(-0.5 * z * z) / Math.sqrt(2 * Math.PI)],
};

// Further activations of nodes; softmax and log_softmax, which act on whole rows, are in `activateRows`.
const NODE_ACTIVATION_TABLE = {
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

// The activation that a string such as "hard_sigmoid(0.2, 0.5)" names: { name, f, slope, alpha, beta }; null where it isn't in `table`.
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
export const knowsNodeActivation = (text) => ROW_ACTIVATIONS.includes(text) || nodeActivation(text) !== null;

// The activation y of rows z of `width` numbers.
export function activateRows(text, z, width) {
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

// The gradient of `activateRows` with respect to z.
export function activateRowsBack(text, z, y, width, dy) {
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

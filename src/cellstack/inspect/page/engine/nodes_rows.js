// Nodes that act on each step, and lookups of ids.

import { lastAxis } from "./shapes.js";
import { activateRows, activateRowsBack, betweenOf } from "./activations.js";
import { addNumbers, addOuter, addProduct, addProductBack, normaliseRow, normaliseRowBack } from "./products.js";
import { elementwiseNode, stepwiseNode } from "./nodes_base.js";

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

const groupedDenseNode = stepwiseNode(
  ["groups", "group_input_size", "group_units", "units", "use_bias"],
  ["kernel", "bias"],
  (node, x) => {
    const { kernel, bias } = node.arrays;
    const [G, I, O] = kernel.shape;
    const rows = x.data.length / (G * I);
    const data = new Float64Array(rows * G * O);
    for (let row = 0; row < rows; row += 1) {
      for (let g = 0; g < G; g += 1) {
        addProduct(data, (row * G + g) * O, x.data, (row * G + g) * I, I, kernel.data, g * I * O, O, O);
      }
      if (bias) addNumbers(data, row * G * O, bias.data, 0, G * O);
    }
    return { data, shape: [...x.shape.slice(0, -1), G * O] };
  },
  (node, x, y, dy, darrays) => {
    const { kernel } = node.arrays;
    const [G, I, O] = kernel.shape;
    const dx = new Float64Array(x.data.length);
    for (let at = 0; at < dx.length / I; at += 1) {
      const w = (at % G) * I * O;
      addOuter(darrays.kernel, w, O, x.data, at * I, I, dy, at * O, O);
      addProductBack(dx, at * I, I, kernel.data, w, O, O, dy, at * O);
      if (darrays.bias) addNumbers(darrays.bias, (at % G) * O, dy, at * O, O);
    }
    return dx;
  },
);

const boundsOf = ({ low, high }) => [low ?? -Infinity, high ?? Infinity];

const FUNCTION_SLOPES = { abs: Math.sign, cos: (x) => -Math.sin(x), log: (x) => 1 / x, sin: Math.cos };

// Normalise each group of every row; also returns the result before the gain, and the deviations, for the backward pass.
function normalisedRows(node, x, centred) {
  const { groups = 1, epsilon } = node.settings;
  const W = lastAxis(x.shape) / groups;
  const [gain, bias] = ["gain", "bias"].map((name) => node.arrays[name]?.data ?? null);
  const y = x.data.slice();
  const unit = new Float64Array(y.length);
  const deviations = new Float64Array(y.length / W || 0);
  for (let n = 0; n < deviations.length; n += 1) {
    deviations[n] = normaliseRow(y, n * W, W, gain, (n % groups) * W, bias, epsilon, unit, n * W, centred);
  }
  return { y, unit, deviations, gain, groups, W };
}

const normNode = (centred, ...settings) =>
  stepwiseNode(
    ["input_size", "use_gain", "use_bias", "epsilon", ...settings],
    ["gain", "bias"],
    (node, x) => ({ data: normalisedRows(node, x, centred).y, shape: x.shape }),
    (node, x, y, dy, darrays) => {
      const { unit, deviations, gain, groups, W } = normalisedRows(node, x, centred);
      const dx = dy.slice();
      const [dgain, dbias] = [darrays.gain ?? null, darrays.bias ?? null];
      for (let n = 0; n < deviations.length; n += 1) {
        normaliseRowBack(dx, n * W, W, gain, (n % groups) * W, dgain, dbias, unit, n * W, deviations[n], centred);
      }
      return dx;
    },
  );

const groupNormNode = {
  ...normNode(true, "groups", "over_time"),
  refuses: ({ over_time: overTime }) => (overTime ? "a norm over time isn't supported." : null),
};

// A mask that a node creates, combined with its input's mask.
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

export const ROW_NODES = {
  standardise: elementwiseNode(
    ["input_size"],
    ["mean", "scale"],
    (_, x, mean, scale) => (x - mean) / scale,
    (_, y, x, mean, scale) => [1 / scale, -1 / scale, -y / scale],
  ),
  scale: elementwiseNode(
    ["input_size"],
    ["scale", "shift"],
    (_, x, scale, shift) => x * scale + shift,
    (_, y, x, scale) => [scale, x, 1],
  ),
  layer_norm: normNode(true),
  rms_norm: normNode(false),
  group_norm: groupNormNode,
  dense: denseNode,
  grouped_dense: groupedDenseNode,
  activation: stepwiseNode(
    ["activation"],
    [],
    (node, x) => ({ data: activateRows(node.settings.activation, x.data, lastAxis(x.shape)), shape: x.shape }),
    (node, x, y, dy) => activateRowsBack(node.settings.activation, x.data, y.data, lastAxis(x.shape), dy),
  ),
  clip: elementwiseNode(
    ["low", "high"],
    [],
    (bounds, x) => betweenOf(x, ...boundsOf(bounds)),
    (bounds, y, x) => [x > boundsOf(bounds)[0] && x < boundsOf(bounds)[1] ? 1 : 0],
  ),
  power: elementwiseNode(
    ["exponent"],
    [],
    ({ exponent }, x) => x ** exponent,
    ({ exponent }, y, x) => [exponent * x ** (exponent - 1)],
  ),
  function: elementwiseNode(
    ["function"],
    [],
    (settings, x) => Math[settings.function](x),
    (settings, y, x) => [FUNCTION_SLOPES[settings.function](x)],
  ),
  skipped: stepwiseNode(["frame", "nodes", "takes"], [], (node, x) => x, (node, x, y, dy) => dy),
  embedding: embeddingNode,
  masking: maskingNode,
};

// Nodes that combine steps or features: convolutions, pools, sums.

import { numbersIn } from "./shapes.js";
import { activateRows, activateRowsBack } from "./activations.js";
import { addNumbers, addOuter, addProduct, addProductBack } from "./products.js";
import { around, axisOf, flagsOf, noFlags, withAxis } from "./nodes_base.js";

// The padding before and after a sequence, for windows of `span` steps.
function paddingOf(padding, steps, span, strides) {
  if (Array.isArray(padding)) return padding;
  if (padding === "causal") return [span - 1, 0];
  if (padding === "valid") return [0, 0];
  const missing = Math.max(0, (Math.ceil(steps / strides) - 1) * strides + span - steps);
  return [Math.floor(missing / 2), missing - Math.floor(missing / 2)];
}

// The number of windows, and the first step of the first one.
function windowsOf({ padding, strides }, steps, span) {
  const [before, after] = paddingOf(padding, steps, span, strides);
  return { count: Math.max(0, Math.floor((steps + before + after - span) / strides) + 1), first: -before };
}

// The mask of every nth step of B rows.
function everyNth(mask, B, n) {
  if (mask === null || n === 1) return mask;
  const T = mask.length / B;
  return mask.filter((_, at) => (at % T) % n === 0);
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
  settings: ["taps", "input_size", "units", "strides", "dilation", "groups", "padding", "use_bias", "activation", "keeps_mask"],
  arrays: ["kernel", "bias"],
  mixesSteps: ({ taps, strides, padding }) => taps > 1 || strides > 1 || Array.isArray(padding),
  run(node, [flow]) {
    const { z, B, F, count } = convolutionSums(node, flow.x);
    const data = activateRows(node.settings.activation, z, F);
    return { x: { data, shape: [B, count, F] }, mask: node.settings.keeps_mask ? everyNth(flow.mask, B, node.settings.strides) : null, reset: flow.reset };
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

// Reduce places of x to one number: their sum, mean, maximum or minimum, 0 for none. `best` is the place of the maximum
// or minimum, the first of several; a NaN among the values propagates.
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

// A reduction; plan(node, flow): { mode, shape, places(n): the inputs of output n }.
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

// The inputs of output `at` along an axis of length n, restricted to entries for which used(o, entry) is true.
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

export const TIME_NODES = { conv1d: convolutionNode, pool1d: windowPoolNode, pool: globalPoolNode, reduce: reduceNode };

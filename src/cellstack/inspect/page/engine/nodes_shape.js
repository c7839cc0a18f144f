// Nodes that move numbers, and nodes that combine several values.

import { numbersIn, shapeText, slicedEntries } from "./shapes.js";
import { around, axisOf, flagsOf, inOrder, movingNode, noFlags, takenMap, withAxis } from "./nodes_base.js";

const reshapeNode = (settings, lengths) => ({
  ...movingNode(
    settings,
    (node, shape) => {
      const numbers = numbersIn(shape.slice(1));
      const wanted = lengths(node);
      const rest = wanted.reduce((product, length) => (length === -1 ? product : product * length), 1);
      if (wanted.includes(-1) ? numbers % rest : numbers !== rest) {
        throw new Error(`${node.name}: ${numbers} numbers don't fit into [${wanted.join(", ")}]`);
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

// The selected steps at which a sequence begins: one that begins at a dropped step begins at the next.
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

// For each number of a value of shape `to`, the index of the number of `shape` that is broadcast there.
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

// The inputs of an elementwise merge: their maps, and where each one is masked.
function mergePlan(node, flows) {
  const shapes = flows.map((flow) => flow.x.shape);
  const shape = shapes[0].map((_, axis) => {
    const lengths = shapes.map((one) => one[axis]);
    return lengths.find((length) => length !== 1) ?? 1;
  });
  shapes.forEach((one) => {
    if (one.length !== shape.length || one.some((length, axis) => length !== 1 && length !== shape[axis])) {
      throw new Error(`${node.name}: expected values with compatible shapes, got ${shapes.map(shapeText).join(", ")}`);
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

// Flags of several values combined, 1 where one of them is 1; flags are broadcast with their values.
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

// Concatenated values: the shape, and for each value the positions of its numbers.
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
      throw new Error(`${node.name}: expected values with compatible shapes, got ${shapes.map(shapeText).join(", ")}`);
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

export const SHAPE_NODES = {
  pad: padNode,
  flatten: reshapeNode([], () => [-1]),
  reshape: reshapeNode(["shape"], (node) => node.settings.shape),
  permute: permuteNode,
  repeat: repeatNode,
  select: selectNode,
  merge: mergeNode,
};

// Shared code of nodes: moving numbers, passing flags of steps on.

import { lastAxis, numbersIn } from "./shapes.js";

// The index of an axis, counted from 0, the batch; throws if it doesn't exist.
export function axisOf(node, shape) {
  const axis = node.settings.axis > 0 ? node.settings.axis : shape.length + node.settings.axis;
  if (axis < 1 || axis >= shape.length) {
    throw new Error(`${node.name}: expected a value with an axis ${node.settings.axis}, got [${shape.join(", ")}]`);
  }
  return axis;
}

// The sizes of the axes before and after an axis.
export const around = (shape, axis) => [numbersIn(shape.slice(0, axis)), numbersIn(shape.slice(axis + 1))];

// A node that moves numbers: output n is x[map[n]], or `value` where map[n] is -1.
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

// The map for `moved` that selects these entries of an axis; -1 selects none.
export function takenMap(shape, axis, entries) {
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

export const withAxis = (shape, axis, length) => shape.map((old, n) => (n === axis ? length : old));

// A node that moves numbers, from `plan(node, shape)`: the output's shape, and the map.
export function movingNode(settings, plan, flags) {
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

export const noFlags = () => ({ mask: null, reset: null });
export const inOrder = (length) => Int32Array.from({ length }, (_, n) => n);
export const flagsOf = ({ mask, reset }) => ({ mask, reset });

// An elementwise or rowwise node: `run(node, x)` and `back(node, x, y, dy, darrays)` on rows.
export function stepwiseNode(settings, arrays, run, back) {
  return {
    settings,
    arrays,
    run: (node, [flow]) => ({ x: run(node, flow.x), ...flagsOf(flow) }),
    back: (node, [flow], { x }, dy, darrays) => [back(node, flow.x, x, dy, darrays)],
  };
}

// An elementwise node: `run(settings, x, …)` of a number and those of the arrays there, of which it has at most two, and
// `slopes(settings, y, x, …)`, the derivatives by x and by each of these.
export function elementwiseNode(settings, arrays, run, slopes) {
  const each = (node, x, visit) => {
    const width = lastAxis(x.shape);
    const [a, b] = arrays.map((name) => node.arrays[name].data);
    for (let n = 0; n < x.data.length; n += 1) visit(n, n % width, x.data[n], a?.[n % width], b?.[n % width]);
  };
  return stepwiseNode(
    settings,
    arrays,
    (node, x) => {
      const data = new Float64Array(x.data.length);
      each(node, x, (n, at, ...numbers) => (data[n] = run(node.settings, ...numbers)));
      return { data, shape: x.shape };
    },
    (node, x, y, dy, darrays) => {
      const dx = new Float64Array(dy.length);
      each(node, x, (n, at, ...numbers) => {
        const [slope, ...others] = slopes(node.settings, y.data[n], ...numbers);
        dx[n] = dy[n] * slope;
        arrays.forEach((name, k) => (darrays[name][at] += dy[n] * others[k]));
      });
      return dx;
    },
  );
}

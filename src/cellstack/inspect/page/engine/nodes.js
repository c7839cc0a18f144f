// Nodes with cells, and every kind of node by its name in files.

import { lastAxis, numbersIn } from "./shapes.js";
import { addNumbers } from "./products.js";
import { CellPass } from "./cells.js";
import { CellBack } from "./cells_back.js";
import { backStack, fromTheEnd, runStack } from "./stacks.js";
import { flagsOf, noFlags } from "./nodes_base.js";
import { ROW_NODES } from "./nodes_rows.js";
import { TIME_NODES } from "./nodes_time.js";
import { SHAPE_NODES } from "./nodes_shape.js";

export const STACK_SETTINGS = ["cells", "return_sequences", "go_backwards", "zero_output_for_mask", "residual"];

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

// The memory of an mLSTM is a cell that has only traced gates and states, and whose h isn't a state.
const memoryNode = {
  settings: ["heads", "key_size", "value_size", "epsilon", "output_gate"],
  arrays: [],
  run(node, [flow], { states: [state], patches: [patches], pre: traced, keep }) {
    const [B, T] = flow.x.shape;
    const [cell] = node.cells;
    const options = { ...flagsOf(flow), state, patches, reverse: false, pre: false, traced, keep };
    const pass = new (cell.pass ?? CellPass)(cell, flow.x.data, B, T, options);
    return { x: pass.fields.h, ...flagsOf(flow), kept: pass };
  },
  passes: ({ kept }) => [kept],
  back(node, inputs, { kept }, dy, darrays, [dfields]) {
    const h = new Float64Array(kept.fields.h.data.length);
    for (const own of [dy, dfields?.h]) if (own) addNumbers(h, 0, own, 0, h.length);
    const cell = new CellBack(kept, null, null, { ...dfields, h });
    return { dxs: [cell.dx], cells: [cell] };
  },
};

// Every kind of node, by its name in files: its settings and arrays in a description; `run` maps a flow to a flow, and
// stores what the backward pass needs; `back` maps the gradient of the output to the gradients of the inputs. Optional:
// `refuses` returns why some settings aren't supported, or null.
export const NODE_KINDS = {
  recurrent: recurrentNode,
  bidirectional: bidirectionalNode,
  mlstm: memoryNode,
  ...ROW_NODES,
  ...TIME_NODES,
  ...SHAPE_NODES,
};

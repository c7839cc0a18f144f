// A network from a safetensors file, run over sequences: the cells and dense layers by the kernel, all other nodes by
// the engine of the page (engine/engine.js).

import { activateRows } from "./engine/activations.js";
import { readNetwork, run, unsupported } from "./engine/engine.js";
import { cellShapes, stateSizes } from "./engine/cells.js";
import { numbersIn, shapeText } from "./engine/shapes.js";
import { flagsOf } from "./engine/nodes_base.js";
import { NODE_KINDS } from "./engine/nodes.js";
import { KernelPass, cellWeights, denseWeights, formOf, onKernel } from "./cells.js";
import { FormatError } from "./description.js";
import { MATRICES } from "./kinds.js";
import { MemoryPass, memoryForm } from "./memories.js";
import { bytesOf, loadKernel } from "./kernel.js";
import { readSafetensors } from "./safetensors.js";
import { Stream } from "./stream.js";

const ofNorm = ({ input_size: I, use_gain, use_bias }) => ({ ...(use_gain && { gain: [I] }), ...(use_bias && { bias: [I] }) });

// The shapes of the tensors of nodes without cells.
const SHAPES = {
  standardise: ({ input_size: I }) => ({ mean: [I], scale: [I] }),
  scale: ({ input_size: I }) => ({ scale: [I], shift: [I] }),
  layer_norm: ofNorm,
  rms_norm: ofNorm,
  group_norm: ofNorm,
  grouped_dense: ({ groups: G, group_input_size: I, group_units: O, units, use_bias }) => ({ kernel: [G, I, O], ...(use_bias && { bias: [units ?? G * O] }) }),
  dense: ({ input_size: I, units: O, use_bias }) => ({ kernel: [I, O], ...(use_bias && { bias: [O] }) }),
  embedding: ({ ids, units }) => ({ table: [ids, units] }),
  conv1d: ({ taps, input_size: C, groups, units: F, use_bias }) => ({
    kernel: [taps, C / groups, F],
    ...(use_bias && { bias: [F] }),
  }),
};

// The stacks of a node's cells, each with the prefix of its tensors.
function stacksOf({ name, type, ...settings }) {
  if (type === "recurrent") return [[`${name}/`, settings.cells]];
  if (type !== "bidirectional") return [];
  return ["forward", "backward"].map((way) => [`${name}/${way}/`, settings[way].cells]);
}

// Take the tensors of one owner out of `left`, after checking them.
function taken(left, prefix, shapes, narrows) {
  const found = {};
  for (const [name, shape] of Object.entries(shapes)) {
    const full = prefix + name;
    const tensor = left[full];
    if (tensor === undefined) throw new FormatError(`${full}: expected this tensor in the file, ${shapeText(shape)}`);
    if (tensor.shape.join() !== shape.join()) {
      throw new FormatError(`${full}: expected ${shapeText(shape)}, got ${shapeText(tensor.shape)}`);
    }
    const narrow = narrows && MATRICES.includes(name);
    if (tensor.dtype !== "F32" && !(narrow && tensor.dtype === "BF16")) {
      throw new FormatError(`${full}: expected ${narrow ? "F32 or BF16" : "F32"}, got ${tensor.dtype}`);
    }
    found[name] = tensor;
    delete left[full];
  }
  return found;
}

const asFloats = ({ data, shape }) => ({ data: data instanceof Float32Array ? data : new Float32Array(data), shape });
const mapped = (entries, of) => Object.fromEntries(Object.entries(entries).map(([name, one]) => [name, of(one)]));
const statesOf = (state) => state.map((one) => mapped(one, asFloats));

export class Network {
  // See `load`.
  constructor(kernel, description, tensors, weights) {
    if (description.patches?.length) throw new FormatError("The network's patches aren't supported: run it in Python.");
    const forms = [];
    const numbers = {};
    for (const node of description.nodes) {
      if (node.type === "mlstm") {
        numbers[node.name] = [forms.length];
        forms.push(memoryForm(node));
      }
      for (const [prefix, cells] of stacksOf(node)) {
        cells.forEach((cell, n) => {
          (numbers[node.name] ??= []).push(forms.length);
          forms.push(formOf(`${prefix}${n}`, cell));
        });
      }
    }
    const network = { ...readNetwork({ description, arrays: {}, cells: { forms, numbers } }), narrow: true };
    const left = { ...tensors };
    network.nodes.forEach((node, n) => {
      let place = 0;
      for (const [prefix, cells] of stacksOf(description.nodes[n])) {
        cells.forEach((_, k) => {
          const cell = node.cells[place];
          place += 1;
          cell.tensors = taken(left, `${prefix}${k}/`, cellShapes(cell), true);
          cell.arrays = cell.tensors;
        });
      }
      if (node.cells.length === 0) node.arrays = taken(left, `${node.name}/`, SHAPES[node.type]?.(node.settings) ?? {}, node.type === "dense");
    });
    const [problem] = [
      ...unsupported(network),
      ...Object.keys(left).map((name) => `${name}: no node uses this tensor.`),
    ];
    if (problem !== undefined) throw new FormatError(problem);
    this.kernel = kernel;
    this.network = network;
    this.inputs = network.inputs;
    this.outputs = network.outputs;
    this.metadata = description.metadata ?? {};
    for (const node of network.nodes) this.pack(node, weights);
  }

  // Pack a node's weights; the engine then runs the kernel in place of its own code.
  pack(node, weights) {
    const { kernel } = this;
    node.cells.forEach((cell, n) => {
      Object.assign(cell, { kernel, sizes: stateSizes(cell) });
      if (node.type === "mlstm") {
        cell.pass = MemoryPass;
        return;
      }
      const packed = cellWeights(kernel, `${node.name}, cell ${n}`, cell, cell.tensors, weights);
      const arrays = mapped(cell.tensors, ({ shape }) => ({ shape })); // the engine checks their shapes
      Object.assign(cell, { weights: packed, pass: KernelPass, arrays, tensors: null });
    });
    if (node.type === "dense") {
      node.weights = denseWeights(kernel, node, node.arrays, weights);
      const { input_size: input, units, activation } = node.settings;
      node.activate = onKernel(node) ? null : (z) => Float32Array.from(activateRows(activation, z, units));
      node.run = (_, [flow]) => {
        const rows = flow.x.data.length / input;
        const { y } = kernel.forward(node.weights, { h: units }, flow.x.data, rows, 1, {});
        return { x: { data: node.activate?.(y) ?? y, shape: [...flow.x.shape.slice(0, -1), units] }, ...flagsOf(flow) };
      };
      node.arrays = {};
    } else {
      // values between nodes are float32, as in Python and in a stream
      node.run = (...given) => {
        const flow = NODE_KINDS[node.type].run(...given);
        return { ...flow, x: asFloats(flow.x) };
      };
    }
  }

  // The inputs by name, from one value or from values by name; rounded to float32, except for ids.
  named(x) {
    const rounded = ([name, value]) => {
      const ids = this.inputs.find((input) => input.name === name)?.shape.length === 1;
      return [name, ids || value?.data === undefined ? value : asFloats(value)];
    };
    return Object.fromEntries(Object.entries(this.byName(x)).map(rounded));
  }
  byName(x) {
    if (ArrayBuffer.isView(x?.data) || Array.isArray(x?.data)) {
      if (this.inputs.length > 1) {
        throw new Error(`expected the inputs ${this.inputs.map(({ name }) => name).join(", ")} by name, got one value`);
      }
      return { [this.inputs[0].name]: x };
    }
    if (x === null || typeof x !== "object" || ArrayBuffer.isView(x)) {
      throw new Error("expected an input as { data, shape }, or inputs by name");
    }
    return x;
  }

  // See index.d.ts.
  run(x, options = {}) {
    const { values, state } = run(this.network, this.named(x), { ...options, pre: false });
    const outputs = Object.fromEntries(this.outputs.map((name) => [name, asFloats(values[name])]));
    return { y: outputs[this.outputs[0]], outputs, state: statesOf(state) };
  }

  // See index.d.ts.
  trace(x, options = {}) {
    const { values, cells, state } = run(this.network, this.named(x), { ...options, pre: true });
    return {
      values: mapped(values, asFloats),
      cells: mapped(cells, (list) => list.map((fields) => mapped(fields, asFloats))),
      state: statesOf(state),
    };
  }

  // See index.d.ts.
  stream(options) {
    return new Stream(this, options);
  }
}

// Load a network: see index.d.ts.
export async function load(source, { wasm, weights } = {}) {
  if (weights !== undefined && !["float32", "bfloat16", "int8"].includes(weights)) {
    throw new Error(`weights: expected float32, bfloat16 or int8, got ${weights}`);
  }
  const [kernel, bytes] = await Promise.all([loadKernel(wasm), bytesOf("load", source)]);
  const { description, tensors } = readSafetensors(bytes);
  return new Network(kernel, description, tensors, weights ?? null);
}

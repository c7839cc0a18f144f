// Cells on the kernel, in the form that the engine takes (engine/engine.js): what a file says of a cell, and a pass over
// sequences in place of the engine's own.

import { cellActivation, knowsNodeActivation } from "./engine/activations.js";
import { FormatError } from "./description.js";
import { ACTIVATIONS, ARRAYS, FLAGS, KINDS, MATRICES } from "./kinds.js";

// The kernel's number formats, in its order.
export const ELEMENTS = ["float32", "float64", "bfloat16", "int8"];

// The axes that the symbols in the shape of an array stand for, as in src/cellstack/cells/arrays.py: [count, letter],
// count blocks of that width; null: the axis is left out.
function symbolsOf(kind, spec) {
  const gates = kind.gates.length - (spec.coupled ? 1 : 0);
  const output = [1, spec.proj_size ? "P" : "H"];
  const sums = spec.backbone_units ? [1, "U"] : [gates, "H"]; // of the products with x and h
  const several = spec.heads > 1;
  return {
    I: [1, "I"],
    H: [1, "H"],
    P: output,
    U: [1, "U"],
    S: sums,
    GH: [gates, "H"],
    "G-1": [gates - 1, ""],
    "L-1": [spec.backbone_layers - 1, ""],
    heads: several ? [spec.heads, ""] : null,
    "P/heads": several ? [1, "D"] : output,
    "S/heads": several ? [gates, "D"] : sums,
    biases: spec.reset_after ? [2, ""] : null,
  };
}

// The axes of a cell's arrays, by name.
function symbolicShapes(kind, spec) {
  const settings = { ...spec, joint: spec.layer_norm === "joint", deep: spec.backbone_layers > 1 };
  const symbols = symbolsOf(kind, spec);
  const has = (need) => need === "" || Boolean(settings[need.replace("not ", "")]) !== need.startsWith("not ");
  const own = kind.arrays.filter(([, , needs]) => needs.split(" and ").every(has));
  return Object.fromEntries(own.map(([name, shape]) => [name, shape.split(" ").map((one) => (one in symbols ? symbols[one] : [Number(one), ""])).filter((axis) => axis !== null)]));
}

// The form of a cell, as far as the engine needs it where the kernel runs the cell; `where` is for messages.
export function formOf(where, given) {
  const name = given.kind ?? "lstm";
  const kind = Object.hasOwn(KINDS, name) ? KINDS[name] : null;
  if (kind === null) throw new FormatError(`${where}: expected kind to be one of ${Object.keys(KINDS).join(", ")}, got ${name}`);
  const settings = { ...kind.settings, kind: name };
  const spec = { ...settings, ...given };
  for (const width of ["input_size", "units"]) {
    if (!Number.isInteger(spec[width]) || spec[width] < 1) {
      throw new FormatError(`${where}: expected ${width} to be a positive integer, got ${spec[width]}`);
    }
  }
  if (spec.proj_size !== undefined && !(Number.isInteger(spec.proj_size) && spec.proj_size >= 0 && spec.proj_size < spec.units)) {
    throw new FormatError(`${where}: expected proj_size from 0 to below units=${spec.units}, got ${spec.proj_size}`);
  }
  if (spec.heads !== undefined && !(Number.isInteger(spec.heads) && spec.heads >= 1 && spec.units % spec.heads === 0)) {
    throw new FormatError(`${where}: expected heads to divide units=${spec.units}, got ${spec.heads}`);
  }
  if (spec.heads > 1 && spec.proj_size) throw new FormatError(`${where}: expected heads=1 with proj_size, got ${spec.heads}`);
  for (const [name, least] of [["backbone_units", 0], ["backbone_layers", 1]]) {
    if (spec[name] !== undefined && !(Number.isInteger(spec[name]) && spec[name] >= least)) {
      throw new FormatError(`${where}: expected ${name} to be an integer of at least ${least}, got ${spec[name]}`);
    }
  }
  const activations = Object.entries(kind.slots).map(([slot, usual]) => [slot, spec.gate_activations[slot] ?? spec[usual]]);
  if (spec.backbone_units) activations.push(["backbone", spec.backbone_activation]);
  const widths = kind.states.map((state) => [state, { width: [1, state === "h" && spec.proj_size ? "P" : "H"] }]);
  return {
    settings,
    states: Object.fromEntries(widths),
    trace: kind.trace,
    scalar: spec[kind.scalar] ? kind.scalar : "",
    activations: Object.fromEntries(activations),
    shapes: symbolicShapes(kind, spec),
    values: [], // the equations: the kernel has them
  };
}

const codeOf = ({ name, alpha, beta }) => [ACTIVATIONS.indexOf(name), alpha, beta];

// A setting as a number: an infinity for null, and the place in its options for a text.
const numberOf = (value, options) => (value === null ? Infinity : typeof value === "string" ? options.indexOf(value) : Number(value));

// The numbers of a description, in the order of kernel/wasm.cpp.
function numbersOf(spec, activations) {
  const flags = FLAGS.map(([name, usual, options]) => numberOf(spec[name] ?? usual, options));
  const slots = [0, 1, 2, 3, 4].flatMap((n) => activations[n] ?? [0, 0, 0]);
  return [spec.input, spec.units, spec.output, ...flags, ...slots];
}

// The weights of a cell { spec, form } on the kernel; `tensors`: its arrays by name, as read from the file; `format`:
// that of its matrices in memory, one of ELEMENTS, or null for the file's.
export function cellWeights(kernel, where, { spec, form }, tensors, format) {
  const dtypes = new Set(MATRICES.filter((name) => tensors[name]).map((name) => tensors[name].dtype));
  if (dtypes.size > 1) throw new FormatError(`${where}: expected its matrices all in F32 or all in BF16`);
  const element = format ?? (dtypes.has("BF16") ? "bfloat16" : "float32");
  const activations = Object.values(form.activations).map((text) => codeOf(cellActivation(text)));
  const [scalar, output] = [Boolean(form.scalar), spec.proj_size || spec.units];
  const numbers = numbersOf({ ...spec, scalar, input: spec.input_size - (scalar ? 1 : 0), output }, activations);
  const arrays = ARRAYS.map((name) => tensors[name]?.data ?? null);
  return kernel.weights(spec.kind, numbers, ELEMENTS.indexOf(element), arrays);
}

// The same of a dense layer, with its activation if the kernel has it.
export function denseWeights(kernel, node, tensors, format) {
  const { input_size: input, units, use_bias } = node.settings;
  const activation = onKernel(node) ? node.settings.activation : "linear";
  const element = format ?? (tensors.kernel.dtype === "BF16" ? "bfloat16" : "float32");
  const numbers = numbersOf({ input, units, output: units, use_bias }, [codeOf(cellActivation(activation))]);
  const arrays = ARRAYS.map((name) => tensors[name]?.data ?? null);
  return kernel.weights("dense", numbers, ELEMENTS.indexOf(element), arrays);
}

// Whether the kernel has a dense layer's activation; the engine has further ones, such as softmax.
export const onKernel = ({ settings: { activation } }) => knowsNodeActivation(activation) && cellActivation(activation) !== null;

// A pass over sequences by the kernel, in place of the engine's CellPass. With `pre`, which is false where nobody reads
// the gates, `fields` are all gates and states of every step; else only h.
export class KernelPass {
  constructor(cell, x, B, T, { state, mask, reset, reverse, pre }) {
    const { kernel, weights, sizes, spec } = cell;
    const { gates } = KINDS[spec.kind];
    const H = spec.units;
    Object.assign(this, { cell, B, sizes });
    const planes = pre ? kernel.exports.planes(weights) : 0;
    const found = kernel.forward(weights, sizes, x, B, T, { before: state, mask, reset, reverse, gates: { planes, units: H } });
    this.after = found.after;
    this.fields = {};
    for (const name of pre ? cell.form.trace : ["h"]) {
      const place = gates.indexOf(name);
      const data = place < 0 ? (name === "h" ? found.y : found.states[name]) : new Float32Array(B * T * H);
      for (let at = 0; place >= 0 && at < B * T; at += 1) {
        const from = (at * planes + place) * H;
        data.set(found.gates.subarray(from, from + H), at * H);
      }
      this.fields[name] = { data, shape: [B, T, sizes[name] ?? H] };
    }
  }
}

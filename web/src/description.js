// Checks the description of a network in a file, see docs/format.md: what reads it afterwards relies on its types.

import { FORMAT_VERSION } from "./engine/engine.js";
import { KINDS } from "./kinds.js";
import { memoryForm } from "./memories.js";

// A file that isn't a network, or a network that the package doesn't support.
export class FormatError extends Error {
  constructor(message) {
    super(message);
    this.name = "FormatError";
  }
}

const isTable = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isCount = (value) => Number.isSafeInteger(value) && value > 0;
const text = [(value) => typeof value === "string", "a text"];
const flag = [(value) => typeof value === "boolean", "true or false"];
const number = [Number.isFinite, "a number"];
const count = [isCount, "a positive integer"];
const table = [isTable, "an object"];
const list = [Array.isArray, "a list"];

// The settings of nodes that have the same type wherever they occur.
const SETTINGS = {
  ...Object.fromEntries(["type", "activation", "mode", "merge_mode"].map((name) => [name, text])),
  ...Object.fromEntries(
    ["use_bias", "use_gain", "over_time", "return_sequences", "go_backwards", "zero_output_for_mask", "residual", "mask_zero", "keepdims", "output_gate"].map(
      (name) => [name, flag],
    ),
  ),
  ...Object.fromEntries(
    ["units", "ids", "times", "heads", "key_size", "value_size", "groups", "group_input_size", "group_units"].map((name) => [name, count]),
  ),
  input_size: [(value) => value === null || isCount(value), "a positive integer or null"],
  ...Object.fromEntries(["epsilon", "value"].map((name) => [name, number])),
};
const CHOICES = { pool: ["mode", ["mean", "max", "last", "final"]], bidirectional: ["merge_mode", ["concat", "sum", "mul", "ave"]] };
// Settings that nodes of a type must have.
const REQUIRED = {
  recurrent: ["return_sequences", "go_backwards", "zero_output_for_mask", "residual"],
  bidirectional: ["merge_mode"],
  dense: ["input_size", "units", "use_bias", "activation"],
  conv1d: ["input_size", "units", "use_bias", "activation"],
  embedding: ["ids", "units", "mask_zero"],
  layer_norm: ["use_gain", "use_bias", "epsilon"],
  rms_norm: ["use_gain", "use_bias", "epsilon"],
  group_norm: ["groups", "use_gain", "use_bias", "epsilon", "over_time"],
  grouped_dense: ["groups", "group_input_size", "group_units", "use_bias"],
  mlstm: ["heads", "key_size", "value_size", "epsilon", "output_gate"],
  pool: ["mode"],
  activation: ["activation"],
};
const SAME_WIDTH = ["standardise", "scale", "layer_norm", "rms_norm", "group_norm", "activation", "clip", "pool", "masking"];
const SEQUENCES = ["recurrent", "bidirectional", "mlstm", "conv1d", "pool", "masking"]; // they need a time axis

function check(where, value, [is, expected]) {
  if (!is(value)) throw new FormatError(`${where}: expected ${expected}, got ${JSON.stringify(value)?.slice(0, 80)}`);
}

// Check the settings of a cell by the types of their defaults.
function checkCell(where, cell) {
  check(where, cell, table);
  const settings = KINDS[Object.hasOwn(KINDS, cell.kind ?? "lstm") ? (cell.kind ?? "lstm") : "lstm"].settings;
  for (const [name, value] of Object.entries(cell)) {
    const usual = settings[name];
    const at = `${where}: ${name}`;
    if (name === "input_size" || name === "units") check(at, value, count);
    else if (name === "layer_norm") check(at, value, [(one) => typeof one === "boolean" || one === "joint", 'true, false or "joint"']);
    else if (name === "gate_activations") check(at, value, [(one) => isTable(one) && Object.values(one).every(text[0]), "activations by gate"]);
    else if (usual === null) check(at, value, [(one) => one === null || Number.isFinite(one), "a number or null"]);
    else if (typeof usual === "boolean") check(at, value, flag);
    else if (typeof usual === "number") check(at, value, number);
    else if (typeof usual === "string") check(at, value, text);
  }
  for (const name of ["input_size", "units"]) check(`${where}: ${name}`, cell[name], count);
}

// Check a stack of cells; return the widths that it takes and returns.
function checkStack(where, stack) {
  check(where, stack, table);
  for (const name of REQUIRED.recurrent) check(`${where}: ${name}`, stack[name], flag);
  checkSettings(where, stack);
  check(`${where}: cells`, stack.cells, [(value) => Array.isArray(value) && value.length > 0, "a list of cells"]);
  let width = null;
  stack.cells.forEach((cell, n) => {
    checkCell(`${where}, cell ${n}`, cell);
    if (width !== null && cell.input_size !== width) {
      throw new FormatError(`${where}, cell ${n}: expected input_size to be ${width}, the width of the cell before, got ${cell.input_size}`);
    }
    width = cell.proj_size || cell.units;
  });
  return { taken: stack.cells[0].input_size, width };
}

function checkSettings(where, settings) {
  for (const [name, value] of Object.entries(settings)) {
    if (Object.hasOwn(SETTINGS, name)) check(`${where}: ${name}`, value, SETTINGS[name]);
  }
}

// The number of axes without the batch and the width of a node's output, null where unknown, after checking the node.
function shapeAfter(node, given) {
  const { name, type } = node;
  // Without a bias, a grouped_dense has no units.
  checkSettings(name, type === "grouped_dense" && node.units === null ? { ...node, units: 1 } : node);
  for (const setting of Object.hasOwn(REQUIRED, type) ? REQUIRED[type] : []) check(`${name}: ${setting}`, node[setting], SETTINGS[setting]);
  if (Object.hasOwn(CHOICES, type)) {
    const [setting, choices] = CHOICES[type];
    check(`${name}: ${setting}`, node[setting], [(value) => choices.includes(value), `one of ${choices.join(", ")}`]);
  }
  let [taken, width, axes] = [node.input_size ?? null, null, given.axes];
  if (type === "recurrent") {
    ({ taken, width } = checkStack(name, node));
    axes = node.return_sequences ? 2 : 1;
  } else if (type === "bidirectional") {
    const ways = ["forward", "backward"].map((way) => checkStack(`${name}, ${way}`, node[way]));
    if (ways[0].taken !== ways[1].taken) throw new FormatError(`${name}: expected the same input_size forward and backward`);
    taken = ways[0].taken;
    width = node.merge_mode === "concat" ? ways[0].width + ways[1].width : ways[0].width;
    axes = node.forward.return_sequences ? 2 : 1;
  } else if (type === "embedding") [width, axes] = [node.units, 2];
  else if (type === "dense") width = node.units;
  else if (type === "grouped_dense") [taken, width] = [node.groups * node.group_input_size, node.units ?? node.groups * node.group_units];
  else if (type === "mlstm") {
    check(`${name}: epsilon`, node.epsilon, [(value) => value >= 0, "a number of 0 or more"]);
    const { settings } = memoryForm(node);
    [taken, width, axes] = [settings.input_size, settings.units, 2];
  }
  else if (type === "conv1d") {
    width = node.units;
    for (const setting of ["taps", "strides", "dilation", "groups"]) check(`${name}: ${setting}`, node[setting], count);
  }
  else if (type === "pool") [width, axes] = [given.width, 1];
  else if (SAME_WIDTH.includes(type)) width = given.width ?? taken;
  else axes = null;
  if (SEQUENCES.includes(type) && given.axes !== null && given.axes !== 2) {
    throw new FormatError(`${name}: expected a sequence [B, T, W] from ${node.wires[0]}`);
  }
  if (taken !== null && given.width !== null && taken !== given.width) {
    throw new FormatError(`${name}: expected an input of ${taken} features, got ${given.width} from ${node.wires[0]}`);
  }
  return { width: width ?? null, axes };
}

// Raise a `FormatError` where a description isn't one of a network; other parts of the package may not support it.
export function checkDescription(description) {
  const where = "description";
  check(where, description, table);
  for (const part of ["inputs", "nodes", "outputs"]) {
    if (!Array.isArray(description[part])) throw new FormatError(`expected a description of a network, which has a list of ${part}`);
  }
  if (description.version !== FORMAT_VERSION) {
    throw new FormatError(`expected a description of version ${FORMAT_VERSION}, got ${description.version}`);
  }
  check(`${where}: metadata`, description.metadata, table);
  check(`${where}: patches`, description.patches ?? [], list);
  const shapes = new Map();
  const named = (name, at) => {
    check(at, name, [(value) => typeof value === "string" && value !== "", "a name"]);
    if (shapes.has(name)) throw new FormatError(`${at}: ${JSON.stringify(name)} occurs twice`);
  };
  description.inputs.forEach((input, n) => {
    const at = `${where}: input ${n}`;
    check(at, input, table);
    named(input.name, `${at}: name`);
    const sizes = (value) => Array.isArray(value) && value.length > 0 && value.every((one) => one === null || isCount(one));
    check(`${at}: shape`, input.shape, [sizes, "a list of sizes, null where any is possible"]);
    const ids = input.shape.length === 1 && input.shape[0] === null;
    shapes.set(input.name, { width: ids ? null : input.shape.at(-1), axes: ids ? null : input.shape.length });
  });
  description.nodes.forEach((node, n) => {
    const at = `${where}: node ${n}`;
    check(at, node, table);
    named(node.name, `${at}: name`);
    check(`${at}: type`, node.type, text);
    check(`${at}: wires`, node.wires, [(value) => Array.isArray(value) && value.length > 0 && value.every(text[0]), "a list of names"]);
    for (const source of node.wires) {
      if (!shapes.has(source.split("/")[0])) throw new FormatError(`${node.name}: expected an input or an earlier node, got ${source}`);
    }
    shapes.set(node.name, shapeAfter(node, shapes.get(node.wires[0]) ?? { width: null, axes: null }));
  });
  check(`${where}: outputs`, description.outputs, [(value) => value.length > 0 && value.every(text[0]), "a list of names"]);
  for (const output of description.outputs) {
    if (!shapes.has(output.split("/")[0])) throw new FormatError(`expected outputs to be values of the network, got ${output}`);
  }
}

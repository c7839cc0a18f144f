// The engine: a network run in the browser, forward and backward, in float64 and plain typed arrays.
//
// The equations are those of src/cellstack/reference, and tests compare every result with it. The engine makes no
// requests, reads no document and keeps nothing between calls, so the same text runs in a page and in a worker.
//
// INPUTS
//
//   payload   the result of `cellstack.inspect.payload.payload_of(network)`: { description, arrays, cells }, the
//             description in docs/format.md; its arrays by name, { dtype, shape, data }, where data is base64 or a typed
//             array; and the forms of its cells, whose recorded step is run.
//   network   readNetwork(payload):
//             { inputs: [{ name, shape }], outputs: [name], nodes: [{ name, type, sources: [name], settings: {…},
//               arrays: { name: { data, shape } },
//               cells: [{ spec: {…every field of CellSpec…}, form: {…}, arrays: { kernel: { data, shape }, … } }] }],
//               patches: as in the options }
//             A bidirectional node's cells are the forward cells, then the backward cells. The memory of an mLSTM is a
//             cell without arrays. Optional, for other
//             implementations: a cell's `pass`, a class that runs it instead of CellPass, and a node's `run`; `narrow`,
//             true if they take inputs as they are passed, without converting them to float64.
//   a value   { data: Float64Array (or any array of numbers), shape: [B, …] }; the last axis runs fastest.
//   inputs    { name: value }, one for each of network.inputs; ids of an embedding are also numbers, [B, T].
//   options   all are optional:
//     state     one entry for each cell, in the order of the nodes and of their cells: { h: value [B, P], … }, its
//               states by name, or null for the cell's own initial state.
//     mask      [B, T] of 0 and 1 (an array of B·T numbers, or a value), 1 where a step is used; for every input that
//               has a time axis, or { name: mask } for separate masks.
//     reset     [B, T] likewise, 1 where a new sequence begins.
//     patches   [{ node, cell, gate, units, rows, steps, how, value }], applied after the network's own patches:
//               gate the name of a gate or state, one of the cell's form.trace; units and
//               rows lists of numbers or { start, stop, step }, steps [start, stop, step] or { start, stop, step } as
//               Python slices, or { numbers: [number] }, counted in the order of time; null or absent means all; how
//               "set", "add", "scale" or "freeze"; value a number, or a value that broadcasts to the named rows,
//               steps and units. A gate is changed right after its activation, c after the cell clip and zoneout,
//               before o and h use it, h last. "freeze": its value after the previous step; at a row's first step,
//               the initial state, and for a gate its own value. Masked steps don't change.
//     pre       false: omit the pre-activations, which saves memory.
//
// OUTPUTS
//
//   unsupported(network)             [sentence, …]: unsupported parts, by name. Empty: everything is supported.
//   multiplications(network, steps)  the number for one row over `steps` steps; about 10^9 per second.
//   run(network, inputs, options)
//     { values: { name: value },     of every input, in the caller's memory, and of every node
//       cells: { node: [{ i, f, g, o, c, h, pre: { i, f, g, o } }] },
//                                    of each node with cells, the gates and states of its cells; values [B, T, H] in
//                                    the order of time, regardless of the cell's direction. `pre`: the pre-activations,
//                                    before a clip; a coupled f has none. At masked steps, gates and pre are 0, and
//                                    states are carried over. Of an mLSTM: q, k, v, i, f, m, n, o and h, without pre.
//       state: [{ h, c }] }          after the last step, as options.state
//   gradient(network, inputs, options, of)
//     of    { value: name, row, step, unit } one number of an input's or a node's value; no step for [B, W];
//           { node, cell, gate, row, step, unit } one number of a gate or state ("c", "h") of a cell;
//           { seeds: { name: array or value } } the gradient of a loss with respect to node outputs.
//     { inputs: { name: value },     null for ids
//       values: { name: value },     of every node's output; null where the number doesn't depend on it
//       cells: { node: [{ i, f, g, o, c, h }] },  of each gate after its activation and each state, at every step
//       state: [{ h, c }],           of the initial state
//       arrays: { node: [{ kernel, … }] } }       one entry per cell; for a node without cells, one entry or none
//   createTrainer(options)           the playground: see there
//   cellActivation(text)             the activation that a string such as "hard_sigmoid(0.2, 0.5)" names: { name, f, slope,
//                                    alpha, beta }, y = f(z, alpha, beta) and dy/dz = slope(z, y, alpha, beta); or null
//
// All functions throw an Error with a readable message for invalid inputs.

import { floats, lastAxis, numbersIn, shapeText } from "./shapes.js";
import { cellActivation, knowsNodeActivation } from "./activations.js";
import { addNumbers } from "./products.js";
import { byName, cellShapes, stateSizes } from "./cells.js";
import { OPERATIONS } from "./operations.js";
import { NODE_KINDS, STACK_SETTINGS } from "./nodes.js";

export const FORMAT_VERSION = 1;
const GIVEN = ["x", "state", "weight", "split", "features", "part", "record"]; // values of a step without an operation of their own

function readArray({ dtype, shape, data }) {
  if (typeof data !== "string") return { data: new Float64Array(data), shape };
  if (!["float32", "float64"].includes(dtype)) throw new Error(`expected arrays of float32 or float64, got ${dtype}`);
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n += 1) bytes[n] = text.charCodeAt(n);
  const numbers = dtype === "float32" ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
  return { data: new Float64Array(numbers), shape };
}

// A network from a payload: see the top of this file. `unsupported` reports parts that it doesn't support.
export function readNetwork({ description, arrays, cells: { forms, numbers } }) {
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
    const found = stacks.flatMap(([prefix, stack]) => stack.cells.map((spec, n) => [spec, groups[`${name}/${prefix}${n}`] ?? {}]));
    if (!stacks.length && Object.hasOwn(numbers, name)) found.push([{}, {}]); // the form has the settings, as of an mLSTM
    const cells = found.map(([spec, own], n) => {
      const form = forms[numbers[name][n]];
      return { spec: { ...form.settings, ...spec }, form, arrays: own };
    });
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

// Sentences about the unsupported parts of a network; none if everything is supported.
export function unsupported(network) {
  const found = (network.others ?? []).map((key) => `The network's ${key} aren't supported.`);
  for (const name of (network.outputs ?? []).filter((output) => output.includes("/"))) {
    found.push(`The output ${name}, which is a state, isn't supported: run the network in Python.`);
  }
  for (const { name, type, sources, settings, arrays, cells } of network.nodes) {
    const states = sources.filter((source, n) => source.includes("/") || (cells.length && n));
    if (states.length) {
      found.push(`${name}: reading the states ${states.join(", ")} isn't supported: run the network in Python.`);
    }
    if (!Object.hasOwn(NODE_KINDS, type) || ("passes" in NODE_KINDS[type] && !cells.length)) {
      found.push(`${name}: a node of the type ${type} isn't supported.`);
      continue;
    }
    const kind = NODE_KINDS[type];
    const why = kind.refuses?.(settings) ?? null;
    if (why !== null) found.push(`${name}: ${why}`);
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

function unsupportedCell(where, cell) {
  const { spec, form, arrays } = cell;
  const operations = form.values.map(({ operation }) => operation).filter((one) => !GIVEN.includes(one));
  const known = spec.kind === form.settings.kind && operations.every((one) => Object.hasOwn(OPERATIONS, one));
  if (!known) return [`${where}: a cell of the kind ${spec.kind} isn't supported.`];
  const found = [];
  for (const key of Object.keys(spec)) {
    if (!["input_size", "units", ...Object.keys(form.settings)].includes(key)) {
      found.push(`${where}: the setting ${key} isn't supported.`);
    }
  }
  for (const [slot, text] of Object.entries(form.activations)) {
    if (cellActivation(text) === null) found.push(`${where}: the activation ${text} of ${slot} isn't supported.`);
  }
  const shapes = cellShapes(cell);
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

const OF_MATRIX = 8; // times that a step reads or writes each number of a memory's matrices, about

// The number of multiplications by weights for one row over `steps` steps, each node counted at every step: a good
// measure of the time, about 10^9 per second.
export function multiplications(network, steps) {
  const added = /^(bias|cell_bias|initial_.*|table|mean|shift)$/;
  let sum = 0;
  for (const node of network.nodes) {
    for (const arrays of [node.arrays, ...node.cells.map((cell) => cell.arrays)]) {
      for (const [name, { data }] of Object.entries(arrays)) if (!added.test(name)) sum += data.length;
    }
    for (const cell of node.cells) if (cell.form.heads) sum += OF_MATRIX * stateSizes(cell).C;
  }
  return sum * steps;
}

// Inputs that are looked up in a table, also through nodes that only move numbers: they may have a mask, too.
function takesIds(network, name) {
  const takers = network.nodes.filter((node) => node.sources.includes(name));
  const past = (node) =>
    node.type === "embedding" || (NODE_KINDS[node.type].shapesOnly === true && takesIds(network, node.name));
  return takers.length > 0 && !network.outputs.includes(name) && takers.every(past);
}

// Flags [B, T] of one input: an array or a value for all inputs, or one by name.
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
    if (value === undefined) throw new Error(`the input ${name} is missing`);
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
    const x = { data: network.narrow ? value.data : floats(value.data), shape: value.shape };
    flows[name] = { x, mask: flags("mask", mask), reset: flags("reset", reset) };
  }
  const rows = new Set(Object.values(flows).map((flow) => flow.x.shape[0]));
  if (rows.size > 1) throw new Error(`expected inputs with the same number of rows, got ${[...rows].join(" and ")}`);
  return flows;
}

// One state per cell, as Float64Arrays, or null.
function givenStates(network, state, B) {
  const cells = network.nodes.flatMap((node) => node.cells);
  if (state === null || state === undefined) return cells.map(() => null);
  if (state.length !== cells.length) throw new Error(`expected ${cells.length} states, got ${state.length}`);
  return state.map((one, n) => one && byName(stateSizes(cells[n]), (size, name) => {
    const data = one[name] && floats(one[name].data ?? one[name]);
    if (!data || data.length !== B * size) {
      throw new Error(`expected ${name} of state ${n} [B=${B}, ${size}], got another shape`);
    }
    return data;
  }));
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

// Run all nodes in order; `keep`: store what the backward pass needs.
export function runNodes(network, inputs, options, keep) {
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
    flows[node.name] = (node.run ?? kind.run)(node, taken, {
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
  const ranks = { recurrent: 3, bidirectional: 3, mlstm: 3, conv1d: 3, pool1d: 3, pool: 3, masking: 3, repeat: 2, embedding: 2 };
  const rank = ranks[node.type] ?? null;
  for (const { x, reset } of taken) {
    if ((width !== null && lastAxis(x.shape) !== width) || (rank !== null && x.shape.length !== rank)) {
      const expected = rank === 3 ? ["B", "T"] : rank === 2 ? ["B"] : ["…"];
      throw new Error(`${node.name}: expected ${shapeText([...expected, width])}, got ${shapeText(x.shape)}`);
    }
    if (reset !== null && kind.mixesSteps?.(node.settings)) {
      throw new Error(`${node.name}: reset isn't supported, as it combines steps across sequences`);
    }
  }
}

const passesOf = (node, flow) => (node.cells.length ? NODE_KINDS[node.type].passes(flow) : []);
const statesOf = (arrays, { B, sizes }) => byName(arrays, (data, name) => ({ data, shape: [B, sizes[name]] }));

// Run the network: see the top of this file.
export function run(network, inputs, options) {
  return answersOf(network, runNodes(network, inputs, options ?? {}, false));
}

export function answersOf(network, flows) {
  const cells = {};
  const state = [];
  for (const node of network.nodes) {
    const passes = passesOf(node, flows[node.name]);
    if (passes.length) cells[node.name] = passes.map((pass) => pass.fields);
    state.push(...passes.map((pass) => statesOf(pass.after, pass)));
  }
  return { values: Object.fromEntries(Object.entries(flows).map(([name, { x }]) => [name, x])), cells, state };
}

// The index of one number in an array of this shape; `of` has its row, step and unit.
function placeOf(what, shape, { row, step, unit }) {
  const at = shape.length === 3 ? [row, step, unit] : shape.length === 2 ? [row, unit] : [];
  if (!at.length || at.some((entry, axis) => !Number.isInteger(entry) || entry < 0 || entry >= shape[axis])) {
    throw new Error(`gradient: expected row, step and unit within ${what} ${shapeText(shape)}, got ${at.join(", ")}`);
  }
  return at.reduce((place, entry, axis) => place * shape[axis] + entry, 0);
}

// The seeds of a call of `gradient`: gradients of node outputs, and of fields of cells.
export function seedsOf(network, flows, of) {
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

// The gradient of one number, or of a loss: see the top of this file.
export function gradient(network, inputs, options, of) {
  const flows = runNodes(network, inputs, options ?? {}, true);
  return backNodes(network, flows, seedsOf(network, flows, of));
}

function zerosLike(arrays) {
  return Object.fromEntries(Object.entries(arrays).map(([name, { data }]) => [name, new Float64Array(data.length)]));
}

export function backNodes(network, flows, { dvalues, dfields }) {
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
    let ends = passes.map((pass) => statesOf(byName(pass.after, ({ length }) => new Float64Array(length)), pass));
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

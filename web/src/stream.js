// A network step by step, with its own state: cells and dense layers run in the kernel's memory, other nodes by the
// engine.

import { NODE_KINDS } from "./engine/nodes.js";
import { lastAxis, numbersIn, shapeText } from "./engine/shapes.js";
import { memoryNumbers } from "./memories.js";

// Nodes that give the same result step by step as over a whole sequence.
const STEPWISE = ["dense", "activation", "clip", "standardise", "scale", "layer_norm", "rms_norm", "group_norm", "grouped_dense", "mlstm", "embedding", "masking"];
const masks = ({ type, settings }) => type === "masking" || (type === "embedding" && settings.mask_zero);

// Why a node can't run step by step; null if it can.
function whyNot({ type, settings }) {
  if (type === "recurrent") return settings.go_backwards ? "it starts at the end of the sequence" : null;
  if (type === "bidirectional") return "its backward direction starts at the end of the sequence";
  if (type === "pool") return settings.mode === "last" ? null : `the ${settings.mode} over time needs the whole sequence`;
  if (type === "merge") return settings.axis === 1 ? "it joins the steps of sequences" : null;
  return STEPWISE.includes(type) ? null : `a node of the type ${type} isn't supported in a stream`;
}

function check(network) {
  let moved = null; // the first node with a state
  for (const { name, shape } of network.inputs) {
    const ids = shape.length === 1 && network.nodes.some(({ type, sources }) => type === "embedding" && sources.includes(name));
    if (shape.length !== 2 && !ids) {
      throw new Error(`stream: expected inputs with a time axis, got ${name} ${shapeText(["B", ...shape])}`);
    }
  }
  for (const node of network.nodes) {
    const why = whyNot(node) ?? (moved && masks(node) ? `it may mask a step after the state of ${moved} has changed` : null);
    if (why !== null) throw new Error(`stream: ${node.name} can't run step by step: ${why}; use run()`);
    if (node.cells.length) moved ??= node.name;
  }
}

function checkWidth({ name }, { shape }, width) {
  if (lastAxis(shape) !== width) throw new Error(`${name}: expected [B, T, ${width}], got ${shapeText(shape)}`);
}

// A value of the network in the kernel's memory, [B, T, width].
class Value {
  #kernel;
  #view = new Float32Array(0); // of the memory, which is replaced when it grows
  at = 0;
  room = 0;
  count = 0;
  shape = [];

  constructor(kernel) {
    this.#kernel = kernel;
  }
  // Make room for a value of this shape; an earlier one is lost.
  fit(shape) {
    this.shape = shape;
    this.count = numbersIn(shape);
    if (this.count <= this.room) return;
    this.free();
    this.at = this.#kernel.allocate(Float32Array.BYTES_PER_ELEMENT * this.count);
    this.room = this.count;
  }
  get numbers() {
    const { buffer } = this.#kernel.exports.memory;
    if (this.#view.buffer !== buffer || this.#view.byteOffset !== this.at || this.#view.length !== this.count) {
      this.#view = new Float32Array(buffer, this.at, this.count);
    }
    return this.#view;
  }
  free() {
    this.#kernel.release(this.at);
    this.at = 0;
    this.room = 0;
  }
}

// What a stream has in the kernel's memory, apart from the stream, so that it can be freed after it.
class Memory {
  // In the order of the network's states: { cell, stream }, the kernel's stream of a cell, or { cell, places }, where the
  // states of an mLSTM are.
  cells = [];
  dense = []; // the same of dense layers
  values = [];
  constructor(kernel) {
    this.kernel = kernel;
  }
  value() {
    this.values.push(new Value(this.kernel));
    return this.values.at(-1);
  }
  free() {
    for (const value of this.values) value.free();
    for (const { stream, places } of [...this.cells, ...this.dense.map((stream) => ({ stream }))]) {
      if (places) for (const at of places) this.kernel.release(at);
      else this.kernel.exports.delete_stream(stream);
    }
  }
}
const unused = new FinalizationRegistry((memory) => memory.free());

export class Stream {
  #network;
  #memory;
  #batch;
  #inputs; // { name, value, given }
  #parts; // one function for each node, in order: (T) => nothing
  #outputs; // { name, value }

  // See Network.stream.
  constructor({ kernel, network }, { batch = 1 } = {}) {
    if (!Number.isInteger(batch) || batch < 1) throw new Error(`stream: expected batch to be a positive integer, got ${batch}`);
    check(network);
    const memory = new Memory(kernel);
    this.#network = network;
    this.#memory = memory;
    this.#batch = batch;
    const found = {};
    this.#inputs = network.inputs.map(({ name, shape }) => {
      found[name] = { value: memory.value(), given: null, ids: shape.length === 1 };
      return Object.assign(found[name], { name, width: shape.length === 1 ? 1 : lastAxis(shape) });
    });
    this.#parts = network.nodes.map((node) => {
      const sources = node.sources.map((name) => found[name]);
      const of = node.type === "mlstm" ? this.#remembering : node.cells.length ? this.#stack : this.#single;
      const own = of.call(this, node, sources);
      found[node.name] = { value: own.value, given: null };
      return own.run;
    });
    this.#outputs = network.outputs.map((name) => ({ name, value: found[name].value }));
    unused.register(this, memory, this);
  }

  // The cells of a node, each a stream of the kernel.
  #stack(node, [{ value: source }]) {
    const { cells, settings } = node;
    const { exports } = this.#memory.kernel;
    let value = source;
    const steps = cells.map((cell, n) => {
      const [x, y] = [value, this.#memory.value()];
      const stream = exports.stream(cell.weights, this.#batch);
      this.#memory.cells.push({ stream, cell });
      const P = cell.sizes.h;
      const added = settings.residual && n > 0 && cell.spec.input_size === P;
      value = y;
      return (T) => {
        checkWidth(node, x, cell.spec.input_size);
        y.fit([this.#batch, T, P]);
        exports.stream_run(stream, x.at, y.at, T);
        if (!added) return;
        const [to, from] = [y.numbers, x.numbers];
        for (let k = 0; k < to.length; k += 1) to[k] += from[k];
      };
    });
    return { value, run: (T) => steps.forEach((step) => step(T)) };
  }

  // The memory of an mLSTM.
  #remembering(node, [{ value: x }]) {
    const { kernel } = this.#memory;
    const [cell] = node.cells;
    const value = this.#memory.value();
    const places = Object.values(cell.sizes).map((size) => kernel.allocate(Float32Array.BYTES_PER_ELEMENT * this.#batch * size));
    this.#memory.cells.push({ cell, places });
    this.#clear(places, cell.sizes);
    const numbers = memoryNumbers(cell.spec);
    const run = (T) => {
      checkWidth(node, x, cell.spec.input_size);
      value.fit([this.#batch, T, cell.spec.units]);
      kernel.memory(numbers, this.#batch, T, { x: x.at, y: value.at, states: places, stepwise: true });
    };
    return { value, run };
  }

  #clear(places, sizes) {
    Object.values(sizes).forEach((size, n) => this.#memory.kernel.floats(places[n], this.#batch * size).fill(0));
  }

  // A node without cells: a dense layer on the kernel, or any node by the engine.
  #single(node, sources) {
    const { kernel } = this.#memory;
    const value = this.#memory.value();
    const [{ value: x }] = sources;
    if (node.type === "pool") return { value: x, run: () => {} }; // the last step is the present one
    if (node.weights) {
      const stream = kernel.exports.stream(node.weights, this.#batch);
      this.#memory.dense.push(stream);
      const run = (T) => {
        checkWidth(node, x, node.settings.input_size);
        value.fit([this.#batch, T, node.settings.units]);
        kernel.exports.stream_run(stream, x.at, value.at, T);
        if (node.activate) value.numbers.set(node.activate(value.numbers));
      };
      return { value, run };
    }
    const options = { states: [], patches: [], dtype: this.#network.dtype, pre: false, keep: false };
    const run = () => {
      const flows = sources.map(({ value: own, given, ids }) => ({
        x: { data: given ?? own.numbers, shape: ids ? own.shape.slice(0, 2) : own.shape },
        mask: null,
        reset: null,
      }));
      const { x: found, mask } = NODE_KINDS[node.type].run(node, flows, options);
      if (mask?.includes(0)) throw new Error(`stream: ${node.name} masks a step: leave padding out of the stream`);
      value.fit(found.shape);
      value.numbers.set(found.data);
    };
    return { value, run };
  }

  #advance(given, T) {
    if (this.#memory === null) throw new Error("stream: it is closed");
    for (const input of this.#inputs) {
      const data = given[input.name];
      const width = input.width ?? data?.length / (this.#batch * T);
      if (data?.length !== this.#batch * T * width || !Number.isInteger(width)) {
        const expected = shapeText([`B=${this.#batch}`, `T=${T}`, input.width]);
        throw new Error(`stream: expected ${input.name} ${expected}, got ${data?.length ?? "no"} numbers`);
      }
      input.value.fit([this.#batch, T, width]);
      input.value.numbers.set(data);
      if (input.ids) input.given = data; // a float32 can't hold ids above 2^24
    }
    for (const part of this.#parts) part(T);
  }

  // Values by the names of the inputs, from one value or by name.
  #named(x, isValue) {
    if (!isValue(x)) return x ?? {};
    if (this.#inputs.length > 1) {
      throw new Error(`stream: expected the inputs ${this.#inputs.map(({ name }) => name).join(", ")} by name, got one value`);
    }
    return { [this.#inputs[0].name]: x };
  }
  #answer(of) {
    if (this.#outputs.length === 1) return of(this.#outputs[0].value);
    return Object.fromEntries(this.#outputs.map(({ name, value }) => [name, of(value)]));
  }

  step(x) {
    this.#advance(this.#named(x, (one) => ArrayBuffer.isView(one) || Array.isArray(one)), 1);
    return this.#answer((value) => value.numbers.slice());
  }

  run(x) {
    const named = this.#named(x, (one) => one?.data !== undefined && Array.isArray(one?.shape));
    const T = Object.values(named)[0]?.shape?.[1];
    for (const [name, { data, shape }] of Object.entries(named)) {
      if (shape[0] !== this.#batch || shape[1] !== T || data.length !== numbersIn(shape)) {
        throw new Error(`stream: expected ${name} ${shapeText([`B=${this.#batch}`, `T=${T}`, "…"])}, got ${shapeText(shape)}`);
      }
    }
    this.#advance(Object.fromEntries(Object.entries(named).map(([name, { data }]) => [name, data])), T);
    return this.#answer((value) => ({ data: value.numbers.slice(), shape: value.shape }));
  }

  // Call body(addresses, sizes) for the states of each cell, with memory for them.
  #eachState(body) {
    if (this.#memory === null) throw new Error("stream: it is closed");
    const { kernel, cells } = this.#memory;
    return cells.map(({ stream, places: own, cell: { sizes } }, n) =>
      kernel.within((take) => {
        const names = Object.keys(sizes);
        const places = own ?? names.map((name) => take(Float32Array.BYTES_PER_ELEMENT * this.#batch * sizes[name]));
        const list = kernel.put(take, places, Uint32Array);
        const views = names.map((name, k) => [name, kernel.floats(places[k], this.#batch * sizes[name])]);
        return body({ n, stream, list, views, sizes });
      }),
    );
  }

  get state() {
    return this.#eachState(({ stream, list, views, sizes }) => {
      if (stream) this.#memory.kernel.exports.stream_get_state(stream, list);
      return Object.fromEntries(views.map(([name, view]) => [name, { data: view.slice(), shape: [this.#batch, sizes[name]] }]));
    });
  }

  set state(given) {
    const count = this.#memory?.cells.length;
    if (!Array.isArray(given) || given.length !== count) {
      throw new Error(`stream: expected state to be a list of ${count} states, one for each cell`);
    }
    this.#memory.cells.forEach(({ cell: { sizes } }, n) => {
      for (const [name, size] of Object.entries(sizes)) {
        if (given[n]?.[name]?.data?.length !== this.#batch * size) {
          throw new Error(`stream: expected ${name} of state ${n} [B=${this.#batch}, ${size}], got another shape`);
        }
      }
    });
    this.#eachState(({ n, stream, list, views }) => {
      for (const [name, view] of views) view.set(given[n][name].data);
      if (stream) this.#memory.kernel.exports.stream_set_state(stream, list);
    });
  }

  reset() {
    if (this.#memory === null) throw new Error("stream: it is closed");
    for (const { stream, places, cell } of this.#memory.cells) {
      if (stream) this.#memory.kernel.exports.stream_reset(stream);
      else this.#clear(places, cell.sizes);
    }
  }

  close() {
    unused.unregister(this);
    this.#memory?.free();
    this.#memory = null;
  }
}

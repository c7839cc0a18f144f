// The kernel's WebAssembly module: loading it, its memory, and calls of its C functions (kernel/wasm.cpp).

// A module with one instruction of WebAssembly's SIMD: (func (result v128) (i32x4.splat (i32.const 0))).
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 17, 11,
]);
const NUMBER_BYTES = 4;
const MOST_STATES = 4; // kStates in kernel/kinds.h

// The bytes of a file: a URL; a path, in Node; or bytes.
export async function bytesOf(what, source) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  if (typeof source !== "string" && !(source instanceof URL)) {
    throw new TypeError(`${what}: expected a URL, a path or bytes, got ${source === null ? "null" : typeof source}`);
  }
  if (globalThis.process?.versions?.node && !/^(https?|blob|data):/.test(String(source))) {
    const { readFile } = await import(/* webpackIgnore: true */ "node:fs/promises");
    const file = String(source).startsWith("file:") ? new URL(source) : source;
    return new Uint8Array(await readFile(file));
  }
  const answer = await fetch(source);
  if (!answer.ok) throw new Error(`${what}: expected a file at ${source}, got status ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function compiled(source) {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new Error(
      "cellstack needs WebAssembly with SIMD, which this browser doesn't have: use Chrome 91, Firefox 89, Safari 16.4 or later",
    );
  }
  return WebAssembly.compile(await bytesOf("wasm", source));
}

let usual = null; // the module next to this file, compiled once

// A new instance of the kernel with its own memory, which is freed with it. `source`: where cellstack.wasm is, if not
// next to this file.
export async function loadKernel(source) {
  if (source === undefined) {
    usual ??= compiled(new URL("./cellstack.wasm", import.meta.url)).catch((error) => {
      usual = null; // the next call tries again
      throw error;
    });
  }
  const module = source instanceof WebAssembly.Module ? source : await (source === undefined ? usual : compiled(source));
  const { exports } = await WebAssembly.instantiate(module, { env: { emscripten_notify_memory_growth: () => {} } });
  exports._initialize();
  return new Kernel(exports);
}

// Addresses in the kernel's memory are numbers; 0 is null. A view of the memory is valid until the memory grows, which
// any allocation may cause.
export class Kernel {
  constructor(exports) {
    this.exports = exports;
  }

  allocate(bytes) {
    const at = bytes < 2 ** 31 ? this.exports.allocate(bytes) : 0;
    if (at === 0) throw new RangeError(`out of memory: ${bytes} bytes for an array of the network`);
    return at;
  }
  release(at) {
    if (at !== 0) this.exports.release(at);
  }
  floats(at, count) {
    return new Float32Array(this.exports.memory.buffer, at, count);
  }

  // Run `body(take)`, in which take(bytes) allocates memory that is freed afterwards.
  within(body) {
    const taken = [];
    try {
      return body((bytes) => {
        taken.push(this.allocate(bytes));
        return taken.at(-1);
      });
    } finally {
      for (const at of taken) this.release(at);
    }
  }
  // Memory from `take` with these numbers; 0 for null.
  put(take, numbers, Type = Float32Array) {
    if (numbers === null || numbers === undefined) return 0;
    const at = take(numbers.length * Type.BYTES_PER_ELEMENT);
    new Type(this.exports.memory.buffer, at, numbers.length).set(numbers);
    return at;
  }

  // The weights of a cell. `kind`: its name; `numbers`: its description, in the order of kernel/wasm.cpp; `element`: the
  // format of its matrices, an index in ELEMENTS; `arrays`: in the kernel's order, null where absent.
  weights(kind, numbers, element, arrays) {
    return this.within((take) => {
      const places = arrays.map((array) => this.put(take, array));
      const name = this.put(take, new TextEncoder().encode(`${kind}\0`), Uint8Array);
      const description = this.put(take, numbers, Float64Array);
      return this.exports.weights(name, description, element, this.put(take, places, Uint32Array), places.length);
    });
  }

  // Run the memory of an mLSTM over steps of some rows. `numbers`: its description, in the order of kernel/wasm.cpp; x, y,
  // mask, reset and states: addresses; the states are updated.
  memory(numbers, rows, steps, { x, y, states, mask = 0, reset = 0, stepwise = false }) {
    this.within((take) => {
      const given = [this.put(take, numbers, Float64Array), this.put(take, states, Uint32Array)];
      this.exports.run_memory(rows, steps, x, mask, reset, ...given, y, stepwise ? 1 : 0);
    });
  }

  // Run a cell over x [B, T, I]. `states`: the names and widths of its states, h first; `before`: the states before the
  // first step, by name, or null; mask and reset [B, T] or null. Returns y [B, T, P], `after`, the states after the last
  // step, by name; and with `gates`, a number of planes, the gates [B, T, planes, H] and, by name, the inner states of
  // every step [B, T, H].
  forward(weights, states, x, B, T, { before, mask, reset, reverse, gates = 0 }) {
    const names = Object.keys(states);
    const [output, units] = [states[names[0]] ?? 0, states[names[1]] ?? 0];
    return this.within((take) => {
      const room = (count) => take(count * NUMBER_BYTES);
      const start = names.map((name) => this.put(take, before?.[name]));
      const after = names.map((name) => room(B * states[name]));
      const y = room(B * T * output);
      const every = gates.planes ? names.slice(1).map(() => room(B * T * units)) : [];
      const planes = gates.planes ? room(B * T * gates.planes * gates.units) : 0;
      const padded = (list, count) => [...list, ...new Array(count - list.length).fill(0)];
      const layer = [weights, ...padded(start, MOST_STATES), ...padded(after, MOST_STATES), y, planes];
      const place = this.put(take, [...layer, ...padded(every, MOST_STATES - 1)], Uint32Array);
      const flags = [mask, reset].map((one) => this.put(take, one, Uint8Array));
      this.exports.forward(B, T, this.put(take, x), ...flags, reverse ? 1 : 0, place);
      const read = (at, count) => this.floats(at, count).slice();
      const byName = (list, of) => Object.fromEntries(list.map((name, n) => [name, of(name, n)]));
      return {
        y: read(y, B * T * output),
        after: byName(names, (name, n) => read(after[n], B * states[name])),
        gates: planes ? read(planes, B * T * gates.planes * gates.units) : null,
        states: byName(planes ? names.slice(1) : [], (name, n) => read(every[n], B * T * units)),
      };
    });
  }
}

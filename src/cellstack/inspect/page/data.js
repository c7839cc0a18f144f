// The contents of a page's payload, unpacked at the first access; and planes of numbers, units by steps, that can be
// drawn at any scale.

import { shown } from "./dom.js";

const BYTES = { f2: 2, f4: 4, f8: 8, u1: 1, i1: 1 };
const LEAST_BLOCK = 4; // steps in a block of the lowest level of a pyramid

let float16s = null;

// The values of all 65,536 float16 bit patterns: some browsers have no Float16Array yet.
function halfTable() {
  if (float16s === null) {
    float16s = new Float32Array(65536);
    for (let bits = 0; bits < 65536; bits += 1) {
      const sign = bits & 0x8000 ? -1 : 1;
      const power = (bits >> 10) & 31;
      const rest = bits & 1023;
      if (power === 31) float16s[bits] = rest ? NaN : sign * Infinity;
      else float16s[bits] = sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
    }
  }
  return float16s;
}

function fromBase64(text) {
  if (typeof Uint8Array.fromBase64 === "function") return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let n = 0; n < binary.length; n += 1) bytes[n] = binary.charCodeAt(n);
  return bytes;
}

async function gunzipped(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Numbers from bytes stored plane by plane, grouped by significance.
function numbersOf(bytes, dtype, packed) {
  const size = BYTES[dtype];
  if (size === undefined) throw new Error(`The page contains an array of an unknown type, ${dtype}.`);
  if (size === 1) return dtype === "i1" ? new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length) : bytes;
  const count = bytes.length / size;
  if (dtype === "f2") {
    const table = halfTable();
    const out = new Float32Array(count);
    if (packed) for (let n = 0; n < count; n += 1) out[n] = table[bytes[n] | (bytes[count + n] << 8)];
    else for (let n = 0; n < count; n += 1) out[n] = table[bytes[2 * n] | (bytes[2 * n + 1] << 8)];
    return out;
  }
  let lined = bytes;
  if (packed) {
    lined = new Uint8Array(bytes.length);
    for (let plane = 0; plane < size; plane += 1) {
      const from = plane * count;
      for (let n = 0, to = plane; n < count; n += 1, to += size) lined[to] = bytes[from + n];
    }
  } else if (lined.byteOffset % size) {
    lined = lined.slice();
  }
  return new (dtype === "f4" ? Float32Array : Float64Array)(lined.buffer, lined.byteOffset, count);
}

// Returns a payload's arrays; each is unpacked once.
export class Store {
  constructor(payload) {
    this.description = payload.description;
    this.raw = payload.arrays;
    this.made = new Map();
  }

  // { data, shape } of a reference to an array; null for none.
  get(reference) {
    if (reference === null || reference === undefined) return Promise.resolve(null);
    const number = reference.array;
    if (!this.made.has(number)) this.made.set(number, this.unpacked(number));
    return this.made.get(number);
  }

  async unpacked(number) {
    const entry = this.description.arrays[number];
    let raw = this.raw[number];
    if (typeof raw === "function") raw = raw();
    let bytes;
    if (typeof raw === "string") bytes = fromBase64(raw);
    else if (raw instanceof ArrayBuffer) bytes = new Uint8Array(raw);
    else bytes = new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength);
    if (entry.packed) bytes = await gunzipped(bytes);
    return { data: numbersOf(bytes, entry.dtype, entry.packed), shape: entry.shape };
  }
}

// One row's numbers of a sequence: units by steps, `data[unit * steps + step]`.
export class Plane {
  constructor(data, units, steps) {
    this.data = data;
    this.units = units;
    this.steps = steps;
    this.levels = null;
    this.ends = null;
  }

  at(unit, step) {
    return this.data[unit * this.steps + step];
  }

  // One unit's numbers over the steps.
  line(unit) {
    return this.data.subarray(unit * this.steps, (unit + 1) * this.steps);
  }

  column(step) {
    const out = new Float64Array(this.units);
    for (let unit = 0; unit < this.units; unit += 1) out[unit] = this.data[unit * this.steps + step];
    return out;
  }

  // The smallest and the largest finite number, and whether some numbers aren't finite.
  get range() {
    if (this.ends === null) {
      let low = Infinity;
      let high = -Infinity;
      let broken = false;
      for (const value of this.data) {
        if (value - value !== 0) broken = true;
        else {
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
      this.ends = low > high ? { low: 0, high: 0, broken } : { low, high, broken };
    }
    return this.ends;
  }

  // Minima and maxima over blocks of 4, 8, 16 … steps; a block with a NaN has NaN in both.
  get pyramid() {
    if (this.levels === null) {
      this.levels = [];
      let { data: low, steps: count } = this;
      let high = low;
      let times = LEAST_BLOCK;
      for (let block = LEAST_BLOCK; count > 1 && block < 2 * this.steps; block *= 2) {
        const after = Math.ceil(count / times);
        const lows = new Float32Array(this.units * after);
        const highs = new Float32Array(this.units * after);
        for (let unit = 0; unit < this.units; unit += 1) {
          for (let n = 0; n < after; n += 1) {
            const from = unit * count + n * times;
            const to = unit * count + Math.min(count, (n + 1) * times);
            let least = low[from];
            let most = high[from];
            for (let m = from + 1; m < to; m += 1) {
              const a = low[m];
              const b = high[m];
              if (!(a >= least)) least = least !== least ? least : a;
              if (!(b <= most)) most = most !== most ? most : b;
            }
            lows[unit * after + n] = least;
            highs[unit * after + n] = most;
          }
        }
        this.levels.push({ block, count: after, low: lows, high: highs });
        low = lows;
        high = highs;
        count = after;
        times = 2;
      }
    }
    return this.levels;
  }

  // The level to draw when a pixel covers this many steps; null = the original numbers.
  level(span) {
    if (span < LEAST_BLOCK) return null;
    const levels = this.pyramid;
    let found = null;
    for (const one of levels) if (one.block <= span) found = one;
    return found;
  }

  // The smallest and the largest number of a unit over steps [from, to), for drawing: partly covered blocks count too.
  extremes(unit, from, to, level, out) {
    const low = level === null ? this.data : level.low;
    const high = level === null ? this.data : level.high;
    const block = level === null ? 1 : level.block;
    const count = level === null ? this.steps : level.count;
    const first = Math.max(0, Math.floor(from / block));
    const last = Math.min(count - 1, Math.max(first, Math.ceil(to / block) - 1));
    let least = low[unit * count + first];
    let most = high[unit * count + first];
    for (let n = first + 1; n <= last; n += 1) {
      const a = low[unit * count + n];
      const b = high[unit * count + n];
      if (!(a >= least)) least = least !== least ? least : a;
      if (!(b <= most)) most = most !== most ? most : b;
    }
    out[0] = least;
    out[1] = most;
  }
}

// Planes of one row of an engine result `[B, T, …]`.
export function planeOf(value, row) {
  const [, steps, ...rest] = value.shape;
  const width = rest.reduce((a, b) => a * b, 1);
  const data = new Float64Array(steps * width);
  const from = row * steps * width;
  for (let step = 0; step < steps; step += 1) {
    for (let unit = 0; unit < width; unit += 1) data[unit * steps + step] = value.data[from + step * width + unit];
  }
  return new Plane(data, width, steps);
}

// A text with visible blanks.
export function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

// The labels of the steps.
export class Labels {
  constructor(description) {
    this.all = description.labels;
    this.steps = description.steps;
    this.kind = this.all === null ? null : this.all.kind;
  }

  raw(row, step) {
    if (this.all === null) return null;
    const value = (this.all.nested ? this.all.values[row] : this.all.values)[step];
    return value === undefined ? null : value;
  }

  // Shortened, with visible blanks.
  short(row, step) {
    const value = this.raw(row, step);
    if (value === null) return "";
    if (this.kind === "number") return shown(value, 6);
    if (this.kind === "date") return value;
    return visible(value);
  }

  // "step 12 “e”": the step's number in the run, and its label.
  full(row, step) {
    const number = this.steps[step] ?? step;
    const label = this.short(row, step);
    if (label === "") return `step ${number}`;
    if (this.kind === "text") return `step ${number} “${label}”`;
    return this.kind === "number" ? `step ${number} (label ${label})` : `step ${number} (${label})`;
  }
}

// Memories of mLSTMs on the kernel, in the form that the engine takes: see cells.js.

// The form of the cell of an `mlstm` node, from its settings.
export function memoryForm({ heads, key_size: keys, value_size: values, epsilon, output_gate: gated }) {
  const units = heads * values;
  const sizes = { C: keys * units, n: heads * keys, m: heads };
  return {
    settings: { kind: "mlstm", heads, key_size: keys, value_size: values, epsilon, output_gate: gated, units, input_size: heads * (2 * keys + values + 2 + (gated ? values : 0)) },
    states: Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, { width: [size, ""] }])),
    trace: [..."qkvif", ...(gated ? ["o"] : []), ..."mnh"],
    scalar: "",
    activations: {},
    shapes: {},
    values: [],
  };
}

// The numbers of a memory's description, in the order of kernel/wasm.cpp.
export const memoryNumbers = ({ heads, key_size: keys, value_size: values, epsilon, output_gate: gated }) => [heads, keys, values, epsilon, Number(gated)];

const BYTES = Float32Array.BYTES_PER_ELEMENT;
const sigmoid = (z) => 1 / (1 + Math.exp(-z));
const logSigmoid = (z) => Math.min(z, 0) - Math.log1p(Math.exp(-Math.abs(z)));

// A pass of an mLSTM's memory by the kernel, in place of the engine's CellPass. `traced`: `fields` are those of every step,
// which runs step by step; else only h.
export class MemoryPass {
  constructor(cell, x, B, T, { state, mask, reset, traced }) {
    const { kernel, sizes, spec } = cell;
    const { units, input_size: width } = spec;
    const names = Object.keys(sizes);
    Object.assign(this, { cell, B, sizes });
    kernel.within((take) => {
      const numbers = memoryNumbers(spec);
      const given = kernel.put(take, x);
      const flags = [mask, reset].map((one) => kernel.put(take, one, Uint8Array));
      const states = names.map((name) => kernel.put(take, state?.[name] ?? new Float32Array(B * sizes[name])));
      const y = take(BYTES * B * T * units);
      const call = (row, t, rows, steps) => {
        const at = row * T + t;
        const [masked, begun] = flags.map((flag) => (flag === 0 ? 0 : flag + at));
        const own = states.map((place, n) => place + BYTES * row * sizes[names[n]]);
        kernel.memory(numbers, rows, steps, { x: given + BYTES * at * width, y: y + BYTES * at * units, states: own, mask: masked, reset: begun });
        return own;
      };
      if (traced) this.fields = this.trace(x, B, T, { mask, reset, call });
      else call(0, 0, B, T);
      const h = { data: kernel.floats(y, B * T * units).slice(), shape: [B, T, units] };
      this.fields = { ...this.fields, h };
      this.after = Object.fromEntries(names.map((name, n) => [name, kernel.floats(states[n], B * sizes[name]).slice()]));
    });
  }

  // Run step by step, and return all fields but h.
  trace(x, B, T, { mask, reset, call }) {
    const { kernel, sizes, spec } = this.cell;
    const { heads, key_size: keys, value_size: values, units, input_size: width, output_gate: gated } = spec;
    const widths = { q: heads * keys, k: heads * keys, v: units, i: heads, f: heads, ...(gated && { o: units }) };
    const plane = (size) => ({ data: new Float32Array(B * T * size), shape: [B, T, size] });
    const fields = Object.fromEntries(Object.entries({ ...widths, m: sizes.m, n: sizes.n }).map(([name, size]) => [name, plane(size)]));
    for (let row = 0; row < B; row += 1) {
      for (let t = 0; t < T; t += 1) {
        const at = row * T + t;
        const before = call(row, t, 1, 0);
        const kept = reset?.[at] ? new Float32Array(heads) : kernel.floats(before[2], heads).slice();
        const [, n, m] = call(row, t, 1, 1);
        for (const [name, place] of [["n", n], ["m", m]]) fields[name].data.set(kernel.floats(place, sizes[name]), at * sizes[name]);
        if (mask !== null && !mask[at]) continue;
        let from = at * width;
        for (const [name, size] of Object.entries(widths)) {
          const z = x.subarray(from, from + size);
          const now = fields.m.data.subarray(at * heads, (at + 1) * heads);
          const of = { i: (one, u) => Math.exp(one - now[u]), f: (one, u) => Math.exp(logSigmoid(one) + kept[u] - now[u]), o: sigmoid }[name];
          fields[name].data.set(of ? z.map(of) : z, at * size);
          from += size;
        }
      }
    }
    return fields;
  }
}

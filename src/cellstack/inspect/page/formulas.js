// One step of one cell, recomputed from its weights in float64, so that every number can be shown as a formula, down to
// each product and sum. The equations are those of src/cellstack/reference.py, line by line.

import { inBrackets, shown } from "./dom.js";
import { cellActivation } from "./engine/activations.js";

const GREEK = { sigmoid: "σ", tanh: "tanh" };
const DIGITS = 5;

// An activation of `argument` as written in a formula: σ(0.5).
function callOf(text, argument) {
  const name = text.split("(")[0];
  return `${GREEK[name] ?? name.replaceAll("_", " ")}(${argument})`;
}

function activated(text, z) {
  const { f, alpha, beta } = cellActivation(text);
  return f(z, alpha, beta);
}

// v · W, for a row and a matrix.
function productOf(v, { data, shape: [rows, columns] }) {
  const out = new Float64Array(columns);
  for (let k = 0; k < rows; k += 1) {
    if (v[k] === 0) continue;
    const from = k * columns;
    for (let n = 0; n < columns; n += 1) out[n] += v[k] * data[from + n];
  }
  return out;
}

// LN(v) of columns [from, to): its mean and its deviation.
function momentsOf(v, from, to, epsilon) {
  let mean = 0;
  for (let n = from; n < to; n += 1) mean += v[n] / (to - from);
  let variance = 0;
  for (let n = from; n < to; n += 1) variance += (v[n] - mean) ** 2 / (to - from);
  return { mean, deviation: Math.sqrt(variance + epsilon) };
}

// The inputs of a step, and all intermediate results.
//
//   weights  { kernel: { data, shape }, … }
//   given    { x, h, c, names }: the input and the state before the step, c of an LSTM; names of the input's features
export class CellStep {
  constructor(spec, weights, given) {
    this.spec = spec;
    this.weights = weights;
    this.given = given;
    this.units = spec.units;
    this.a = productOf(given.x, weights.kernel);
    this.b = productOf(given.h, weights.recurrent_kernel);
  }

  // The columns that are normalised together with a gate's: all; for a GRU, z and r together, g separately.
  together(gate) {
    const wide = this.spec.blocks.length * this.units;
    if (this.spec.kind !== "gru") return [0, wide];
    return gate === "g" ? [2 * this.units, wide] : [0, 2 * this.units];
  }

  column(gate, unit) {
    return this.spec.blocks.indexOf(gate) * this.units + unit;
  }

  // The terms of a product with one column: { name, value, weight, product }.
  terms(which, gate, unit) {
    const column = this.column(gate, unit);
    const matrix = this.weights[which];
    const columns = matrix.shape[1];
    const v = which === "kernel" ? this.given.x : this.given.h;
    const letter = which === "kernel" ? "x" : "h";
    return Array.from(v, (value, k) => {
      const weight = matrix.data[k * columns + column];
      return { name: letter === "x" ? (this.given.names?.[k] ?? `x[${k}]`) : `h_prev[${k}]`, value, weight, product: value * weight };
    });
  }

  // A product as a term of a sum: unchanged, or normalised and multiplied by its gain.
  part(which, gate, unit, lines) {
    const column = this.column(gate, unit);
    const v = which === "kernel" ? this.a : this.b;
    const letter = which === "kernel" ? "x" : "h_prev";
    lines.push({ terms: this.terms(which, gate, unit), title: `${letter} · ${which.replace("_", " ")}`, total: v[column] });
    if (!this.spec.layer_norm) return v[column];
    const [from, to] = this.together(gate);
    const { mean, deviation } = momentsOf(v, from, to, this.spec.norm_epsilon);
    const gain = this.weights[which === "kernel" ? "kernel_gain" : "recurrent_gain"].data[column];
    const value = ((v[column] - mean) / deviation) * gain;
    lines.push({ text: `normalised: (${shown(v[column], DIGITS)} − ${inBrackets(mean, DIGITS)}) / ${shown(deviation, DIGITS)} · gain ${inBrackets(gain, DIGITS)} = ${shown(value, DIGITS)}` });
    return value;
  }

  // The value of a gate, and its derivation.
  gate(gate, unit) {
    const { spec, weights, given } = this;
    const lines = [];
    if (gate === "f" && spec.coupled) {
      const i = this.gate("i", unit).value;
      return { value: 1 - i, lines: [{ text: `f = 1 − i = 1 − ${inBrackets(i, DIGITS)} = ${shown(1 - i, DIGITS)}` }] };
    }
    const column = this.column(gate, unit);
    const reset = spec.kind === "gru" && gate === "g";
    const sum = [];
    sum.push(this.part("kernel", gate, unit, lines));
    const bias = weights.bias ?? null;
    const own = bias === null ? 0 : bias.data[column];
    const second = bias !== null && bias.shape.length === 2 ? bias.data[bias.shape[1] + column] : 0;
    const names = bias === null ? "" : bias.shape.length === 2 && !reset ? " with both biases" : " with the bias";
    if (bias !== null && reset) sum.push(own);
    if (!reset) {
      sum.push(this.part("recurrent_kernel", gate, unit, lines));
      if (bias !== null) sum.push(...(bias.shape.length === 2 ? [own, second] : [own]));
    } else if (spec.reset_after) {
      const inner = this.part("recurrent_kernel", gate, unit, lines) + second;
      const r = this.gate("r", unit).value;
      if (bias !== null) lines.push({ text: `plus its bias: ${shown(inner - second, DIGITS)} + ${inBrackets(second, DIGITS)} = ${shown(inner, DIGITS)}` });
      lines.push({ text: `times r: ${shown(r, DIGITS)} · ${inBrackets(inner, DIGITS)} = ${shown(r * inner, DIGITS)}` });
      sum.push(r * inner);
    } else {
      const columns = weights.recurrent_kernel.shape[1];
      const terms = Array.from(given.h, (value, k) => {
        const seen = this.gate("r", k).value * value;
        const weight = weights.recurrent_kernel.data[k * columns + column];
        return { name: `r·h_prev[${k}]`, value: seen, weight, product: seen * weight };
      });
      const total = terms.reduce((all, term) => all + term.product, 0);
      lines.push({ terms, title: "(r · h_prev) · recurrent kernel", total });
      sum.push(total);
    }
    if (spec.peepholes && gate !== "g") {
      const rows = spec.blocks.filter((one) => one !== "g");
      const weight = weights.peepholes.data[rows.indexOf(gate) * this.units + unit];
      const c = gate === "o" ? this.cell(unit).fresh : given.c[unit];
      lines.push({ terms: [{ name: gate === "o" ? "c" : "c_prev", value: c, weight, product: c * weight }], title: "peephole", total: c * weight });
      sum.push(c * weight);
    }
    let z = sum.reduce((all, one) => all + one, 0);
    lines.push({ text: `sum${names}: ${sum.map((one, n) => (n ? inBrackets(one, DIGITS) : shown(one, DIGITS))).join(" + ")} = ${shown(z, DIGITS)}` });
    if (spec.clip !== null) {
      const cut = Math.min(Math.max(z, -spec.clip), spec.clip);
      lines.push({ text: `clipped to ±${shown(spec.clip)}: ${shown(cut, DIGITS)}` });
      z = cut;
    }
    const activation = spec.activations[gate];
    const value = activated(activation, z);
    lines.push({ text: `${gate} = ${callOf(activation, shown(z, DIGITS))} = ${shown(value, DIGITS)}`, result: true });
    return { value, lines };
  }

  // An LSTM's cell: `fresh` from the equations, `value` after zoneout.
  cell(unit) {
    const { spec, given } = this;
    const [i, f, g] = ["i", "f", "g"].map((gate) => this.actual(gate, unit));
    let fresh = f * given.c[unit] + i * g;
    const lines = [
      { text: `c = f · c_prev + i · g` },
      { text: `= ${shown(f, DIGITS)} · ${inBrackets(given.c[unit], DIGITS)} + ${shown(i, DIGITS)} · ${inBrackets(g, DIGITS)}` },
      { text: `= ${shown(f * given.c[unit], DIGITS)} + ${inBrackets(i * g, DIGITS)} = ${shown(fresh, DIGITS)}`, result: true },
    ];
    if (spec.cell_clip !== null) {
      fresh = Math.min(Math.max(fresh, -spec.cell_clip), spec.cell_clip);
      lines.push({ text: `clipped to ±${shown(spec.cell_clip)}: ${shown(fresh, DIGITS)}` });
    }
    const value = this.keep(spec.zoneout_cell, given.c[unit], fresh, lines);
    return { value, fresh, lines };
  }

  keep(rate, before, fresh, lines) {
    if (!rate) return fresh;
    const value = rate * before + (1 - rate) * fresh;
    lines.push({ text: `zoneout keeps ${shown(rate)} of the previous value: ${shown(rate)} · ${inBrackets(before, DIGITS)} + ${shown(1 - rate)} · ${inBrackets(fresh, DIGITS)} = ${shown(value, DIGITS)}`, result: true });
    return value;
  }

  // A gate's actual value in the step, which a patch may have changed.
  actual(gate, unit) {
    const now = this.given.now?.[gate];
    return now === undefined ? this.gate(gate, unit).value : now[unit];
  }

  // An LSTM unit's activated cell before the output gate, and its product with the gate.
  shownCell(unit, lines) {
    const { spec, weights } = this;
    const cells = this.freshCells();
    let out = cells[unit];
    if (spec.layer_norm) {
      const { mean, deviation } = momentsOf(cells, 0, this.units, spec.norm_epsilon);
      const [gain, bias] = [weights.cell_gain.data[unit], weights.cell_bias.data[unit]];
      out = ((cells[unit] - mean) / deviation) * gain + bias;
      lines?.push({ text: `c normalised: (${shown(cells[unit], DIGITS)} − ${inBrackets(mean, DIGITS)}) / ${shown(deviation, DIGITS)} · ${inBrackets(gain, DIGITS)} + ${inBrackets(bias, DIGITS)} = ${shown(out, DIGITS)}` });
    }
    const o = this.actual("o", unit);
    const activation = spec.activations.cell;
    const active = activated(activation, out);
    lines?.push({ text: `${spec.proj_size ? "m" : "h"} = o · ${callOf(activation, "c")} = ${shown(o, DIGITS)} · ${callOf(activation, shown(out, DIGITS))}` });
    lines?.push({ text: `= ${shown(o, DIGITS)} · ${inBrackets(active, DIGITS)} = ${shown(o * active, DIGITS)}`, result: !spec.proj_size });
    return o * active;
  }

  freshCells() {
    this.cells ??= Float64Array.from({ length: this.units }, (_, unit) => {
      // Without zoneout and patches, the kept c is the fresh one.
      const now = this.given.now?.c;
      return now !== undefined && !this.spec.zoneout_cell ? now[unit] : this.cell(unit).fresh;
    });
    return this.cells;
  }

  output(unit) {
    const { spec, weights, given } = this;
    const lines = [];
    let fresh;
    if (spec.kind === "rnn") {
      fresh = this.actual("g", unit);
      lines.push({ text: `h = g = ${shown(fresh, DIGITS)}`, result: true });
    } else if (spec.kind === "gru") {
      const [z, g, before] = [this.actual("z", unit), this.actual("g", unit), given.h[unit]];
      fresh = z * before + (1 - z) * g;
      lines.push({ text: "h = z · h_prev + (1 − z) · g" });
      lines.push({ text: `= ${shown(z, DIGITS)} · ${inBrackets(before, DIGITS)} + ${shown(1 - z, DIGITS)} · ${inBrackets(g, DIGITS)}` });
      lines.push({ text: `= ${shown(z * before, DIGITS)} + ${inBrackets((1 - z) * g, DIGITS)} = ${shown(fresh, DIGITS)}`, result: true });
    } else if (spec.proj_size) {
      const terms = Array.from({ length: this.units }, (_, k) => {
        const value = this.shownCell(k, null);
        const weight = weights.projection.data[k * spec.proj_size + unit];
        return { name: `m[${k}]`, value, weight, product: value * weight };
      });
      fresh = terms.reduce((all, term) => all + term.product, 0);
      lines.push({ text: `h = m · projection, where m = o · ${callOf(spec.activations.cell, "c")}` });
      lines.push({ terms, title: "m · projection", total: fresh });
      lines.push({ text: `h = ${shown(fresh, DIGITS)}`, result: true });
    } else {
      fresh = this.shownCell(unit, lines);
    }
    const value = this.keep(spec.zoneout, given.h[unit], fresh, lines);
    return { value, lines };
  }

  // { value, lines } for any field.
  explain(field, unit) {
    if (field === "c") return this.cell(unit);
    if (field === "h") return this.output(unit);
    return this.gate(field, unit);
  }
}

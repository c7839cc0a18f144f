// One step of one cell, recomputed from its weights in float64, so that every number can be shown as a formula, down to
// each product and sum. The formulas are those of the cell's recorded step.

import { inBrackets, shown } from "./dom.js";
import { CellPass, byName, stateSizes } from "./engine/cells.js";
import { startOf } from "./engine/operations.js";
import { columnOf } from "./engine/products.js";
import { placeIn, weightsAt } from "./heads.js";

const GREEK = { sigmoid: "σ", tanh: "tanh" };
const SIGNS = { add: "+", sub: "−", mul: "·", scaled: "·", div: "/" };
const IS_SUM = ["add", "sub", "one_minus"];
const DIGITS = 5;

const words = (name) => name.replaceAll("_", " ");

// The name of an activation, without its parameters, as written in a formula.
export function activationName(text) {
  const name = text.split("(")[0];
  return GREEK[name] ?? words(name);
}

// An activation of `argument` as written in a formula: σ(0.5).
const callOf = (text, argument) => `${activationName(text)}(${argument})`;

export class CellStep {
  // cell   { spec, form, arrays: { kernel: { data, shape }, … } }
  // given  { x, before, now, names, memory }: the input, the states before the step, the actual gates and states, which a patch
  //        may have changed, names of the input's features, and of an mLSTM what `memoryOf` returns and the step
  constructor(cell, given) {
    Object.assign(this, { cell, given, form: cell.form, values: cell.form.values });
  }

  // The step with the actual gates and states.
  get pass() {
    const { cell, form, given } = this;
    const actual = form.trace.filter((name) => !form.states[name]?.kept); // those without zoneout: the step uses them unchanged
    const patches = actual.map((gate) => ({ node: "", gate, how: "set", value: { data: given.now[gate], shape: [given.now[gate].length] } }));
    const before = byName(stateSizes(cell), (size, name) => Float64Array.from(given.before[name] ?? new Float64Array(size))); // C isn't shown
    const options = { state: before, mask: null, reset: null, reverse: false, patches, pre: false, keep: false };
    const pass = new CellPass(cell, Float64Array.from(given.x), 1, 1, options);
    Object.defineProperty(this, "pass", { value: pass });
    return pass;
  }

  number(n, unit) {
    const vector = this.pass.vectors[n];
    return vector.data[startOf(vector, 0) + placeIn(this.form.heads, unit, this.cell.spec.units, vector.width)];
  }

  // Whether a value is computed from products or norms, and not only from gates and states.
  isDeep(n) {
    const { operation, of } = this.values[n];
    return operation === "product" || operation === "norm" || (operation !== "record" && of.some((one) => this.isDeep(one)));
  }

  // A value as a formula, down to the values for which `leaf` returns a text: [text, whether it is a sum].
  formula(n, leaf, first = true) {
    const { operation, of, name } = this.values[n];
    const known = leaf(n, first);
    if (known !== null) return [known, false];
    const factor = (k, start) => {
      const [text, isSum] = this.formula(of[k], leaf, start);
      return isSum && operation !== "add" && !(operation === "sub" && k === 0) ? `(${text})` : text;
    };
    if (operation in SIGNS) return [`${factor(0, first)} ${SIGNS[operation]} ${factor(1, false)}`, IS_SUM.includes(operation)];
    if (operation === "one_minus") return [`1 − ${factor(0, false)}`, true];
    if (operation === "activation") return [callOf(this.form.activations[name], this.formula(of[0], leaf)[0]), false];
    if (operation === "affine") return [`${shown(this.values[n].numbers[0], 3)} · ${this.formula(of[0], leaf, false)[0]}`, false];
    const inner = () => of.map((one) => this.formula(one, leaf)[0]);
    if (operation === "exp" || operation === "log_sigmoid") return [`${operation === "exp" ? "exp" : "log σ"}(${inner()[0]})`, false];
    if (operation === "maximum") return [`max(${inner().join(", ")})`, false];
    if (operation === "select") {
      const [test, one, other = "0"] = inner();
      return [`(${test} ≠ 0 ? ${one} : ${other})`, false];
    }
    return this.formula(of[0], leaf, first);
  }

  // Whether a value is the sum of the products with x and with h, of all gates.
  isPreActivation(n) {
    const { operation, of } = this.values[n];
    return operation === "add" && of.every((one) => this.isDeep(one));
  }

  symbol(n) {
    const leaf = (k) => {
      const { operation, name, of, part } = this.values[k];
      const place = this.form.after.indexOf(k);
      if (place >= 0 && k !== n && operation !== "record") return Object.keys(this.form.states)[place];
      if (operation === "x" || operation === "features") return "x";
      if (operation === "scalar" || operation === "part") return name;
      if (operation === "state") return `${name}_prev`;
      if (operation === "product") return `${this.symbol(of[0])} · ${words(name)}`;
      if (operation === "norm") return `LN(${this.symbol(of[0])})`;
      if (operation === "split" && this.isPreActivation(of[0])) return `z_${this.form.blocks[part]}`;
      return ["record", "weight"].includes(operation) ? words(name) : null;
    };
    return this.formula(n, leaf)[0];
  }

  written(n, unit, first) {
    return first ? shown(this.number(n, unit), DIGITS) : inBrackets(this.number(n, unit), DIGITS);
  }

  // A product with one column of a matrix, as a table of its terms.
  product(n, unit, lines) {
    const { of: [source], name, part } = this.values[n];
    const { operation } = this.values[source];
    const { data, shape } = this.cell.arrays[name];
    const { row, rows, at, wide } = columnOf(shape, this.cell.spec.units, unit, part);
    const letter = ["x", "features", "state", "record"].includes(operation) ? this.symbol(source) : "m";
    if (letter === "m") lines.push({ text: `m = ${this.symbol(source)}` });
    const nameOf = (k) => (letter === "x" ? this.given.names?.[k] : null) ?? `${letter}[${k}]`;
    const terms = Array.from({ length: rows }, (_, k) => {
      const [value, weight] = [this.number(source, row + k), data[at + k * wide]];
      return { name: nameOf(row + k), value, weight, product: value * weight };
    });
    lines.push({ terms, title: `${letter} · ${words(name)}`, total: this.number(n, unit) });
    return `${letter} · ${words(name)}`;
  }

  // A norm, and its product with a gain.
  norm(n, unit, lines, gain = null, product = n) {
    const { of: [source], numbers } = this.values[n];
    const { units, norm_epsilon: epsilon } = this.cell.spec;
    let from = 0;
    let width = 0;
    for (const count of numbers) {
      if (unit < from + width) break;
      from += width;
      width = count * units;
    }
    const v = Array.from({ length: width }, (_, k) => this.number(source, from + k));
    const mean = v.reduce((sum, one) => sum + one, 0) / width;
    const deviation = Math.sqrt(v.reduce((sum, one) => sum + (one - mean) ** 2, 0) / width + epsilon);
    lines.push({ text: `normalised: (${this.written(source, unit, true)} − ${inBrackets(mean, DIGITS)}) / ${shown(deviation, DIGITS)}${gain === null ? "" : ` · gain ${this.written(gain, unit, false)}`} = ${this.written(product, unit, true)}` });
  }

  // The terms of a sum, [value, unit] each, whose own derivations are added to the lines.
  terms(n, unit, lines) {
    const { operation, of, part } = this.values[n];
    if (operation === "split") return this.terms(of[0], part * this.cell.spec.units + unit, lines);
    if (operation === "add") return of.flatMap((one) => this.terms(one, unit, lines));
    this.derive(n, unit, lines);
    return [[n, unit]];
  }

  // A sum as a line, after the derivations of its terms.
  sum(n, unit, lines) {
    const terms = this.terms(n, unit, lines);
    if (terms.length === 1) return;
    const biases = terms.filter(([one]) => ["bias", "gate_bias", "backbone_bias"].includes(this.values[one].name)).length;
    const with_ = ["", " with the bias", " with both biases"][biases];
    lines.push({ text: `sum${with_}: ${terms.map(([one, own], k) => this.written(one, own, k === 0)).join(" + ")} = ${this.written(n, unit, true)}` });
  }

  // The derivation of a value from products and norms; none where it is computed from gates and states alone.
  derive(n, unit, lines) {
    const { operation, of, part } = this.values[n];
    if (operation === "split") this.derive(of[0], part * this.cell.spec.units + unit, lines);
    else if (operation === "product") this.product(n, unit, lines);
    else if (operation === "add" && this.isDeep(n)) this.sum(n, unit, lines);
    else if (operation === "mul" && !this.isDeep(n)) this.weighed(of, unit, lines);
    else if (this.isDeep(n)) {
      const [deep, other] = this.isDeep(of[0]) ? of : [of[1], of[0]];
      if (operation === "mul" && this.values[deep].operation === "norm") {
        this.derive(this.values[deep].of[0], unit, lines);
        this.norm(deep, unit, lines, other, n);
        return;
      }
      for (const one of of) this.derive(one, unit, lines);
      if (operation === "norm") this.norm(n, unit, lines);
      else if (operation === "mul") {
        lines.push({ text: `times ${this.isDeep(other) ? "the other" : this.symbol(other)}: ${this.written(other, unit, true)} · ${this.written(deep, unit, false)} = ${this.written(n, unit, true)}` });
      } else if (operation !== "activation") lines.push({ text: `${this.formula(n, (k, first) => (k === n ? null : this.written(k, unit, first)))[0]} = ${this.written(n, unit, true)}` });
    }
  }

  // A weight times a gate or state, such as a peephole.
  weighed(of, unit, lines) {
    const weight = of.find((one) => this.values[one].operation === "weight");
    if (weight === undefined) return;
    const other = of.find((one) => one !== weight);
    const [value, factor] = [this.number(other, unit), this.number(weight, unit)];
    lines.push({ terms: [{ name: this.symbol(other), value, weight: factor, product: value * factor }], title: words(this.values[weight].name), total: value * factor });
  }

  // `name` = a value as an equation: its symbols, its numbers, and their result.
  equation(name, n, unit, lines) {
    const { operation, of } = this.values[n];
    const value = this.written(n, unit, true);
    if (operation === "product") lines.push({ text: `${name} = ${this.product(n, unit, lines)} = ${value}`, result: true });
    else if (!(operation in SIGNS)) {
      if (this.isDeep(n)) this.derive(n, unit, lines);
      const leaf = (k, first) => (k === n || (this.values[k].operation in SIGNS && !this.isDeep(k)) ? null : this.written(k, unit, first));
      const numbers = of.length && operation !== "record" ? ` = ${this.formula(n, leaf)[0]}` : "";
      lines.push({ text: `${name} = ${this.symbol(n)}${numbers} = ${value}`, result: true });
    } else {
      for (const one of of) this.derive(one, unit, lines);
      const leaf = (k, first) => {
        const { operation: own, of: [source], name: slot } = this.values[k];
        if (own === "activation") return callOf(this.form.activations[slot], this.written(source, unit, true));
        return own in SIGNS && (k === n || !this.isDeep(k)) ? null : this.written(k, unit, first);
      };
      const [symbols, [numbers]] = [`${name} = ${this.symbol(n)}`, this.formula(n, leaf)];
      const result = of.map((one, k) => this.written(one, unit, k === 0)).join(` ${SIGNS[operation]} `);
      if (operation === "mul") lines.push({ text: numbers === result ? symbols : `${symbols} = ${numbers}` });
      else lines.push({ text: symbols }, ...(numbers === result ? [] : [{ text: `= ${numbers}` }]));
      lines.push({ text: `= ${result} = ${value}`, result: true });
    }
  }

  // The lines that derive a gate or state of a unit: { text, result } or { terms, title, total }.
  explain(name, unit) {
    const { form, values } = this;
    const lines = [];
    const place = Object.keys(form.states).indexOf(name);
    let n = place < 0 ? values.findIndex((value) => value.operation === "record" && value.name === name) : form.after[place];
    if (values[n].operation === "record" && values[n].name === name) [n] = values[n].of;
    if (values[n].operation === "part") {
      const column = values[n].part + placeIn(form.heads, unit, this.cell.spec.units, this.given.now[name].length);
      return [{ text: `${name} = x[${column}] = ${this.written(n, unit, true)}`, result: true }];
    }
    if (form.heads && name === "h") return this.retrieved(unit);
    const clipped = (k) => lines.push({ text: `clipped to ±${shown(values[k].numbers[0])}: ${this.written(k, unit, true)}` });
    if (place < 0 && values[n].operation === "activation") {
      const [source] = values[n].of;
      const cut = values[source].operation === "clip";
      this.sum(cut ? values[source].of[0] : source, unit, lines);
      if (cut) clipped(source);
      lines.push({ text: `${name} = ${callOf(form.activations[values[n].name], this.written(source, unit, true))} = ${this.written(n, unit, true)}`, result: true });
      return lines;
    }
    const cut = values[n].operation === "clip";
    this.equation(name, cut ? values[n].of[0] : n, unit, lines);
    if (cut) clipped(n);
    const kept = form.states[name]?.kept;
    if (kept) {
      const before = this.given.before[name][unit];
      const value = kept * before + (1 - kept) * this.number(n, unit);
      lines.push({ text: `zoneout keeps ${shown(kept)} of the previous value: ${shown(kept)} · ${inBrackets(before, DIGITS)} + ${shown(1 - kept)} · ${this.written(n, unit, false)} = ${shown(value, DIGITS)}`, result: true });
    }
    return lines;
  }

  // h of an mLSTM: the values of the steps that its query reads, with their weights.
  retrieved(unit) {
    const { memory: { memory, step, label }, now } = this.given;
    const { weights, start, product, divisor } = weightsAt(memory, step, unit);
    const terms = [...weights.keys()].flatMap((at) => {
      const [value, weight] = [memory.planes.v.at(unit, at), weights[at]];
      return weight === 0 ? [] : [{ name: label(at), value, weight, product: value * weight }];
    });
    if (start !== 0) terms.push({ name: "initial state", value: start, weight: 1, product: start });
    const total = terms.reduce((sum, term) => sum + term.product, 0);
    const [size, gate] = [Math.exp(-now.m[placeIn(this.form.heads, unit, now.h.length, now.m.length)]), now.o?.[unit]];
    return [
      { text: `the divisor: max(|n·q|, exp(−m)) + ε = max(|${shown(product, DIGITS)}|, ${shown(size, DIGITS)}) + ε = ${shown(divisor, DIGITS)}` },
      { text: "Cᵀq, divided by it, is a sum of the v of all steps:" },
      { terms, title: "v · weight", total },
      { text: `h = ${gate === undefined ? shown(total, DIGITS) : `o · the sum = ${shown(gate, DIGITS)} · ${inBrackets(total, DIGITS)}`} = ${shown(now.h[unit], DIGITS)}`, result: true },
    ];
  }
}

// Of the first state that a step keeps unit by unit, how: { name, kept, fields, of }. `of(value)` are the share that the
// step keeps and what it adds, before zoneout, given a function of the names in `fields`; null where there is no such state.
export function keepingOf({ states, before, after, values }) {
  for (const [place, [name, { kept }]] of Object.entries(states).entries()) {
    const fields = new Set();
    const start = after[place];
    const first = values[start].operation === "record" && values[start].name === name ? values[start].of[0] : start;
    // [share, rest] as functions of the fields' values; null: it isn't linear in the state
    const linear = (n) => {
      const { operation, of, name: own } = values[n];
      if (n === before[place]) return [() => 1, () => 0];
      if (operation === "record") {
        fields.add(own);
        return [null, (value) => value(own)];
      }
      const [a, b] = of.map(linear);
      if (!["add", "mul", "div", "one_minus"].includes(operation) || a === null || b === null) return null;
      const plus = (p, q) => (p && q ? (value) => p(value) + q(value) : (p ?? q));
      if (operation === "add") return [plus(a[0], b[0]), plus(a[1], b[1])];
      if (operation === "one_minus") return [a[0] && ((value) => -a[0](value)), (value) => 1 - a[1](value)];
      const [one, other] = b[0] === null ? [a, b[1]] : [b, a[1]];
      if ((a[0] && b[0]) || (operation === "div" && b[0])) return null;
      const by = operation === "div" ? (p) => (value) => p(value) / other(value) : (p) => (value) => p(value) * other(value);
      return [one[0] && by(one[0]), by(one[1])];
    };
    const found = values[first].operation === "clip" ? null : linear(first);
    if (found !== null && found[0] !== null) return { name, kept, fields: [...fields], of: (value) => found.map((part) => part(value)) };
  }
  return null;
}

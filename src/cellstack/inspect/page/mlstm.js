// The memory of an mLSTM, whose fields have one number for each head, or several: its units, the weights with which its query
// reads earlier steps, and each number of a step as a formula.

import { inBrackets, shown } from "./dom.js";
import { DIGITS } from "./formulas.js";

// The units of a cell: `part(unit)` the range of those shown together; `title(unit, width)` in a vector; `index(width, unit)`
// the place of a unit in a vector, and `unit(width, index)` the reverse. In an mLSTM a unit is a number of a head; it has none
// in vectors whose heads are narrower, and all of a head have the same in a vector of one number per head.
export function unitsOf({ form: { heads }, spec, units }) {
  const same = (_, unit) => unit;
  if (!heads) return { part: () => [0, units.length], title: (unit) => `unit ${units[unit] ?? unit}`, index: same, unit: same };
  const most = Math.max(spec.key_size, spec.value_size);
  const split = (unit, each) => [Math.floor(unit / each), unit % each];
  return {
    part: (unit) => [split(unit, most)[0] * most, most],
    title: (unit, width) => (width === heads ? headTitle(1, split(unit, most)[0]) : headTitle(most, unit)),
    index: (width, unit) => {
      const [head, n] = split(unit, most);
      const each = width / heads;
      return each === 1 ? head : n < each ? head * each + n : undefined;
    },
    unit: (width, index) => {
      const [head, n] = split(index, width / heads);
      return head * most + n;
    },
  };
}

// "head 1", or "head 1 [3]".
export function headTitle(each, unit) {
  return `head ${Math.floor(unit / each)}${each > 1 ? ` [${unit % each}]` : ""}`;
}

function productOf(a, b, head, size, at, other) {
  let sum = 0;
  for (let n = head * size; n < (head + 1) * size; n += 1) sum += a.at(n, at) * b.at(n, other);
  return sum;
}

// What the query of a head reads at a step is the sum of v with `weights`, one for each step, and `left` times what it reads of
// the state before the run; `product` is n·q, and `divisor` what all are divided by. `planes`: those of the fields.
export function weightsAt({ planes: { q, k, i, f, m, n }, spec, mask, reset }, head, step) {
  const { key_size: size, epsilon } = spec;
  const weights = new Float64Array(q.steps);
  const product = productOf(n, q, head, size, step, step);
  const divisor = Math.max(Math.abs(product), Math.exp(-m.at(head, step))) + epsilon;
  let left = mask === null || mask[step] ? 1 / divisor : 0;
  for (let at = step; at >= 0 && left !== 0; at -= 1) {
    if (mask === null || mask[at]) {
      weights[at] = (left * i.at(head, at) * productOf(q, k, head, size, step, at)) / Math.sqrt(size);
      left *= f.at(head, at);
    }
    if (reset !== null && reset[at]) left = 0;
  }
  return { weights, left, product, divisor };
}

// What a query reads of the state before the run, for the number of h at an index.
export function readOfStart({ planes: { q }, spec, start }, step, left, index) {
  const { key_size: keys, value_size: values } = spec;
  const [head, n] = [Math.floor(index / values), index % values];
  let sum = 0;
  for (let key = head * keys; key < (head + 1) * keys; key += 1) sum += q.at(key, step) * start.C[key * values + n];
  return left * sum;
}

export class MemoryStep {
  // given   { planes, spec, mask, reset, start }, the step, and { x, before, now, label }: its input, n and m before the step,
  //         its fields, and a function that names a step
  constructor(given, step, { x, before, now, label }) {
    Object.assign(this, { given, step, x, before, now, label });
  }

  // The lines that derive a number of a field, as of `CellStep.explain`.
  explain(name, index) {
    const { spec } = this.given;
    const { heads, key_size: keys, value_size: values } = spec;
    const head = Math.floor((index * heads) / this.now[name].length);
    const [s, b] = [(number) => shown(number, DIGITS), (number) => inBrackets(number, DIGITS)];
    const first = { q: 0, k: heads * keys, v: 2 * heads * keys, i: heads * (2 * keys + values) };
    first.f = first.i + heads;
    first.o = first.f + heads;
    const column = first[name] + index;
    const [zi, zf] = [this.x[first.i + head], this.x[first.f + head]];
    const logF = Math.min(zf, 0) - Math.log1p(Math.exp(-Math.abs(zf)));
    const [m, before] = [this.now.m[head], this.before.m[head]];
    const [i, f] = [this.now.i[head], this.now.f[head]];
    const value = s(this.now[name][index]);
    const result = (text) => ({ text: `${text} = ${value}`, result: true });
    const of = (letter, z) => ({ text: `z_${letter} = x[${first[letter] + head}] = ${s(z)}` });
    if ("qkv".includes(name)) return [result(`${name} = x[${column}]`)];
    if (name === "o") return [{ text: `z_o = x[${column}] = ${s(this.x[column])}` }, result(`o = σ(z_o) = σ(${s(this.x[column])})`)];
    if (name === "m") return [of("i", zi), of("f", zf), result(`m = max(log σ(z_f) + m_prev, z_i) = max(${s(logF)} + ${b(before)}, ${s(zi)})`)];
    if (name === "i") return [of("i", zi), result(`i = exp(z_i − m) = exp(${s(zi)} − ${b(m)})`)];
    if (name === "f") return [of("f", zf), result(`f = exp(log σ(z_f) + m_prev − m) = exp(${s(logF)} + ${b(before)} − ${b(m)})`)];
    if (name === "n") return [{ text: `n = f · n_prev + i · k / √${keys}` }, result(`= ${s(f)} · ${b(this.before.n[index])} + ${s(i)} · ${b(this.now.k[index])} / √${keys}`)];
    return this.retrieved(head, index, result);
  }

  // h: the values of the earlier steps with their weights.
  retrieved(head, index, result) {
    const { given, step, now, label } = this;
    const s = (number) => shown(number, DIGITS);
    const { weights, left, product, divisor } = weightsAt(given, head, step);
    const steps = [...weights.keys()].filter((at) => weights[at] !== 0);
    const terms = steps.map((at) => {
      const value = given.planes.v.at(index, at);
      return { name: label(at), value, weight: weights[at], product: weights[at] * value };
    });
    const rest = readOfStart(given, step, left, index);
    if (rest !== 0) terms.push({ name: "state before the run", value: rest, weight: 1, product: rest });
    const total = terms.reduce((sum, term) => sum + term.product, 0);
    const epsilon = given.spec.epsilon ? ` + ${s(given.spec.epsilon)}` : "";
    return [
      { text: `Cᵀq is divided by max(|n·q|, exp(−m))${epsilon} = max(|${s(product)}|, ${s(Math.exp(-now.m[head]))})${epsilon} = ${s(divisor)}` },
      { text: "C is a sum over the steps, so the query reads the sum of their values v, each with a weight:" },
      { terms, title: "v · weight", total },
      now.o === undefined ? result("h = the sum") : result(`h = o · the sum = ${s(now.o[index])} · ${inBrackets(total, DIGITS)}`),
    ];
  }
}

// The heads of an mLSTM, whose fields have one number for each head, or several; and what a head's query reads.

// The place in a vector of `to` numbers that belongs to one in a vector of `from` numbers: of the same head. Undefined where its
// heads are narrower; cells without heads have equally many units in all fields.
export function placeIn(heads, place, from, to) {
  if (!heads || from === to) return place;
  const [each, other] = [from / heads, to / heads];
  const [head, n] = [Math.floor(place / each), place % each];
  return other === 1 ? head : n < other ? head * other + n : undefined;
}

// What a query reads at a step is the sum of v with `weights`, one for each step, and `start`, what is left of the state before the
// run; `unit` of h has it before the output gate. All are divided by `divisor`. See `memoryOf` in cell.js for the memory.
export function weightsAt({ planes: { q, k, i, f, m, n }, spec, mask, reset, C }, step, unit) {
  const { key_size: keys, value_size: values, epsilon } = spec;
  const head = Math.floor(unit / values);
  const times = (other) => {
    let sum = 0;
    for (let key = head * keys; key < (head + 1) * keys; key += 1) sum += q.at(key, step) * other(key);
    return sum;
  };
  const product = times((key) => n.at(key, step));
  const divisor = Math.max(Math.abs(product), Math.exp(-m.at(head, step))) + epsilon;
  const weights = new Float64Array(q.steps);
  let left = mask === null || mask[step] ? 1 / divisor : 0;
  for (let at = step; at >= 0 && left !== 0; at -= 1) {
    if (mask === null || mask[at]) {
      weights[at] = (left * i.at(head, at) * times((key) => k.at(key, at))) / Math.sqrt(keys);
      left *= f.at(head, at);
    }
    if (reset !== null && reset[at]) left = 0;
  }
  return { weights, start: left * times((key) => C[key * values + (unit % values)]), product, divisor };
}

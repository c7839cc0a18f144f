// Orders of the units of a layer: by memory length, by variance, and by similarity of neighbours.

const POINTS = 256; // points per line when comparing lines
const MOST_COMPARED = 1024; // maximum units to compare; the cost is quadratic

export function byNumber(units) {
  return Int32Array.from({ length: units }, (_, n) => n);
}

// Largest first; NaN last.
export function bySize(values) {
  const key = (n) => (Number.isNaN(values[n]) ? -Infinity : values[n]);
  return byNumber(values.length).sort((a, b) => (key(a) === key(b) ? a - b : key(b) > key(a) ? 1 : -1));
}

// Each unit's variance over the steps.
export function variances(plane) {
  return Float64Array.from({ length: plane.units }, (_, unit) => {
    const line = plane.line(unit);
    let mean = 0;
    let sum = 0;
    let count = 0;
    for (const value of line) {
      if (!Number.isFinite(value)) continue;
      count += 1;
      const before = value - mean;
      mean += before / count;
      sum += before * (value - mean);
    }
    return count ? sum / count : NaN;
  });
}

// The number of steps in which each unit forgets half of its state: ln 2 over the mean of -ln |f|; f is the keep factor
// of a step. Masked steps don't count. Values rounded to 0 count as `least`.
export function halfLives(kept, rate, mask, least) {
  return Float64Array.from({ length: kept.units }, (_, unit) => {
    const line = kept.line(unit);
    let sum = 0;
    let count = 0;
    for (let step = 0; step < line.length; step += 1) {
      if (mask !== null && !mask[step]) continue;
      sum -= Math.log(Math.max(Math.abs(rate + (1 - rate) * line[step]), least));
      count += 1;
    }
    if (!count) return NaN;
    return sum > 0 ? (Math.LN2 * count) / sum : Number.isNaN(sum) ? NaN : Infinity;
  });
}

// An order with similar neighbours: units are merged into groups by the mean of their correlations (average linkage, by
// nearest-neighbour chains), and each group is oriented so that adjacent ends are similar.
export function byLikeness(plane) {
  const { units } = plane;
  if (units < 3 || units > MOST_COMPARED || plane.steps < 2) return byNumber(units);
  const lines = standardised(plane);
  const points = lines.length / units;
  const distance = new Float32Array(units * units);
  for (let a = 0; a < units; a += 1) {
    for (let b = a + 1; b < units; b += 1) {
      let sum = 0;
      for (let n = 0; n < points; n += 1) sum += lines[a * points + n] * lines[b * points + n];
      distance[a * units + b] = distance[b * units + a] = 1 - sum;
    }
  }
  const between = Float32Array.from(distance); // distances of groups, each stored at the index of its first unit
  const members = Array.from({ length: units }, (_, n) => [n]);
  const active = new Set(members.keys());
  const chain = [];
  while (active.size > 1) {
    if (!chain.length) chain.push(active.values().next().value);
    const top = chain[chain.length - 1];
    const before = chain.length > 1 ? chain[chain.length - 2] : -1;
    let nearest = before;
    let least = before < 0 ? Infinity : between[top * units + before];
    for (const other of active) {
      if (other !== top && between[top * units + other] < least) {
        least = between[top * units + other];
        nearest = other;
      }
    }
    if (nearest !== before) {
      chain.push(nearest);
      continue;
    }
    chain.length -= 2;
    const [a, b] = [members[top], members[nearest]];
    for (const other of active) {
      if (other === top || other === nearest) continue;
      const joined = (a.length * between[top * units + other] + b.length * between[nearest * units + other]) / (a.length + b.length);
      between[top * units + other] = between[other * units + top] = joined;
    }
    members[top] = joinedEnds(a, b, distance, units);
    active.delete(nearest);
  }
  return Int32Array.from(members[active.values().next().value]);
}

// Two orders concatenated, each possibly reversed, so that the joined ends are most similar.
function joinedEnds(a, b, distance, units) {
  const [a0, a1, b0, b1] = [a[0], a[a.length - 1], b[0], b[b.length - 1]];
  const ways = [
    [distance[a1 * units + b0], () => a.concat(b)],
    [distance[a1 * units + b1], () => a.concat(b.reverse())],
    [distance[a0 * units + b0], () => a.reverse().concat(b)],
    [distance[a0 * units + b1], () => b.concat(a)],
  ];
  return ways.reduce((best, way) => (way[0] < best[0] ? way : best))[1]();
}

// Lines reduced to block means, each with mean 0 and length 1; a constant line is all 0.
function standardised(plane) {
  const points = Math.min(POINTS, plane.steps);
  const out = new Float32Array(plane.units * points);
  for (let unit = 0; unit < plane.units; unit += 1) {
    const line = plane.line(unit);
    const own = out.subarray(unit * points, (unit + 1) * points);
    let mean = 0;
    for (let n = 0; n < points; n += 1) {
      const from = Math.floor((n * line.length) / points);
      const to = Math.max(from + 1, Math.floor(((n + 1) * line.length) / points));
      let sum = 0;
      for (let step = from; step < to; step += 1) sum += Number.isFinite(line[step]) ? line[step] : 0;
      own[n] = sum / (to - from);
      mean += own[n] / points;
    }
    let size = 0;
    for (let n = 0; n < points; n += 1) size += (own[n] -= mean) ** 2;
    size = Math.sqrt(size);
    for (let n = 0; n < points; n += 1) own[n] = size > 1e-9 ? own[n] / size : 0;
  }
  return out;
}

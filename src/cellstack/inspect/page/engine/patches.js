// Patches of gates and states, forward and backward.

import { floats, numbersIn, shapeText, slicedEntries } from "./shapes.js";

// The indices of an axis that a patch names, in their order: all of them, a list, or a slice { start, stop, step }.
function patchedEntries(patch, name, index, length) {
  if (index === null || index === undefined) return Array.from({ length }, (_, n) => n);
  const found = Array.isArray(index) ? index : slicedEntries([index.start, index.stop, index.step], length);
  const bad = found.find((entry) => !Number.isInteger(entry) || entry < 0 || entry >= length);
  if (bad !== undefined) {
    throw new Error(`patch of ${patch.node}: expected ${name} from 0 to ${length - 1}, got ${bad}`);
  }
  return found;
}

// The position of each index of an axis among the entries of a patch; -1 where it isn't one.
function placesAmong(entries, length) {
  const places = new Int32Array(length).fill(-1);
  entries.forEach((entry, place) => {
    places[entry] = place;
  });
  return places;
}

// The patches of one cell by gate, in order, in the form that `patched` takes; `widths` are those of all gates and states.
// `value` is a number, or a value that broadcasts to the patch's [rows, steps, units].
export function compiledPatches(patches, widths, B, T) {
  const found = {};
  for (const patch of patches) {
    const { node, gate, how, value } = patch;
    if (!Object.hasOwn(widths, gate)) {
      throw new Error(`patch of ${node}: expected gate to be one of ${Object.keys(widths).join(", ")}, got ${gate}`);
    }
    if (!["set", "add", "scale", "freeze"].includes(how)) {
      throw new Error(`patch of ${node}: expected how to be set, add, scale or freeze, got ${how}`);
    }
    if (how !== "freeze" && typeof value !== "number" && !Array.isArray(value?.shape)) {
      throw new Error(`patch of ${node}: expected a number or numbers as value to ${how}, got ${value}`);
    }
    // A list of three, as in a what-if, is a slice; patches of a file name the fields of the slice.
    const steps = Array.isArray(patch.steps)
      ? { start: patch.steps[0], stop: patch.steps[1], step: patch.steps[2] }
      : (patch.steps?.numbers ?? patch.steps);
    const named = [
      patchedEntries(patch, "rows", patch.rows, B),
      patchedEntries(patch, "steps", steps, T),
      patchedEntries(patch, "units", patch.units, widths[gate]),
    ];
    const { data, shape } = typeof value === "number" || how === "freeze" ? { data: [value], shape: [] } : value;
    const whole = [...new Array(Math.max(0, 3 - shape.length)).fill(1), ...shape];
    const fits = (length, n, axis) => length === 1 || length === n || (axis === 1 && length > n); // a slice clipped to the run
    if (whole.length > 3 || !whole.every((length, axis) => fits(length, named[axis].length, axis))) {
      const expected = named.map((entries) => entries.length).join(", ");
      throw new Error(`patch of ${node}: expected a value that fits [${expected}], got ${shapeText(shape)}`);
    }
    const strides = whole.map((length, axis) => (length === 1 ? 0 : numbersIn(whole.slice(axis + 1))));
    const [rows, times] = [placesAmong(named[0], B), placesAmong(named[1], T)];
    const units = Int32Array.from(named[2]);
    (found[gate] ??= []).push({ units, rows, steps: times, how, data: floats(data), strides });
  }
  return found;
}

// Apply patches to v[at…] at a step of a row; before[from…] is its value at the previous step, if any.
export function patched(list, v, at, row, t, before, from) {
  for (const { units, rows, steps, how, data, strides } of list) {
    if (rows[row] < 0 || steps[t] < 0) continue;
    const first = rows[row] * strides[0] + steps[t] * strides[1];
    for (let n = 0; n < units.length; n += 1) {
      const u = units[n];
      const value = data[first + n * strides[2]];
      if (how === "set") v[at + u] = value;
      else if (how === "add") v[at + u] += value;
      else if (how === "scale") v[at + u] = value === 0 ? 0 : v[at + u] * value;
      else if (from >= 0) v[at + u] = before[from + u];
    }
  }
}

// Backward pass of `patched`: dv[at…] becomes the gradient of its input; frozen parts go to dbefore[from…].
export function patchedBack(list, dv, at, row, t, dbefore, from) {
  for (let p = list.length - 1; p >= 0; p -= 1) {
    const { units, rows, steps, how, data, strides } = list[p];
    if (rows[row] < 0 || steps[t] < 0 || how === "add") continue;
    const first = rows[row] * strides[0] + steps[t] * strides[1];
    for (let n = 0; n < units.length; n += 1) {
      const d = at + units[n];
      if (how === "set") dv[d] = 0;
      else if (how === "scale") dv[d] *= data[first + n * strides[2]];
      else if (from >= 0) {
        dbefore[from + units[n]] += dv[d];
        dv[d] = 0;
      }
    }
  }
}

// Shapes, and Python slices of axes.

export const numbersIn = (shape) => shape.reduce((product, length) => product * length, 1);
export const lastAxis = (shape) => shape[shape.length - 1];
export const shapeText = (shape) => `[${shape.map((length) => length ?? "any").join(", ")}]`;

// The start, stop and step of Python's slice start:stop:step of n entries.
function slicedRange([start, stop, given], n) {
  const step = given ?? 1;
  const [least, most] = step > 0 ? [0, n] : [-1, n - 1];
  const end = (value, usual) => {
    if (value === null || value === undefined) return usual;
    return value < 0 ? Math.max(value + n, least) : Math.min(value, most);
  };
  return [end(start, step > 0 ? least : most), end(stop, step > 0 ? most : least), step];
}

export function slicedEntries(slice, n) {
  const [start, stop, step] = slicedRange(slice, n);
  const found = [];
  for (let at = start; step > 0 ? at < stop : at > stop; at += step) found.push(at);
  return found;
}

export const floats = (data) => (data instanceof Float64Array ? data : new Float64Array(data));

// Products and layer normalisation of rows, forward and backward.

// The parts of a product of a row with a matrix, or with the columns of its gates [first, end): `rows` numbers of the row from
// `row` on are multiplied by weights from `from` on, to `columns` numbers from `column` on. A matrix of heads
// [heads, rows, columns] has a part for each head and gate. Of several matrices, `gates` is the number of one.
export function productParts(shape, units, gates) {
  if (Number.isInteger(gates)) return [{ row: 0, rows: shape[1], from: gates * shape[1] * shape[2], column: 0, columns: shape[2] }];
  const [heads, rows, wide] = shape.length === 3 ? shape : [1, ...shape];
  if (heads === 1) return [{ row: 0, rows, from: (gates?.[0] ?? 0) * units, column: 0, columns: gates ? (gates[1] - gates[0]) * units : wide }];
  const width = units / heads;
  const [first, end] = gates ?? [0, wide / width];
  return Array.from({ length: heads * (end - first) }, (_, n) => {
    const [head, gate] = [n % heads, Math.floor(n / heads)];
    return { row: head * rows, rows, from: head * rows * wide + (first + gate) * width, column: gate * units + head * width, columns: width };
  });
}

// The weights of one column of a product: of numbers of the row from `row` on, from index `at` of the matrix in steps of `wide`.
export function columnOf(shape, units, column, gates) {
  const part = productParts(shape, units, gates).find((one) => column >= one.column && column < one.column + one.columns);
  return { row: part.row, rows: part.rows, at: part.from + column - part.column, wide: shape.at(-1) };
}

// y[yAt…] += x[xAt…]·w, where w has n rows of `stride` numbers, of which m from wAt on are used. Four rows per iteration,
// so that y is read and written a quarter as often.
export function addProduct(y, yAt, x, xAt, n, w, wAt, stride, m) {
  let k = 0;
  for (; k + 4 <= n; k += 4) {
    const x0 = x[xAt + k];
    const x1 = x[xAt + k + 1];
    const x2 = x[xAt + k + 2];
    const x3 = x[xAt + k + 3];
    const w0 = wAt + k * stride;
    const w1 = w0 + stride;
    const w2 = w1 + stride;
    const w3 = w2 + stride;
    for (let j = 0; j < m; j += 1) {
      y[yAt + j] += x0 * w[w0 + j] + x1 * w[w1 + j] + x2 * w[w2 + j] + x3 * w[w3 + j];
    }
  }
  for (; k < n; k += 1) {
    const x0 = x[xAt + k];
    const w0 = wAt + k * stride;
    for (let j = 0; j < m; j += 1) y[yAt + j] += x0 * w[w0 + j];
  }
}

// dx[xAt…] += w·dy[yAt…], the backward pass of `addProduct` for x.
export function addProductBack(dx, xAt, n, w, wAt, stride, m, dy, yAt) {
  for (let k = 0; k < n; k += 1) {
    const row = wAt + k * stride;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    let j = 0;
    for (; j + 4 <= m; j += 4) {
      s0 += w[row + j] * dy[yAt + j];
      s1 += w[row + j + 1] * dy[yAt + j + 1];
      s2 += w[row + j + 2] * dy[yAt + j + 2];
      s3 += w[row + j + 3] * dy[yAt + j + 3];
    }
    for (; j < m; j += 1) s0 += w[row + j] * dy[yAt + j];
    dx[xAt + k] += s0 + s1 + (s2 + s3);
  }
}

// dw += x·dy, the backward pass of `addProduct` for w.
export function addOuter(dw, wAt, stride, x, xAt, n, dy, yAt, m) {
  for (let k = 0; k < n; k += 1) {
    const xk = x[xAt + k];
    const row = wAt + k * stride;
    for (let j = 0; j < m; j += 1) dw[row + j] += xk * dy[yAt + j];
  }
}

export function addNumbers(y, yAt, x, xAt, n) {
  for (let j = 0; j < n; j += 1) y[yAt + j] += x[xAt + j];
}

// v[at…] becomes LN(v)⊙gain + bias; LN(v) goes to `unit` at the same index, if given. Returns the deviation. Without
// `centred`, the mean isn't subtracted.
export function normaliseRow(v, at, n, gain, gainAt, bias, epsilon, unit, unitAt, centred = true) {
  let mean = 0;
  if (centred) for (let j = 0; j < n; j += 1) mean += v[at + j];
  mean /= n;
  let variance = 0;
  for (let j = 0; j < n; j += 1) variance += (v[at + j] - mean) ** 2;
  const deviation = Math.sqrt(variance / n + epsilon);
  for (let j = 0; j < n; j += 1) {
    const u = (v[at + j] - mean) / deviation;
    if (unit !== null) unit[unitAt + j] = u;
    v[at + j] = (gain === null ? u : u * gain[gainAt + j]) + (bias === null ? 0 : bias[gainAt + j]);
  }
  return deviation;
}

// dv[at…], the gradient of `normaliseRow`'s output, becomes that of its input; dgain and dbias are added to.
export function normaliseRowBack(dv, at, n, gain, gainAt, dgain, dbias, unit, unitAt, deviation, centred = true) {
  let mean = 0;
  let along = 0;
  for (let j = 0; j < n; j += 1) {
    const d = dv[at + j];
    const u = unit[unitAt + j];
    if (dgain !== null) dgain[gainAt + j] += d * u;
    if (dbias !== null) dbias[gainAt + j] += d;
    dv[at + j] = gain === null ? d : d * gain[gainAt + j];
    if (centred) mean += dv[at + j];
    along += dv[at + j] * u;
  }
  mean /= n;
  along /= n;
  for (let j = 0; j < n; j += 1) dv[at + j] = (dv[at + j] - mean - unit[unitAt + j] * along) / deviation;
}

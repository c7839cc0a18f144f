// The operations of a cell's recorded step, forward and backward, over whole vectors.
//
// A vector is a part of an array at every position, a step of a row: { data, from, stride, width } and, in the backward
// pass, { slopes, slopesFrom, slopesStride } for its gradient. Its numbers at a position `at` begin at from + at·stride.

import { betweenOf } from "./activations.js";
import { addNumbers, addOuter, addProduct, addProductBack, normaliseRow, normaliseRowBack } from "./products.js";

export const startOf = (v, at) => v.from + at * v.stride;
export const slopeStart = (v, at) => v.slopesFrom + at * v.slopesStride;

// visit(m, v, w, rows, columns) the matrix of each head, which begins at m; its rows belong to the numbers of v from v on, its
// columns to those of w from w on.
function eachHead(heads, { width: allRows }, { width: allColumns }, visit) {
  const [rows, columns] = [allRows / heads, allColumns / heads];
  for (let head = 0; head < heads; head += 1) visit(head * rows * columns, head * rows, head * columns, rows, columns);
}

// `run` computes the vector y of an operation { y, a, b, c, given } at a position. `back` adds to the gradients of its operands
// a, b and c, given y's, which it may overwrite. `reads`: the backward pass needs the operands; `returns`: it needs y.
export const OPERATIONS = {
  product: {
    reads: true,
    run({ y, a, given }, at) {
      const i = startOf(y, at);
      y.data.fill(0, i, i + y.width);
      for (const { row, rows, from, column, columns } of given.parts) {
        addProduct(y.data, i + column, a.data, startOf(a, at) + row, rows, given.matrix, from, given.wide, columns);
      }
    },
    back({ y, a, given }, at) {
      const { matrix, slopes, wide, parts } = given;
      for (const { row, rows, from, column, columns } of parts) {
        addOuter(slopes, from, wide, a.data, startOf(a, at) + row, rows, y.slopes, slopeStart(y, at) + column, columns);
        addProductBack(a.slopes, slopeStart(a, at) + row, rows, matrix, from, wide, columns, y.slopes, slopeStart(y, at) + column);
      }
    },
  },
  add: {
    run({ y, a, b }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const B = b.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = A[j + u] + B[k + u];
    },
    back({ y, a, b }, at) {
      addNumbers(a.slopes, slopeStart(a, at), y.slopes, slopeStart(y, at), y.width);
      addNumbers(b.slopes, slopeStart(b, at), y.slopes, slopeStart(y, at), y.width);
    },
  },
  mul: {
    reads: true,
    run({ y, a, b }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const B = b.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = A[j + u] * B[k + u];
    },
    back({ y, a, b }, at) {
      const { slopes: dY, width } = y;
      const A = a.data;
      const B = b.data;
      const dA = a.slopes;
      const dB = b.slopes;
      const j = startOf(a, at);
      const k = startOf(b, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      const dk = slopeStart(b, at);
      for (let u = 0; u < width; u += 1) {
        dA[dj + u] += dY[di + u] * B[k + u];
        dB[dk + u] += dY[di + u] * A[j + u];
      }
    },
  },
  div: {
    reads: true,
    returns: true,
    run({ y, a, b }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const B = b.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = A[j + u] / B[k + u];
    },
    back({ y, a, b }, at) {
      const { data: Y, slopes: dY, width } = y;
      const B = b.data;
      const dA = a.slopes;
      const dB = b.slopes;
      const i = startOf(y, at);
      const k = startOf(b, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      const dk = slopeStart(b, at);
      for (let u = 0; u < width; u += 1) {
        const d = dY[di + u] / B[k + u];
        dA[dj + u] += d;
        dB[dk + u] -= d * Y[i + u];
      }
    },
  },
  // The last number of x, for all units.
  scalar: {
    run({ y, a }, at) {
      const i = startOf(y, at);
      y.data.fill(a.data[startOf(a, at) + a.width - 1], i, i + y.width);
    },
    back({ y, a }, at) {
      const last = slopeStart(a, at) + a.width - 1;
      const di = slopeStart(y, at);
      for (let u = 0; u < y.width; u += 1) a.slopes[last] += y.slopes[di + u];
    },
  },
  sub: {
    run({ y, a, b }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const B = b.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = A[j + u] - B[k + u];
    },
    back({ y, a, b }, at) {
      const { slopes: dY, width } = y;
      const dB = b.slopes;
      const di = slopeStart(y, at);
      const dk = slopeStart(b, at);
      addNumbers(a.slopes, slopeStart(a, at), dY, di, width);
      for (let u = 0; u < width; u += 1) dB[dk + u] -= dY[di + u];
    },
  },
  exp: {
    returns: true,
    run({ y, a }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = Math.exp(A[j + u]);
    },
    back({ y, a }, at) {
      const { data: Y, slopes: dY, width } = y;
      const dA = a.slopes;
      const i = startOf(y, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < width; u += 1) dA[dj + u] += dY[di + u] * Y[i + u];
    },
  },
  log_sigmoid: {
    returns: true,
    run({ y, a }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = Math.min(A[j + u], 0) - Math.log1p(Math.exp(-Math.abs(A[j + u])));
    },
    back({ y, a }, at) {
      const { data: Y, slopes: dY, width } = y;
      const dA = a.slopes;
      const i = startOf(y, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < width; u += 1) dA[dj + u] -= dY[di + u] * Math.expm1(Y[i + u]);
    },
  },
  maximum: {
    reads: true,
    run({ y, a, b }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const B = b.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = Math.max(A[j + u], B[k + u]);
    },
    back({ y, a, b }, at) {
      const { slopes: dY, width } = y;
      const A = a.data;
      const B = b.data;
      const dA = a.slopes;
      const dB = b.slopes;
      const j = startOf(a, at);
      const k = startOf(b, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      const dk = slopeStart(b, at);
      for (let u = 0; u < width; u += 1) {
        const difference = A[j + u] - B[k + u];
        const share = difference === 0 ? 0.5 : difference > 0 ? 1 : 0;
        dA[dj + u] += share * dY[di + u];
        dB[dk + u] += (1 - share) * dY[di + u];
      }
    },
  },
  // b where a isn't 0, else c; 0 without it.
  select: {
    reads: true,
    run({ y, a, b, c }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = startOf(b, at);
      const l = c ? startOf(c, at) : 0;
      for (let u = 0; u < width; u += 1) Y[i + u] = A[j + u] !== 0 ? b.data[k + u] : c ? c.data[l + u] : 0;
    },
    back({ y, a, b, c }, at) {
      const { slopes: dY, width } = y;
      const A = a.data;
      const j = startOf(a, at);
      const di = slopeStart(y, at);
      const dk = slopeStart(b, at);
      const dl = c ? slopeStart(c, at) : 0;
      for (let u = 0; u < width; u += 1) {
        if (A[j + u] !== 0) b.slopes[dk + u] += dY[di + u];
        else if (c) c.slopes[dl + u] += dY[di + u];
      }
    },
  },
  one_minus: {
    run({ y, a }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = 1 - A[j + u];
    },
    back({ y, a }, at) {
      const { slopes: dY, width } = y;
      const dA = a.slopes;
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < width; u += 1) dA[dj + u] -= dY[di + u];
    },
  },
  clip: {
    reads: true,
    run({ y, a, given: bound }, at) {
      const { data: Y, width } = y;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = betweenOf(A[j + u], -bound, bound);
    },
    back({ y, a, given: bound }, at) {
      const { slopes: dY, width } = y;
      const A = a.data;
      const dA = a.slopes;
      const j = startOf(a, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < width; u += 1) if (Math.abs(A[j + u]) < bound) dA[dj + u] += dY[di + u];
    },
  },
  activation: {
    reads: true,
    returns: true,
    run({ y, a, given }, at) {
      const { data: Y, width } = y;
      const { f, alpha, beta } = given;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < width; u += 1) Y[i + u] = f(A[j + u], alpha, beta);
    },
    back({ y, a, given }, at) {
      const { data: Y, slopes: dY, width } = y;
      const { slope, alpha, beta } = given;
      const A = a.data;
      const dA = a.slopes;
      const i = startOf(y, at);
      const j = startOf(a, at);
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < width; u += 1) dA[dj + u] += dY[di + u] * slope(A[j + u], Y[i + u], alpha, beta);
    },
  },
  norm: {
    returns: true,
    run({ y, a, given }, at) {
      const { parts, epsilon, deviations, every } = given;
      const Y = y.data;
      const A = a.data;
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < y.width; u += 1) Y[i + u] = A[j + u];
      parts.forEach(([from, width], n) => {
        deviations[at * every + n] = normaliseRow(Y, i + from, width, null, 0, null, epsilon, null, 0);
      });
    },
    back({ y, a, given }, at) {
      const { parts, deviations, every } = given;
      const i = startOf(y, at);
      const di = slopeStart(y, at);
      parts.forEach(([from, width], n) => {
        const deviation = deviations[at * every + n];
        normaliseRowBack(y.slopes, di + from, width, null, 0, null, null, y.data, i + from, deviation);
      });
      addNumbers(a.slopes, slopeStart(a, at), y.slopes, di, y.width);
    },
  },
  // a·numbers[0] + numbers[1].
  affine: {
    run({ y, a, given: [factor, term] }, at) {
      const i = startOf(y, at);
      const j = startOf(a, at);
      for (let u = 0; u < y.width; u += 1) y.data[i + u] = factor * a.data[j + u] + term;
    },
    back({ y, a, given: [factor] }, at) {
      const di = slopeStart(y, at);
      const dj = slopeStart(a, at);
      for (let u = 0; u < y.width; u += 1) a.slopes[dj + u] += factor * y.slopes[di + u];
    },
  },
  // b times the number in a of each head; without b, that number.
  scaled: {
    reads: true,
    run({ y, a, b }, at) {
      const i = startOf(y, at);
      const j = startOf(a, at);
      const k = b ? startOf(b, at) : 0;
      const each = y.width / a.width;
      for (let u = 0; u < y.width; u += 1) y.data[i + u] = a.data[j + Math.floor(u / each)] * (b ? b.data[k + u] : 1);
    },
    back({ y, a, b }, at) {
      const [i, j] = [slopeStart(y, at), slopeStart(a, at)];
      const [k, first] = b ? [startOf(b, at), startOf(a, at)] : [0, 0];
      const each = y.width / a.width;
      for (let u = 0; u < y.width; u += 1) {
        const head = Math.floor(u / each);
        a.slopes[j + head] += y.slopes[i + u] * (b ? b.data[k + u] : 1);
        if (b) b.slopes[slopeStart(b, at) + u] += y.slopes[i + u] * a.data[first + head];
      }
    },
  },
  // The products of the numbers of a with those of b, a matrix for each head.
  outer: {
    reads: true,
    run({ y, a, b, given: heads }, at) {
      const [i, j, k] = [y, a, b].map((v) => startOf(v, at));
      y.data.fill(0, i, i + y.width);
      eachHead(heads, a, b, (m, v, w, rows, columns) => addOuter(y.data, i + m, columns, a.data, j + v, rows, b.data, k + w, columns));
    },
    back({ y, a, b, given: heads }, at) {
      const [j, k] = [a, b].map((v) => startOf(v, at));
      const [di, dj, dk] = [y, a, b].map((v) => slopeStart(v, at));
      eachHead(heads, a, b, (m, v, w, rows, columns) => {
        addProductBack(a.slopes, dj + v, rows, y.slopes, di + m, columns, columns, b.data, k + w);
        addProduct(b.slopes, dk + w, a.data, j + v, rows, y.slopes, di + m, columns, columns);
      });
    },
  },
  // The matrix of each head in a, transposed, times b.
  contract: {
    reads: true,
    run({ y, a, b, given: heads }, at) {
      const [i, j, k] = [y, a, b].map((v) => startOf(v, at));
      y.data.fill(0, i, i + y.width);
      eachHead(heads, b, y, (m, v, w, rows, columns) => addProduct(y.data, i + w, b.data, k + v, rows, a.data, j + m, columns, columns));
    },
    back({ y, a, b, given: heads }, at) {
      const [j, k] = [a, b].map((v) => startOf(v, at));
      const [di, dj, dk] = [y, a, b].map((v) => slopeStart(v, at));
      eachHead(heads, b, y, (m, v, w, rows, columns) => {
        addOuter(a.slopes, dj + m, columns, b.data, k + v, rows, y.slopes, di + w, columns);
        addProductBack(b.slopes, dk + v, rows, a.data, j + m, columns, columns, y.slopes, di + w);
      });
    },
  },
};

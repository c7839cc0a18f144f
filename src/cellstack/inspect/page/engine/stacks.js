// Stacks of cells, with masks, resets, residual sums and directions.

import { addNumbers } from "./products.js";
import { CellPass } from "./cells.js";
import { CellBack } from "./cells_back.js";

// The last step of each sequence but the last one: the first step of that sequence in a backward direction.
export function fromTheEnd(reset, B, T) {
  if (reset === null) return null;
  const back = new Uint8Array(B * T);
  for (let row = 0; row < B; row += 1) for (let t = 0; t + 1 < T; t += 1) back[row * T + t] = reset[row * T + t + 1];
  return back;
}

// For each step, the last used step up to it since the row or its sequence began; -1 where there is none.
function lastUsed(mask, reset, B, T, reverse) {
  const found = new Int32Array(B * T);
  for (let row = 0; row < B; row += 1) {
    let last = -1;
    for (let n = 0; n < T; n += 1) {
      const at = row * T + (reverse ? T - 1 - n : n);
      if (reset !== null && reset[at]) last = -1;
      if (mask === null || mask[at]) last = at;
      found[at] = last;
    }
  }
  return found;
}

// A stack over a flow: its layers, and y [B, T, W] in the order of time, or [B, W] for its last step.
export function runStack(cells, settings, flow, states, patches, { pre, keep }) {
  const [B, T] = flow.x.shape;
  const { mask } = flow;
  const reverse = settings.go_backwards;
  const reset = reverse ? fromTheEnd(flow.reset, B, T) : flow.reset;
  let x = flow.x.data;
  const layers = cells.map((cell, n) => {
    const options = { state: states[n], mask, reset, reverse, patches: patches[n], pre, keep };
    const pass = new (cell.pass ?? CellPass)(cell, x, B, T, options);
    const { sizes: { h: P }, fields: { h: { data: h } } } = pass;
    const added = settings.residual && n > 0 && cell.spec.input_size === P;
    const from = added ? lastUsed(mask, reset, B, T, reverse) : null;
    if (added) {
      const y = new Float64Array(B * T * P);
      for (let at = 0; at < B * T; at += 1) {
        for (let u = 0; u < P; u += 1) {
          const source = from[at] * P + u;
          y[at * P + u] = from[at] < 0 ? h[at * P + u] : h[source] + x[source];
        }
      }
      x = y;
    } else {
      x = h;
    }
    return { pass, from };
  });
  const W = layers.at(-1).pass.sizes.h;
  const zeroed = settings.zero_output_for_mask && mask !== null;
  if (settings.return_sequences) {
    const y = x.slice();
    for (let at = 0; zeroed && at < B * T; at += 1) if (!mask[at]) y.fill(0, at * W, (at + 1) * W);
    return { layers, y: { data: y, shape: [B, T, W] } };
  }
  if (T === 0) return { layers, y: { data: layers.at(-1).pass.after.h.slice(), shape: [B, W] } };
  const y = new Float64Array(B * W);
  for (let row = 0; row < B; row += 1) {
    const at = row * T + (reverse ? 0 : T - 1);
    if (!zeroed || mask[at]) y.set(x.subarray(at * W, (at + 1) * W), row * W);
  }
  return { layers, y: { data: y, shape: [B, W] } };
}

// Backward pass of `runStack`: dy is the gradient of y, or null; dfields: gradients of the fields of each cell.
export function backStack(layers, settings, flow, dy, dfields) {
  const [B, T] = flow.x.shape;
  const { mask } = flow;
  const W = layers.at(-1).pass.sizes.h;
  const zeroed = settings.zero_output_for_mask && mask !== null;
  let above = dy === null ? null : new Float64Array(B * T * W);
  let after = null;
  if (dy !== null && settings.return_sequences) {
    above.set(dy);
    for (let at = 0; zeroed && at < B * T; at += 1) if (!mask[at]) above.fill(0, at * W, (at + 1) * W);
  } else if (dy !== null && T === 0) {
    after = dy;
  } else if (dy !== null) {
    for (let row = 0; row < B; row += 1) {
      const at = row * T + (settings.go_backwards ? 0 : T - 1);
      if (!zeroed || mask[at]) above.set(dy.subarray(row * W, (row + 1) * W), at * W);
    }
  }
  const found = [];
  for (let n = layers.length - 1; n >= 0; n -= 1) {
    const { pass, from } = layers[n];
    let dh = above;
    let dx = null;
    if (from !== null && above !== null) {
      const P = pass.sizes.h;
      dh = new Float64Array(B * T * P);
      dx = new Float64Array(B * T * P);
      for (let at = 0; at < B * T; at += 1) {
        for (let u = 0; u < P; u += 1) {
          const source = (from[at] < 0 ? at : from[at]) * P + u;
          dh[source] += above[at * P + u];
          if (from[at] >= 0) dx[source] += above[at * P + u];
        }
      }
    }
    const back = new CellBack(pass, dh, n === layers.length - 1 ? after : null, dfields[n]);
    if (dx !== null) addNumbers(back.dx, 0, dx, 0, dx.length);
    found[n] = back;
    above = back.dx;
  }
  return found;
}

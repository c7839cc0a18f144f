// The backward pass of cells.

import { addNumbers } from "./products.js";
import { byName, copy, isPart } from "./cells.js";
import { slopeStart } from "./operations.js";
import { patchedBack } from "./patches.js";

const zeroed = (arrays) => byName(arrays, (like) => new Float64Array((like.data ?? like).length));

// Backpropagation through a `CellPass` with `keep`: its operations backwards, last to first.
export class CellBack {
  // Gradients: dh [B, T, P] of the output h, dafter [B, P] of h after the last step, dfields { gate, …, h: [B, T, ·] } of
  // the fields; each may be null.
  constructor(pass, dh, dafter, dfields) {
    const { B, cell, fields } = pass;
    const { pre, ...recorded } = fields;
    Object.assign(this, { pass, dh, dfields: dfields ?? {} });
    this.dx = new Float64Array(pass.x.length);
    this.darrays = zeroed(cell.arrays);
    this.dstate = zeroed(pass.after);
    this.by = zeroed(recorded);
    this.now = zeroed(pass.now);
    this.compile();
    for (let row = 0; row < B; row += 1) {
      for (const { name } of pass.states) this.now[name].fill(0);
      if (dafter !== null) addNumbers(this.now.h, 0, dafter, row * this.now.h.length, this.now.h.length);
      this.backRow(row);
      for (const { name, size } of pass.states) this.dstate[name].set(this.now[name], row * size);
      if (pass.state === null) this.toInitial();
    }
  }

  // Where the gradient of each value is: those of one step are in one array.
  compile() {
    const { pass, darrays, dx } = this;
    const { vectors } = pass;
    const all = new Float64Array(vectors.reduce((sum, { width }) => sum + width, 0));
    let length = 0;
    pass.cell.form.values.forEach(({ operation, name, of: [source] }, n) => {
      const vector = vectors[n];
      const place = (slopes, slopesFrom, slopesStride) => Object.assign(vector, { slopes, slopesFrom, slopesStride });
      const parent = vectors[source];
      if (vector === parent) return;
      if (operation === "x") place(dx, 0, vector.width);
      else if (operation === "weight") place(darrays[name], vector.from, 0);
      else if (isPart({ operation })) place(parent.slopes, parent.slopesFrom + vector.from - parent.from, parent.slopesStride);
      else {
        place(all, length, 0);
        length += vector.width;
      }
    });
    this.step = all.subarray(0, length);
    this.froze = byName(pass.patches, (_, name) => new Float64Array(pass.fields[name].shape[2]));
    for (const { given } of pass.operations) if (given?.matrix) given.slopes = darrays[given.name];
  }

  backRow(row) {
    const { pass, now, dfields, by } = this;
    const { T, mask, reset, reverse, states, operations } = pass;
    pass.row = row;
    for (const froze of Object.values(this.froze)) froze.fill(0);
    const lasts = this.lastsOf(row);
    for (let n = T - 1; n >= 0; n -= 1) {
      const t = reverse ? T - 1 - n : n;
      const at = row * T + t;
      for (const { name, size } of states) {
        if (name === "h" && this.dh !== null) addNumbers(now[name], 0, this.dh, at * size, size);
        if (dfields[name]) addNumbers(now[name], 0, dfields[name], at * size, size);
        by[name]?.set(now[name], at * size);
      }
      if (mask === null || mask[at]) {
        pass.t = t;
        pass.last = lasts[t];
        this.step.fill(0);
        for (const state of states) this.finishBack(state, at);
        for (let k = operations.length - 1; k >= 0; k -= 1) {
          const operation = operations[k];
          if (operation.back !== null) operation.back(operation, at);
          else this.recordBack(operation, at);
        }
        for (const { name, size, before } of states) copy(now[name], 0, before.slopes, before.slopesFrom, size);
      }
      if (reset !== null && reset[at]) {
        this.toInitial();
        for (const { name } of states) now[name].fill(0);
      }
    }
  }

  // Add the gradient of the state that the run began with to that of the learned initial state.
  toInitial() {
    for (const { name, size } of this.pass.states) {
      const slopes = this.darrays[`initial_${name}`];
      if (slopes) addNumbers(slopes, 0, this.now[name], 0, size);
    }
  }

  // For each step, the previous used step; -1 where there is none.
  lastsOf(row) {
    const { T, mask, reverse } = this.pass;
    const lasts = new Int32Array(T);
    let last = -1;
    for (let n = 0; n < T; n += 1) {
      const t = reverse ? T - 1 - n : n;
      lasts[t] = last;
      if (mask === null || mask[row * T + t]) last = t;
    }
    return lasts;
  }

  // From the gradient of a state after the step to those of the value before zoneout, and of the state before.
  finishBack({ name, size, kept, value, before, patches }, at) {
    const { pass } = this;
    const [dnow, i, j] = [this.now[name], slopeStart(value, at), slopeStart(before, at)];
    if (patches !== null) patchedBack(patches, dnow, 0, pass.row, pass.t, before.slopes, j);
    for (let u = 0; u < size; u += 1) value.slopes[i + u] += (1 - kept) * dnow[u];
    if (kept) for (let u = 0; u < size; u += 1) before.slopes[j + u] += kept * dnow[u];
  }

  // From the gradient of a gate, or of a state that the step uses, to that of its operand.
  recordBack({ y, a, given: { name, list, before, kept } }, at) {
    const { pass } = this;
    const i = slopeStart(y, at);
    if (before === null && this.dfields[name]) addNumbers(y.slopes, i, this.dfields[name], at * y.width, y.width);
    if (before === null && list !== null) {
      addNumbers(y.slopes, i, this.froze[name], 0, y.width);
      this.froze[name].fill(0);
    }
    if (!kept) copy(this.by[name], at * y.width, y.slopes, i, y.width);
    if (list !== null && before !== null) patchedBack(list, y.slopes, i, pass.row, pass.t, before.slopes, slopeStart(before, at));
    else if (list !== null) patchedBack(list, y.slopes, i, pass.row, pass.t, this.froze[name], pass.last < 0 ? -1 : 0);
    if (y !== a) addNumbers(a.slopes, slopeStart(a, at), y.slopes, i, y.width);
  }
}

// The backward pass of cells.

import { addNumbers, addOuter, addProductBack, normaliseRowBack } from "./products.js";
import { patchedBack } from "./cells.js";

// Backpropagation through a `CellPass` with `keep`: the chain rule on its lines, last to first.
export class CellBack {
  // Gradients: dh [B, T, P] of the output h, dafter [B, P] of h after the last step, dfields { gate, c, h: [B, T, ·] } of
  // the fields; each may be null.
  constructor(pass, dh, dafter, dfields) {
    const { B, T, H, P, G, cell, spec } = pass;
    Object.assign(this, { pass, dh, dfields: dfields ?? {} });
    this.dx = new Float64Array(pass.x.length);
    this.darrays = Object.fromEntries(
      Object.entries(cell.arrays).map(([name, { data }]) => [name, new Float64Array(data.length)]),
    );
    this.dstate = { h: new Float64Array(B * P), c: pass.lstm ? new Float64Array(B * H) : null };
    this.by = Object.fromEntries(pass.names.map((gate) => [gate, new Float64Array(B * T * H)]));
    if (pass.lstm) this.by.c = new Float64Array(B * T * H);
    this.by.h = new Float64Array(B * T * P);
    this.froze = Object.fromEntries(pass.names.map((gate) => [gate, new Float64Array(H)]));
    this.now = { h: new Float64Array(P), c: new Float64Array(H) };
    this.to = { h: new Float64Array(P), c: new Float64Array(H) }; // of the state before the step
    this.scratch = {
      dz: new Float64Array(G * H),
      dq: new Float64Array(G * H),
      m: new Float64Array(H),
      dm: new Float64Array(H),
      dseen: new Float64Array(H),
      dhNew: new Float64Array(P),
      dgate: new Float64Array(H),
    };
    for (let row = 0; row < B; row += 1) {
      this.now.h.fill(0);
      this.now.c.fill(0);
      if (dafter !== null) addNumbers(this.now.h, 0, dafter, row * P, P);
      this.backRow(row);
      this.dstate.h.set(this.now.h, row * P);
      if (pass.lstm) this.dstate.c.set(this.now.c, row * H);
      if (pass.state === null && spec.learn_initial_state) this.toInitial();
    }
  }

  toInitial() {
    addNumbers(this.darrays.initial_h, 0, this.now.h, 0, this.pass.P);
    if (this.pass.lstm) addNumbers(this.darrays.initial_c, 0, this.now.c, 0, this.pass.H);
  }

  backRow(row) {
    const { pass, now, to, dfields } = this;
    const { T, P, H, mask, reset, lstm, spec } = pass;
    for (const gate of pass.names) this.froze[gate].fill(0);
    const lasts = this.lastsOf(row);
    for (let n = T - 1; n >= 0; n -= 1) {
      const t = pass.reverse ? T - 1 - n : n;
      const at = row * T + t;
      if (this.dh !== null) addNumbers(now.h, 0, this.dh, at * P, P);
      if (dfields.h) addNumbers(now.h, 0, dfields.h, at * P, P);
      if (lstm && dfields.c) addNumbers(now.c, 0, dfields.c, at * H, H);
      this.by.h.set(now.h, at * P);
      if (lstm) this.by.c.set(now.c, at * H);
      if (mask === null || mask[at]) {
        to.h.fill(0);
        to.c.fill(0);
        this.leaveBack(row, t);
        if (lstm) this.backLSTM(row, t, at, lasts[t]);
        else if (spec.kind === "gru") this.backGRU(row, t, at, lasts[t]);
        else this.backRNN(row, t, at, lasts[t]);
        now.h.set(to.h);
        now.c.set(to.c);
      }
      if (reset !== null && reset[at]) {
        if (spec.learn_initial_state) this.toInitial();
        now.h.fill(0);
        now.c.fill(0);
      }
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

  patchBack(gate, dv, at, row, t, dbefore, from) {
    const list = this.pass.patches[gate];
    if (list !== undefined) patchedBack(list, dv, at, row, t, dbefore, from);
  }

  // From now.h, the gradient of the step's final h, to dhNew and the previous h.
  leaveBack(row, t) {
    const { now, to, scratch } = this;
    const { P, spec } = this.pass;
    this.patchBack("h", now.h, 0, row, t, to.h, 0);
    const kept = spec.zoneout;
    for (let u = 0; u < P; u += 1) {
      scratch.dhNew[u] = (1 - kept) * now.h[u];
      to.h[u] += kept * now.h[u];
    }
  }

  // From dgate, the gradient of a gate, to its pre-activations in dz[zAt…]; null where it has none.
  activateBack(gate, dgate, dz, zAt, row, t, at, last) {
    const { H, slopes } = this.pass;
    const froze = this.froze[gate];
    const own = this.dfields[gate];
    for (let u = 0; u < H; u += 1) {
      dgate[u] += froze[u] + (own ? own[at * H + u] : 0);
      froze[u] = 0;
    }
    this.by[gate].set(dgate, at * H);
    this.patchBack(gate, dgate, 0, row, t, froze, last);
    if (dz !== null) for (let u = 0; u < H; u += 1) dz[zAt + u] = dgate[u] * slopes[gate][at * H + u];
  }

  // From dout, the gradient of `CellPass.product`, to its array and to dv[vAt…]; dout is overwritten.
  productBack(name, dout, v, vAt, n, at, dv, dvAt, columns = this.pass.G * this.pass.H) {
    const { pass, darrays } = this;
    const { arrays } = pass.cell;
    const wide = pass.G * pass.H;
    if (pass.spec.layer_norm) {
      const [key, gain] = name === "kernel" ? ["a", "kernel_gain"] : ["b", "recurrent_gain"];
      const cuts = pass.spec.kind === "gru" ? [0, 2 * pass.H, wide] : [0, wide];
      const unit = pass.units[key];
      for (let part = 0; part + 1 < cuts.length; part += 1) {
        const [from, to] = [cuts[part], cuts[part + 1]];
        const deviation = pass.deviations[key][at * 2 + part];
        const [g, dg] = [arrays[gain].data, darrays[gain]];
        normaliseRowBack(dout, from, to - from, g, from, dg, null, unit, at * wide + from, deviation);
      }
    }
    addOuter(darrays[name], 0, wide, v, vAt, n, dout, 0, columns);
    addProductBack(dv, dvAt, n, arrays[name].data, 0, wide, columns, dout, 0);
  }

  backLSTM(row, t, at, last) {
    const { pass, darrays, now, to } = this;
    const { H, P, G, spec, gates } = pass;
    const { arrays } = pass.cell;
    const { dz, dq, m, dm, dseen, dhNew, dgate } = this.scratch;
    const n = at * H;
    if (spec.proj_size) {
      for (let u = 0; u < H; u += 1) m[u] = gates.o[n + u] * pass.cAct[n + u];
      dm.fill(0);
      addOuter(darrays.projection, 0, P, m, 0, H, dhNew, 0, P);
      addProductBack(dm, 0, H, arrays.projection.data, 0, P, P, dhNew, 0);
    } else {
      dm.set(dhNew);
    }
    for (let u = 0; u < H; u += 1) {
      dgate[u] = dm[u] * pass.cAct[n + u];
      dseen[u] = dm[u] * gates.o[n + u] * pass.slopes.cell[n + u];
    }
    if (spec.layer_norm) {
      const [gain, dgain] = [arrays.cell_gain.data, darrays.cell_gain];
      normaliseRowBack(dseen, 0, H, gain, 0, dgain, darrays.cell_bias, pass.units.c, n, pass.deviations.c[at]);
    }
    const o = (G - 1) * H;
    this.activateBack("o", dgate, dz, o, row, t, at, last);
    if (spec.peepholes) {
      const [p, dp] = [arrays.peepholes.data, darrays.peepholes];
      for (let u = 0; u < H; u += 1) {
        dp[o - H + u] += dz[o + u] * pass.seen[n + u];
        dseen[u] += dz[o + u] * p[o - H + u];
      }
    }
    const kept = spec.zoneout_cell;
    if (kept === 0) addNumbers(this.by.c, n, dseen, 0, H); // o and φ use the kept c
    this.patchBack("c", dseen, 0, row, t, to.c, 0);
    this.patchBack("c", now.c, 0, row, t, to.c, 0);
    for (let u = 0; u < H; u += 1) {
      const inside = pass.inside[n + u];
      const dc = inside ? dseen[u] + (1 - kept) * now.c[u] : 0; // of f⊙c_prev + i⊙g
      to.c[u] += kept * now.c[u] + dc * gates.f[n + u];
      dseen[u] = dc;
    }
    for (let u = 0; u < H; u += 1) dgate[u] = dseen[u] * pass.cBefore[n + u];
    this.activateBack("f", dgate, spec.coupled ? null : dz, H, row, t, at, last);
    for (let u = 0; u < H; u += 1) dm[u] = dseen[u] * gates.g[n + u] - (spec.coupled ? dgate[u] : 0);
    this.activateBack("i", dm, dz, 0, row, t, at, last);
    for (let u = 0; u < H; u += 1) dgate[u] = dseen[u] * gates.i[n + u];
    this.activateBack("g", dgate, dz, o - H, row, t, at, last);
    if (spec.peepholes) {
      const [p, dp] = [arrays.peepholes.data, darrays.peepholes];
      for (let u = 0; u < (spec.coupled ? H : 2 * H); u += 1) {
        const unit = u < H ? u : u - H;
        dp[u] += dz[u] * pass.cBefore[n + unit];
        to.c[unit] += dz[u] * p[u];
      }
    }
    this.sumsBack(at, dz, dq);
  }

  // From dz, the gradient of the kernel's product plus the recurrent kernel's plus bias, to all of these.
  sumsBack(at, dz, dq) {
    const { pass, darrays } = this;
    const { spec, P } = pass;
    if (spec.use_bias) addNumbers(darrays.bias, 0, dz, 0, dz.length);
    dq.set(dz);
    this.productBack("kernel", dq, pass.x, at * spec.input_size, spec.input_size, at, this.dx, at * spec.input_size);
    this.productBack("recurrent_kernel", dz, pass.hBefore, at * P, P, at, this.to.h, 0);
  }

  backGRU(row, t, at, last) {
    const { pass, darrays, to } = this;
    const { H, spec, gates } = pass;
    const { arrays } = pass.cell;
    const { dz: da, dq, m, dm, dseen: dr, dhNew, dgate } = this.scratch;
    const n = at * H;
    const wide = 3 * H;
    for (let u = 0; u < H; u += 1) dgate[u] = dhNew[u] * (pass.hBefore[n + u] - gates.g[n + u]);
    this.activateBack("z", dgate, da, 0, row, t, at, last);
    for (let u = 0; u < H; u += 1) {
      dgate[u] = dhNew[u] * (1 - gates.z[n + u]);
      to.h[u] += dhNew[u] * gates.z[n + u];
    }
    this.activateBack("g", dgate, da, 2 * H, row, t, at, last);
    if (spec.reset_after) {
      for (let u = 0; u < H; u += 1) {
        dr[u] = da[2 * H + u] * pass.q[n + u];
        dq[2 * H + u] = da[2 * H + u] * gates.r[n + u];
      }
    } else {
      for (let u = 0; u < H; u += 1) m[u] = gates.r[n + u] * pass.hBefore[n + u];
      dm.fill(0);
      addOuter(darrays.recurrent_kernel, 2 * H, wide, m, 0, H, da, 2 * H, H);
      addProductBack(dm, 0, H, arrays.recurrent_kernel.data, 2 * H, wide, H, da, 2 * H);
      for (let u = 0; u < H; u += 1) {
        dr[u] = dm[u] * pass.hBefore[n + u];
        to.h[u] += dm[u] * gates.r[n + u];
      }
    }
    this.activateBack("r", dr, da, H, row, t, at, last);
    for (let u = 0; u < 2 * H; u += 1) dq[u] = da[u];
    if (spec.use_bias) {
      addNumbers(darrays.bias, 0, da, 0, wide);
      if (spec.reset_after) addNumbers(darrays.bias, wide, dq, 0, wide);
    }
    this.productBack("recurrent_kernel", dq, pass.hBefore, n, H, at, to.h, 0, spec.reset_after ? wide : 2 * H);
    this.productBack("kernel", da, pass.x, at * spec.input_size, spec.input_size, at, this.dx, at * spec.input_size);
  }

  backRNN(row, t, at, last) {
    const { dz, dq, dhNew, dgate } = this.scratch;
    dgate.set(dhNew);
    this.activateBack("g", dgate, dz, 0, row, t, at, last);
    this.sumsBack(at, dz, dq);
  }
}

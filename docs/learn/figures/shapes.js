// The shapes of what a layer, or a stack of two, returns; and a sequence that is cut in two.

import { planeOf } from "../../../src/cellstack/inspect/page/data.js";
import { scaleOf } from "../../../src/cellstack/inspect/page/draw.js";
import { run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { cellOf, figure, networkOf } from "./common.js";

// Arbitrary weights, always the same.
const waves = (name, count) => Array.from({ length: count }, (_, n) => (name === "bias" ? 0 : 0.8 * Math.sin(3 * n + count)));

figure("shapes", (page) => {
  const sizes = [["rows, B", [1, 4, 1], 2], ["steps, T", [1, 8, 1], 3], ["features, I", [1, 8, 1], 6], ["units, H", [1, 8, 1], 4], ["units of a second layer, 0 for none", [0, 8, 1], 0]];
  const sliders = sizes.map(([label, range, value]) => page.slider(label, range, value));
  const cut = page.slider("steps in the first part, 0 for one part", [0, 7, 1], 0);
  const sequences = page.checkbox("return_sequences", true);
  const states = page.checkbox("return_state", true);
  const passed = page.checkbox("pass the state to the second part", true);
  const tell = page.numbers();
  const say = page.sentence();
  const tiles = page.tiles("The output for the first sequence: a line for each unit, steps to the right");
  return () => {
    const [B, T, I, H, second] = sliders.map((slider) => slider.value);
    const widths = second ? [H, second] : [H];
    const network = networkOf(...widths.map((units, n) => cellOf("lstm", units, n ? widths[n - 1] : I, waves)));
    const number = (row, step, feature) => 0.8 * Math.sin(3 * (64 * row + 8 * step + feature)); // whatever T is
    const part = (from, to, state) => {
      const steps = Array.from({ length: B * (to - from) }, (_, n) => [Math.floor(n / (to - from)), from + (n % (to - from))]);
      const data = Float64Array.from(steps.flatMap(([row, step]) => Array.from({ length: I }, (_, feature) => number(row, step, feature))));
      return run(network, { input: { data, shape: [B, to - from, I] } }, { state });
    };
    const whole = part(0, T, null);
    const shape = (...axes) => `[${axes.join(", ")}]`;
    const last = widths.at(-1);
    const named = { x: shape(B, T, I), output: sequences.checked ? shape(B, T, last) : shape(B, last) };
    if (states.checked) widths.forEach((units, n) => ["h", "c"].forEach((name) => { named[widths.length > 1 ? `${name} of layer ${n + 1}` : name] = shape(B, units); }));
    tell(named);
    const { data } = whole.values[network.outputs[0]];
    const first = sequences.checked ? data.slice(0, T * last) : data.slice((T - 1) * last, T * last);
    tiles(planeOf({ data: first, shape: [1, first.length / last, last] }, 0), scaleOf(false, { low: -1, high: 1 }), null);
    if (cut.value === 0 || cut.value >= T) {
      say(cut.value === 0 ? "One part: the state begins with zeros." : `One part: a sequence of ${T} steps has no second part after ${cut.value}.`);
      return;
    }
    const { state } = part(0, cut.value, null);
    const after = part(cut.value, T, passed.checked ? state : null).state;
    const far = Math.max(...after.flatMap((cell, n) => ["h", "c"].flatMap((name) => Array.from(cell[name].data, (value, k) => Math.abs(value - whole.state[n][name].data[k])))));
    say(far === 0 ? "Two parts: the final state is that of the whole sequence, to the last bit." : `Two parts: the final state differs from that of the whole sequence by up to ${far.toFixed(4)}.`);
  };
});

// A stack of two LSTMs that the chapter has trained: what each layer sees, and how far a change of the input gets.

import { planeOf } from "../../../src/cellstack/inspect/page/data.js";
import { scaleOf } from "../../../src/cellstack/inspect/page/draw.js";
import { readNetwork, run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { isGate, meaningOf } from "../../../src/cellstack/inspect/page/view.js";
import { figure, inputOf } from "./common.js";

figure("stack", (page) => {
  const network = readNetwork(page.given.network);
  const layers = network.nodes.filter(({ cells }) => cells.length);
  const x = page.given.x.flat(); // the wave and the pulse of each step
  const steps = page.given.x.length;
  const { form } = layers[0].cells[0];
  const layer = page.select("Layer", layers.map((_, n) => [String(n), `layer ${n + 1}`]), "0");
  const field = page.select("Gate or state", ["f", "i", "g", "o", "c", "h"].map((name) => [name, `${name}, ${meaningOf(form, name).split(":")[0]}`]), "c");
  const pulse = page.checkbox("add a pulse at the changed step", false);
  const at = page.slider("changed step", [0, steps - 1, 1], 12);
  const by = page.slider("change of the wave at this step", [-2, 2, 0.1], 1);
  const output = page.chart("Input and output");
  const change = page.chart("Size of the change of h at each step, root of the mean square over the units");
  const tell = page.numbers();
  const inputs = page.tiles("What the layer sees");
  const units = page.tiles("Its units");
  const plain = run(network, inputOf(network, x), {});
  const [out] = network.outputs;
  return () => {
    const changed = [...x];
    changed[2 * at.value] += by.value;
    if (pulse.checked) changed[2 * at.value + 1] = 1;
    const after = run(network, inputOf(network, changed), {});
    const sizes = layers.map(({ name }) => Array.from({ length: steps }, (_, step) => {
      const [was, is] = [plain, after].map(({ cells }) => planeOf(cells[name][0].h, 0).column(step));
      return Math.hypot(...is.map((value, unit) => value - was[unit])) / Math.sqrt(is.length);
    }));
    const { warm, cold, muted, ink } = page.colours;
    const every = (feature) => Array.from({ length: steps }, (_, step) => changed[2 * step + feature]);
    output([
      { name: "wave", values: every(0), colour: muted },
      { name: "pulse", values: every(1), colour: cold, dash: [2, 3] },
      { name: "output before the change", values: plain.values[out].data, colour: ink, dash: [4, 3] },
      { name: "output", values: after.values[out].data, colour: warm },
    ]);
    change(sizes.map((values, n) => ({ name: `layer ${n + 1}`, values, colour: [cold, warm][n], dash: n ? [6, 3] : null })));
    tell(Object.fromEntries(sizes.map((values, n) => [`change of layer ${n + 1} at the last step`, values.at(-1)])));
    const chosen = Number(layer.value);
    const [{ name }] = [layers[chosen]];
    const seen = planeOf(chosen ? after.cells[layers[chosen - 1].name][0].h : { data: Float64Array.from(changed), shape: [1, steps, 2] }, 0);
    inputs(seen, scaleOf(false, seen.range), chosen ? null : ["wave", "pulse"]);
    const plane = planeOf(after.cells[name][0][field.value], 0);
    units(plane, scaleOf(isGate(form, field.value), plane.range), null);
  };
});

// The memory of one unit over a sequence with two marked numbers, and what each step has left in it.

import { run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { lineColour } from "../../../src/cellstack/inspect/page/draw.js";
import { contributionsOf } from "../../../src/cellstack/inspect/page/memory.js";
import { cellOf, figure, inputOf, networkOf } from "./common.js";

const MEMORY_STEPS = 40;

figure("memory", (page) => {
  const last = MEMORY_STEPS - 1;
  const bias = page.slider("forget bias", [-2, 8, 0.1], 3);
  const mark = page.slider("weight of the mark in the forget gate", [-12, 0, 0.5], 0);
  const first = page.slider("step of the first marked number, 1", [0, MEMORY_STEPS / 2 - 1, 1], 5);
  const second = page.slider("step of the second one", [MEMORY_STEPS / 2, last, 1], 20);
  const value = page.slider("value of the second one", [-1, 1, 0.1], -0.5);
  const lines = page.chart("Memory c and forget gate f at each step");
  const tell = page.numbers();
  const bars = page.bars("What each step has left in c at the last step", "left of it");
  return () => {
    const x = new Float64Array(2 * MEMORY_STEPS); // the number, and whether it is marked
    for (const [step, number] of [[first.value, 1], [second.value, value.value]]) x.set([number, 1], 2 * step);
    // Gates i, f, g, o: only a mark opens the input gate.
    const cell = cellOf("lstm", 1, 2, { kernel: [0, 0, 1, 0, 10, mark.value, 0, 0], recurrent_kernel: [0, 0, 0, 0], bias: [-5, bias.value, 0, 2] });
    const network = networkOf(cell);
    const [{ i, f, g, c }] = run(network, inputOf(network, x), {}).cells.layer_0;
    const written = i.data.map((open, step) => open * g.data[step]);
    const { parts } = contributionsOf({ kept: f.data, written, rate: 0, start: 0, fresh: 0, mask: null, reset: null, reverse: false, step: last });
    const kept = 1 / (1 + Math.exp(-bias.value)); // of a step without a mark
    const named = (field, name, values, dash) => ({ name, values, colour: lineColour(field, page.theme), dash });
    tell({ "f without a mark": kept, "half-life in steps": Math.log(0.5) / Math.log(kept), "c at the end": c.data[last], "sum of the bars": parts.reduce((sum, part) => sum + part) });
    lines([named("c", "memory c", c.data), named("f", "forget gate f", f.data, [4, 3])]);
    bars(parts);
  };
});

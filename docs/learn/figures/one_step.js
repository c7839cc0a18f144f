// One unit of an LSTM at one step: the wiring of the trace page, with sliders for what goes in.

import { CellView } from "../../../src/cellstack/inspect/page/cell.js";
import { make } from "../../../src/cellstack/inspect/page/dom.js";
import { scaleOf } from "../../../src/cellstack/inspect/page/draw.js";
import { run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { CellStep } from "../../../src/cellstack/inspect/page/formulas.js";
import { cellOf, figure, inputOf, networkOf } from "./common.js";

// The numbers that the chapter's code uses; a column for each gate i, f, g, o.
const ONE_UNIT = { kernel: [1.5, -0.5, 2, 0.5], recurrent_kernel: [0.4, 0.3, -0.6, 0.2], bias: [-0.2, 1, 0.1, -0.4] };
const GATES_OF_UNIT = ["i", "f", "g", "o"];
const PARTS = [["kernel", "weight of x"], ["recurrent_kernel", "weight of h_prev"], ["bias", "bias"]];

figure("one_step", (page) => {
  const x = page.slider("x, the input", [-3, 3, 0.1], 1);
  const h = page.slider("h_prev, the output of the previous step", [-1, 1, 0.05], 0.2);
  const c = page.slider("c_prev, the memory of the previous step", [-3, 3, 0.1], 1.5);
  const arrays = Object.fromEntries(Object.entries(ONE_UNIT).map(([name, numbers]) => [name, [...numbers]]));
  const say = page.sentence();
  const wiring = new CellView(page, page.page);
  page.add(wiring.element);
  const choices = [["i", "i, input gate"], ["f", "f, forget gate"], ["g", "g, candidate"], ["o", "o, output gate"]];
  const gate = page.select("Weights of", choices, "f", () => fill());
  page.button("Reset the weights", () => { for (const [name] of PARTS) arrays[name] = [...ONE_UNIT[name]]; fill(); });
  const weights = PARTS.map(([name, text]) => page.slider(text, [-8, 8, 0.1], 0));
  const column = () => GATES_OF_UNIT.indexOf(gate.value);
  const fill = () => PARTS.forEach(([name], n) => { weights[n].value = arrays[name][column()]; });
  fill();
  page.add(make("div", { class: "group" }, wiring.legend, wiring.meanings, wiring.numbers)); // below the controls, which stay near the drawing
  return () => {
    PARTS.forEach(([name], n) => { arrays[name][column()] = weights[n].value; });
    const cell = cellOf("lstm", 1, 1, arrays);
    const before = { h: [h.value], c: [c.value] };
    const state = Object.fromEntries(Object.entries(before).map(([name, data]) => [name, { data: Float64Array.from(data), shape: [1, 1] }]));
    const network = networkOf(cell);
    const [fields] = run(network, inputOf(network, [x.value]), { state: [state], pre: false }).cells.layer_0;
    const now = Object.fromEntries(cell.form.trace.map((name) => [name, fields[name].data]));
    const step = new CellStep(cell, { x: [x.value], before, now, names: null });
    wiring.found = { heads: 0, now, before, x: [x.value], step, masked: false, begins: null, why: null, scale: scaleOf(false, { low: -3, high: 3 }) };
    const place = { key: "one", name: "layer_0", number: 0, cell: { ...cell, units: [0], fields } };
    wiring.build(place, 0);
    wiring.fill(place, 0);
    const percent = (number) => `${Math.round(100 * number)} %`;
    say(`It keeps ${percent(now.f[0])} of its memory, writes ${percent(now.i[0])} of the candidate, and shows ${percent(now.o[0])} of tanh(c).`);
  };
});

// A sequence in parts: the state is all that a stream keeps from one to the next.

import { multiplications, readNetwork, run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { figure, inputOf } from "./common.js";

figure("use", (page) => {
  const network = readNetwork(page.given.network);
  const { x } = page.given;
  const [out] = network.outputs;
  const whole = run(network, inputOf(network, x), {}).values[out].data;
  let [state, done] = [null, []];
  const next = (count) => {
    const part = x.slice(done.length, done.length + count);
    if (!part.length) return;
    const found = run(network, inputOf(network, part), { state });
    state = found.state;
    done = [...done, ...found.values[out].data];
  };
  const size = page.slider("steps in a part", [1, 40, 1], 1);
  page.button("Next part", () => next(size.value), { class: "main" });
  page.button("All others", () => { while (done.length < x.length) next(size.value); });
  page.button("Forget the state", () => { state = null; });
  page.button("Start again", () => { [state, done] = [null, []]; });
  const say = page.sentence();
  const chart = page.chart("The output so far, on the output of the whole sequence");
  const tell = page.numbers();
  return () => {
    const { warm, cold, ink } = page.colours;
    chart([{ name: "input", values: x, colour: cold, dash: [2, 3] }, { name: "whole sequence", values: whole, colour: ink }, { name: "in parts", values: done, colour: warm }]);
    const differences = done.map((value, step) => Math.abs(value - whole[step]));
    const far = Math.max(0, ...differences);
    const kept = network.nodes.flatMap(({ cells }) => cells).reduce((sum, { spec }) => sum + 2 * spec.units, 0);
    tell({ "numbers in the state": kept, "multiplications per step": multiplications(network, 1), "output of the last step": done.at(-1) ?? "–", "its difference from the whole sequence": differences.at(-1) ?? "–" });
    const forgotten = done.length && state === null ? " The next part starts from zeros." : "";
    if (!done.length) say(`0 of ${x.length} steps.`);
    else say(`${done.length} of ${x.length} steps. ${far === 0 ? "Every output is that of the whole sequence, to the last bit." : `The outputs differ from those of the whole sequence by up to ${far.toFixed(4)}.`}${forgotten}`);
  };
});

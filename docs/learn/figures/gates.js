// The gradient of the last output with respect to each input: through a SimpleRNN and through an LSTM, of one unit each.

import { gradient } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { shown } from "../../../src/cellstack/inspect/page/dom.js";
import { cellOf, figure, inputOf, networkOf } from "./common.js";

figure("gates", (page) => {
  const steps = page.slider("T, the number of steps", [5, 100, 1], 50);
  const weight = page.slider("recurrent weight of the SimpleRNN", [0.5, 1.5, 0.01], 0.9);
  const bias = page.slider("forget bias of the LSTM", [-2, 8, 0.1], 4);
  const size = page.slider("size of the input", [0, 2, 0.1], 0);
  const draw = page.chart("Gradient of the last output with respect to x of each step: logarithm, base 10");
  const say = page.sentence();
  const tell = page.numbers();
  return () => {
    const T = steps.value;
    const x = Array.from({ length: T }, (_, t) => size.value * Math.sin(t * t)); // irregular, and always the same
    const cells = {
      SimpleRNN: cellOf("rnn", 1, 1, { kernel: [1], recurrent_kernel: [weight.value], bias: [0] }),
      LSTM: cellOf("lstm", 1, 1, { kernel: [0, 0, 1, 0], recurrent_kernel: [0, 0, 0, 0], bias: [0, bias.value, 0, 2] }),
    };
    const slopes = Object.entries(cells).map(([name, cell]) => {
      const network = networkOf(cell);
      const { inputs } = gradient(network, inputOf(network, x), {}, { value: "layer_0", row: 0, step: T - 1, unit: 0 });
      return [name, inputs.input.data];
    });
    const logs = (numbers) => Array.from(numbers, (number) => Math.log10(Math.abs(number)));
    const colours = { SimpleRNN: page.colours.cold, LSTM: page.colours.warm };
    draw(slopes.map(([name, numbers]) => ({ name, values: logs(numbers), colour: colours[name], dash: name === "LSTM" ? [6, 3] : null })));
    const ends = (name, numbers) => [[`${name}, gradient at the first input`, numbers[0]], [`${name}, gradient at the last input`, numbers[T - 1]]];
    tell(Object.fromEntries(slopes.flatMap(([name, numbers]) => ends(name, numbers))));
    const [rnn, lstm] = slopes.map(([, numbers]) => numbers[0] / numbers[T - 1]);
    say(`A small change of the first input counts ${shown(rnn, 3)} times as much as one of the last input in the SimpleRNN, and ${shown(lstm, 3)} times in the LSTM: the gradient at the first input divided by that at the last.`);
  };
});

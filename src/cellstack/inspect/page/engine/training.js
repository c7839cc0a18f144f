// The playground: tasks, and a trainer of small networks.

import { numbersIn } from "./shapes.js";
import { sigmoidOf } from "./activations.js";
import { byName, cellShapes } from "./cells.js";
import { answersOf, backNodes, runNodes, seedsOf } from "./engine.js";

/* global cellKinds */ // the form of each kind of cell with the default flags, which html.py inserts before the modules

// Numbers from 0 to below 1 by mulberry32, reproducible from the seed on every machine.
// Ref: Tommy Ettinger 2017, mulberry32, in the public domain.
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// A task draws a sequence: x(t, feature, number), and target(t, number, counted = true) at the steps with a target.
// kind: "bits", targets are 0 or 1 and the output is the probability of a 1; or "numbers", with `whole` for
// integer targets.
export const TASKS = {
  echo: {
    title: "Echo",
    text: "At every step, output the bit from some steps earlier: the network has to store several bits at once.",
    kind: "bits",
    inputs: ["bit"],
    outputs: ["the earlier bit"],
    steps: 20,
    draw(random, T, { delay }, x, target) {
      const bits = Array.from({ length: T }, () => (random() < 0.5 ? 0 : 1));
      bits.forEach((bit, t) => {
        x(t, 0, 2 * bit - 1);
        if (t >= delay) target(t, bits[t - delay]);
      });
    },
  },
  parity: {
    title: "Parity",
    text: "At every step, output whether the number of ones so far is odd: one bit of state, flipped by every one.",
    kind: "bits",
    inputs: ["bit"],
    outputs: ["odd"],
    steps: 12,
    draw(random, T, options, x, target) {
      let odd = 0;
      for (let t = 0; t < T; t += 1) {
        const bit = random() < 0.5 ? 0 : 1;
        odd ^= bit;
        x(t, 0, 2 * bit - 1);
        target(t, odd);
      }
    },
  },
  // Ref: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", sec. 5.4, experiment 4.
  adding: {
    title: "Adding",
    text: "At the end of the sequence, output the sum of the two marked numbers.",
    kind: "numbers",
    inputs: ["number", "mark"],
    outputs: ["sum"],
    steps: 20,
    draw(random, T, options, x, target) {
      const half = Math.floor(T / 2);
      const marked = [Math.floor(random() * half), half + Math.floor(random() * (T - half))];
      let sum = 0;
      for (let t = 0; t < T; t += 1) {
        const number = random();
        x(t, 0, number);
        if (marked.includes(t)) {
          x(t, 1, 1);
          sum += number;
        }
      }
      target(T - 1, sum);
    },
  },
  wave: {
    title: "A wave with pulses",
    text: "Output the value that the wave had at the last pulse; no target before the first.",
    kind: "numbers",
    inputs: ["wave", "pulse"],
    outputs: ["stored"],
    steps: 30,
    draw(random, T, options, x, target) {
      const [period, phase] = [8 + 16 * random(), 2 * Math.PI * random()];
      let stored = null;
      for (let t = 0; t < T; t += 1) {
        const wave = Math.sin((2 * Math.PI * t) / period + phase);
        const pulse = random() < 0.12;
        if (pulse) stored = wave;
        x(t, 0, wave);
        x(t, 1, pulse ? 1 : 0);
        if (stored !== null) target(t, stored);
      }
    },
  },
  brackets: {
    title: "Brackets",
    text: "Count the open brackets: a unit has to count up and down.",
    kind: "numbers",
    whole: true,
    inputs: ["(", ")", "other"],
    outputs: ["open"],
    steps: 24,
    draw(random, T, options, x, target) {
      let open = 0;
      for (let t = 0; t < T; t += 1) {
        const drawn = random();
        const symbol = drawn < 0.4 && open < 6 ? 0 : drawn >= 0.6 && open > 0 ? 1 : 2;
        open += symbol === 0 ? 1 : symbol === 1 ? -1 : 0;
        x(t, symbol, 1);
        target(t, open);
      }
    },
  },
};

// `rows` sequences of a task: input and target, and a weight of 1 where there is a target, 0 elsewhere.
function drawnTask(task, options, random, rows) {
  const { steps: T } = options;
  const [I, O] = [task.inputs.length, task.outputs.length];
  const made = (width) => ({ data: new Float64Array(rows * T * width), shape: [rows, T, width] });
  const [input, target, weight] = [made(I), made(O), made(O)];
  for (let row = 0; row < rows; row += 1) {
    const x = (t, feature, number) => {
      input.data[(row * T + t) * I + feature] = number;
    };
    const asked = (t, number) => {
      target.data[row * T + t] = number;
      weight.data[row * T + t] = 1;
    };
    task.draw(random, T, options, x, asked);
  }
  return { input, target, weight };
}

// A cell and a head, drawn uniformly within ±1/sqrt(H); the bias of a gate that keeps the state is 1, where another gate
// writes.
// Ref: Jozefowicz, Zaremba and Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", sec. 5.
function newPlayground(task, kind, units, random) {
  const O = task.outputs.length;
  const form = cellKinds[kind];
  const spec = { ...form.settings, input_size: task.inputs.length, units };
  const even = () => (2 * random() - 1) / Math.sqrt(units);
  const drawn = (shape) => ({ data: Float64Array.from({ length: numbersIn(shape) }, even), shape });
  const arrays = byName(cellShapes({ form, spec }), drawn);
  const keeps = form.blocks.findIndex((gate) => form.gates[gate] === "keep");
  if (keeps >= 0 && Object.values(form.gates).includes("write")) arrays.bias.data.fill(1, keeps * units, (keeps + 1) * units);
  const bits = task.kind === "bits";
  const nodes = [
    {
      name: kind,
      type: "recurrent",
      sources: ["input"],
      settings: { return_sequences: true, go_backwards: false, zero_output_for_mask: false, residual: false },
      arrays: {},
      cells: [{ spec, form, arrays }],
    },
    {
      name: "head",
      type: "dense",
      sources: [kind],
      settings: { input_size: units, units: O, use_bias: true, activation: "linear" },
      arrays: { kernel: drawn([units, O]), bias: { data: new Float64Array(O), shape: [O] } },
      cells: [],
    },
  ];
  if (bits) {
    const settings = { activation: "sigmoid" };
    nodes.push({ name: "output", type: "activation", sources: ["head"], settings, arrays: {}, cells: [] });
  }
  const inputs = [{ name: "input", shape: [null, task.inputs.length] }];
  return { inputs, outputs: [bits ? "output" : "head"], dtype: "float64", nodes };
}

// The loss, averaged over the targets: cross-entropy in nats for bits, squared error for numbers; its gradient with
// respect to the head's output; and the share of correct answers, null where they aren't counted.
function taskLoss(task, head, target, weight) {
  const dhead = new Float64Array(head.length);
  let [loss, asked, right] = [0, 0, 0];
  for (let n = 0; n < head.length; n += 1) asked += weight[n];
  for (let n = 0; n < head.length; n += 1) {
    if (weight[n] === 0) continue;
    const [z, wanted] = [head[n], target[n]];
    if (task.kind === "bits") {
      loss += Math.max(z, 0) - z * wanted + Math.log1p(Math.exp(-Math.abs(z)));
      dhead[n] = (sigmoidOf(z) - wanted) / asked;
      right += z > 0 === (wanted === 1) ? 1 : 0;
    } else {
      loss += (z - wanted) ** 2;
      dhead[n] = (2 * (z - wanted)) / asked;
      right += Math.round(z) === wanted ? 1 : 0;
    }
  }
  const counted = task.kind === "bits" || task.whole === true;
  return { loss: asked ? loss / asked : 0, accuracy: counted ? right / asked : null, dhead };
}

// createTrainer({ task, kind, units, rate, batch, steps, delay, clip, seed }): a small network that learns one of TASKS
// with Adam, reproducibly from the seed. All options are optional:
//   task "echo"; kind, of the cell, the first one; units 12; rate 0.01, Adam's; batch 32; steps: the task's own; delay 3, of
//   an echo; clip 1, the maximum norm of the gradient; seed 1.
// Returns { network, options, iteration, step(), example(seed) }:
//   network        in the form that `run` takes; its arrays change with every step
//   step()         trains on one batch of new sequences: { loss, accuracy, norm, iteration }. Accuracy is null where
//                  the task's answers aren't counted; norm is the gradient's norm before clipping
//   example(seed)  another sequence, not used for training: { input, target, weight, output: values [1, T, …], cells: the
//                  cell's fields as in `run`, loss, accuracy }; weight is 1 where there is a target
// Ref: Kingma and Ba 2015, "Adam", alg. 1; Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent
// neural networks", alg. 1.
export function createTrainer(given = {}) {
  const usual = { task: "echo", kind: Object.keys(cellKinds)[0], units: 12, rate: 0.01, batch: 32, delay: 3, clip: 1, seed: 1 };
  const options = { ...usual, ...given };
  for (const [name, choices] of [["task", TASKS], ["kind", cellKinds]]) {
    if (!Object.hasOwn(choices, options[name])) {
      const [names, got] = [Object.keys(choices).join(", "), options[name]];
      throw new Error(`createTrainer: expected ${name} to be one of ${names}, got ${got}`);
    }
  }
  const task = TASKS[options.task];
  options.steps ??= task.steps;
  for (const name of ["units", "batch", "steps"]) {
    if (!Number.isInteger(options[name]) || options[name] < 1) {
      throw new Error(`createTrainer: expected ${name} to be a whole number above 0, got ${options[name]}`);
    }
  }
  const { delay, steps } = options;
  if (options.task === "echo" && !(Number.isInteger(delay) && delay >= 0 && delay < steps)) {
    throw new Error(`createTrainer: expected delay from 0 to below steps=${steps}, got ${delay}`);
  }
  for (const name of ["rate", "clip"]) {
    if (!(options[name] > 0)) throw new Error(`createTrainer: expected ${name} above 0, got ${options[name]}`);
  }
  const random = randomNumbers(options.seed);
  const network = newPlayground(task, options.kind, options.units, random);
  const [cell, head] = [network.nodes[0].cells[0], network.nodes[1]];
  const weights = [...Object.values(cell.arrays), ...Object.values(head.arrays)].map(({ data }) => data);
  const moments = weights.map((data) => [new Float64Array(data.length), new Float64Array(data.length)]);
  const lossOf = (flows, { target, weight }) => taskLoss(task, flows.head.x.data, target.data, weight.data);
  const trainer = {
    network,
    options,
    iteration: 0,
    step() {
      const drawn = drawnTask(task, options, random, options.batch);
      const flows = runNodes(network, { input: drawn.input }, { pre: false }, true);
      const { loss, accuracy, dhead } = lossOf(flows, drawn);
      const { arrays } = backNodes(network, flows, seedsOf(network, flows, { seeds: { head: dhead } }));
      const found = [arrays[options.kind][0], arrays.head[0]].flatMap(Object.values);
      const slopes = found.map(({ data }) => data);
      const norm = Math.sqrt(slopes.reduce((sum, slope) => slope.reduce((own, d) => own + d * d, sum), 0));
      trainer.iteration += 1;
      const cut = Math.min(1, options.clip / (norm + 1e-12));
      const [first, second] = [1 - 0.9 ** trainer.iteration, 1 - 0.999 ** trainer.iteration];
      weights.forEach((data, k) => {
        const [mean, square] = moments[k];
        for (let n = 0; n < data.length; n += 1) {
          const d = slopes[k][n] * cut;
          mean[n] = 0.9 * mean[n] + 0.1 * d;
          square[n] = 0.999 * square[n] + 0.001 * d * d;
          data[n] -= (options.rate * mean[n]) / first / (Math.sqrt(square[n] / second) + 1e-8);
        }
      });
      return { loss, accuracy, norm, iteration: trainer.iteration };
    },
    example(seed = 0) {
      const drawn = drawnTask(task, options, randomNumbers(seed ^ 0x5eed5eed), 1);
      const flows = runNodes(network, { input: drawn.input }, {}, false);
      const { loss, accuracy } = lossOf(flows, drawn);
      const answers = answersOf(network, flows);
      const [cells, output] = [answers.cells[options.kind][0], answers.values[network.outputs[0]]];
      return { ...drawn, output, cells, loss, accuracy };
    },
  };
  return trainer;
}

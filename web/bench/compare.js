// Runs in the page of compare.py: outputs of both engines, then their times.

import { load } from "/cellstack/index.js";
import * as ort from "/ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = "/ort/";
ort.env.wasm.numThreads = 1;

const ROUNDS = 60;
const ROUND_MS = 8; // of each engine

const random = (count) => Float32Array.from({ length: count }, () => 2 * Math.random() - 1);
const apart = (a, b) => a.reduce((most, value, n) => Math.max(most, Math.abs(value - b[n])), 0);

// The least time of a call in µs, for each of the engines, which take turns.
async function times(engines) {
  const least = engines.map(() => Infinity);
  const counts = engines.map(() => 1);
  for (let round = 0; round < ROUNDS; round += 1) {
    for (let k = 0; k < engines.length; k += 1) {
      const start = performance.now();
      for (let n = 0; n < counts[k]; n += 1) await engines[k](); // the await costs ours 0.1 µs too
      const taken = performance.now() - start;
      least[k] = Math.min(least[k], (1000 * taken) / counts[k]);
      counts[k] = Math.max(1, Math.round((counts[k] * ROUND_MS) / Math.max(taken, 0.1)));
    }
  }
  return least;
}

async function step(units) {
  const net = await load(`/${units}.safetensors`);
  const session = await ort.InferenceSession.create(`/step-${units}.onnx`, { executionProviders: ["wasm"] });
  const stream = net.stream();
  const xs = Array.from({ length: 20 }, () => random(units));
  const tensor = (data) => new ort.Tensor("float32", data, [1, 1, units]);
  let [h, c] = [tensor(new Float32Array(units)), tensor(new Float32Array(units))];
  const theirs = async (x) => {
    const found = await session.run({ x: tensor(x), h, c });
    [h, c] = [found.h_after, found.c_after];
    return h.data;
  };
  let difference = 0;
  for (const x of xs) difference = Math.max(difference, apart(stream.step(x), await theirs(x)));
  const [own, other] = await times([() => stream.step(xs[0]), () => theirs(xs[0])]);
  return { what: "step", units, difference, ours: own, theirs: other };
}

async function sequence(units, steps) {
  const net = await load(`/${units}.safetensors`);
  const session = await ort.InferenceSession.create(`/sequence-${units}.onnx`, { executionProviders: ["wasm"] });
  const x = { data: random(steps * units), shape: [1, steps, units] };
  const ours = () => net.run(x).y.data;
  const theirs = async () => (await session.run({ x: new ort.Tensor("float32", x.data, x.shape) })).y.data;
  const difference = apart(ours(), await theirs());
  const [own, other] = await times([ours, theirs]);
  return { what: `sequence of ${steps}`, units, difference, ours: own, theirs: other };
}

export async function compare(units, steps) {
  const rows = [];
  for (const n of units.step) rows.push(await step(n));
  for (const n of units.sequence) rows.push(await sequence(n, steps));
  return rows;
}

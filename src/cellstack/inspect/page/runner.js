// The engine in a worker, so that the page stays responsive; and the data for running a trace again.

import { gradient, multiplications, readNetwork, run, unsupported } from "./engine/engine.js";
import { createTrainer } from "./engine/training.js";
import { plural } from "./dom.js";

/* global engineSource */ // the engine's text, which html.py inserts before the modules

export const LIVE = 2e8; // maximum multiplications of a run during a drag
export const MOST_RUN = 6e9; // maximum multiplications of other runs: a few seconds
const MOST_NUMBERS = 4e7; // maximum numbers of gates and states in a run, in float64
const BACK = { multiplications: 3, kept: 4, matrices: 2 }; // cost of a gradient relative to a run; copies of each C

// The patches of a network for one row of its batch, the only row that a run in the page has.
export function patchesOfRow(patches, row) {
  const found = [];
  for (const patch of patches) {
    let place = row;
    if (Array.isArray(patch.rows)) place = patch.rows.indexOf(row);
    else if (patch.rows) {
      const { start, stop, step } = patch.rows;
      const [from, by] = [start ?? 0, step ?? 1];
      place = row >= from && row < (stop ?? Infinity) && (row - from) % by === 0 ? (row - from) / by : -1;
    }
    if (place < 0) continue;
    let { value } = patch;
    if (value !== null && value.shape.length === 3 && value.shape[0] > 1) {
      const size = value.shape[1] * value.shape[2];
      value = { data: value.data.slice(place * size, (place + 1) * size), shape: [1, ...value.shape.slice(1)] };
    }
    found.push({ ...patch, rows: null, value });
  }
  return found;
}

// Serve a request, in a worker or in the page; `engine` is the engine's state between requests.
export function served(engine, what, given) {
  if (what === "network") {
    engine.network = readNetwork(given.network);
    engine.patches = engine.network.patches;
    return { unsupported: unsupported(engine.network), multiplications: multiplications(engine.network, given.steps) };
  }
  if (what === "run" || what === "gradient") {
    engine.network.patches = patchesOfRow(engine.patches, given.row);
    const restore = [];
    for (const { node, cell, name, at, value } of given.edits) {
      const { data } = engine.network.nodes.find((one) => one.name === node).cells[cell].arrays[name];
      restore.push([data, at, data[at]]);
      data[at] = value;
    }
    try {
      if (what === "run") return run(engine.network, given.inputs, given.options);
      return gradient(engine.network, given.inputs, given.options, given.of).inputs;
    } finally {
      for (const [data, at, value] of restore.reverse()) data[at] = value;
    }
  }
  if (what === "trainer") {
    engine.trainer = createTrainer(given);
    return { options: engine.trainer.options, example: engine.trainer.example() };
  }
  if (what === "train") {
    const losses = [];
    const until = performance.now() + given.milliseconds;
    do losses.push(engine.trainer.step());
    while (performance.now() < until && losses.length < given.most);
    return { losses, example: engine.trainer.example() };
  }
  throw new Error(`expected network, run, gradient, trainer or train, got ${what}`);
}

const AT_WORK = `
const engine = {};
onmessage = ({ data: { id, what, given } }) => {
  try { postMessage({ id, answer: served(engine, what, given) }); }
  catch (error) { postMessage({ id, error: error.message }); }
};`;

// Sends requests to a worker, or computes in the page where a browser can't start a worker from text.
export class Runner {
  constructor() {
    this.count = 0;
    this.open = new Map();
    this.next = new Map();
    this.engine = {};
    this.worker = null;
    try {
      this.address = URL.createObjectURL(new Blob([engineSource, patchesOfRow.toString(), served.toString(), AT_WORK], { type: "text/javascript" }));
      this.worker = new Worker(this.address);
      this.worker.onmessage = ({ data }) => this.settle(data);
      this.worker.onerror = (event) => {
        event.preventDefault();
        this.fallBack();
      };
    } catch {
      this.worker = null; // compute in the page instead
    }
  }

  // The worker didn't start: answer its open requests here.
  fallBack() {
    this.worker?.terminate();
    this.worker = null;
    for (const [id, { what, given }] of this.open) this.here(id, what, given);
  }

  ask(what, given) {
    const id = (this.count += 1);
    return new Promise((resolve, reject) => {
      this.open.set(id, { resolve, reject, what, given });
      if (this.worker !== null) this.worker.postMessage({ id, what, given });
      else this.here(id, what, given);
    });
  }

  here(id, what, given) {
    setTimeout(() => {
      try {
        this.settle({ id, answer: served(this.engine, what, given) });
      } catch (error) {
        this.settle({ id, error: error.message });
      }
    });
  }

  settle({ id, answer, error }) {
    const waiting = this.open.get(id);
    if (waiting === undefined) return;
    this.open.delete(id);
    if (error === undefined) waiting.resolve(answer);
    else waiting.reject(new Error(error));
  }

  // Like `ask`, but of several requests of one kind that arrive while one runs, only the last is served; the others get null.
  async latest(what, given) {
    const slot = this.next.get(what) ?? { busy: false, waiting: null };
    this.next.set(what, slot);
    if (slot.busy) {
      slot.waiting?.resolve(null);
      return new Promise((resolve, reject) => { slot.waiting = { given, resolve, reject }; });
    }
    slot.busy = true;
    try {
      return await this.ask(what, given);
    } finally {
      slot.busy = false;
      const { waiting } = slot;
      slot.waiting = null;
      if (waiting !== null) this.latest(what, waiting.given).then(waiting.resolve, waiting.reject);
    }
  }

  close() {
    this.worker?.terminate();
    if (this.address) URL.revokeObjectURL(this.address);
  }
}

// A trace's network and inputs, ready to run again; `why` is the reason if they can't.
export class Rerun {
  constructor(view, runner) {
    this.view = view;
    this.runner = runner;
    this.why = null;
    this.whyNoGradient = null;
    this.size = 0;
  }

  // Read the network, and determine whether it can be run, and at what cost.
  async start() {
    const { view, runner } = this;
    const { description, store } = view;
    if (description.network === null) {
      this.why = description.why_not;
      return;
    }
    const arrays = {};
    await Promise.all(
      Object.entries(description.network.arrays).map(async ([name, entry]) => {
        const { data, shape } = await store.get(entry);
        arrays[name] = { dtype: entry.dtype, shape, data };
      }),
    );
    const network = { description: description.network.description, cells: description.cells, arrays };
    const found = await runner.ask("network", { network, steps: Math.max(1, view.steps) });
    this.size = found.multiplications;
    if (found.unsupported.length) this.why = `This page can't run the network again. ${found.unsupported.join(" ")}`;
    else this.why = this.tooMuch("A run of this network", 1, 1);
    if (this.why === null) this.whyNoGradient = this.tooMuch("A gradient of this run", BACK.multiplications, BACK.kept, BACK.matrices * this.matrices);
  }

  // The reason why a run, scaled by these factors, and with `more` numbers, is too expensive for a browser; null where it isn't.
  tooMuch(what, times, copies, more = 0) {
    const count = this.size * times;
    const numbers = this.numbers * copies + more;
    if (count > MOST_RUN) {
      const seconds = Math.round(count / 1e9);
      return `${what} takes ${count.toLocaleString("en")} multiplications, about ${plural(seconds, "second")} in a browser: too long to wait for. Trace fewer steps.`;
    }
    if (numbers > MOST_NUMBERS) return `${what} takes ${numbers.toLocaleString("en")} numbers: too many for a browser. Trace fewer steps.`;
    return null;
  }

  // The number of gate and state values of one row.
  get numbers() {
    const { arrays } = this.view.description;
    const fields = this.view.description.nodes.flatMap((node) => node.cells.flatMap((cell) => Object.values(cell.fields)));
    return fields.reduce((sum, { array }) => sum + arrays[array].shape[1] * arrays[array].shape[2], 0);
  }

  // The number of values of the memories of mLSTMs at all steps of one row.
  get matrices() {
    const { arrays, nodes } = this.view.description;
    const memories = nodes.flatMap(({ cells }) => cells.filter((cell) => cell.form.heads));
    return memories.reduce((sum, { before }) => sum + arrays[before.C.array].shape[1] * this.view.steps, 0);
  }

  get live() {
    return this.size <= LIVE;
  }

  // The arguments of a run of the row: { inputs, options }.
  async given(row) {
    const { description, store } = this.view;
    const inputs = {};
    for (const [n, { name, shape }] of description.network.description.inputs.entries()) {
      const input = description.inputs[n];
      const { data, shape: own } = await store.get(input.value);
      if (input.timed) {
        const [, width, steps] = own;
        const turned = new Float64Array(width * steps);
        const from = row * width * steps;
        for (let step = 0; step < steps; step += 1) {
          for (let k = 0; k < width; k += 1) turned[step * width + k] = data[from + k * steps + step];
        }
        inputs[name] = { data: turned, shape: [1, steps, ...shape.slice(1)] };
      } else {
        const width = own[1];
        inputs[name] = { data: Float64Array.from(data.subarray(row * width, (row + 1) * width)), shape: [1, ...shape] };
      }
    }
    const flags = async (reference) => {
      const found = await store.get(reference);
      if (found === null) return null;
      const steps = found.shape[1];
      return Uint8Array.from(found.data.subarray(row * steps, (row + 1) * steps));
    };
    const states = [];
    for (const node of description.nodes) {
      for (const cell of node.cells) {
        const own = {};
        for (const [name, reference] of Object.entries(cell.before)) {
          const { data, shape } = await store.get(reference);
          own[name] = { data: Float64Array.from(data.subarray(row * shape[1], (row + 1) * shape[1])), shape: [1, shape[1]] };
        }
        states.push(own);
      }
    }
    const { run: flagged } = description;
    const mask = {};
    for (const [name, reference] of Object.entries(flagged.mask)) mask[name] = await flags(reference);
    const options = { state: states, mask, reset: await flags(flagged.reset), pre: false };
    return { inputs, options, row: description.row_numbers[row] };
  }
}

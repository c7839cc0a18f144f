// The engine: a network run in the browser, forward and backward, in float64 and plain typed arrays.
//
// The equations are those of src/cellstack/reference.py, which every result is held against in the tests. It makes no
// request, reads no document and keeps nothing between calls, so the same text runs in a page and in a worker.
//
// WHAT GOES IN
//
//   payload   what `cellstack.inspect.payload.payload_of(network)` returns: { description, arrays }, the description of
//             docs/format.md and its arrays by name, { dtype, shape, data }, where data is base64 or a typed array.
//   network   readNetwork(payload):
//             { inputs: [{ name, shape }], outputs: [name], nodes: [{ name, type, sources: [name], settings: {…},
//               arrays: { name: { data, shape } },
//               cells: [{ spec: {…every field of CellSpec…}, arrays: { kernel: { data, shape }, … } }] }] }
//             A bidirectional node's cells are the forward half's, then the backward half's.
//   a value   { data: Float64Array (or any array of numbers), shape: [B, …] }; the last axis runs fastest.
//   inputs    { name: value }, one for each of network.inputs; ids of an embedding are numbers too, [B, T].
//   options   all of them may be left out:
//     state     one entry for each cell, in the order of the nodes and of their cells: { h: value [B, P], c: value
//               [B, H] } (c of an LSTM), or null for the cell's own initial state.
//     mask      [B, T] of 0 and 1 (an array of B·T numbers, or a value), 1 where a step counts; for every input that
//               has a time axis, or { name: mask } for each its own.
//     reset     [B, T] likewise, 1 where a new piece begins.
//     patches   [{ node, cell, gate, units, rows, steps: [start, stop, step], how, value }]: see `patched` below.
//     pre       false: leave the pre-activations out, which saves memory.
//
// WHAT COMES OUT
//
//   unsupported(network)             [sentence, …]: what isn't served, by name. Empty: all of it is.
//   multiplications(network, steps)  how many one row's run over so many steps takes: some 10^9 a second.
//   run(network, inputs, options)
//     { values: { name: value },     of every input and every node
//       cells: { node: [{ i, f, g, o, c, h, pre: { i, f, g, o } }] },
//                                    of each node that has cells: z, r, g, h of a GRU, g, h of a SimpleRNN; values
//                                    [B, T, H] in the order of time whichever way the cell ran. `pre`: what the gates
//                                    are activations of, before a clip; a coupled f has none. Where the mask leaves a
//                                    step out, gates and pre are 0, and c and h are carried.
//       state: [{ h, c }] }          after the last step, as options.state
//   gradient(network, inputs, options, of)
//     of    { value: name, row, step, unit } one number of an input's or a node's value; step is left out of [B, W];
//           { node, cell, gate, row, step, unit } one number of a gate or state ("c", "h") of a cell;
//           { seeds: { name: array or value } } the gradient of a loss by what nodes return.
//     { inputs: { name: value },     null for ids
//       values: { name: value },     of every node, what it returned; null where the number doesn't depend on it
//       cells: { node: [{ i, f, g, o, c, h }] },  by each gate after its activation, and by each state, of every step
//       state: [{ h, c }],           by the state before the first step
//       arrays: { node: [{ kernel, … }] } }       one entry a cell; of a node without cells one entry, or none
//   createTrainer(options)           the playground: see there
//
// All of these throw an Error whose message is a sentence, where what goes in doesn't fit.

export function readNetwork(payload) {
  throw new Error(`not written yet: ${typeof payload}`);
}

export function unsupported(network) {
  throw new Error(`not written yet: ${typeof network}`);
}

export function multiplications(network, steps) {
  throw new Error(`not written yet: ${typeof network} ${steps}`);
}

export function run(network, inputs, options = {}) {
  throw new Error(`not written yet: ${typeof network} ${inputs} ${options}`);
}

export function gradient(network, inputs, options, of) {
  throw new Error(`not written yet: ${typeof network} ${inputs} ${options} ${of}`);
}

// The playground's tasks by name: { title, text, inputs: [names], outputs: [names], kind: "bits" | "numbers" }.
export const TASKS = {};

// createTrainer({ task, kind, units, rate, batch, steps, seed, clip }) returns
//   { network, options, iteration, step(), example(seed) }
//   step()         trains on one batch: { loss, accuracy (null where it isn't a classification), norm, iteration }
//   example(seed)  { input, target, weight, output: values [1, T, …], cells: the fields as of `run`, loss }
export function createTrainer(options = {}) {
  throw new Error(`not written yet: ${options}`);
}

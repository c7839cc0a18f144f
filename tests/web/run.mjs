// Runs the cases of a JSON file with the package, and writes what it computes: node run.mjs PACKAGE CASES RESULTS.
import { readFile, writeFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { resolve } from "node:path";

const [, , folder, cases, results] = process.argv;
const { load } = await import(pathToFileURL(resolve(folder, "index.js")));

const TYPES = { float32: Float32Array, float64: Float64Array, uint8: Uint8Array };
const isArray = (one) => ArrayBuffer.isView(one);
function unpacked(one) {
  if (Array.isArray(one)) return one.map(unpacked);
  if (one === null || typeof one !== "object") return one;
  if (one.base64 === undefined) return Object.fromEntries(Object.entries(one).map(([name, value]) => [name, unpacked(value)]));
  const bytes = new Uint8Array(Buffer.from(one.base64, "base64"));
  return { data: new TYPES[one.dtype](bytes.buffer), shape: one.shape };
}
function packed(one) {
  if (isArray(one)) return { base64: Buffer.from(one.buffer, one.byteOffset, one.byteLength).toString("base64"), type: one.constructor.name };
  if (Array.isArray(one)) return one.map(packed);
  if (one === null || typeof one !== "object") return one;
  return Object.fromEntries(Object.entries(one).map(([name, value]) => [name, packed(value)]));
}

// What a case asks for: each returns what Python compares.
const ACTIONS = {
  run: (net, { x, options }) => net.run(x, options),
  trace: (net, { x, options }) => net.trace(x, options),
  // Chunks of the given lengths through one stream, x [B, T, I]; a chunk of 1 by step().
  stream: (net, { x, chunks, state }) => {
    const [B, T, I] = [x.shape[0], x.shape[1], x.shape[2] ?? 1];
    const stream = net.stream({ batch: B });
    if (state) stream.state = state;
    const parts = [];
    let from = 0;
    for (const length of chunks) {
      const data = new Float32Array(B * length * I);
      for (let b = 0; b < B; b += 1) data.set(x.data.subarray((b * T + from) * I, (b * T + from + length) * I), b * length * I);
      parts.push(length === 1 ? stream.step(data) : stream.run({ data, shape: [B, length, ...x.shape.slice(2)] }).data);
      from += length;
    }
    const after = stream.state;
    stream.close();
    return { parts, state: after };
  },
};

const answers = [];
for (const { file, action, load: options, ...given } of JSON.parse(await readFile(cases, "utf8"))) {
  try {
    const net = await load(file, options ?? {});
    answers.push(action === undefined ? {} : packed(ACTIONS[action](net, unpacked(given))));
  } catch (error) {
    answers.push({ error: error.message, name: error.name });
  }
}
await writeFile(results, JSON.stringify(answers));

// Reads a network from the bytes of a safetensors file: docs/format.md describes it.

import { checkDescription, FormatError } from "./description.js";

const MOST_HEADER = 100e6; // bytes, as in the safetensors package
const BYTES = { F64: 8, F32: 4, BF16: 2 };

function textOf(bytes) {
  return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
}

function headerOf(bytes) {
  const bad = (why) => new FormatError(`expected a safetensors file: ${why}`);
  if (bytes.byteLength < 8) throw bad(`it has ${bytes.byteLength} bytes`);
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (length > MOST_HEADER || 8 + length > bytes.byteLength) {
    throw bad(`its header has ${length} bytes, but the file ${bytes.byteLength}`);
  }
  let header;
  try {
    header = JSON.parse(textOf(bytes.subarray(8, 8 + length)));
  } catch (error) {
    throw bad(`its header isn't JSON (${error.message})`);
  }
  if (header === null || typeof header !== "object" || Array.isArray(header)) throw bad("its header isn't a JSON object");
  return { header, data: bytes.subarray(8 + length) };
}

// The numbers of a tensor as floats, in the file's memory where possible; bfloat16 is widened, float64 isn't read.
function numbersOf(bytes, dtype) {
  if (dtype === "F64") return null;
  if (dtype === "F32") {
    const aligned = bytes.byteOffset % 4 === 0 ? bytes : bytes.slice();
    return new Float32Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 4);
  }
  const aligned = bytes.byteOffset % 2 === 0 ? bytes : bytes.slice();
  const words = new Uint16Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 2);
  return new Float32Array(Uint32Array.from(words, (word) => word << 16).buffer);
}

// { description, tensors: { name: { dtype, shape, data: Float32Array or null } } }. Throws a FormatError that names the tensor.
export function readSafetensors(bytes) {
  const { header, data } = headerOf(bytes);
  const { __metadata__: metadata, ...entries } = header;
  if (typeof metadata?.cellstack !== "string") {
    throw new FormatError(
      "the safetensors file has no description of a network: write it with cellstack, by net.save or `cellstack convert`",
    );
  }
  const tensors = {};
  const ranges = [];
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    if (!Object.hasOwn(BYTES, dtype)) {
      throw new FormatError(`${name}: expected ${Object.keys(BYTES).join(", ")}, got ${dtype}`);
    }
    const lengths = (list) => Array.isArray(list) && list.every((length) => Number.isSafeInteger(length) && length >= 0);
    if (!lengths(shape) || !lengths(offsets) || offsets.length !== 2) {
      throw new FormatError(`${name}: expected a shape and two offsets, got ${JSON.stringify({ shape, data_offsets: offsets })}`);
    }
    const [start, end] = offsets;
    const size = shape.reduce((product, length) => product * length, BYTES[dtype]);
    if (end - start !== size) {
      throw new FormatError(`${name}: expected ${size} bytes for ${dtype} [${shape.join(", ")}], got ${end - start}`);
    }
    if (end > data.byteLength) {
      throw new FormatError(`${name}: the file ends before this tensor does, it may be truncated`);
    }
    ranges.push({ name, start, end });
    tensors[name] = { dtype, shape, data: numbersOf(data.subarray(start, end), dtype) };
  }
  let last = 0;
  for (const { name, start, end } of ranges.sort((a, b) => a.start - b.start || a.end - b.end)) {
    if (start !== last) throw new FormatError(`${name}: expected it to start at byte ${last} of the arrays, got ${start}`);
    last = end;
  }
  if (last !== data.byteLength) {
    throw new FormatError(`expected the file's tensors to end at its end, got ${data.byteLength - last} bytes after them`);
  }
  let description;
  try {
    description = JSON.parse(metadata.cellstack);
  } catch (error) {
    throw new FormatError(`the description of the network isn't JSON (${error.message})`);
  }
  checkDescription(description);
  return { description, tensors };
}

/**
 * A value of the network: numbers in row-major order, and their shape. The first axis is the batch, and in a sequence
 * the second one is time: `[B, T, I]`.
 */
export interface Value {
  data: Float32Array;
  shape: number[];
}

/** A value that is passed in; numbers are rounded to float32, except for the ids of an embedding, `[B, T]`. */
export interface Given {
  data: ArrayLike<number>;
  shape: number[];
}

/** The states of one cell: `h` `[B, P]`, and for an LSTM `c` `[B, H]`; of an mLSTM `C`, `n` and `m`, those of head 0 first. */
export type State = Record<string, Value>;

export interface RunOptions {
  /** One state per cell, in the order of the nodes and their cells; null: the cell's initial state. */
  state?: (Record<string, Given> | null)[] | null;
  /** `[B, T]`, 0 where a step is padding; for every input with a time axis, or by input. */
  mask?: Given | Record<string, Given> | null;
  /** `[B, T]`, 1 where a new sequence begins: the states become the initial ones before this step. */
  reset?: Given | Record<string, Given> | null;
}

export interface Result {
  /** The first output. */
  y: Value;
  /** All outputs by name. */
  outputs: Record<string, Value>;
  /** The states after the last step, one per cell. */
  state: State[];
}

export interface Trace {
  /** Every input, and the output of every node. */
  values: Record<string, Value>;
  /** Of each node with cells: for each cell its gates and states at every step, `[B, T, H]`, by name. */
  cells: Record<string, Record<string, Value>[]>;
  state: State[];
}

export interface LoadOptions {
  /** Where the kernel is, if `cellstack.wasm` isn't next to the module: a URL, its bytes, or a compiled module. */
  wasm?: URL | string | ArrayBuffer | ArrayBufferView | WebAssembly.Module;
  /** The number format of the matrices in memory; omitted: that of the file. */
  weights?: "float32" | "bfloat16" | "int8";
}

/**
 * Load a network from a safetensors file that cellstack wrote (`net.save`, `cellstack convert`).
 *
 * @param source a URL; in Node also a path; or the bytes of the file
 * @throws FormatError if the file is damaged, or has something that isn't supported; the message names the tensor or
 *   node, what was expected and what was found
 */
export function load(source: URL | string | ArrayBuffer | ArrayBufferView, options?: LoadOptions): Promise<Network>;

/** A file that isn't a network, or one that the package doesn't support. */
export class FormatError extends Error {}

/** A network. Its weights never change; it may be used by any number of streams. */
export class Network {
  private constructor();
  /** The inputs: their names, and the lengths of the axes after the batch, null for any length. */
  readonly inputs: { name: string; shape: (number | null)[] }[];
  /** The names of the outputs. */
  readonly outputs: string[];
  /** Data about the network from the file, such as class labels. */
  readonly metadata: Record<string, unknown>;
  /**
   * Run the network over a batch of sequences.
   *
   * @param x the input, `[B, T, I]`; several inputs by name
   */
  run(x: Given | Record<string, Given>, options?: RunOptions): Result;
  /** Run the network, and return the values of all nodes, and the gates and states of all cells, at every step. */
  trace(x: Given | Record<string, Given>, options?: RunOptions): Trace;
  /**
   * Start a stream, which runs the network step by step.
   *
   * @throws Error if a node needs the whole sequence; the message names it
   */
  stream(options?: { batch?: number }): Stream;
}

/** A network step by step, with its own state. Any division of a sequence into steps and chunks has the same bits. */
export class Stream {
  private constructor();
  /**
   * One step of every row.
   *
   * @param x `B·I` numbers; several inputs by name
   * @returns `B·O` numbers; several outputs by name
   */
  step(x: ArrayLike<number>): Float32Array;
  step(x: Record<string, ArrayLike<number>>): Float32Array | Record<string, Float32Array>;
  /** Several steps, `[B, T, I]`; returns the outputs `[B, T, O]`, by name if there are several. */
  run(x: Given): Value;
  run(x: Record<string, Given>): Value | Record<string, Value>;
  /** A copy of the states, one per cell. Assigning sets them: those of another stream, or of `Network.run`. */
  get state(): State[];
  set state(state: Record<string, Given>[]);
  /** Set the initial states. */
  reset(): void;
  /** Free the stream's memory now, instead of when it is garbage-collected. */
  close(): void;
}

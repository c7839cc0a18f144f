// Where inputs come from: values, generated signals, a table, audio. A source is a function that returns the next input
// as an array of numbers, null if there is none yet, or undefined at its end.

// The columns of a model's input: one per feature, one per input of ids.
export function columnsOf(inputs) {
  return inputs.flatMap(({ name, width }) =>
    width === null ? [{ input: name, name, id: true }] : Array.from({ length: width }, (_, n) => ({ input: name, name: width === 1 ? name : `${name} ${n}`, id: false })),
  );
}

// The value of "x" in a message: a list, a number for ids, or an object of these by name.
export function asMessage(inputs, values) {
  let at = 0;
  const parts = inputs.map(({ width }) => (width === null ? values[at++] : values.slice(at, (at += width))));
  return inputs.length === 1 ? parts[0] : Object.fromEntries(inputs.map(({ name }, n) => [name, parts[n]]));
}

// Numbers from text, separated by commas, semicolons or white space.
export function numbersOf(text, columns) {
  const parts = text.trim().split(/[\s,;]+/).filter((part) => part !== "");
  const values = parts.map(Number);
  const bad = parts.find((_, n) => !Number.isFinite(values[n]));
  if (bad !== undefined) throw new Error(`expected numbers, got ${bad}`);
  if (values.length !== columns.length) throw new Error(`expected ${columns.length} numbers, got ${values.length}`);
  const fraction = columns.findIndex(({ id }, n) => id && (!Number.isInteger(values[n]) || values[n] < 0));
  if (fraction >= 0) throw new Error(`${columns[fraction].name}: expected a whole number from 0 on, got ${values[fraction]}`);
  return values;
}

// A sine, noise or impulses, with a shift per column; ids are whole numbers from 0 to the amplitude.
export function generated(columns, { shape, period, amplitude }) {
  let step = 0;
  const at = (column) => {
    if (shape === "noise") return (2 * Math.random() - 1) * amplitude();
    if (shape === "impulse") return step % Math.max(1, Math.round(period())) === 0 ? amplitude() : 0;
    return amplitude() * Math.sin(2 * Math.PI * (step / Math.max(1, period()) + column / columns.length));
  };
  return () => {
    const values = columns.map(({ id }, n) => (id ? Math.round(Math.abs(at(n))) : at(n)));
    step += 1;
    return values;
  };
}

// The rows of a CSV file; a first row that isn't numbers is a header.
export function rowsOf(text, columns) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim() !== "");
  const separator = ["\t", ";", ","].find((one) => lines[0]?.includes(one)) ?? ",";
  const header = lines.length && lines[0].split(separator).some((part) => !Number.isFinite(Number(part.trim() || NaN)));
  const rows = lines.slice(header ? 1 : 0).map((line, n) => {
    try {
      return numbersOf(line.split(separator).join(" "), columns);
    } catch (error) {
      throw new Error(`row ${n + 1}: ${error.message}`);
    }
  });
  if (!rows.length) throw new Error("expected at least one row of numbers");
  return rows;
}

export function ofRows(rows) {
  let at = 0;
  return () => rows[at++];
}

// Samples as frames of the model's width; the last frame is filled up with zeros.
export function ofSamples(samples, width) {
  let at = 0;
  return () => {
    if (at >= samples.length) return undefined;
    const frame = new Array(width).fill(0);
    for (let n = 0; n < width && at + n < samples.length; n += 1) frame[n] = samples[at + n];
    at += width;
    return frame;
  };
}

// Decode an audio file, resample it and average its channels.
export async function samplesOf(file, rate) {
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} isn't an audio file that this browser can decode`);
  }
  const mean = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel += 1) {
    const samples = audio.getChannelData(channel);
    for (let n = 0; n < mean.length; n += 1) mean[n] += samples[n] / audio.numberOfChannels;
  }
  return mean;
}

const COLLECTOR = `registerProcessor("collector", class extends AudioWorkletProcessor {
  process([[samples]]) { if (samples) this.port.postMessage(samples.slice()); return true; }
});`;

// The microphone, at a rate to which the browser resamples. Its source has `stop`.
export async function microphone(width, rate) {
  if (!navigator.mediaDevices) throw new Error("browsers allow the microphone only for https and for localhost");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
  } catch (error) {
    throw new Error(`the browser gives no microphone: ${error.message}`);
  }
  const audio = new AudioContext({ sampleRate: rate });
  const url = URL.createObjectURL(new Blob([COLLECTOR], { type: "text/javascript" }));
  await audio.audioWorklet.addModule(url);
  URL.revokeObjectURL(url);
  const collector = new AudioWorkletNode(audio, "collector", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
  const waiting = [];
  collector.port.onmessage = ({ data }) => waiting.push(...data);
  audio.createMediaStreamSource(stream).connect(collector);
  const next = () => (waiting.length < width ? null : waiting.splice(0, width));
  next.stop = () => {
    stream.getTracks().forEach((track) => track.stop());
    audio.close();
  };
  return next;
}

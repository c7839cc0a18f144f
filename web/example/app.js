// Streams a microphone through a network: a step of the LSTM for every 20 ms of sound.

import { load } from "../dist/index.js";
import { FRAME, RATE, features } from "./features.js";

const SHOWN = 500; // frames: ten seconds

export const probabilities = []; // of a whistle, in the last frames
const took = []; // milliseconds of the last steps

function draw() {
  const canvas = document.querySelector("canvas");
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const { color, borderTopColor } = getComputedStyle(canvas);
  context.clearRect(0, 0, width, height);
  context.fillStyle = borderTopColor;
  context.fillRect(0, height / 2, width, 1);
  context.fillStyle = color;
  probabilities.forEach((p, n) => {
    const bar = Math.max(1, p * height);
    context.fillRect((n * width) / SHOWN, height - bar, width / SHOWN, bar);
  });
  const whistles = probabilities.slice(-5).some((p) => p > 0.5);
  document.querySelector("output").textContent = whistles ? "a whistle" : "no whistle";
  const mean = (1000 * took.reduce((sum, one) => sum + one, 0)) / took.length;
  document.querySelector("#time").textContent = `A step and its features take ${mean.toFixed(0)} µs.`;
  requestAnimationFrame(draw);
}

async function listen() {
  const network = await load("whistle.safetensors");
  const stream = network.stream();
  // the browser's own processing of speech would remove a whistle
  const constraints = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const microphone = await navigator.mediaDevices.getUserMedia({ audio: constraints });
  const audio = new AudioContext({ sampleRate: RATE });
  await audio.audioWorklet.addModule("frames.js");
  const frames = new AudioWorkletNode(audio, "frames", { numberOfOutputs: 0, processorOptions: { length: FRAME } });
  frames.port.onmessage = ({ data: frame }) => {
    const start = performance.now();
    const [p] = stream.step(features(frame));
    took.push(performance.now() - start);
    probabilities.push(p);
    if (probabilities.length > SHOWN) probabilities.shift();
    if (took.length > SHOWN) took.shift();
  };
  audio.createMediaStreamSource(microphone).connect(frames);
  draw();
}

document.querySelector("button").addEventListener("click", async ({ target }) => {
  target.hidden = true;
  try {
    await listen();
  } catch (error) {
    document.querySelector("output").textContent = error.message;
    throw error;
  }
});

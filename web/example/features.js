// What the network reads of a frame of sound: the level of each band, relative to the mean of all, as in train.py.

export const RATE = 16000;
export const FRAME = 320; // samples: 20 ms
const BANDS = Array.from({ length: 32 }, (_, band) => 500 + 100 * band); // Hz

const window = Float64Array.from({ length: FRAME }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * (n + 0.5)) / FRAME));
const waves = BANDS.map((pitch) => {
  const angle = (n) => (2 * Math.PI * n * pitch) / RATE;
  return [Math.cos, Math.sin].map((of) => window.map((weight, n) => weight * of(angle(n))));
});

export function features(frame) {
  const levels = waves.map((parts) => {
    let energy = 0;
    for (const wave of parts) {
      let sum = 0;
      for (let n = 0; n < FRAME; n += 1) sum += frame[n] * wave[n];
      energy += sum * sum;
    }
    return Math.log10(energy + 1e-7);
  });
  const mean = levels.reduce((total, level) => total + level, 0) / levels.length;
  return Float32Array.from(levels, (level) => level - mean);
}

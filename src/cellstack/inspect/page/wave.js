// A wave and its spectrum above the map, over the same steps.

import { make, shown } from "./dom.js";
import { fitted, palette, RIGHT } from "./draw.js";

export class Wave {
  constructor(view) {
    this.view = view;
    this.sound = null;
    this.element = make("canvas", { class: "wave", role: "img", "aria-label": "The wave and its spectrum", hidden: true });
  }

  // Read the wave and its spectrum.
  async read() {
    const { audio } = this.view.description;
    this.element.hidden = false;
    const [wave, spectrum] = await Promise.all([this.view.store.get(audio.wave), this.view.store.get(audio.spectrum)]);
    const [bands, frames] = spectrum.shape;
    const made = new Map();
    const picture = (theme) => {
      if (!made.has(theme)) {
        const canvas = make("canvas", { width: frames, height: bands });
        const pen = canvas.getContext("2d");
        const image = pen.createImageData(frames, bands);
        const pixels = new Uint32Array(image.data.buffer);
        const colours = palette("gate", theme);
        for (let band = 0; band < bands; band += 1) {
          for (let frame = 0; frame < frames; frame += 1) pixels[(bands - 1 - band) * frames + frame] = colours[spectrum.data[band * frames + frame]];
        }
        pen.putImageData(image, 0, 0);
        made.set(theme, canvas);
      }
      return made.get(theme);
    };
    this.sound = { audio, wave: wave.data, blocks: wave.shape[1], picture };
  }

  draw() {
    const { view, sound } = this;
    if (sound === null) return;
    const { context: pen, width, height, ratio } = fitted(this.element);
    const left = view.left * ratio;
    const wide = width - left - RIGHT * ratio;
    const { from, span } = view.window;
    pen.clearRect(0, 0, width, height);
    const high = Math.round(height * 0.42);
    const steps = Math.max(1, view.steps);
    const end = Math.min(wide, ((steps - from) / span) * wide);
    pen.fillStyle = view.colours.accent;
    for (let x = 0; x < end; x += 1) {
      const a = Math.floor(((from + (x / wide) * span) / steps) * sound.blocks);
      const b = Math.max(a + 1, Math.floor(((from + ((x + 1) / wide) * span) / steps) * sound.blocks));
      let least = 127;
      let most = -128;
      for (let n = a; n < b && n < sound.blocks; n += 1) {
        if (sound.wave[n] < least) least = sound.wave[n];
        if (sound.wave[sound.blocks + n] > most) most = sound.wave[sound.blocks + n];
      }
      if (least > most) continue;
      const top = high / 2 - (most / 127) * (high / 2 - 1);
      pen.fillRect(left + x, top, 1, Math.max(1, high / 2 - (least / 127) * (high / 2 - 1) - top));
    }
    const picture = sound.picture(view.theme);
    pen.imageSmoothingEnabled = true;
    const source = (from / steps) * picture.width;
    pen.drawImage(picture, source, 0, Math.max(1, (end / wide) * (span / steps) * picture.width), picture.height, left, high + 2, end, height - high - 2);
    const x = left + ((view.step + 0.5 - from) / span) * wide;
    if (x >= left && x <= left + wide) {
      pen.fillStyle = view.colours.cursor;
      pen.fillRect(x - ratio / 2, 0, ratio, height);
    }
    pen.fillStyle = view.colours.muted;
    pen.font = `${10 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText("wave", left - 6 * ratio, high / 2);
    pen.fillText(`${shown(sound.audio.rate / 2000, 3)} kHz`, left - 4 * ratio, high + 8 * ratio);
    pen.fillText("0", left - 6 * ratio, height - 6 * ratio);
  }
}

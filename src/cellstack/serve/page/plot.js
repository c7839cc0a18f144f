// Charts of the last steps: lines for a few values, colours for many.

import { shown } from "./dom.js";
import { LEFT, RIGHT, drawLines, fitted, palette } from "./draw.js";

export const MOST_LINES = 8;
const KEPT = 1000;
const COLOURS = {
  light: ["#0072b2", "#b35400", "#00795c", "#a2477f", "#8a6d00", "#5b3fa8", "#a32020", "#3d4654"],
  dark: ["#5cb6ee", "#f29a4a", "#3fc9a0", "#e08fbd", "#e8cd4d", "#a99bf0", "#f08a80", "#c3cad6"],
};

// The last values of some series, as a plane for `drawLines`.
export class Recent {
  constructor(units) {
    this.units = units;
    this.values = new Float64Array(units * KEPT);
    this.total = 0;
  }

  add(row) {
    const at = this.total % KEPT;
    for (let unit = 0; unit < this.units; unit += 1) this.values[unit * KEPT + at] = row[unit];
    this.total += 1;
  }

  get steps() {
    return this.total;
  }

  at(unit, step) {
    return step < this.total - KEPT || step >= this.total || step < 0 ? NaN : this.values[unit * KEPT + (step % KEPT)];
  }

  level() {
    return 0;
  }

  extremes(unit, from, to, level, out) {
    out[0] = Infinity;
    out[1] = -Infinity;
    for (let step = Math.floor(from); step < to; step += 1) {
      const value = this.at(unit, step);
      if (value < out[0]) out[0] = value;
      if (value > out[1]) out[1] = value;
    }
    if (out[0] > out[1]) out[0] = out[1] = NaN;
  }
}

export function colourOf(n, theme) {
  return COLOURS[theme][n % MOST_LINES];
}

// Lines of some series over the last `span` steps.
export function drawRecent(canvas, look, recent, first, span) {
  const count = Math.min(MOST_LINES, recent.units - first);
  const lines = Array.from({ length: count }, (_, n) => ({ plane: recent, unit: first + n, colour: colourOf(n, look.theme), gaps: true }));
  drawLines(canvas, look.colours, lines, { from: Math.max(0, recent.total - span), span });
}

// All series as rows of colours over the last `span` steps; returns the number at the end of the scale.
export function drawMap(canvas, look, recent, span) {
  canvas.style.height = `${Math.max(40, Math.min(260, recent.units * 4))}px`;
  const { context: pen, width, height, ratio } = fitted(canvas);
  const from = Math.max(0, recent.total - span);
  const pixels = new ImageData(span, recent.units);
  const into = new Uint32Array(pixels.data.buffer);
  const colours = palette("state", look.theme);
  let most = 0;
  for (let unit = 0; unit < recent.units; unit += 1) {
    for (let step = from; step < recent.total; step += 1) most = Math.max(most, Math.abs(recent.at(unit, step)) || 0);
  }
  for (let unit = 0; unit < recent.units; unit += 1) {
    for (let n = 0; from + n < recent.total && n < span; n += 1) {
      const value = recent.at(unit, from + n);
      if (!Number.isNaN(value)) into[unit * span + n] = colours[Math.max(0, Math.min(255, Math.round((value / (most || 1) + 1) * 127.5)))];
    }
  }
  const small = new OffscreenCanvas(span, recent.units);
  small.getContext("2d").putImageData(pixels, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, LEFT * ratio, 0, width - (LEFT + RIGHT) * ratio, height);
  pen.fillStyle = look.colours.muted;
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "top";
  pen.fillText("0", (LEFT - 6) * ratio, 0);
  pen.textBaseline = "bottom";
  pen.fillText(String(recent.units - 1), (LEFT - 6) * ratio, height);
  return shown(most, 3);
}

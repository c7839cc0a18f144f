// Canvases, colours, axes and lines.

import { make, shown } from "./dom.js";

// The margins of the map and all charts left and right of the steps, in CSS pixels: numbers are on the left.
export const LEFT = 44;
export const RIGHT = 6;

// Colours for colour-blind readers: dark blue to yellow from closed to open, after Nuñez, Anderton and Renslow 2018,
// "Optimizing colormaps with consideration for color vision deficiency"; and blue and orange on either side of the
// page's background.
const OPENING = [[0, 32, 77], [35, 61, 109], [77, 89, 112], [112, 117, 118], [150, 146, 117], [190, 178, 102], [229, 212, 75], [254, 232, 69]];
const SIDES = {
  light: [[12, 66, 122], [58, 124, 182], [148, 190, 222], [246, 246, 244], [248, 190, 128], [222, 118, 36], [140, 60, 4]],
  dark: [[168, 216, 255], [86, 156, 220], [42, 88, 138], [28, 30, 36], [132, 74, 26], [222, 130, 50], [255, 206, 148]],
};
const LINES = {
  light: { i: "#0072b2", f: "#b35400", g: "#00795c", o: "#a2477f", c: "#8a6d00", h: "#1f2430", z: "#b35400", r: "#0072b2", x: "#5b6472", y: "#1f2430", q: "#3d4fb8", k: "#a63a3a", v: "#3f7d20", n: "#8a6d00", m: "#75608f" },
  dark: { i: "#5cb6ee", f: "#f29a4a", g: "#3fc9a0", o: "#e08fbd", c: "#e8cd4d", h: "#f2f4f8", z: "#f29a4a", r: "#5cb6ee", x: "#a4adba", y: "#f2f4f8", q: "#93a0ff", k: "#ff8f8f", v: "#8fd46a", n: "#e8cd4d", m: "#bba6d8" },
};

const palettes = new Map();

// 256 colours in the pixel format of an image.
export function palette(kind, theme) {
  const key = `${kind} ${theme}`;
  if (!palettes.has(key)) {
    const stops = kind === "gate" ? OPENING : SIDES[theme];
    const pixels = new Uint32Array(256);
    for (let n = 0; n < 256; n += 1) {
      const place = (n / 255) * (stops.length - 1);
      const first = Math.min(stops.length - 2, Math.floor(place));
      const [r, g, b] = stops[first].map((value, k) => Math.round(value + (stops[first + 1][k] - value) * (place - first)));
      pixels[n] = (255 << 24) | (b << 16) | (g << 8) | r;
    }
    palettes.set(key, pixels);
  }
  return palettes.get(key);
}

export function cssColour(pixel) {
  return `rgb(${pixel & 255}, ${(pixel >> 8) & 255}, ${(pixel >> 16) & 255})`;
}

// A legend of a scale: its colours between its ends.
export function colourBar(scale, theme) {
  const colours = palette(scale.kind, theme);
  const stops = Array.from({ length: 9 }, (_, n) => cssColour(colours[Math.round((n * 255) / 8)]));
  const bar = make("span", { class: "bar", style: `background: linear-gradient(to right, ${stops.join(", ")})` });
  const [low, high] = scale.kind === "gate" ? ["0, closed", "1, open"] : [shown(scale.low, 3), shown(scale.high, 3)];
  return [make("span", {}, low), bar, make("span", {}, high)];
}

// Black on light colours, white on dark ones.
export function inkOn(pixel) {
  const light = 0.299 * (pixel & 255) + 0.587 * ((pixel >> 8) & 255) + 0.114 * ((pixel >> 16) & 255);
  return light > 140 ? "#111" : "#fff";
}

export function lineColour(field, theme) {
  return LINES[theme][field] ?? LINES[theme].y;
}

// The mapping from a number to the 256 colours; `gate`: from closed to open.
export function scaleOf(gate, range) {
  if (gate && range.low >= 0 && range.high <= 1) return { kind: "gate", low: 0, high: 1 };
  const most = Math.max(Math.abs(range.low), Math.abs(range.high)) || 1;
  return { kind: "state", low: -most, high: most };
}

// A text that fits into a width, shortened with an ellipsis.
export function clipped(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && pen.measureText(`${text.slice(0, end)}…`).width > width) end -= 1;
  return `${text.slice(0, end)}…`;
}

// Resize a canvas to its displayed size, in device pixels.
export function fitted(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  return { context: canvas.getContext("2d"), width, height, ratio };
}

// A small map of a whole plane, with names of its rows if there are any; one row may be marked.
export function drawTiles(canvas, view, plane, scale, names, marked = null) {
  canvas.style.height = `${Math.max(24, Math.min(260, plane.units * (names === null ? 13 : 20)))}px`;
  const { context: pen, width, height, ratio } = fitted(canvas);
  pen.clearRect(0, 0, width, height);
  const left = LEFT * ratio;
  const colours = palette(scale.kind, view.theme);
  const [wide, high] = [(width - left - RIGHT * ratio) / plane.steps, height / plane.units];
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let unit = 0; unit < plane.units; unit += 1) {
    for (let step = 0; step < plane.steps; step += 1) {
      const value = plane.at(unit, step);
      const place = Math.max(0, Math.min(255, Math.floor(((value - scale.low) / (scale.high - scale.low || 1)) * 255)));
      pen.fillStyle = Number.isFinite(value) ? cssColour(colours[place]) : "#000";
      pen.fillRect(left + step * wide, unit * high, Math.max(1, wide - 1), Math.max(1, high - 1));
    }
    pen.fillStyle = view.colours.muted;
    if (high >= 10 * ratio) pen.fillText(names === null ? String(unit) : names[unit], left - 6 * ratio, (unit + 0.5) * high, left - 8 * ratio);
  }
  if (marked === null) return;
  pen.strokeStyle = pen.fillStyle = view.colours.cursor;
  pen.lineWidth = 1.5 * ratio;
  if (high > 6 * ratio) pen.strokeRect(left, marked * high, width - left - RIGHT * ratio, high);
  else pen.fillRect(0, marked * high - ratio, left - 3 * ratio, 2 * ratio); // a line at the left end of the row
}

// A limited number of round numbers between two ends.
export function ticks(low, high, most) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return [low];
  const rough = span / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * span; n += 1) found.push(n * step);
  return found;
}

// A chart of lines over the steps of a window, with the cursor and a marked range.
//
//   lines   [{ plane, unit, colour, dash, gaps }]; gaps: NaN marks an intended gap
//   window  { from, span }: the visible steps
export function drawLines(canvas, colours, lines, window_, { cursor = null, range = null, zero = true, ends = null } = {}) {
  const { context: pen, width, height, ratio } = fitted(canvas);
  pen.clearRect(0, 0, width, height);
  const left = LEFT * ratio;
  const bottom = height - 18 * ratio;
  const top = 6 * ratio;
  const wide = width - left - RIGHT * ratio;
  const out = [0, 0];
  let low = ends?.low ?? Infinity;
  let high = ends?.high ?? -Infinity;
  const traced = lines.map(({ plane, unit, colour, dash, gaps = false }) => {
    const points = [];
    const add = (at, least, most) => {
      points.push([at, least, most]);
      if (least < low && Number.isFinite(least)) low = least;
      if (most > high && Number.isFinite(most)) high = most;
    };
    const columns = Math.max(1, Math.floor(wide / ratio));
    const span = window_.span / columns;
    if (span <= 1) {
      const last = Math.min(plane.steps, Math.ceil(window_.from + window_.span) + 1);
      for (let step = Math.max(0, Math.floor(window_.from) - 1); step < last; step += 1) add(step + 0.5, plane.at(unit, step), plane.at(unit, step));
    } else {
      const level = plane.level(span);
      for (let n = 0; n < columns; n += 1) {
        const from = window_.from + n * span;
        if (from + span <= 0 || from >= plane.steps) continue;
        plane.extremes(unit, from, from + span, level, out);
        add(from + span / 2, out[0], out[1]);
      }
    }
    return { points, colour, dash, gaps };
  });
  if (low > high) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  if (ends === null) [low, high] = [low - 0.04 * (high - low), high + 0.04 * (high - low)];
  const across = (step) => left + ((step - window_.from) / window_.span) * wide;
  const down = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const value of ticks(low, high, Math.max(2, (bottom - top) / (34 * ratio)))) {
    pen.strokeStyle = value === 0 && zero ? colours.muted : colours.grid;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(left, Math.round(down(value)) + 0.5);
    pen.lineTo(left + wide, Math.round(down(value)) + 0.5);
    pen.stroke();
    pen.fillStyle = colours.muted;
    pen.fillText(shown(value, 3), left - 6 * ratio, down(value));
  }
  if (range !== null) {
    pen.fillStyle = colours.mark;
    pen.fillRect(across(range[0]), top, across(range[1]) - across(range[0]), bottom - top);
  }
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, wide, height);
  pen.clip();
  for (const { points, colour, dash, gaps } of traced) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1.6 * ratio;
    pen.lineJoin = "round";
    pen.setLineDash((dash ?? []).map((length) => length * ratio));
    pen.beginPath();
    const alone = [];
    const isDrawn = (point) => point !== undefined && Number.isFinite(point[1]) && Number.isFinite(point[2]);
    points.forEach((point, n) => {
      if (!isDrawn(point)) return;
      const [x, y] = [across(point[0]), down(point[2])];
      const follows = isDrawn(points[n - 1]);
      if (follows) pen.lineTo(x, y);
      else pen.moveTo(x, y);
      if (point[1] !== point[2]) pen.lineTo(x, down(point[1]));
      if (!follows && !isDrawn(points[n + 1])) alone.push([x, y]);
    });
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = colour;
    for (const [x, y] of alone) { // a dot, such as for the target of a last step
      pen.beginPath();
      pen.arc(x, y, 2.5 * ratio, 0, 7);
      pen.fill();
    }
    if (gaps) continue; // an intended gap
    // A number that isn't finite is drawn as a cross at the edge.
    pen.lineWidth = 1.5 * ratio;
    for (const [step, least, most] of points) {
      if (Number.isFinite(least) && Number.isFinite(most)) continue;
      const x = across(step);
      const y = most === Infinity ? top + 4 * ratio : least === -Infinity ? bottom - 4 * ratio : (top + bottom) / 2;
      pen.beginPath();
      for (const [a, b] of [[-3, -3], [-3, 3]]) {
        pen.moveTo(x + a * ratio, y + b * ratio);
        pen.lineTo(x - a * ratio, y - b * ratio);
      }
      pen.stroke();
    }
  }
  if (cursor !== null) {
    pen.strokeStyle = colours.cursor;
    pen.lineWidth = 1.5 * ratio;
    pen.beginPath();
    pen.moveTo(across(cursor + 0.5), top);
    pen.lineTo(across(cursor + 0.5), bottom);
    pen.stroke();
  }
  pen.restore();
  pen.textBaseline = "top";
  pen.textAlign = "center";
  pen.fillStyle = colours.muted;
  for (const step of ticks(Math.max(0, window_.from), window_.from + window_.span - 1, Math.max(2, wide / (70 * ratio)))) {
    if (step === Math.round(step)) pen.fillText(String(window_.steps?.[step] ?? step), across(step + 0.5), bottom + 4 * ratio);
  }
  return {
    step: (x) => Math.floor(window_.from + ((x * ratio - left) / wide) * window_.span),
    value: (y) => low + ((bottom - y * ratio) / (bottom - top)) * (high - low),
  };
}

// Bars over steps, such as the contributions of past steps.
export function drawBars(canvas, colours, values, window_, { cursor = null, positive, negative }) {
  const { context: pen, width, height, ratio } = fitted(canvas);
  pen.clearRect(0, 0, width, height);
  const left = LEFT * ratio;
  const bottom = height - 18 * ratio;
  const top = 6 * ratio;
  const wide = width - left - RIGHT * ratio;
  let low = 0;
  let high = 0;
  const first = Math.max(0, Math.floor(window_.from));
  const last = Math.min(values.length - 1, Math.ceil(window_.from + window_.span) - 1);
  for (let n = first; n <= last; n += 1) {
    if (values[n] < low) low = values[n];
    if (values[n] > high) high = values[n];
  }
  if (low === 0 && high === 0) high = 1;
  const across = (step) => left + ((step - window_.from) / window_.span) * wide;
  const down = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const value of ticks(low, high, Math.max(2, (bottom - top) / (34 * ratio)))) {
    pen.strokeStyle = value === 0 ? colours.muted : colours.grid;
    pen.beginPath();
    pen.moveTo(left, Math.round(down(value)) + 0.5);
    pen.lineTo(left + wide, Math.round(down(value)) + 0.5);
    pen.stroke();
    pen.fillStyle = colours.muted;
    pen.fillText(shown(value, 3), left - 6 * ratio, down(value));
  }
  for (let n = first; n <= last; n += 1) {
    const value = values[n];
    if (!Number.isFinite(value) || value === 0) continue;
    pen.fillStyle = value > 0 ? positive : negative;
    const from = across(n);
    const size = Math.max(1, across(n + 1) - from - (across(n + 1) - from > 4 ? 1 : 0));
    pen.fillRect(from, Math.min(down(0), down(value)), size, Math.max(1, Math.abs(down(value) - down(0))));
  }
  if (cursor !== null) {
    pen.strokeStyle = colours.cursor;
    pen.lineWidth = 1.5 * ratio;
    pen.beginPath();
    pen.moveTo(across(cursor + 0.5), top);
    pen.lineTo(across(cursor + 0.5), bottom);
    pen.stroke();
  }
  pen.textBaseline = "top";
  pen.textAlign = "center";
  pen.fillStyle = colours.muted;
  for (const step of ticks(Math.max(0, window_.from), window_.from + window_.span - 1, Math.max(2, wide / (70 * ratio)))) {
    if (step === Math.round(step)) pen.fillText(String(window_.steps?.[step] ?? step), across(step + 0.5), bottom + 4 * ratio);
  }
  return { step: (x) => Math.floor(window_.from + ((x * ratio - left) / wide) * window_.span) };
}

// A diagram of the network: layers stacked upwards, unrolled over all steps, or over as many around the cursor as fit.

import { Plane } from "./data.js";
import { make, replaceChildren, shown, svg } from "./dom.js";
import { cssColour, palette, scaleOf } from "./draw.js";

const BOX = { least: 34, most: 104, high: 28 };
const SMALL = 26; // the least width of a box where there is little space
const GAP = { least: 14, most: 34, up: 26 };
const MOST_ROWS = 9; // more rows are drawn closer together
const CHARACTER = 7.2; // width of one in a name, about
const CHIP = 4; // width of a unit's value, at least
const MOST_CHIPS = 12; // units shown in a box

export class NetworkDiagram {
  constructor(view) {
    this.view = view;
    this.picture = svg("svg", { class: "network", role: "group", "aria-label": "The network, unrolled over time" });
    this.element = make("div", { class: "scroll" }, this.picture);
    this.part = make("p", { class: "note" }); // which steps are drawn
    this.asked = 0;
    this.space = 0; // the width that the drawing fills
    new ResizeObserver(() => {
      if (this.element.clientWidth !== this.space) this.draw();
    }).observe(this.element);
    view.on((changed) => {
      if (["step", "row", "place", "result", "shows", "theme"].some((name) => changed.has(name))) this.draw();
    });
  }

  // Inputs lowest, then node by node.
  rowsOf() {
    const { description } = this.view;
    return [
      ...description.inputs.map((input) => ({ ...input, input: true, cells: [], sources: [], kind: "input" })),
      ...description.nodes,
    ];
  }

  placeOf(row) {
    return this.view.places.find((place) => place.node === row || (row.input && place.kind === "input" && place.name === row.name) || (!row.input && place.kind !== "input" && place.name === row.name)) ?? null;
  }

  async draw() {
    const asked = (this.asked += 1);
    const { view } = this;
    const rows = this.rowsOf();
    this.space = this.element.clientWidth;
    const number = new Map(rows.map((row, n) => [row.name, n]));
    const skips = rows.some((row, n) => row.sources.some((source) => number.get(source) !== n - 1)); // wires past a layer
    const letters = Math.min(this.space < 350 ? 11 : 16, Math.max(4, ...rows.map((row) => row.name.length)));
    const left = letters * CHARACTER + 12; // the names
    const least = skips ? 28 : GAP.least;
    const box = this.space < 350 ? SMALL : BOX.least;
    const count = Math.min(Math.max(1, view.steps), Math.max(1, Math.floor((this.space - left - least) / (box + least))));
    const fitting = Math.min((this.space - left) / (count + 0.25), (this.space - left - least) / count); // with a gap before the first
    const across = Math.max(box + least, Math.min(BOX.most + GAP.most, fitting));
    const gap = Math.max(least, Math.min(GAP.most, across / 4));
    const boxWide = across - gap;
    const first = Math.max(0, Math.min(view.step - Math.floor(count / 2), view.steps - count));
    const steps = view.steps ? Array.from({ length: count }, (_, n) => first + n) : [0];
    const planes = await Promise.all(
      rows.map(async (row) => {
        const place = this.placeOf(row);
        if (place !== null) return view.plane(place, place.fields.includes("h") ? "h" : place.fields[place.fields.length - 1]);
        if (row.value === null || row.timed) return null;
        return this.vector(row);
      }),
    );
    if (asked !== this.asked) return;
    const label = (step) => view.description.steps[step];
    this.part.textContent = count < view.steps ? `Steps ${label(steps[0])} to ${label(steps.at(-1))} of ${view.steps}: move the cursor to see others.` : "";
    const x = (column) => left + gap + column * across;
    const wide = x(steps.length);
    const up = rows.length > MOST_ROWS ? GAP.up / 2 : GAP.up;
    const high = (rows.length - 1) * (BOX.high + up) + BOX.high + 32; // with the steps' names
    const y = (n) => high - 30 - BOX.high - n * (BOX.high + up);
    const wires = [];
    const boxes = [];
    const arrow = (path, title) => wires.push(svg("path", { d: path, class: "wire", "marker-end": "url(#head)" }, title ? svg("title", {}, title) : null));
    const unrolled = (row) => row.timed || row.cells.length > 0;
    rows.forEach((row, n) => {
      const places = unrolled(row) ? steps.map((_, column) => [x(column), boxWide]) : [[x(0), x(steps.length - 1) + boxWide - x(0)]];
      places.forEach(([start, width], column) => {
        for (const source of row.sources) {
          const below = number.get(source);
          // A node with one output per row is connected to the last step.
          const once = !unrolled(row) && unrolled(rows[below]) && !rows[below].timed;
          const from = once ? x(steps.length - 1) + boxWide / 2 : unrolled(rows[below]) ? start + width / 2 : x(steps.length - 1) / 2 + (x(0) + boxWide) / 2;
          const to = once ? from : start + width / 2;
          if (below === n - 1) arrow(`M ${from} ${y(below)} L ${to} ${y(n) + BOX.high + 5}`);
          else arrow(`M ${from - boxWide / 2} ${y(below) + BOX.high / 2} C ${from - boxWide / 2 - 26} ${y(below)}, ${to - boxWide / 2 - 26} ${y(n) + BOX.high}, ${to - boxWide / 2 - 5} ${y(n) + BOX.high / 2}`);
        }
        boxes.push(this.box(row, n, start, y(n), width, unrolled(row) ? steps[column] : null, planes[n]));
      });
      boxes.push(this.name(row, y(n), letters));
      if (!row.cells.length) return;
      const backwards = row.cells.some((cell) => cell.reverse);
      const forwards = row.cells.some((cell) => !cell.reverse);
      const word = Object.keys(row.cells[0].form.states).join(" and ");
      for (let column = 0; column <= steps.length; column += 1) {
        const from = x(column - 1) + boxWide;
        const to = column === steps.length ? wide - 2 : x(column);
        if (forwards) arrow(`M ${from + 1} ${y(n) + BOX.high / 2 - (backwards ? 7 : 0)} L ${to - 6} ${y(n) + BOX.high / 2 - (backwards ? 7 : 0)}`, `${word} are passed to the next step`);
        if (backwards) arrow(`M ${to - 1} ${y(n) + BOX.high / 2 + (forwards ? 7 : 0)} L ${from + 6} ${y(n) + BOX.high / 2 + (forwards ? 7 : 0)}`, `${word} are passed to the previous step`);
      }
    });
    const names = this.stepNames(steps, across);
    const heads = names.map((name, column) =>
      svg("text", { x: x(column) + boxWide / 2, y: high - 8, class: steps[column] === view.step ? "stepname now" : "stepname" }, name),
    );
    if (view.steps && !names[0].startsWith("step")) heads.push(svg("text", { x: 0, y: high - 8, class: "stepname head" }, "step"));
    this.picture.setAttribute("viewBox", `0 0 ${wide} ${high}`);
    this.picture.style.width = `${wide}px`;
    const focused = this.picture.getRootNode().activeElement?.getAttribute?.("data-box") ?? null;
    replaceChildren(
      this.picture,
      svg("defs", {}, svg("marker", { id: "head", viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" }, svg("path", { d: "M 0 0 L 8 4 L 0 8 z", class: "head" }))),
      ...wires,
      ...boxes,
      ...heads,
    );
    if (!this.drawn) this.element.scrollTop = this.element.scrollHeight; // the input is at the bottom
    this.drawn = true;
    if (focused !== null) this.picture.querySelector(`[data-box="${focused}"]`)?.focus({ preventScroll: true });
  }

  // The steps' numbers and labels, or only the numbers if they don't fit; the word "step" is then at the left.
  stepNames(steps, across) {
    const { view } = this;
    if (!view.steps) return [""];
    const numbers = steps.map((step) => String(view.description.steps[step]));
    const words = numbers.map((number, n) => {
      const label = view.labels.kind === "text" ? ` “${view.labels.short(view.row, steps[n])}”` : "";
      const text = `step ${number}${label}`;
      return text.length > 18 ? `${text.slice(0, 17)}…` : text;
    });
    const short = words.map((text) => text.slice("step ".length));
    const fits = (texts) => Math.max(...texts.map((text) => text.length)) * 6.6 <= across - 4;
    return [words, short, numbers.map((number) => `step ${number}`)].find(fits) ?? numbers;
  }

  // The name of a layer or an input, to the left of its boxes.
  name(row, top, letters) {
    const place = this.placeOf(row);
    const chosen = this.chosen(place, row);
    return svg(
      "text",
      { x: 0, y: top + BOX.high / 2 + 4.5, class: `rowname${chosen ? " now" : ""}${place === null ? " dim" : ""}`, onclick: place === null ? () => {} : () => this.choose(place, null) },
      svg("title", {}, this.described(row)),
      row.name.length > letters ? `${row.name.slice(0, letters - 3)}…${row.name.slice(-2)}` : row.name,
    );
  }

  chosen(place, row) {
    const { view } = this;
    return place !== null && view.place.name === place.name && (view.place.kind === "input") === Boolean(row.input);
  }

  described(row) {
    const names = row.input ? this.view.shownNames(row.names) : null;
    return row.input ? `${row.name}: an input, ${row.shape ?? ""}${names === null ? "" : `: ${names.slice(0, 24).join(", ")}${names.length > 24 ? " …" : ""}`}` : `${row.name}: ${row.kind} ${row.summary}, ${row.shape}`;
  }

  choose(place, step) {
    this.view.set({ place, unit: 0, ...(step === null ? {} : { step }) });
    this.view.follow();
    this.onchoose?.(place);
  }

  box(row, n, left, top, width, step, plane) {
    const { view } = this;
    const place = this.placeOf(row);
    const names = view.shownNames(row.names);
    const chosen = this.chosen(place, row) && (step === null || step === view.step);
    const group = svg(
      "g",
      {
        class: `box${chosen ? " chosen" : ""}${place === null ? " dim" : ""}`,
        ...(place === null ? {} : { role: "button", tabindex: "0", "data-box": `${n}-${step ?? "all"}` }),
        "aria-label": `${row.name}, ${row.input ? "input" : row.kind}${step === null ? "" : `, step ${view.description.steps[step]}`}`,
      },
      svg("title", {}, `${this.described(row)}${place === null && plane !== null ? `: ${Array.from(plane.data.slice(0, 12), (value, n) => `${names === null ? "" : `${names[n]} `}${shown(value, 4)}`).join(", ")}` : ""}`),
      svg("rect", { x: left, y: top, width, height: BOX.high, rx: 6 }),
      ...this.chips(left + 5, top + 7, width - 10, step, plane),
    );
    if (place !== null) {
      group.addEventListener("click", () => this.choose(place, step));
      group.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          this.choose(place, step);
        }
      });
    }
    return group;
  }

  // A node's output per row, as a plane of one step.
  async vector(row) {
    const { view } = this;
    const after = view.shows === "after" && view.result !== null ? view.result.run.values[row.name] : null;
    if (after) return new Plane(Float64Array.from(after.data), after.data.length, 1);
    const { data, shape } = await view.store.get(row.value);
    return new Plane(data.subarray(view.row * shape[1], (view.row + 1) * shape[1]), shape[1], 1);
  }

  // The numbers of a step as small coloured cells.
  chips(left, top, width, step, plane) {
    if (plane === null || plane.steps === 0) return [];
    const own = step === null ? 0 : plane.steps === this.view.steps ? step : Math.min(plane.steps - 1, Math.floor((step * plane.steps) / this.view.steps));
    const scale = scaleOf(false, plane.range);
    const colours = palette(scale.kind, this.view.theme);
    const count = Math.min(MOST_CHIPS, plane.units, Math.max(1, Math.floor(width / CHIP)));
    const size = Math.min(14, width / count);
    const space = Math.min(1.5, size / 6);
    return Array.from({ length: count }, (_, unit) => {
      const value = plane.at(unit, own);
      const level = Math.max(0, Math.min(255, Math.floor(((value - scale.low) / (scale.high - scale.low)) * 255)));
      return svg("rect", { x: left + unit * size, y: top, width: size - space, height: 14, rx: 2, class: Number.isFinite(value) ? "chip" : "chip nothing", fill: Number.isFinite(value) ? cssColour(colours[level]) : null });
    });
  }
}

// A diagram of the network: layers stacked upwards, unrolled over the steps around the cursor.

import { Plane } from "./data.js";
import { make, replaceChildren, shown, svg } from "./dom.js";
import { cssColour, palette, scaleOf } from "./draw.js";

const BOX = { wide: 104, high: 46 };
const GAP = { across: 34, up: 30 };
const EDGE = 10;
const MOST_CHIPS = 12; // units shown in a box

export class NetworkDiagram {
  constructor(view) {
    this.view = view;
    this.picture = svg("svg", { class: "network", role: "group", "aria-label": "The network, unrolled over time" });
    this.element = make("div", { class: "scroll" }, this.picture);
    this.asked = 0;
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
    const columns = this.element.clientWidth < 400 ? 2 : 3;
    const count = Math.min(columns, Math.max(1, view.steps));
    const first = Math.max(0, Math.min(view.step - 1, view.steps - count));
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
    const number = new Map(rows.map((row, n) => [row.name, n]));
    const past = rows.some((row, n) => row.sources.some((source) => number.get(source) !== n - 1)) ? 30 : 0; // space for wires that skip a layer
    const x = (column) => EDGE + past + 12 + column * (BOX.wide + GAP.across);
    const wide = past + EDGE + steps.length * (BOX.wide + GAP.across) + 16;
    const high = rows.length * (BOX.high + GAP.up) + 26;
    const y = (n) => high - 34 - BOX.high - n * (BOX.high + GAP.up);
    const wires = [];
    const boxes = [];
    const arrow = (path, title) => wires.push(svg("path", { d: path, class: "wire", "marker-end": "url(#head)" }, title ? svg("title", {}, title) : null));
    const unrolled = (row) => row.timed || row.cells.length > 0;
    rows.forEach((row, n) => {
      const across = unrolled(row) ? steps.map((_, column) => [x(column), BOX.wide]) : [[x(0), x(steps.length - 1) + BOX.wide - x(0)]];
      across.forEach(([left, width], column) => {
        for (const source of row.sources) {
          const below = number.get(source);
          // A node with one output per row is connected to the last step.
          const once = !unrolled(row) && unrolled(rows[below]) && !rows[below].timed;
          const from = once ? x(steps.length - 1) + BOX.wide / 2 : unrolled(rows[below]) ? left + width / 2 : x(steps.length - 1) / 2 + (x(0) + BOX.wide) / 2;
          const to = once ? from : left + width / 2;
          if (below === n - 1) arrow(`M ${from} ${y(below)} L ${to} ${y(n) + BOX.high + 5}`);
          else arrow(`M ${from - BOX.wide / 2} ${y(below) + BOX.high / 2} C ${from - BOX.wide / 2 - 30} ${y(below)}, ${to - BOX.wide / 2 - 30} ${y(n) + BOX.high}, ${to - BOX.wide / 2 - 5} ${y(n) + BOX.high / 2}`);
        }
        boxes.push(this.box(row, n, left, y(n), width, unrolled(row) ? steps[column] : null, planes[n]));
      });
      if (!row.cells.length) return;
      const backwards = row.cells.some((cell) => cell.reverse);
      const forwards = row.cells.some((cell) => !cell.reverse);
      const word = row.cells[0].spec.kind === "lstm" ? "h and c" : "h";
      for (let column = 0; column <= steps.length; column += 1) {
        const from = column === 0 ? 2 : x(column - 1) + BOX.wide;
        const to = column === steps.length ? wide - 8 : x(column);
        if (forwards) arrow(`M ${from + 1} ${y(n) + BOX.high / 2 - (backwards ? 7 : 0)} L ${to - 6} ${y(n) + BOX.high / 2 - (backwards ? 7 : 0)}`, `${word} are passed to the next step`);
        if (backwards) arrow(`M ${to - 1} ${y(n) + BOX.high / 2 + (forwards ? 7 : 0)} L ${from + 6} ${y(n) + BOX.high / 2 + (forwards ? 7 : 0)}`, `${word} are passed to the previous step`);
      }
    });
    const heads = steps.map((step, column) =>
      svg("text", { x: x(column) + BOX.wide / 2, y: high - 8, class: step === view.step ? "stepname now" : "stepname" }, view.steps ? this.stepName(step) : ""),
    );
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
    if (focused !== null) this.picture.querySelector(`[data-box="${focused}"]`)?.focus({ preventScroll: true });
  }

  stepName(step) {
    const { view } = this;
    const label = view.labels.kind === "text" ? ` “${view.labels.short(view.row, step)}”` : "";
    const text = `step ${view.description.steps[step]}${label}`;
    return text.length > 18 ? `${text.slice(0, 17)}…` : text;
  }

  box(row, n, left, top, width, step, plane) {
    const { view } = this;
    const place = this.placeOf(row);
    const chosen = place !== null && view.place.name === place.name && (view.place.kind === "input") === Boolean(row.input) && (step === null || step === view.step);
    const fits = Math.floor((width - 16) / 7.2);
    const title = row.name.length > fits ? `${row.name.slice(0, fits - 1)}…` : row.name;
    const group = svg(
      "g",
      {
        class: `box${chosen ? " chosen" : ""}${place === null ? " dim" : ""}`,
        ...(place === null ? {} : { role: "button", tabindex: "0", "data-box": `${n}-${step ?? "all"}` }),
        "aria-label": `${row.name}, ${row.input ? "input" : row.kind}${step === null ? "" : `, step ${view.description.steps[step]}`}`,
      },
      svg("title", {}, row.input ? `${row.name}: an input, ${row.shape ?? ""}` : `${row.name}: ${row.kind} ${row.summary}, ${row.shape}${place === null && plane !== null ? `: ${Array.from(plane.data.slice(0, 12), (value) => shown(value, 4)).join(", ")}` : ""}`),
      svg("rect", { x: left, y: top, width, height: BOX.high, rx: 7 }),
      svg("text", { x: left + 8, y: top + 17 }, title),
      ...this.chips(left + 8, top + 26, width - 16, step, plane),
    );
    if (place !== null) {
      const choose = () => {
        view.set({ place, unit: 0, ...(step === null ? {} : { step }) });
        view.follow();
        this.onchoose?.(place);
      };
      group.addEventListener("click", choose);
      group.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          choose();
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
    const scale = scaleOf("", plane.range);
    const colours = palette(scale.kind, this.view.theme);
    const count = Math.min(MOST_CHIPS, plane.units);
    const size = Math.min(14, width / count);
    return Array.from({ length: count }, (_, unit) => {
      const value = plane.at(unit, own);
      const level = Math.max(0, Math.min(255, Math.floor(((value - scale.low) / (scale.high - scale.low)) * 255)));
      return svg("rect", { x: left + unit * size, y: top, width: size - 1.5, height: 12, rx: 2, class: Number.isFinite(value) ? "chip" : "chip nothing", fill: Number.isFinite(value) ? cssColour(colours[level]) : null });
    });
  }
}

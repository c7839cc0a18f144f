// What the figures of the course share: their frame, in the style of the page of a trace, with controls, charts and numbers.
// A chapter has <div data-figure="name"></div>; `data-given` may hold JSON, such as a network that the chapter has trained.

import { Plane } from "../../../src/cellstack/inspect/page/data.js";
import { behind, button, checkbox, make, replaceChildren, select, shown, table } from "../../../src/cellstack/inspect/page/dom.js";
import { colourBar, drawBars, drawLines, drawTiles } from "../../../src/cellstack/inspect/page/draw.js";
import { byName, cellShapes } from "../../../src/cellstack/inspect/page/engine/cells.js";
import { numbersIn } from "../../../src/cellstack/inspect/page/engine/shapes.js";
import { COLOURS } from "../../../src/cellstack/inspect/page/page.js";
import { pageStyle } from "../../../src/cellstack/inspect/page/style.js";

/* global cellKinds */ // the form of each kind of cell with the default flags, which html.py inserts before the modules

const FIGURE_STYLE = `
.figure { border: 1px solid var(--edge); border-radius: 12px; padding: 14px 16px; margin: 0 0 16px; }
.figure > * + * { margin-top: 8px; }
.figure .sliders { max-width: none; }
.figure .key .dashed { border-bottom-style: dashed; }
.figure .sliders label { overflow-wrap: anywhere; }
.figure .cellview { grid-template-columns: minmax(0, 1fr); }
.figure .wires { margin: 0 auto; }
.figure .numbers-line { display: flex; flex-wrap: wrap; gap: 4px 20px; }

@media (max-width: 600px) {
  .figure { padding: 12px 10px; }
  .figure .sliders { grid-template-columns: minmax(0, 1fr) auto; row-gap: 0; }
  .figure .sliders label { grid-column: 1 / -1; line-height: 1.2; }
}
`;

// Show a figure wherever a page has a place for it. `build(figure)` adds what it consists of, and returns the function that
// draws it, which is called after every change.
export function figure(name, build) {
  for (const host of document.querySelectorAll(`[data-figure="${name}"]`)) new Figure(host, build);
}

// It is also what the parts of the page of a trace need of a view: { theme, colours, patches, on, namesOf, set }.
export class Figure {
  constructor(host, build) {
    const root = host.attachShadow({ mode: "open" });
    const chapter = document.querySelector("h1")?.firstChild.textContent ?? "";
    this.page = make("div", { class: "page figure", role: "group", "aria-label": `Interactive figure: ${chapter}` });
    root.append(make("style", {}, pageStyle, FIGURE_STYLE), this.page);
    this.given = JSON.parse(host.dataset.given ?? "null");
    this.patches = [];
    this.listeners = [];
    this.count = 0;
    this.draw = () => {};
    this.paint();
    this.draw = build(this);
    new MutationObserver(() => this.paint()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.page); // also draws it at first
  }

  paint() {
    this.theme = this.page.dataset.theme = document.documentElement.dataset.theme === "dark" ? "dark" : "light";
    const style = getComputedStyle(this.page);
    this.colours = byName(COLOURS, (property) => style.getPropertyValue(property).trim());
    for (const listener of this.listeners) listener(new Set(["theme"]));
    this.draw();
  }

  on(listener) {
    this.listeners.push(listener);
  }

  namesOf() {
    return null;
  }

  set() {}

  // The last element, if it has this class, or a new one: neighbouring controls share a row.
  row(name) {
    const last = this.page.lastElementChild;
    if (last?.className === name) return last;
    return this.add(make("div", { class: name }));
  }

  add(element) {
    this.page.append(element);
    return element;
  }

  slider(label, [min, max, step], value) {
    const id = `control-${(this.count += 1)}`;
    const out = make("output", { for: id, "aria-live": "off" }); // the slider itself says its value
    const range = make("input", { type: "range", id, min, max, step, value, oninput: () => { tell(); this.draw(); } });
    const tell = () => { out.textContent = shown(Number(range.value), 4); };
    tell();
    this.row("sliders").append(make("label", { for: id }, label), range, out);
    return {
      get value() { return Number(range.value); },
      set value(number) { range.value = number; tell(); },
    };
  }

  // `onchange` comes before the figure is drawn.
  select(label, choices, value, onchange = () => {}) {
    const { element, box } = select(label, choices, value, () => { onchange(box.value); this.draw(); });
    this.row("toolbar").append(element);
    return box;
  }

  checkbox(label, checked) {
    const { element } = checkbox(label, checked, () => this.draw());
    this.row("toolbar").append(element);
    return element.firstChild;
  }

  button(label, onclick, attributes = {}) {
    const made = button(label, () => { onclick(); this.draw(); }, attributes);
    this.row("toolbar").append(made);
    return made;
  }

  // A sentence that is read out when it changes.
  sentence() {
    const element = this.add(make("p", { class: "readout", role: "status" }));
    return (text) => { if (element.textContent !== text) element.textContent = text; };
  }

  // Named numbers in a row.
  numbers() {
    const row = this.add(make("div", { class: "numbers-line" }));
    return (named) => replaceChildren(row, ...Object.entries(named).map(([name, value]) =>
      make("span", {}, `${name} = `, make("b", { "data-name": name }, typeof value === "number" ? shown(value, 4) : value))));
  }

  // A drawing with its title, a legend, and a table of its numbers.
  drawing(title, kind) {
    const canvas = make("canvas", { class: kind, role: "img", "aria-label": title });
    const legend = make("div", { class: "legend key" });
    const { element, body } = behind(title);
    this.add(make("div", { class: "group" }, make("h3", {}, title), canvas, legend, element));
    const list = (rows) => {
      const steps = Math.max(0, ...rows.map(([, values]) => values.length));
      const cells = rows.map(([name, values]) => [name, ...Array.from(values, (value) => (typeof value === "number" ? shown(value, 4) : value))]);
      body.replaceChildren(table(["step", ...Array.from({ length: steps }, (_, n) => String(n))], cells));
    };
    return { canvas, legend, list };
  }

  // Lines over the steps: { name, values, colour, dash }; `more` rows of the table.
  chart(title) {
    const { canvas, legend, list } = this.drawing(title, "chart");
    return (lines, more = []) => {
      const drawn = lines.map(({ values, colour, dash }) => ({ plane: new Plane(Float64Array.from(values), 1, values.length), unit: 0, colour, dash, gaps: true }));
      drawLines(canvas, this.colours, drawn, { from: 0, span: Math.max(...lines.map(({ values }) => values.length)) });
      replaceChildren(legend, ...lines.map(({ name, colour, dash }) => make("span", { style: `--line: ${colour}`, class: dash ? "dashed" : null }, name)));
      list([...lines.map(({ name, values }) => [name, values]), ...more]);
    };
  }

  // Bars over the steps, above and below 0.
  bars(title, name) {
    const { canvas, list } = this.drawing(title, "chart");
    return (values) => {
      drawBars(canvas, this.colours, values, { from: 0, span: values.length }, { positive: this.colours.warm, negative: this.colours.cold });
      list([[name, values]]);
    };
  }

  // A row of tiles for each unit; names: of the rows.
  tiles(title) {
    const { canvas, legend, list } = this.drawing(title, "tiles");
    return (plane, scale, names) => {
      drawTiles(canvas, this, plane, scale, names);
      replaceChildren(legend, ...colourBar(scale, this.theme));
      legend.classList.remove("key");
      list(Array.from({ length: plane.units }, (_, unit) => [names?.[unit] ?? `unit ${unit}`, plane.line(unit)]));
    };
  }
}

// A cell for the engine. arrays: the numbers of each array in C order, gates in the order of the kind; or a function of an
// array's name, and of how many numbers it has.
export function cellOf(kind, units, inputs, arrays) {
  const form = cellKinds[kind];
  const spec = { ...form.settings, input_size: inputs, units };
  const made = (shape, name) => {
    const data = typeof arrays === "function" ? arrays(name, numbersIn(shape)) : arrays[name];
    return { data: Float64Array.from(data), shape };
  };
  return { spec, form, arrays: byName(cellShapes({ form, spec }), made) };
}

// A network of cells, each on top of the one before.
export function networkOf(...cells) {
  const settings = { return_sequences: true, go_backwards: false, zero_output_for_mask: false, residual: false };
  const nodes = cells.map((cell, n) => ({ name: `layer_${n}`, type: "recurrent", sources: [n ? `layer_${n - 1}` : "input"], settings, arrays: {}, cells: [cell] }));
  return { inputs: [{ name: "input", shape: [null, cells[0].spec.input_size] }], outputs: [nodes.at(-1).name], dtype: "float64", nodes };
}

// One sequence, all features of a step next to each other, as the input of a network.
export function inputOf({ inputs: [{ name, shape }] }, values) {
  const features = shape.at(-1);
  return { [name]: { data: Float64Array.from(values), shape: [1, values.length / features, features] } };
}

// The wiring of a cell: one unit at one step, with its actual numbers, and the formula of each.

import { button, make, popover, replaceChildren, shown, svg } from "./dom.js";
import { colourBar, cssColour, inkOn, lineColour, palette, scaleOf } from "./draw.js";
import { stateSizes } from "./engine/cells.js";
import { activationName, CellStep } from "./formulas.js";
import { placeIn } from "./heads.js";
import { isGate, meaningOf } from "./view.js";
import { wiringOf } from "./wiring.js";

const MOST_TERMS = 12; // terms of a sum shown one by one; the rest is one line
const MOST_UNITS = 12; // in the table
const MOST_INPUTS = 24;
const NARROW = 640; // with less space, in CSS pixels, the drawing is narrower, with shorter numbers
const NARROWER = 0.68;
const TIGHT = 480; // with less space, the table has shorter numbers

// A number with as many of these digits as fit into `most` characters; a small one with an exponent if none fits.
function shortest(value, digits, most) {
  const texts = digits.map((count) => shown(value, count));
  return texts.find((text) => text.length <= most) ?? value.toExponential(0).replaceAll("-", "−");
}

export class CellView {
  constructor(view, root) {
    this.view = view;
    this.pop = popover(root);
    this.title = make("h3", {});
    this.wires = svg("svg", { class: "wires", role: "group" });
    this.numbers = make("div", { class: "numbers" });
    this.note = make("p", { class: "note" });
    this.legend = make("div", { class: "legend" });
    this.meanings = make("dl", { class: "meanings" });
    this.body = make("div", { class: "cellview" }, make("div", {}, make("div", { class: "scroll" }, this.wires), this.legend, this.meanings), this.numbers);
    this.element = make("div", {}, this.title, this.note, this.body);
    this.open = false;
    this.built = null;
    this.asked = 0;
    view.on((changed) => {
      if (["step", "row", "place", "unit", "result", "shows", "theme"].some((name) => changed.has(name))) this.draw();
    });
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const place = view.place?.kind === "cell" ? view.place : (view.places.find((one) => one.kind === "cell" && one.name === view.place?.name) ?? null);
    if (place === null || !view.stepsOf(place)) {
      const why = view.places.some((one) => one.kind === "cell") ? `${view.place?.title ?? "This network"} has no cell: choose a layer with a cell in the network.` : "This trace has no cell.";
      this.title.textContent = "No cell here";
      this.note.textContent = why;
      replaceChildren(this.wires);
      replaceChildren(this.numbers);
      replaceChildren(this.legend);
      replaceChildren(this.meanings);
      this.built = null;
      return;
    }
    const found = await given(view, place);
    if (asked !== this.asked) return;
    this.found = found;
    const { cell } = place;
    const { heads } = cell.form;
    const unit = heads ? view.nearestIn("h") : Math.min(view.unit, cell.units.length - 1);
    this.title.textContent = `${cell.form.title} cell of ${place.title}, ${this.titleOf(place, unit)}, ${view.labels.full(view.row, view.step)}`;
    this.note.textContent = found.why ?? "";
    this.build(place, unit);
    this.fill(place, unit);
  }

  titleOf(place, unit) {
    return place.cell.form.heads ? this.view.unitTitle(place, "h", unit) : `unit ${place.cell.units[unit] ?? unit}`;
  }

  // The drawing and the table, rebuilt when another cell or other units are shown.
  build(place, unit) {
    const { cell } = place;
    const { heads } = cell.form;
    const each = cell.units.length / (heads || 1); // shown together: the units of a head
    const start = unit - (unit % each);
    const first = Math.max(start, Math.min(unit - MOST_UNITS / 2, start + each - MOST_UNITS));
    const parts = getComputedStyle(this.body).gridTemplateColumns.split(" ").length;
    this.narrow = this.element.clientWidth / parts < NARROW;
    this.tight = this.element.clientWidth < TIGHT;
    const key = `${place.key} ${first} ${this.narrow} ${this.tight}`;
    if (this.built?.key === key) return;
    this.pop.hide();
    const wiring = wiringOf(cell.form);
    const [whole, high] = wiring.size;
    const across = this.narrow ? NARROWER : 1;
    const wide = whole * across;
    this.wires.classList.toggle("narrow", this.narrow);
    this.numbers.classList.toggle("tight", this.tight);
    this.wires.setAttribute("viewBox", `0 0 ${wide} ${high}`);
    this.wires.setAttribute("aria-label", `The wiring of one unit of this ${cell.form.title} cell`);
    const ports = {};
    const boxes = Object.entries(wiring.ports).sort(([, a], [, b]) => a[0] - b[0] || a[1] - b[1]).map(([name, [left, y]]) => {
      const x = left * across;
      const width = name === "x" ? 86 : 86 * across;
      const value = svg("text", { x, y: y + 12, class: "value" }, "");
      const box = svg("rect", { x: x - width / 2, y: y - 22, width, height: 44, rx: 8 });
      const group = svg("g", { class: name === "x" ? "port small" : "port", "data-field": name, tabindex: "0", role: "button" }, box, svg("text", { x, y: y - 6, class: "name" }, name), value);
      ports[name] = { group, box, value, texts: group.querySelectorAll("text") };
      this.pop.attach(group, () => this.formula(place, name, this.unit));
      group.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          group.dispatchEvent(new MouseEvent("click"));
        }
      });
      return group;
    });
    replaceChildren(
      this.wires,
      svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M 0 0 L 8 4 L 0 8 z", class: "head" }))),
      svg("rect", { x: 104 * across, y: 18, width: wide - 200 * across, height: high - 66, rx: 16, class: "hull" }),
      ...wiring.paths.map((d) => svg("path", { d: d.replace(/([MH]) (\d+)/g, (_, letter, x) => `${letter} ${x * across}`), class: "wire", "marker-end": "url(#tip)" })),
      ...wiring.dots.map(([cx, cy]) => svg("circle", { cx: cx * across, cy, r: 3, class: "head" })),
      ...wiring.signs.map(([left, y, name]) => {
        const activation = cell.form.activations[name]; // `name` is a sign, or an activation of this cell
        const sign = activation === undefined ? name : activationName(activation);
        const [x, width] = [left * across, sign.length > 1 ? Math.max(38, 44 * across, 14 + 8 * sign.length) : 32 * across];
        return svg("g", { class: "sign" }, svg("rect", { x: x - width / 2, y: y - 16, width, height: 32, rx: width / 2 }), svg("text", { x, y: y + 5 }, sign));
      }),
      ...boxes,
    );
    replaceChildren(this.meanings, ...cell.form.trace.flatMap((name) => [make("dt", {}, name), make("dd", {}, meaningOf(cell.form, name))]));
    // The table of all values of the step.
    const fields = Object.keys(cell.fields);
    const states = Object.keys(cell.form.states).filter((name) => fields.includes(name));
    const several = (name) => !heads || each === 1 || this.view.unitsOf(place, name.replace("_prev", "")) > heads; // the others are in the drawing
    const columns = [...states.reverse().map((name) => `${name}_prev`), ...fields].filter(several);
    const count = Math.min(MOST_UNITS, each);
    const cells = [];
    const below = this.tight && !heads; // the word "unit" is then in the heading
    const rows = Array.from({ length: count }, (_, n) => {
      const own = first + n;
      const head = make("th", { scope: "row" }, button(below ? String(cell.units[own] ?? own) : this.titleOf(place, own), () => this.view.set(heads ? { field: "h", unit: own } : { unit: own }), { class: "plain", title: "Show the wiring of this unit" }));
      const row = make("tr", { "data-unit": own }, head);
      for (const name of columns) {
        const number = make("button", { type: "button", class: "number", "data-field": name, "data-unit": own });
        this.pop.attach(number, () => this.formula(place, name, own));
        cells.push({ number, name, unit: own });
        row.append(make("td", {}, number));
      }
      return row;
    });
    const inputs = heads ? 0 : Math.min(MOST_INPUTS, cell.spec.input_size); // q, k and v are in the table
    const xs = Array.from({ length: inputs }, (_, n) => {
      const number = make("button", { type: "button", class: "number", "data-field": "x", "data-unit": n });
      this.pop.attach(number, () => this.formula(place, "x", n));
      return number;
    });
    const names = this.view.namesOf(place, "x");
    const titled = xs.map((number, n) => (names === null ? number : make("span", { class: "titled", title: names[n] }, make("span", {}, names[n]), number)));
    replaceChildren(
      this.numbers,
      make(
        "div",
        { class: "scroll" },
        make(
          "table",
          { class: "steptable" },
          make("caption", {}, count < each ? `All values of this step, for ${count} of ${each} units` : "All values of this step"),
          make("thead", {}, make("tr", {}, make("th", { scope: "col" }, below ? "unit" : ""), ...columns.map((name) => make("th", { scope: "col", title: meaningOf(cell.form, name) ?? null }, name)))),
          make("tbody", {}, ...rows),
        ),
      ),
      inputs === 0 ? null : make("p", { class: "inputs" }, make("span", {}, `x, the input${inputs < cell.spec.input_size ? `, the first ${inputs} of ${cell.spec.input_size}` : ""}: `), ...titled),
    );
    this.built = { key, ports, cells, xs, rows };
  }

  // Update the numbers in the existing elements.
  fill(place, unit) {
    this.unit = unit;
    const { built, found, view } = this;
    const theme = view.theme;
    const paint = (element, value, field) => {
      const scale = isGate(place.cell.form, field) ? scaleOf(true, { low: 0, high: 1 }) : found.scale;
      const pixel = palette(scale.kind, theme)[Math.max(0, Math.min(255, Math.floor(((value - scale.low) / (scale.high - scale.low)) * 255)))] ?? 0;
      const fine = Number.isFinite(value);
      element.style.setProperty("--fill", fine ? cssColour(pixel) : "#000");
      element.style.setProperty("--on", fine ? inkOn(pixel) : "#fff");
    };
    for (const [name, port] of Object.entries(built.ports)) {
      const numbers = found.now[name.replace("_prev", "")];
      const value = numbers === undefined ? null : valueOf(found, name, place.cell.form.heads ? unit : Math.min(unit, numbers.length - 1));
      const { key_size: keys, value_size: values } = place.cell.spec;
      port.value.textContent = name === "x" ? this.listed(found.x) : numbers === undefined ? `${keys} × ${values}` : this.short(value);
      if (value !== null && value !== undefined) paint(port.group, value, name);
      else port.group.style.setProperty("--fill", "var(--raised)");
      port.group.setAttribute("aria-label", name === "x" ? `x, the input: ${this.listed(found.x)}` : `${name} of this unit: ${shown(value, 4)}`);
      port.group.style.setProperty("--line", lineColour(name.replace("_prev", ""), theme));
    }
    for (const { number, name, unit: own } of built.cells) {
      const value = valueOf(found, name, own);
      number.textContent = this.tight ? shortest(value, [2, 1], 5) : shown(value, 4);
      number.disabled = value === undefined;
      if (value === null || value === undefined) number.style.setProperty("--fill", "transparent");
      else paint(number, value, name);
    }
    const names = view.namesOf(place, "x");
    built.xs.forEach((number, n) => {
      number.textContent = shown(found.x?.[n], 4);
      number.setAttribute("aria-label", `${names?.[n] ?? `x ${n}`}: ${number.textContent}`);
    });
    const gates = scaleOf(true, { low: 0, high: 1 });
    const some = Object.keys(built.ports).some((name) => isGate(place.cell.form, name));
    replaceChildren(
      this.legend,
      some ? make("span", { class: "scale" }, "gates:", ...colourBar(gates, theme)) : null,
      make("span", { class: "scale" }, some ? "other values:" : null, ...colourBar(found.scale, theme)),
    );
    for (const row of built.rows) row.classList.toggle("chosen", Number(row.dataset.unit) === unit);
  }

  // A number that fits into a box of the drawing.
  short(value) {
    return this.narrow ? shortest(value, [3, 2, 1], 6) : shortest(value, [4, 3, 2, 1], 8);
  }

  listed(x) {
    if (x === null) return "–";
    if (x.length === 1) return shown(x[0], 4);
    return x.length <= 2 ? Array.from(x, (value) => shown(value, 3)).join("  ") : `${x.length} numbers`;
  }

  // The popover of a number: its formula.
  formula(place, name, unit) {
    const { found, view } = this;
    const { cell } = place;
    if (found === null) return null;
    const head = (text) => make("strong", {}, text);
    const number = cell.units[unit] ?? unit;
    if (name === "x") {
      if (found.x === null) return null;
      const names = view.namesOf(place, "x");
      const all = Array.from(found.x.slice(0, MOST_INPUTS), (value, n) => `${names?.[n] ?? `x[${n}]`} = ${shown(value, 5)}`);
      return [head("x: the input at this step"), make("div", { class: "sums" }, ...all.map((text) => make("div", {}, text)))];
    }
    if (name.endsWith("_prev")) {
      const letter = name.replace("_prev", "");
      const value = valueOf(found, name, unit);
      const from = found.begins === null ? `${letter} of the previous step` : found.begins;
      return [head(`${letter}_prev, ${this.titleOf(place, unit)}`), make("div", {}, `${value === undefined ? "" : `${shown(value, 6)}: `}${from}`)];
    }
    const title = head(`${name}, ${this.titleOf(place, unit)}: ${(meaningOf(cell.form, name) ?? "").split(":")[0]}`);
    const kept = valueOf(found, name, unit);
    const isMatrix = found.now[name] === undefined;
    if (kept === undefined && !isMatrix) return null;
    if (found.masked) {
      const text = Object.hasOwn(cell.form.states, name) ? `This step is masked: ${name} stays ${isMatrix ? "as it is" : shown(kept, 5)}.` : "This step is masked: its gates are 0.";
      return [title, make("div", {}, text)];
    }
    if (isMatrix) return [title, make("div", { class: "result" }, `C = f · C_prev + i · k · vᵀ / √${cell.spec.key_size}`)];
    const patches = view.patches.filter((patch) => patchesNumber(patch, place, name, number, view));
    const lines = patches.map((patch) => {
      const what = patch.text ?? `${patch.how}${patch.value === null ? "" : ` ${shown(patch.value, 5)}`}`;
      return make("div", { class: "patched" }, `It is patched: ${what}. Its value is then ${shown(kept, 5)}.`);
    });
    if (found.step === null) return [title, ...lines, make("div", {}, `${shown(kept, 6)}. ${found.why}`)];
    const made = found.step.explain(name, unit);
    return [title, ...lines, ...made.flatMap((line) => (line.terms ? this.sum(line) : [make("div", { class: line.result ? "result" : "" }, line.text)]))];
  }

  // A sum of products: all of them, or the largest and the total of the others.
  sum({ terms, title, total }) {
    const sorted = terms.length > MOST_TERMS ? [...terms].sort((a, b) => Math.abs(b.product) - Math.abs(a.product)) : terms;
    const some = sorted.slice(0, MOST_TERMS);
    const rest = sorted.slice(MOST_TERMS).reduce((all, term) => all + term.product, 0);
    const row = (name, value, weight, product) =>
      make("tr", {}, make("th", { scope: "row", title: name }, name), make("td", {}, value), make("td", {}, weight), make("td", {}, product));
    return [
      make(
        "table",
        { class: "sum" },
        make("caption", {}, title),
        make(
          "tbody",
          {},
          ...some.map((term) => row(term.name, shown(term.value, 5), `· ${shown(term.weight, 5)}`, `= ${shown(term.product, 5)}`)),
          terms.length > MOST_TERMS ? row(`the other ${terms.length - MOST_TERMS}`, "", "", shown(rest, 5)) : null,
          row("sum", "", "", shown(total, 5)),
        ),
      ),
    ];
  }
}

function valueOf({ before, now, heads }, name, unit) {
  const numbers = name.endsWith("_prev") ? before[name.replace("_prev", "")] : now[name];
  return numbers?.[placeIn(heads, unit, now.h.length, numbers.length)];
}

// Whether an axis of a patch includes an index: all, a list, [start, stop, step], or a slice object.
function named(index, number, listed) {
  if (index === null) return true;
  if (Array.isArray(index) && listed) return index.includes(number);
  const [start, stop, step] = Array.isArray(index) ? index : [index.start, index.stop, index.step];
  const from = start ?? 0;
  return number >= from && number < (stop ?? Infinity) && (number - from) % (step ?? 1) === 0;
}

function patchesNumber(patch, place, field, unit, view) {
  if (patch.node !== place.name || patch.cell !== place.number || patch.gate !== field) return false;
  const { steps, row_numbers: rows } = view.description;
  const network = patch.text !== undefined; // its own: a list of steps is one of numbers
  return named(patch.units, unit, true) && named(patch.rows, rows[view.row], true) && named(patch.steps, steps[view.stepAt(place)], network);
}

// Everything known about a cell at the cursor: { x, before: { h, … }, now: { i, … }, step, masked, begins, why, scale }.
export async function given(view, place) {
  const { cell } = place;
  const step = view.stepAt(place);
  const changed = view.shows !== "trace" && view.result !== null;
  const planeOfField = async (field) => (changed ? view.after(place, field) : null) ?? view.traced(place, field);
  const fields = Object.keys(cell.fields);
  const planes = Object.fromEntries(await Promise.all(fields.map(async (field) => [field, await planeOfField(field)])));
  const now = Object.fromEntries(fields.map((field) => [field, planes[field].column(step)]));
  const states = Object.keys(cell.form.states).filter((name) => name in planes);
  const mask = await view.mask(place);
  const steps = planes.h.steps;
  const previous = cell.reverse ? step + 1 : step - 1;
  const first = previous < 0 || previous >= steps;
  const found = { heads: cell.form.heads, now, x: null, before: {}, step: null, masked: mask !== null && !mask[step], begins: null, why: null, scale: null };
  // The input of the cell, from the trace or from the changed run.
  if (changed) found.x = changedInput(view, place, step);
  if (!changed && cell.x !== null) found.x = (await view.traced(place, "x")).column(step);
  // The state before the step.
  const reset = await view.resets(place);
  const begun = reset !== null && reset[step];
  const numbers = view.description.steps;
  const follows = cell.whole || (!first && Math.abs(numbers[step] - numbers[previous]) === 1);
  for (const name of states) {
    if (begun) found.before[name] = await initialOf(view, place, name);
    else if (!first && follows) found.before[name] = planes[name].column(previous);
    else if (first && cell.before !== null) found.before[name] = rowOf(await view.store.get(cell.before[name]), view.row);
  }
  const sizes = [...Object.values(now), ...Object.values(found.before)].flatMap((column) => Array.from(column, (value) => (Number.isFinite(value) ? Math.abs(value) : 0)));
  const size = sizes.reduce((most, one) => Math.max(most, one), 1);
  found.scale = scaleOf(false, { low: -size, high: size });
  if (begun) found.begins = "the state was reset before this step";
  else if (first && cell.before !== null) found.begins = "the initial state of the run";
  const allUnits = cell.units.length === cell.spec.units;
  const known = states.every((name) => found.before[name] !== undefined) && found.x !== null && allUnits;
  if (cell.weights === null) found.why = "This page doesn't include the weights of this cell, so its sums can't be shown.";
  else if (!known || (cell.form.heads && !cell.whole)) found.why = changed && found.x === null ? "The input of this cell after the change is unknown, so its sums can't be shown." : "The trace covers only part of the run, so the sums of this step can't be shown.";
  else if (!found.masked) {
    const arrays = {};
    for (const [name, reference] of Object.entries(cell.weights)) arrays[name] = changed ? (view.result.weights?.[place.key]?.[name] ?? (await view.store.get(reference))) : await view.store.get(reference);
    found.step = new CellStep({ spec: cell.spec, form: cell.form, arrays }, { x: found.x, before: found.before, now, names: view.namesOf(place, "x"), memory: cell.form.heads ? { memory: await memoryOf(view, place, planes), step, label: (at) => view.labels.full(view.row, at) } : null });
  }
  return found;
}

// What the weights of an mLSTM are computed from; see `weightsAt`.
export async function memoryOf(view, place, planes) {
  const [C, mask, reset] = await Promise.all([view.store.get(place.cell.before.C), view.mask(place), view.resets(place)]);
  return { planes, spec: place.cell.spec, mask, reset, C: rowOf(C, view.row) };
}

function rowOf({ data, shape }, row) {
  return data.subarray(row * shape[1], (row + 1) * shape[1]);
}

async function initialOf(view, place, name) {
  const { weights } = place.cell;
  const learned = weights?.[`initial_${name}`];
  if (learned !== undefined) return (await view.store.get(learned)).data;
  return new Float64Array(stateSizes(place.cell)[name]);
}

// The input of a cell in a changed run: the output of the cell below it in a stack; null where unknown.
function changedInput(view, place, step) {
  if (place.lowest) return view.after(place, "x")?.column(step) ?? null;
  const below = view.places.find((one) => one.kind === "cell" && one.name === place.name && one.number === place.number - 1);
  const stacked = place.node.kind === "Recurrent" && below !== undefined && !place.node.residual;
  return stacked ? (view.after(below, "h")?.column(step) ?? null) : null;
}

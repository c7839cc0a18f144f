// What the units of a network know about quotation marks: the reader's text, ablation, and what-if.

import { planeOf } from "../../../src/cellstack/inspect/page/data.js";
import { make, replaceChildren, shown, table } from "../../../src/cellstack/inspect/page/dom.js";
import { colourBar, cssColour, inkOn, palette, scaleOf } from "../../../src/cellstack/inspect/page/draw.js";
import { readNetwork, run } from "../../../src/cellstack/inspect/page/engine/engine.js";
import { isGate, meaningOf } from "../../../src/cellstack/inspect/page/view.js";
import { figure, inputOf } from "./common.js";

const USUAL_TEXT = 'she said "come in" and he said "no, thanks" and left';
const WHAT_IFS = [["", "nothing"], ["c 0", "its memory is 0"], ["f 0", "its forget gate is 0"], ["f 1", "its forget gate is 1"], ["i 0", "its input gate is 0"]];

// As in the chapter: a mark, a blank, a letter, anything else.
const kindOf = (letter) => (letter === '"' ? 0 : letter === " " ? 1 : /\p{L}/u.test(letter) ? 2 : 3);

figure("units", (page) => {
  const network = readNetwork(page.given.network);
  const { name, cells: [{ form, spec }] } = network.nodes.find(({ cells }) => cells.length);
  const box = make("input", { type: "text", maxlength: 120, oninput: () => page.draw(), style: "width: 100%" });
  box.value = USUAL_TEXT;
  page.add(make("label", { class: "field", style: "display: flex" }, make("span", {}, "Text, at most 120 characters"), box));
  const units = Array.from({ length: spec.units }, (_, unit) => unit);
  const unit = page.select("Unit", units.map((one) => [one, `unit ${one}`]), String(page.given.unit));
  const field = page.select("Gate or state", ["c", "h", "f", "i", "g", "o"].map((one) => [one, `${one}, ${meaningOf(form, one).split(":")[0]}`]), "c");
  const change = page.select("What if", WHAT_IFS, "");
  const from = page.slider("from step", [0, 119, 1], 0);
  const letters = page.add(make("p", { class: "text" }));
  const legend = page.add(make("div", { class: "legend" }));
  const say = page.sentence();
  const chart = page.chart("The network's output: the probability that a character is inside quotation marks");
  const ranks = make("div", { class: "behind" });
  page.add(make("div", { class: "group" }, make("h3", {}, "Ablation: the output h of one unit is its mean over this text"), ranks));
  return () => {
    const text = [...(box.value || " ")];
    const x = inputOf(network, text.flatMap((letter) => [0, 1, 2, 3].map((kind) => (kind === kindOf(letter) ? 1 : 0))));
    let open = false;
    const target = text.map((letter) => { if (letter === '"') open = !open; return open ? 1 : 0; });
    const runWith = (patches) => {
      const { values, cells } = run(network, x, { patches });
      const { data } = values[network.outputs[0]];
      return { data, cells, right: target.filter((inside, step) => data[step] > 0.5 === (inside === 1)).length };
    };
    const patch = (gate, own, value, start) => ({ node: name, cell: 0, gate, units: [own], rows: null, steps: [start, null, null], how: "set", value });
    const plain = runWith([]);
    const [gate, value] = change.value.split(" ");
    const after = change.value === "" ? plain : runWith([patch(gate, Number(unit.value), Number(value), from.value)]);
    const plane = planeOf(after.cells[name][0][field.value], 0);
    const line = plane.line(Number(unit.value));
    const scale = scaleOf(isGate(form, field.value), { low: Math.min(...line), high: Math.max(...line) });
    const colours = palette(scale.kind, page.theme);
    replaceChildren(letters, ...text.map((letter, step) => {
      const pixel = colours[Math.max(0, Math.min(255, Math.floor((255 * (line[step] - scale.low)) / (scale.high - scale.low))))];
      const style = `background: ${cssColour(pixel)}; color: ${inkOn(pixel)}; cursor: auto`;
      return make("span", { style, title: `step ${step}: ${field.value} = ${shown(line[step], 4)}` }, letter === " " ? "\u00a0" : letter);
    }));
    replaceChildren(legend, ...colourBar(scale, page.theme));
    const { warm, muted, ink } = page.colours;
    const lines = [{ name: "inside", values: target, colour: muted }, { name: "output, unchanged", values: plain.data, colour: ink, dash: [4, 3] }, { name: "output", values: after.data, colour: warm }];
    chart(lines, [["character", text], [`${field.value} of unit ${unit.value}`, line]]);
    say(`${after.right} of ${text.length} characters are right${change.value ? `, ${plain.right} without the change` : ""}.`);
    const mean = (numbers) => numbers.reduce((sum, number) => sum + number) / numbers.length;
    const h = planeOf(plain.cells[name][0].h, 0);
    const without = units.map((own) => [own, runWith([patch("h", own, mean(h.line(own)), 0)]).right]).sort((a, b) => a[1] - b[1]);
    replaceChildren(ranks, table(["unit", "right without it"], without.map(([own, right]) => [`unit ${own}`, `${right} of ${text.length}`])));
  };
});

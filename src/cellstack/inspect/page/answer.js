// What the network predicts, in words: the class and its probability, the number, the forecast or the next character.

import { visible } from "./data.js";
import { make, replaceChildren, shown } from "./dom.js";

const MOST_OTHERS = 2; // further classes

// A probability with three digits after the point, never rounded to 0 or 1.
export function chance(p) {
  if (p > 0 && p < 0.0005) return "below 0.001";
  if (p < 1 && p >= 0.9995) return "above 0.999";
  return shown(Math.round(p * 1000) / 1000, 3);
}

export class Answer {
  constructor(view) {
    this.view = view;
    this.element = make("p", { class: "answer", role: "status" });
    const { outputs, nodes, answer } = view.description;
    this.node = outputs.length === 1 ? (nodes.find((node) => node.name === outputs[0]) ?? null) : null;
    if (this.node !== null && (this.node.value === null || (this.node.names === null && answer.rescale === null))) this.node = null;
    this.element.hidden = this.node === null;
    this.asked = 0;
    view.on((changed) => {
      if (["step", "row", "result", "shows"].some((name) => changed.has(name))) this.draw();
    });
  }

  async draw() {
    if (this.node === null) return;
    const asked = (this.asked += 1);
    const { view, node } = this;
    const { answer } = view.description;
    const stored = await view.store.get(node.value);
    const inUnits = await view.inUnits(node);
    if (asked !== this.asked) return;
    const [, width, steps] = node.timed ? stored.shape : [0, stored.shape[1], 1];
    const step = node.timed ? view.stepOfNode(node, steps) : 0;
    const traced = Float64Array.from({ length: width }, (_, k) => stored.data[view.row * width * steps + k * steps + step]);
    const after = view.shows === "trace" ? null : (view.result?.run.values[node.name]?.data ?? null);
    const parts = this.said(traced.map((value, k) => inUnits(value, step, k)));
    if (after !== null) parts.push("; after the changes: ", ...this.said(Float64Array.from(after.subarray(step * width, (step + 1) * width), (value, k) => inUnits(value, step, k))));
    const truth = this.truth(step);
    const row = view.description.rows > 1 ? `Row ${view.rowTitle(view.row)}` : "";
    const at = node.timed ? view.labels.full(view.row, view.runStep(node, steps)) : "";
    const head = [row, at].filter((text) => text !== "").join(", ");
    replaceChildren(this.element, head ? `${head[0].toUpperCase()}${head.slice(1)}: ` : "", this.verb, ...parts, truth === null ? null : `; true: ${truth}`);
  }

  get verb() {
    const { task } = this.view.description.answer;
    return task === "text" ? "next character " : task === "forecast" ? "forecast of " : "predicted ";
  }

  // The prediction as strings and elements.
  said(values) {
    const { answer } = this.view.description;
    const names = this.node.names ?? [...values.keys()].map(String);
    const strong = (text) => make("strong", {}, text);
    if (answer.task === "forecast") {
      const each = answer.quantiles.length;
      const middle = answer.quantiles.indexOf(0.5);
      return answer.targets.flatMap((target, n) => {
        const own = Array.from(values.subarray(n * each, (n + 1) * each)).sort((a, b) => a - b);
        const others = own.map((value, k) => `quantile ${answer.quantiles[k]}: ${shown(value, 5)}`).filter((_, k) => k !== middle);
        return [n ? "; " : "", `${target}: `, strong(shown(own[middle], 5)), others.length ? ` (${others.join(", ")})` : ""];
      });
    }
    const sum = values.reduce((all, value) => all + value, 0);
    const chances = values.length > 1 && values.every((value) => value >= 0 && value <= 1) && Math.abs(sum - 1) < 1e-3;
    if (answer.task === "regress" || !chances) {
      return names.slice(0, 6).flatMap((name, k) => [k ? ", " : "", `${name}: `, strong(shown(values[k], 5))]);
    }
    const quoted = (name) => (answer.task === "text" ? `“${visible(name)}”` : name);
    const order = [...values.keys()].sort((a, b) => values[b] - values[a]);
    const others = order.slice(1, 1 + MOST_OTHERS).map((k) => `${quoted(names[k])}: ${chance(values[k])}`);
    return [strong(quoted(names[order[0]])), `, probability ${chance(values[order[0]])} (then ${others.join(", ")})`];
  }

  // The true class, number or character, if the page has it.
  truth(step) {
    const { view, node } = this;
    const { answer } = view.description;
    const own = answer.truth === null ? null : answer.truth[view.row];
    const value = node.timed && Array.isArray(own) ? own[step] : own;
    const listed = (one) => (typeof one === "number" ? shown(one, 5) : one);
    if (value !== null && value !== undefined) return Array.isArray(value) ? value.map(listed).join(", ") : listed(value);
    if (!node.timed || view.labels.kind !== "text") return null;
    const label = view.labels.raw(view.row, answer.task === "text" ? view.step + 1 : view.step);
    if (label === null || !(node.names ?? []).includes(label)) return null;
    return answer.task === "text" ? `“${visible(label)}”` : label;
  }
}

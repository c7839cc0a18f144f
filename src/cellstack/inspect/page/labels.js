// The steps' labels as running text, each coloured by the value of a unit at its step, as in Karpathy, Johnson and Li 2015.

import { make, plural, replaceChildren, shown } from "./dom.js";
import { cssColour, inkOn, palette, scaleOf } from "./draw.js";
import { isGate } from "./view.js";

const MOST_LABELS = 4000; // labels in the text at a time

export class LabelText {
  constructor(view) {
    this.view = view;
    this.title = make("h3", {});
    this.text = make("div", { class: "text" });
    this.note = make("p", { class: "note" });
    this.element = make("div", {}, this.title, this.text, this.note);
    this.open = false;
    this.asked = 0;
    this.spans = [];
    this.text.addEventListener("click", (event) => {
      const step = event.target.dataset?.step;
      if (step !== undefined) view.set({ step: Number(step) });
    });
    view.on((changed) => {
      if (["row", "place", "field", "unit", "result", "shows", "theme", "step"].some((name) => changed.has(name))) this.draw();
    });
  }

  async draw() {
    if (!this.open) return;
    const asked = (this.asked += 1);
    const { view } = this;
    const plane = await view.plane();
    if (asked !== this.asked) return;
    if (plane.steps !== view.steps || view.labels.kind === null) {
      this.title.textContent = "No labels to show";
      this.note.textContent =
        view.labels.kind === null ? "The steps of this trace have no labels: pass them with save_html(path, labels=…)." : `${view.place.title} doesn't have a step for each label.`;
      this.text.replaceChildren();
      this.spans = [];
      return;
    }
    this.title.textContent = `The steps, coloured by ${view.field} of ${view.unitTitle(view.place, view.field, view.unit)} of ${view.place.title}`;
    const scale = scaleOf(view.shows !== "difference" && isGate(view.place.cell?.form, view.field), plane.range);
    const colours = palette(scale.kind, view.theme);
    const first = Math.max(0, Math.min(Math.floor(view.step / MOST_LABELS) * MOST_LABELS, view.steps - 1));
    const count = Math.min(MOST_LABELS, view.steps - first);
    if (this.first !== first || this.row !== view.row || this.spans.length !== count) {
      const apart = view.labels.kind !== "text" || this.words(first, count);
      this.spans = Array.from({ length: count }, (_, n) => make("span", { "data-step": first + n }, this.label(first + n)));
      this.text.replaceChildren(...this.spans.flatMap((span) => [span, ...(apart ? [" "] : span.textContent === "↵" ? [make("br")] : [])]));
      this.first = first;
      this.row = view.row;
    }
    const line = plane.line(view.unit);
    for (let n = 0; n < count; n += 1) {
      const value = line[first + n];
      const span = this.spans[n];
      const level = Math.max(0, Math.min(255, Math.floor(((value - scale.low) / (scale.high - scale.low)) * 255)));
      const fine = Number.isFinite(value);
      span.style.background = fine ? cssColour(colours[level]) : "#000";
      span.style.color = fine ? inkOn(colours[level]) : "#fff";
      span.title = `${view.labels.full(view.row, first + n)}: ${view.field} = ${shown(value, 4)}`;
    }
    this.now?.classList.remove("now");
    this.now = this.spans[view.step - first];
    this.now?.classList.add("now");
    this.note.textContent = count < view.steps ? `Steps ${view.description.steps[first]} to ${view.description.steps[first + count - 1]} of ${plural(view.steps, "step")}: move the cursor to see the others.` : "";
  }

  // Whether labels are words, which need spaces, rather than characters.
  words(first, count) {
    const some = Array.from({ length: Math.min(50, count) }, (_, n) => this.view.labels.raw(this.view.row, first + n) ?? "");
    return some.filter((label) => [...label].length > 1).length > some.length / 2;
  }

  label(step) {
    const { labels, row } = this.view;
    if (labels.kind !== "text") return labels.short(row, step) || "·";
    const text = labels.raw(row, step).replaceAll("\n", "↵").replaceAll("\t", "⇥");
    return text.trim() === "" ? text.replaceAll(" ", "\u00a0") || "·" : text;
  }
}

// The page of a server: its models, and the trial of the chosen one.

import { button, make, plural } from "./dom.js";
import { access, ask } from "./session.js";
import { pageStyle } from "./style.js";
import { Trial, shapesOf } from "./trial.js";

const LOOK = ["ink", "muted", "grid", "cursor", "mark"];
const OWN = `
.models { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 16px; padding: 0; list-style: none; }
.models button { text-align: left; padding: 8px 12px; max-width: 340px; overflow-wrap: anywhere; }
.models small { display: block; font-weight: 400; color: var(--muted); }
.models [aria-pressed="true"] small { color: inherit; }
.trial { display: grid; grid-template-columns: minmax(0, 380px) minmax(0, 1fr); gap: 20px; align-items: start; }
.trial .choice { margin: 6px 0 10px; }
.trial textarea { width: 100%; min-height: 90px; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; color: inherit; background: var(--ground); border: 1px solid var(--edge); border-radius: 7px; padding: 6px 8px; }
.drop { border: 1px dashed var(--muted); border-radius: 8px; padding: 14px; color: var(--muted); margin-top: 8px; overflow-wrap: anywhere; }
.drop.over { background: var(--soft); border-color: var(--accent); color: var(--accent); }
.drop input { max-width: 100%; margin-top: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 8px; margin: 0 0 10px; }
.figures div { background: var(--raised); border-radius: 8px; padding: 6px 10px; }
.figures dt { font-size: 12px; color: var(--muted); }
.figures dd { margin: 0; font-weight: 650; font-size: 17px; }
.values { display: flex; flex-wrap: wrap; gap: 2px 16px; }
.values span { border-bottom: 3px solid var(--line); padding: 0 2px; }
.about, .values span { overflow-wrap: anywhere; }
.errors { margin: 8px 0 0; padding: 0; list-style: none; }
.errors li { background: var(--warn-soft); color: var(--warn); border-radius: 8px; padding: 6px 10px; margin-top: 4px; overflow-wrap: anywhere; }
.card h3 { margin: 14px 0 0; }
.trial .run input { width: 96px; padding-right: 2px; }
canvas.colours { border-radius: 4px; }
.run { margin-top: 12px; }
@media (max-width: 900px) { .trial { grid-template-columns: minmax(0, 1fr); gap: 14px; } }
`;

// Show the page in an element. Returns a promise that is resolved when the models are shown.
export function start(el) {
  const page = make("div", { class: "page" });
  el.append(make("style", {}, pageStyle + OWN), page);
  const look = { theme: "light", colours: {} };
  const server = new Server(page, look);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    page.dataset.theme = look.theme = dark.matches ? "dark" : "light";
    const style = getComputedStyle(page);
    look.colours = Object.fromEntries(LOOK.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    server.trial?.draw();
  };
  dark.addEventListener("change", paint);
  window.addEventListener("pagehide", () => server.trial?.end());
  paint();
  return server.load();
}

// The list of models, and the trial of the chosen one.
class Server {
  constructor(page, look) {
    this.look = look;
    this.trial = null;
    this.summary = make("p", { class: "summary" });
    this.list = make("ul", { class: "models", "aria-label": "Models" });
    this.body = make("div");
    page.append(make("div", { class: "inner" }, make("header", {}, make("div", {}, make("h1", {}, "cellstack serve"), this.summary)), this.list, this.body));
  }

  async load() {
    let models;
    try {
      ({ models } = await (await ask("models")).json());
    } catch (error) {
      this.refused(error);
      return;
    }
    this.summary.textContent = plural(models.length, "model");
    const buttons = models.map((model) => button("", () => this.choose(model, buttons), { "data-model": model.name }));
    models.forEach((model, n) => {
      buttons[n].model = model;
      buttons[n].append(model.name, make("small", {}, `version ${model.version} · ${shapesOf(model)}`));
    });
    this.list.replaceChildren(...buttons.map((one) => make("li", {}, one)));
    const first = models.find((model) => model.streams) ?? models[0];
    if (first) this.choose(first, buttons);
    else this.body.replaceChildren(make("p", { class: "note" }, "This server has no models."));
  }

  choose(model, buttons) {
    for (const one of buttons) one.setAttribute("aria-pressed", String(one.model === model));
    this.trial?.end();
    this.trial = null;
    if (model.streams) {
      this.trial = new Trial(model, this.look);
      this.body.replaceChildren(this.trial.element);
      this.trial.draw();
    } else {
      this.body.replaceChildren(make("p", { class: "warning" }, `${model.name} has no sessions: ${model.why_not}. It runs whole sequences: POST /models/${model.name}/run.`));
    }
  }

  refused(error) {
    const message = make("p", { class: "warning", role: "alert" }, error.message);
    if (error.status !== 401) {
      this.body.replaceChildren(message);
      return;
    }
    const box = make("input", { type: "password", "aria-label": "Token", autocomplete: "off" });
    const form = make("form", { class: "toolbar", onsubmit: (event) => {
      event.preventDefault();
      access.token = box.value;
      this.body.replaceChildren();
      this.load();
    } }, make("label", { class: "field" }, make("span", {}, "Token"), box), make("button", { class: "main" }, "Continue"));
    this.body.replaceChildren(access.token ? message : make("p", { class: "note" }, "This server needs a token."), form);
  }
}

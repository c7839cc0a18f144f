// The page: one run of a network, and runs with changes. The same module serves a file and a notebook.

import { Answer } from "./answer.js";
import { CellView } from "./cell.js";
import { Changes } from "./changes.js";
import { Store } from "./data.js";
import { button, make, plural, tabs } from "./dom.js";
import { Gradients } from "./gradients.js";
import { LabelText } from "./labels.js";
import { HeatMap } from "./map.js";
import { Matches } from "./matches.js";
import { Memory } from "./memory.js";
import { NetworkDiagram } from "./network.js";
import { Playground } from "./playground.js";
import { Rerun, Runner } from "./runner.js";
import { pageStyle } from "./style.js";
import { UnitLines } from "./unit.js";
import { View } from "./view.js";
import { WhatIf } from "./whatif.js";

export const COLOURS = { ground: "--ground", ink: "--ink", muted: "--muted", grid: "--grid", accent: "--accent", cursor: "--cursor", veil: "--veil", mark: "--mark", warm: "--warm", cold: "--cold" };

const PLAY = "A small network that learns a task in this page; watch its gates during training.";

// The theme of JupyterLab, VS Code or the browser.
function usualTheme() {
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  if (jpThemeLight !== undefined) return jpThemeLight === "false" ? "dark" : "light";
  if (vscodeThemeKind !== undefined) return vscodeThemeKind.includes("light") ? "light" : "dark";
  return window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

// anywidget's contract: `model.get("payload")` is the result of `cellstack.inspect.contents.payload`. `el.ready` is a
// promise of the page's parts, resolved when everything is drawn.
export function render({ model, el }) {
  const root = el.attachShadow({ mode: "open" });
  const page = make("div", { class: "page" });
  root.append(make("style", {}, pageStyle), page);
  page.addEventListener("keydown", (event) => event.stopPropagation()); // notebooks have single-key commands
  const built = build(model.get("payload"), page, root).catch((error) => {
    page.append(make("p", { class: "warning", role: "alert" }, `This page can't be shown: ${error.message}`));
    throw error;
  });
  el.ready = built;
  return () => built.then(({ close }) => close());
}

async function build(payload, page, root) {
  const store = new Store(payload);
  const { description } = store;
  const view = new View(store);
  const paint = (theme) => {
    page.dataset.theme = theme;
    const style = getComputedStyle(page);
    view.colours = Object.fromEntries(Object.entries(COLOURS).map(([name, property]) => [name, style.getPropertyValue(property).trim()]));
    view.set({ theme });
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const follow = () => paint(chosen ?? usualTheme());
  dark.addEventListener("change", follow);
  const print = (event) => {
    if (event.matches) paint("light"); // paper is white
    else follow();
    view.notify(); // now: the next animation frame may be too late for printing
  };
  const paper = window.matchMedia("print");
  paper.addEventListener("change", print);
  const theme = button("Dark", () => {
    chosen = view.theme === "dark" ? "light" : "dark";
    follow();
  }, { class: "theme", title: "Light or dark" });
  view.on(() => (theme.textContent = view.theme === "dark" ? "Light" : "Dark"));
  const layers = description.nodes.map((node) => node.name).join(" → ");
  const header = make(
    "header",
    {},
    make(
      "div",
      {},
      make("h1", {}, description.title),
      make("p", { class: "summary" }, `${plural(description.rows, "row")}, ${plural(description.steps.length, "step")} · ${layers.length > 160 ? plural(description.nodes.length, "layer") : layers}`),
    ),
    theme,
  );
  const answer = new Answer(view);
  header.firstChild.append(answer.element);
  const inner = make("div", { class: "inner" }, header);
  page.append(inner);
  follow();
  if (description.rounded !== null) {
    inner.append(make("p", { class: "note" }, `The numbers of this trace are stored as ${description.rounded} to keep the page small: the last digits differ from the run's.`));
  }
  if (description.patches.length) {
    inner.append(make("p", { class: "note" }, `The network was run with ${plural(description.patches.length, "patch", "patches")}: ${description.patches.map((patch) => patch.text).join(", ")}.`));
  }
  const runner = new Runner();
  const rerun = new Rerun(view, runner);
  const changes = new Changes(view, rerun);
  const close = () => {
    dark.removeEventListener("change", follow);
    paper.removeEventListener("change", print);
    runner.close();
  };
  const empty = view.place === null || view.steps === 0 || description.rows === 0;
  if (empty) {
    const what = description.rows === 0 ? "no row" : view.steps === 0 ? "no step" : "no gate, state or sequence";
    const play = new Playground(view, runner);
    inner.append(make("p", { class: "warning" }, `There is nothing to show: the trace has ${what}.`), make("h2", {}, "Playground"), make("p", { class: "about" }, PLAY), play.element);
    play.open = true;
    play.draw();
    return { view, close };
  }
  const diagram = new NetworkDiagram(view);
  const map = new HeatMap(view);
  const panes = {
    cell: { title: "Cell", about: "The wiring of one unit at one step. Point at a number, or move to it with Tab, to see its formula.", pane: new CellView(view, root.querySelector(".page")) },
    unit: { title: "Unit over time", about: "One unit over all steps: its gates between 0, closed, and 1, open; below, its state and output. A click moves the cursor.", pane: new UnitLines(view) },
    text: { title: "Labels", about: "The steps' labels as text, each coloured by the unit's value at its step.", pane: new LabelText(view) },
    memory: { title: "Memory", pane: new Memory(view) },
    gradient: { title: "Gradient", about: "How much a number changes with each input: the gradient, computed by backpropagation in this page. The cursor selects the step.", pane: new Gradients(view, rerun, changes) },
    whatif: { title: "What if", about: "Change an input, patch a gate, reset the state or edit a weight: the page runs the network again and shows the result in every view.", pane: new WhatIf(view, rerun, changes) },
    match: { title: "Find similar steps", hint: "Which units are active at some steps, and where else the same units are active", about: "Mark some steps in the map, such as a word or a peak. The page lists the units that are on, which means above a threshold, at all of these steps, and every other place where the same units are on together: steps that the network treats alike.", pane: new Matches(view) },
    playground: { title: "Playground", about: PLAY, pane: new Playground(view, runner) },
  };
  if (view.labels.kind === null) delete panes.text;
  const tabbed = tabs(
    "Views of the trace",
    Object.entries(panes).map(([name, { title, about, hint, pane }]) => ({ name, title, about, hint, element: pane.element })),
    (name) => {
      for (const [own, { pane }] of Object.entries(panes)) {
        pane.open = own === name;
        if (pane.open) pane.draw();
      }
    },
  );
  diagram.onchoose = (place) => {
    if (place.kind === "cell") tabbed.show("cell");
  };
  inner.append(
    make(
      "div",
      { class: "stage" },
      make("section", { class: "card net" }, make("h2", {}, "The network"), make("p", { class: "about" }, "Layers upwards, steps to the right; the colours are the values of the first units. Choose a layer to open it."), diagram.element, diagram.part),
      make("section", { class: "card" }, make("h2", {}, "Units over time"), map.element),
    ),
    tabbed.element,
  );
  const resize = new ResizeObserver(() => panes[tabbed.open]?.pane.draw());
  resize.observe(tabbed.element);
  view.set(await view.opening());
  await map.start();
  performance.mark("cellstack: the map is drawn");
  await diagram.draw();
  await answer.draw();
  tabbed.show("cell");
  await rerun.start();
  if (rerun.why !== null) header.after(make("p", { class: "warning" }, `${rerun.why} The page shows only the trace, without what-if and gradients.`));
  return {
    view,
    map,
    changes,
    close: () => {
      resize.disconnect();
      close();
    },
  };
}

// The trial of a model: a session, its inputs and its outputs over time.

import { button, choice, make, numberBox, plural, replaceChildren, select, shown } from "./dom.js";
import { MOST_LINES, Recent, colourOf, drawMap, drawRecent } from "./plot.js";
import { LiveSession, ask } from "./session.js";
import { asMessage, columnsOf, generated, microphone, numbersOf, ofRows, ofSamples, rowsOf, samplesOf } from "./sources.js";

const MOST_SLIDERS = 8;
const MOST_WAITING = 64; // frames whose answers haven't arrived: beyond that none are sent
const AUDIO = { least: 160, most: 1024 }; // widths of inputs that may be frames of audio

export function shapesOf({ inputs, outputs }) {
  const text = (values) => values.map(({ name, width }) => `${name} ${width === null ? "(id)" : `[${width}]`}`).join(", ");
  return `${text(inputs)} → ${text(outputs)}`;
}

// A session of a model: its inputs on the left, its outputs on the right.
export class Trial {
  constructor(model, look) {
    this.model = model;
    this.look = look;
    this.columns = columnsOf(model.inputs);
    this.outputs = columnsOf(model.outputs);
    this.session = null;
    this.source = null; // that is running
    this.timer = null;
    this.span = 300;
    this.first = 0;
    this.drawing = false;
    this.values = this.columns.map(() => 0);
    this.errors = make("ul", { class: "errors", "aria-live": "polite" });
    this.element = make("div", { class: "trial" }, this.inputSide(), this.outputSide());
    this.clear();
    this.resize = new ResizeObserver(() => this.draw());
    this.resize.observe(this.element);
    this.kind("values");
  }

  // ── inputs ──

  inputSide() {
    const [only] = this.model.inputs;
    this.width = only.width;
    const audio = this.model.inputs.length === 1 && this.width >= AUDIO.least && this.width <= AUDIO.most;
    const kinds = [["values", "Values", "Numbers that you set"], ["signal", "Signal", "A generated signal"], ["file", "CSV", "Rows of a file"]];
    if (audio) kinds.push(["audio", "Audio", "An audio file, cut into frames"], ["microphone", "Microphone", "Your microphone, cut into frames"]);
    this.panel = make("div");
    this.kinds = choice("Where inputs come from", (name) => this.kind(name));
    this.kinds.set(kinds, "values");
    this.rate = numberBox("Frames per second", () => this.paced(), { value: 20, min: 0.1, max: 1000, step: "any" });
    this.samples = numberBox("Samples per second", () => this.audioRate(), { value: 16000, min: 3000, max: 192000, step: 1 });
    this.startButton = button("Start", () => this.toggle(), { class: "main" });
    this.once = button("Send one", () => this.sendOne());
    return make(
      "section",
      { class: "card" },
      make("h2", {}, "Input"),
      make("p", { class: "about" }, `${plural(this.columns.length, "number")} per frame`),
      this.kinds.element,
      this.panel,
      make("div", { class: "toolbar run" }, this.rate.element, this.samples.element, this.startButton, this.once),
      this.errors,
    );
  }

  kind(name) {
    this.stop();
    this.chosen = name;
    const sound = name === "audio" || name === "microphone";
    this.samples.element.hidden = !sound;
    this.rate.element.hidden = name === "microphone";
    this.once.hidden = name !== "values" && name !== "signal";
    this.make = null; // a function that returns a source
    replaceChildren(this.panel, ...{ values: () => this.valuesPanel(), signal: () => this.signalPanel(), file: () => this.filePanel(), audio: () => this.audioPanel(), microphone: () => this.microphonePanel() }[name]());
    if (sound) this.audioRate();
    this.startButton.disabled = this.make === null;
  }

  valuesPanel() {
    this.make = () => () => [...this.values];
    if (this.columns.length > MOST_SLIDERS) {
      const box = make("textarea", { "aria-label": "Values", spellcheck: "false" });
      box.value = this.values.map((value) => shown(value, 6).replace("−", "-")).join(", ");
      this.make = () => () => numbersOf(box.value, this.columns);
      const fill = (text, next) => button(text, () => (box.value = this.columns.map(next).join(", ")));
      return [make("p", { class: "note" }, `${this.columns.length} numbers, separated by commas`), box, make("div", { class: "buttons" }, fill("Zeros", () => 0), fill("Ones", () => 1), fill("Random", ({ id }) => (id ? Math.floor(10 * Math.random()) : (2 * Math.random() - 1).toFixed(3))))];
    }
    const rows = this.columns.flatMap(({ name, id }, n) => {
      if (id) {
        const box = make("input", { type: "number", "aria-label": name, min: 0, step: 1, value: this.values[n], oninput: () => (this.values[n] = Number(box.value)) });
        return [make("span", {}, name), box, make("span")];
      }
      const out = make("output", {}, shown(this.values[n], 3));
      const box = make("input", { type: "range", "aria-label": name, min: -3, max: 3, step: 0.01, value: this.values[n], oninput: () => {
        this.values[n] = Number(box.value);
        out.textContent = shown(this.values[n], 3);
      } });
      return [make("span", {}, name), box, out];
    });
    return [make("div", { class: "sliders" }, ...rows)];
  }

  signalPanel() {
    const period = numberBox("Period in frames", () => {}, { value: 40, min: 1, step: "any" });
    const amplitude = numberBox("Amplitude", () => {}, { value: 1, step: "any" });
    const shape = select("Shape", [["sine", "Sine"], ["noise", "Noise"], ["impulse", "Impulses"]], "sine", () => this.restart());
    this.make = () => generated(this.columns, { shape: shape.box.value, period: () => Number(period.box.value), amplitude: () => Number(amplitude.box.value) });
    return [make("div", { class: "toolbar" }, shape.element, period.element, amplitude.element)];
  }

  filePanel() {
    return this.drop(`Drop a CSV file here, with ${plural(this.columns.length, "column")}: one row per frame.`, ".csv,.tsv,.txt,text/csv", async (file) => {
      const rows = rowsOf(await file.text(), this.columns);
      this.make = () => ofRows(rows);
      return `${file.name}: ${plural(rows.length, "row")}`;
    });
  }

  audioPanel() {
    return this.drop(`Drop an audio file here. It is resampled, mixed to one channel, and cut into frames of ${this.width} samples.`, "audio/*", async (file) => {
      const rate = this.sampleRate();
      const samples = await samplesOf(file, rate);
      this.make = () => ofSamples(samples, this.width);
      return `${file.name}: ${shown(samples.length / rate, 3)} seconds, ${plural(Math.ceil(samples.length / this.width), "frame")}`;
    });
  }

  microphonePanel() {
    this.make = () => microphone(this.width, this.sampleRate());
    return [make("p", { class: "note" }, `Start sends frames of ${this.width} samples to the server as they are recorded.`)];
  }

  drop(text, accept, read) {
    const said = make("p", {}, text);
    const use = async (file) => {
      if (!file) return;
      this.stop();
      this.make = null;
      try {
        said.textContent = await read(file);
      } catch (error) {
        said.textContent = text;
        this.complain(error.message);
      }
      this.startButton.disabled = this.make === null;
    };
    const box = make("input", { type: "file", accept, "aria-label": "File", onchange: () => use(box.files[0]) });
    const area = make("div", {
      class: "drop",
      ondragover: (event) => { event.preventDefault(); area.classList.add("over"); },
      ondragleave: () => area.classList.remove("over"),
      ondrop: (event) => { event.preventDefault(); area.classList.remove("over"); use(event.dataTransfer.files[0]); },
    }, said, box);
    this.reread = () => use(box.files[0]);
    return [area];
  }

  sampleRate() {
    const rate = Number(this.samples.box.value);
    if (!(rate >= 3000 && rate <= 192000)) throw new Error(`samples per second: expected 3000 to 192000, got ${this.samples.box.value}`);
    return rate;
  }

  audioRate() {
    this.rate.box.value = Math.round((1000 * Number(this.samples.box.value)) / this.width) / 1000;
    if (this.chosen === "audio" && this.make !== null) this.reread();
  }

  // ── running ──

  async toggle() {
    if (this.source !== null) this.stop();
    else await this.run();
  }

  restart() {
    if (this.source !== null) this.source = this.make();
  }

  async run() {
    this.startButton.disabled = true;
    try {
      this.source = await this.make();
      await this.opened();
    } catch (error) {
      this.stop();
      this.complain(error.message);
      return;
    } finally {
      this.startButton.disabled = false;
    }
    this.startButton.textContent = "Stop";
    this.paced();
  }

  stop() {
    clearInterval(this.timer);
    this.source?.stop?.();
    this.source = this.timer = null;
    this.startButton.textContent = "Start";
  }

  // Send frames at the chosen rate from now on; the microphone sets its own.
  paced() {
    if (this.source === null) return;
    clearInterval(this.timer);
    const live = this.chosen === "microphone";
    const rate = Number(this.rate.box.value);
    if (!live && !(rate > 0 && rate <= 1000)) {
      this.stop();
      this.complain(`frames per second: expected more than 0, at most 1000, got ${this.rate.box.value}`);
      return;
    }
    const began = performance.now();
    let sent = 0;
    this.timer = setInterval(() => {
      const due = live ? Infinity : Math.floor(((performance.now() - began) / 1000) * rate) + 1;
      if (!live && due - sent > MOST_WAITING) sent = due - 1; // after a pause of the browser
      while (sent < due && this.session.waiting < MOST_WAITING) {
        if (!this.next()) return;
        sent += 1;
      }
    }, Math.max(4, live ? 10 : Math.min(500, 1000 / rate)));
  }

  async sendOne() {
    try {
      const values = (this.source ?? this.make())();
      await this.opened();
      this.send(values);
    } catch (error) {
      this.complain(error.message);
    }
  }

  // Send the source's next frame; returns whether there was one.
  next() {
    let values;
    try {
      values = this.source();
    } catch (error) {
      this.stop();
      this.complain(error.message);
      return false;
    }
    if (values === undefined) this.stop();
    if (!values) return false;
    this.send(values);
    return true;
  }

  send(values) {
    this.inputs.add(this.inputs.units < values.length ? [Math.min(...values), Math.max(...values)] : values);
    this.session.send(asMessage(this.model.inputs, values));
  }

  // ── the session ──

  opened() {
    if (this.session?.open) return Promise.resolve();
    if (this.opening) return this.opening;
    this.clear();
    this.opening = new Promise((resolve, reject) => {
      this.session = new LiveSession(this.model, {
        open: () => {
          this.newButton.disabled = false;
          resolve();
        },
        answer: (message) => this.answered(message),
        closed: (reason) => {
          reject(new Error(reason));
          this.lost(reason);
        },
      });
    }).finally(() => (this.opening = null));
    return this.opening;
  }

  lost(reason) {
    this.stop();
    this.session = null;
    this.newButton.disabled = true;
    if (!this.opening) this.complain(`${reason}; the next frame begins a new session`);
  }

  renew() {
    this.stop();
    this.session?.close();
    this.session = null;
    this.newButton.disabled = true;
    this.clear();
  }

  end() {
    this.stop();
    this.session?.close();
    this.resize.disconnect();
  }

  answered({ frame, y, error, seconds }) {
    this.frame = frame;
    if (error !== undefined) {
      this.complain(`frame ${frame}: ${error}`);
      this.recent.add(this.outputs.map(() => NaN));
    } else {
      this.last = this.model.outputs.length === 1 ? [y].flat() : this.model.outputs.flatMap(({ name }) => y[name]);
      this.recent.add(this.last);
    }
    if (Number.isFinite(seconds)) this.latencies.push(seconds);
    if (this.latencies.length > 200) this.latencies.shift();
    this.drawSoon();
  }

  complain(text) {
    if (this.errors.lastChild?.textContent !== text) this.errors.append(make("li", { role: "alert" }, text));
    while (this.errors.children.length > 3) this.errors.firstChild.remove();
  }

  clear() {
    this.errors.replaceChildren();
    this.recent = new Recent(this.outputs.length);
    this.inputs = new Recent(this.columns.length > MOST_SLIDERS ? 2 : this.columns.length);
    this.latencies = [];
    this.frame = 0;
    this.last = null;
    this.drawSoon();
  }

  // ── outputs ──

  outputSide() {
    this.figures = Object.fromEntries([["frame", "Frame"], ["now", "Round trip"], ["median", "Median"], ["worst", "99th percentile"]].map(([name, text]) => [name, { text, value: make("dd", { "data-figure": name }, "–") }]));
    this.map = make("canvas", { class: "colours", role: "img", "aria-label": "All outputs over time, as colours" });
    this.chart = make("canvas", { class: "chart", role: "img", "aria-label": "Outputs over time" });
    this.inputChart = make("canvas", { class: "chart", role: "img", "aria-label": "Inputs over time" });
    this.inputChart.style.height = "120px";
    this.scale = make("p", { class: "summary" });
    this.readout = make("p", { class: "values" });
    this.newButton = button("New session", () => this.renew(), { disabled: true });
    const span = select("Steps shown", [100, 300, 1000].map((n) => [n, String(n)]), this.span, (value) => {
      this.span = Number(value);
      this.draw();
    });
    const many = this.outputs.length > MOST_LINES;
    const starts = Array.from({ length: Math.ceil(this.outputs.length / MOST_LINES) }, (_, n) => n * MOST_LINES);
    const which = select("Lines of outputs", starts.map((n) => [n, `${n} to ${Math.min(n + MOST_LINES, this.outputs.length) - 1}`]), 0, (value) => {
      this.first = Number(value);
      this.draw();
    });
    return make(
      "section",
      { class: "card" },
      make("h2", {}, "Output"),
      make("p", { class: "about" }, `${plural(this.outputs.length, "number")} per frame: ${shapesOf({ inputs: [], outputs: this.model.outputs }).slice(3)}`),
      make("dl", { class: "figures" }, ...Object.values(this.figures).map(({ text, value }) => make("div", {}, make("dt", {}, text), value))),
      make("div", { class: "toolbar" }, span.element, many ? which.element : null, this.newButton),
      many ? this.map : null,
      many ? this.scale : null,
      this.chart,
      this.readout,
      make("h3", {}, this.columns.length > MOST_SLIDERS ? "Input: smallest and largest number of each frame" : "Input"),
      this.inputChart,
    );
  }

  drawSoon() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      this.draw();
    });
  }

  draw() {
    if (!this.element.isConnected) return;
    if (this.outputs.length > MOST_LINES) this.scale.textContent = `Colours from −${drawMap(this.map, this.look, this.recent, this.span)} (blue) to the same positive number (orange)`;
    drawRecent(this.chart, this.look, this.recent, this.first, this.span);
    drawRecent(this.inputChart, this.look, this.inputs, 0, this.span);
    const sorted = [...this.latencies].sort((a, b) => a - b);
    const time = (seconds) => (seconds === undefined ? "–" : `${shown(1000 * seconds, 3)} ms`);
    this.figures.frame.value.textContent = this.frame.toLocaleString("en");
    this.figures.now.value.textContent = time(this.latencies.at(-1));
    this.figures.median.value.textContent = time(sorted[Math.floor(sorted.length / 2)]);
    this.figures.worst.value.textContent = time(sorted[Math.floor(0.99 * sorted.length)]);
    const shownNow = this.outputs.slice(this.first, this.first + MOST_LINES);
    this.readout.replaceChildren(...shownNow.map(({ name }, n) => make("span", { style: `--line: ${colourOf(n, this.look.theme)}` }, `${name}: ${this.last === null ? "–" : shown(this.last[this.first + n], 4)}`)));
  }
}

// Elements of the page. Content of files is inserted as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

// An element: make("button", { class: "x", onclick: f }, "text", child, …). Null children are skipped.
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function replaceChildren(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

// A readable number: a given number of significant digits, no trailing zeros, NaN and infinities as words.
export function shown(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 10 ** Math.max(digits, 6) || size < 10 ** -4) {
    text = value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  } else {
    const after = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
    text = value.toFixed(Math.min(after, 12));
    if (text.includes(".")) text = text.replace(/\.?0+$/, "");
  }
  return text.replaceAll("-", "−");
}

// Like `shown`, in brackets where a sum or product would be hard to read.
export function inBrackets(value, digits = 4) {
  const text = shown(value, digits);
  return text.startsWith("−") ? `(${text})` : text;
}

export function plural(count, word, more = `${word}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? word : more}`;
}

export function select(label, choices, value, onchange) {
  const box = make("select", { "aria-label": label, onchange: () => onchange(box.value) });
  setChoices(box, choices, value);
  return { element: make("label", { class: "field" }, make("span", {}, label), box), box };
}

// Choices are strings, or pairs of a value and a string.
export function setChoices(box, choices, value) {
  const options = choices.map((choice) => {
    const [own, text] = Array.isArray(choice) ? choice : [choice, choice];
    return make("option", { value: own, selected: String(own) === String(value) }, text);
  });
  box.replaceChildren(...options);
  box.value = String(value);
}

export function button(text, onclick, attributes = {}) {
  return make("button", { type: "button", ...attributes, onclick }, text);
}

export function checkbox(label, checked, onchange) {
  const box = make("input", { type: "checkbox", onchange: () => onchange(box.checked) });
  box.checked = checked;
  return { element: make("label", { class: "check" }, box, make("span", {}, label)), box };
}

// A field for a number; `onchange` gets its text when it loses focus or Enter is pressed.
export function numberBox(label, onchange, attributes) {
  const box = make("input", { type: "number", "aria-label": label, ...attributes, onchange: () => onchange(box.value) });
  return { element: make("label", { class: "field short" }, make("span", {}, label), box), box };
}

// Buttons of which one is pressed, for the gates and states of a cell.
export function choice(label, onchange) {
  const group = make("div", { class: "choice", role: "group", "aria-label": label });
  let now = null;
  const show = () => {
    for (const one of group.children) one.setAttribute("aria-pressed", String(one.dataset.value === now));
  };
  return {
    element: group,
    set(values, value) {
      now = value;
      group.replaceChildren(
        ...values.map(([own, text, title]) =>
          button(text, () => { now = own; show(); onchange(own); }, { "data-value": own, title }),
        ),
      );
      show();
    },
  };
}

// Panels of which one is open, with the keyboard controls of tabs: arrows, Home, End.
export function tabs(label, panels, onchange) {
  const list = make("div", { class: "tabs", role: "tablist", "aria-label": label });
  const bodies = make("div", { class: "panels" });
  let open = null;
  const show = (name, focus = false) => {
    const chosen = open !== null; // by the reader: the first panel opens without scrolling
    open = name;
    for (const one of panels) {
      const selected = one.name === name;
      one.tab.setAttribute("aria-selected", String(selected));
      one.tab.tabIndex = selected ? 0 : -1;
      one.panel.hidden = !selected;
      if (selected && focus) one.tab.focus();
      if (selected && chosen) one.tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    onchange(name);
  };
  for (const one of panels) {
    one.tab = button(one.title, () => show(one.name), { role: "tab", id: `tab-${one.name}`, title: one.hint, "aria-controls": `panel-${one.name}` });
    one.panel = make(
      "section",
      { role: "tabpanel", id: `panel-${one.name}`, "aria-labelledby": `tab-${one.name}`, tabindex: "-1" },
      one.about ? make("p", { class: "about" }, one.about) : null,
      one.element,
    );
    list.append(one.tab);
    bodies.append(one.panel);
  }
  list.addEventListener("keydown", (event) => {
    const at = panels.findIndex((one) => one.name === open);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: panels.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(panels[(to + panels.length) % panels.length].name, true);
  });
  return { element: make("div", { class: "tabbed" }, list, bodies), show, get open() { return open; } };
}

// A table of strings, with a header row, and row headers in the first column with `rowHeads`.
export function table(head, rows, { caption = null, rowHeads = true } = {}) {
  return make(
    "table",
    {},
    caption === null ? null : make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
    make(
      "tbody",
      {},
      ...rows.map((row) =>
        make("tr", {}, ...row.map((cell, n) => (n === 0 && rowHeads ? make("th", { scope: "row" }, cell) : make("td", {}, cell)))),
      ),
    ),
  );
}

// The numbers behind a drawing, as a table that the reader opens: `body` is for the table.
export function behind(title, ontoggle = () => {}) {
  const body = make("div", { class: "behind" });
  const summary = make("summary", { "aria-label": `Show as a table: ${title}` }, "Show as a table");
  return { element: make("details", { ontoggle }, summary, body), body };
}

// A popover next to the element that is pointed at, focused or touched; Escape closes it.
export function popover(root) {
  const box = make("div", { class: "popover", role: "tooltip", id: "formula", hidden: true });
  root.append(box);
  let target = null;
  const hide = () => {
    box.hidden = true;
    target?.removeAttribute("aria-describedby");
    target = null;
  };
  const show = (element, content) => {
    target?.removeAttribute("aria-describedby");
    target = element;
    replaceChildren(box, ...content);
    box.hidden = false;
    element.setAttribute("aria-describedby", "formula");
    const at = element.getBoundingClientRect();
    const own = box.getBoundingClientRect();
    const base = root.getBoundingClientRect();
    // Next to it if there is space, else below or above; not over the drawing that it is part of.
    const [wide, high] = [document.documentElement.clientWidth, window.innerHeight];
    let left = at.right + 10;
    if (left + own.width > wide - 8) left = at.left - own.width - 10;
    let top = Math.min(at.top + at.height / 2 - own.height / 2, high - own.height - 8);
    if (left < 8 || wide < 700) {
      left = Math.max(8, Math.min(at.left + at.width / 2 - own.width / 2, wide - own.width - 8));
      const free = element.closest("svg")?.getBoundingClientRect() ?? at;
      top = free.bottom + 8 + own.height <= high || free.top < own.height + 8 ? free.bottom + 8 : free.top - own.height - 8;
    } else top = Math.max(8, top);
    box.style.left = `${left - base.left}px`;
    box.style.top = `${top - base.top}px`;
    if (window.matchMedia("(hover: none)").matches) box.scrollIntoView({ block: "nearest" });
  };
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !box.hidden) hide();
  });
  // Show the result of `content` next to `element` while it is pointed at or focused.
  const attach = (element, content) => {
    const open = () => {
      const made = content();
      if (made !== null) show(element, made);
    };
    element.addEventListener("pointerenter", open);
    element.addEventListener("focus", open);
    element.addEventListener("click", open);
    element.addEventListener("pointerleave", () => { if (target === element && root.activeElement !== element && element.getRootNode().activeElement !== element) hide(); });
    element.addEventListener("blur", () => { if (target === element) hide(); });
  };
  return { attach, hide, box };
}

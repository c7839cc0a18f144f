// The wiring of a cell: where the boxes of its gates and states are, and the paths between them.

// Drawn wirings: what each state is computed from, boxes by the name of what they show, and the paths between them.
const WIRINGS = [
  {
    from: { c: ["c_prev", "f", "g", "i"], h: ["c", "o"] },
    size: [760, 348],
    ports: {
      c_prev: [46, 60],
      c: [708, 60],
      h_prev: [46, 262],
      h: [708, 262],
      x: [116, 316],
      f: [196, 190],
      i: [300, 190],
      g: [392, 190],
      o: [510, 190],
    },
    signs: [[196, 60, "×"], [346, 60, "+"], [346, 122, "×"], [600, 190, "×"], [600, 112, "cell"]],
    paths: [
      "M 90 60 H 180", "M 212 60 H 330", "M 362 60 H 662", "M 600 60 V 92", "M 600 132 V 174", "M 600 206 V 262 H 662",
      "M 196 168 V 76", "M 300 168 V 122 H 330", "M 392 168 V 122 H 362", "M 346 106 V 76", "M 552 190 H 584",
      "M 90 262 H 510 V 212", "M 196 262 V 212", "M 300 262 V 212", "M 392 262 V 212", "M 116 294 V 264",
    ],
    dots: [[600, 60], [196, 262], [300, 262], [392, 262]],
  },
  {
    from: { h: ["g", "h_prev", "z"] },
    size: [760, 348],
    ports: {
      h_prev: [46, 60],
      h: [708, 60],
      x: [116, 316],
      r: [196, 200],
      z: [318, 200],
      g: [600, 200],
    },
    signs: [[318, 60, "×"], [600, 60, "+"], [600, 132, "×"], [430, 132, "1−z"], [196, 132, "×"]],
    paths: [
      "M 90 60 H 302", "M 334 60 H 584", "M 616 60 H 662", "M 318 178 V 76", "M 318 132 H 410", "M 452 132 H 584",
      "M 600 178 V 148", "M 600 116 V 76", "M 140 60 V 132 H 180", "M 196 178 V 148",
      "M 212 132 H 256 V 244 H 586 V 222", "M 140 132 V 272 H 614 V 222", "M 196 272 V 222", "M 318 272 V 222", "M 116 294 V 274 H 140",
    ],
    dots: [[140, 60], [140, 132], [196, 272], [318, 272], [318, 132]],
  },
  {
    from: { h: ["g"] },
    size: [760, 238],
    ports: {
      h_prev: [46, 90],
      x: [180, 206],
      g: [370, 90],
      h: [708, 90],
    },
    signs: [],
    paths: ["M 90 90 H 326", "M 414 90 H 662", "M 180 184 V 92"],
    dots: [[180, 90]],
  },
];

// The wiring of an mLSTM; `o`: with an output gate.
const memoryWiring = (o) => ({
  size: [760, 500],
  ports: {
    C_prev: [46, 60],
    C: [708, 60],
    n_prev: [46, 150],
    n: [708, 150],
    m_prev: [46, 330],
    m: [708, 330],
    x: [116, 450],
    f: [190, 265],
    k: [286, 265],
    i: [382, 265],
    v: [478, 265],
    q: [568, 265],
    ...(o ? { o: [540, 450] } : {}),
    h: [708, 450],
  },
  signs: [
    [190, 60, "×"], [190, 150, "×"], [334, 150, "+"], [334, 215, "×"], [430, 60, "+"], [430, 182, "×"], [140, 330, "max"], [636, 390, "Cᵀq"],
    ...(o ? [[636, 450, "×"]] : []),
  ],
  paths: [
    "M 90 60 H 174", "M 206 60 H 414", "M 446 60 H 662", "M 90 150 H 174", "M 206 150 H 318", "M 350 150 H 662", "M 190 243 V 166", "M 190 134 V 76",
    "M 286 243 V 215 H 318", "M 382 243 V 215 H 350", "M 334 199 V 166", "M 334 182 H 414", "M 478 243 V 182 H 446", "M 430 166 V 76",
    "M 90 330 H 118", "M 162 330 H 662", "M 190 330 V 287", "M 382 330 V 287", "M 116 428 V 400", "M 116 396 H 568 V 287", "M 140 396 V 348",
    "M 286 396 V 287", "M 478 396 V 287", "M 590 287 V 390 H 614", "M 636 60 V 374",
    ...(o ? ["M 540 396 V 426", "M 636 406 V 434", "M 584 450 H 620", "M 652 450 H 662"] : ["M 636 406 V 450 H 662"]),
  ],
  dots: [[334, 182], [190, 330], [382, 330], [140, 396], [286, 396], [478, 396], [636, 60], [636, 150], [636, 330], ...(o ? [[540, 396]] : [])],
});

// The gates and states that value n is computed from, by name; a state before the step has the suffix _prev.
function sourcesOf({ values }, n) {
  const found = new Set();
  const visit = (k) => {
    const { operation, name, of } = values[k];
    if (operation === "record") found.add(name);
    else if (operation === "state") found.add(`${name}_prev`);
    else if (operation === "x") found.add("x");
    else of.forEach(visit);
  };
  values[n].operation === "record" ? values[n].of.forEach(visit) : visit(n);
  return [...found].sort();
}

// The sources of each state after the step, and of each gate.
function wiresOf(form) {
  const ofStates = Object.keys(form.states).map((name, n) => {
    const { operation, name: own } = form.values[form.after[n]];
    return [name, operation === "record" && own !== name ? [own] : sourcesOf(form, form.after[n])];
  });
  const records = form.values.flatMap(({ operation, name }, n) => (operation === "record" && Object.hasOwn(form.gates, name) ? [[name, sourcesOf(form, n)]] : []));
  return { states: Object.fromEntries(ofStates), gates: Object.fromEntries(records) };
}

// A wiring made from the step: each state is a line from left to right, above a row of gates, above the line of what the
// gates are computed from.
function madeWiring({ states, gates }) {
  const [left, right, first] = [46, 708, 180];
  const names = Object.keys(states).reverse();
  const row = Object.fromEntries(names.map((name, n) => [name, 46 + 62 * n]));
  const low = 62 * names.length + 84;
  const bus = low + 72;
  const listed = Object.keys(gates);
  const column = Object.fromEntries(listed.map((name, n) => [name, first + (400 / Math.max(1, listed.length - 1)) * n || first]).map(([name, x]) => [name, Math.round(x)]));
  const ports = { x: [116, bus + 54] };
  const [paths, dots] = [[`M 116 ${bus + 32} V ${bus + 2}`], []];
  const used = new Set(Object.values(gates).flat());
  names.forEach((name, n) => {
    const y = row[name];
    Object.assign(ports, { [`${name}_prev`]: [left, y], [name]: [right, y] });
    const own = states[name].includes(`${name}_prev`);
    const begin = own ? 90 : Math.min(...states[name].map((source) => column[source] ?? 640 - 16 * n));
    paths.push(`M ${begin} ${y} H 662`);
    if (used.has(`${name}_prev`)) paths.push(`M ${left} ${y + 22} V ${bus} H ${left + 58}`);
    for (const source of states[name]) {
      if (source in column) paths.push(`M ${column[source]} ${low - 22} V ${y + 2}`);
      else if (source in row && source !== name) {
        paths.push(`M ${640 - 16 * n} ${row[source]} V ${y + (row[source] < y ? -2 : 2)}`);
        dots.push([640 - 16 * n, row[source]]);
      }
    }
  });
  listed.forEach((name, n) => {
    const x = column[name];
    ports[name] = [x, low];
    const last = n === listed.length - 1;
    paths.push(`M ${last ? `104 ${bus} H ${x}` : `${x} ${bus}`} V ${low + 22}`);
    if (!last) dots.push([x, bus]);
    for (const source of gates[name]) if (column[source] < x) paths.push(`M ${column[source] + 43} ${low} H ${x - 45}`);
  });
  return { size: [760, bus + 86], ports, signs: [], paths, dots };
}

export function wiringOf(form) {
  if (form.heads) return memoryWiring("o" in form.gates);
  const wires = wiresOf(form);
  const same = (from) => JSON.stringify(from) === JSON.stringify(wires.states);
  const ordered = ({ from }) => Object.fromEntries(Object.keys(wires.states).map((name) => [name, from[name]]));
  const holds = ({ ports }) => form.trace.every((name) => name in ports) && Object.keys(form.gates).length + 2 * Object.keys(form.states).length + 1 === Object.keys(ports).length;
  return WIRINGS.find((one) => holds(one) && same(ordered(one))) ?? madeWiring(wires);
}

// The style of the page: light, dark, narrow and printed.

const light = `
  --ground: #ffffff; --raised: #f6f7f9; --ink: #1a1f29; --muted: #5c6675; --grid: #e4e7ec; --edge: #d3d8e0;
  --accent: #0b63b5; --on-accent: #ffffff; --soft: #e3eefa; --cursor: #111827; --veil: rgba(255, 255, 255, 0.5);
  --mark: rgba(11, 99, 181, 0.12); --warm: #c2620e; --cold: #2b74b8; --warn: #8a4b00; --warn-soft: #fdf1e0;
  color-scheme: light;`;

const dark = `
  --ground: #14171d; --raised: #1d222b; --ink: #e9edf3; --muted: #9aa5b5; --grid: #2a313c; --edge: #38414f;
  --accent: #6cb5f5; --on-accent: #0c1420; --soft: #1c3148; --cursor: #ffffff; --veil: rgba(20, 23, 29, 0.45);
  --mark: rgba(108, 181, 245, 0.18); --warm: #f0963f; --cold: #6cb5f5; --warn: #f2bd74; --warn-soft: #33270f;
  color-scheme: dark;`;

export const pageStyle = `
:host { display: block; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
.page {
  ${light}
  background: var(--ground); color: var(--ink); min-height: var(--least, 0);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  position: relative; font-variant-numeric: tabular-nums; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.page[data-theme="dark"] { ${dark} }
.inner { max-width: 1360px; margin: 0 auto; padding: 20px 24px 40px; }
h1 { font-size: 21px; line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 2px; font-weight: 650; }
h3 { font-size: 14px; margin: 0 0 8px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0; }
header { display: flex; gap: 16px; align-items: flex-start; justify-content: space-between; margin-bottom: 14px; }
.summary { color: var(--muted); margin-top: 3px; overflow-wrap: anywhere; }
.answer { margin-top: 4px; overflow-wrap: anywhere; }
.about { color: var(--muted); margin: 0 0 10px; max-width: 78ch; }
.note { color: var(--muted); margin: 8px 0; max-width: 78ch; }
.note:empty, .about:empty { display: none; }
.warning { background: var(--warn-soft); color: var(--warn); border-radius: 8px; padding: 8px 12px; margin: 0 0 14px; max-width: none; }
.stage { display: grid; grid-template-columns: minmax(0, 440px) minmax(0, 1fr); gap: 20px; align-items: start; }
.card { border: 1px solid var(--edge); border-radius: 12px; padding: 14px 16px; background: var(--ground); min-width: 0; }
.net .scroll { max-height: 700px; overflow: auto; }
.scroll { overflow-x: auto; max-width: 100%; }
button, select, input[type="text"], input[type="number"] {
  font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--edge); border-radius: 7px; padding: 4px 10px; min-height: 32px;
}
button { cursor: pointer; }
button:hover:not(:disabled), select:hover { border-color: var(--muted); }
button:disabled { cursor: default; opacity: 0.55; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button[aria-pressed="true"] { background: var(--soft); border-color: var(--accent); color: var(--accent); }
button.plain { border: 0; background: none; padding: 0 2px; min-height: 0; color: var(--accent); text-align: left; }
button.plain:hover { text-decoration: underline; }
select { max-width: min(260px, 70vw); padding-right: 4px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg g:focus-visible { outline: none; }
svg g:focus-visible > rect:first-of-type, svg .port:focus-visible rect { stroke: var(--accent); stroke-width: 3; }
.toolbar { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; margin-bottom: 8px; }
.together { display: flex; gap: 8px; align-items: end; min-width: 0; }
.together .field { min-width: 48px; }
.together select { max-width: min(260px, 100%); }
.field { display: inline-flex; flex-direction: column; gap: 2px; }
.field > span { font-size: 12px; color: var(--muted); }
.short input[type="number"] { width: 60px; padding: 4px 2px 4px 8px; }
.check { display: inline-flex; gap: 6px; align-items: center; min-height: 32px; }
.buttons, .choice, .choices, .pills { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.choices { gap: 4px 14px; }
.choice button { min-width: 32px; padding: 4px 8px; font-weight: 600; }
.key span { border-bottom: 3px solid var(--line); font-weight: 600; padding: 0 2px; }
.meanings { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2px 10px; margin: 10px 0 0; font-size: 13px; }
.meanings dt { font-weight: 600; }
.meanings dd { margin: 0; color: var(--muted); }
canvas { display: block; width: 100%; }
.ruler { height: 34px; }
.wave { height: 110px; margin-bottom: 4px; }
.stack { position: relative; border-radius: 4px; cursor: crosshair; touch-action: pan-y; user-select: none; }
.stack.marking { cursor: col-resize; }
.stack canvas { position: absolute; inset: 0; height: 100%; }
.whole { height: 14px; margin-top: 6px; cursor: pointer; touch-action: none; }
.under { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; justify-content: space-between; margin-top: 10px; }
.readout { font-weight: 600; overflow-wrap: anywhere; min-height: 1.45em; white-space: pre-wrap; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: center; color: var(--muted); font-size: 12.5px; margin-top: 8px; }
.legend .bar { width: 130px; height: 10px; border-radius: 3px; border: 1px solid var(--edge); }
.legend .scale { display: inline-flex; gap: 8px; align-items: center; margin-right: 10px; }
.legend .extent { margin-left: 10px; }
.legend .extent:empty { display: none; }
.broken { display: inline-flex; gap: 5px; align-items: center; margin-left: 10px; }
.striped { width: 16px; height: 12px; border: 1px solid var(--muted); background: repeating-linear-gradient(135deg, #000 0 3px, #fff 3px 6px); }
.chequered { width: 16px; height: 12px; border: 1px solid var(--muted); background: repeating-conic-gradient(#000 0 25%, #fff 0 50%) 0 0 / 8px 8px; }
details { margin-top: 8px; }
summary { color: var(--muted); cursor: pointer; font-size: 13px; }
.behind { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
caption { text-align: left; color: var(--muted); padding: 4px 0; }
th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; }
tbody th, thead th:first-child { text-align: left; }
.tabbed { margin-top: 20px; }
.tabs { display: flex; gap: 2px; overflow-x: auto; border-bottom: 1px solid var(--edge); scrollbar-width: none; }
.tabs button { border: 0; border-radius: 0; background: none; color: var(--muted); padding: 9px 14px; white-space: nowrap; border-bottom: 3px solid transparent; margin-bottom: -1px; font-weight: 600; }
.tabs button[aria-selected="true"] { color: var(--ink); border-bottom-color: var(--accent); }
.tabs button:hover { color: var(--ink); }
.panels > section { padding: 14px 2px 4px; }
.panels > section:focus-visible { outline-offset: 4px; }
.chart.dragged { height: 120px; cursor: ns-resize; touch-action: none; margin: 0 0 8px; }
.tiles { margin-top: 8px; }
.chart { height: 190px; margin-top: 6px; cursor: pointer; }
.cellview > div { min-width: 0; }
.cellview { display: grid; grid-template-columns: minmax(440px, 1fr) minmax(0, auto); gap: 16px 28px; align-items: start; }
.port.small .value { font-size: 12px; font-weight: 500; }
.wires { display: block; width: 100%; min-width: 560px; max-width: 880px; height: auto; }
.wires.narrow { min-width: 0; }
.wires.narrow .port .name { font-size: 14px; }
.wires.narrow .port .value { font-size: 14px; }
.wires.narrow .port.small .value { font-size: 13px; }
.wire { fill: none; stroke: var(--muted); stroke-width: 1.6; }
.head { fill: var(--muted); }
.hull { fill: var(--raised); stroke: var(--edge); }
.port { cursor: help; }
.port rect { fill: var(--fill, var(--raised)); stroke: var(--edge); stroke-width: 1.2; }
.port text { text-anchor: middle; fill: var(--on, var(--ink)); pointer-events: none; }
.port .name { font-size: 12px; opacity: 0.85; }
.port:not(.small) .value { font-size: 15px; font-weight: 650; }
.sign rect { fill: var(--ground); stroke: var(--muted); stroke-width: 1.4; }
.sign text { text-anchor: middle; font-size: 15px; fill: var(--ink); }
.network { display: block; }
.network .box { cursor: pointer; }
.network .box > rect:first-of-type { fill: var(--raised); stroke: var(--edge); stroke-width: 1.2; }
.network .box.chosen > rect:first-of-type { stroke: var(--accent); stroke-width: 2.4; fill: var(--soft); }
.network .box.dim { cursor: default; opacity: 0.75; }
.network .rowname { font-size: 12.5px; fill: var(--ink); font-weight: 600; cursor: pointer; }
.network .rowname.now { fill: var(--accent); }
.network .rowname.dim { cursor: default; fill: var(--muted); }
.network .chip { stroke: var(--edge); stroke-width: 0.6; }
.network .nothing { fill: #000; stroke: #fff; }
.network .stepname { font-size: 12px; text-anchor: middle; fill: var(--muted); }
.network .stepname.head { text-anchor: start; }
.network .stepname.now { fill: var(--ink); font-weight: 650; }
.steptable td { padding: 2px; }
.steptable { font-size: 12.5px; }
.tight .steptable { font-size: 11px; }
.tight .steptable th { padding: 3px 2px; }
.tight .steptable td { padding: 1px; }
.tight .steptable .number { min-width: 0; padding: 1px 2px; font-size: 11px; }
.steptable th:first-child { position: sticky; left: 0; background: var(--ground); }
.number { min-height: 28px; min-width: 60px; padding: 2px 6px; border-radius: 6px; background: var(--fill, transparent); color: var(--on, inherit); border-color: var(--grid); text-align: right; cursor: help; font-variant-numeric: tabular-nums; }
.steptable tr.chosen th .plain { font-weight: 700; color: var(--ink); }
.inputs { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: end; margin-top: 10px; width: 0; min-width: 100%; color: var(--muted); }
.inputs .number { color: var(--ink); }
.titled { display: inline-flex; flex-direction: column; font-size: 12px; max-width: 200px; }
.weights .field { width: 116px; }
.titled span, .weights .field span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.titled .number { font-size: 13px; }
.popover { position: absolute; z-index: 20; max-width: min(500px, calc(100vw - 16px)); max-height: 70vh; overflow: auto; background: var(--ground); color: var(--ink); border: 1px solid var(--edge); border-radius: 10px; padding: 10px 12px; box-shadow: 0 8px 30px rgba(0, 0, 0, 0.25); font-size: 13px; }
.popover .result { font-weight: 650; }
.popover .patched { color: var(--warn); }
.popover .sum { margin: 4px 0 6px; width: 100%; }
.popover .sum th, .popover .sum td { padding: 1px 6px; border: 0; }
.popover .sum th { font-weight: 400; max-width: 180px; overflow: hidden; text-overflow: ellipsis; }
.popover .sum tr:last-child th, .popover .sum tr:last-child td { border-top: 1px solid var(--edge); font-weight: 650; }
.text { line-height: 1.9; font-size: 15px; max-height: 420px; overflow: auto; border: 1px solid var(--grid); border-radius: 8px; padding: 10px 12px; overflow-wrap: anywhere; }
.text span { padding: 2px 1px; border-radius: 2px; cursor: pointer; white-space: pre-wrap; }
.text span.now { outline: 2px solid var(--cursor); outline-offset: 0; }
.pills button { min-width: 40px; border-radius: 999px; }
.found { max-height: 320px; overflow: auto; padding-left: 26px; margin: 10px 0 0; }
.found li { padding: 2px 0; }
.context { margin-left: 10px; color: var(--muted); overflow-wrap: anywhere; }
mark { background: var(--soft); color: var(--ink); border-radius: 3px; padding: 0 2px; }
input[type="range"] { accent-color: var(--accent); width: 180px; min-height: 32px; }
input[type="number"] { width: 100px; }
output { font-weight: 600; min-width: 56px; display: inline-block; align-self: center; }
.toolbar output { align-self: end; line-height: 32px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 20px 28px; align-items: start; margin-top: 8px; }
.group { border-top: 1px solid var(--grid); padding-top: 10px; margin-top: 14px; }
.group:first-child { border-top: 0; padding-top: 0; margin-top: 0; }
.patches { list-style: none; padding: 0; margin: 6px 0; }
.patches li { display: flex; gap: 8px; align-items: center; justify-content: space-between; padding: 4px 0; border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }
pre { background: var(--raised); border-radius: 8px; padding: 10px 12px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0; user-select: all; white-space: pre; }
.sliders { display: grid; grid-template-columns: auto minmax(80px, 1fr) auto; gap: 2px 10px; align-items: center; max-width: 460px; }
.sliders input[type="range"] { width: 100%; }
.weights input { width: 116px; min-height: 28px; padding: 1px 6px; text-align: right; }
.screen-reader-only { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.status { color: var(--muted); min-height: 1.45em; }
@media (max-width: 1340px) { .stage { grid-template-columns: minmax(0, 400px) minmax(0, 1fr); } }
@media (max-width: 1240px) { .cellview { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 900px) {
  .tabs { flex-wrap: wrap; overflow: visible; }
  .inner { padding: 14px 12px 32px; }
  .stage { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .outcome { order: -1; }
  .card { padding: 12px; }
}
@media (max-width: 480px) {
  .popover, .popover .sum { font-size: 12px; }
  .popover .sum th, .popover .sum td { padding: 1px 4px; }
  .popover .sum th { max-width: 82px; }
}
@media (prefers-reduced-motion: no-preference) { .tabs button { transition: color 0.15s, border-color 0.15s; } }
@media print {
  .page, .page[data-theme="dark"] { ${light} }
  .toolbar select, .toolbar button { border: 0; padding: 0; }
  .buttons, .popover, .theme, details, .whole, .tabs button:not([aria-selected="true"]) { display: none !important; }
  .inner { max-width: none; padding: 0; }
  .stage { grid-template-columns: minmax(0, 1fr); }
  .scroll, .text, .found, .net .scroll { overflow: visible; max-height: none; }
  .card, .panels > section { break-inside: avoid; }
}
`;

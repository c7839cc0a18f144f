"""The report of a monitored training, and the parts of such reports: one HTML file, for light and dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cellstack.inspect.monitoring.records import VANISHED, LayerRecord, TrainingRecord
from cellstack.train.history import named

# Figures are drawn in placeholder colours, which are replaced by variables of the style sheet, for light and dark mode.
INK, FAINT = "#010203", "#010204"
# Blue, orange, green: distinct on white and black, also for the colour-blind.
SERIES = ("#2a78d6", "#eb6834", "#1baf7a")
THEME = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1c1a; --muted: #5f5e5a; --line: #dedcd6;
  --accent: #2368bd; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201e; --ink: #ecebe6; --muted: #a8a69e;
  --line: #3a3936; --accent: #6aa9f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 0 0 .2rem; }
p { margin: .3rem 0 .9rem; max-width: 46rem; color: var(--muted); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.4rem 1.5rem;
  margin-top: 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .9rem; margin-top: 1.5rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .875rem; }
figure { margin: .8rem 0 0; overflow-x: auto; container-type: inline-size; }
figure svg { display: block; width: 100%; height: auto; min-width: 34rem; }
@container (width < 34rem) { figure::before { content: "Wider than the screen: scroll it sideways →";
  position: sticky; left: 0; display: block; color: var(--muted); font-size: .875rem; margin-bottom: .4rem; } }
svg text { font-family: system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; } td.bar { width: 45%; text-align: left; }
td.bar i { display: block; height: .6rem; border-radius: 3px; background: var(--accent); }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--accent); }
.live { border: 1px solid var(--line, #8884); border-radius: 8px; display: block; width: 100%; }
footer { color: var(--muted); font-size: .8125rem; margin-top: 1.5rem; }
@media (max-width: 40rem) { main { padding: 1.5rem .6rem 3rem; } section { padding: 1rem .8rem; }
  section:has(> .live) { padding: 1rem 0 0; } section:has(> .live) > :not(.live) { margin-inline: .8rem; } }
"""


def training_page(
    name: str, history: Sequence[dict[str, float]], records: Sequence[TrainingRecord], unit: str = "nats"
) -> str:
    """Return the page of an inspected training: of its history, see `Fit`, and the records of at least one epoch."""
    last = records[-1]
    names = list(dict.fromkeys(name for record in records for name in record.layers))
    tiles = [
        (str(len(history)), "epochs"),
        (f"{history[-1]['loss']:.3g}", f"training loss in the last epoch, {unit}"),
        *(
            (f"{history[-1][key]:.3g}", f"{named(key)} in the last epoch")
            for key in ("accuracy", "rmse")
            if key in history[-1]
        ),
        (str(len(last.findings)), f"findings in epoch {last.epoch}"),
    ]
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in last.findings)
    sections = [
        section(
            f"Findings in epoch {last.epoch}",
            "In one batch. Try a remedy if the loss no longer decreases, or if the output depends on steps further "
            "back than the gradient reaches.",
            f"<ul>{items}</ul>" if items else "<p>No findings.</p>",
        ),
        section(
            "Loss",
            "Mean loss in each epoch, on the training part and on the validation part.",
            curves({name: history}, f"loss ({unit})"),
        ),
    ]
    for layer in names:
        seen = {record.epoch: record.layers[layer] for record in records if layer in record.layers}
        sections.append(
            section(
                f"Layer {layer}",
                "Left: the share of the gradient at a sequence's last output that remains after so many steps back. "
                "Where it has vanished, the layer learns hardly anything from earlier steps. Middle: the mean of each "
                "gate. Right: norms of all weights together and of their gradient, before clipping.",
                _layer(layer, seen) + _figures_table(seen),
            )
        )
    heading = f"{name} in training"
    return page(heading, heading, "Its layers in one batch of each epoch.", tiles, sections)


def _layer(name: str, seen: dict[int, LayerRecord]) -> str:
    epochs = list(seen)
    shown = list(dict.fromkeys([epochs[0], epochs[(len(epochs) - 1) // 2], epochs[-1]]))
    with theme():
        figure = Figure(figsize=(9, 2.7), layout="constrained")
        reach, gates, norms = figure.subplots(1, 3)
        for epoch, color in zip(shown, SERIES, strict=False):
            carried = np.where(seen[epoch].lags["carried"] > 0.0, seen[epoch].lags["carried"], np.nan)
            reach.plot(carried, color=color, label=f"epoch {epoch}")
        reach.axhline(VANISHED, color=FAINT, linewidth=0.8, linestyle="--")
        reach.set(title="remaining gradient", xlabel="steps back from the output", yscale="log")
        for gate, color in zip(next(iter(seen.values())).figures.get("gates", {}), SERIES, strict=False):
            gates.plot(epochs, _over(seen, "gates", gate), color=color, label=gate, **_marked(epochs))
        gates.set(title="mean of the gates", xlabel="epoch", ylim=(-0.03, 1.03))
        for group, color in zip(("weights", "gradients"), SERIES, strict=False):
            norms.plot(epochs, _over(seen, group, "all"), color=color, label=group, **_marked(epochs))
        norms.set(title="norms", xlabel="epoch", yscale="log")
        for axis in (gates, norms):
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axis in (reach, gates, norms):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="best", fontsize=7)
    return figure_svg(figure, f"layer {name} in training")


def _marked(epochs: Sequence[float]) -> dict[str, Any]:
    """Return the style of a line over epochs: a single point needs a marker."""
    return {"marker": "o", "markersize": 3} if len(epochs) == 1 else {}


def _over(seen: dict[int, LayerRecord], group: str, what: str) -> list[float]:
    """Return a number over the epochs; NaN, a gap, where it wasn't measured or has no logarithm."""
    numbers = [record.figures.get(group, {}).get(what, np.nan) for record in seen.values()]
    return [number if np.isfinite(number) and (number > 0.0 or group == "gates") else np.nan for number in numbers]


def _figures_table(seen: dict[int, LayerRecord]) -> str:
    epoch, last = next(reversed(seen.items()))
    rows = [
        f"<tr><td>{html.escape(group)}</td><td>{html.escape(what)}</td><td>{number:.4g}</td></tr>"
        for group, numbers in last.figures.items()
        for what, number in numbers.items()
    ]
    head = f"<tr><th>measure</th><th>of</th><th>epoch {epoch}</th></tr>"
    return f"<details><summary>all numbers as a table</summary><table>{head}{''.join(rows)}</table></details>"


def page(
    title: str,
    heading: str,
    text: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[str],
    footer: str = "",
) -> str:
    """Return a report: a heading with a text, figures in tiles, and sections of HTML."""
    cards = "".join(f'<div class="tile"><b>{value}</b><span>{html.escape(said)}</span></div>' for value, said in tiles)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cellstack: {html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(heading)}</h1><p>{html.escape(text)}</p>"
        f'<div class="tiles">{cards}</div>{"".join(sections)}{footer}</main></body></html>\n'
    )


def section(title: str, text: str, body: str) -> str:
    """Return a section of a page; `body` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"


def theme(more: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    """Return a context with matplotlib's settings for the figures of a page."""
    settings: Any = THEME | (more or {})
    return rc_context(settings)


def figure_svg(figure: Figure, label: str) -> str:
    """Return a figure as an inline SVG in the page's colours."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # ids are shared by the whole page: keep those that are referred to, with a prefix for each figure
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' \bid="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    mark = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--muted)")
    return f'<figure role="img" aria-label="{html.escape(label)}">{svg}</figure>'


def curves(histories: dict[str, Sequence[dict[str, float]]], label: str = "loss (nats)") -> str:
    """Return the losses of some fits over their epochs, side by side; `label` is the axis label."""
    with theme():
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        axes = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]
        for axis, (name, history) in zip(axes, histories.items(), strict=True):
            epochs = [entry["epoch"] for entry in history]
            for key, part, color in (("loss", "training", SERIES[0]), ("validation_loss", "validation", SERIES[1])):
                if history and key in history[0]:
                    axis.plot(epochs, [entry[key] for entry in history], color=color, label=part, **_marked(epochs))
            axis.set(title=name, xlabel="epoch", yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel(label)
        axes[0].legend(loc="upper right")
    return figure_svg(figure, "training curves")

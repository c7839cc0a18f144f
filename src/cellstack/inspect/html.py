"""The page of a trace as one self-contained HTML file: it needs no server, no network and no other file."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellstack.cells import KINDS
from cellstack.cells.spec import CellSpec
from cellstack.formats.files import check_replaceable, replacing
from cellstack.inspect import contents
from cellstack.views.recorded import form_of

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace

ENGINE = (
    "engine/shapes",
    "engine/activations",
    "engine/products",
    "engine/operations",
    "engine/patches",
    "engine/cells",
    "engine/cells_back",
    "engine/stacks",
    "engine/nodes_base",
    "engine/nodes_rows",
    "engine/nodes_time",
    "engine/nodes_shape",
    "engine/nodes",
    "engine/engine",
    "engine/training",
)
"""The engine's modules, each after its imports."""

MODULES = (
    *ENGINE,
    "style",
    "dom",
    "data",
    "draw",
    "seriation",
    "heads",
    "formulas",
    "view",
    "answer",
    "network",
    "tiles",
    "wave",
    "map",
    "wiring",
    "cell",
    "unit",
    "labels",
    "memory",
    "runner",
    "gradients",
    "changes",
    "whatif",
    "matches",
    "playground",
    "page",
)
"""The page's modules, each after its imports."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
"""The content security policy: only the page's own scripts run, and nothing is requested from a network."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>html {{ color-scheme: light dark; }} body {{ margin: 0; }} #page {{ --least: 100vh; }}</style>
</head>
<body>
<main id="page"></main>
<noscript>This page needs JavaScript, which is disabled in this browser.</noscript>
"""

_START = """
const element = (name) => document.getElementById(name).textContent;
const description = JSON.parse(element("description"));
const arrays = description.arrays.map((_, number) => () => element(`array-${number}`));
const payload = { description, arrays };
const el = document.getElementById("page");
render({ model: { get: () => payload }, el });
const frame = window.frameElement; // null if there is none, or if it is of another origin
if (frame?.classList.contains("live")) {
  el.style.setProperty("--least", "0"); // not the height of the frame, which follows that of the page
  const border = frame.offsetHeight - frame.clientHeight;
  const fit = () => (frame.style.height = `${Math.ceil(el.getBoundingClientRect().height) + border}px`);
  new ResizeObserver(fit).observe(el);
}
"""


def head(title: str, policy: str = POLICY) -> str:
    """Return the beginning of a page, up to its scripts, with an empty element `page`."""
    return _HEAD.format(policy=html.escape(policy), title=html.escape(title))


@cache
def module_text() -> str:
    """Return the page's modules joined into one, which exports `render({ model, el })`."""
    engine = json.dumps(engine_text()).replace("<", "\\u003c")  # run by a worker; must contain no tag
    return "\n".join([f"const engineSource = {engine};", _kinds(), *map(joinable, MODULES)])


def engine_text() -> str:
    """Return the engine's modules joined into one without exports, for a worker."""
    return "\n".join([_kinds(), *map(joinable, ENGINE)])


def _kinds() -> str:
    """Return the form of each kind of cell with the default flags, for the playground."""
    forms = {name: form_of(CellSpec(1, 1, kind=name)) for name in KINDS}
    return f"const cellKinds = {contents.text_of(forms)};"


def script_text(*modules: Path) -> str:
    """Return the page's modules and other ones as a classic script, which pages on disk may load too."""
    others = (unwrapped(module.read_text(encoding="utf-8")) for module in modules)
    return "\n".join(['(() => {\n"use strict";', module_text(), *others, "})();\n"])


def joinable(name: str, package: str = "cellstack.inspect") -> str:
    """Return the text of a module of a page, as `unwrapped` does."""
    return unwrapped((resources.files(package) / "page" / f"{name}.js").read_text(encoding="utf-8"))


def unwrapped(text: str) -> str:
    """Return a module without its imports and exports, and without lines of comments."""
    text = re.sub(r"^(?:import [^;]*;| *//.*)\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^export (?=(?:async )?(?:function|class|const|let)\b)", "", text, flags=re.MULTILINE)


def save_html(
    t: NetworkTrace, path: str | PathLike[str], labels: Any, audio: Any, title: str | None, rows: Any, **meaning: Any
) -> None:
    """Write the page of a trace: see `NetworkTrace.save_html`."""
    check_replaceable(path)  # before the work of compressing
    parts = page(t, labels, audio, title, rows, **meaning)
    with replacing(path) as file:
        for part in parts:
            file.write(part)


def page(t: NetworkTrace, labels: Any, audio: Any, title: str | None, rows: Any, **meaning: Any) -> Iterator[bytes]:
    """Return the page of a trace in chunks: see `NetworkTrace.save_html`; errors are raised before the first chunk."""
    made = contents.payload(t, labels, audio, title, rows, **meaning)
    begin = head(made.description["title"]) + '<script type="application/json" id="description">'
    before, after = b'<script type="text/plain" id="array-%d">', b"</script>\n"
    arrays = ((before % number, base64.b64encode(data), after) for number, data in enumerate(made.arrays))
    return chain(
        (begin.encode("utf-8", "replace"), contents.text_of(made.description).encode(), after),
        chain.from_iterable(arrays),
        (b'<script type="module">\n', (module_text() + _START).encode(), after, b"</body>\n</html>\n"),
    )

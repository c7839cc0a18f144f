"""Write `src/kinds.js`: what JavaScript needs to know of the kinds of cell, from their declarations."""

import json
from pathlib import Path
from typing import Any

from cellstack.cells import KINDS
from cellstack.cells.activations import OF_BACKBONES
from cellstack.cells.arguments import Argument
from cellstack.cells.base import Kind
from cellstack.cells.spec import ARRAYS, FLAGS, MATRICES

TARGET = Path(__file__).parent / "src" / "kinds.js"


def entry(kind: Kind) -> dict[str, Any]:
    """Return what JavaScript needs to know of a kind of cell."""
    settings = {name: one.default for name, one in kind.settings.items() if name != "units"}
    return {
        "gates": list(kind.gates),
        "states": list(kind.state._fields),
        "trace": list(kind.trace._fields),
        "slots": {slot: kind.activation(slot) for slot in kind.slots},
        "arrays": [[one.name, one.shape, one.needs] for one in kind.every_array],
        "scalar": kind.scalar,
        "settings": {**settings, "gate_activations": {}},
    }


def flag(one: Argument) -> list[Any]:
    """Return a setting's name, default and options."""
    return [one.name, one.default, list(one.limit.options) if one.limit else []]


def module() -> str:
    """Return the text of the module."""
    kinds = "".join(
        f"  {name}: {{\n"
        + "".join(f"    {field}: {json.dumps(value)},\n" for field, value in entry(kind).items())
        + "  },\n"
        for name, kind in KINDS.items()
    )
    lines = (
        "// The kinds of cell, written by web/write_kinds.py from their declarations in Python: change those instead.",
        "",
        "// Of each kind: the gates in the order of their blocks; its states; the names in a trace; for each slot of",
        "// an activation, in the kernel's order, the setting that names it; its arrays, each with the symbols of its",
        "// axes and the settings that it needs; the setting with which the last column of x is a number of the step;",
        "// and the settings with their defaults.",
        f"export const KINDS = {{\n{kinds}}};",
        "",
        "// The settings that the kernel takes as numbers, with their defaults, and the options of texts.",
        f"export const FLAGS = {json.dumps([flag(one) for one in FLAGS.values()])};",
        "",
        "// The kernel's codes of activations, its order of a cell's arrays, and those that are matrices.",
        f"export const ACTIVATIONS = {json.dumps(OF_BACKBONES)};",
        f"export const ARRAYS = {json.dumps(ARRAYS)};",
        f"export const MATRICES = {json.dumps(MATRICES)};",
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(module())

"""Stubs of the classes whose constructors are compiled from declarations: what type checkers and editors read.

`make stubs` writes them; `test_signatures.py` compares them with the declarations.
"""

import json
import os
import re
import textwrap
from importlib import import_module
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import cellstack
from cellstack.cells import KINDS
from cellstack.cells.arguments import constructor

SOURCE = Path(cellstack.__file__).parent
MODULES = {"layers.cell_classes": "cell", "layers.layer_classes": "layer", "keras.layers": "keras"}
"""The modules, and what their classes are."""


def path(module):
    return SOURCE / f"{module.replace('.', '/')}.pyi"


def stub(module):
    """Return the text of a module's stub."""
    of, found = MODULES[module], import_module(f"cellstack.{module}")
    imports, classes, names = {"from typing import Any"}, [], []
    for name in found.__all__:
        cls = getattr(found, name)
        names.append(name)
        base, kind = cls.__base__, KINDS[cls.kind]
        imports.add(f"from {base.__module__} import {base.__name__}")
        body = [f"{constructor(kind, of)}: ..."]
        if of == "layer":
            body.insert(0, f"cell: {cls.cell_type.__name__}")
            imports.add(f"from {cls.cell_type.__module__} import {cls.cell_type.__name__}")
        classes.append(f"\nclass {cls.__name__}({base.__name__}):\n" + textwrap.indent("\n".join(body), "    ") + "\n")
    text = "".join(classes)
    used = {"torch.": "import torch", "weights.": "from cellstack.layers import weights"}
    imports |= {line for name, line in used.items() if re.search(rf"\b{re.escape(name)}", text)}
    return (
        "# Written by `make stubs`.\n# fmt: off\n# ruff: noqa: I001\n"
        + "\n".join(sorted(imports, key=_order))
        + f"\n\n__all__ = {json.dumps(sorted(names, key=lambda name: (not name.isupper(), name)), indent=4)}\n"
        + text
    )


def _order(line):
    package = line.split()[1].partition(".")[0]
    return ("typing", "torch", "cellstack").index(package), line


if __name__ == "__main__":
    for module in MODULES:
        path(module).write_text(stub(module), encoding="utf-8")

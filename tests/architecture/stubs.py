"""Stubs of classes and functions whose signatures are made from declarations, and the table of options in the docs.

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
from cellstack.cli.options import TITLES, has_flag, shown
from cellstack.train import entry
from cellstack.train.declaration import DATA
from cellstack.train.options import RECORDS, declared

SOURCE = Path(cellstack.__file__).parent
PAGE = SOURCE.parents[1] / "docs" / "options.md"
MODULES = {"layers.cell_classes": "cell", "layers.layer_classes": "layer", "keras.layers": "keras"}
"""The modules, and what their classes are."""
TRAINING = {"train.entry": "functions", "sklearn.parameters": "estimators"}
"""Modules with the options of training."""


def path(module):
    return SOURCE / f"{module.replace('.', '/')}.pyi"


def stub(module):
    """Return the text of a module's stub."""
    if module in TRAINING:
        return globals()[TRAINING[module]]()
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


def functions():
    """Return the stub of the functions that train."""
    made = (entry.fit, entry.fit_forecast, entry.fit_text)
    heads = [f"\n{one.head} -> {one.__annotations__['return']}: ...\n" for one in made]
    return (
        "# Written by `make stubs`.\n# fmt: off\nimport os\n"
        "from collections.abc import Callable, Mapping, Sequence\nfrom pathlib import Path\nfrom typing import Any\n\n"
        "from cellstack.train.fitting import Result\n"
        "from cellstack.train.forecasting.training import Trained\n" + "".join(heads)
    )


def estimators():
    """Return the stub of the estimators' parameters."""
    from cellstack.sklearn import parameters as made

    bases = {"Sequence": (made.SEQUENCE, "BaseEstimator"), "Classifier": (made.CLASSIFIER, "SequenceParameters")}
    bases["Forecaster"] = (made.FORECASTER, "BaseEstimator")
    classes = [
        f"\n@dataclass(repr=False, eq=False, kw_only=True)\nclass {name}Parameters({base}):\n"
        + "".join(f"    {one.name}: {one.type} = {one.default!r}\n" for one in some.values())
        for name, (some, base) in bases.items()
    ]
    return (
        "# Written by `make stubs`.\n# fmt: off\n"
        "from collections.abc import Callable, Mapping, Sequence\nfrom dataclasses import dataclass\n"
        "from typing import Any, TypeVar\n\nimport numpy as np\nfrom sklearn.base import BaseEstimator\n\n"
        "from cellstack.cells.arguments import Argument\n\nC = TypeVar('C', bound=type)\n"
        "SEQUENCE: dict[str, Argument]\nCLASSIFIER: dict[str, Argument]\nFORECASTER: dict[str, Argument]\n\n"
        "def described(of: Mapping[str, Argument]) -> Callable[[C], C]: ...\n" + "".join(classes)
    )


def options_page():
    """Return docs/options.md."""
    lines = [
        "# Options of training\n",
        "Each option is an argument of [`train.fit`](training.md) (sequences), `train.fit_forecast` or\n"
        "`train.fit_text`, and a flag of `cellstack train` with hyphens, such as `--day-first`; only Python has\n"
        "those marked so. A flag for False begins with `--no-`; for `day_first` it is `--month-first`.\n"
        "`cellstack train FILE --help` shows the main options for the data of FILE, `--help-all` all of them.\n"
        "The [estimators](sklearn.md) have those that apply, some with other defaults. A cell without an entry\n"
        "means none, or off; \\- means that the option doesn't apply, and is refused.\n",
    ]
    for title, record in zip(TITLES, RECORDS, strict=True):
        lines += [f"## {title.capitalize()}\n", f"| option | {' | '.join(DATA)} | |", "|---" * (len(DATA) + 2) + "|"]
        for one in declared(record).values():
            cells = [shown(one, data) if data in one.defaults else "\\-" for data in DATA]
            choices = f": {', '.join(one.limit.options)}" if one.limit is not None and one.limit.options else ""
            where = "" if has_flag(one) else " (Python)"
            lines.append(f"| `{one.name}`{where} | {' | '.join(cells)} | {one.text}{choices} |")
        lines.append("")
    return "\n".join(lines)


def _order(line):
    package = line.split()[1].partition(".")[0]
    return ("typing", "torch", "cellstack").index(package), line


if __name__ == "__main__":
    for module in (*MODULES, *TRAINING):
        path(module).write_text(stub(module), encoding="utf-8")
    PAGE.write_text(options_page(), encoding="utf-8")

"""Modules as files hold them, asked for their settings and weights as the modules in memory would be.

A pickled module has its settings among its attributes. TorchScript writes them into its source, which
`script.py` follows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.script import Scripts
from cellstack.formats.pytorch.tensors import Quantised, Tensor, short
from cellstack.formats.pytorch.tree import OWN, attributes_of, contents, hooked, kind_of
from cellstack.spec import CellSpec, FormatError, described

PACKAGES = re.compile(
    r"(torch\.(nn\.(modules|parallel)|(?P<dynamic>(ao\.)?nn\.quantized\.dynamic\.modules))|(?P<ours>cellstack\.layers))"
    r"\.\w+\.(?P<kind>\w+)"
)
MOST = 10_000  # modules: the same one may be met many times
LATER = {"padding_mode": "zeros", "proj_size": 0, "approximate": "none"}  # settings that older versions lack, as then


class UnsaidError(AttributeError):
    """A setting that the file doesn't say."""


@dataclass
class Source:
    """What the modules of a file have in common.

    Attributes:
        where: what messages call the file.
        scripts: the source of TorchScript's classes.
        left: how many modules may still be met.
    """

    where: str
    scripts: Scripts
    left: int = MOST


class Saved:
    """A module of a file.

    Attributes:
        path: that of its class.
        kind: the class's name, "" where it is neither PyTorch's nor ours or has a forward pass of its own.
        package: "torch.nn", or "cellstack.layers" for one of ours.
        hooked: whether it has hooks other than those that compute a weight.
        changed: what keeps it from computing what its class does, as far as TorchScript's source tells; "" = nothing.
    """

    def __init__(self, source: Source, standin: Standin) -> None:
        source.left -= 1
        if source.left < 0:
            raise FormatError(f"{source.where}: expected at most {MOST} modules in a row, found more")
        self.source, self.standin, self.path = source, standin, kind_of(standin)
        self.attributes = attributes_of(standin)
        match = PACKAGES.fullmatch(self.path)
        self.hooked = hooked(self.attributes)
        written = source.scripts.written(standin, self.attributes)
        self.changed = written.why if written and match else ""
        self.kind = match["kind"] if match and "forward" not in self.attributes else ""
        self.package = "cellstack.layers" if match and match["ours"] else "torch.nn"
        held = (self.attributes[name] for name in OWN if isinstance(self.attributes.get(name), dict))
        self.own = {key: child for part in held for key, child in part.items()}
        implied: dict[str, Any] = {}
        if match and match["dynamic"]:
            implied["bias"] = None  # where there is one, it is packed with the weights
        mode = self.attributes.get("mode")
        if isinstance(mode, str) and mode.startswith("RNN_"):  # which old RNNs have alone
            implied["nonlinearity"] = mode.removeprefix("RNN_").lower()
        self.settings = LATER | implied | (written.constants if written else {}) | self.attributes | self.own

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Its weights and its children's, by name, read when they are asked for."""
        found = contents(self.source.where, self.standin, self.source.scripts)
        return joined(found.tensors, self.source.where, directions=found.directions, axes=found.axes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.tensors:
            return self.tensors[name]
        if name not in self.settings:
            raise UnsaidError(f"expected the file to say {name}, found a module without it")
        value = self.settings[name]
        if isinstance(value, (Tensor, Quantised)):
            return value
        if value is not None and not isinstance(value, (bool, int, float, str)):
            whole = isinstance(value, (list, tuple)) and all(type(part) is int for part in value)
            if not whole:
                raise UnsaidError(f"expected {name} to be a setting, found {type(value).__name__}")
            return tuple(value)
        return value

    @property
    def spec(self) -> CellSpec:
        """Description of one of our cells.

        Raises:
            ValueError: the file doesn't say it, or an activation isn't one of `cellstack.spec.ACTIVATIONS`.
        """
        foreign, text = self.attributes.get("_foreign"), self.attributes.get("_text")
        if foreign:
            raise ValueError(f"no description for the activation {short(foreign)}")
        if not isinstance(text, str):
            raise ValueError("expected the file to describe the cell, found one without its description")
        try:
            return described(text)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"expected the description of a cell, found {short(text)}: {str(error)[:200]}") from None

    @property
    def _modules(self) -> dict[str, Saved]:
        """The modules in it, in their order."""
        pickled = "_modules" in self.attributes
        return {
            str(name): Saved(self.source, child)
            for name, child in (self.own if pickled else self.attributes).items()
            if isinstance(child, Standin) and (pickled or child.kind.startswith("__torch__."))
        }

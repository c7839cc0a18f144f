"""Modules in files, with the same attributes for settings and weights as modules in memory.

A pickled module has its settings among its attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.cells.spec import CellSpec, described
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.tensors import Quantised, Tensor, short
from cellstack.formats.pytorch.tree import OWN, attributes_of, contents, hooked, kind_of

PACKAGES = re.compile(
    r"(torch\.(nn\.(modules|parallel)|(?P<dynamic>(ao\.)?nn\.quantized\.dynamic\.modules))|(?P<ours>cellstack\.layers))"
    r"\.\w+\.(?P<kind>\w+)"
)
MOST = 10_000  # modules that are read; the same one may occur many times
LATER = {"padding_mode": "zeros", "proj_size": 0, "approximate": "none"}  # settings that older versions didn't have


class MissingSettingError(AttributeError):
    """The file doesn't specify a setting."""


@dataclass
class SavedFile:
    """What the modules of a file share.

    Attributes:
        where: the file's name, for messages.
        left: how many more modules may be read.
    """

    where: str
    left: int = MOST


class Saved:
    """A module of a file.

    Attributes:
        path: the dotted path of its class.
        kind: the class's name; "" if it is neither PyTorch's nor ours, or has its own forward pass.
        package: "torch.nn", or "cellstack.layers" for one of ours.
        hooked: whether it has hooks other than those that compute a weight.
    """

    def __init__(self, source: SavedFile, standin: Standin) -> None:
        source.left -= 1
        if source.left < 0:
            raise FormatError(f"{source.where}: more than {MOST} modules aren't supported")
        self.source, self.standin, self.path = source, standin, kind_of(standin)
        self.attributes = attributes_of(standin)
        match = PACKAGES.fullmatch(self.path)
        self.hooked = hooked(self.attributes)
        self.kind = match["kind"] if match and "forward" not in self.attributes else ""
        self.package = "cellstack.layers" if match and match["ours"] else "torch.nn"
        held = (self.attributes[name] for name in OWN if isinstance(self.attributes.get(name), dict))
        self.own = {key: child for part in held for key, child in part.items()}
        implied: dict[str, Any] = {}
        if match and match["dynamic"]:
            implied["bias"] = None  # a bias is packed with the weights
        mode = self.attributes.get("mode")
        if isinstance(mode, str) and mode.startswith("RNN_"):  # old RNNs have no other setting for it
            implied["nonlinearity"] = mode.removeprefix("RNN_").lower()
        self.settings = LATER | implied | self.attributes | self.own

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The weights of the module and its children by name, read on first use."""
        found = contents(self.source.where, self.standin)
        return joined(found.tensors, self.source.where, directions=found.directions, axes=found.axes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.tensors:
            return self.tensors[name]
        if name not in self.settings:
            raise MissingSettingError(f"the file doesn't specify {name}")
        value = self.settings[name]
        if isinstance(value, (Tensor, Quantised)):
            return value
        if value is not None and not isinstance(value, (bool, int, float, str)):
            whole = isinstance(value, (list, tuple)) and all(type(part) is int for part in value)
            if not whole:
                raise MissingSettingError(f"expected {name} to be a setting, found {type(value).__name__}")
            return tuple(value)
        return value

    @property
    def spec(self) -> CellSpec:
        """The description of one of our cells.

        Raises:
            ValueError: the file doesn't hold it, or an activation isn't one of `cells.activations.ACTIVATIONS`.
        """
        foreign, text = self.attributes.get("_foreign"), self.attributes.get("_text")
        if foreign:
            raise ValueError(f"no description for the activation {short(foreign)}")
        if not isinstance(text, str):
            raise ValueError("the file holds no description of the cell")
        try:
            return described(text)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"expected the description of a cell, found {short(text)}: {str(error)[:200]}") from None

    @property
    def _modules(self) -> dict[str, Saved]:
        """The modules in it, in their order."""
        return {str(name): Saved(self.source, child) for name, child in self.own.items() if isinstance(child, Standin)}

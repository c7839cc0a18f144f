"""What a runtime answers, or why it can't; and what the runtimes share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from cellstack.nodes.base import Array, CellState

Inputs = Mapping[str, Array]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # colours for terminals, which torch writes into its messages
MODULE = "compare with your module: cs.verify(cs.load(…), module)"


class Answers(NamedTuple):
    """A runtime's answers: outputs by the network's names, and states by the names that `named` gives them, if any.

    `no_states` says why states are missing, if the reason is known; `note` says what to know about the run.
    """

    runtime: str
    version: str
    outputs: dict[str, Array]
    states: dict[str, Array]
    no_states: str = ""
    note: str = ""


class CannotRunError(Exception):
    """No runtime can run a file here; the message says why, and what to install if that helps."""


class OtherSizesError(CannotRunError):
    """A file only takes inputs with `batch` rows of `steps` steps."""

    def __init__(self, batch: int, steps: int) -> None:
        super().__init__(f"the file only takes inputs with B={batch}, T={steps}")
        self.batch, self.steps = batch, steps


def named(states: Sequence[CellState]) -> dict[str, Array]:
    """Return every array of a network's state by a name, such as `cell 0 c`."""
    return {
        f"cell {number} {name}": array
        for number, state in enumerate(states)
        for name, array in zip(state._fields, state, strict=True)
    }


def package(name: str, path: str) -> Any:
    """Import and return a package; raise `CannotRunError` if it isn't installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise CannotRunError(f"{path} is run by {name}, which needs {error.name}: pip install {error.name}") from None


def says(what: str, error: Exception) -> str:
    """Return a message with the text of a runtime's error, in one line of bounded length."""
    text = " ".join(ESCAPE.sub("", str(error)).split())
    return f"{what}: {text if len(text) <= 300 else text[:297] + '...'}"


def by_name(names: Sequence[str], found: Sequence[str], arrays: Sequence[Any], what: str) -> dict[str, Any]:
    """Return arrays by `names`: matched by name if all of them are in `found`, else by order."""
    if set(names) <= set(found):
        return {name: arrays[found.index(name)] for name in names}
    if len(names) != len(found):
        raise CannotRunError(f"expected the {what} {', '.join(names)}, found {', '.join(found)}")
    return dict(zip(names, arrays, strict=True))

"""What an option of training is, how one is declared, and how its values are checked; `options.py` declares them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple

from cellstack.cells.arguments import Limit
from cellstack.train.checks import OptionError

DATA = ("sequences", "forecasts", "texts")
"""The kinds of data."""

NUMBERS = {"int": (Integral, "an integer"), "float": (Real, "a number")}


class Option(NamedTuple):
    """An option of training.

    Args:
        name: of the argument in Python; the flag is `--` and the same name with hyphens.
        type: annotation in signatures.
        text: one line of documentation; names of other options are in backquotes.
        defaults: by the kinds of data that the option applies to.
        unset: what None means, by kind of data.
        limit: its range.
        rare: whether only `--help-all` shows it.
        flag: whether the command line may have it.
        python: what only Python accepts, in words.
        stored: annotation of the record's field, which may lack None where it is replaced before.
    """

    name: str
    type: str
    text: str
    defaults: dict[str, Any]
    unset: dict[str, str]
    limit: Limit | None
    rare: bool
    flag: bool
    python: str
    stored: str

    def typed(self, data: str) -> str:
        """Return the annotation for a kind of data."""
        optional = self.defaults[data] is None and "None" not in self.type and self.type != "Any"
        return f"{self.type} | None" if optional else self.type

    def described(self, data: str) -> str:
        """Return the text for a kind of data."""
        unset = self.unset.get(data) if self.defaults[data] is None else ""
        choices = f": {', '.join(self.limit.options)}" if self.limit is not None and self.limit.options else ""
        more = f"; {self.python}" * (bool(self.python) and data == "sequences")
        return f"{self.text}{choices}{more}{f'; None = {unset}' if unset else ''}."

    def check(self, value: Any) -> None:
        """Raise `OptionError` if the option can't have this value."""
        if value is None and (self.stored == "Any" or "None" in self.stored):
            return
        kind, what = NUMBERS.get(self.stored.removesuffix(" | None"), (None, ""))
        if kind is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise OptionError(self.name, f"to be {what}, got {value!r:.80}")
        if self.limit is not None and not self.limit.allows(value):
            raise OptionError(self.name, f"{self.limit.text}, got {value!r:.80}")


def option(
    default: Any,
    text: str,
    limit: Limit | None = None,
    *,
    of: str | tuple[str, ...] = DATA,
    type: str = "",
    unset: str | dict[str, str] = "",
    rare: bool = False,
    flag: bool = True,
    python: str = "",
    **defaults: Any,
) -> Any:
    """Declare a field as an option.

    Args:
        default: the field's.
        text, limit, rare, flag, python: see `Option`.
        of: the kinds of data that it applies to.
        type: annotation in signatures; "" = the field's.
        unset: what None means, for all kinds of data or for some.
        defaults: other defaults, by kind of data.
    """
    by_data = {data: defaults.get(data, default) for data in ((of,) if isinstance(of, str) else of)}
    unset = unset if isinstance(unset, dict) else dict.fromkeys(by_data, unset)
    declared = Option("", type, text, by_data, unset, limit, rare, flag, python, "")
    return field(default=default, metadata={"option": declared})


def at_least(least: int, most: float = math.inf) -> Limit:
    """Return the limit of a number."""
    return Limit(lambda value: least <= value <= most, f">= {least}" if most == math.inf else f"from {least} to {most}")


def among(*choices: str) -> Limit:
    """Return the limit of an option with a few values."""
    return Limit(lambda value: value in choices, f"to be one of {', '.join(choices)}", options=choices)


def function(example: str) -> Limit:
    """Return the limit of an option that is a function."""
    return Limit(callable, f"to be a function, such as {example}")


ABOVE_ZERO = Limit(lambda value: 0 < value < math.inf, "> 0 and finite")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < math.inf, ">= 0 and finite")
SHARE = Limit(lambda value: 0.0 <= value < 1.0, "to be a share in [0, 1)")


@cache
def options_of(*records: type) -> dict[str, Option]:
    """Return the options of records by name."""
    options: dict[str, Option] = {}
    for record in records:
        for one in fields(record):
            if one.metadata:
                declared, stored = one.metadata["option"], str(one.type)
                options[one.name] = declared._replace(name=one.name, type=declared.type or stored, stored=stored)
    return options


@dataclass(frozen=True)
class Record:
    """Options with their values, which are checked.

    Raises:
        UsageError: an option out of range.
    """

    def __post_init__(self) -> None:
        for name, one in options_of(type(self)).items():
            one.check(getattr(self, name))


def several(value: Any) -> Any:
    """Return one name or number, or several, as a tuple; None for None."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    return None if value is None else (value,)

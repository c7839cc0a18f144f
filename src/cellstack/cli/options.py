"""The flags of training, derived from its options, and the help that shows those for the data at hand."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cellstack.cli.arguments import names, numbers, sizes
from cellstack.train.declaration import DATA, Option
from cellstack.train.options import NAMES, RECORDS, applying, declared

TITLES = ("data", "forecasts", "model", "training")  # of the groups of `RECORDS`
WORDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "float": (float, "X"),
    "str": (str, "TEXT"),
    "str | os.PathLike[str]": (str, "PATH"),
    "Sequence[str]": (names, "A,B"),
    NAMES: (names, "A,B"),
    "int | Sequence[int]": (sizes, "N,N"),
    "float | Sequence[float]": (numbers, "X,X"),
}
"""How the value of a flag is parsed and shown, by the option's type without None."""


def _sign(text: str) -> str:
    found = {"point": ".", "comma": ",", ".": ".", ",": ","}.get(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected point or comma, got {text!r}")
    return found


def _classes(text: str) -> str:
    if text != "balanced":
        raise argparse.ArgumentTypeError(f"expected balanced, got {text!r}")
    return text


OWN: dict[str, tuple[Callable[[str], Any], str]] = {
    "test": (float, "P"),
    "validation": (float, "P"),
    "init": (str, "MODEL"),
    "pretrained": (str, "MODEL"),
    "sample_weight": (str, "COLUMN"),
    "class_weight": (_classes, "balanced"),
    "decimal": (_sign, "{point,comma}"),
}
"""The same, by the option's name."""
OPPOSITE = {"day_first": ("--month-first", "01/02 is 2 January")}
"""Flags for False and their help, of options that have a name for it; for others it begins with `--no-`."""


def add_flags(group: Any, options: Mapping[str, Option], default: str = "") -> None:
    """Add flags for options, without their defaults, which depend on the data.

    Args:
        group: the parser, or a group of it.
        options: by name; those that only Python has are left out.
        default: what holds without the flag, in all helps.
    """
    for name, one in options.items():
        if not has_flag(one):
            continue
        flag, kind = "--" + name.replace("_", "-"), one.type.removesuffix(" | None")
        text = as_help(one.text) + f" (default: {default})" * bool(default)
        if kind == "bool":
            usual, pair = next(iter(one.defaults.values())), group.add_mutually_exclusive_group()
            if not usual:
                pair.add_argument(flag, dest=name, action="store_const", const=True, help=text)
            if usual or name in OPPOSITE:
                flag, text = OPPOSITE.get(name, (flag.replace("--", "--no-"), f"don't {text}"))
                pair.add_argument(flag, dest=name, action="store_const", const=False, help=text)
        elif one.limit is not None and one.limit.options:
            group.add_argument(flag, dest=name, choices=one.limit.options, help=text)
        else:
            parsed, shown = OWN.get(name) or WORDS[kind]
            group.add_argument(flag, dest=name, type=parsed, metavar=shown, help=text)


def has_flag(one: Option) -> bool:
    """Return whether the command line has an option: its value can be written in a word, or is a switch."""
    kind = one.type.removesuffix(" | None")
    return one.flag and (one.name in OWN or kind in WORDS or kind == "bool")


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all options of training, in groups, and `--help-all`."""
    for title, record in zip(TITLES, RECORDS, strict=True):
        add_flags(parser.add_argument_group(title), declared(record))


class ShowHelp(argparse.Action):
    """Shows the flags for the data of FILE, or without it those for all data; with `const` also the rare ones."""

    def __init__(
        self,
        *given: Any,
        data_of: Callable[[argparse.Namespace], str],
        others: Mapping[str, tuple[str, ...]],
        **named: Any,
    ) -> None:
        """Take a function that returns the kind of data of FILE, and flags that aren't options, with their kinds."""
        super().__init__(*given, nargs=0, default=argparse.SUPPRESS, **named)
        self.data_of, self.others = data_of, others

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        """Print the help and exit."""
        kinds = DATA if namespace.file is None else (self.data_of(namespace),)
        for action in parser._actions:
            one = declared().get(action.dest)
            one = one if one is not None and has_flag(one) else None
            applies = self.others.get(action.dest, DATA) if one is None else tuple(one.defaults)
            known = [data for data in kinds if data in applies]
            if not known or (not self.const and (len(known) < len(kinds) or (one is not None and one.rare))):
                action.help = argparse.SUPPRESS
            elif one is not None and action.const is not False:
                action.help = f"{as_help(one.text)}{_default(one, known)}"
        parser.print_help()
        parser.exit()


def as_help(text: str) -> str:
    """Return an option's text for the command line, with flags in place of the names of options."""
    return re.sub(r"`(\w+)`", lambda found: f"--{found[1].replace('_', '-')}", text).replace("`", "").replace("%", "%%")


def _default(one: Option, kinds: Iterable[str]) -> str:
    """Return the defaults for kinds of data, in brackets; "" if there are none."""
    said = {data: shown(one, data) for data in kinds}
    if len({*said.values()}) == 1:
        (only,) = {*said.values()}
        return f" (default: {only})" if only else ""
    return f" (default: {'; '.join(f'{data} {value}' for data, value in said.items() if value)})"


def shown(one: Option, data: str) -> str:
    """Return the default of an option for a kind of data in words; "" for False and nothing."""
    value = one.defaults[data]
    if value is None:
        return one.unset.get(data, "")
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if isinstance(value, bool) else str(value)


def options_of(args: argparse.Namespace, data: str) -> dict[str, Any]:
    """Return the options of a kind of data by name: those that are given, else their defaults."""
    found = {name: one.defaults[data] for name, one in applying(data).items()}
    return found | {name: value for name in found if (value := getattr(args, name, None)) is not None}

"""The parser of the command line: how help and errors look, and the types that arguments share."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

TEXT = r"'[^'`\\]*'"
NAMED = re.compile(rf"`(\w+)=(…|True|False|{TEXT}|\[{TEXT}(?:, {TEXT})*\])`")  # an argument of Python in a message


class Help(argparse.HelpFormatter):
    """Formats options as `-o, --output FILE`, leaves examples as written, and lists verbs under one heading."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and suggest the option or choice closest to a misspelt one."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, formatter_class=Help, **named)
        self.register("type", int, integer)  # argparse says only "invalid int value"
        self.register("type", float, number)

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Parse, and refuse unknown arguments here, where the verb's own options are known for suggestions."""
        found, left = super().parse_known_args(*given, **named)
        if left:
            options = [word for word in left if word.startswith("-")]  # words after an unknown option are its values
            known = self._option_string_actions
            said = [f"unrecognized argument {word}{near(word.split('=')[0], known)}" for word in options or left]
            self.error("; ".join(said))
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += near(choice[1], re.findall(r"[^', ]+", choice[2]))
        self.exit(2, f"{self.prog}: error: {message}\n")


def near(word: str, known: Iterable[str]) -> str:
    """Return a suggestion of the closest known word, "" if none is close."""
    found = get_close_matches(word, list(known), 1)
    return f", did you mean {found[0]}?" if found else ""


def as_flags(text: str, args: argparse.Namespace) -> str:
    """Return a message with options of the command line instead of arguments of Python.

    Messages name an argument in backquotes: `` `id='shop'` `` or, without a value, `` `id=…` ``. An option's `dest` is
    the name of its argument. Options of other verbs stand for arguments that this verb doesn't have, as in what
    `stream` says about a network's training.
    """
    parsers = [args.parsers[args.verb], *args.parsers.values()]

    def flag(found: re.Match[str]) -> str:
        name, written = found.groups()
        value = None if written == "…" else ast.literal_eval(written)
        for action in (action for parser in parsers for action in parser._actions if action.option_strings):
            if action.dest == name and (action.nargs != 0 or value in (None, action.const)):
                flag, shown = action.option_strings[-1], ",".join(value) if isinstance(value, list) else value
                return flag if value is None or action.nargs == 0 else f"{flag} {_quoted(str(shown))}"
        return found[0]

    return NAMED.sub(flag, text)


def _quoted(value: str) -> str:
    """Return a value as in a shell; one without letters and digits in quotation marks, which sets it apart."""
    return shlex.quote(value) if re.search(r"\w", value) else f"'{value}'"


def sizes(text: str) -> tuple[int, ...]:
    """Parse positive integers, separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, got {text!r}")
    return found


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers, separated by commas."""
    return tuple(map(number, text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parse names, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def integer(text: str) -> int:
    """Parse an integer."""
    return _parsed(int, "an integer", text)


def number(text: str) -> float:
    """Parse a number."""
    return _parsed(float, "a number", text)


def _parsed(kind: Callable[[str], Any], what: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None

"""The parser of the command line: how help and errors look, and the types that arguments share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn


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


def sizes(text: str) -> tuple[int, ...]:
    """Parse positive integers, separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, got {text!r}")
    return found


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

"""`cellstack completion`: a script for the shell, which the library shtab derives from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cellstack.train.checks import UsageError

SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("FILE", "TEST", "MODEL", "SOURCE", "TARGET", "PAGE", "PATH")  # placeholders of file names in the help
FOLDERS = ("DIR", "FOLDER")


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `completion` to its parser."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def completion(top: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Print the script that completes the commands of the parser `top`."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UsageError(f"completion needs {error.name}: pip install 'cellstack[completion]'") from None
    for action in _actions(top):
        if action.metavar in FILES or action.metavar in FOLDERS:
            action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(top, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for made in action.choices.values():
                yield from _actions(made)

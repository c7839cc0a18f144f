"""Functions with the signature, the documentation and the errors that follow from the options of training."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from cellstack.cells.arguments import Argument, documented
from cellstack.train import options as table
from cellstack.train.options import applying, declared


def head_of(name: str, data: str, own: str, first: Iterable[str] = ()) -> str:
    """Return the head of a function that trains as source text, without its colon.

    Args:
        name, own: of the function, and its own arguments.
        data: kind of data.
        first: options that may be given by position.
    """
    typed = {one.name: f"{one.name}: {one.typed(data)} = {one.defaults[data]!r}" for one in applying(data).values()}
    parts = [own, *(typed.pop(option) for option in first), "*", *typed.values()]
    text = ",\n".join(parts)
    return f"def {name}(\n{textwrap.indent(text, '    ')},\n)"


def trains(data: str, own: str, first: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Give a function the signature and the documentation of the options of a kind of data.

    The signature is compiled, as in `dataclasses`. The function gets its own arguments, and all options in a dict.

    Args:
        data: kind of data.
        own: the function's own arguments, as source text.
        first: options that may be given by position.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name, options = function.__name__, applying(data)
        head = head_of(name, data, own, first)
        values = ", ".join(f"{option!r}: {option}" for option in options)
        passed = ", ".join(part.split(":")[0].strip() for part in own.split(", "))
        source = (
            f"{head[:-1]}    **unknown: Any,\n):\n    if unknown:\n        raise refused(unknown)\n"
            f"    return run({passed}, {{{values}}})\n"
        )
        names = {**vars(table), **function.__globals__, "run": function, "refused": partial(_unexpected, name, data)}
        exec(compile(source, f"<{function.__module__}.{name}>", "exec"), names)
        made = names[name]
        shown = inspect.signature(made)
        made.__signature__ = shown.replace(parameters=list(shown.parameters.values())[:-1])
        made.__module__, made.__annotations__["return"] = function.__module__, function.__annotations__["return"]
        made.head = head
        lines = [Argument(option.name, "", None, option.described(data)) for option in options.values()]
        made.__doc__ = documented(function.__doc__, lines, "\n\nReturns:")
        return made

    return decorate


def _unexpected(function: str, data: str, unknown: Mapping[str, Any]) -> TypeError:
    """Return the error for an argument that a function doesn't have."""
    name = next(iter(unknown))
    if name in declared():
        others = " and ".join(declared()[name].defaults)
        return TypeError(f"{function}: `{name}=…` doesn't apply to {data}, only to {others}")
    close = get_close_matches(name, applying(data), 1)
    fix = f": did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{fix}")

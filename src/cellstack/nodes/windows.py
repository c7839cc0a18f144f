"""Windows of steps: their padding and their number."""

from __future__ import annotations

from typing import Any

from cellstack.nodes.checks import check_choice, check_integer

WINDOW_MODES = ("mean", "max")
PADDINGS = ("valid", "same", "causal")


def checked_padding(owner: str, padding: Any, span: int, strides: int) -> str | tuple[int, int]:
    """Return the padding of a `Conv1D` or `Pool1D`, by name if a name exists; `ValueError` if it is invalid."""
    if isinstance(padding, (tuple, list)) and len(padding) == 2:
        before, after = (check_integer(owner, "padding", steps, least=0) for steps in padding)
        names = PADDINGS if strides == 1 else ("valid", "causal")  # else "same" depends on the sequence's length
        return next((name for name in names if pads(name, span, span, strides) == (before, after)), (before, after))
    check_choice(owner, "padding", padding, PADDINGS)
    return str(padding)


def why_not_by_steps(padding: str | tuple[int, int], span: int, strides: int) -> str | None:
    """Return why windows don't give one output per step that depends only on past steps; None if they do."""
    if strides > 1:
        return f"it has an output every {strides} steps, and a stream needs one per step"
    if padding == "causal" or (span == 1 and padding in PADDINGS):
        return None
    return "its windows contain future steps, which a stream doesn't have (trained with padding='causal' they don't)"


def pads(padding: str | tuple[int, int], steps: int, span: int, strides: int) -> tuple[int, int]:
    """Return the number of padding steps before and after a sequence, for windows of `span` steps."""
    if isinstance(padding, tuple):
        return padding
    if padding == "causal":
        return span - 1, 0
    if padding == "valid":
        return 0, 0
    missing = max(0, (-(-steps // strides) - 1) * strides + span - steps)
    return missing // 2, missing - missing // 2


def windows(steps: int, span: int, strides: int) -> int:
    """Return the number of windows of `span` steps in `steps`."""
    return max(0, (steps - span) // strides + 1)


def steps_out(steps: int | None, padding: str | tuple[int, int], span: int, strides: int) -> int | None:
    """Return the number of windows over padded `steps`; None if `steps` isn't known."""
    return None if steps is None else windows(steps + sum(pads(padding, steps, span, strides)), span, strides)

"""The outputs of ONNX Runtime's sessions in which the kernel runs recurrent operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class NodeArg(NamedTuple):
    """An output, with the fields of ONNX Runtime's class of this name, which can't be created in Python."""

    name: str
    type: str
    shape: list[int | str | None]


def described(outputs: Sequence[Any], operators: Sequence[Any]) -> list[Any]:
    """Return outputs as ONNX Runtime describes them if it runs all operators: an axis of unknown length is None.

    Its interface for custom operators needs a name for such an axis, which kernel/onnxruntime.cpp makes.

    Args:
        outputs: from a session.
        operators: the kernel's operators in it.
    """
    made = {f"recurrent{one.handle}_{axis}" for one in operators for axis in (0, 1)}
    return [
        one
        if made.isdisjoint(one.shape)
        else NodeArg(one.name, one.type, [None if axis in made else axis for axis in one.shape])
        for one in outputs
    ]

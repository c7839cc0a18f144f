"""The recurrent nodes: `Recurrent`, and `Bidirectional`, one forwards and one backwards over the same sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import Array, Node, NodeRun, StateGradients
from cellstack.nodes.checks import check_choice, one_dtype
from cellstack.nodes.stack import BACKWARDS, Calls, CellsRun, Recurrent, RecurrentNode, run_each

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.stored import Entry

MERGE_MODES = ("concat", "sum", "mul", "ave")


@dataclass(frozen=True, eq=False)
class Bidirectional(RecurrentNode):
    """A forward and a backward stack over the same sequence, whose outputs are merged step by step.

    As in Keras, both return zeros at masked steps if they return sequences: their `zero_output_for_mask` is set to
    their `return_sequences`.

    Args:
        forward: the forward stack.
        backward: the backward stack (`go_backwards=True`).
        merge_mode: `"concat"` (forward first), `"sum"`, `"mul"` or `"ave"` (the mean).

    Raises:
        ShapeError: the input sizes differ, or the output widths differ and `merge_mode` isn't `"concat"`.
        TypeError: the dtypes differ, or one isn't a `Recurrent`.
        ValueError: a wrong direction, different `return_sequences`, or an unknown merge mode.
    """

    forward: Recurrent
    backward: Recurrent
    merge_mode: str = "concat"
    file_type = "bidirectional"
    why_whole = BACKWARDS
    about = "{0.forward.summary} and back, {0.merge_mode}"

    def __post_init__(self) -> None:
        owner = "Bidirectional"
        for name in ("forward", "backward"):
            node = getattr(self, name)
            if not isinstance(node, Recurrent):
                raise TypeError(f"{owner}: expected {name} to be a Recurrent, got {type(node).__name__}")
            if node.go_backwards != (name == "backward"):
                raise ValueError(f"{owner}: expected {name} with go_backwards={name == 'backward'}, got the opposite")
            object.__setattr__(self, name, replace(node, zero_output_for_mask=node.return_sequences))
        check_choice(owner, "merge_mode", self.merge_mode, MERGE_MODES)
        forward, backward = self.forward, self.backward
        if forward.return_sequences != backward.return_sequences:
            raise ValueError(f"{owner}: expected return_sequences to be the same forwards and backwards")
        if forward.input_size != backward.input_size:
            raise ShapeError(f"{owner}: expected backward I={forward.input_size}, got I={backward.input_size}")
        if self.merge_mode != "concat" and forward.units != backward.units:
            raise ShapeError(
                f"{owner}: expected backward H={forward.units} to {self.merge_mode}, got H={backward.units}"
            )
        both = {"forward": forward, "backward": backward}
        numbers: dict[str, Array | None] = {name: np.empty(0, node.dtype) for name, node in both.items()}
        object.__setattr__(self, "dtype", one_dtype(owner, numbers))
        object.__setattr__(self, "input_size", forward.input_size)
        object.__setattr__(self, "axes", forward.axes)
        object.__setattr__(self, "cells", forward.cells + backward.cells)

    @property
    def return_sequences(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the output has every step."""
        return self.forward.return_sequences

    @property
    def units(self) -> int:
        return self.forward.units + (self.backward.units if self.merge_mode == "concat" else 0)

    def calls_of(self, run: CellsRun) -> list[Calls]:
        half = len(self.forward.cells)
        first, second = run.part(slice(half)), run.part(slice(half, None))
        return [*self.forward.calls_of(first), *self.backward.calls_of(second)]

    def merged(self, outputs: list[Array]) -> Array:
        ahead, back = outputs
        if self.merge_mode == "concat":
            return np.concatenate([ahead, back], axis=-1)
        if self.merge_mode == "mul":
            return ahead * back
        return ahead + back if self.merge_mode == "sum" else (ahead + back) * ahead.dtype.type(0.5)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        flow, count = run.inputs[0], len(self.forward.cells)
        if self.merge_mode == "concat":
            ahead, back = dy[..., : self.forward.units], dy[..., self.forward.units :]
        elif self.merge_mode == "mul":
            again = CellsRun(flow, tuple(record.before for record in run.records))
            (ahead, _), (back, _) = run_each(self.calls_of(again), 1)
            ahead, back = dy * back, dy * ahead
        else:
            ahead = back = dy if self.merge_mode == "sum" else dy * dy.dtype.type(0.5)
        dx, begun = self.forward.stack_gradients(run.records[:count], flow, ahead, dstates[:count])
        other, begun_back = self.backward.stack_gradients(run.records[count:], flow, back, dstates[count:])
        return [dx + other, *begun, *begun_back]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        return masks[0] if self.return_sequences else None

    def with_weights(self, weights: str) -> Bidirectional:
        forward, backward = (half.with_weights(weights) for half in (self.forward, self.backward))
        return Bidirectional(forward, backward, self.merge_mode)

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        described: dict[str, Any] = {"type": self.file_type}
        arrays = {}
        for half in ("forward", "backward"):
            described[half], own = getattr(self, half).stored()
            arrays |= {f"{half}/{name}": array for name, array in own.items()}
        return {**described, "merge_mode": self.merge_mode}, arrays

    @classmethod
    def restored(cls, entry: Entry) -> Bidirectional:
        values = entry.take(cls.keys())
        forward, backward = (
            Recurrent.restored(entry.inner(half, values[half], Recurrent.file_type)) for half in ("forward", "backward")
        )
        return cls(forward, backward, values["merge_mode"])

    @property
    def calls(self) -> str:
        return f"{self.forward.calls}, {self.backward.calls} back, merged in NumPy"


def ends_both_ways(backwards: Iterable[Node]) -> bool:
    """Whether nodes, the last one first, give the sequence of a bidirectional layer, perhaps changed step by step.

    Its last step isn't the layer's final states: the backward direction ends at the first step.
    """
    for node in backwards:
        if node.cells or node.mixes_steps:
            return isinstance(node, Bidirectional) and node.forward.return_sequences
    return False


def final(node: Node) -> Recurrent | Bidirectional | None:
    """Return a recurrent node that returns only the final output, of both directions; None for other nodes."""
    if isinstance(node, Bidirectional):
        forward, backward = (replace(part, return_sequences=False) for part in (node.forward, node.backward))
        return replace(node, forward=forward, backward=backward)
    return replace(node, return_sequences=False) if isinstance(node, Recurrent) else None

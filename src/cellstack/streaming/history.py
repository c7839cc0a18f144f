"""The last steps of a stream: their inputs, and states from which they can be run again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cellstack.nodes.base import Array


class History:
    """The inputs of at least the last `most` steps, in two blocks, each with the state before it.

    Args:
        most: the number of steps in a block; a block that ends with a chunk may have more.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._blocks: list[tuple[Any, list[tuple[Array, ...]], int]] = []  # state, chunks of all inputs, steps

    @property
    def wants_state(self) -> bool:
        """Whether the next steps begin a block, so that `add` needs the state before them."""
        return not self._blocks or self._blocks[-1][2] >= self.most

    def add(self, before: Any, given: tuple[Array, ...], chunk: bool) -> None:
        """Add the inputs of a call.

        Args:
            before: the state before the call, or None if `wants_state` was False.
            given: one array per input, `[B, W]`, ids `[B]`.
            chunk: whether they have a time axis, `[B, T, W]`, ids `[B, T]`.
        """
        if chunk and not given[0].shape[1]:
            return
        if before is not None:
            self._blocks = [*self._blocks[-1:], (before, [], 0)]
        state, chunks, steps = self._blocks[-1]
        chunks.append(tuple(array.copy() if chunk else array[:, None].copy() for array in given))
        self._blocks[-1] = state, chunks, steps + chunks[-1][0].shape[1]

    def forget(self) -> None:
        """Drop all steps, because the state was changed."""
        self._blocks = []

    def recorded(self) -> tuple[Any, list[Array]] | None:
        """Return the state before the oldest step and the inputs since, an array per input; None if there are none."""
        chunks = [chunk for _, own, _ in self._blocks for chunk in own]
        if not chunks:
            return None
        return self._blocks[0][0], [np.concatenate(arrays, axis=1) for arrays in zip(*chunks, strict=True)]

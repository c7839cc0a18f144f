"""What a stream remembers of its last steps: frames, and states to run them from again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cellstack.nodes.base import Array


class History:
    """The frames of at least the last steps, in two blocks, each with the state before it.

    Args:
        most: how many steps a block has, or more where a chunk ends it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._blocks: list[tuple[Any, list[tuple[Array, ...]], int]] = []  # state, chunks of all inputs, steps

    @property
    def wants_state(self) -> bool:
        """Whether the next frames begin a block, and the state before them is wanted."""
        return not self._blocks or self._blocks[-1][2] >= self.most

    def add(self, before: Any, given: tuple[Array, ...], chunk: bool) -> None:
        """Take the frames that a stream took.

        Args:
            before: the state before them, where it was wanted.
            given: one a value that came in, `[B, W]`, ids `[B]`.
            chunk: whether they have an axis of time, `[B, T, W]`, ids `[B, T]`.
        """
        if chunk and not given[0].shape[1]:
            return
        if before is not None:
            self._blocks = [*self._blocks[-1:], (before, [], 0)]
        state, chunks, steps = self._blocks[-1]
        chunks.append(tuple(array.copy() if chunk else array[:, None].copy() for array in given))
        self._blocks[-1] = state, chunks, steps + chunks[-1][0].shape[1]

    def forget(self) -> None:
        """Begin anew: the state was changed."""
        self._blocks = []

    def kept(self) -> tuple[Any, list[Array]] | None:
        """Return the state before the oldest steps and the frames since, an array an input; None without any."""
        chunks = [chunk for _, own, _ in self._blocks for chunk in own]
        if not chunks:
            return None
        return self._blocks[0][0], [np.concatenate(arrays, axis=1) for arrays in zip(*chunks, strict=True)]

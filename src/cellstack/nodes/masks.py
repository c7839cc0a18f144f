"""What can be done with masks, whatever they are: each node's rule is written in these words, once for all uses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cellstack.nodes.base import Flow, Node

Mask = TypeVar("Mask")


class Masks(Protocol[Mask]):
    """The operations on masks that `Node.mask_after` is made of."""

    def made(self) -> Mask:
        """Return the mask that the node makes itself, out of what it takes."""
        ...

    def both(self, one: Mask, other: Mask) -> Mask:
        """Return the steps that both masks keep."""
        ...

    def either(self, masks: Sequence[Mask]) -> Mask:
        """Return the steps that one of the masks keeps."""
        ...

    def join(self, masks: Sequence[Mask | None]) -> Mask:
        """Return the masks of the values that the node takes, one after the other along time; None keeps all steps."""
        ...

    def cut(self, mask: Mask, taken: slice) -> Mask:
        """Return a slice of a mask along time."""
        ...


class ArrayMasks(Masks[NDArray[np.bool_]]):
    """Masks as arrays `[B, T]` of bool, in a run of a node over what flows in."""

    def __init__(self, node: Node, flows: Sequence[Flow]) -> None:
        self.node, self.flows = node, flows

    def made(self) -> NDArray[np.bool_]:
        return self.node.kept(*(flow.x for flow in self.flows))

    def both(self, one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return one & other

    def either(self, masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
        return reduce(np.logical_or, masks)

    def join(self, masks: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.bool_]:
        full = [
            np.ones(flow.x.shape[:2], bool) if mask is None else mask
            for mask, flow in zip(masks, self.flows, strict=True)
        ]
        return np.concatenate(full, axis=1)

    def cut(self, mask: NDArray[np.bool_], taken: slice) -> NDArray[np.bool_]:
        return mask[:, taken]


class NamedMasks(Masks[frozenset[str]]):
    """Masks as sets of names, such as those of the nodes that make them.

    Args:
        names: those of a mask that the node makes itself.
    """

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def made(self) -> frozenset[str]:
        return self.names

    def both(self, one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
        return one | other

    def either(self, masks: Sequence[frozenset[str]]) -> frozenset[str]:
        return frozenset().union(*masks)

    def join(self, masks: Sequence[frozenset[str] | None]) -> frozenset[str]:
        return frozenset().union(*(mask for mask in masks if mask))

    def cut(self, mask: frozenset[str], taken: slice) -> frozenset[str]:
        return mask

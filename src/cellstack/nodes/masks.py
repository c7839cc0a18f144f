"""Operations on masks in any representation: each node's mask rule is written once, in terms of these operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellstack.nodes.values import Flow

Mask = TypeVar("Mask")


class Masks(Protocol[Mask]):
    """The operations on masks that `Node.mask_after` uses."""

    def of_node(self) -> Mask:
        """Return the mask that the node itself makes from its inputs."""
        ...

    def both(self, one: Mask, other: Mask) -> Mask:
        """Return the intersection: the steps that both masks use."""
        ...

    def either(self, masks: Sequence[Mask]) -> Mask:
        """Return the union: the steps that at least one mask uses."""
        ...

    def join(self, masks: Sequence[Mask | None]) -> Mask:
        """Return the masks of the node's inputs concatenated along time; None: all steps are used."""
        ...

    def cut(self, mask: Mask, taken: slice) -> Mask:
        """Return a slice of a mask along time."""
        ...


class ArrayMasks(Masks[NDArray[np.bool_]]):
    """Masks as arrays `[B, T]` of bool, in a run of a node.

    Args:
        kept: returns the mask that the node itself makes: `Node.kept`.
        flows: the node's inputs.
    """

    def __init__(self, kept: Callable[..., NDArray[np.bool_]], flows: Sequence[Flow]) -> None:
        self.kept, self.flows = kept, flows

    def of_node(self) -> NDArray[np.bool_]:
        return self.kept(*(flow.x for flow in self.flows))

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
    """Masks as sets of names, such as the names of the nodes that make them.

    Args:
        names: the names for a mask that the node itself makes.
    """

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def of_node(self) -> frozenset[str]:
        return self.names

    def both(self, one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
        return one | other

    def either(self, masks: Sequence[frozenset[str]]) -> frozenset[str]:
        return frozenset().union(*masks)

    def join(self, masks: Sequence[frozenset[str] | None]) -> frozenset[str]:
        return frozenset().union(*(mask for mask in masks if mask))

    def cut(self, mask: frozenset[str], taken: slice) -> frozenset[str]:
        return mask

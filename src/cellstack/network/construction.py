"""What the constructor of `Network` checks, and what follows from its arguments."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cellstack.cells.errors import ShapeError
from cellstack.network.graph import Graph, check_name
from cellstack.nodes.base import Node
from cellstack.nodes.patches import CellPatches, Patch
from cellstack.nodes.recurrent import ends_both_ways, final
from cellstack.nodes.time import FINAL, GlobalPool
from cellstack.nodes.values import Celled


def checked_names(nodes: tuple[Node, ...], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return a different name for each node; None: layer_0, layer_1 and so on."""
    if not nodes:
        raise ShapeError("Network: expected at least one node, got none")
    for number, node in enumerate(nodes):
        if not isinstance(node, Node):
            raise TypeError(f"Network: expected node {number} to be a node, got {type(node).__name__}")
    if names is None:
        return tuple(f"layer_{number}" for number in range(len(nodes)))
    names = tuple(names)
    if len(names) != len(nodes) or len(set(names)) != len(names):
        raise ValueError(f"Network: expected {len(nodes)} different names, one per node, got {list(names)}")
    for name in names:
        check_name("name", name)
    return names


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a private copy of `metadata`, in the form in which a file restores it."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError("Network: expected metadata to be a dict with strings as keys")
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"Network: expected metadata that JSON can hold, without NaN: {error}") from error


def with_final(nodes: tuple[Node, ...], names: tuple[str, ...]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Return a chain in which each `GlobalPool("final")` is part of the recurrent node before it."""
    kept: list[tuple[Node, str]] = []
    for node, name in zip(nodes, names, strict=True):
        ending = final(kept[-1][0]) if kept and isinstance(node, GlobalPool) and node.mode == FINAL else None
        if ending is None:
            kept.append((node, name))
        else:
            kept[-1] = ending, kept[-1][1]
    return tuple(node for node, _ in kept), tuple(name for _, name in kept)


def patched(
    nodes: tuple[Node, ...], names: tuple[str, ...], patches: tuple[Patch, ...], dtype: np.dtype[Any]
) -> dict[str, tuple[CellPatches | None, ...]]:
    """Return the patches of each node's cells by the name of the node; empty without patches."""
    cells = {name: node.cells_in(dtype) for name, node in zip(names, nodes, strict=True)}
    for patch in patches:
        if not isinstance(patch, Patch):
            raise TypeError(f"Network: expected a Patch, got {type(patch).__name__}")
        if patch.node not in names:
            raise ValueError(f"Network: expected patches of {', '.join(names)}, got one of {patch.node!r:.80}")
        count = len(cells[patch.node])
        if not count:
            raise ValueError(f"Network: node {patch.node!r} has no cells to patch")
        if patch.cell is None and count > 1:
            raise ValueError(
                f"Network: {patch.node!r} has {count} cells: expected cell=0 to {count - 1} (bottom first, forward "
                f"before backward) in {patch}"
            )
        if patch.cell is not None and patch.cell >= count:
            raise ValueError(f"Network: expected cell=0 to {count - 1} in a patch of {patch.node!r}, got {patch}")

    def of_cell(name: str, place: int, cell: Celled) -> CellPatches | None:
        own = [patch for patch in patches if patch.node == name and (patch.cell or 0) == place]
        for patch in own:
            patch.check(cell.spec)
        return CellPatches(cell.spec, own) if own else None

    every = cells.items() if patches else ()
    return {name: tuple(of_cell(name, place, cell) for place, cell in enumerate(own)) for name, own in every}


def initial_state_sources(nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph) -> tuple[str, ...]:
    """Return, for each cell, a text about the values that it starts from; "" if there are none."""
    found: list[str] = []
    for node, name, sources in zip(nodes, names, graph.wires, strict=True):
        starts = node.apart(sources)[1]
        found += [f"{name} starts from {', '.join(starts)}" if starts else ""] * len(node.cells)
    return tuple(found)


def warn_of_last_steps(nodes: tuple[Node, ...], names: tuple[str, ...], graph: Graph) -> None:
    """Warn about each pool that takes the last step of a bidirectional layer: its final states may be intended."""
    by_name = dict(zip(names, nodes, strict=True))
    sources = dict(zip(names, graph.wires, strict=True))

    def before(name: str) -> Iterator[Node]:
        while sources[name] and (name := sources[name][0]) in by_name:
            yield by_name[name]

    for name, node in by_name.items():
        if isinstance(node, GlobalPool) and node.mode == "last" and ends_both_ways(before(name)):
            warnings.warn(
                f'Network: {name}: GlobalPool("last") after a Bidirectional is the last step, not both final states: '
                "at that step the backward direction has read one step only. For both final states write "
                'GlobalPool("final") directly after the Bidirectional',
                stacklevel=3,
            )

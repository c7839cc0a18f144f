"""The half of a bidirectional layer that runs backwards, as graphs write it: the steps turned round, and back again."""

from __future__ import annotations

from dataclasses import replace

from cellstack.nodes import Bidirectional, Merge, Node, Recurrent, Select

Entry = tuple[str, Node, tuple[str, ...]]  # a node's name, itself, and what it takes


def both_ways(nodes: list[Entry], outputs: list[str]) -> tuple[list[Entry], dict[str, tuple[str, int]]]:
    """Return nodes with one `Bidirectional` for each pair of cells that go over one sequence from its two ends.

    Args:
        nodes: in the order in which they run.
        outputs: what the network returns.

    Returns:
        The nodes, and of each cell's node that became part of a pair the pair's name and where its cells stand there.
    """
    known = {name: (node, sources) for name, node, sources in nodes}
    for name, (node, sources) in known.items():
        if isinstance(node, Recurrent) and _turns(known, sources[0]):
            known[name] = replace(node, go_backwards=not node.go_backwards), known[sources[0]][1]
    uses: dict[str, int] = {}
    for wire in [*outputs, *(wire for _, sources in known.values() for wire in sources)]:
        uses[wire] = uses.get(wire, 0) + 1
    moved: dict[str, tuple[str, int]] = {}
    for name, (node, sources) in list(known.items()):
        if not isinstance(node, Merge) or node.mode != "concat" or node.axis not in (-1, 2) or len(sources) != 2:
            continue
        ahead, back = sources
        gone = [ahead, back]
        if _turns(known, back):
            (back,) = known[back][1]
            gone.append(back)
        forward, backward = (known.get(wire, (None, ())) for wire in (ahead, back))
        (one, x), (other, again) = forward, backward
        if not isinstance(one, Recurrent) or not isinstance(other, Recurrent) or x != again:
            continue
        in_order = len(gone) == 3 if other.return_sequences else len(gone) == 2
        alike = one.zero_output_for_mask == other.zero_output_for_mask <= one.return_sequences
        if not in_order or not alike or any(uses[wire] != 1 for wire in gone) or one.dtype != other.dtype:
            continue
        if (one.go_backwards, other.go_backwards, one.return_sequences) == (False, True, other.return_sequences):
            known[name] = Bidirectional(one, other), x
            moved |= {ahead: (name, 0), back: (name, len(one.cells))}
            for wire in gone:
                del known[wire]
    return [(name, node, sources) for name, (node, sources) in known.items()], moved


def _turns(known: dict[str, tuple[Node, tuple[str, ...]]], wire: str) -> bool:
    """Whether a wire carries a sequence whose steps are turned round."""
    node = known[wire][0] if wire in known else None
    return isinstance(node, Select) and node.axis == 1 and node.taken in (slice(None, None, -1), slice(-1, None, -1))

"""The differences of two traces of one network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cellstack.cells.errors import ShapeError

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace
    from cellstack.nodes.base import Array

SHOWN = 10


class Difference(NamedTuple):
    """A number that differs between two traces."""

    node: str
    cell: int
    field: str
    row: int
    step: int
    unit: int
    one: float
    other: float


class TraceDifference(Mapping[str, tuple[dict[str, "Array"], ...]]):
    """The differences of two traces of one network: by node, cell and field, `[B, T, W]` each.

    A difference is the other trace minus the first.
    """

    def __init__(self, one: NetworkTrace, other: NetworkTrace) -> None:
        self._one, self._other = one, other
        self._found: dict[str, tuple[dict[str, Array], ...]] = {}
        if not np.array_equal(one.steps, other.steps):
            raise ShapeError(f"diff: the traces' steps must be equal, got {one.steps!r:.80} and {other.steps!r:.80}")
        for name, node in one.items():
            kinds = [[tuple(cell) for cell in seen.cells] for seen in (node, other[name])]
            if kinds[0] != kinds[1]:
                raise ValueError(f"diff: the traces must be of the same network, but the cells of {name} differ")
            cells = []
            for own, its in zip(node.cells, other[name].cells, strict=True):
                if own.fields.h.shape != its.fields.h.shape or not np.array_equal(own.units, its.units):
                    shapes = f"{list(own.fields.h.shape)} and {list(its.fields.h.shape)}"
                    raise ShapeError(f"diff: {name}: the traces must have the same rows, steps and units, got {shapes}")
                with np.errstate(all="ignore"):
                    cells.append({field: its.flat(field) - own.flat(field) for field in own})
            self._found[name] = tuple(cells)

    def __getitem__(self, name: str) -> tuple[dict[str, Array], ...]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def largest(self, count: int = SHOWN) -> list[Difference]:
        """Return the largest differences, one per unit and field.

        Args:
            count: the number of differences.
        """
        found = []
        for name, cells in self._found.items():
            for number, fields in enumerate(cells):
                own, its = self._one[name].cells[number], self._other[name].cells[number]
                for field, array in fields.items():
                    sizes = np.where(np.isnan(array), np.inf, np.abs(array)).reshape(-1, array.shape[2])
                    for place in np.flatnonzero((sizes > 0).any(axis=0)):
                        row, step = np.unravel_index(sizes[:, place].argmax(), array.shape[:2])
                        ends = (float(cell.flat(field)[row, step, place]) for cell in (own, its))
                        unit = int(own.units[place]) if array.shape[2] == len(own.units) else int(place)
                        one = Difference(name, number, field, int(row), self._step(int(step)), unit, *ends)
                        found.append((float(sizes[:, place].max()), one))
        return [one for _, one in sorted(found, key=lambda entry: -entry[0])[:count]]

    def _step(self, place: int) -> int:
        """Return the number of the step at an index."""
        return int(self._one.steps[place]) if place < len(self._one.steps) else place

    def __repr__(self) -> str:
        lines = ["Difference of two traces"]
        for name, cells in self._found.items():
            for number, fields in enumerate(cells):
                which = f", cell {number}" if len(cells) > 1 else ""
                apart = [np.flatnonzero((array != 0).any(axis=(0, 2))) for array in fields.values()]
                first = min((int(steps[0]) for steps in apart if steps.size), default=None)
                if first is None:
                    lines.append(f"  {name}{which}: none")
                    continue
                most = ", ".join(f"{field} {np.abs(array).max():.3g}" for field, array in fields.items())
                lines.append(f"  {name}{which}: from step {self._step(first)} on; at most {most}")
        return "\n".join(lines)

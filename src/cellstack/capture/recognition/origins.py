"""Finds which parts of a module's parameters the weights of a cell consist of.

The module is traced twice, with different random numbers as parameters. Each number in an array of the cell thus shows
which element of a parameter it comes from, and the difference of the two traces contains no constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellstack.capture.recognition.values import NotReplaced
from cellstack.cells.spec import MATRICES, CellSpec
from cellstack.layers import op
from cellstack.layers.handwritten import Layer, ParameterPart, weight
from cellstack.nodes.cell_arrays import Cell


class Origins:
    """Finds which parts of parameters an array consists of.

    Args:
        first, second: the values of the parameters in the two traces, by name.
    """

    def __init__(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
        self.first = first
        self.apart = {name: array - second[name] for name, array in first.items()}
        self.names = list(self.apart)
        self.flat = np.concatenate([array.reshape(-1) for array in self.apart.values()])
        self.starts = np.cumsum([0, *(array.size for array in self.apart.values())])
        self.order = np.argsort(self.flat)
        self.sorted = self.flat[self.order]
        self.vectors = np.concatenate(
            [np.arange(a, b) for a, b, n in zip(self.starts[:-1], self.starts[1:], self.names, strict=True)
             if self.apart[n].squeeze().ndim < 2] or [np.empty(0, int)]
        )  # fmt: skip

    def _find(self, values: np.ndarray) -> np.ndarray:
        """Return the index of the element that has each value; -1 where none has."""
        places = np.clip(np.searchsorted(self.sorted, values), 1, len(self.sorted) - 1)
        places -= values - self.sorted[places - 1] < self.sorted[places] - values
        near = np.abs(self.sorted[places] - values) < 1e-11
        return np.where(near, self.order[places], -1)

    def _at(self, index: int) -> tuple[str, int]:
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.names[place], int(index - self.starts[place])

    def matrix(self, one: np.ndarray, other: np.ndarray) -> ParameterPart:
        """Return the part that is a matrix `[units, inputs]`, given its values in both traces."""
        apart = one - other
        index = int(self._find(apart[:1, :1].reshape(-1))[0])
        if index >= 0:
            name, offset = self._at(index)
            pairs, (rows, columns) = ((self.apart[name], apart), (self.first[name], one)), apart.shape
            for transposed in (False, True) if pairs[0][0].ndim == 2 else ():
                at = divmod(offset, pairs[0][0].shape[1])
                r, c = at[::-1] if transposed else at
                block = slice(r, r + rows), slice(c, c + columns)
                found = [((whole.T if transposed else whole)[block], wanted) for whole, wanted in pairs]
                if all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-11) for a, b in found):
                    return ParameterPart(name, (r, r + rows), (c, c + columns), transposed)
        raise NotReplaced("the weights of its gates aren't parts of its parameters: it computes them from other values")

    def vector(self, one: np.ndarray, other: np.ndarray) -> list[ParameterPart]:
        """Return the parts whose sum is a vector, given its values in both traces."""
        apart, parts = one - other, list[ParameterPart]()
        if np.abs(apart).max() > 1e-11:
            single = int(self._find(apart[:1])[0])
            pairs = [(single,)] if single >= 0 else []
            if not pairs:
                left = self._find(apart[0] - self.flat[self.vectors])
                pairs = [(int(a), int(b)) for a, b in zip(self.vectors, left, strict=True) if b >= a]
            for pair in pairs:
                found = [self._vector(index, len(apart)) for index in pair]
                total = sum(self.flat[index : index + len(apart)] for index in pair)
                if None not in found and np.allclose(total, apart, rtol=0, atol=1e-11):
                    parts = [part for part in found if part is not None]
                    break
            else:
                raise NotReplaced("its biases aren't sums of one or two parameters")
        rest = one - sum((self.first[p.name].reshape(-1)[slice(*p.rows)] for p in parts), np.zeros(len(one)))
        if np.ptp(rest) > 1e-11:
            raise NotReplaced("its biases contain constants that differ between units")
        value = float(np.round(rest[0], 10))
        return [*parts, *([ParameterPart("", (0, len(one)), value=value)] if value or not parts else [])]

    def _vector(self, index: int, count: int) -> ParameterPart | None:
        name, offset = self._at(index)
        fits = offset + count <= self.apart[name].size
        return ParameterPart(name, (offset, offset + count)) if fits else None


def layer_of(origins: Origins, one: Cell, other: Cell) -> Layer:
    """Return a cell as a layer of a module, given the cell in both traces."""
    spec = one.spec
    if spec != other.spec:
        raise NotReplaced("its equations depend on the values of its parameters")
    blocks: dict[str, list[list[Any]]] = {}
    for name in spec.shapes:
        first, second = (np.atleast_2d(cell.arrays[name]) for cell in (one, other))
        wide = spec.units if first.shape[1] % spec.units == 0 and name != "projection" else first.shape[1]
        ranges = [slice(n, n + wide) for n in range(0, first.shape[1], wide)]
        if name in MATRICES:
            blocks[name] = [[origins.matrix(first[:, r].T, second[:, r].T) for r in ranges]]
        else:
            blocks[name] = [[origins.vector(a[r], b[r]) for r in ranges] for a, b in zip(first, second, strict=True)]
    in_torch = _in_torch_layout(spec, blocks)
    if in_torch is not None:
        return in_torch
    weights = []
    for name, shape in spec.shapes.items():
        if name in MATRICES:
            weights.append(weight(blocks[name], shape))
        else:
            row = [block for each in blocks[name] for block in each]
            weights.append(weight(_terms(row), shape))
    return Layer(op.CellCall(spec), tuple(weights))


def _terms(row: Sequence[list[ParameterPart]]) -> list[list[ParameterPart]]:
    """Return one vector per gate, each a sum of parts, as a sum of vectors over all gates: the parts of each."""
    count = max(map(len, row))
    return [
        [parts[n] if n < len(parts) else ParameterPart("", (0, _length(parts[0]))) for parts in row]
        for n in range(count)
    ]


def _length(part: ParameterPart) -> int:
    return part.rows[1] - part.rows[0]


def _in_torch_layout(spec: CellSpec, blocks: Mapping[str, list[list[Any]]]) -> Layer | None:
    """Return a layer with weights in PyTorch's layout, which the op reads in place; None if PyTorch lacks the cell."""
    known = spec.of_kind.names.get("torch")
    plain = CellSpec(
        spec.input_size, spec.units, kind=spec.kind, use_bias=spec.use_bias, activation=str(spec.activations[0])
        if not spec.of_kind.gated else "tanh"
    )  # fmt: skip
    if known is None or plain != spec:
        return None
    places = [spec.gates.index(gate) for gate in known.order]
    call = op.CellCall(spec, torch_layout=True)
    shapes = call.shapes
    weights = [
        weight([[blocks[name][0][n] for n in places]], shapes[theirs])
        for name, theirs in (("kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"))
    ]
    if spec.use_bias:
        pairs = [[each[n] for each in blocks["bias"]] for n in places]
        two = [_apart(pair, fixed=spec.two_biases and gate == known.order[-1]) for pair, gate in
               zip(pairs, known.order, strict=True)]  # fmt: skip
        fixed = two[-1] if spec.two_biases else None
        order = [next((pair[n].name for pair in two if pair[n].name), "") for n in range(2)]
        order = order if fixed is None else [part.name for part in fixed]
        # The sum of the two matters, except for `fixed`: they are ordered so that adjacent parts can be joined.
        two = [pair[::-1] if pair is not fixed and [pair[1].name, pair[0].name] == order else pair for pair in two]
        for n, name in enumerate(("bias_ih", "bias_hh")):
            weights.append(weight([[pair[n] for pair in two]], shapes[name]))
    return Layer(call, tuple(weights))


def _apart(pair: Sequence[list[ParameterPart]], fixed: bool) -> tuple[ParameterPart, ParameterPart]:
    """Return the biases of a gate as two vectors.

    Args:
        pair: the parts of its bias, or of its two biases.
        fixed: whether the first is that of the product with x, and the second that with h; otherwise only their sum
            matters.
    """
    units = _length(pair[0][0])
    zeros = ParameterPart("", (0, units))
    if fixed:
        if any(len(parts) > 1 for parts in pair):
            raise NotReplaced("its candidate's biases are sums of several parameters")
        return pair[0][0], pair[1][0]
    parts = [part for each in pair for part in each if part != zeros]
    if len(parts) > 2:
        raise NotReplaced("its biases are sums of more than two vectors")
    first, second = [*parts, zeros, zeros][:2]
    return first, second

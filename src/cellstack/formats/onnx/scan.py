"""Cells with any flags as ONNX's Scan: the equations of `cellstack.reference` as the graph of one step.

Used for cells that ONNX's LSTM, GRU and RNN can't express, and for float64 cells, which ONNX Runtime's operators don't
support. The body maps the states and x to the states and y. It holds its arrays, and the cell's description as its
`doc_string`: the reader takes the cell from the equations, and from the description only numbers that float32 rounded.

Ref: ONNX, Operators.md, Scan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import onnx_package
from cellstack.formats.onnx.pieces import Pieces
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.values import Celled

OPSET = 17  # of the files that cellstack writes
AXES_AS_INPUT = 18  # first opset in which the axes of ReduceMean are an input


class OnnxOps(Pieces):
    """See `cellstack.cells.base.Ops`; vectors are the names of values `[B, …]`."""

    def __init__(self, where: str, cell: Celled, opset: int = OPSET) -> None:
        super().__init__(onnx_package(), cell.dtype, set(), f"{where}/")  # names of a Network have no slash
        self.spec: Any = cell.spec
        self.opset = opset
        self.w: dict[str, str] = {}
        for name, array in cell.arrays.items():
            if not name.startswith("initial_"):
                apart = name.startswith("backbone_")  # a tensor for each layer
                several = {f"{name}_{n}": one for n, one in enumerate(array)} if apart else {name: array}
                self.w |= {key: self.tensor(f"{where}/{key}", one) for key, one in several.items()}

    def add(self, a: str, b: str) -> str:
        """Return `a + b`."""
        return self.of("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        """Return `a - b`."""
        return self.of("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        """Return `a⊙b`."""
        return self.of("Mul", a, b)

    def exp(self, v: str) -> str:
        """Return `e^v`."""
        return self.of("Exp", v)

    def maximum(self, a: str, b: str) -> str:
        """Return the larger of `a` and `b`."""
        return self.of("Max", a, b)

    def record(self, name: str, v: str) -> str:
        """Return `v`."""
        return v

    def columns(self, v: str, start: int, stop: int) -> str:
        """Return the columns of some gates."""
        units = self.spec.units
        return self.of("Slice", v, self.integers(start * units), self.integers(stop * units), self.integers(-1))

    def product(self, v: str, name: str, part: slice | int | None = None) -> str:
        """Return the matrix product."""
        if isinstance(part, slice):
            return self.of("MatMul", v, self.columns(self.w[name], part.start, part.stop))
        return self.of("MatMul", v, self.w[name if part is None else f"{name}_{part}"])

    def weight(self, name: str, row: int | None = None) -> str:
        """Return a vector of weights."""
        if row is None or f"{name}_{row}" in self.w:
            return self.w[name if row is None else f"{name}_{row}"]
        key = ("at", row)
        if key not in self.constants:
            self.constants[key] = self.tensor(f"{self.prefix}at_{row}", np.array(row, np.int64))
        return self.of("Gather", self.w[name], self.constants[key], axis=0)

    def split(self, v: str, count: int) -> list[str]:
        """Return the blocks of a vector."""
        return [self.columns(v, n, n + 1) for n in range(count)]

    def div(self, a: str, b: str) -> str:
        """Return `a / b`."""
        return self.of("Div", a, b)

    def one_minus(self, v: str) -> str:
        """Return `1 - v`."""
        return self.of("Sub", self.number(1.0), v)

    def select(self, test: str, a: str, b: str | None = None) -> str:
        """Return `a` where `test` isn't 0, else `b` or 0."""
        other = self.number(0.0) if b is None else b
        return self.of("Where", self.of("Cast", test, to=self.onnx.TensorProto.BOOL), a, other)

    def clip(self, v: str, bound: float | None) -> str:
        """Return `v` clipped to ±bound."""
        return v if bound is None else self.of("Clip", v, self.number(-bound), self.number(bound))

    def norm(self, v: str, blocks: Sequence[int] = (1,)) -> str:
        """Return `v` normalised, block by block."""
        ends = [0, *accumulate(blocks)]
        parts = [self.columns(v, *pair) for pair in pairwise(ends)] if len(blocks) > 1 else [v]
        units = [self._unit(part) for part in parts]
        return self.of("Concat", *units, axis=-1) if len(units) > 1 else units[0]

    def _unit(self, v: str) -> str:
        apart = self.of("Sub", v, self._mean(v))
        variance = self._mean(self.of("Mul", apart, apart))
        return self.of("Div", apart, self.of("Sqrt", self.of("Add", variance, self.number(self.spec.norm_epsilon))))

    def _mean(self, v: str) -> str:
        if self.opset < AXES_AS_INPUT:
            return self.of("ReduceMean", v, axes=[-1], keepdims=1)
        return self.of("ReduceMean", v, self.integers(-1), keepdims=1)

    def gate(self, name: str, z: str) -> str:
        """Return a gate."""
        return self.activation(name, self.clip(z, self.spec.clip))

    def activation(self, slot: str, v: str) -> str:
        """Return an activation."""
        text = str(self.spec.activations[self.spec.slots.index(slot)])
        made = self.fresh(f"{self.prefix}{slot}")
        return self.activate(made, v, text, made, plain=self.dtype == np.float64)

    def dropped(self, v: str) -> str:
        """Return `v`: a saved cell has no dropout."""
        return v

    def features(self, x: str) -> str:
        """Return the columns of x that the kernel multiplies."""
        return self.of("Slice", x, self.integers(0), self.integers(self.spec.features), self.integers(-1))

    def scalar(self, x: str) -> str:
        """Return the last column of x."""
        return self.of(
            "Slice", x, self.integers(self.spec.features), self.integers(self.spec.input_size), self.integers(-1)
        )

    def wide(self, v: str, axes: int = 1, last: int = -1) -> str:
        """Return `v` with so many new axes of size 1, the last one at `last`; `v` itself with none."""
        return self.of("Unsqueeze", v, self.integers(*range(last, last - axes, -1))) if axes else v

    def parts(self, x: str, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[str]:
        """Return parts of `x [B, W]` by head."""
        ends = [0, *accumulate(map(math.prod, shapes.values()))]
        found = []
        for (name, shape), pair in zip(shapes.items(), pairwise(ends), strict=True):
            part = self.cut(x, slice(*pair), -1, self.fresh(f"{self.prefix}{name}"))
            found.append(self.of("Reshape", part, self.integers(0, *shape)))
        return found

    def absolute(self, v: str) -> str:
        """Return `|v|`."""
        return self.of("Abs", v)

    def affine(self, v: str, factor: float = 1.0, offset: float = 0.0) -> str:
        """Return `factor·v + offset`."""
        if factor != 1.0:
            v = self.of("Neg", v) if factor == -1.0 else self.of("Mul", v, self.number(factor))
        return self.of("Add", v, self.number(offset)) if offset else v

    def joined(self, v: str) -> str:
        """Return the vectors of all heads as one."""
        return self.of("Reshape", v, self.integers(0, self.spec.units))

    def scaled(self, v: str, s: str, axes: int = 1) -> str:
        """Return vectors or matrices times numbers."""
        return self.of("Mul", v, self.wide(s, axes))

    def divided(self, v: str, s: str) -> str:
        """Return vectors divided by numbers."""
        return self.of("Div", v, self.wide(s))

    def dot(self, a: str, b: str) -> str:
        """Return inner products."""
        product = self.of("MatMul", self.wide(a, last=-2), self.wide(b))
        return self.of("Squeeze", product, self.integers(-1, -2))

    def outer(self, a: str, b: str) -> str:
        """Return `a·bᵀ`."""
        return self.of("Mul", self.wide(a), self.wide(b, last=-2))

    def retrieved(self, M: str, q: str) -> str:
        """Return `Mᵀq`."""
        return self.of("Squeeze", self.of("MatMul", self.wide(q, last=-2), M), self.integers(-2))


def body_of(where: str, cell: Celled, masked: bool = False, residual: bool = False, opset: int = OPSET) -> Any:
    """Return a step of a cell as a GraphProto: states and x in, states and y out.

    Args:
        where: the prefix of all names.
        cell: the cell.
        masked: whether it takes a flag per row too, False where the step is skipped: then all states are carried over.
            The previous y is then an additional state, the last one; where h isn't a state, y is zeros.
        residual: whether y is h + x; only with `masked`.
        opset: the version of the default operator set.
    """
    cell = cell.one_head
    step, kind = OnnxOps(where, cell, opset), cell.spec.of_kind
    spec = step.spec
    info = step.onnx.helper.make_tensor_value_info
    repeats = masked and kind.carries_h
    shapes = dict(spec.state_shapes) | ({"y": (spec.output_size,)} if repeats else {})
    before = {name: step.fresh(f"{where}/{name}_before") for name in shapes}
    x = step.fresh(f"{where}/x")
    own = [before[name] for name in spec.state_shapes]
    found = list(kind.step(step, spec, kind.prepared(step, spec, x), *own)[1])
    y, new = found[0], found[-len(own) :]
    for n, kept in enumerate(spec.zoneout_rates.values()):
        if kept:
            old = step.of("Mul", own[n], step.number(kept))
            new[n] = step.of("Add", old, step.of("Mul", new[n], step.number(1.0 - kept)))
    inputs = [info(before[name], step.type, ["batch", *shape]) for name, shape in shapes.items()]
    inputs.append(info(x, step.type, ["batch", spec.input_size]))
    if masked:
        used = step.fresh(f"{where}/used")
        inputs.append(info(used, step.onnx.TensorProto.BOOL, ["batch", 1]))
        if repeats:
            new.append(step.of("Add", new[0], x) if residual else new[0])
        flags = [step.wide(used, len(shape) - 1) for shape in shapes.values()]
        new = [step.of("Where", *flow) for flow in zip(flags, new, before.values(), strict=True)]
        y = new[-1] if repeats else step.of("Where", used, y, step.number(0.0))
    elif kind.carries_h:
        y = new[0]
    outputs = []
    shapes |= {"out": (spec.output_size,)}
    for (name, shape), value in zip(shapes.items(), [*new, y], strict=True):
        after = step.put("Identity", [value], step.fresh(f"{where}/{name}_after"))
        outputs.append(info(after, step.type, ["batch", *shape]))
    text = described(cell) if isinstance(cell, Cell) and not masked else ""
    return step.onnx.helper.make_graph(step.nodes, f"{where}/step", inputs, outputs, step.tensors, doc_string=text)


def described(cell: Cell) -> str:
    """Return a cell's description as one line of JSON; without its initial state, which isn't part of the step."""
    settings = {**cell.spec.settings, "input_size": cell.spec.input_size, "units": cell.spec.units}
    settings.pop("learn_initial_state", None)
    return json.dumps(settings)

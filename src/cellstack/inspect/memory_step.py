"""The step of an `MLSTM` as data, which the page interprets as it interprets the steps of cells."""

from __future__ import annotations

import math
from typing import Any

from cellstack.cells.mlstm import MEANINGS, MemorySizes, step
from cellstack.nodes.mlstm import MLSTM
from cellstack.views.recorded import RecordedMath, Value, listed


class _Recorder(RecordedMath):
    """See `cellstack.cells.mlstm.MemoryOps`. A vector is as wide as those of all heads together."""

    def __init__(self, sizes: MemorySizes) -> None:
        self.values, self.sizes = [], sizes

    def new(self, operation: str, *of: Value, shape: tuple[int, ...], **more: Any) -> Value:
        """Record an operation whose result has this shape."""
        return self._new(operation, *of, width=(math.prod(shape), ""), **more)

    def parts(self, x: Value, output_gate: bool) -> dict[str, Value]:
        """Record the parts of the input; q, k and v are fields of the trace."""
        found, first = {}, 0
        for name, shape in self.sizes.parts(output_gate).items():
            part = self.new("part", x, shape=shape, name=name, part=first)
            found[name] = self.record(name, part) if name in ("q", "k", "v") else part
            first += math.prod(shape)
        return found

    def absolute(self, v: Value) -> Value:
        """Record `max(v, -v)`."""
        return self.maximum(v, self.affine(v, -1.0))

    def affine(self, v: Value, factor: float = 1.0, offset: float = 0.0) -> Value:
        """Record `factor·v + offset`."""
        return self._new("affine", v, numbers=(factor, offset))

    def scaled(self, v: Value, s: Value) -> Value:
        """Record vectors times numbers."""
        return self._new("scaled", s, v, width=v.width)

    def scaled_matrix(self, M: Value, s: Value) -> Value:
        """Record matrices times numbers."""
        return self.scaled(M, s)

    def divided(self, v: Value, s: Value) -> Value:
        """Record vectors divided by numbers."""
        return self._new("div", v, self._new("scaled", s, width=v.width))

    def dot(self, a: Value, b: Value) -> Value:
        """Record inner products."""
        return self.new("contract", a, b, shape=(self.sizes.heads,))

    def outer(self, a: Value, b: Value) -> Value:
        """Record `a·bᵀ`."""
        return self.new("outer", a, b, shape=self.sizes.state_shapes["C"])

    def retrieved(self, M: Value, q: Value) -> Value:
        """Record `Mᵀq`."""
        return self.new("contract", M, q, shape=(self.sizes.units,))

    def sigmoid(self, name: str, v: Value) -> Value:
        """Record a gate."""
        return self.record(name, self._new("activation", v, name=name))


def settings_of(node: MLSTM) -> dict[str, Any]:
    """Return the settings of an `MLSTM`, as those of a cell."""
    sizes = {"kind": "mlstm", "input_size": node.input_size, "units": node.units}
    return sizes | {name: getattr(node, name) for name in node.settings}


def memory_form(node: MLSTM) -> dict[str, Any]:
    """Return an `MLSTM` as a form of cell without arrays, with the keys of `views.recorded.form_of`, and `heads`.

    Vectors are as wide as all heads together; C is `[heads, key_size, value_size]`. In addition to the operations of
    cells, there are `"part"`, some columns of x, the first of which is `part`; `"affine"`, `v·numbers[0] + numbers[1]`;
    `"scaled"`, a vector times a number per head, or only that number; `"outer"`, the products of two vectors of each
    head; and `"contract"`, a matrix of each head, transposed, times a vector.
    """
    ops = _Recorder(node.sizes)
    shapes = node.sizes.state_shapes
    before = [ops.new("state", shape=shape, name=name) for name, shape in shapes.items()]
    x = ops.new("x", shape=(node.input_size or 0,))
    _, after = step(ops, node.sizes, ops.parts(x, node.output_gate), *before)
    place = {id(value): number for number, value in enumerate(ops.values)}
    gates = {"i": "write", "f": "keep"} | ({"o": "output"} if node.output_gate else {})
    output = MEANINGS["h"] + (", times the output gate" if node.output_gate else "")
    trace = [*"qkv", *gates, "m", "n", "h"]  # not C, which has too many numbers
    return {
        "settings": settings_of(node),
        "title": "mLSTM",
        "heads": node.heads,
        "gates": gates,
        "blocks": [],
        "trace": trace,
        "meanings": {name: MEANINGS[name] for name in (*trace, "C")} | {"h": output},
        "scalar": "",
        "states": {name: {"width": [math.prod(shape), ""], "kept": 0.0} for name, shape in shapes.items()},
        "activations": {"o": "sigmoid"} if node.output_gate else {},
        "shapes": {},
        "values": listed(ops.values),
        "before": [place[id(value)] for value in before],
        "after": [place[id(value)] for value in after],
    }

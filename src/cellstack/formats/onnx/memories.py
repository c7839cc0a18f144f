"""An mLSTM's memory as ONNX's Scan: the graph of one step, from C, n, m and x to those after it and h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cellstack.cells.mlstm import step
from cellstack.formats.onnx.file import onnx_package
from cellstack.formats.onnx.scan import OnnxMath
from cellstack.nodes import MLSTM


class _Ops(OnnxMath):
    """See `cellstack.cells.mlstm.MemoryOps`; numbers are `[B, heads]`, vectors and matrices have more axes."""

    def wide(self, v: str, *axes: int) -> str:
        """Return `v` with new axes of size 1."""
        return self.of("Unsqueeze", v, self.integers(*axes))

    def parts(self, x: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        """Return the parts of `x [B, W]`, `[B, *shape]` each."""
        ends = [0, *accumulate(map(math.prod, shapes.values()))]
        return {
            name: self.of(
                "Reshape", self.cut(x, slice(*pair), -1, self.fresh(f"{self.prefix}{name}")), self.integers(0, *shape)
            )
            for (name, shape), pair in zip(shapes.items(), pairwise(ends), strict=True)
        }

    def absolute(self, v: str) -> str:
        """Return `|v|`."""
        return self.of("Abs", v)

    def affine(self, v: str, factor: float = 1.0, offset: float = 0.0) -> str:
        """Return `factor·v + offset`."""
        if factor != 1.0:
            v = self.of("Neg", v) if factor == -1.0 else self.of("Mul", v, self.number(factor))
        return self.of("Add", v, self.number(offset)) if offset else v

    def scaled(self, v: str, s: str) -> str:
        """Return vectors times numbers."""
        return self.of("Mul", v, self.wide(s, -1))

    def scaled_matrix(self, M: str, s: str) -> str:
        """Return matrices times numbers."""
        return self.of("Mul", M, self.wide(s, -1, -2))

    def divided(self, v: str, s: str) -> str:
        """Return vectors divided by numbers."""
        return self.of("Div", v, self.wide(s, -1))

    def dot(self, a: str, b: str) -> str:
        """Return inner products."""
        product = self.of("MatMul", self.wide(a, -2), self.wide(b, -1))
        return self.of("Squeeze", product, self.integers(-1, -2))

    def outer(self, a: str, b: str) -> str:
        """Return `a·bᵀ`."""
        return self.of("Mul", self.wide(a, -1), self.wide(b, -2))

    def retrieved(self, M: str, q: str) -> str:
        """Return `Mᵀq`."""
        return self.of("Squeeze", self.of("MatMul", self.wide(q, -2), M), self.integers(-2))

    def sigmoid(self, name: str, v: str) -> str:
        """Return a gate."""
        return self.of("Sigmoid", v)


def body_of(where: str, node: MLSTM, dtype: np.dtype[Any], masked: bool) -> Any:
    """Return a step of a memory as a GraphProto.

    Args:
        where: the prefix of all names.
        node: the memory.
        dtype: that of the numbers.
        masked: whether it takes a flag per row too, False where the step is skipped: then the state is carried over,
            and the output is zeros.
    """
    ops = _Ops(onnx_package(), dtype, set(), f"{where}/")
    states = node.sizes.state_shapes
    x, *before = (ops.fresh(f"{where}/{name}") for name in ("x", *states))
    h, after = step(ops, node.sizes, ops.parts(x, node.sizes.parts(node.output_gate)), *before)
    h, new = ops.of("Reshape", h, ops.integers(0, node.units)), list(after)
    info = ops.onnx.helper.make_tensor_value_info
    inputs = [info(name, ops.type, ["batch", *shape]) for name, shape in zip(before, states.values(), strict=True)]
    inputs.append(info(x, ops.type, ["batch", node.input_size]))
    if masked:
        used = ops.fresh(f"{where}/used")
        inputs.append(info(used, ops.onnx.TensorProto.BOOL, ["batch", 1]))
        flags = ops.wide(used, -1, -2), ops.wide(used, -1), used
        new = [ops.of("Where", *flow) for flow in zip(flags, new, before, strict=True)]
        h = ops.of("Where", used, h, ops.number(0.0))
    outputs = []
    all_shapes = *states.values(), (node.units,)
    for name, value, shape in zip([*states, "h"], [*new, h], all_shapes, strict=True):
        after = ops.put("Identity", [value], ops.fresh(f"{where}/{name}_after"))
        outputs.append(info(after, ops.type, ["batch", *shape]))
    return ops.onnx.helper.make_graph(ops.nodes, f"{where}/step", inputs, outputs, ops.tensors)


def memory(pieces: Any, name: str, node: MLSTM, x: str, mask: str) -> None:
    """Add a memory, with its states as outputs, and as inputs if the file takes states.

    Args:
        pieces: the graph's writer.
        name: the name of the node, and of its output.
        node: the memory.
        x: its input, `[B, T, W]`.
        mask: a flag per step, `[B, T, 1]`; "": all steps are used.
    """
    states = node.sizes.state_shapes
    starts = [_start(pieces, name, part, shape, x) for part, shape in states.items()]
    ends = pieces.after(states.values())
    flows = [pieces.of("Transpose", flow, perm=[1, 0, 2]) for flow in (x, mask) if flow]
    y = pieces.fresh(f"{name}.steps")
    body = body_of(name, node, pieces.dtype, bool(mask))
    made = pieces.onnx.helper.make_node
    pieces.nodes.append(made("Scan", [*starts, *flows], [*ends, y], name=name, body=body, num_scan_inputs=len(flows)))
    pieces.put("Transpose", [y], name, f"{name}.rows", perm=[1, 0, 2])


def _start(pieces: Any, name: str, part: str, shape: Sequence[int], x: str) -> str:
    """Add the initial state of a part, and return its value for every row."""
    start = pieces.initial(f"{name}.{part}", np.zeros((1, *shape), pieces.dtype))
    batch = pieces.of("Shape", x, start=0, end=1)
    wide = pieces.of("Concat", batch, pieces.integers(*shape), axis=0)
    return pieces.put("Expand", [start, wide], pieces.fresh(f"{start}.start"))

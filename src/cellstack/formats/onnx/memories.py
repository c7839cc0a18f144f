"""An mLSTM's memory as ONNX's Scan: the graph of one step, from C, n, m and x to those after it and h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import onnx_package
from cellstack.formats.onnx.pieces import Pieces
from cellstack.nodes import MLSTM


class _Step(Pieces):
    """The operators of a step."""

    def wide(self, v: str, *axes: int) -> str:
        """Return `v` with new axes of size 1."""
        return self.of("Unsqueeze", v, self.integers(*axes))

    def part(self, x: str, start: int, size: int, *shape: int) -> str:
        """Return columns of `x [B, W]` as `[B, *shape]`."""
        columns = self.of("Slice", x, self.integers(start), self.integers(start + size), self.integers(-1))
        return self.of("Reshape", columns, self.integers(0, *shape))


def body_of(where: str, node: MLSTM, dtype: np.dtype[Any], masked: bool) -> Any:
    """Return a step of a memory as a GraphProto.

    Args:
        where: the prefix of all names.
        node: the memory.
        dtype: that of the numbers.
        masked: whether it takes a flag per row too, False where the step is skipped: then the state is carried over,
            and the output is zeros.
    """
    step = _Step(onnx_package(), dtype, set(), f"{where}/")
    states = node.memory_in(dtype).state_shapes
    of, wide, heads, keys, values = step.of, step.wide, node.heads, node.key_size, node.value_size
    x, *before = (step.fresh(f"{where}/{name}") for name in ("x", *states))
    C, n, m = before
    ends = np.cumsum([0, heads * keys, heads * keys, heads * values, heads, heads]).tolist()
    shapes = (heads, 1, keys), (heads, keys), (heads, 1, values), (heads,), (heads,)
    q, k, v, i, f = (
        step.part(x, start, end - start, *shape) for start, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
    )
    kept = of("Add", step.log_sigmoid(f), m)
    m_new = of("Max", kept, i)
    f = wide(of("Exp", of("Sub", kept, m_new)), -1)
    i = of("Mul", of("Exp", of("Sub", i, m_new)), step.number(1 / math.sqrt(keys)))
    key = of("Mul", k, wide(i, -1))
    n_new = of("Add", of("Mul", n, f), key)
    C_new = of("Add", of("Mul", C, wide(f, -1)), of("Mul", wide(key, -1), v))
    size = of("Abs", of("MatMul", q, wide(n_new, -1)))  # [B, heads, 1, 1]
    floor = wide(of("Exp", of("Neg", m_new)), -1, -2)
    h = of("Div", of("MatMul", q, C_new), of("Add", of("Max", size, floor), step.number(node.epsilon)))
    h = of("Reshape", h, step.integers(0, node.units))
    if node.output_gate:
        h = of("Mul", h, of("Sigmoid", step.part(x, node.core_size, node.units, node.units)))
    new, info = [C_new, n_new, m_new], step.onnx.helper.make_tensor_value_info
    inputs = [info(name, step.type, ["batch", *shape]) for name, shape in zip(before, states.values(), strict=True)]
    inputs.append(info(x, step.type, ["batch", node.input_size]))
    if masked:
        used = step.fresh(f"{where}/used")
        inputs.append(info(used, step.onnx.TensorProto.BOOL, ["batch", 1]))
        flags = wide(used, -1, -2), wide(used, -1), used
        new = [of("Where", *flow) for flow in zip(flags, new, before, strict=True)]
        h = of("Where", used, h, step.number(0.0))
    outputs = []
    all_shapes = *states.values(), (node.units,)
    for name, value, shape in zip([*states, "h"], [*new, h], all_shapes, strict=True):
        after = step.put("Identity", [value], step.fresh(f"{where}/{name}_after"))
        outputs.append(info(after, step.type, ["batch", *shape]))
    return step.onnx.helper.make_graph(step.nodes, f"{where}/step", inputs, outputs, step.tensors)


def memory(pieces: Any, name: str, node: MLSTM, x: str, mask: str) -> None:
    """Add a memory, its states as inputs and outputs, of which an omitted input is zeros.

    Args:
        pieces: the graph's writer.
        name: the name of the node, and of its output.
        node: the memory.
        x: its input, `[B, T, W]`.
        mask: a flag per step, `[B, T, 1]`; "": all steps are used.
    """
    states = node.memory_in(pieces.dtype).state_shapes
    starts = [_start(pieces, name, part, shape, x) for part, shape in states.items()]
    ends = pieces.after(states.values())
    flows = [pieces.of("Transpose", flow, perm=[1, 0, 2]) for flow in (x, mask) if flow]
    y = pieces.fresh(f"{name}.steps")
    body = body_of(name, node, pieces.dtype, bool(mask))
    made = pieces.onnx.helper.make_node
    pieces.nodes.append(made("Scan", [*starts, *flows], [*ends, y], name=name, body=body, num_scan_inputs=len(flows)))
    pieces.put("Transpose", [y], name, f"{name}.rows", perm=[1, 0, 2])


def _start(pieces: Any, name: str, part: str, shape: Sequence[int], x: str) -> str:
    """Add the input for the initial state of a part, and return its value for every row."""
    start = pieces.tensor(f"{name}.{part}", np.zeros((1, *shape), pieces.dtype))
    rows = pieces.fresh(f"{start}.rows")
    pieces.inputs.append(pieces.onnx.helper.make_tensor_value_info(start, pieces.type, [rows, *shape]))
    pieces.begun.append([start, start])
    batch = pieces.of("Shape", x, start=0, end=1)
    wide = pieces.of("Concat", batch, pieces.integers(*shape), axis=0)
    return pieces.put("Expand", [start, wide], pieces.fresh(f"{start}.start"))

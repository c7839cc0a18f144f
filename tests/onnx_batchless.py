"""ONNX files without a batch axis, in the style of published ones: input `[T, F]`, states `[H]` as inputs and outputs.

An Unsqueeze adds the batch axis before each recurrent operator, a Squeeze removes it afterwards. The backward direction
is a Slice with step -1 before and after a forward operator, or one direction of a bidirectional operator.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
BACK = -(2**31)


class Plan(NamedTuple):
    """A file: `both` is "", "slice" or "operator"; `states` "", "flat" `[H]`, "row" `[1, H]` or "stacked" `[L, H]`."""

    kind: str
    layers: int
    both: str
    states: str
    head: str
    flag: str = ""  # "peepholes", "after" (linear_before_reset), or ""

    @property
    def name(self):
        return "-".join(str(word) for word in self if word)


def plans():
    """All files, by name."""
    kinds = [("LSTM", ""), ("LSTM", "peepholes"), ("GRU", ""), ("GRU", "after"), ("RNN", "")]
    heads = ("dense", "", "softmax", "last")
    found = []
    for number, ((kind, flag), layers, both) in enumerate(product(kinds, (1, 2, 3), ("", "slice", "operator"))):
        states = ("flat", "row", "stacked", "")[number % 4] if both != "operator" else ""
        found.append(Plan(kind, layers, both, states, heads[(number // 3) % 4], flag))
    return {plan.name: plan for plan in found}


class _Graph:
    def __init__(self, seed):
        self.rng, self.nodes, self.arrays = np.random.default_rng(seed), [], {}
        self.inputs, self.outputs = {"input": ["T", 3]}, {}

    def floats(self, name, *shape):
        self.arrays[name] = self.rng.normal(0, 0.6, shape).astype(np.float32)
        return name

    def integers(self, *values):
        name = "to_" + "_".join(map(str, values)).replace("-", "m")
        self.arrays[name] = np.array(values, np.int64)
        return name

    def put(self, operator, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"make {output}", **attributes))
        return output

    def turned(self, x, output, axis=0):
        lists = [self.integers(n) for n in (-1, BACK, axis, -1)]
        return self.put("Slice", [x, *lists], output)


def model_of(plan, seed=0):
    """Return a plan's file as a ModelProto, with different weights for each gate."""
    g, units, value = _Graph(seed), 4, "input"
    parts = "hc" if plan.kind == "LSTM" else "h"
    ways = 1 if not plan.both else 2
    stacked = plan.states == "stacked"
    if stacked:
        for part in parts:
            g.inputs[f"{part}_in"] = [plan.layers * ways, units]
    ends = {part: [] for part in parts}
    for layer in range(plan.layers):
        width = 3 if layer == 0 else units * ways
        directions = []
        for way in range(1 if plan.both == "operator" else ways):
            where = f"{'fb'[way]}{layer}"
            both, count = plan.both == "operator", (2 if plan.both == "operator" else 1)
            x = value
            early = layer % 2 == 0  # whether it is reversed before or after the batch axis is added
            if way and early:
                x = g.turned(x, f"{where}.turned")
            x = g.put("Unsqueeze", [x, g.integers(1)], f"{where}.batch")
            if way and not early:
                x = g.turned(x, f"{where}.turned")
            wide = GATES[plan.kind] * units
            names = [x, g.floats(f"{where}.W", count, wide, width), g.floats(f"{where}.R", count, wide, units)]
            names += [g.floats(f"{where}.B", count, 2 * wide), ""]
            for part in parts:
                names.append(_start(g, plan, part, where, layer * ways + way, units))
            if plan.flag == "peepholes":
                names.append(g.floats(f"{where}.P", count, 3 * units))
            while not names[-1]:
                names.pop()
            flags = {"linear_before_reset": 1} if plan.flag == "after" else {}
            flags |= {"direction": "bidirectional"} if both else {}
            made = [f"{where}.Y", *(f"{where}.Y_{part}" for part in parts)]
            g.nodes.append(helper.make_node(plan.kind, names, made, name=where, hidden_size=units, **flags))
            for part, name in zip(parts, made[1:], strict=True):
                _end(g, plan, part, where, name, ends)
            if both:
                rows = g.put("Squeeze", [made[0], g.integers(2)], f"{where}.rows")
                y = g.put("Reshape", [rows, g.integers(0, -1)], f"{where}.y")
            else:
                y = g.put("Squeeze", [made[0], g.integers(1, 2)], f"{where}.y")
            directions.append(g.turned(y, f"{where}.back") if way else y)
        value = directions[0] if len(directions) == 1 else g.put("Concat", directions, f"both{layer}", axis=-1)
    if stacked:
        for part in parts:
            _out(g, g.put("Concat", ends[part], f"{part}_out", axis=0), 2)
    _head(g, plan.head, value, units * ways)
    graph = helper.make_graph(
        g.nodes,
        "batchless",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in g.inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in reversed(g.outputs.items())],
        [onnx.numpy_helper.from_array(array, name) for name, array in g.arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _start(g, plan, part, where, number, units):
    if not plan.states:
        return ""
    name = f"{part}_in" if plan.states == "stacked" else f"{where}.{part}_in"
    if plan.states == "stacked":
        row = g.put("Gather", [name, g.integers(number)], f"{where}.{part}_row", axis=0)
        return g.put("Unsqueeze", [row, g.integers(1)], f"{where}.{part}_start")
    g.inputs[name] = [units] if plan.states == "flat" else [1, units]
    axes = (0, 1) if plan.states == "flat" else (number % 2,)
    return g.put("Unsqueeze", [name, g.integers(*axes)], f"{where}.{part}_start")


def _end(g, plan, part, where, name, ends):
    if plan.states == "flat":
        _out(g, g.put("Squeeze", [name, g.integers(0, 1)], f"{where}.{part}_out"), 1)
    elif plan.states:
        row = g.put("Squeeze", [name, g.integers(1)], f"{where}.{part}_out")
        ends[part].append(row)
        if plan.states == "row":
            _out(g, row, 2)


def _out(g, name, rank):
    g.outputs[name] = [f"{name}.{n}" for n in range(rank)]


def _head(g, head, value, width):
    if head == "last":
        value = g.put("Gather", [value, g.integers(-1)], "frame", axis=0)  # [1, W]
    if head:
        z = g.put("Gemm", [value, g.floats("head.W", 2, width), g.floats("head.b", 2)], "head.z", transB=1)
        value = g.put(
            "Softmax" if head == "softmax" else "Sigmoid", [z], "y", **({"axis": -1} if head == "softmax" else {})
        )
    _out(g, value, 2)

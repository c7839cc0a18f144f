"""Steps that differ from a cell's in one operation aren't taken for the cell.

Every operation of every kind's step is changed, one at a time. A changed step may be another cell, as when two gates
are exchanged. So a step is either refused, or read as a cell that computes the same numbers.
"""

import numpy as np
import pytest
import torch
from family import random_state

from cellstack.cells import KINDS
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx import scan
from cellstack.formats.onnx.decomposed.scans import _cell
from cellstack.formats.onnx.file import Budget, Graph, Model, Tensors
from cellstack.layers.eager import function_of
from cellstack.nodes.cell_arrays import Cell
from cellstack.views.torch import TorchOps

UNITS, WIDTH, ROWS = 3, 3, 4


class Mutant:
    """The operations of a view with the n-th one changed; counts them.

    Args:
        ops: the view.
        at: which operation is changed.
        how: the name of the change.
    """

    def __init__(self, ops, at, how):
        self.ops, self.at, self.how, self.count = ops, at, how, -1
        self.changed = False

    def __getattr__(self, name):
        return getattr(self.ops, name)

    def is_next(self, *changes):
        self.count += 1
        here = self.count == self.at and self.how in changes
        self.changed |= here
        return here

    def minus(self, v):
        return -v if isinstance(v, torch.Tensor) else self.ops.of("Neg", v)

    def twice(self, v):
        return 2.0 * v if isinstance(v, torch.Tensor) else self.ops.of("Mul", v, self.ops.number(2.0))

    def add(self, a, b):
        if self.is_next("sign", "factor", "operator"):
            other = {"sign": self.minus, "factor": self.twice}.get(self.how)
            return self.ops.mul(a, b) if other is None else self.ops.add(a, other(b))
        return self.ops.add(a, b)

    def mul(self, a, b):
        if self.is_next("sign", "factor", "operator"):
            other = {"sign": self.minus, "factor": self.twice}.get(self.how)
            return self.ops.add(a, b) if other is None else self.ops.mul(other(a), b)
        return self.ops.mul(a, b)

    def one_minus(self, v):
        if self.is_next("sign", "factor", "operator"):
            return {"sign": self.minus, "factor": self.twice}.get(self.how, lambda v: v)(self.ops.one_minus(v) if
                    self.how != "operator" else v)  # fmt: skip
        return self.ops.one_minus(v)

    def split(self, v, count):
        blocks = [*self.ops.split(v, count)]
        if self.is_next("sign", "factor", "operator", "gate"):
            change = {"sign": self.minus, "factor": self.twice}.get(self.how)
            blocks = [change(blocks[0]), *blocks[1:]] if change else [blocks[1], blocks[0], *blocks[2:]]
            if self.how == "gate":  # one gate is used twice, another one never
                blocks[0] = blocks[1]
        return blocks

    def activated(self, z, active):
        if self.is_next("sign", "factor", "operator"):
            return {"sign": self.minus, "factor": self.twice}.get(self.how, lambda v: v)(
                active() if self.how != "operator" else z
            )
        return active()

    def gate(self, name, z):
        return self.activated(z, lambda: self.ops.gate(name, z))

    def activation(self, slot, v):
        return self.activated(v, lambda: self.ops.activation(slot, v))

    def clip(self, v, bound):
        if bound is not None and self.is_next("factor", "operator"):
            return self.twice(self.ops.clip(v, bound)) if self.how == "factor" else v
        return self.ops.clip(v, bound)


def scope_of(cell, monkeypatch, at=-1, how=""):
    """Return the graph of a step, and whether it is changed."""
    made = []
    theirs = scan.OnnxOps

    def ops(where, cell, opset):
        made.append(Mutant(theirs(where, cell, opset), at, how))
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr(scan, "OnnxOps", ops)
        graph = Graph.of(scan.body_of("step", cell))
    return Model("", graph, 17, (), "", None, Tensors(""), Budget(1 << 20)).scope(), made[0].changed, made[0].count


def stepped(spec, arrays, x, state, at=-1, how=""):
    """Return the states after a step in torch."""
    functions = [function_of(activation) for activation in spec.activations]
    weights = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    ops = Mutant(TorchOps(spec, weights, functions, None), at, how)
    given = [torch.from_numpy(value) for value in state]
    a = spec.of_kind.prepared(ops, spec, torch.from_numpy(x))
    return [value.numpy() for value in spec.of_kind.step(ops, spec, a, *given)[1]]


CASES = [
    *({"kind": name} for name in KINDS if name != "cfc"),
    {"kind": "cfc", "timespans": True},  # without times only the sum of two of its gates has an effect
    {"kind": "cfc", "timespans": True, "backbone_units": 4},
    {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_layers": 2, "backbone_activation": "silu"},
    {"peepholes": True, "cell_clip": 0.5},
    {"coupled": True, "proj_size": 2},
    {"layer_norm": True},
    {"layer_norm": "joint"},
    {"kind": "gru", "reset_after": False},
    {"kind": "ligru", "layer_norm": "joint"},
]


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: " ".join(map(str, flags.values())))
def test_a_step_with_one_changed_operation_is_refused_or_read_as_what_it_computes(flags, monkeypatch):
    rng = np.random.default_rng(0)
    spec = CellSpec(WIDTH, UNITS, **flags)
    arrays = {name: rng.standard_normal(shape) for name, shape in spec.shapes.items()}
    if "decay" in arrays:
        arrays["decay"] = np.abs(arrays["decay"])  # its sign has no effect, and isn't read
    cell = Cell(spec, **arrays)
    x = rng.standard_normal((ROWS, WIDTH))
    state = random_state(rng, spec, ROWS)
    scope, changed, last = scope_of(cell, monkeypatch)
    found = _cell(scope, [None] * len(state))
    assert not changed
    assert found.spec.kind == spec.kind
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    refused = accepted = 0
    for at in range(last + 1):
        for how in ("sign", "factor", "operator", "gate"):
            scope, changed, _ = scope_of(cell, monkeypatch, at, how)
            if not changed:
                continue
            try:
                found = _cell(scope, [None] * len(state))
            except ValueError:
                refused += 1
                continue
            accepted += 1
            ours = stepped(found.spec, found.arrays, x, state)
            theirs = stepped(spec, arrays, x, state, at, how)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=f"operation {at}: {how}")
    assert refused > accepted, (refused, accepted)

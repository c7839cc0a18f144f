"""Cells that a graph spells out are found from the step that each kind declares, in any spelling of its equations."""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import model

from cellstack import cells, reference
from cellstack.cells import spec
from cellstack.cells.base import HiddenState, Kind, State
from cellstack.cells.errors import FormatError
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx.cell_writer import write_operator
from cellstack.formats.onnx.decomposed.found import find_decomposed
from cellstack.formats.onnx.decomposed.match import MOST_LAYERS, forms
from cellstack.formats.onnx.decomposed.scans import read_scan
from cellstack.formats.onnx.file import Budget, Graph, Model, Tensors
from cellstack.formats.onnx.scan import OnnxOps, body_of
from cellstack.nodes.cell_arrays import Cell

# ── kinds of cell that only these tests declare ───────────────────────────────────────────────────────────────────────


def product_step(ops, spec, a, h, c):
    """An LSTM whose candidate is the product of two."""
    i, f, g, k, o = ops.split(ops.add(a, ops.product(ops.dropped(h), "recurrent_kernel")), 5)
    i, f, g, k, o = (ops.gate(name, z) for name, z in zip("ifgko", (i, f, g, k, o), strict=True))
    c = ops.record("c", ops.add(ops.mul(f, c), ops.mul(i, ops.mul(g, k))))
    return (i, f, g, k, o), (ops.mul(o, ops.activation("cell", c)), c)


def trace(gates):
    return NamedTuple("Toy", [(name, Any) for name in gates])


def kind(name, gates, step, state=HiddenState, **given):
    roles = {"g": "candidate", "k": "candidate", "i": "write", "f": "keep", "o": "output"}
    return Kind(name, name, {gate: roles[gate] for gate in gates}, state, trace(gates), step, **given)


TOYS = {
    "product": kind("product", "ifgko", product_step, State, outputs=("cell",)),
}


@pytest.fixture
def toys(monkeypatch):
    """The kinds of TOYS, registered."""
    for name, toy in TOYS.items():
        monkeypatch.setitem(cells.KINDS, name, toy)
        monkeypatch.setitem(spec.GATES, name, tuple(toy.gates))
        monkeypatch.setitem(spec.STATES, name, toy.state)
        monkeypatch.setitem(spec.TRACES, name, toy.trace)


# ── graphs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def some(rng, inputs=3, **flags):
    described = CellSpec(inputs, 4, **flags)
    return Cell(described, *(rng.normal(0, 0.7, shape).astype("f4") for shape in described.shapes.values()))


def scope_of(proto):
    return Model("file", Graph.of(proto.graph), 17, (), "", None, Tensors("file"), Budget(10**6)).scope()


def respelled(body, rng):
    """The same equations: factors and terms in another order, and 1 - z times g as g - z·g."""
    makers = {name: node for node in body.node for name in node.output}
    for node in list(body.node):
        if node.op_type in ("Add", "Mul") and rng.random() < 0.5:
            node.input[:] = node.input[::-1]
        less = [makers[name] for name in node.input if name in makers and makers[name].op_type == "Sub"]
        if node.op_type != "Mul" or not less or less[0].input[0] in makers:
            continue
        other = next(name for name in node.input if name != less[0].output[0])
        made = helper.make_node("Mul", [less[0].input[1], other], [f"{node.output[0]} less"])
        node.op_type, node.input[:] = "Sub", [other, made.output[0]]
        body.node.insert(list(body.node).index(node), made)
    return body


def scan_of(body, cell):
    """A file with one Scan, started from inputs."""
    states = list(cell.spec.state_sizes)
    node = helper.make_node(
        "Scan",
        [*states, "X"],
        [*(f"{state}_after" for state in states), "Y"],
        name="scan",
        body=body,
        num_scan_inputs=1,
    )
    inputs = {name: (TensorProto.FLOAT, ["B", size]) for name, size in cell.spec.state_sizes.items()}
    inputs["X"] = (TensorProto.FLOAT, ["T", "B", cell.spec.input_size])
    return model([node], inputs, {"Y": 3}, {})


def unrolled(cell, count=3):
    """A cell's steps one after the other, from zeros, for inputs `x0`, `x1` …"""
    ops = OnnxOps("cell", cell)
    states = [ops.tensor(name, np.zeros((2, size), "f4")) for name, size in cell.spec.state_sizes.items()]
    kind = cell.spec.of_kind
    for n in range(count):
        states = kind.step(ops, cell.spec, kind.prepared(ops, cell.spec, f"x{n}"), *states)[1]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in ops.tensors}
    inputs = {f"x{n}": (TensorProto.FLOAT, [2, cell.spec.input_size]) for n in range(count)}
    return model(ops.nodes, inputs, {states[0]: 2}, arrays)


def settings(described):
    """A description with the activation of each gate, however it was given."""
    own = {slot: str(text) for slot, text in zip(described.slots, described.activations, strict=True)}
    for gate in ("f",) if described.coupled else described.of_kind.fixed:
        del own[gate]
    own.pop("backbone", None)  # which has an argument of its own
    usual = {} if described.kind == "rnn" else {"recurrent_activation": "sigmoid"}
    return replace(described, activation="tanh", gate_activations=own, **usual)


def check_same(found, cell):
    assert settings(found.spec) == settings(cell.spec)
    assert found.arrays.keys() == cell.arrays.keys()
    for name, array in cell.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def check_factors(found, cell):
    """Check that a "product" is the same cell: i, g and k are factors of a product, and may be each other."""
    gates = []
    for one in (found, cell):
        blocks = np.concatenate([array.reshape(-1, 5, 4) for array in one.arrays.values()]).transpose(1, 0, 2)
        texts = map(str, one.spec.activations)
        i, f, g, k, o = ((text, *map(tuple, block)) for text, block in zip(texts, blocks, strict=False))
        gates.append([f, o, *sorted([i, g, k])])
    assert gates[0] == gates[1]


# ── tests ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", [{}, {"clip": 0.5, "use_bias": False}], ids=str)
@pytest.mark.parametrize("name", TOYS)
def test_a_kind_that_only_a_test_declares(toys, name, flags):
    rng = np.random.default_rng(len(name))
    cell = some(rng, kind=name, **flags)
    for _ in range(4):
        body = respelled(body_of("toy", cell), rng)
        body.doc_string = ""
        scope = scope_of(scan_of(body, cell))
        (found,) = read_scan(scope, scope.graph.node[0]).cells
        check_factors(found, cell)


@pytest.mark.parametrize("name", [*TOYS, "mingru", "minlstm", "ligru", "slstm"])
def test_it_has_no_operator_of_its_own(toys, name):
    with pytest.raises(ValueError, match=f"(?i)ONNX has no operator for {name}$"):
        write_operator("layer", (some(np.random.default_rng(0), kind=name),), "forward")


@pytest.mark.parametrize("name", TOYS)
def test_its_unrolled_steps(toys, name):
    cell = some(np.random.default_rng(1), kind=name)
    ((_, operator),) = find_decomposed(scope_of(unrolled(cell)))
    check_factors(operator.cells[0], cell)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"peepholes": True, "coupled": True, "proj_size": 2},
        {"layer_norm": True, "cell_clip": 0.4, "clip": 0.9, "zoneout": 0.25, "zoneout_cell": 0.5},
        {"kind": "gru"},
        {"kind": "gru", "reset_after": False, "clip": 0.25, "use_bias": False},
        {"kind": "gru", "layer_norm": True, "gate_activations": {"z": "softsign", "g": "softplus"}},
        {"kind": "rnn", "layer_norm": True, "activation": "leaky_relu(0.25)"},
        {"layer_norm": "joint", "cell_clip": 0.4, "coupled": True, "peepholes": True, "zoneout_cell": 0.5},
        {"kind": "rnn", "layer_norm": "joint"},
        {"kind": "gru", "attention": True},
        {"kind": "gru", "attention": True, "reset_after": False, "zoneout": 0.25},
        {"kind": "cfc", "timespans": True, "mode": "no_gate", "use_bias": False},
        {"kind": "cfc", "timespans": True, "clip": 0.75, "zoneout": 0.25},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "scaled_tanh(1.75, 0.625)"},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "silu", "backbone_layers": 2},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "gelu", "use_bias": False},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "tanh", "backbone_layers": 7},
        {
            "kind": "cfc",
            "timespans": True,
            "backbone_units": 4,
            "backbone_activation": "relu",
            "clip": 0.5,
            "use_bias": False,
        },
        {"kind": "ligru", "clip": 0.75, "zoneout": 0.25},
        {"kind": "cfc", "timespans": True, "layer_norm": "joint"},
        {"kind": "ligru", "layer_norm": "joint", "use_bias": False},
        {"kind": "mingru"},
        {"kind": "mingru", "layer_norm": True, "clip": 0.75, "zoneout": 0.25, "activation": "tanh"},
        {"kind": "mingru", "clip": 0.5, "use_bias": False},
        {"kind": "minlstm"},
        {"kind": "minlstm", "clip": 0.5, "use_bias": False},
        {"kind": "minlstm", "layer_norm": True, "use_bias": False, "activation": "tanh"},
    ],
    ids=str,
)
def test_spellings(flags):
    rng = np.random.default_rng(2)
    cell = some(rng, **flags)
    for _ in range(6):
        body = respelled(body_of("cell", cell), rng)
        body.doc_string = ""
        scope = scope_of(scan_of(body, cell))
        check_same(read_scan(scope, scope.graph.node[0]).cells[0], cell)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"peepholes": True, "cell_clip": 0.5},
        {"kind": "gru", "reset_after": False},
        {"layer_norm": "joint"},
        {"kind": "ligru"},
        {"kind": "mingru"},
        {"kind": "minlstm"},
        {"kind": "cfc", "timespans": True},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "tanh"},
        {"kind": "cfc", "timespans": True, "backbone_units": 4, "backbone_activation": "gelu", "backbone_layers": 3},
        {"kind": "cfc", "timespans": True, "backbone_units": 5, "backbone_activation": "tanh", "backbone_layers": 6},
    ],
    ids=str,
)
def test_unrolled_steps_with_flags(flags):
    cell = some(np.random.default_rng(3), **flags)
    ((_, operator),) = find_decomposed(scope_of(unrolled(cell)))
    check_same(operator.cells[0], cell)


def test_of_a_cfc_s_equal_steps_only_the_sum_of_slope_and_time_gate_is_known():
    rng = np.random.default_rng(5)
    cell = some(rng, kind="cfc")
    ((_, operator),) = find_decomposed(scope_of(unrolled(cell)))
    x, found = rng.standard_normal((2, 4, cell.spec.input_size)), operator.cells[0]
    y, expected = (reference.forward(one.spec, one.arrays, x).y for one in (found, cell))
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_the_most_layers_of_a_backbone():
    flags = {"kind": "cfc", "backbone_units": 5, "backbone_activation": "gelu", "timespans": True}
    cell = some(np.random.default_rng(6), **flags, backbone_layers=MOST_LAYERS)
    scope = scope_of(scan_of(body_of("cell", cell), cell))
    check_same(read_scan(scope, scope.graph.node[0]).cells[0], cell)
    cell = some(np.random.default_rng(6), **flags, backbone_layers=MOST_LAYERS + 1)
    scope = scope_of(scan_of(body_of("cell", cell), cell))
    with pytest.raises(FormatError, match="isn't a step of a cell"):
        read_scan(scope, scope.graph.node[0])


def test_every_combination_of_flags_is_a_form():
    count = {name: len(forms(kind)) for name, kind in cells.KINDS.items()}
    expected = {
        "lstm": 24,
        "gru": 6,
        "rnn": 3,
        "mingru": 2,
        "minlstm": 2,
        "ligru": 3,
        "slstm": 2,
        "cfc": 16,
        "sru": 1,
        "cfs": 8,
    }
    assert count == expected


@pytest.mark.parametrize("operator", ["Mul", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Add", "Sub"))])
def test_sums_that_double_at_every_operator_take_little_time(operator):
    """Multiplied out, the last of them would have 2^500 terms."""
    nodes = [helper.make_node("Tanh", ["x"], ["v0"]), helper.make_node("Sub", ["v0", "x"], ["d0"])]
    for n in range(500):
        nodes.append(helper.make_node(operator, [f"d{n}", f"d{n}" if operator == "Mul" else f"v{n}"], [f"v{n + 1}"]))
        nodes.append(helper.make_node("Sub", [f"v{n + 1}", f"d{n}"], [f"d{n + 1}"]))
    start = time.process_time()
    assert not list(find_decomposed(scope_of(model(nodes, {"x": (TensorProto.FLOAT, ["B", 3])}, {"d500": 2}, {}))))
    assert time.process_time() - start < 20

"""The comparisons detect errors: wrong gate orders and planted faults exceed the tolerances."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from kinds import named
from op_calls import FLAGS, by_reference, flagged, furthest, fused, given, split

from cellstack import layers, reference
from cellstack.cells.spec import CellSpec
from cellstack.layers import cell_base

UNITS, WIDTH = 5, 3
CELLS = {
    "lstm": (layers.LSTMCell, {}),
    "coupled lstm with peepholes": (layers.LSTMCell, {"coupled": True, "peepholes": True}),
    "lstm with layer norm": (layers.LSTMCell, {"layer_norm": True, "peepholes": True}),
    "gru": (layers.GRUCell, {}),
    "gru, reset before": (layers.GRUCell, {"reset_after": False}),
    "gru with layer norm": (layers.GRUCell, {"layer_norm": True}),
}
BLOCKS = ("kernel", "recurrent_kernel", "bias", "kernel_gain", "recurrent_gain")  # arrays with one block per gate


def orders(name):
    """Every wrong order of the gates of a cell of CELLS."""
    make, flags = CELLS[name]
    right = tuple(range(len(make(1, input_size=1, **flags).spec.gates)))
    return [order for order in itertools.permutations(right) if order != right]


class Case:
    """A cell with its arrays and inputs, in which all numbers differ."""

    def __init__(self, name):
        rng = np.random.default_rng(3)
        make, flags = CELLS[name]
        self.cell = make(UNITS, input_size=WIDTH, **flags)
        self.spec = self.cell.spec
        self.arrays = {
            name: rng.normal(size=shape) * (0.5 if name == "recurrent_kernel" else 1.0)
            for name, shape in self.spec.shapes.items()
        }
        self.cell.set_weights(list(self.arrays.values()))
        self.x = rng.normal(size=(2, 6, WIDTH))
        self.state = tuple(rng.normal(size=(2, size)) / 2 for size in self.spec.state_sizes.values())
        self.options = {
            "mask": np.array([[True] * 6, [False, True, True, False, True, False]]),
            "recurrent_dropout": 2.0 * (rng.random((2, UNITS)) < 0.5),
        }

    def run(self, backwards=False, arrays=None, spec=None, state=None, **changes):
        """Return y of the layer, and of the reference with changed arguments."""
        rnn = layers.RNN(self.cell, return_sequences=True, go_backwards=backwards)
        drop = torch.tensor(self.options["recurrent_dropout"], dtype=torch.float32)
        self.cell.masks = lambda batch, steps, training: cell_base.Masks(recurrent=drop)
        with torch.no_grad():
            y = rnn(self.x, initial_state=self.state, mask=self.options["mask"])
        given = {**self.options, "reverse": backwards, **changes}
        arrays = {**self.arrays, **(arrays or {})}
        expected = reference.forward(spec or self.spec, arrays, self.x, state or self.state, **given).y
        return (y.flip(1) if backwards else y).numpy(), expected

    def permuted(self, order, names=BLOCKS):
        """The arrays of these names with their blocks in a wrong order."""
        blocks = {name: np.split(self.arrays[name], len(order), axis=-1) for name in names if name in self.arrays}
        return {name: np.concatenate([block[k] for k in order], axis=-1) for name, block in blocks.items()}


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name) for name in CELLS}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_the_comparison_holds(cases, name, backwards):
    y, expected = cases[name].run(backwards)
    assert np.abs(y - expected).max() <= tolerances.REFERENCE


def test_the_number_of_wrong_orders():
    assert {name: len(orders(name)) for name in CELLS} == dict(zip(CELLS, (23, 5, 23, 5, 5, 5), strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_each_wrong_gate_order_is_caught(cases, name):
    for order in orders(name):
        y, expected = cases[name].run(arrays=cases[name].permuted(order))
        assert np.abs(y - expected).max() > 1000 * tolerances.KERAS, order


@pytest.mark.parametrize(
    ("name", "array"),
    [(name, array) for name, (_, flags) in CELLS.items() for array in BLOCKS[: 5 if "layer_norm" in flags else 3]],
)
def test_each_wrong_gate_order_of_one_array_is_caught(cases, name, array):
    for order in orders(name):
        y, expected = cases[name].run(arrays=cases[name].permuted(order, [array]))
        assert np.abs(y - expected).max() > 1000 * tolerances.KERAS, order


@pytest.mark.parametrize("name", ["coupled lstm with peepholes", "lstm with layer norm"])
def test_each_wrong_order_of_peepholes_is_caught(cases, name):
    peepholes = cases[name].arrays["peepholes"]
    for order in list(itertools.permutations(range(len(peepholes))))[1:]:
        y, expected = cases[name].run(arrays={"peepholes": peepholes[list(order)]})
        assert np.abs(y - expected).max() > 100 * tolerances.KERAS, order


def test_exchanged_biases_of_a_gru_are_caught(cases):
    y, expected = cases["gru"].run(arrays={"bias": cases["gru"].arrays["bias"][::-1]})
    assert np.abs(y - expected).max() > 1000 * tolerances.KERAS


MUTANTS = {
    "missing bias": lambda case: {"arrays": {"bias": 0.0 * case.arrays["bias"]}},
    "mask ignored": lambda case: {"mask": None},
    "recurrent dropout ignored": lambda case: {"recurrent_dropout": None},
    "wrong direction": lambda case: {"reverse": True},
    "wrong activation": lambda case: {"spec": replace(case.spec, activation="softsign")},
    "wrong gate activation": lambda case: {"spec": replace(case.spec, recurrent_activation="hard_sigmoid")},
    "start ignored": lambda case: {"state": tuple(0.0 * part for part in case.state)},
    "stale state": lambda case: {"state": (*case.state[:-1], 0.0 * case.state[-1])},
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_faults_exceed_the_tolerances(cases, name, mutant):
    y, expected = cases[name].run(**MUTANTS[mutant](cases[name]))
    assert np.abs(y - expected).max() > 100 * tolerances.KERAS


# ── Flags ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

# Faults of the reference in place of a flag; each must show in the results and the gradients.
WITHOUT = named("faults")


def both(name, spec):
    """Results and gradients of the kernel for the cell of that name, and of the reference for `spec`."""
    there = {"zoned": False, "started": False, "masked": True, "resets": True}
    g = given([flagged(name, WIDTH, UNITS)], 2, dtype=torch.float32, **there)
    weights = dict(zip(g.specs[0].shapes, g.weights, strict=True))
    if spec.shapes.get("bias") != g.specs[0].shapes.get("bias"):  # a GRU has two, or one
        weights["bias"] = weights["bias"].sum(0)
    wrong = g._replace(specs=[spec], weights=[weights[key] for key in spec.shapes])
    (state,), (y,), *_ = split(g, fused(g))
    dy = np.random.default_rng(4).standard_normal(y.shape)
    (out,), gradients = by_reference(wrong, dy)
    got = torch.autograd.grad(y, [g.x, g.weights[0]], torch.tensor(dy, dtype=torch.float32))
    return [*state, y], [*out.state, out.y], got, gradients[:2]


@pytest.mark.parametrize("name", FLAGS)
def test_the_comparison_of_flags_holds(name):
    got, wanted, gradient, gradient_wanted = both(name, flagged(name, WIDTH, UNITS))
    assert furthest(got, wanted) <= tolerances.REFERENCE
    assert furthest(gradient, gradient_wanted) <= tolerances.REFERENCE_GRADIENT


@pytest.mark.parametrize("name", WITHOUT)
def test_a_flag_that_is_ignored_or_slightly_wrong_is_caught(name):
    spec = CellSpec(**{**flagged(name, WIDTH, UNITS).settings, **WITHOUT[name]})
    got, wanted, gradient, gradient_wanted = both(name, spec)
    assert furthest(got, wanted) > 20 * tolerances.REFERENCE
    assert furthest(gradient, gradient_wanted) > 2 * tolerances.REFERENCE_GRADIENT


# ── The backward pass ─────────────────────────────────────────────────────────────────────────────────────────────────


def plant(out, fault):
    """Plant a fault into the inputs of the reference's backward pass, and return dy."""
    dy = np.ones_like(out.y)
    if fault == "mask ignored":
        out.tape.used = np.ones_like(out.tape.used)
    if fault == "dropout ignored":
        out.tape.dropout = np.ones_like(out.tape.dropout)
    if fault == "gates swapped":
        for step in out.tape.steps:
            step.slopes = dict(zip(step.slopes, [*step.slopes.values()][::-1], strict=True))
    if fault == "last step only":
        dy[:, :-1] = 0.0
    if fault == "steps exchanged":
        out.tape.steps[2], out.tape.steps[3] = out.tape.steps[3], out.tape.steps[2]
    return dy


FAULTS = ["mask ignored", "dropout ignored", "gates swapped", "last step only", "steps exchanged"]


@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("name", CELLS)
def test_faults_in_the_backward_pass_exceed_the_tolerances(cases, name, fault):
    case = cases[name]
    leaves = [
        torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (case.x, *case.state, *case.arrays.values())
    ]
    count = len(case.state)
    x, starts, weights = leaves[0], leaves[1 : 1 + count], leaves[1 + count :]
    none = torch.empty(0)
    drops = [torch.tensor(case.options["recurrent_dropout"], dtype=torch.float32), none, none]
    mask = torch.tensor(case.options["mask"])
    text = case.spec.text
    out = torch.ops.cellstack.recurrent(x, starts, weights, drops, mask, None, [text], False, True, True, 1, False)
    out[count].sum().backward()
    forward = reference.forward(case.spec, case.arrays, case.x, case.state, **case.options)
    wanted = reference.backward(case.spec, case.arrays, forward, dy=plant(forward, fault))
    worst = furthest([leaf.grad for leaf in leaves], [wanted.x, *wanted.state, *wanted.arrays.values()])
    if fault is None:
        assert worst <= tolerances.REFERENCE_GRADIENT
    else:
        assert worst > 100 * tolerances.REFERENCE_GRADIENT

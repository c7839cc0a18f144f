"""The comparisons catch what they are there to catch: wrong gate orders and planted faults exceed the tolerances."""

import itertools

import numpy as np
import pytest
import tolerances
import torch

from cellstack import layers, reference
from cellstack.spec import GATES

ORDERS = [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]
UNITS, WIDTH = 5, 3


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.normal(size=shape)

    return {
        "x": draw(2, 6, WIDTH),
        "h0": draw(2, UNITS) / 2,
        "c0": draw(2, UNITS) / 2,
        "kernel": draw(WIDTH, 4 * UNITS),
        "recurrent_kernel": draw(UNITS, 4 * UNITS) / 2,
        "bias": draw(4 * UNITS),
        "mask": np.array([[True] * 6, [False, True, True, False, True, False]]),
        "recurrent_dropout": 2.0 * (rng.random((2, UNITS)) < 0.5),
    }


def run(given, backwards=False, **changes):
    """Return y of the layer, and of the reference with `changes` made to what it is given."""
    cell = layers.LSTMCell(UNITS)
    cell.set_weights([given[name] for name in ("kernel", "recurrent_kernel", "bias")])
    lstm = layers.RNN(cell, return_sequences=True, go_backwards=backwards)
    cell.masks = lambda batch, training: (None, torch.tensor(given["recurrent_dropout"], dtype=torch.float32))
    with torch.no_grad():
        y = lstm(given["x"], initial_state=(given["h0"], given["c0"]), mask=given["mask"])
    expected = reference.lstm_forward(**{**given, "reverse": backwards, **changes}).y
    return (y.flip(1) if backwards else y).numpy(), expected


def permuted(given, order):
    def block(w):
        return np.concatenate([np.split(w, 4, axis=-1)[k] for k in order], axis=-1)

    return {name: block(given[name]) for name in ("kernel", "recurrent_kernel", "bias")}


@pytest.mark.parametrize("backwards", [False, True])
def test_the_comparison_holds(given, backwards):
    y, expected = run(given, backwards)
    assert np.abs(y - expected).max() <= tolerances.REFERENCE


def test_there_are_four_gates():
    assert len(GATES) == 4
    assert len(ORDERS) == 23


@pytest.mark.parametrize("order", ORDERS)
def test_each_wrong_gate_order_is_caught(given, order):
    y, expected = run(given, **permuted(given, order))
    assert np.abs(y - expected).max() > 1000 * tolerances.KERAS


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel", "bias"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_wrong_gate_order_of_one_array_is_caught(given, name, order):
    y, expected = run(given, **{name: permuted(given, order)[name]})
    assert np.abs(y - expected).max() > 1000 * tolerances.KERAS


MUTANTS = {
    "missing bias": {"bias": None},
    "mask ignored": {"mask": None},
    "recurrent dropout ignored": {"recurrent_dropout": None},
    "wrong direction": {"reverse": True},
    "wrong activation": {"activation": "softsign"},
    "wrong gate activation": {"recurrent_activation": "hard_sigmoid"},
    "start ignored": {"h0": np.zeros((2, UNITS))},
    "stale c": {"c0": np.zeros((2, UNITS))},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_faults_exceed_the_tolerances(given, mutant):
    y, expected = run(given, **MUTANTS[mutant])
    assert np.abs(y - expected).max() > 100 * tolerances.KERAS


def gradients(given, fault=None):
    """Return the reference's gradients of the sum of y with one fault planted in its backward pass."""
    forward = reference.lstm_forward(**given)
    names = ("x", "h0", "c0", "kernel", "recurrent_kernel")
    kwargs = {"mask": given["mask"], "recurrent_dropout": given["recurrent_dropout"], "dy": np.ones_like(forward.y)}
    if fault == "mask ignored":
        kwargs["mask"] = None
    if fault == "dropout ignored":
        kwargs["recurrent_dropout"] = None
    if fault == "gates swapped":
        forward = forward._replace(gates=forward.gates[:, :, [1, 0, 2, 3]])
    if fault == "stale c":
        forward = forward._replace(cells=np.roll(forward.cells, 1, axis=1))
    if fault == "last step only":
        kwargs["dy"] = np.concatenate([0 * kwargs["dy"][:, :-1], kwargs["dy"][:, -1:]], axis=1)
    if fault == "other activation":
        kwargs["activation"] = "softsign"
    return reference.lstm_backward(forward, *(given[name] for name in names), **kwargs)


FAULTS = ["mask ignored", "dropout ignored", "gates swapped", "stale c", "last step only", "other activation"]


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_the_backward_pass_exceed_the_tolerances(given, fault):
    names = ("x", "h0", "c0", "kernel", "recurrent_kernel", "bias")
    leaves = [torch.tensor(given[name], dtype=torch.float32, requires_grad=True) for name in names]
    x, h0, c0, *weights = leaves
    drop = torch.tensor(given["recurrent_dropout"], dtype=torch.float32)
    mask = torch.tensor(given["mask"])
    out = torch.ops.cellstack.lstm(x, [h0], [c0], weights, [drop], mask, [1, 0], False, True, True, 1)
    out[2].sum().backward()
    expected = gradients(given, fault)

    def scale(wanted):
        return max(1.0, np.abs(wanted).max())

    worst = max(
        np.abs(leaf.grad.numpy() - wanted).max() / scale(wanted) for leaf, wanted in zip(leaves, expected, strict=True)
    )
    if fault is None:
        assert worst <= tolerances.REFERENCE_GRADIENT
    else:
        assert worst > 100 * tolerances.REFERENCE_GRADIENT

"""Parity with Keras 3 over random configurations of every argument and kind, outputs and gradients.

Where we deliberately part from Keras the cases avoid it, and `test_layers_traps` tests what we do instead:
leading masked steps with a start other than zero (Keras emits zeros, we emit the initial h); stacks of one cell
(Keras fails); recurrent dropout (Keras draws one mask a gate, we draw one; here all are set equal). Two cases where
Keras fails of itself are left out: gradients through a stateful call, and a stateful Bidirectional with
return_state.
"""

import inspect
import itertools

import keras
import numpy as np
import pytest
import tolerances
import torch
from keras.src.backend.common import dtypes as keras_dtypes

from cellstack import layers
from cellstack.layers.cell_base import NO_MASKS, Cell, Masks

CASES = 450
ACTIVATIONS = ["tanh", "sigmoid", "linear", "relu", "hard_sigmoid", "softsign", "softplus", "elu", "gelu", "silu"]
GATE_ACTIVATIONS = ["tanh", "sigmoid", "relu", "hard_sigmoid", "softsign"]
SIZES = ("cells", "units", "batch", "steps", "width")
BOUNDED = {"tanh", "sigmoid", "hard_sigmoid", "softsign"}


def draw(seed):
    rng = np.random.default_rng(seed)

    def flag(p=0.5):
        return bool(rng.random() < p)

    kind = ["alone", "stack", "bidirectional", "bidirectional stack"][seed % 4]
    depth = int(rng.integers(2, 4)) if "stack" in kind else 1

    def cell(family):
        given = {
            "units": int(rng.integers(1, 20)),
            "activation": str(rng.choice(ACTIVATIONS)) if flag() else "tanh",
            "use_bias": flag(0.8),
            "dropout": float(rng.choice([0.0, 0.0, 0.3])),
            "recurrent_dropout": float(rng.choice([0.0, 0.0, 0.4])),
        }
        if family != "SimpleRNN":
            gates = (
                GATE_ACTIVATIONS if family == "LSTM" else sorted(BOUNDED)
            )  # a GRU multiplies z and h: unbounded activations give h², h⁴, …
            given["recurrent_activation"] = str(rng.choice(gates)) if flag() else "sigmoid"
        return given | {"LSTM": {"unit_forget_bias": flag()}, "GRU": {"reset_after": flag()}}.get(family, {})

    families = [["LSTM", "GRU", "SimpleRNN"][int(rng.integers(3))] for _ in range(depth)]
    case = {
        "kind": kind,
        "families": families,
        "cells": [cell(family) for family in families],
        "return_sequences": flag(),
        "return_state": flag(),
        "go_backwards": flag() and "bidirectional" not in kind,  # which Keras's Bidirectional refuses
        "stateful": flag(0.3),
        "zero_output_for_mask": flag(),
        "masked": flag(),
        "started": flag(),
        "training": flag(),
        "merge_mode": [None, "concat", "sum", "mul", "ave"][int(rng.integers(5))],
        "batch": int(rng.integers(1, 5)),
        "steps": int(rng.integers(1, 7)),
        "width": int(rng.integers(1, 20)),
    }
    case["unroll"] = flag(0.2) and not case["masked"]  # masks of unrolled backward layers fail in Keras
    if "bidirectional" in kind and case["stateful"]:
        case["return_state"] = False  # Keras's compute_mask fails
    # Unbounded values lose digits in float32 in both libraries: compare these cases in float64.
    bounded = {value for c in case["cells"] for name, value in c.items() if name.endswith("activation")} <= BOUNDED
    case["dtype"] = "float32" if bounded else "float64"
    return case, rng


def build(module, case):
    dtype = {"dtype": case["dtype"]}
    theirs = dtype if module is keras.layers else {}  # each Keras layer casts its inputs to its dtype
    flags = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")
    flags = {name: case[name] for name in flags}
    if "stack" in case["kind"]:
        pairs = zip(case["families"], case["cells"], strict=True)
        stack = module.StackedRNNCells(
            [getattr(module, f"{family}Cell")(**cell, **dtype) for family, cell in pairs], **theirs
        )
        layer = module.RNN(stack, **flags, **theirs)
    else:
        layer = getattr(module, case["families"][0])(**case["cells"][0], **flags, **dtype)
    if "bidirectional" not in case["kind"]:
        return layer
    return module.Bidirectional(layer, case["merge_mode"], **theirs)


def cells_of(layer):
    if hasattr(layer, "forward_layer"):
        return [*cells_of(layer.forward_layer), *cells_of(layer.backward_layer)]
    return list(getattr(layer.cell, "cells", [layer.cell]))


def flatten(results):
    if isinstance(results, (list, tuple)):
        return [part for result in results for part in flatten(result)]
    return [results]


def distance(a, b):
    """Return the largest difference, relative to the largest entry if that is above 1."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def draw_masks(cells, batch, rng, dtype):
    def scaled(rate, width):
        return (rng.random((batch, width)) >= rate) / (1 - rate)

    return [
        Masks(
            *(
                torch.tensor(scaled(rate, width), dtype=dtype) if rate else None
                for rate, width in ((cell.dropout, cell.kernel.shape[0]), (cell.recurrent_dropout, cell.units))
            )
        )
        for cell in cells
    ]


def pairs(seed):
    """All pairs of settings of a case: those of its call and of its first cell."""
    case, _ = draw(seed)
    settings = {**case, **case["cells"][0], "families": case["families"][0]}
    settings = [(name, str(value)) for name, value in settings.items() if name not in SIZES]
    return set(itertools.combinations(settings, 2))


def seeds():
    """Yield every seed; those that add few pairs of settings are marked slow."""
    met = set()
    for seed in range(CASES):
        new = pairs(seed) - met
        quick = len(new) > 3
        if quick:
            met |= new
        yield pytest.param(seed, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("seed", list(seeds()))
def test_outputs_and_gradients_are_keras(seed, monkeypatch):
    # Like JAX, Keras computes float64 products in float32 by default; change that here.
    monkeypatch.setattr(keras_dtypes, "BIT64_TO_BIT32_DTYPE", {})
    case, rng = draw(seed)
    bound = {"float32": tolerances.KERAS, "float64": tolerances.KERAS_DOUBLE}[case["dtype"]]
    batch, steps, width = case["batch"], case["steps"], case["width"]
    ours, theirs = build(layers, case), build(keras.layers, case)
    ours.build(width)
    theirs.build((batch, steps, width))
    dtype = getattr(torch, case["dtype"])
    weights = [rng.normal(size=w.shape, scale=0.7 * w.shape[0] ** -0.5).astype(np.float32) for w in ours.parameters()]
    ours.set_weights(weights)
    assert len(weights) == len(theirs.trainable_weights)
    for variable, weight in zip(theirs.trainable_weights, weights, strict=True):
        variable.assign(weight)
    states = [
        [rng.normal(size=(batch, cell["units"])) for _ in ("hc" if family == "LSTM" else "h")]
        for _ in range(1 + ("bidirectional" in case["kind"]))
        for family, cell in zip(case["families"], case["cells"], strict=True)
    ]

    def make():
        return [[torch.tensor(a, dtype=dtype, requires_grad=True) for a in state] for state in states]

    starts = [make(), make()] if case["started"] else [None, None]

    drops = {}
    our_cells, their_cells = cells_of(ours), cells_of(theirs)
    monkeypatch.setattr(Cell, "masks", lambda self, batch, steps, training: drops[id(self)] if training else NO_MASKS)
    gradients = [[], []]
    for call in range(2 if case["stateful"] else 1):
        x = rng.normal(size=(batch, steps, width))
        mask = rng.random((batch, steps)) < 0.6 if case["masked"] else None
        if mask is not None and (case["started"] or call):
            mask[:, 0] = mask[:, -1] = True  # the first steps of both directions: see above
        results = []
        drawn = draw_masks(our_cells, batch, rng, dtype)
        for ours_cell, theirs_cell, masks in zip(our_cells, their_cells, drawn, strict=True):
            drops[id(ours_cell)] = masks
            count = getattr(theirs_cell, "dropout_mask_count", None)  # number of masks; None: one for all gates
            theirs_cell._dropout_mask, theirs_cell._recurrent_dropout_mask = (
                mask if mask is None or count is None else [mask] * count for mask in masks[:2]
            )
        for which, (layer, start) in enumerate(zip((ours, theirs), starts, strict=True)):
            nested = start if "stack" in case["kind"] else start and flatten(start)
            given = torch.tensor(x, dtype=dtype, requires_grad=True)
            kwargs = {"training": case["training"], "mask": None if mask is None else torch.tensor(mask)}
            if nested and not call:
                kwargs["initial_state"] = nested
            parts = flatten(layer(given, **kwargs))
            coefficients = np.random.default_rng(seed)
            loss = sum((part * torch.tensor(coefficients.normal(size=part.shape), dtype=dtype)).sum() for part in parts)
            parameters = list(ours.parameters()) if which == 0 else [v.value for v in theirs.trainable_weights]
            leaves = [*parameters, given, *(flatten(start) if start and not call else [])]
            if not case["stateful"]:
                gradients[which] = torch.autograd.grad(loss, leaves, allow_unused=True)
            results.append(parts)
        assert len(results[0]) == len(results[1])
        for our, their in zip(*results, strict=True):
            assert our.shape == their.shape
            assert distance(our, their) <= bound, case
        for our, their in zip(*gradients, strict=True):
            if our is None or their is None:
                assert not any(g is not None and g.abs().max() > 0 for g in (our, their))
                continue
            assert distance(our, their) <= bound, case


@pytest.mark.parametrize(
    ("name", "flags"),
    [("LSTMCell", {}), ("GRUCell", {}), ("GRUCell", {"reset_after": False}), ("SimpleRNNCell", {})],
)
def test_a_cell_equals_that_of_keras(name, flags, rng):
    ours, theirs = getattr(layers, name)(5, input_size=3, **flags), getattr(keras.layers, name)(5, **flags)
    theirs.build((2, 3))
    ours.set_weights([rng.normal(size=w.shape) for w in ours.get_weights()])
    theirs.set_weights(ours.get_weights())
    x = torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32)
    state = [torch.tensor(rng.normal(size=(2, 5)), dtype=torch.float32) for _ in ("hc" if name == "LSTMCell" else "h")]
    for _ in range(3):
        out, mine = ours(x, state)
        expected, its = theirs(x, state)
        for a, b in zip([out, *mine], [expected, *its], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerances.KERAS)
        state = [part.detach() for part in mine]


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"])
def test_arguments_have_the_order_of_keras(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (layers, keras.layers))
    theirs = [key for key in theirs if key not in ("kwargs", "use_cudnn")]
    assert [key for key in ours if key in theirs] == theirs
    assert list(ours)[: len(theirs)] == theirs
    for key in theirs:
        assert ours[key].default == inspect.signature(getattr(keras.layers, name)).parameters[key].default


def test_time_distributed_is_keras(rng):
    dense = keras.layers.Dense(5)
    theirs = keras.layers.TimeDistributed(dense)
    theirs.build((2, 3, 4))
    linear = torch.nn.Linear(4, 5)
    with torch.no_grad():
        dense.kernel.assign(linear.weight.t())
        dense.bias.assign(linear.bias)
    x = torch.tensor(rng.normal(size=(2, 3, 4)), dtype=torch.float32)
    torch.testing.assert_close(layers.TimeDistributed(linear)(x), theirs(x), rtol=0, atol=tolerances.KERAS)


@pytest.mark.parametrize("name", ["glorot_uniform", "glorot_normal", "he_uniform", "he_normal", "lecun_normal"])
def test_initialisers_have_the_spread_of_keras(name):
    ours = layers.LSTMCell(64, kernel_initializer=name, input_size=50).get_weights()[0]
    theirs = np.asarray(keras.initializers.get(name)((50, 256)))
    assert abs(ours.std() / theirs.std() - 1.0) < 0.05
    if "uniform" in name:  # some of Keras's truncated normal values aren't truncated
        assert abs(np.abs(ours).max() / np.abs(theirs).max() - 1.0) < 0.02


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("regularizers", "l1"),
        ("regularizers", "l2"),
        ("regularizers", {"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}}),
        ("constraints", "max_norm"),
        ("constraints", "non_neg"),
        ("constraints", "unit_norm"),
        ("constraints", {"class_name": "MinMaxNorm", "config": {"min_value": 0.5, "max_value": 0.9, "rate": 0.5}}),
    ],
)
def test_regularisers_and_constraints_are_keras(kind, given, rng):
    w = (3 * rng.normal(size=(4, 20))).astype(np.float32)
    argument = "kernel_regularizer" if kind == "regularizers" else "kernel_constraint"
    cell = layers.LSTMCell(5, input_size=4, **{argument: given})
    cell.set_weights([w, *cell.get_weights()[1:]])
    expected = getattr(keras, kind).get(given)(torch.tensor(w))
    if kind == "regularizers":
        torch.testing.assert_close(cell.losses[0], expected)
    else:
        cell.apply_constraints()
        torch.testing.assert_close(cell.kernel.detach(), expected)

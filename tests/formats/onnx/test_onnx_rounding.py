"""Cells in which rounding errors grow with every step: the kernel is as far from float64 as ONNX Runtime is.

Over many steps, results of such cells differ by as much as they vary. Two properties tell this from an error: each step
alone, from the same states, is correct; and the differences aren't greater than those of float64 computations whose
states are changed by about a rounding error of float32 in every step.
"""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import tolerances
from onnx import TensorProto, helper, numpy_helper

from cellstack.onnxruntime import InferenceSession

STEPS, BATCH, WIDTH, UNITS = 66, 3, 8, 24
ROUNDING = 2.0**-22  # a few rounding errors of float32, which a step has
NOISE = 8  # computations with such changes
TIMES = 30  # how much greater than theirs a difference may be: that of an early step determines all later ones
GROWN = 10 * tolerances.NETWORK  # a difference that is certainly more than rounding
SMALL = 100.0  # states up to which a step is compared: greater ones cancel out in its sums
FUNCTIONS: dict[str, Any] = {
    "Tanh": np.tanh,
    "Elu": lambda z: np.where(z < 0, np.expm1(np.minimum(z, 0)), z),
    "Softsign": lambda z: z / (1 + np.abs(z)),
}
CASES = {  # kind, activations, the deviation of the weights
    "GRU, Tanh": ("GRU", ["Tanh", "Tanh"], 0.25),
    "GRU, Softsign": ("GRU", ["Softsign", "Tanh"], 0.6),
    "LSTM, Elu": ("LSTM", ["Elu", "Elu", "Tanh"], 0.28),
    "RNN, Tanh": ("RNN", ["Tanh"], 1.0),
}


def step(cell, x, *states):
    """Return the states after a step, in float64, by ONNX's equations with linear_before_reset 0."""
    kind, weights, activations = cell
    W, R, B = (weights[name][0].astype(float) for name in "WRB")
    f, *others = (FUNCTIONS[name] for name in activations)
    h, *_ = states
    bias, recurrent_bias = np.split(B, 2)
    of_x, of_h = x @ W.T + bias, h @ R.T + recurrent_bias
    if kind == "RNN":
        return (f(of_x + of_h),)
    if kind == "LSTM":
        i, o, forget, c = np.split(of_x + of_h, 4, axis=-1)
        c = f(forget) * states[1] + f(i) * others[0](c)
        return f(o) * others[1](c), c
    z, r = f(of_x + of_h)[..., :UNITS], f(of_x + of_h)[..., UNITS : 2 * UNITS]
    new = others[0](of_x[..., 2 * UNITS :] + (r * h) @ R[2 * UNITS :].T + recurrent_bias[2 * UNITS :])
    return ((1 - z) * new + z * h,)


def all_states(cell, x, noise: Any = None):
    """Return the states before and after each step, [T + 1, B, H] each, in float64; `noise` changes them."""
    states = (np.zeros((x.shape[1], UNITS)),) * (2 if cell[0] == "LSTM" else 1)
    every = [states]
    for row in x.astype(float):
        states = step(cell, row, *states)
        if noise:
            states = tuple(state * (1 + ROUNDING * noise.uniform(-1, 1, state.shape)) for state in states)
        every.append(states)
    return [np.stack(one) for one in zip(*every, strict=True)]


def sessions(cell) -> tuple[Any, Any]:
    """Return our session and ONNX Runtime's, of an operator whose initial states are inputs and final ones outputs."""
    kind, weights, activations = cell
    names = ["h", "c"][: 2 if kind == "LSTM" else 1]
    inputs, outputs = ["X", "W", "R", "B", "", *names], ["Y", *(f"{name}_after" for name in names)]
    alphas = [1.0] * activations.count("Elu")
    more = {"activation_alpha": alphas} if alphas else {}
    node = helper.make_node(kind, inputs, outputs, "cell", hidden_size=UNITS, activations=activations, **more)
    taken = {"X": ["T", "B", WIDTH]} | {name: [1, "B", UNITS] for name in names}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in taken.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    ours = InferenceSession(file)
    assert "fused cpu kernel" in ours.plan()[0]
    return ours, onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def random_cell(case, seed):
    """Return a cell as (kind, weights, activations), and its input."""
    kind, activations, deviation = CASES[case]
    rng = np.random.default_rng(seed)
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * UNITS
    shapes = {"W": (1, rows, WIDTH), "R": (1, rows, UNITS), "B": (1, 2 * rows)}
    weights = {name: rng.normal(0, deviation, shape).astype("f4") for name, shape in shapes.items()}
    return (kind, weights, activations), rng.normal(size=(STEPS, BATCH, WIDTH)).astype("f4")


def of_single_steps(session, cell, x):
    """The greatest difference of a session from float64 after one step from each of the states of float64."""
    before = [state[:-1].reshape(-1, UNITS).astype("f4") for state in all_states(cell, x)]
    small = np.all([np.abs(state).max(axis=1) < SMALL for state in before], axis=0)
    before, rows = [state[small] for state in before], x.reshape(-1, WIDTH)[small]
    assert len(rows) > STEPS
    expected = step(cell, rows.astype(float), *(state.astype(float) for state in before))
    fed = {"X": rows[None]} | {name: state[None] for name, state in zip("hc", before, strict=False)}
    differences = [
        np.abs(found[0] - state) / np.maximum(1, np.abs(state).max(axis=1, keepdims=True))
        for found, state in zip(session.run(None, fed)[1:], expected, strict=True)
    ]
    return np.max(differences)


def of_all_steps(session, cell, x):
    """A session's y after all steps, and its greatest differences from float64, divided by those that noise has."""
    exact = all_states(cell, x)
    start = {name: np.zeros((1, BATCH, UNITS), "f4") for name, _ in zip("hc", exact, strict=False)}
    y = session.run(None, {"X": x} | start)[0][:, 0]

    def until_each_step(y):
        return np.maximum.accumulate(np.abs(y - exact[0][1:]).max(axis=(1, 2)))

    noisy = [all_states(cell, x, np.random.default_rng(n))[0][1:] for n in range(NOISE)]
    return y, (until_each_step(y) / np.max([until_each_step(one) for one in noisy], axis=0)).max()


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
@pytest.mark.parametrize("case", CASES)
def test_rounding_errors_grow_as_in_onnxruntime(case, seed):
    cell, x = random_cell(case, seed)
    ys = []
    for session in sessions(cell):
        assert of_single_steps(session, cell, x) < tolerances.NETWORK
        y, times = of_all_steps(session, cell, x)
        assert times < TIMES
        ys.append(y)
    assert np.abs(ys[0] - ys[1]).max() > GROWN * np.abs(ys[1]).max()  # otherwise, nothing has grown


@pytest.mark.parametrize("case", CASES)
def test_an_error_exceeds_both_bounds(case):
    cell, x = random_cell(case, 0)
    kind, weights, activations = cell
    wrong = weights | {"W": weights["W"] * np.float32(1 + 1e-4)}
    for session in sessions((kind, wrong, activations)):
        assert of_single_steps(session, cell, x) > tolerances.NETWORK
        assert of_all_steps(session, cell, x)[1] > TIMES

"""minGRU and minLSTM in the kernel: their equations, and their gradients compared with finite differences."""

import math

import numpy as np
import pytest

from cellstack import _kernel, native

SIGMOID, TANH, SIGMOID_LINEAR = 0, 1, 12
GATES = {"mingru": 2, "minlstm": 3}
FLAGS = {
    "plain": {},
    "clip": {"clip": 0.8},
    "zoneout": {"zoneout": 0.3},
    "layer_norm": {"layer_norm": True},
    "tanh": {"candidate": TANH},
    "all": {"clip": 1.2, "zoneout": 0.2, "layer_norm": True},
}


@pytest.fixture(params=_kernel.isas())
def isa(request):
    _kernel.set_isa(request.param)
    yield request.param
    _kernel.set_isa("")


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def activation(code, v):
    if code == TANH:
        return np.tanh(v)
    return np.where(v >= 0, v + 0.5, sigmoid(v))


def describe(kind, width, units, candidate=SIGMOID_LINEAR, layer_norm=False, clip=math.inf, zoneout=0.0, rows=False):
    codes = [(code, 0.0, 0.0) for code in (*[SIGMOID] * (GATES[kind] - 1), candidate)]
    flags = {"layer_norm": float(layer_norm), "norm_epsilon": 1e-2, "clip": clip, "zoneout": zoneout}
    return _kernel.Description(kind, width, units, units, codes, flags, rows)


def make(kind, flags, batch=3, steps=6, width=4, units=5, dtype=np.float64):
    rng = np.random.default_rng(3)
    new = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    columns = GATES[kind] * units
    arrays = {"kernel": new(width, columns), "bias": new(columns), "initial_h": new(units)}
    if flags.get("layer_norm"):
        arrays["kernel_gain"] = 1 + 0.3 * new(columns)
    case = {"x": new(batch, steps, width), "h": new(batch, units)}
    case["mask"], case["reset"] = rng.random((batch, steps)) < 0.8, rng.random((batch, steps)) < 0.2
    return arrays, case


def by_equations(kind, flags, arrays, case):
    x, h, (batch, steps, _) = case["x"], case["h"], case["x"].shape
    z = x @ arrays["kernel"]
    if flags.get("layer_norm"):
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-2) * arrays["kernel_gain"]
    z = np.clip(z + arrays["bias"], -flags.get("clip", math.inf), flags.get("clip", math.inf))
    *keeps, g = np.split(z, GATES[kind], axis=-1)
    gates = np.stack([*map(sigmoid, keeps), activation(flags.get("candidate", SIGMOID_LINEAR), g)], 2)
    gates *= case["mask"][:, :, None, None]
    y = np.empty((batch, steps, h.shape[1]))
    for t in range(steps):
        h = np.where(case["reset"][:, t, None], arrays["initial_h"], h)
        if kind == "mingru":
            z, g = gates[:, t].swapaxes(0, 1)
            new = (1 - z) * h + z * g
        else:
            i, f, g = gates[:, t].swapaxes(0, 1)
            with np.errstate(invalid="ignore"):  # at masked steps
                new = (f * h + i * g) / (f + i)
        new = flags.get("zoneout", 0.0) * h + (1 - flags.get("zoneout", 0.0)) * new
        h = y[:, t] = np.where(case["mask"][:, t, None], new, h)
    return y, gates, h


def run(kind, flags, arrays, case, threads=1, copy=True, element=None):
    x, h = case["x"], case["h"]
    (batch, steps, width), units = x.shape, h.shape[1]
    new = lambda *shape: np.full(shape, np.nan, x.dtype)  # noqa: E731
    found = {
        "y": new(batch, steps, units),
        "gates": new(batch, steps, GATES[kind], units),
        "after": [new(batch, units)],
    }
    if flags.get("layer_norm"):
        found["intermediate"] = new(batch, steps, GATES[kind] * units + 2)
    what = describe(kind, width, units, **flags)
    weights = native.weights_at(what, element or x.dtype.name, native.in_order(arrays), copy)
    sequences = native.sequences(x, case["mask"], case["reset"])
    native.forward(sequences, [native.Layer(weights, [h], **found)], threads)
    return found


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.usefixtures("isa")
def test_results_follow_the_equations(kind, flags):
    arrays, case = make(kind, FLAGS[flags])
    y, gates, h = by_equations(kind, FLAGS[flags], arrays, case)
    for copy in (True, False):
        found = run(kind, FLAGS[flags], arrays, case, copy=copy)
        for got, expected in ((found["y"], y), (found["gates"], gates), (found["after"][0], h)):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        assert np.isfinite(found.get("intermediate", np.zeros(1))).all()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("flags", FLAGS)
def test_gradients_are_those_of_finite_differences(kind, flags, again):
    arrays, case = make(kind, FLAGS[flags])
    found = run(kind, FLAGS[flags], arrays, case)
    rng = np.random.default_rng(4)
    dy, dh, dgates = (rng.standard_normal(a.shape) for a in (found["y"], found["after"][0], found["gates"]))

    def loss():
        out = run(kind, FLAGS[flags], arrays, case)
        return (out["y"] * dy).sum() + (out["after"][0] * dh).sum() + (out["gates"] * dgates).sum()

    what = describe(kind, case["x"].shape[2], case["h"].shape[1], **FLAGS[flags])
    weights = native.weights_at(what, "float64", native.in_order(arrays), False)
    kept = {"y": found["y"]} if again else {name: found.get(name) for name in ("y", "gates", "intermediate")}
    into = {name: np.full_like(array, np.nan) for name, array in (*arrays.items(), *list(case.items())[:2])}
    gradients = native.Gradients(
        dy,
        [dh],
        dgates,
        dx=into["x"],
        dbefore=[into["h"]],
        arrays=native.in_order({name: into[name] for name in arrays}),
    )
    native.backward(
        native.sequences(case["x"], case["mask"], case["reset"]),
        [native.Layer(weights, [case["h"]], **kept)],
        [gradients],
        1,
    )
    for name, gradient in into.items():
        array = arrays.get(name, case.get(name))
        for place in np.ndindex(array.shape):
            before = array[place]
            ends = []
            for step in (1e-6, -1e-6):
                array[place] = before + step
                ends.append(loss())
            array[place] = before
            np.testing.assert_allclose(gradient[place], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.usefixtures("isa")
def test_threads_formats_and_streams_agree(kind):
    arrays, case = make(kind, {}, batch=9, steps=40, width=96, units=130, dtype=np.float32)
    one = run(kind, {}, arrays, case)
    for threads in (2, 3):
        for name, array in run(kind, {}, arrays, case, threads).items():
            np.testing.assert_array_equal(array, one[name])
    for element in ("bfloat16", "int8"):
        assert np.abs(run(kind, {}, arrays, case, element=element)["y"] - one["y"]).max() < 2.0
    weights = native.weights_at(describe(kind, 96, 130), "float32", native.in_order(arrays), True)
    whole = run(kind, {}, arrays, {**case, "mask": None, "reset": None})["y"]
    for threads in (1, 2):
        stream = native.stream([weights], 9, threads)
        stream.set_state(0, [case["h"]])
        parts = [stream.run(case["x"][:, :7].copy()), stream.step(case["x"][:, 7].copy())[:, None]]
        parts.append(stream.run(case["x"][:, 8:].copy()))
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind nonsense"):
        _kernel.Description("nonsense", 1, 1, 1, [], {})

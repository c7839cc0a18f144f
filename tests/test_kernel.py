"""The kernel against the law (reference.py), on every instruction set of the machine."""

import itertools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import kernel_calls as native
import numpy as np
import pytest
import tolerances

from cellstack import _kernel, reference
from cellstack.spec import ACTIVATIONS

SIGMAS = ("sigmoid", "hard_sigmoid", "linear", "relu")


@pytest.fixture(params=_kernel.isas())
def isa(request):
    before = _kernel.isa()
    _kernel.set_isa(request.param)
    yield request.param
    _kernel.set_isa(before)


def make(seed, batch, steps, width, units, dtype=np.float32):
    rng = np.random.default_rng(seed)
    new = lambda *shape, scale=1.0: (rng.standard_normal(shape) * scale).astype(dtype)  # noqa: E731
    return {
        "x": new(batch, steps, width),
        "h0": new(batch, units, scale=0.5),
        "c0": new(batch, units),
        "kernel": new(width, 4 * units, scale=width**-0.5),
        "recurrent_kernel": new(units, 4 * units, scale=units**-0.5),
        "bias": new(4 * units, scale=0.3),
    }, rng


def in_float64(arrays):
    return {name: a.astype(np.float64) for name, a in arrays.items()}


def assert_same(got, expected, tolerance):
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert a.shape == b.shape, name
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 3, 4),
    (2, 3, 6, 5),
    (1, 70, 5, 16),
    (1, 9, 8, 17),
    (3, 11, 7, 33),
    (5, 4, 20, 64),
    (6, 7, 12, 32),
    (7, 6, 16, 48),
    (13, 5, 9, 40),
    (32, 3, 30, 20),
    (70, 2, 3, 7),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["onward", "reverse"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_forward_and_backward_follow_the_reference(isa, shape, dtype, reverse, masked):
    arrays, rng = make(hash(shape) % 1000, *shape, dtype)
    batch, steps, _, units = shape
    new = lambda *s: rng.standard_normal(s).astype(dtype)  # noqa: E731
    flags = {"reverse": reverse, "mask": rng.random((batch, steps)) < 0.7 if masked else None}
    if masked:
        flags["recurrent_dropout"] = ((rng.random((batch, units)) < 0.6) / 0.6).astype(dtype)
    law_flags = {k: v.astype(np.float64) if k == "recurrent_dropout" else v for k, v in flags.items()}
    law_arrays = in_float64(arrays)
    expected = reference.lstm_forward(**law_arrays, **law_flags)
    got = native.forward(**arrays, **flags, threads=2)
    assert_same(got, expected, tolerances.KERNEL[np.dtype(dtype).name])

    d = {
        "dy": new(batch, steps, units),
        "dh": new(batch, units),
        "dc": new(batch, units),
        "dgates": new(batch, steps, 4, units),
        "dcells": new(batch, steps, units),
    }
    del arrays["bias"], law_arrays["bias"]
    law_gradients = reference.lstm_backward(expected, **law_arrays, **in_float64(d), **law_flags)
    assert_same(
        native.backward(got, **arrays, **d, **flags, threads=2),
        law_gradients,
        tolerances.KERNEL_GRADIENT * tolerances.KERNEL[np.dtype(dtype).name],
    )


@pytest.mark.parametrize(("phi", "sigma"), [*itertools.product(ACTIVATIONS, SIGMAS)])
def test_every_activation(isa, phi, sigma):
    arrays, rng = make(7, 3, 6, 5, 9, np.float64)
    flags = {"activation": phi, "recurrent_activation": sigma}
    expected = reference.lstm_forward(**arrays, **flags)
    got = native.forward(**arrays, **flags)
    assert_same(got, expected, tolerances.KERNEL_ACTIVATIONS)
    dy = rng.standard_normal(got.y.shape)
    del arrays["bias"]
    law = reference.lstm_backward(expected, **arrays, dy=dy, **flags)
    assert_same(
        native.backward(got, **arrays, dy=dy, **flags), law, tolerances.KERNEL_GRADIENT * tolerances.KERNEL_ACTIVATIONS
    )


def test_bits_do_not_depend_on_batch_chunks_or_threads(isa):
    arrays, _ = make(3, 9, 150, 10, 35)
    whole = native.forward(**arrays, threads=1)
    for threads in (2, 3, 4):
        for a, b in zip(whole, native.forward(**arrays, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)
    for row in (0, 8):
        own = {k: v[row : row + 1].copy() if k in ("x", "h0", "c0") else v for k, v in arrays.items()}
        np.testing.assert_array_equal(native.forward(**own).y, whole.y[row : row + 1])
    state, first = (arrays["h0"], arrays["c0"]), 0
    for size in (1, 1, 2, 7, 64, 75):
        part = native.forward(**{**arrays, "x": arrays["x"][:, first : first + size], "h0": state[0], "c0": state[1]})
        np.testing.assert_array_equal(part.y, whole.y[:, first : first + size])
        state, first = (part.h, part.c), first + size
    assert first == 150


def test_gradients_have_the_same_bits_on_any_number_of_threads(isa):
    arrays, rng = make(4, 9, 40, 10, 35)
    out = native.forward(**arrays)
    dy = rng.standard_normal(out.y.shape).astype(np.float32)
    del arrays["bias"]
    one = native.backward(out, **arrays, dy=dy, threads=1)
    for threads in (2, 5):
        for a, b in zip(one, native.backward(out, **arrays, dy=dy, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_stack_is_its_layers_one_after_the_other(isa, batch, threads):
    rng = np.random.default_rng(5)
    widths = [6, 20, 33, 8]
    cells, states = [], []
    for seed, (width, units) in enumerate(itertools.pairwise(widths)):
        arrays, _ = make(seed, batch, 1, width, units)
        cells.append((arrays["kernel"], arrays["recurrent_kernel"], arrays["bias"], "tanh", "sigmoid"))
        states.append((arrays["h0"], arrays["c0"]))
    x = rng.standard_normal((batch, 200, 6)).astype(np.float32)
    outs = native.forward_stack(x, cells, states, threads=threads, save=False)
    for cell, state, out in zip(cells, states, outs, strict=True):
        alone = native.forward(x, *state, *cell[:3])
        np.testing.assert_array_equal(alone.y, out.y)
        np.testing.assert_array_equal(alone.c, out.c)
        x = alone.y


def test_a_strided_input_is_read_in_place(isa):
    arrays, _ = make(6, 4, 12, 7, 10)
    time_major = np.ascontiguousarray(arrays["x"].transpose(1, 0, 2)).transpose(1, 0, 2)
    assert not time_major.flags.c_contiguous
    np.testing.assert_array_equal(native.forward(**{**arrays, "x": time_major}).y, native.forward(**arrays).y)


@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do(isa, batch, steps):
    arrays, _ = make(1, batch, steps, 3, 4)
    out = native.forward(**arrays, threads=2)
    np.testing.assert_array_equal(out.h, arrays["h0"])
    del arrays["bias"]
    grads = native.backward(out, **arrays, dh=np.ones_like(arrays["h0"]), threads=2)
    assert (grads.kernel == 0).all()
    assert (grads.bias == 0).all()
    np.testing.assert_array_equal(grads.h0, np.ones_like(arrays["h0"]))


def test_linear_mode_is_exact(isa):
    """With identity activations and small integers, float32 arithmetic is exact: the layout is compared bit for bit."""
    rng = np.random.default_rng(8)
    integers = lambda *shape: rng.integers(-1, 2, shape).astype(np.float32)  # noqa: E731
    x, h0, c0 = integers(3, 3, 4), integers(3, 19), integers(3, 19)
    weights = (integers(4, 76), integers(19, 76), integers(76))
    flags = {"activation": "linear", "recurrent_activation": "linear"}
    sparse = [w * (rng.random(w.shape) < 0.15) for w in weights]
    got = native.forward(x, h0, c0, *(w.astype(np.float32) for w in sparse), **flags)
    law = reference.lstm_forward(*(a.astype(np.float64) for a in (x, h0, c0, *sparse)), **flags)
    assert np.abs(law.gates).max() > 3
    assert max(np.abs(a).max() for a in law) < 2**24
    for a, b in zip(got, law, strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_23_wrong_gate_orders_are_seen(isa):
    arrays, _ = make(9, 2, 4, 3, 5)
    expected = reference.lstm_forward(**in_float64(arrays))
    for order in itertools.permutations(range(4)):
        swapped = dict(arrays)
        for name in ("kernel", "recurrent_kernel", "bias"):
            blocks = np.split(arrays[name], 4, axis=-1)
            swapped[name] = np.ascontiguousarray(np.concatenate([blocks[k] for k in order], axis=-1))
        wrong = np.abs(native.forward(**swapped).y - expected.y).max()
        assert (wrong < tolerances.KERNEL["float32"]) == (order == (0, 1, 2, 3)), order


def test_long_sequence_in_single_precision(isa):
    arrays, _ = make(10, 1, 1000, 16, 64)
    law = reference.lstm_forward(**in_float64(arrays))
    assert np.abs(native.forward(**arrays).y - law.y).max() < tolerances.REFERENCE


def test_nan_weights_give_nan(isa):
    arrays, _ = make(11, 2, 3, 4, 5)
    arrays["kernel"][0, 0] = np.nan
    out = native.forward(**arrays)
    assert np.isnan(out.gates[:, 0, 0, 0]).all()
    assert np.isfinite(out.gates[:, 0, 1]).all()


# Largest error in units of the last place. Every float32 is too many for each run; these are a million of them, over
# all magnitudes at which the result is normal, and the two functions' own hard places.
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_are_within_four_ulp(isa, name, dtype):
    rng = np.random.default_rng(12)
    magnitude = np.exp(rng.uniform(np.log(1e-30), np.log(87.0), 500_000))
    x = np.concatenate([magnitude, -magnitude, np.linspace(-20, 20, 100_001), [0.0, -0.0]]).astype(dtype)
    y = np.empty_like(x)
    _kernel.activate(ACTIVATIONS.index(name), x, y)
    exact = x.astype(np.longdouble)
    exact = np.tanh(exact) if name == "tanh" else 1 / (1 + np.exp(-exact))
    ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    assert (np.abs(y - exact) / ulp).max() < 4


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_at_the_ends(isa, name):
    x = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan], np.float32)
    y = np.empty_like(x)
    _kernel.activate(ACTIVATIONS.index(name), x, y)
    low = -1.0 if name == "tanh" else 0.0
    np.testing.assert_allclose(y[:4], [1.0, low, 1.0, low], atol=1e-37)
    assert np.isnan(y[4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_that_are_not_packed_give_the_same_bits(isa, shape, dtype):
    arrays, rng = make(17, *shape, dtype)
    batch, steps, _, units = shape
    flags = {
        "mask": rng.random((batch, steps)) < 0.7,
        "recurrent_dropout": ((rng.random((batch, units)) < 0.6) / 0.6).astype(dtype),
        "reverse": True,
    }
    for given in ({}, flags):
        packed, plain = (native.forward(**arrays, **given, copy=copy) for copy in (True, False))
        for a, b in zip(packed, plain, strict=True):
            np.testing.assert_array_equal(a, b)
    del arrays["bias"]
    np.testing.assert_array_equal(native.forward(**arrays).y, native.forward(**arrays, copy=False).y)


def test_calls_from_several_threads_do_not_touch():
    arrays, _ = make(14, 6, 50, 12, 40)
    expected = native.forward(**arrays)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: native.forward(**arrays, threads=3), range(60)):
            for a, b in zip(out, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    arrays, _ = make(15, 6, 20, 12, 40)
    expected = native.forward(**arrays, threads=2)
    child = os.fork()
    if child == 0:  # no assertion may escape here: pytest would go on in the child
        out = native.forward(**arrays, threads=3)
        os._exit(0 if np.array_equal(out.y, expected.y) else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child never came back")
    assert status == 0
    np.testing.assert_array_equal(native.forward(**arrays, threads=2).y, expected.y)


def test_denormals_count_as_zero_and_the_mode_comes_back():
    arrays, _ = make(16, 1, 3, 2, 4)
    for name in ("x", "h0", "bias"):
        arrays[name][:] = 0
    arrays["c0"][:] = np.float32(1e-40)
    assert (native.forward(**arrays).c == 0).all()
    assert np.float32(1e-38) / np.float32(4) > 0


def test_softplus_keeps_its_tail(isa):
    x = np.array([-60.0, -30.0, -17.5, -3.0, 0.0, 40.0], np.float32)
    y = np.empty_like(x)
    _kernel.activate(ACTIVATIONS.index("softplus"), x, y)
    np.testing.assert_allclose(y, np.logaddexp(0.0, x.astype(np.float64)), rtol=1e-6)


def test_an_instruction_set_may_be_asked_for_by_name():
    ask = [sys.executable, "-c", "from cellstack import _kernel; print(_kernel.isa())"]
    run = lambda name: subprocess.run(ask, env={**os.environ, "CELLSTACK_ISA": name}, capture_output=True, text=True)  # noqa: E731
    assert run("baseline").stdout.strip() == "baseline"
    wrong = run("avx9")
    assert wrong.returncode != 0
    assert "got 'avx9'" in wrong.stderr
    assert "baseline" in wrong.stderr


def test_what_is_masked_may_be_nan(isa):
    arrays, rng = make(18, 4, 9, 5, 20)
    mask = rng.random((4, 9)) < 0.6
    clean = {**arrays, "x": np.where(mask[:, :, None], arrays["x"], 0).astype(np.float32)}
    arrays["x"] = np.where(mask[:, :, None], arrays["x"], np.nan).astype(np.float32)
    del arrays["bias"], clean["bias"]
    outs = [native.forward(**given, mask=mask) for given in (arrays, clean)]
    dy = rng.standard_normal(outs[0].y.shape).astype(np.float32)
    grads = [native.backward(out, **given, dy=dy, mask=mask) for out, given in zip(outs, (arrays, clean), strict=True)]
    for a, b in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stream_is_one_threads_at_a_time():
    arrays, rng = make(19, 1, 1, 64, 64)
    stream = _kernel.Stream([native.pack(arrays["kernel"], arrays["recurrent_kernel"])], 1)
    x = rng.standard_normal((1, 20_000, 64)).astype(np.float32)
    outcomes = []

    def run():
        try:
            stream.run(x, np.empty_like(x))
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            pool.submit(run)
    assert outcomes.count("done") >= 1
    refused = [outcome for outcome in outcomes if outcome != "done"]
    assert refused
    assert all("one thread at a time" in outcome for outcome in refused)


@pytest.mark.parametrize("batch", [2**40, 2**59, 2**62, 2**63 - 1])
def test_sizes_beyond_all_memory_are_refused(batch):
    arrays, _ = make(20, 1, 1, 64, 64)
    with pytest.raises(MemoryError):
        _kernel.Stream([native.pack(arrays["kernel"], arrays["recurrent_kernel"])], batch)

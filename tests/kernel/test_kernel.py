"""The kernel compared with the reference, on every instruction set of the machine."""

import functools
import itertools
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import family
import kernel_calls as calls
import numpy as np
import pairs
import pytest
import tolerances
from kinds import TESTED, named

from cellstack import _kernel, native, reference
from cellstack.cells import KINDS as DECLARED
from cellstack.cells import bfloat16
from cellstack.cells.activations import ACTIVATIONS, PARAMETERS, activation
from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.spec import GATES, MATRICES, CellSpec

SIGMAS = ("sigmoid", "hard_sigmoid", "linear", "relu")


ISAS = _kernel.isas()
# Those of AVX-512 differ in their products of bfloat16 and int8 numbers; all else is the same machine code.
FLOAT_ISAS = [name for name in ISAS if name not in ("avx512vnni", "avx512bf16")]
EVERY_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)
DTYPES = [np.float32, np.float64]


@pytest.fixture(params=FLOAT_ISAS)
def isa(request):
    _kernel.set_isa(request.param)
    yield request.param
    _kernel.set_isa(os.environ.get("CELLSTACK_ISA", ""))


def over_isas(names, *axes, isas=FLOAT_ISAS, **options):
    return pairs.parametrize(f"isa, {names}", isas, *axes, **options, indirect=["isa"])


def over_isas_in_turn(names, *axes, isas=FLOAT_ISAS):
    """Each case on one instruction set, on the others in slow tests."""
    return over_isas(names, *axes, isas=isas, unpaired=[0])


def cast(value, dtype):
    """Convert all float arrays in `value` to `dtype`, contiguous."""
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(cast(item, dtype) for item in value)
    return np.ascontiguousarray(value, dtype) if getattr(value, "dtype", None) == np.float64 else value


def make(seed, batch, steps, width, units, dtype=np.float32, **flags):
    """Return a cell that is stable over long sequences, its arrays, and a case of x and a state."""
    rng = np.random.default_rng(seed)
    spec = CellSpec(width + flags.get(DECLARED[flags.get("kind", "lstm")].scalar, False), units, **flags)
    new = lambda *shape, scale=1.0: rng.standard_normal(shape) * scale  # noqa: E731
    scales = {"kernel": width**-0.5, "recurrent_kernel": units**-0.5}
    arrays = {
        name: new(*shape, scale=scales.get(name, 0.3)) + name.endswith("_gain") for name, shape in spec.shapes.items()
    }
    case = {
        "x": new(batch, steps, spec.input_size),
        "state": family.random_state(rng, spec, batch),
    }
    if spec.scalar:
        case["x"][..., -1] = rng.random((batch, steps))
    return spec, cast(arrays, dtype), cast(case, dtype), rng


def flat(out):
    """Return all arrays of a result, by name."""
    if hasattr(out, "arrays"):
        return {"x": out.x, **{f"state {n}": a for n, a in enumerate(out.state)}, **out.arrays}
    found = {"y": out.y, "gates": out.gates, **{f"state {n}": a for n, a in enumerate(out.state)}}
    found |= {f"state {n} of every step": a for n, a in enumerate(out.states or (), 1)}
    return {name: array for name, array in found.items() if array is not None}


def assert_same(got, expected, tolerance):
    got, expected = flat(got), flat(expected)
    for name, a in got.items():
        b = expected[name]
        assert a.shape == b.shape, name
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_equal(got, expected):
    got, expected = flat(got), flat(expected)
    assert got.keys() == expected.keys()
    for name, array in got.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def random_gradients(rng, spec, out):
    """Return random gradients w.r.t. all results of a forward pass."""
    new = lambda like: None if like is None else rng.standard_normal(like.shape)  # noqa: E731
    dgates = new(out.gates)
    dgates[:, :, len(GATES[spec.kind]) :] = 0.0  # the recurrent sum of a GRU isn't differentiable
    dstates = tuple(map(new, out.states))
    return {"dy": new(out.y), "dstate": tuple(map(new, out.state)), "dgates": dgates, "dstates": dstates}


def compare(spec, arrays, case, rng, dtype, tolerance, threads=2, copy=True):
    """Compare the forward and backward pass in `dtype` with the reference in float64."""
    arrays64, case64 = cast(arrays, np.float64), cast(case, np.float64)
    expected = reference.forward(spec, arrays64, **case64)
    got = calls.forward(spec, cast(arrays, dtype), **cast(case, dtype), threads=threads, copy=copy)
    assert_same(got, expected, tolerance)
    gradients = random_gradients(rng, spec, expected)
    expected_gradients = reference.backward(spec, arrays64, expected, **gradients)
    found = calls.backward(spec, cast(arrays, dtype), got, **cast(gradients, dtype), threads=threads)
    assert_same(found, expected_gradients, tolerances.KERNEL_GRADIENT * tolerance)
    again = calls.backward(spec, cast(arrays, dtype), bare(got), **cast(gradients, dtype), threads=threads)
    assert_equal(again, found)


def bare(out):
    """Return results with only y and c, so that the backward pass recomputes gates and intermediate values."""
    return out._replace(gates=None, case={**out.case, "intermediate": None})


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
MEMBERS = named("several")


def test_few_combinations_have_every_pair_of_options():
    lengths = (5, 19, 12, 2)
    chosen = pairs.few(list(itertools.product(*map(range, lengths))), lengths, also=(0, 2, 3))
    for part in (*itertools.combinations(range(4), 2), (0, 2, 3)):
        assert len({tuple(one[n] for n in part) for one in chosen}) == math.prod(lengths[n] for n in part)
    assert len(chosen) < 300


@over_isas("member, shape, dtype, masked", list(GATES), SHAPES, DTYPES, [False, True], also=(0, 2, 3))
def test_forward_and_backward_follow_the_reference(isa, member, shape, dtype, masked):
    spec, arrays, case, rng = make(hash(shape) % 1000, *shape, np.float64, **MEMBERS[member])
    batch, steps, *_ = shape
    if masked:
        case["mask"], case["reset"] = rng.random((batch, steps)) < 0.7, rng.random((batch, steps)) < 0.2
        case["recurrent_dropout"] = (rng.random((batch, spec.output_size)) < 0.6) / 0.6
        case["reverse"] = True
    compare(spec, arrays, case, rng, dtype, tolerances.KERNEL[np.dtype(dtype).name])


@over_isas("member, shape, dtype", list(MEMBERS), [(1, 70, 5, 16), (3, 11, 7, 33), (7, 6, 16, 48)], DTYPES)
def test_every_flag_at_widths_beyond_one_block(isa, member, shape, dtype):
    spec, arrays, case, rng = make(3, *shape, np.float64, **MEMBERS[member])
    compare(spec, arrays, case, rng, dtype, tolerances.KERNEL[np.dtype(dtype).name])


@over_isas_in_turn("seed", range(150), isas=ISAS)
def test_a_random_cell_follows_the_reference(isa, seed):
    """Any combination of flags, with any masks, in either direction."""
    rng = np.random.default_rng(seed)
    spec = family.random_spec(rng, largest=40 if seed % 3 == 0 else 8)
    arrays = family.random_arrays(rng, spec)
    case = family.random_case(rng, spec, batch=int(rng.integers(1, 9)), steps=int(rng.integers(1, 9)))
    threads, copy = 1 + seed % 3, bool(seed % 4)
    compare(spec, arrays, case, rng, np.float64, tolerances.KERNEL_ACTIVATIONS, threads, copy)


@over_isas_in_turn("phi, sigma", [*ACTIVATIONS, "leaky_relu(0.0)", "elu(0.0)"], SIGMAS)
def test_every_activation(isa, phi, sigma):
    spec, arrays, case, rng = make(7, 3, 6, 5, 9, np.float64, activation=phi, recurrent_activation=sigma)
    compare(spec, arrays, case, rng, np.float64, tolerances.KERNEL_ACTIVATIONS)


@over_isas_in_turn("member", list(MEMBERS))
def test_bits_do_not_depend_on_batch_chunks_or_threads(isa, member):
    spec, arrays, case, _ = make(3, 9, 150, 10, 35, **MEMBERS[member])
    whole = calls.forward(spec, arrays, **case, threads=1)
    for threads in (2, 3, 4):
        assert_equal(calls.forward(spec, arrays, **case, threads=threads), whole)
    for row in (0, 8):
        own = {"x": case["x"][row : row + 1].copy(), "state": tuple(a[row : row + 1].copy() for a in case["state"])}
        np.testing.assert_array_equal(calls.forward(spec, arrays, **own).y, whole.y[row : row + 1])
    state, first = case["state"], 0
    for size in (1, 1, 2, 7, 64, 75):
        part = calls.forward(spec, arrays, case["x"][:, first : first + size], state)
        np.testing.assert_array_equal(part.y, whole.y[:, first : first + size])
        state, first = part.state, first + size
    assert first == 150


@over_isas_in_turn("member", list(MEMBERS))
def test_a_stream_gives_the_bits_of_the_whole_sequence(isa, member):
    spec, arrays, case, _ = make(21, 3, 40, 10, 35, **MEMBERS[member])
    whole = calls.forward(spec, arrays, **case)
    stream = _kernel.stream([native.weights(spec, arrays)], 3)
    stream.set_state(0, case["state"])
    for t in range(10):
        np.testing.assert_array_equal(stream.step(np.ascontiguousarray(case["x"][:, t])), whole.y[:, t])
    np.testing.assert_array_equal(stream.run(np.ascontiguousarray(case["x"][:, 10:])), whole.y[:, 10:])
    for a, b in zip(stream.get_state()[0], whole.state, strict=True):
        np.testing.assert_array_equal(a, b)
    stream.reset()
    for name, array in zip("hc", stream.get_state()[0], strict=False):
        np.testing.assert_array_equal(array, np.broadcast_to(arrays.get(f"initial_{name}", 0.0), array.shape))


@over_isas_in_turn("member", list(MEMBERS))
def test_gradients_have_the_same_bits_on_any_number_of_threads(isa, member):
    spec, arrays, case, rng = make(4, 9, 40, 10, 35, **MEMBERS[member])
    out = calls.forward(spec, arrays, **case)
    dy = rng.standard_normal(out.y.shape).astype(np.float32)
    one = calls.backward(spec, arrays, out, dy=dy, threads=1)
    for threads in (2, 5):
        assert_equal(calls.backward(spec, arrays, out, dy=dy, threads=threads), one)


DIVIDED = [name for name, flags in MEMBERS.items() if not {"layer_norm", "proj_size", "backbone_units"} & flags.keys()]


@over_isas_in_turn("member", list(DIVIDED))
def test_threads_that_share_the_units_give_the_same_bits(isa, member):
    # enough for threads to save time, even where they exchange results slowly
    units = TESTED[MEMBERS[member]["kind"]].units
    spec, arrays, case, rng = make(5, 1, 30, 40, units, **MEMBERS[member])
    case["mask"] = rng.random((1, 30)) < 0.8
    weights = [native.weights(spec, arrays)]
    whole = calls.forward(spec, arrays, **case, threads=1)
    for threads in (2, 3):
        divides = spec.kind != "gru" or spec.reset_after
        assert _kernel.cut(weights, 1, 30, False, threads) == (1, 1, threads if divides else 1)
        assert_equal(calls.forward(spec, arrays, **case, threads=threads), whole)


def test_threads_share_a_step_whose_weights_exceed_the_cache():
    """Reading 8 MB takes longer than the multiplications, which are too few to add a thread."""
    for units, threads in ((350, 2), (100, 1)):
        spec, arrays, _, _ = make(8, 1, 1, units, units, np.float64)
        assert _kernel.cut([native.weights(spec, arrays)], 1, 1, False, 2) == (1, 1, threads)


@over_isas_in_turn("element", ["float32", "bfloat16", "int8"], isas=ISAS)
def test_threads_of_a_stream_share_the_units_of_its_layers(isa, element):
    spec, arrays, case, _ = make(6, 1, 90, 48, 500)
    above, more, _, _ = make(7, 1, 1, 500, 450, kind="gru")
    weights = [native.weights(spec, arrays, element), native.weights(above, more, element)]
    assert _kernel.cut(weights, 1, 40, False, 2) == (1, 1, 2)
    x = case["x"]
    alone, shared = _kernel.stream(weights, 1), _kernel.stream(weights, 1, 2)
    whole = alone.run(x)
    parts = [shared.run(np.ascontiguousarray(x[:, a:b])) for a, b in ((0, 1), (1, 2), (2, 70), (70, 73), (73, 90))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    for one, other in zip(alone.get_state(), shared.get_state(), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_thread_that_does_not_run_does_not_block_the_others(tmp_path):
    """Two threads on one processor: the second one runs only when the first one yields."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import kernel_calls as calls, numpy as np\n"
        "from cellstack.cells.spec import CellSpec\n"
        "spec = CellSpec(40, 300)\n"
        "rng = np.random.default_rng(0)\n"
        "arrays = {n: (rng.standard_normal(s) * 0.05).astype('f') for n, s in spec.shapes.items()}\n"
        "x = rng.standard_normal((1, 400, 40)).astype('f')\n"
        "def seconds(threads):\n"
        "    taken = []\n"
        "    for _ in range(5):\n"
        "        start = time.process_time()\n"
        "        y = calls.forward(spec, arrays, x, None, threads=threads).y\n"
        "        taken.append(time.process_time() - start)\n"
        "    return min(taken), y\n"
        "(one, y), (two, same) = seconds(1), seconds(2)\n"
        "assert np.array_equal(y, same)\n"
        "print(two / one)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 2, run.stdout


@over_isas_in_turn("member, batch", list(MEMBERS), [1, 5])
def test_gradients_have_the_same_bits_if_threads_share_the_units(isa, member, batch):
    spec, arrays, case, rng = make(5, batch, 9, 70, 330, **MEMBERS[member])
    case["mask"], case["reset"] = rng.random((batch, 9)) < 0.8, rng.random((batch, 9)) < 0.2
    out = calls.forward(spec, arrays, **case)
    dy = rng.standard_normal(out.y.shape).astype(np.float32)
    one = calls.backward(spec, arrays, out, dy=dy, threads=1)
    for threads in (2, 3, 4):
        assert_equal(calls.backward(spec, arrays, out, dy=dy, threads=threads), one)


@over_isas_in_turn("member, reverse", list(MEMBERS), [False, True])
def test_gates_recomputed_in_chunks_give_the_same_bits(isa, member, reverse):
    """600 rows per step, so that the second-level cache holds only a chunk of the steps."""
    spec, arrays, case, rng = make(6, 600, 5, 6, 70, **MEMBERS[member])
    case["mask"], case["reset"] = rng.random((600, 5)) < 0.8, rng.random((600, 5)) < 0.2
    case["recurrent_dropout"] = ((rng.random((600, spec.output_size)) < 0.6) / 0.6).astype(np.float32)
    out = calls.forward(spec, arrays, **case, reverse=reverse, threads=2)
    dy = rng.standard_normal(out.y.shape).astype(np.float32)
    kept = calls.backward(spec, arrays, out, dy=dy, threads=2)
    for threads in (1, 2):
        assert_equal(calls.backward(spec, arrays, bare(out), dy=dy, threads=threads), kept)


@over_isas_in_turn("member, size", list(MEMBERS), [(1, 330), (5, 70), (150, 33)], isas=ISAS)
def test_gradients_in_bfloat16(isa, member, size):
    """Close to float32 if pairs are multiplied, else equal; equal for any threads, with and without saved gates."""
    batch, units = size
    spec, arrays, case, rng = make(9, batch, 9, 21, units, **MEMBERS[member])
    case["mask"], case["reset"] = rng.random((batch, 9)) < 0.8, rng.random((batch, 9)) < 0.2
    out = calls.forward(spec, arrays, **case, element="bfloat16")
    given = {"dy": rng.standard_normal(out.y.shape).astype(np.float32)}
    exact = flat(calls.backward(spec, arrays, out, **given))
    found = calls.backward(spec, arrays, out, **given, element="bfloat16")
    off = {
        name: np.linalg.norm(a - exact[name]) / (np.linalg.norm(exact[name]) or 1.0) for name, a in flat(found).items()
    }
    if isa == "avx512bf16":
        assert max(off.values()) < 1e-2
        assert off["x"] > 1e-5
        assert off["kernel"] > 1e-5
    else:
        assert max(off.values()) == 0
    for threads in (2, 3):
        assert_equal(calls.backward(spec, arrays, out, **given, element="bfloat16", threads=threads), found)
    if isa == "avx512bf16":  # on other instruction sets recomputed gates use rounded numbers, and gradients don't
        again = calls.backward(spec, arrays, bare(out), **given, element="bfloat16", threads=2)
        assert_equal(again, found)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_stack_is_its_layers_one_after_the_other(isa, batch, threads):
    cells, states, rng = stack(batch)
    x = rng.standard_normal((batch, 200, 6)).astype(np.float32)
    for cell, state, out in zip(
        cells, states, calls.forward_stack(x, cells, states, threads=threads, save=False), strict=True
    ):
        alone = calls.forward(*cell, x, state)
        np.testing.assert_array_equal(alone.y, out.y)
        for a, b in zip(alone.state, out.state, strict=True):
            np.testing.assert_array_equal(a, b)
        x = alone.y


KINDS = (
    {},
    {"kind": "gru"},
    {"proj_size": 20},
    {"kind": "rnn"},
    {"layer_norm": True},
    {"kind": "mingru"},
    {"kind": "minlstm"},
    {"kind": "slstm"},
)


def stack(batch, dtype=np.float32):
    """Return cells of every kind, their states, and the random generator."""
    cells, states, width = [], [], 6
    for seed, (units, flags) in enumerate(zip((20, 33, 40, 8, 17, 35, 12, 21), KINDS, strict=True)):
        spec, arrays, case, rng = make(seed, batch, 1, width, units, dtype, **flags)
        cells.append((spec, arrays))
        states.append(case["state"])
        width = spec.output_size
    return cells, states, rng


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_backward_pass_of_a_stack_is_that_of_its_layers(isa, threads, dtype):
    cells, states, rng = stack(3, dtype)
    x = rng.standard_normal((3, 40, 6)).astype(dtype)
    outs = calls.forward_stack(x, cells, states, mask=rng.random((3, 40)) < 0.8, reverse=True)
    like = lambda array: rng.standard_normal(array.shape).astype(dtype)  # noqa: E731
    given = [{"dy": like(out.y), "dstate": tuple(map(like, out.state)), "dgates": like(out.gates)} for out in outs]
    given[2] = {}  # a layer whose only gradient comes from the layer above
    found = calls.backward_stack(cells, outs, given, threads=threads)
    above = None
    for n in reversed(range(len(cells))):
        own = dict(given[n])
        if above is not None:
            own["dy"] = above + own["dy"] if "dy" in own else above
        case = {**outs[n].case, "x": outs[n - 1].y if n else x}
        alone = calls.backward(*cells[n], outs[n]._replace(case=case), **own)
        assert_equal(found[n]._replace(x=0), alone._replace(x=0))
        above = alone.x
    np.testing.assert_array_equal(found[0].x, above)


def test_the_backward_pass_of_a_stack_writes_only_the_requested_gradients(isa):
    cells, states, rng = stack(2)
    x = rng.standard_normal((2, 9, 6)).astype(np.float32)
    outs = calls.forward_stack(x, cells, states)
    given = [{} for _ in cells]
    given[-1] = {"dy": np.ones_like(outs[-1].y)}
    every = calls.backward_stack(cells, outs, given)
    for wanted in ({"x"}, set()), (set(), {"h0"}), ({"kernel"}, {"c0", "recurrent_kernel"}):
        names = [wanted[0], set(), wanted[1], *[set()] * (len(cells) - 3)]
        found = calls.backward_stack(cells, outs, given, wanted=names)
        for n, (some, whole) in enumerate(zip(found, every, strict=True)):
            flat = lambda g: {"x": g.x, **dict(zip(("h0", "c0"), g.state, strict=False)), **g.arrays}  # noqa: E731
            for name, array in flat(some).items():
                if name in names[n]:
                    np.testing.assert_array_equal(array, flat(whole)[name])
                else:
                    assert np.isnan(array).all(), (n, name)


def test_a_call_accepts_only_arrays_that_the_kernel_can_read():
    spec, arrays, case, _ = make(30, 2, 3, 4, 5)
    weights, y = native.weights(spec, arrays), np.empty((2, 3, 5), np.float32)
    read_only = y.copy()
    read_only.flags.writeable = False
    native.Layer(weights, before=[read_only[:, 0].copy()], y=y)
    unaligned = np.frombuffer(b"0" + y.tobytes(), np.uint8)[1:].view(np.float32).reshape(y.shape)
    for wrong in (read_only, y[:, ::2], np.asfortranarray(y), unaligned, y.astype(">f4"), y.tolist(), 1.0, -1):
        with pytest.raises(TypeError):
            native.Layer(weights, y=wrong)
    with pytest.raises(TypeError):
        native.Sequences(2, 3, unaligned, 15, 5)
    with pytest.raises(ValueError, match="at least one layer"):
        native.forward(native.sequences(case["x"]), [], 1)
    with pytest.raises(ValueError, match="the weights must not be copied"):
        native.backward(native.sequences(case["x"]), [native.Layer(weights)], [native.Gradients()], 1)
    with pytest.raises(ValueError, match="one Gradients per layer"):
        native.backward(native.sequences(case["x"]), [native.Layer(weights)], [], 1)


def test_a_strided_input_is_read_in_place(isa):
    for member in MEMBERS.values():
        spec, arrays, case, _ = make(6, 4, 12, 7, 10, **member)
        x = np.ascontiguousarray(case["x"].transpose(1, 0, 2)).transpose(1, 0, 2)
        assert not x.flags.c_contiguous
        for reverse in (False, True):
            got = calls.forward(spec, arrays, x, case["state"], reverse=reverse)
            assert_equal(got, calls.forward(spec, arrays, **case, reverse=reverse))


@over_isas_in_turn("member, shape", list(MEMBERS), [(0, 4), (3, 0), (0, 0)])
def test_empty_batches_and_sequences(isa, member, shape):
    batch, steps = shape
    spec, arrays, case, _ = make(1, batch, steps, 3, 4, **MEMBERS[member])
    out = calls.forward(spec, arrays, **case, threads=2)
    np.testing.assert_array_equal(out.state[0], case["state"][0])
    ones = tuple(map(np.ones_like, case["state"]))
    grads = calls.backward(spec, arrays, out, dstate=ones, threads=2)
    assert all((array == 0).all() for array in grads.arrays.values())
    np.testing.assert_array_equal(grads.state[0], ones[0])


@pytest.mark.parametrize("kind", [kind for kind, tested in TESTED.items() if tested.finite])
def test_linear_mode_is_exact(isa, kind):
    """With identity activations and small integers, float32 arithmetic is exact: the layout is compared bit for bit."""
    rng = np.random.default_rng(8)
    spec = CellSpec(
        4, 19, *(("linear",) if kind == "rnn" else ("linear", "linear")), kind=kind, peepholes=kind == "lstm"
    )
    sparse = lambda *shape: (rng.integers(-1, 2, shape) * (rng.random(shape) < 0.15)).astype(np.float32)  # noqa: E731
    arrays = {name: sparse(*shape) for name, shape in spec.shapes.items()}
    x = rng.integers(-1, 2, (3, 3, 4)).astype(np.float32)
    state = tuple(rng.integers(-1, 2, (3, 19)).astype(np.float32) for _ in spec.state_sizes)
    for steps in (3, 2, 1):  # where gates are multiplied with each other, numbers soon need more digits
        x, wide = x[:, :steps], [cast(one, np.float64) for one in (arrays, state)]
        expected = flat(reference.forward(spec, wide[0], x.astype(np.float64), wide[1]))
        if max(np.abs(a).max() for a in expected.values()) < 2**24:
            break
    else:
        pytest.fail("the numbers of one step aren't exact in float32")
    assert np.abs(expected["gates"]).max() >= 2
    for name, array in flat(calls.forward(spec, arrays, x, state)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_clip_has_no_slope_at_its_bounds(isa):
    """With integers, sums and cells are exactly at the bounds."""
    rng = np.random.default_rng(28)
    spec = CellSpec(3, 17, "linear", "linear", clip=2.0, cell_clip=3.0)
    arrays = {name: rng.integers(-1, 2, shape).astype(np.float64) for name, shape in spec.shapes.items()}
    arrays["recurrent_kernel"] *= rng.random((17, 68)) < 0.2
    case = {"x": rng.integers(-1, 2, (4, 5, 3)).astype(np.float64), "state": None}
    expected = reference.forward(spec, arrays, **case)
    assert (np.abs(expected.gates) == 2).any()
    assert (np.abs(*expected.states) == 3).any()
    compare(spec, arrays, case, rng, np.float64, tolerances.KERNEL["float64"])


@pytest.mark.parametrize(
    "member", ["lstm", "lstm, coupled", "gru", "gru, reset before", "mingru", "minlstm", "ligru", "cfc, timespans"]
)
def test_all_wrong_gate_orders_fail(isa, member):
    flags = {"timespans": True} if member == "cfc" else {}  # without them the two gates of its time are only added
    spec, arrays, case, _ = make(9, 2, 4, 3, 5, **MEMBERS[member] | flags)
    expected = reference.forward(spec, cast(arrays, np.float64), **cast(case, np.float64))
    count = len(spec.gates)
    for order in itertools.permutations(range(count)):
        swapped = dict(arrays)
        for name in {"kernel", "recurrent_kernel", "bias"} & arrays.keys():
            blocks = np.split(arrays[name], count, axis=-1)
            swapped[name] = np.ascontiguousarray(np.concatenate([blocks[k] for k in order], axis=-1))
        wrong = np.abs(calls.forward(spec, swapped, **case).y - expected.y).max()
        assert (wrong < tolerances.KERNEL["float32"]) == (order == tuple(range(count))), order


@functools.cache
def long_sequence(member):
    """Return a case of 1,000 steps, and y of the reference."""
    spec, arrays, case, _ = make(10, 1, 1000, 16, 64, **MEMBERS[member])
    if spec.of_kind.has_recurrent_kernel:  # a GRU and a SimpleRNN with larger random weights are chaotic
        arrays["recurrent_kernel"] *= np.float32(0.5)
    return spec, arrays, case, reference.forward(spec, cast(arrays, np.float64), **cast(case, np.float64)).y


@over_isas_in_turn(
    "member", ["lstm", "lstm, coupled", "lstm, projection", "lstm, joint norm", "gru", "rnn", "mingru", "minlstm"]
)
def test_long_sequence_in_single_precision(isa, member):
    spec, arrays, case, expected = long_sequence(member)
    assert np.abs(calls.forward(spec, arrays, **case).y - expected).max() < tolerances.REFERENCE


def test_nan_weights_give_nan(isa):
    spec, arrays, case, _ = make(11, 2, 3, 4, 5)
    arrays["kernel"][0, 0] = np.nan
    out = calls.forward(spec, arrays, **case)
    assert np.isnan(out.gates[:, 0, 0, 0]).all()
    assert np.isfinite(out.gates[:, 0, 1]).all()


def activated(name, x):
    """Apply an activation of the kernel to an array."""
    found, y = activation(name), np.empty_like(x)
    _kernel.activate(ACTIVATIONS.index(found.name), found.alpha, found.beta, x, y)
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize(
    "name", [*ACTIVATIONS, *(f"{name}({', '.join('0.7' for _ in PARAMETERS[name])})" for name in PARAMETERS)]
)
def test_activations_match_the_reference(isa, name, dtype):
    x = np.random.default_rng(5).normal(0, 3, 1001).astype(dtype)
    expected = reference.ACTIVATIONS[activation(name).name][0](x.astype(np.float64), *activation(name)[1:])
    np.testing.assert_allclose(activated(name, x), expected, rtol=1e-5 if dtype == np.float32 else 1e-13, atol=1e-7)


def ulps(name, x):
    """Return the errors of the kernel's sigmoid or tanh, in units of the last place of the exact value."""
    exact = x.astype(np.longdouble)
    exact = np.tanh(exact) if name == "tanh" else 1 / (1 + np.exp(-exact))
    return (activated(name, x) - exact) / np.spacing(np.abs(exact).astype(x.dtype)).astype(np.longdouble)


# The largest error in units of the last place, over a million float32 values: all magnitudes with a normal result, and
# the difficult ranges of the two functions. All float32 values would take too long.
@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [("tanh", np.float32, 1.3), ("tanh", np.float64, 2.6), ("sigmoid", np.float32, 2.5), ("sigmoid", np.float64, 2.6)],
    ids=["tanh single", "tanh double", "sigmoid single", "sigmoid double"],
)
def test_activations_are_within_some_ulp(isa, name, dtype, most):
    rng = np.random.default_rng(12)
    magnitude = np.exp(rng.uniform(np.log(1e-30), np.log(87.0), 500_000))
    x = np.concatenate([magnitude, -magnitude, np.linspace(-20, 20, 100_001), [0.0, -0.0]]).astype(dtype)
    assert np.abs(ulps(name, x)).max() < most


# The root mean square error of a single rounding is 0.29 units; the accuracy of an LSTM depends on that of tanh being
# hardly larger. Above 0.5 the quotient adds half a unit of 1.
@pytest.mark.parametrize(("first", "last", "most"), [(1e-4, 0.5, 0.30), (0.5, 1.0, 0.40), (1.0, 9.0, 0.31)])
def test_tanh_of_floats_is_hardly_more_than_one_rounding(isa, first, last, most):
    x = np.random.default_rng(3).uniform(first, last, 200_000).astype(np.float32)
    assert np.sqrt(np.mean(ulps("tanh", x) ** 2)) < most


def test_tanh_of_floats_is_odd_and_monotonic(isa):
    x = np.sort(np.random.default_rng(4).uniform(0, 12, 100_000)).astype(np.float32)
    seam = np.float32(0.6) + np.arange(-5000, 5000) * np.spacing(np.float32(0.6))
    for points in (x, seam.astype(np.float32)):
        y = activated("tanh", points)
        assert (np.diff(y) >= 0).all()
        assert y.max() <= 1
        np.testing.assert_array_equal(activated("tanh", -points), -y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_of_extreme_values(isa, name, dtype):
    largest = np.finfo(dtype).max
    x = np.array([np.inf, -np.inf, largest, -largest, 1e30, -1e30, np.nan, -np.nan], dtype)
    y = activated(name, x)
    low = -1.0 if name == "tanh" else 0.0
    np.testing.assert_allclose(y[:6], [1.0, low] * 3, atol=1e-37)
    assert np.isnan(y[6:]).all()


def test_tanh_of_the_smallest_floats(isa):
    smallest = np.finfo(np.float32).smallest_normal
    x = np.array([smallest, 1e-37, 1e-30, 0.0], np.float32)
    for signed in (x, -x):
        np.testing.assert_array_equal(activated("tanh", signed), signed)  # of -0, a zero


@over_isas_in_turn("member, shape, dtype", list(MEMBERS), SHAPES, DTYPES)
def test_weights_that_are_not_packed_give_the_same_bits(isa, member, shape, dtype):
    if MEMBERS[member].get("proj_size", 0) >= shape[3]:
        shape = (*shape[:3], 4)
    spec, arrays, case, rng = make(17, *shape, dtype, **MEMBERS[member])
    batch, steps, *_ = shape
    flags = {
        "mask": rng.random((batch, steps)) < 0.7,
        "reset": rng.random((batch, steps)) < 0.2,
        "recurrent_dropout": ((rng.random((batch, spec.output_size)) < 0.6) / 0.6).astype(dtype),
        "reverse": True,
    }
    for given in ({}, flags):
        packed, plain = (calls.forward(spec, arrays, **case, **given, copy=copy) for copy in (True, False))
        assert_equal(packed, plain)


def streamed(spec, arrays, x, element=None):
    """Return y of a stream over x in one call, and check that a stream step by step gives the same bits."""
    packed = native.weights(spec, arrays, element)
    whole, steps = (_kernel.stream([packed], len(x)) for _ in range(2))
    y = whole.run(x)
    for t in range(x.shape[1]):
        np.testing.assert_array_equal(steps.step(np.ascontiguousarray(x[:, t])), y[:, t])
    return y


def test_a_stream_takes_only_what_the_kernel_can_read():
    spec, arrays, _, rng = make(23, 1, 1, 6, 4)
    stream = _kernel.stream([native.weights(spec, arrays)], 2)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    before = [array.copy() for array in stream.get_state()[0]]
    unaligned = np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    others = (x.astype(np.float64), x.astype(">f4"), x[:, :5], x[:1], x[0], x[:, None], np.asfortranarray(x), unaligned)
    for other in (*others, x.tolist(), None, np.ma.array(x), x.view(np.int32), np.float32(1)):
        assert stream.step(other) is None
    for other in (x, x[:, None][..., :5], x[:1, None], np.zeros((2, 3, 6))):
        assert stream.run(other) is None
    assert stream.run(np.zeros((2, 0, 6), np.float32)).shape == (2, 0, 4)
    for a, b in zip(stream.get_state()[0], before, strict=True):
        np.testing.assert_array_equal(a, b)
    read_only = x.copy()
    read_only.flags.writeable = False
    assert stream.step(read_only).shape == (2, 4)


@over_isas_in_turn("size, element", [(1, 333), (3, 111), (40, 33)], ["float32", "int8"], isas=ISAS)
def test_threads_leave_every_bit_of_a_stream(isa, size, element):
    batch, steps = size
    rng = np.random.default_rng(0)
    packed = []
    for seed, (width, units) in enumerate(((40, 96), (96, 130), (130, 64))):
        spec, arrays, _, _ = make(seed, 1, 1, width, units)
        packed.append(native.weights(spec, arrays, element))
    x = rng.standard_normal((batch, steps, 40)).astype(np.float32)
    one, *others = (_kernel.stream(packed, batch, threads) for threads in (1, 2, 3, 7, 10**6))
    y, y_t = one.run(x), one.step(np.ascontiguousarray(x[:, 0]))
    for other in others:
        np.testing.assert_array_equal(other.run(x), y)
        np.testing.assert_array_equal(other.step(np.ascontiguousarray(x[:, 0])), y_t)
        for states, expected in zip(other.get_state(), one.get_state(), strict=True):
            for a, b in zip(states, expected, strict=True):
                np.testing.assert_array_equal(a, b)
        states = one.get_state()
        for layer, state in enumerate(states):
            other.set_state(layer, state)


def to_bfloat16(array):
    bits = array.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


@over_isas_in_turn("member, units, batch", list(MEMBERS), [5, 33], [1, 7], isas=ISAS)
def test_weights_in_bfloat16_follow_the_reference(isa, member, units, batch):
    spec, arrays, case, _ = make(22, batch, 20, 9, units, **MEMBERS[member])
    rounded = {name: BFloat16Array(bfloat16.rounded(a)) if name in MATRICES else a for name, a in arrays.items()}
    expected = reference.forward(spec, rounded, case["x"]).y
    y = streamed(spec, arrays, case["x"], "bfloat16")
    # an h halfway between two bfloat16 values may be rounded to either, a difference of 1/256, with later effects
    assert np.abs(y - expected).max() < 4e-3 * max(1.0, np.abs(expected).max())
    assert np.abs(y - expected).mean() < 0.2 * np.abs(reference.forward(spec, arrays, case["x"]).y - expected).mean()


# Cells that multiply matrices only with x and h, not with intermediate results.
DIRECT = [
    name
    for name, flags in MEMBERS.items()
    if not {"proj_size", "backbone_units"} & flags.keys() and flags.get("reset_after", True)
]


@over_isas("member, batch, width", DIRECT, [1, 7, 64, 80], [1, 8, 17, 70], also=(0, 2, 3), isas=ISAS)
def test_a_step_in_bfloat16_is_a_step_with_rounded_numbers(isa, member, batch, width):
    """Bit for bit: sums of exact products in order, also if the processor multiplies pairs."""
    spec, arrays, case, _ = make(28, batch, 1, width, 33, **MEMBERS[member])
    near = {name: to_bfloat16(array) if name in MATRICES else array for name, array in arrays.items()}
    assert not np.array_equal(near["kernel"], arrays["kernel"])
    state, rounded = (to_bfloat16(case["state"][0]), *case["state"][1:]), case["x"].copy()
    rounded[..., : spec.features] = to_bfloat16(rounded[..., : spec.features])  # a scalar isn't multiplied by weights
    after = []
    for element, numbers, x in (("bfloat16", arrays, case["x"]), (None, near, rounded)):
        stream = _kernel.stream([native.weights(spec, numbers, element)], batch)
        stream.set_state(0, state)
        after.append((stream.run(x), *stream.get_state()[0]))
    for found, expected in zip(*after, strict=True):
        np.testing.assert_array_equal(found, expected)


def quantised(array, axis):
    """Quantise to integers, in units of 1/127 of the largest magnitude along `axis`; return integers and units."""
    scale = np.abs(array).max(axis=axis, keepdims=True) / 127
    return np.rint(array / scale), scale


@EVERY_ISA
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("units", [5, 33])
def test_products_of_int8_weights_are_integer_sums(isa, units, batch):
    spec, arrays, case, _ = make(23, batch, 20, 9, units, clip=20.0)
    exact = cast(arrays, np.float64)

    def product(a, matrix):
        (steps, size), (weights, scale) = quantised(a, 1), quantised(matrix, 0)
        return steps @ weights * size * scale

    h, c = np.full((2, batch, units), 1e-30)
    y = []
    for t in range(20):
        x = case["x"][:, t].astype(np.float64)
        z = exact["bias"] + product(x, exact["kernel"]) + product(h, exact["recurrent_kernel"])
        i, f, o = (1 / (1 + np.exp(-np.split(z, 4, axis=1)[k])) for k in (0, 1, 3))
        c = f * c + i * np.tanh(np.split(z, 4, axis=1)[2])
        h = o * np.tanh(c)
        y.append(h)
    got = streamed(spec, arrays, case["x"], "int8")
    # a value halfway between two integers may be rounded to either: a difference of 1/127 times a weight
    np.testing.assert_allclose(got, np.stack(y, 1), atol=2e-3)
    whole = streamed(spec, arrays, case["x"])
    assert 1e-5 < np.abs(got - whole).max() < 0.05


@over_isas_in_turn("member", list(MEMBERS), isas=ISAS)
def test_weights_in_int8_are_close_to_float32(isa, member):
    spec, arrays, case, _ = make(24, 3, 30, 20, 40, **MEMBERS[member])
    if spec.of_kind.has_recurrent_kernel:
        arrays["recurrent_kernel"] *= np.float32(0.5)
    whole, narrow = (streamed(spec, arrays, case["x"], element) for element in (None, "int8"))
    assert 1e-5 < np.abs(narrow - whole).mean() < 0.02


@EVERY_ISA
@pytest.mark.parametrize("element", ["int8", "bfloat16"])
def test_bfloat16_and_int8_weights_keep_a_nan(isa, element):
    spec, arrays, case, _ = make(25, 2, 3, 4, 5)
    case["x"][0, 1, 2] = np.nan
    y = streamed(spec, arrays, case["x"], element)
    assert np.isfinite(y[0, 0]).all()
    assert np.isnan(y[0, 1]).all()
    assert np.isfinite(y[1]).all()
    arrays["kernel"][0, 0] = np.nan
    assert np.isnan(streamed(spec, arrays, case["x"], element)[1, 0, 0])


def test_weights_have_a_number_format():
    spec, arrays, _, _ = make(26, 1, 1, 3, 4)
    for element in native.ELEMENTS:
        dtype = np.float64 if element == "float64" else np.float32
        given = {name: array.astype(dtype) for name, array in arrays.items()}
        assert native.weights(spec, given, element).element == element
    with pytest.raises(ValueError, match="copy"):
        native.weights(spec, arrays, "int8", copy=False)
    with pytest.raises(ValueError, match="forward: weights in rows, or with fewer bits, must be copied"):
        calls.forward(spec, arrays, np.zeros((1, 2, 3), np.float32), element="bfloat16", copy=False)
    with pytest.raises(ValueError, match="expected float32, float64, bfloat16 or int8, got float16"):
        native.weights(spec, arrays, "float16")


@over_isas_in_turn("member, threads", list(MEMBERS), [1, 3])
def test_states_may_be_rows_of_a_larger_array(isa, member, threads):
    spec, arrays, case, rng = make(27, 6, 5, 9, 35, **MEMBERS[member])
    expected = calls.forward(spec, arrays, **case)
    places = np.array([11, 2, 7, 0, 5, 3])
    states = tuple(rng.standard_normal((12, a.shape[1])).astype(np.float32) for a in case["state"])
    for array, own in zip(states, case["state"], strict=True):
        array[places] = own
    before = tuple(array.copy() for array in states)
    y, at = np.empty_like(expected.y), states
    layer = native.Layer(native.weights(spec, arrays), at, at, y=y)
    native.forward(
        native.Sequences(6, 5, case["x"], 5 * spec.input_size, spec.input_size, places=places), [layer], threads
    )
    np.testing.assert_array_equal(y, expected.y)
    others = np.setdiff1d(np.arange(12), places)
    for array, old, new in zip(states, before, expected.state, strict=True):
        np.testing.assert_array_equal(array[places], new)
        np.testing.assert_array_equal(array[others], old[others])


def test_calls_from_several_threads_are_independent():
    spec, arrays, case, _ = make(14, 6, 50, 12, 40)
    expected = calls.forward(spec, arrays, **case)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: calls.forward(spec, arrays, **case, threads=3), range(60)):
            assert_equal(out, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own_threads():
    spec, arrays, case, _ = make(15, 6, 20, 12, 40)
    expected = calls.forward(spec, arrays, **case, threads=2)
    child = os.fork()
    if child == 0:  # no exception may escape, or pytest would continue in the child
        out = calls.forward(spec, arrays, **case, threads=3)
        os._exit(0 if np.array_equal(out.y, expected.y) else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child didn't exit")
    assert status == 0
    np.testing.assert_array_equal(calls.forward(spec, arrays, **case, threads=2).y, expected.y)


def test_denormals_are_flushed_to_zero_and_the_mode_is_restored():
    spec, arrays, case, _ = make(16, 1, 3, 2, 4)
    (h, c), x = case["state"], case["x"]
    x[:], h[:], arrays["bias"][:] = 0, 0, 0
    c[:] = np.float32(1e-40)
    assert (calls.forward(spec, arrays, **case).state[1] == 0).all()
    assert np.float32(1e-38) / np.float32(4) > 0


def test_softplus_keeps_its_tail(isa):
    x = np.array([-60.0, -30.0, -17.5, -3.0, 0.0, 40.0], np.float32)
    np.testing.assert_allclose(activated("softplus", x), np.logaddexp(0.0, x.astype(np.float64)), rtol=1e-6)


# Without a requested instruction set, layers with few units use narrower vectors.
@pairs.parametrize("member, units, dtype", list(MEMBERS), [1, 4, 5, 8, 9], DTYPES)
def test_the_default_instruction_set_gives_the_bits_of_the_best_one(member, units, dtype):
    flags = {**MEMBERS[member], **({"proj_size": 1} if member == "lstm, projection" else {})}
    spec, arrays, case, _ = make(18, 7, 9, 3, max(2, units) if member == "lstm, projection" else units, dtype, **flags)
    runs = []
    for asked in (_kernel.isas()[0], ""):
        _kernel.set_isa(asked)
        out = calls.forward(spec, arrays, **case)
        gradients = cast(random_gradients(np.random.default_rng(1), spec, out), dtype)
        runs.append((out, calls.backward(spec, arrays, out, **gradients)))
    _kernel.set_isa(os.environ.get("CELLSTACK_ISA", ""))
    for ours, expected in zip(*runs, strict=True):
        assert_equal(ours, expected)


def test_an_instruction_set_can_be_requested_by_name():
    ask = [sys.executable, "-c", "from cellstack import _kernel; print(_kernel.isa())"]
    run = lambda name: subprocess.run(ask, env={**os.environ, "CELLSTACK_ISA": name}, capture_output=True, text=True)  # noqa: E731
    plainest = _kernel.isas()[-1]
    assert run(plainest).stdout.strip() == plainest
    wrong = run("avx9")
    assert wrong.returncode != 0
    assert "got 'avx9'" in wrong.stderr
    assert plainest in wrong.stderr


@over_isas_in_turn("member", list(MEMBERS))
def test_masked_values_may_be_nan(isa, member):
    spec, arrays, case, rng = make(18, 4, 9, 5, 20, **MEMBERS[member])
    mask = rng.random((4, 9)) < 0.6
    dy = rng.standard_normal((4, 9, spec.output_size)).astype(np.float32)
    results = []
    for filling in (0.0, np.nan):
        x = np.where(mask[:, :, None], case["x"], np.float32(filling))
        out = calls.forward(spec, arrays, x, case["state"], mask=mask)
        results.append((out, calls.backward(spec, arrays, out, dy=dy)))
    for clean, dirty in zip(*results, strict=True):
        assert_equal(dirty, clean)


def test_a_stream_refuses_concurrent_calls():
    spec, arrays, _, rng = make(19, 1, 1, 64, 64)
    stream = _kernel.stream([native.weights(spec, arrays)], 1)
    x = rng.standard_normal((1, 20_000, 64)).astype(np.float32)
    outcomes = []

    def run():
        try:
            stream.run(x)
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
def test_sizes_beyond_memory_are_refused(batch):
    spec, arrays, _, _ = make(20, 1, 1, 64, 64)
    with pytest.raises(MemoryError):
        _kernel.stream([native.weights(spec, arrays)], batch)


def test_a_stream_restores_its_snapshot():
    cells = [make(n, 1, 1, *widths, kind=kind) for n, widths, kind in ((0, (5, 20), "lstm"), (1, (20, 7), "gru"))]
    packed = [native.weights(spec, arrays) for spec, arrays, _, _ in cells]
    rng = np.random.default_rng(2)
    stream = _kernel.stream(packed, 3, 2)
    x = rng.normal(size=(4, 3, 5)).astype(np.float32)
    stream.step(x[0])
    stream.keep()
    first = stream.run(np.ascontiguousarray(x[1:].transpose(1, 0, 2)))
    for _ in range(2):
        stream.undo()
        again = np.stack([stream.step(x[n]) for n in (1, 2, 3)], axis=1)
        np.testing.assert_array_equal(again, first)


def test_a_stream_is_locked_by_one_call_at_a_time():
    lock = native.CallLock()
    with lock.attempt() as mine:
        assert mine
        for _ in range(2):
            with lock.attempt() as other:
                assert not other
    with pytest.raises(RuntimeError, match="as it came"), lock.attempt():
        raise RuntimeError("as it came")
    with lock.attempt() as mine:
        assert mine


def test_sessions_are_locked_by_one_call_at_a_time():
    table = native.SessionTable(3)
    opened = []
    for _ in range(3):
        with table.opening() as number:
            opened.append(number)
    with table.opening() as number:
        assert number is None
    assert (opened, len(table)) == ([0, 1, 2], 3)
    table.close(1)
    with pytest.raises(RuntimeError, match="as it came"), table.opening():
        raise RuntimeError("as it came")  # then the session isn't open, and its number is free
    with table.opening() as number:
        assert number == 4  # slot 1 again, under another number
        with table.opening() as other:
            assert other is None
        with pytest.raises(KeyError, match="session 4 is not open"), table.locked(np.array([4])):
            pass
    with table.locked(np.array([4, 0])) as slots:
        assert slots.tolist() == [1, 0]
        with pytest.raises(RuntimeError, match="another thread is stepping session 0"), table.locked(np.array([2, 0])):
            pass
        with pytest.raises(ValueError, match="session 2 is given twice"), table.locked(np.array([2, 2])):
            pass
        with table.locked(np.array([2])) as others:
            assert others.tolist() == [2]
    with pytest.raises(RuntimeError, match="as it came"), table.locked(np.array([2, 0])):
        raise RuntimeError("as it came")
    with table.locked(np.array([2, 0, 4])):
        pass
    for wrong in (np.array([1]), np.array([-1]), np.array([7]), np.array([2**62])):
        with pytest.raises(KeyError), table.locked(wrong):
            pass
    for wrong in ([1], np.array([1.0]), np.array([[1]]), np.arange(4)[::2]):
        with pytest.raises(TypeError):
            table.locked(wrong)

"""The mLSTM's memory: the reference by hand and against finite differences; the kernel against it, in every form."""

import itertools

import numpy as np
import pairs
import pytest
from test_kernel import FLOAT_ISAS, isa
from tolerances import KERNEL, KERNEL_GRADIENT, REFERENCE_DOUBLE

from cellstack import _kernel, native
from cellstack.cells.base import MatrixState
from cellstack.reference import memory as reference
from cellstack.reference.memory import MatrixInputs

__all__ = ["isa"]

STEPS, CHUNKS = 1, 2


def case(batch, steps, heads, dk, dv, seed=0, given=True):
    """Return the input as an array, its parts, and a state."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, steps, heads * (2 * dk + dv + 2)))
    x[..., -2 * heads : -heads] *= 3
    x[..., -heads:] = 3 * x[..., -heads:] + 2
    state = reference.zero_state(batch, heads, dk, dv)
    if given:
        state = MatrixState(*(rng.normal(size=part.shape) for part in state))
    return x, reference.split(x, heads, dk, dv), state


def run(x, sizes, state, dtype, form=0, mask=None, reset=None, threads=1, gradients=None):
    """Run the kernel; return h and the state, and the gradients of x and of the state before it."""
    heads, _, dv = sizes
    x = x.astype(dtype)
    before = [] if state is None else [part.astype(dtype) for part in state]
    shapes = [part.shape for part in reference.zero_state(len(x), *sizes)]
    after = [np.full(shape, np.nan, dtype) for shape in shapes]
    y = np.full((*x.shape[:2], heads * dv), np.nan, dtype)
    memory = _kernel.Memory(native.sequences(x, mask, reset), *sizes, 1e-6, before, after, y, form)
    twice = np.dtype(dtype) == np.float64
    native.memory_forward(memory, twice, threads)
    found = y.reshape(*y.shape[:2], heads, dv), MatrixState(*after)
    if gradients is None:
        return found
    dh, dstate = gradients
    dx, dbefore = np.full_like(x, np.nan), [np.full(shape, np.nan, dtype) for shape in shapes]
    of_state = [] if dstate is None else [np.ascontiguousarray(part, dtype) for part in dstate]
    native.memory_backward(memory, twice, np.ascontiguousarray(dh, dtype), of_state, dx, dbefore, threads)
    return (*found, reference.split(dx, *sizes), MatrixState(*dbefore))


def near(found, expected, tolerance):
    size = max(1.0, *(np.abs(part).max(initial=0) for part in expected))
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert np.abs(own - other).max(initial=0) <= tolerance * size


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────────────


def one_head(*rows):
    """Return the parts of steps `(q, k, v, ĩ, f̃)` with keys of width 1 and values of width 1."""
    columns = [np.array(column, float) for column in zip(*rows, strict=True)]
    q, k, v = (column.reshape(1, -1, 1, 1) for column in columns[:3])
    return MatrixInputs(q, k, v, *(column.reshape(1, -1, 1) for column in columns[3:]))


def test_two_steps_by_hand():
    """f̃ = 0 is f = 1/2. Step 1: m = max(log ½, log 2) = log 2, i = 1, C = 3·5, n = 3. Step 2: log ½ + log 2 = 0 =
    ĩ, so m = 0, f = i = 1: C = 15 + 7·2 = 29, n = 3 + 7 = 10; q = ½ gives nᵀq = 5."""
    inputs = one_head((1, 3, 5, np.log(2), 0), (0.5, 7, 2, 0, 0))
    h, state = reference.steps(inputs, reference.zero_state(1, 1, 1, 1), epsilon=0.0)
    np.testing.assert_allclose(h.ravel(), [5, 29 * 0.5 / 5], rtol=1e-15)
    np.testing.assert_allclose([part.item() for part in state], [29, 10, 0], atol=1e-15)


def test_the_divisor_is_at_least_one_in_units_of_the_state():
    """|nᵀq| = 1/4 < e^-m = 1: h is Cᵀq itself."""
    h, _ = reference.steps(one_head((1, 0.25, 8, 0, -100)), reference.zero_state(1, 1, 1, 1), epsilon=0.0)
    assert h.item() == 2.0


def test_m_is_only_a_factor():
    """C·e^m and n·e^m determine h; a state of zeros is empty, whatever m is."""
    _, inputs, state = case(2, 9, 2, 3, 4)
    shift = np.array([[0.5, -1.0], [2.0, 0.0]])
    scale = np.exp(-shift)[..., None]
    moved = MatrixState(state.C * scale[..., None], state.n * scale, state.m + shift)
    near(reference.steps(inputs, moved, 0.0)[:1], reference.steps(inputs, state, 0.0)[:1], REFERENCE_DOUBLE)
    empty = reference.zero_state(2, 2, 3, 4)
    near(
        reference.steps(inputs, empty._replace(m=shift), 0.0)[:1],
        reference.steps(inputs, empty, 0.0)[:1],
        REFERENCE_DOUBLE,
    )


@pytest.mark.parametrize("length", [1, 3, 8, 64])
def test_both_forms_of_the_reference_agree(length):
    _, inputs, state = case(2, 21, 2, 3, 5)
    (h, after), (other, ends) = reference.steps(inputs, state), reference.chunks(inputs, state, length=length)
    near([other, *ends], [h, *after], REFERENCE_DOUBLE)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_gradients_of_the_reference_are_differences(epsilon):
    """With a mask, a reset, and gradients into all results: also those of m, before and after."""
    _, inputs, state = case(2, 6, 2, 3, 2, seed=3)
    rng = np.random.default_rng(4)
    mask, reset = rng.random((2, 6)) < 0.8, np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    dh = rng.normal(size=inputs.v.shape)
    dstate = MatrixState(*(rng.normal(size=part.shape) for part in state))

    def loss(inputs, state):
        h, after = reference.steps(inputs, state, epsilon, mask, reset)
        return (h * dh).sum() + sum((a * b).sum() for a, b in zip(after, dstate, strict=True))

    found = reference.backward(inputs, state, dh, dstate, epsilon, mask, reset)
    for which, own in enumerate((inputs, state)):
        for name in own._fields:
            for place in np.ndindex(getattr(own, name).shape):
                values = []
                for step in (1e-6, -1e-6):
                    moved = getattr(own, name).copy()
                    moved[place] += step
                    both = [inputs, state]
                    both[which] = own._replace(**{name: moved})
                    values.append(loss(*both))
                difference = (values[0] - values[1]) / 2e-6
                assert abs(difference - getattr(found[which], name)[place]) < 1e-6 * max(1, abs(difference))


# ── the kernel ──────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = [(1, 1, 1, 4, 4), (2, 5, 3, 3, 5), (1, 70, 2, 16, 16), (2, 131, 1, 17, 40), (1, 90, 4, 64, 64)]


@pairs.parametrize("isa, sizes, dtype", FLOAT_ISAS, SIZES, ["float32", "float64"], unpaired=[0], indirect=["isa"])
def test_the_kernel_is_the_reference(isa, sizes, dtype):
    """Outputs, states and gradients, with masks and resets, with and without a state, in steps and in chunks."""
    batch, steps, heads, dk, dv = sizes
    rng = np.random.default_rng(1)
    for flags, given, form in itertools.product((False, True), (False, True), (STEPS, CHUNKS)):
        x, inputs, state = case(*sizes, seed=7, given=given)
        mask = rng.random((batch, steps)) < 0.8 if flags else None
        reset = rng.random((batch, steps)) < 0.1 if flags else None
        dh = rng.normal(size=inputs.v.shape)
        dstate = MatrixState(*(rng.normal(size=part.shape) for part in state)) if given else None
        args = x, (heads, dk, dv), state if given else None, dtype, form, mask, reset, 1, (dh, dstate)
        h, after, dx, dbefore = run(*args)
        expected_h, expected = reference.steps(inputs, state, 1e-6, mask, reset)
        none = MatrixState(*(np.zeros_like(part) for part in state))
        gradients, of_state = reference.backward(inputs, state, dh, dstate or none, 1e-6, mask, reset)
        # h is a quotient: where nᵀq nearly cancels, its error is that of the sums times 1/N
        near([h], [expected_h], 10 * KERNEL[dtype])
        near(after, expected, KERNEL[dtype])
        near([*dx, *dbefore], [*gradients, *of_state], 10 * KERNEL_GRADIENT * KERNEL[dtype])


def test_one_long_chunk_is_many_chunks():
    """A sequence shorter than the memory is wide runs as one chunk, if no state is needed."""
    sizes = 2, 160, 160
    x, inputs, state = case(1, 100, *sizes, given=False)
    y = np.empty((1, 100, 320))
    memory = _kernel.Memory(native.sequences(x), *sizes, 1e-6, [], [], y, 0)
    native.memory_forward(memory, True, 1)
    h, _ = reference.steps(inputs, state)
    near([y.reshape(h.shape)], [h], REFERENCE_DOUBLE)
    dh, dx = np.random.default_rng(0).normal(size=y.shape), np.empty_like(x)
    native.memory_backward(memory, True, dh, [], dx, [], 1)
    expected, _ = reference.backward(inputs, state, dh.reshape(h.shape), reference.zero_state(1, *sizes))
    near(reference.split(dx, *sizes), expected, 10 * REFERENCE_DOUBLE)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("sizes", [(2, 131, 1, 17, 90), (1, 200, 2, 160, 160)], ids=str)
def test_gradients_are_the_same_with_what_forward_keeps(sizes, nan, isa):
    """Many chunks, and one long chunk. Chunks with NaN keep nothing; the state after them is rounded differently."""
    batch, steps, heads, dk, dv = sizes
    x = case(*sizes)[0].astype("f4")
    if nan:
        x[0, 70, 3] = np.nan
    reset = np.zeros((batch, steps), bool)
    reset[0, 40] = nan
    row = native.score_row(dk, dv, steps, False, False)
    assert row == (80 if steps < 200 else 224)
    dh, found = np.random.default_rng(1).normal(size=(batch, steps, heads * dv)).astype("f4"), []
    for scores in (None, np.full((batch, heads, steps, row), np.inf, "f4")):
        y, dx = np.empty_like(dh), np.empty_like(x)
        kept = {"scores": scores, "score_row": row}
        memory = _kernel.Memory(native.sequences(x, None, reset), heads, dk, dv, 1e-6, [], [], y, **kept)
        native.memory_forward(memory, False, 1)
        native.memory_backward(memory, False, dh, [], dx, [], 1)
        found.append((y, dx))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=0, atol=10 * KERNEL["float32"] * np.nanmax(np.abs(one)) if nan else 0
        )
    assert native.score_row(32, 32, steps, False, False) == 0  # more than keys and values together


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    x, _, state = case(3, 80, 2, 24, 24)
    whole = run(x, (2, 24, 24), state, "float32", threads=1)
    for threads in (2, 5):
        again = run(x, (2, 24, 24), state, "float32", threads=threads)
        assert all(
            a.tobytes() == b.tobytes() for a, b in zip((whole[0], *whole[1]), (again[0], *again[1]), strict=True)
        )
    alone = run(x[1:2], (2, 24, 24), MatrixState(*(part[1:2] for part in state)), "float32")
    assert alone[0].tobytes() == whole[0][1:2].tobytes()


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_nan_reaches_no_earlier_step(part):
    """Also within a chunk, whose products would mix it into the steps before."""
    x, inputs, _ = case(1, 40, 1, 8, 8, given=False)
    clean, _ = run(x, (1, 8, 8), None, "float32", CHUNKS)
    getattr(inputs, part)[0, 20] = np.nan
    x = np.concatenate([array.reshape(1, 40, -1) for array in inputs], axis=-1)
    h, _ = run(x, (1, 8, 8), None, "float32", CHUNKS)
    near([h[:, :20]], [clean[:, :20]], KERNEL["float32"])
    assert np.isnan(h[0, 20]).all()
    reset = np.zeros((1, 40), bool)
    reset[0, 30] = True
    h, _ = run(x, (1, 8, 8), None, "float32", CHUNKS, reset=reset)
    assert np.isfinite(h[0, 30:]).all()


def test_gates_that_would_overflow():
    """e^ĩ of 300 is no float; the stabiliser keeps every number finite."""
    x, inputs, state = case(1, 70, 2, 8, 8, given=False)
    inputs.i[:] *= 100
    x = np.concatenate([array.reshape(1, 70, -1) for array in inputs], axis=-1)
    for form in (STEPS, CHUNKS):
        h, after = run(x, (2, 8, 8), None, "float32", form)
        assert all(np.isfinite(part).all() for part in (h, *after))
        near([h], [reference.steps(inputs, state)[0]], 1e-3)  # m of 300 has 5 digits after the point: gates of 3e-5


@pytest.mark.models
def test_parity_with_xlstm():
    """The functions of xlstm and mlstm_kernels, outputs, states and gradients, over random shapes."""
    torch = pytest.importorskip("torch")
    backends = pytest.importorskip("xlstm.blocks.mlstm.backends")
    chunkwise = pytest.importorskip("mlstm_kernels.torch.chunkwise.native.fwbw").mlstm_chunkwise__native_autograd
    rng = np.random.default_rng(5)
    for _ in range(5):
        batch, heads, d = (int(n) for n in rng.integers((1, 1, 2), (4, 4, 40)))
        steps = 64 * int(rng.integers(1, 4))
        x, inputs, _ = case(batch, steps, heads, d, d, seed=int(rng.integers(99)), given=False)
        parts = [torch.from_numpy(np.moveaxis(array, 2, 1).copy()).requires_grad_() for array in inputs]
        q, k, v, i, f = parts
        dh = rng.normal(size=inputs.v.shape)
        h, after, dx, _ = run(x, (heads, d, d), None, "float64", 0, gradients=(dh, None))
        theirs = {
            "parallel": backends.parallel_stabilized_simple(q, k, v, i[..., None], f[..., None]),
            "chunkwise": chunkwise(q, k, v, i, f, chunk_size=64),
        }
        for output in theirs.values():
            near([h], [np.moveaxis(output.detach().numpy(), 1, 2)], 1e-5)  # their epsilon relates to another m
            found = torch.autograd.grad(output, parts, torch.from_numpy(np.moveaxis(dh, 2, 1).copy()))
            near(dx, [np.moveaxis(part.numpy(), 1, 2) for part in found], 1e-4)
        shapes = (d, d), (d, 1), (1, 1)
        C, n, m = (torch.zeros(batch, heads, *shape, dtype=torch.float64) for shape in shapes)
        for t in range(steps):
            step = [part[:, :, t : t + 1].detach().clone() for part in (q, k, v)]
            gates = [part[:, :, t, None, None].detach() for part in (i, f)]
            _, (C, n, m) = backends.recurrent_step_stabilized_simple(C, n, m, *step, *gates)
        near(after, [C.numpy(), n[..., 0].numpy(), m[..., 0, 0].numpy()], 1e-12)

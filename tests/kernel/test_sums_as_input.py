"""Cells with `use_kernel=False`, whose input is the sums over x, compared with an identity matrix as the kernel."""

import family
import kernel_calls as calls
import numpy as np
import pytest
import tolerances
from test_heads import masked, over_isas
from test_kernel import DTYPES, assert_equal, bare, compare, isa, make
from test_reference import check_gradients

from cellstack import _kernel, native
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import CellSpec

__all__ = ["isa"]

MEMBERS = {
    "lstm": {},
    "lstm, heads": {"heads": 3},
    "flags": {"peepholes": True, "coupled": True, "clip": 1.5, "zoneout": 0.2, "proj_size": 2},
    "norm": {"layer_norm": True},
    "joint norm": {"layer_norm": "joint"},
    "no bias": {"use_bias": False},
    "gru": {"kind": "gru"},
    "gru, reset before": {"kind": "gru", "reset_after": False},
    "gru, attention": {"kind": "gru", "attention": True},
    "rnn": {"kind": "rnn"},
    "mingru": {"kind": "mingru"},
    "minlstm": {"kind": "minlstm"},
}


def made(seed, batch, steps, units, member, dtype=np.float64):
    """Return a cell without a kernel with a random case, and the same cell with an identity matrix."""
    flags = MEMBERS[member]
    gates = len(CellSpec(99, units, **flags).gates)
    spec, arrays, case, rng = make(seed, batch, steps, gates * units, units, dtype, use_kernel=False, **flags)
    whole = CellSpec(**{**spec.settings, "use_kernel": True})
    return spec, arrays, case, rng, whole, {**arrays, "kernel": np.eye(gates * units, dtype=dtype)}


@pytest.mark.parametrize("member", MEMBERS)
def test_gradients_of_the_reference_are_finite_differences(member):
    spec, arrays, case, rng, *_ = made(3, 2, 3, 6, member)
    check_gradients(rng, spec, arrays, {"x": case["x"], "state": family.random_state(rng, spec, 2)})


@over_isas("member, units, dtype, batch, copy", list(MEMBERS), [6, 12, 36], DTYPES, [1, 2, 7], [True, False])
def test_forward_and_backward_follow_the_reference(isa, member, units, dtype, batch, copy):
    spec, arrays, case, rng, *_ = made(5, batch, 6, units, member)
    case = masked(case, spec, rng) if batch == 7 and not spec.proj_size else case
    compare(spec, arrays, case, rng, dtype, tolerances.KERNEL[np.dtype(dtype).name], copy=copy)


@over_isas("member, units, batch", list(MEMBERS), [6, 36], [1, 2, 7, 30])
def test_the_bits_are_those_of_an_identity_matrix(isa, member, units, batch):
    spec, arrays, case, rng, whole, others = made(6, batch, 5, units, member, np.float32)
    out, expected = calls.forward(spec, arrays, **case), calls.forward(whole, others, **case)
    assert_equal(out, expected)
    given = {"dy": rng.standard_normal(out.y.shape).astype(np.float32)}
    found, gradients = calls.backward(spec, arrays, out, **given), calls.backward(whole, others, expected, **given)
    del gradients.arrays["kernel"]
    assert_equal(found, gradients)


@over_isas("member", list(MEMBERS))
def test_bits_do_not_depend_on_chunks_or_threads(isa, member):
    spec, arrays, case, rng, *_ = made(7, 2, 40, 36, member, np.float32)
    whole = calls.forward(spec, arrays, **case)
    stream = _kernel.stream([native.weights(spec, arrays)], 2, 2)
    stream.set_state(0, case["state"])
    parts = [stream.run(np.ascontiguousarray(case["x"][:, a:b])) for a, b in ((0, 1), (1, 3), (3, 40))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole.y)
    given = {"dy": rng.standard_normal(whole.y.shape).astype(np.float32)}
    gradients = calls.backward(spec, arrays, whole, **given)
    assert_equal(calls.forward(spec, arrays, **case, threads=3), whole)
    assert_equal(calls.backward(spec, arrays, bare(whole), **given, threads=3), gradients)


def test_exchanged_gates_are_found():
    """A deliberate error: it exceeds every tolerance."""
    spec, arrays, case, *_ = made(8, 2, 6, 12, "lstm", np.float32)
    other = {**case, "x": np.ascontiguousarray(np.roll(case["x"], 12, axis=2))}
    difference = np.abs(calls.forward(spec, arrays, **other).y - calls.forward(spec, arrays, **case).y)
    assert difference.max() > 100 * tolerances.KERNEL["float32"]


def test_another_width_is_refused():
    with pytest.raises(ShapeError, match=r"expected input_size 16 with use_kernel=False, the sums of 4 gates of 4 un"):
        CellSpec(15, 4, use_kernel=False)
    assert "kernel" not in CellSpec(16, 4, use_kernel=False).shapes

"""Cells with heads, compared with a cell whose recurrent kernel is a block-diagonal matrix, and with the reference."""

import itertools

import family
import kernel_calls as calls
import numpy as np
import pairs
import pytest
import tolerances
from test_kernel import DTYPES, FLOAT_ISAS, ISAS, assert_equal, bare, compare, flat, isa, make
from test_reference import ROUNDING, check_gradients

from cellstack import _kernel, native, reference
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import CellSpec

__all__ = ["isa"]

MEMBERS = {
    "lstm": {},
    "flags": {"peepholes": True, "coupled": True, "clip": 1.5, "zoneout": 0.2, "learn_initial_state": True},
    "norm": {"layer_norm": True},
    "joint norm": {"layer_norm": "joint"},
    "gru": {"kind": "gru"},
    "gru, reset before": {"kind": "gru", "reset_after": False},
    "gru, norm": {"kind": "gru", "layer_norm": True},
    "rnn": {"kind": "rnn"},
    "ligru": {"kind": "ligru"},
}
WIDTHS = [(4, 2), (12, 3), (20, 4), (100, 4), (64, 4), (66, 2), (34, 17), (20, 20)]
"""Units and heads: heads that are narrower than a vector, that begin within one, that consist of whole ones."""


def over_isas(names, *axes, isas=FLOAT_ISAS):
    return pairs.parametrize(f"isa, {names}", isas, *axes, indirect=["isa"])


def masked(case, spec, rng):
    """Add masks, resets and recurrent dropout to a case, which then runs in reverse."""
    batch, steps, _ = case["x"].shape
    dropped = ((rng.random((batch, spec.units)) < 0.6) / 0.6).astype(case["x"].dtype)
    flags = {"mask": rng.random((batch, steps)) < 0.8, "reset": rng.random((batch, steps)) < 0.2}
    return {**case, **flags, "recurrent_dropout": dropped, "reverse": True}


def one_head(spec, arrays):
    """Return the same cell with one head: a matrix that is zero outside the blocks of the heads."""
    heads, gates = spec.heads, len(spec.gates)
    size = spec.units // heads
    matrix = np.zeros((heads, size, gates, heads, size), arrays["recurrent_kernel"].dtype)
    for head, own in enumerate(arrays["recurrent_kernel"]):
        matrix[head, :, :, head] = own.reshape(size, gates, size)
    return CellSpec(**{**spec.settings, "heads": 1}), {**arrays, "recurrent_kernel": matrix.reshape(spec.units, -1)}


def of_heads(spec, matrix):
    """Return the blocks of a block-diagonal matrix as the recurrent kernel of a cell with heads."""
    size = spec.units // spec.heads
    parts = matrix.reshape(spec.heads, size, -1, spec.heads, size)
    return np.stack([parts[head, :, :, head].reshape(size, -1) for head in range(spec.heads)])


@pytest.mark.parametrize(("member", "widths"), list(itertools.product(MEMBERS, WIDTHS)))
def test_the_reference_is_that_of_a_block_diagonal_matrix(member, widths):
    spec, arrays, case, rng = make(1, 3, 6, 5, widths[0], np.float64, heads=widths[1], **MEMBERS[member])
    case = masked(case, spec, rng)
    plain, whole = one_head(spec, arrays)
    out, expected = reference.forward(spec, arrays, **case), reference.forward(plain, whole, **case)
    given = {"dy": rng.standard_normal(out.y.shape), "dgates": rng.standard_normal(out.gates.shape)}
    found, gradients = (
        reference.backward(spec, arrays, out, **given),
        reference.backward(plain, whole, expected, **given),
    )
    gradients.arrays["recurrent_kernel"] = of_heads(spec, gradients.arrays["recurrent_kernel"])
    for a, b in ((out, expected), (found, gradients)):
        for name, array in flat(a).items():
            np.testing.assert_allclose(array, flat(b)[name], rtol=0, atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("member", MEMBERS)
def test_gradients_of_the_reference_are_finite_differences(member):
    rng = np.random.default_rng(3)
    spec = CellSpec(3, 6, heads=3, **MEMBERS[member])
    case = {"x": rng.standard_normal((2, 3, 3)), "state": family.random_state(rng, spec, 2)}
    check_gradients(rng, spec, family.random_arrays(rng, spec), case)


@over_isas("member, widths, dtype, batch, copy", list(MEMBERS), WIDTHS, DTYPES, [1, 2, 7], [True, False])
def test_forward_and_backward_follow_the_reference(isa, member, widths, dtype, batch, copy):
    spec, arrays, case, rng = make(5, batch, 6, 5, widths[0], np.float64, heads=widths[1], **MEMBERS[member])
    case = masked(case, spec, rng) if batch == 7 else case
    compare(spec, arrays, case, rng, dtype, tolerances.KERNEL[np.dtype(dtype).name], copy=copy)


@over_isas("member, batch", list(MEMBERS), [1, 7])
def test_a_nan_stays_in_its_head(isa, member, batch):
    spec, arrays, case, _ = make(5, batch, 2, 7, 20, heads=20, **MEMBERS[member])
    h, *others = case["state"]
    h[:, 7] = np.nan
    y = calls.forward(spec, arrays, **{**case, "state": (h, *others)}).y
    whole = spec.layer_norm is not False  # a normalisation includes all units
    assert np.isnan(y[..., 7]).all()
    assert np.isnan(np.delete(y, 7, -1)).any() == whole


@over_isas(
    "member, widths, batch, element", list(MEMBERS), WIDTHS, [1, 2, 7, 30], ["float32", "bfloat16", "int8"], isas=ISAS
)
def test_the_bits_are_those_of_a_block_diagonal_matrix(isa, member, widths, batch, element):
    """Products with zeros don't change a sum: forward in every format, and backward."""
    spec, arrays, case, rng = make(6, batch, 5, 7, widths[0], heads=widths[1], **MEMBERS[member])
    case = masked(case, spec, rng)
    plain, whole = one_head(spec, arrays)
    out = calls.forward(spec, arrays, **case, element=element)
    expected = calls.forward(plain, whole, **case, element=element)
    assert_equal(out, expected)
    if element == "int8":
        return
    given = {"dy": rng.standard_normal(out.y.shape).astype(np.float32)}
    found = calls.backward(spec, arrays, out, **given, element=element)
    gradients = calls.backward(plain, whole, expected, **given, element=element)
    gradients.arrays["recurrent_kernel"] = of_heads(spec, gradients.arrays["recurrent_kernel"])
    assert_equal(found, gradients)


@over_isas("member, widths", list(MEMBERS), [(35, 5), (320, 4), (330, 3)])
def test_bits_do_not_depend_on_chunks_or_threads(isa, member, widths):
    spec, arrays, case, rng = make(7, 2, 40, 6, widths[0], heads=widths[1], **MEMBERS[member])
    whole = calls.forward(spec, arrays, **case)
    stream = _kernel.stream([native.weights(spec, arrays)], 2, 2)
    stream.set_state(0, case["state"])
    parts = [stream.run(np.ascontiguousarray(case["x"][:, a:b])) for a, b in ((0, 1), (1, 3), (3, 40))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole.y)
    given = {"dy": rng.standard_normal(whole.y.shape).astype(np.float32)}
    gradients = calls.backward(spec, arrays, whole, **given)
    for threads in (2, 3):
        assert_equal(calls.forward(spec, arrays, **case, threads=threads), whole)
        assert_equal(calls.backward(spec, arrays, whole, **given, threads=threads), gradients)
        assert_equal(calls.backward(spec, arrays, bare(whole), **given, threads=threads), gradients)


@pytest.mark.parametrize("member", MEMBERS)
def test_swapped_heads_are_found(member):
    """A deliberate error: it exceeds every tolerance."""
    spec, arrays, case, _ = make(8, 2, 6, 5, 12, heads=3, **MEMBERS[member])
    swapped = {**arrays, "recurrent_kernel": np.ascontiguousarray(arrays["recurrent_kernel"][[1, 0, 2]])}
    y = calls.forward(spec, arrays, **case).y
    assert np.abs(calls.forward(spec, swapped, **case).y - y).max() > 100 * tolerances.KERNEL["float32"]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"heads": 4}, ShapeError, r"CellSpec: units 10 can't be divided into heads=4"),
        ({"heads": 0}, ValueError, r"CellSpec: expected heads to be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, r"CellSpec: expected heads to be an integer, got 2.0"),
        ({"heads": True}, TypeError, r"CellSpec: expected heads to be an integer, got True"),
        ({"heads": 2, "proj_size": 4}, ValueError, r"CellSpec: expected heads=1 with proj_size=4, got heads=2"),
        ({"heads": 2, "kind": "mingru"}, ValueError, r"CellSpec: heads is valid with kind='lstm' or .* only"),
    ],
)
def test_invalid_heads_are_refused(flags, error, message):
    with pytest.raises(error, match=message):
        CellSpec(3, 10, **flags)

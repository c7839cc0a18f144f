"""The last block of units, whose gates share vectors if few units remain, compared with a block of its own gates."""

from dataclasses import replace

import kernel_calls as calls
import numpy as np
import pairs
import pytest
from test_kernel import EVERY_ISA, ISAS, isa, make

from cellstack import _kernel, native
from cellstack.cells.layout import block_diagonal

__all__ = ["isa"]

MEMBERS = {
    "lstm": {},
    "coupled": {"coupled": True, "peepholes": True},
    "gru": {"kind": "gru"},
    "gru, reset before": {"kind": "gru", "reset_after": False},
    "minlstm": {"kind": "minlstm"},
    "heads": {"heads": 3},
    "gru, heads": {"kind": "gru", "heads": 3},
    "five heads": {"heads": 5},
}
UNITS = [18, 21, 27, 36, 51, 60]
"""Blocks of 2 to 16 units leave remainders of one, two and three vectors on each set."""


def wider(spec, arrays, units):
    """Return a cell of `units` units and one head: the same ones, and units whose weights are zero."""
    if spec.heads > 1:
        arrays = {**arrays, "recurrent_kernel": block_diagonal(arrays["recurrent_kernel"], len(spec.gates))}
    spec = replace(spec, units=units, heads=1)
    padded = {name: np.zeros(shape, arrays["kernel"].dtype) for name, shape in spec.shapes.items()}
    for name, array in padded.items():
        gates = 1 if name == "peepholes" else len(spec.gates)
        for to, part in zip(np.split(array, gates, -1), np.split(arrays[name], gates, -1), strict=True):
            to[tuple(slice(size) for size in part.shape)] = part
    return spec, padded


@pairs.parametrize(
    "isa, member, units, batch, element",
    ISAS,
    list(MEMBERS),
    UNITS,
    [1, 2, 7, 30],
    ["float32", "float64", "bfloat16", "int8"],
    also=(0, 1, 2),
    unless=lambda isa, member, units, *_: units % MEMBERS[member].get("heads", 1) > 0,
    indirect=["isa"],
)
def test_the_bits_are_those_of_a_wider_cell(isa, member, units, batch, element):
    """Units of zero weights fill the last block of the wider cell, and add nothing to the sums."""
    dtype = np.float64 if element == "float64" else np.float32
    spec, arrays, case, rng = make(units, batch, 3, 7, units, dtype, **MEMBERS[member])
    x, mask = case["x"], rng.random((batch, 3)) < 0.8
    run = lambda *cell: calls.forward(*cell, x, mask=mask, element=element if dtype == np.float32 else None)  # noqa: E731
    found, expected = run(spec, arrays), run(*wider(spec, arrays, 64))
    for name in ("y", "gates"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[..., :units], err_msg=name)
    for a, b in zip(found.state, expected.state, strict=True):
        np.testing.assert_array_equal(a, b[:, :units])


@EVERY_ISA
@pytest.mark.parametrize("element", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("member", ["lstm", "gru"])
def test_a_thread_may_have_the_last_block_alone(isa, member, element):
    """Each of two threads has one of two blocks; the last of the steps is a chunk of its own."""
    units = 20 if isa.startswith("avx512") else 10 if isa == "avx2" else 5
    spec, arrays, case, _ = make(1, 1, 65, 4000, units, **MEMBERS[member])
    assert _kernel.cut([native.weights(spec, arrays, element)], 1, 65, False, 2) == (1, 1, 2)
    shared, alone = (calls.forward(spec, arrays, **case, element=element, threads=threads) for threads in (2, 1))
    np.testing.assert_array_equal(shared.y, alone.y)

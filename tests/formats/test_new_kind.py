"""A kind of cell that other formats don't have: their writers refuse it by name."""

import numpy as np
import pytest

import cellstack as cs
from cellstack import layout, spec
from cellstack.cells import KINDS
from cellstack.cells.base import HiddenState, Kind
from cellstack.cells.rnn import RNNTrace


def step(ops, spec, a, h):
    """A leaky average of a candidate that depends on x only."""
    a_z, a_g = ops.split(a, 2)
    z, g = ops.gate("z", a_z), ops.gate("g", a_g)
    h = ops.add(ops.mul(ops.one_minus(z), h), ops.mul(z, g))
    return (z, g), (h,)


@pytest.fixture
def network(monkeypatch):
    kind = Kind(
        name="toy",
        title="ToyCell",
        gates={"z": "write", "g": "candidate"},
        state=HiddenState,
        trace=RNNTrace,
        step=step,
        shapes=lambda spec: {"recurrent_kernel": None},
    )
    monkeypatch.setitem(KINDS, "toy", kind)
    for table, value in ((spec.GATES, ("z", "g")), (spec.STATES, HiddenState), (spec.TRACES, RNNTrace)):
        monkeypatch.setitem(table, "toy", value)
    monkeypatch.setitem(layout.OURS, "toy", "zg")
    description = cs.CellSpec(3, 4, kind="toy")
    assert description.shapes == {"kernel": (3, 8), "bias": (8,)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in description.shapes.items()}
    return cs.Network([cs.Recurrent((cs.Cell(description, **arrays),))])


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".pt"])
def test_writers_refuse_a_kind_that_their_format_lacks(network, tmp_path, suffix):
    with pytest.raises(ValueError, match="ToyCell"):
        network.save(tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())

"""A kind of cell that only its declaration describes: formats that don't have it refuse it by name, C has it."""

from dataclasses import replace

import numpy as np
import pytest
from tools import need

import cellstack as cs
from cellstack.cells import KINDS, layout, spec
from cellstack.cells.base import HiddenState, Kind
from cellstack.cells.rnn import RNNTrace
from cellstack.formats.runtimes import c


def step(ops, spec, a, h):
    """A leaky average of a candidate that depends on x only, and a constant."""
    a_z, a_g = ops.split(a, 2)
    z, g = ops.gate("z", a_z), ops.gate("g", a_g)
    h = ops.add(ops.mul(ops.one_minus(z), h), ops.affine(ops.mul(z, ops.affine(g, -1.0)), 0.5, 0.25))
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
        arrays=KINDS["mingru"].arrays,
    )
    monkeypatch.setitem(KINDS, "toy", kind)
    for table, value in ((spec.GATES, ("z", "g")), (spec.STATES, HiddenState), (spec.TRACES, RNNTrace)):
        monkeypatch.setitem(table, "toy", value)
    monkeypatch.setitem(layout.OURS, "toy", "zg")
    description = cs.CellSpec(3, 4, kind="toy")
    assert description.shapes == {"kernel": (3, 8), "bias": (8,)}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in description.shapes.items()}
    return cs.Network([cs.nodes.Recurrent((cs.nodes.Cell(description, **arrays),))])


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".pt"])
def test_writers_refuse_a_kind_that_their_format_lacks(network, tmp_path, suffix):
    with pytest.raises(ValueError, match="ToyCell"):
        network.save(tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


def test_c_is_derived_from_the_step(network, tmp_path):
    need("cc")
    _, source = network.export_c(tmp_path)
    x = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)
    (y,) = c.run(network, str(source), {"x": x}).outputs.values()
    (cell,) = network.cells
    a_z, a_g = np.split(x @ cell.kernel + cell.bias, 2, axis=-1)
    z, g, h = 1 / (1 + np.exp(-a_z)), np.tanh(a_g), np.zeros((2, 4))
    for t in range(5):
        h = (1 - z[:, t]) * h - 0.5 * z[:, t] * g[:, t] + 0.25
        np.testing.assert_allclose(y[:, t], h, rtol=1e-5, atol=1e-6)


def test_an_operation_that_c_lacks_is_refused(network, monkeypatch, tmp_path):
    def dotted(ops, spec, a, h):
        gates, (h,) = step(ops, spec, a, h)
        return gates, (ops.mul(h, ops.dot(h, h)),)

    monkeypatch.setitem(KINDS, "toy", replace(KINDS["toy"], step=dotted))
    with pytest.raises(ValueError, match="export_c: ToyCell: the operation contract isn't supported"):
        network.export_c(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.names], ids=lambda kind: kind.name)
@pytest.mark.parametrize("suffix", [".keras", ".h5", ".pt"])
def test_writers_refuse_our_kinds_that_their_format_lacks(kind, suffix, tmp_path):
    description = cs.CellSpec(3, 4, kind=kind.name)
    cell = cs.nodes.Cell(description, *(np.zeros(shape, np.float32) for shape in description.shapes.values()))
    with pytest.raises(ValueError, match=rf"{kind.title}.*\.safetensors supports every network"):
        cs.Network([cs.nodes.Recurrent((cell,))]).save(tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())

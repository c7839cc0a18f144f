"""Scan files written by 0.1.0 load, and give the same results as then (tests/fixtures/README.md)."""

from pathlib import Path

import numpy as np
import pytest

import cellstack as cs
from cellstack import _kernel
from cellstack.cells.base import HiddenState, State

FOLDER = Path(__file__).parents[2] / "fixtures" / "0.1.0"
NAMES = sorted(path.stem.removeprefix("scan_") for path in FOLDER.glob("scan_*.onnx"))


@pytest.fixture(scope="module")
def answers():
    with np.load(FOLDER / "scan_answers.npz") as file:
        return dict(file)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize("name", NAMES)
def test_scans(name, isa, answers):
    if isa not in _kernel.isas():
        pytest.skip(f"this machine has no {isa}")
    before = _kernel.isa()
    _kernel.set_isa(isa)
    try:
        check(cs.load(FOLDER / f"scan_{name}.onnx"), name, isa, answers)
    finally:
        _kernel.set_isa(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_scans(name):
    path = FOLDER / f"scan_{name}.onnx"
    whole, parts = cs.load(path), cs.extract(path)
    cells = [cell for part in parts.values() for cell in part.cells]
    assert [cell.spec for cell in cells] == [cell.spec for cell in whole.cells]
    for cell, expected in zip(cells, whole.cells, strict=True):
        for key, array in expected.arrays.items():
            np.testing.assert_array_equal(cell.arrays[key], array)


def check(net, name, isa, answers):
    starts = []
    for number, cell in enumerate(net.cells):
        kind = State if cell.spec.kind == "lstm" else HiddenState
        starts.append(kind(*(answers[f"start{number}/{name}/{part}"] for part in kind._fields)))
    y, after = net.run(answers[f"x/{name}"], tuple(starts))
    np.testing.assert_allclose(y, answers[f"{isa}/{name}/y"], rtol=1e-5, atol=1e-6)
    for number, state in enumerate(after):
        for part, array in zip(state._fields, state, strict=True):
            np.testing.assert_allclose(array, answers[f"{isa}/{name}/state{number}/{part}"], rtol=1e-5, atol=1e-6)


def test_every_file_has_its_answers(answers):
    assert set(NAMES) == {key.split("/")[1] for key in answers if key.startswith("x/")}
    assert len(NAMES) == 13

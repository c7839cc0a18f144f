"""A kind of cell with four states, which only its declaration describes: what runs without the kernel."""

import pickle

import numpy as np
import pytest
import tolerances
import torch
from networks import fill
from tools import need
from toy import ToyState, ToyTrace, evaluate, register, run_without_kernel

import cellstack as cs
from cellstack import CellSpec, Network
from cellstack.formats import onnx
from cellstack.formats.runtimes import c as c_runtime
from cellstack.inspect import diagnostics
from cellstack.inspect.monitoring.records import examined
from cellstack.layers import RNN
from cellstack.layers.cell_base import Cell
from cellstack.layers.observer import Observer
from cellstack.nodes import Recurrent

WIDTH, UNITS = 3, 4
FLAGS = ({}, {"zoneout": 0.2, "zoneout_cell": 0.4}, {"learn_initial_state": True, "layer_norm": True})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    register(monkeypatch)


def network(dtype="float64", seed=0, **flags):
    cell = fill(np.random.default_rng(seed), CellSpec(WIDTH, UNITS, kind="toy", **flags), dtype)
    return Network([Recurrent((cell,))], ["cell"], inputs=["x"])


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def toy_layer(monkeypatch, **flags):
    """Return a layer over the torch loop, and its cell's arrays."""

    class ToyCell(Cell):
        kind = "toy"

    monkeypatch.setattr(ToyCell, "route", lambda self, kernel: ("loop", "the kernel doesn't have it"))
    cell = ToyCell(UNITS, input_size=WIDTH, dtype="float64", **flags)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    arrays = {name: array.detach().numpy() for name, array in cell.named_parameters()}
    return RNN(cell, return_sequences=True, return_state=True), arrays


@pytest.mark.parametrize("flags", FLAGS)
def test_the_torch_loop_has_the_states(monkeypatch, flags):
    layer, arrays = toy_layer(monkeypatch, **flags)
    spec = layer.cell.spec
    x, mask, start = drawn(1, 2, 5, WIDTH), drawn(2, 2, 5) < 0.6, drawn(3, 4, 2, UNITS)
    for before in (None, start):
        state = None if before is None else ToyState(*map(torch.from_numpy, before))
        y, *ends = layer(torch.from_numpy(x), initial_state=state, mask=torch.from_numpy(mask), training=False)
        fields, last = evaluate(spec, arrays, x, before, mask)
        for found, exact in zip((y, *ends), (fields["h"], *last), strict=True):
            np.testing.assert_allclose(found.detach().numpy(), exact, rtol=0, atol=tolerances.LOOP)


def test_training_draws_a_mask_for_each_state_with_zoneout(monkeypatch):
    layer, arrays = toy_layer(monkeypatch, zoneout=0.3, zoneout_cell=0.6, seed=1)
    cell, x, masks = layer.cell, drawn(1, 2, 5, WIDTH), []
    draw = cell.masks
    monkeypatch.setattr(cell, "masks", lambda *given: masks.append(draw(*given)) or masks[-1])
    y, *ends = layer(torch.from_numpy(x), training=True)
    of_h, of_n = (mask.numpy() for mask in masks[0].zoneout)
    assert 0 < of_h.mean() < of_n.mean() < 1
    fields, last = evaluate(cell.spec, arrays, x, kept={"h": of_h, "n": of_n})
    for found, exact in zip((y, *ends), (fields["h"], *last), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), exact, rtol=0, atol=tolerances.LOOP)


def test_training_is_observed_for_every_state(monkeypatch):
    layer, _ = toy_layer(monkeypatch, zoneout=0.2, zoneout_cell=0.3)
    observer = Observer(layer, rows=2, steps=4)
    observer.start()
    x = torch.from_numpy(drawn(1, 3, 6, WIDTH))
    y, *_ = layer(x)
    y[:, -1].square().sum().backward()
    (looked,) = observer.looked()
    assert list(looked.lags) == list(ToyState._fields)
    assert type(looked.trace) is ToyTrace
    record, _ = examined(looked)
    assert list(record.figures["states"]) == list(ToyState._fields)


def test_the_gradients_are_those_of_finite_differences(monkeypatch):
    layer, _ = toy_layer(monkeypatch, zoneout=0.2, zoneout_cell=0.3)
    x = torch.from_numpy(drawn(1, 2, 3, WIDTH)).requires_grad_()
    start = [torch.from_numpy(one).requires_grad_() for one in drawn(2, 4, 2, UNITS)]
    assert torch.autograd.gradcheck(lambda x, *start: layer.eval()(x, initial_state=ToyState(*start)), (x, *start))


# ── networks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", FLAGS)
def test_a_trace_has_the_states_and_so_has_its_pickle(monkeypatch, flags):
    run_without_kernel(monkeypatch)
    net, x, mask = network(**flags), drawn(1, 2, 5, WIDTH), drawn(2, 2, 5) < 0.6
    (cell,) = net.cells
    start = ToyState(*drawn(3, 4, 2, UNITS))
    t = net.trace(x, (start,), mask)
    fields, last = evaluate(cell.spec, cell.arrays, x, start, mask)
    for trace in (t, pickle.loads(pickle.dumps(t))):
        (seen,) = trace["cell"].cells
        assert list(seen) == list(ToyTrace._fields)
        for name, exact in fields.items():
            np.testing.assert_array_equal(seen[name], exact)
        for found, exact in zip(trace.state[0], last, strict=True):
            np.testing.assert_array_equal(found, exact)
        assert type(seen.record.before) is type(seen.record.states) is ToyState
        np.testing.assert_array_equal(seen.record.before.m, start.m)
        np.testing.assert_array_equal(trace.select(steps=slice(1, 3))["cell"]["n"], fields["n"][:, 1:3])


def test_its_diagnostics_and_page_come_from_the_declaration(monkeypatch, tmp_path):
    run_without_kernel(monkeypatch)
    net = network(zoneout=0.2, zoneout_cell=0.4)
    t = net.trace(drawn(1, 2, 5, WIDTH))
    (seen,) = t["cell"].cells
    kept, written = diagnostics._update(seen)  # c has no zoneout
    np.testing.assert_array_equal(kept, seen.f)
    np.testing.assert_array_equal(written, seen.i * seen.g * seen.q)
    assert list(diagnostics.gate_shares(seen)) == ["i", "f", "o"]
    assert diagnostics.half_lives(seen).shape == (UNITS,)
    t.save_html(tmp_path / "t.html")
    assert (tmp_path / "t.html").stat().st_size


# ── formats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", FLAGS)
def test_the_native_file_and_onnx_have_the_states(tmp_path, flags):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = network("float32", **flags)
    (cell,) = net.cells
    path = tmp_path / "net.onnx"
    onnx.save(net, path, states=True)
    session = onnxruntime.InferenceSession(path)
    x, start = drawn(1, 2, 5, WIDTH).astype("f4"), ToyState(*drawn(3, 4, 2, UNITS).astype("f4"))
    feed = {f"cell.{name}": array for name, array in start._asdict().items()}
    assert {one.name for one in session.get_overridable_initializers()} == feed.keys()
    results = dict(zip((one.name for one in session.get_outputs()), session.run(None, {"x": x, **feed}), strict=True))
    fields, last = evaluate(cell.spec, cell.arrays, x.astype("f8"), [a.astype("f8") for a in start])
    y = results.pop("cell")
    np.testing.assert_allclose(y, fields["h"], rtol=0, atol=tolerances.KERNEL["float32"])
    for name, exact in last._asdict().items():
        np.testing.assert_allclose(results.pop(f"cell.{name}.after"), exact, rtol=0, atol=tolerances.KERNEL["float32"])
    assert not results
    net.save(tmp_path / "net.safetensors")
    for file in (path, tmp_path / "net.safetensors"):
        (again,) = cs.load(file).cells
        assert again.spec == cell.spec
        assert again.arrays.keys() == cell.arrays.keys()
        for name, array in cell.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array)


def test_c_has_the_states(tmp_path):
    need("cc")
    net = network("float32", zoneout=0.2, zoneout_cell=0.4)
    (cell,) = net.cells
    _, source = net.export_c(tmp_path)
    x = drawn(1, 2, 5, WIDTH).astype("f4")
    answers = c_runtime.run(net, str(source), {"x": x})
    fields, last = evaluate(cell.spec, cell.arrays, x.astype("f8"))
    np.testing.assert_allclose(answers.outputs["cell"], fields["h"], rtol=0, atol=tolerances.KERNEL["float32"])
    for name, exact in last._asdict().items():
        np.testing.assert_allclose(answers.states[f"cell 0 {name}"], exact, rtol=0, atol=tolerances.KERNEL["float32"])

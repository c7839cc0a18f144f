"""Files without a batch axis load whole, including states, and match ONNX Runtime."""

import numpy as np
import pytest
from onnx_batchless import model_of, plans
from onnx_graphs import TOLERANCE, run, write

import cellstack as cs
from cellstack.cells.base import HiddenState, State

PLANS = plans()


def states_of(net, feeds):
    """The network's states, from the inputs that hold them according to the metadata."""
    found = [{} for _ in net.cells]
    firsts = np.cumsum([0, *(len(node.cells) for node in net.nodes if node.cells)])
    for name, refs in net.metadata["onnx"].get("starts", {}).items():
        units = feeds[name].shape[-1]
        for row, (node, cell, part) in zip(feeds[name].reshape(-1, 1, units), refs, strict=True):
            found[firsts[node] + cell][part] = row
    return tuple((State if "c" in one else HiddenState)(**one) for one in found) if all(found) else None


def ends_of(net, after):
    """The expected outputs, by name, from the network's states."""
    firsts = np.cumsum([0, *(len(node.cells) for node in net.nodes if node.cells)])
    said = net.metadata["onnx"]["states"].items()
    return {name: np.stack([getattr(after[firsts[n] + cell], part) for n, cell, part in refs]) for name, refs in said}


@pytest.mark.parametrize("name", PLANS)
def test_files_without_a_batch_axis(tmp_path, name):
    plan, rng = PLANS[name], np.random.default_rng(3)
    made = model_of(plan)
    path = write(tmp_path / "net.onnx", made)
    net = cs.load(path)
    said = net.metadata["onnx"]
    assert said["inputs"] == {"input": "TF"}
    feeds = {"input": rng.standard_normal((6, 3)).astype(np.float32)}
    for value in made.graph.input[1:]:
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(sizes).astype(np.float32)
    names = [value.name for value in made.graph.output]
    expected = dict(zip(names, run(path, feeds), strict=True))
    y, after = net.run(feeds["input"][None], states_of(net, feeds))
    (output,) = said["outputs"]
    np.testing.assert_allclose(y[0], expected.pop(output).reshape(y[0].shape), rtol=0, atol=TOLERANCE)
    ends = ends_of(net, after)
    assert ends.keys() == expected.keys()
    for key, got in ends.items():
        np.testing.assert_allclose(got.reshape(expected[key].shape), expected[key], rtol=0, atol=TOLERANCE)
    kinds = {type(node).__name__ for node in net.nodes if node.cells}
    assert kinds == {"Bidirectional" if plan.both else "Recurrent"}
    assert sum(len(node.cells) for node in net.nodes) == plan.layers * (2 if plan.both else 1)
    if not plan.both and plan.head != "last":
        stream = net.stream()
        frames = np.stack([stream.step(frame[None])[0] for frame in feeds["input"]])
        np.testing.assert_allclose(frames, net(feeds["input"][None])[0], rtol=0, atol=TOLERANCE)
    report = cs.verify(net, path)
    assert report.ok(1e-5)
    compared = {one.name for one in report.differences}
    parts = {f"cell {n} {part}" for refs in said["states"].values() for n, _, part in refs}
    assert len(compared) == 1 + sum(map(len, said["states"].values())) >= 1 + len(parts) * bool(plan.states)


def test_a_layer_over_the_last_state_of_another_runs_in_onnx_runtime(tmp_path):
    made = model_of(PLANS["RNN-3-stacked-softmax"])
    (second,) = (node for node in made.graph.node if node.output[0] == "f1.batch")
    second.input[0] = "f0.h_out"  # one step, whereas the first layer has as many as the input has rows
    path = write(tmp_path / "net.onnx", made)
    with pytest.warns(UserWarning, match="RNN 'f1': the state after the last row isn't supported"):
        net = cs.load(path)
    rng = np.random.default_rng(3)
    feeds = {"input": rng.standard_normal((6, 3)), "h_in": rng.standard_normal((3, 4))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    for got, expected in zip(net.compute(feeds), run(path, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_the_test_files_are_many():
    assert len(PLANS) >= 24

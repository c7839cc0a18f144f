"""Properties of all nodes, and the nodes that reduce, pad and clip: in a run, in a stream, and in every file format."""

import json
import subprocess
import sys
import warnings
from dataclasses import fields

import keras
import numpy as np
import onnx_graphs
import pytest
import safetensors
from networks import make_cell

from cellstack import Network, ShapeError
from cellstack.cli import main as cli
from cellstack.formats import keras as keras_adapter
from cellstack.formats import onnx as onnx_adapter
from cellstack.nodes import (
    MLSTM,
    NODES,
    Activation,
    Attention,
    Bidirectional,
    Clip,
    Context,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    Function,
    GlobalPool,
    GridConv,
    GridPool,
    GroupedDense,
    GroupNorm,
    LayerNorm,
    Magnitude,
    Masking,
    Merge,
    Pad,
    PerFrame,
    Permute,
    Pool1D,
    Power,
    Recurrent,
    Reduce,
    Repeat,
    RepeatLike,
    Reshape,
    RMSNorm,
    Scale,
    Select,
    Skipped,
    Standardise,
    StepMask,
    Take,
    TimeSoftmax,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.nodes.elementwise import FUNCTIONS, X, gradient


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def floats(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def lstm(inputs=3, units=4, **flags):
    return Recurrent((make_cell(np.random.default_rng(1), inputs, units),), **flags)


def both_ways(**flags):
    return Bidirectional(lstm(**flags), lstm(go_backwards=True, **flags))


EVERY = [
    lstm(),
    lstm(return_sequences=False),
    lstm(go_backwards=True),
    both_ways(),
    both_ways(return_sequences=False),
    Standardise(floats(3), floats(3)),
    Scale(floats(3), floats(3)),
    LayerNorm(floats(3)),
    RMSNorm(floats(3), floats(3)),
    RMSNorm(),
    Dense(floats(3, 2)),
    GroupedDense(floats(3, 1, 2), floats(6)),
    GroupedDense(floats(1, 3, 2)),
    Activation("silu"),
    Clip(-1.0, 1.0),
    Embedding(floats(9, 3)),
    Embedding(floats(9, 3), mask_zero=True),
    Masking(0.5),
    StepMask(),
    Conv1D(floats(2, 3, 4)),
    Conv1D(floats(2, 3, 4), padding="causal"),
    Conv1D(floats(2, 3, 4), padding="causal", keeps_mask=True),
    Conv1D(floats(1, 3, 4)),
    Conv1D(floats(4, 1, 3), floats(3), padding="causal", groups=3),
    Conv1D(floats(2, 1, 3), None, 2, dilation=2, groups=3),
    Pool1D("max", 2),
    Pool1D("mean", 2, 1, "causal"),
    GlobalPool("last"),
    GlobalPool("max"),
    Reduce("sum", 1),
    Reduce("sum", 1, keepdims=True),
    Reduce("max", -1, keepdims=True),
    Reduce("min", -1),
    Pad(1, 0),
    Pad(1, 0, axis=-1),
    Flatten(),
    Reshape((-1, 3)),
    Permute((2, 1)),
    Repeat(2),
    RepeatLike(),
    Select(1, None),
    Select(None, None, -1),
    Select(0, 2, 1, -1),
    Merge(),
    Merge("concat", 1),
    Merge("add"),
    Merge("min"),
    Take((2, 0, 0, 1)),
    Take((5, 0, 1), axis=1),
    Magnitude(),
    Magnitude(0.5),
    GridConv(floats(3, 2, 1, 4), (3,), padding=((2, 0), (0, 0))),
    GridConv(floats(1, 3, 1, 2), (3,), floats(2), padding=((0, 0), (1, 1))),
    GridConv(floats(2, 2, 3, 1, 6), (1, 1), floats(6), (2, 1, 1), ((1, 0), (1, 0), (0, 2)), (2, 1, 1), None, 3),
    GridConv(floats(3, 2, 1, 4), (3,), floats(4), None, ((1, 2), (1, 1)), None, (2, 2)),
    GridConv(floats(2, 3, 1, 3), (1,), floats(3), None, ((1, 0), (1, 1)), None, None, 3),
    GridPool("max", (3,), 1, (1, 2), (1, 1), ((0, 0), (1, 0))),
    GridPool("max", (3,), 1, (2, 2), (1, 1), ((1, 0), (1, 0))),
    GridPool("mean", (3,), 1, (2, 2), (1, 1), ((1, 0), (1, 0)), counts=True),
    GridPool("mean", (1,), 3, (3, 1), (2, 1), ((1, 2), (0, 0))),
    Power(2.0),
    Function("sin"),
    Function("abs"),
    TimeSoftmax(),
    GroupNorm(3, floats(3), floats(3)),
    GroupNorm(1, None, floats(3)),
    GroupNorm(3, over_time=False),
    GroupNorm(1, floats(3), over_time=False),
    Attention(),
    Attention(3, 0.5, True),
    MLSTM(1, 1, 1),
    MLSTM(1, 1, 2, output_gate=True),
    Context(2),
    PerFrame((3,), (Reshape((-1, 1)), Conv1D(floats(2, 1, 4)), GlobalPool("max")), ((0,), (1,), (2,))),
    Skipped((None, 4), (Dense(floats(4, 2)), Attention()), ((0,), (1, 1, 1))),
]
NOT_IN_ONNX = (Context, PerFrame)


def network(node):
    """Return a network of one node, and its inputs: sequences of 6 steps and 3 features, ids or vectors."""
    count = 2 if node.inputs is None else node.inputs
    shape = (
        (6,)
        if node.takes_ids
        else (3,)
        if node.axes[0] == 1
        else (6, 4 if type(node) is Magnitude else node.input_size or 3)
    )
    names = [f"x{number}" for number in range(count)]
    shapes = dict.fromkeys(names, shape)
    if isinstance(node, StepMask):  # a flag per step
        shapes["x1"] = (6,)
    if isinstance(node, RepeatLike):
        shapes["x1"] = (6, 5)
    net = Network([node], ["node"], inputs=shapes, wires=[names])
    rng = np.random.default_rng(4)
    if node.takes_ids:
        return net, {"x0": rng.integers(0, 9, (2, 6))}
    return net, {name: rng.normal(size=(2, *shape)).astype("float32") for name, shape in shapes.items()}


def label(node):
    return f"{type(node).__name__} {node.summary}"


def test_every_kind_of_node_is_here():
    assert {type(node) for node in EVERY} == set(NODES.values())
    assert all(kind.file_type == name for name, kind in NODES.items())


@pytest.mark.parametrize("node", EVERY, ids=label)
def test_properties_of_a_node_match_a_run(node):
    """The shape, mask and step rule of the node agree with a run."""
    net, given = network(node)
    flow = node.run([net_flow(value) for value in given.values()], tuple(None for _ in node.cells), 1)
    assert flow.x.shape[1:] == net.shapes["node"]
    made = node.mask_after([None] * len(given), len(net.shapes["x0"]), Counted())
    assert (made is not None) == node.makes_mask == (flow.mask is not None)
    assert {*node.settings(), *node.arrays, *node.added} == {field.name for field in fields(node)}


class Counted:
    """Masks represented by how many were made and merged."""

    of_node = lambda self: 1  # noqa: E731
    both = lambda self, one, other: one + other  # noqa: E731
    either = lambda self, masks: sum(masks)  # noqa: E731
    join = lambda self, masks: sum(mask or 0 for mask in masks)  # noqa: E731
    cut = lambda self, mask, taken: mask  # noqa: E731


def net_flow(x, mask=None):
    from cellstack.nodes.base import Flow

    return Flow(x, mask)


@pytest.mark.parametrize("node", EVERY, ids=label)
def test_the_mask_rule_is_that_of_a_run(node):
    """The output has a mask if the rule says so; the output of a node that doesn't heed masks is the same without."""
    net, given = network(node)
    if len(net.shapes["x0"]) == 1 and not node.takes_ids:
        return
    mask = np.random.default_rng(2).random((2, 6)) < 0.6
    states = tuple(None for _ in node.cells)
    masked = node.run([net_flow(value, mask) for value in given.values()], states, 1)
    plain = node.run([net_flow(value) for value in given.values()], states, 1)
    says = node.mask_after([1] * len(given), len(net.shapes["x0"]), Counted())
    assert (says is not None) == (masked.mask is not None)
    if masked.mask is not None:
        assert masked.mask.shape == masked.x.shape[:2]
    if not node.heeds_mask and not node.takes_ids:
        np.testing.assert_array_equal(masked.x, plain.x)
    elif node.heeds_mask:
        assert not np.array_equal(masked.x, plain.x)


@pytest.mark.parametrize("node", EVERY, ids=label)
def test_step_by_step_gives_the_bits_of_a_run(node):
    """A node that can be streamed gives the bits of a run for any chunking; the others give a reason."""
    net, given = network(node)
    rule = node.step_rule(*(net.shapes[name] for name in net.inputs))
    stateful = node.cells or node.memory
    assert rule.why_not is not None or stateful or rule.step or rule.advance
    if rule.why_not is not None or stateful or len(net.shapes["x0"]) == 1:
        return
    whole = node.run([net_flow(value) for value in given.values()], (), 1).x
    for sizes in ((1,) * 6, (2, 4), (5, 1), (0, 6), (3, 0, 3)):
        memory = None if rule.memory is None else np.full((2, *rule.memory), rule.start, "float32")
        at, pieces = 0, []
        for size in sizes:
            chunk = [value[:, at : at + size] for value in given.values()]
            if rule.step is not None:
                y = rule.step(*chunk)
            else:
                y, memory = rule.advance(memory, chunk[0])
            pieces.append(y)
            at += size
        y = np.concatenate(pieces, axis=1)
        np.testing.assert_array_equal(y if whole.ndim == 3 else y[:, -1], whole)


@pytest.mark.parametrize("node", EVERY, ids=label)
def test_every_node_in_onnx(node, tmp_path):
    net, given = network(node)
    path = str(tmp_path / "net.onnx")
    if type(node) in NOT_IN_ONNX:
        with pytest.raises(ValueError, match=f"node: {type(node).__name__} isn't supported in ONNX files"):
            onnx_adapter.save(net, path)
        return
    onnx_adapter.save(net, path)
    y = onnx_graphs.run(path, given)[0]
    want = net(given if len(given) > 1 else given["x0"])
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)


# ── reductions, padding, bounds ─────────────────────────────────────────────────────────────────────────────────────

NUMPY = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@pytest.mark.parametrize("mode", NUMPY)
@pytest.mark.parametrize("axis", [1, 2, -1, -2])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reduce_is_numpy_s(mode, axis, keepdims, dtype):
    for shape in ((2, 5, 3), (2, 5, 3, 4)):
        x = floats(*shape, dtype=dtype)
        net = Network([Reduce(mode, axis, keepdims)], inputs={"x": shape[1:]})
        want = NUMPY[mode](x.astype("float64"), axis=axis, keepdims=keepdims)
        y = net.nodes[0].apply(x)
        assert y.dtype == dtype
        assert y.shape[1:] == net.shapes["layer_0"]
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", NUMPY)
def test_reduce_over_time_ignores_masked_steps(mode):
    x, mask = floats(3, 5, 2), np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    spoilt = np.where(mask[:, :, None], x, np.nan)
    for keepdims in (False, True):
        net = Network([Reduce(mode, 1, keepdims)])
        y = net(spoilt, mask)
        for row in range(2):
            want = NUMPY[mode](x[row, mask[row]].astype("float64"), axis=0)
            np.testing.assert_allclose(y[row].reshape(-1), want, rtol=0, atol=1e-6)
        assert not y[2].any()
        if mode in ("mean", "max"):
            np.testing.assert_array_equal(y.reshape(3, 2), Network([GlobalPool(mode)])(spoilt, mask))
    assert not Network([Reduce(mode, 1)])(x[:, :0]).any()
    with pytest.raises(ValueError, match=r"reset isn't supported: layer_0 .Reduce. combines steps"):
        net.run(x, reset=mask)


@pytest.mark.parametrize("axis", [1, 2, -1, 3])
def test_pad_is_numpy_s(axis):
    x = floats(2, 4, 3, 2)
    net = Network([Pad(1, 2, 0.5, axis)], inputs={"x": (4, 3, 2)})
    ends = [(0, 0)] * 4
    ends[axis] = (1, 2)
    y = net(x)
    np.testing.assert_array_equal(y, np.pad(x, ends, constant_values=0.5))
    assert y.shape[1:] == net.shapes["layer_0"]
    assert Network([Pad(1, 2)]).shapes["layer_0"] == (None, None)


def test_padding_drops_the_mask_only_along_time():
    x, mask = floats(1, 4, 3), np.array([[True, False, True, False]])
    stack = lstm()
    padded = Network([Pad(0, 0, axis=1), stack])
    np.testing.assert_array_equal(padded(x, mask), Network([stack])(x))
    wide = lstm(5)
    np.testing.assert_array_equal(
        Network([Pad(1, 1, axis=-1), wide])(x, mask), Network([wide])(np.pad(x, [(0, 0), (0, 0), (1, 1)]), mask)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, None), (None, 0.3)])
def test_clip_is_numpy_s(low, high, dtype):
    x = floats(2, 4, 3, dtype=dtype)
    x[0, 0] = [np.nan, np.inf, -np.inf]
    y = Clip(low, high).apply(x)
    np.testing.assert_array_equal(y, np.clip(x, low, high))
    assert y.dtype == dtype


@pytest.mark.parametrize("padding", ["valid", "same", "causal", (0, 2), (1, 0), (2, 3), (5, 6)])
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_pools_are_padded_as_convolutions_are(padding, mode, strides):
    """Compare with a loop over the actual steps of each window."""
    size = 3
    for steps in (0, 1, 2, 5, 7):
        x = floats(2, steps, 2)
        node = Pool1D(mode, size, strides, padding)
        conv = Conv1D(np.ones((size, 2, 2), "float32"), strides=strides, padding=padding)
        y = node.apply(x)
        assert y.shape == conv.apply(x).shape
        assert node.check("", (steps, 2)) == y.shape[1:]
        before = {"valid": 0, "causal": size - 1}.get(padding, padding[0] if isinstance(padding, tuple) else None)
        if before is None:
            before = max(0, (-(-steps // strides) - 1) * strides + size - steps) // 2
        for number in range(y.shape[1]):
            first = number * strides - before
            there = x[:, max(0, first) : max(0, first + size)].astype("float64")
            want = getattr(there, mode)(axis=1) if there.shape[1] else np.zeros((2, 2))
            np.testing.assert_allclose(y[:, number], want, rtol=0, atol=1e-6)


def test_a_stream_of_causal_pools(rng):
    """Any chunking gives the same bits; states can be restored, also for a loaded network."""
    net = Network([Pool1D("mean", 9, 1, "causal"), lstm(), Pool1D("max", 4, 1, (3, 0)), Dense(floats(4, 2))])
    x = rng.normal(size=(2, 30, 3)).astype("float32")
    whole = net(x)
    for sizes in ((30,), (1,) * 30, (7, 23)):
        stream, at, got = net.stream(2), 0, []
        for size in sizes:
            chunk = x[:, at : at + size]
            got.append(stream.step(chunk[:, 0])[:, None] if size == 1 else stream.run(chunk))
            at += size
        np.testing.assert_array_equal(np.concatenate(got, 1), whole)
    stream = net.stream(2)
    stream.run(x[:, :11])
    other = net.stream(2)
    other.state = stream.state
    np.testing.assert_array_equal(other.run(x[:, 11:]), whole[:, 11:])
    other.reset([1])
    np.testing.assert_array_equal(other.run(x)[1], whole[1])
    other.reset()
    np.testing.assert_array_equal(other.run(x), whole)


BAD = {
    "reduce mode": (lambda: Reduce("prod"), ValueError, "Reduce: expected mode to be one of sum, mean, max, min"),
    "reduce axis": (lambda: Reduce("sum", 0), ValueError, "Reduce: expected axis to be an integer other than 0"),
    "reduce axis bool": (lambda: Reduce("sum", True), ValueError, "Reduce: expected axis to be an integer"),
    "reduce keepdims": (lambda: Reduce("sum", 1, 1), TypeError, "Reduce: expected keepdims to be True or False"),
    "reduce a vector": (
        lambda: Network([Reduce("sum", -1)], inputs={"x": (3,)}),
        ShapeError,
        "layer_0: Reduce of a vector requires keepdims=True",
    ),
    "reduce no axis": (
        lambda: Network([Reduce("sum", 3)], inputs={"x": (4, 3)}),
        ShapeError,
        "layer_0: Reduce expected a value with an axis 3",
    ),
    "pad below 0": (lambda: Pad(-1, 0), ValueError, "Pad: expected before to be an integer from 0"),
    "pad inf": (lambda: Pad(1, 0, np.inf), ValueError, "Pad: expected value to be a finite number"),
    "pad axis": (lambda: Pad(1, 0, axis=0), ValueError, "Pad: expected axis to be an integer other than 0"),
    "pad no axis": (
        lambda: Network([Pad(1, 0, axis=3)], inputs={"x": (4, 3)}),
        ShapeError,
        "layer_0: Pad expected a value with an axis 3",
    ),
    "clip nothing": (lambda: Clip(), ValueError, "Clip: expected low or high, got neither"),
    "clip order": (lambda: Clip(1.0, 0.0), ValueError, "Clip: expected low <= high, got 1 and 0"),
    "clip nan": (lambda: Clip(np.nan), ValueError, "Clip: expected low to be a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_node_is_refused(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build()


def keras_answer(path, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keras.models.load_model(path, compile=False)(x).detach().numpy()


IN_KERAS = [
    [Clip(0.0, 2.5)],
    [Clip(0.0)],
    [Clip(-0.5, 0.5)],
    [Reduce("sum", 1)],
    [Reduce("mean", -1, True), lstm(1)],
    [Reduce("max", 1, True)],
    [Reduce("min", 1)],
    [Pad(2, 1)],
    *([Activation(name)] for name in MORE_ACTIVATIONS),
    *([Dense(floats(3, 4), activation=name)] for name in MORE_ACTIVATIONS),
]


@pytest.mark.parametrize("nodes", IN_KERAS, ids=lambda nodes: label(nodes[0]))
def test_nodes_match_keras(nodes, tmp_path):
    net, x = Network(nodes, inputs={"x": (6, 3)}), floats(2, 6, 3)
    path = str(tmp_path / "net.keras")
    keras_adapter.save(net, path)
    np.testing.assert_allclose(keras_answer(path, x), net(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_minimum_of_two_in_keras(suffix, tmp_path):
    net = Network([Merge("min")], ["least"], inputs={"a": (6, 3), "b": (6, 3)}, wires=[("a", "b")])
    path = str(tmp_path / f"net{suffix}")
    keras_adapter.save(net, path)
    x = [floats(2, 6, 3), floats(2, 6, 3, seed=1)]
    np.testing.assert_array_equal(keras_answer(path, x), net(tuple(x)))
    np.testing.assert_array_equal(keras_adapter.load(path)(tuple(x)), net(tuple(x)))


NOT_IN_KERAS = {
    "one bound": ([Clip(0.5)], ".keras", "one: a Clip with one bound, from 0.5"),
    "pads": ([Pool1D("max", 3, 1, (1, 2))], ".keras", r"one: a pool with padding \(1, 2\)"),
    "value": ([Pad(1, 0, 1.0)], ".keras", "one: padding of 1 before and 0 after axis 1, of 1"),
    "function": ([Reduce("sum", 1)], ".h5", "one: the function Sum, which only .keras files can store"),
    "gelu_tanh": ([Activation("gelu_tanh")], ".h5", "one: the function Gelu"),
    "masked sum": ([Masking(), Reduce("sum", 1)], ".keras", "two: Keras's sum over time ignores the mask"),
    "two masks": ([Masking(), Masking(1.0)], ".keras", "two: a second mask replaces the first in Keras"),
    "cropped": (
        [Masking(), Select(1, None), lstm()],
        ".keras",
        "two: Keras drops the mask, which three needs",
    ),
    "clipped": (
        [Masking(), Clip(-1.0, 1.0), Activation("tanh"), lstm()],
        ".keras",
        "two: Keras drops the mask, which four needs",
    ),
    "cut vector": ([Flatten(), Select(1, None)], ".keras", r"two: Cropping1D of \[B, 18\]"),
}


@pytest.mark.parametrize("case", NOT_IN_KERAS)
def test_nodes_that_keras_lacks_are_named(case, tmp_path):
    nodes, suffix, message = NOT_IN_KERAS[case]
    net = Network(nodes, ["one", "two", "three", "four"][: len(nodes)], inputs={"x": (6, 3)})
    with pytest.raises(ValueError, match=f"^save: Keras can't represent this network: {message}"):
        keras_adapter.save(net, str(tmp_path / f"net{suffix}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "node",
    [node for node in EVERY if node.axes[0] != 1 and node.inputs != 2 and type(node) not in NOT_IN_ONNX],
    ids=label,
)
def test_masks_in_onnx(node, tmp_path):
    """With a mask of lengths, ONNX Runtime matches a run, for the node and for cells after it."""
    net, given = network(node)
    names = list(given)
    wires: list = [("x0",), *([("x0",)] * (len(names) - 1)), tuple(f"one{n}" for n in range(len(names)))]
    width = net.shapes["node"][-1]
    tail = [lstm(width, 2, return_sequences=False)] if len(net.shapes["node"]) == 2 else [Activation("tanh")]
    more = Network(
        [*(Masking(100.0) for _ in names), node, *tail],
        [*(f"one{n}" for n in range(len(names))), "node", "end"],
        inputs={"x0": (features := net.shapes["x0"]) if len(net.shapes["x0"]) == 2 else (6, 3)},
        wires=[*wires, ("node",)],
    )
    x = floats(3, *(features if len(features) == 2 else (6, 3)))
    x[1, 2:], x[2, :1] = 100.0, 100.0
    path = str(tmp_path / "net.onnx")
    onnx_adapter.save(more, path)
    np.testing.assert_allclose(onnx_graphs.run(path, {"x0": x}, ["end"])[0], more(x), rtol=0, atol=1e-5)


def test_padding_by_whole_windows_is_refused_in_onnx(tmp_path):
    with pytest.raises(ValueError, match=r"save: pool: expected padding below the window's 2, got \(2, 0\)"):
        onnx_adapter.save(
            Network([Pool1D("max", 2, 1, (2, 0))], ["pool"], inputs={"x": (6, 3)}), str(tmp_path / "a.onnx")
        )


# ── plans ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def described(net, tmp_path, capsys):
    net.save(tmp_path / "net.safetensors")
    assert cli.main(["info", "--json", str(tmp_path / "net.safetensors")]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_what_a_step_costs(tmp_path, capsys):
    cell = make_cell(np.random.default_rng(0), 3, 4, peepholes=True, learn_initial_state=True)
    net = Network(
        [Recurrent((cell,)), Conv1D(floats(5, 2, 6), floats(6), 2, groups=2), Activation("tanh"), Dense(floats(6, 2))],
        ["lstm", "conv", "act", "head"],
    )
    lstm_line, conv_line, act_line, head_line, total = net.plan()
    # 3·16 + 4·16 + 3·4; a bias of 16 is read in addition, 4 bytes each, and the initial state isn't.
    assert "124 multiplications, 560 bytes" in lstm_line
    assert "60 multiplications, 264 bytes" in conv_line
    assert "multiplications" not in act_line
    assert "12 multiplications, 48 bytes" in head_line
    assert total == "total per step: 196 multiplications, 872 bytes"
    report = described(net, tmp_path, capsys)
    assert (report["multiplications"], report["bytes_read"]) == (196, 872)
    assert [layer["multiplications"] for layer in report["layers"]] == [124, 60, 0, 12]
    one_row = Network([Embedding(floats(1000, 5))]).plan()[0]
    assert "0 multiplications, 20 bytes" in one_row


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@pytest.mark.skipif(safetensors.__version__ < "0.8", reason="safetensors raised an OSError without the file's name")
def test_a_memory_error_names_the_file(tmp_path):
    path = tmp_path / "large.safetensors"
    Network([Dense(np.zeros((8192, 8192), "float32"))]).save(path)  # 256 MiB
    code = f"""
import resource, sys
import cellstack as cs, safetensors
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for more in (16 << 20, 300 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))
    try:
        cs.load({str(path)!r})
    except MemoryError as error:
        assert {str(path)!r} in str(error), error
        print("named")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["named", "named"], done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_of_functions_are_their_differences(name):
    function = getattr(np, name)
    formula = (lambda x: function(x)) if function.nin == 1 else (lambda x: function(x * x, 1.3))
    x, dy, step = np.array([[0.4, 0.9, 1.4, 2.3]]), np.array([[1.0, -2.0, 0.5, 3.0]]), 1e-6
    difference = (formula(x + step) - formula(x - step)) / (2 * step)
    np.testing.assert_allclose(gradient(formula(X), x, dy), difference * dy, rtol=1e-7, atol=1e-9)

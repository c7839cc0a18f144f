"""Every node compared with its Keras layer, over random settings; masks through graphs of nodes."""

import warnings

import keras
import numpy as np
import pytest
import tolerances

from cellstack import CellSpec, Network
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS

L = keras.layers
SEEDS = range(40)


def f32(array):
    return np.asarray(array, "float32")


def weights_of(layer):
    """The weights as NumPy arrays; `get_weights` warns of NumPy 2."""
    return [array_of(weight.value) for weight in layer.weights]


def randomise(layer, rng):
    """Set every weight of a Keras layer to random numbers, with variances above 0."""
    for weight in layer.weights:
        weight.assign(rng.uniform(0.3, 1.5, weight.shape) if len(weight.shape) == 1 else rng.normal(size=weight.shape))


def array_of(tensor):
    return tensor.detach().numpy()


def predicted(layers, x):
    """Return the outputs of Keras layers for x as NumPy arrays."""
    for layer in layers if isinstance(layers, list) else [layers]:
        x = layer(x)
    return array_of(x)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    scale = max(1.0, np.abs(theirs).max(initial=0.0))
    np.testing.assert_allclose(ours, theirs, atol=tolerances.KERAS * scale, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_conv1d(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2, 3]))
    channels, filters = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 5))
    strides, dilation = [(1, 1), (int(rng.integers(2, 5)), 1), (1, int(rng.integers(2, 4)))][rng.integers(3)]
    settings = {
        "strides": strides,
        "padding": str(rng.choice(["valid", "same", "causal"])),
        "dilation_rate": dilation,
        "groups": groups,
        "activation": str(rng.choice(["linear", "relu", "tanh"])),
        "use_bias": bool(rng.integers(2)),
    }
    taps = int(rng.integers(1, 6))
    x = f32(rng.normal(size=(int(rng.integers(1, 4)), (taps - 1) * dilation + int(rng.integers(1, 12)), channels)))
    layer = L.Conv1D(filters, taps, **settings)
    layer.build(x.shape)
    randomise(layer, rng)
    kernel, *bias = weights_of(layer)
    settings.pop("use_bias")
    node = Conv1D(kernel, bias[0] if bias else None, dilation=settings.pop("dilation_rate"), **settings)
    net = Network([node])
    close(net(x), predicted(layer, x))
    given = Network([node], inputs={"x": x.shape[1:]})
    assert given.shapes["layer_0"] == net(x).shape[1:]
    alone = np.concatenate([net(row[None]) for row in x])
    assert np.array_equal(alone, net(x))


@pytest.mark.parametrize("seed", SEEDS)
def test_conv1d_with_explicit_padding(seed):
    rng = np.random.default_rng(seed)
    before, after = int(rng.integers(0, 4)), int(rng.integers(0, 4))
    kernel, strides = f32(rng.normal(size=(3, 4, 5))), int(rng.integers(1, 4))
    x = f32(rng.normal(size=(2, 7, 4)))
    layer = L.Conv1D(5, 3, strides, use_bias=False)
    layer.build(x.shape)
    layer.kernel.assign(kernel)
    expected = predicted([L.ZeroPadding1D((before, after)), layer], x)
    close(Network([Conv1D(kernel, None, strides, (before, after))])(x), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_pool1d(seed):
    rng = np.random.default_rng(seed)
    mode, size = str(rng.choice(["max", "mean"])), int(rng.integers(1, 5))
    strides = [None, int(rng.integers(1, 5))][rng.integers(2)]
    padding = str(rng.choice(["valid", "same"]))
    x = f32(rng.normal(size=(int(rng.integers(1, 4)), size + int(rng.integers(0, 10)), int(rng.integers(1, 6)))))
    layer = (L.MaxPooling1D if mode == "max" else L.AveragePooling1D)(size, strides, padding)
    net = Network([Pool1D(mode, size, strides, padding)])
    expected = predicted(layer, x)
    if (
        mode == "mean"
    ):  # Keras's torch backend counts a copy of the last step where it pads one side more than the other
        steps, stride = x.shape[1], strides or size
        before = max(0, (expected.shape[1] - 1) * stride + size - steps) // 2 if padding == "same" else 0
        starts = np.arange(expected.shape[1]) * stride - before
        by_hand = [x[:, max(start, 0) : start + size].mean(axis=1) for start in starts]
        if padding == "valid":
            close(np.stack(by_hand, axis=1), expected)
        expected = np.stack(by_hand, axis=1)
    close(net(x), expected)
    assert Network(net.nodes, inputs={"x": x.shape[1:]}).shapes["layer_0"] == net(x).shape[1:]


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_normalisation(seed):
    rng = np.random.default_rng(seed)
    center, scale, epsilon = bool(rng.integers(2)), bool(rng.integers(2)), float(rng.choice([1e-6, 1e-3, 1e-1]))
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(2, 9)))
    x = f32(rng.normal(2.0, 3.0, size=shape))
    layer = L.LayerNormalization(epsilon=epsilon, center=center, scale=scale)
    layer.build(x.shape)
    randomise(layer, rng)
    weights = weights_of(layer)
    gain = weights.pop(0) if scale else None
    node = LayerNorm(gain, weights.pop(0) if center else None, epsilon)
    close(Network([node])(x), predicted(layer, x))
    close(Network([node], inputs={"x": x.shape[2:]})(x[:, 0]), predicted(layer, x[:, 0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_normalisation_is_a_scale(seed):
    rng = np.random.default_rng(seed)
    center, scale, epsilon = bool(rng.integers(2)), bool(rng.integers(2)), float(rng.choice([1e-5, 1e-3, 1e-1]))
    x = f32(rng.normal(2.0, 3.0, size=(3, 5, int(rng.integers(1, 9)))))
    layer = L.BatchNormalization(epsilon=epsilon, center=center, scale=scale)
    layer.build(x.shape)
    randomise(layer, rng)
    weights = weights_of(layer)
    gamma = weights.pop(0) if scale else 1.0
    beta = weights.pop(0) if center else 0.0
    mean, variance = weights
    factor = gamma / np.sqrt(variance + epsilon)
    close(Network([Scale(f32(factor), f32(beta - mean * factor))])(x), predicted(layer, x))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float32", "float64"])
def test_embedding(dtype, rng):
    table = f32(rng.normal(size=(11, 4)))
    ids = rng.integers(0, 11, size=(3, 5)).astype(dtype)
    layer = L.Embedding(11, 4)
    layer.build(ids.shape)
    layer.embeddings.assign(table)
    assert np.array_equal(Network([Embedding(table)])(ids), predicted(layer, ids.astype("int64")))


ACTIVATIONS = {
    "softmax": keras.activations.softmax,
    "log_softmax": keras.activations.log_softmax,
    "silu": keras.activations.silu,
    "gelu": lambda z: keras.activations.gelu(z, approximate=False),
    "gelu_tanh": lambda z: keras.activations.gelu(z, approximate=True),
    "selu": keras.activations.selu,
    "exponential": keras.activations.exponential,
    "relu6": keras.activations.relu6,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MORE_ACTIVATIONS)
def test_activations_beyond_those_of_cells(name, dtype, rng):
    x = (4 * rng.normal(size=(3, 5, 4))).astype(dtype)
    expected = array_of(ACTIVATIONS[name](keras.ops.convert_to_tensor(x)))
    for node in (Activation(name), Dense(np.eye(4, dtype=dtype), None, name)):
        net = Network([Scale(np.ones(4, dtype), np.zeros(4, dtype)), node])
        assert net(x).dtype == dtype
        close(net(x), expected)
        if dtype == "float64":
            np.testing.assert_allclose(net(x), expected, atol=1e-12 * max(1.0, expected.max()), rtol=0)
        stream = net.stream(3)
        assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(5)], axis=1), net(x))
    assert np.array_equal(net(x * np.nan), x * np.nan, equal_nan=True)
    assert net(x[:, :0]).shape == (3, 0, 4)


SHAPING = [
    ([Flatten()], lambda: [L.Flatten()]),
    ([Reshape((2, 6))], lambda: [L.Reshape((2, 6))]),
    ([Reshape((-1, 2))], lambda: [L.Reshape((-1, 2))]),
    ([Reshape((12,))], lambda: [L.Reshape((12,))]),
    ([Permute((2, 1))], lambda: [L.Permute((2, 1))]),
    (
        [Reshape((2, -1, 3)), Permute((3, 1, 2)), Flatten()],
        lambda: [L.Reshape((2, 2, 3)), L.Permute((3, 1, 2)), L.Flatten()],
    ),
    ([Flatten(), Repeat(3)], lambda: [L.Flatten(), L.RepeatVector(3)]),
    ([GlobalPool("mean")], lambda: [L.GlobalAveragePooling1D()]),
    ([GlobalPool("max")], lambda: [L.GlobalMaxPooling1D()]),
    ([Activation("softmax")], lambda: [L.Softmax()]),
    ([Select(1, 3, axis=1)], lambda: [L.Cropping1D((1, 1))]),
    ([Masking(0.5)], lambda: [L.Masking(0.5)]),
]


@pytest.mark.parametrize("case", range(len(SHAPING)))
def test_shapes(case, rng):
    nodes, layers = SHAPING[case]
    x = f32(rng.normal(size=(5, 4, 3)))
    x[1, 2] = 0.5
    expected = predicted(layers(), x)
    for inputs in (None, {"x": (4, 3)}, {"x": (None, 3)}):
        net = Network(nodes, inputs=inputs)
        close(net(x), expected)
        known = net.shapes[net.outputs[0]]
        assert all(length in (None, got) for length, got in zip(known, expected.shape[1:], strict=True))
        assert net(x[:0]).shape == (0, *expected.shape[1:])


MERGES = {"add": L.Add, "mul": L.Multiply, "ave": L.Average, "max": L.Maximum, "sub": L.Subtract}


@pytest.mark.parametrize(
    ("mode", "count"),
    [(mode, count) for mode in ["concat", *MERGES] for count in (2, 3) if (mode, count) != ("sub", 3)],
)
def test_merges(mode, count, rng):
    names = ["a", "b", "c"][:count]
    values = [f32(rng.normal(size=(2, 4, 3))) for _ in names]
    for axis in (-1, 1, 2) if mode == "concat" else (-1,):
        layer = L.Concatenate(axis) if mode == "concat" else MERGES[mode]()
        net = Network([Merge(mode, axis)], inputs=names, wires=[names])
        close(net(values), array_of(layer(values)))
        flat = [value[:, 0] for value in values]
        if axis == -1:
            net = Network([Merge(mode, axis)], inputs=dict.fromkeys(names, (3,)), wires=[names])
            close(net(flat), array_of(layer(flat)))


# ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def keras_lstm(rng, width, units, **flags):
    """Return a Keras LSTM with random weights, and the same cell."""
    layer = L.LSTM(units, **flags)
    layer.build((None, None, width))
    return layer, fill(layer, rng, width, units)


def fill(layer, rng, width, units):
    for weight in layer.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return Cell(CellSpec(width, units), *weights_of(layer))


def steps_left_out(rng, x, value):
    """Set random steps of x to `value`, except the first: before it Keras repeats a different output."""
    x = x.copy()
    x[:, 1:][rng.random((x.shape[0], x.shape[1] - 1)) < 0.4] = value
    return x


PASSING = ["dense", "activation", "scale", "layer_norm", "lstm", "bidirectional", "dropping", "pool"]


@pytest.mark.parametrize("seed", range(60))
def test_masks_propagate_as_in_keras(seed):
    """A mask from an Embedding or a Masking, through random nodes, into an LSTM."""
    rng = np.random.default_rng(seed)
    embedded, width = bool(rng.integers(2)), int(rng.integers(2, 6))
    if embedded:
        x = steps_left_out(rng, rng.integers(1, 9, size=(4, 7)), 0)
        mask_zero = bool(rng.integers(4))
        first = L.Embedding(9, width, mask_zero=mask_zero)
        first.build(x.shape)
        layers, nodes = [first], [Embedding(weights_of(first)[0], mask_zero)]
    else:
        x = steps_left_out(rng, f32(rng.normal(size=(4, 7, width))), 0.25)
        layers, nodes = [L.Masking(0.25)], [Masking(0.25)]
    for _ in range(rng.integers(0, 4)):
        kind = str(rng.choice(PASSING[:-1]))
        if kind == "dense":
            layer = L.Dense(int(rng.integers(2, 6)), "tanh")
            layer.build((None, None, width))
            randomise(layer, rng)
            nodes.append(Dense(*weights_of(layer), "tanh"))
            width = layer.units
        elif kind == "activation":
            layer = L.Activation("softsign")
            nodes.append(Activation("softsign"))
        elif kind == "scale":
            layer = L.BatchNormalization(center=False, scale=False)
            layer.build((None, None, width))
            randomise(layer, rng)
            mean, variance = weights_of(layer)
            factor = f32(1.0 / np.sqrt(variance + layer.epsilon))
            nodes.append(Scale(factor, f32(-mean * factor)))
        elif kind == "layer_norm":
            layer = L.LayerNormalization()
            layer.build((None, None, width))
            randomise(layer, rng)
            nodes.append(LayerNorm(*weights_of(layer), layer.epsilon))
        elif kind == "lstm":
            units = int(rng.integers(2, 6))
            layer, cell = keras_lstm(rng, width, units, return_sequences=True)
            nodes.append(Recurrent((cell,)))
            width = units
        elif kind == "bidirectional":
            units = int(rng.integers(2, 6))
            layer = L.Bidirectional(L.LSTM(units, return_sequences=True))
            layer.build((None, None, width))
            ahead, back = (fill(half, rng, width, units) for half in (layer.forward_layer, layer.backward_layer))
            nodes.append(Bidirectional(Recurrent((ahead,)), Recurrent((back,), go_backwards=True)))
            width = 2 * units
        else:
            layer, node = dropping(rng, width)
            nodes.append(node)
        layers.append(layer)
    if rng.integers(3):
        layer, cell = keras_lstm(rng, width, 3)
        nodes.append(Recurrent((cell,), return_sequences=False))
    else:
        layer = L.GlobalAveragePooling1D()
        nodes.append(GlobalPool("mean"))
    layers.append(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Layer .* was passed an input with a mask attached to it")
        expected = predicted(layers, x)
    close(Network(nodes)(x), expected)


def dropping(rng, width):
    """Return a layer that drops the mask, and its node."""
    which = rng.integers(4)
    if which == 0:
        layer = L.Conv1D(width, 2, padding="causal")
        layer.build((None, None, width))
        randomise(layer, rng)
        return layer, Conv1D(*weights_of(layer), padding="causal")
    if which == 1:
        return L.MaxPooling1D(2, 1, "same"), Pool1D("max", 2, 1, "same")
    if which == 2:
        return L.Reshape((7, width)), Reshape((7, width))
    return L.AveragePooling1D(3, 1, "same"), Pool1D("mean", 3, 1, "same")


@pytest.mark.parametrize("masked", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mode", ["concat", "time", *MERGES])
def test_masks_of_several_values_merge_as_in_keras(mode, masked, rng):
    """Two branches, one or both of them with a mask, merged, into an LSTM."""
    xs = [steps_left_out(rng, rng.integers(1, 9, size=(4, 7)), 0) for _ in masked]
    embeddings = [L.Embedding(9, 3, mask_zero=zero) for zero in masked]
    for layer, x in zip(embeddings, xs, strict=True):
        layer.build(x.shape)
        randomise(layer, rng)
    axis = 1 if mode == "time" else -1
    merge = MERGES[mode]() if mode in MERGES else L.Concatenate(axis)
    lstm, cell = keras_lstm(rng, 6 if mode == "concat" else 3, 4)
    nodes = [Embedding(weights_of(layer)[0], zero) for layer, zero in zip(embeddings, masked, strict=True)]
    nodes += [Merge(mode if mode in MERGES else "concat", axis), Recurrent((cell,), return_sequences=False)]
    names, inputs = ["e", "f", "merge", "lstm"], ["a", "b"]
    net = Network(nodes, names, inputs=inputs, wires=[("a",), ("b",), ("e", "f"), ("merge",)])
    merged = merge([layer(x) for layer, x in zip(embeddings, xs, strict=True)])
    close(net(dict(zip(inputs, xs, strict=True))), array_of(lstm(merged)))

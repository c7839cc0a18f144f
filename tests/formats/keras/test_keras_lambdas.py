"""Functions among the layers of tf.keras 2.4 to 2.15, in hand-made files in its form."""

import json
import math
import time

import h5py
import numpy as np
import pytest
import tolerances

from cellstack import FormatError, extract, load

FULL = {"start": None, "stop": None, "step": None}
X = np.random.default_rng(5).normal(size=(3, 6, 3))


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def softmax(z, axis):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def weights():
    rng = np.random.default_rng(3)
    return [(rng.normal(size=shape) * 0.6).astype("float32") for shape in ((3, 16), (4, 16), (16,))]


def gelu(z, approximate=False):
    inner = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)) if approximate else np.vectorize(math.erf)(z / 2**0.5)
    return z * (1.0 + inner) / 2.0


def lstm(x):
    """The LSTM of every model here, in float64: gates i f c o."""
    kernel, again, bias = (np.asarray(array, np.float64) for array in weights())
    h = c = np.zeros((len(x), 4))
    ys = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ again + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        ys.append(h)
    return np.stack(ys, axis=1)


def function(name, inbound, number=0, kind="TFOpLambda"):
    own = f"tf.{name}" + (f"_{number}" if number else "")
    config = {"name": own, "trainable": True, "dtype": "float32", "function": name}
    return {"class_name": kind, "config": config, "name": own, "inbound_nodes": inbound}


def written(folder, layers, version="2.8.0"):
    """A model of an input, an LSTM named h that returns sequences, and these layers; the last one is the output."""
    settings = {"units": 4, "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True}
    start = [
        {"class_name": "InputLayer", "config": {"name": "x", "batch_input_shape": [None, 6, 3]}, "name": "x"},
        {
            "class_name": "LSTM",
            "config": {"name": "h", "return_sequences": True, "time_major": False, **settings},
            "name": "h",
            "inbound_nodes": [[["x", 0, 0, {}]]],
        },
    ]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": [[layers[-1]["name"], 0, 0]]}
    config = {"class_name": "Functional", "config": {"name": "m", "layers": [*start, *layers], **ends}}
    path = folder / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["keras_version"], group.attrs["backend"] = version, "tensorflow"
        names = ["x", "h", *(layer["name"] for layer in layers)]
        group.attrs["layer_names"] = np.array([name.encode() for name in names])
        for name in names:
            own = group.create_group(name)
            arrays = zip(("kernel", "recurrent_kernel", "bias"), weights(), strict=True) if name == "h" else ()
            own.attrs["weight_names"] = np.array(
                [b"h/lstm_cell/" + leaf + b":0" for leaf in (b"kernel", b"recurrent_kernel", b"bias")]
                if name == "h"
                else [],
                dtype="S40",
            )
            for leaf, array in arrays:
                own.create_dataset(f"h/lstm_cell/{leaf}:0", data=array)
    return path


def item(*keys):
    return [function("__operators__.getitem", [["h", 0, 0, {"slice_spec": list(keys)}]], kind="SlicingOpLambda")]


def one(name, /, **settings):
    return [function(name, [["h", 0, 0, settings]])]


def two(name, /, **settings):
    """A function that takes a list: the output of the LSTM and its tanh."""
    values = [["h", 0, 0, settings], ["tf.math.tanh", 0, 0, settings]]
    return [function("math.tanh", [["h", 0, 0, {"name": None}]]), function(name, [values])]


def attention():
    """The LSTM's output weighted by its softmax over time, and summed: four layers."""
    return [
        function("nn.softmax", [["h", 0, 0, {"axis": 1, "name": None}]]),
        function("math.multiply", [["h", 0, 0, {"y": ["tf.nn.softmax", 0, 0], "name": None}]]),
        function("math.reduce_sum", [["tf.math.multiply", 0, 0, {"axis": 1, "keepdims": False}]]),
        function("math.subtract", [["_CONSTANT_VALUE", -1, 1.0, {"y": ["tf.math.reduce_sum", 0, 0]}]]),
    ]


CASES = {
    "the last step": (item(FULL, -1), lambda h: h[:, -1]),
    "a step": (item(FULL, 2, FULL), lambda h: h[:, 2]),
    "steps": (item(FULL, {"start": 1, "stop": -1, "step": 2}), lambda h: h[:, 1:-1:2]),
    "features": (item({"class_name": "__ellipsis__"}, {**FULL, "stop": 2}), lambda h: h[..., :2]),
    "a feature as a sequence": (item(FULL, FULL, 1, None), lambda h: h[:, :, 1, None]),
    "operator": (one("__operators__.add", y=1.5, name=None), lambda h: h + 1.5),
    "product": (one("math.multiply", y=[1.0, 2.0, 3.0, 4.0], name=None), lambda h: h * [1.0, 2.0, 3.0, 4.0]),
    "difference": (one("math.subtract", y=0.25), lambda h: h - 0.25),
    "quotient": (one("math.truediv", y=4.0), lambda h: h / 4.0),
    "mean": (one("math.reduce_mean", axis=1), lambda h: h.mean(axis=1)),
    "greatest": (one("math.reduce_max", axis=[-1], keepdims=True), lambda h: h.max(axis=-1, keepdims=True)),
    "sum": (one("math.reduce_sum", axis=1, keepdims=None), lambda h: h.sum(axis=1)),
    "concat": (two("concat", axis=-1), lambda h: np.concatenate([h, np.tanh(h)], axis=-1)),
    "concat along time": (two("concat", axis=1, name=None), lambda h: np.concatenate([h, np.tanh(h)], axis=1)),
    "stack": (two("stack", axis=2), lambda h: np.stack([h, np.tanh(h)], axis=2)),
    "transpose": (one("transpose", perm=[0, 2, 1], conjugate=None), lambda h: h.transpose(0, 2, 1)),
    "reshape": (one("reshape", shape=[-1, 3, 8], name=None), lambda h: h.reshape(len(h), 3, 8)),
    "reverse": (one("reverse", axis=[1]), lambda h: h[:, ::-1]),
    "gather": (one("gather", indices=-1, validate_indices=None, axis=1, batch_dims=0), lambda h: h[:, -1]),
    "cast": (one("cast", dtype="float32"), lambda h: h),
    "expand": (one("expand_dims", axis=-1), lambda h: h[..., None]),
    "silu": (one("nn.silu", beta=None), lambda h: h * sigmoid(h)),
    "leaky": (one("nn.leaky_relu", alpha=0.4), lambda h: np.where(h > 0, h, 0.4 * h)),
    "gelu": (one("nn.gelu"), lambda h: gelu(h)),
    "gelu by a tanh": (one("nn.gelu", approximate=True), lambda h: gelu(h, approximate=True)),
    "attention": (attention(), lambda h: 1.0 - (h * softmax(h, 1)).sum(axis=1)),
}


@pytest.mark.parametrize("what", CASES)
def test_functions_of_tensorflow(tmp_path, what):
    layers, expected = CASES[what]
    path = written(tmp_path, layers)
    net = load(path)
    theirs = expected(lstm(X))
    ours = net(X)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.NETWORK * max(1.0, np.abs(theirs).max()))


REFUSED = {
    "another function": (one("math.cumsum", axis=1), "tf.math.cumsum.*the function 'math.cumsum' isn't supported"),
    "an argument of its own": (one("nn.silu", beta=2.0), "beta=2.0 isn't supported"),
    "no function": ([{**one("cast")[0], "config": {"name": "tf.cast"}}], "the function None isn't supported"),
    "a part of the batch": (item({**FULL, "stop": 2}), "expected all rows of the batch"),
    "a batch of its own": (one("gather", indices=0, axis=1, batch_dims=1), "batch_dims"),
    "an integer dtype": (one("cast", dtype="int32"), "a dtype of floats"),
    "texts": (one("math.multiply", y="x"), "expected a number"),
    "unequal lists": (one("math.multiply", y=[[1.0], [2.0, 3.0]]), "expected a number"),
    "too many numbers": (one("math.multiply", y=[1.0, 2.0]), "expected a number, or one for each of 4 features"),
    "not a number": (one("math.multiply", y=float("inf")), "expected a number"),
    "a number over it": (
        [function("math.truediv", [["_CONSTANT_VALUE", -1, 1.0, {"y": ["h", 0, 0]}]])],
        "dividing a number by a value",
    ),
    "many copies": (one("tile", multiples=[1, 10**6, 1]), "expected 1 to 256 copies"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_functions_are_refused_by_name(tmp_path, what):
    layers, message = REFUSED[what]
    path = written(tmp_path, layers)
    with pytest.raises(FormatError, match=message):
        load(path)
    (part,) = extract(path).values()
    np.testing.assert_allclose(part(X), lstm(X), rtol=0, atol=tolerances.NETWORK)


def test_a_split(tmp_path):
    layers = [
        function("split", [["h", 0, 0, {"num_or_size_splits": [1, 3], "axis": -1}]]),
        function("math.tanh", [["tf.split", 0, 1, {"name": None}]]),
    ]
    net = load(written(tmp_path, layers))
    np.testing.assert_allclose(net(X), np.tanh(lstm(X)[..., 1:]), rtol=0, atol=tolerances.NETWORK)


def test_a_split_into_many_pieces_is_fast(tmp_path):
    layers = [
        function("split", [["h", 0, 0, {"num_or_size_splits": [1] * 60_000, "axis": -1}]]),
        function("math.tanh", [["tf.split", 0, 1, {"name": None}]]),
    ]
    path = written(tmp_path, layers)
    start = time.process_time()
    net = load(path)
    assert time.process_time() - start < 10
    np.testing.assert_allclose(net(X), np.tanh(lstm(X)[..., 1:2]), rtol=0, atol=tolerances.NETWORK)

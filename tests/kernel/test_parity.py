"""Our engines compared with ONNX Runtime, PyTorch and Keras.

An engine is a function of a cell, its arrays, x, the state before (None: zeros) and the flags mask, reverse and
recurrent_dropout; it returns y and the state after. `test_reference` tests what the others don't support.
"""

import keras
import kernel_calls
import numpy as np
import onnx
import onnxruntime
import pairs
import pytest
import torch
from family import random_arrays, random_state
from onnx import helper

from cellstack import reference
from cellstack.cells.spec import CellSpec

FLOAT64 = 1e-12  # float64 on both sides, different summation order
FLOAT32 = 2e-6  # ONNX Runtime's float32, over six steps
KERAS = 2e-6  # Keras's loop on torch rounds to float32 between steps for every dtype

B, T, INPUT, H = 3, 6, 4, 5


def by_reference(spec, arrays, x, state, **flags):
    out = reference.forward(spec, arrays, x, state, **flags)
    return out.y, tuple(out.state)


def by_kernel(spec, arrays, x, state, **flags):
    flat = {name: np.ascontiguousarray(a, np.float64) for name, a in arrays.items()}
    start = None if state is None else tuple(np.ascontiguousarray(a, np.float64) for a in state)
    out = kernel_calls.forward(spec, flat, np.ascontiguousarray(x, np.float64), start, **flags)
    return out.y, out.state


ENGINES = {"reference": by_reference, "kernel": by_kernel}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request):
    return request.param


def assert_same(got, expected, tolerance):
    (y, state), (y_expected, state_expected) = got, expected
    for a, b in zip((y, *state), (y_expected, *state_expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


# ── ONNX Runtime ────────────────────────────────────────────────────────────────────────────────────────────────────

ONNX_ORDER = {"lstm": "iofg", "gru": "zrg", "rnn": "g"}
ONNX_ACTIVATIONS = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "linear": "Affine",
    "relu": "Relu",
    "hard_sigmoid": "HardSigmoid",
    "softsign": "Softsign",
    "softplus": "Softplus",
    "elu": "Elu",
    "affine": "Affine",
    "leaky_relu": "LeakyRelu",
    "thresholded_relu": "ThresholdedRelu",
    "scaled_tanh": "ScaledTanh",
}
ONNX_ALPHA = {"Affine", "HardSigmoid", "Elu", "LeakyRelu", "ThresholdedRelu", "ScaledTanh"}
ONNX_BETA = {"Affine", "HardSigmoid", "ScaledTanh"}
SLOTS = {"lstm": ("i", "g", "cell"), "gru": ("z", "g"), "rnn": ("g",)}  # ONNX's activations f, g and h


def rows_of(spec, array):
    """Convert columns in our gate order to rows in ONNX's; coupled cells get an arbitrary f."""
    blocks = dict(zip(spec.gates, np.split(array, len(spec.gates), axis=-1), strict=True))
    any_f = np.full_like(blocks[spec.gates[0]], 0.7)
    return np.concatenate([blocks.get(gate, any_f) for gate in ONNX_ORDER[spec.kind]], axis=-1).T


def by_onnxruntime(spec, arrays, x, state, lengths=None, reverse=False):
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    inputs = {"X": x.transpose(1, 0, 2), "W": rows_of(spec, arrays["kernel"])[None]}
    inputs["R"] = rows_of(spec, arrays["recurrent_kernel"])[None]
    if spec.use_bias:
        bias = arrays["bias"]
        w, r = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
        inputs["B"] = np.concatenate([rows_of(spec, w), rows_of(spec, r)])[None]
    if lengths is not None:
        inputs["sequence_lens"] = lengths.astype(np.int32)
    for name, a in zip(("initial_h", "initial_c"), state or (), strict=False):
        inputs[name] = a[None]
    if spec.peepholes:
        i, *f, o = arrays["peepholes"]
        inputs["P"] = np.concatenate([i, o, *(f or [np.full_like(i, 0.7)])])[None]
    inputs = {
        name: np.ascontiguousarray(a, np.int32 if name == "sequence_lens" else np.float32) for name, a in inputs.items()
    }

    activations = [dict(zip(spec.slots, spec.activations, strict=True))[slot] for slot in SLOTS[spec.kind]]
    names = [ONNX_ACTIVATIONS[activation.name] for activation in activations]
    attributes = {
        "hidden_size": spec.units,
        "direction": "reverse" if reverse else "forward",
        "activations": names,
    }
    # the parameters of the activations that have some, in order
    alphas = [
        1.0 if a.name == "linear" else a.alpha for a, n in zip(activations, names, strict=True) if n in ONNX_ALPHA
    ]
    betas = [a.beta for a, n in zip(activations, names, strict=True) if n in ONNX_BETA]
    attributes |= {key: v for key, v in (("activation_alpha", alphas), ("activation_beta", betas)) if v}
    if spec.clip is not None:
        attributes["clip"] = spec.clip
    if spec.kind == "lstm":
        attributes["input_forget"] = int(spec.coupled)
    if spec.kind == "gru":
        attributes["linear_before_reset"] = int(spec.reset_after)
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", *(["initial_c", "P"] if spec.kind == "lstm" else [])]
    outputs = ["Y", "Y_h", *(["Y_c"] if spec.kind == "lstm" else [])]
    node = helper.make_node(
        spec.kind.upper(), [name if name in inputs else "" for name in order], outputs, **attributes
    )
    number = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
    graph = helper.make_graph(
        [node],
        "cell",
        [helper.make_tensor_value_info(name, number[a.dtype], a.shape) for name, a in inputs.items()],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * (4 if name == "Y" else 3))
            for name in outputs
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, *after = session.run(None, inputs)
    return y[:, 0].transpose(1, 0, 2), tuple(a[0] for a in after)


ONNX_CELLS = {
    "lstm": {},
    "lstm without bias": {"use_bias": False},
    "peepholes": {"peepholes": True},
    "clip": {"clip": 0.4},
    "coupled": {"coupled": True},
    "coupled peepholes": {"coupled": True, "peepholes": True},
    "peepholes, clip": {"peepholes": True, "clip": 0.4},
    "coupled, peepholes, clip": {"coupled": True, "peepholes": True, "clip": 0.4},
    "f g h": {
        "recurrent_activation": "hard_sigmoid(0.3, 0.4)",
        "activation": "elu(0.7)",
        "gate_activations": {"cell": "scaled_tanh(0.9, 0.6)"},
    },
    "g h": {"activation": "leaky_relu(0.3)", "gate_activations": {"cell": "affine(0.5, 0.1)"}},
    "f h": {"recurrent_activation": "scaled_tanh(0.8, 0.5)", "gate_activations": {"cell": "thresholded_relu(0.05)"}},
    "softsign": {"activation": "softsign", "gate_activations": {"cell": "relu"}},
    "linear": {"activation": "linear", "gate_activations": {"cell": "softplus"}},
    "gru": {"kind": "gru"},
    "gru without bias": {"kind": "gru", "use_bias": False},
    "gru clip": {"kind": "gru", "clip": 0.4},
    "gru f g": {"kind": "gru", "recurrent_activation": "hard_sigmoid(0.3, 0.4)", "activation": "scaled_tanh(0.9, 0.6)"},
    "gru reset before": {"kind": "gru", "reset_after": False},
    "gru reset before without bias": {"kind": "gru", "reset_after": False, "use_bias": False},
    "gru reset before clip": {"kind": "gru", "reset_after": False, "clip": 0.4},
    "gru reset before f g": {
        "kind": "gru",
        "reset_after": False,
        "recurrent_activation": "hard_sigmoid(0.3, 0.4)",
        "activation": "softsign",
    },
    "rnn": {"kind": "rnn"},
    "rnn without bias": {"kind": "rnn", "use_bias": False},
    "rnn clip": {"kind": "rnn", "clip": 0.4},
    "rnn f": {"kind": "rnn", "activation": "affine(0.5, 0.1)"},
}


@pairs.parametrize(
    "reverse, given, cell", [False, True], ["zeros", "started", "lengths"], list(ONNX_CELLS), unpaired=[2]
)
def test_onnx_runtime(engine, rng, reverse, given, cell):
    flags = ONNX_CELLS[cell]
    spec = CellSpec(INPUT, H, **flags)
    arrays, x = random_arrays(rng, spec), rng.standard_normal((B, T, INPUT))
    state = None if given == "zeros" else random_state(rng, spec, B)
    lengths = np.array([T, 2, 4])
    mask = np.arange(T) < lengths[:, None]
    masked = {"mask": mask} if given == "lengths" else {}
    y, after = engine(spec, arrays, x, state, reverse=reverse, **masked)
    expected = by_onnxruntime(spec, arrays, x, state, lengths if masked else None, reverse)
    if masked:
        y = np.where(mask[:, :, None], y, 0.0)  # y is zero past a row's end in ONNX, and the last h here
    assert_same((y, after), expected, FLOAT32)


# ── PyTorch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_torch(spec, arrays, x, state, lengths=None):
    """Run `torch.nn.LSTM`, `GRU` or `RNN`; its two biases are added, except for a GRU."""
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[spec.kind]
    given = {"lstm": {"proj_size": spec.proj_size}, "gru": {}, "rnn": {"nonlinearity": spec.activation}}[spec.kind]
    layer = module(INPUT, H, batch_first=True, bias=spec.use_bias, dtype=torch.float64, **given)
    order = [1, 0, 2] if spec.kind == "gru" else range(len(spec.gates))  # r z n
    rows = lambda a: torch.tensor(np.concatenate([np.split(a.T, len(order))[k] for k in order]))  # noqa: E731
    weights = {"weight_ih_l0": rows(arrays["kernel"]), "weight_hh_l0": rows(arrays["recurrent_kernel"])}
    if spec.use_bias:
        bias = arrays["bias"]
        weights["bias_ih_l0"], weights["bias_hh_l0"] = map(rows, bias if bias.ndim == 2 else (bias / 4, 3 * bias / 4))
    if spec.proj_size:
        weights["weight_hr_l0"] = torch.tensor(arrays["projection"].T)
    layer.load_state_dict(weights)
    starts = [torch.tensor(a)[None] for a in state]
    inputs = torch.tensor(x)
    if lengths is not None:
        inputs = torch.nn.utils.rnn.pack_padded_sequence(inputs, torch.tensor(lengths), True, enforce_sorted=False)
    with torch.no_grad():
        y, after = layer(inputs, tuple(starts) if spec.kind == "lstm" else starts[0])
    if lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    return y.numpy(), tuple(a[0].numpy() for a in (after if spec.kind == "lstm" else (after,)))


TORCH_CELLS = {
    "lstm": {},
    "lstm without bias": {"use_bias": False},
    "proj_size": {"proj_size": 3},
    "proj_size without bias": {"proj_size": 2, "use_bias": False},
    "gru": {"kind": "gru"},
    "gru without bias": {"kind": "gru", "use_bias": False},
    "rnn": {"kind": "rnn"},
    "rnn relu": {"kind": "rnn", "activation": "relu"},
}


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("flags", TORCH_CELLS.values(), ids=TORCH_CELLS)
def test_torch(engine, rng, flags, packed):
    spec = CellSpec(INPUT, H, **flags)
    arrays, x, state = random_arrays(rng, spec), rng.standard_normal((B, T, INPUT)), random_state(rng, spec, B)
    lengths = np.array([T, 2, 4])
    mask = np.arange(T) < lengths[:, None]
    y, after = engine(spec, arrays, x, state, mask=mask if packed else None)
    if packed:
        y = np.where(mask[:, :, None], y, 0.0)  # y is zero past a row's end in torch, and the last h here
    assert_same((y, after), by_torch(spec, arrays, x, state, lengths if packed else None), FLOAT64)


# ── Keras ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_keras(spec, arrays, x, state, *, mask=None, reverse=False, recurrent_dropout=None):
    layer_of = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}[spec.kind]
    given = {} if spec.kind == "rnn" else {"recurrent_activation": spec.recurrent_activation}
    if spec.kind == "gru":
        given["reset_after"] = spec.reset_after
    layer = layer_of(
        spec.units,
        spec.activation,
        use_bias=spec.use_bias,
        go_backwards=reverse,
        recurrent_dropout=0.0 if recurrent_dropout is None else 0.5,
        return_sequences=True,
        return_state=True,
        dtype="float64",
        **given,
    )
    layer.build(x.shape)
    layer.set_weights([arrays[name] for name in spec.shapes])
    if recurrent_dropout is not None:  # instead of random masks: one per gate, or one for a SimpleRNN
        drawn = torch.tensor(recurrent_dropout)
        layer.cell._recurrent_dropout_mask = drawn if spec.kind == "rnn" else [drawn] * len(spec.gates)
    y, *after = layer(
        torch.tensor(x),
        initial_state=[torch.tensor(a) for a in state],
        mask=None if mask is None else torch.tensor(mask),
        training=recurrent_dropout is not None,
    )
    y = y.flip(1) if reverse else y  # Keras returns it in the order of processing
    return y.detach().numpy(), tuple(a.detach().numpy() for a in after)


KERAS_CELLS = {
    "lstm": {},
    "lstm without bias": {"use_bias": False},
    "lstm activations": {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    "lstm leaky_relu": {"activation": "leaky_relu"},
    "gru": {"kind": "gru"},
    "gru without bias": {"kind": "gru", "use_bias": False},
    "gru activations": {"kind": "gru", "activation": "elu", "recurrent_activation": "hard_sigmoid"},
    "gru reset before": {"kind": "gru", "reset_after": False},
    "gru reset before without bias": {"kind": "gru", "reset_after": False, "use_bias": False},
    "rnn": {"kind": "rnn"},
    "rnn without bias": {"kind": "rnn", "use_bias": False},
    "rnn softplus": {"kind": "rnn", "activation": "softplus"},
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reverse", [False, True], ids=["onward", "reverse"])
@pytest.mark.parametrize("flags", KERAS_CELLS.values(), ids=KERAS_CELLS)
def test_keras(engine, rng, flags, reverse, masked):
    spec = CellSpec(INPUT, H, **flags)
    arrays, x, state = random_arrays(rng, spec), rng.standard_normal((B, T, INPUT)), random_state(rng, spec, B)
    mask = rng.random((B, T)) < 0.6
    mask[:, [0, -1]] = True  # if the first steps are masked, y is zero in Keras, and the initial h here
    given = {"reverse": reverse, "mask": mask if masked else None}
    expected = by_keras(spec, arrays, x, state, **given)
    assert_same(engine(spec, arrays, x, state, **given), expected, KERAS)


@pytest.mark.parametrize("flags", KERAS_CELLS.values(), ids=KERAS_CELLS)
def test_recurrent_dropout_is_keras_s(engine, rng, flags):
    # A GRU mixes h_prev without dropout into h, as does Keras from 3.10, unlike 3.0.
    spec = CellSpec(INPUT, H, **flags)
    arrays, x, state = random_arrays(rng, spec), rng.standard_normal((B, T, INPUT)), random_state(rng, spec, B)
    given = {"recurrent_dropout": 2.0 * (rng.random((B, H)) < 0.5)}
    assert_same(engine(spec, arrays, x, state, **given), by_keras(spec, arrays, x, state, **given), KERAS)

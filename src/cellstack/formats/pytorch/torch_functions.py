"""The torch functions that PyTorch's classes call, and the settings of a module, from their arguments."""

from __future__ import annotations

import ast
from typing import Any

from cellstack.formats.pytorch.evaluation import Evaluation, Symbol, UnreadError
from cellstack.formats.pytorch.pickles import Standin

WEIGHTS = ("weight", "bias", "running_mean", "running_var", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
PACKED = ("_packed_params._packed_params", "_packed_weight_ih", "_packed_weight_hh")
NEEDED = object()  # marks arguments without a default


DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
SEQUENCE = "input, _hx, _params, bias, num_layers, _dropout, _train, bidirectional, batch_first"
ARGUMENTS = {
    "linear": "input, weight, bias=None",
    "linear_dynamic": "input, _packed_params._packed_params, _reduce_range=False",
    "linear_dynamic_fp16": "input, _packed_params._packed_params",
    "embedding": "weight, input, _padding_idx=-1, _scale_grad_by_freq=False, _sparse=False",
    "conv1d": "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1",
    "convolution": "input, weight, bias, stride, padding, dilation, transposed, _output_padding, groups, _benchmark, "
    "_deterministic, _cudnn_enabled, _allow_tf32=True",
    "convolution_mode": "input, weight, bias, stride, padding, dilation, groups",
    "batch_norm": "input, weight, bias, running_mean, running_var, train, _momentum, eps, _cudnn_enabled",
    "layer_norm": "input, normalized_shape, weight=None, bias=None, eps=1e-5, _cudnn_enable=True",
    "max_pool1d": "input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False",
    "avg_pool1d": "input, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True",
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_max_pool1d"), "input, output_size"),
    "flatten": "input, start_dim=0, end_dim=-1",
    **dict.fromkeys(("softmax", "log_softmax"), "input, dim, cast=None"),
    **dict.fromkeys(
        ("hardsigmoid", "hardswish", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softsign", "tanh"), "input"
    ),
    "gelu": "input, approximate='none'",
    "hardtanh": "input, min_val=-1.0, max_val=1.0",
    "elu": "input, alpha=1.0, scale=1, input_scale=1",
    "leaky_relu": "input, negative_slope=0.01",
    "softplus": "input, beta=1.0, threshold=20.0",
    **dict.fromkeys(DROPOUTS, "input, _p, train"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), SEQUENCE),
    **dict.fromkeys(("quantized_lstm", "quantized_gru"), f"{SEQUENCE}, _dtype=None, _use_dynamic=False"),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        "input, _hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None",
    ),
    **dict.fromkeys(
        [f"quantized_{kind}_cell_dynamic" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")],
        "input, _hx, _packed_weight_ih, _packed_weight_hh, bias_ih, bias_hh",
    ),
}
"""Arguments of torch's functions, in order, with their defaults.

Those in `WEIGHTS` and `PACKED` have to be the module's own weights, `input` the module's input, and those in `FIXED`
have to have that value; others that begin with `_` don't matter in evaluation mode, and the rest are settings.
"""
FIXED = {"train": False, "transposed": False, "scale": 1, "input_scale": 1, "cast": None}
FUNCTIONS: dict[str, tuple[str, ...]] = {  # the functions of which a class calls one
    "Linear": ("linear", "linear_dynamic", "linear_dynamic_fp16"),
    "Conv1d": ("conv1d", "convolution", "convolution_mode"),
    "BatchNorm1d": ("batch_norm",),
    "LayerNorm": ("layer_norm",),
    "MaxPool1d": ("max_pool1d",),
    "AvgPool1d": ("avg_pool1d",),
    "AdaptiveAvgPool1d": ("adaptive_avg_pool1d",),
    "AdaptiveMaxPool1d": ("adaptive_max_pool1d",),
    "LeakyReLU": ("leaky_relu",),
    "LogSoftmax": ("log_softmax",),
    "ReLU6": ("relu6", "hardtanh"),
    **{
        kind: (kind.lower(),)
        for kind in (
            "ELU",
            "Embedding",
            "Flatten",
            "GELU",
            "Hardsigmoid",
            "Hardswish",
            "Hardtanh",
            "Mish",
            "ReLU",
            "SELU",
            "SiLU",
            "Sigmoid",
            "Softmax",
            "Softplus",
            "Softsign",
            "Tanh",
        )
    },
    "Identity": (),
    **dict.fromkeys(("Dropout", "Dropout1d", "AlphaDropout"), DROPOUTS),
}
RECURRENT: dict[str, tuple[str, ...]] = {
    "LSTM": ("lstm", "quantized_lstm"),
    "GRU": ("gru", "quantized_gru"),
    "RNN": ("rnn_tanh", "rnn_relu"),
    "LSTMCell": ("lstm_cell", "quantized_lstm_cell_dynamic"),
    "GRUCell": ("gru_cell", "quantized_gru_cell_dynamic"),
    "RNNCell": ("rnn_tanh_cell", "rnn_relu_cell", "quantized_rnn_tanh_cell_dynamic", "quantized_rnn_relu_cell_dynamic"),
}
IMPLIED = {  # settings that don't occur in the code
    "Conv1d": {"padding_mode": "zeros"},
    "Embedding": {"max_norm": None},
    "ReLU6": {"min_val": 0.0, "max_val": 6.0},
}


def check_chain(run: Evaluation) -> None:
    """Check that a Sequential only calls its children in their order."""
    value = run.forward()
    for name, child in reversed(run.attributes.items()):
        if not isinstance(child, Standin) or not child.kind.startswith("__torch__."):
            continue
        if isinstance(value, Symbol) and value.word == "child" and value.given[0] == name:
            value = value.given[1]
        elif not child.kind.endswith(".Identity"):  # the tracer writes a call without argument or result for it
            raise UnreadError
    if value is not run.input:
        raise UnreadError


def settings(run: Evaluation, words: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a module that computes one of the functions `words`; else raise `UnreadError`."""
    value = run.forward()
    if isinstance(value, Symbol) and value.word == "to" and value.given:  # casts a quantised result back
        value = value.given[0] if getattr(value.given[0], "word", "").startswith("linear_dynamic") else value
    if (value is run.input and words in ((), DROPOUTS)) or (value is None and not words):
        return run.constants
    value = _softsign(value)
    if not isinstance(value, Symbol) or value.word not in words:
        raise UnreadError
    usual = _arguments(value.word)
    given = dict(zip(usual, value.given, strict=False))
    if len(value.given) > len(given) or not value.named.keys().isdisjoint(given):
        raise UnreadError
    given = usual | given | {key if key in usual else f"_{key}": part for key, part in value.named.items()}
    found = {key: _checked(run, key, part) for key, part in given.items() if not key.startswith("_")}
    _check_sequence(run, value.word, given)
    passed = (*WEIGHTS, *PACKED, *FIXED, "input")
    own = {key: part for key, part in found.items() if key not in passed or (key in WEIGHTS and part is None)}
    if "stride" in own and own["stride"] == ():
        own["stride"] = own["kernel_size"]
    for word in ("tanh", "relu"):
        if f"rnn_{word}" in value.word:
            own |= {"nonlinearity": word} | ({"mode": f"RNN_{word.upper()}"} if run.name == "RNN" else {})
    said = run.constants | {key: run.attributes[key] for key in own if key in run.attributes}
    for key, part in own.items():
        usual = key == "stride" and said.get(key, part) is None
        if key in said and not usual and _plain(said[key]) != _plain(part):
            raise UnreadError
    return IMPLIED.get(run.name, {}) | said | own


def _softsign(value: Any) -> Any:
    """Return x / (|x| + 1) as a call of softsign; other values unchanged."""
    match value:
        case Symbol("div", (x, Symbol("add", (Symbol("abs", (same,)), 1)))) if x is same:
            return Symbol("softsign", (x,))
    return value


def _checked(run: Evaluation, key: str, part: Any) -> Any:
    """Return an argument; raise `UnreadError` if the class would pass another one."""
    recurrent = run.name in RECURRENT and not run.name.endswith("Cell")
    if part is NEEDED or (key == "input" and part is not run.input):
        raise UnreadError
    if key in FIXED and part != FIXED[key]:
        raise UnreadError
    if key in PACKED or (key in WEIGHTS and not (recurrent and key == "bias")):
        own = None if part is None and run.attributes.get(key) is None else run.self
        for name in key.split(".") if own is not None else ():
            own = run.attribute(own, name)
        if part is not own:
            raise UnreadError
    elif isinstance(part, Symbol) and key != "input":
        raise UnreadError
    return part


def _check_sequence(run: Evaluation, word: str, given: dict[str, Any]) -> None:
    """Check that a recurrent layer or cell starts from zeros, and that a layer uses its own weights in order."""
    if "_hx" not in given:
        return
    starts = given["_hx"] if isinstance(given["_hx"], (tuple, list)) else [given["_hx"]]
    if not all(isinstance(start, Symbol) and start.word == "zeros" for start in starts):
        raise UnreadError
    if "_params" not in given:
        return
    ways = [f"_l{n}{way}" for n in range(_count(given["num_layers"])) for way in ("", "_reverse")]
    ways = ways if given["bidirectional"] else ways[::2]
    if word.startswith("quantized"):
        packs = run.attribute(run.self, "_all_weight_values")
        own = [run.attribute(run.attribute(packs, str(n)), "param") for n in range(len(ways))]
    else:
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if given["bias"] else [])]
        kinds += ["weight_hr"] if "weight_hr_l0" in run.attributes else []
        own = [run.attribute(run.self, f"{kind}{way}") for way in ways for kind in kinds]
    params = given["_params"]
    if not isinstance(params, (list, tuple)) or len(params) != len(own):
        raise UnreadError
    if any(one is not other for one, other in zip(params, own, strict=True)) or given["_train"] not in (False,):
        raise UnreadError


def _arguments(word: str) -> dict[str, Any]:
    """Return the arguments of a torch function, each with its default."""
    parts = (part.partition("=") for part in ARGUMENTS[word].split(", "))
    return {name: ast.literal_eval(usual) if usual else NEEDED for name, _, usual in parts}


def _plain(value: Any) -> Any:
    """Return a setting in one form: torch stores one for one axis as a number, or as a list of one."""
    row = isinstance(value, (tuple, list))
    return value[0] if row and len(value) == 1 else tuple(value) if row else value


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1000:
        raise UnreadError
    return value

"""Maps the TensorFlow functions that tf.keras lists among a model's layers to Keras 3's operations."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short

OF_ONE = {  # activations and other functions of x alone, by module; their operations have the same names
    "math": ("exp", "negative", "sigmoid", "softplus", "square", "tanh"),
    "nn": ("elu", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
}
OF_TWO = ("add", "subtract", "multiply", "maximum", "minimum")
NAMES = {  # TensorFlow's name without `tf.`: the operation, and its arguments in order
    **{f"{module}.{name}": (name.title(), ("x",)) for module, names in OF_ONE.items() for name in names},
    **{f"math.{name}": (name.title(), ("x", "y")) for name in OF_TWO},
    **{f"math.reduce_{name}": (name.title(), ("x", "axis", "keepdims")) for name in ("mean", "max", "min", "sum")},
    "__operators__.getitem": ("GetItem", ("x", "key")),
    "__operators__.add": ("Add", ("x", "y")),
    **dict.fromkeys(("math.truediv", "math.divide"), ("TrueDivide", ("x", "y"))),
    "math.abs": ("Absolute", ("x",)),
    "nn.swish": ("Silu", ("x",)),
    "nn.leaky_relu": ("LeakyRelu", ("x", "negative_slope")),
    "nn.gelu": ("Gelu", ("x", "approximate")),
    "nn.softmax": ("Softmax", ("x", "axis")),
    "nn.log_softmax": ("LogSoftmax", ("x", "axis")),
    "cast": ("Cast", ("x", "dtype")),
    "concat": ("Concatenate", ("x", "axis")),
    "stack": ("Stack", ("x", "axis")),
    "expand_dims": ("ExpandDims", ("x", "axis")),
    "squeeze": ("Squeeze", ("x", "axis")),
    "reshape": ("Reshape", ("x", "newshape")),
    "transpose": ("Transpose", ("x", "axes")),
    "reverse": ("Flip", ("x", "axis")),
    "gather": ("Take", ("x", "indices", "validate_indices", "axis")),
    "repeat": ("Repeat", ("x", "repeats", "axis")),
    "tile": ("Tile", ("x", "repeats")),
    "split": ("Split", ("x", "indices_or_sections", "axis")),
    "identity": ("Copy", ("x",)),
    "stop_gradient": ("StopGradient", ("x",)),
}
WORDS = {  # TensorFlow's names of arguments that have others above
    "slice_spec": "key",
    "perm": "axes",
    "shape": "newshape",
    "multiples": "repeats",
    "num_or_size_splits": "indices_or_sections",
    "alpha": "negative_slope",
}
SAYS_NOTHING = ("name", "trainable", "dtype", "function", "num", "validate_indices", "batch_dims", "var", "mask")
USUAL = {"Concatenate": 0, "Stack": 0, "Split": 0, "Take": 0, "Softmax": -1, "LogSoftmax": -1}


def as_operation(layer: Layer, given: list[Any], named: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the operation of a TensorFlow function, its positional arguments, and its settings.

    Args:
        layer: the function as the file lists it.
        given: its positional arguments: tensors, numbers or lists of them.
        named: its other arguments, by TensorFlow's names.

    Raises:
        FormatError: an unknown function, or an unknown argument.
    """
    function = layer.config.get("function")
    if not isinstance(function, str) or function not in NAMES:
        raise layer.refuse(f"the function {short(function)} isn't supported")
    kind, order = NAMES[function]
    settings: dict[str, Any] = {}
    for name, value in named.items():
        word = WORDS.get(name, name)
        if word in order[1:] and (value is not None or name not in SAYS_NOTHING):
            settings[word] = value
        elif name not in SAYS_NOTHING and value is not None:
            raise layer.refuse(f"{name}={short(value)} isn't supported")
    if named.get("batch_dims"):
        raise layer.refuse(f"batch_dims={short(named['batch_dims'])} isn't supported")
    if "y" in settings:
        given = [*given, settings.pop("y")]
    if kind == "Gelu":
        settings.setdefault("approximate", False)  # the function's default; the operation's is True
    if kind in USUAL and settings.get("axis") is None:
        settings["axis"] = USUAL[kind]
    if kind == "Split" and isinstance(settings.get("indices_or_sections"), list):  # TensorFlow gives lengths
        settings["indices_or_sections"] = _places(layer, settings["indices_or_sections"])
    return kind, given, settings


def _places(layer: Layer, lengths: list[Any]) -> list[int]:
    if not all(type(length) is int and length > 0 for length in lengths):
        raise layer.refuse(f"expected the length of every piece, found {short(lengths)}")
    return [*accumulate(lengths[:-1])]

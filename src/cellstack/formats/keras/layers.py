"""Converts Keras's layers other than the recurrent ones to nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cellstack import nodes
from cellstack.formats.keras.cells import RECURRENT, Slot, activation, activation_layer, own_slots, recurrent
from cellstack.formats.keras.cells import recurrent_slots as slots_of_recurrent
from cellstack.formats.keras.composed import COMPOSED
from cellstack.formats.keras.config import Layer
from cellstack.formats.keras.files import short
from cellstack.nodes.base import Array

NOTHING = (
    "Dropout",
    "SpatialDropout1D",
    "GaussianNoise",
    "GaussianDropout",
    "AlphaDropout",
    "ActivityRegularization",
    "Identity",
)
ACTIVATIONS = ("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "ThresholdedReLU")
MERGES = {
    "Concatenate": "concat",
    "Add": "add",
    "Multiply": "mul",
    "Average": "ave",
    "Maximum": "max",
    "Minimum": "min",
    "Subtract": "sub",
}
MERGES_1 = {"concat": "Concatenate", "sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum"}
POOLS = ("MaxPooling1D", "AveragePooling1D", "GlobalMaxPooling1D", "GlobalAveragePooling1D")
CONVOLUTIONS = {  # the names of their kernels: depthwise, then pointwise
    "DepthwiseConv1D": ("kernel",),
    "SeparableConv1D": ("depthwise_kernel", "pointwise_kernel"),
}
RENAMED_1 = {
    "TimeDistributedDense": "Dense",
    "Convolution1D": "Conv1D",
    "AtrousConvolution1D": "Conv1D",
}
SETTINGS_1 = {  # settings of Keras 1 that have another name now
    "output_dim": "units",
    "inner_activation": "recurrent_activation",
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "border_mode": "padding",
    "subsample_length": "strides",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "bias": "use_bias",
    "p": "rate",
}


def modern(layer: Layer) -> Layer:
    """Return a layer of Keras 1 with the names of Keras 2."""
    kind = RENAMED_1.get(layer.kind, layer.kind)
    names = {} if kind == "Embedding" else SETTINGS_1
    config = {names.get(name, name): value for name, value in layer.config.items()}
    if kind == "Merge":
        mode = config.get("mode")
        if config.get("layers"):
            raise layer.refuse("a Merge that contains models isn't supported, only one of tensors")
        if not isinstance(mode, str) or mode not in MERGES_1:
            raise layer.refuse(f"mode {short(mode)} isn't supported")
        kind, config = MERGES_1[mode], {**config, "axis": config.get("concat_axis", -1)}
    if kind == "BatchNormalization" and config.get("mode", 0) != 0:
        raise layer.refuse(f"expected mode 0, found {short(config['mode'])}")
    for name in ("layer", "backward_layer"):
        inner = config.get(name)
        if isinstance(inner, dict) and isinstance(inner.get("config"), dict) and kind == "Bidirectional":
            entry = modern(layer.within(inner, name))
            config = {**config, name: {"class_name": entry.kind, "config": entry.config}}
    return Layer(layer.where, layer.name, kind, config, layer.calls, layer.model)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def slots(layer: Layer, major: int) -> list[Slot]:
    """Return the slots of a layer's weights, in the order in which its node takes them; the layer isn't a model.

    Raises:
        FormatError: a layer that isn't supported.
    """
    layer = modern(layer) if major == 1 else layer
    if layer.kind in RECURRENT:
        return slots_of_recurrent(layer, major)
    old = major == 1
    if layer.kind in ("Dense", "Conv1D"):
        leaves = ["W" if old else "kernel", *(["b" if old else "bias"] if layer.flag("use_bias", True) else [])]
    elif layer.kind in CONVOLUTIONS:
        leaves = [*CONVOLUTIONS[layer.kind], *(["bias"] if layer.flag("use_bias", True) else [])]
    elif layer.kind == "PReLU":
        leaves = ["alpha"]
    elif layer.kind == "Embedding":
        leaves = ["W" if old else "embeddings"]
    elif layer.kind == "BatchNormalization":
        leaves = [*_affine(layer), *(["running_mean", "running_std"] if old else ["moving_mean", "moving_variance"])]
    elif layer.kind == "LayerNormalization":
        leaves = _affine(layer)
    elif layer.kind == "Normalization":
        leaves = ["mean", "variance", "count"] if layer.config.get("mean") is None else []
    elif layer.kind in BUILDERS or layer.kind in (*NOTHING, *COMPOSED, "InputLayer"):
        leaves = []
    else:
        raise layer.refuse("this layer isn't supported")
    if quantised(layer):
        first, *rest = own_slots(layer, [*leaves, f"{leaves[0]}_scale"])
        return [first._replace(trainable=False, whole=True), *rest]
    return own_slots(layer, leaves)


def quantised(layer: Layer) -> bool:
    """Return whether a layer's weights were quantised by `model.quantize("int8")`."""
    policy = layer.config.get("dtype")
    if not isinstance(policy, dict) or layer.kind not in ("Dense", "Embedding"):
        return False
    settings = policy.get("config")
    mode = settings.get("mode") if isinstance(settings, dict) else None
    if mode not in (None, "int8"):
        raise layer.refuse(f"{short(mode)} weights aren't supported, only int8")
    return mode == "int8"


def _dequantised(layer: Layer, arrays: list[Array], axis: int) -> list[Array]:
    """Return the weights with the integers divided by their scales, one for each index of an axis."""
    if not quantised(layer):
        return arrays
    whole, *rest, scale = arrays
    if whole.ndim != 2 or scale.shape != (whole.shape[axis],) or not (scale > 0).all():
        raise layer.refuse(f"expected a scale above 0 for each of {whole.shape}, found {scale.shape}")
    return [(whole / (scale if axis else scale[:, None])).astype(scale.dtype), *rest]


def _affine(layer: Layer) -> list[str]:
    scale, center = layer.flag("scale", True), layer.flag("center", True)
    return [name for name, there in (("gamma", scale), ("beta", center)) if there]


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def nodes_of(layer: Layer, arrays: Iterator[Array], major: int, backend: str | None) -> list[nodes.Node]:
    """Return the nodes of one layer; none if it does nothing in inference mode.

    Args:
        layer: as the file describes it; not a model.
        arrays: its weights, in the order of `slots`.
        major: the version of Keras.
        backend: the backend of that Keras, if it is known.

    Raises:
        FormatError: unsupported settings, or weights of other shapes.
    """
    layer = modern(layer) if major == 1 else layer
    try:
        if layer.kind in (*NOTHING, *COMPOSED, "InputLayer") and layer.kind not in BUILDERS:
            return []
        if layer.kind in RECURRENT:
            return [recurrent(layer, arrays, major)]
        if layer.kind == "Conv1D":
            return [_conv(layer, list(arrays), major, backend)]
        if layer.kind in CONVOLUTIONS:
            return _convolutions(layer, list(arrays), major)
        return [BUILDERS[layer.kind](layer, list(arrays), major)]
    except (ValueError, TypeError) as error:  # settings or weights that the node refuses
        if str(error).startswith(layer.where):
            raise
        raise layer.refuse(str(error)[:300]) from None


def _dense(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    kernel, *bias = _dequantised(layer, arrays, 1)
    node = nodes.Dense(kernel, *bias, activation=activation(layer, "activation", major, more=True))
    if node.kernel.shape[1] != layer.integer("units"):
        raise layer.refuse(f"expected kernel [I, {layer.integer('units')}], found {node.kernel.shape}")
    return node


def _conv(layer: Layer, arrays: list[Array], major: int, backend: str | None) -> nodes.Node:
    layer.check_channels_last()
    filters, size = layer.integer("filters"), layer.integer("kernel_size")
    kernel = arrays[0]
    if kernel.ndim == 4 and major == 1:  # stored as a 2D convolution of width 1, in the axis order of its backend
        kernel = kernel[:, 0] if kernel.shape[:2] == (size, 1) else kernel[..., 0].transpose(2, 1, 0)
    if kernel.ndim != 3 or kernel.shape[0] != size or kernel.shape[2] != filters:
        raise layer.refuse(f"expected kernel [{size}, C, {filters}], found {arrays[0].shape}")
    if backend == "theano":  # it computes a true convolution, with the kernel flipped
        kernel = kernel[::-1]
    return nodes.Conv1D(
        kernel,
        arrays[1] if len(arrays) > 1 else None,
        layer.integer("strides", 1),
        layer.config.get("padding") or "valid",
        layer.integer("dilation_rate", 1),
        layer.integer("groups", 1),
        activation(layer, "activation", major, more=True),
    )


def _convolutions(layer: Layer, arrays: list[Array], major: int) -> list[nodes.Node]:
    """Return a depthwise convolution and, for a SeparableConv1D, the pointwise one after it.

    The depthwise kernel is `[K, C, M]`; channel c becomes channels c·M to c·M + M - 1.
    """
    layer.check_channels_last()
    pointwise = layer.kind == "SeparableConv1D"
    kernel, size = arrays[0], layer.integer("kernel_size")
    if kernel.ndim != 3 or kernel.shape[0] != size or kernel.shape[2] != layer.integer("depth_multiplier", 1):
        raise layer.refuse(f"expected kernel [{size}, C, M], found {kernel.shape}")
    bias = arrays[-1] if layer.flag("use_bias", True) else None
    last = activation(layer, "activation", major, more=True)
    first = nodes.Conv1D(
        kernel.reshape(size, 1, -1),
        None if pointwise else bias,
        layer.integer("strides", 1),
        layer.config.get("padding") or "valid",
        layer.integer("dilation_rate", 1),
        kernel.shape[1],
        "linear" if pointwise else last,
    )
    return [first, nodes.Conv1D(arrays[1], bias, activation=last)] if pointwise else [first]


def _prelu(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    return nodes.Scale(arrays[0].reshape(-1), np.zeros(arrays[0].size, arrays[0].dtype))


def _embedding(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    node = nodes.Embedding(_dequantised(layer, arrays, 0)[0], layer.flag("mask_zero"))
    expected = layer.integer("input_dim"), layer.integer("output_dim")
    if node.table.shape != expected:
        raise layer.refuse(f"expected embeddings {list(expected)}, found {node.table.shape}")
    return node


def _epsilon(layer: Layer) -> float:
    return float(layer.get("epsilon", (int, float)) if "epsilon" in layer.config else 1e-3)


def _batch_norm(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    """Fold the statistics: gamma·(x - mean) / sqrt(variance + epsilon) + beta."""
    width = arrays[0].shape
    if len(width) != 1 or any(array.shape != width for array in arrays):
        raise layer.refuse(f"expected weights [W] each, found {', '.join(str(array.shape) for array in arrays)}")
    *affine, mean, variance = arrays
    named = dict(zip(_affine(layer), affine, strict=True))
    return nodes.Scale.of_statistics(mean, variance, _epsilon(layer), named.get("gamma"), named.get("beta"))


def _normalization(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    if layer.flag("invert"):
        raise layer.refuse("expected invert=False, found True")
    if not arrays:
        dtype = "float64" if layer.config.get("dtype") == "float64" else "float32"
        arrays = [np.asarray(layer.config.get(name), dtype) for name in ("mean", "variance")]
    mean, variance = (array.reshape(-1) for array in arrays)
    if mean.shape != variance.shape or not (variance >= 0.0).all():
        raise layer.refuse("expected a mean and a variance for each feature, found others")
    return nodes.Standardise(mean, np.maximum(np.sqrt(variance), variance.dtype.type(1e-7)))  # Keras's minimum


def _layer_norm(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    if layer.flag("rms_scaling"):
        raise layer.refuse("rms_scaling isn't supported")
    named = dict(zip(_affine(layer), arrays, strict=True))
    return nodes.LayerNorm(named.get("gamma"), named.get("beta"), _epsilon(layer))


def _pool(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    layer.check_channels_last()
    mode = "max" if "Max" in layer.kind else "mean"
    if layer.kind.startswith("Global"):
        return nodes.Reduce(mode, 1, True) if layer.flag("keepdims") else nodes.GlobalPool(mode)
    size = layer.integer("pool_size", 2)
    return nodes.Pool1D(mode, size, layer.integer("strides", size), layer.config.get("padding") or "valid")


def _activation(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    return nodes.Activation(activation_layer(layer, major, more=True))


def _relu(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    most = layer.config.get("max_value")
    if most is None:
        return _activation(layer, arrays, major)
    if layer.config.get("negative_slope") or layer.config.get("threshold"):
        raise layer.refuse("a max_value with a negative_slope or a threshold isn't supported")
    return nodes.Clip(0.0, most)


def _merge(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    mode = MERGES[layer.kind]
    axis = layer.integer("axis", -1, least=-1) if mode == "concat" else -1
    return nodes.Merge(mode, axis)


def _reshape(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    shape = layer.config.get("target_shape", layer.config.get("dims"))
    if not isinstance(shape, list):
        raise layer.refuse(f"expected target_shape, found {short(shape)}")
    return nodes.Reshape(tuple(-1 if axis is None else axis for axis in shape))


def _flatten(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    layer.check_channels_last()
    return nodes.Flatten()


def _permute(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    return nodes.Permute(tuple(layer.get("dims", list)))


def _pair(layer: Layer, name: str) -> tuple[int, int]:
    """Return the numbers of steps at the start and at the end in a setting."""
    layer.check_channels_last()
    setting = layer.config.get(name)
    pair = [setting, setting] if type(setting) is int else setting
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(one) is int and one >= 0 for one in pair):
        raise layer.refuse(f"expected {name} at the start and the end, found {short(setting)}")
    return pair[0], pair[1]


def _cropping(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    first, last = _pair(layer, "cropping")
    return nodes.Select(first, -last or None)


def _masking(layer: Layer, arrays: list[Array], major: int) -> nodes.Node:
    return nodes.Masking(layer.get("mask_value", (int, float), 0.0))


BUILDERS: dict[str, Callable[[Layer, list[Array], int], nodes.Node]] = {
    "Dense": _dense,
    "Embedding": _embedding,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Normalization": _normalization,
    "Masking": _masking,
    **dict.fromkeys(POOLS, _pool),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": lambda layer, arrays, major: nodes.Repeat(layer.integer("n")),
    "Cropping1D": _cropping,
    "ZeroPadding1D": lambda layer, arrays, major: nodes.Pad(*_pair(layer, "padding")),
    **dict.fromkeys(MERGES, _merge),
    **dict.fromkeys(ACTIVATIONS, _activation),
    "ReLU": _relu,
    "PReLU": _prelu,
    "Softmax": lambda layer, arrays, major: nodes.Activation("softmax"),
}

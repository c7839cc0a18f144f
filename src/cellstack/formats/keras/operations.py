"""Converts the operations of Keras 3 and TensorFlow among a model's layers: slices, sums, concatenations and others.

A file lists each as a layer whose inputs are the arguments of a call. Their results have no mask. Some of them compute
masks themselves; these add no nodes here, they only define the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from cellstack.formats.keras.config import DEEPEST, LAMBDAS, OPERATION, Layer, LayerCall, Ref
from cellstack.formats.keras.files import short
from cellstack.formats.keras.lambdas import as_operation
from cellstack.formats.keras.layer_builder import LayerBuilder, Pending, Value

MASKS = ("NotEqual", "Any", "LogicalOr", "ZerosLike", "OnesLike")
NAMED = ("tanh", "sigmoid", "relu", "relu6", "softplus", "softsign", "silu", "selu", "hard_sigmoid")
PLAIN = {"Exp": "exponential", **{name.title().replace("_", ""): name for name in NAMED}}  # activations as operations
BINARY = {"Add": "add", "Subtract": "sub", "Multiply": "mul", "Maximum": "max", "Minimum": "min"}
DIVIDE = ("TrueDivide", "Divide")
REDUCED = {"Mean": "mean", "Max": "max", "Min": "min", "Sum": "sum"}
ORDER = {  # the names of positional arguments after the first
    "GetItem": ("key",),
    "Take": ("indices",),
    "Reshape": ("newshape",),
}
Worker = Callable[[LayerBuilder, Any, dict[str, Any]], Value | list[Pending]]
FLOATS = ("float32", "float64", "float16", "bfloat16")


def operate(build: LayerBuilder, call: LayerCall, look: Callable[[Ref], Value]) -> list[Value | Pending]:
    """Return the results of an operation; `look` returns the value of a reference.

    Raises:
        FormatError: an unsupported operation, or unsupported arguments.
    """
    layer = build.layer
    kind, arguments, settings = layer.kind.removeprefix(OPERATION), list(call.arguments), dict(layer.config)
    if layer.kind in LAMBDAS:
        kind, arguments, settings = as_operation(layer, arguments, dict([*call.settings, *call.named]))
    else:
        settings.update(call.settings)
        settings.update(call.named)
    arguments = [_looked(layer, look, one) for one in arguments]
    settings = {key: _looked(layer, look, value) for key, value in settings.items()}
    for key, value in zip(ORDER.get(kind, ()), arguments[1:], strict=False):
        settings[key] = value
    values = [one for one in _flat(arguments) if isinstance(one, Value)]
    if any(isinstance(one, Value) and one.flag is not None for one in [*values, *settings.values()]) or kind in MASKS:
        return [_mask(build, kind, arguments, settings)]
    arguments = [_bare(build, one) for one in arguments]
    if kind in BINARY or kind in DIVIDE:
        return [_binary(build, kind, arguments)]
    worker = WORKERS.get(kind)
    if worker is None or not arguments:
        raise layer.refuse("this operation isn't supported")
    if kind not in ("Concatenate", "Stack") and not isinstance(arguments[0], Value):
        raise layer.refuse(f"expected a tensor, found {short(arguments[0])}")
    result = worker(build, arguments[0], settings)
    return [*result] if isinstance(result, list) else [result]


def _looked(layer: Layer, look: Callable[[Ref], Value], argument: Any, depth: int = 0) -> Any:
    """Return an argument with the references replaced by their values."""
    if isinstance(argument, Ref):
        return look(argument)
    if not isinstance(argument, list):
        return argument
    if depth > DEEPEST:
        raise layer.refuse(f"lists are nested more than {DEEPEST} deep")
    return [_looked(layer, look, one, depth + 1) for one in argument]


def _flat(arguments: list[Any]) -> list[Any]:
    return [leaf for one in arguments for leaf in (_flat(one) if isinstance(one, list) else [one])]


def _bare(build: LayerBuilder, argument: Any) -> Any:
    if isinstance(argument, Value):
        return build.bare(argument)
    return [_bare(build, one) for one in argument] if isinstance(argument, list) else argument


# ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def either(masks: list[Any]) -> Any:
    """Return the mask that keeps a step if any of several masks does; None keeps all steps."""
    parts: set[Any] = set()
    for mask in masks:
        parts |= mask[1] if isinstance(mask, tuple) and mask[0] == "or" else {("all",) if mask is None else mask}
    if ("all",) in parts:
        return ("all",)
    parts -= {("none",)}
    if not parts:
        return ("none",)
    return next(iter(parts)) if len(parts) == 1 else ("or", frozenset(parts))


def _mask(build: LayerBuilder, kind: str, arguments: list[Any], settings: dict[str, Any]) -> Value:
    """Return the mask that an operation on masks defines."""
    values = [one for one in _flat(arguments) if isinstance(one, Value)]
    flags = [value.flag for value in values]
    wire, axis = values[0].wire if values else "", settings.get("axis")
    if kind == "NotEqual" and len(arguments) == 2 and len(values) == 1 and flags == [None]:
        number = arguments[1]
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return Value(wire, None, ("ne", wire, float(number)))
    elif kind in ("ZerosLike", "OnesLike") and len(values) == 1 and settings.get("dtype") == "bool":
        return Value(wire, None, ("none",) if kind == "ZerosLike" else ("wide", ("all",)))
    elif None in flags or not flags:
        pass
    elif kind == "Any" and len(flags) == 1 and axis in (-1, [-1]) and not settings.get("keepdims"):
        if flags[0][0] in ("wide", "ne"):
            return Value(wire, None, flags[0][1] if flags[0][0] == "wide" else ("any", flags[0]))
    elif kind == "ExpandDims" and len(flags) == 1 and axis == -1 and flags[0][0] != "wide":
        return Value(wire, None, ("wide", flags[0]))
    elif kind == "LogicalOr" and len(flags) == 2:
        wide = any(flag[0] == "wide" for flag in flags)
        flag = either([flag[1] if flag[0] == "wide" else flag for flag in flags])
        return Value(wire, None, ("wide", flag) if wide else flag)
    elif kind == "Concatenate" and all(flag[0] == "wide" for flag in flags):
        inner = [flag[1] for flag in flags]
        if axis in (-1, 2):
            return Value(wire, None, ("wide", either(inner)))
        if axis == 1:
            return Value(wire, None, ("wide", build.followed.mask(inner)))
    raise build.layer.refuse("this operation on masks isn't supported")


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _binary(build: LayerBuilder, kind: str, arguments: list[Any]) -> Value:
    """Return the result of an operation on two values, or on a value and a number."""
    if len(arguments) != 2 or not any(isinstance(one, Value) for one in arguments):
        raise build.layer.refuse(f"expected two values, found {short(arguments)}")
    one, other = arguments
    if isinstance(one, Value) and isinstance(other, Value):
        if kind in DIVIDE:
            raise build.layer.refuse("dividing two values isn't supported")
        return build.merge(BINARY[kind], one, other)
    value, number = (one, other) if isinstance(one, Value) else (other, one)
    if kind == "Add":
        return build.scale(value, 1.0, number)
    if kind == "Multiply":
        return build.scale(value, number)
    if kind == "Subtract":
        return build.scale(value, -1.0, number) if value is not one else build.scale(value, 1.0, build.negative(number))
    if kind in DIVIDE:
        if value is not one:
            raise build.layer.refuse("dividing a number by a value isn't supported")
        return build.divide(value, number)
    return build.clip(value, number, None) if kind == "Maximum" else build.clip(value, None, number)


# ── operations on one value ─────────────────────────────────────────────────────────────────────────────────────────


def _whole(build: LayerBuilder, settings: dict[str, Any], name: str) -> int:
    number = settings.get(name)
    if type(number) is not int:
        raise build.layer.refuse(f"expected {name} to be an integer, found {short(number)}")
    return number


def _flag(build: LayerBuilder, settings: dict[str, Any], name: str) -> bool:
    flag = settings.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise build.layer.refuse(f"expected {name} to be True or False, found {short(flag)}")
    return bool(flag)


def _slice(build: LayerBuilder, key: Any) -> slice:
    """Return a slice in the notation of Keras 3 or TensorFlow."""
    ends = key.get("config", key) if isinstance(key, dict) else None
    if not isinstance(ends, dict) or not {"start", "stop", "step"} <= ends.keys():
        raise build.layer.refuse(f"expected a slice, found {short(key)}")
    parts = [ends[name] for name in ("start", "stop", "step")]
    if any(part is not None and type(part) is not int for part in parts) or parts[2] == 0:
        raise build.layer.refuse(f"expected a slice of integers, found {short(parts)}")
    return slice(*parts)


def _is_ellipsis(key: Any) -> bool:
    return key is Ellipsis or (isinstance(key, dict) and key.get("class_name") == "__ellipsis__")


def _get_item(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    """Apply slices and indices; None adds an axis."""
    keys = settings.get("key")
    keys = keys.get("items") if isinstance(keys, dict) and keys.get("class_name") == "__tuple__" else keys
    keys = list(keys) if isinstance(keys, (list, tuple)) else [keys]
    named = sum(not _is_ellipsis(key) and key is not None for key in keys)
    axes, full = len(build.shape(value)) + 1, {"start": None, "stop": None, "step": None}
    left = axes - named
    if left < 0 or sum(map(_is_ellipsis, keys)) > 1:
        raise build.layer.refuse(f"expected at most {axes} keys, found {short(keys)}")
    if any(map(_is_ellipsis, keys)):
        at = next(number for number, key in enumerate(keys) if _is_ellipsis(key))
        keys[at : at + 1] = [full] * left
    if (
        not keys
        or keys[0] is None
        or type(keys[0]) is int
        or _slice(build, keys[0]) not in (slice(None), slice(0, None))
    ):
        raise build.layer.refuse(f"expected all rows of the batch, found {short(keys[:1])}")
    place = 1  # the next axis to process
    for key in keys[1:]:
        if key is None:
            value = build.expand(value, place)
        elif type(key) is int:
            value = build.at(value, place, key)
            continue
        else:
            value = build.select(value, place, _slice(build, key))
        place += 1
    return value


def _take(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    place = build.place(settings.get("axis"), len(build.shape(value)))
    return build.at(value, place, _whole(build, settings, "indices"))


def _cast(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    if settings.get("dtype") not in FLOATS:
        raise build.layer.refuse(f"expected a dtype of floats, found {short(settings.get('dtype'))}")
    return value


def _reshape(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    shape, old = settings.get("newshape"), build.shape(value)
    if not isinstance(shape, list) or not shape or not all(one is None or type(one) is int for one in shape):
        raise build.layer.refuse(f"expected a shape, found {short(shape)}")
    rest = [None if one in (None, -1) else one for one in shape[1:]]
    known = [one for one in rest if one is not None]
    if shape[0] in (None, -1) and len(known) == len(rest):  # a row has to stay a row
        rows = [build.length(value, place + 1) for place in range(len(old))]
        if prod(rows) != prod(known):
            raise build.layer.refuse(f"mixes the rows of the batch: a row's shape {rows} becomes {rest}")
    elif shape[0] not in (None, -1):
        raise build.layer.refuse(f"expected a batch of any size, found {shape[0]}")
    elif shape[0] == -1:
        raise build.layer.refuse(f"expected one unknown length, found {short(shape)}")
    return build.reshape(value, rest)


def _transpose(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    order, axes = settings.get("axes"), len(build.shape(value)) + 1
    order = [one + axes if type(one) is int and one < 0 else one for one in order] if isinstance(order, list) else []
    if order[:1] != [0] or sorted(order, key=repr) != sorted(range(axes), key=repr):
        raise build.layer.refuse(f"expected the batch first, and each axis once, found {short(settings.get('axes'))}")
    return build.permute(value, order[1:])


def _swap(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    axes = len(build.shape(value))
    one, other = (build.place(settings.get(name), axes) for name in ("axis1", "axis2"))
    order = list(range(1, axes + 1))
    order[one - 1], order[other - 1] = other, one
    return build.permute(value, order)


def _flip(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    place = build.place(settings.get("axis"), len(build.shape(value)))
    return build.select(value, place, slice(None, None, -1))


def _repeat(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    place = build.place(settings.get("axis"), len(build.shape(value)))
    if build.shape(value)[place - 1] != 1:
        raise build.layer.refuse(f"expected axis {place} of length 1 to repeat")
    return build.repeat(value, place, _whole(build, settings, "repeats"))


def _tile(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
    times = settings.get("repeats")
    if not isinstance(times, list) or len(times) != len(build.shape(value)) + 1 or times[0] != 1:
        raise build.layer.refuse(f"expected how often for each axis, once for the batch, found {short(times)}")
    for place in range(1, len(times)):
        value = build.repeat(value, place, _whole(build, {"repeats": times[place]}, "repeats"))
    return value


def _split(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> list[Pending]:
    place, cuts = build.place(settings.get("axis"), len(build.shape(value))), settings.get("indices_or_sections")
    if type(cuts) is int:
        length = build.length(value, place)
        if not 0 < cuts <= length or length % cuts:
            raise build.layer.refuse(f"an axis of length {length} can't be split into {cuts} equal pieces")
        step = length // build.pieces(cuts)
        cuts = list(range(step, length, step))
    if not isinstance(cuts, list) or not all(type(cut) is int and cut > 0 for cut in cuts) or sorted(cuts) != cuts:
        raise build.layer.refuse(f"expected increasing indices to split at, found {short(cuts)}")
    ends = [*zip([None, *cuts], [*cuts, None], strict=True)]
    return [partial(build.select, value, place, slice(start, stop)) for start, stop in ends]


def _concatenate(build: LayerBuilder, values: Any, settings: dict[str, Any]) -> Value:
    return build.merge("concat", *_values(build, values), axis=_axis(build, values, settings, 0))


def _stack(build: LayerBuilder, values: Any, settings: dict[str, Any]) -> Value:
    axis = _axis(build, values, settings, 1)
    return build.merge("concat", *(build.expand(value, axis) for value in _values(build, values)), axis=axis)


def _values(build: LayerBuilder, values: Any) -> list[Value]:
    if not isinstance(values, list) or not values or not all(isinstance(value, Value) for value in values):
        raise build.layer.refuse(f"expected tensors, found {short(values)}")
    return values


def _axis(build: LayerBuilder, values: Any, settings: dict[str, Any], more: int) -> int:
    return build.place(settings.get("axis", 0), len(build.shape(_values(build, values)[0])) + more)


def _softmax(name: str) -> Worker:
    def work(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
        place = build.place(settings.get("axis", -1), len(build.shape(value)))
        return build.last(value, place, lambda one: build.activate(one, name))

    return work


def _reduced(mode: str) -> Worker:
    return lambda build, value, settings: build.reduce(
        mode, value, settings.get("axis"), _flag(build, settings, "keepdims")
    )


def _plain(activation: str) -> Worker:
    return lambda build, value, settings: build.activate(value, activation)


def _with(text: str, name: str, usual: float) -> Worker:
    def work(build: LayerBuilder, value: Value, settings: dict[str, Any]) -> Value:
        return build.activate(value, f"{text}({build.number(settings.get(name, usual))})")

    return work


WORKERS: dict[str, Worker] = {
    **{kind: _plain(text) for kind, text in PLAIN.items()},
    **{kind: _reduced(mode) for kind, mode in REDUCED.items()},
    "Elu": _with("elu", "alpha", 1.0),
    "LeakyRelu": _with("leaky_relu", "negative_slope", 0.2),
    "Gelu": lambda build, value, settings: build.activate(
        value, "gelu_tanh" if _flag(build, {"approximate": True, **settings}, "approximate") else "gelu"
    ),
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "Negative": lambda build, value, settings: build.scale(value, -1.0),
    "Square": lambda build, value, settings: build.merge("mul", value, value),
    "Absolute": lambda build, value, settings: build.merge("max", value, build.scale(value, -1.0)),
    "Clip": lambda build, value, settings: build.clip(value, settings.get("x_min"), settings.get("x_max")),
    "Copy": lambda build, value, settings: value,
    "StopGradient": lambda build, value, settings: value,
    "Cast": _cast,
    "Concatenate": _concatenate,
    "ExpandDims": lambda build, value, settings: build.expand(value, settings.get("axis")),
    "Flip": _flip,
    "GetItem": _get_item,
    "Repeat": _repeat,
    "Reshape": _reshape,
    "Split": _split,
    "Squeeze": lambda build, value, settings: build.squeeze(value, settings.get("axis")),
    "Stack": _stack,
    "Swapaxes": _swap,
    "Take": _take,
    "Tile": _tile,
    "Transpose": _transpose,
}

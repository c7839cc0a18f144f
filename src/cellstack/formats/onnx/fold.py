"""Constants that an ONNX graph computes from constants, with the operators that exporters use to build weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.build import TooMuchError
from cellstack.formats.onnx.attributes import axes_of, place, slices, split_sizes, whole, within

FREE = 1 << 22  # numbers that any file may compute, regardless of its size
TIMES = 8  # further numbers per byte of the file
CASTS = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8", 12: "u4", 13: "u8"}


NEEDED = {  # number of required inputs, 1 by default
    "BatchNormalization": 5,
    "Constant": 0,
    "Range": 3,
    "Where": 3,
    **dict.fromkeys(
        ("Add", "Conv", "DequantizeLinear", "Div", "Equal", "Expand", "Gather", "Gemm", "LayerNormalization", "MatMul",
         "MatMulInteger", "Mod", "Mul", "PRelu", "Pow", "Reshape", "Sub", "Tile"), 2
    ),
}  # fmt: skip


def check_inputs(operator: str, present: Sequence[bool]) -> None:
    """Raise `ValueError` where an operator lacks a required input."""
    count = max(1, len(present)) if operator in ("Concat", "Max", "Mean", "Min", "Sum") else NEEDED.get(operator, 1)
    if not all(present[:count]) or len(present) < count:
        raise ValueError(f"expected at least {count} input{'s' * (count != 1)}, found {sum(present[:count])}")


class Budget:
    """The budget of numbers that the constants of a file of `size` bytes may still use."""

    def __init__(self, size: int) -> None:
        self.most = self.left = FREE + TIMES * size

    def again(self) -> Budget:
        """Return a full budget of the same size."""
        fresh = Budget(0)
        fresh.most = fresh.left = self.most
        return fresh

    def take(self, *shape: int) -> None:
        """Count an array of this shape; `TooMuchError` beyond the budget, `ValueError` for an invalid shape."""
        if any(axis < 0 for axis in shape):
            raise ValueError(f"expected a shape without negative axes, found {list(shape)}")
        self.left -= prod(shape) + 1
        if self.left < 0:
            raise TooMuchError(f"the constants exceed the limit of {self.most} numbers")


class Broadcast(NamedTuple):
    """A constant of unknown shape: `array`, broadcast to that shape.

    `ranked`: whether it has as many axes as `array`, so that operations that move axes can be applied to `array`.
    """

    array: Array
    ranked: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all its values are equal."""
        return self.array.size == 1


def numbers(value: Any) -> Any:
    """Return the array of a `Broadcast`; other values are returned unchanged."""
    return value.array if isinstance(value, Broadcast) else value


def reshape(array: Array, target: list[int], keep_zero: bool) -> Array:
    """Return `array` in a shape in Reshape's notation: 0 keeps a length, -1 is inferred."""
    shape = [
        array.shape[n] if axis == 0 and not keep_zero and n < array.ndim else axis for n, axis in enumerate(target)
    ]
    if any(axis < -1 for axis in shape):
        raise ValueError(f"the shape may have at most one -1, found {shape}")
    return array.reshape(shape)


def _broadcast(function: Callable[[Array, Array], Array]) -> Callable[..., list[Array]]:
    def run(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
        a, b = values
        model.budget.take(*np.broadcast_shapes(a.shape, b.shape))
        with np.errstate(all="ignore"):
            return [np.asarray(function(a, b))]

    return run


def _where(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    flags, one, other = values
    model.budget.take(*np.broadcast_shapes(*(array.shape for array in values)))
    return [np.where(flags.astype(bool), one, other)]


def _each(function: Callable[[Array], Array]) -> Callable[..., list[Array]]:
    def run(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
        model.budget.take(values[0].size)
        with np.errstate(all="ignore"):
            return [np.asarray(function(values[0]), values[0].dtype)]

    return run


def _clip(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    low, high = (*values[1:], None, None)[:2]
    low, high = attributes.get("min", low), attributes.get("max", high)
    model.budget.take(values[0].size)
    y = values[0] if low is None else np.maximum(values[0], low)
    return [np.asarray(y if high is None else np.minimum(y, high), values[0].dtype)]


def _matmul(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    """Compute a product; None if all rows are equal: this is an initial state, which must stay for finding cells."""
    a, b = values
    if a.ndim < 2 or (a.reshape(-1, a.shape[-1]) == a.reshape(-1, a.shape[-1])[:1]).all():
        return None
    model.budget.take(a.size, b.shape[-1] if b.ndim > 1 else 1)  # counts multiplications, as these take the time
    return [np.asarray(a @ b)]


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    if not b.all():
        raise ZeroDivisionError("division by 0")
    return a // b


def _constant(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    kinds = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
    for name, value in attributes.items():
        if name == "value":
            return [value]
        if name in kinds:
            return [np.asarray(value, kinds[name])]
    return None


def _constant_of_shape(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Any]:
    value = np.asarray(attributes.get("value", np.zeros(1, np.float32)))
    if value.size != 1:
        raise ValueError(f"expected one number as the value, found {value.shape}")
    if values[0] is None:
        return [Broadcast(value)]
    shape = whole(values[0])
    model.budget.take(*shape)
    return [np.full(shape, value.reshape(()))]


def _expand(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Any] | None:
    if values[0] is None:
        return None
    if values[1] is None:
        return [Broadcast(values[0])]
    shape = np.broadcast_shapes(values[0].shape, tuple(whole(values[1])))
    model.budget.take(*shape)
    return [np.broadcast_to(values[0], shape)]


def _tile(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Any] | None:
    array = values[0]
    if values[1] is None:
        return [Broadcast(array)] if array.size == 1 else None
    repeats = whole(values[1])
    model.budget.take(array.size, *repeats)
    return [np.tile(array, repeats)]


def _gather(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    array, indices = values
    axis = place(attributes.get("axis", 0), array.ndim)
    model.budget.take(array.size // max(1, array.shape[axis]), indices.size)
    return [np.asarray(np.take(array, indices, axis=axis))]


def _slice(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    taken = slices(attributes, values, values[0].ndim)
    if taken is None:
        return None
    return [values[0][tuple(within(part, length) for part, length in zip(taken, values[0].shape, strict=True))]]


def _squeeze(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    axes = axes_of(attributes, values)
    return [np.squeeze(values[0], None if axes is None else tuple(axes))]


def _unsqueeze(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    axes = axes_of(attributes, values)
    return None if axes is None else [np.expand_dims(values[0], tuple(axes))]


def _split(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    axis = place(attributes.get("axis", 0), values[0].ndim)
    sizes = split_sizes(attributes, values, values[0].shape[axis], outputs)
    return np.split(values[0], np.cumsum(sizes)[:-1], axis=axis)


def _cast(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    kind = CASTS.get(attributes.get("to", 0))
    model.budget.take(values[0].size)
    with np.errstate(all="ignore"):
        return None if kind is None else [values[0].astype(kind)]


def _concat(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    model.budget.take(sum(value.size for value in values))
    return [np.concatenate(values, axis=place(attributes["axis"], values[0].ndim))]


def _concat_broadcast(attributes: dict[str, Any], arrays: list[Array]) -> list[Broadcast]:
    """Concatenate constants of unknown shape, each as long along the axis as its array."""
    axis = place(attributes["axis"], arrays[0].ndim)
    shapes = [(*array.shape[:axis], 1, *array.shape[axis + 1 :]) for array in arrays]
    wide = np.broadcast_shapes(*shapes)
    parts = [np.broadcast_to(a, (*wide[:axis], a.shape[axis], *wide[axis + 1 :])) for a in arrays]
    return [Broadcast(np.concatenate(parts, axis=axis), True)]


def _range(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array]:
    start, limit, delta = (value.reshape(()) for value in values)
    model.budget.take(max(0, int(np.ceil((float(limit) - float(start)) / float(delta)))))
    return [np.arange(start, limit, delta)]


def _dequantize(model: Any, attributes: dict[str, Any], values: list[Any], outputs: int) -> list[Array] | None:
    array, scale = values[:2]
    zero = values[2] if len(values) > 2 and values[2] is not None else np.zeros_like(scale)
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * array.ndim
        shape[place(attributes.get("axis", 1), array.ndim)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    elif scale.size > 1:
        return None
    model.budget.take(*np.broadcast_shapes(array.shape, scale.shape))
    return [(array.astype(scale.dtype) - zero.astype(scale.dtype)) * scale]


OPERATORS: dict[str, Callable[..., list[Any] | None]] = {
    **{
        name: _each(getattr(np, name.lower()))
        for name in ("Abs", "Ceil", "Cos", "Exp", "Floor", "Log", "Reciprocal", "Sin", "Sqrt", "Tanh")
    },
    "Add": _broadcast(np.add),
    "And": _broadcast(np.logical_and),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DequantizeLinear": _dequantize,
    "Div": _broadcast(_divide),
    "Equal": _broadcast(np.equal),
    "Expand": _expand,
    "Gather": _gather,
    "Greater": _broadcast(np.greater),
    "GreaterOrEqual": _broadcast(np.greater_equal),
    "Identity": lambda model, attributes, values, outputs: [values[0]],
    "Less": _broadcast(np.less),
    "LessOrEqual": _broadcast(np.less_equal),
    "MatMul": _matmul,
    "Mod": lambda model, attributes, values, outputs: _broadcast(np.fmod if attributes.get("fmod") else np.mod)(
        model, attributes, values, outputs
    ),
    "Mul": _broadcast(np.multiply),
    "Neg": lambda model, attributes, values, outputs: [-values[0]],
    "Not": lambda model, attributes, values, outputs: [np.logical_not(values[0])],
    "Or": _broadcast(np.logical_or),
    "Range": _range,
    "Reshape": lambda model, attributes, values, outputs: [
        reshape(values[0], whole(values[1]), bool(attributes.get("allowzero", 0)))
    ],
    "Shape": lambda model, attributes, values, outputs: [
        np.array(values[0].shape[attributes.get("start", 0) : attributes.get("end")], np.int64)
    ],
    "Size": lambda model, attributes, values, outputs: [np.array(values[0].size, np.int64)],
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _broadcast(np.subtract),
    "Tile": _tile,
    "Transpose": lambda model, attributes, values, outputs: [np.transpose(values[0], attributes.get("perm"))],
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
KEEP_RANKED = {"Gather", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
KEEP_BROADCAST = {*KEEP_RANKED, "Expand", "Reshape", "Tile"}
OPEN = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}  # the input that may be unknown


def fold(
    operator: str, attributes: dict[str, Any], values: list[Any], present: list[bool], outputs: int, model: Any
) -> list[Any] | None:
    """Return an operator's outputs for constant inputs; None where unknown or unsupported.

    Args:
        operator: its name.
        attributes: by name.
        values: constants, a `Broadcast` where the shape is unknown; None for missing or non-constant inputs.
        present: which inputs are present.
        outputs: the number of outputs.
        model: its budget counts the results.

    Raises:
        TooMuchError: more numbers than a file of this size may compute.
        ValueError: invalid inputs of the operator.
    """
    compute = OPERATORS.get(operator)
    if compute is None:
        return None
    check_inputs(operator, present)
    if operator == "Concat" and all(isinstance(value, Broadcast) and value.ranked for value in values):
        return _concat_broadcast(attributes, [value.array for value in values])
    if values and isinstance(values[0], Broadcast):
        array, ranked = values[0]
        if operator == "Identity":
            return [values[0]]
        if operator == "Cast" and attributes.get("to") in CASTS:
            return [Broadcast(array.astype(CASTS[attributes["to"]]), ranked)]
        if values[0].uniform and operator in KEEP_BROADCAST:
            return [Broadcast(array)] * outputs
        if (
            ranked
            and operator in KEEP_RANKED
            and not any(
                value is None or isinstance(value, Broadcast)
                for value, there in zip(values[1:], present[1:], strict=True)
                if there
            )
        ):
            arrays = compute(model, attributes, [array, *values[1:]], outputs)
            return None if arrays is None else [Broadcast(part, True) for part in arrays]
        return None
    for number, (value, there) in enumerate(zip(values, present, strict=True)):
        if isinstance(value, Broadcast) or (there and value is None and OPEN.get(operator) != number):
            return None
    arrays = compute(model, attributes, values, outputs)
    if arrays is not None and len(arrays) != outputs:
        raise ValueError(f"expected {len(arrays)} outputs, found {outputs}")
    return arrays

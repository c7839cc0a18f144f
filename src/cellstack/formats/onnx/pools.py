"""ONNX's pools over windows of steps, as nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.fold import whole
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.ops import padding_of, steps_apart, window
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import Activation, Conv1D, Dense, Pool1D

NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hard_sigmoid", "softplus", "softmax", "exponential")
MOST_FILTERS = 4096  # of a mean that is written as a convolution


def pool(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MaxPool or AveragePool over time.

    A Network's pool has no pads of its own choice. Those of a mean that counts them are a convolution's, and zeros are
    as good as none to the greatest of numbers that aren't negative. Others are those of SAME for a length alone that
    the file names, and then the network takes no other.
    """
    x = reader.flowing(values[0])
    spatial = x.axes[2:]
    if not x.has("BF" + "".join(spatial)) or sorted(spatial) not in (["T"], ["1", "T"]):
        raise Refused(f"expected axes B F T, found {' '.join(x.axes)}")
    steps_apart(reader)
    over, count = spatial.index("T"), len(spatial)
    size = whole(attributes["kernel_shape"])
    strides, dilations, pads = window(attributes, count)
    padding = padding_of(attributes, pads, over, count)
    if len(size) != count or any(n != 1 for axis, n in enumerate(size) if axis != over) or set(dilations) != {1}:
        raise Refused(f"expected a window over time alone, found {size} and dilations {dilations}")
    mode, counts = ("max" if node.op_type == "MaxPool" else "mean"), bool(attributes.get("count_include_pad", 0))
    if padding == "same" and mode == "mean" and counts:
        raise Refused("expected count_include_pad=0")
    if isinstance(padding, tuple) or attributes.get("ceil_mode", 0):
        both = padding if isinstance(padding, tuple) else (0, 0) if padding == "valid" else None
        if both is None:
            raise Refused("expected auto_pad without ceil_mode")
        return [_padded(reader, node, x, mode, counts, size[over], strides[over], both, attributes.get("ceil_mode", 0))]
    return [_put(reader, node, x, Pool1D(mode, size[over], strides[over], padding))]


def _put(reader: Reader, node: Any, x: Flowing, made: Any) -> Flowing:
    steps, _ = made.check(label(node), (x.steps, None))
    if steps == 0:
        raise Refused(f"expected at least one window of {x.steps} steps, found none")
    return replace(x, wire=reader.add(label(node), made, x.wire), steps=steps)


def _padded(
    reader: Reader,
    node: Any,
    x: Flowing,
    mode: str,
    counts: bool,
    size: int,
    stride: int,
    pads: tuple[int, int],
    ceil: int,
) -> Flowing:
    before, after = pads
    if max(pads) >= size or (ceil and size < stride + after):
        raise Refused(f"expected windows that hold steps, found {size} steps every {stride}, pads {list(pads)}")
    if ceil and size == stride == 2 and pads == (0, 0):
        return _put(reader, node, x, Pool1D(mode, size, stride, "same"))
    rest = 0
    if ceil and x.steps is not None:  # the last window may be less than whole
        rest = -(x.steps + before + after - size) % stride
    if x.width is not None and x.width <= MOST_FILTERS:
        ones = np.ones((1, 1, x.width), np.float32)
        if mode == "mean" and counts and not rest and not (ceil and x.steps is None):
            reader.pinned = reader.pinned or bool(ceil)
            reader.budget.take(size, x.width)
            kernel = np.repeat(ones / np.float32(size), size, axis=0)
            return _put(reader, node, x, Conv1D(kernel, None, stride, pads, groups=x.width))
        if mode == "max" and _not_negative(reader, x):  # so many zeros more give the last window, whole or not
            zeros = Conv1D(ones, None, 1, (before, after + (stride - 1 if ceil else 0)), groups=x.width)
            x = _put(reader, node, x, zeros)
            return _put(reader, node, x, Pool1D(mode, size, stride))
    uncounted = not counts or pads == (0, 0)
    steps = size if stride == 1 else x.steps  # windows at every step have the same pads at every length
    if steps is not None and uncounted and _same(steps, size, stride) == (before, after + rest):
        reader.pinned = reader.pinned or stride > 1  # else of another length, these pads aren't those of SAME
        return _put(reader, node, x, Pool1D(mode, size, stride, "same"))
    raise Refused(f"expected a pool without pads {list(pads)} and ceil_mode {ceil}, which a Network's hasn't")


def _same(steps: int, size: int, stride: int) -> tuple[int, int]:
    """Return the pads that give one window for each of so many strides, the odd one at the end."""
    missing = max(0, (-(-steps // stride) - 1) * stride + size - steps)
    return missing // 2, missing - missing // 2


def _not_negative(reader: Reader, x: Flowing) -> bool:
    """Whether a value comes out of an activation that gives nothing below 0."""
    node = next((node for name, node, _ in reader.nodes if name == x.wire), None)
    text = node.activation if isinstance(node, (Activation, Conv1D, Dense)) else ""
    return text.split("(")[0] in NOT_NEGATIVE


HANDLERS: dict[str, Handler] = {"MaxPool": pool, "AveragePool": pool}

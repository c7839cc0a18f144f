"""ONNX's operators over windows of steps, as nodes: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cellstack.cells.layout import Array
from cellstack.formats.onnx import grid_windows
from cellstack.formats.onnx.attributes import whole
from cellstack.formats.onnx.file import label
from cellstack.formats.onnx.graph import Handler, Reader, Refused, floats, steps_apart
from cellstack.formats.onnx.slices import unfilled
from cellstack.formats.onnx.values import Filled, Flowing
from cellstack.nodes import Conv1D, Dense, Node, Pad, Pool1D, Reshape


def over_time(reader: Reader, node: Any, value: Any) -> tuple[Flowing, int, int]:
    """Return a value, the index of time among the windowed axes, and the number of windowed axes.

    Windows slide over one axis, or over two of which one has length 1.
    """
    x = reader.flowing(value)
    if reader.frames is not None and x.axes == ("B", "1", "F"):  # one channel; its steps are the values of a frame
        x = reader.put(f"{x.wire}.steps", Reshape((-1, 1)), x, axes=("B", "F", "T"))
    spatial = x.axes[2:]
    if not x.has("BF" + "".join(spatial)) or sorted(spatial) not in (["T"], ["1", "T"]):
        raise Refused(f"expected axes B F T, found {' '.join(x.axes)}")
    return x, spatial.index("T"), len(spatial)


def window(attributes: dict[str, Any], over: int, count: int) -> tuple[int, list[int], Any]:
    """Return the strides over time, all dilations, and the padding over time in the nodes' notation.

    Args:
        attributes: the attributes of the operator.
        over: the index of time among the windowed axes.
        count: the number of windowed axes.
    """
    strides, dilations, steps, auto = grid_windows.window_lists(attributes, count)
    if auto in ("VALID", "SAME_UPPER"):
        return strides[over], dilations, "same" if auto == "SAME_UPPER" else "valid"
    if any(number for n, number in enumerate(steps) if n % count != over) or min(steps) < 0:
        raise Refused(f"only time can be padded, found {steps}")
    return strides[over], dilations, (steps[over], steps[over + count])


def put(reader: Reader, node: Any, made: Node, x: Flowing) -> list[Any]:
    """Add a node over windows, and return its output; `Refused` where the output would have no steps."""
    if made.mixes_steps:
        steps_apart(reader)
    y = reader.put(node, made, x)
    if y.steps == 0:
        raise Refused(f"the input's {x.steps} steps are fewer than one window")
    return [y]


def conv(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a convolution over time."""
    kernel = floats(values[1], "the weights")
    bias = floats(values[2], "the bias") if len(values) > 2 and values[2] is not None else None
    if isinstance(values[0], Filled):
        count = kernel.ndim - 2
        strides, dilations = (whole(attributes.get(name, [1] * count)) for name in ("strides", "dilations"))
        if count != 1 or any(whole(attributes.get("pads", [0, 0]))):
            raise Refused(
                "after padding that depends on the number of steps, only a convolution over time, without pads, is "
                "supported"
            )
        span = (kernel.shape[2] - 1) * dilations[0] + 1
        values = [unfilled(reader, values[0], span, strides[0]), *values[1:]]
    if reader.frames is not None and (made := _at_once(reader, node, attributes, values[0], kernel, bias)) is not None:
        return [made]
    if reader.frames is None and not _only_time(reader.flowing(values[0]), kernel.shape[2:]):
        made = grid_windows.conv(reader, node, attributes, values[0], kernel, bias)
        return [made]
    x, over, count = over_time(reader, node, values[0])
    if kernel.ndim != count + 2:
        raise Refused(f"expected weights with {count + 2} axes, found {kernel.shape}")
    if count == 2:
        kernel = kernel[:, :, :, 0] if over == 0 else kernel[:, :, 0]
    strides, dilations, padding = window(attributes, over, count)
    taps, group = kernel.transpose(2, 1, 0), attributes.get("group", 1)
    return put(reader, node, Conv1D(taps, bias, strides, padding, dilations[over], group), x)


def _only_time(x: Flowing, sizes: Sequence[int]) -> bool:
    """Whether windows slide over time only, with the features as channels."""
    spatial = x.axes[2:]
    time = sorted(spatial) in (["T"], ["1", "T"]) and len(sizes) == len(spatial)
    return (
        time
        and x.has("BF" + "".join(spatial))
        and all(size == 1 for axis, size in zip(spatial, sizes, strict=True) if axis == "1")
    )


def _at_once(
    reader: Reader, node: Any, attributes: dict[str, Any], value: Any, kernel: Array, bias: Array | None
) -> Flowing | None:
    """Return the output of a convolution with kernel size 1, read as a Dense; None for other convolutions."""
    x = reader.flowing(value)
    plain = attributes.get("group", 1) == 1 and set(kernel.shape[2:]) == {1} and "T" not in x.axes
    if len(x.axes) != kernel.ndim or x.axes[1] != "F" or not plain:
        return None
    strides, pads = (whole(attributes.get(name, [1])) for name in ("strides", "pads"))
    if set(strides) != {1} or ("pads" in attributes and any(pads)):
        return None
    return reader.put(node, Dense(kernel.reshape(kernel.shape[:2]).T, bias), x)


def pool(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a MaxPool or AveragePool over time; with ceil_mode, an incomplete last window counts too."""
    sizes = whole(attributes["kernel_shape"])
    if reader.frames is None and not _only_time(reader.flowing(values[0]), sizes):
        return [grid_windows.pool(reader, node, attributes, values[0])]
    x, over, count = over_time(reader, node, values[0])
    strides, dilations, padding = window(attributes, over, count)
    if len(sizes) != count or any(n != 1 for axis, n in enumerate(sizes) if axis != over) or set(dilations) != {1}:
        raise Refused(f"only windows over time are supported, found {sizes} and dilations {dilations}")
    mode, size, ceil = "max" if node.op_type == "MaxPool" else "mean", sizes[over], attributes.get("ceil_mode", 0)
    counts = mode == "mean" and attributes.get("count_include_pad", 0) and padding not in ("valid", (0, 0))
    if padding == "same" and (counts or ceil):
        raise Refused("auto_pad can't be combined with ceil_mode or count_include_pad")
    if isinstance(padding, tuple):
        before, after = padding
        if max(padding) >= size or (ceil and size < strides + after):
            raise Refused(f"every window must contain a step, found {size} steps every {strides}, pads {list(padding)}")
        if counts and ceil:  # runtimes differ in whether positions beyond the pads count
            if x.steps is None or (x.steps + before + after - size) % strides:
                raise Refused("ceil_mode with count_include_pad and pads isn't supported")
            reader.builder.pinned, ceil = True, 0
        if counts:
            x = reader.put(f"{label(node)}.padded", Pad(before, after), x)
            padding = before, after = (0, 0)
        padding = (before, after + strides - 1) if ceil else padding
    return put(reader, node, Pool1D(mode, size, strides, padding), x)


HANDLERS: dict[str, Handler] = {
    "Conv": conv,
    "ConvTranspose": grid_windows.conv_transpose,
    "MaxPool": pool,
    "AveragePool": pool,
}

"""ONNX's convolutions and pools over time and several feature axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.attributes import whole
from cellstack.formats.onnx.graph import Reader, Refused, floats, steps_apart
from cellstack.formats.onnx.grids import arranged, as_features, as_grid, fresh
from cellstack.formats.onnx.values import Flowing
from cellstack.nodes import GridConv, GridPool, windows


def window_lists(attributes: dict[str, Any], count: int) -> tuple[list[int], list[int], list[int], str]:
    """Return the strides, dilations, pads and auto_pad of windows over some axes, as attributes list them."""
    usual = {"strides": [1] * count, "dilations": [1] * count, "pads": [0] * 2 * count}
    strides, dilations, pads = (whole(attributes.get(name, values)) for name, values in usual.items())
    if (len(strides), len(dilations), len(pads)) != (count, count, 2 * count):
        raise Refused(f"expected strides, dilations and pads for {count} axes")
    auto = attributes.get("auto_pad") or "NOTSET"
    if auto not in ("NOTSET", "VALID", "SAME_UPPER"):
        raise Refused(f"expected auto_pad NOTSET, VALID or SAME_UPPER, found {auto}")
    return strides, dilations, pads, auto


class Spatial:
    """An operator's input with the axes over which its windows slide: time, if it is one, and a grid of features.

    Args:
        reader: the reader.
        value: the input, with the axes batch, channels, and those of the windows.
        pools: whether the operator is a pool, which doesn't combine channels, so time may be the axis of channels.
    """

    def __init__(self, reader: Reader, value: Any, pools: bool = False) -> None:
        x = as_grid(reader.flowing(value))
        sizes = dict(x.parts)
        behind = x.axes[2:]
        steps = "T" in behind
        ahead = "1T" if pools else "1"
        if x.axes[0] not in "B1NM" or (x.axes[1] not in sizes and x.axes[1] not in ahead) or not behind:
            raise Refused(f"expected the axes batch, channels, and those of windows, found {' '.join(x.axes)}")
        if ("T" in x.axes and x.axes[1] != "T") != steps or any(
            axis not in sizes and axis not in "T1" for axis in behind
        ):
            raise Refused(f"expected windows over time and features, found axes {' '.join(x.axes)}")
        self.pins = False  # whether the padding is that of the file's number of steps
        self.channels = sizes.get(x.axes[1], 1)
        self.over = behind.index("T") if steps else None
        # The indices of the grid's axes among those of the windows.
        self.places = [n for n, axis in enumerate(behind) if axis != "T"]
        self.grid = tuple(sizes.get(behind[n], 1) for n in self.places) or (1,)
        order = [behind[n] for n in self.places if behind[n] != "1"]
        self.x = arranged(reader, x, [*order, *([x.axes[1]] if x.axes[1] in sizes else [])])
        self.count = len(behind)

    def turned(self, values: Sequence[Any], usual: Any) -> tuple[Any, ...]:
        """Return one setting per axis, time first, for an attribute `values`; `usual` for axes that it lacks."""
        ahead = usual if self.over is None else values[self.over]
        return (ahead, *([values[n] for n in self.places] or [usual]))

    def kernel(self, weights: Array) -> Array:
        """Return weights `[…, …, axes of windows]` with time as the first of these axes."""
        if weights.ndim != self.count + 2:
            raise Refused(f"expected weights with {self.count + 2} axes, found {weights.shape}")
        weights = weights if self.over is not None else weights[:, :, None]
        order = [0, 1, 2 + (self.over or 0), *(2 + n + (self.over is None) for n in self.places)]
        weights = weights.transpose(order)
        return weights if self.places else weights[..., None]

    def settings(self, attributes: dict[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
        """Return the strides, dilation and padding of windows with these sizes, time first."""
        count = self.count
        strides, dilations, pads, auto = window_lists(attributes, count)
        if min(pads) < 0:
            raise Refused(f"expected strides, dilations and pads for {count} axes")
        made = {"strides": self.turned(strides, 1), "dilation": self.turned(dilations, 1)}
        pairs = [(pads[n], pads[n + count]) for n in range(count)]
        if auto == "SAME_UPPER":
            lengths = [self.x.steps if n == self.over else None for n in range(count)]
            for n, length in zip(self.places, self.grid, strict=False):
                lengths[n] = length
            for n, length in enumerate(lengths):
                if length is None and strides[n] > 1:
                    raise Refused("auto_pad SAME_UPPER with strides above 1 needs a known number of steps")
                span = (sizes[n] - 1) * dilations[n] + 1
                pairs[n] = windows.pads("same", length or 1, span, strides[n])
                self.pins |= length is not None and n == self.over and strides[n] > 1
        return made | {"padding": self.turned(pairs, (0, 0))}

    def put(self, reader: Reader, node: Any, made: GridConv | GridPool) -> Flowing:
        """Add a node over windows, and return its output."""
        reader.builder.pinned |= self.pins
        y, behind = reader.put(node, made, self.x), self.x.axes[2:]
        if y.steps == 0:
            raise Refused(f"the input's {self.x.steps} steps are fewer than one window")
        free = fresh(self.x.axes)
        names = dict(zip(self.places, made.grid_out, strict=False))
        axes, parts = list[str](), list[tuple[str, int]]()
        for n, axis in enumerate(behind):
            if n not in names:
                axes.append("T")
                continue
            name = axis if axis != "1" else "1" if names[n] == 1 else next(free)
            axes.append(name)
            parts += [(name, names[n])] if name != "1" else []
        channel = self.x.axes[1] if self.x.axes[1] != "1" else next(free)
        if channel != "T":
            parts.append((channel, made.filters))
        return as_features(replace(y, axes=(self.x.axes[0], channel, *axes), parts=tuple(parts)))


def conv(
    reader: Reader, node: Any, attributes: dict[str, Any], value: Any, kernel: Array, bias: Array | None
) -> Flowing:
    """Read a convolution over a grid."""
    spatial = Spatial(reader, value)
    groups = attributes.get("group", 1)
    if kernel.ndim == spatial.count + 2 and kernel.shape[1] * groups != spatial.channels:
        raise Refused(f"expected weights for {spatial.channels} channels, found {kernel.shape[1] * groups}")
    settings = spatial.settings(attributes, kernel.shape[2:])
    taps = np.moveaxis(spatial.kernel(kernel), (1, 0), (-2, -1))
    return spatial.put(reader, node, GridConv(taps, spatial.grid, bias, groups=groups, **settings))


def conv_transpose(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a transposed convolution as a convolution with zeros inserted into its input: see `GridConv.spread`."""
    kernel = floats(values[1], "the weights")
    bias = floats(values[2], "the bias") if len(values) > 2 and values[2] is not None else None
    spatial = Spatial(reader, values[0])
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attributes:
        raise Refused("auto_pad and output_shape aren't supported")
    settings = spatial.settings(attributes, kernel.shape[2:])
    more = spatial.turned(whole(attributes.get("output_padding", [0] * spatial.count)), 0)
    groups = attributes.get("group", 1)
    taps = spatial.kernel(kernel)  # [C, F/groups, …]
    channels, filters, *sizes = taps.shape
    if channels != spatial.channels or channels % groups:
        raise Refused(f"expected weights for {spatial.channels} channels, found {channels}")
    taps = np.flip(taps, tuple(range(2, taps.ndim))).reshape(groups, channels // groups, filters, *sizes)
    taps = np.moveaxis(taps.swapaxes(0, 1).reshape(channels // groups, groups * filters, *sizes), (0, 1), (-2, -1))
    spans = [(size - 1) * step + 1 for size, step in zip(sizes, settings["dilation"], strict=True)]
    ends = zip(spans, settings["padding"], more, strict=True)
    padding = [(span - 1 - before, span - 1 - after + extra) for span, (before, after), extra in ends]
    if min(map(min, padding)) < 0:
        raise Refused(f"expected pads less than a window, {spans}, found {settings['padding']}")
    spread = settings["strides"]
    made = GridConv(taps, spatial.grid, bias, None, tuple(padding), settings["dilation"], spread, groups)
    if made.mixes_steps:
        steps_apart(reader)
    return [spatial.put(reader, node, made)]


def pool(reader: Reader, node: Any, attributes: dict[str, Any], value: Any) -> Flowing:
    """Read a MaxPool or AveragePool over a grid."""
    spatial, sizes = Spatial(reader, value, pools=True), whole(attributes["kernel_shape"])
    if len(sizes) != spatial.count:
        raise Refused(f"expected windows over {spatial.count} axes, found {sizes}")
    settings, size = spatial.settings(attributes, sizes), spatial.turned(sizes, 1)
    mode = "max" if node.op_type == "MaxPool" else "mean"
    counts = mode == "mean" and bool(attributes.get("count_include_pad", 0))
    if attributes.get("ceil_mode", 0):
        lengths = (spatial.x.steps if spatial.over is not None else 1, *spatial.grid)
        for length, span, stride, pads in zip(lengths, size, settings["strides"], settings["padding"], strict=True):
            if (stride > 1 and length is None) or (length is not None and (length + sum(pads) - span) % stride):
                raise Refused("ceil_mode isn't supported for windows over features of which the last is incomplete")
    return spatial.put(reader, node, GridPool(mode, spatial.grid, spatial.channels, size, counts=counts, **settings))

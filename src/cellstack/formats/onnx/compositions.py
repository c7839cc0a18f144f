"""Writes nodes that take several ONNX operators: those over a grid, attention, norms, grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.nodes import Attention, GridConv, GridPool, GroupedDense, GroupNorm, RMSNorm

if TYPE_CHECKING:
    from cellstack.formats.onnx.pieces import Pieces
    from cellstack.nodes.grid_base import Grid


def _channels_first(pieces: Pieces, node: Grid, x: str, vector: bool) -> str:
    """Add operators that turn `x [B, T, W]`, or `[B, W]` if it is a vector, into `[B, C, T, …]`; return the result."""
    if vector:
        x = pieces.of("Unsqueeze", x, pieces.integers(1))
    wide = pieces.of("Reshape", x, pieces.integers(0, 0, *node.grid, node.channels))
    last = len(node.grid) + 2
    return pieces.of("Transpose", wide, perm=[0, last, *range(1, last)])


def _steps_first(pieces: Pieces, name: str, node: Grid, y: str, vector: bool) -> None:
    """Add operators that turn `y [B, F, T, …]` into the output of a node, `[B, T, W]`, or `[B, W]` for a vector."""
    last = len(node.grid) + 2
    width = node.filters * int(np.prod(node.grid_out))
    rows = pieces.of("Transpose", y, perm=[0, *range(2, last + 1), 1])
    shape = pieces.integers(0, width) if vector else pieces.integers(0, 0, width)
    pieces.put("Reshape", [rows, shape], name, f"{name}.rows")


def grid_conv(pieces: Pieces, name: str, node: GridConv, x: str, vector: bool) -> None:
    """Add a convolution over a grid."""
    spread, kernel = any(step > 1 for step in node.spread), np.moveaxis(node.kernel, (-1, -2), (0, 1))
    pads = [*(before for before, _ in node.padding), *(after for _, after in node.padding)]
    sizes: dict[str, Any] = {"strides": list(node.strides), "pads": pads}
    if spread:
        if any(step > 1 for step in node.strides):
            raise ValueError(f"save: {name}: strides and spread together aren't supported in ONNX files")
        kernel = np.flip(kernel, tuple(range(2, kernel.ndim)))
        filters, channels, *taps = kernel.shape
        kernel = kernel.reshape(node.groups, filters // node.groups, channels, *taps).swapaxes(1, 2)
        kernel = kernel.reshape(channels * node.groups, filters // node.groups, *taps)
        before = [span - 1 - pair[0] for span, pair in zip(node.spans, node.padding, strict=True)]
        after = [span - 1 - pair[1] for span, pair in zip(node.spans, node.padding, strict=True)]
        more = [max(0, -n) for n in after]
        if min(before) < 0 or any(n >= step for n, step in zip(more, node.spread, strict=True)):
            raise ValueError(f"save: {name}: padding {node.padding} with spread isn't supported in ONNX files")
        pads = [*before, *(max(0, n) for n in after)]
        sizes = {"strides": list(node.spread), "pads": pads, "output_padding": more}
    arrays = [pieces.tensor(f"{name}.kernel", kernel)]
    if node.bias is not None:
        arrays.append(pieces.tensor(f"{name}.bias", node.bias))
    sizes |= {"dilations": list(node.dilation), "group": node.groups, "kernel_shape": list(kernel.shape[2:])}
    wide = _channels_first(pieces, node, x, vector)
    y = pieces.put("ConvTranspose" if spread else "Conv", [wide, *arrays], pieces.fresh(f"{name}.z"), name, **sizes)
    _steps_first(pieces, name, node, y, vector)


def grid_pool(pieces: Pieces, name: str, node: GridPool, x: str, vector: bool) -> None:
    """Add a pool over a grid."""
    pads = [*(before for before, _ in node.padding), *(after for _, after in node.padding)]
    sizes: dict[str, Any] = {"kernel_shape": list(node.size), "strides": list(node.strides), "pads": pads}
    dilated = any(step > 1 for step in node.dilation)
    if dilated and node.mode == "mean":
        raise ValueError(f"save: {name}: a mean with dilation isn't supported in ONNX files")
    sizes |= {"dilations": list(node.dilation)} if dilated else {}
    sizes |= {"count_include_pad": int(node.counts)} if node.mode == "mean" else {}
    wide = _channels_first(pieces, node, x, vector)
    operator = "MaxPool" if node.mode == "max" else "AveragePool"
    y = pieces.put(operator, [wide], pieces.fresh(f"{name}.pooled"), name, **sizes)
    _steps_first(pieces, name, node, y, vector)


def time_softmax(pieces: Pieces, name: str, x: str, mask: str) -> None:
    """Add a softmax over time; `mask` is the mask of `x`, or ""."""
    if not mask:
        pieces.put("Softmax", [x], name, axis=1)
        return
    y = pieces.of("Softmax", pieces.of("Where", mask, x, pieces.number(LEAST)), axis=1)
    pieces.put("Where", [mask, y, pieces.number(0.0)], name)


LEAST = -1e30  # the score of an unused step; -inf would make NaN of a row without any used step


def attention(pieces: Pieces, name: str, node: Attention, sources: Sequence[str], width: int, masks: list[str]) -> None:
    """Add an Attention of sources with these masks, "" for none, to queries of this width."""
    of, split = pieces.of, pieces.integers(0, 0, node.heads, -1)
    queries, keys, values = (
        of("Transpose", of("Reshape", source, split), perm=[0, 2, 3, 1] if n == 1 else [0, 2, 1, 3])
        for n, source in enumerate(sources)
    )
    factor = 1 / np.sqrt(width // node.heads) if node.scale is None else node.scale
    scores = of("MatMul", of("Mul", queries, pieces.number(float(factor))), keys)
    used = of("And", *masks) if len(masks) > 1 else "".join(masks)
    used = of("Unsqueeze", of("Transpose", used, perm=[0, 2, 1]), pieces.integers(1)) if used else ""
    if node.causal:
        ones = of("ConstantOfShape", of("Shape", scores, start=2), value=pieces.onnx.numpy_helper.from_array(ONE))
        past = of("Cast", of("Trilu", ones, upper=0), to=9)
        used = of("And", used, past) if used else past
    if used:
        scores = of("Where", used, scores, pieces.number(LEAST))
    weights = of("Softmax", scores, axis=-1)
    if used:
        weights = of("Where", used, weights, pieces.number(0.0))
    rows = of("Transpose", of("MatMul", weights, values), perm=[0, 2, 1, 3])
    pieces.put("Reshape", [rows, pieces.integers(0, 0, -1)], name)


ONE = np.ones(1, np.float32)


def group_norm(pieces: Pieces, name: str, node: GroupNorm, x: str, axes: int, width: int, mask: str) -> None:
    """Add a GroupNorm of a value with so many axes after the batch; `mask` is "" unless the node heeds one."""
    of, ahead = pieces.of, [0] * axes
    wide = of("Reshape", x, pieces.integers(*ahead, node.groups, width // node.groups))
    over = [1, 3] if node.over_time else [axes + 1]
    mask = of("Unsqueeze", mask, pieces.integers(3)) if mask else ""

    def mean(value: str) -> str:
        if not mask:
            return of("ReduceMean", value, axes=over, keepdims=1)
        used = of("Where", mask, value, pieces.number(0.0))
        total = of("ReduceSum", used, pieces.integers(*over), keepdims=1)
        steps = of("ReduceSum", of("Cast", mask, to=pieces.type), pieces.integers(1), keepdims=1)
        return of("Div", total, of("Max", of("Mul", steps, pieces.number(width // node.groups)), pieces.number(1.0)))

    centred = of("Sub", wide, mean(wide))
    variance = mean(of("Mul", centred, centred))
    unit = of("Div", centred, of("Sqrt", of("Add", variance, pieces.number(node.epsilon))))
    _scaled(pieces, name, node, of("Reshape", unit, pieces.integers(*ahead, width)))


def _scaled(pieces: Pieces, name: str, node: GroupNorm | RMSNorm, y: str) -> None:
    for operator, array in (("Mul", node.gain), ("Add", node.bias)):
        if array is not None:
            y = pieces.of(operator, y, pieces.tensor(f"{name}.{operator.lower()}", array))
    pieces.put("Identity", [y], name)


def rms_norm(pieces: Pieces, name: str, node: RMSNorm, x: str) -> None:
    """Add an RMSNorm; ONNX's operator of this name needs opset 23."""
    of = pieces.of
    squares = of("ReduceMean", of("Mul", x, x), axes=[-1], keepdims=1)
    _scaled(pieces, name, node, of("Div", x, of("Sqrt", of("Add", squares, pieces.number(node.epsilon)))))


def grouped_dense(pieces: Pieces, name: str, node: GroupedDense, x: str, axes: int) -> None:
    """Add a GroupedDense; its input has `axes` axes after the batch."""
    of, (groups, inputs, units) = pieces.of, node.kernel.shape
    if inputs == units == 1:
        y = of("Mul", x, pieces.tensor(f"{name}.kernel", node.kernel.ravel()))
    elif groups == 1:
        y = of("MatMul", x, pieces.tensor(f"{name}.kernel", node.kernel[0]))
    else:
        rows = of("Reshape", x, pieces.integers(*[0] * axes, groups, 1, inputs))
        y = of("MatMul", rows, pieces.tensor(f"{name}.kernel", node.kernel))
        y = of("Reshape", y, pieces.integers(*[0] * axes, node.units))
    if node.bias is not None:
        y = of("Add", y, pieces.tensor(f"{name}.bias", node.bias))
    pieces.put("Identity", [y], name)

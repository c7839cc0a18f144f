"""How each node is written: a function per node, which adds its operators to the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack import nodes
from cellstack.formats.onnx import compositions
from cellstack.formats.onnx.masks import last_used, masked, neutral, reduced
from cellstack.nodes.base import Shape
from cellstack.nodes.elementwise import FUNCTIONS, Elementwise

if TYPE_CHECKING:
    from cellstack.formats.onnx.cell_writer import CellWriter
    from cellstack.formats.onnx.pieces import Pieces


class Feed(NamedTuple):
    """What a node reads: its inputs, their masks, "" for none, and the shape of the first one without the batch."""

    sources: list[str]
    masks: list[str]
    shape: Shape

    @property
    def x(self) -> str:
        """The first input."""
        return self.sources[0]

    @property
    def mask(self) -> str:
        """Its mask."""
        return self.masks[0]

    @property
    def axes(self) -> int:
        """The number of its axes after the batch."""
        return len(self.shape)

    def width(self, name: str, node: nodes.Node) -> int:
        """Return the width of the first input, which the operators of a node depend on."""
        if self.shape[-1] is None:
            raise ValueError(f"save: {name}: {type(node).__name__} needs a known width")
        return self.shape[-1]


def _channels(out: Pieces, name: str, x: str) -> str:
    """Transpose `[B, T, W]` to `[B, W, T]`, the order that ONNX's windows need."""
    return out.put("Transpose", [x], out.fresh(f"{name}.channels"), perm=[0, 2, 1])


def _padding(padding: str | tuple[int, int], span: int) -> dict[str, Any]:
    """Return the attributes for padding a sequence to windows of `span` steps."""
    if padding in ("valid", "same"):
        return {"auto_pad": "SAME_UPPER" if padding == "same" else "VALID"}
    return {"pads": [span - 1, 0] if padding == "causal" else list(padding)}


def _arrays(out: Pieces, name: str, **arrays: Any) -> list[str]:
    """Add the arrays of a node that aren't None."""
    return [out.tensor(f"{name}.{what}", array) for what, array in arrays.items() if array is not None]


def _step_mask(out: Pieces, name: str, node: nodes.StepMask, feed: Feed) -> str:
    flags = out.of("Not", out.of("Equal", feed.sources[1], out.number(0.0)))
    out.put("Identity", [feed.x], name)
    return out.of("Unsqueeze", flags, out.integers(2))


def _dense(out: Pieces, name: str, node: nodes.Dense, feed: Feed) -> None:
    product = out.put("MatMul", [feed.x, *_arrays(out, name, kernel=node.kernel)], out.fresh(f"{name}.z"), name)
    if node.bias is not None:
        product = out.put("Add", [product, *_arrays(out, name, bias=node.bias)], out.fresh(f"{name}.sum"))
    out.finish(name, product, node.activation, name)


def _conv(out: Pieces, name: str, node: nodes.Conv1D, feed: Feed) -> None:
    arrays = _arrays(out, name, kernel=node.kernel.transpose(2, 1, 0), bias=node.bias)
    sizes = {"strides": [node.strides], "dilations": [node.dilation], "group": node.groups}
    sizes |= _padding(node.padding, node.span)
    y = out.put("Conv", [_channels(out, name, feed.x), *arrays], out.fresh(f"{name}.z"), name, **sizes)
    y = out.put("Transpose", [y], out.fresh(f"{name}.rows"), perm=[0, 2, 1])
    out.finish(name, y, node.activation, name)


def _pool(out: Pieces, name: str, node: nodes.Pool1D, feed: Feed) -> None:
    if isinstance(node.padding, tuple) and max(node.padding) >= node.size:
        raise ValueError(f"save: {name}: expected padding below the window's {node.size}, got {node.padding}")
    sizes = {"kernel_shape": [node.size], "strides": [node.strides], **_padding(node.padding, node.size)}
    operator = "MaxPool" if node.mode == "max" else "AveragePool"
    y = out.put(operator, [_channels(out, name, feed.x)], out.fresh(f"{name}.pooled"), name, **sizes)
    out.put("Transpose", [y], name, f"{name}.rows", perm=[0, 2, 1])


def _global_pool(out: Pieces, name: str, node: nodes.GlobalPool, feed: Feed) -> None:
    if node.mode != "last":
        reduced(out, name, node.mode, feed.x, 1, False, feed.mask)
    elif feed.mask:
        last_used(out, name, feed.x, feed.mask)
    else:
        out.put("Gather", [feed.x, out.tensor(f"{name}.at", np.array(-1, np.int64))], name, axis=1)


def _reduce(out: Pieces, name: str, node: nodes.Reduce, feed: Feed) -> None:
    place = node.place(feed.axes)
    reduced(out, name, node.mode, feed.x, place, node.keepdims, feed.mask if place == 1 else "")


def _layer_norm(out: Pieces, name: str, node: nodes.LayerNorm, feed: Feed) -> None:
    """ONNX requires a gain, so a missing one becomes ones."""
    gain = np.ones(feed.width(name, node), out.dtype) if node.gain is None else node.gain
    arrays = _arrays(out, name, gain=gain, bias=node.bias)
    out.put("LayerNormalization", [feed.x, *arrays], name, axis=-1, epsilon=float(node.epsilon))


def _attention(out: Pieces, name: str, node: nodes.Attention, feed: Feed) -> None:
    masks = [mask for mask in feed.masks[1:] if mask]
    compositions.attention(out, name, node, feed.sources, feed.width(name, node), masks)


def _magnitude(out: Pieces, name: str, node: nodes.Magnitude, feed: Feed) -> None:
    """A slice for the real parts and one for the imaginary parts."""
    width, squares = feed.width(name, node), []
    for part, taken in (("real", slice(0, width // 2)), ("imaginary", slice(width // 2, width))):
        cut = out.fresh(f"{name}.{part}")
        out.cut(feed.x, taken, -1, cut)
        squares.append(out.put("Mul", [cut, cut], out.fresh(f"{cut}.squared")))
    total = out.put("Add", squares, out.fresh(f"{name}.total"))
    if node.epsilon:
        total = out.put("Add", [total, out.number(node.epsilon)], out.fresh(f"{name}.above"))
    out.put("Sqrt", [total], name)


def _elementwise(out: Pieces, name: str, node: Elementwise, feed: Feed) -> None:
    """The first operator of the formula has the node's name."""
    first = len(out.nodes)

    def call(function: str, *values: str) -> str:
        operator = FUNCTIONS[function][1]
        return out.put(operator, list(values), out.fresh(f"{name}.{operator}"))

    def constant(value: Any) -> str:
        return out.number(value) if np.ndim(value) == 0 else out.tensor(f"{name}.{node.name_of(value)}", value)

    node.formula.written(feed.x, call, constant)
    out.nodes[first].name, out.nodes[-1].output[0] = name, name


def _clip(out: Pieces, name: str, node: nodes.Clip, feed: Feed) -> None:
    bounds = ["" if bound is None else out.number(bound) for bound in (node.low, node.high)]
    out.put("Clip", [feed.x, *bounds], name)


def _pad(out: Pieces, name: str, node: nodes.Pad, feed: Feed) -> None:
    ends = np.zeros((2, feed.axes + 1), np.int64)
    ends[:, node.place(feed.axes)] = node.before, node.after
    out.put("Pad", [feed.x, out.integers(*ends.ravel().tolist()), out.number(node.value)], name)


def _repeat(out: Pieces, name: str, node: nodes.Repeat | nodes.RepeatLike, feed: Feed) -> None:
    wide = out.put("Unsqueeze", [feed.x, out.integers(1)], out.fresh(f"{name}.wide"))
    if isinstance(node, nodes.Repeat):
        times = out.integers(1, node.times, 1)
    else:
        steps = out.put("Shape", [feed.sources[1]], out.fresh(f"{name}.steps"), start=1, end=2)
        times = out.put("Concat", [out.integers(1), steps, out.integers(1)], out.fresh(f"{name}.times"), axis=0)
    out.put("Tile", [wide, times], name)


def _take(out: Pieces, name: str, node: nodes.Take, feed: Feed) -> None:
    out.put("Gather", [feed.x, out.integers(*node.indices)], name, axis=node.place(feed.axes))


def _bidirectional(out: CellWriter, name: str, node: nodes.Bidirectional, feed: Feed) -> None:
    out.bidirectional(name, node, feed.x, name, feed.mask, node.apart(feed.sources)[1])


def _recurrent(out: CellWriter, name: str, node: nodes.Recurrent, feed: Feed) -> None:
    out.stack(name, node, feed.x, name, feed.mask, node.apart(feed.sources)[1])


def _group_norm(out: Pieces, name: str, node: nodes.GroupNorm, feed: Feed) -> None:
    mask = feed.mask if node.over_time else ""
    compositions.group_norm(out, name, node, feed.x, feed.axes, feed.width(name, node), mask)


def _masked(out: Pieces, name: str, node: nodes.Embedding | nodes.Masking, feed: Feed) -> str:
    return masked(out, name, node, feed.x, feed.mask)


WRITERS: dict[type[nodes.Node], Callable[[Any, str, Any, Feed], Any]] = {
    nodes.Recurrent: _recurrent,
    nodes.Bidirectional: _bidirectional,
    nodes.MLSTM: lambda out, name, node, feed: out.memory(name, node, feed.x, feed.mask),
    nodes.Embedding: _masked,
    nodes.Masking: _masked,
    nodes.StepMask: _step_mask,
    nodes.Dense: _dense,
    nodes.GroupedDense: lambda out, name, node, feed: compositions.grouped_dense(out, name, node, feed.x, feed.axes),
    nodes.Conv1D: _conv,
    nodes.Pool1D: _pool,
    nodes.GlobalPool: _global_pool,
    nodes.GridConv: lambda out, name, node, feed: compositions.grid_conv(out, name, node, feed.x, feed.axes == 1),
    nodes.GridPool: lambda out, name, node, feed: compositions.grid_pool(out, name, node, feed.x, feed.axes == 1),
    nodes.Reduce: _reduce,
    **{node: _elementwise for node in nodes.NODES.values() if issubclass(node, Elementwise)},
    nodes.LayerNorm: _layer_norm,
    nodes.GroupNorm: _group_norm,
    nodes.RMSNorm: lambda out, name, node, feed: compositions.rms_norm(out, name, node, feed.x),
    nodes.TimeSoftmax: lambda out, name, node, feed: compositions.time_softmax(out, name, feed.x, feed.mask),
    nodes.Attention: _attention,
    nodes.Activation: lambda out, name, node, feed: out.activate(name, feed.x, node.activation, name),
    nodes.Clip: _clip,
    nodes.Pad: _pad,
    nodes.Skipped: lambda out, name, node, feed: out.put("Identity", [feed.x], name),
    nodes.Flatten: lambda out, name, node, feed: out.put("Flatten", [feed.x], name, axis=1),
    nodes.Reshape: lambda out, name, node, feed: out.put("Reshape", [feed.x, out.integers(0, *node.shape)], name),
    nodes.Permute: lambda out, name, node, feed: out.put("Transpose", [feed.x], name, perm=[0, *node.dims]),
    nodes.Repeat: _repeat,
    nodes.RepeatLike: _repeat,
    nodes.Select: lambda out, name, node, feed: out.cut(feed.x, node.taken, node.axis, name),
    nodes.Take: _take,
    nodes.Magnitude: _magnitude,
    nodes.Merge: lambda out, name, node, feed: out.merge(node.mode, neutral(out, node, *feed[:2]), node.axis, name),
}
"""The nodes that can be written; a function returns the mask that its node makes, if the node makes one."""

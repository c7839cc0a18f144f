"""The roles that each operator assigns to its inputs' axes, and its outputs' axes: see `axes`."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from cellstack.formats.onnx.attributes import axes_of, order_of, pads_of, slices, split_sizes, within
from cellstack.formats.onnx.axes import Axes, Axis, Rule, Shaped
from cellstack.formats.onnx.cells import KIND_OF, NAMES
from cellstack.formats.onnx.values import Dim, Symbols

BY_NUMBER = (
    *NAMES, "Abs", "Cast", "Clip", "Cos", "DequantizeLinear", "Dropout", "Exp", "Gelu", "HardSwish", "Identity", "Log",
    "Mish", "Neg", "PRelu", "Reciprocal", "Selu", "Sin", "Sqrt", "Swish",
)  # fmt: skip
TOGETHER = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum", "Where")


def _same(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    return values[:1] * len(axes.node.output)


def _padded(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Padding applies to steps rather than to features, the last axis, unless only the last axis has an open length."""
    x = values[0]
    if len(values) > 1 and not isinstance(values[1], np.ndarray):  # padding computed from an open length leaves it open
        return [Shaped(x.axes, [None] * len(x.axes)) if axes.exact else x]
    pads = pads_of(attributes, values, len(x.axes))
    last = len(x.axes) - 1
    more = [sum(pads[n :: len(x.axes)]) for n in range(len(x.axes))]
    turned = last > 1 and x.lengths[last] is None and None not in x.lengths[1:last]
    for n, axis in enumerate(x.axes):
        if more[n] and (n < last or turned):
            axes.hints.append((axis, "F" if turned and n < last else "T"))
    return [Shaped(x.axes, [None if length is None else length + n for length, n in zip(x.lengths, more, strict=True)])]


def _together(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Elementwise operators unify axes, counted from the last, where neither has length 1."""
    flows = [value for value in values if isinstance(value, Shaped)]
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    if axes.exact and len(flows) + len(arrays) < len(values):
        return []
    rank = max(len(flow.axes) for flow in flows)
    for array in arrays:
        long = [n - array.ndim for n, length in enumerate(array.shape) if length > 1]
        for flow in flows:
            if len(long) == 1 and -long[0] <= len(flow.axes) and flow.lengths[long[0]] != 1:
                axes.needs(flow, "F" + "." * (-long[0] - 1), "one number per feature", long[0])
        rank = max(rank, array.ndim)
    made: list[Axis] = []
    lengths: list[int | None] = []
    for n in range(-rank, 0):
        here = [(flow.axes[n], flow.lengths[n]) for flow in flows if -n <= len(flow.axes)]
        wide = [pair for pair in here if pair[1] != 1]
        for axis, _ in wide[1:]:
            axes.unify(wide[0][0], axis)
        axis, length = (wide or here or [(Axis(), 1)])[0]
        made.append(axis)
        lengths.append(length if wide or not any(-n <= a.ndim and a.shape[n] > 1 for a in arrays) else None)
    return [Shaped(made, lengths)]


def _product(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, weights = values[:2]
    if isinstance(x, Shaped) and isinstance(weights, Shaped):
        if len(x.axes) != len(weights.axes) or len(x.axes) < 3:
            return []
        for one, other in zip((*x.axes[:-2], x.axes[-1]), (*weights.axes[:-2], weights.axes[-2]), strict=True):
            axes.unify(one, other)
        wide = [b if a == 1 else a for a, b in zip(x.lengths[:-2], weights.lengths[:-2], strict=True)]
        return [Shaped([*x.axes[:-1], weights.axes[-1]], [*wide, x.lengths[-2], weights.lengths[-1]])]
    x, weights, last = (x, weights, -1) if isinstance(x, Shaped) else (weights, x, -2)
    axes.needs(x, "F" if last == -1 else "F.", "its input", last)
    if axes.exact and (np.ndim(weights) < 2 or attributes.get("transA", 0)):
        return []
    shape = weights.shape if isinstance(weights, np.ndarray) and weights.ndim > 1 else ()
    more = max(len(shape) - len(x.axes), 0)
    made, lengths = [*(Axis() for _ in range(more)), *x.axes], [*[1] * more, *x.lengths]
    for n in range(-len(shape), -2):
        if shape[n] > 1:
            made[n], lengths[n] = Axis() if lengths[n] == 1 else made[n], shape[n]
    turned = last == -2 or attributes.get("transB", 0)
    made[last], lengths[last] = Axis("F", axes.here), shape[-2 if turned else -1] if shape else None
    return [Shaped(made, lengths)]


def _windows(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Windows slide over time: the axis after the channels, or of two such axes the one with windows longer than 1."""
    x = values[0]
    kernel = values[1].shape[2:] if len(values) > 1 and isinstance(values[1], np.ndarray) else None
    sizes = list(kernel or attributes.get("kernel_shape", ()))
    behind = list(range(2, len(x.axes)))
    over = [n for n in behind if x.lengths[n] != 1 and (len(behind) == 1 or sizes[n - 2 : n - 1] != [1])]
    over = behind if len(behind) == 1 else over
    if any(n not in over and x.lengths[n] != 1 for n in behind):  # one of them may be features
        over = []
    roles = "BF" + "".join("T" if over == [n] else "." for n in behind)
    if kernel is None and len(behind) > 1:  # a pool doesn't combine the entries of axis 1, which may be time
        axes.hints += [(axis, role) for axis, role in zip(x.axes, roles, strict=False) if role != "."]
        roles = "B"
    axes.needs(x, roles, "its input")
    features = Axis("F", axes.here) if axes.node.op_type.startswith("Conv") else x.axes[1]
    ends = axes.node.op_type.startswith("Global")
    behind_now = [Axis() for _ in behind] if ends else x.axes[2:]
    kept = [1 if x.lengths[n] == 1 and n not in over and not axes.exact else None for n in behind]
    slid = [_slid(axes, attributes, x, n, sizes) for n in behind]
    lengths = [1] * len(behind) if ends else [b if a is None else a for a, b in zip(slid, kept, strict=True)]
    filters = values[1].shape[0] if axes.node.op_type == "Conv" and kernel is not None else None
    return [Shaped([x.axes[0], features, *behind_now], [x.lengths[0], filters, *lengths])]


def _slid(axes: Axes, attributes: dict[str, Any], x: Shaped, axis: int, sizes: list[int]) -> int | None:
    """Return how many windows there are along an axis; None where that isn't known."""
    length, n, count = x.lengths[axis], axis - 2, len(x.axes) - 2
    known = "Transpose" not in axes.node.op_type and attributes.get("auto_pad", "NOTSET") == "NOTSET"
    if length is None or not known or len(sizes) != count or attributes.get("ceil_mode", 0):
        return None
    pads, strides, dilations = (attributes.get(key) for key in ("pads", "strides", "dilations"))
    more = pads[n] + pads[n + count] if pads else 0
    span = (sizes[n] - 1) * (dilations[n] if dilations else 1)
    return (length + more - span - 1) // (strides[n] if strides else 1) + 1


def _reduced(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, found = values[0], axes_of(attributes, values)
    if not found:
        return []
    gone, keep = {x.at(axis) for axis in found}, attributes.get("keepdims", 1)
    if len(gone) == 1:
        (over,) = gone
        axes.hints.append((x.axes[over], "F" if keep and over == len(x.axes) - 1 else "T"))
    kept = [n for n in range(len(x.axes)) if keep or n not in gone]
    made = [Axis() if n in gone else x.axes[n] for n in kept]
    return [Shaped(made, [1 if n in gone else x.lengths[n] for n in kept])]


def _batch_norm(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    axes.needs(values[0], "F", "its input", 1)
    return values[:1]


def _layer_norm(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    axes.needs(values[0], "F", "its input", -1)
    return values[:1]


def _softmax(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    axes.hints.append((x.axes[x.at(attributes.get("axis", 1 if axes.scope.model.opset < 13 else -1))], "F"))
    return values[:1]


def _recurrent(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, batch_first = values[0], bool(attributes.get("layout", 0))
    if not axes.framed:
        axes.needs(x, "BTF" if batch_first else "TBF", "X")
    for value, name in zip(values[5:7], ("initial_h", "initial_c"), strict=False):
        axes.needs(value, "BSF" if batch_first else "SBF", name)
    if not isinstance(x, Shaped) or len(x.axes) != 3:
        return []
    time, batch = x.axes[::-1][1:] if batch_first else x.axes[:2]
    ways = 2 if attributes.get("direction") == "bidirectional" else 1
    features, way = Axis("F", axes.here), Axis("D", axes.here)
    b, t = (x.lengths[n] for n in ((0, 1) if batch_first else (1, 0)))
    y = Shaped([time, way, batch, features], [t, ways, b, None])
    end = Shaped([Axis("S", axes.here), batch, features], [ways, b, None])
    if batch_first:
        y = Shaped([batch, time, way, features], [b, t, ways, None])
        end = Shaped([batch, Axis("S", axes.here), features], [b, ways, None])
    return [y, end, end]


def _scan(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """A Scan over one value: time first, then rows of features, as in the states."""
    *states, x = values
    if axes.exact:
        return []
    axes.needs(x, "TBF", "its steps")
    for state in states:
        axes.needs(state, "BF", "its states")
    if not isinstance(x, Shaped):
        return []
    ends = [Shaped([x.axes[1], Axis("F", axes.here)], [x.lengths[1], None]) for _ in states]
    return [*ends, Shaped([x.axes[0], x.axes[1], Axis("F", axes.here)], [x.lengths[0], x.lengths[1], None])]


def _moved(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    if axes.exact and axes.node.op_type == "Squeeze" and axes_of(attributes, values) is None and None in x.lengths:
        return []
    order = order_of(axes.node.op_type, attributes, values, [length == 1 for length in x.lengths])
    made = [Axis() if n is None else x.axes[n] for n in order]
    return [Shaped(made, [1 if n is None else x.lengths[n] for n in order])]


def _taken(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, index = values[:2]
    if isinstance(x, np.ndarray):  # rows of a table
        if axes.exact and attributes.get("axis", 0) != 0:
            return []
        return [Shaped([*index.axes, Axis("F", axes.here)], [*index.lengths, x.shape[-1]])]
    axis = x.at(attributes.get("axis", 0))
    if not isinstance(index, np.ndarray) or index.ndim > 1:
        return []
    axes.hints.append((x.axes[axis], "T"))
    if index.ndim:
        return [Shaped(x.axes, [index.size if n == axis else length for n, length in enumerate(x.lengths)])]
    return [Shaped(x.axes[:axis] + x.axes[axis + 1 :], x.lengths[:axis] + x.lengths[axis + 1 :])]


def _sliced(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    lists = [value.known if isinstance(value, Symbols) else value for value in values[1:]]
    lists = [value if isinstance(value, np.ndarray) else None for value in lists]
    taken = slices(attributes, [x, *lists], len(x.axes))
    if taken is None:
        return [Shaped(x.axes, [None for _ in x.axes])]
    lengths = list(x.lengths)
    for n, part in enumerate(taken):
        if part != slice(None):
            length = x.lengths[n]
            last = part.start == -1 and part.stop is not None and part.stop > 2**31
            lengths[n] = 1 if last else None if length is None else len(range(length)[within(part, length)])
            if n < len(taken) - 1:
                axes.hints.append((x.axes[n], "T"))
    return [Shaped(x.axes, lengths)]


def _split(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    axis = x.at(attributes.get("axis", 0))
    length, count = x.lengths[axis], len(axes.node.output)
    sizes = [None] * count if length is None else split_sizes(attributes, values, length, count)
    return [Shaped(x.axes, [*x.lengths[:axis], size, *x.lengths[axis + 1 :]]) for size in sizes]


def _joined(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    flows = [value for value in values if isinstance(value, Shaped)]
    first, axis = flows[0], flows[0].at(attributes["axis"])
    if len({len(flow.axes) for flow in flows}) != 1:
        return []
    made = list(first.axes)
    for flow in flows[1:]:
        for n, (one, other) in enumerate(zip(first.axes, flow.axes, strict=True)):
            if n != axis or (first.lengths[n] != 1 and flow.lengths[n] != 1):
                axes.unify(one, other)
    if first.lengths[axis] == 1 and len(flows) > 1 and not first.axes[axis].root.role:
        made[axis] = Axis()
    parts = [flow.lengths[axis] for flow in flows]
    total = None if None in parts or len(flows) < len(values) else sum(n for n in parts if n is not None)
    return [Shaped(made, [total if n == axis else length for n, length in enumerate(first.lengths)])]


def _tiled(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """A Tile or an Expand: an axis of length 1 may have been expanded."""
    x, target = values[:2]
    count = len(target.array if isinstance(target, Symbols) else target)
    made: list[Axis] = [Axis() for _ in range(count - len(x.axes))]
    made += [Axis() if length == 1 else axis for axis, length in zip(x.axes, x.lengths, strict=True)]
    new = [1] * (count - len(x.axes))
    unsure = axes.exact and axes.node.op_type == "Tile"
    return [Shaped(made, [None if n == 1 or unsure else n for n in (*new, *x.lengths)])]


def _shape(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    lengths = np.empty(len(x.axes), object)
    for n, axis in enumerate(x.axes):
        name = f"{id(axis.root)}"
        axes.known[name] = axis
        lengths[n] = x.lengths[n] if axes.exact and x.lengths[n] is not None else Dim((name,))
    return [Symbols(lengths[attributes.get("start", 0) : attributes.get("end")])]


def _reshaped(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Axes that keep their lengths are unified: the first, the last, and those whose lengths the graph queries.

    So are two axes before they are merged and after they are split again.
    """
    x, target = values[:2]
    entries = list((target.array if isinstance(target, Symbols) else target).reshape(-1))
    made: list[Axis] = [Axis() for _ in entries]
    lengths: list[int | None] = [None] * len(entries)
    fits = len(entries) == len(x.axes) and sum(not isinstance(entry, Dim) and entry == -1 for entry in entries) <= 1
    same = []
    for n, entry in enumerate(entries):
        if isinstance(entry, Dim):
            if len(entry.labels) == 1 and entry.times == 1:
                made[n] = axes.known[entry.labels[0]]
        elif entry == 0 and not attributes.get("allowzero", 0) and n < len(x.axes):
            made[n], lengths[n] = x.axes[n], x.lengths[n]
        elif entry > 0:
            lengths[n] = int(entry)
    for n, entry in enumerate(entries):
        begins = n < len(x.axes) and all(made[m] is x.axes[m] or x.lengths[m] == entries[m] for m in range(n))
        both = axes.merged.get(x.axes[n]) if begins else None
        if both is not None and both.lengths[1] in entries[n + 1 : n + 2]:
            made[n : n + 2], lengths[n : n + 2] = both
        elif begins and entry == -1 and _same_number(x.lengths[n + 1 :], entries[n + 1 :]):
            made[n], lengths[n] = x.axes[n], x.lengths[n]
        elif begins and entry == -1 and _same_number(x.lengths[n + 2 :], entries[n + 1 :]):
            axes.merged[made[n]] = Shaped(x.axes[n : n + 2], x.lengths[n : n + 2])
        elif not isinstance(entry, Dim) and entry > 1:  # equal lengths at the start or the end
            if begins and x.lengths[n] == entry:
                made[n] = x.axes[n]
            elif n == len(entries) - 1 and x.lengths[-1] == entry:
                made[n] = x.axes[-1]
        same.append(any(axis is made[n] for axis in x.axes))
    if fits and sum(same) == len(entries) - 1:  # the remaining axis is unchanged
        rest = same.index(False)
        left = [n for n, axis in enumerate(x.axes) if not any(axis is one for one in made)]
        if left == [rest]:
            made[rest], lengths[rest] = x.axes[rest], x.lengths[rest]
    return [Shaped(made, lengths)]


def _same_number(lengths: list[int | None], entries: list[Any]) -> bool:
    """Whether the axes after one of a shape hold as many numbers as those of the value."""
    numbers = [[n for n in each if isinstance(n, (int, np.integer)) and n > 0] for each in (lengths, entries)]
    return [len(each) for each in numbers] == [len(lengths), len(entries)] and prod(numbers[0]) == prod(numbers[1])


def _flat(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    axis = attributes.get("axis", 1)
    if axis == 2 and len(x.axes) == 3:  # rows of all steps
        return [Shaped([Axis(), x.axes[2]], [None, x.lengths[2]])]
    first = x.axes[0] if axis == 1 else Axis()
    last = x.axes[1] if axis == 1 and len(x.axes) == 2 else Axis("F", axes.here)
    return [Shaped([first, last], [x.lengths[0] if axis == 1 else None, None])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(BY_NUMBER, _same),
    **dict.fromkeys(TOGETHER, _together),
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger"), _product),
    **dict.fromkeys(
        ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _windows
    ),
    **dict.fromkeys(("ReduceL2", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"), _reduced),
    **dict.fromkeys(KIND_OF, _recurrent),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("Tile", "Expand"), _tiled),
    **dict.fromkeys(("Squeeze", "Transpose", "Unsqueeze"), _moved),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _batch_norm),
    "Concat": _joined,
    "DynamicQuantizeLinear": lambda axes, attributes, values: values[:1],
    "Flatten": _flat,
    "Gather": _taken,
    "LayerNormalization": _layer_norm,
    "Pad": _padded,
    "Reshape": _reshaped,
    "Scan": _scan,
    "Shape": _shape,
    "Slice": _sliced,
    "Split": _split,
}

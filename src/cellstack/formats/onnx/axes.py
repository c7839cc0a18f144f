"""Infers which axis of each value is batch, time or features, from the requirements of the operators.

Every axis of every value is a variable. Operators that move numbers pass variables on, operators that combine values
unify their variables, and operators that need a role assign it: an LSTM assigns the roles of X's axes. A role holds for
all unified axes. Two roles for one axis are a contradiction, and are reported. Conventions decide only what no operator
determines: in a file of products and sums alone, inputs are `[B, T, F]`.

A file may have no batch axis, where each call is one row: `[T, F]`. Such a file adds the axis of length 1 itself, where
an operator needs a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.onnx.cells import KIND_OF, NAMES, is_recurrent
from cellstack.formats.onnx.file import DOMAINS, ODD, Constant, Scope, declared, label, short
from cellstack.formats.onnx.fold import axes_of, fold, order_of, pads_of, place, slices, within
from cellstack.formats.onnx.values import Dim, Symbols

WORDS = {"B": "the batch", "T": "time", "F": "the features", "D": "the directions", "S": "the states"}
CONVENTIONS = {  # the possible orders of a data input's axes, the likeliest first
    1: ("F", "T"),
    2: ("BF", "BT", "TB", "TF", "FT", "FB"),
    3: ("BTF", "TBF", "BFT", "TFB", "FTB", "FBT"),
    4: ("BFFT", "BFTF", "BTFF", "TBFF", "FBFT", "FFBT", "TFFB"),  # features in two axes, or one axis of length 1
}
OF_IDS = {1: ("T",), 2: ("BT", "TB"), 3: ("BT1", "TB1")}
FLOATS = (1, 10, 11, 16)
INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)
BY_NUMBER = (
    *NAMES, "Abs", "Cast", "Clip", "Cos", "DequantizeLinear", "Dropout", "Exp", "Gelu", "HardSwish", "Identity", "Log",
    "Mish", "Neg", "PRelu", "Reciprocal", "Selu", "Sin", "Sqrt", "Swish",
)  # fmt: skip
TOGETHER = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum", "Where")


class Axis:
    """A variable: the role of an axis, and which operator assigned it. Unified axes share the variable `same`."""

    __slots__ = ("role", "same", "source")

    def __init__(self, role: str = "", source: str = "") -> None:
        self.role, self.source, self.same = role, source, self

    @property
    def root(self) -> Axis:
        """The representative of all axes unified with this one."""
        root = self
        while root.same is not root:
            root = root.same
        while self.same is not root:
            self.same, self = root, self.same
        return root


class Shaped(NamedTuple):
    """A value: a variable and a length for each axis, None where the length isn't known."""

    axes: list[Axis]
    lengths: list[int | None]

    def at(self, axis: int) -> int:
        """Return an axis counted from the front; `ValueError` where there are fewer."""
        return place(axis, len(self.axes))


class Axes:
    """The axes of a graph's values.

    Args:
        scope: the outermost graph.
        live: ids of the nodes that lead to an output.
        states: inputs that hold initial states.
        lengths: inputs that hold the rows' lengths.
        framed: whether a call is one step; the graph then adds the recurrent operators' time axis itself.

    Attributes:
        inputs: the axes of each data input, such as "TBF"; None where it can't be one. Of two axes of features, the
            first is C and the second F, or one of them is 1 if its length is 1.
        states: the same for each input that holds states, of B, F and S; None where unknown.
        problems: contradictions, by the id of the node.
    """

    def __init__(self, scope: Scope, live: set[int], states: set[str], lengths: set[str], framed: bool = False) -> None:
        self.framed = framed
        self.scope, self.values, self.problems = scope, dict[str, Any](), dict[int, str]()
        self.node: Any = None
        self.hints: list[tuple[Axis, str]] = []  # roles of axes that no operator determines
        self.known: dict[str, Axis] = {}  # axes by the labels of the lengths that the graph computes with
        data: dict[str, Any] = {}
        for value in scope.graph.input:
            kind, shape = value.type.tensor_type.elem_type, declared(value)
            if value.name in scope.initializers or value.name in lengths:
                continue
            if shape is None:
                shape = list[int | None]([None] * (2 if kind in INTEGERS else 3))
            self.values[value.name] = Shaped([Axis() for _ in shape], shape)
            if value.name not in states:
                data[value.name] = OF_IDS if kind in INTEGERS else CONVENTIONS if kind in FLOATS else {}
        for node in scope.graph.node:
            if id(node) in live:
                self._read(node)
        for axis, role in self.hints:
            axis.root.role = axis.root.role or role
        self.inputs = self._decided(data)
        self.states = {name: self._of_states(name) for name in states}

    # ── helpers of the rules ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def here(self) -> str:
        """The current node, as messages name it."""
        return f"{self.node.op_type} {short(label(self.node))}"

    def unify(self, one: Axis, other: Axis) -> None:
        """Unify two axes."""
        a, b = one.root, other.root
        if a is b:
            return
        if a.role and b.role and a.role != b.role:
            what = f"{WORDS[a.role]} to {a.source} and {WORDS[b.role]} to {b.source}"
            self._contradicts(f"the axes of its inputs don't match: one axis is {what}")
            return
        if not a.role:
            a, b = b, a
        b.same = a

    def needs(self, value: Any, roles: str, what: str, first: int = 0) -> None:
        """Assign roles to a value's axes from `first` on, `.` for any role; a contradiction becomes a problem."""
        if not isinstance(value, Shaped):
            return
        found = value.axes[first:] if first < 0 else value.axes[first : first + len(roles)]
        for axis, role in zip(found, roles, strict=False):
            root = axis.root
            if role != "." and not root.role:
                root.role, root.source = role, self.here
        wrong = [
            n for n, (axis, role) in enumerate(zip(found, roles, strict=False)) if role not in (".", axis.root.role)
        ]
        wrong = [n for n in wrong if value.lengths[value.axes.index(found[n])] != 1]
        if wrong or len(found) != len(roles):
            shown = " ".join(self.role(axis) for axis in value.axes)
            found_at = "" if not wrong else self._described(found[wrong[0]])
            at = "" if not wrong else f": axis {value.axes.index(found[wrong[0]])} is {found_at}"
            wanted = " ".join(roles.replace(".", "·"))
            self._contradicts(f"expected {what} with axes {wanted}, found {shown or 'none'}{at}")

    def role(self, axis: Axis) -> str:
        """Return the role of an axis, `·` where it is open."""
        return axis.root.role or "·"

    def _described(self, axis: Axis) -> str:
        return f"{WORDS[axis.root.role]} to {axis.root.source}"

    def _contradicts(self, text: str) -> None:
        self.problems.setdefault(id(self.node), text)

    def constant(self, name: str) -> Constant | None:
        """Return a constant; None where there is none."""
        return self.scope.constant(name) if name else None

    def roles_of(self, name: str) -> str | None:
        """Return the roles of a value's axes, `·` where one is open; None where the value is unknown."""
        value = self.values.get(name)
        return "".join(map(self.role, value.axes)) if isinstance(value, Shaped) else None

    def why_not(self, name: str) -> str:
        """Explain why an input's axes aren't those of data or states."""
        roles = self.roles_of(name)
        count = 0 if roles is None else len(roles)
        if name in self.inputs and count not in CONVENTIONS:
            return f"expected a tensor with 1 to 4 axes, found {count}"
        return f"expected axes of batch, time and features, found {' '.join(roles or '')}"

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, node: Any) -> None:
        self.node = node
        rule = RULES.get(node.op_type) if node.domain in DOMAINS or is_recurrent(node) else None
        try:
            values = [self._value(name) for name in node.input]
            if not any(isinstance(value, Shaped) for value in values):
                made = self._counted(node, values)
            else:
                made = [] if rule is None else list(rule(self, self.scope.model.attributes(node), values))
        except (*ODD, AttributeError):  # a FormatError too: reading the operator reports the error later
            made = []
        for name, value in zip(node.output, made, strict=False):
            self.values[name] = value

    def _value(self, name: str) -> Any:
        if name in self.values or not name:
            return self.values.get(name)
        return self.constant(name)

    def _counted(self, node: Any, values: list[Any]) -> list[Any]:
        """Return the outputs of a node that computes with lengths of axes and constants."""
        if not any(isinstance(value, Symbols) for value in values):
            return []
        attributes = self.scope.model.attributes(node)
        if node.op_type == "Cast":
            return values
        arrays = [value.array if isinstance(value, Symbols) else value for value in values]
        given = [bool(name) for name in node.input]
        made = fold(node.op_type, attributes, arrays, given, len(node.output), self.scope.model)
        return [Symbols(np.asarray(array, object)) for array in made or ()]

    # ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _decided(self, data: dict[str, Any]) -> dict[str, str | None]:
        """Return the roles of the data inputs' axes. Inputs with known roles come first; they decide about the batch.

        A decision for one input holds for all axes unified with its axes.
        """
        decided: dict[str, str | None] = {}
        whole = {name: self.roles_of(name) or "" for name in data}
        known = [name for name, roles in whole.items() if "·" not in roles]
        batchless = bool(known) and all("B" not in whole[name] for name in known)
        for name in (*known, *(name for name in data if name not in known)):
            axes, lengths = self.values[name]
            ways = [way for way in self._ways(axes, data[name]) if not batchless or "B" not in way or name in known]
            ways = [way for way in ways if all(lengths[n] == 1 for n, role in enumerate(way) if role == "1")]
            ways.sort(
                key=lambda way: sum(
                    (role, n is None) in (("T", False), ("F", True)) for role, n in zip(way, lengths, strict=True)
                )
            )
            decided[name] = _labels(ways[0], lengths) if ways else None
            for axis, role in zip(axes, ways[0] if ways else "", strict=False):
                root = axis.root
                if not root.role and role != "1":
                    root.role, root.source = role, "convention"
            if ways and ways[0].count("F") == 2:  # a grid, of which the first feature axis is the outer one
                decided[name] = ways[0].replace("F", "C", 1)
        return {name: decided[name] for name in data}

    def _ways(self, axes: list[Axis], conventions: dict[int, tuple[str, ...]]) -> Iterator[str]:
        """Yield the orders of an input's axes that are free of contradictions."""
        for way in conventions.get(len(axes), ()):
            if all(axis.root.role in ("", role) or role == "1" for axis, role in zip(axes, way, strict=True)):
                yield way

    def _of_states(self, name: str) -> str | None:
        """Return the roles of the axes of an input that holds states: batch, units, and the index of the state."""
        value = self.values.get(name)
        if not isinstance(value, Shaped):
            return None
        roles = ["S" if axis.root.role in ("", "D", "T") else axis.root.role for axis in value.axes]
        return "".join(roles) if roles.count("F") == 1 and roles.count("B") <= 1 else None


def _labels(roles: str, lengths: list[int | None]) -> str:
    """Return the labels of an input's axes: of two axes of features, one is C, or 1 if its length is 1."""
    if roles.count("F") < 2:
        return roles
    first, last = roles.index("F"), roles.rindex("F")
    if lengths[first] != 1 and lengths[last] == 1:
        return f"{roles[:last]}1{roles[last + 1 :]}"
    return f"{roles[:first]}{'1' if lengths[first] == 1 else 'C'}{roles[first + 1 :]}"


# ── rules: the roles an operator assigns to its inputs' axes, and its outputs' axes ───────────────────────────────────

Rule = Callable[[Axes, dict[str, Any], list[Any]], list[Any]]


def _same(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    return values[:1] * len(axes.node.output)


def _padded(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Padding applies to steps rather than to features, the last axis, unless only the last axis has an open length."""
    x = values[0]
    if len(values) > 1 and not isinstance(values[1], np.ndarray):  # padding computed from an open length leaves it open
        return [x]
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
    if isinstance(weights, Shaped):
        if not isinstance(x, Shaped) or len(x.axes) != len(weights.axes) or len(x.axes) < 3:
            return []
        for one, other in zip((*x.axes[:-2], x.axes[-1]), (*weights.axes[:-2], weights.axes[-2]), strict=True):
            axes.unify(one, other)
        return [Shaped([*x.axes[:-1], weights.axes[-1]], [*x.lengths[:-1], weights.lengths[-1]])]
    axes.needs(x, "F", "its input", -1)
    transposed = isinstance(weights, np.ndarray) and attributes.get("transB", 0)
    width = weights.shape[0 if transposed else -1] if isinstance(weights, np.ndarray) and weights.ndim == 2 else None
    return [Shaped([*x.axes[:-1], Axis("F", axes.here)], [*x.lengths[:-1], width])]


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
    lengths = [1 if ends or (x.lengths[n] == 1 and n not in over) else None for n in behind]
    return [Shaped([x.axes[0], features, *behind_now], [x.lengths[0], None, *lengths])]


def _reduced(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, found = values[0], axes_of(attributes, values)
    if found is None:
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
    axes.needs(x, "TBF", "its steps")
    for state in states:
        axes.needs(state, "BF", "its states")
    if not isinstance(x, Shaped):
        return []
    ends = [Shaped([x.axes[1], Axis("F", axes.here)], [x.lengths[1], None]) for _ in states]
    return [*ends, Shaped([x.axes[0], x.axes[1], Axis("F", axes.here)], [x.lengths[0], x.lengths[1], None])]


def _moved(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x = values[0]
    order = order_of(axes.node.op_type, attributes, values, [length == 1 for length in x.lengths])
    made = [Axis() if n is None else x.axes[n] for n in order]
    return [Shaped(made, [1 if n is None else x.lengths[n] for n in order])]


def _taken(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    x, index = values[:2]
    if isinstance(x, np.ndarray):  # rows of a table
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
    lists = [value if isinstance(value, np.ndarray) else None for value in values[1:]]
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
    lengths = [None if n == axis else length for n, length in enumerate(x.lengths)]
    return [Shaped(x.axes, lengths)] * len(axes.node.output)


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
    return [Shaped(made, [None if n == 1 else n for n in (*new, *x.lengths)])]


def _shape(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    lengths = np.empty(len(values[0].axes), object)
    for n, axis in enumerate(values[0].axes):
        name = f"{id(axis.root)}"
        axes.known[name] = axis
        lengths[n] = Dim((name,))
    return [Symbols(lengths[attributes.get("start", 0) : attributes.get("end")])]


def _reshaped(axes: Axes, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Axes that keep their lengths are unified: the first, the last, and those whose lengths the graph queries."""
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
        if not isinstance(entry, Dim) and entry > 1:  # equal lengths at the start or the end
            if n < len(x.axes) and entries[:n] == x.lengths[:n] and x.lengths[n] == entry:
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

"""Infers which axis of each value is batch, time or features, from the requirements of the operators.

Every axis of every value is a variable. Operators that move numbers pass variables on, operators that combine values
unify their variables, and operators that need a role assign it: an LSTM assigns the roles of X's axes. A role holds for
all unified axes. Two roles for one axis are a contradiction, and are reported. Conventions decide only what no operator
determines: in a file of products and sums alone, inputs are `[B, T, F]`.

For example, a file takes X with three open axes, a, b and c. Transpose (1, 0, 2) gives b, a, c, without a role for
either. An LSTM takes the result, and needs T, B, F: so b is time, a the batch and c the features, and X is `BTF`. Its Y
is summed over the directions, and added to a second input with axes d, e, f: Add unifies d with b, e with a and f with
Y's axis of features, so the second input is `TBF`. Were it also the X of another LSTM by way of the Transpose, d would
be the batch as well as time: a contradiction, which is reported with both operators.

A file may have no batch axis, where each call is one row: `[T, F]`. Such a file adds the axis of length 1 itself, where
an operator needs a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.onnx.attributes import place
from cellstack.formats.onnx.cells import is_recurrent
from cellstack.formats.onnx.file import DOMAINS, ODD, Constant, Scope, declared, label, short
from cellstack.formats.onnx.fold import fold
from cellstack.formats.onnx.values import Symbols

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


Rule = Callable[["Axes", dict[str, Any], list[Any]], list[Any]]


class Axes:
    """The axes of a graph's values.

    Args:
        scope: the outermost graph.
        rules: what each operator says of axes: `axis_rules.RULES`.
        live: ids of the nodes that lead to an output.
        states: inputs that hold initial states.
        lengths: inputs that hold the rows' lengths.
        framed: whether a call is one step; the graph then adds the recurrent operators' time axis itself.
        sizes: where lengths are asked for, and not roles: those of inputs that the file leaves open, by name. Then a
            length is certain, or None, and a value whose number of axes isn't certain is unknown.

    Attributes:
        inputs: the axes of each data input, such as "TBF"; None where it can't be one. Of two axes of features, the
            first is C and the second F, or one of them is 1 if its length is 1.
        states: the same for each input that holds states, of B, F and S; None where unknown.
        problems: contradictions, by the id of the node.
    """

    def __init__(
        self,
        scope: Scope,
        rules: Mapping[str, Rule],
        live: set[int],
        states: set[str],
        lengths: set[str],
        framed: bool = False,
        sizes: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        self.rules, self.framed, self.exact = rules, framed, sizes is not None
        self.scope, self.values, self.problems = scope, dict[str, Any](), dict[int, str]()
        self.node: Any = None
        self.hints: list[tuple[Axis, str]] = []  # roles of axes that no operator determines
        self.known: dict[str, Axis] = {}  # axes by the labels of the lengths that the graph computes with
        self.merged: dict[Axis, Shaped] = {}  # the two axes that an axis consists of
        data: dict[str, Any] = {}
        for value in scope.graph.input:
            kind, shape = value.type.tensor_type.elem_type, declared(value)
            if value.name in scope.initializers or value.name in lengths:
                continue
            if sizes is not None:
                if shape is None:
                    continue
                given = sizes.get(value.name) or shape
                shape = [own if length is None else length for own, length in zip(shape, given, strict=True)]
            elif shape is None:
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
        rule = self.rules.get(node.op_type) if node.domain in DOMAINS or is_recurrent(node) else None
        try:
            values = [self._value(name) for name in node.input]
            if self.exact and node.op_type in ("Gemm", "MatMul") and isinstance(values[0], np.ndarray):
                values[0] = Shaped([Axis() for _ in values[0].shape], [*values[0].shape])  # zeros before the first step
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
        if node.op_type == "ConstantOfShape" and self.exact:
            sizes = list(values[0].array)
            return [Shaped([Axis() for _ in sizes], [size if isinstance(size, int) else None for size in sizes])]
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

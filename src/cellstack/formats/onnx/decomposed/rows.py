"""Operators that a graph repeats at every step of an unrolled loop, merged into one operation on all steps.

In addition to its cell, a loop may contain layers: before it, between two cells, or after them. The graph then repeats
their operators for every step. Where they differ only in the step's values, the first step's operators are added once
more, for the rows of all steps, `[B·T, F]`; their result is split into steps again where the graph joins them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.onnx.axis_rules import BY_NUMBER, TOGETHER
from cellstack.formats.onnx.decomposed.linear import Place, Term, axes_in, place_of, sequence_of
from cellstack.formats.onnx.file import DOMAINS, Scope, declared, onnx_package
from cellstack.formats.onnx.fold import Broadcast

BY_ITSELF = {*BY_NUMBER, *TOGETHER, "Abs", "Cos", "Erf", "Log", "Neg", "Sin"}
ALONG = {"Concat": 0, "LogSoftmax": -1, "Softmax": -1, "Split": 0}  # operators along one axis, and its default
REDUCED = {"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}


class Steps(NamedTuple):
    """A value of all steps, `[B, T, F]`; `backwards`: whether the loop runs from the last step to the first."""

    name: str
    backwards: bool


class Rows(NamedTuple):
    """A value of all steps as rows: like its value at one step, but with `B·T` for `B`, the first axis.

    Args:
        name: the name of the value.
        of: the sequence that determines the number of rows and steps.
        rank: its number of axes.
        ones: the axes that are known to have length 1.
    """

    name: str
    of: Steps
    rank: int
    ones: frozenset[int] = frozenset()


class Added:
    """Operators that are added to a graph; generated names begin with `prefix`.

    Attributes:
        made: the added nodes.
        constants: the tensors that they need.
    """

    def __init__(self, scope: Scope, prefix: str) -> None:
        self.scope, self.prefix, self.onnx = scope, prefix, onnx_package()
        self.made: list[Any] = []
        self.constants: list[Any] = []

    def put(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add an operator and return the name of its output."""
        output = output or f"{self.prefix}{len(self.made)}"
        self.add(self.onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def add(self, node: Any) -> None:
        """Add a node."""
        self.made.append(node)
        self.scope.producers.update((name, node) for name in node.output)

    def constant(self, value: Any) -> str:
        """Add an integer, or a list of them, and return its name."""
        name = f"{self.prefix}constant {len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, np.int64), name))
        self.scope.initializers[name] = self.constants[-1]
        return name

    def squeezed(self, value: str, axis: int, operator: str = "Squeeze", output: str = "") -> str:
        """Add a Squeeze or an Unsqueeze, in this opset's form."""
        if self.scope.model.opset < 13:
            return self.put(operator, [value], output, axes=[axis])
        return self.put(operator, [value, self.constant([axis])], output)

    def sliced(self, value: str, axis: int, start: int, stop: int, step: int = 1, output: str = "") -> str:
        """Add a Slice, in this opset's form."""
        if self.scope.model.opset < 10:
            return self.put("Slice", [value], output, axes=[axis], starts=[start], ends=[stop])
        return self.put("Slice", [value, *(self.constant([n]) for n in (start, stop, axis, step))], output)


class Loop(Added):
    """The operators of a graph's loops, added once for all steps.

    Args:
        scope: the graph.
        known: the step and sequence of each known value; may be extended.
        whole: whether loops run over all steps of a sequence; else over as many as the graph unrolls.

    Attributes:
        shared: values that every step uses unchanged, although they aren't constant.
    """

    def __init__(self, scope: Scope, known: dict[str, Place], whole: bool) -> None:
        super().__init__(scope, "loop ")
        self.known, self.whole = known, whole
        self.shared: list[str] = []
        self.found: dict[tuple[str, ...], Rows | str | None] = {}
        self.sequences: dict[Any, Steps] = {}
        self.ranks = {value.name: len(declared(value) or (0, 0, 0)) for value in scope.graph.input}

    # ── queries of the loop reader ────────────────────────────────────────────────────────────────────────────────────

    def taken(self, values: Sequence[str]) -> Steps | None:
        """Return a cell's inputs at its steps, `[B, F]` each, as one sequence; None where they aren't one."""
        rows = self.rows(values)
        if isinstance(rows, str):  # the same at every step
            repeated = self.squeezed(rows, 1, "Unsqueeze")
            return Steps(self.put("Tile", [repeated, self.constant([1, len(values), 1])]), False)
        if rows is None or rows.rank != 2:
            return None
        return Steps(self._parted(rows.name, rows.of), rows.of.backwards)

    def joined(self, values: Sequence[str], axis: int) -> str | None:
        """Return the steps' values joined along an axis; None where they aren't steps."""
        over = {self._unsqueezed(name) for name in values}
        first = None
        if len(over) == 1 and None not in over:  # like torch.stack
            (first,) = over
            rows = self.rows([self.scope.producers[name].input[0] for name in values])
            if first != axis or axis not in (0, 1) or not isinstance(rows, Rows) or rows.rank > 2:
                return None
        else:
            rows = self.rows(values)
            if not isinstance(rows, Rows) or axis % rows.rank != 1 or 1 not in rows.ones or rows.rank > 3:
                return None
        name = rows.name
        if rows.rank == 3:
            name = self.squeezed(name, 1)
        single = rows.rank == 1 or (rows.rank == 2 and first is None)
        if rows.rank == 1:
            name = self.squeezed(name, 1, "Unsqueeze")
        name = self._parted(name, rows.of)
        if rows.of.backwards:
            name = self.sliced(name, 1, -1, -(2**63), -1)
        if single:  # one number per step, without a feature axis
            name = self.squeezed(name, 2)
        if first == 0:
            name = self.put("Transpose", [name], perm=[1, 0] if single else [1, 0, 2])
        return name

    def _unsqueezed(self, name: str) -> int | None:
        """Return the axis that an Unsqueeze adds; None where it adds several, or for another operator."""
        node = self.scope.producers.get(name)
        axes = axes_in(self.scope, node) if node is not None and node.op_type == "Unsqueeze" else None
        return axes[0] if axes is not None and len(axes) == 1 else None

    def _parted(self, name: str, of: Steps) -> str:
        """Return rows `[B·T, F]` as a sequence."""
        lengths = self.sliced(self.put("Shape", [of.name]), 0, 0, 2)
        return self.put("Reshape", [name, self.put("Concat", [lengths, self.constant([-1])], axis=0)])

    # ── values of all steps ───────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, values: Sequence[str]) -> Rows | str | None:
        """Return the values of all steps, in order, as rows; a name where all are the same value; else None."""
        key = tuple(values)
        if key not in self.found:
            self.found[key] = None
            self.found[key] = self._rows(key)
        return self.found[key]

    def _rows(self, values: tuple[str, ...]) -> Rows | str | None:
        if len(set(values)) == 1 or not all(values):
            return values[0] if len(set(values)) == 1 else None
        constants = [self.scope.constant(name) for name in values]
        if any(constant is not None for constant in constants):
            arrays = [one for one in constants if isinstance(one, np.ndarray)]
            alike = all(one.dtype == arrays[0].dtype and np.array_equal(one, arrays[0]) for one in arrays)
            return values[0] if alike and len(arrays) == len(values) else None
        leaf = self._leaf(values)
        if leaf is not None:
            return leaf
        nodes = [self.scope.producers.get(name) for name in values]
        if any(node is None for node in nodes):
            return None
        first = nodes[0]
        kinds = {(node.op_type, node.domain, len(node.input), len(node.output)) for node in nodes if node is not None}
        at = {list(node.output).index(name) for node, name in zip(nodes, values, strict=True) if node is not None}
        said = {
            b"".join(sorted(one.SerializeToString() for one in node.attribute)) for node in nodes if node is not None
        }
        if first is None or first.domain not in DOMAINS or (len(kinds), len(at), len(said)) != (1, 1, 1):
            return None
        taken = [self.rows(names) if any(names) else "" for names in zip(*(n.input for n in nodes if n), strict=True)]
        if any(one is None for one in taken):
            return None
        if not any(isinstance(one, Rows) for one in taken):  # recomputed at every step from unchanged values
            return values[0]
        return self._made(first, at.pop(), [one for one in taken if one is not None])

    def _leaf(self, values: tuple[str, ...]) -> Rows | None:
        """Return values that are the steps of a sequence, from the first to the last; None where they aren't."""
        looked_up = self._looked_up(values)
        if looked_up is not None:
            return looked_up
        found = sequence_of([place_of(self.scope, Term(name, "", False, 0, 0), self.known) for name in values])
        if found is None:
            return None
        root, axis, backwards, last = found
        thick = self._thick(values[0], root, axis)
        rank = self.ranks.get(root, 3)
        if thick is None or rank not in (2, 3) or (rank == 2 and not thick):
            return None
        of = self._steps(root, axis, rank, len(values), backwards, last)
        name = self.put("Flatten", [of.name], axis=2)
        if not thick:
            return Rows(name, of, 2)
        if rank == 2:
            return Rows(name, of, 2, frozenset({1})) if axis == 1 else None
        return Rows(self.squeezed(name, 1, "Unsqueeze"), of, 3, frozenset({1})) if axis == 1 else None

    def _looked_up(self, values: tuple[str, ...]) -> Rows | None:
        """Return the entries of a table at the ids of all steps; None for other values."""
        nodes = [self.scope.producers.get(name) for name in values]
        if not all(node is not None and node.op_type == "Gather" and len(node.input) == 2 for node in nodes):
            return None
        tables = {node.input[0] for node in nodes if node is not None}
        table = tables.pop()
        axes = {self.scope.model.attributes(node).get("axis", 0) for node in nodes}
        if tables or axes != {0} or not isinstance(self.scope.constant(table), np.ndarray):
            return None
        terms = [Term(node.input[1], "", False, 0, 0) for node in nodes if node is not None]
        found = sequence_of([place_of(self.scope, term, self.known) for term in terms])
        if found is None or found[1:3] != (1, False):
            return None
        ids = found[0]
        thick = self._thick(terms[0].value, ids, 1)
        if self.ranks.get(ids) != 2 or thick is None:
            return None
        ids = ids if self.whole else self.sliced(ids, 1, 0, len(values))
        of = Steps(self.put("Gather", [table, ids], axis=0), False)
        name = self.put("Flatten", [of.name], axis=2)
        return Rows(self.squeezed(name, 1, "Unsqueeze"), of, 3, frozenset({1})) if thick else Rows(name, of, 2)

    def _thick(self, name: str, root: str, axis: int) -> bool | None:
        """Return whether a step of a sequence still has its time axis, of length 1; None where unknown."""
        thick, place = True, 0
        while name != root and name not in self.known and place < 8:
            node = self.scope.producers[name]
            if node.op_type == "Gather":
                index = self.scope.constant(node.input[1])
                gone = isinstance(index, np.ndarray) and not index.ndim
            elif node.op_type in ("Squeeze", "Unsqueeze"):
                if axes_in(self.scope, node) != [axis]:
                    return None
                gone = node.op_type == "Squeeze"
                if not gone and thick is False:  # added after it was removed
                    return None
                if not gone:
                    name, place = node.input[0], place + 1
                    inner = self._thick(name, root, axis)
                    return True if inner is False else None
            else:
                gone = False
            thick, name, place = thick and not gone, node.input[0], place + 1
        return thick if name == root else False if name in self.known else None

    def _steps(self, root: str, axis: int, rank: int, count: int, backwards: bool, last: bool) -> Steps:
        """Return a sequence as `[B, T, F]`, restricted to the loop's steps."""
        key = root, axis, count, backwards, last
        if key not in self.sequences:
            name = root if rank == 3 else self.squeezed(root, 2, "Unsqueeze")
            name = name if axis == 1 else self.put("Transpose", [name], perm=[1, 0, 2])
            if not self.whole:
                name = self.sliced(name, 1, -count if last else 0, 2**63 - 1 if last else count)
            self.sequences[key] = Steps(name, backwards)
        return self.sequences[key]

    def _made(self, node: Any, place: int, taken: list[Rows | str]) -> Rows | None:
        """Add the first step's operator for the rows of all steps; None where it may combine rows."""
        flows = [one for one in taken if isinstance(one, Rows)]
        if len({(one.of.backwards, one.rank) for one in flows}) != 1:
            return None
        of, rank = flows[0].of, flows[0].rank
        apart = self._apart(node, taken, rank)
        if apart is None:
            return None
        key = node.output[0], "rows"
        if key not in self.found:
            names = [one.name if isinstance(one, Rows) else one for one in taken]
            outputs = [f"loop {len(self.made)} {n}" for n in range(len(node.output))]
            operator = copy.deepcopy(node)
            del operator.input[:], operator.output[:]
            operator.input.extend(names)
            operator.output.extend(outputs)
            self.add(operator)
            self.found[key] = outputs[0]
        outputs = self.scope.producers[str(self.found[key])].output
        rank, ones = apart
        return Rows(outputs[place], of, rank, ones)

    def _apart(self, node: Any, taken: list[Rows | str], rank: int) -> tuple[int, frozenset[int]] | None:
        """Return the rank of an operator's output, and axes of length 1; None where it may combine rows."""
        kind, attributes = node.op_type, self.scope.model.attributes(node)
        flows = [one for one in taken if isinstance(one, Rows)]
        ones = frozenset.intersection(*(one.ones for one in flows))
        constants = [self.scope.constant(one) for one in taken if isinstance(one, str) and one]
        if not all(isinstance(one, (np.ndarray, Broadcast)) for one in constants):
            self.shared.append(next(one for one in taken if isinstance(one, str) and self.scope.constant(one) is None))
            return None
        arrays = [one for one in constants if isinstance(one, np.ndarray)]
        first = isinstance(taken[0], Rows) and len(flows) == 1
        if kind in BY_ITSELF:
            if len(arrays) != len(constants) and not all(
                one.uniform for one in constants if isinstance(one, Broadcast)
            ):
                return None
            if any(array.ndim > rank or (array.ndim == rank and array.shape[0] != 1) for array in arrays):
                return None
            wide = {n + rank - array.ndim for array in arrays for n, length in enumerate(array.shape) if length != 1}
            return rank, ones - wide
        if kind in ("Gemm", "MatMul"):
            if not first or not arrays or arrays[0].ndim != 2 or attributes.get("transA", 0):
                return None
            if any(array.ndim > 1 and array.shape[0] != 1 for array in arrays[1:]) or rank < 2:
                return None
            width = arrays[0].shape[0 if kind == "Gemm" and attributes.get("transB", 0) else 1]
            return rank, (ones - {rank - 1}) | (frozenset({rank - 1}) if width == 1 else frozenset())
        if kind == "BatchNormalization" and first and rank == 2:
            return (rank, ones) if not attributes.get("training_mode", 0) else None
        if kind == "LayerNormalization" and first:
            return (rank, ones) if attributes.get("axis", -1) % rank != 0 else None
        if kind in ALONG and (first or kind == "Concat"):
            axis = attributes.get("axis", ALONG[kind])
            fits = -rank <= axis < rank and axis % rank != 0 and (kind != "Concat" or len(flows) == len(taken))
            return (rank, ones if "Softmax" in kind else ones - {axis % rank}) if fits else None
        if kind == "Transpose" and rank == 3:
            return (rank, frozenset()) if attributes.get("perm") == [0, 2, 1] else None
        if kind in ("Squeeze", "Unsqueeze", *REDUCED) and first:
            axes = axes_in(self.scope, node)
            total = rank + (len(axes or ()) if kind == "Unsqueeze" else 0)
            if not axes or any(not -total <= axis < total or axis % total == 0 for axis in axes):
                return None
            over = {axis % total for axis in axes}
            if kind in REDUCED and attributes.get("keepdims", 1):
                return rank, ones | over
            left = [n for n in range(total) if n not in over]
            if kind == "Unsqueeze":
                return total, frozenset(over) | {left[n] for n in ones}
            return len(left), frozenset(n for n, old in enumerate(left) if old in ones)
        if kind in ("Gather", "Slice") and first:
            return self._cut(node, attributes, rank, ones)
        return None

    def _cut(self, node: Any, attributes: dict[str, Any], rank: int, ones: frozenset[int]) -> Any:
        """The same for a Gather or a Slice along axes other than the rows."""
        values = [self.scope.constant(name) for name in node.input[1:]]
        if node.op_type == "Gather":
            axis, index = attributes.get("axis", 0), values[0]
            if not isinstance(index, np.ndarray) or index.ndim > 1 or not -rank <= axis < rank or axis % rank == 0:
                return None
            gone = not index.ndim
            return rank - gone, frozenset(n - (gone and n > axis % rank) for n in ones if n != axis % rank)
        axes = attributes.get("axes") or (values[2] if len(values) > 2 else None)
        axes = None if axes is None else [int(axis) for axis in np.asarray(axes).reshape(-1)]
        if not axes or any(not -rank <= axis < rank or axis % rank == 0 for axis in axes):
            return None
        return rank, ones - {axis % rank for axis in axes}

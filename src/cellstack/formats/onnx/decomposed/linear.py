"""Reads values of a graph as sums of products of values and constants, term by term.

A sum may have products with matrices, normalised or not, elementwise products, such as peepholes, and constants. A cut
of a sum, by which a graph divides a product into gates, is the same sum with fewer rows of each constant.

For example, with z = Gemm(x, W, b) + Gemm(h, R) and i, f, g, o = Split(z), where W and R have 4·H rows, f is the sum of
rows H to 2·H of W times x, of the same rows of R times h, and of the same entries of b: as in a graph with a matrix for
each gate. A cut of steps, z[:, t], is one of the `moves` of a term instead: it says which step of x is multiplied, and
leaves the rows as they are. A product of joined values, Concat(x, h) times W, is one term, or, by `split_joined`,
one for each value, with the columns of W that belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.attributes import axes_of, slices, whole
from cellstack.formats.onnx.cells import decimal
from cellstack.formats.onnx.file import DOMAINS, Scope
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.specialize import KnownLengths

MOST_NODES = 32  # maximum number of nodes in one sum
MOST_NUMBERS = 1 << 16  # maximum size of a bias that a file repeats for every row
MOST_OUTPUTS = 8  # maximum number of outputs of a Split into gates
FOLLOWED = ("Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class Term:
    """Rows `start` to `stop` of a constant matrix, times a value; or, where `value` is "", of a constant vector.

    Args:
        value: the name of the factor.
        weights: the name of the constant.
        transposed: whether the matrix is stored as `[I, N]`.
        start: the first row.
        stop: the row after the last.
        moves: the nodes that select a step of the product, in order, each with the name of the output that is used;
            empty where the value is a single step.
        flat: whether the value has rows without time.
        columns: the first column of the matrix, and the one after the last, None for its end.
        vector: whether the constant is a vector: the product is elementwise, or there is no value.
        normed: the bounds of separately normalised blocks of the product: `(0, N)`, or `(0, M, N)`; () without.
        gain: the name of the normalised product's gain.
        epsilon: the number added to its variance.
    """

    value: str
    weights: str
    transposed: bool
    start: int
    stop: int
    moves: tuple[Any, ...] = ()
    flat: bool = False
    columns: tuple[int, int | None] = (0, None)
    vector: bool = False
    normed: tuple[int, ...] = ()
    gain: str = ""
    epsilon: float = 0.0

    @property
    def rows(self) -> tuple[Any, ...]:
        """Identifies the term's numbers in the file."""
        return self.weights, self.transposed, self.start, self.stop, self.columns, self.gain


class Linear(NamedTuple):
    """A sum: products with matrices, constants, and elementwise products with vectors."""

    products: tuple[Term, ...]
    biases: tuple[Term, ...]
    peepholes: tuple[Term, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What steps have in common: everything except the values."""
        return tuple(tuple(sorted(term.rows for term in terms)) for terms in self)


def array_of(scope: Scope, term: Term) -> Array:
    """Return a term's rows, `[N, I]` or `[N]`."""
    weights = scope.constant(term.weights)
    assert isinstance(weights, np.ndarray)
    if term.vector:
        return weights.reshape(-1)[term.start : term.stop]
    return (weights.T if term.transposed else weights)[term.start : term.stop, slice(*term.columns)]


def split_joined(scope: Scope, total: Linear) -> Linear:
    """Return a sum in which each product of values that are joined along features is a product of each value."""
    return total._replace(products=tuple(part for term in total.products for part in _parts(scope, term)))


def _parts(scope: Scope, term: Term) -> list[Term]:
    names = inputs_of(scope, term.value, "Concat")
    if len(names) < 2 or term.moves or term.normed:
        return [term]
    if scope.lengths is None:
        scope.lengths = KnownLengths(scope, {}).shapes
    shapes, whole = [scope.lengths.get(name) for name in names], array_of(scope, term).shape[1]
    known = [shape[-1] for shape in shapes if shape and shape[-1] is not None]
    widths = [shape[-1] if shape and shape[-1] is not None else whole - sum(known) for shape in shapes]
    last = {-1, *(len(shape) - 1 for shape in shapes if shape)}
    joined = scope.model.attributes(scope.producers[term.value]).get("axis") in last
    if not joined or min(widths) < 1 or sum(widths) != whole:  # or several widths are unknown
        return [term]
    columns = pairwise(accumulate(widths, initial=0))
    return [replace(term, value=name, columns=each) for name, each in zip(names, columns, strict=True)]


def linear(scope: Scope, name: str, left: list[int] | None = None, rows: bool = False) -> Linear | None:
    """Return a value as a sum of products with constant matrices, and constants; None where it isn't one.

    Args:
        scope: the graph.
        name: the name of the value.
        left: how many more nodes may be visited.
        rows: whether values are known to be rows of features, without time.
    """
    left = [MOST_NODES] if left is None else left
    left[0] -= 1
    constant = scope.constant(name)
    if left[0] < 0 or not name:
        return None
    if constant is not None:
        if name not in scope.rows:
            scope.rows[name] = _row(constant)
        width = scope.rows[name]
        return Linear((), (Term("", name, False, 0, width, vector=True),)) if width else None
    node = scope.producers.get(name)
    if node is None:
        return None
    if node.op_type == "Add" and len(node.input) == 2:
        parts = [linear(scope, each, left, rows) for each in node.input]
        if parts[0] is None or parts[1] is None:
            return None
        return Linear(*(one + other for one, other in zip(*parts, strict=True)))
    if node.op_type == "Mul" and len(node.input) == 2:
        return _by_vector(scope, node, left)
    if node.op_type in ("MatMul", "Gemm"):
        return _product(scope, node, left)
    inner = linear(scope, node.input[0], left, rows) if node.op_type in MOVED and node.input else None
    if inner is None or node.op_type == "Identity":
        return inner
    if inner.peepholes:
        return None
    cut = _cut(scope, node, name, inner, rows)
    if cut is not None:
        return cut
    if node.op_type == "Slice" and any(term.normed for term in inner.products):
        return None
    return Linear(tuple(replace(term, moves=(*term.moves, (node, name))) for term in inner.products), inner.biases)


MOVED = ("Split", "Slice", "Gather", "SequenceAt", "SplitToSequence", *FOLLOWED)


def _row(constant: Any) -> int:
    """Return the length of a row where a constant is one row, or one repeated row; else 0."""
    if not isinstance(constant, np.ndarray) or not constant.ndim or not constant.size:
        return 0
    rows: Array = constant.reshape(-1, constant.shape[-1])
    alike = len(rows) == 1 or (constant.size <= MOST_NUMBERS and bool((rows == rows[0]).all()))
    return constant.shape[-1] if alike else 0


def _product(scope: Scope, node: Any, left: list[int]) -> Linear | None:
    weights = scope.constant(node.input[1]) if len(node.input) > 1 else None
    attributes = scope.model.attributes(node)
    factors = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    plain = not attributes.get("transA", 0) and factors == (1.0, 1.0)
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or not plain:
        return None
    transposed = not attributes.get("transB", 0)
    count = weights.shape[1 if transposed else 0]
    first = _first_alike(scope, node.input[1], transposed, weights)
    term = Term(node.input[0], *first, 0, count, flat=node.op_type == "Gemm")
    added = node.input[2] if len(node.input) > 2 else ""
    if added and scope.constant(added) is None:
        return None
    bias = linear(scope, added, left) if added else Linear((), ())
    if bias is None or any(b.stop != count for b in bias.biases):
        return None
    return Linear((term,), bias.biases)


def _first_alike(scope: Scope, name: str, transposed: bool, array: Array) -> tuple[str, bool]:
    """Return the first name of equal matrices, and whether that one is transposed: exporters repeat a matrix."""
    if (name, transposed) not in scope.first_alike:
        rows = np.ascontiguousarray(array.T if transposed else array)
        key = rows.shape, rows.dtype.str, sha256(rows.data).digest()
        scope.first_alike[name, transposed] = scope.alike.setdefault(key, (name, transposed))
    return scope.first_alike[name, transposed]


def _by_vector(scope: Scope, node: Any, left: list[int]) -> Linear | None:
    """Return a product with a constant vector: of a normalised value, or an elementwise product, such as a peephole."""
    names = list(node.input)
    constants = [scope.constant(name) for name in names]
    vectors = [
        isinstance(value, np.ndarray) and value.ndim > 0 and value.size == value.shape[-1] for value in constants
    ]
    if vectors.count(True) != 1 or sum(value is not None for value in constants) != 1:
        return None
    gain, value = names[vectors.index(True)], names[vectors.index(False)]
    width = np.size(numbers(constants[vectors.index(True)]))
    term = _normed(scope, value, left)
    if term is not None:
        return Linear((replace(term, gain=gain),), ()) if (term.start, term.stop) == (0, width) else None
    return Linear((), (), (Term(value, gain, False, 0, width, vector=True),))


def _normed(scope: Scope, name: str, left: list[int]) -> Term | None:
    """Return a product that is normalised, as a whole or in consecutive blocks."""
    node = scope.producers.get(name)
    parts = list(node.input) if node is not None and node.op_type == "Concat" else [name]
    if len(parts) > 1 and (node is None or scope.model.attributes(node).get("axis") != -1):
        return None
    terms: list[Term] = []
    for part in parts[:MOST_OUTPUTS]:
        inside = unit(scope, part)
        inner = None if inside is None else linear(scope, inside[0], left)
        if inside is None or inner is None or len(inner.products) != 1 or inner.biases or inner.peepholes:
            return None
        terms.append(replace(inner.products[0], epsilon=inside[1]))
    first = terms[0]
    ends = (first.start, *(term.stop for term in terms))
    alike = {replace(term, start=0, stop=0) for term in terms}
    if len(alike) != 1 or first.normed or [term.start for term in terms] != list(ends[:-1]):
        return None
    return replace(first, stop=ends[-1], normed=ends)


def unit(scope: Scope, name: str) -> tuple[str, float] | None:
    """Return v and epsilon of a value `(v - mean) / sqrt(variance + epsilon)`; None where it isn't one."""
    producers = scope.producers
    ends = [producers.get(one) for one in inputs_of(scope, name, "Div")]
    if len(ends) != 2 or None in ends:
        return None
    apart = inputs_of(scope, name, "Div")[0]
    root = inputs_of(scope, inputs_of(scope, name, "Div")[1], "Sqrt")
    value = inputs_of(scope, apart, "Sub")
    for variance, added in pairs(scope, root[0], "Add") if root and len(value) == 2 else ():
        squares, epsilon = _mean_of(scope, variance), scalar(scope, added)
        if epsilon is None or squares is None or inputs_of(scope, squares, "Mul") != [apart, apart]:
            continue
        if _mean_of(scope, value[1]) == value[0]:
            return value[0], epsilon
    return None


def _mean_of(scope: Scope, name: str) -> str | None:
    """Return the value whose mean over the features this is."""
    node = scope.producers.get(name)
    if node is None or node.op_type != "ReduceMean" or not node.input:
        return None
    keeps = scope.model.attributes(node).get("keepdims", 1)
    return node.input[0] if axes_in(scope, node) == [-1] and keeps else None


def axes_in(scope: Scope, node: Any) -> list[int] | None:
    """Return the axes of a Squeeze, an Unsqueeze or a reduction; None where the graph computes them."""
    values = [None, *(scope.constant(name) for name in node.input[1:])]
    known = all(value is None or isinstance(value, np.ndarray) for value in values)
    return axes_of(scope.model.attributes(node), values) if known else None


def inputs_of(scope: Scope, name: str, operator: str) -> list[str]:
    """Return the inputs of the operator that computes a name; [] where it is a different operator."""
    node = scope.producers.get(name)
    return list(node.input) if node is not None and node.op_type == operator and node.domain in DOMAINS else []


def pairs(scope: Scope, name: str, operator: str) -> Iterator[tuple[str, str]]:
    """Yield the two inputs of the operator that computes a name, in both orders; nothing where it differs."""
    operands = inputs_of(scope, name, operator)
    if len(operands) == 2:
        yield operands[0], operands[1]
        yield operands[1], operands[0]


def scalar(scope: Scope, name: str) -> float | None:
    """Return a constant without axes as a number; for float32, the shortest decimal that rounds to it."""
    value = scope.constant(name) if name else None
    if not isinstance(value, np.ndarray) or value.ndim or value.dtype.kind != "f":
        return None
    return float(value) if value.dtype == np.float64 else decimal(float(value))


def sizes_of(scope: Scope, node: Any) -> list[int] | None:
    """Return the lengths into which a Split divides an axis; [] for equal parts, None where unknown."""
    sizes, named = scope.model.attributes(node).get("split"), len(node.input) > 1 and node.input[1]
    if sizes is None and not named:
        return []
    sizes = scope.constant(node.input[1]) if sizes is None else sizes
    fits = isinstance(sizes, (list, np.ndarray)) and np.size(sizes) == len(node.output)
    return whole(sizes, len(node.output)) if fits else None


def _cut(scope: Scope, node: Any, name: str, inner: Linear, rows: bool) -> Linear | None:
    """Return an output of a Split of the features, as used for a cell's gates; None where it isn't one."""
    terms = (*inner.products, *inner.biases)
    if not all(_apart(scope, term) for term in inner.products):
        return None
    if len({term.stop - term.start for term in terms}) != 1:
        return None
    flat = rows or all(term.flat or term.moves for term in inner.products)
    if node.op_type == "Slice":
        ends = _columns(scope, node, (-1, 1) if flat else (-1,))
        if ends is None:
            return None
        start, stop = ends[0], min(ends[1], terms[0].stop - terms[0].start)
        return _part(inner, start, stop) if 0 <= start < stop else None
    if node.op_type != "Split" or len(node.output) > MOST_OUTPUTS:
        return None
    attributes = scope.model.attributes(node)
    count, axis = terms[0].stop - terms[0].start, attributes.get("axis", 0)
    sizes = sizes_of(scope, node)
    if sizes is None:
        return None
    if axis == 1:  # the last axis of rows of features, but not of sequences
        known = bool(sizes) and max(sizes) > 1
        if not known and not flat:
            return None
    elif axis not in (-1, 2):
        return None
    if not sizes and count % len(node.output):
        return None
    sizes = sizes or [count // len(node.output)] * len(node.output)
    if sum(sizes) != count or min(sizes) < 1:
        return None
    place = list(node.output).index(name)
    start = sum(sizes[:place])
    return _part(inner, start, start + sizes[place])


def _part(inner: Linear, start: int, stop: int) -> Linear:
    """Return some columns of a sum."""
    return Linear(*(tuple(replace(t, start=t.start + start, stop=t.start + stop) for t in terms) for terms in inner))


def _columns(scope: Scope, node: Any, last: Sequence[int]) -> tuple[int, int] | None:
    """Return the columns, start and stop, that a Slice takes of the `last` ones; None for a slice of another axis."""
    values = [scope.constant(name) if name else None for name in node.input[1:]]
    lists = [whole(value) if isinstance(value, np.ndarray) else None for value in (*values, None, None, None, None)[:4]]
    starts, ends, axes, steps = lists
    if starts is None or ends is None or axes is None or steps not in (None, [1]):
        return None
    if not len(starts) == len(ends) == len(axes) == 1 or axes[0] not in last:
        return None
    return starts[0], ends[0]


def _apart(scope: Scope, term: Term) -> bool:
    """Whether moves that might also reverse features select one step of a sequence."""
    if not any(node.op_type == "Slice" for node, _ in term.moves):
        return True
    located = _located(scope, [*reversed(term.moves)])
    return located is not None and located[2] == len(term.moves)


# ── the step of a sequence that a value belongs to ────────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """A step of a sequence: the sequence, its time axis, and the step's index, from the end where negative."""

    root: str
    axis: int
    step: int


def place_of(scope: Scope, term: Term, known: dict[str, Place]) -> Place | None:
    """Return the step and sequence that a product belongs to, given the `known` steps by name; None where unknown."""
    if term.moves:
        path = [*reversed(term.moves)]
        located = _located(scope, path)
        whole_way = located is not None and located[2] == len(path)
        return Place(term.value, *located[:2]) if located is not None and whole_way else None
    name, path = term.value, []
    while len(path) < MOST_NODES and name not in known:
        node = scope.producers.get(name)
        if node is None or node.op_type not in MOVED or not node.input:
            break
        path.append((node, name))
        name = node.input[0]
    if name in known and all(node.op_type in FOLLOWED for node, _ in path):
        return known[name]
    located = _located(scope, path)
    return None if located is None else Place(path[located[2] - 1][0].input[0], *located[:2])


def sequence_of(places: Sequence[Place | None]) -> tuple[str, int, bool, bool] | None:
    """Return the sequence of which these are the steps, from the first to the last or backwards; None without one.

    Returns:
        Its name, its time axis, whether the steps run backwards, and whether they are counted from its end.
    """
    placed = [place for place in places if place is not None]
    if len(placed) < len(places) or len({(place.root, place.axis) for place in placed}) != 1:
        return None
    steps, ahead, (root, axis, _) = [place.step for place in placed], list(range(len(placed))), placed[0]
    backwards = steps in (ahead[::-1], [-1 - n for n in ahead])
    return (root, axis, backwards, steps[0] == -1) if (steps == ahead or backwards) and axis in (0, 1) else None


def _located(scope: Scope, path: list[tuple[Any, str]]) -> tuple[int, int, int] | None:
    """Return the axis and the step that nodes select from a sequence, and the number of nodes used.

    Args:
        scope: the graph.
        path: the nodes, the last one first, each with the name of the output used, where known.
    """
    n = 0
    while n < len(path) and path[n][0].op_type in FOLLOWED:
        n += 1
    selected = _step(scope, *path[n]) if n < len(path) else None
    if selected is None:
        return None
    (axis, step), n = selected, n + 1
    if path[n - 1][0].op_type == "SequenceAt":
        if n == len(path) or path[n][0].op_type != "SplitToSequence" or len(path[n][0].input) > 1:
            return None
        axis, n = scope.model.attributes(path[n][0]).get("axis", 0), n + 1
    while n < len(path) and _reverses(scope, path[n][0], axis):
        step, n = -1 - step, n + 1
    return axis, step, n


def _step(scope: Scope, node: Any, output: str) -> tuple[int, int] | None:
    """Return the axis and the step that a node selects; None for other nodes."""
    attributes = scope.model.attributes(node)
    values = [scope.constant(name) if name else None for name in node.input]
    if node.op_type in ("Gather", "SequenceAt"):
        index = values[1] if len(values) > 1 else None
        if not isinstance(index, np.ndarray) or index.size != 1:
            return None
        return attributes.get("axis", 0), int(index.reshape(()))
    if node.op_type == "Slice":
        cut = _cuts(scope, node)
        if cut is None or cut[1].step != 1 or cut[1].start is None or cut[1].stop is None:
            return None
        axis, part = cut
        last = part.start == -1 and part.stop >= 2**31 - 1
        return (axis, part.start) if last or part.stop - part.start == 1 else None
    if node.op_type == "Split" and output:
        first = node.output[0]
        if first not in scope.unbound:
            singles = set(sizes_of(scope, node) or ()) == {1}
            scope.unbound[first] = {name: n for n, name in enumerate(node.output)} if singles else {}
        step = scope.unbound[first].get(output)
        return None if step is None else (attributes.get("axis", 0), step)
    return None


def _cuts(scope: Scope, node: Any) -> tuple[int, slice] | None:
    """Return the axis and the slice of a Slice; None for several axes or unknown ones."""
    values = [scope.constant(name) if name else None for name in node.input[1:]]
    constants = [value if isinstance(value, np.ndarray) else None for value in values]
    taken = slices(scope.model.attributes(node), [None, *constants], 8)
    if taken is None:
        return None
    cut = [(axis, part) for axis, part in enumerate(taken) if part != slice(None)]
    return cut[0] if len(cut) == 1 and cut[0][0] < 2 else None


def _reverses(scope: Scope, node: Any, axis: int) -> bool:
    """Whether a node reverses the steps."""
    cut = _cuts(scope, node) if node.op_type == "Slice" else None
    return cut is not None and cut[0] == axis and cut[1].step == -1 and cut[1].start == -1 and cut[1].stop is None

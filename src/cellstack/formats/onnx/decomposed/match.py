"""Recognises steps of cells in a graph by comparing it with the recorded step of each kind of cell.

Both sides are read in the same form, one value at a time, starting from h: a value is an activation, a clipped or
normalised value, a sum of products with constants (`linear`, `parts`), or a sum of products of other values (`expand`),
in which differences are multiplied out: 1 - z times g is g - z·g. Sums and products match in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, cached_property
from itertools import accumulate, islice, permutations, product
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells import KINDS, Kind
from cellstack.formats.onnx.decomposed.activations import activated
from cellstack.formats.onnx.decomposed.linear import FOLLOWED, Linear, Term, array_of, inputs_of, linear, scalar, unit
from cellstack.formats.onnx.file import DOMAINS, Scope
from cellstack.formats.onnx.fold import numbers
from cellstack.layout import Array
from cellstack.nodes.recurrent import Cell
from cellstack.spec import CellSpec
from cellstack.views.recorded import Recorded, Value

MOST_TERMS = 32  # maximum number of operators in one sum
MOST_MATCHES = 8  # maximum number of ways in which one value is matched with one form
MOST_VISITS = 4000  # maximum number of values that are compared per form

# ── recorded steps ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Form:
    """The recorded step of a kind of cell with some of its flags.

    Args:
        kind: the kind.
        flags: settings of the cell that follow from the equations.
        recorded: the step.
        bounds: the flag of each bound of a clip.
    """

    kind: Kind
    flags: dict[str, Any]
    recorded: Recorded
    bounds: dict[float, str]

    @cached_property
    def x(self) -> Value:
        """The input."""
        return next(value for value in self.recorded.values if value.operation == "x")

    @cached_property
    def before(self) -> dict[str, Value]:
        """The states before the step."""
        return dict(zip(self.kind.state._fields, self.recorded.before, strict=True))

    @cached_property
    def after(self) -> dict[str, Value]:
        """The states after the step."""
        return dict(zip(self.kind.state._fields, map(plain, self.recorded.states), strict=True))


@cache
def forms(kind: Kind) -> tuple[Form, ...]:
    """Return a kind's step with every combination of flags; clips are recorded, and are optional in a graph."""
    others = {flag for other in KINDS.values() for flag in other.flags} - {*kind.flags}
    known = [entry for entry in fields(CellSpec) if entry.name not in {*others, "use_bias", "learn_initial_state"}]
    bounds = {entry.name: float(n) for n, entry in enumerate(known, 1) if entry.type == "float | None"}
    switches = [entry for entry in known if entry.type in ("bool", "int") and entry.default is not MISSING]
    found = []
    for values in product((False, True), repeat=len(switches)):
        flags = {entry.name: type(entry.default)(value) for entry, value in zip(switches, values, strict=True)}
        with suppress(ValueError):  # flags that exclude each other
            recorded = Recorded(CellSpec(1, 2, kind=kind.name, **flags, **bounds))
            found.append(Form(kind, flags, recorded, {bound: name for name, bound in bounds.items()}))
    return tuple(found)


def plain(value: Value) -> Value:
    """Return a recorded value without its names."""
    return plain(value.of[0]) if value.operation == "record" else value


class Part(NamedTuple):
    """A term of a recorded sum: blocks `start` to `stop` of an array times a value; a bias where `value` is None."""

    array: str
    row: int | None
    value: Value | None
    start: int
    stop: int
    matrix: bool = False
    normed: tuple[int, ...] = ()
    gain: str = ""


@cache
def parts(value: Value) -> tuple[Part, ...] | None:
    """Return a recorded value as a sum of products with arrays, as `linear` does; None where it isn't one."""
    if value.operation == "product":
        start, stop = value.part if isinstance(value.part, tuple) else (0, value.width[0])
        return (Part(value.name, None, plain(value.of[0]), start, stop, matrix=True),)
    if value.operation == "weight":
        return (Part(value.name, value.part if isinstance(value.part, int) else None, None, 0, value.width[0]),)
    if value.operation == "mul":
        one, other = value.of if value.of[1].operation == "weight" else value.of[::-1]
        inner = parts(one.of[0]) if one.operation == "norm" else None
        if inner is not None:
            ends = (0, *(int(end) for end in accumulate(one.numbers)))
            return tuple(part._replace(normed=ends, gain=other.name) for part in inner)
        return tuple(part._replace(value=plain(one)) for part in parts(other) or ()) or None
    inner = [parts(one) for one in value.of]
    if value.operation == "split" and inner[0] is not None:
        n = value.part
        return tuple(part._replace(start=part.start + n, stop=part.start + n + 1) for part in inner[0])
    if value.operation in ("add", "record") and None not in inner:
        return tuple(part for each in inner for part in each or ())
    return None


# ── sums of products ──────────────────────────────────────────────────────────────────────────────────────────────────

ONE = Value("one")


class Product(NamedTuple):
    """A term of a sum: its sign, its factors, and the value that it is, where it is one value."""

    sign: int
    factors: tuple[Any, ...]
    value: Any = None


Look = Callable[[Any], tuple[str, Sequence[Any]]]


def expand(value: Any, look: Look, left: list[int], factor: bool = False) -> list[Product]:
    """Return a value as a sum of products; as a factor, other sums than differences stay one value.

    Args:
        value: the value.
        look: returns the operation that computes a value, "add", "sub", "mul", "neg" or "one", and its inputs.
        left: how many more values may be visited; `ValueError` beyond.
        factor: whether the value is a factor of a product, or part of one.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("a sum with too many terms")
    operation, of = look(value)
    if operation == "one":
        return [Product(1, ())]
    if operation == "mul":
        first, second = (expand(one, look, left, True) for one in of)
        found = [Product(a.sign * b.sign, a.factors + b.factors) for a in first for b in second]
        return [found[0]._replace(value=value)] if len(found) == 1 else found
    if operation in ("sub", "neg") or (operation == "add" and not factor):
        first, *second = (expand(one, look, left, factor) for one in of)
        less = first if operation == "neg" else second[0]
        more = [] if operation == "neg" else first
        return [*more, *(less if operation == "add" else (Product(-one.sign, one.factors) for one in less))]
    return [Product(1, (value,), value)]


def _look(value: Value) -> tuple[str, Sequence[Any]]:
    """Return the operation of a recorded value."""
    value = plain(value)
    if value.operation == "one_minus":
        return "sub", (ONE, plain(value.of[0]))
    return ("", ()) if parts(value) is not None else (value.operation, [plain(one) for one in value.of])


@cache
def _size(value: Value) -> int:
    return 1 + sum(_size(one) for one in value.of)


@cache
def _recorded_sum(value: Value) -> tuple[list[Product], tuple[Part, ...]]:
    """Return a recorded sum, the most specific terms and factors first, and its products with arrays separately."""
    terms, rest = [], list[Part]()
    for term in expand(value, _look, [1000]):
        linear_too = parts(term.factors[0]) if len(term.factors) == 1 and term.sign > 0 else None
        if linear_too is None:
            terms.append(term._replace(factors=tuple(sorted(map(plain, term.factors), key=_size, reverse=True))))
        rest += linear_too or ()
    return sorted(terms, key=lambda term: -sum(map(_size, term.factors))), tuple(rest)


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

Bound = dict[Any, Any]
"""What is known of a match: the name of each recorded value, the product of x, the activation of each slot, bounds and
epsilon by flag, and the terms of each block of an array, by array, row and number."""


@dataclass(eq=False)
class Step:
    """One step of a cell.

    Args:
        form: the recorded step that it matches.
        node: the node that computes h.
        bound: how it matches.
    """

    form: Form
    node: Any
    bound: Bound

    @property
    def x(self) -> Term:
        """The product of x, with the name of x and the nodes that select it."""
        return self.bound[self.form.x]

    @cached_property
    def before(self) -> dict[str, str]:
        """The names of the states before the step; "" for zeros that the graph omits."""
        return {state: self.bound.get(value, "") for state, value in self.form.before.items()}

    @cached_property
    def after(self) -> dict[str, str]:
        """The names of the states after the step."""
        return {state: self.bound[value] for state, value in self.form.after.items()}

    @cached_property
    def arrays(self) -> dict[tuple[str, int | None], dict[int, tuple[Term, ...]]]:
        """The terms of each array, by name and row, and by number of the block."""
        found: dict[tuple[str, int | None], dict[int, tuple[Term, ...]]] = {}
        for key in sorted((key for key in self.bound if isinstance(key, tuple)), key=str):
            found.setdefault(key[:2], {})[key[2]] = self.bound[key]
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The activation of each slot, and numbers by flag."""
        return {key: value for key, value in self.bound.items() if isinstance(key, str)}

    @property
    def matrices(self) -> set[str]:
        """The names of the constants by which x and h are multiplied."""
        return {term.weights for key in self.bound if isinstance(key, tuple) for term in self.bound[key] if term.value}

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What all steps of a cell have in common."""
        rows = [(*key, n, tuple(sorted(t.rows for t in terms))) for key, each in self.arrays.items()
                for n, terms in each.items()]  # fmt: skip
        return id(self.form), tuple(sorted(self.settings.items())), tuple(rows)

    @property
    def swapped(self) -> bool:
        """Whether a gate and a candidate, whose product is symmetric, are more likely to be each other."""
        texts = {role: set[str]() for role in self.form.kind.gates.values()}
        for gate, role in self.form.kind.gates.items():
            texts[role].add(self.bound.get(gate, ""))
        candidates = texts.pop("candidate", set[str]())
        return any("tanh" in others for others in texts.values()) and "tanh" not in candidates


def bare(scope: Scope, name: str) -> str:
    """Return a value's origin, skipping operators without effect."""
    return _origin(scope, name, ("Identity",), 100)


def stripped(scope: Scope, name: str) -> str:
    """Return the origin of a value, ignoring axes of length 1."""
    return _origin(scope, name, FOLLOWED, 4)


def _origin(scope: Scope, name: str, skipped: Sequence[str], most: int) -> str:
    for _ in range(most):
        node = scope.producers.get(name)
        if node is None or node.op_type not in skipped or not node.input:
            break
        name = node.input[0]
    return name


def is_zero(scope: Scope, name: str) -> bool:
    """Whether a value is all zeros."""
    array = numbers(scope.constant(name))
    return isinstance(array, np.ndarray) and not array.any()


def _is_one(value: Any) -> bool:
    array = numbers(value)
    return isinstance(array, np.ndarray) and array.size > 0 and bool((array == 1).all())


def _clipped(scope: Scope, name: str) -> tuple[str, float | None]:
    """Return a value without its symmetric clipping, and the bound; None where it isn't clipped."""
    found = inputs_of(scope, name, "Clip")
    bounds = [scalar(scope, one) for one in found[1:]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or bounds[0] != -bounds[1]:
        return name, None
    return found[0], bounds[1]


class Matcher:
    """Compares values of a graph with recorded values.

    Args:
        scope: the graph.
        within_loop: whether the graph is one step of a loop: gates may then lack an activation.
        rows: whether values are known to be rows of features, without time.
        zeros: a recorded state whose products an exporter has folded.
    """

    def __init__(self, scope: Scope, within_loop: bool = False, rows: bool = False, zeros: Value | None = None) -> None:
        self.scope, self.loop, self.rows, self.zeros = scope, within_loop, rows, zeros
        self.sums: dict[str, list[Product]] = {}
        self.activations: dict[str, tuple[str, str] | None] = {}
        self.left = 0
        self.form: Form | None = None

    def steps(self, form: Form, node: Any, ends: dict[str, str], bound: Bound) -> list[Step]:
        """Return the steps of a form that compute states; several where a graph doesn't distinguish x from h.

        Args:
            form: the recorded step.
            node: the node that computes h.
            ends: the names of the states after the step, at least of h.
            bound: what is known.
        """
        self.form, self.left = form, MOST_VISITS
        found: dict[Any, Step] = {}
        pairs = [(form.after[state], name) for state, name in ends.items()]
        for each in islice(self._all(self.match, pairs, bound), MOST_MATCHES):
            if all(value in each for value in (form.x, *form.after.values())):
                step = Step(form, node, each)
                start = self._place(step.x), step.before["h"]
                if start not in found or (found[start].swapped and not step.swapped):
                    found[start] = step
        return list(found.values())

    def _all(self, match: Any, pairs: Sequence[tuple[Any, Any]], bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which all pairs match."""
        if not pairs:
            yield bound
            return
        for each in match(*pairs[0], bound):
            yield from self._all(match, pairs[1:], each)

    def match(self, value: Value, name: str, bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which a value of the graph is a recorded value, in addition to what is known."""
        value, name = plain(value), bare(self.scope, name)
        self.left -= 1
        if self.left < 0:
            return
        if value.operation == "x":
            yield from self._x(value, Term(name, "", False, 0, 0), bound)
        elif value in bound:
            if self._same(bound[value], name):
                yield bound
        else:
            yield from self._operation(value, name, {**bound, value: name})

    def _operation(self, value: Value, name: str, bound: Bound) -> Iterator[Bound]:
        kind, form = value.operation, parts(value)
        if form is not None:
            total = linear(self.scope, name, rows=self.rows)
            if total is not None:
                yield from self._sum(form, total, bound)
        elif kind == "state":
            yield bound
        elif kind == "activation":
            found = self._activated(name) or (("linear", name) if self.loop else None)
            if found is not None:
                yield from self._with(value.name, found[0], value, found[1], bound)
        elif kind == "clip":
            assert self.form is not None
            inner, number = _clipped(self.scope, name)
            yield from self._with(self.form.bounds[value.numbers[0]], number, value, inner, bound)
        elif kind == "norm":
            inside = unit(self.scope, name)
            if inside is not None and len(value.numbers) == 1:
                yield from self._with("norm_epsilon", inside[1], value, inside[0], bound)
        elif kind in ("add", "mul", "one_minus"):
            terms, rest = _recorded_sum(value)
            theirs = self._expanded(name)
            if len(theirs) == len(terms) or (rest and len(theirs) > len(terms)):
                yield from self._terms(terms, theirs, rest, bound)
        else:
            node = self.scope.producers.get(name)
            if node is not None and node.op_type.lower() == kind and len(node.input) == len(value.of):
                yield from self._all(self.match, list(zip(value.of, node.input, strict=True)), bound)

    def _with(self, key: Any, found: Any, value: Value, name: str, bound: Bound) -> Iterator[Bound]:
        """Yield the matches of an operation's input, with one more thing known: `found` for `key`."""
        if bound.get(key, found) == found:
            yield from self.match(value.of[0], name, {**bound, key: found})

    def _activated(self, name: str) -> tuple[str, str] | None:
        if name not in self.activations:
            self.activations[name] = activated(self.scope, name)
        return self.activations[name]

    def _same(self, one: str, other: str) -> bool:
        if stripped(self.scope, one) == stripped(self.scope, other):
            return True
        return not self.loop and is_zero(self.scope, one) and is_zero(self.scope, other)

    def _place(self, term: Term) -> tuple[Any, ...]:
        return (bare(self.scope, term.value), *map(id, term.moves))

    def _x(self, value: Value, term: Term, bound: Bound) -> Iterator[Bound]:
        if self._place(bound.get(value, term)) == self._place(term):
            yield {value: term, **bound}

    # ── sums of products with constants ───────────────────────────────────────────────────────────────────────────────

    def _sum(self, form: Sequence[Part], total: Linear, bound: Bound) -> Iterator[Bound]:
        form = [part for part in form if self.zeros is None or part.value is not self.zeros]
        matrices = [part for part in form if part.value is not None and part.matrix]
        vectors = [part for part in form if part.value is not None and not part.matrix]
        biases = [part for part in form if part.value is None]
        if (len(matrices), len(vectors)) != (len(total.products), len(total.peepholes)):
            return
        for order in permutations(range(len(matrices))):
            if len(biases) == len(total.biases) == len(matrices) and self.loop:  # each belongs to one product
                given = [(total.biases[n],) for n in order]
            else:
                given = [total.biases, *[()] * len(biases)]
            if any(given[len(biases) :]):
                return
            known = bound | {(b.array, b.row, b.start): terms for b, terms in zip(biases, given, strict=False)}
            products = list(zip(matrices, (total.products[n] for n in order), strict=True))
            for others in permutations(total.peepholes):
                yield from self._all(self._term, [*products, *zip(vectors, others, strict=True)], known)

    def _term(self, part: Part, term: Term, bound: Bound) -> Iterator[Bound]:
        units, value = term.stop - term.start, part.value
        if value is None or term.normed != tuple(n * units for n in part.normed):
            return
        known: Bound = {(part.array, part.row, part.start): (term if part.matrix else replace(term, value=""),)}
        if part.normed:
            gain = Term("", term.gain, False, term.start, term.stop)
            known |= {"norm_epsilon": term.epsilon, (part.gain, None, part.start): (gain,)}
        if any(bound.get(key, found) != found for key, found in known.items()):
            return
        if value.operation == "x":
            yield from self._x(value, term, bound | known)
        elif not term.moves:
            yield from self.match(value, term.value, bound | known)

    # ── sums of other products ────────────────────────────────────────────────────────────────────────────────────────

    def _look(self, name: str, first: str = "") -> tuple[str, Sequence[Any]]:
        """Return the operation that computes a value, unless it is an activation; `first` is one in any case."""
        name = bare(self.scope, name)
        constant, node = self.scope.constant(name), self.scope.producers.get(name)
        if constant is not None:
            return ("one" if _is_one(constant) else ""), ()
        if node is None or node.domain not in DOMAINS or len(node.input) != (1 if node.op_type == "Neg" else 2):
            return "", ()
        if node.op_type not in ("Add", "Sub", "Mul", "Neg") or (name != first and self._activated(name) is not None):
            return "", ()
        return node.op_type.lower(), [bare(self.scope, one) for one in node.input]

    def _expanded(self, name: str) -> list[Product]:
        """Return a value as a sum of products; empty where it has too many terms."""
        if name not in self.sums:
            self.sums[name] = []
            with suppress(ValueError):
                self.sums[name] = expand(name, lambda one: self._look(one, name), [MOST_TERMS])
        return self.sums[name]

    def _terms(self, ours: list[Product], theirs: list[Product], rest: Sequence[Part], bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which each recorded term is one of the graph, and the others are products with arrays."""
        if not ours:
            totals = [linear(self.scope, one.value, rows=self.rows) if one.value else None for one in theirs]
            found = [total for total in totals if total is not None]
            if not theirs and not rest:
                yield bound
            elif len(found) == len(theirs):
                yield from self._sum(rest, Linear(*(sum(terms, ()) for terms in zip(*found, strict=True))), bound)
            return
        for n, term in enumerate(theirs):
            if (term.sign, len(term.factors)) == (ours[0].sign, len(ours[0].factors)):
                for each in self._factors(ours[0].factors, term.factors, bound):
                    yield from self._terms(ours[1:], [*theirs[:n], *theirs[n + 1 :]], rest, each)

    def _factors(self, ours: Sequence[Value], theirs: Sequence[str], bound: Bound) -> Iterator[Bound]:
        if not ours:
            yield bound
            return
        for n, name in enumerate(theirs):
            guessed = ours[0].operation == "state" and ours[0] not in bound and not self.loop
            if guessed and self._activated(name) is not None:  # more likely a gate
                continue
            for each in self.match(ours[0], name, bound):
                yield from self._factors(ours[1:], [*theirs[:n], *theirs[n + 1 :]], each)


def steps_of(scope: Scope, rows: bool = False) -> Iterator[list[Step]]:
    """Yield the decomposed steps of cells in a graph, each as the list of its readings; `rows`: as in `Matcher`."""
    matcher = Matcher(scope, rows=rows)
    found = [form for kind in KINDS.values() for form in forms(kind) if parts(form.after["h"]) is None]
    for node in scope.graph.node:  # a product with a matrix after a cell isn't taken to be its projection
        if node.domain in DOMAINS and len(node.output) == 1 and node.op_type != "Identity":
            steps = (matcher.steps(form, node, {"h": node.output[0]}, {}) for form in found)
            first = next(filter(None, steps), None)
            if first is not None:
                yield first


# ── cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell_of(scope: Scope, step: Step, flags: dict[str, Any], **arrays: Array) -> Cell:
    """Return the cell of a decomposed step.

    Args:
        scope: the graph.
        step: the step.
        flags: settings of the cell that don't follow from the step's equations.
        **arrays: arrays that aren't in the equations.

    Raises:
        ValueError: weights that don't form one cell.
    """
    kind, bound = step.form.kind, step.bound
    units = len(array_of(scope, step.arrays["kernel", None][0][0]))
    rows: dict[str, list[Array]] = {}
    for (name, _), each in step.arrays.items():
        blocks = [total(scope, terms, units) for _, terms in sorted(each.items())]
        if len({len(block) for block in blocks}) != 1:
            raise ValueError(f"the gates of {name} don't have the same width")
        rows.setdefault(name, []).append(np.concatenate(blocks).T)
    stacked = {row[0] for row in step.arrays if row[1] is not None}
    arrays |= {name: np.stack(found) if name in stacked else found[0] for name, found in rows.items()}
    biased = any(terms for row, each in step.arrays.items() if row[0] == "bias" for terms in each.values())
    if not biased:
        arrays.pop("bias", None)
    texts = {slot: bound[slot] for slot in kind.slots if slot in bound}
    candidates, others = ([texts[g] for g, role in kind.gates.items() if g in texts and (role == "candidate") == wanted]
                          for wanted in (True, False))  # fmt: skip
    settings = {**step.form.flags, **flags, "use_bias": biased, "gate_activations": texts}
    settings |= {name: bound[name] for name in (*step.form.bounds.values(), "norm_epsilon") if bound.get(name)}
    if "projection" in arrays:
        settings["proj_size"] = arrays["projection"].shape[1]
    if others:
        settings["recurrent_activation"] = others[0]
    spec = CellSpec(len(arrays["kernel"]), units, candidates[0], kind=kind.name, **settings)
    dtype = np.dtype(np.float64 if arrays["kernel"].dtype == np.float64 else np.float32)
    return Cell(spec, **{name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()})


def total(scope: Scope, terms: Sequence[Term], units: int) -> Array:
    """Return the rows of a matrix, or the sum of constants."""
    if len(terms) == 1:
        return array_of(scope, terms[0])
    return sum((array_of(scope, term) for term in terms), np.zeros(units))

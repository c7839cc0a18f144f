"""Recognises steps of cells in a graph by comparing it with the step of each kind of cell, written as a graph.

A `Form` is the step of a kind with one choice of flags, written as a graph in which each number and each activation
says what it is: all numbers of a block of an array are equal, and each slot has an `elu` with a parameter of its own.
The `Matcher` compares a value of the file that may be h with the form's h, and goes on to what each is computed from.
Both graphs are read in the same way (`sums`); terms and factors match in any order, so there may be several matches.
Where the form has a slot, a block or a state, the match notes what the file has there; a second place must have the
same.

For example, the form of a minGRU is, with its differences multiplied out,

    h = h₋ - z·h₋ + z·g    z = elu(0.5) of 2·x + 4    g = elu(1.5) of 3·x + 5

and a file computes y = (1 - a)·s + a·b, with a = Sigmoid(A·x + p) and b = Tanh(B·x + q). This is s - a·s + a·b: terms
with as many factors and the same signs. The term with the most operators comes first: z·g is a·b. Its factor z can be
a: slot z is "sigmoid", the kernel's block of z is A, its bias p, and the input is x. So g is b: slot g is "tanh", with
B and q. (z as b and g as a match too, but fail at the next term.) Then z·h₋ is a·s, as z is a: h₋ is s, and the term h₋
is s as well. `cell_of` joins A and B to the kernel, and p and q to the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache, cached_property
from itertools import islice, permutations, product
from typing import Any

import numpy as np

from cellstack.cells import KINDS, Kind
from cellstack.cells.activations import names_for
from cellstack.cells.layout import Array
from cellstack.cells.spec import MATRICES, CellSpec
from cellstack.formats.onnx.decomposed.linear import MOST_NODES, Linear, Term, array_of, split_joined, unit
from cellstack.formats.onnx.decomposed.sums import Product, Values, bare, is_zero, stripped, together
from cellstack.formats.onnx.file import DOMAINS, Budget, Graph, Model, Scope, Tensors
from cellstack.formats.onnx.scan import body_of
from cellstack.nodes.cell_arrays import Cell

MOST_MATCHES = 24  # maximum number of ways in which one value is matched with one form
VISITS = 4000, 100  # maximum number of values that are compared in a graph: at least, and per node

# ── the steps of the kinds of cell ────────────────────────────────────────────────────────────────────────────────────

CHOICES = {"bool": (False, True), "int": (0, 1), "backbone_layers": (1,)}
"""The values of flags in the forms of a kind, by name or type; those of other flags are their `Limit.options`."""

MOST_LAYERS = 32  # maximum number of layers of a backbone: matching one more takes some ten frames of Python's stack

BACKBONE = "elu(9.5)"
"""The activation of a backbone in the forms: another one than that of any slot."""

BIASES = ("bias", "gate_bias", "backbone_bias")
"""The arrays of biases of products."""

Key = tuple[str, int | None, int]  # a block of an array: its name, the row where there are several, and its number


@dataclass(frozen=True, eq=False)
class Form:
    """The step of a kind of cell with some of its flags, as a graph.

    Args:
        kind: the kind.
        flags: settings of the cell that follow from the equations.
        values: the graph; all numbers of a block of an array are equal, and differ from those of other blocks.
        slots: where each activation is.
        bounds: the flag of each bound of a clip.
        keys: the block of each number.
    """

    kind: Kind
    flags: dict[str, Any]
    values: Values
    slots: dict[str, str]
    bounds: dict[float, str]
    keys: dict[float, Key]

    def with_layers(self, count: int) -> Form:
        """Return the form with this number of layers of its backbone; itself without a backbone."""
        return _deep(self, min(count, MOST_LAYERS)) if count > 1 and "backbone" in self.slots.values() else self

    @cached_property
    def x(self) -> str:
        """The name of the input."""
        return self.values.scope.inputs[-1]

    @cached_property
    def before(self) -> dict[str, str]:
        """The names of the states before the step."""
        return dict(zip(self.kind.state._fields, self.values.scope.inputs, strict=False))

    @cached_property
    def after(self) -> dict[str, str]:
        """The names of the states after the step."""
        scope = self.values.scope
        names = [bare(scope, value.name) for value in scope.graph.output]
        return dict(zip(self.kind.state._fields, names, strict=False))

    def key(self, term: Term) -> Key:
        """Return the block of a term."""
        return self.keys[float(array_of(self.values.scope, term).flat[0])]


@cache
def forms(kind: Kind) -> tuple[Form, ...]:
    """Return a kind's step with every combination of flags; clips are optional in a graph."""
    names = {*kind.settings} - {"use_bias", "learn_initial_state"}
    known = [entry for entry in fields(CellSpec) if entry.name in names]
    bounds = {entry.name: float(n) for n, entry in enumerate(known, 1) if entry.type == "float | None"}
    choices = {entry.name: _choices(kind, entry) for entry in known if entry.default is not MISSING}
    switches = {name: values for name, values in choices.items() if values}
    possible = []
    for values in product(*switches.values()):
        flags = dict(zip(switches, values, strict=True))
        with suppress(ValueError):  # flags that exclude each other
            possible.append(_form(kind, flags, bounds))
    return tuple(possible)


@cache
def _deep(form: Form, layers: int) -> Form:
    bounds = {name: bound for bound, name in form.bounds.items()}
    return _form(form.kind, {**form.flags, "backbone_layers": layers}, bounds)


def _choices(kind: Kind, entry: Field[Any]) -> tuple[Any, ...]:
    limit = kind.settings[entry.name].limit
    usual = CHOICES.get(entry.name, CHOICES.get(str(entry.type), ()))
    return limit.options if limit is not None and limit.options else usual


def _form(kind: Kind, flags: dict[str, Any], bounds: dict[str, float]) -> Form:
    settings: dict[str, Any] = {**flags, **bounds}
    if flags.get("backbone_units"):
        settings["backbone_activation"] = BACKBONE
    # Each bound of a slice is one value, which matches one value of a graph: bounds of x, at most 2, mustn't be units.
    spec = CellSpec(1 + flags.get(kind.scalar, False), 3, kind=kind.name, **settings)
    usable = {*spec.gates, *kind.outputs} - {*kind.fixed}
    slots = {slot: f"elu({n}.5)" for n, slot in enumerate(kind.slots) if slot in usable}
    spec = replace(spec, gate_activations=slots)
    if spec.backbone_units:
        slots["backbone"] = spec.backbone_activation
    arrays, keys = dict[str, Array](), dict[float, Key]()
    for name, shape in spec.shapes.items():
        several = len(shape) == (3 if name in MATRICES else 2)
        rows = [*range(shape[0])] if several else [None]
        blocks = max(1, shape[-1] // spec.units)
        codes = {len(keys) + 2.0 + n: (name, *block) for n, block in enumerate(product(rows, range(blocks)))}
        each = np.array([*codes], np.float32).reshape(len(rows), blocks).repeat(shape[-1] // blocks, axis=1)
        each = each if several else each[0]
        arrays[name] = np.broadcast_to(each[:, None] if len(shape) == 3 else each, shape)
        keys |= codes
    graph = Graph.of(body_of("step", Cell(spec, **arrays)))
    model = Model("", graph, 17, (), "", None, Tensors(""), Budget(0))
    texts = {text: slot for slot, text in slots.items()}
    return Form(kind, flags, Values(model.scope(), rows=True), texts, {b: name for name, b in bounds.items()}, keys)


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

Bound = dict[Any, Any]
"""A match: the name in the graph of each name of a form, except the term of x; the terms of each block of an array; and
settings: activations by slot, bounds and epsilon by flag."""


@dataclass(eq=False)
class Step:
    """One step of a cell.

    Args:
        form: the form that it matches.
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
        return {state: self.bound.get(name, "") for state, name in self.form.before.items()}

    @cached_property
    def after(self) -> dict[str, str]:
        """The names of the states after the step."""
        return {state: self.bound[name] for state, name in self.form.after.items()}

    @cached_property
    def terms(self) -> dict[Key, tuple[Term, ...]]:
        """The terms of each block of an array, in the order of blocks."""
        return {key: self.bound[key] for key in self.form.keys.values() if key in self.bound}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The activation of each slot, and numbers by flag."""
        names = (*self.form.kind.slots, "backbone", *self.form.bounds.values(), "norm_epsilon")
        return {name: self.bound[name] for name in names if name in self.bound}

    @property
    def matrices(self) -> frozenset[tuple[Any, ...]]:
        """The constants by which x and h are multiplied: the name of each, and its columns."""
        terms = (term for terms in self.terms.values() for term in terms if not term.vector)
        return frozenset((term.weights, term.columns) for term in terms)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What all steps of a cell have in common."""
        rows = ((key, tuple(sorted(term.rows for term in terms))) for key, terms in self.terms.items())
        return id(self.form), tuple(self.settings.items()), tuple(rows)

    @property
    def swapped(self) -> bool:
        """Whether a gate and a candidate, whose product is symmetric, are more likely to be each other."""
        texts = {True: set[str](), False: set[str]()}
        for gate, role in self.form.kind.gates.items():
            texts[role == "candidate"].add(self.bound.get(gate, ""))
        return "tanh" in texts[False] and texts[True] != {"tanh"}


class Matcher:
    """Compares the values of a graph with those of forms.

    Args:
        scope: the graph.
        within_loop: whether the graph is one step of a loop: gates may then lack an activation.
        rows: whether values are known to be rows of features, without time.
        zeros: a state of the form whose products an exporter has folded; "" for none.
    """

    def __init__(self, scope: Scope, within_loop: bool = False, rows: bool = False, zeros: str = "") -> None:
        self.scope, self.values = scope, Values(scope, rows)
        self.loop, self.zeros = within_loop, zeros
        self.left = VISITS[0] + VISITS[1] * len(scope.graph.node)
        self.form: Any = None
        # The number of values matched before the last that matches none of the form, and its name.
        self.furthest = (0, "")

    def steps(self, form: Form, node: Any, ends: dict[str, str], bound: Bound) -> list[Step]:
        """Return the steps of a form that compute states; several where a graph doesn't distinguish x from h.

        Args:
            form: the form.
            node: the node that computes h.
            ends: the names of the states after the step, at least of h.
            bound: what is known.
        """
        if not self.zeros:  # else the form is that of another step
            form = form.with_layers(self._layers(ends["h"]))
        self.form, self.furthest = form, (0, "")
        by_start: dict[Any, Step] = {}
        pairs = [(form.after[state], name) for state, name in ends.items()]
        for each in islice(self._all(self.match, pairs, bound), MOST_MATCHES):
            if all(name in each for name in (form.x, *form.after.values())):
                step = Step(form, node, each)
                start = self._place(step.x), step.before["h"]
                if start not in by_start or (by_start[start].swapped and not step.swapped):
                    by_start[start] = step
        return list(by_start.values())

    def _layers(self, h: str) -> int:
        """Return the number of layers of a backbone that h may have: of products of an activation of a product."""
        names = [h]
        for name in names:
            total, node = self.values.linear(name), self.scope.producers.get(name)
            if total is not None and total.products:
                break
            names += node.input if node is not None and len(names) < MOST_NODES else ()
        else:
            return 0
        count = 0
        while total is not None and len(total.products) == 1:
            active = self.values.activated(total.products[0].value)
            total = None if active is None else self.values.linear(active[1])
            count += total is not None
        return count

    def _all(self, match: Any, pairs: Sequence[tuple[Any, Any]], bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which all pairs match."""
        if not pairs:
            yield bound
            return
        for each in match(*pairs[0], bound):
            yield from self._all(match, pairs[1:], each)

    def match(self, ours: str, theirs: str, bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which a value of the graph is a value of the form, in addition to what is known."""
        theirs = bare(self.scope, theirs)
        self.left -= 1
        if self.left < 0:
            return
        if ours == self.form.x:
            yield from self._x(Term(theirs, "", False, 0, 0), bound)
        elif ours in bound:
            if self._same(bound[ours], theirs):
                yield bound
        else:
            matches = False
            for each in self._operation(ours, theirs, {**bound, ours: theirs}):
                matches = True
                yield each
            if not matches and len(bound) > self.furthest[0]:
                self.furthest = len(bound), theirs

    def _operation(self, ours: str, theirs: str, bound: Bound) -> Iterator[Bound]:
        values, node = self.form.values, self.form.values.scope.producers.get(ours)
        total, active = values.linear(ours), values.activated(ours)
        if node is None:
            yield bound
        elif total is not None:
            other_total = self.values.linear(theirs)
            if other_total is not None:
                yield from self._linear(total, other_total, bound)
        elif active is not None:
            (ours_name, ours_inner), slot = active, self.form.slots.get(active[0])
            other_active = self.values.activated(theirs) or (("linear", theirs) if self.loop else None)
            if slot is not None and other_active is not None:
                argument = self.form.kind.activation(slot)
                if other_active[0].partition("(")[0] not in names_for(argument):
                    return
                yield from self._with(slot, other_active[0], ours_inner, other_active[1], bound)
            elif other_active is not None and other_active[0] == ours_name:  # such as the exponential of an sLSTM
                yield from self.match(ours_inner, other_active[1], bound)
        elif node.op_type == "Clip":
            (inner, bound_of), (value, limit) = values.clipped(ours), self.values.clipped(theirs)
            yield from self._with(self.form.bounds[bound_of], limit, inner, value, bound)
        elif (normed := unit(values.scope, ours)) is not None:
            other_normed = unit(self.scope, theirs)
            if other_normed is not None:
                yield from self._with("norm_epsilon", other_normed[1], normed[0], other_normed[0], bound)
        elif node.op_type in ("Add", "Mul", "Sub"):
            terms, rest = values.parted(ours)
            other_terms = self.values.sum(theirs)
            if len(other_terms) == len(terms) or (rest and len(other_terms) > len(terms)):
                yield from self._terms(terms, other_terms, rest, bound)
        else:
            other = self.scope.producers.get(theirs)
            inputs = [] if other is None else list(other.input)
            step = self.scope.constant(inputs[4]) if node.op_type == "Slice" and len(inputs) == 5 else None
            if isinstance(step, np.ndarray) and (step == 1).all():
                inputs.pop()
            if other is not None and (other.op_type, len(inputs)) == (node.op_type, len(node.input)):
                yield from self._all(self.match, [*zip(node.input, inputs, strict=True)], bound)

    def _with(self, key: str, value: Any, ours: str, theirs: str, bound: Bound) -> Iterator[Bound]:
        """Yield the matches of an operation's input, with one more setting known."""
        if bound.get(key, value) == value:
            yield from self.match(ours, theirs, {**bound, key: value})

    def _same(self, one: str, other: str) -> bool:
        if stripped(self.scope, one) == stripped(self.scope, other):
            return True
        return not self.loop and is_zero(self.scope, one) and is_zero(self.scope, other)

    def _place(self, term: Term) -> tuple[Any, ...]:
        return (bare(self.scope, term.value), *((id(node), name) for node, name in term.moves))

    def _x(self, term: Term, bound: Bound) -> Iterator[Bound]:
        if self._place(bound.get(self.form.x, term)) == self._place(term):
            yield {self.form.x: term, **bound}

    # ── sums of products with constants ───────────────────────────────────────────────────────────────────────────────

    def _linear(self, ours: Linear, theirs: Linear, bound: Bound) -> Iterator[Bound]:
        products = [term for term in ours.products if term.value != self.zeros]
        if len(theirs.products) < len(products):
            theirs = split_joined(self.scope, theirs)
        biases, key = theirs.biases, self.form.key
        if (len(products), len(ours.peepholes)) != (len(theirs.products), len(theirs.peepholes)):
            return
        if biases and not ours.biases:
            return
        for order in permutations(range(len(products))):
            if self.loop and len(ours.biases) == len(biases) == len(products):  # each belongs to one product
                of_biases = [(biases[n],) for n in order]
            else:
                of_biases = [biases, *[()] * len(ours.biases)]
            known = bound | {key(bias): terms for bias, terms in zip(ours.biases, of_biases, strict=False)}
            for others in permutations(theirs.peepholes):
                pairs = [*zip(products, (theirs.products[n] for n in order), strict=True)]
                yield from self._all(self._term, [*pairs, *zip(ours.peepholes, others, strict=True)], known)

    def _term(self, ours: Term, theirs: Term, bound: Bound) -> Iterator[Bound]:
        wide, width = ours.stop - ours.start, theirs.stop - theirs.start
        if [n * width for n in ours.normed] != [n * wide for n in theirs.normed]:
            return
        known: Bound = {self.form.key(ours): (theirs,)}
        if ours.normed:
            gain, other = (Term("", term.gain, False, term.start, term.stop, vector=True) for term in (ours, theirs))
            known |= {"norm_epsilon": theirs.epsilon, self.form.key(gain): (other,)}
        if any(bound.get(name, value) != value for name, value in known.items()):
            return
        if ours.value == self.form.x:
            yield from self._x(theirs, bound | known)
        elif not theirs.moves:
            yield from self.match(ours.value, theirs.value, bound | known)

    # ── sums of other products ────────────────────────────────────────────────────────────────────────────────────────

    def _terms(self, ours: list[Product], theirs: list[Product], rest: Linear | None, bound: Bound) -> Iterator[Bound]:
        """Yield the ways in which each term of a form is one of the graph, and the others are products with arrays."""
        if ours:
            for n, term in enumerate(theirs):
                if (term.sign, len(term.factors)) == (ours[0].sign, len(ours[0].factors)):
                    for each in self._factors(ours[0].factors, term.factors, bound):
                        yield from self._terms(ours[1:], [*theirs[:n], *theirs[n + 1 :]], rest, each)
        elif rest is None:
            yield bound
        else:
            linears = [self.values.linear(term.name) if term.name and term.sign > 0 else None for term in theirs]
            total = together(linears)
            if total is not None:
                yield from self._linear(rest, total, bound)

    def _factors(self, ours: Sequence[str], theirs: Sequence[str], bound: Bound) -> Iterator[Bound]:
        if not ours:
            yield bound
            return
        for n, name in enumerate(theirs):
            guessed = ours[0] in self.form.before.values() and ours[0] not in bound and not self.loop
            if guessed and self.values.activated(name) is not None:  # more likely a gate
                continue
            for each in self.match(ours[0], name, bound):
                yield from self._factors(ours[1:], [*theirs[:n], *theirs[n + 1 :]], each)


def steps_of(scope: Scope, rows: bool = False, states: int = 1) -> Iterator[list[Step]]:
    """Yield the decomposed steps of cells in a graph, each as the list of its readings.

    Args:
        scope: the graph.
        rows: as in `Matcher`.
        states: only kinds with at least so many states.
    """
    matcher, alike = Matcher(scope, rows=rows), dict[Any, list[Form]]()
    for form in (form for kind in KINDS.values() if len(kind.state._fields) >= states for form in forms(kind)):
        h = form.after["h"]
        if form.values.linear(h) is None:  # a product with a matrix after a cell isn't taken to be its projection
            whole = form.values.parted(h)[1] is None
            alike.setdefault(form.values.outline(h) if whole else "any", []).append(form)
    for node in scope.graph.node:
        if node.domain in DOMAINS and len(node.output) == 1 and node.op_type != "Identity":
            candidates = [*alike.get(matcher.values.outline(node.output[0]), ()), *alike.get("any", ())]
            steps = (matcher.steps(form, node, {"h": node.output[0]}, {}) for form in candidates)
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
    kind, of_slots = step.form.kind, dict(step.settings)
    backbone = of_slots.pop("backbone", None)
    gated = "gate_kernel" if backbone else "kernel"  # the product that has a block of columns for each gate
    rows_of_gates, columns_of_kernel = (
        len(array_of(scope, step.terms[name, None, 0][0])) for name in (gated, "kernel")
    )
    blocks_of_gates = [key for key in step.form.keys.values() if key[0] == gated]
    units = rows_of_gates // (len(blocks_of_gates) // sum(key in step.terms for key in blocks_of_gates))
    rows: dict[str, dict[int | None, list[Array]]] = {}
    for (name, row, _), terms in step.terms.items():
        width = columns_of_kernel if backbone and name in ("bias", "backbone_bias") else units
        rows.setdefault(name, {}).setdefault(row, []).append(total(scope, terms, width))
    if any(len({len(block) for block in blocks}) != 1 for each in rows.values() for blocks in each.values()):
        raise ValueError("the gates of an array don't have the same width")
    for name in rows:
        _check_normed(name, [terms for (array, *_), terms in step.terms.items() if array == name], units)
    for name, each in rows.items():
        joined = [np.concatenate(blocks).T for blocks in each.values()]
        arrays[name] = joined[0] if None in each else np.stack(joined)
    biased = any(terms and name in BIASES for (name, *_), terms in step.terms.items())
    if not biased:
        arrays = {name: array for name, array in arrays.items() if name not in BIASES}
    texts = {slot: text for slot, text in of_slots.items() if slot in kind.slots}
    settings = {**step.form.flags, **flags, "use_bias": biased, "gate_activations": texts}
    settings |= {name: n for name, n in of_slots.items() if name not in texts and n is not None}
    for gate, role in reversed(kind.gates.items()):  # the first of each role
        if gate in texts:
            settings["activation" if role == "candidate" else "recurrent_activation"] = texts[gate]
    if backbone:
        settings |= {"backbone_units": columns_of_kernel, "backbone_activation": backbone}
    if "projection" in arrays:
        settings["proj_size"] = arrays["projection"].shape[1]
    dtype = np.dtype(np.float64 if arrays["kernel"].dtype == np.float64 else np.float32)
    width = len(arrays["kernel"]) + settings.get(kind.scalar, False)
    spec = CellSpec(width, units, kind=kind.name, **settings)
    return Cell(spec, **{name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()})


def _check_normed(name: str, blocks: Sequence[Sequence[Term]], units: int) -> None:
    """Raise `ValueError` if the gates don't use the blocks that a layer normalisation normalises together.

    Args:
        name: the array.
        blocks: the terms of each block, in the order of gates.
        units: the number of units.
    """
    normed = [terms[0] for terms in blocks if len(terms) == 1 and terms[0].normed]
    if len(normed) < 2:
        return
    bounds = normed[0].normed
    within = [sum(bound <= term.start for bound in bounds) for term in normed]
    expected = [sum(bound <= n * units for bound in bounds) for n in range(len(normed))]
    if within != expected or sorted(term.start for term in normed) != [n * units for n in range(len(normed))]:
        raise ValueError(f"the gates don't use all blocks of the normalised {name}")


def total(scope: Scope, terms: Sequence[Term], width: int) -> Array:
    """Return the rows of a matrix, a vector, or the sum of constants of this width."""
    arrays = [array_of(scope, term) for term in terms]
    return arrays[0] if len(arrays) == 1 else sum(arrays, np.zeros(width))

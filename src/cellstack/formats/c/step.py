"""A cell's step as the body of a C function, generated from its recorded operations.

Matrix products and normalisations are calls over arrays; between them, loops over the units compute everything else.
The calls of level n precede loop n, and use the arrays that earlier loops stored. Other values are local variables of a
loop, or parts of an expression.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from itertools import count as numbers
from typing import NamedTuple

from cellstack.cells.activations import PARAMETERS, Activation
from cellstack.cells.spec import CellSpec
from cellstack.formats.c.narrow import Narrow
from cellstack.nodes.activations import FORMULAS
from cellstack.nodes.elementwise import FUNCTIONS, X
from cellstack.views.recorded import Recorded, Value

SUM, FACTOR, ATOM = range(3)  # the precedence of an expression's operator
ARRAYS = ("z", "a", "q", "u", "v", "s", "t", "n")  # names of scratch arrays, without those of gates and states


class Matrix(NamedTuple):
    """The matrix of a product: a cell's array, the columns of some of its gates, or one of its matrices."""

    array: str
    part: tuple[int, int] | int | None

    @property
    def name(self) -> str:
        """Return its name in the struct of weights."""
        parts = self.part if isinstance(self.part, tuple) else () if self.part is None else (self.part,)
        return "_".join(map(str, (self.array, *parts)))


@dataclass(frozen=True, eq=False)
class Node:
    """A value of the function. `operation` is `"sum"` or `"norm"`, which are calls, or the operation of a `Value`."""

    operation: str
    of: tuple[Node, ...]
    value: Value
    level: int
    weight: Node | None = None  # what a sum starts from
    matrices: tuple[Matrix, ...] = ()  # of a sum, one per entry of `of`

    @property
    def is_call(self) -> bool:
        """Whether it is computed by a call, into an array."""
        return self.operation in ("sum", "norm")

    @property
    def is_element(self) -> bool:
        """Whether it is computed by a loop, unit by unit."""
        return not self.is_call and self.operation not in ("x", "features", "state", "weight", "split")


def literal(value: float) -> str:
    """Return a number as a C literal, in a template."""
    return f"{float(value)!r}$f"


def called(function: str, *of: str) -> str:
    """Return a C expression, as a template, that applies a function of formulas."""
    return FUNCTIONS[function][2].format(*(f"({one})" if " " in one else one for one in of))


def activate(function: Activation, inner: str) -> str:
    """Return a C expression, as a template, that applies an activation, which may be one of `FORMULAS`."""
    if function.name == "linear":
        return inner
    if function.name in FORMULAS:
        return FORMULAS[function.name](X).written(inner, called, literal)
    if function.name == "tanh":
        return f"$tanh({inner})"
    parameters = [literal(value) for value in (function.alpha, function.beta)[: len(PARAMETERS.get(function.name, ()))]]
    return f"${{name}}_{function.name}({', '.join([inner, *parameters])})"


def times(count: int, letter: str) -> str:
    """Return `count` widths as C, `3 * H`."""
    return letter if count == 1 else f"{count} * {letter}"


class Step:
    """A cell's step as C, in a template.

    After construction, `lines` is the body of the function, `scratch` the length of each of its scratch arrays, a
    number and the letter of a width, and `matrices` what it multiplies by.

    Args:
        spec: the cell.
        narrow: the format of the matrices; None: that of the other arrays.
    """

    def __init__(self, spec: CellSpec, narrow: Narrow | None = None) -> None:
        self.spec, self.narrow, recorded = spec, narrow, Recorded(spec)
        self.nodes: dict[Value, Node] = {}
        self.value_uses = Counter(of for value in recorded.values for of in value.of) + Counter(recorded.states)
        self.new = [self._node(value) for value in recorded.states]
        self.old, self.kept = recorded.before, recorded.kept
        every = list(self._reachable())
        self.matrices = list(dict.fromkeys(matrix for node in every for matrix in node.matrices))
        order = {value: n for n, value in enumerate(recorded.values)}
        every.sort(key=lambda node: order[node.value])  # stable: what a value needs stays before it
        self.elements = [node for node in every if node.is_element]
        self.calls = [node for node in every if node.is_call]
        self.readers = {node: [other for other in every if node in other.of] for node in every}
        self.levels = {node: node.level for node in every}
        self._sink()
        self.scratch: dict[str, tuple[int, str]] = {}
        self.places: dict[Node, str] = {}  # the arrays in which values are stored
        self.texts: dict[Node, tuple[str, int]] = {}  # local variables of the current loop
        body: list[str] = []
        for level in range(1 + max(self.levels.values())):
            body += [line for call in self.calls if self.levels[call] == level for line in self._call(call)]
            for letter in ("U", "H", "P"):
                body += self._loop(level, letter)
        self.lines = ["const size_t H = w->units;", *(["const size_t P = w->projected;"] if spec.proj_size else [])]
        self.lines += ["const size_t U = w->backbone;"] if spec.backbone_units else []
        self.lines += [f"const size_t D = H / {spec.heads};"] if spec.heads > 1 else []
        lengths = list(self.scratch.values())
        for n, (name, (count, letter)) in enumerate(self.scratch.items()):
            start = " + ".join(["scratch", *(times(*one) for one in self.lengths(lengths[:n]) if one[0])])
            self.lines.append(f"$real *const {name} = {start}; /* [{count}{letter}] */")
        self.lines += ["", *body]

    # ── from recorded values to nodes ─────────────────────────────────────────────────────────────────────────────────

    def _node(self, value: Value) -> Node:
        if value not in self.nodes:
            self.nodes[value] = self._sum(value) if self._has_products(value) else self._plain(value)
        return self.nodes[value]

    def _plain(self, value: Value) -> Node:
        of = tuple(map(self._node, value.of))
        late = value.operation == "norm"
        return Node(value.operation, of, value, max([0, *(node.level + (late and node.is_element) for node in of)]))

    def _sum(self, value: Value) -> Node:
        """Return a sum of products as a call, to which the terms are added that can't be accumulated."""
        terms = list(self._terms(value))
        products = [term for term in terms if term.operation == "product"]
        weights = [term for term in terms if term.operation == "weight"]
        of = tuple(self._node(product.of[0]) for product in products)
        matrices = tuple(Matrix(product.name, product.part) for product in products)
        level = max(node.level + node.is_element for node in of)
        node = Node("sum", of, value, level, self._node(weights[0]) if weights else None, matrices)
        for term in terms:
            if term not in products and term not in weights[:1]:
                other = self._node(term)
                node = Node("add", (other, node), value, max(node.level, other.level))
        return node

    def _has_products(self, value: Value) -> bool:
        return value.operation == "product" or (value.operation == "add" and any(map(self._accumulates, value.of)))

    def _accumulates(self, value: Value) -> bool:
        """Whether a term can be accumulated into a sum: it has products, and nothing else uses it."""
        return self.value_uses[value] == 1 and self._has_products(value)

    def _terms(self, value: Value) -> Iterator[Value]:
        for of in value.of if value.operation == "add" else ():
            yield from self._terms(of) if self._accumulates(of) else (of,)
        if value.operation == "product":
            yield value

    def _reachable(self) -> dict[Node, None]:
        """Return all nodes, each after those that it needs."""
        nodes: dict[Node, None] = {}

        def visit(node: Node) -> None:
            for of in (*node.of, *([node.weight] if node.weight else [])):
                visit(of)
            nodes.setdefault(node)

        for node in self.new:
            visit(node)
        return nodes

    def _sink(self) -> None:
        """Compute each element as late as possible, so that fewer values are stored from loop to loop."""
        last = max(self.levels.values())
        for node in reversed(self.elements):
            readers = list(self.readers[node])
            for split in (other for other in readers if other.operation == "split"):
                readers += self.readers[split]
            needed = [self.levels[other] - other.is_call for other in readers if other.operation != "split"]
            self.levels[node] = max(self.levels[node], min(needed, default=last))

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def lengths(scratch: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], tuple[int, str]]:
        """Return the total length of some scratch arrays: how many times H, and how many times U."""
        totals = {"H": 0, "U": 0}
        for count, letter in scratch:
            totals[letter] += count
        return (totals["H"], "H"), (totals["U"], "U")

    def _array(self, count: int, letter: str) -> str:
        """Return the name of a new scratch array of `count` blocks of a width; P is at most H."""
        taken = {*self.scratch, *self.spec.gates, *self.spec.state_sizes}
        name = next(name for name in chain(ARRAYS, map("b_{}".format, numbers())) if name not in taken)
        self.scratch[name] = count, "H" if letter == "P" else letter
        return name

    def _call(self, call: Node) -> Iterator[str]:
        count, letter = call.value.width
        wide = times(count, letter)
        if call.operation == "norm":
            (of,) = call.of
            place = self.places.get(call)  # where a loop has stored its argument
            if place is None:
                place = self.places[of]
                if len(self.readers[of]) > 1:
                    place = self._array(count, letter)
                    yield f"memcpy({place}, {self.places[of]}, {wide} * sizeof *{place});"
                self.places[call] = place
            start = 0
            for blocks in map(int, call.value.numbers):
                at = f"{place} + {times(start, 'H')}" if start else place
                yield f"${{name}}_normalise({at}, {times(blocks, 'H')}, {literal(self.spec.norm_epsilon)});"
                start += blocks
            return
        place = self.places[call] = self._state_of(call) or self._array(count, letter)
        bias = None if call.weight is None else f"w->{call.weight.value.name}{self._row(call.weight)}"
        if bias is None:
            yield f"memset({place}, 0, {wide} * sizeof *{place});"
        elif not self.narrow:
            yield f"memcpy({place}, {bias}, {wide} * sizeof *{place});"
        for of, matrix in zip(call.of, call.matrices, strict=True):
            length = "w->inputs" if of.value.width[1] == "I" else times(*of.value.width)
            vector = {"x": "x", "features": "x", "state": of.value.name}.get(of.operation) or self.places[of]
            if self.narrow:
                passed = [
                    place,
                    wide,
                    bias or "NULL",
                    vector,
                    length,
                    *(f"w->{name}" for _, name in self.narrow.members(matrix.name)),
                ]
                yield f"${{name}}_multiply({', '.join([*passed, 'row'])});"
                bias = None
            elif matrix.array == "recurrent_kernel" and self.spec.heads > 1:
                yield f"for (size_t block = 0; block < {count * self.spec.heads}; block++) {{ /* a gate of a head */"
                part = f"{vector} + block % {self.spec.heads} * D"
                yield f"    ${{name}}_accumulate({place} + block * D, D, {part}, D, w->{matrix.name} + block * D * D);"
                yield "}"
            else:
                yield f"${{name}}_accumulate({place}, {wide}, {vector}, {length}, w->{matrix.name});"

    def _row(self, weight: Node) -> str:
        part, (count, letter) = weight.value.part, weight.value.width
        return f" + {times(part * count, letter)}" if isinstance(part, int) and part else ""

    def _state_of(self, call: Node) -> str | None:
        """Return the state that a sum can be computed into, because it is the new one and nothing reads the old one."""
        for old, new, rate in self._states():
            unread = all(self.levels[reader] < self.levels[call] for reader in self._reading(old))
            if new is call and unread and not rate and not self.readers[call]:
                return old.name
        return None

    def _states(self) -> Iterator[tuple[Value, Node, float]]:
        """Yield the states before and after the step, and the share of the old one that zoneout keeps."""
        yield from zip(self.old, self.new, self.kept, strict=True)

    def _reading(self, old: Value) -> list[Node]:
        return self.readers.get(self.nodes[old], []) if old in self.nodes else []

    # ── loops ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _loop(self, level: int, letter: str) -> list[str]:
        """Return a loop over the units, which computes the values of a level that something later needs."""
        self.texts = {}
        here = [node for node in self.elements if self.levels[node] == level and node.value.width[1] == letter]
        writes = [(old, new, rate) for old, new, rate in self._states() if self._written(old, new) == (level, letter)]
        writes = [write for write in writes if self.places.get(write[1]) != write[0].name]
        body: list[str] = []
        for node in here:
            later = [other for other in self.readers[node] if self.levels[other] > level or other.is_call]
            norms = [other for other in later if other.operation == "norm"]
            ends_later = any(new is node and self._written(old, new)[0] > level for old, new, _ in self._states())
            stored = [*norms, *([node] if len(later) > len(norms) or ends_later else [])]
            text = self._text(node)
            if node.value.width[0] == 1 and (node.operation == "record" or len(self.readers[node]) > 1):
                name = node.value.name or f"v_{len(self.texts)}"
                name = f"{name}_new" if name in self.spec.state_sizes else name
                body.append(f"const $real {name} = {text[0]};")
                self.texts[node] = name, ATOM
            for other in stored:  # a norm is computed in place
                count, letter = node.value.width
                place = self._array(count, letter)
                for block in range(count):
                    text = self._text(node, block)
                    body.append(f"{place}[{self._at(block, letter)}] = {text[0]};")
                self.places[other] = place
        ends = [(old.name, self._kept(old, new, rate)) for old, new, rate in writes]
        for n, (name, text) in enumerate(ends):
            if any(f"{before}[j]" in text for before, _ in ends[:n]):  # it reads a state that is overwritten before it
                body.append(f"const $real {name}_after = {text};")
                ends[n] = name, f"{name}_after"
        body += [f"{name}[j] = {text};" for name, text in ends]
        if not body:
            return []
        return [f"for (size_t j = 0; j < {letter}; j++) {{", *(f"    {line}" for line in body), "}"]

    def _written(self, old: Value, new: Node) -> tuple[int, str]:
        """Return the loop that writes a state: the first after which nothing reads the old one."""
        return max(self.levels[node] for node in (new, *self._reading(old))), old.width[1]

    def _kept(self, old: Value, new: Node, rate: float) -> str:
        """Return a state after zoneout: in inference, the rate is the share of the old value that is kept."""
        text, binds = self._text(new)
        if not rate:
            return text
        text = f"({text})" if binds < (ATOM if self.narrow else FACTOR) else text
        if self.narrow:
            return f"fmaf({literal(rate)}, {old.name}[j], (1.0$f - {literal(rate)}) * {text})"
        return f"{literal(rate)} * {old.name}[j] + {literal(1.0 - rate)} * {text}"

    @staticmethod
    def _at(block: int, letter: str) -> str:
        return f"{times(block, letter)} + j" if block else "j"

    def _fused(self, node: Node, block: int) -> tuple[str, int] | None:
        """Return a sum with a product as one operation, as in the kernel; None if it isn't one.

        Of two products it is the first, or the one without 1 - v.
        """
        products = [of for of in node.of if of.operation == "mul"]
        if not self.narrow or not products:
            return None
        direct = [of for of in products if all(factor.operation != "one_minus" for factor in of.of)]
        product = (direct or products)[0]
        (other,) = (of for of in node.of if of is not product)
        return f"fmaf({', '.join(self._text(of, block)[0] for of in (*product.of, other))})", ATOM

    def _text(self, node: Node, block: int = 0) -> tuple[str, int]:
        """Return the expression of unit j of a block of a value, and how tightly it binds."""
        if node in self.texts:
            return self.texts[node]
        letter = node.value.width[1]
        at = self._at(block, letter)
        if node in self.places:
            return f"{self.places[node]}[{at}]", ATOM
        operation, of, value = node.operation, node.of, node.value
        if operation == "state":
            return f"{value.name}[{at}]", ATOM
        if operation == "weight":
            row = value.part if isinstance(value.part, int) else 0
            block += row * value.width[0]
            return f"w->{value.name}[{self._at(block, letter)}]", ATOM
        if operation == "split":
            return self._text(of[0], value.part)  # type: ignore[arg-type]
        if operation == "scalar":
            return "x[w->inputs]", ATOM
        inner = [self._text(one, block) for one in of]
        if operation == "add":
            return self._fused(node, block) or (" + ".join(text for text, _ in inner), SUM)
        if operation == "mul":
            return " * ".join(text if binds >= FACTOR else f"({text})" for text, binds in inner), FACTOR
        if operation == "div":
            above, below = (
                text if binds >= low else f"({text})" for (text, binds), low in zip(inner, (FACTOR, ATOM), strict=True)
            )
            return f"{above} / {below}", FACTOR
        if operation == "sub":
            (above, _), (below, binds) = inner
            return f"{above} - {below if binds > SUM else f'({below})'}", SUM
        if operation == "maximum":
            return f"${{name}}_maximum({inner[0][0]}, {inner[1][0]})", ATOM
        if operation == "select":
            test, *either = (text for text, _ in inner)
            return f"({test} != 0.0$f ? {' : '.join([*either, '0.0$f'][:2])})", ATOM
        (text, binds), *_ = inner
        if operation == "exp":
            return f"exp$f({text})", ATOM
        if operation == "log_sigmoid":
            return f"-${{name}}_softplus(-{text if binds == ATOM else f'({text})'})", FACTOR
        if operation == "one_minus":
            return f"1.0$f - {text if binds > SUM else f'({text})'}", SUM
        if operation == "clip":
            return f"${{name}}_clip({text}, {literal(value.numbers[0])})", ATOM
        if operation == "activation":
            function = self.spec.activations[self.spec.slots.index(value.name)]
            return activate(function, text), binds if function.name == "linear" else ATOM
        if operation == "affine":
            factor, offset = value.numbers
            text = f"{literal(factor)} * {text if binds >= FACTOR else f'({text})'}"
            return (f"{text} + {literal(offset)}", SUM) if offset else (text, FACTOR)
        if operation != "record":
            raise ValueError(f"export_c: {self.spec.of_kind.title}: the operation {operation} isn't supported")
        return text, binds

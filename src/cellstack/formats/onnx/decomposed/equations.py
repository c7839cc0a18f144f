"""Recognises a step of a cell from its equations in a graph, from h backwards; z is any sum of products:

    RNN   h = act(z)
    GRU   h = Add(Mul(Sub(h_prev, n), act(z)), n), or Add(Mul(Sub(1, act(z)), n), Mul(act(z), h_prev));
          n = act(Add(z, Mul(act(z), z))), or act(z) of a z with a product of Mul(act(z), h_prev)
    LSTM  h = Mul(act(z), act(c));  c = Add(Mul(act(z), c_prev), Mul(act(z), act(z)))

Any gate may be clipped before its activation; an LSTM's forget gate may be Sub(1, i), and its c may be clipped, and
normalised before the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import activation_text
from cellstack.formats.onnx.file import DOMAINS, Scope
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.decomposed.linear import Linear, inputs_of, linear, pairs, scalar, unit

ORDER = {"lstm": "ifgo", "gru": "zrg", "rnn": "g"}


@dataclass(eq=False)
class Step:
    """One step of a cell.

    Args:
        kind: "lstm", "gru" or "rnn".
        node: the node that computes h.
        gates: the sum behind each gate; "h": the product of h, for a GRU that resets after it.
        activations: the activation of each gate, and of an LSTM's "cell".
        c: the names of an LSTM's c and c_prev.
        h: the name of the h that a GRU mixes its candidate with, "" where unknown.
        reset: the name of r·h, where a GRU multiplies r·h by a matrix.
        flags: the cell's flags that follow from the equations: clip, cell_clip, coupled, reset_after.
        paired: whether two constants in a sum of two products belong to one product each, in their order.
        cell_norm: gain and bias, by name, and epsilon of the normalisation of an LSTM's c before the output, if any.
    """

    kind: str
    node: Any
    gates: dict[str, Linear]
    activations: dict[str, str]
    c: tuple[str, str] = ("", "")
    h: str = ""
    reset: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    paired: bool = False
    cell_norm: tuple[str, str, float] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What all steps of a cell have in common."""
        gates = tuple((name, gate.key) for name, gate in sorted(self.gates.items()))
        return self.kind, tuple(sorted(self.activations.items())), gates, tuple(sorted(self.flags.items()))


# ── activations ───────────────────────────────────────────────────────────────────────────────────────────────────────


def activated(scope: Scope, name: str) -> tuple[str, str] | None:
    """Return the activation that computes a value, and the name of its input; None where it isn't one."""
    node = scope.producers.get(name)
    if node is None or not node.input or node.domain not in DOMAINS:
        return None
    text = activation_text(node, scope.model.attributes(node))
    return (text, node.input[0]) if text is not None else _composed(scope, name)


def _composed(scope: Scope, name: str) -> tuple[str, str] | None:
    """Return an activation that consists of several operators."""
    bounds = clipped(scope, name)
    if bounds is not None and bounds[1:] == (0.0, 1.0):
        inner = _affine(scope, bounds[0])
        return None if inner is None else (f"hard_sigmoid({inner[1]!r}, {inner[2]!r})", inner[0])
    affine = _affine(scope, name)
    if affine is not None:
        return f"affine({affine[1]!r}, {affine[2]!r})", affine[0]
    for inner, factor in pairs(scope, name, "Mul"):
        alpha, tanh = scalar(scope, factor), inputs_of(scope, inner, "Tanh")
        for value, slope in pairs(scope, tanh[0], "Mul") if tanh and alpha is not None else ():
            beta = scalar(scope, slope)
            if beta is not None:
                return f"scaled_tanh({alpha!r}, {beta!r})", value
    ends = inputs_of(scope, name, "Div")
    for one, magnitude in pairs(scope, ends[1], "Add") if len(ends) == 2 else ():
        if scalar(scope, one) == 1.0 and inputs_of(scope, magnitude, "Abs") == ends[:1]:
            return "softsign", ends[0]
    for relu, small in pairs(scope, name, "Add"):
        x = inputs_of(scope, relu, "Relu")
        if x and _softplus_tail(scope, small) == x[0]:
            return "softplus", x[0]
    return _by_sign(scope, name)


def _affine(scope: Scope, name: str) -> tuple[str, float, float] | None:
    for inner, added in pairs(scope, name, "Add"):
        beta = scalar(scope, added)
        for value, factor in pairs(scope, inner, "Mul") if beta is not None else ():
            alpha = scalar(scope, factor)
            if alpha is not None and beta is not None:
                return value, alpha, beta
    return None


def _softplus_tail(scope: Scope, name: str) -> str | None:
    """Return x of log(1 + exp(-|x|))."""
    log = inputs_of(scope, name, "Log")
    for exp, one in pairs(scope, log[0], "Add") if log else ():
        value = [exp]
        for operator in ("Exp", "Neg", "Abs"):
            value = inputs_of(scope, value[0], operator) if value else []
        if value and scalar(scope, one) == 1.0:
            return value[0]
    return None


def _by_sign(scope: Scope, name: str) -> tuple[str, str] | None:
    """Return an activation that is x above a bound, and another expression below it."""
    branches = inputs_of(scope, name, "Where")
    condition = inputs_of(scope, branches[0], "Greater") if len(branches) == 3 else []
    if len(condition) != 2 or condition[0] != branches[1]:
        return None
    x, bound, below = condition[0], scalar(scope, condition[1]), branches[2]
    if bound is not None and scalar(scope, below) == 0.0:
        return f"thresholded_relu({bound!r})", x
    for inner, factor in pairs(scope, below, "Mul") if bound == 0.0 else ():
        alpha = scalar(scope, factor)
        if alpha is not None and inner == x:
            return f"leaky_relu({alpha!r})", x
        difference = inputs_of(scope, inner, "Sub")
        exp = inputs_of(scope, difference[0], "Exp") if len(difference) == 2 else []
        least = list(pairs(scope, exp[0], "Min")) if exp and scalar(scope, difference[1]) == 1.0 else []
        if alpha is not None and any(one == x and scalar(scope, zero) == 0.0 for one, zero in least):
            return f"elu({alpha!r})", x
    return None


def clipped(scope: Scope, name: str) -> tuple[str, float, float] | None:
    """Return the input and the bounds of a clipped value; None where it isn't clipped."""
    found = inputs_of(scope, name, "Clip")
    bounds = [scalar(scope, one) for one in found[1:]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return found[0], bounds[0], bounds[1]


def within(scope: Scope, name: str) -> tuple[str, float | None]:
    """Return a value without its symmetric clipping, and the bound; None where it isn't clipped."""
    found = clipped(scope, name)
    return (name, None) if found is None or found[1] != -found[2] else (found[0], found[2])


# ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Gate:
    """A gate: its activation, the sum that is its input, and the clip bound of that sum."""

    text: str
    total: Linear
    clip: float | None


def gate_of(scope: Scope, name: str, linear_too: bool = False, rows: bool = False) -> Gate | None:
    """Return a value as a gate; None where it isn't one.

    Args:
        scope: the graph.
        name: the name of the value.
        linear_too: whether to accept a gate without an activation.
        rows: whether values are known to be rows of features, without time.
    """
    text, inner = activated(scope, name) or ("linear", name)
    if text == "linear" and not linear_too:
        return None
    inner, clip = within(scope, inner)
    total = linear(scope, inner, rows=rows)
    return Gate(text, total, clip) if total is not None and 1 <= len(total.products) <= 2 else None


def bare(scope: Scope, name: str) -> str:
    """Return a value's origin, skipping operators without effect."""
    seen = 0
    while seen < 100 and inputs_of(scope, name, "Identity"):
        name, seen = inputs_of(scope, name, "Identity")[0], seen + 1
    return name


class Matcher:
    """Recognises steps of cells in a graph.

    Args:
        scope: the graph.
        within_loop: whether the graph is one step of a loop: gates may then lack an activation.
        rows: whether values are known to be rows of features, without time.
    """

    def __init__(self, scope: Scope, within_loop: bool = False, rows: bool = False) -> None:
        self.scope, self.loop, self.rows = scope, within_loop, rows

    def gate(self, name: str) -> Gate | None:
        """Return a value as a gate."""
        return gate_of(self.scope, bare(self.scope, name) if self.loop else name, self.loop, self.rows)

    def lstm(self, node: Any) -> Step | None:
        """Return the LSTM step whose h a node computes."""
        scope = self.scope
        for out, wide in pairs(scope, node.output[0], "Mul"):
            text, inner = activated(scope, wide) or ("linear", bare(scope, wide))
            o = self.gate(out)
            if o is None or (text == "linear" and not self.loop):
                continue
            inner, norm = self._cell_norm(inner)
            total, cell_clip = within(scope, inner)
            for kept, new in pairs(scope, total, "Add"):
                for left, c_prev in pairs(scope, kept, "Mul"):
                    for first, second in pairs(scope, new, "Mul"):
                        step = self._lstm(node, (left, first, second), c_prev, o)
                        if step is not None:
                            step.activations["cell"], step.c, step.cell_norm = text, (inner, c_prev), norm
                            step.flags |= {} if cell_clip is None else {"cell_clip": cell_clip}
                            return step
        return None

    def _lstm(self, node: Any, names: tuple[str, str, str], c_prev: str, o: Gate) -> Step | None:
        left, first, second = names
        less = inputs_of(self.scope, left, "Sub")
        coupled = len(less) == 2 and less[1] == first and is_one(self.scope.constant(less[0]))
        f, i, g = None if coupled else self.gate(left), self.gate(first), self.gate(second)
        if i is None or g is None or (f is None and not coupled) or self.gate(c_prev) is not None:
            return None
        found = {"i": i, "g": g, "o": o} | ({} if f is None else {"f": f})
        if not coupled and i.text == "tanh" != g.text:  # a product doesn't say which factor is which
            return None
        if self.loop and g.total.peepholes:  # i has peepholes, g never does
            return None
        return self._step("lstm", node, found, {"coupled": True} if coupled else {})

    def _step(self, kind: str, node: Any, gates: dict[str, Gate], flags: dict[str, Any]) -> Step | None:
        clips = {gate.clip for gate in gates.values()}
        if len(clips) != 1:
            return None
        clip = clips.pop()
        flags = flags | ({} if clip is None else {"clip": clip})
        totals = {name: gate.total for name, gate in gates.items()}
        texts = {name: gate.text for name, gate in gates.items()}
        return Step(kind, node, totals, texts, flags=flags, paired=self.loop)

    def _cell_norm(self, name: str) -> tuple[str, tuple[str, str, float] | None]:
        """Return an LSTM's c without its normalisation, and the normalisation."""
        for scaled, bias in pairs(self.scope, name, "Add"):
            for normed, gain in pairs(self.scope, scaled, "Mul"):
                inside = unit(self.scope, normed)
                constant = all(isinstance(self.scope.constant(one), np.ndarray) for one in (gain, bias))
                if inside is not None and constant:
                    return inside[0], (gain, bias, inside[1])
        return name, None

    def gru(self, node: Any) -> Step | None:
        """Return the GRU step whose h a node computes."""
        scope = self.scope
        for mixed, rest in pairs(scope, node.output[0], "Add"):
            for left, right in pairs(scope, mixed, "Mul"):
                difference = inputs_of(scope, left, "Sub")
                if len(difference) != 2:
                    continue
                first, second = difference
                others = [other for factor, other in pairs(scope, rest, "Mul") if factor == second]
                if second == rest:
                    gate, new, h = right, rest, first  # (h_prev - n)·z + n
                elif is_one(scope.constant(first)) and others:
                    gate, new, h = second, right, others[0]  # (1 - z)·n + z·h_prev
                else:
                    continue
                z = self.gate(gate)
                step = None if z is None else self._gru(node, z, new)
                if step is not None:
                    step.h = h
                    return step
        return None

    def _gru(self, node: Any, z: Gate, new: str) -> Step | None:
        """Return a GRU's step from its candidate, act(x + r·h) or act(x + R·(r·h))."""
        scope = self.scope
        text, inner = activated(scope, new) or ("linear", bare(scope, new))
        if text == "linear" and not self.loop:
            return None
        inner, clip = within(scope, inner)
        for plain, reset in pairs(scope, inner, "Add"):
            x = linear(scope, plain)
            for first, second in pairs(scope, reset, "Mul"):
                r, h = self.gate(first), linear(scope, second)
                if x and h and r and len(x.products) == len(h.products) == 1 and not (x.peepholes or h.peepholes):
                    gates = {"z": z, "r": r, "g": Gate(text, x, clip)}
                    step = self._step("gru", node, gates, {"reset_after": True})
                    if step is not None:
                        step.gates["h"] = h
                        return step
        total = linear(scope, inner) if self.loop else None
        for term in total.products if total is not None else ():
            for first, _ in pairs(scope, term.value, "Mul"):
                r = self.gate(first)
                if r is not None and total is not None:
                    gates = {"z": z, "r": r, "g": Gate(text, total, clip)}
                    step = self._step("gru", node, gates, {"reset_after": False})
                    if step is not None:
                        step.reset = term.value
                        return step
        return None

    def rnn(self, node: Any) -> Step | None:
        """Return the simple RNN step whose h a node computes."""
        found = self.gate(node.output[0])
        if found is None or len(found.total.products) != 2 or found.total.peepholes:
            return None
        return self._step("rnn", node, {"g": found}, {})


def steps_of(scope: Scope, rows: bool = False) -> Iterator[Step]:
    """Yield the decomposed steps of cells in a graph; `rows`: as in `Matcher`."""
    match = Matcher(scope, rows=rows)
    by_operator = {"Mul": match.lstm, "Add": match.gru}
    for node in scope.graph.node:
        if node.domain in DOMAINS and node.output:
            matcher = by_operator.get(node.op_type)
            single = activation_text(node, scope.model.attributes(node)) if matcher is None else None
            step = matcher(node) if matcher is not None else match.rnn(node) if single is not None else None
            if step is not None:
                yield step


def is_zero(scope: Scope, name: str) -> bool:
    """Whether a value is all zeros."""
    array = numbers(scope.constant(name))
    return isinstance(array, np.ndarray) and not array.any()


def is_one(value: Any) -> bool:
    """Whether a constant is all ones."""
    array = numbers(value)
    return isinstance(array, np.ndarray) and array.size > 0 and bool((array == 1).all())

"""Rolls up loops that an exporter unrolled: the steps of a cell become one recurrent operator of the graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import Operator, operator_of
from cellstack.formats.onnx.decomposed.chains import Chain, find_chains
from cellstack.formats.onnx.decomposed.found import find_steps
from cellstack.formats.onnx.decomposed.linear import Place, axes_in, place_of, sequence_of
from cellstack.formats.onnx.decomposed.match import cell_of
from cellstack.formats.onnx.decomposed.rows import Added, Loop
from cellstack.formats.onnx.decomposed.sums import stripped
from cellstack.formats.onnx.file import Model, Scope, live_nodes
from cellstack.formats.onnx.fold import Broadcast, numbers
from cellstack.nodes.cell_arrays import Cell


class _Roller(Added):
    """Writes one chain as an operator, and the chain's values as selections from its output.

    Args:
        scope: the graph.
        chain: the steps.
        number: the index of the chain, for unique names.
        loop: the operators over all steps; the chain's steps are added to its known steps.
        joins: the Concats of the graph, by the first value that they join.
    """

    def __init__(self, scope: Scope, chain: Chain, number: int | str, loop: Loop, joins: dict[str, list[Any]]) -> None:
        super().__init__(scope, f"rolled {number} ")
        self.chain, self.number, self.loop, self.known, self.joins = chain, number, loop, loop.known, joins
        self.rolled: dict[str, Operator] = {}  # by the names of their Y
        self.replaced: dict[int, Any] = {}  # other nodes of the graph that change, by id

    def roll(self) -> bool:
        """Add the operator, and return whether that was possible."""
        chain, scope = self.chain, self.scope
        taken = self._taken()
        if taken is None:
            return False
        x, backwards = taken
        deep = self._is_deep()
        starts = [self._start(name, deep) for name in chain.starts]
        if None in starts:
            return False
        cell = cell_of(scope, chain.steps[-1], {})
        names = self._operator(cell, x, starts, "reverse" if backwards else "forward")
        y = self.squeezed(names[0], 1)
        self._outputs(y, names, deep, backwards)
        return True

    def _taken(self) -> tuple[str, bool] | None:
        """Return the name of the sequence that the steps run over, and whether backward; None where there is none."""
        terms = [step.x for step in self.chain.steps]
        found = sequence_of([place_of(self.scope, term, self.known) for term in terms])
        if found is None:
            taken = None if any(term.moves for term in terms) else self.loop.taken([term.value for term in terms])
            return None if taken is None else (self.put("Transpose", [taken.name], perm=[1, 0, 2]), taken.backwards)
        x, axis, backwards, last = found
        if self.loop.ranks.get(x) == 2:  # one number per step
            x = self.loop.squeezed(x, 2, "Unsqueeze")
        x = self.put("Transpose", [x], perm=[1, 0, 2]) if axis else x
        if not self.loop.whole:  # only the steps that the file unrolls
            x = self.sliced(x, 0, -len(terms) if last else 0, 2**63 - 1 if last else len(terms))
        return x, backwards

    def roll_step(self, starts: Sequence[str]) -> None:
        """Add the operator for a chain of one step on rows `[B, F]`, with an internal time axis of length 1.

        Args:
            starts: the names of the states before the step.
        """
        chain = self.chain
        cell = cell_of(self.scope, chain.steps[0], {})
        x = self.squeezed(chain.steps[0].x.value, 0, operator="Unsqueeze")
        names = self._operator(cell, x, [self._start(name, False) for name in starts], "forward")
        self._ends(names, False)

    def roll_apart(self) -> dict[str, list[Any]]:
        """Return one operator per step, `{name: nodes}`, to insert before the node that computes the name."""
        chain, before = self.chain, dict[str, list[Any]]()
        if self._is_deep():
            return before
        if any(step.x.moves for step in chain.steps):
            return {}
        starts = chain.starts
        for n, step in enumerate(chain.steps):
            roller = _Roller(self.scope, Chain([step], chain.name), f"{self.number} {n}", self.loop, {})
            ends = [*step.after.values()]
            roller.roll_step(starts)
            self.constants += roller.constants
            self.rolled |= roller.rolled
            self.replaced |= roller.replaced
            before[ends[-1]] = roller.made
            starts = ends
        return before

    def _operator(self, cell: Cell, x: str, starts: list[str | None], direction: str) -> list[str]:
        """Add a cell as an operator on `x [T, B, I]`, and return the names of its outputs: Y and the states."""
        names = [f"{self.prefix}{part}" for part in ("Y", *cell.spec.state_sizes)]
        inputs = [x, "", "", "", "", *(name or "" for name in starts)]
        self.add(self.onnx.helper.make_node(operator_of(cell.spec), inputs, names, name=self.chain.name))
        initial = zip(cell.spec.state_sizes, starts, strict=True)
        started = {f"initial_{state}": name for state, name in initial if name}
        self.rolled[names[0]] = Operator((cell,), direction, False, "", started)
        return names

    def _is_deep(self) -> bool:
        """Whether each h is `[1, B, H]`, and not `[B, H]`."""
        node = self.scope.producers.get(self.chain.starts[0])
        if node is not None and node.op_type == "Unsqueeze":
            return True
        constant = self.scope.constant(self.chain.folded or self.chain.starts[0])
        array = constant.array if isinstance(constant, Broadcast) and constant.ranked else constant
        return isinstance(array, np.ndarray) and array.ndim == 3

    def _start(self, name: str, deep: bool) -> str | None:
        """Return the name of an initial state, "" for zeros; None where it can't be one."""
        constant = self.scope.constant(name)
        if not name:
            return ""
        if constant is not None:
            array = numbers(constant)
            return None if array.any() else ""
        return name if deep else self.squeezed(name, 0, operator="Unsqueeze")

    def _outputs(self, y: str, names: list[str], deep: bool, backwards: bool) -> None:
        """Add the replacements of each step's h, of the last c, and of the values that join all steps."""
        steps = self.chain.steps
        h = [step.node.output[0] for step in steps]
        self._ends(names, deep)
        self.known.update((name, Place(y, 0, len(h) - 1 - n if backwards else n)) for n, name in enumerate(h))
        for n, name in enumerate(h[:-1]):
            at = len(h) - 1 - n if backwards else n
            if deep:
                self.sliced(y, 0, at, at + 1, output=name)
            else:
                self.put("Gather", [y, self.constant(at)], name, axis=0)
        in_order = h[::-1] if backwards else h
        for node in (*self.joins.get(h[0], ()), *self.joins.get(h[-1], ())):
            if len(node.input) == len(h) and id(node) not in self.replaced:
                self._join(node, in_order, y, deep)
        for step in steps[:-1]:
            self._set_aside(step.node)

    def _set_aside(self, node: Any) -> None:
        """Give the first output of a node another name: a new node computes the value."""
        moved = copy.deepcopy(node)
        moved.output[0] = f"{self.prefix}was {node.output[0]}"
        self.replaced[id(node)] = moved

    def _ends(self, names: list[str], deep: bool) -> None:
        """Add the replacements of the final states."""
        last = self.chain.steps[-1]
        for name, old in zip(names[1:], last.after.values(), strict=True):
            self._set_aside(self.scope.producers[old])
            self.put("Identity", [name], old) if deep else self.squeezed(name, 0, output=old)

    def _join(self, node: Any, in_order: list[str], y: str, deep: bool) -> None:
        """Replace a Concat of every step's h by the operator's output."""
        axis, names = self.scope.model.attributes(node).get("axis"), list(node.input)
        if not deep:
            inner = [self.scope.producers.get(name) for name in names]
            if any(one is None or one.op_type != "Unsqueeze" for one in inner):
                return
            if any(axes_in(self.scope, one) != [axis] for one in inner):
                return
            names = [one.input[0] for one in inner if one is not None]
        if axis not in ((0,) if deep else (0, 1)) or names not in (in_order, in_order[::-1]):
            return
        source = y if names == in_order else self.sliced(y, 0, -1, -(2**63), -1)
        operator = self.onnx.helper.make_node("Identity", [source], list(node.output), name=node.name)
        if axis == 1:
            operator = self.onnx.helper.make_node(
                "Transpose", [source], list(node.output), name=node.name, perm=[1, 0, 2]
            )
        self.replaced[id(node)] = operator
        self.scope.producers.update(dict.fromkeys(operator.output, operator))


def roll(model: Model, whole: bool = False) -> Model:
    """Return a model in which recurrent operators replace the unrolled steps of cells in the outermost graph.

    Other uses of a step's h select it from the operator's output; operators that the loop repeats at every step are
    applied to all steps at once. Steps that don't run over one sequence from one end to the other, or don't start from
    zeros or an input, become operators of one step each.

    Args:
        model: the file.
        whole: whether loops run over all steps of a sequence; else over as many as the graph unrolls.
    """
    scope = model.scope()
    chains = find_chains(scope)
    if not chains:
        return model
    loop = Loop(scope, {}, whole)
    joins: dict[str, list[Any]] = {}
    concats = [node for node in scope.graph.node if node.op_type == "Concat" and node.input]
    for node in concats:
        joins.setdefault(stripped(scope, node.input[0]), []).append(node)
    before: dict[str, list[Any]] = {}  # new nodes, by the name of the value before which they go
    replaced: dict[int, Any] = {}
    rolled, unrolled, constants, lost = dict(model.rolled), dict(model.unrolled), list[Any](), list[str]()
    for number, chain in enumerate(chains):
        roller = _Roller(scope, chain, number, loop, joins)
        try:
            h = chain.steps[0].node.output[0]
            whole_chain = roller.roll()
            new = {h: roller.made} if whole_chain else roller.roll_apart()
        except ValueError:  # weights that don't form a cell: reading the graph reports the operators
            continue
        if new and not whole_chain:
            unrolled[chain.name] = len(chain.steps), _why_apart(scope, chain, h)
        before |= new
        rolled |= roller.rolled
        replaced |= roller.replaced
        constants += roller.constants
    for node in concats if loop.known else ():
        several = len(node.input) > 1 and id(node) not in replaced
        name = loop.joined(list(node.input), model.attributes(node).get("axis", 0)) if several else None
        if name is not None:
            replaced[id(node)] = loop.onnx.helper.make_node("Identity", [name], list(node.output), name=node.name)
    nodes = _placed(scope, before, replaced, loop.made)
    model = model.changed(nodes, (*constants, *loop.constants), rolled=rolled, unrolled=unrolled)
    if before:
        scope = model.scope()
        live = live_nodes(scope)
        for chain in chains:
            for state in [*chain.steps[0].after][1:] if chain.name not in unrolled else ():
                inner = [scope.producers.get(step.after[state]) for step in chain.steps[:-1]]
                if any(node is not None and id(node) in live for node in inner):
                    lost.append(f"the loop over {chain.name} uses {state} of every step; a Network has only the last")
    return replace(model, lost=(*model.lost, *lost)) if lost else model


def _why_apart(scope: Scope, chain: Chain, h: str) -> str:
    """Explain why a chain's steps don't run over one sequence; `h`: the name of the first step's h."""
    waiting, seen = [chain.steps[1].x.value], set[str]()
    while waiting:
        name = waiting.pop()
        if name == h:
            return "feeds its output back as its input"
        node = scope.producers.get(name)
        if node is not None and name not in seen:
            waiting += [one for one in node.input if one]
        seen.add(name)
    return "uses values that are the same at every step, or out of order"


def roll_steps(model: Model) -> Model:
    """Return a model in which recurrent operators replace the decomposed single steps of the outermost graph."""
    scope = model.scope()
    before, replaced, constants = dict[str, list[Any]](), dict[int, Any](), list[Any]()
    rolled = dict(model.rolled)
    for number, (name, _, step) in enumerate(list(find_steps(scope, set())), len(model.rolled)):
        roller = _Roller(scope, Chain([step], name), number, Loop(scope, {}, False), {})
        roller.roll_step([*step.before.values()])
        before[[*step.after.values()][-1]] = roller.made  # may be used before h is computed
        rolled |= roller.rolled
        replaced |= roller.replaced
        constants += roller.constants
    return model.changed(_placed(scope, before, replaced), constants, rolled=rolled) if before else model


def _placed(
    scope: Scope, before: dict[str, list[Any]], replaced: dict[int, Any], more: Sequence[Any] = ()
) -> list[Any]:
    """Return the nodes of a graph with others among them.

    Args:
        scope: the scope of the graph.
        before: lists of nodes, each inserted before the node that computes the value named by its key.
        replaced: nodes that take the place of others, by the id of those.
        more: nodes that are inserted before the first use of their outputs.
    """
    nodes = [new for node in scope.graph.node for new in (*_ahead(before, node), replaced.get(id(node), node))]
    return _in_order(nodes, more)


def _in_order(nodes: list[Any], more: Sequence[Any]) -> list[Any]:
    """Return all nodes in topological order."""
    if not more:
        return nodes
    makers = {name: node for node in (*nodes, *more) for name in node.output if name}
    done, placed = set[int](), list[Any]()
    for node in nodes:
        waiting = [node]
        while waiting:
            top = waiting[-1]
            lacking = [makers[name] for name in top.input if name in makers and id(makers[name]) not in done]
            if id(top) in done or not lacking:
                waiting.pop()
                placed += [] if id(top) in done else [top]
                done.add(id(top))
            else:
                waiting += lacking
    return placed


def _ahead(before: dict[str, list[Any]], node: Any) -> list[Any]:
    return next((before[name] for name in node.output if name in before), [])

"""Rolls up loops over time that `torch.export` unrolls, for any step and any length.

`torch.export` runs a module's code, in which `for t in range(x.shape[1])` has as many steps as the example. In the
order in which it ran, the graph has the operators of the first step, then the same of the second, and so on: a sequence
of operators that repeats itself. Such a sequence is a loop if each argument of each operator is, in step k,

- what the operator at the same place of this step or of the step before returned: of the latter, a state, which starts
  from another value in the first step;
- the same as in all other steps, such as a weight;
- entry `a k + b` of an axis of another tensor, such as `x[:, k]`.

Then `scan` takes its place: the entries become the sequences that it runs over, its outputs are the values of all
steps, and `stack` or `cat` of them these sequences. For 3 steps of `h = tanh(w(x[:, t]) + h)` and `stack(all h, 1)`:

    a0 = x[:, 0]; b0 = w(a0); c0 = b0 + h; h0 = tanh(c0)    final, all = scan(step, h, x.movedim(1, 0))
    a1 = x[:, 1]; b1 = w(a1); c1 = b1 + h0; h1 = tanh(c1)   where step(h, a) is b = w(a); c = b + h; h = tanh(c)
    a2 = x[:, 2]; b2 = w(a2); c2 = b2 + h1; h2 = tanh(c2)
    y = stack([h0, h1, h2], 1)                              y = all.movedim(0, 1)

The code fixes the length in other places too, which `open_lengths` opens. `compile` compares the result with the module
at other lengths.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from cellstack.capture.axes import Axes, resized
from cellstack.capture.corrections import as_entry
from cellstack.capture.open_lengths import SCAN, SIZE, open_lengths
from cellstack.cells.errors import FormatError

ATEN = torch.ops.aten
SELECT, SLICE, STACK, CAT = ATEN.select.int, ATEN.slice.Tensor, ATEN.stack.default, ATEN.cat.default
JOINS = {ATEN.concat.default: None, ATEN.concatenate.default: None, ATEN.hstack.default: 1, ATEN.vstack.default: 0}
SCATTER = ATEN.select_scatter.default
LEAST, SHORT = 3, 5  # steps of a loop; the length of the example along axes whose length became fixed
WHOLE = (0, 2**63 - 1), (0, None), (None, None)  # the bounds of slices


def rolled(record: Callable[[Any], Any], given: Sequence[Any], axes: Sequence[Axes]) -> tuple[Any, Sequence[Any]]:
    """Return a module with loops in the place of their steps, and an example of its inputs.

    Args:
        record: returns what `torch.export` records of the module for inputs.
        given: its inputs.
        axes: the axes of the inputs that may change, in groups that change together.

    Raises:
        FormatError: it has no loop, or its operators aren't the same at another length.
    """
    short = list(given)
    for number, group in enumerate(axes):  # other lengths for each, or else a number may come from two of them
        n, axis, unit = min(group)
        short = resized(short, group, min(SHORT + number - given[n].shape[axis] // unit, 0))
    try:
        given, program = short, record(tuple(short))
    except Exception:  # the code may need a longer example
        given = list(given)
        program = record(tuple(given))
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    # A loop over the steps of one input fixes its length, but not that of an input of which it only takes entries.
    fixed = [group for group in axes if any(str(inputs[n].meta["val"].shape[axis]).isdigit() for n, axis, _ in group)]
    places = [min(group) for group in fixed]
    lengths = [given[n].shape[axis] // unit for n, axis, unit in places]
    programs = [program]

    def opened(decomposed: bool) -> GraphModule:
        made = _plain(program, decomposed)
        if not _roll(made):
            raise FormatError("no operators are repeated for each step of a sequence")
        if len(programs) == 1:
            programs.extend(record(tuple(resized(given, group, 1))) for group in fixed)
        others = [_plain(one, decomposed) for one in programs[1:]]
        for other in others:
            _roll(other)
        open_lengths([made, *others], places, lengths)
        return made

    try:
        made = opened(False)
    except FormatError:  # an operator that consists of others, such as narrow or chunk, may be a part of a loop
        made = opened(True)
    for node in made.graph.find_nodes(op="call_function", target=SCAN):  # whose tensors mustn't share their memory
        with made.graph.inserting_before(node):
            node.args = node.args[0], *([_copy(made.graph, one) for one in group] for group in node.args[1:])
    made.recompile()
    return made, given


def _plain(program: Any, decomposed: bool) -> GraphModule:
    """Return a graph without operators that change tensors in place, and with each entry of a list as an operator.

    Args:
        program: what `torch.export` recorded.
        decomposed: whether operators that consist of others become these, which takes longer than `torch.export`.
    """
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    if decomposed or any(program.graph_module.children()) or any(one and one.is_mutable for one in schemas):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns about its own code
            program = program.run_decompositions({})
    made = program.module(check_guards=False)
    graph = made.graph
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            as_entry(graph, node)
        elif node.target in JOINS:
            _as_cat(node)
        elif node.target is ATEN._assert_scalar.default:  # that a branch is the example's
            graph.erase_node(node)
        elif (same := _same_value(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is SCATTER and all(user.target is not SCATTER for user in node.users):
            _as_stack(graph, node)
    graph.eliminate_dead_code()
    known: dict[Any, Node] = {}
    for node in graph.find_nodes(op="get_attr"):  # each step may have its own copy of a constant
        value = operator.attrgetter(str(node.target))(made)
        if isinstance(value, torch.Tensor):
            key = value.dtype, value.shape, hash(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
            node.meta["constant"] = key
            node.replace_all_uses_with(known.setdefault(key, node))
    last = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")][-1]
    for node in graph.find_nodes(op="call_function", target=SIZE):  # which only the first step would compute
        if node.args[0].op == "placeholder":
            last.append(node)
    graph.eliminate_dead_code()
    return made


def _same_value(node: Any) -> Any:
    """Return the tensor that an operator returns as it is; None if it doesn't."""
    if node.target is SLICE and (*node.args, None, None)[2:4] in WHOLE and len(node.args) < 5:
        return node.args[0]
    if node.target is ATEN.slice_scatter.default and (*node.args, None, None)[3:5] in WHOLE and len(node.args) < 6:
        return node.args[1]
    if node.target is ATEN.copy.default:
        old, new = (one.meta["val"] for one in node.args[:2])
        return node.args[1] if (old.shape, old.dtype) == (new.shape, new.dtype) else None
    if node.target is not SELECT or node.args[0].target is not SCATTER:
        return None
    x, axis, n = node.args
    while x.target is SCATTER and x.args[2:] != (axis, n):
        if x.args[2] != axis:
            return None
        x = x.args[0]
    if x.target is SCATTER:
        return x.args[1]
    node.args = x, axis, n
    return None


def _as_cat(node: Any) -> None:
    """Make another operator that joins tensors a `cat`, or a `stack`."""
    axis, vectors = JOINS[node.target], node.args[0][0].meta["val"].ndim == 1
    node.target = STACK if axis == 0 and vectors else CAT
    node.args = node.args if axis is None else (node.args[0], 0 if vectors else axis)


def _as_stack(graph: Graph, node: Any) -> None:
    """Make a tensor into whose entries along an axis others were written a `stack`."""
    x, _, axis, _ = node.args
    size = str(x.meta["val"].shape[axis])
    parts, last = dict[Any, Any](), node
    while node.target is SCATTER and node.args[2] == axis:
        parts.setdefault(node.args[3], node.args[1])
        node = node.args[0]
    if not size.isdigit() or len(parts) < LEAST or not parts.keys() <= set(range(int(size))):
        return
    with graph.inserting_before(last):
        every = [parts[n] if n in parts else _add(graph, SELECT, node, axis, n) for n in range(int(size))]
        last.replace_all_uses_with(_add(graph, STACK, every, axis))


# ── Loops ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Taken(NamedTuple):
    """The entries that the steps take: `step * k + first` of an axis of `x`."""

    x: Node
    axis: int
    first: int
    step: int
    width: int  # of a slice; 0: a select


class Place(NamedTuple):
    """What an operator of the same step returns."""

    place: int


class State(NamedTuple):
    """What an operator returned, or another state was, in the step before."""

    source: Any  # a Place or State
    start: Node  # in the first step


def _roll(made: GraphModule) -> int:
    """Put loops in the place of their steps; return their number."""
    count, failed = 0, set[tuple[Node, int, int]]()
    while True:
        nodes = [node for node in made.graph.nodes if node.op == "call_function"]
        for start, period, steps in _repeated(nodes):
            key = nodes[start], period, steps
            if key in failed:
                continue
            failed.add(key)
            every = [nodes[start + k * period : start + (k + 1) * period] for k in range(steps)]
            partly = _needed(nodes[start + period * steps :], every[0])
            loops = (_Loop(made, one) for one in (([*every, partly], every) if any(partly) else (every,)))
            if (loop := next((one for one in loops if one.read()), None)) is not None:
                loop.write(count)
                break
        else:
            break
        count += 1
        failed.clear()
        _join(made.graph)
        made.graph.eliminate_dead_code()
    return count


def _repeated(nodes: Sequence[Node]) -> Iterator[tuple[int, int, int]]:
    """Yield the start, the length and the number of repeated sequences of operators, the longest first."""
    known: dict[Any, int] = {}
    kinds = np.array([known.setdefault(_kind(node), len(known)) for node in nodes])
    found = []
    for period in range(1, len(kinds) // LEAST + 1):
        same = np.concatenate([[False], kinds[:-period] == kinds[period:], [False]])
        starts, ends = (np.flatnonzero(same[:-1] < same[1:]), np.flatnonzero(same[:-1] > same[1:]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            steps, over = divmod(end - start + period, period)
            found += [(start + n, period, steps) for n in range(over + 1) if steps >= LEAST]
            found += [(start + n + period, period, steps - 1) for n in range(over + 1) if steps > LEAST]
    yield from sorted(found, key=lambda one: (-one[1] * one[2], one[1], one[0]))


def _needed(nodes: Sequence[Node], step: Sequence[Node]) -> list[Node | None]:
    """Return the operators of a last step, of which the graph has only those that the outputs need; None for others."""
    made, n = list[Node | None](), 0
    for one in step:
        same = n < len(nodes) and _kind(nodes[n]) == _kind(one)
        made.append(nodes[n] if same else None)
        n += same
    return made


def _kind(node: Node) -> Any:
    """Return what an operator has in common with that of another step: all but its tensors and numbers."""
    leaves, structure = tree_flatten((node.args, node.kwargs))
    sort = [Node if isinstance(one, Node) else int if type(one) is int else repr(one) for one in leaves]
    return node.target, str(structure), *sort, *_shape(node)


def _shape(node: Node) -> tuple[str, Any]:
    """Return the shape and the dtype of what an operator returns; sizes that depend on values are alike."""
    value = node.meta.get("val")
    return re.sub(r"\bu\d+", "u", str(getattr(value, "shape", ""))), getattr(value, "dtype", None)


class _Loop:
    """A sequence of operators that is repeated.

    Args:
        made: the graph.
        steps: the operators of each step; None in the last one for those that aren't needed.
    """

    def __init__(self, made: GraphModule, steps: Sequence[Sequence[Any]]) -> None:
        self.made, self.steps = made, steps
        self.at = {node: (k, place) for k, step in enumerate(steps) for place, node in enumerate(step) if node}
        self.given: list[list[Any]] = []  # the arguments of each operator
        self.entries: dict[int, Taken] = {}  # by place, what a `select` or `slice` takes
        self.fixed: set[int] = set()  # places of operators that compute the same in every step

    def read(self) -> bool:
        """Read the steps; return whether they are a loop."""
        for place, column in enumerate(zip(*self.steps, strict=True)):
            nodes = [node for node in column if node]
            every = [tree_flatten((node.args, node.kwargs))[0] for node in nodes]
            entry = self._taken(nodes)
            own = [] if entry else [self._argument(list(leaves)) for leaves in zip(*every, strict=True)]
            if None in own:
                return False
            self.given.append([one[0] if type(one) is tuple else one for one in own])
            if entry:
                self.entries[place] = entry
                continue
            if all(type(one) is tuple or (isinstance(one, Place) and one.place in self.fixed) for one in own):
                self.fixed.add(place)
        return len(self.given) > len(self.entries) + len(self.fixed)

    def _argument(self, values: list[Any]) -> Any:
        """Return what an argument is in each step; `(value,)` if it is the same; None if it is nothing that repeats."""
        if not isinstance(values[0], Node):
            return (values[0],) if all(one == values[0] for one in values) else None
        places = [self.at.get(one) for one in values]
        last = places[-1]
        if last is None:
            same = all(one is values[0] for one in values)
            return (values[0],) if same else self._taken(values) if not any(places) else None
        own, delay, made = [(k, last[1]) for k in range(len(places))], places.count(None), Place(last[1])
        for start in reversed(values[:delay]):
            made = State(made, start)
        if any(_shape(one) != _shape(values[-1]) for one in values):  # a first step may use a start for all rows
            return None
        return made if places == [None] * delay + own[: len(own) - delay] else None

    def _taken(self, nodes: Sequence[Any]) -> Taken | None:
        """Return the entries of one tensor that selects or slices take; None for others."""
        if nodes[0].target not in (SELECT, SLICE) or any(node.target is not nodes[0].target for node in nodes):
            return None
        every = [node.args for node in nodes]
        xs = [self.at.get(args[0], args[0]) for args in every]
        if isinstance(xs[0], tuple):
            fixed = xs[0][1] in self.fixed and all(one == (k, xs[0][1]) for k, one in enumerate(xs))
        else:
            fixed = all(one is xs[0] for one in xs)
        x: Any = every[0][0]
        axis = (*every[0], 0)[1]
        if not fixed or any(len(args) not in (3, 4) or args[1] != axis for args in every):
            return None
        axis, size = axis % x.meta["val"].ndim, _length(x.meta["val"].shape[axis])
        if size is None or any(type(one) is not int for args in every for one in args[2:]):
            return None
        first, ends = ([min(args[n] + size * (args[n] < 0), size) for args in every] for n in (2, len(every[0]) - 1))
        step, widths = first[1] - first[0], {end - one for one, end in zip(first, ends, strict=True)}
        if not step or len(widths) > 1 or first != [first[0] + k * step for k in range(len(first))]:
            return None
        last, width = first[0] + step * (len(self.steps) - 1), widths.pop()
        return Taken(x, axis, first[0], step, width) if 0 <= last <= size - max(width, 1) else None

    def write(self, number: int) -> None:
        """Put `scan` in the place of the steps."""
        graph, first, last = self.made.graph, self.steps[0][0], len(self.steps) - 1
        body, old = Graph(), self.steps[0]
        groups: list[dict[Any, Node]] = [{}, {}, {}]  # states, taken entries and other values in the body, by the same
        outer: dict[Node, Node] = {}  # copies of the operators that compute the same in every step

        def add(target: Any, *args: Any) -> Node:
            with graph.inserting_before(first):
                return _add(graph, target, *args)

        def inner(group: int, key: Any) -> Node:
            if key not in groups[group]:
                groups[group][key] = body.placeholder(f"{'sxw'[group]}_{len(groups[group])}")
            return groups[group][key]

        def inside(one: Any) -> Any:
            if isinstance(one, Place) and one.place in self.fixed:
                return inner(2, outer[self.steps[0][one.place]])
            if isinstance(one, Place):
                return values[one.place]
            if isinstance(one, State):
                return inner(0, one)
            if isinstance(one, Taken):
                return inner(1, one)
            return inner(2, one) if isinstance(one, Node) else one

        values: dict[int, Node] = {}
        for place, (node, given) in enumerate(zip(self.steps[0], self.given, strict=True)):
            if place in self.fixed:
                with graph.inserting_before(first):
                    outer[node] = graph.node_copy(node, lambda one: outer.get(one, one))
            elif place in self.entries:
                values[place] = inside(self.entries[place])
            else:
                _, structure = tree_flatten((node.args, node.kwargs))
                args, kwargs = tree_unflatten([inside(one) for one in given], structure)
                values[place] = body.call_function(node.target, args, kwargs)
        used = dict[int, list[int]]()  # by place, the steps whose value is used elsewhere
        for node, (k, place) in self.at.items():
            if place not in self.fixed and any(user not in self.at for user in node.users):
                used.setdefault(place, []).append(k)
        results, n = list[Node](), 0
        while n < len(groups[0]):  # a state may have another state as its source
            results.append(inside([*groups[0]][n].source))
            n += 1
        if not groups[1]:
            inner(1, None)
        states, taken, others = (list(group) for group in groups)
        ended = {state.source.place: n for n, state in enumerate(states) if isinstance(state.source, Place)}
        every = [place for place, ks in used.items() if ks != [last] or place not in ended]
        results += [values[place] for place in every]
        body.output(tuple(body.call_function(ATEN.clone.default, (one,)) for one in results))
        for node in reversed([one for group in groups for one in group.values()]):
            next(iter(body.nodes)).prepend(node)
        name = f"loop_{number}"
        setattr(self.made, name, GraphModule({}, body))
        sequences = [
            _sequence(add, one._replace(x=outer.get(one.x, one.x)), last + 1)
            if one
            else add(ATEN.new_zeros.default, states[0].start, [last + 1])  # which only has as many entries as steps
            for one in taken
        ]
        with graph.inserting_before(first):
            step = graph.get_attr(name)
            node = graph.call_function(SCAN, (step, [one.start for one in states], sequences, tuple(others)))
        made = (old[place].meta["val"] for place in every)
        node.meta["val"] = [one.start.meta["val"] for one in states]
        node.meta["val"] += [one.unsqueeze(0).expand(last + 1, *one.shape) for one in made]
        ends = [add(operator.getitem, node, n) for n in range(len(results))]
        for place, ks in used.items():
            for k in ks:
                n = len(states) + every.index(place) if place in every else ended[place]
                made = add(SELECT, ends[n], 0, k) if place in every else ends[n]
                self.steps[k][place].replace_all_uses_with(made, lambda user: user not in self.at)
        for place in self.fixed:
            for node in filter(None, (step[place] for step in self.steps)):
                node.replace_all_uses_with(outer[self.steps[0][place]])
        for node in reversed(list(self.at)):
            graph.erase_node(node)


def _length(size: Any) -> int | None:
    """Return the length of an axis in the example; None if it depends on values."""
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else None


def _copy(graph: Graph, one: Node) -> Node:
    """Return a copy of a tensor; of a number, the number."""
    return graph.call_function(ATEN.clone.default, (one,)) if isinstance(one.meta.get("val"), torch.Tensor) else one


def _add(graph: Graph, target: Any, *args: Any) -> Node:
    """Add an operator with its example value."""
    node = graph.call_function(target, args)
    leaves, structure = tree_flatten(args)
    given = [one.meta["val"] if isinstance(one, Node) else one for one in leaves]
    node.meta["val"] = target(*tree_unflatten(given, structure))
    return node


def _sequence(add: Callable[..., Node], taken: Taken, steps: int) -> Node:
    """Return the entries of all steps, the steps as the first axis."""
    x, axis, first, step, width = taken
    value = x.meta["val"]
    if width > 1:
        x = add(ATEN.unfold.default, x, axis, width, 1)  # the windows have their entries along a last axis
        value = x.meta["val"]
    last = first + step * (steps - 1)
    if (min(first, last), max(first, last) + 1, abs(step)) != (0, _length(value.shape[axis]), 1):
        x = add(SLICE, x, axis, min(first, last), max(first, last) + 1, abs(step))
    if step < 0:
        x = add(ATEN.flip.default, x, [axis])
    if axis:
        x = add(ATEN.permute.default, x, [axis, *(n for n in range(value.ndim) if n != axis)])
    if width == 1:
        return add(ATEN.unsqueeze.default, x, axis + 1)
    if width > 1:
        return add(ATEN.permute.default, x, _moved(value.ndim, value.ndim - 1, axis + 1))
    return x


def _moved(rank: int, axis: int, to: int) -> list[int]:
    """Return the order of axes in which one is at another place."""
    order = [n for n in range(rank) if n != axis]
    return [*order[:to], axis, *order[to:]]


def _join(graph: Graph) -> None:
    """Put sequences in the place of a `stack` or `cat` of their entries."""
    for node in list(graph.nodes):
        if node.target not in (STACK, CAT):
            continue
        parts, axis = list(node.args[0]), (*node.args, 0)[1]
        axis %= node.meta["val"].ndim
        pieces, k = list[tuple[Any, int, int]](), 0
        while k < len(parts):
            count, step = _run(parts[k:])
            pieces.append((parts[k], count, step))
            k += count
        if max(count for _, count, _ in pieces) < LEAST:
            continue
        with graph.inserting_before(node):
            made = [_piece(graph, one, n, step, axis, node.target is STACK) for one, n, step in pieces]
            whole = made[0] if len(made) == 1 else _add(graph, CAT, made, axis)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)


def _run(parts: list[Any]) -> tuple[int, int]:
    """Return how many of the first tensors of a list are entries of a tensor in order, and whether 1 or -1 apart."""
    known: list[Any] = [one.args if one.target is SELECT else None for one in parts]
    if len(parts) < 2 or None in known[:2] or known[0][:2] != known[1][:2]:
        return 1, 0
    (x, axis, first), step = known[0], known[1][2] - known[0][2]
    count = next((k for k, args in enumerate(known) if args != (x, axis, first + k * step)), len(known))
    return (count, step) if abs(step) == 1 else (1, 0)


def _piece(graph: Graph, first: Any, count: int, step: int, axis: int, stacked: bool) -> Node:
    """Return entries of a tensor along an axis of another one."""
    if count < 2:
        return _add(graph, ATEN.unsqueeze.default, first, axis) if stacked else first
    x, at, n = first.args
    made = _sequence(lambda *args: _add(graph, *args), Taken(x, at, n, step, 0), count)
    made = _add(graph, ATEN.permute.default, made, _moved(made.meta["val"].ndim, 0, axis)) if axis else made
    return made if stacked else _add(graph, ATEN.flatten.using_ints, made, axis, axis + 1)

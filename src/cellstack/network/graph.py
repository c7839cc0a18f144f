"""The wiring of a network's nodes: inputs, outputs and shapes, with the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import MOST_AXES, Node, Shape, shown
from cellstack.nodes.checks import check_integer

Inputs = Sequence[str] | Mapping[str, Sequence[int | None] | None]


STATE = "/"  # between the name of a node and of a state of its cells; names can't contain it


def origin(value: str) -> str:
    """Return the name of the input or node that a value comes from."""
    return value.partition(STATE)[0]


def state_of(node: str, state: str) -> str:
    """Return the name of the value for a state of a node, one of its `state_sizes`, after the last step."""
    return f"{node}{STATE}{state}"


class StateValue(NamedTuple):
    """A state that is used as a value: the value's name, the index of the cell in its node, and the state's name."""

    value: str
    cell: int
    part: str


class Graph(NamedTuple):
    """The checked wiring of a network.

    The name of a value is that of its input or node; the name of a state is `node/state`.
    """

    inputs: tuple[str, ...]
    wires: tuple[tuple[str, ...], ...]  # for each node, the names of its inputs
    outputs: tuple[str, ...]
    shapes: dict[str, Shape]  # of every value
    ids: frozenset[str]  # inputs of ids, which are only used as indices and keep their dtype
    late: tuple[bool, ...]  # for each node, whether its check needs lengths that are known only in a call
    done: tuple[tuple[str, ...], ...]  # for each node, the values that aren't needed after it has run
    states: tuple[tuple[StateValue, ...], ...]  # for each node, its states that are inputs of nodes or outputs

    def timed(self, name: str) -> bool:
        """Return whether an input has a time axis, and therefore can have a mask."""
        return name in self.ids or len(self.shapes[name]) == 2

    def shown(self, name: str) -> str:
        """Return the shape of a value as text."""
        return shown(self.shapes[name], name in self.ids)


class _Parts(NamedTuple):
    """The arguments: nodes with their names, inputs with their given shapes, wires and outputs."""

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    inputs: dict[str, Shape | None]
    wires: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]

    def forwards(self) -> Iterator[tuple[Node, str, tuple[str, ...]]]:
        """Iterate over the nodes with their names and the names of their inputs."""
        return zip(self.nodes, self.names, self.wires, strict=True)

    def backwards(self) -> Iterator[tuple[Node, str, tuple[str, ...]]]:
        """Iterate over the same from the last node to the first."""
        return reversed([*self.forwards()])


def wired(
    nodes: tuple[Node, ...],
    names: tuple[str, ...],
    inputs: Inputs | None,
    wires: Sequence[Sequence[str]] | None,
    outputs: Sequence[str] | None,
) -> Graph:
    """Check the wiring of nodes and return it; for the errors see `Network`."""
    given = _inputs(names, inputs)
    states = dict(zip(names, (node.state_sizes for node in nodes), strict=True))
    parts = _Parts(nodes, names, given, _wires(states, tuple(given), wires), _outputs(states, outputs))
    _check_used(parts)
    used_states = _states(parts)
    ids = _ids(parts)
    shapes = _input_shapes(parts, ids)
    late = []
    for node, name, sources in parts.forwards():
        if node.inputs is not None and len(sources) not in (node.inputs, node.inputs + len(states[name])):
            more = f", or {1 + len(states[name])} with the initial {', '.join(states[name])}" if states[name] else ""
            raise ShapeError(f"{name}: {type(node).__name__} expected one input{more}, got {len(sources)}")
        comes = [shapes[source] for source in sources]
        shapes[name] = node.check(name, *comes)
        shapes |= {state.value: (states[name][state.value.partition(STATE)[2]],) for state in used_states[len(late)]}
        open_width = node.input_size is not None and any(shape[-1] is None for shape in comes)
        late.append(open_width or (node.checks_late and any(None in shape for shape in comes)))
    last = {name: number for number, name in enumerate(names)}  # the node itself, if only its states are used
    last |= {source: number for number, sources in enumerate(parts.wires) for source in sources}
    done: list[list[str]] = [[] for _ in nodes]
    kept = set(parts.outputs)
    for value, number in last.items():
        if value not in kept:
            done[number].append(value)
    lists = tuple(late), tuple(map(tuple, done)), used_states
    return Graph(tuple(given), parts.wires, parts.outputs, shapes, ids, *lists)


def check_name(what: str, name: object) -> None:
    """Raise `ValueError` unless `name` is printable text without a slash."""
    if not isinstance(name, str) or not name or "/" in name or not name.isprintable():
        raise ValueError(f"Network: expected every {what} to be printable text without '/', got {name!r:.80}")


def _inputs(names: tuple[str, ...], inputs: Inputs | None) -> dict[str, Shape | None]:
    """Return the inputs by name, with their shapes where they are given."""
    if inputs is None:
        inputs = ("x",)
    if isinstance(inputs, str):
        raise TypeError(f"Network: expected inputs to be a tuple of names, got {inputs!r:.80}")
    order, taken = tuple(inputs), set(names)
    for name in order:
        check_name("input's name", name)
        if name in taken:
            raise ValueError(f"Network: an input and a node have the same name, {name!r:.80}")
    if not order or len(set(order)) != len(order):
        raise ValueError(f"Network: expected inputs to be different names, at least one, got {list(order)}")
    shapes = inputs if isinstance(inputs, Mapping) else {}
    return {name: _given_shape(name, shapes.get(name)) for name in order}


def _given_shape(name: str, shape: object) -> Shape | None:
    if shape is None:
        return None
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not 1 <= len(shape) <= MOST_AXES:
        raise ValueError(f"Network: expected the shape of input {name} to be its axes after B, got {shape!r:.80}")
    return tuple(
        None if axis is None else check_integer(f"Network: input {name}", "every axis", axis) for axis in shape
    )


def _states(parts: _Parts) -> tuple[tuple[StateValue, ...], ...]:
    """Return, for each node, the states that are inputs of nodes or outputs."""
    taken = {value for values in (parts.outputs, *parts.wires) for value in values if STATE in value}
    found = []
    for node, name, _ in parts.forwards():
        own = [(number, part) for number, cell in enumerate(node.cells) for part in cell.spec.state_sizes]
        values = (StateValue(state_of(name, state), *at) for state, at in zip(node.state_sizes, own, strict=True))
        found.append(tuple(state for state in values if state.value in taken) if taken else ())
    return tuple(found)


def _wires(
    states: Mapping[str, Mapping[str, int]], inputs: tuple[str, ...], wires: Sequence[Sequence[str]] | None
) -> tuple[tuple[str, ...], ...]:
    names = tuple(states)
    if wires is None:
        if len(inputs) > 1:
            raise ValueError(f"Network: several inputs, {', '.join(inputs)}, require wires")
        return tuple((before,) for before in (*inputs, *names[:-1]))
    if isinstance(wires, str) or not isinstance(wires, Sequence) or len(wires) != len(names):
        got = len(wires) if isinstance(wires, Sequence) else type(wires).__name__
        raise ValueError(f"Network: expected wires to be {len(names)} tuples of names, one per node, got {got}")
    known, all_names, checked = set(inputs), set(names), []
    for name, sources in zip(names, wires, strict=True):
        if isinstance(sources, str) or not isinstance(sources, Sequence) or not sources:
            raise ValueError(f"Network: expected the wires of {name} to be a tuple of names, got {sources!r:.80}")
        for source in sources:
            comes = origin(source) if isinstance(source, str) else ""
            if not isinstance(source, str) or (comes not in known and comes not in all_names):
                raise ValueError(f"Network: expected the wires of {name} to be inputs or nodes, got {source!r:.80}")
            _check_state(f"the wires of {name}", source, states)
            if comes not in known:
                raise ValueError(f"Network: expected the wires of {name} to be earlier nodes, got {source!r}")
        checked.append(tuple(sources))
        known.add(name)
    return tuple(checked)


def _check_state(what: str, value: str, states: Mapping[str, Mapping[str, int]]) -> None:
    """Raise `ValueError` if a value is named as a state that doesn't exist."""
    node, _, state = value.partition(STATE)
    own = states.get(node, {})
    if value != node and state not in own:
        has = f"the states of {node} are {', '.join(own)}" if own else f"{node} has no states"
        raise ValueError(f"Network: {what} contain {value!r:.80}, which doesn't exist: {has}")


def _outputs(states: Mapping[str, Mapping[str, int]], outputs: Sequence[str] | None) -> tuple[str, ...]:
    if outputs is None:
        return tuple(states)[-1:]
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        raise ValueError(f"Network: expected outputs to be a tuple of nodes' names, got {outputs!r:.80}")
    for name in outputs:
        if not isinstance(name, str) or origin(name) not in states:
            raise ValueError(f"Network: expected every output to be a node or a state of one, got {name!r:.80}")
        _check_state("the outputs", name, states)
    if len(set(outputs)) != len(outputs):
        raise ValueError(f"Network: expected outputs that differ, got {list(outputs)}")
    return tuple(outputs)


def _check_used(parts: _Parts) -> None:
    used = set(map(origin, parts.outputs))
    for _, name, sources in parts.backwards():
        if name in used:
            used.update(map(origin, sources))
    for what, all_names in (("node", parts.names), ("input", parts.inputs)):
        for name in all_names:
            if name not in used:
                raise ValueError(f"Network: {what} {name!r} doesn't lead to an output")


def _ids(parts: _Parts) -> frozenset[str]:
    """Return the inputs of ids: those of which all uses are table look-ups, possibly after nodes that only reshape."""
    computed = set(map(origin, parts.outputs))
    for node, name, sources in parts.backwards():
        if not node.takes_ids and (name in computed or not node.shapes_only):
            computed.update(map(origin, sources))
    return frozenset(name for name in parts.inputs if name not in computed)


def _input_shapes(parts: _Parts, ids: frozenset[str]) -> dict[str, Shape]:
    """Return the shapes of the inputs, as given or inferred from the nodes that take them."""
    axes, widths = _axes(parts), _widths(parts)
    shapes: dict[str, Shape] = {}
    for name, shape in parts.inputs.items():
        shape = (None,) * axes[name] if shape is None else shape
        if shape[-1] is None and name not in ids:
            shape = (*shape[:-1], widths.get(name))
        shapes[name] = shape
    return shapes


def _axes(parts: _Parts) -> dict[str, int]:
    """Infer the number of axes of each input without the batch; two, as of a sequence, if no node determines it.

    If a node keeps the number of axes, its inputs and its output are tied (union-find); the first known number wins.
    """
    states = {source for sources in parts.wires for source in sources if STATE in source}
    ties = {name: name for name in (*parts.inputs, *parts.names, *states)}
    said = dict.fromkeys(states, 1) | {name: len(shape) for name, shape in parts.inputs.items() if shape is not None}

    def of(name: str) -> str:
        while ties[name] != name:
            ties[name] = ties[ties[name]]
            name = ties[name]
        return name

    for node, name, sources in parts.forwards():
        takes, gives = node.axes
        if takes is None and gives is None:
            for source in sources:
                one, other = of(source), of(name)
                if one != other:
                    ties[other] = one
                    if other in said:
                        said.setdefault(one, said[other])
            continue
        comes, starts = node.apart(sources)
        for value, count in [(name, gives), *((one, takes) for one in comes), *((start, 1) for start in starts)]:
            if count is not None:
                said.setdefault(of(value), count)
    return {name: said.get(of(name), 2) for name in parts.inputs}


def _widths(parts: _Parts) -> dict[str, int]:
    """Infer the widths of values from the first node that requires a width; values without such a node are absent."""
    widths: dict[str, int] = {}
    for node, name, sources in parts.backwards():
        width = widths.get(name) if node.input_size is None and node.keeps_width else node.input_size
        comes, starts = node.apart(sources)
        if width is not None:
            widths.update(dict.fromkeys(comes, width))
        widths.update(zip(starts, node.state_sizes.values(), strict=False))
    return widths

"""Runs the networks of TiRex and TiRex-2 over scaled patches: series by themselves, and series forecast together.

In each block of a TiRex-2 a cell runs along time over each series, and then attention mixes the series of a group at
each step. Covariates don't attend to the series that are forecast, so that they are run first, and their keys and
values are kept. Covariates whose future is known run in both directions.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.nodes import Attention, Dense, Merge, Node, Select, Skipped

Array = NDArray[np.float32]
Ints = NDArray[np.int64]
Seen = list[tuple[Array, ...]]
"""The keys and values of covariates in each block, each `[G, T, C, W]`."""


class Block(NamedTuple):
    """A block as networks.

    Attributes:
        cell: the cell with the norms around it, `[B, T, W]`.
        both: joins the outputs of both directions, `[..., 2·W]` to `[..., W]`.
        rest: what follows, from the block's input and the cell's output.
        mixed: mixes the series of each step, `[N, V, W]`; also returns its keys and values.
        joined: the same; also attends to given keys and values, `[N, C, W]`.
    """

    cell: Network
    both: Dense
    rest: Network
    mixed: Network
    joined: Network


class Model:
    """The network of a TiRex or a TiRex-2.

    Args:
        network: the network.
        weights: the number format of its matrices; None: its own.
    """

    def __init__(self, network: Network, weights: str | None) -> None:
        self.network, self.weights = network, weights
        self._networks: dict[int, Network] = {}  # by the number of steps that they return

    def alone(self, tokens: Array, count: int, threads: int) -> Array:
        """Run series by themselves, `[B, T, 2·patch]`, and return the last outputs, `[B, count, Q·patch]`."""
        if count not in self._networks:
            self._networks[count] = last_steps(self.network, count)
        return self._networks[count].run(tokens, threads=threads, weights=self.weights)[0]

    @cached_property
    def _parts(self) -> tuple[Network, list[Block], Network]:
        """What comes before the blocks, the blocks, and what comes after them."""
        network, blocks, first = self.network, [], None
        sources = dict(zip(network.names, network.wires, strict=True))
        skipped = {
            name: node for name, node in zip(network.names, network.nodes, strict=True) if isinstance(node, Skipped)
        }
        (before,) = network.inputs
        names = list(skipped)
        for combination, mixer in zip(names[::2], names[1::2], strict=True):
            (entry,) = (wires[0] for wires in network.wires if wires[1:] == (combination,))
            first = first or part(network, entry, before)
            (both,) = skipped[combination].nodes
            assert isinstance(both, Dense)
            cell = part(network, sources[combination][0], entry)
            rest = part(network, sources[mixer][0], entry, combination)
            blocks.append(Block(cell, both, rest, *_mixers(skipped[mixer])))
            before = mixer
        assert first is not None
        return first, blocks, part(network, network.outputs[0], before)

    def together(
        self,
        tokens: Array,
        threads: int,
        states: list[Any] | None = None,
        seen: Seen | None = None,
        known: int = 0,
        wanted: slice = slice(None),
    ) -> tuple[Array, list[Any], Seen]:
        """Run groups of series.

        Args:
            tokens: `[G, V, T, 2·patch]`.
            threads: the number of threads that the kernel may use.
            states: of each block's cell; None: the initial ones.
            seen: of the covariates of the same groups; None: there are none, or these are the covariates.
            known: the number of series, the last of each group, that run in both directions.
            wanted: the steps whose outputs are returned.

        Returns:
            The outputs, `[G, V, wanted, Q·patch]`; the states after the last step; the keys and values, of the last
            block those of the wanted steps only.
        """
        groups, series, steps, _ = tokens.shape
        how: dict[str, Any] = {"threads": threads, "weights": self.weights}
        first, blocks, last = self._parts
        x = first.run(tokens.reshape(groups * series, steps, -1), **how)[0]
        apart = (groups, series, steps, x.shape[2])
        after, kept = [], []
        for number, block in enumerate(blocks):
            rows = x
            if known:
                back = x.reshape(apart)[:, series - known :, ::-1]
                rows = np.concatenate([x, back.reshape(-1, *x.shape[1:])])
            y, state = block.cell.run(rows, states and states[number], **how)
            after.append(state)
            if known:
                y, back = y[: len(x)], y[len(x) :, ::-1]
                own = y.reshape(apart)[:, series - known :]
                own[:] = block.both.product(np.concatenate([own, back.reshape(own.shape)], axis=-1), **how)
            if number == len(blocks) - 1:
                x, y = x[:, wanted], y[:, wanted]
            z = _swapped(block.rest.run((x, y), **how)[0], groups)
            if seen is None:
                z, *pair = block.mixed.run(z, **how)[0]
                kept.append(tuple(one.reshape(groups, -1, *one.shape[1:]) for one in pair))
            else:
                z = block.joined.run((z, *(one.reshape(-1, *one.shape[2:]) for one in seen[number])), **how)[0]
            x = _swapped(z, groups)
        y = last.run(x, **how)[0]
        return y.reshape(groups, series, *y.shape[1:]), after, kept


class Together:
    """Groups of series of the same numbers of variates and covariates, and the states of the network over them.

    Args:
        model: the network.
        targets: the rows of the variates that are forecast, `[G, V]`.
        covariates: the rows of the covariates, `[G, C]`.
        known: how many of them, the last of each group, have a known future.
        threads: the number of threads that the kernel may use.
    """

    def __init__(self, model: Model, targets: Ints, covariates: Ints, known: int, threads: int) -> None:
        self.targets, self._model, self._covariates, self._known = targets, model, covariates, known
        self._threads = threads
        self._states: tuple[Any, Any] = None, None  # of the covariates, of the targets
        self._stream: Any = None  # of series by themselves, once they are continued
        self._ahead: Seen = []  # of covariates with a known future, from the next step on

    def foresee(self, tokens: Array, wanted: slice = slice(None)) -> None:
        """Run the groups' covariates over all steps if their future is known.

        Args:
            tokens: of all rows, `[rows, T, 2·patch]`.
            wanted: the steps whose outputs will be asked for.
        """
        if self._known:
            own = tokens[self._covariates]
            self._ahead = self._model.together(own, self._threads, known=self._known, wanted=wanted)[2]

    def run(self, tokens: Array, count: int, keep: bool = True) -> Array:
        """Run the next steps.

        Args:
            tokens: of all rows, `[rows, T, 2·patch]`; those of covariates with a known future aren't used.
            count: the number of steps, the last ones, whose outputs are returned.
            keep: whether the next call continues after these steps.

        Returns:
            `[G, V, count, Q·patch]`.
        """
        own, steps, (before, states) = tokens[self.targets], tokens.shape[1], self._states
        if self.targets.shape[1] + self._covariates.shape[1] == 1:
            if self._stream is None and not keep:
                return self._model.alone(own[:, 0], count, self._threads)[:, None]
            network, weights = self._model.network, self._model.weights
            stream = self._stream = self._stream or network.stream(len(own), self._threads, weights)
            if not keep:
                stream = self._stream.fork()
                stream.state = self._stream.state
            y = stream.run(own[:, 0])[:, None, -count:]
        else:
            how: dict[str, Any] = {"threads": self._threads, "wanted": slice(steps - count, None)}
            seen = None
            if self._known:  # the last block needs the wanted steps only
                *first, last = [tuple(one[:, :steps] for one in pair) for pair in self._ahead]
                seen = [*first, tuple(one[:, -count:] for one in last)]
            elif self._covariates.size:
                _, before, seen = self._model.together(tokens[self._covariates], states=before, **how)
            y, states, _ = self._model.together(own, states=states, seen=seen, **how)
        if keep:
            self._states = before, states
            self._ahead = [tuple(one[:, steps:] for one in pair) for pair in self._ahead]
        return y


def last_steps(network: Network, count: int) -> Network:
    """Return a network that returns the last steps of another one's output.

    What follows the last node with a memory and its residual runs for these steps only.
    """
    stateful = max(number for number, node in enumerate(network.nodes) if node.cells or node.memory is not None)
    place = next(
        number
        for number, node in enumerate(network.nodes)
        if number > stateful and isinstance(node, Merge) and node.mode == "add"
    )
    before, name = network.names[place], "last_steps"
    wires = [tuple(name if wire == before else wire for wire in wires) for wires in network.wires[place + 1 :]]
    return Network(
        [*network.nodes[: place + 1], Select(start=-count), *network.nodes[place + 1 :]],
        [*network.names[: place + 1], name, *network.names[place + 1 :]],
        inputs={name: network.shapes[name] for name in network.inputs},
        wires=[*network.wires[: place + 1], (before,), *wires],
        outputs=network.outputs,
    )


def part(network: Network, output: str, *inputs: str) -> Network:
    """Return the part of a network that computes a value from others, which become its inputs."""
    sources = dict(zip(network.names, network.wires, strict=True))
    needed, ahead = set(inputs), [output]
    while ahead:
        wire = ahead.pop()
        if wire not in needed:
            needed.add(wire)
            ahead += sources[wire]
    nodes = dict(zip(network.names, network.nodes, strict=True))
    names = [name for name in network.names if name in needed - set(inputs)]
    return Network(
        [nodes[name] for name in names],
        names,
        inputs={name: network.shapes[name] for name in inputs},
        wires=[sources[name] for name in names],
        outputs=[output],
    )


def _mixers(node: Skipped) -> tuple[Network, Network]:
    """Return the networks `mixed` and `joined` of a `Block`."""
    names = ("x", *(str(number) for number in range(1, len(node.nodes) + 1)))
    wires = [tuple(names[source] for source in sources) for sources in node.takes]
    at = next(number for number, inner in enumerate(node.nodes) if isinstance(inner, Attention))
    queries, *parts = wires[at]
    mixed = Network(node.nodes, names[1:], inputs={"x": node.frame}, wires=wires, outputs=(names[-1], *parts))
    given, every = ("keys", "values"), ("all_keys", "all_values")
    merges: tuple[Node, ...] = (Merge(axis=1), Merge(axis=1))
    joined = Network(
        node.nodes[:at] + merges + node.nodes[at:],
        names[1 : at + 1] + every + names[at + 1 :],
        inputs=dict.fromkeys(("x", *given), node.frame),
        wires=[*wires[:at], *zip(parts, given, strict=True), (queries, *every), *wires[at + 1 :]],
    )
    return mixed, joined


def _swapped(x: Array, groups: int) -> Array:
    """Return `[G·V, T, W]` as `[G·T, V, W]`, and the reverse."""
    apart = x.reshape(groups, -1, *x.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(apart).reshape(-1, *apart.shape[2:])

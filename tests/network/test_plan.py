"""Which nodes run together in one call of the kernel, for sequences, for single steps and for the whole network."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
from networks import make_cell, make_graph, make_network

from cellstack import Network, Patch
from cellstack.nodes import Dense, Merge, Recurrent


def stack(rng, *widths, **flags):
    cells = tuple(make_cell(rng, width, units) for width, units in pairwise(widths))
    return Recurrent(cells, **flags)


def head(rng, width, units, activation="linear"):
    return Dense(rng.normal(size=(width, units)).astype("f4"), activation=activation)


# A list of nodes, then the nodes of each call for sequences and for steps, and whether the network is one call.
CASES = {
    "stacks": (lambda r: [stack(r, 3, 4), stack(r, 4, 5, 6)], "01", "01", True),
    "a head": (lambda r: [stack(r, 3, 4), head(r, 4, 2)], "0 1", "01", True),
    "heads between": (
        lambda r: [head(r, 3, 3), stack(r, 3, 4), head(r, 4, 2), stack(r, 2, 2)],
        "0 1 2 3",
        "0123",
        True,
    ),
    "heads only": (lambda r: [head(r, 3, 3), head(r, 3, 2)], "0 1", "0 1", True),
    "softmax": (lambda r: [stack(r, 3, 4), head(r, 4, 2, "softmax"), stack(r, 2, 2)], "0 1 2", "01 2", False),
    "last step": (lambda r: [stack(r, 3, 4, return_sequences=False), head(r, 4, 2)], "0 1", "01", True),
    "backwards below": (lambda r: [stack(r, 3, 4, go_backwards=True), stack(r, 4, 2)], "01", "01", False),
    "backwards above": (lambda r: [stack(r, 3, 4), stack(r, 4, 2, go_backwards=True)], "0 1", "01", False),
    "zeros below": (lambda r: [stack(r, 3, 4, zero_output_for_mask=True), stack(r, 4, 2)], "0 1", "01", True),
    "zeros above": (lambda r: [stack(r, 3, 4), stack(r, 4, 2, zero_output_for_mask=True)], "01", "01", True),
    "residual": (lambda r: [stack(r, 3, 4, 4, residual=True), stack(r, 4, 2)], "0 1", "0 1", False),
    "residual of no cell": (lambda r: [stack(r, 3, 4, 5, residual=True), stack(r, 5, 2)], "01", "01", True),
}


def calls(found):
    return " ".join("".join(map(str, call.nodes)) for call in found)


@pytest.mark.parametrize("case", CASES)
def test_the_nodes_of_each_call(case, rng):
    make, sequences, steps, whole = CASES[case]
    net = Network(make(rng))
    assert calls(net.calls.sequences) == sequences
    assert calls(net.calls.steps) == steps
    assert (net.calls.whole is not None) == whole
    joined = sum(f"in the call of layer_{call[0]}" in line for call in sequences.split() for line in net.plan())
    assert joined == sum(len(call) - 1 for call in sequences.split())


def test_values_that_are_used_elsewhere_end_a_call(rng):
    nodes = [stack(rng, 3, 3), stack(rng, 3, 3), Merge("add")]
    shared = Network(nodes, ["a", "b", "sum"], inputs=["x"], wires=[("x",), ("a",), ("a", "b")])
    assert calls(shared.calls.sequences) == calls(shared.calls.steps) == "0 1 2"
    state = Network(nodes[:2], ["a", "b"], inputs=["x"], wires=[("x",), ("a",)], outputs=["b", "a/h"])
    assert calls(state.calls.sequences) == "01"  # h after the last step isn't the sequence
    assert calls(state.calls.steps) == "0 1"  # step by step it is the output
    started = Network(nodes[:2], ["a", "b"], inputs=["x"], wires=[("x",), ("a", "a/h", "a/c")])
    assert calls(started.calls.sequences) == "0 1"
    given = Network(nodes[:1], ["a"], inputs={"x": (None, 3), "h": (3,), "c": (3,)}, wires=[("x", "h", "c")])
    assert given.calls.whole is None


def test_patches_above_a_backward_node_end_a_call(rng):
    net = Network([stack(rng, 3, 4, go_backwards=True), stack(rng, 4, 2)])
    below, above = (net.edit(Patch(name, "h", value=0.5)) for name in net.names)
    assert calls(below.calls.sequences) == "01"
    assert calls(above.calls.sequences) == "0 1"
    assert below.calls.whole is above.calls.whole is None


@pytest.mark.parametrize("seed", range(8))
def test_copies_and_pickles_are_the_same_network(seed):
    net = make_graph(seed)[0] if seed % 2 else make_network(seed)
    for other in (copy.copy(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(other) == repr(net)
        assert repr(other.plan()) == repr(net.plan())
        assert other.inputs == net.inputs
    old = Network.__new__(Network)  # an older version pickled all attributes
    old.__setstate__(
        {name: getattr(net, name) for name in Network.__annotations__ if name not in ("calls", "_patched")}
    )
    if not seed % 2:
        x = np.random.default_rng(seed).normal(size=(2, 4, net.input_size))
        np.testing.assert_array_equal(old(x), net(x))
    assert repr(old) == repr(net)

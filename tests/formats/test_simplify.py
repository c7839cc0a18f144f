"""The builder and the simplifier: what each rule does, when it doesn't apply, and that outputs don't change."""

import numpy as np
import pytest
from networks import make_cell, make_graph

import cellstack as cs
from cellstack import CellSpec, Network
from cellstack.formats.build import Builder, Names, ProblemsError, TooMuchError
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Pad,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)

RNG = np.random.default_rng(5)
DTYPE = np.float64  # so that only the order of sums can differ


def numbers(*shape):
    return RNG.normal(size=shape)


def positive(*shape):
    return RNG.uniform(0.5, 2.0, size=shape)


def lstm(inputs=3, units=4, **flags):
    return Recurrent((make_cell(RNG, inputs, units, DTYPE),), **flags)


def dense(inputs=3, outputs=5, activation="linear", bias=True):
    return Dense(numbers(inputs, outputs), numbers(outputs) if bias else None, activation)


def conv(channels=3, filters=5, **settings):
    return Conv1D(numbers(2, channels, filters), numbers(filters), **settings)


def scale(width=3):
    return Scale(positive(width), numbers(width))


def built(*nodes, shape=(None, 3)):
    """A chain, simplified by the builder and unchanged."""
    builder = Builder()
    wire = builder.input("x", shape)
    for node in nodes:
        wire = builder.add(type(node).__name__.lower(), node, wire)
    builder.output(wire)
    return builder.network(), Network(nodes, inputs={"x": shape})


def agree(simple, plain, x=None, mask=None):
    x = numbers(4, 6, *plain.shapes["x"][1:]) if x is None else x
    for given in (None, mask):
        ours, wanted = simple.run(x, mask=given), plain.run(x, mask=given)
        np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-9, atol=1e-9)
        for one, other in zip(ours[1], wanted[1], strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def kinds(network):
    return [type(node).__name__ for node in network.nodes]


SOME = np.arange(6) < np.array([[6], [4], [1], [3]])
TURN = Permute((2, 1))

ONE_NODE = {  # chains that become one node
    "an activation into Dense": [dense(), Activation("tanh")],
    "softmax into Dense": [dense(), Activation("softmax")],
    "an activation into Conv1D": [conv(), Activation("relu")],
    "a scale into Dense": [dense(), scale(5)],
    "a scale into Dense without a bias": [dense(bias=False), scale(5)],
    "one factor into Dense": [dense(), Activation("affine(2.0, 0.5)")],
    "a scale and an activation into Conv1D": [conv(padding="same"), scale(5), Activation("relu")],
    "a scale before Dense": [scale(), dense(activation="relu")],
    "a scale before Conv1D": [scale(), conv(dilation=2, strides=2)],
    "a quotient before Dense": [Standardise(np.zeros(3), positive(3)), dense()],
    "a scale before an LSTM": [scale(), lstm()],
    "a scale before a way back": [scale(), lstm(go_backwards=True, return_sequences=False)],
    "a scale before both ways": [scale(), Bidirectional(lstm(), lstm(3, 2, go_backwards=True))],
    "scales": [scale(), scale(), Scale(np.ones(3), numbers(3))],
    "a sum and a quotient": [Scale(np.ones(3), numbers(3)), Standardise(np.zeros(3), positive(3))],
    "a scale into a layer norm": [LayerNorm(), scale()],
    "a scale into a layer norm with its own": [LayerNorm(positive(3), numbers(3)), scale()],
    "a bound into Dense": [dense(), Clip(0.0, None)],
    "bounds into Conv1D": [conv(), Clip(0.0, 6.0)],
    "a whole slice": [dense(), Select(0, None)],
    "a whole slice of the features": [dense(), Select(0, 5, axis=-1)],
    "nothing": [Activation("linear"), dense(), Activation("linear"), Scale(np.ones(5), np.zeros(5))],
    "permutes": [TURN, TURN, dense()],
    "permutes around activations": [dense(), TURN, Activation("relu"), TURN],
    "permutes in permutes": [TURN, TURN, TURN, TURN, lstm()],
    "the last step": [lstm(), GlobalPool("last")],
    "a sequence in reverse": [Select(step=-1), lstm()],
    "a sequence in reverse twice": [Select(step=-1), lstm(return_sequences=False, go_backwards=True)],
    "pads before a Conv1D": [Pad(1, 1), conv(strides=2)],
    "pads before a padded Conv1D": [Pad(0, 2), conv(padding="causal")],
    "pads, a Conv1D, a scale and an activation": [Pad(1, 0), conv(), scale(5), Activation("relu")],
    "a sum of zeros": [dense(bias=False), Scale(np.ones(5), np.zeros(5))],
    "a vector flattened": [lstm(return_sequences=False), Flatten()],
    "pooled to one step, and flattened": [lstm(), GlobalPool("last"), Reshape((1, -1)), TURN, Flatten()],
}


@pytest.mark.parametrize("nodes", ONE_NODE.values(), ids=ONE_NODE.keys())
def test_chains_become_one_node(nodes):
    simple, plain = built(*nodes)
    assert len(simple.nodes) == 1
    turned = any(isinstance(node, Permute) for node in nodes)  # these drop a mask of the caller
    agree(simple, plain, mask=None if turned else SOME)


KEPT = {  # chains that aren't simplified
    "an activation after one": [dense(activation="relu"), Activation("tanh")],
    "a scale after an activation": [conv(activation="relu"), scale(5)],
    "a scale before a padded Conv1D": [scale(), conv(padding="causal")],
    "a scale before groups": [scale(4), Conv1D(numbers(2, 2, 6), groups=2)],
    "a sum before Dense": [Scale(np.ones(3), numbers(3)), dense()],
    "a mean that is taken off": [Standardise(numbers(3), positive(3)), dense()],
    "a scale before layer norm in a cell": [
        scale(),
        Recurrent((make_cell(RNG, 3, 4, DTYPE, layer_norm=True),)),
    ],
    "a scale after a scale that isn't one": [Standardise(numbers(3), positive(3)), scale()],
    "softmax between permutes": [conv(activation="relu"), TURN, Activation("softmax"), TURN],
    "other bounds": [dense(), Clip(0.0, 5.0), Clip(-1.0, None)],
    "other permutes": [Reshape((-1, 3, 2)), Permute((2, 3, 1)), Permute((2, 3, 1))],
    "a slice": [lstm(), Select(1, None)],
    "the last of both ways": [Bidirectional(lstm(), lstm(go_backwards=True)), GlobalPool("last")],
    "the last, where masked steps are zero": [lstm(zero_output_for_mask=True), GlobalPool("last")],
    "the mean": [lstm(), GlobalPool("mean")],
    "pads of ones": [Pad(1, 1, 1.0), conv()],
    "pads of the features": [Pad(1, 1, 0.0, -1), conv(5)],
    "pads before the same": [Pad(1, 1), conv(padding="same")],
    "pads before a pool": [Pad(1, 1), Pool1D("max", 2)],
    "every other step in reverse": [Select(step=-2), lstm()],
    "the features in reverse": [Select(step=-1, axis=-1), lstm()],
    "a mask, then the last step": [Masking(0.0), lstm(), GlobalPool("last")],
    "a mask that ends": [Masking(0.0), Permute((1, 2)), lstm()],
    "a mask that ends in permutes": [Masking(0.0), TURN, TURN, lstm()],
}


@pytest.mark.parametrize("nodes", KEPT.values(), ids=KEPT.keys())
def test_chains_that_are_not_simplified(nodes):
    simple, plain = built(*nodes, shape=(None, nodes[0].input_size or 3))
    if isinstance(nodes[0], Reshape):
        simple, plain = built(*nodes, shape=(4, 3))
        agree(simple, plain, numbers(2, 4, 3))
    else:
        x = numbers(4, 6, plain.shapes["x"][-1])
        x[:, 2] = 0.0
        agree(simple, plain, x, SOME)
    assert kinds(simple) == kinds(plain)


HUGE = Scale(np.array([1e200, 1.0, 1.0]), np.zeros(3))
BEYOND = {  # chains whose folded weights overflow
    "factors": [HUGE, HUGE],
    "a sum and a factor": [Scale(positive(3), np.full(3, 1e200)), Scale(np.full(3, -1e200), numbers(3))],
    "a factor after Dense": [Dense(np.full((3, 3), 1e200)), HUGE],
    "a factor after the bias of Dense": [Dense(numbers(3, 3), np.full(3, 1e200)), HUGE],
    "a factor before Dense": [HUGE, Dense(np.full((3, 3), 1e200))],
    "a sum before Dense": [Scale(positive(3), np.full(3, 1e200)), Dense(np.full((3, 3), 1e200))],
    "a factor before an LSTM": [
        HUGE,
        Recurrent((Cell(CellSpec(3, 1), np.full((3, 4), 1e200), np.zeros((1, 4)), np.zeros(4)),)),
    ],
    "a factor after the gain of a layer norm": [LayerNorm(np.full(3, 1e200)), HUGE],
    "a factor after the bias of a layer norm": [LayerNorm(positive(3), np.full(3, 1e200)), HUGE],
}


@pytest.mark.parametrize("nodes", BEYOND.values(), ids=BEYOND.keys())
def test_weights_that_overflow_are_not_folded(nodes):
    simple, plain = built(*nodes)
    assert kinds(simple) == kinds(plain)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(simple(np.zeros((1, 2, 3))), plain(np.zeros((1, 2, 3))), equal_nan=True)


def test_a_value_with_several_uses_is_kept():
    builder = Builder()
    first = builder.add("first", dense(), builder.input("x", (None, 3)))
    second = builder.add("second", Activation("relu"), first)
    builder.output(builder.add("both", Merge("add"), first, second))
    assert kinds(builder.network()) == ["Dense", "Activation", "Merge"]
    builder = Builder()
    first = builder.add("first", dense(), builder.input("x", (None, 3)))
    builder.output(first)
    builder.output(builder.add("second", Activation("relu"), first))
    network = builder.network()
    assert kinds(network) == ["Dense", "Activation"]
    assert network.outputs == ("first", "second")


def times_its_gate(masked, *order, mode="mul", text="sigmoid"):
    builder = Builder()
    wires = [builder.add("first", dense(), builder.input("x", (None, 3)))]
    wires = [builder.add("masked", Masking(0.0), wires[0])] if masked else wires
    wires.append(builder.add("gate", Activation(text), wires[0]))
    builder.output(builder.add("both", Merge(mode), *(wires[n] for n in order)))
    draft = Network(
        [*builder.nodes.values()], [*builder.nodes], inputs=builder.inputs, wires=[*builder.sources.values()]
    )
    agree(builder.network(), draft)
    return kinds(builder.network())


def test_a_value_times_its_sigmoid_is_an_activation():
    assert times_its_gate(False, 0, 1) == times_its_gate(False, 1, 0) == ["Dense"]
    assert times_its_gate(True, 0, 1) == ["Dense", "Masking", "Activation", "Merge"]
    for order, settings in (((0, 1, 1), {}), ((0, 1), {"mode": "add"}), ((0, 1), {"text": "tanh"})):
        assert times_its_gate(False, *order, **settings) == ["Dense", "Activation", "Merge"]


CUT = {  # slices of eight features, and the nodes that are left of them and the Merge
    "whole": ([(0, 4), (4, 8)], [("Dense", 5)]),
    "whole, with open ends": ([(None, 3), (3, -1), (-1, None)], [("Dense", 5)]),
    "a part": ([(2, 4), (4, 7)], [("Select", 2, 7), ("Dense", 5)]),
    "swapped": ([(4, 8), (0, 4)], None),
    "with a gap": ([(0, 3), (4, 8)], None),
}


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(("cuts", "left"), CUT.values(), ids=CUT.keys())
def test_slices_that_are_concatenated_again(cuts, left, other):
    """`other`: one of the slices is also used elsewhere."""
    nodes, wires = [Bidirectional(lstm(), lstm(go_backwards=True))], [("x",)]
    nodes += [Select(start, stop, axis=-1) for start, stop in cuts]
    wires += [("n0",)] * len(cuts)
    nodes.append(Merge("concat"))
    wires.append(tuple(f"n{n + 1}" for n in range(len(cuts))))
    nodes.append(dense(sum(len(range(8)[start:stop]) for start, stop in cuts)))
    wires.append((f"n{len(nodes) - 2}",))
    outputs = [f"n{len(nodes) - 1}", *(["n1"] if other else [])]
    builder = Builder()
    builder.input("x", (None, 3))
    for number, (node, sources) in enumerate(zip(nodes, wires, strict=True)):
        builder.add(f"n{number}", node, *sources)
    for name in outputs:
        builder.output(name)
    simple = builder.network()
    names = [f"n{n}" for n in range(len(nodes))]
    plain = Network(nodes, names, inputs={"x": (None, 3)}, wires=wires, outputs=outputs)
    x = numbers(4, 6, 3)
    for one, other_one in zip(*((y if isinstance(y, tuple) else (y,)) for y in (simple(x), plain(x))), strict=True):
        np.testing.assert_array_equal(one, other_one)
    rest = [node for node in simple.nodes if not (other and isinstance(node, Select) and node.taken == nodes[1].taken)]
    if left is None:
        assert len(simple.nodes) == len(nodes)
    else:
        assert [type(node).__name__ for node in rest] == ["Bidirectional", *(kind for kind, *_ in left)]
        assert [node.taken for node in rest if isinstance(node, Select)] == [slice(*c[1:], 1) for c in left[:-1]]


def test_a_stack_becomes_one_node_per_layer():
    cells = tuple(make_cell(RNG, 3 if n == 0 else 4, 4, DTYPE) for n in range(3))
    for flags in ({}, {"return_sequences": False}, {"go_backwards": True}, {"zero_output_for_mask": True}):
        simple, plain = built(Recurrent(cells, **flags))
        assert simple.names == ("recurrent.0", "recurrent.1", "recurrent.2")
        agree(simple, plain, mask=SOME)
    simple, plain = built(Recurrent(cells, residual=True))
    assert len(simple.nodes) == 1
    agree(simple, plain, mask=SOME)


def test_masks_that_the_graph_creates_are_kept():
    table = Embedding(numbers(5, 3), mask_zero=True)
    ids = np.array([[1, 2, 0, 4], [0, 0, 3, 0]])
    for nodes in (
        [table, scale(), lstm(), dense(4, 2), Activation("relu")],
        [table, Select(None, None), lstm(return_sequences=False)],
        [table, Permute((1, 2)), lstm(return_sequences=False)],
        [table, conv(), Activation("relu"), TURN, TURN, lstm(5)],
    ):
        simple, plain = built(*nodes, shape=(None,))
        agree(simple, plain, ids)


NAMED = {  # paddings in steps, and their names
    "causal": (conv(padding=(1, 0)), "causal"),
    "causal with a dilation": (conv(padding=(3, 0), dilation=3), "causal"),
    "the same": (conv(padding=(0, 1)), "same"),
    "the same at every second": (conv(padding=(0, 1), strides=2), "same"),
    "the same of an odd window": (Pool1D("max", 3, 1, (1, 1)), "same"),
    "pairs rounded up": (Pool1D("mean", 2, 2, (0, 1)), "same"),
    "the same at some lengths alone": (Pool1D("mean", 3, 2, (0, 1)), (0, 1)),
    "more than the same": (conv(padding=(1, 1)), (1, 1)),
}


@pytest.mark.parametrize("name", NAMED)
def test_padding_gets_a_name(name):
    node, padding = NAMED[name]
    simple, plain = built(node)
    assert simple.nodes[0].padding == padding
    for steps in range(1, 7):
        agree(simple, plain, numbers(2, steps, 3))


def two_directions(merge=None, back=None, flags=(), width=2):
    """Two layers over one sequence, the second over it in reverse, merged."""
    builder, ahead = Builder(), lstm(**dict(flags))
    x = builder.input("x", (None, 3))
    one = builder.add("ahead", ahead, x)
    two = builder.add("back", lstm(3, width, **dict(flags)), builder.add("reverse", Select(step=-1), x))
    if ahead.return_sequences:
        two = builder.add("in_order", back or Select(step=-1), two)
    builder.output(builder.add("both", merge or Merge("concat"), one, two))
    nodes, wires = list(builder.nodes.values()), [builder.sources[name] for name in builder.nodes]
    return builder, Network(nodes, list(builder.nodes), inputs={"x": (None, 3)}, wires=wires)


@pytest.mark.parametrize("flags", [{}, {"return_sequences": False}, {"zero_output_for_mask": True}])
def test_two_opposite_layers_become_a_bidirectional(flags):
    builder, plain = two_directions(flags=flags.items())
    drafts = []
    simple = builder.network(lambda draft: drafts.append(draft) or {})
    assert kinds(simple) == ["Bidirectional"]
    assert simple.names == ("both",)
    assert drafts[0].cells == {"ahead": ("both", 0), "back": ("both", 1)}
    agree(simple, plain, mask=SOME if flags else None)


def test_opposite_layers_that_stay_separate():
    for how in (
        {"back": Activation("tanh")},
        {"merge": Merge("add"), "back": Select(step=-1), "width": 4},
        {"flags": {"return_sequences": False, "zero_output_for_mask": True}.items()},
    ):
        builder, plain = two_directions(**how)
        simple = builder.network()
        assert "Bidirectional" not in kinds(simple)
        agree(simple, plain)
    builder, _ = two_directions()
    builder.output("ahead")
    assert "Bidirectional" not in kinds(builder.network())


def woven(seed):
    """A random graph, simplified by the builder and unchanged, with additional nodes."""
    net, given = make_graph(seed, "float64")
    rng = np.random.default_rng(seed)
    builder, nodes, names, wires, ends = Builder(), [], [], [], {}
    for name in net.inputs:
        builder.input(name, given[name].shape[1:])
        ends[name] = name

    def add(name, node, *sources):
        nodes.append(node)
        names.append(builder.add(name, node, *sources))
        wires.append(sources)
        return names[-1]

    for name, node, sources in zip(net.names, net.nodes, net.wires, strict=True):
        if isinstance(node, Recurrent) and len(node.cells) > 1 and not node.residual:
            node = Recurrent(node.cells[:1], node.return_sequences, node.go_backwards)
            if node.units != net.shapes[name][-1]:
                return None
        wire = add(name, node, *(ends[source] for source in sources))
        shape = builder.shapes[wire]
        for kind in rng.choice(["nothing", "scale", "turned", "activated", "whole"], size=rng.integers(3)):
            if kind == "scale" and len(shape) < 3:
                wire = add("s", Scale(rng.uniform(0.5, 2, size=shape[-1]), rng.normal(size=shape[-1])), wire)
            elif kind == "turned" and len(shape) == 2:
                wire = add("t", TURN, add("a", Activation("softsign"), add("t", TURN, wire)))
            elif kind == "activated" and len(shape) < 3:
                wire = add("a", Activation("tanh"), wire)
            else:
                wire = add("w", Select(), wire)
        ends[name] = wire
    for wire in dict.fromkeys(ends[name] for name in net.outputs):
        builder.output(wire)
    shapes = {name: given[name].shape[1:] for name in net.inputs}
    plain = Network(nodes, names, inputs=shapes, wires=wires, outputs=list(builder.outputs))
    return builder.network(), plain, given


@pytest.mark.long
def test_random_graphs_give_the_same_outputs():
    fewer = compared = 0
    for seed in range(200):
        found = woven(seed)
        if found is None:
            continue
        simple, plain, given = found
        ours, wanted = simple(given), plain(given)
        for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (ours, wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
        fewer += len(plain.nodes) - len(simple.nodes)
        compared += 1
    assert compared > 120
    assert fewer > 3 * compared / 2


def test_shared_weights_stay_shared():
    shared, norm = dense(), scale(5)
    builder = Builder()
    x = builder.input("x", (None, 3))
    ends = [
        builder.add("act", Activation("relu"), builder.add("norm", norm, builder.add("dense", shared, x)))
        for _ in range(2)
    ]
    builder.output(builder.add("both", Merge("add"), *ends))
    network = builder.network()
    assert kinds(network) == ["Dense", "Dense", "Merge"]
    assert network.nodes[0] is network.nodes[1]


def test_copies_of_shared_weights_are_limited(monkeypatch):
    monkeypatch.setattr("cellstack.formats.draft.MOST_COPIED", 100)
    shared = dense(10, 10)
    builder = Builder()
    wire = builder.input("x", (None, 10))
    for _ in range(5):
        wire = builder.add("scale", scale(10), builder.add("dense", shared, wire))
    builder.output(wire)
    assert len(builder.network().nodes) == 10


# ── the builder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_unique_and_valid():
    names = Names(["x"])
    assert [names.fresh(name) for name in ("x", "x", "y", "x.2", "x")] == ["x.2", "x.3", "y", "x.2.2", "x.4"]
    builder = Builder()
    assert builder.input("a/b", (None, 3)) == "a.b"
    assert builder.add("/a/b\n", dense(), "a.b") == "a.b_"


def test_problems_are_ordered_by_rank_and_counted():
    builder = Builder()
    for number in range(50):
        builder.refuse(f"tensor {number}", rank=1)
    builder.refuse("a layer that isn't supported")
    builder.refuse("a layer that isn't supported")
    with pytest.raises(ProblemsError, match=r"^a layer that isn't supported; tensor 0; .*; tensor 4; and 45 more$"):
        builder.network()


def test_nodes_and_created_numbers_are_limited():
    builder = Builder(most_nodes=2, most_numbers=10)
    wire = builder.input("x", (None, 3))
    for _ in range(2):
        wire = builder.add("relu", Activation("relu"), wire)
    with pytest.raises(TooMuchError, match="more than 2 nodes"):
        builder.add("relu", Activation("relu"), wire)
    builder.make(10)
    with pytest.raises(TooMuchError, match="more than 10 numbers"):
        builder.make(1)


def test_a_node_of_the_wrong_shape_is_refused_when_added():
    builder = Builder()
    with pytest.raises(cs.ShapeError, match="head: expected an input of 4 features, got 3"):
        builder.add("head", dense(4), builder.input("x", (None, 3)))


def test_outputs_that_are_inputs_or_outputs_already_are_copied():
    builder = Builder()
    wire = builder.add("dense", dense(), builder.input("x", (None, 3)))
    builder.output(wire)
    builder.output(wire, "again")
    builder.output("x", "raw")
    network = builder.network()
    assert network.outputs == ("dense", "again", "raw")


def test_unused_nodes_are_dropped():
    builder = Builder()
    wire = builder.add("dense", dense(), builder.input("x", (None, 3)))
    builder.add("more", dense(5), wire)
    builder.output(wire)
    assert builder.network().names == ("dense",)


LENGTHS = {  # whether a network takes sequences of any length
    "an LSTM": ([lstm()], True),
    "a pool": ([conv(), Pool1D("max", 2), lstm(5)], True),
    "time flattened": ([lstm(), Flatten(), dense(24)], False),
    "time turned": ([lstm(), TURN, dense(6)], False),
    "time turned and back": ([lstm(), TURN, Activation("relu"), TURN, dense(4)], True),
    "a vector shaped": ([lstm(return_sequences=False), Reshape((2, 2))], True),
    "a vector repeated": ([lstm(return_sequences=False), Repeat(3), Flatten()], True),
}


@pytest.mark.parametrize(("nodes", "any_length"), LENGTHS.values(), ids=LENGTHS.keys())
def test_sequences_may_have_any_length_unless_a_node_fixes_it(nodes, any_length):
    simple, _ = built(*nodes, shape=(6, 3))
    assert simple.shapes["x"] == (None if any_length else 6, 3)


def test_a_requested_length_is_kept():
    builder = Builder()
    builder.output(builder.add("lstm", lstm(), builder.input("x", (6, 3))))
    assert builder.length("x", 1) == 6
    assert builder.network().shapes["x"] == (6, 3)

"""The native format of graphs: every node with every setting round trips; malicious descriptions."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from networks import make_cell

import cellstack as cs
from cellstack.nodes import (
    MLSTM,
    NODES,
    Activation,
    Attention,
    Bidirectional,
    Clip,
    Context,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    Function,
    GlobalPool,
    GridConv,
    GridPool,
    GroupedDense,
    GroupNorm,
    LayerNorm,
    Magnitude,
    Masking,
    Merge,
    Pad,
    PerFrame,
    Permute,
    Pool1D,
    Power,
    Recurrent,
    Reduce,
    Repeat,
    RepeatLike,
    Reshape,
    RMSNorm,
    Scale,
    Select,
    Skipped,
    Standardise,
    StepMask,
    Take,
    TimeSoftmax,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS


def floats(*shape, dtype="float32"):
    return np.random.default_rng(0).uniform(0.5, 2.0, size=shape).astype(dtype)


EVERY = {
    "standardise": lambda d: [Standardise(floats(3, dtype=d), floats(3, dtype=d))],
    "scale": lambda d: [Scale(floats(3, dtype=d), floats(3, dtype=d))],
    "layer_norm": lambda d: [
        LayerNorm(),
        LayerNorm(floats(3, dtype=d)),
        LayerNorm(None, floats(3, dtype=d), 1e-6),
        LayerNorm(floats(3, dtype=d), floats(3, dtype=d), 1.0),
    ],
    "rms_norm": lambda d: [RMSNorm(), RMSNorm(floats(3, dtype=d), floats(3, dtype=d), 1e-3)],
    "grouped_dense": lambda d: [
        GroupedDense(floats(3, 1, 2, dtype=d)),
        GroupedDense(floats(3, 1, 2, dtype=d), floats(6, dtype=d)),
    ],
    "dense": lambda d: [Dense(floats(3, 2, dtype=d)), Dense(floats(3, 2, dtype=d), floats(2, dtype=d), "elu(0.5)")],
    "activation": lambda d: [Activation(name) for name in MORE_ACTIVATIONS],
    "clip": lambda d: [Clip(0.0), Clip(None, 1.5), Clip(-1.0, 1.0)],
    "embedding": lambda d: [Embedding(floats(5, 2, dtype=d)), Embedding(floats(5, 2, dtype=d), True)],
    "masking": lambda d: [Masking(), Masking(-1.5)],
    "step_mask": lambda d: [StepMask()],
    "conv1d": lambda d: [
        Conv1D(floats(2, 3, 4, dtype=d)),
        Conv1D(floats(2, 3, 4, dtype=d), floats(4, dtype=d), 2, "same", 1, 1, "relu"),
        Conv1D(floats(2, 1, 6, dtype=d), None, 1, "causal", 2, 3),
        Conv1D(floats(2, 3, 4, dtype=d), padding=(1, 0)),
    ],
    "pool1d": lambda d: [Pool1D("max", 2), Pool1D("mean", 3, 1, "same"), Pool1D("mean", 3, 2, (1, 2))],
    "pool": lambda d: [GlobalPool("last")],
    "reduce": lambda d: [Reduce(), Reduce("max", 1, True)],
    "pad": lambda d: [Pad(1, 2), Pad(0, 3, -1.5, -1)],
    "flatten": lambda d: [Flatten()],
    "reshape": lambda d: [Reshape((2, -1)), Reshape((6,))],
    "permute": lambda d: [Permute((2, 1))],
    "repeat": lambda d: [Repeat(3)],
    "repeat_like": lambda d: [RepeatLike()],
    "select": lambda d: [Select(), Select(None, -1, 2, -1), Select(1, 3)],
    "merge": lambda d: [Merge(), Merge("sub", 1), Merge("min")],
    "take": lambda d: [Take((0, 2, 1)), Take((4, 4), 1)],
    "magnitude": lambda d: [Magnitude(), Magnitude(1e-6)],
    "grid_conv": lambda d: [
        GridConv(floats(2, 3, 1, 4, dtype=d), (3,)),
        GridConv(
            floats(2, 2, 3, 1, 2, dtype=d),
            (2, 3),
            floats(2, dtype=d),
            (2, 1, 1),
            ((1, 0), (0, 0), (0, 2)),
            (1, 1, 2),
            (1, 2, 1),
            2,
        ),
    ],
    "grid_pool": lambda d: [
        GridPool("max", (4,), 2, (1, 2)),
        GridPool("mean", (3,), 1, (2, 2), (1, 1), ((1, 0), (1, 0)), (1, 2), True),
    ],
    "group_norm": lambda d: [
        GroupNorm(3, floats(3, dtype=d), floats(3, dtype=d)),
        GroupNorm(1, None, None, 1e-3, False),
    ],
    "power": lambda d: [Power(0.5), Power(-1.0)],
    "function": lambda d: [Function("abs")],
    "time_softmax": lambda d: [TimeSoftmax()],
    "attention": lambda d: [Attention(), Attention(1, 0.5, True)],
    "mlstm": lambda d: [MLSTM(1, 1, 1), MLSTM(1, 1, 2, 0.0, True)],
    "context": lambda d: [Context(3)],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", EVERY)
def test_every_node_round_trips_with_every_setting(kind, dtype, tmp_path):
    for node in EVERY[kind](dtype):
        inputs = {"merge": ("x", "y"), "step_mask": ("x", "y"), "attention": ("x", "y", "z")}.get(kind, ("x",))
        inputs = ("x", "y") if kind == "repeat_like" else inputs
        shapes = {"x": (None, 3), "y": (None,)} if kind == "step_mask" else inputs
        shapes = {"x": (3,), "y": (None, 3)} if kind == "repeat_like" else shapes
        net = cs.Network([node], ["node"], inputs=shapes, wires=[inputs])
        net.save(tmp_path / "net.safetensors")
        other = cs.load(tmp_path / "net.safetensors")
        assert type(other.nodes[0]) is type(node)
        assert vars(other.nodes[0]).keys() >= {*NODES[kind].settings()}
        for name, value in vars(node).items():
            got = getattr(other.nodes[0], name)
            if isinstance(value, np.ndarray):
                assert got.tobytes() == value.tobytes()
                assert (got.dtype, got.shape) == (value.dtype, value.shape)
                assert not got.flags.writeable
            else:
                assert got == value
                assert type(got) is type(value)
        assert (other.inputs, other.wires, other.shapes) == (net.inputs, net.wires, net.shapes)


def test_every_node_is_tested():
    assert {*EVERY, "recurrent", "bidirectional", "per_frame", "skipped"} == NODES.keys()


@pytest.mark.parametrize("kind", [PerFrame, Skipped])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nodes_within_a_frame_round_trip(kind, dtype, tmp_path):
    inner = (Reshape((-1, 2)), Conv1D(floats(2, 2, 4, dtype=dtype)), Activation("tanh"), Merge("mul"), Flatten())
    node = kind((8,), inner, ((0,), (1,), (2,), (2, 3), (4,)))
    net = cs.Network([node], ["node"], inputs={"x": (None, 8)})
    net.save(tmp_path / "net.safetensors")
    other = cs.load(tmp_path / "net.safetensors")
    assert type(other.nodes[0]) is kind
    assert (other.nodes[0].frame, other.nodes[0].takes) == (node.frame, node.takes)
    assert other.nodes[0].nodes[1].kernel.tobytes() == inner[1].kernel.tobytes()
    x = floats(2, 3, 8, dtype=dtype)
    np.testing.assert_array_equal(other(x), net(x))
    assert np.array_equal(net(x), x) == (kind is Skipped)
    assert other.nodes[0].stored()[0] == node.stored()[0]


def test_the_format_page_lists_every_key_and_every_tensor():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    table = text[text.index("| `type` |") :].split("\n\n")[0]
    rows = {cells[1].strip(" `"): cells[2:4] for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert rows.keys() == NODES.keys()
    for kind in EVERY:
        (keys, tensors), known = rows[kind], {*NODES[kind].keys(), *NODES[kind].added}
        named = set(re.findall(r"`(\w+)`", keys))
        assert known <= named, kind
        words = "valid same causal mean max min sum last concat add mul ave sub"
        assert named - known <= set(words.split()), kind
        made = [vars(node).items() for node in EVERY[kind]("float32")]
        arrays = {name for items in made for name, value in items if isinstance(value, np.ndarray) and name[0] != "_"}
        assert arrays <= set(re.findall(r"`(\w+) \[", tensors)), kind


def test_the_format_page_lists_the_activations_of_nodes():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    line = re.search(r"for `dense`, `conv1d` and `activation` also (.*?)\.\n", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", line[1]) == list(MORE_ACTIVATIONS)


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def graph():
    """A network of every kind of node except those that the other tests damage."""
    rng = np.random.default_rng(0)
    cell, back = make_cell(rng, 5, 4), make_cell(rng, 4, 3, kind="gru")
    nodes = {
        "table": (Embedding(floats(9, 2), True), ["id"]),
        "both": (Merge(), ["x", "table"]),
        "lstm": (Recurrent((cell,)), ["both"]),
        "two": (Bidirectional(Recurrent((back,)), Recurrent((back,), go_backwards=True)), ["lstm"]),
        "conv": (Conv1D(floats(2, 3, 4), floats(4), 1, "same", 1, 2, "relu"), ["two"]),
        "max": (Pool1D("max", 2), ["conv"]),
        "norm": (LayerNorm(floats(4), None), ["max"]),
        "scale": (Scale(floats(4), floats(4)), ["norm"]),
        "slice": (Select(None, 2, 1, -1), ["scale"]),
        "flat": (Flatten(), ["slice"]),
        "wide": (Reshape((3, -1)), ["flat"]),
        "turned": (Permute((2, 1)), ["wide"]),
        "pool": (GlobalPool("mean"), ["turned"]),
        "again": (Repeat(2), ["pool"]),
        "mask": (Masking(0.0), ["again"]),
    }
    inputs = {"x": (6, 3), "id": (6,)}
    wires = [wire for _, wire in nodes.values()]
    return cs.Network(
        [node for node, _ in nodes.values()], list(nodes), inputs=inputs, wires=wires, outputs=["mask", "pool"]
    )


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "net.safetensors"
    graph().save(path)
    return path.read_bytes()


def changed(blob, change):
    """The file with its description changed."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    description = json.loads(header["__metadata__"]["cellstack"])
    nodes = {node["name"]: node for node in description["nodes"]}
    change(description, nodes)
    header["__metadata__"]["cellstack"] = json.dumps(description)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]


def put(name, key, value):
    return lambda description, nodes: nodes[name].__setitem__(key, value)


def top(key, value):
    return lambda description, nodes: description.__setitem__(key, value)


def drop(name, key):
    return lambda description, nodes: nodes[name].pop(key)


def to_both_too(description, nodes):
    nodes["scale"]["wires"] = ["both"]
    description["outputs"].append("norm")


INPUTS = [{"name": "x", "shape": [6, 3]}, {"name": "id", "shape": [6]}]
DAMAGE = {
    "to the future": (put("table", "wires", ["lstm"]), "wires of table to be earlier nodes, got 'lstm'"),
    "a circle": (put("lstm", "wires", ["lstm"]), "wires of lstm to be earlier nodes, got 'lstm'"),
    "to nothing": (put("lstm", "wires", ["nothing"]), "wires of lstm to be inputs or nodes, got 'nothing'"),
    "two wires": (
        put("lstm", "wires", ["both", "both"]),
        "lstm: Recurrent expected one input, or 3 with the initial h, c, got 2",
    ),
    "no wires": (put("lstm", "wires", []), "wires of lstm to be a tuple of names"),
    "wires text": (put("lstm", "wires", "both"), "'lstm': expected wires to be a list of names, found 'both'"),
    "wires numbers": (put("lstm", "wires", [1]), r"'lstm': expected wires to be a list of names, found \[1\]"),
    "wires missing": (drop("lstm", "wires"), "'lstm': expected wires to be a list of names, found None"),
    "unused node": (put("two", "wires", ["both"]), "node 'lstm' doesn't lead to an output"),
    "unused input": (
        lambda d, nodes: d["inputs"].append({"name": "z", "shape": [3]}),
        "input 'z' doesn't lead to an output",
    ),
    "inputs object": (top("inputs", {}), "expected inputs to be list, found dict"),
    "no inputs": (top("inputs", []), "inputs to be different names, at least one"),
    "input text": (top("inputs", ["x"]), r"inputs: expected the keys \['name', 'shape'\], found str"),
    "input without shape": (top("inputs", [{"name": "x"}]), "inputs: expected the keys"),
    "input twice": (top("inputs", [*INPUTS, INPUTS[0]]), "the input 'x' occurs more than once"),
    "input number": (top("inputs", [{"name": 1, "shape": [3]}]), "expected name to be str, found int"),
    "input a node": (
        top("inputs", [*INPUTS, {"name": "lstm", "shape": [3]}]),
        "an input and a node have the same name, 'lstm'",
    ),
    "shape null": (top("inputs", [{"name": "x", "shape": None}]), "expected shape to be list, found NoneType"),
    "shape empty": (top("inputs", [{"name": "x", "shape": []}]), "shape of input x to be its axes after B"),
    "shape text": (top("inputs", [{"name": "x", "shape": ["T", 3]}]), "every axis to be an integer from 1"),
    "shape huge": (top("inputs", [{"name": "x", "shape": [2**70, 3]}]), "every axis to be an integer from 1"),
    "shape long": (top("inputs", [{"name": "x", "shape": [1] * 10**5}]), "shape of input x to be its axes after B"),
    "outputs text": (top("outputs", "mask"), "expected outputs to be list|outputs to be a list of names"),
    "outputs none": (top("outputs", []), "outputs to be a tuple of nodes' names"),
    "outputs twice": (top("outputs", ["mask", "mask"]), "outputs that differ"),
    "outputs unknown": (top("outputs", ["x"]), "every output to be a node or a state of one, got 'x'"),
    "outputs object": (top("outputs", [{}]), "outputs to be a list of names"),
    "ids": (put("table", "ids", 8), r"tensor 'table/table': expected shape \[8, 2\], found \[9, 2\]"),
    "ids huge": (put("table", "ids", 1 << 63), "tensor 'table/table': expected shape"),
    "ids negative": (put("table", "ids", -9), "tensor 'table/table': expected shape"),
    "mask_zero": (put("table", "mask_zero", 1), "'table': expected mask_zero to be bool, found int"),
    "merge mode": (put("both", "mode", "dot"), "'both': Merge: expected mode to be one of"),
    "merge axis": (put("both", "axis", 0), "'both': Merge: expected axis to be an integer other than 0"),
    "merge axis float": (put("both", "axis", 1.0), "'both': expected axis to be int, found float"),
    "conv groups": (put("conv", "groups", 3), "tensor 'conv/kernel': expected shape"),
    "conv groups none": (put("conv", "groups", 0), "'conv': expected groups to divide input_size 6, found 0"),
    "conv groups odd": (put("conv", "groups", 4), "'conv': expected groups to divide input_size 6, found 4"),
    "conv groups negative": (put("conv", "groups", -2), "'conv': expected groups to divide input_size 6, found -2"),
    "conv taps": (put("conv", "taps", 3), r"tensor 'conv/kernel': expected shape \[3, 3, 4\], found \[2, 3, 4\]"),
    "conv strides": (put("conv", "strides", 0), "'conv': Conv1D: expected strides to be an integer from 1"),
    "conv dilation": (put("conv", "dilation", 2**31), "'conv': Conv1D: expected dilation to be an integer from 1"),
    "conv padding": (put("conv", "padding", "full"), "'conv': Conv1D: expected padding to be one of"),
    "conv padding null": (put("conv", "padding", None), "'conv': expected padding to be str or list, found NoneType"),
    "conv padding list": (put("conv", "padding", [1]), "'conv': Conv1D: expected padding to be one of"),
    "conv padding deep": (put("conv", "padding", [[1], 2]), "'conv': Conv1D: expected padding to be an integer from 0"),
    "conv padding true": (
        put("conv", "padding", [True, 2]),
        "'conv': Conv1D: expected padding to be an integer from 0",
    ),
    "conv activation": (put("conv", "activation", "cube"), "'conv': Conv1D: activation: expected"),
    "conv bias": (put("conv", "use_bias", False), "tensor 'conv/bias': no node uses it"),
    "pool size": (put("max", "size", 0), "'max': Pool1D: expected size to be an integer from 1"),
    "pool strides null": (put("max", "strides", None), "'max': expected strides to be int, found NoneType"),
    "norm epsilon": (put("norm", "epsilon", 0), "'norm': LayerNorm: expected epsilon to be a finite number above 0"),
    "norm width": (put("norm", "input_size", None), "'norm': expected input_size with gain or bias, and null without"),
    "norm text": (put("norm", "input_size", "4"), "'norm': expected input_size to be int or NoneType, found str"),
    "norm without": (put("norm", "use_gain", False), "'norm': expected input_size with gain or bias, and null without"),
    "norm bias": (put("norm", "use_bias", True), "tensor 'norm/bias': expected shape .4., found no such"),
    "slice step": (put("slice", "step", 0), "'slice': Select: expected step and axis other than 0"),
    "slice start": (put("slice", "start", "a"), "'slice': expected start to be int or NoneType, found str"),
    "slice huge": (put("slice", "start", 10**30), "'slice': Select: expected start to be an integer"),
    "slice nothing": (put("slice", "start", 2), "slice: Select expected to take at least one of 4 features"),
    "reshape": (put("wide", "shape", [4, -1]), "wide: can't reshape .B, 6. to .B, 4, -1.: the sizes"),
    "reshape list": (put("wide", "shape", [[3], 2]), "'wide': Reshape: expected every axis to be an integer"),
    "reshape text": (put("wide", "shape", "3"), "'wide': expected shape to be list, found str"),
    "reshape long": (put("wide", "shape", [1] * 10**5), "'wide': Reshape: expected shape to be lengths"),
    "permute": (put("turned", "dims", [1, 3]), "'turned': Permute: expected dims to be each axis once"),
    "permute deep": (put("turned", "dims", [[1], [2]]), "'turned': Permute: expected dims to be each axis once"),
    "permute one": (put("turned", "dims", [1]), "turned: Permute expected 1 axes after the batch"),
    "repeat": (put("again", "times", -1), "'again': Repeat: expected times to be an integer from 1"),
    "masking": (put("mask", "value", "0"), "'mask': expected value to be float, found str"),
    "type": (
        put("mask", "type", "dropout"),
        "'mask': expected type to be one of .*, merge, .*, recurrent, .*, found 'dropout'",
    ),
    "width": (to_both_too, "scale: expected an input of 4 features, got 5 from before it"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_errors_name_the_damage(case, blob, tmp_path):
    change, message = DAMAGE[case]
    path = tmp_path / "net.safetensors"
    path.write_bytes(changed(blob, change))
    with pytest.raises(cs.FormatError, match=rf"net\.safetensors: .*({message})") as error:
        cs.load(path)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_the_graph_itself_loads(blob, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(changed(blob, lambda description, nodes: None))
    x, ids = np.random.default_rng(1).normal(size=(2, 6, 3)), np.arange(12).reshape(2, 6) % 9
    for one, other in zip(cs.load(path)((x, ids)), graph()((x, ids)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.long
def test_every_bit_of_a_graph_s_header(blob, tmp_path):
    """A flipped bit (in each fifth byte) raises an error or gives a network that runs, never anything else."""
    path, passed = tmp_path / "net.safetensors", 0
    size = 8 + int.from_bytes(blob[:8], "little")
    for at in range(0, size, 5):
        spoilt = bytearray(blob)
        spoilt[at] ^= 1 << (at // 5 % 8)
        path.write_bytes(spoilt)
        try:
            net = cs.load(path)
        except cs.FormatError:
            continue
        passed += 1
        axes = [[1, *(6 if axis is None else axis for axis in net.shapes[name])] for name in net.inputs]
        net([np.zeros(shape) for shape in axes])
    assert passed < size / 25  # most bits matter


@pytest.mark.long
def test_large_graphs_are_fast(tmp_path):
    """Thousands of nodes, wires, inputs or outputs are read, or refused, in seconds."""
    path, count = tmp_path / "net.safetensors", 8_000
    relu = {"type": "activation", "activation": "relu"}
    chain = [{"name": f"n{n}", "wires": [f"n{n - 1}" if n else "x"], **relu} for n in range(count)]
    fan = [{"name": f"n{n}", "wires": [f"x{n}"], **relu} for n in range(count)]
    merge = {"name": "all", "wires": [node["name"] for node in fan], "type": "merge", "mode": "add", "axis": -1}
    one = [{"name": "x", "shape": [None, 3]}]
    many = [{"name": f"x{n}", "shape": [None, 3]} for n in range(count)]
    twice = {"name": "all", "wires": ["x"] * 200_000, "type": "merge", "mode": "concat", "axis": -1}
    for inputs, nodes, outputs in (
        (one, chain, [chain[-1]["name"]]),
        (one, chain, [node["name"] for node in chain]),
        (many, [*fan, merge], ["all"]),
        (one, [twice], ["all"]),
        (one, chain[::-1], ["n0"]),
    ):
        description = {"version": 1, "inputs": inputs, "nodes": nodes, "outputs": outputs, "metadata": {}}
        path.write_bytes(safetensors.numpy.save({}, {"cellstack": json.dumps(description)}))
        start = time.process_time()
        if nodes[0] is chain[-1]:
            with pytest.raises(cs.FormatError, match="earlier nodes"):
                cs.load(path)
        else:
            assert len(cs.load(path).nodes) == len(nodes)
        assert time.process_time() - start < 10

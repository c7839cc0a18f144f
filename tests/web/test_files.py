"""Files that the npm package can't read: its messages name the tensor, node or setting."""

import json
import struct

import numpy as np
import pytest
from networks import make_cell

from cellstack import FormatError, Network, Patch, load
from cellstack.nodes import Dense, PerFrame, Recurrent

pytestmark = pytest.mark.web


@pytest.fixture
def saved(rng, tmp_path):
    """The bytes of a network's file."""
    path = tmp_path / "net.safetensors"
    Network([Recurrent((make_cell(rng, 3, 4),)), Dense(np.ones((4, 2), "f4"), np.ones(2, "f4"), "softmax")]).save(path)
    return path.read_bytes()


def opened(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def closed(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(data, change):
    """Return the file after `change(header)`."""
    header, body = opened(data)
    change(header)
    return closed(header, body)


def redescribed(data, change):
    """Return the file after `change(description)`."""

    def of_header(header):
        description = json.loads(header["__metadata__"]["cellstack"])
        change(description)
        header["__metadata__"]["cellstack"] = json.dumps(description)

    return changed(data, of_header)


def with_tensor(data, name, dtype, numbers):
    header, body = opened(data)
    header[name] = {
        "dtype": dtype,
        "shape": list(numbers.shape),
        "data_offsets": [len(body), len(body) + numbers.nbytes],
    }
    return closed(header, body + numbers.tobytes())


def test_damaged_files(package, saved):
    def rename(header):
        header["layer_0/0/weights"] = header.pop("layer_0/0/kernel")

    def transpose(header):
        header["layer_0/0/kernel"]["shape"].reverse()

    cases = [
        (b"", "expected a safetensors file: it has 0 bytes"),
        (b"\xff" * 64, "expected a safetensors file: its header has"),
        (saved[:8] + b"x" * 5000, "expected a safetensors file: its header isn't JSON"),
        (saved[:-4], "the file ends before this tensor does, it may be truncated"),
        (saved + b"1234", "4 bytes after them"),
        (changed(saved, lambda header: header.pop("__metadata__")), "has no description of a network"),
        (changed(saved, rename), "layer_0/0/kernel: expected this tensor in the file, [3, 16]"),
        (changed(saved, transpose), "layer_0/0/kernel: expected [3, 16], got [16, 3]"),
        (with_tensor(saved, "more", "F32", np.ones(1, "f4")), "more: no node uses this tensor"),
        (with_tensor(saved, "more", "F64", np.ones(1)), "more: no node uses this tensor"),
        (with_tensor(saved, "more", "I64", np.ones(1, "i8")), "more: expected F64, F32, BF16, got I64"),
        (
            redescribed(saved, lambda one: one.pop("nodes")),
            "expected a description of a network, which has a list of nodes",
        ),
        (redescribed(saved, lambda one: one.update(version=2)), "expected a description of version 1, got 2"),
        (redescribed(saved, lambda one: one["nodes"][1].update(type="new")), "a node of the type new isn't supported"),
        (
            redescribed(saved, lambda one: one["nodes"][1].update(activation="odd")),
            "the activation odd isn't supported",
        ),
        (
            redescribed(saved, lambda one: one["nodes"][0]["cells"][0].update(kind="new")),
            "layer_0/0: expected kind to be one of lstm, gru",
        ),
        (
            redescribed(saved, lambda one: one["nodes"][0]["cells"][0].update(peephole=True)),
            "layer_0, cell 0: the setting peephole isn't supported",
        ),
        (
            redescribed(saved, lambda one: one["nodes"][0]["cells"][0].update(proj_size=4)),
            "layer_0/0: expected proj_size from 0 to below units=4, got 4",
        ),
    ]
    for data, _ in cases:
        package.add(data)
    for found, (_, message) in zip(package.run(), cases, strict=True):
        assert message in found["error"]
        assert found["name"] == "FormatError"


def test_descriptions_with_values_of_a_wrong_type(package, saved, tmp_path):
    """Python refuses them too."""

    def cell(**changes):
        return lambda one: one["nodes"][0]["cells"][0].update(changes)

    def node(n, **changes):
        return lambda one: one["nodes"][n].update(changes)

    cases = [
        (lambda one: one.update(metadata=[]), "description: metadata: expected an object, got []"),
        (lambda one: one.update(inputs=[None]), "description: input 0: expected an object, got null"),
        (lambda one: one["inputs"][0].update(shape=3), "description: input 0: shape: expected a list of sizes"),
        (
            lambda one: one["inputs"][0].update(shape=[None, 5]),
            "layer_0: expected an input of 3 features, got 5 from x",
        ),
        (lambda one: one["inputs"][0].update(shape=[3]), "layer_0: expected a sequence [B, T, W] from x"),
        (lambda one: one.update(nodes=[None]), "description: node 0: expected an object, got null"),
        (lambda one: one.update(outputs=[]), "description: outputs: expected a list of names, got []"),
        (lambda one: one.update(outputs=["other"]), "expected outputs to be values of the network, got other"),
        (node(1, name="layer_0"), 'description: node 1: name: "layer_0" occurs twice'),
        (node(1, wires=None), "description: node 1: wires: expected a list of names, got null"),
        (node(0, wires=["layer_1"]), "layer_0: expected an input or an earlier node, got layer_1"),
        (node(0, return_sequences=None), "layer_0: return_sequences: expected true or false, got null"),
        (node(0, cells=None), "layer_0: cells: expected a list of cells, got null"),
        (node(0, cells=[None]), "layer_0, cell 0: expected an object, got null"),
        (cell(units="4"), 'layer_0, cell 0: units: expected a positive integer, got "4"'),
        (cell(clip="1"), 'layer_0, cell 0: clip: expected a number or null, got "1"'),
        (cell(peepholes=0), "layer_0, cell 0: peepholes: expected true or false, got 0"),
        (cell(gate_activations=[]), "layer_0, cell 0: gate_activations: expected activations by gate, got []"),
        (node(1, use_bias=None), "layer_1: use_bias: expected true or false, got null"),
        (node(1, activation=None), "layer_1: activation: expected a text, got null"),
        (node(1, type="pool", mode="least"), 'layer_1: mode: expected one of mean, max, last, final, got "least"'),
    ]
    for change, _ in cases:
        package.add(redescribed(saved, change))
        (tmp_path / "damaged.safetensors").write_bytes(redescribed(saved, change))
        with pytest.raises(FormatError):
            load(tmp_path / "damaged.safetensors")
    for found, (_, message) in zip(package.run(), cases, strict=True):
        assert message in found["error"]
        assert found["name"] == "FormatError"


def test_networks_with_parts_that_only_python_has(package, rng):
    cells = Recurrent((make_cell(rng, 3, 4),))
    doubles = Network([Recurrent((make_cell(rng, 3, 4, "float64"),))])
    cases = [
        (doubles, "layer_0/0/kernel: expected F32 or BF16, got F64"),
        (Network([cells]).edit(Patch("layer_0", "f", value=1.0)), "The network's patches aren't supported"),
        (Network([cells], outputs=["layer_0/c"]), "The output layer_0/c, which is a state, isn't supported"),
        (Network([PerFrame((3,), (Dense(np.ones((3, 2), "f4")),), ((0,),))]), "per_frame isn't supported"),
    ]
    for net, _ in cases:
        package.add(net)
    for found, (_, message) in zip(package.run(), cases, strict=True):
        assert message in found["error"]


def test_inputs_that_do_not_fit(package, rng):
    net = Network([Recurrent((make_cell(rng, 3, 4),))])
    x = np.zeros((2, 5, 3), "f4")
    cases = [
        ("run", {"x": np.zeros((2, 5, 4), "f4"), "options": {}}, "expected x [B, any, 3], got [2, 5, 4]"),
        ("run", {"x": x, "options": {"state": []}}, "expected 1 states, got 0"),
        ("run", {"x": x, "options": {"mask": np.ones(3, "u1")}}, "expected mask of x [B=2, T=5], got 3 numbers"),
        ("stream", {"x": np.zeros((2, 5, 4), "f4"), "chunks": [1]}, "stream: expected x [B=2, T=1, 3], got 8 numbers"),
        ("stream", {"x": x, "chunks": [1], "state": []}, "expected state to be a list of 1 states"),
    ]
    for action, given, _ in cases:
        package.add(net, action, **given)
    for found, (_, _, message) in zip(package.run(), cases, strict=True):
        assert message in found["error"]

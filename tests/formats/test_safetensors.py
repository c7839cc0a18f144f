"""The native format: exact round trips, damage of every kind, and atomic saving."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pairs
import pytest
import safetensors
import safetensors.numpy
from family import random_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import fill, make_cell, make_network

import cellstack as cs
from cellstack.cells import KINDS
from cellstack.cells.arguments import REQUIRED
from cellstack.cells.spec import ARRAYS, GATES
from cellstack.formats.files import replacing
from cellstack.nodes.cell_arrays import CELL_FLAGS, CELL_WIDTHS

CELL_KEYS = CELL_WIDTHS | CELL_FLAGS


def file_of(header, data=b"", length=None):
    """A file's bytes from a header (JSON or bytes) and its arrays' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def parts_of(blob):
    """The header and the arrays' bytes of a file."""
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def small():
    rng = np.random.default_rng(0)
    gru = {"kind": "gru", "clip": 5.0, "gate_activations": {"r": "hard_sigmoid(0.2, 0.5)"}}
    stack = cs.nodes.Recurrent(
        (make_cell(rng, 3, 2), make_cell(rng, 2, 2, use_bias=False), make_cell(rng, 2, 2, **gru))
    )
    ahead, back = (
        cs.nodes.Recurrent((make_cell(rng, 2, 2),)),
        cs.nodes.Recurrent((make_cell(rng, 2, 2),), go_backwards=True),
    )
    dense = cs.nodes.Dense(rng.normal(size=(4, 2)).astype("f4"), np.ones(2, "f4"), "softmax")
    nodes = [
        cs.nodes.Standardise(np.zeros(3, "f4"), np.ones(3, "f4")),
        stack,
        cs.nodes.Bidirectional(ahead, back),
        cs.nodes.GlobalPool(),
        dense,
    ]
    return cs.Network(nodes, ["scale", "stack", "both", "pool", "out"], {"labels": ["a", "b"]})


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "net.safetensors"
    small().save(path)
    return path.read_bytes()


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(40))
def test_a_network_round_trips_bit_for_bit(seed, dtype, tmp_path):
    net = make_network(seed, dtype)
    path = tmp_path / "net.safetensors"
    cs.Network(net.nodes, [f"node {n}" for n in range(len(net.nodes))], {"seed": seed, "é": [None, {"x": 0.1}]}).save(
        path
    )
    other = cs.load(path)
    assert [type(node) for node in other.nodes] == [type(node) for node in net.nodes]
    assert other.names == tuple(f"node {n}" for n in range(len(net.nodes)))
    assert other.metadata == {"seed": seed, "é": [None, {"x": 0.1}]}
    assert other.dtype == net.dtype
    for one, two in zip(net.cells, other.cells, strict=True):
        assert one.spec == two.spec
        assert all(one.arrays[name].tobytes() == two.arrays[name].tobytes() for name in one.spec.shapes)
    assert [getattr(node, "residual", None) for node in other.nodes] == [
        getattr(node, "residual", None) for node in net.nodes
    ]
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(3, 5, net.input_size)), rng.random((3, 5)) < 0.7
    assert np.array_equal(other(x, mask), net(x, mask), equal_nan=True)
    again = tmp_path / "again.SafeTensors"
    other.save(str(again))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", GATES)
@pairs.seeds(10, 20)
def test_a_cell_of_every_flag_round_trips(seed, kind, tmp_path):
    rng = np.random.default_rng(seed)
    cell = fill(rng, random_spec(rng, kind), "float64" if seed % 2 else "float32")
    cs.Network([cs.nodes.Recurrent((cell,), residual=bool(seed % 3))]).save(tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", "np") as file:
        (node,) = json.loads(file.metadata()["cellstack"])["nodes"]
        assert sorted(file.keys()) == sorted(f"layer_0/0/{name}" for name in cell.spec.shapes)
    assert node["cells"] == [cell.spec.settings]
    assert {"input_size", "units"} <= node["cells"][0].keys()
    other = cs.load(tmp_path / "net.safetensors").nodes[0]
    assert other.residual == bool(seed % 3)
    assert other.cells[0].spec == cell.spec
    for name, array in cell.arrays.items():
        assert other.cells[0].arrays[name].tobytes() == array.tobytes()


def test_a_name_without_a_suffix_is_refused_with_the_native_one(tmp_path):
    net = cs.Network([cs.nodes.Dense(np.ones((2, 3), "f4"))])
    with pytest.raises(
        ValueError, match=r"got '.*/q': \.safetensors supports every network, such as '.*/q\.safetensors'"
    ):
        net.save(tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_integers_are_accepted_as_floats(tmp_path):
    cell = make_cell(np.random.default_rng(0), 2, 2, clip=5)  # some languages write 5.0 so
    cs.Network([cs.nodes.Recurrent((cell,))]).save(tmp_path / "net.safetensors")
    assert cs.load(tmp_path / "net.safetensors").cells[0].spec == cs.CellSpec(2, 2, clip=5.0)


def test_the_format_page_lists_every_setting_and_every_tensor():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    tables = {found[1]: found[0] for found in re.finditer(r"^\| (\w+).*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)}
    rows = [line.split("|")[1:4] for line in tables["setting"].splitlines()[2:]]
    said = {name: (kind, usual) for names, kind, usual in rows for name in re.findall(r"`(\w+)`", names)}
    types = {int: "integer", str: "text", bool: "boolean", float: "number", dict: "object of text"}
    types[bool, str] = "boolean or text"
    assert said.keys() == CELL_KEYS.keys()
    for field in fields(cs.CellSpec):
        kind, usual = said[field.name]
        assert kind.strip() == types[CELL_KEYS[field.name]], field.name
        usual, *of_kinds = usual.strip().split("; ")  # those of kinds, after the usual one
        defaults = {}
        for kinds, value in (part.split(": ") for part in of_kinds):
            defaults |= dict.fromkeys(kinds.split(", "), value)
        for kind in KINDS.values():
            default = kind.settings.get(field.name, field).default
            if default in (None, MISSING, REQUIRED):
                assert not usual, field.name
            else:
                value = json.loads(defaults.get(kind.name, usual).strip("`"))
                assert value == (default or type(value)()), (field.name, kind.name)
    assert re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.+?) \|", tables["tensor"], re.MULTILINE))) == list(ARRAYS)
    assert re.findall(r"^\| `(\w+)` \| \*\*(.+?)\*\*", text, re.MULTILINE) == [
        (kind, " ".join(gates)) for kind, gates in GATES.items()
    ]


def test_nan_and_infinite_weights_round_trip(tmp_path):
    kernel = np.array([[np.nan, np.inf], [-np.inf, -0.0]], "f4")
    cs.Network([cs.nodes.Dense(kernel)]).save(tmp_path / "net.safetensors")
    assert cs.load(tmp_path / "net.safetensors").nodes[0].kernel.tobytes() == kernel.tobytes()


def test_other_readers_and_writers_of_safetensors_agree(blob, tmp_path):
    path, other = tmp_path / "net.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(blob)
    tensors = safetensors.numpy.load_file(path)
    assert np.array_equal(tensors["stack/0/kernel"], small().nodes[1].cells[0].kernel)
    assert len(tensors) == 18
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file(tensors, other, metadata)  # it orders the tensors differently
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    assert np.array_equal(cs.load(other)(x), small()(x))


def test_additions_of_other_writers_are_ignored(blob, tmp_path):
    path, (header, data) = tmp_path / "net.safetensors", parts_of(blob)
    header["__metadata__"]["format"] = "pt"
    header["stack/0/kernel"]["note"] = "an unknown key, which the package passes over"
    path.write_bytes(file_of(header, data))
    assert np.array_equal(cs.load(path)(np.ones((1, 4, 3))), small()(np.ones((1, 4, 3))))


def test_loaded_arrays_are_owned_and_aligned(blob, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(blob)
    net = cs.load(path)
    cells = [getattr(cell, name) for cell in net.cells for name in cell.spec.shapes]
    for array in [*cells, net.nodes[0].mean, net.nodes[-1].kernel]:
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.flags.owndata
        assert array.dtype.isnative
        assert not array.flags.writeable


def test_a_fresh_process_loads_and_runs_without_torch(blob, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(blob)
    code = (
        "import sys, numpy as np, cellstack as cs\n"
        f"y = cs.load({str(path)!r})(np.ones((1, 4, 3)))\n"
        "assert 'torch' not in sys.modules\n"
        "print(y.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == small()(np.ones((1, 4, 3))).tolist()


def test_the_suffix_determines_the_format(tmp_path):
    for name in ("net.txt", "net", "net.tflite", ".safetensors"):
        with pytest.raises(ValueError, match=r"ends as one of safetensors \(.safetensors\), .*ONNX \(.onnx\), got"):
            small().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_content_determines_the_format(blob, tmp_path):
    (tmp_path / "anything.bin").write_bytes(blob)
    assert cs.load(tmp_path / "anything.bin").names == small().names
    for content in (b"", b"GIF89a and more", b"\x7fELF"):
        (tmp_path / "other.txt").write_bytes(content)
        with pytest.raises(cs.FormatError, match=r"other.txt: expected one of safetensors .*found a file that begins"):
            cs.load(tmp_path / "other.txt")


def test_the_native_suffix_may_be_omitted(tmp_path):
    small().save(tmp_path / "net.safetensors")
    (tmp_path / "net").mkdir()  # such as one for C code
    for name in (tmp_path / "net", str(tmp_path / "net")):
        assert cs.load(name).names == small().names
        assert cs.extract(name)
    with pytest.raises(FileNotFoundError, match=r"no such file, nor .*none\.safetensors: .*none'"):
        cs.load(tmp_path / "none")
    small().save(tmp_path / "other.safetensors")
    (tmp_path / "other").write_bytes(b"GIF89a")
    with pytest.raises(cs.FormatError):  # the name as given comes first
        cs.load(tmp_path / "other")


def test_files_that_can_t_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        cs.load(tmp_path / "none.safetensors")
    with pytest.raises(cs.FormatError, match="expected a folder with"):
        cs.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        small().save(tmp_path / "none" / "net.safetensors")


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(path, content, message=None):
    path.write_bytes(content)
    with pytest.raises(cs.FormatError, match=message) as error:
        cs.load(path)
    text = str(error.value)
    assert path.name in text
    assert len(text) < 600
    assert "\n" not in text
    text.encode()  # printable for any file
    return text


def package(words):
    """The message for a file that the package refuses, whose wording differs between versions."""
    return f"net.safetensors: expected a safetensors file, found '.*(?i:{words})"


def test_truncated_anywhere(blob, tmp_path):
    path = tmp_path / "net.safetensors"
    for size in range(0, len(blob), 1 if len(blob) < 2000 else 7):
        refused(path, blob[:size])
    refused(path, blob + b"\0", package("incomplete"))


def test_a_file_of_another_kind(tmp_path):
    image = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(20)
    refused(
        tmp_path / "net.safetensors", image, r"net.safetensors: expected a safetensors file, found a file that begins"
    )


def edited(change):
    """A change to the header's JSON, as a change to the file."""

    def apply(blob):
        header, data = parts_of(blob)
        return file_of(change(header) or header, data)

    return apply


def described(change):
    """A change to the description, as a change to the file."""

    def apply(blob):
        header, data = parts_of(blob)
        description = json.loads(header["__metadata__"]["cellstack"])
        description = change(description) or description
        header["__metadata__"]["cellstack"] = description if isinstance(description, str) else json.dumps(description)
        return file_of(header, data)

    return apply


def tensors(change):
    """A change to the arrays, as a change to the file."""

    def apply(blob):
        arrays = safetensors.numpy.load(blob)
        change(arrays)
        return safetensors.numpy.save(arrays, parts_of(blob)[0]["__metadata__"])

    return apply


def put(*path_and_value):
    """A change that puts a value at a path of keys."""
    *path, last, value = path_and_value

    def change(table):
        for key in path:
            table = table[key]
        table[last] = value

    return change


def drop(*path):
    def change(table):
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


K = "stack/0/kernel"
NOTHING = {
    "name": "none",
    "wires": ["x"],
    "type": "dense",
    "input_size": 0,
    "units": 1 << 63,
    "use_bias": False,
    "activation": "linear",
}


def description_of(*nodes):
    """A description of these nodes, the last of which is the output, as text."""
    graph = {"inputs": [{"name": "x", "shape": [None, None]}], "nodes": nodes, "outputs": [nodes[-1]["name"]]}
    return json.dumps({"version": 1, **graph, "metadata": {}})


JSON, INFO = package("invalid ?(header|json|utf-8)"), package("invalid ?(info|shape)")

DAMAGE = {
    # refused by the package
    "empty": (lambda b: b"", package("too ?small")),
    "length 2^63": (lambda b: file_of(b[8:], length=1 << 63), package("too ?large")),
    "length 2^64-1": (lambda b: b"\xff" * 8 + b[8:], package("too ?large")),
    "length 0": (lambda b: bytes(8) + b[8:], JSON),
    "length one less": (lambda b: file_of(b[8:], length=int.from_bytes(b[:8], "little") - 1), package("incomplete")),
    "length one more": (lambda b: file_of(b[8:], length=int.from_bytes(b[:8], "little") + 1), JSON),
    "bad utf-8": (lambda b: b[:20] + b"\xff" + b[21:], JSON),
    "a list": (lambda b: file_of([]), JSON),
    "no text": (edited(put("__metadata__", "cellstack", 3)), JSON),
    "metadata list": (edited(put("__metadata__", [])), JSON),
    "metadata twice": (lambda b: file_of(b'{"__metadata__": {}, "__metadata__": {}}'), JSON),
    "name twice": (
        lambda b: file_of(json.dumps(parts_of(b)[0]).replace("stack/0/bias", K).encode(), parts_of(b)[1]),
        package("offset"),
    ),
    "deep": (lambda b: file_of(b"[" * 100_000), JSON),
    "deep object": (lambda b: file_of(b'{"a":' * 100_000), JSON),
    "header of a long number": (lambda b: file_of(b'{"a": ' + b"9" * 10_000 + b"}"), JSON),
    "header with nan": (lambda b: file_of(b'{"a": NaN}'), JSON),
    "entry number": (edited(put(K, 7)), JSON),
    "entry short": (edited(drop(K, "shape")), JSON),
    "dtype size": (edited(put(K, "dtype", "F64")), INFO),
    "dtype type": (edited(put(K, "dtype", ["F32"])), JSON),
    "dtype unknown": (edited(put(K, "dtype", "F31")), JSON),
    "shape size": (edited(put(K, "shape", [3, 9])), INFO),
    "shape negative": (edited(put(K, "shape", [-3, -8])), JSON),
    "shape bool": (edited(put(K, "shape", [True, 24])), JSON),
    "shape float": (edited(put(K, "shape", [3.0, 8.0])), JSON),
    "shape huge": (edited(put(K, "shape", [1 << 62, 1 << 62])), package("overflow")),
    "shape long": (edited(put(K, "shape", [1] * 100_000)), INFO),
    "shape none": (edited(put(K, "shape", [0, 1 << 62])), INFO),
    "offsets": (edited(put(K, "data_offsets", [0, 96])), package(f"offset.*{K}")),
    "offsets beyond": (edited(put(K, "data_offsets", [1 << 40, (1 << 40) + 96])), package("offset.*stack/0/")),
    "offsets three": (edited(put(K, "data_offsets", [0, 96, 1])), JSON),
    "offsets negative": (edited(put(K, "data_offsets", [-96, 0])), JSON),
    "offsets shared": (lambda b: edited(put("more", parts_of(b)[0][K]))(b), package("offset")),
    "surrogate name": (edited(put("\ud800", 7)), JSON),
    # requirements on a network's arrays
    "weights alone": (edited(drop("__metadata__")), "expected a description under __metadata__.cellstack, found none"),
    "another's": (edited(put("__metadata__", {"format": "pt"})), "expected a description under"),
    "missing tensor": (
        tensors(drop("out/bias")),
        "tensor 'out/bias': expected shape .2., found no such tensor",
    ),
    "unused tensor": (
        tensors(put("more", np.ones(1, "f4"))),
        "tensor 'more': no node uses it",
    ),
    "unused and empty": (tensors(put("", np.ones(0, "f4"))), "tensor '': no node uses it"),
    "unused and odd": (tensors(put("\n\u202e" * 99, np.ones(1, "f4"))), r"tensor '\\n\\u202e.*: no node uses it"),
    "dtype": (tensors(put(K, np.ones((3, 8), "i4"))), f"tensor '{K}': expected dtype F32, F64 or BF16, found 'I32'"),
    "dtype that NumPy lacks": (
        edited(lambda h: h["stack/0/bias"].update(dtype="BF16", shape=[16])),
        "tensor 'stack/0/bias': expected dtype F32 or F64, found 'BF16'",
    ),
    "shape of bfloat16": (
        edited(lambda h: h[K].update(dtype="BF16", shape=[3, 16])),
        f"tensor '{K}': expected shape .3, 8., found .3, 16.",
    ),
    "dtype of one": (tensors(put(K, np.ones((3, 8)))), "'stack': Cell: expected"),
    "shape": (edited(put(K, "shape", [8, 3])), f"tensor '{K}': expected shape .3, 8., found .8, 3."),
    "shape of three axes": (edited(put(K, "shape", [3, 8, 1])), f"tensor '{K}': expected shape .3, 8., found .3, 8, 1"),
    "no numbers": (
        lambda b: file_of(
            {
                "__metadata__": {"cellstack": description_of(NOTHING)},
                "none/kernel": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]},
            }
        ),
        "tensor 'none/kernel': expected at least one number, found shape .0, 9223372036854775808.",
    ),
    # requirements on a description
    "deep description": (described(lambda d: "[" * 100_000), "description: the JSON is nested too deeply"),
    "key twice": (described(lambda d: '{"a": 1, "a": 2}'), "description: the key 'a' occurs more than once"),
    "nan": (described(lambda d: '{"a": NaN}'), "description: NaN isn't a number in JSON"),
    "too long a number": (described(lambda d: f'{{"a": {"9" * 10_000}}}'), "description: expected JSON, found"),
    "too long": (
        described(lambda d: " " * ((1 << 22) + 1)),
        "description: 4194305 characters are more than the limit of 4194304",
    ),
    "no description": (described(lambda d: "null"), "description: expected a version, found None"),
    "a list of it": (described(lambda d: "[]"), "description: expected a version, found None"),
    "no json": (described(lambda d: "hello"), "description: expected JSON"),
    "newer": (described(put("version", 2)), "expected version 1 or older, found 2: made by a newer cellstack"),
    "version 0": (described(put("version", 0)), "description: expected a version, found 0"),
    "version true": (described(put("version", True)), "description: expected a version, found True"),
    "version long": (described(put("version", 10**4000)), "expected version 1 or older"),
    "more keys": (described(put("code", "import os")), "description: unknown key 'code'; expected "),
    "metadata text": (described(put("metadata", "x")), "description: expected metadata to be dict, found str"),
    "metadata inf": (described(lambda d: json.dumps(d).replace('"a"', "1e999")), "metadata that JSON can hold"),
    "no nodes": (described(put("nodes", [])), "tensor '.*': no node uses it"),
    "node text": (described(put("nodes", 0, "x")), "expected a node with a name, found 'x'"),
    "no name": (described(drop("nodes", 0, "name")), "expected a node with a name"),
    "bad name": (described(put("nodes", 3, "name", "a/b")), "without '/', got 'a/b'"),
    "same name": (described(put("nodes", 3, "name", "out")), "5 different names"),
    "unknown node": (described(put("nodes", 3, "type", "gru")), "'pool': expected type to be one of .* found 'gru'"),
    "type list": (described(put("nodes", 3, "type", [])), r"'pool': expected type to be one of .* found \[\]"),
    "missing key": (described(drop("nodes", 3, "mode")), "'pool': expected the keys"),
    "unknown key": (described(put("nodes", 3, "axis", 1)), "'pool': unknown key 'axis'; expected "),
    "unknown mode": (described(put("nodes", 3, "mode", "sum")), "'pool': GlobalPool: expected mode to be one of"),
    "unknown activation": (
        described(put("nodes", 4, "activation", "cube")),
        "'out': Dense: activation: expected .*'cube'",
    ),
    "flag": (described(put("nodes", 1, "go_backwards", 0)), "'stack': expected go_backwards to be bool, found int"),
    "units": (
        described(put("nodes", 1, "cells", 0, "units", 3)),
        f"tensor '{K}': expected shape .3, 12., found .3, 8.",
    ),
    "units true": (
        described(put("nodes", 1, "cells", 0, "units", True)),
        "'stack/0': expected units to be int, found bool",
    ),
    "units none": (described(put("nodes", 1, "cells", 0, "units", 0)), "'stack': CellSpec: expected units >= 1, got 0"),
    "units huge": (described(put("nodes", 1, "cells", 0, "units", 10**30)), f"tensor '{K}': expected shape"),
    "units long": (described(put("nodes", 1, "cells", 0, "units", 10**4299)), "expected|Exceeds"),
    "clip text": (
        described(put("nodes", 1, "cells", 2, "clip", "5")),
        "'stack/2': expected clip to be float, found str",
    ),
    "clip true": (
        described(put("nodes", 1, "cells", 2, "clip", True)),
        "'stack/2': expected clip to be float, found bool",
    ),
    "clip null": (described(put("nodes", 1, "cells", 2, "clip", None)), "expected clip to be float, found NoneType"),
    "clip inf": (
        described(lambda d: json.dumps(d).replace('"clip": 5.0', '"clip": 1e999')),
        "'stack': CellSpec: expected clip above 0 and finite, got inf",
    ),
    "clip long": (described(put("nodes", 1, "cells", 2, "clip", 10**400)), "expected clip to be float, found int"),
    "clip negative": (described(put("nodes", 1, "cells", 2, "clip", -1.0)), "'stack': CellSpec: expected clip above 0"),
    "kind": (described(put("nodes", 1, "cells", 2, "kind", "mlp")), "'stack': CellSpec: expected kind to be one of"),
    "kind changed": (described(put("nodes", 1, "cells", 2, "kind", "rnn")), "'stack': CellSpec: expected .*'r'"),
    "flag of another kind": (
        described(put("nodes", 1, "cells", 2, "peepholes", True)),
        "'stack': CellSpec: peepholes is valid with kind='lstm' only",
    ),
    "peepholes": (
        described(put("nodes", 1, "cells", 0, "peepholes", True)),
        "tensor 'stack/0/peepholes': expected shape .3, 2., found no such tensor",
    ),
    "peepholes number": (
        described(put("nodes", 1, "cells", 0, "peepholes", 1)),
        "'stack/0': expected peepholes to be bool, found int",
    ),
    "projection": (
        described(put("nodes", 1, "cells", 0, "proj_size", 1)),
        "tensor 'stack/0/recurrent_kernel': expected",
    ),
    "projection float": (
        described(put("nodes", 1, "cells", 0, "proj_size", 1.0)),
        "expected proj_size to be int, found float",
    ),
    "projection huge": (described(put("nodes", 1, "cells", 0, "proj_size", 10**30)), "CellSpec: expected proj_size"),
    "gates list": (
        described(put("nodes", 1, "cells", 2, "gate_activations", [["r", "tanh"]])),
        "'stack/2': expected gate_activations to be dict, found list",
    ),
    "gate number": (
        described(put("nodes", 1, "cells", 2, "gate_activations", "r", 1)),
        "'stack/2': expected the activation of 'r' to be str, found 1",
    ),
    "gate unknown": (
        described(put("nodes", 1, "cells", 2, "gate_activations", "o", "tanh")),
        "'stack': CellSpec: expected gate_activations of z, r, g, got 'o'",
    ),
    "gate activation": (
        described(put("nodes", 1, "cells", 2, "gate_activations", "r", "elu(1")),
        r"'stack': CellSpec: gate_activations.'r'.: expected .*'elu\(1'",
    ),
    "gru's bias": (
        described(put("nodes", 1, "cells", 2, "reset_after", False)),
        "tensor 'stack/2/bias': expected shape .6., found .2, 6.",
    ),
    "unknown setting": (
        described(put("nodes", 1, "cells", 0, "dropout", 0.5)),
        "'stack/0': unknown key 'dropout'; expected .*'zoneout_cell'.",
    ),
    "no width": (described(drop("nodes", 1, "cells", 0, "units")), "'stack/0': expected the keys .*units"),
    "residual": (described(put("nodes", 1, "residual", 1)), "'stack': expected residual to be bool, found int"),
    "no residual": (described(drop("nodes", 1, "residual")), "'stack': expected the keys .*'residual'"),
    "no cells": (described(put("nodes", 1, "cells", [])), "'stack': Recurrent: expected at least one cell"),
    "cell text": (described(put("nodes", 1, "cells", 0, "x")), "'stack/0': expected the keys .* found str"),
    "bias": (
        described(put("nodes", 1, "cells", 1, "use_bias", True)),
        "tensor 'stack/1/bias': expected shape .8., found no such tensor",
    ),
    "no bias": (described(put("nodes", 1, "cells", 0, "use_bias", False)), "tensor 'stack/0/bias': no node uses it"),
    "cell activation": (
        described(put("nodes", 1, "cells", 0, "activation", "no")),
        "'stack': CellSpec: activation: expected .*'no'",
    ),
    "backward type": (
        described(put("nodes", 2, "backward", "type", "dense")),
        "'both/backward': expected type 'recurrent'",
    ),
    "backward direction": (
        described(put("nodes", 2, "backward", "go_backwards", False)),
        "'both': Bidirectional: expected backward",
    ),
    "merge": (described(put("nodes", 2, "merge_mode", "max")), "'both': Bidirectional: expected merge_mode"),
    "order": (described(lambda d: d["nodes"].reverse()), "expected"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_errors_name_the_damage(case, blob, tmp_path):
    change, message = DAMAGE[case]
    refused(tmp_path / "net.safetensors", change(blob), message)


def loads(path, content):
    """Return whether a file of this content loads; else it has to raise `FormatError`."""
    path.write_bytes(content)
    try:
        net = cs.load(path)
    except cs.FormatError:
        return False
    net(np.zeros((1, 2, net.input_size)))  # a file that loads also runs
    return True


@pytest.mark.long
def test_every_bit_of_the_header(tmp_path):
    """A flipped bit raises an error or gives a network (a name may change), never anything else."""
    path, rng = tmp_path / "net.safetensors", np.random.default_rng(0)
    cells = make_cell(rng, 3, 2), make_cell(rng, 2, 2, kind="gru", clip=5.0, gate_activations={"r": "elu(0.5)"})
    cs.Network([cs.nodes.Recurrent(cells), cs.nodes.GlobalPool()]).save(path)
    good = path.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    passed = 0
    for at in range(size):
        spoilt = bytearray(good)
        spoilt[at] ^= 1 << (at % 8)
        passed += loads(path, spoilt)
    assert passed < size / 5  # most bits matter


@pytest.mark.parametrize(("depth", "expected"), [(10, {True}), (900, {True, False}), (200_000, {False})])
def test_deep_and_too_deep_metadata(depth, expected, blob, tmp_path):
    deep = described(lambda d: json.dumps(d).replace('{"labels": ["a", "b"]}', '{"a":' * depth + "1" + "}" * depth))
    assert loads(tmp_path / "net.safetensors", deep(blob)) in expected


@pytest.mark.long
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage(data, blob, tmp_path):
    spoilt = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(spoilt)))
        piece = data.draw(st.binary(max_size=9))
        spoilt[at : at + data.draw(st.integers(0, 9))] = piece
    loads(tmp_path / "net.safetensors", spoilt)


@pytest.mark.long
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_any_place(header, blob, tmp_path):
    path, (good, data) = tmp_path / "net.safetensors", parts_of(blob)
    description = json.loads(good["__metadata__"]["cellstack"])
    places = [header, {**good, "more": header}, {**good, K: header}, {**good, "__metadata__": header}]
    texts = [header, {**description, "nodes": header}, {**description, "nodes": [header]}]
    texts += [{**description, "nodes": [{**node, key: header}]} for node in description["nodes"] for key in node]
    stack = description["nodes"][1]
    for number, cell in enumerate(stack["cells"]):
        for key in CELL_KEYS:
            cells = [*stack["cells"][:number], {**cell, key: header}, *stack["cells"][number + 1 :]]
            nodes = [description["nodes"][0], {**stack, "cells": cells}, *description["nodes"][2:]]
            text = json.dumps({**description, "nodes": nodes})
            loads(path, file_of({**good, "__metadata__": {"cellstack": text}}, data))
    for place in places + [{**good, "__metadata__": {"cellstack": json.dumps(text)}} for text in texts]:
        refused(path, file_of(place, data))


MEASURED = """
import os, sys, time, cellstack as cs
from cellstack.formats import safetensors
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
for path in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    start, outcome = peak(), "loaded"
    try:
        cs.load(path)
    except (cs.FormatError, MemoryError) as error:
        outcome = type(error).__name__
    print(outcome, peak() - start, time.process_time(), flush=True)
    os._exit(0)
"""


def measured(*paths):
    """Load each file in a process of its own; return the outcome, its memory and its processor seconds."""
    command = [sys.executable, "-c", MEASURED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(outcome, int(memory), float(seconds)) for outcome, memory, seconds in rows]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process, as Linux counts it")
def test_hostile_files_take_little_memory_and_time(blob, tmp_path):
    limit = 1 << 22
    bombs = [
        file_of(b"[" + b"[]," * (limit // 3 - 2) + b"[]]"),
        file_of(b"{" + b",".join(b'"%d":0' % n for n in range(350_000)) + b',"7":0}'),
        file_of(edited(put(K, "shape", [1 << 62, 1 << 62]))(blob)[8:]),
        file_of(b"{}", length=1 << 40),
        blob[:8] + bytes(1 << 24),
        edited(put(K, "shape", [1] * 1_000_000))(blob),
        edited(put(K, "shape", [3, 8] + [1] * 1_000_000))(blob),
        edited(
            lambda h: {**h, **{str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(60_000)}}
        )(blob),
        described(lambda d: "[" + "[]," * (limit // 3 - 2) + "[]]")(blob),
        described(lambda d: "[" + "[]," * limit + "[]]")(blob),
    ]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(bombs))]
    for path, bomb in zip(paths, bombs, strict=True):
        path.write_bytes(bomb)
    for path, (outcome, memory, seconds) in zip(paths, measured(*paths), strict=True):
        assert outcome == "FormatError", path
        assert memory < 40 * limit, path
        assert seconds < 20, path


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process, as Linux counts it")
def test_loading_takes_little_more_memory_than_the_arrays(tmp_path):
    path, size = tmp_path / "net.safetensors", 1 << 22
    cs.Network([cs.nodes.Dense(np.ones((1024, 1024), "f4")) for _ in range(16)]).save(path)
    [(outcome, memory, _)] = measured(path)
    assert outcome == "loaded"
    assert memory < (2 * 16 + 8) * size  # the mapped file, the network's copies, and a few arrays


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and a limit on memory")
def test_a_file_larger_than_memory_is_a_memory_error(tmp_path):
    path = tmp_path / "net.safetensors"
    node = {**NOTHING, "input_size": 1 << 16, "units": 1 << 16}
    size = 4 << 32
    header = {
        "__metadata__": {"cellstack": description_of(node)},
        "none/kernel": {"dtype": "F32", "shape": [1 << 16, 1 << 16], "data_offsets": [0, size]},
    }
    path.write_bytes(file_of(header))
    os.truncate(path, path.stat().st_size + size)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({size + (4 << 30)}, {size + (4 << 30)}))\n"
    command = [sys.executable, "-c", limit + MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split()[0] == "MemoryError"


def test_a_too_long_description_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bytes, more than 4194304: shorten the metadata"):
        cs.Network(small().nodes, metadata={"history": "x" * (1 << 22)}).save(tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


# ── atomic saving ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_killed_process_leaves_the_old_file(where, blob, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(blob)
    code = (
        "import os, sys, time, numpy as np, cellstack as cs\n"
        "def stop(*arguments):\n"
        "    print('here', flush=True)\n"
        "    time.sleep(60)\n"
        f"os.{where} = stop\n"
        f"cs.Network([cs.nodes.Dense(np.ones((1000, 1000), 'f4'))]).save({str(path)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    assert path.read_bytes() == blob  # the old file is unchanged
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == blob
    assert cs.load(path).names == small().names
    small().save(path)  # the temporary file of the killed process doesn't matter
    assert path.read_bytes() == blob


def test_a_failure_leaves_the_old_file_and_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as file:  # noqa: PT012
            file.write(b"half of the n")
            raise error
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "net.safetensors"
    for name in ("fsync", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left on device") as found:
                small().save(path)
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
def test_modes_and_links_are_kept(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    old = os.umask(0o027)
    try:
        with replacing(path) as file:
            file.write(b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as for any new file
    finally:
        os.umask(old)
    path.chmod(0o604)
    link.symlink_to(path)
    with replacing(link) as file:
        file.write(b"2")
    assert link.is_symlink()
    assert path.read_bytes() == b"2"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    with pytest.raises(OSError, match="regular file"), replacing("/dev/null"):
        pass
    with pytest.raises(OSError, match="regular file"), replacing(tmp_path):
        pass


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anything
    with pytest.raises(PermissionError, match=r"net.safetensors: no permission to write to the existing file"):
        small().save(path)
    assert path.read_bytes() == b"old"

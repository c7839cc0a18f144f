"""ONNX files that are damaged or malicious: a FormatError, in bounded time and memory, and nothing else."""

import os
import time
import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import model, operator_model, random_operator, unrolled_model, write

from cellstack import CellSpec
from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter
from cellstack.network import Network
from cellstack.nodes import Bidirectional, Cell, Conv1D, Dense, GlobalPool, Recurrent

SECONDS = 4.0  # of fuzzing, in total


def valid_files(tmp_path):
    """A few small files with different contents, as bytes."""
    rng = np.random.default_rng(0)
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731

    def cell(inputs, units, **flags):
        spec = CellSpec(inputs, units, **flags)
        return Cell(spec, *(floats(*shape) for shape in spec.shapes.values()))

    pair = Bidirectional(Recurrent((cell(3, 2),)), Recurrent((cell(3, 2),), go_backwards=True))
    nets = [
        Network([Conv1D(floats(2, 2, 3)), pair, GlobalPool("last"), Dense(floats(4, 2), floats(2), "softmax")]),
        Network([Recurrent((cell(2, 3, kind="gru", learn_initial_state=True), cell(3, 2, peepholes=True, clip=1.0)))]),
    ]
    path = tmp_path / "valid.onnx"
    for net in nets:
        adapter.save(net, str(path))
        yield path.read_bytes()
    for kind in ("LSTM", "RNN"):
        yield operator_model(*random_operator(np.random.default_rng(1), kind)).SerializeToString()
    yield unrolled_model(3, 2).SerializeToString()
    yield function_model().SerializeToString()


def function_model():
    """A GRU in a function that is called once."""
    node, arrays, feeds, outputs = random_operator(np.random.default_rng(2), "GRU", lengths=False)
    made = operator_model(node, arrays, feeds, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    given = [name for name in node.input if name]
    made.functions.append(helper.make_function("own", "layer", given, outputs, [node], opsets))
    del made.graph.node[:]
    made.graph.node.append(helper.make_node("layer", given, outputs, domain="own"))
    made.opset_import.append(opsets[1])
    return made


def damaged(rng, data):
    """Copies of `data` with an error: truncated, a few bits flipped, bytes inserted, removed or overwritten."""
    way = int(rng.integers(5))
    at = int(rng.integers(len(data)))
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
    if way == 2:
        return data[:at] + data[at + int(rng.integers(1, 9)) :]
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(data)))
        changed[at] = changed[at] ^ (1 << int(rng.integers(8))) if way == 3 else int(rng.choice([0, 0x7F, 0x80, 0xFF]))
    return bytes(changed)


def is_refused(read, path):
    """Whether a reader refuses a file, in the allowed form."""
    try:
        read(path)
    except FormatError as error:
        return str(error).startswith(f"{path}: ")
    return False


@pytest.mark.slow
def test_damaged_files_are_format_errors(tmp_path):
    rng, files = np.random.default_rng(0), list(valid_files(tmp_path))
    path = tmp_path / "damaged.onnx"
    refused = tried = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        path.write_bytes(damaged(rng, files[tried % len(files)]))
        tried += 1
        for read in (adapter.load, adapter.extract):
            refused += is_refused(read, str(path))
    assert tried > 50
    assert refused > tried / 4


def test_every_truncation(tmp_path):
    for data in valid_files(tmp_path):
        path = tmp_path / "cut.onnx"
        for length in range(0, len(data) - 1, 1 + len(data) // 60):
            path.write_bytes(data[:length])
            with pytest.raises(FormatError):
                adapter.load(str(path))


def lstm_model(arrays=None, nodes=(), name="W", **attributes):
    """One LSTM of 2 -> 3 whose W the test defines."""
    usual = {"W": np.ones((1, 12, 2), np.float32), "R": np.ones((1, 12, 3), np.float32)}
    arrays = usual | (arrays or {})
    inputs = {"X": (TensorProto.FLOAT, ["T", "B", 2])}
    node = helper.make_node("LSTM", ["X", name, "R"], ["Y"], name="lstm", hidden_size=3, **attributes)
    return model([*nodes, node], inputs, ["Y"], arrays)


def refuses(tmp_path, made, message):
    """Both readers refuse a model, in little processor time and memory."""
    path = tmp_path / "hostile.onnx"
    path.write_bytes(made.SerializeToString())
    for read in (adapter.extract, adapter.load):
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(FormatError, match=message):
            read(str(path))
        assert time.process_time() - start < 20
        assert tracemalloc.get_traced_memory()[1] < 150e6
        tracemalloc.stop()


def shape(*lengths):
    return numpy_helper.from_array(np.array(lengths, np.int64), "shape")


def test_a_circle(tmp_path):
    made = lstm_model(nodes=[helper.make_node("Identity", ["b"], ["a"]), helper.make_node("Identity", ["a"], ["b"])])
    refuses(tmp_path, made, r"node 'a': input 'b' isn't computed before the node")


def test_a_node_that_feeds_itself(tmp_path):
    refuses(
        tmp_path,
        lstm_model(nodes=[helper.make_node("Add", ["a", "a"], ["a"])]),
        "input 'a' isn't computed before the node",
    )


def test_a_name_made_twice(tmp_path):
    refuses(tmp_path, lstm_model(nodes=[helper.make_node("Identity", ["R"], ["W"])]), "'W' is computed more than once")


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile", "Range"])
def test_constants_that_would_fill_memory(tmp_path, operator):
    huge = np.array([10**6, 10**6, 10**3], np.int64)
    inputs = {
        "ConstantOfShape": ["huge"],
        "Expand": ["one", "huge"],
        "Tile": ["one", "huge"],
        "Range": ["zero", "large", "step"],
    }[operator]
    arrays = {
        "huge": huge,
        "one": np.ones((1, 1, 1), np.float32),
        "zero": np.int64(0),
        "large": np.int64(10**15),
        "step": np.int64(1),
    }
    made = lstm_model(arrays, [helper.make_node(operator, inputs, ["W2"])], "W2")
    refuses(tmp_path, made, r"the constants exceed the limit of \d+ numbers")


def test_constants_that_double_and_double(tmp_path):
    nodes, name = [], "W"
    for n in range(60):
        nodes.append(helper.make_node("Concat", [name, name], [f"w{n}"], axis=0))
        name = f"w{n}"
    refuses(tmp_path, lstm_model(nodes=nodes, name=name), r"the constants exceed the limit of \d+ numbers")


def test_a_weight_through_many_operators(tmp_path):
    nodes, name = [], "W"
    for n in range(5000):
        nodes.append(helper.make_node("Identity", [name], [f"w{n}"]))
        name = f"w{n}"
    path = write(tmp_path / "long.onnx", lstm_model(nodes=nodes, name=name), check=False)
    assert list(adapter.extract(path)) == ["lstm"]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([1, 12, -2], "none negative"),
        ([2**62, 2**62, 2**62], "doesn't fit into memory"),
        ([2**20, 2**20, 2], r"expected \d+ bytes"),
        ([1] * 40, "at most 32 axes"),
        ([1, 12, 3], "expected 144 bytes"),
        ([0, 2**62], "doesn't fit into memory"),
    ],
)
def test_wrong_sizes(tmp_path, dims, message):
    made = lstm_model()
    tensor = next(tensor for tensor in made.graph.initializer if tensor.name == "W")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    if 0 in dims:
        tensor.raw_data = b""
    refuses(tmp_path, made, message)


def test_numbers_of_an_unknown_type(tmp_path):
    made = lstm_model()
    made.graph.initializer[0].data_type = 99
    refuses(tmp_path, made, "data type 99 isn't supported")


@pytest.mark.parametrize("versions", [[1], [10**6], [], [17, 18]])
def test_opsets(tmp_path, versions):
    made = lstm_model()
    del made.opset_import[:]
    made.opset_import.extend(helper.make_opsetid("", version) for version in versions)
    refuses(tmp_path, made, r"expected one opset from 7 to \d+, found")


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "", "a/../../secret.bin", "link.bin", "nul\0.bin", "none.bin", "."]
)
def test_data_in_other_files_stays_in_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink(tmp_path / "secret.bin", inside / "link.bin")
    made = lstm_model()
    tensor = next(tensor for tensor in made.graph.initializer if tensor.name == "W")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    refuses(
        inside, made, "tensor 'W': (external data must be in this file's folder|the file of its data, .*doesn't exist)"
    )


@pytest.mark.parametrize(("key", "value"), [("offset", "-8"), ("offset", "9" * 30), ("length", "7"), ("offset", "x")])
def test_wrong_offsets_in_other_files(tmp_path, key, value):
    (tmp_path / "data.bin").write_bytes(bytes(96))
    made = lstm_model()
    tensor = next(tensor for tensor in made.graph.initializer if tensor.name == "W")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="data.bin")
    path = write(tmp_path / "good.onnx", made, check=False)
    assert adapter.extract(path)["lstm"].cells[0].kernel.max() == 0.0
    tensor.external_data.add(key=key, value=value)
    refuses(tmp_path, made, "tensor 'W': expected")


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\x08\x08", b"PK\x03\x04" + bytes(100), bytes(1000), b"\xff" * 1000]
)
def test_files_that_are_not_onnx(tmp_path, content):
    path = tmp_path / "not.onnx"
    path.write_bytes(content)
    for read in (adapter.load, adapter.extract):
        with pytest.raises(FormatError):
            read(str(path))


def test_graphs_within_graphs(tmp_path):
    graph = helper.make_graph([helper.make_node("Identity", ["X"], ["end"])], "g", [], [])
    for n in range(30):
        branch = helper.make_node(
            "If", ["X"], [f"y{n}"], then_branch=graph, else_branch=helper.make_graph([], "e", [], [])
        )
        graph = helper.make_graph([branch], "g", [], [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.graph.input.extend([helper.make_tensor_value_info("X", TensorProto.BOOL, [])])
    path = write(tmp_path / "deep.onnx", made, check=False)
    assert adapter.extract(path) == {}
    with pytest.raises(FormatError):
        adapter.load(path)


def test_names_that_are_not_text(tmp_path):
    data = lstm_model().SerializeToString().replace(b"lstm", b"\xff\xfe\xff\xfe")
    path = tmp_path / "names.onnx"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        adapter.load(str(path))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    path = write(tmp_path / "net.onnx", lstm_model())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cellstack\[onnx\]'"):
        adapter.load(path)


def test_a_valid_file_passes_the_checks(tmp_path):
    path = write(tmp_path / "good.onnx", lstm_model())
    onnx.checker.check_model(path)
    assert adapter.load(path)(np.ones((1, 2, 2), np.float32)).shape == (1, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "chains", "broken"), [(3000, 1, False), (2, 1500, False), (3000, 1, True)])
def test_long_loops_and_many(tmp_path, steps, chains, broken):
    """The cost of a loop grows linearly with its steps."""
    made = unrolled_model(steps, chains, broken)
    path = write(tmp_path / "net.onnx", made)
    start = time.process_time()
    assert len(adapter.extract(path)) == chains
    assert time.process_time() - start < 20
    if not broken:
        assert len(adapter.load(path).cells) == chains
        assert time.process_time() - start < 60


@pytest.mark.long
def test_sums_within_sums(tmp_path):
    """A product's bias may be another product, and so on; none of these is recognised, and none overflows."""
    nodes, name = [helper.make_node("MatMul", ["X", "W"], ["v"])], "v"
    for n in range(3000):
        nodes.append(helper.make_node("Gemm", ["X", "W", name], [f"v{n}"]))
        name = f"v{n}"
    nodes.append(helper.make_node("Tanh", [name], ["Y"]))
    made = model(nodes, {"X": (TensorProto.FLOAT, ["B", 3])}, {"Y": 2}, {"W": np.ones((3, 3), np.float32)})
    path = write(tmp_path / "net.onnx", made, check=False)
    assert adapter.extract(path) == {}
    with pytest.raises(FormatError, match="expected the bias to be constant"):
        adapter.load(path)


@pytest.mark.parametrize("operator", ["Add", "DequantizeLinear"])
def test_arrays_as_large_as_a_file_says(tmp_path, operator):
    """Widths that are only declared don't allocate arrays."""
    axes = ["B", 10**9, 10**9]
    inputs = ["X", "one", "zero"][: 2 if operator == "Add" else 3]
    node = helper.make_node(operator, inputs, ["Y"], name="large")
    arrays = {"one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)}
    made = model([node], {"X": (TensorProto.FLOAT, axes)}, {"Y": 3}, arrays)
    path = write(tmp_path / "net.onnx", made, check=False)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FormatError, match=rf"{operator} 'large': more than \d+ numbers that aren't stored in the file"):
        adapter.load(path)
    assert time.process_time() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_windows_as_large_as_a_file_says(tmp_path):
    given = {"kernel_shape": [10**6], "pads": [1, 1], "count_include_pad": 1}
    node = helper.make_node("AveragePool", ["X"], ["Y"], name="large", **given)
    made = model([node], {"X": (TensorProto.FLOAT, ["B", 4096, "T"])}, {"Y": 3}, {})
    path = write(tmp_path / "net.onnx", made, check=False)
    tracemalloc.start()
    net = adapter.load(path)
    assert net(np.ones((1, 2, 4096), np.float32)).shape == (1, 0, 4096)  # [B, T, F]
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.long
def test_many_nodes_of_one_name(tmp_path):
    count = 4000
    names = ["X", *(f"v{n}" for n in range(count - 1)), "Y"]
    nodes = [helper.make_node("Tanh", names[n : n + 1], names[n + 1 : n + 2], name="tanh") for n in range(count)]
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (TensorProto.FLOAT, ["B", "T", 3])}, {"Y": 3}, {}), False)
    start = time.process_time()
    net = adapter.load(path)
    assert time.process_time() - start < 10
    assert (*net.names[:3], net.names[-1]) == ("tanh", "tanh.2", "tanh.3", f"tanh.{count}")


@pytest.mark.long
def test_lengths_within_lengths(tmp_path):
    """The length of a list may depend on another list's, and so on; the recursion is bounded."""
    make, end = helper.make_node, "ones"
    nodes = [make("Shape", ["X"], ["lengths"])]
    for n in range(300):
        nodes += [make("Concat", ["lengths", end], [f"s{n}"], axis=0), make("Expand", ["ones", f"s{n}"], [f"e{n}"])]
        end = f"e{n}"
    made = lstm_model({"ones": np.ones(1, np.int64)}, nodes, end)
    refuses(tmp_path, made, "expected W to be constant|expected W of shape")


@pytest.mark.long
@pytest.mark.parametrize(
    ("operator", "shapes", "axes", "reads"),
    [
        ("Gemm", [(2000, 4), (4,)], ["B", 2000], [adapter.load]),
        pytest.param(
            *("LSTM", [(1, 4, 2000), (1, 4, 1)], ["T", "B", 2000], [adapter.load, adapter.extract]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_many_nodes_that_share_a_large_weight(tmp_path, operator, shapes, axes, reads):
    """Each node has its own copy of its weights: they must not be far larger than the file."""
    arrays = {name: np.ones(shape, np.float32) for name, shape in zip(("W", "R"), shapes, strict=True)}
    outputs = [f"v{n}" for n in range(800)]
    nodes = [helper.make_node(operator, ["X", "W", "R"], [name]) for name in outputs]
    nodes.append(helper.make_node("Concat", outputs, ["Y"], axis=-1))
    made = model(nodes, {"X": (TensorProto.FLOAT, axes)}, {"Y": len(shapes[0]) + len(axes) - 2}, arrays)
    path = write(tmp_path / "net.onnx", made, check=False)
    for read in reads:
        tracemalloc.start()
        with pytest.raises(FormatError, match=r"more than|the constants exceed the limit"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 60e6
        tracemalloc.stop()

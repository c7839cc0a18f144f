"""Safetensors files that hold only weights, as torch models are often published."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cellstack as cs
from cellstack import FormatError
from cellstack.train.fitting import as_network


def saved(tmp_path, module, **others):
    path = tmp_path / "model.safetensors"
    save_file({**module.state_dict(), **others}, path)
    return path


def test_one_module_is_a_network(tmp_path):
    gru = torch.nn.GRU(3, 5, 2, batch_first=True)
    net = cs.load(saved(tmp_path, gru))
    x = torch.randn(2, 7, 3)
    np.testing.assert_allclose(net(x.numpy()), gru(x)[0].detach().numpy(), atol=1e-6)


def test_parts_of_a_model(tmp_path):
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 5, batch_first=True), "head": torch.nn.Linear(5, 2)})
    path = saved(tmp_path, model)
    with pytest.raises(FormatError, match="head"):
        cs.load(path)
    parts = cs.extract(path)
    assert list(parts) == ["encoder", "head"]
    x = torch.randn(2, 7, 3)
    np.testing.assert_allclose(parts["encoder"](x.numpy()), model["encoder"](x)[0].detach().numpy(), atol=1e-6)


BOTH_WAYS = r"after a .*idirectional.* is the last step, not both final states"


@pytest.mark.parametrize("between", [[], ["relu"]])
@pytest.mark.parametrize("last", ["last", cs.GlobalPool("last")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_last_step_of_a_bidirectional_layer_in_an_order_is_warned_of(tmp_path, between, last, suffix):
    model = torch.nn.ModuleDict(
        {"rnn": torch.nn.LSTM(3, 5, batch_first=True, bidirectional=True), "head": torch.nn.Linear(10, 2)}
    )
    path = saved(tmp_path, model)
    if suffix == "pt":
        torch.save(model.state_dict(), path := tmp_path / "model.pt")
    with pytest.warns(UserWarning, match=rf"^load: .*model.{suffix}: .*{BOTH_WAYS}: .* cellstack.compile") as record:
        net = cs.load(path, order=["rnn", *between, last, "head"])
    assert [warning.filename for warning in record] == [__file__]
    x = torch.randn(2, 7, 3)
    y = model["rnn"](x)[0][:, -1]
    np.testing.assert_allclose(
        net(x.numpy()), model["head"](torch.relu(y) if between else y).detach().numpy(), atol=1e-6
    )


def test_a_last_step_that_is_a_final_state_is_not_warned_of(tmp_path):
    model = torch.nn.ModuleDict(
        {
            "ahead": torch.nn.LSTM(3, 5, batch_first=True),
            "both": torch.nn.GRU(3, 5, batch_first=True, bidirectional=True),
            "top": torch.nn.GRU(10, 4, batch_first=True),
        }
    )
    path = saved(tmp_path, torch.nn.ModuleDict({"rnn": model["ahead"], "head": torch.nn.Linear(5, 2)}))
    stacked = tmp_path / "stacked.pt"
    torch.save({name: value for name, value in model.state_dict().items() if not name.startswith("ahead")}, stacked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.load(path, order=["rnn", "last", "head"])
        cs.load(stacked, order=["both", "top", "last"])
        cs.load(stacked, order=["both", "top"])


def test_the_last_step_of_a_bidirectional_node_is_warned_of_where_a_network_is_built_by_hand(tmp_path):
    gru = torch.nn.GRU(3, 4, batch_first=True, bidirectional=True)
    (both,) = cs.from_torch(gru).nodes
    with pytest.warns(UserWarning, match=rf"^Network: layer_2: .*{BOTH_WAYS}: .* return_sequences=False") as record:
        net = cs.Network([both, cs.Activation("relu"), cs.GlobalPool("last")])
    assert [warning.filename for warning in record] == [__file__]
    x = torch.randn(2, 7, 3)
    with warnings.catch_warnings():  # networks from files, training and other networks, and other nodes
        warnings.simplefilter("error")
        net.save(tmp_path / "net.safetensors")
        assert cs.load(tmp_path / "net.safetensors")(x.numpy()).shape == (2, 8)
        net.with_weights("bfloat16")
        as_network(SimpleNamespace(to_nodes=lambda: net.nodes), {})
        cs.Network([both, cs.GlobalPool("mean")])
        cs.Network([both.forward, cs.GlobalPool("last")])
        directions = [replace(part, return_sequences=False) for part in (both.forward, both.backward)]
        final = cs.Network([cs.Bidirectional(*directions)])  # as the warning advises
    expected = torch.cat(list(gru(x)[1]), 1).detach().numpy()
    np.testing.assert_allclose(final(x.numpy()), expected, atol=1e-6)


def test_half_precision_is_widened_and_other_dtypes_are_named(tmp_path):
    lstm = torch.nn.LSTM(3, 5).half()
    assert cs.load(saved(tmp_path, lstm)).dtype == np.float32
    assert cs.load(saved(tmp_path, lstm.bfloat16())).dtype == np.float32
    with pytest.raises(FormatError, match=r"tensor .*expected dtype F16, F32, F64, BF16, found F8_E4M3"):
        cs.load(saved(tmp_path, lstm.to(torch.float8_e4m3fn)))


def test_extract_of_native_files(tmp_path):
    rng = np.random.default_rng(0)
    spec = cs.CellSpec(3, 4)
    cell = cs.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))
    net = cs.Network([cs.Recurrent((cell,)), cs.Dense(rng.normal(size=(4, 2)))], ["memory", "head"])
    net.save(tmp_path / "net.safetensors")
    parts = cs.extract(tmp_path / "net.safetensors")
    x = rng.normal(size=(1, 5, 3))
    np.testing.assert_array_equal(parts["memory"](x), cs.Network(net.nodes[:1])(x))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
@pytest.mark.parametrize("call", ["cs.load(path)", "cs.extract(path)", "verify(net, path)"])
@pytest.mark.parametrize("name", ["pipe", "pipe.onnx"])
def test_a_named_pipe_is_refused_at_once(tmp_path, call, name):
    os.mkfifo(tmp_path / name)
    code = (
        "import sys; import numpy as np; import cellstack as cs; from cellstack.formats.verify import verify\n"
        f"path = sys.argv[1]; net = cs.Network([cs.Dense(np.ones((2, 2)))])\n{call}"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True, timeout=60)
    wanted = f"OSError: {tmp_path / name}: expected a regular file, found a named pipe: write the model to a file first"
    assert done.stderr.splitlines()[-1] == wanted

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
@pytest.mark.parametrize("last", ["last", cs.nodes.GlobalPool("last")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_last_step_of_a_bidirectional_layer_in_an_order_is_warned_of(tmp_path, between, last, suffix):
    model = torch.nn.ModuleDict(
        {"rnn": torch.nn.LSTM(3, 5, batch_first=True, bidirectional=True), "head": torch.nn.Linear(10, 2)}
    )
    path = saved(tmp_path, model)
    if suffix == "pt":
        torch.save(model.state_dict(), path := tmp_path / "model.pt")
    with pytest.warns(
        UserWarning, match=rf'^load: .*model.{suffix}: .*{BOTH_WAYS}: .* write "final" instead$'
    ) as record:
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
    (both,) = cs.load(gru).nodes
    with pytest.warns(UserWarning, match=rf'^Network: layer_2: .*{BOTH_WAYS}: .* GlobalPool\("final"\)') as record:
        net = cs.Network([both, cs.nodes.Activation("relu"), cs.nodes.GlobalPool("last")])
    assert [warning.filename for warning in record] == [__file__]
    x = torch.randn(2, 7, 3)
    with warnings.catch_warnings():  # networks from files, training and other networks, and other nodes
        warnings.simplefilter("error")
        net.save(tmp_path / "net.safetensors")
        assert cs.load(tmp_path / "net.safetensors")(x.numpy()).shape == (2, 8)
        net.with_weights("bfloat16")
        as_network(SimpleNamespace(to_nodes=lambda: net.nodes), {})
        cs.Network([both, cs.nodes.GlobalPool("mean")])
        cs.Network([both.forward, cs.nodes.GlobalPool("last")])
        directions = [replace(part, return_sequences=False) for part in (both.forward, both.backward)]
        final = cs.Network([cs.nodes.Bidirectional(*directions), cs.nodes.Activation("relu")])
        named = cs.Network([both, cs.nodes.GlobalPool("final"), cs.nodes.Activation("relu")], ["both", "final", "relu"])
    assert named.names == ("both", "relu")
    expected = torch.relu(torch.cat(list(gru(x)[1]), 1)).detach().numpy()
    for net in (final, named):
        np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-6)
    named.save(tmp_path / "named.safetensors")
    again = cs.load(tmp_path / "named.safetensors")
    assert repr(again) == repr(named)
    with pytest.raises(ValueError, match="both can't run step by step: it runs backwards"):
        again.stream()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_final_states_in_an_order_are_those_of_the_last_layer(tmp_path, kind, both, depth):
    rnn = getattr(torch.nn, kind)(3, 4, depth, batch_first=True, bidirectional=both)
    head = torch.nn.Linear(4 * (1 + both), 2)
    path = saved(tmp_path, torch.nn.ModuleDict({"rnn": rnn, "head": head}))
    x = torch.randn(3, 6, 3)
    h = rnn(x)[1][0] if kind == "LSTM" else rnn(x)[1]
    expected = head(torch.cat(list(h[-1 - both :]), 1)).detach().numpy()
    for final in ("final", cs.nodes.GlobalPool("final")):
        net = cs.load(path, order=["rnn", final, "head"])
        assert [type(node).__name__ for node in net.nodes] == ["Bidirectional" if both else "Recurrent"] * depth + [
            "Dense"
        ]
        np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-6)
    padded = np.concatenate([x.numpy(), np.ones((3, 2, 3), "f4")], axis=1)
    np.testing.assert_allclose(net(padded, lengths=[6, 6, 6]), expected, atol=1e-6)
    if not both:
        np.testing.assert_array_equal(net(x.numpy()), cs.load(path, order=["rnn", "last", "head"])(x.numpy()))


@pytest.mark.parametrize(("word", "pooled"), [("mean", lambda y: y.mean(1)), ("max", lambda y: y.amax(1))])
def test_an_order_takes_the_mean_and_the_maximum_by_name(tmp_path, word, pooled):
    gru, head = torch.nn.GRU(3, 4, batch_first=True), torch.nn.Linear(4, 2)
    path = saved(tmp_path, torch.nn.ModuleDict({"gru": gru, "head": head}))
    x = torch.randn(2, 6, 3)
    net = cs.load(path, order=["gru", word, "head"])
    np.testing.assert_allclose(net(x.numpy()), head(pooled(gru(x)[0])).detach().numpy(), atol=1e-6)


def test_the_last_step_in_an_order_is_the_last_used_one(tmp_path):
    rnn = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True)
    path = saved(tmp_path, torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(8, 2)}))
    with pytest.warns(UserWarning, match="is the last step"):
        net = cs.load(path, order=["rnn", "last", "head"])
    x = torch.randn(1, 6, 3).numpy()
    padded = np.concatenate([x, np.ones((1, 2, 3), "f4")], axis=1)
    np.testing.assert_allclose(net(padded, lengths=[6]), net(x), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "order", "message"),
    [
        (
            16,
            ["rnn", "final", "head"],
            "head, as in order: .*16 is the width of the final states of all 2 layers togeth",
        ),
        (4, ["rnn", "final", "head"], "4 is the width of one direction; h.-1. is the final state of the backward dir"),
        (4, ["rnn", "last", "head"], "4 is the width of one direction"),
        (5, ["rnn", "final", "head"], "expected an input of 5 features, got 8 from before it$"),
        (16, ["rnn", "head"], "expected an input of 16 features, got 8 from before it$"),
        (8, ["rnn", "relu", "final", "head"], r"'final', as in order: .*must directly follow a recurrent layer"),
        (8, ["rnn", "finale", "head"], "order also takes 'last' for the last step, 'mean' and 'max' over all steps, "),
    ],
)
@pytest.mark.filterwarnings("ignore:load:UserWarning")
def test_orders_whose_widths_are_those_of_other_states(tmp_path, width, order, message):
    rnn = torch.nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
    path = saved(tmp_path, torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(width, 2)}))
    with pytest.raises(FormatError, match=message):
        cs.load(path, order=order)


def test_final_states_need_a_recurrent_node_before_them(tmp_path):
    (both,) = cs.load(torch.nn.GRU(3, 4, batch_first=True, bidirectional=True)).nodes
    pool = cs.nodes.GlobalPool("final")
    for nodes, wires in (
        ([pool], None),
        ([both, cs.nodes.Activation("relu"), pool], None),
        ([both, pool], [("x",), ("layer_0",)]),
    ):
        with pytest.raises(cs.ShapeError, match=r'GlobalPool\("final"\) must directly follow'):
            cs.Network(nodes, wires=wires)
    cs.Network([both.forward, cs.nodes.GlobalPool("mean")]).save(path := tmp_path / "net.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"mean"', b'"final"').replace(b" " * 2, b" ", 1))
    with pytest.raises(FormatError):
        cs.load(path)


def test_half_precision_is_widened_and_other_dtypes_are_named(tmp_path):
    lstm = torch.nn.LSTM(3, 5).half()
    assert cs.load(saved(tmp_path, lstm)).dtype == np.float32
    assert cs.load(saved(tmp_path, lstm.bfloat16())).dtype == np.float32
    with pytest.raises(FormatError, match=r"tensor .*expected dtype F16, F32, F64, BF16, found F8_E4M3"):
        cs.load(saved(tmp_path, lstm.to(torch.float8_e4m3fn)))


def test_extract_of_native_files(tmp_path):
    rng = np.random.default_rng(0)
    spec = cs.CellSpec(3, 4)
    cell = cs.nodes.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))
    net = cs.Network([cs.nodes.Recurrent((cell,)), cs.nodes.Dense(rng.normal(size=(4, 2)))], ["memory", "head"])
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
        f"path = sys.argv[1]; net = cs.Network([cs.nodes.Dense(np.ones((2, 2)))])\n{call}"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True, timeout=60)
    wanted = f"OSError: {tmp_path / name}: expected a regular file, found a named pipe: write the model to a file first"
    assert done.stderr.splitlines()[-1] == wanted

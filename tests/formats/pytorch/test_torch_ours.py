"""Files of our layers: state dicts, whole pickles, checkpoints; and modules in an order that the caller gives."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import tolerances
import torch
from safetensors.torch import save_file
from torch import nn

import cellstack as cs
from cellstack import layers

WIDTH = 3
EVERY = {"return_sequences": True, "input_size": WIDTH}


def shaken(module):
    """The module with random weights."""
    if hasattr(module, "built") and not module.built:
        module.build(WIDTH)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


LAYERS = {
    "lstm": lambda: layers.LSTM(4, **EVERY),
    "no bias": lambda: layers.LSTM(4, use_bias=False, **EVERY),
    "one unit": lambda: layers.LSTM(1, **EVERY),
    "every array": lambda: layers.LSTM(
        5, peepholes=True, proj_size=2, layer_norm=True, learn_initial_state=True, dropout=0.2, seed=1, **EVERY
    ),
    "coupled": lambda: layers.LSTM(4, coupled=True, peepholes=True, **EVERY),
    "gru": lambda: layers.GRU(4, **EVERY),
    "gru with gains": lambda: layers.GRU(4, layer_norm=True, learn_initial_state=True, **EVERY),
    "simple": lambda: layers.SimpleRNN(4, **EVERY),
    "minimal gru": lambda: layers.MinGRU(4, **EVERY),
    "minimal gru, no bias": lambda: layers.MinGRU(5, use_bias=False, dropout=0.2, seed=1, **EVERY),
    "joint gains": lambda: layers.LSTM(5, layer_norm="joint", peepholes=True, coupled=True, **EVERY),
    "simple with joint gains": lambda: layers.SimpleRNN(4, layer_norm="joint", **EVERY),
    "light gru": lambda: layers.LiGRU(4, **EVERY),
    "light gru with gains": lambda: layers.LiGRU(4, layer_norm=True, use_bias=False, **EVERY),
    "minimal lstm": lambda: layers.MinLSTM(5, **EVERY),
    "backbone": lambda: layers.CfC(4, backbone_units=8, **EVERY),
    "backbone of three layers": lambda: layers.CfC(4, backbone_units=8, backbone_layers=3, **EVERY),
    "pure": lambda: layers.CfS(4, **EVERY),
    "pure, backbone": lambda: layers.CfS(4, backbone_units=8, backbone_layers=2, **EVERY),
    "backbone, no bias": lambda: layers.CfC(5, backbone_units=7, use_bias=False, learn_initial_state=True, **EVERY),
    "minimal lstm with gains": lambda: layers.MinLSTM(4, layer_norm=True, learn_initial_state=True, **EVERY),
    "both, minimal": lambda: layers.Bidirectional(layers.MinGRU(4, return_sequences=True)),
    "stack with minimal": lambda: layers.RNN(
        [layers.LSTMCell(4), layers.MinGRUCell(5), layers.MinLSTMCell(3)], **EVERY
    ),
    "double": lambda: layers.LSTM(4, dtype="float64", **EVERY),
    "stack": lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(5), layers.SimpleRNNCell(2)], **EVERY),
    "both": lambda: layers.Bidirectional(layers.GRU(4, return_sequences=True)),
    "both, stacks": lambda: layers.Bidirectional(
        layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_sequences=True)
    ),
}
ONLY_IN_PICKLES = {
    "settings": lambda: layers.LSTM(
        4, "softsign", "hard_sigmoid", clip=0.7, zoneout=0.2, go_backwards=True, input_size=3
    ),
    "reset before": lambda: layers.GRU(4, reset_after=False, use_bias=False, **EVERY),
    "residual": lambda: layers.RNN(
        layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(3)], residual=True), **EVERY
    ),
    "merged": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True), "mul"),
    "minimal lstm of many columns": lambda: layers.MinLSTM(4, **EVERY),
    "slstm": lambda: layers.SLSTM(4, exponential_forget=True, **EVERY),
    "slstm with heads": lambda: layers.SLSTM(4, heads=2, use_bias=False, **EVERY),
    "row": lambda: nn.Sequential(
        layers.GRU(4, **EVERY), layers.TimeDistributed(nn.Linear(4, 2)), layers.LSTM(2), nn.ReLU()
    ),
    "one layer in a row": lambda: nn.Sequential(layers.SimpleRNN(4, "relu", input_size=WIDTH)),
}


def check(net, module):
    dtype = next(module.parameters()).dtype
    x = torch.randn(2, 6, WIDTH, dtype=dtype)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.parametrize("container", ["pt", "nested", "old", "safetensors"])
@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_of_our_layers(tmp_path, name, container):
    module = shaken(LAYERS[name]())
    module(torch.zeros(1, 2, WIDTH, dtype=next(module.parameters()).dtype))
    state, path = module.state_dict(), tmp_path / "file"
    if container == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(
            {"net": state} if container == "nested" else state, path, _use_new_zipfile_serialization=container != "old"
        )
    net = cs.load(path)
    check(net, module)
    assert "a state dict doesn't store these settings" in net.metadata["assumed"]
    (part,) = cs.extract(path).values()
    check(part, module)


@pytest.mark.parametrize("name", [*LAYERS, *ONLY_IN_PICKLES])
def test_whole_pickles_of_our_layers(tmp_path, name):
    module = shaken((LAYERS | ONLY_IN_PICKLES)[name]())
    module(torch.zeros(1, 2, WIDTH, dtype=next(module.parameters()).dtype))
    module = shaken(module)
    torch.save({"model": module}, tmp_path / "file.pt")
    net = cs.load(tmp_path / "file.pt")
    check(net, module)
    assert "assumed" not in net.metadata
    net = cs.load(module)
    check(net, module)


def test_four_gates_in_a_state_dict_are_an_lstm_and_not_an_slstm(tmp_path):
    states = {"lstm": layers.LSTM(4, **EVERY), "slstm": layers.SLSTM(4, **EVERY), "gru": layers.GRU(4, **EVERY)}
    for name, module in states.items():
        torch.save(module.state_dict(), tmp_path / f"{name}.pt")
    read = {name: cs.load(tmp_path / f"{name}.pt") for name in states}
    assert [net.cells[0].spec.kind for net in read.values()] == ["lstm", "lstm", "gru"]
    assert read["lstm"].metadata["assumed"].startswith("LSTM and not SLSTM or CfC, default activations, ")
    assert read["slstm"].metadata["assumed"] == read["lstm"].metadata["assumed"]
    assert "SLSTM" not in read["gru"].metadata["assumed"]


@pytest.mark.parametrize("flags", [{"peepholes": True}, {"proj_size": 2}, {"layer_norm": True}])
def test_arrays_that_no_other_kind_has_need_no_assumption_of_the_kind(tmp_path, flags):
    torch.save(layers.LSTM(4, **flags, **EVERY).state_dict(), tmp_path / "lstm.pt")
    assert "SLSTM" not in cs.load(tmp_path / "lstm.pt").metadata["assumed"]


class Own(nn.Module):
    """A custom class; its names don't show the order."""

    def __init__(self, ours=True):
        super().__init__()
        self.a_head = nn.Linear(4, 2)
        self.memory = layers.LSTM(4, clip=0.5, **EVERY) if ours else nn.LSTM(WIDTH, 4, batch_first=True)

    def forward(self, x):
        y = self.memory(x)
        return self.a_head(y if torch.is_tensor(y) else y[0])


def test_pickles_of_our_layers_are_read_without_importing_them(tmp_path):
    module = shaken(Own())
    torch.save(module, tmp_path / "file.pt")
    code = (
        "import sys, cellstack as cs\n"
        f"parts = cs.extract({str(tmp_path / 'file.pt')!r})\n"
        "print(*parts, parts['memory'].cells[0].spec.clip, 'torch' in sys.modules, 'cellstack.layers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "memory a_head 0.5 False False\n"


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("what", ["state", "module", "checkpoint", "lightning"])
def test_a_custom_class_in_a_given_order(tmp_path, what, ours):
    module = shaken(Own(ours))
    if ours:
        module.memory = shaken(layers.LSTM(4, **EVERY))  # without settings that a state dict doesn't store
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(1, 2, WIDTH)).sum().backward()
    optimiser.step()
    state = module.state_dict()
    saved = {
        "state": state,
        "module": module,
        "checkpoint": {"model": state, "optimizer": optimiser.state_dict(), "epoch": 3},
        "lightning": {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {f"model.{name}": value for name, value in state.items()},
            "optimizer_states": [optimiser.state_dict()],
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
    }[what]
    path = tmp_path / "file.ckpt"
    torch.save(saved, path)
    net = cs.load(path, order=["memory", "a_head"])
    check(net, module)
    assert ("left_out" in net.metadata) == (what in ("checkpoint", "lightning"))
    parts = cs.extract(path)
    assert [name.rpartition(".")[2] for name in parts] == ["memory", "a_head"]
    inner, head = parts.values()
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype("f4")
    np.testing.assert_allclose(head(inner(x)), net(x), atol=tolerances.NETWORK)
    with pytest.raises(cs.FormatError, match=r"found 1 recurrent .*a_head.*; pass `order=…`, the names"):
        cs.load(path)


def test_a_lightning_checkpoint_of_one_layer(tmp_path):
    module = shaken(layers.GRU(4, **EVERY))
    state = {f"rnn.{name}": value for name, value in module.state_dict().items()}
    score = {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state, "callbacks": score}, tmp_path / "file.ckpt")
    net = cs.load(tmp_path / "file.ckpt")
    check(net, module)
    assert net.metadata["left_out"] == "Lightning's training state"


def test_keywords_and_nodes_in_an_order(tmp_path):
    module = nn.ModuleDict(
        {"words": nn.Embedding(9, 3), "rnn": nn.GRU(3, 4, batch_first=True), "head": nn.Linear(4, 2)}
    )
    torch.save(module.state_dict(), tmp_path / "file.pt")
    ids = torch.randint(0, 9, (2, 5))
    y = module["rnn"](module["words"](ids))[0]
    wanted = torch.softmax(module["head"](torch.relu(y[:, -1])), -1).detach().numpy()
    order = ["words:Embedding", "rnn", "last", "relu", "head", cs.nodes.Activation("softmax")]
    net = cs.load(tmp_path / "file.pt", order=order)
    np.testing.assert_allclose(net(ids.numpy()), wanted, atol=tolerances.NETWORK)
    torch.save(module, tmp_path / "file.pt")  # it specifies the kinds of its modules
    net = cs.load(tmp_path / "file.pt", order=["words", *order[1:]])
    np.testing.assert_allclose(net(ids.numpy()), wanted, atol=tolerances.NETWORK)


@pytest.mark.parametrize(
    ("module", "order", "name"),
    [
        (nn.LSTM(3, 4), None, r"the module \(LSTM\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)), None, r"1 \(GRU\)"),
        (nn.ModuleDict({"rnn": nn.GRU(3, 4)}), ["rnn", "final"], r"rnn \(GRU\)"),
    ],
)
def test_a_file_that_records_time_before_batch_gives_a_warning(tmp_path, module, order, name):
    torch.save(module, tmp_path / "file.pt")
    with pytest.warns(UserWarning, match=rf"^load: .*file.pt: {name} has batch_first=False") as record:
        cs.load(tmp_path / "file.pt", order=order)
    assert [warning.filename for warning in record] == [__file__]
    torch.save(module.state_dict(), tmp_path / "file.pt")  # doesn't record it
    cs.load(
        tmp_path / "file.pt", order=order or [*dict.fromkeys(key.rpartition(".")[0] for key in module.state_dict())]
    )


def test_the_gate_order_of_a_cell_s_weights_is_reported_as_assumed(tmp_path):
    torch.save(nn.GRUCell(3, 4).state_dict(), tmp_path / "file.pt")
    assert "gates in the order of torch.nn.GRUCell" in cs.load(tmp_path / "file.pt").metadata["assumed"]
    torch.save(nn.GRU(3, 4).state_dict(), tmp_path / "file.pt")
    assert "assumed" not in cs.load(tmp_path / "file.pt").metadata


BAD = {
    "left out": (["rnn"], r"order has to name every module with weights; it doesn't name .*head"),
    "unknown": (["rnn", "tail"], r"there is no module 'tail', as in order; there are .*rnn, head"),
    "unlike": (["head", "rnn"], r"expected|LSTM"),
    "no kind": (["words", "rnn", "head"], r"words:Linear or words:Embedding"),
    "unsaid": (["words:Embedding", "rnn", "norm", "head"], r"'norm': .*found norm \(weight \[4\], bias \[4\]\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_orders_that_do_not_fit(tmp_path, name):
    parts = {"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2)}
    if name in ("no kind", "unsaid"):
        parts |= {"words": nn.Embedding(9, 3), "norm": nn.LayerNorm(4)}
    torch.save(nn.ModuleDict(parts).state_dict(), tmp_path / "file.pt")
    order, message = BAD[name]
    with pytest.raises((cs.FormatError, cs.ShapeError), match=message):
        cs.load(tmp_path / "file.pt", order=order)


def test_files_that_take_no_order(tmp_path):
    torch.save(nn.LSTM(3, 4).state_dict(), tmp_path / "file.pt")
    with pytest.raises(TypeError, match="expected order as a list of modules' names, got 'rnn'"):
        cs.load(tmp_path / "file.pt", order="rnn")
    cs.load(nn.LSTM(3, 4, batch_first=True)).save(tmp_path / "net.safetensors")
    cs.load(nn.LSTM(3, 4, batch_first=True)).save(tmp_path / "net.onnx")
    for suffix in ("safetensors", "onnx"):
        with pytest.raises(TypeError, match=r"order isn't used for|ONNX files take .*, got order"):
            cs.load(tmp_path / f"net.{suffix}", order=["rnn"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"cell.kernel": torch.zeros(3, 15)}), r"'cell\.kernel': expected \[3, 16\]"),
        (lambda s: s.update({"cell.recurrent_kernel": torch.zeros(4, 20)}), "expected 4H, 3H, 2H or H columns for H=4"),
        (lambda s: s.update({"cell.cell_gain": torch.zeros(4)}), "lstm cells have no such array"),
        (lambda s: s.update({"cell.bias": torch.zeros(16, dtype=torch.int64)}), "expected floats, found int64"),
        (lambda s: s.update({"cell.kernel": torch.zeros(3)}), "expected two axes"),
    ],
)
def test_weights_that_none_of_our_layers_has(tmp_path, change, message):
    state = dict(layers.LSTM(4, **EVERY).state_dict())
    change(state)
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match=message):
        cs.load(tmp_path / "file.pt")


def test_ambiguous_shapes_are_refused(tmp_path):
    torch.save(layers.GRU(4, reset_after=False, **EVERY).state_dict(), tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match=r"may belong to a GRU with reset_after=False.* save the whole layer"):
        cs.load(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("module", "these"),
    [
        (layers.MinLSTM(4, **EVERY), "a MinLSTM of 4 units or a MinGRU of 6 units"),
        (
            layers.MinGRU(3, use_bias=False, **EVERY),
            "a MinLSTM without a bias of 2 units or a MinGRU without a bias of 3",
        ),
    ],
)
def test_columns_that_several_kinds_without_a_recurrent_kernel_may_have_are_refused(tmp_path, module, these):
    torch.save(module.state_dict(), tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match=rf"may belong to {these}.* save the whole layer, by torch\.save"):
        cs.load(tmp_path / "file.pt")


def test_columns_that_no_kind_without_a_recurrent_kernel_has(tmp_path):
    torch.save({"cell.kernel": torch.zeros(3, 7)}, tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match=r"'cell\.kernel': expected 3H or 2H columns, found 7"):
        cs.load(tmp_path / "file.pt")
    torch.save({"cell.kernel": torch.zeros(3, 8), "cell.bias": torch.zeros(6)}, tmp_path / "file.pt")
    with pytest.raises(
        cs.FormatError, match=r"'cell\.bias': expected \[8\], as mingru cells have it, found \[6\] with"
    ):
        cs.load(tmp_path / "file.pt")


def test_a_kernel_of_another_module_is_none_of_our_layers(tmp_path):
    state = {"other.cell.kernel": torch.zeros(3, 4, 5), **nn.GRU(3, 4).state_dict(prefix="rnn.")}
    torch.save(state, tmp_path / "file.pt")
    assert list(cs.extract(tmp_path / "file.pt")) == ["rnn"]


def test_a_custom_activation_is_named(tmp_path):
    torch.save(layers.LSTM(4, "gelu", **EVERY), tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match="no description for the activation"):
        cs.load(tmp_path / "file.pt")


def test_a_stateful_layers_state_is_reported_as_left_out(tmp_path):
    layer = shaken(layers.LSTM(4, stateful=True, **EVERY))
    layer(torch.randn(1, 3, WIDTH))
    torch.save(layer.state_dict(), tmp_path / "file.pt")
    net = cs.load(tmp_path / "file.pt")
    assert "the state of the stateful layer (states.0.h, states.0.c)" in net.metadata["left_out"]
    layer.reset_states()
    check(net, layer)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"units": -1}', "{}", '{"units": 1e400}', '{"kind": 3}', 5])
def test_an_invalid_description(tmp_path, monkeypatch, text):
    layer = layers.LSTM(4, **EVERY)
    state = {**layer.cell.__getstate__(), "_text": text}
    monkeypatch.setattr(layers.LSTMCell, "__getstate__", lambda cell: state)
    torch.save(layer, tmp_path / "file.pt")
    with pytest.raises(cs.FormatError, match="description"):
        cs.load(tmp_path / "file.pt")


def test_a_plain_pickle_calls_nothing(tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(layers.GRU(4, **EVERY).state_dict()))
    assert cs.load(tmp_path / "file.pkl").cells[0].spec.kind == "gru"

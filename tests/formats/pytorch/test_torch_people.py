"""PyTorch files of many kinds: weights in pieces, packed, pruned, quantised; whole modules; checkpoints."""

import copy
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import tolerances
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

import cellstack as cs
from cellstack.formats import pytorch
from cellstack.formats.pytorch.archive import records
from cellstack.formats.pytorch.tree import contents

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage.*:UserWarning"),
]
WEIGHTS = ("weight_ih_l0", "weight_hh_l0")


def randomised(module):
    for weight in module.parameters():
        nn.init.normal_(weight, 0.0, 0.4)
    return module.eval()


def lstm(*sizes, kind=nn.LSTM, **settings):
    return randomised(kind(*(sizes or (5, 7)), batch_first=True, **settings))


def close(got, want, tolerance=tolerances.LOOP):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=tolerance, rtol=tolerance)


def output(module, x):
    """A module's output if each recurrent layer passes on its output only, as in a Network."""
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        x = output(layer, x) if isinstance(layer, nn.Sequential) else layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


@pytest.fixture
def write(tmp_path):
    def write(value, suffix=".pt", **how):
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}{suffix}"
        torch.save(value, path, **how)
        return str(path)

    return write


# ── weights that are computed ───────────────────────────────────────────────────────────────────────────────────────


def with_each(module, change):
    for name in WEIGHTS:
        change(module, name)
    if hasattr(module, "flatten_parameters"):
        module(torch.zeros(1, 1, module.input_size))
    return module


def half_masked(module, name):
    prune.random_unstructured(module, name, amount=0.5)


def twice_masked(module, name):
    half_masked(module, name)
    prune.l1_unstructured(module, name, amount=0.2)


COMPUTED = {
    "weight norm": lambda m, name: nn.utils.weight_norm(m, name),
    "of columns": lambda m, name: nn.utils.weight_norm(m, name, dim=1),
    "of all": lambda m, name: nn.utils.weight_norm(m, name, dim=None),
    "parametrised weight norm": lambda m, name: parametrizations.weight_norm(m, name),
    "parametrised, of columns": lambda m, name: parametrizations.weight_norm(m, name, dim=1),
    "spectral norm": lambda m, name: nn.utils.spectral_norm(m, name),
    "parametrised spectral norm": lambda m, name: parametrizations.spectral_norm(m, name),
    "pruned": half_masked,
    "pruned twice": twice_masked,
}
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def computed(kind, case):
    module = with_each(lstm(kind=KINDS[kind]), COMPUTED[case]).train()
    with torch.no_grad():
        for name, piece in module.named_parameters():
            if name.endswith(("_g", "original0")):
                piece.mul_(torch.rand_like(piece) + 0.5)
    module.train()
    module(torch.zeros(1, 1, 5))
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", COMPUTED)
def test_weights_are_computed_from_their_pieces(write, kind, case):
    module = computed(kind, case)
    x = torch.randn(2, 6, 5)
    want = module(x)[0]
    state = {f"encoder.rnn.{name}": value for name, value in module.state_dict().items()}
    path = write({"state_dict": state})
    net = pytorch.extract(path)["state_dict.encoder.rnn"]
    close(net(x.numpy()), want)
    assert set(net.metadata["computed"]) == {"weight_ih", "weight_hh"}
    close(pytorch.load(path)(x.numpy()), want)
    close(cs.load(module)(x.numpy()), want)
    if not parametrize.is_parametrized(module):  # torch pickles none of these
        path = write(module)
        close(pytorch.load(path)(x.numpy()), want)
        close(pytorch.extract(path)[""](x.numpy()), want)


def test_invalid_pieces_are_reported(write):
    state = lstm().state_dict()
    weight = state.pop("weight_hh_l0")
    for pieces, message in (
        ({"parametrizations.weight_hh_l0.original": weight}, "this parametrization isn't supported"),
        ({"parametrizations.weight_hh_l0.original": weight, "parametrizations.weight_hh_l0.0.base": weight}, "0.base"),
        ({"weight_hh_l0_g": torch.ones(3, 1), "weight_hh_l0_v": weight}, r"pieces of a weight norm, found \[3, 1\]"),
        ({"weight_hh_l0_orig": weight, "weight_hh_l0_mask": weight[:3]}, r"pieces of a pruned, found"),
        ({"weight_hh_l0_g": torch.ones(28, 1)}, "found weight_hh_l0_g too: another kind of layer"),
    ):
        with pytest.raises(cs.FormatError, match=message):
            pytorch.extract(write({**state, **pieces}))


def test_a_custom_parametrization_is_only_supported_in_memory():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = lstm()
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    x = torch.randn(2, 6, 5)
    close(cs.load(module)(x.numpy()), module(x)[0])


# ── quantised ───────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "deep": (nn.LSTM, {"num_layers": 3}),
    "both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "both ways of gru": (nn.GRU, {"bidirectional": True}),
}


def dequantised(quantised, like):
    """`like` with the actual weights of the quantised module, read by torch."""
    ways = 1 + like.bidirectional
    with torch.no_grad():
        for number, value in enumerate(quantised._all_weight_values):
            suffix = f"l{number // ways}{'_reverse' * (number % ways)}"
            state = value.param.__getstate__()[0]
            for what, packed in zip(("ih", "hh"), state[4], strict=True):
                weight, bias = packed.__getstate__()[0]
                weight = weight.dequantize() if weight.is_quantized else weight
                getattr(like, f"weight_{what}_{suffix}").copy_(weight)
                if like.bias:
                    getattr(like, f"bias_{what}_{suffix}").copy_(bias)
    return like


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamically_quantised_layers(write, case, dtype):
    kind, settings = SHAPES[case]
    module = lstm(kind=kind, **settings)
    quantised = quantize_dynamic(nn.Sequential(module), {kind}, dtype=dtype)
    exact = dequantised(quantised[0], copy.deepcopy(module))
    x = torch.randn(2, 6, 5)
    for path in (write(quantised.state_dict()), write(quantised)):
        for net in (pytorch.load(path), *pytorch.extract(path).values()):
            close(net(x.numpy()), exact(x)[0])
    near = quantised(x)[0].detach().numpy()
    apart = np.abs(net(x.numpy()) - near).max()
    assert apart < 0.05
    if dtype == torch.qint8:
        assert net.metadata["computed"]["weight_ih"].startswith("dequantised")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_weights_with_ambiguous_widths(write, bidirectional):
    """Two layers or two directions as wide as the input: a state dict doesn't record which, a module does."""
    module = lstm(7, 7, 2 - bidirectional, bidirectional=bidirectional)
    quantised = quantize_dynamic(nn.Sequential(module), {nn.LSTM}, dtype=torch.qint8)
    exact = dequantised(quantised[0], module)
    x = torch.randn(2, 6, 7)
    close(pytorch.load(write(quantised))(x.numpy()), exact(x)[0])
    close(pytorch.extract(write(quantised))["0"](x.numpy()), exact(x)[0])
    with pytest.raises(
        cs.FormatError, match=r"packed weights with 7 features in and 7 units may be two layers or two directions"
    ):
        pytorch.extract(write(quantised.state_dict()))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_dynamically_quantised_cells(write, kind):
    cell = randomised(kind(5, 7))
    quantised = quantize_dynamic(nn.Sequential(cell), {kind}, dtype=torch.qint8)
    state = {name: getattr(quantised[0], f"_packed_{name}").__getstate__()[0] for name in ("weight_ih", "weight_hh")}
    layer = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU}[kind](5, 7, batch_first=True)
    with torch.no_grad():
        for name, (weight, bias) in state.items():
            getattr(layer, f"{name}_l0").copy_(weight.dequantize())
            getattr(layer, f"{name.replace('weight', 'bias')}_l0").copy_(bias)
    x = torch.randn(2, 6, 5)
    for path in (write(quantised.state_dict()), write(quantised)):
        close(pytorch.extract(path)["0"](x.numpy()), layer(x)[0])


def test_a_sequential_of_quantised_layers(write, tmp_path):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), lstm(6, 7))
    quantised = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    linear = nn.Linear(5, 6)
    weight, bias = quantised[0]._packed_params._packed_params.__getstate__()[0]
    linear.load_state_dict({"weight": weight.dequantize(), "bias": bias})
    exact = nn.Sequential(linear, nn.ReLU(), dequantised(quantised[2], model[2]))
    torch.jit.script(quantised).save(str(tmp_path / "scripted.pt"))
    x = torch.randn(2, 6, 5)
    whole = write(quantised)
    close(pytorch.load(whole)(x.numpy()), output(exact, x))
    for path in (whole, str(tmp_path / "scripted.pt")):
        close(pytorch.extract(path)["2"](output(exact[:2], x).detach().numpy()), output(exact, x))


@pytest.mark.parametrize("by_row", [False, True])
def test_quantised_tensors(write, by_row):
    tensor = torch.randn(4, 3)
    quantised = (
        torch.quantize_per_channel(tensor, torch.rand(4) / 50 + 0.01, torch.tensor([0, 3, -2, 1]), 0, torch.qint8)
        if by_row
        else torch.quantize_per_tensor(tensor, 0.03, 7, torch.quint8)
    )
    with records(write({"a": quantised, "b": quantised.t()} if not by_row else {"a": quantised})) as file:
        root = file.read()
        found = contents("the file", root).tensors
        assert np.array_equal(np.asarray(found["a"]), quantised.dequantize().numpy())
        if not by_row:
            assert np.array_equal(np.asarray(found["b"]), quantised.dequantize().t().numpy())


# ── whole modules ───────────────────────────────────────────────────────────────────────────────────────────────────


class Turn(nn.Module):
    def forward(self, x):
        return x[0]


def norm(width):
    made = nn.BatchNorm1d(width)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


MODELS = {
    "head": lambda: (nn.Sequential(lstm(), nn.Linear(7, 3)), torch.randn(2, 6, 5)),
    "deep head": lambda: (
        nn.Sequential(lstm(5, 7, 2, bidirectional=True, dropout=0.5), nn.Dropout(0.3), nn.Linear(14, 6), nn.ReLU()),
        torch.randn(2, 6, 5),
    ),
    "ids": lambda: (nn.Sequential(nn.Embedding(9, 5), lstm(kind=nn.GRU), nn.LayerNorm(7)), torch.randint(9, (2, 6))),
    "named": lambda: (
        nn.Sequential(OrderedDict(rnn=lstm(kind=nn.RNN, nonlinearity="relu"), out=nn.Linear(7, 2, bias=False))),
        torch.randn(2, 6, 5),
    ),
    "nested": lambda: (
        nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Sequential(lstm(6, 4, proj_size=3), nn.Sigmoid())),
        torch.randn(2, 6, 5),
    ),
    "convolved": lambda: (
        nn.Sequential(nn.Conv1d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 2, dilation=2)),
        torch.randn(2, 5, 12),
    ),
    "normalised": lambda: (nn.Sequential(nn.Conv1d(5, 6, 3), norm(6), nn.LeakyReLU(0.3)), torch.randn(2, 5, 12)),
    "activations": lambda: (
        nn.Sequential(lstm(), nn.ELU(0.7), nn.Linear(7, 7), nn.Softplus(), nn.Hardsigmoid(), nn.Softmax(-1)),
        torch.randn(2, 6, 5),
    ),
    "weight norm": lambda: (
        nn.Sequential(with_each(lstm(), COMPUTED["weight norm"]), nn.utils.weight_norm(nn.Linear(7, 3))),
        torch.randn(2, 6, 5),
    ),
    "twice the same": lambda: ((lambda m: nn.Sequential(m, nn.ReLU(), m))(lstm(5, 5)), torch.randn(2, 6, 5)),
}


WRAPPINGS = [
    (case, wrapped)
    for case in MODELS
    for wrapped in ("alone", "parallel", "checkpoint", "old", "half")
    if (case, wrapped) != ("weight norm", "half")  # torch computes it in half precision
]


@pytest.mark.parametrize(("case", "wrapped"), WRAPPINGS)
def test_pickled_sequentials(write, case, wrapped):
    model, x = MODELS[case]()
    model.eval()
    if wrapped == "half":
        path = write(copy.deepcopy(model).half())
        model = model.half().float()
    else:
        held = {"parallel": lambda: nn.DataParallel(model), "checkpoint": lambda: {"epoch": 3, "model": model}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = write(held.get(wrapped, lambda: model)(), _use_new_zipfile_serialization=wrapped != "old")
    net, want = pytorch.load(path), output(model, x)
    close(net(x.numpy()), want)
    assert np.array_equal(net(x.numpy()), cs.load(model)(x.numpy()))
    assert net.metadata["source"] == {"format": "pytorch", "module": "model" if wrapped == "checkpoint" else ""}


def test_unsupported_parts_of_a_pickled_sequential_are_refused_by_name(write):
    own, hooks = nn.Sequential(lstm(), Turn(), nn.Linear(7, 2)), nn.Sequential(lstm(), nn.Linear(7, 2))
    hooks[1].register_forward_hook(output)
    patched = nn.Sequential(lstm(), nn.Linear(7, 2))
    patched[1].forward = output
    for model, message in (
        (own, r"1 \(test_torch_people.Turn\): expected a recurrent layer, .*to_nodes\(\): \[\] if"),
        (hooks, r"1 \(torch.nn.modules.linear.Linear\): forward hooks aren't supported"),
        (patched, r"1 \(torch.nn.modules.linear.Linear\): expected a recurrent layer"),
        (nn.Sequential(lstm(), nn.PReLU()), r"1 \(torch.nn.modules.activation.PReLU\): expected"),
        ({"model": own[:1], "head": nn.Linear(7, 2).state_dict()}, r"head \(weight \[2, 7\]"),
        ({"model": nn.Sequential(lstm(), nn.Linear(7, 2)), "a": torch.ones(2)}, r"a \[2\]"),
    ):
        with pytest.raises(cs.FormatError, match=message) as caught:
            pytorch.load(write(model))
        assert "(or `cellstack info FILE`) gives its recurrent parts" in str(caught.value)
    for model in (own, patched):
        with pytest.raises(
            TypeError, match=r"1 \((Turn|Linear)\): expected a recurrent layer, .*a method to_nodes\(\)"
        ):
            cs.load(model)
    own[1].to_nodes = list
    x = torch.randn(2, 6, 5)
    close(cs.load(own)(x.numpy()), own[2](own[0](x)[0]))


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────


def shared(module):
    """Weights in one storage, as cuDNN stores them, and one of them transposed."""
    flat, state, at = torch.cat([w.detach().reshape(-1) for w in module.parameters()]), OrderedDict(), 0
    for name, weight in module.named_parameters():
        state[name] = flat[at : at + weight.numel()].view(weight.shape)
        at += weight.numel()
    state["weight_ih_l0"] = state["weight_ih_l0"].t().contiguous().t()
    return state


def prefixed(prefix):
    return lambda m: {prefix + name: value for name, value in m.state_dict().items()}


def trained(module):
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(1, 2, 5))[0].sum().backward()
    optimiser.step()
    averaged = torch.optim.swa_utils.AveragedModel(module)
    state = {f"rnn.{name}": value for name, value in module.state_dict().items()}
    return {"state_dict": state, "optimizer_states": [optimiser.state_dict()], "ema": averaged.state_dict()}


CHECKPOINTS = {
    "data parallel": ("module", prefixed("module.")),
    "compiled": ("_orig_mod.model.encoder.rnn", prefixed("_orig_mod.model.encoder.rnn.")),
    "lightning": ("state_dict.rnn", trained),
    "shared": ("", shared),
    "list": ("0.net", lambda m: [{"net": m.state_dict()}, {"lr": 0.1}]),
    "parameters": ("", lambda m: dict(m.named_parameters())),
    "module within": ("model", lambda m: {"model": m, "args": {"layers": 2}}),
}


@pytest.mark.parametrize("suffix", [".tar", ".ckpt", ".model", ".pth.tar", ".bin", ""])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(write, case, old, suffix):
    name, make = CHECKPOINTS[case]
    module = lstm(kind=nn.GRU) if case == "lightning" else lstm(5, 7, 2)
    path = write(make(module), suffix, _use_new_zipfile_serialization=not old)
    x = torch.randn(2, 6, 5)
    parts = cs.extract(path)
    close(parts[name](x.numpy()), module(x)[0])
    assert list(parts) == ([name] if case != "lightning" else [name, "ema.module"])
    if case == "lightning":
        with pytest.raises(
            cs.FormatError, match=r"ema \(n_averaged \[\]\), 12 tensors of an optimiser \(optimizer_states\.0"
        ):
            cs.load(path)
    else:
        close(cs.load(path)(x.numpy()), module(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "weight norm", "pruned"])
def test_safetensors(tmp_path, case, dtype):
    module = lstm() if case == "plain" else computed("lstm", case)
    state = {f"rnn.{name}": value.contiguous().to(dtype) for name, value in module.state_dict().items()}
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "step": "7"})
    wide = {name: value.to(torch.float64) for name, value in state.items()}
    exact = pytorch.networks_of({name: value.numpy() for name, value in wide.items()}, "the state")["rnn"]
    x = np.random.default_rng(0).normal(size=(2, 6, 5))
    for net in (cs.load(path), cs.extract(path)["rnn"]):
        tolerance = tolerances.REFERENCE_DOUBLE if dtype == torch.float64 else tolerances.LOOP
        wide = net.with_weights("float32")  # without the rounding of bfloat16 inputs
        np.testing.assert_allclose(wide(x), exact(x), atol=tolerance, rtol=tolerance)
        assert net.dtype == ("float64" if dtype == torch.float64 else "float32")


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_in_memory_steps_over_time(kind):
    cell = randomised(kind(5, 7, nonlinearity="relu") if kind is nn.RNNCell else kind(5, 7))
    net, x, state = cs.load(cell), torch.randn(2, 6, 5), None
    got = net(x.numpy())
    for step in range(6):
        state = cell(x[:, step], state)
        close(got[:, step], state[0] if kind is nn.LSTMCell else state)


def test_an_old_rnn_without_the_setting_nonlinearity(write):
    model = nn.Sequential(nn.Linear(5, 5), lstm(kind=nn.RNN, nonlinearity="relu"))
    del model[1].nonlinearity
    x = torch.randn(2, 6, 5)
    close(pytorch.load(write(model))(x.numpy()), output(model, x))


@pytest.mark.parametrize("module", [nn.TransformerEncoderLayer(8, 2), nn.LazyLinear(3), nn.EmbeddingBag(5, 7)])
def test_unknown_layers_are_refused_by_name(write, module):
    with pytest.raises(
        cs.FormatError, match=rf"1 \(torch\.nn\.modules\.\w+\.{type(module).__name__}\): (expected|forward hooks)"
    ):
        pytorch.load(write(nn.Sequential(lstm(), module)))


@pytest.mark.parametrize("kind", [nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_modules_without_effect_in_evaluation_mode_are_ignored(write, kind):
    module = nn.Sequential(lstm(), kind()).eval()
    x = torch.randn(2, 6, 5)
    with records(write(module)) as file:
        root = file.read()
        assert contents("the file", root).unknown == []
    close(pytorch.load(write(module))(x.numpy()), output(module, x))

"""The SRU of the package sru, as state dicts and in memory: compared with its recurrence, step by step."""

import sys

import numpy as np
import pytest
import torch

import cellstack as cs
from cellstack.cells.errors import FormatError

H, STEPS, BATCH = 4, 7, 3


def of_package(layers, x):
    """Run layers of one direction as sru's `elementwise_recurrence_naive` does."""
    for weight, weight_c, bias, scale_x in layers:
        units = weight_c.shape[0] // 2
        u = (x @ weight).reshape(*x.shape[:2], units, -1)
        (v_f, v_r), (b_f, b_r) = weight_c.reshape(2, units), bias.reshape(2, units)
        highway = u[..., 3] if u.shape[-1] == 4 else x * scale_x
        c, out = np.zeros((len(x), units)), []
        for t in range(x.shape[1]):
            forget, reset = (
                1 / (1 + np.exp(-(u[:, t, :, k] + v * c + b))) for k, v, b in ((1, v_f, b_f), (2, v_r, b_r))
            )
            c = u[:, t, :, 0] + (c - u[:, t, :, 0]) * forget
            out.append(highway[:, t] + (c - highway[:, t]) * reset)
        x = np.stack(out, axis=1)
    return x


def state_dict(rng, features, depth=2):
    tensors, layers = {}, []
    for number in range(depth):
        width = features if number == 0 else H
        shapes = {"weight": (width, H * (3 if width == H else 4)), "weight_c": (2 * H,), "bias": (2 * H,)}
        arrays = {name: rng.normal(0, 0.6, shape) for name, shape in shapes.items()}
        arrays["scale_x"] = np.array([1.7])
        tensors |= {f"rnn.rnn_lst.{number}.{name}": torch.tensor(array) for name, array in arrays.items()}
        layers.append([arrays[name] for name in ("weight", "weight_c", "bias", "scale_x")])
    return tensors, layers


@pytest.mark.parametrize("features", [5, H])
def test_a_state_dict_is_read(tmp_path, features):
    rng = np.random.default_rng(features)
    tensors, layers = state_dict(rng, features)
    torch.save(tensors, tmp_path / "sru.pt")
    net, x = cs.load(tmp_path / "sru.pt"), rng.normal(size=(BATCH, STEPS, features))
    np.testing.assert_allclose(net(x), of_package(layers, x), atol=1e-12)
    assert "one direction" in net.metadata["assumed"]


def test_factorised_products_are_multiplied_out(tmp_path):
    rng = np.random.default_rng(1)
    tensors, layers = state_dict(rng, 5, depth=1)
    first, second = rng.normal(size=(5, 2)), rng.normal(size=(2, 4 * H))
    tensors |= {"rnn.rnn_lst.0.weight_proj": torch.tensor(first), "rnn.rnn_lst.0.weight": torch.tensor(second)}
    torch.save(tensors, tmp_path / "sru.pt")
    layers[0][0] = first @ second
    x = rng.normal(size=(BATCH, STEPS, 5))
    np.testing.assert_allclose(cs.load(tmp_path / "sru.pt")(x), of_package(layers, x), atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm.weight": torch.ones(5)}, "layer_norm isn't supported"),
        ({"weight": torch.ones(5, 9)}, "expected weight"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, message):
    tensors, _ = state_dict(np.random.default_rng(2), 5, depth=1)
    torch.save(tensors | {f"rnn.rnn_lst.0.{name}": value for name, value in changes.items()}, tmp_path / "sru.pt")
    with pytest.raises(FormatError, match=message):
        cs.load(tmp_path / "sru.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 5},
        {"input_size": 2 * H, "bidirectional": True, "rescale": True},
        {"input_size": H, "use_tanh": True, "rescale": True},
        {"input_size": H, "has_skip_term": False},
        {"input_size": 5, "projection_size": 3, "proj_input_to_hidden_first": True},
    ],
)
def test_modules_of_the_package(monkeypatch, options):
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *args, **kwargs: None)  # it compiles routines
    monkeypatch.setattr("torch.jit.script", lambda function: function)
    sru = pytest.importorskip("sru")
    assert "sru.modules" in sys.modules
    torch.manual_seed(0)
    module = sru.SRU(hidden_size=H, num_layers=2, **options).double().eval()
    x = torch.randn(STEPS, BATCH, options["input_size"], dtype=torch.float64)
    y, _ = module(x)
    np.testing.assert_allclose(cs.load(module)(x.transpose(0, 1).numpy()), y.detach().transpose(0, 1), atol=1e-6)

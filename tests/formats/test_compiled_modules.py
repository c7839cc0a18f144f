"""Modules as people have them: kept tensors, locks, computed weights, nested inputs and outputs, scripted parts."""

import random
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs


class Net(nn.Module):
    """A convolution, an LSTM and a head, with whatever else a test adds.

    Args:
        ends: what it returns of the output and the state.
        takes: returns x from the inputs.
    """

    def __init__(self, ends=lambda y, state: y, takes=lambda *inputs: inputs[0]):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.lstm, self.head = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)
        self.ends, self.takes = ends, takes

    def forward(self, *inputs):
        y, state = self.lstm(self.front(self.takes(*inputs)))
        return self.ends(self.head(y), state)


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


def agrees(net, module, x=X):
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_tensors_of_a_graph_and_locks_are_copied():
    module = Net()
    module.kept, module.lock = [module(X)], {"lock": threading.RLock(), "other": threading.Lock()}
    agrees(cs.compile(module, X), module)
    assert module.kept[0].grad_fn is not None


def test_a_part_that_cannot_be_copied_is_named():
    module = Net()
    module.lstm.steps = (n for n in range(3))
    with pytest.raises(cs.FormatError, match=r"Net can't be copied: its attribute lstm\.steps can't be copied, so set"):
        cs.compile(module, X)


def old(norm, part, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm(part, name)


def weight_norms(m):
    old(nn.utils.weight_norm, m.head, "weight")
    old(nn.utils.weight_norm, m.lstm, "weight_hh_l0")


def parametrizations(m):
    nn.utils.parametrizations.weight_norm(m.head)
    nn.utils.parametrizations.spectral_norm(m.front)


CHANGES = {
    "weight norm": weight_norms,
    "spectral norm": lambda m: old(nn.utils.spectral_norm, m.head, "weight"),
    "parametrizations": parametrizations,
    "pruned": lambda m: nn.utils.prune.random_unstructured(m.head, "weight", 0.5),
}


def state_of(module):
    """Return all that `compile` could change of a module."""
    return {
        "weights": {
            name: (value, value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()
        },
        "modes": [part.training for part in module.modules()],
        "classes": [type(part) for part in module.modules()],
        "hooks": [(dict(p._forward_pre_hooks), dict(p._forward_hooks)) for p in module.modules()],
        "attributes": [set(vars(part)) for part in module.modules()],
        "drawn": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),  # noqa: NPY002
    }


@pytest.mark.parametrize("name", CHANGES)
def test_weights_computed_before_each_call_are_folded_and_the_module_is_not_changed(name):
    module = Net()
    CHANGES[name](module)
    expected = state_of(module)
    net = cs.compile(module, X)
    same(state_of(module), expected)
    agrees(net, module.eval())
    with pytest.raises(ValueError, match="itself rejects the example"):
        cs.compile(module, torch.randn(2, 5, 4))


def same(found, expected):
    for key, (value, then, version) in expected["weights"].items():
        now = found["weights"][key][0]
        assert now is value
        assert torch.equal(now, then)
        assert now._version == version
    for key in ("modes", "classes", "hooks", "attributes"):
        assert found[key] == expected[key]
    for one, other in zip(found["drawn"], expected["drawn"], strict=True):
        assert np.array_equal(one, other) if not isinstance(one, tuple) else one == other


def test_a_refused_module_is_not_changed_and_no_random_number_is_taken():
    module = Net(lambda y, state: torch.erfinv(y) + torch.rand(()))
    weight_norms(module)
    expected = state_of(module)
    with pytest.raises(cs.FormatError, match="a second call with the same input gives another output"):
        cs.compile(module, X)
    same(state_of(module), expected)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Names(dict):
    """A dict with attributes, as transformers have it."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize(
    ("ends", "noted"),
    [
        (lambda y, state: {"y": y, "name": "net", "loss": None}, r"aren't tensors \(str\): .* the tensors only"),
        (lambda y, state: (None, 3, y, (0.5,)), r"aren't tensors \(int, float\)"),
        (lambda y, state: Output(y), None),
        (lambda y, state: Names(logits=y, past=None), None),
    ],
)
def test_outputs_that_are_not_tensors_are_left_out(ends, noted):
    module = Net(ends)
    if noted is None:
        net = cs.compile(module, X)
    else:
        with pytest.warns(UserWarning, match=noted):
            net = cs.compile(module, X)
    np.testing.assert_allclose(net(X.numpy()), Net()(X).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("takes", "example"),
    [
        (lambda batch: batch["x"], {"x": X}),
        (lambda batch, scale: batch["x"] if scale is None else scale, ({"x": X}, None)),
        (lambda batch: batch.x, Names(x=X)),
        (lambda out: out.logits, Output(X)),
        (lambda x, flag, parts: x if flag else parts[0], (X, True, [None, "a"])),
    ],
)
def test_examples_may_hold_dicts_and_settings(takes, example):
    net = cs.compile(Net(takes=takes), example)
    np.testing.assert_allclose(net(X.numpy()), Net()(X).detach().numpy(), atol=1e-5)


def test_what_a_module_itself_rejects_is_said():
    module = Net()
    module.ends = Ends()
    with pytest.raises(
        ValueError, match=r"rejects the example, in evaluation mode, but accepts it in training mode: R"
    ):
        cs.compile(module, X)
    with pytest.raises(ValueError, match=r"rejects the example: RuntimeError: .*Float"):
        cs.compile(Net(), X.long())
    with pytest.raises(ValueError, match=r"Net itself returns no tensor for the example, but str, NoneType"):
        cs.compile(Net(lambda y, state: ("y", None)), X)


class Ends(nn.Module):
    """Works in training mode only."""

    def forward(self, y, state):
        if not self.training:
            raise RuntimeError("no targets")
        return y


def test_the_parts_that_can_be_compiled_are_named_with_their_connections():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.encoder, self.decoder = nn.Linear(3, 3), Net(), nn.GRU(2, 4, batch_first=True)

        def forward(self, x):
            return torch.erfinv(self.decoder(torch.erfinv(self.encoder(self.first(x))))[0])

    with pytest.raises(cs.FormatError) as raised:
        cs.compile(Whole(), X)
    assert str(raised.value).endswith(
        "; a part of it can be compiled: module.encoder, [B, T, 3] -> [B, T, 2]; its input is the output of "
        "module.first; module.decoder, [B, T, 2] -> [B, T, 4]; its input is computed in forward"
    )

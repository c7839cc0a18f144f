"""Weights, states and inputs of subclasses of torch.Tensor: the kernel reads none without ordinary memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import cellstack as cs
from cellstack import layers

SEQUENCES = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
PAIRS = (nn.LSTM, nn.LSTMCell)
UNITS = 200  # wide enough for the kernel in all modules


class Wrapper(torch.Tensor):
    """A tensor without its own memory, like DTensor and quantised weights."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(inner, (args, kwargs or {}))
        return tree_map(lambda t: Wrapper(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


class Plain(torch.Tensor):
    """A subclass with memory like any tensor's."""


def inner(value):
    return value.inner if isinstance(value, Wrapper) else value


def wrap(module):
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Wrapper(parameter.detach().clone()))
    return module


def pair(kind):
    torch.manual_seed(0)
    theirs = kind(3, UNITS)
    return theirs, cs.accelerate(copy.deepcopy(theirs))


def given(kind):
    """Return an input and a state for a module."""
    x, h = (
        (torch.randn(2, 3), torch.randn(2, UNITS))
        if kind in CELLS
        else (torch.randn(20, 2, 3), torch.ones(1, 2, UNITS))
    )
    return x, (h, h) if kind in PAIRS else h


def same(found, expected):
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(inner(a).detach(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
def test_pytorch_runs_a_module_whose_weights_are_a_subclass(kind, learns):
    theirs, ours = pair(kind)
    wrap(ours)
    assert cs.plan(ours)[0].endswith("PyTorch: its weights are of a subclass of torch.Tensor (Wrapper)")
    x, hx = given(kind)
    x.requires_grad_(learns)
    with torch.set_grad_enabled(learns), cs.packed_weights(ours):
        same(ours(x), theirs(x))
        same(ours(x, hx), theirs(x, hx))
    with pytest.raises(RuntimeError, match=r"its weights are of a subclass of torch\.Tensor \(Wrapper\)"):
        ours(x, return_gates=True)


@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS])
def test_pytorch_runs_a_call_with_a_state_or_an_input_of_a_subclass(kind):
    theirs, ours = pair(kind)
    x, hx = given(kind)
    expected = theirs(x, hx)
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(x, tree_map(Wrapper, hx)), expected)
        same(ours(Wrapper(x), hx), expected)
        found = ours(Wrapper(x), tree_map(Wrapper, hx))
        same(found, expected)
        assert all(type(part) is Wrapper for part in tree_leaves(found))
        assert all(type(part) is Plain for part in tree_leaves(ours(x.as_subclass(Plain), hx)))


def test_a_reset_of_a_subclass_is_refused():
    _, ours = pair(nn.LSTM)
    with pytest.raises(ValueError, match="LSTM: expected reset to be a bool tensor, got Wrapper"):
        ours(torch.randn(20, 2, 3), reset=Wrapper(torch.zeros(20, 2, dtype=torch.bool)))


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_our_layers_refuse_what_the_kernel_cannot_read(kind):
    x, h, names = torch.randn(2, 5, 3), torch.zeros(2, 4), {"input_size": 3, "name": "first"}
    layer = kind(4, **names)
    state = [Wrapper(h)] * 2 if kind is layers.LSTM else Wrapper(h)
    with pytest.raises(TypeError, match=r"'first': expected the state as torch\.Tensor, got Wrapper"):
        layer(x, initial_state=state)
    with pytest.raises(TypeError, match=r"'first': expected the state as torch\.Tensor, got Wrapper"):
        layer.states = state
    with pytest.raises(TypeError, match=r"'first': expected mask as torch\.Tensor, got Wrapper"):
        layer(x, mask=Wrapper(torch.ones(2, 5, dtype=torch.bool)))
    expected = layer(x)
    same(layer(Wrapper(x)), expected)
    with pytest.raises(
        TypeError, match=r"'first': expected kernel to be a torch\.Tensor or nn\.Parameter, got Wrapper"
    ):
        wrap(layer)(x)
    cell = wrap(kind(4, **names).cell)
    with pytest.raises(
        TypeError, match=r"'first': expected kernel to be a torch\.Tensor or nn\.Parameter, got Wrapper"
    ):
        cell(x[:, 0])


def test_a_stateful_layer_works_after_an_input_of_a_subclass_with_memory():
    layer = layers.LSTM(4, input_size=3, stateful=True)
    x = torch.randn(2, 5, 3)
    layer(x.as_subclass(Plain))
    found = layer(x)
    layer.reset_states()
    layer(x)
    same(found, layer(x))


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_a_layer_of_fake_tensors_returns_shapes(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = kind(4, input_size=3, return_sequences=True)
        assert tuple(layer(torch.zeros(2, 5, 3)).shape) == (2, 5, 4)
        ours = cs.accelerate(nn.LSTM(3, UNITS))
        assert tuple(ours(torch.zeros(20, 2, 3))[0].shape) == (20, 2, UNITS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_gradients_per_sample_are_those_of_pytorch(kind, packed):
    theirs, ours = pair(kind)
    x = torch.randn(20, 2, 3)
    x = pack_sequence([x[:, 0], x[:7, 1]]) if packed else x
    found, expected = (gradients_per_sample(module, x) for module in (ours, theirs))
    if isinstance(expected, str):
        assert kind is nn.LSTM
        assert not packed
        assert found == expected
    else:
        same(found, expected)


def gradients_per_sample(module, x):
    """Return the gradients of each sample, or PyTorch's error: oneDNN's LSTM doesn't support them."""
    try:
        out = call_for_per_sample_grads(module, batch_size=2, batch_first=False)(x)
    except RuntimeError as error:
        return str(error)
    sum(t.sum() for t in tree_leaves(out) if t is not None and t.is_floating_point()).backward()
    return [parameter.grad_sample for parameter in module.parameters()]


def test_our_layers_refuse_gradients_per_sample():
    layer = layers.LSTM(4, input_size=3)
    with pytest.raises(TypeError, match=r"expected kernel to be a torch\.Tensor or nn\.Parameter, got ExpandedWeight"):
        call_for_per_sample_grads(layer, batch_size=2)(torch.randn(2, 5, 3))

"""Modules whose axes aren't [B, T, features]: what `compile` makes of them, and how it says so."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.capture import compile_network


class Fn(nn.Module):
    """A module with a function as its forward."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x):
        return self.function(self, *x)


def conv(channels=6):
    return nn.Conv1d(channels, 5, 3)


def lstm(size, **flags):
    return nn.LSTM(size, 4, **{"batch_first": True} | flags)


# name: module, shape of the example, axes of input and output in the module
MODULES = {
    "an LSTM": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), (3, 9, 6), "", ""),
    "time first": (lambda: Fn(lambda m, x: m.r(x)[0] * 2, r=lstm(6, batch_first=False)), (9, 3, 6), "TB6", "TB4"),
    "time first, last": (lambda: Fn(lambda m, x: m.r(x)[0][-1], r=lstm(6, batch_first=False)), (9, 3, 6), "TB6", "B4"),
    "a torch layer with time first": (lambda: nn.GRU(6, 4), (9, 3, 6), "TB6", "TB4"),
    "time first, one step": (lambda: nn.GRU(6, 4), (1, 3, 6), "TB6", "TB4"),
    "convolutions in sequence": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.Conv1d(5, 4, 1)), (3, 6, 9), "B6T", "B4T"),
    "a convolution": (lambda: Fn(lambda m, x: torch.relu(m.c(x)), c=conv()), (3, 6, 9), "B6T", "B5T"),
    "channels first around an LSTM": (
        lambda: Fn(lambda m, x: m.r(m.c(x).transpose(1, 2))[0].transpose(1, 2), c=conv(), r=lstm(5)),
        (3, 6, 9), "B6T", "B4T",
    ),
    "channels first to a vector": (lambda: Fn(lambda m, x: m.c(x).mean(-1), c=conv()), (3, 6, 9), "B6T", "B5"),
    "as many channels as steps": (lambda: Fn(lambda m, x: m.c(x), c=conv()), (6, 6, 6), "B6T", "B5T"),
    "an axis of length 1": (lambda: Fn(lambda m, x: m.r(x.squeeze(1))[0], r=lstm(6)), (3, 1, 9, 6), "B1T6", "BT4"),
    "an image": (
        lambda: Fn(lambda m, x: m.r(x.squeeze(1).transpose(1, 2))[0].transpose(1, 2)[:, None], r=lstm(6)),
        (3, 1, 6, 9), "B16T", "B14T",
    ),
    "an image whose height may change too": (
        lambda: Fn(lambda m, x: m.r(x.permute(2, 0, 3, 1).flatten(0, 1))[0].transpose(1, 2)[:, :, None], r=lstm(6)),
        (3, 6, 1, 9), "B61T", "B41T",
    ),
    "pooling over the height": (
        lambda: Fn(
            lambda m, x: m.r(m.p(x.permute(0, 3, 1, 2)).squeeze(3))[0], r=lstm(1), p=nn.AdaptiveAvgPool2d((None, 1))
        ),
        (3, 1, 6, 9), "B16T", "BT4",
    ),
    "ids with time first": (
        lambda: Fn(lambda m, x: m.r(m.e(x))[0], e=nn.Embedding(9, 6), r=lstm(6, batch_first=False)), (9, 3), "TB", "TB4"
    ),
    "without a batch": (lambda: Fn(lambda m, x: m.r(x)[0], r=lstm(6)), (9, 6), "T6", "T4"),
}  # fmt: skip


def shown(axes):
    return f"[{', '.join(axes)}]"


@pytest.mark.parametrize("name", MODULES)
def test_layouts(name):
    make, shape, takes, returns = MODULES[name]
    torch.manual_seed(0)
    module = make().eval()
    example = torch.randint(9, shape) if "ids" in name else torch.randn(shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = cs.compile(module, example)
    said = [str(one.message) for one in caught if "compile" in str(one.message)]
    if not takes:
        assert (said, "axes in" in repr(net)) == ([], False)
        return
    line = f"axes in the module: {shown(takes)} -> {shown(returns)}"
    assert line in repr(net)
    assert line in str(net.plan())
    if takes != "T6":  # only its batch is missing
        text, *fixed = said
        assert len(fixed) == ("height" in name)
        assert all("takes only the example's size along axis" in one for one in fixed)
        assert f"has other axes than the network: input '{net.inputs[0]}' {shown(takes)} is [B, T" in text
    with torch.no_grad():
        y = module(example)
    y = (y[0] if isinstance(y, tuple) else y).numpy()
    x, theirs = (turned(array, axes) for array, axes in ((example.numpy(), takes), (y, returns)))
    np.testing.assert_allclose(net(x), theirs, atol=1e-5)
    report = cs.verify(net, module)
    assert report.ok(1e-5), str(report)
    assert line in str(report)


def turned(array, axes):
    """Return an array with the axes of a network."""
    array = array.reshape([n for n, axis in zip(array.shape, axes, strict=True) if axis != "1"])
    axes = axes.replace("1", "")
    letters = ["F" if axis.isdigit() else axis for axis in axes]
    array = array.transpose([letters.index(axis) for axis in "BTF" if axis in letters])
    return array if "B" in letters else array[None]


def test_a_module_that_mixes_rows_isn_t_taken_for_one_with_time_first():
    """An LSTM with batch_first=False on a batch-first input runs over the rows: its first axis is the time."""
    module = Fn(lambda m, x: m.r(x)[0].mean(1), r=lstm(6, batch_first=False)).eval()
    with pytest.raises(cs.FormatError, match="compile: Fn can't be a Network"):
        compile_network(module, torch.randn(3, 9, 6))


def test_rows_and_steps_that_a_module_merges_are_warned_of():
    module = Fn(lambda m, x: m.h((y := m.r(x)[0]).reshape(-1, y.shape[-1])), r=lstm(6), h=nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match=r"output '.*' \[B·T, 2\] is \[B, T, 2\] in the network"):
        net = cs.compile(module, torch.randn(3, 9, 6))
    x = torch.randn(2, 5, 6)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy().reshape(2, 5, 2), atol=1e-5)

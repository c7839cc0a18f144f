"""Modules that do something else for some sizes of their input: refused where that shows, else a warning says where."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.capture import compile_network

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """An LSTM, and what becomes of what it takes and returns."""

    def __init__(self, after, layer=nn.LSTM, units=4, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.after = layer(3, units, batch_first=True, **options), nn.Linear(units, 1), after

    def forward(self, x):
        return self.after(self, x, self.layer(x)[0])


def twice_where(condition):
    """Return a module that gives twice its answer where a condition on x holds, and where that condition is."""
    code = condition.__code__
    return Layer(lambda m, x, y: y * 2 if condition(x) else y).eval(), re.escape(
        f"test_compiled_sizes.py:{code.co_firstlineno}"
    )


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.shape[0] > 4,
        lambda x: not x.size(0) <= 4,
        lambda x: x.size(1) - 1 < 1,
        lambda x: len(x) == 1,
        lambda x: len(x) > 4,
        lambda x: x.shape[1] // 2 >= 60,
    ],
)
def test_a_branch_on_a_size_that_was_tried_is_refused_and_located(condition):
    module, place = twice_where(condition)
    with pytest.raises(cs.FormatError, match=rf"Network: it compares sizes of its input \({place}\)"):
        compile_network(module, X)


@pytest.mark.parametrize("condition", [lambda x: list(range(99))[x.shape[0]] > 4, lambda x: math.sqrt(x.size(0)) > 2])
def test_a_size_that_becomes_a_plain_number_is_refused_and_located(condition):
    module, place = twice_where(condition)
    with pytest.raises(
        cs.FormatError, match=rf"Network: its outputs differ for other sizes, .*int\(n\), .*\({place}\)"
    ):
        compile_network(module, X)


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.shape[1] % 7 == 0,
        lambda x: x.shape[0] > 400,
        lambda x: x.size()[1] == 600,
        lambda x: not x.size(1) - 600,
        lambda x: x.shape == (3, 600, 3),
        lambda x: max(x.shape[1], 600) > 600,
        lambda x: x.shape[1] in (600, 601),
        lambda x: x.numel() > 20000,
        lambda x: x.nelement() > 20000,
        lambda x: x.nbytes > 80000,
        lambda x: x.stride(0) > 1800,
        lambda x: x.stride()[0] > 1800,
        lambda x: np.array(x.shape[1]) > 600,
        lambda x: x.shape[1] / 4 > 150.5,
    ],
)
def test_a_branch_on_a_size_that_was_not_tried_is_warned_of_and_located(condition):
    module, place = twice_where(condition)
    with pytest.warns(UserWarning, match=rf"^compile: Layer compares sizes of its input \({place}\)"):
        net = cs.compile(module, X)
    np.testing.assert_allclose(net(X.numpy()), module(X).detach().numpy(), atol=1e-6)


CONVERSIONS = {
    "range with an end": lambda m, x, y: y * 2 if list(range(600, x.shape[1])) else y,
    "range over chunks": lambda m, x, y: y * 2 if list(range(x.shape[1] // 600)) else y,
    "repeated list": lambda m, x, y: y * 2 if [1] * (x.shape[1] - 600) else y,
    "index of a list": lambda m, x, y: y * ([1] * 600 + [2] * 400)[x.shape[1]],
    "int": lambda m, x, y: y * 2 if int(x.shape[1]) > 600 else y,
    "float": lambda m, x, y: y * 2 if float(x.shape[1]) > 600 else y,
    "chunks": lambda m, x, y: torch.cat([y[:, a : a + 600] for a in range(0, 600 * (x.shape[1] // 600) + 1, 600)], 1),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_size_that_becomes_a_plain_number_is_warned_of_located_and_not_verified(name, tmp_path):
    module = Layer(CONVERSIONS[name]).eval()
    place = re.escape(f"test_compiled_sizes.py:{CONVERSIONS[name].__code__.co_firstlineno}")
    with pytest.warns(
        UserWarning, match=rf"^compile: Layer turns sizes of its input into plain numbers, .*\({place}\)"
    ):
        net = cs.compile(module, X)
    net.save(tmp_path / "net.safetensors")
    report = cs.verify(cs.load(tmp_path / "net.safetensors"), module, streams=False)
    assert not report.ok(1e-3)
    assert re.match(rf"not verified: .*\({place}\)", report.verdict())
    given = cs.verify(net, module, x=X.numpy(), streams=False)
    assert given.ok()
    assert re.search(rf"for these sizes only: .*\({place}\)", given.note)


def test_chunks_of_steps_are_warned_of():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return torch.cat([self.layer(x[:, a : a + 280])[0] for a in range(0, x.shape[1], 280)], 1)

    with pytest.warns(UserWarning, match=r"turns sizes .*\(test_compiled_sizes.py:\d+\)"):
        net = cs.compile(module := Chunks(), X)
    assert "test_compiled_sizes.py" in cs.verify(net, module, streams=False).verdict()


class Weighted(nn.Module):
    """Takes a sequence as `[B, T·F]`, or weights `[B, T]` of its steps: axes that a Network takes for features."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, weights=None):
        y = self.rnn(x if x.ndim == 3 else x.view(x.shape[0], -1, 3))[0][:, -1]
        return y if weights is None else y * weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("example", "place"),
    [((torch.randn(2, 27),), "axis 1 of input 0"), ((torch.randn(2, 9, 3), torch.rand(2, 9)), "axis 1 of input 1")],
    ids=["merged", "weights"],
)
def test_a_size_that_only_the_network_fixes_is_warned_of(example, place):
    with pytest.warns(UserWarning, match=f"only the example's size along {place}, where the module takes others"):
        net = cs.compile(Weighted().eval(), example)
    assert isinstance(net, cs.Network)


@pytest.mark.long
def test_a_size_as_a_key_is_refused():
    module, _ = twice_where(lambda x: x.shape[1] in {600, 601})
    with pytest.raises(cs.FormatError, match="it uses a size of its input as a key, as in"):
        cs.compile(module, X)


@pytest.mark.long
def test_loops_over_steps_and_states_of_as_many_rows_are_no_plain_numbers():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x):
            h = c = x.new_zeros(len(x), 4)
            ys = []
            for t in range(x.shape[1]):
                h, c = self.cell(x[:, t], (h, c))
                ys.append(h)
            return torch.stack(ys, 1)

    before = globals().keys() - {"len", "range"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = cs.compile(Loop(), X)
    assert cs.verify(net, Loop(), streams=False).unsure == ""  # only the sizes matter here, not the weights
    assert globals().keys() == before  # where `compile` replaces functions for a while


@pytest.mark.long
def test_a_branch_on_the_number_of_a_step_is_refused():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x):
            h = c = x.new_zeros(x.size(0), 4)
            ys = []
            for t in range(x.size(1)):
                h, c = self.cell(x[:, t], (h, c))
                ys.append(-h if t == 30 else h)
            return torch.stack(ys, 1)

    with pytest.raises(
        cs.FormatError, match=r"Network: its loop .* treats some of them differently, .* with 250 more steps"
    ):
        compile_network(Loop(), X)


def checked(m, x, y):
    rows, steps, features = x.shape
    if features != 3 or x.size(-1) != m.layer.input_size:
        raise ValueError("expected three features")
    assert y.shape[:2] == x.shape[:2]
    assert y.size(0) == rows
    assert y.size(1) <= steps
    return m.head(y)


@pytest.mark.parametrize(
    "after",
    [
        checked,
        lambda m, x, y: m.head(y[:, -1]).squeeze(),  # a number alone, for one row
        lambda m, x, y: m.head(y.reshape(x.shape[0] * x.shape[1], -1)).view(x.shape[0], x.shape[1], 1),
    ],
)
def test_checks_and_the_use_of_sizes_are_no_branches(after):
    module = Layer(after).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = cs.compile(module, X)
    expected = module(X).detach().numpy()
    np.testing.assert_allclose(net(X.numpy()).reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_long_sequence_that_rounding_decides_is_no_reason_to_refuse(nonlinearity):
    module = Layer(lambda m, x, y: y * 1.5, nn.RNN, 32, nonlinearity=nonlinearity).eval()
    with torch.no_grad():
        module.layer.weight_hh_l0.mul_(20)  # errors grow from step to step, or the answer is infinite
    net = cs.compile(module, X)
    np.testing.assert_allclose(net(X.numpy()), module(X).detach().numpy(), rtol=1e-3, atol=1e-3)


def test_large_inputs_that_rounding_decides_are_no_reason_to_refuse():
    def after(m, x, y):
        if x.shape[-1] != 3:  # a tensor while traced: values may matter, so large ones are tried too
            raise ValueError
        return torch.sin(500 * m.head(torch.cat([x, x[..., :1]], -1)))

    module = Layer(after).eval()
    net = cs.compile(module, X)
    np.testing.assert_allclose(net(X.numpy()), module(X).detach().numpy(), atol=1e-4)


def test_what_rounding_decides_ends_no_comparison():
    def after(m, x, y):
        if x.shape[-1] != 3:  # as above
            raise ValueError
        return torch.sin(500 * m.head(torch.cat([x, x[..., :1]], -1))) * (2 if x.shape[0] > 8 else 1)

    with pytest.raises(cs.FormatError, match="with 10 more rows output 0 differs"):
        cs.compile(Layer(after).eval(), X)


class Filled(nn.Module):
    """Convolutions of which each uses all steps: the last window is filled up; then the transposed ones, cut."""

    def __init__(self, mode="constant", window=4, stride=3):
        super().__init__()
        torch.manual_seed(0)
        self.mode, self.window, self.stride = mode, window, stride
        self.down, self.up = nn.Conv1d(3, 4, window, stride), nn.ConvTranspose1d(4, 3, window, stride)
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def filled(self, x):
        steps = x.shape[-1] + 1 - self.window
        more = math.ceil(steps / self.stride) * self.stride - steps
        return nn.functional.pad(x, (1, more), self.mode)

    def forward(self, x):
        y = self.down(self.filled(x.transpose(1, 2)))
        y = self.up(self.rnn(y.transpose(1, 2))[0].transpose(1, 2))
        return y[..., 1 : y.shape[-1] - 2].transpose(1, 2)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_windows_that_are_filled_up(mode):
    module = Filled(mode).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # math.ceil of a length is part of the graph
        net = cs.compile(module, torch.randn(2, 9, 3))
    for rows, steps in ((2, 9), (1, 10), (3, 11), (2, 30)):
        x = torch.randn(rows, steps, 3)
        np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)
    assert not hasattr(torch.Tensor, "__ceil__")


@pytest.mark.long
def test_pads_that_no_window_needs_are_refused():
    def more(m, x, y):
        return nn.functional.pad(y.transpose(1, 2), (0, math.ceil(y.shape[1] / 4) * 4 - y.shape[1]))

    with pytest.raises(
        cs.FormatError, match="depends on the number of steps, only a convolution over time is supported"
    ):
        compile_network(Layer(lambda m, x, y: torch.relu(more(m, x, y))).eval(), X)
    module = Layer(lambda m, x, y: m.conv(more(m, x, y))).eval()
    module.conv = nn.Conv1d(4, 4, 3, 2)
    with pytest.raises(cs.FormatError, match="don't fit windows of 3 every 2 steps"):
        compile_network(module, X)


def test_an_end_of_another_value_is_refused():
    module = Layer(lambda m, x, y: m.conv(y.transpose(1, 2))[..., : y.shape[1] - 1]).eval()
    module.conv = nn.Conv1d(4, 4, 3, 1, 2)
    with pytest.raises(cs.FormatError, match="the end of a slice computed from another value's number of steps"):
        compile_network(module, X)

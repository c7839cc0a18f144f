"""Whole PyTorch modules as networks: they agree with the module, or are refused."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.capture import compile_network


class Tagger(nn.Module):
    """A custom class with its own forward: only the exporter knows its graph."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y, _ = self.lstm(x)
        return torch.log_softmax(self.head(self.drop(torch.relu(y))), dim=-1)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        y, _ = self.gru(x)
        return self.head(y[:, -1])


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return torch.erfinv(self.lstm(x)[0])


@pytest.mark.long
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(("kind", "width"), [(Tagger, 5), (Last, 4)])
def test_a_custom_class_becomes_a_network(kind, width, accelerated):
    torch.manual_seed(0)
    module = kind().train()
    if accelerated:
        cs.accelerate(module)
    net = cs.compile(module, torch.randn(2, 7, width))
    assert module.training
    x = torch.randn(3, 11, width)  # another batch, another length
    expected = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-5)


def test_known_modules_are_read_directly(monkeypatch):
    def export(*_args, **_options):
        raise AssertionError("exported")

    monkeypatch.setattr(torch.onnx, "export", export)
    module = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    np.testing.assert_allclose(cs.compile(module, x)(x.numpy()), module(x)[0].detach().numpy(), atol=1e-6)


@pytest.mark.long
def test_an_unsupported_module_is_refused_with_all_reasons_the_most_important_first():
    with pytest.raises(cs.FormatError) as raised:
        compile_network(Sine(), torch.randn(2, 7, 4))
    line = Sine.forward.__code__.co_firstlineno + 1
    assert re.fullmatch(
        "compile: Sine can't be a Network: ONNX has no such operator: compute that part outside the module; "
        rf"exported to ONNX: PyTorch can't export it: .*erf_inv.* \(test_compiled\.py:{line}\); "
        r"read directly: load: the module \(Sine\): a custom class without to_nodes\(\)",
        str(raised.value),
    )


class Loud(nn.Module):
    """A branch on values, which a trace of one example doesn't show."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        y, _ = self.lstm(x)
        return y * 2 if bool(x.abs().max() > 1e-3) else y


@pytest.mark.long
def test_a_network_with_other_outputs_is_refused():
    with pytest.raises(cs.FormatError, match=r"exported to ONNX: output 0 differs from the module's by "):
        compile_network(Loud(), torch.zeros(2, 7, 4))


def test_invalid_modules_and_examples_are_refused():
    with pytest.raises(TypeError, match="expected a module of PyTorch, got int"):
        compile_network(3, torch.zeros(1))
    for example in (None, (), ([1.0],)):
        with pytest.raises(TypeError, match="expected example to be a tensor"):
            compile_network(nn.LSTM(3, 4), example)
    with pytest.raises(TypeError, match=r"expected example to be a tensor.* such as torch.zeros\(1, 10, 3\)"):
        compile_network(nn.LSTM(3, 4))


class Parts(nn.Module):
    """Outputs of a module in addition to y."""

    def __init__(self, parts, **options):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True, **options), nn.Linear(4, 2)
        self.parts = parts

    def forward(self, *inputs):
        x = sum(inputs)
        return self.parts(self, x, *self.lstm(x))


RETURNED = {
    "state": lambda m, x, y, state: (m.head(y), state),
    "last h": lambda m, x, y, state: (m.head(y), state[0]),
    "dict": lambda m, x, y, state: {"z": m.head(y), "a": y},
    "list": lambda m, x, y, state: [y, m.head(y)],
    "none": lambda m, x, y, state: (y, None),
    "twice": lambda m, x, y, state: (y, y),
    "c changed": lambda m, x, y, state: (y, state[1][0] * 2),
}


@pytest.mark.parametrize("name", RETURNED)
def test_the_network_has_every_output_of_the_module(name):
    module, x = Parts(RETURNED[name]), torch.randn(2, 7, 3)
    net = cs.compile(module, x)
    ours, (state,) = net.run(x.numpy())
    expected = module(x)
    found = [*(ours if isinstance(ours, tuple) else (ours,)), *(part[None] for part in state)]
    for tensor in flat(expected):
        assert any(a.shape == tensor.shape and np.allclose(a, tensor.detach().numpy(), atol=1e-5) for a in found)
        if tensor.shape[0] == 2:  # a separate output, in order
            np.testing.assert_allclose(found.pop(0), tensor.detach().numpy(), atol=1e-5)


def flat(value):
    value = list(value.values()) if isinstance(value, dict) else value
    return [value] if isinstance(value, torch.Tensor) else [t for part in value if part is not None for t in flat(part)]


@pytest.mark.parametrize("axis", [0, 1])
def test_sizes_in_outputs_are_refused(axis):
    module = Parts(lambda m, x, y, state: y * float(x.shape[axis]))
    with pytest.raises(cs.FormatError, match=r"found a number of steps or rows \(test_compiled.py:\d+\)"):
        compile_network(module, torch.randn(2, 7, 3))


def test_invalid_nested_and_additional_inputs_are_refused_with_a_remedy():
    lstm, x, state = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match=r"got a tuple of Tensor, ndarray"):
        compile_network(lstm, (x, x.numpy()))
    for second in (state, x, True):
        with pytest.raises(TypeError, match=r"expected tolerance to be a number, .* into example as one tuple"):
            compile_network(lstm, x, second)
    with pytest.raises(TypeError, match=r"got ndarray$"):
        compile_network(lstm, x.numpy())


def test_time_before_batch_is_reported():
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.warns(UserWarning, match=r"has other axes than the network: input 'x' \[T, B, 3\] is \[B, T, 3\] in"):
        net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.transpose(0, 1).numpy()), module(x)[0].detach().transpose(0, 1).numpy(), atol=1e-6)


class Stateful(nn.Module):
    """A module that takes and returns its state."""

    def __init__(self, forward, kind=nn.LSTM, layers=1, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(3, 4, layers, batch_first=True, **options)
        self.head = nn.Linear(4 * (1 + self.rnn.bidirectional), 2)
        self.run = forward

    def forward(self, *inputs):
        return self.run(self, *inputs)


def state_apart(m, x, h, c):
    y, (h, c) = m.rnn(x, (h, c))
    return m.head(y), h, c


def state_as_a_pair(m, x, state):
    y, state = m.rnn(x, state)
    return m.head(y), state


def state_rows_first(m, x, h, c):
    y, (h, c) = m.rnn(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
    return m.head(y), h.transpose(0, 1), c.transpose(0, 1)


def c_before_h(m, x, c, h):
    y, (h, c) = m.rnn(x, (h, c))
    return m.head(y), c, h


def h_alone(m, x, h):
    y, (h, _) = m.rnn(x, (h, torch.zeros_like(h)))
    return m.head(y), h


STATEFUL = {
    "apart": (state_apart, {}, ((1, 2, 4), (1, 2, 4))),
    "two layers": (state_apart, {"layers": 2}, ((2, 2, 4), (2, 2, 4))),
    "both directions": (state_apart, {"bidirectional": True}, ((2, 2, 4), (2, 2, 4))),
    "a pair": (state_as_a_pair, {}, (((1, 2, 4), (1, 2, 4)),)),
    "GRU": (state_as_a_pair, {"kind": nn.GRU}, ((1, 2, 4),)),
    "rows first": (state_rows_first, {"layers": 2}, ((2, 2, 4), (2, 2, 4))),
    "c before h": (c_before_h, {}, ((1, 2, 4), (1, 2, 4))),
    "h alone": (h_alone, {}, ((1, 2, 4),)),
}


def random(shapes):
    return tuple(random(part) if isinstance(part[0], tuple) else torch.randn(part) for part in shapes)


@pytest.mark.parametrize("case", STATEFUL)
def test_states_among_the_inputs_become_those_of_the_network(case):
    forward, options, shapes = STATEFUL[case]
    module, x = Stateful(forward, **options).eval(), torch.randn(2, 5, 3)
    net = cs.compile(module, (x, *random(shapes)))
    assert len(net.inputs) == 1
    given = random(shapes)  # other values than the example's
    y, *after = flat(module(x, *given))
    starts = flat(given)
    if case == "h alone":
        starts.append(torch.zeros(1, 2, 4))
    if case == "c before h":
        starts, after = starts[::-1], after[::-1]
    rows = [part.transpose(0, 1) for part in starts] if case == "rows first" else starts
    state = list(zip(*(part.numpy() for part in rows), strict=True))
    ours, ends = net.run(x.numpy(), state)
    np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-5)
    last = [part.transpose(0, 1) for part in after] if case == "rows first" else after
    for part, theirs in zip(zip(*ends, strict=True), last, strict=False):
        np.testing.assert_allclose(np.stack(part), theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(  # it streams unless a layer runs backwards
        net.stream(batch=2).run(x.numpy()) if case != "both directions" else net(x.numpy()),
        flat(module(x, *(torch.zeros(1)[0] * part for part in given)))[0].detach().numpy()
        if case != "a pair"
        else module(x, None)[0].detach().numpy(),
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_module_that_steps_a_cell_becomes_one_over_steps(kind, accelerated):
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell, self.pi = nn.Linear(3, 4), kind(4, 5), nn.Linear(5, 2)

        def forward(self, seen, state):
            state = self.cell(torch.relu(self.first(seen)), state)
            return self.pi(state[0] if isinstance(state, tuple) else state), state

    torch.manual_seed(0)
    actor, seen, h = Actor(), torch.randn(2, 6, 3), torch.randn(2, 5)
    if accelerated:
        cs.accelerate(actor)
    net = cs.compile(actor, (seen[:, 0], (h, h) if kind is nn.LSTMCell else h))
    stream, state = net.stream(batch=2), None
    for t in range(6):
        q, state = actor(seen[:, t], state)
        np.testing.assert_allclose(stream.step(seen[:, t].numpy()), q.detach().numpy(), atol=1e-5)


ENDS = {
    "h": lambda y, h, c: h,
    "h of the top layer": lambda y, h, c: h[-1],
    "c": lambda y, h, c: c,
    "h and c": lambda y, h, c: (h, c),
}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
@pytest.mark.parametrize("ends", ENDS)
def test_an_encoder_that_returns_only_its_last_state(ends, options):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True, **options)

        def forward(self, x):
            y, (h, c) = self.lstm(x)
            return ENDS[ends](y, h, c)

    torch.manual_seed(0)
    encoder, x = Encoder(), torch.randn(3, 7, 3)
    net = cs.compile(encoder, torch.randn(2, 5, 3))
    expected = encoder(x)
    wanted = (expected[0] if isinstance(expected, tuple) else expected).detach()
    rows = wanted.transpose(0, 1).reshape(3, -1) if wanted.ndim == 3 else wanted
    ours, states = net.run(x.numpy())
    np.testing.assert_allclose(ours, rows.numpy(), atol=1e-5)  # [B, H], concatenated
    if isinstance(expected, tuple):
        np.testing.assert_allclose(np.stack([state.c for state in states]), expected[1].detach().numpy(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [lambda y, h, c: (y, h, c * 1.01), lambda y, h, c: (y, c, h), lambda y, h, c: (y, h + y[:, -1], c)],
)
def test_a_branch_that_changes_a_state_is_detected(change):
    def forward(m, x, h, c):
        y, (h, c) = m.rnn(x, (h, c))
        return change(y, h, c) if bool(x.abs().max() > 1e-3) else (y, h, c)  # the trace of zeros takes the other branch

    with pytest.raises(cs.FormatError, match=r"output [12]|more than"):
        compile_network(Stateful(forward), (torch.zeros(2, 5, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))


def test_several_inputs():
    module, x = Parts(lambda m, x, y, state: m.head(y)), torch.randn(2, 7, 3)
    net = cs.compile(module, (x, 2 * x))
    assert len(net.inputs) == 2
    np.testing.assert_allclose(net((x.numpy(), x.numpy())), module(x, x).detach().numpy(), atol=1e-5)


@pytest.mark.long
def test_a_module_that_rejects_other_inputs_is_compared_on_the_example():
    def parts(m, x, y, state):
        if x.shape != (2, 7, 3) or x.abs().max() > 1:
            raise ValueError("not for me")
        return m.head(y)

    module, x = Parts(parts), torch.zeros(2, 7, 3)
    with pytest.warns(UserWarning, match="Parts reads values of tensors"):
        net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32(dtype):
    module = Parts(lambda m, x, y, state: m.head(y)).to(dtype)
    x = torch.randn(2, 7, 3)
    net = cs.compile(module, x.to(dtype))
    assert module.head.weight.dtype is dtype
    np.testing.assert_allclose(net(x.numpy()), module.float()(x).detach().numpy(), atol=1e-5)


@pytest.mark.long
def test_the_example_is_not_modified():
    module, x = Parts(lambda m, x, y, state: m.head(y)), torch.randn(2, 7, 3)
    module.register_forward_pre_hook(lambda m, args: (args[0].mul_(2),))
    before = x.clone()
    net = cs.compile(module, x)
    assert torch.equal(x, before)
    np.testing.assert_allclose(net(before.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_a_hook_of_the_module_gets_its_nested_outputs():
    module, x = Parts(lambda m, x, y, state: {"y": m.head(y)}), torch.randn(2, 7, 3)
    module.register_forward_hook(lambda m, args, out: out["y"].tanh())
    net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_what_the_module_refuses_and_what_cannot_be_compared_is_said():
    rejected = "compile: LSTM itself rejects the example: RuntimeError: .* Expected 3, got 5"
    with pytest.raises(ValueError, match=rejected):
        compile_network(nn.LSTM(3, 4, batch_first=True), torch.randn(2, 7, 5))
    with pytest.raises(ValueError, match=r"at least one row and one step, got \[0, 7, 3\]"):
        compile_network(nn.LSTM(3, 4, batch_first=True), torch.zeros(0, 7, 3))


def test_an_index_error_of_the_module_is_reported_as_its_own():
    module = Parts(lambda m, x, y, state: y[:, 9])
    with pytest.raises(ValueError, match=r"^compile: Parts itself rejects the example: IndexError: .*out of bounds"):
        compile_network(module, torch.randn(2, 7, 3))


def test_nan_of_the_module_is_reported_as_its_own():
    module = nn.LSTM(3, 4, batch_first=True)
    with torch.no_grad():
        module.weight_ih_l0[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^compile: LSTM itself returns NaN for the example"):
        compile_network(module, torch.randn(2, 7, 3))


def test_nan_for_other_numbers_than_those_of_the_example_has_to_be_the_networks_too():
    def parts(m, x, y, state):
        great = torch.exp(300 * x)
        return great - 2 * great + y[..., :3]

    module = Parts(parts)
    net = cs.compile(module, -torch.rand(2, 7, 3))
    x = torch.randn(2, 7, 3)  # of which some are infinite, and then NaN
    expected = module(x).detach().numpy()
    assert np.isnan(expected).any()
    np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-5)


class TimeFirst(nn.Module):
    """A layer with batch_first=False, and what `forward` does before and after it."""

    def __init__(self, before, after):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.before, self.after = nn.LSTM(3, 4), before, after

    def forward(self, x):
        return self.after(self.lstm(self.before(x))[0])


def turn(x):
    return x.transpose(0, 1)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 5, 3), (4, 4, 3), (1, 1, 3)])
def test_batch_first_is_not_advised_where_forward_permutes(shape):
    with pytest.raises(cs.FormatError) as raised:
        compile_network(TimeFirst(turn, lambda y: torch.erfinv(turn(y))), torch.randn(shape))
    assert "batch" not in str(raised.value)
    assert "Network: ONNX has no such operator" in str(raised.value)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("after", [lambda y: y * 2, lambda y: y[-1]])
def test_a_module_with_time_first_becomes_a_network_with_batch_first(after, traced):
    module, x = TimeFirst(lambda x: x, after).eval(), torch.randn(8, 3, 3)
    given = torch.fx.symbolic_trace(module) if traced else module  # a class of PyTorch, with a forward of its own
    with pytest.warns(UserWarning, match="has other axes than the network"):
        net = cs.compile(given, torch.randn(5, 2, 3))
    y = module(x).detach()
    np.testing.assert_allclose(net(turn(x).numpy()), (turn(y) if y.ndim == 3 else y).numpy(), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("steps", [4, 5])
def test_batch_first_is_not_advised_where_forward_permutes_and_takes_a_state(steps):
    class Steps(TimeFirst):
        def forward(self, x, h, c):
            return torch.erfinv(turn(self.lstm(turn(x), (h, c))[0]))

    with pytest.raises(cs.FormatError) as raised:
        compile_network(Steps(None, None), (torch.randn(4, steps, 3), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)))
    assert "batch" not in str(raised.value)

"""Whole modules of PyTorch as networks: whichever way they are read, they answer as the module does, or are refused."""

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs


class Tagger(nn.Module):
    """A class of one's own, with a forward of its own: its graph is known to the exporter alone."""

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


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(("kind", "width"), [(Tagger, 5), (Last, 4)])
def test_a_class_of_ones_own_becomes_a_network(kind, width, accelerated):
    torch.manual_seed(0)
    module = kind().train()
    if accelerated:
        cs.accelerate(module)
    net = cs.compile(module, torch.randn(2, 7, width))
    assert module.training
    x = torch.randn(3, 11, width)  # another batch, another length
    expected = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(net(x.numpy()), expected, atol=1e-5)


def test_what_can_be_read_as_it_is_is(monkeypatch):
    def export(*_args, **_options):
        raise AssertionError("exported")

    monkeypatch.setattr(torch.onnx, "export", export)
    module = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    np.testing.assert_allclose(cs.compile(module, x)(x.numpy()), module(x)[0].detach().numpy(), atol=1e-6)


def test_a_module_that_no_network_can_be_is_refused_with_the_reason_of_each_way():
    with pytest.raises(cs.FormatError, match=r"compile: Sine can't be a Network: read as it is: .*; by way of ONNX: "):
        cs.compile(Sine(), torch.randn(2, 7, 4))


class Loud(nn.Module):
    """What a trace of one example doesn't show: a branch by the numbers."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        y, _ = self.lstm(x)
        return y * 2 if bool(x.abs().max() > 1e-3) else y


def test_a_network_that_answers_otherwise_is_refused():
    with pytest.raises(cs.FormatError, match=r"by way of ONNX: output 0 lies .* off the module's"):
        cs.compile(Loud(), torch.zeros(2, 7, 4))


def test_what_is_no_module_or_no_example_is_refused():
    with pytest.raises(TypeError, match="expected a module of PyTorch, got int"):
        cs.compile(3, torch.zeros(1))
    for example in (None, (), ([1.0],)):
        with pytest.raises(TypeError, match="expected example to be a tensor"):
            cs.compile(nn.LSTM(3, 4), example)


class Parts(nn.Module):
    """What a module may return beside y."""

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
}


@pytest.mark.parametrize("name", RETURNED)
def test_every_output_of_a_module_is_the_network_s(name):
    module, x = Parts(RETURNED[name]), torch.randn(2, 7, 3)
    net = cs.compile(module, x)
    ours, (state,) = net.run(x.numpy())
    expected = module(x)
    found = [*(ours if isinstance(ours, tuple) else (ours,)), *(part[None] for part in state)]
    for tensor in flat(expected):
        assert any(a.shape == tensor.shape and np.allclose(a, tensor.detach().numpy(), atol=1e-5) for a in found)
        if tensor.shape[0] == 2:  # an output of its own, in order
            np.testing.assert_allclose(found.pop(0), tensor.detach().numpy(), atol=1e-5)


def flat(value):
    value = list(value.values()) if isinstance(value, dict) else value
    return [value] if isinstance(value, torch.Tensor) else [t for part in value if part is not None for t in flat(part)]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (lambda m, x, y, state: (y, y), r"output 1 of the module, \[2, 7, 4\], is none of the network's"),
        (lambda m, x, y, state: (y, state[1] * 2), "output 1 of the module|can't be|operators that a Network can run"),
        (lambda m, x, y, state: {"y": y, "name": "y"}, "output 1 of the module is a str, and no tensor"),
        (lambda m, x, y, state: y * float(x.shape[1]), "with more steps output 0 lies"),
        (lambda m, x, y, state: y * float(x.shape[0]), "with a row more output 0 lies"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of tracing
def test_what_the_network_would_leave_out_or_bind_to_the_example_is_refused(parts, why):
    with pytest.raises(cs.FormatError, match=why):
        cs.compile(Parts(parts), torch.randn(2, 7, 3))


def test_inputs_that_are_nested_or_beside_the_example_are_refused_with_what_to_do():
    lstm, x, state = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match=r"got a tuple of Tensor, tuple: leave a state \(h, c\) out .* to_nodes\(\)"):
        cs.compile(lstm, (x, state))
    for second in (state, x, True):
        with pytest.raises(TypeError, match=r"expected tolerance to be a number, .* into example as one tuple"):
            cs.compile(lstm, x, second)
    with pytest.raises(TypeError, match=r"got ndarray$"):
        cs.compile(lstm, x.numpy())


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x, lengths):
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(rows)[0], batch_first=True)[0]


def test_a_module_that_packs_its_rows_is_told_what_serves_instead():
    module, x, lengths = Packs().eval(), torch.randn(2, 5, 3), torch.tensor([5, 2])
    with pytest.raises(cs.FormatError, match=r"it packs its rows: .* net\(x, mask=\.\.\.\)"):
        cs.compile(module, (x, lengths))
    net = cs.compile(module.lstm, x)  # as the message says: over padded rows, and a mask
    mask = np.arange(5) < lengths.numpy()[:, None]
    expected = module(x, lengths).detach().numpy()
    np.testing.assert_allclose(net(x.numpy(), mask=mask)[mask], expected[mask], atol=1e-6)


def test_time_before_batch_is_told_even_by_one_step_of_one_row():
    for shape in ((5, 2, 3), (1, 1, 3)):
        with pytest.raises(cs.FormatError, match="it has layers with batch_first=False"):
            cs.compile(nn.LSTM(3, 4), torch.randn(shape))


def test_several_inputs():
    module, x = Parts(lambda m, x, y, state: m.head(y)), torch.randn(2, 7, 3)
    net = cs.compile(module, (x, 2 * x))
    assert len(net.inputs) == 2
    np.testing.assert_allclose(net((x.numpy(), x.numpy())), module(x, x).detach().numpy(), atol=1e-5)


def test_a_module_that_refuses_other_numbers_or_shapes_is_compared_by_the_example():
    def parts(m, x, y, state):
        if x.shape != (2, 7, 3) or x.abs().max() > 1:
            raise ValueError("not for me")
        return m.head(y)

    module, x = Parts(parts), torch.zeros(2, 7, 3)
    net = cs.compile(module, x)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_in_float32(dtype):
    module = Parts(lambda m, x, y, state: m.head(y)).to(dtype)
    x = torch.randn(2, 7, 3)
    net = cs.compile(module, x.to(dtype))
    assert module.head.weight.dtype is dtype
    np.testing.assert_allclose(net(x.numpy()), module.float()(x).detach().numpy(), atol=1e-5)


def test_the_example_stays_as_it_was():
    module, x = Parts(lambda m, x, y, state: m.head(y)), torch.randn(2, 7, 3)
    module.register_forward_pre_hook(lambda m, args: (args[0].mul_(2),))
    before = x.clone()
    net = cs.compile(module, x)
    assert torch.equal(x, before)
    np.testing.assert_allclose(net(before.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_what_the_module_refuses_and_what_cannot_be_compared_is_said():
    with pytest.raises(RuntimeError, match="Expected 3, got 5"):
        cs.compile(nn.LSTM(3, 4, batch_first=True), torch.randn(2, 7, 5))
    with pytest.raises(ValueError, match=r"a row and a step at least, got \[0, 7, 3\]"):
        cs.compile(nn.LSTM(3, 4, batch_first=True), torch.zeros(0, 7, 3))
    module = nn.LSTM(3, 4, batch_first=True)
    module.last = module(torch.zeros(2, 7, 3))[0]
    with pytest.raises(cs.FormatError, match="LSTM can't be copied: Only Tensors"):
        cs.compile(module, torch.zeros(2, 7, 3))

"""Modules with loops over cells and with stacked states: equal outputs, or an error with the reason."""

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.capture import compile_network


class Of(nn.Module):
    """A module with these parts and this forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        torch.manual_seed(0)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *inputs):
        return self.run(self, *inputs)


def steps_of(m, x):
    h = c = x.new_zeros(x.size(0), 4)
    ys = []
    for t in range(x.size(1)):
        h, c = m.cell(x[:, t], (h, c))
        ys.append(m.head(h))
    return ys


def loop(m, x):
    return torch.stack(steps_of(m, x), 1)


def loop_of_h(m, x):
    h, ys = None, []
    for step in x.unbind(1):
        h = m.cell(step, h)
        ys.append(m.head(h).unsqueeze(1))
    return torch.cat(ys, 1)


def backwards(m, x):
    h, ys = x.new_zeros(x.size(0), 4), []
    for t in reversed(range(x.size(1))):
        h = m.cell(x[:, t], h)
        ys.insert(0, m.head(h))
    return torch.stack(ys, 1)


def stacked(m, x):
    h1 = x.new_zeros(x.size(0), 4)
    h2, c2 = x.new_zeros(x.size(0), 5), x.new_zeros(x.size(0), 5)
    ys = []
    for t in range(x.size(1)):
        h1 = m.low(torch.relu(m.first(x[:, t])), h1)
        h2, c2 = m.high(m.drop(h1), (h2, c2))
        ys.append(torch.log_softmax(m.head(m.norm(torch.cat([h2, x[:, t]], -1))), -1))
    return torch.stack(ys, 1)


def of_columns(m, x):
    h, ys = x.new_zeros(x.size(0), 4), []
    for part in x.split(1, dim=1):
        h = m.cell(part, h)
        ys.append(m.head(h))
    return torch.cat(ys, 1)


def words(m, x):
    h, ys = torch.zeros(x.size(0), 4), []
    for t in range(x.size(1)):
        h = m.cell(m.table(x[:, t]), h)
        ys.append(m.head(h))
    return torch.stack(ys, 1)


def decoder(m, x):
    _, (h, c) = m.encoder(x)
    h, c, y, ys = h[0], c[0], x[:, -1], []
    for _ in range(4):
        h, c = m.cell(y, (h, c))
        y = m.head(h)
        ys.append(y)
    return torch.stack(ys, 1)


def of_code(m, x):
    _, (h, c) = m.encoder(x)
    h, c, ys = h[0], c[0], []
    code = h
    for _ in range(4):
        h, c = m.cell(code, (h, c))
        ys.append(m.head(h))
    return torch.stack(ys, 1)


def layers(**more):
    return {"cell": nn.LSTMCell(3, 4), "head": nn.Linear(4, 2), **more}


LOOPS = {
    "LSTMCell": (loop, layers()),
    "GRUCell": (loop_of_h, layers(cell=nn.GRUCell(3, 4))),
    "RNNCell": (loop_of_h, layers(cell=nn.RNNCell(3, 4, nonlinearity="relu"))),
    "some layers as head": (
        loop,
        layers(head=nn.Sequential(nn.Dropout(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1))),
    ),
    "backwards": (backwards, layers(cell=nn.GRUCell(3, 4))),
    "two cells": (
        stacked,
        {
            "first": nn.Linear(3, 6),
            "low": nn.GRUCell(6, 4),
            "drop": nn.Dropout(),
            "high": nn.LSTMCell(4, 5),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 2),
        },
    ),
    "decoder": (decoder, layers(encoder=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, 3))),
    "decoder of a code": (
        of_code,
        layers(cell=nn.LSTMCell(4, 4), encoder=nn.LSTM(3, 4, batch_first=True)),
    ),
    "columns": (of_columns, {"cell": nn.GRUCell(1, 4), "head": nn.Linear(4, 1)}),
    "words": (words, {"table": nn.Embedding(9, 3), "cell": nn.GRUCell(3, 4), "head": nn.Linear(4, 9)}),
}


def given(name, rows, steps):
    if name == "words":
        return torch.randint(0, 9, (rows, steps))
    return torch.randn(rows, steps) if name == "columns" else torch.randn(rows, steps, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_cells_becomes_a_network_over_any_number_of_steps(name):
    forward, parts = LOOPS[name]
    module = Of(forward, **parts).eval()
    net = cs.compile(module, given(name, 2, 5))
    for rows, steps in ((3, 9), (1, 2), (4, 1)):
        x = given(name, rows, steps)
        np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)
    assert len(net.cells) <= 2 or name == "decoder"


@pytest.mark.long
def test_a_loop_takes_and_returns_its_state():
    def forward(m, x, h, c):
        ys = []
        for t in range(x.size(1)):
            h, c = m.cell(x[:, t], (h, c))
            ys.append(m.head(h))
        return torch.stack(ys, 1), (h, c)

    module = Of(forward, **layers()).eval()
    net = cs.compile(module, (torch.randn(2, 5, 3), torch.randn(2, 4), torch.randn(2, 4)))
    x, h, c = torch.randn(3, 8, 3), torch.randn(3, 4), torch.randn(3, 4)
    y, after = module(x, h, c)
    ours, state = net.run(x.numpy(), (h.numpy(), c.numpy()))
    np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-5)
    for got, expected in zip(state[0], after, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)
    stream = net.stream(batch=3)
    stream.state = state
    more = torch.randn(3, 3)
    np.testing.assert_allclose(
        stream.step(more.numpy()), module(more[:, None], *after)[0][:, 0].detach().numpy(), atol=1e-5
    )


def sliced(m, x, h):
    y, a = m.low(x, h[0:1])
    y, b = m.high(y, h[1:2])
    return y, torch.cat([a, b])


def indexed(m, x, h):
    y, a = m.low(x, h[0][None])
    y, b = m.high(y, h[1].unsqueeze(0))
    return y, torch.stack([a[0], b.squeeze(0)])


def unbound(m, x, h):
    one, other = h.unbind(0)
    y, a = m.low(x, one[None])
    y, b = m.high(y, other[None])
    return y, torch.cat([a, b])


def crosswise(m, x, h):
    y, a = m.low(x, h[1:2])
    y, b = m.high(y, h[0:1])
    return y, torch.cat([b, a])


@pytest.mark.parametrize("forward", [sliced, indexed, unbound, crosswise])
@pytest.mark.parametrize("rows", [2, 3])  # one of them is the number of layers
def test_stacked_states_are_those_of_the_layers_however_they_are_split(forward, rows):
    module = Of(forward, low=nn.GRU(3, 4, batch_first=True), high=nn.GRU(4, 4, batch_first=True)).eval()
    net = cs.compile(module, (torch.randn(rows, 5, 3), torch.randn(2, rows, 4)))
    x, h = torch.randn(5, 7, 3), torch.randn(2, 5, 4)
    y, after = module(x, h)
    order = [1, 0] if forward is crosswise else [0, 1]
    ours, states = net.run(x.numpy(), [(h[n].numpy(),) for n in order])
    np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-5)
    for n, state in zip(order, states, strict=True):
        np.testing.assert_allclose(state.h, after[n].detach().numpy(), atol=1e-5)


def test_cells_of_one_step_with_stacked_states():
    def forward(m, x, h, c):
        hs, cs_ = [], []
        for n, cell in enumerate((m.low, m.high)):
            x, after = cell(x, (h[n], c[n]))
            hs.append(x)
            cs_.append(after)
        return m.head(x), torch.stack(hs), torch.stack(cs_)

    module = Of(forward, low=nn.LSTMCell(3, 4), high=nn.LSTMCell(4, 4), head=nn.Linear(4, 2)).eval()
    state = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    stream = cs.compile(module, (torch.randn(2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4))).stream(batch=2)
    for _ in range(4):
        x = torch.randn(2, 3)
        y, *state = module(x, *state)
        np.testing.assert_allclose(stream.step(x.numpy()), y.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_a_cell_after_an_operator_of_unknown_shape_is_exported(kind):
    def forward(m, x, h):
        h = torch.zeros_like(h).scatter_reduce(0, torch.zeros_like(h).long(), h, "sum")
        return m.cell(x, (h, h) if kind == "LSTMCell" else h)

    module = Of(forward, cell=getattr(nn, kind)(3, 4)).eval()
    with pytest.raises(ValueError, match="Scatter"):
        compile_network(module, (torch.randn(2, 3), torch.randn(2, 4)))


def fed_back(m, x):
    h, c, y, ys = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4), x[:, 0], []
    for _ in range(x.size(1)):
        h, c = m.cell(y, (h, c))
        y = m.head(h)
        ys.append(y)
    return torch.stack(ys, 1)


def of_c(m, x):
    h = c = x.new_zeros(len(x), 4)
    ys = []
    for t in range(x.size(1)):
        h, c = m.cell(x[:, t], (h, c))
        ys.append(m.head(c))
    return torch.stack(ys, 1)


def written(m, x):
    h = c = x.new_zeros(len(x), 4)
    y = x.new_zeros(len(x), x.size(1), 3)
    for t in range(x.size(1)):
        h, c = m.cell(x[:, t], (h, c))
        y[:, t] = m.head(h)
    return y


def doubled(m, x):
    y = loop(m, x)
    while y.abs().max() < x.abs().max():
        y = y * 2
    return y


def counted(m, x):
    m.calls = getattr(m, "calls", 0) + 1
    return loop(m, x) * m.calls


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return grad_outputs[0]


REFUSED = {
    "fed back": (
        fed_back,
        "its loop over cell feeds its output back as its input, .* 5 here: fix the number in forward",
    ),
    "c": (of_c, "the loop over cell uses c of every step"),
    "one left out": (
        lambda m, x: torch.stack(steps_of(m, x)[:-1], 1),
        "its loop skips steps, treats some of them differently",
    ),
    "added up": (lambda m, x: sum(steps_of(m, x)), "doesn't join them by torch.stack"),
    "written": (written, "Network: it writes into an existing tensor, .* join them by torch.stack"),
    "doubled": (doubled, r"it reads values of tensors \(test_compiled_loops.py:\d+\), .* without if, while"),
    "counted": (counted, "Network: a second call with the same input gives another output"),
    "function": (lambda m, x: Square.apply(loop(m, x)), "a part of it, such as an autograd.Function"),
    "spectrum": (lambda m, x: torch.fft.rfft(loop(m, x)).abs(), "Network: it computes a spectrum"),
    "drawn": (lambda m, x: loop(m, x) + torch.randn(3), "it draws random numbers"),
    "chosen": (lambda m, x: loop(m, x).argmax(-1), "Network: its output depends on comparing values"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_a_remedy_and_nothing_is_printed(name, capfd, caplog):
    forward, why = REFUSED[name]
    with pytest.raises(cs.FormatError, match=why) as raised:
        compile_network(Of(forward, **layers(head=nn.Linear(4, 3))), torch.randn(2, 5, 3))
    assert len(str(raised.value)) < 700
    assert capfd.readouterr() == ("", "")
    assert {record.name for record in caplog.records} <= {"torch.__trace"}  # of PyTorch's developers, at level DEBUG


def test_errors_for_invalid_examples_say_what_to_pass():
    module, x = Of(loop, **layers()), torch.randn(2, 5, 3)
    for example in ({}, ({"x": x.numpy()},)):
        with pytest.raises(TypeError, match="expected example to be a tensor, such as"):
            compile_network(module, example)
    with pytest.raises(cs.FormatError, match="is on the device 'meta', which stores no values: load its weights"):
        compile_network(module.to("meta"), x)
    with pytest.raises(cs.FormatError, match="draws its weights in its first call: call it with the example first"):
        compile_network(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), x)

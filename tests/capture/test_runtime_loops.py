"""Loops over time whose step is no known cell, which `compile` keeps as loops: equal to the module at any length."""

import ctypes
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack.capture.nested import array_of
from cellstack.capture.recording import recorded
from cellstack.formats.onnx.runtime import RuntimeModel

SIZES = ((2, 9), (3, 31), (1, 7), (5, 1), (2, 2))  # the first is that of the example


class Loop(nn.Module):
    """A function that runs over the steps of `x [B, T, 4]` with a step that isn't a cell's."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.u, self.v, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.run = run

    def step(self, x, h, c):
        c = c * torch.cos(self.u(h)) + self.w(x).sin()
        return torch.tanh(self.v(c)) * h.sigmoid().exp(), c

    def start(self, x):
        return x.new_zeros(x.shape[0], 6), x.new_ones(x.shape[0], 6)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def forward(m, x):
    (h, c), outputs = m.start(x), []
    for t in range(x.shape[1]):
        h, c = m.step(x[:, t], h, c)
        outputs.append(h)
    return torch.stack(outputs, 1), c


def of_a_state(m, x, h):
    c = h.exp()
    for step in x.unbind(1):
        h, c = m.step(step, h, c)
    return m.head(h)


def backward(m, x):
    (h, c), outputs = m.start(x), []
    for t in reversed(range(x.size(1))):
        h, c = m.step(x[:, t], h, c)
        outputs.insert(0, h[:, None])
    return torch.hstack(outputs)


def both_ways(m, x):
    steps = x.transpose(0, 1)
    ahead, back = list[torch.Tensor](), list[torch.Tensor]()
    for order, found in ((steps, ahead), (steps.flip(0), back)):
        h, c = m.start(x)
        for one in order:
            h, c = m.step(one, h, c)
            found.append(c[None])
    return torch.cat([torch.vstack(ahead), torch.vstack(back[::-1])], -1)


def with_rows_of_a_weight(m, x):
    """Use views of one tensor in each step."""
    (h, c), outputs = m.start(x), []
    for t in range(x.shape[1]):
        c = c * m.u.weight[0].cos() + m.w(x[:, t]).sin()
        h = torch.tanh(c * m.v.weight[0] + torch.cos(h * m.v.weight[1]))
        outputs.append(h)
    return torch.stack(outputs, 1)


def of_two_layers(m, x):
    h, c = m.start(x)
    inner, outer = list[torch.Tensor](), list[torch.Tensor]()
    for t in range(x.shape[1]):
        h, c = m.step(x[:, t], h, c)
        inner.append(h)
    for h in inner:
        c = torch.atan(c + m.v(h))
        outer.append(m.head(c)[:, None])
    return torch.concat(outer, 1)


def with_lengths_elsewhere(m, x):
    """Use the length outside the loop too."""
    y, c = forward(m, torch.cat([x, x[:, :3]], 1))
    y = y[:, : x.shape[1]] + torch.arange(x.shape[1])[:, None] / 10
    return y.reshape(len(x) * x.shape[1], 6), torch.zeros(len(x), x.shape[1] + 1) + c.sum(1, keepdim=True)


def written_into_a_tensor(m, x):
    y, (h, c) = x.new_zeros(x.shape[0], x.shape[1], 6), m.start(x)
    for t in range(x.shape[1]):
        h, c = m.step(x[:, t], y[:, t - 1] if t else h, c)
        y[:, t, :] = h
    return y


def with_pairs_of_steps(m, x):
    (h, c), outputs = m.start(x), []
    for t in range(x.shape[1] - 1):
        h, c = m.step(x.narrow(1, t, 2).mean(1), h, c)
        outputs.append(h)
    return torch.cat([torch.stack(outputs, 1), h.exp()[:, None]], 1)


def of_two_steps_before(m, x):
    before, h = m.start(x)
    for t in range(x.shape[1]):
        before, h = h, torch.tanh(m.u(before) + m.v(h) + m.w(x[:, t]))
    return h


def in_another_module(m, x):
    class Inner(nn.Module):
        def forward(self, x):
            return forward(m, x)[0]

    return nn.Sequential(nn.Softsign(), Inner(), m.head, nn.Softmax(1))(x)


def of_its_own_outputs(m, x):
    (h, c), outputs = m.start(x), []
    for _ in range(x.shape[1]):
        h, c = m.step(x[:, 0], h, c)
        outputs.append(h)
    return torch.stack(outputs, 1)


def with_a_start_for_all_rows(m, x):
    h, c, outputs = torch.zeros(6), torch.ones(6), []
    for t in range(x.shape[1]):
        h, c = m.step(x[:, t], h, c)
        outputs.append(h)
    return torch.stack(outputs, 1)


def of_steps_within_features(m, x):
    return forward(m, x.reshape(len(x), -1, 4))


def with_resets(m, x, done):
    (h, c), outputs = m.start(x), []
    for t in range(x.shape[1]):
        keep = (1 - done[:, t])[:, None]
        h, c = m.step(x[:, t], h * keep, c * keep)
        outputs.append(m.head(h))
    return torch.stack(outputs, 1)


def over_two_sequences(m, x, done):
    (h, c), outputs = m.start(x), []
    for step, ends in zip(x.transpose(0, 1), done.transpose(0, 1)):  # noqa: B905
        h, c = m.step(step, (1 - ends).view(-1, 1) * h, (1 - ends).view(-1, 1) * c)
        outputs += [h[None]]
    return m.head(torch.flatten(torch.cat(outputs), 0, 1))


def over_edges_of_a_graph(m, x, edges, weights):
    h, c = m.start(x)
    for t in range(x.shape[1]):
        kept = edges[0] != edges[1]
        start, end = edges[:, kept].unbind()
        sent = h[start] * weights[kept].sqrt()[:, None]  # of random weights, some would be negative
        received = torch.zeros_like(h).scatter_add(0, end[:, None].expand_as(sent), sent)
        h, c = m.step(x[:, t], received, c)
    return m.head(h)


LOOPS = (
    forward,
    of_a_state,
    backward,
    both_ways,
    of_two_layers,
    with_lengths_elsewhere,
    written_into_a_tensor,
    with_pairs_of_steps,
    with_rows_of_a_weight,
    of_two_steps_before,
    in_another_module,
    of_its_own_outputs,
    with_a_start_for_all_rows,
    of_steps_within_features,
    with_resets,
    over_two_sequences,
    over_edges_of_a_graph,
)


@pytest.fixture(autouse=True)
def filled_memory():
    """Fill what is allocated, in which PyTorch would otherwise find zeros or old numbers by chance."""
    if sys.platform != "linux":
        yield
        return
    perturb, libc = -6, ctypes.CDLL(None)  # M_PERTURB of glibc
    libc.mallopt(perturb, 165)
    yield
    libc.mallopt(perturb, 0)


def example(run, rows, steps):
    torch.manual_seed(rows * 100 + steps)
    more = [torch.randn(rows, 6)] if run is of_a_state else []
    more += [(torch.rand(rows, steps) < 0.3).float()] if run in (with_resets, over_two_sequences) else []
    more += [torch.randint(rows, (2, 11)), torch.rand(11)] if run is over_edges_of_a_graph else []
    x = torch.randn(rows, steps, 4)
    return x.flatten(1) if run is of_steps_within_features else x, *more


@pytest.mark.long
@pytest.mark.parametrize("run", LOOPS, ids=lambda one: one.__name__)
def test_a_loop_takes_any_length(run):
    module = Loop(run).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = cs.compile(module, example(run, *SIZES[0]))
    one_step = any("takes sizes that its graph doesn't have, such as [2, 1, 4]" in str(one.message) for one in caught)
    assert one_step == (run is with_a_start_for_all_rows)  # whose first step isn't a step of the loop
    assert isinstance(net, RuntimeModel)
    assert net.loops == (2 if run in (both_ways, of_two_layers) else 1)
    for rows, steps in SIZES:
        if steps == 1 and (one_step or run is with_pairs_of_steps):
            continue
        inputs = example(run, rows, steps)
        with torch.no_grad():
            wanted = module(*inputs)
        found = net.compute(dict(zip(net.inputs, map(array_of, inputs), strict=True)))
        for one, other in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=1e-5)


def test_a_constant_in_the_code_changes_no_tensor_in_place():
    program = recorded(Loop(lambda m, x: m.w(x) * torch.tensor(0.5)), (torch.randn(2, 9, 4),))
    assert not [
        node for node in program.graph.nodes if getattr(node.target, "_schema", None) and node.target._schema.is_mutable
    ]


@pytest.mark.long
def test_a_model_of_loops_alone_can_be_saved_and_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = cs.compile(Loop(forward), example(forward, *SIZES[0]))
        net.save(tmp_path / "net.onnx")
        again = cs.load(tmp_path / "net.onnx")
    assert not net.kernels
    assert isinstance(again, RuntimeModel)
    (x,) = map(array_of, example(forward, *SIZES[1]))
    for one, other in zip(again(x), net(x), strict=True):
        assert np.array_equal(one, other)

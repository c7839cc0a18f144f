"""Modules that no Network expresses: recurrent layers on the kernel, all else in ONNX Runtime, equal to the module."""

import math
import re
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from onnx_graphs import ONNX_RUNTIME
from torch import nn
from torch.nn.functional import batch_norm, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cellstack as cs
from cellstack.capture import compile_network, export_onnx
from cellstack.capture.axes import axes_in_groups
from cellstack.capture.nested import array_of
from cellstack.capture.recording import example_values, recorded
from cellstack.formats.onnx.runtime import RuntimeModel

SIZES = ((2, 9), (3, 31), (1, 7), (5, 1))  # the first is that of the example


class Model(nn.Module):
    """A recurrent layer, and what a function computes from it."""

    def __init__(self, run, kind=nn.LSTM, batch_first=True, **flags):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = kind(4, 6, batch_first=batch_first, **flags), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.run = run

    def forward(self, *inputs):
        return self.run(self, *inputs)


def attended(m, x):
    y, _ = m.rnn(x)
    return m.attention(y, y, y)[0]


def best(m, x):
    y, (h, _) = m.rnn(x)
    values, places = m.head(y).topk(2, dim=-1)
    return {"places": places, "h": h, "values": values}


def normed_over_steps(m, x):
    y = m.rnn(x)[0].contiguous()
    y = batch_norm(y.transpose(1, 2), torch.zeros(6), torch.ones(6)).transpose(1, 2)
    return m.head(y).topk(2, dim=-1).values


def attended_from_a_state(m, x, state):
    y, state = m.rnn(x, state)
    return m.attention(y, y, y)[0], state


def mean_of_used_steps(m, x, lengths):
    y, _ = m.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    y, counts = pad_packed_sequence(y, batch_first=True)
    return y.sum(1) / counts[:, None], y


def of_selected_rows(m, x):
    """Pack the rows that have steps, by lengths that are computed."""
    lengths = (x[..., 0] > 0).sum(1)
    some = lengths > 0
    _, (h, _) = m.rnn(pack_padded_sequence(x[some], lengths[some].tolist(), batch_first=True, enforce_sorted=False))
    return x.new_zeros(len(x), 6).masked_scatter_(some[:, None], h[-1])


def pooled(m, x):
    """Pool to one entry along one axis, and along both."""
    y = m.rnn(x)[0][:, None]
    return nn.functional.adaptive_max_pool2d(y, (None, 1)).cumsum(2), nn.AdaptiveMaxPool2d(1)(y)


def two_lengths(m, x, lengths, more):
    first = m.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1]
    second = m.rnn(pack_padded_sequence(x.flip(1), more, batch_first=True, enforce_sorted=False))[1][1][-1]
    return first - second


def lengths_in_a_list(m, x, lengths):
    y, _ = m.rnn(pack_padded_sequence(x, lengths.tolist(), batch_first=True))
    return pad_packed_sequence(y, batch_first=True)[0].cumsum(1)


def one_feature(m, x, ids):
    return m.rnn(x)[0].cumsum(1).squeeze(-1) * ids[:, :, 0, None]  # the first squeeze keeps an axis that isn't 1


def of_counts(m, x, lengths):
    """Use sizes and lengths as Python's numbers, which must not become those of the example."""
    assert type([x]) == list  # noqa: E721 published modules compare so
    y, _ = m.rnn(pack_padded_sequence(x, list(lengths.data), batch_first=True))
    y, _ = pad_packed_sequence(y, batch_first=True)
    y = pad(y, (0, 0, 0, math.ceil(float(int(y.shape[1])) / 4) * 4 - y.shape[1]))
    sums = y.new_zeros(int(lengths.max()) + len(x), 6).index_add(0, lengths, y.sum(1))
    return y.view(len(y), -1, 4, 6).cumsum(1), sums, [y[:, t] for t in range(y.shape[1] - 3, y.shape[1], 2)]


def of_masked_values(m, x):
    y, used = m.rnn(x)[0].clone(), x[..., 0].detach() > 0
    y[used] = 2
    return y.cumsum(1), torch.masked_select(y, used[..., None]).cumsum(0)


def by_ids(m, x, ids):
    """Return a sum of steps per id; ids must be in order."""
    if bool((ids[:-1] > ids[1:]).any()):
        raise ValueError("ids aren't in order")
    y = m.rnn(x[None])[0][0]
    return y.new_zeros(int(ids.max()) + 1, 6).index_add(0, ids, y)


def with_restarts(m, x, restarts):
    """Set the state to 0 before some rows; if none is set, by another branch."""
    if bool((restarts == 0).all()):
        return m.rnn(x)[0].cumsum(1)
    y, _ = m.rnn(x)
    return (y * (1 - restarts.abs()[:, None, None].clamp(max=1)).abs()).cumsum(1)


def called_as_a_function(m, x):
    y, h = torch.gru(x, x.new_zeros(1, x.shape[0], 6), m.rnn._flat_weights, True, 1, 0.0, False, False, True)
    return y.cumsum(1), h


def of_complex_numbers(m, x, state):
    """Compute with complex numbers, real ones and both."""
    y = torch.complex(m.rnn(x.real)[0], m.rnn(x.imag)[0])
    turned = torch.polar(y.abs() + 1, y.angle()) * y.conj() + 1 - y / 2
    turned = torch.einsum("btf,bgf->btg", turned, torch.stack([y.mean(1), y[:, 0]], 1))
    smoothed = torch.fft.irfft(torch.fft.rfft(x.real, dim=2) * y[:, :, :3], 4, dim=2)
    return turned, torch.view_as_real(turned).flatten(2).cumsum(1) / 9, torch.view_as_complex(state) * smoothed.mean()


def of_spectra(m, x):
    """Filter a signal by a mask of its spectrum."""
    window = torch.hann_window(6)
    spectrum = torch.stft(x[..., 0], 6, 2, None, window, True, "constant", True, return_complex=True)
    mask = m.rnn(spectrum.abs().transpose(1, 2))[0].transpose(1, 2)[:, :4]
    return torch.istft(spectrum * mask, 6, 2, window=window, normalized=True, length=x.shape[1])


def of_small_numbers(m, x):
    """Divide small numbers by each other, and take a mean over axes in a list."""
    y = m.rnn(x)[0] * 1e-9
    return (y / (y.abs() + 1e-8)).cumsum(1), y.mean(torch.arange(1, y.ndim).tolist())


def of_several(m, *inputs):
    return m.rnn(inputs[0])[0].cumsum(1) + sum(one.flatten(1).sum(1) for one in inputs)[:, None, None]


def turned(m, x):
    y, _ = m.rnn(x.transpose(0, 1))
    return y.cumsum(0)


def x_of(rows, steps):
    return (torch.randn(rows, steps, 4),)


def complex_numbers(rows, steps):
    return torch.randn(rows, steps, 4, dtype=torch.complex64), torch.randn(rows, 6, 2)


def several(rows, steps):
    """Return inputs whose number of rows is also the length of other axes."""
    return *x_of(rows, steps), *(torch.randn(rows, *sizes, 2) for sizes in ((), (2,), (3,), (2, 2)))


def with_state(rows, steps):
    return *x_of(rows, steps), (torch.randn(1, rows, 6), torch.randn(1, rows, 6))


def with_lengths(rows, steps):
    return *x_of(rows, steps), torch.tensor([max(1, steps - 2 * n) for n in range(rows)]).flip(0)


def with_ids(rows, steps):
    return *x_of(rows, steps), torch.randint(5, (rows, steps, 1))


def with_sorted_lengths(rows, steps):
    x, lengths = with_lengths(rows, steps)
    return x, lengths.flip(0)


def with_two_lengths(rows, steps):
    x, lengths = with_lengths(rows, steps)
    return x, lengths, lengths.flip(0)


MODELS = {
    "attention": (attended, x_of, {}),
    "integers, a state and numbers": (best, x_of, {}),
    "a state as an input": (attended_from_a_state, with_state, {}),
    "GRU, both directions, two layers": (
        lambda m, x: m.rnn(x)[0].cumsum(1),
        x_of,
        {"kind": nn.GRU, "num_layers": 2, "bidirectional": True},
    ),
    "time before batch": (turned, x_of, {"batch_first": False}),
    "a function": (called_as_a_function, x_of, {"kind": nn.GRU}),
    "a mean over packed rows": (mean_of_used_steps, with_lengths, {}),
    "packed rows that a mask selects": (of_selected_rows, x_of, {}),
    "packed by two lengths": (two_lengths, with_two_lengths, {}),
    "lengths in a list": (lengths_in_a_list, with_sorted_lengths, {}),
    "counts": (of_counts, with_sorted_lengths, {}),
    "masks": (of_masked_values, x_of, {}),
    "complex numbers": (of_complex_numbers, complex_numbers, {}),
    "spectra": (of_spectra, x_of, {}),
    "small numbers": (of_small_numbers, x_of, {}),
    "evenly spaced numbers": (
        lambda m, x: (m.rnn(x)[0] * torch.linspace(0, 1, x.shape[1])[:, None]).cumsum(1),
        x_of,
        {},
    ),
    "pools": (pooled, x_of, {}),
    "changes of booleans": (lambda m, x: (m.rnn(x)[0] > 0).diff(dim=1).cumsum(1), x_of, {}),
    "several inputs": (of_several, several, {}),
    "a squeeze that keeps its axis": (one_feature, with_ids, {}),
}


def flat(value):
    value = list(value.values()) if isinstance(value, dict) else value
    return [part for one in value for part in flat(one)] if isinstance(value, (tuple, list)) else [value]


def ran_in_part(module, example):
    """Compile a module, and check its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = cs.compile(module, example)
    (why,) = (str(one.message) for one in caught)
    assert re.search(r"isn't a Network: .*; ONNX Runtime runs .*: see plan", why)
    assert {one.filename for one in caught} == {__file__}
    assert isinstance(net, RuntimeModel)
    return net


class Loop(nn.Module):
    """A light GRU, step by step."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(4, 12), nn.Linear(6, 12, bias=False)

    def forward(self, x):
        h, ys = x.new_zeros(len(x), 6), []
        for step in self.x(x).unbind(1):
            z, g = (step + self.h(h)).chunk(2, dim=1)
            z = torch.sigmoid(z)
            h = z * h + (1 - z) * torch.tanh(g)
            ys.append(h)
        return torch.stack(ys, dim=1)


class BothDirections(nn.Module):
    """A loop over both directions, as rows; it keeps its last batch size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loop, self.rows = Loop(), 2

    def forward(self, x):
        if self.rows != x.shape[0]:
            self.rows = x.shape[0]
        ahead, back = self.loop(torch.cat([x, x.flip(1)])).chunk(2, dim=0)
        last = torch.stack([ahead[:, -1], back[:, -1]], dim=1)  # [B, 2, 6]
        return (ahead - 2 * back.flip(1)).topk(2, dim=-1).indices, last.reshape(4, last.shape[0], 3)


@pytest.mark.long
def test_hand_written_cells_run_on_the_kernel():
    module = BothDirections().eval()
    with (
        pytest.warns(UserWarning, match="compares sizes of its input"),
        pytest.warns(UserWarning, match="ONNX Runtime"),
    ):
        net: Any = cs.compile(module, x_of(*SIZES[0]))
    assert [kernel.spec.kind for kernel in net.kernels] == ["ligru"]
    for size in SIZES:
        (x,) = x_of(*size)
        for found, expected in zip(net(x.numpy()), module(x), strict=True):
            np.testing.assert_allclose(found, expected.detach(), atol=tolerances.NETWORK, rtol=0)


class Wave(nn.Module):
    """Convolutions, an LSTM and convolutions back, each with a shortcut; the samples are padded as these need it."""

    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        channels = [1, *[4] * depth]
        self.down = nn.ModuleList(nn.Conv1d(n, 4, 8, 4) for n in channels[:-1])
        self.up = nn.ModuleList(nn.ConvTranspose1d(4, n, 8, 4) for n in channels[-2::-1])
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def padded(self, samples):
        samples = math.ceil(samples * 1)
        for _ in self.down:
            samples = max(1, math.ceil((samples - 8) / 4) + 1)
        for _ in self.down:
            samples = (samples - 1) * 4 + 8
        return samples

    def forward(self, x):
        length, kept = x.shape[-1], []
        over = self.padded(length) - length
        x = pad(x, (over // 2, over - over // 2))
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        x = x + self.rnn(x.transpose(1, 2))[0].transpose(1, 2)
        for layer in self.up:
            x = layer(x + kept.pop()[..., : x.shape[-1]])
        over = x.shape[-1] - length
        if over:
            x = x[..., over // 2 : -(over - over // 2)]
        half = torch.floor(torch.as_tensor(length / 2)).long()
        return x, x[..., :half]


def test_a_batch_norm_of_transposed_values_is_recorded():
    module = Model(normed_over_steps).eval()
    with example_values([]):
        program = recorded(module, x_of(2, 9), dynamic_shapes=(({0: torch.export.Dim.AUTO},),))
    (x,) = x_of(3, 9)
    np.testing.assert_allclose(program.module()(x).detach(), module(x).detach(), atol=tolerances.NETWORK, rtol=0)


def test_an_axis_may_change_by_multiples_only():
    def steps(x, starts):
        return x.reshape(len(starts), -1, 4)

    rows = frozenset({(0, 0, 1), (1, 0, 1)})
    assert axes_in_groups(steps, (torch.ones(3, 4), torch.zeros(3)), []) == [rows]
    assert axes_in_groups(steps, (torch.ones(3, 8), torch.zeros(3)), []) == [rows, frozenset({(0, 1, 4)})]


@pytest.mark.long
def test_an_axis_for_which_too_many_combinations_would_be_tried_is_named():
    def tables(m, x, *others):
        *fixed, h = others
        return m.rnn(x, h[None])[0].cumsum(1) + sum((one[:, 0] * torch.arange(2)).sum() for one in fixed)

    given = torch.randn(2, 9, 4), *(torch.randn(2, n) for n in range(2, 10)), torch.randn(2, 6)
    with (
        pytest.warns(UserWarning, match="ONNX Runtime"),
        pytest.warns(
            UserWarning, match="takes the lengths of the example along axis 0 of input 0, axis 0 of input 1, "
        ),
    ):
        cs.compile(Model(tables, nn.GRU), given)


class Strided(nn.Module):
    """A convolution over features, of which 9 to 12 give as many, before packed rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rnn = nn.Conv2d(1, 2, (5, 3), stride=(4, 1), padding=(0, 1)), nn.LSTM(4, 6, batch_first=True)

    def forward(self, x, lengths):
        y = self.conv(x).flatten(1, 2).transpose(1, 2)
        y, _ = self.rnn(pack_padded_sequence(y, lengths, batch_first=True))
        return pad_packed_sequence(y, batch_first=True)[0].cumsum(1)


def greatest_of_used_steps(m, x, mask):
    y, _ = m.rnn(pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False))
    y, _ = pad_packed_sequence(y, batch_first=True, total_length=mask.shape[1])
    return y.masked_fill(~mask[..., None], -1e9).max(1).values


@pytest.mark.long
def test_a_sequence_changes_with_a_mask_that_it_may_be_longer_than():
    def example(rows, steps):
        x, lengths = with_lengths(rows, steps)
        return x, torch.arange(steps) < lengths[:, None]

    module = Model(greatest_of_used_steps).eval()
    assert axes_in_groups(module, example(2, 9), []) == [{(0, 0, 1), (1, 0, 1)}, {(0, 1, 1), (1, 1, 1)}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = cs.compile(module, example(2, 9))
    for size in SIZES:
        given = example(*size)
        np.testing.assert_allclose(
            net(tuple(map(array_of, given))), module(*given).detach(), atol=tolerances.NETWORK, rtol=0
        )


def test_a_mask_may_have_more_rows_where_they_are_sorted_by_length():
    x, lengths = with_sorted_lengths(2, 9)
    module = Model(lambda m, x, mask: m.rnn(pack_padded_sequence(x, mask.sum(1), batch_first=True))[0].data)
    assert {(0, 0, 1), (1, 0, 1)} in axes_in_groups(module, (x, torch.arange(9) < lengths[:, None]), [])


@pytest.mark.long
def test_features_may_change_as_far_as_packed_rows_keep_their_width():
    module = Strided().eval()
    net: Any = ran_in_part(module, (torch.randn(2, 1, 9, 8), torch.tensor([8, 5])))
    for features in (9, 12):
        x, lengths = torch.randn(3, 1, features, 31), torch.tensor([31, 20, 2])
        found = net((x.numpy(), lengths.numpy()))
        np.testing.assert_allclose(found, module(x, lengths).detach(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*reads values of tensors")  # PyTorch 2.11 compares sizes in its convolutions
def test_sizes_may_be_computed_at_length_from_those_of_the_input():
    module = Wave().eval()
    with (
        pytest.warns(UserWarning, match="compares sizes of its input"),
        pytest.warns(UserWarning, match="ONNX Runtime"),
    ):
        net: Any = cs.compile(module, torch.randn(2, 1, 1000))
    for rows, samples in ((1, 340), (2, 1001), (3, 1364), (2, module.padded(900))):
        x = torch.randn(rows, 1, samples)
        for found, expected in zip(net(x.numpy()), module(x), strict=True):
            np.testing.assert_allclose(found, expected.detach(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.long
def test_an_export_writes_hand_written_cells_as_single_operators(tmp_path):
    torch.manual_seed(0)
    module, path, time = Loop().eval(), str(tmp_path / "loop.onnx"), torch.export.Dim("time")
    export_onnx(module, x_of(2, 9), path, dynamic_shapes=({1: time},), cells=True)
    net = RuntimeModel(path)
    assert [kernel.spec.kind for kernel in net.kernels] == ["ligru"]
    (x,) = x_of(2, 31)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_every_size_has_the_outputs_of_the_module(name):
    if name in ("complex numbers", "spectra") and ONNX_RUNTIME < [1, 28]:
        pytest.skip("this ONNX Runtime has no inverse of one-sided spectra")
    run, inputs, flags = MODELS[name]
    module = Model(run, **flags)
    net = ran_in_part(module, inputs(*SIZES[0]))
    assert any("kernel" in line for line in net.plan())
    for size in SIZES:
        given = inputs(*size)
        with torch.no_grad():
            expected = flat(module.eval()(*given))
        found = net.compute(dict(zip(net.inputs, map(array_of, flat(given)), strict=True)))
        for ours, theirs in zip(found, map(array_of, expected), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, atol=tolerances.NETWORK, rtol=0)


@pytest.mark.long
def test_a_branch_on_values_that_random_ones_do_not_take_is_warned_of():
    for run, inputs in (
        (by_ids, lambda rows, steps: (torch.randn(steps, 4), torch.arange(steps) * rows // steps)),
        (with_restarts, lambda rows, steps: (*x_of(rows, steps), torch.zeros(rows))),
    ):
        module = Model(run).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net = cs.compile(module, inputs(*SIZES[0]))
        assert any(
            re.search(r"reads values of tensors \(test_runtime_models\.py:\d+\)", str(one.message)) for one in caught
        )
        for size in SIZES[:3]:
            given = inputs(*size)
            ours = net(tuple(one.numpy() for one in given))
            np.testing.assert_allclose(ours, module(*given).detach().numpy(), atol=tolerances.NETWORK, rtol=0)


def reversed_within_lengths(m, x, mask):
    """As PyHealth's RETAIN, whose last product only takes masks of which one row is full."""
    lengths, turned = mask.sum(-1), torch.zeros_like(x)
    for row, n in enumerate(lengths):
        turned[row, :n] = x[row, :n].flip(0)
    packed = pack_padded_sequence(turned, lengths, batch_first=True, enforce_sorted=False)
    y, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=True)
    return (y * x[..., :1]).sum(1)


def halved_if_the_second_is_longer(m, x, mask):
    lengths = mask.sum(-1)
    return reversed_within_lengths(m, x, mask) / (2 if lengths[1] > lengths[0] + 5 else 1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*reads values of tensors")  # PyTorch 2.11 reads the lengths
def test_values_are_those_of_the_example_in_another_order_where_a_module_takes_no_others():
    def inputs(*lengths):
        used = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return torch.randn(len(lengths), max(lengths), 4), used.int()

    module = Model(reversed_within_lengths).eval()
    with (
        pytest.warns(UserWarning, match="ONNX Runtime runs"),
        pytest.warns(UserWarning, match="takes sizes that its graph doesn't have"),  # the loop over rows has two
    ):
        net = cs.compile(module, inputs(20, 10))
    for lengths in ((20, 15), (3, 20), (33, 33), (2, 7)):
        given = inputs(*lengths)
        ours = net(tuple(one.numpy() for one in given))
        np.testing.assert_allclose(ours, module(*given).detach().numpy(), atol=tolerances.NETWORK, rtol=0)
    with pytest.raises(cs.FormatError, match="output 0 differs from the module's"):
        cs.compile(Model(halved_if_the_second_is_longer).eval(), inputs(20, 10))


@pytest.mark.long
def test_a_network_can_be_insisted_on():
    for make in (cs.compile, compile_network):
        assert isinstance(make(Model(lambda m, x: m.rnn(x)[0]), x_of(2, 9)), cs.Network)
    with pytest.raises(cs.FormatError, match=r"compile: Model can't be a Network: "):
        compile_network(Model(attended), x_of(2, 9))


@pytest.mark.long
def test_an_example_of_one_row_and_one_step_has_open_sizes_too():
    module = Model(attended).eval()
    net, (x,) = ran_in_part(module, x_of(1, 1)), x_of(3, 8)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=tolerances.NETWORK, rtol=0)


class Branch(nn.Module):
    """A branch on values, of which a graph contains one side."""

    def __init__(self, limit):
        super().__init__()
        self.rnn, self.limit = nn.LSTM(4, 6, batch_first=True), limit

    def forward(self, x):
        y = self.rnn(x)[0].cumsum(1)
        return y * 2 if bool(x.abs().max() > self.limit) else y


@pytest.mark.long
def test_the_logarithm_of_a_sigmoid_is_exact_for_all_numbers():
    module = Model(lambda m, x: nn.functional.logsigmoid(m.rnn(x)[0] * 100).cumsum(1)).eval()
    net, (x,) = ran_in_part(module, x_of(2, 9)), x_of(3, 7)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach(), rtol=1e-5)


REFUSED = {
    "random numbers": (Model(lambda m, x: m.rnn(x)[0] + torch.rand(6)), "it draws random numbers"),
    "nothing for the kernel": (
        Model(lambda m, x: m.head(x.repeat(1, 1, 2)[..., :6]).cumsum(1)),
        "no recurrent layer.*without a loop over time, ONNX Runtime would run all of it: call torch.onnx.export",
    ),
    "a branch on values": (Branch(1e-3), r"torch\.export: output 0 differs from the module's by"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_contain_is_refused(name):
    module, why = REFUSED[name]
    with pytest.raises(cs.FormatError, match=rf"can't be a Network: .*; with ONNX Runtime: .*{why}"):
        cs.compile(module, torch.zeros(2, 9, 4))


@pytest.mark.long
def test_what_a_module_does_for_shorter_rows_is_compared_although_the_example_has_none():
    def of_lengths(m, x, lengths):
        y = m.rnn(x)[0].cumsum(1)
        used = torch.arange(x.shape[1]) < lengths[:, None]
        return y * used[..., None] if bool((lengths < x.shape[1]).any()) else y

    with pytest.raises(cs.FormatError, match="with shorter rows output 0 differs"):
        cs.compile(Model(of_lengths), (torch.randn(2, 9, 4), torch.full((2,), 9)))


@pytest.mark.long
def test_a_refusal_names_the_operator_that_onnx_lacks():
    with pytest.raises(
        cs.FormatError, match=r"torch\.export: No ONNX function found for <OpOverload\(op='aten\.linalg_qr'"
    ) as caught:
        cs.compile(Model(lambda m, x: torch.linalg.qr(m.rnn(x)[0])[0]), torch.randn(2, 9, 4))
    assert "\x1b" not in str(caught.value)


@pytest.mark.long
def test_reads_of_values_that_change_nothing_are_warned_of():
    with pytest.warns(UserWarning, match=r"reads values of tensors \(test_runtime_models\.py:\d+\)"):
        net = cs.compile(Branch(1e9).eval(), torch.zeros(2, 9, 4))
    assert isinstance(net, RuntimeModel)


@pytest.mark.long
def test_a_graph_that_fails_at_an_open_size_is_refused(monkeypatch):
    own = RuntimeModel.compute

    def fails(net, given, options=None):
        if len(given["input_0"]) == 3:
            raise RuntimeError("Reshape")
        return own(net, given, options)

    monkeypatch.setattr(RuntimeModel, "compute", fails)
    with pytest.raises(cs.FormatError, match=r"torch\.export: its graph fails for \[3, 9, 4\]: Reshape"):
        cs.compile(Model(attended), x_of(2, 9))


@pytest.mark.long
def test_steps_of_cells_run_as_loops_of_any_length():
    def loop(m, x):
        h, hs = x.new_zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = m.rnn(x[:, t], h)
            hs.append(h)
        y = torch.stack(hs, 1)
        return m.attention(y, y, y)[0]

    class Cells(Model):
        def __init__(self):
            super().__init__(loop)
            self.rnn = nn.GRUCell(4, 6)

    module = Cells().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = cs.compile(module, x_of(2, 9))
    assert not any("its graph doesn't have" in str(one.message) for one in caught)
    assert isinstance(net, RuntimeModel)
    assert net.loops
    for rows, steps in (3, 9), (1, 4), (2, 21):
        (x,) = x_of(rows, steps)
        np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=tolerances.NETWORK, rtol=0)


@pytest.mark.long
def test_a_size_that_is_fixed_by_a_value_is_fixed_in_the_graph_and_warned_of():
    def steps_in_a_loop(m, x, lengths):
        y, count = m.rnn(x)[0], int(lengths.max())
        steps = [y[:, t] for t in range(count)]
        assert y.shape[1] == count
        return torch.stack(steps, 1).cumsum(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = cs.compile(Model(steps_in_a_loop).eval(), with_lengths(*SIZES[0]))
    assert any("takes sizes that its graph doesn't have" in str(one.message) for one in caught)
    assert isinstance(net, RuntimeModel)
    assert net.arguments(net.inputs)[0].shape[1:] == [9, 4]


@pytest.mark.long
def test_without_onnxruntime_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr("cellstack.capture.runtime.find_spec", lambda name: None)
    with pytest.raises(cs.FormatError, match=re.escape("pip install 'cellstack[onnxruntime]'")):
        cs.compile(Model(attended), x_of(2, 9))


@pytest.mark.long
def test_a_runtime_model_saves_and_does_not_stream(tmp_path):
    module, (x,) = Model(attended).eval(), x_of(3, 8)
    net = ran_in_part(module, x_of(2, 9))
    net.save(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = cs.load(tmp_path / "net.onnx")
    assert np.array_equal(again(x.numpy()), net(x.numpy()))
    with pytest.raises(ValueError, match="not a Network"):
        net.stream()


@pytest.mark.long
def test_nothing_is_printed(capfd):
    ran_in_part(Model(attended), x_of(2, 9))
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_a_size_may_be_the_first_that_a_file_asks_for():
    module = Model(lambda m, x: m.rnn(x)[0])
    names: dict = {"attended": attended}
    exec("def run(m, x):\n    return attended(m, x.reshape(len(x), -1, 4))\n", names)
    module.run = names["run"]
    net = ran_in_part(module, x_of(*SIZES[0]))
    for size in SIZES:
        x = x_of(*size)[0]
        np.testing.assert_allclose(net(x.numpy()), module(x).detach(), atol=tolerances.NETWORK, rtol=0)

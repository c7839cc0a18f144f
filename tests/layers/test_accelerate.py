"""Accelerated PyTorch modules: the same results, gradients, random draws, classes, files and errors as before."""

import copy
import pickle
import re
import subprocess
import sys
from abc import ABC
from contextlib import nullcontext
from dataclasses import replace

import pairs
import pytest
import tolerances
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

import cellstack as cs
from cellstack import _kernel
from cellstack.cells.spec import CellSpec
from cellstack.layers import accelerated, eligibility, kernel_calls, op

MODULES = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


@pytest.fixture
def runs(monkeypatch):
    """Count the calls that the kernel runs, here including those that PyTorch runs faster."""
    monkeypatch.setattr(eligibility, "LIMITS", dict.fromkeys(eligibility.LIMITS, eligibility.Limits(1, 1, 1)))
    monkeypatch.setattr(eligibility, "WIDE_RNN_CELL", 1)
    calls = []
    for name in ("run_op", "forward_each", "step"):
        real = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *args, _real=real, **rest: calls.append(1) or _real(*args, **rest))
    return calls


def pair(kind, *args, **rest):
    """Return a PyTorch module and an accelerated copy of it."""
    torch.manual_seed(0)
    theirs = kind(*args, **rest)
    return theirs, cs.accelerate(copy.deepcopy(theirs))


def under_autocast(module, *given):
    """Return the results of PyTorch's module, if it has any in bfloat16 on this processor."""
    try:
        return flat(module(*given))
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip("on processors without AVX-512, PyTorch's LSTM in bfloat16 ends with an error of oneDNN")


def flat(value):
    """Return the tensors in a module's results as a flat list."""
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes, *(i for i in value[2:] if i is not None)]
    return [value] if isinstance(value, torch.Tensor) else [t for part in value if part is not None for t in flat(part)]


def same(ours, theirs, tolerance):
    ours, theirs = flat(ours), flat(theirs)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert [t.stride() for t in ours] == [t.stride() for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.detach().double() - b.detach().double()).abs().max() if a.numel() else 0) <= tolerance


def check(theirs, ours, make, tolerance=1e-10, second=False):
    """Compare outputs, gradients of all inputs and weights, and with `second` second derivatives, of one call."""
    found = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        inputs, hx = make()
        leaves = [t for t in flat([inputs, hx]) if t.requires_grad]
        out = module(inputs, hx) if hx is not None else module(inputs)
        results = [t for t in flat(out) if t.is_floating_point()]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in results)
        wanted = [*leaves, *module.parameters()]
        first = torch.autograd.grad(loss, wanted, create_graph=second)
        found.append([out, list(first)])
        if second:
            again = sum((g**2).sum() for g in first)
            found[-1].append(list(torch.autograd.grad(again, wanted, allow_unused=True)))
    (a, *ga), (b, *gb) = found[1], found[0]
    same(a, b, tolerance)
    for ours_of, theirs_of in zip(ga, gb, strict=True):
        for x, y in zip(ours_of, theirs_of, strict=True):
            assert (x is None) == (y is None)
            assert x is None or float((x - y).detach().abs().max()) <= tolerance * max(
                1.0, float(y.detach().abs().max())
            )


# ── PyTorch's table of test inputs ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore")
@pairs.parametrize("training, kind", [True, False], [*MODULES, *CELLS], unpaired=[0])
def test_pytorch_s_test_inputs_give_the_results_of_pytorch(kind, training, runs):
    from torch.testing._internal.common_modules import module_db  # a second of time

    (info,) = (info for info in module_db if info.module_cls is kind)
    given = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    inputs = info.module_inputs_func(info, **given)
    assert inputs
    for made in inputs:
        runs.clear()
        compare_on_inputs_of_pytorch(kind, made, training, runs)


def compare_on_inputs_of_pytorch(kind, made, training, runs):
    built = made.constructor_input
    theirs, ours = pair(kind, *built.args, **built.kwargs, dtype=torch.float64)
    theirs.train(training), ours.train(training)
    args = made.forward_input.args

    def make():
        fresh = [a if a is None else copy_of(a) for a in args]
        return fresh[0], fresh[1] if len(fresh) > 1 else None

    check(theirs, ours, make, second=True)
    assert kind in CELLS or runs
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(*args), theirs(*args), 1e-10)
    assert runs


def copy_of(value):
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.detach().clone().requires_grad_(), *value[1:])
    if isinstance(value, (tuple, list)):
        return tuple(copy_of(part) for part in value)
    return value.detach().clone().requires_grad_()


# ── every option, compared with PyTorch ───────────────────────────────────────────────────────────────────────────────

BOTH = (False, True)
OPTIONS = ((1, 2, 3), BOTH, BOTH, BOTH, (0.0, 0.4))


def options_of(layers, both, first, bias, share):
    return {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, "dropout": share}


def dropout_of_one_layer(kind, layers, both, first, bias, share, *rest):
    return layers == 1 and share > 0


@pairs.parametrize(
    "kind, layers, both, first, bias, share",
    MODULES,
    *OPTIONS,
    also=(0, 1, 2),
    unless=dropout_of_one_layer,
)
def test_sequences_with_every_option(kind, layers, both, first, bias, share, runs):
    options = options_of(layers, both, first, bias, share)
    theirs, ours = pair(kind, 5, 19, **options, dtype=torch.float64)
    layers = options["num_layers"] * (1 + options["bidirectional"])

    def batch(given):
        x = torch.randn((3, 7, 5), dtype=torch.float64, requires_grad=True)
        states = [torch.randn(layers, 3 if options["batch_first"] else 7, 19, dtype=torch.float64) for _ in range(2)]
        hx = None if not given else tuple(s.requires_grad_() for s in states) if kind is nn.LSTM else states[0]
        return x, hx

    check(theirs, ours, lambda: batch(False))
    check(theirs, ours, lambda: batch(True))
    with torch.no_grad():
        torch.manual_seed(4)
        expected = theirs(batch(True)[0])
        torch.manual_seed(4)
        same(ours(batch(True)[0]), expected, 1e-10)
    assert runs


@pairs.parametrize(
    "kind, layers, both, first, bias, share, sort",
    MODULES,
    *OPTIONS,
    BOTH,
    also=(0, 1, 2),
    unless=dropout_of_one_layer,
)
def test_packed_sequences(kind, layers, both, first, bias, share, sort, runs):
    options = options_of(layers, both, first, bias, share)
    theirs, ours = pair(kind, 4, 9, **options, dtype=torch.float64)
    lengths = [6, 5, 5, 1] if sort else [5, 1, 6, 5]
    layers = options["num_layers"] * (1 + options["bidirectional"])

    def make(given):
        x = torch.randn((4, 6, 4), dtype=torch.float64, requires_grad=True)
        states = [torch.randn(layers, 4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        hx = None if not given else tuple(states) if kind is nn.LSTM else states[0]
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=sort)
        return PackedSequence(packed.data.detach().requires_grad_(), *packed[1:]), hx

    check(theirs, ours, lambda: make(False))
    check(theirs, ours, lambda: make(True))
    assert runs


@pytest.mark.parametrize("lengths", [[3], [4, 4, 4], [1, 1], [1]])
def test_packed_sequences_of_one_row_and_of_equal_lengths(lengths, runs):
    theirs, ours = pair(nn.LSTM, 4, 9, 2, dtype=torch.float64)
    packed = pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in lengths])
    check(theirs, ours, lambda: (copy_of(packed), None))
    assert runs


@pairs.parametrize(
    "kind, layers, both, first, bias, share, proj",
    [nn.LSTM],
    *OPTIONS,
    [1, 3],
    unless=dropout_of_one_layer,
)
def test_projected_outputs(kind, layers, both, first, bias, share, proj, runs):
    theirs, ours = pair(
        kind, 5, 18, **options_of(layers, both, first, bias, share), proj_size=proj, dtype=torch.float64
    )
    check(theirs, ours, lambda: (torch.randn((3, 7, 5), dtype=torch.float64, requires_grad=True), None))
    assert runs


@pytest.mark.parametrize("hidden", [1, 7, 16, 33, 130])
@pytest.mark.parametrize("kind", MODULES)
def test_float32_of_many_widths(kind, hidden, runs):
    theirs, ours = pair(kind, hidden // 2 + 1, hidden, 2)
    check(theirs, ours, lambda: (torch.randn((9, 4, hidden // 2 + 1), requires_grad=True), None), 1e-4)
    assert runs


@pytest.mark.parametrize("width", [(7,), (1, 7), (5, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, width, runs):
    theirs, ours = pair(kind, 7, 20, bias=bias, dtype=torch.float64)

    def make(given):
        states = [torch.randn(*width[:-1], 20, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        hx = None if not given else tuple(states) if kind is nn.LSTMCell else states[0]
        return torch.randn(width, dtype=torch.float64, requires_grad=True), hx

    check(theirs, ours, lambda: make(False), second=True)
    check(theirs, ours, lambda: make(True))
    for given in (False, True):
        x, hx = make(given)
        with cs.packed_weights(ours):
            check(theirs, ours, lambda g=given: make(g))
            assert len(runs) == 2 * given
            with torch.no_grad():
                for _ in range(2):
                    same(ours(x, hx), theirs(x, hx), 1e-12)


@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_weights_are_packed_once_and_again_when_a_version_changes(kind, monkeypatch):
    theirs, ours = pair(kind, 3, 4)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    packs = []
    real = kernel_calls._weights
    monkeypatch.setattr(eligibility, "WIDE_RNN_CELL", 1)
    monkeypatch.setattr(kernel_calls, "_weights", lambda *args, **rest: packs.append(1) or real(*args, **rest))
    with torch.no_grad(), cs.packed_weights(nn.Sequential(ours)):
        for _ in range(3):
            same(ours(x), theirs(x), 1e-6)
        assert len(packs) == 1
        for module in (theirs, ours):
            module.load_state_dict({name: w * 2 for name, w in module.state_dict().items()})
        same(ours(x), theirs(x), 1e-6)
        assert len(packs) == 2
        assert type(pickle.loads(pickle.dumps(ours))) is kind
        assert copy.deepcopy(ours)._packed is None
    assert ours._packed is None
    with (
        pytest.raises(ValueError, match=r"packed_weights: \w+ has no accelerated module: call accelerate"),
        cs.packed_weights(theirs),
    ):
        pass


OPTIMIZERS = {
    "adam": lambda w: torch.optim.Adam(w, lr=0.1, fused=True),
    "adamw": lambda w: torch.optim.AdamW(w, lr=0.1, fused=True),
    "sgd": lambda w: torch.optim.SGD(w, lr=0.1, fused=True),
    "adagrad": lambda w: torch.optim.Adagrad(w, lr=0.1, fused=True),
    "not fused": lambda w: torch.optim.SGD(w, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_packed_weights_follow_the_steps_of_any_optimizer(kind, name, runs):
    theirs, ours = pair(kind, 3, 4)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    optimizers = [OPTIMIZERS[name](module.parameters()) for module in (theirs, ours)]
    with cs.packed_weights(ours):
        for _ in range(3):
            before = len(runs)
            with torch.no_grad():
                same(ours(x), theirs(x), 1e-6)
            assert len(runs) == before + 1
            for module, optimizer in zip((theirs, ours), optimizers, strict=True):
                for weight in module.parameters():
                    weight.grad = torch.ones_like(weight)
                optimizer.step()


@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_packed_weights_follow_a_vector_that_is_edited_in_place(kind, runs):
    theirs, ours = pair(kind, 3, 4)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    vectors = [nn.utils.parameters_to_vector(module.parameters()).detach() for module in (theirs, ours)]
    with torch.no_grad(), cs.packed_weights(ours):
        for _ in range(4):
            same(ours(x), theirs(x), 1e-6)
            for module, vector in zip((theirs, ours), vectors, strict=True):
                vector.mul_(1.3)
                nn.utils.vector_to_parameters(vector, module.parameters())
    assert runs


def test_packed_weights_follow_memory_shared_with_a_tensor_or_process(runs):
    theirs, ours = pair(nn.LSTMCell, 3, 4)
    x = torch.randn(2, 3)
    others = [[w.data for w in module.parameters()] for module in (theirs, ours)]
    ours.share_memory()
    memory = [torch.empty(0, dtype=w.dtype).set_(w.untyped_storage(), 0, w.shape) for w in ours.parameters()]
    with torch.no_grad(), cs.packed_weights(ours):
        for _ in range(3):
            same(ours(x), theirs(x), 1e-6)
            for w in (*others[0], *memory):
                w.mul_(1.3)
    assert len(runs) == 3


def test_weights_in_shared_memory_are_packed_at_each_call_and_others_once(monkeypatch):
    packs, real = [], kernel_calls._weights
    monkeypatch.setattr(kernel_calls, "_weights", lambda *args, **rest: packs.append(1) or real(*args, **rest))
    own, shared = cs.accelerate(nn.LSTMCell(3, 4)), cs.accelerate(nn.LSTMCell(3, 4).share_memory())
    tied = cs.accelerate(nn.LSTMCell(3, 4))
    tied.weight_ih = own.weight_ih  # a parameter shared by two modules is one tensor
    for module, expected in ((own, 1), (shared, 3), (tied, 1)):
        packs.clear()
        with torch.no_grad(), cs.packed_weights(nn.ModuleList([own, module])):
            for _ in range(3):
                module(torch.randn(2, 3))
            assert len(packs) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_both_directions_run_at_the_same_time_with_the_same_bits(kind, packed, monkeypatch):
    seen, real = [], kernel_calls.native.forward_each
    monkeypatch.setattr(kernel_calls.native, "forward_each", lambda *given: seen.append(real(*given)))
    torch.manual_seed(0)
    # One row of one block of units: threads can't divide a direction on any processor.
    module = cs.accelerate(kind(64, 8, 2, bidirectional=True))
    x, found, before = torch.randn(4000, 1, 64), [], torch.get_num_threads()
    trained = module(x)  # one after the other
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad(), cs.packed_weights(module) if packed else nullcontext():
                y, state = module(x)
            found.append((y, *(state if kind is nn.LSTM else (state,))))
    finally:
        torch.set_num_threads(before)
    assert seen == [False] * 2 + [True] * 4
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert torch.equal(trained[0], found[0][0])


def test_an_optimizer_of_other_weights_keeps_packed_weights(monkeypatch):
    packs, real = [], kernel_calls._weights
    monkeypatch.setattr(kernel_calls, "_weights", lambda *args, **rest: packs.append(1) or real(*args, **rest))
    ours, other = cs.accelerate(nn.LSTMCell(3, 4)), nn.Linear(3, 4)
    optimizer = torch.optim.Adam(other.parameters(), fused=True)
    other.weight.grad = torch.ones_like(other.weight)
    before = len(hooks)
    with torch.no_grad(), cs.packed_weights(ours), cs.packed_weights(ours):
        assert len(hooks) == before + 1
        for _ in range(3):
            ours(torch.randn(2, 3))
            optimizer.step()
    assert len(packs) == 1
    assert len(hooks) == before


def test_pytorch_runs_short_calls_except_those_it_does_not_support(monkeypatch):
    calls = []
    real = op.run_op
    monkeypatch.setattr(op, "run_op", lambda *args, **rest: calls.append(1) or real(*args, **rest))
    ours = cs.accelerate(nn.GRU(3, 4))
    x = torch.randn(2, 1, 3)
    y = ours(x)[0]
    assert not calls
    torch.testing.assert_close(ours(x, return_gates=True)[0], y)
    torch.testing.assert_close(ours(x, reset=torch.zeros(2, 1, dtype=torch.bool))[0], y)
    with torch.no_grad(), cs.packed_weights(ours):
        torch.testing.assert_close(ours(x)[0], y.detach())
    assert len(calls) == 3


@pytest.mark.parametrize(("units", "calls"), [(eligibility.WIDE_RNN_CELL - 1, 0), (eligibility.WIDE_RNN_CELL, 1)])
def test_pytorch_runs_a_narrow_rnn_cell_with_packed_weights_too(units, calls, monkeypatch):
    theirs, ours = pair(nn.RNNCell, 3, units)
    steps, real = [], op.step
    monkeypatch.setattr(op, "step", lambda *args, **rest: steps.append(1) or real(*args, **rest))
    x = torch.randn(2, 3)
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(x), theirs(x), 1e-6)
    assert len(steps) == calls
    assert ("equally fast below" in cs.plan(ours)[0]) == (not calls)


def test_a_relu_rnn_and_its_cell(runs):
    for kind, x in ((nn.RNN, torch.randn(4, 3, 5)), (nn.RNNCell, torch.randn(3, 5))):
        theirs, ours = pair(kind, 5, 8, nonlinearity="relu")
        with torch.no_grad(), cs.packed_weights(ours):
            same(ours(x), theirs(x), 1e-5)
    assert len(runs) == 2


def test_unbatched_input(runs):
    for first in (True, False):
        theirs, ours = pair(nn.LSTM, 5, 8, 2, batch_first=first, bidirectional=True)
        x, hx = torch.randn(6, 5), (torch.randn(4, 8), torch.randn(4, 8))
        same(ours(x, hx), theirs(x, hx), 1e-5)
    assert runs


# ── reset and gates ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_a_reset_sets_the_state_of_a_row_to_zeros(kind, both, runs):
    _, ours = pair(kind, 4, 6, 2, bidirectional=both, dtype=torch.float64)
    x = torch.randn(7, 2, 4, dtype=torch.float64)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[3] = True
    y, _ = ours(x, reset=reset)[:2]
    torch.testing.assert_close(y, torch.cat([ours(x[:3])[0], ours(x[3:])[0]]))


def test_a_reset_of_one_row_does_not_change_others(runs):
    _, ours = pair(nn.LSTM, 4, 6, batch_first=True)
    x, hx = torch.randn(2, 5, 4), (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    reset = torch.tensor([[False] * 5, [True, False, False, True, False]])
    y, (h, c) = ours(x, hx, reset=reset)
    plain, (h_0, c_0) = ours(x, hx)
    for found, expected in ((y[:1], plain[:1]), (h[:, :1], h_0[:, :1]), (c[:, :1], c_0[:, :1])):
        assert torch.equal(found, expected)
    tail, (h_1, c_1) = ours(x[1:, 3:])
    for found, expected in ((y[1:, 3:], tail), (h[:, 1:], h_1), (c[:, 1:], c_1)):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_torch_compile_of_a_whole_graph():
    torch._dynamo.reset()
    _, ours = pair(nn.LSTM, 4, 128, 2, batch_first=True)
    x = torch.randn(3, 20, 4, requires_grad=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        y = torch.compile(lambda x: ours(x)[0] * 2, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, ours(x)[0] * 2)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((ours(x)[0] * 2).sum(), x)[0])


@pytest.mark.parametrize("reset", [torch.zeros(5, 2), torch.zeros(2, 5, dtype=torch.bool), [[False] * 2] * 5])
def test_a_reset_of_a_wrong_shape_or_type_is_refused(reset):
    _, ours = pair(nn.LSTM, 4, 6)
    with pytest.raises(ValueError, match="LSTM: expected reset"):
        ours(torch.randn(5, 2, 4), reset=reset)


def test_resets_of_packed_sequences_are_refused():
    _, ours = pair(nn.LSTM, 4, 6)
    with pytest.raises(ValueError, match="LSTM: reset isn't supported with a PackedSequence"):
        ours(pack_sequence([torch.randn(3, 4)]), reset=torch.zeros(3, 1, dtype=torch.bool))


@pytest.mark.parametrize("first", [False, True])
def test_every_module_returns_gates(first):
    theirs, ours = pair(nn.LSTM, 4, 6, 2, batch_first=first, bidirectional=True)
    x = torch.randn(5, 3, 4)
    y, (h, c), gates = ours(x, return_gates=True)
    same([y, h, c], theirs(x), 1e-6)
    assert len(gates) == 4
    assert gates[0]._fields == ("i", "f", "g", "o", "c", "h")
    time = 1 if first else 0
    torch.testing.assert_close(gates[0].c.select(time, -1), c[0])
    torch.testing.assert_close(gates[3].c.select(time, 0), c[3])
    torch.testing.assert_close(gates[2].h, y[..., :6])
    i, g, f = (gates[0]._asdict()[name].select(time, -1) for name in "igf")
    torch.testing.assert_close(f * gates[0].c.select(time, -2) + i * g, c[0])


def test_gates_of_packed_rows_are_in_batch_order():
    _, ours = pair(nn.GRU, 4, 6, batch_first=True)
    rows = [torch.randn(n, 4) for n in (2, 5, 3)]
    _, _, gates = ours(pack_sequence(rows, enforce_sorted=False), return_gates=True)
    for n, row in enumerate(rows):
        torch.testing.assert_close(gates[0].h[n, : len(row)], ours(row)[0])


def test_gates_of_a_call_that_pytorch_runs_are_refused():
    _, ours = pair(nn.LSTM, 4, 6)
    with pytest.raises(RuntimeError, match="reset and return_gates need the kernel, but PyTorch runs this call"):
        ours.half()(torch.randn(5, 2, 4).half(), return_gates=True)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("packed", [False, True])
def test_cells_return_gates_and_reset_rows(kind, packed):
    theirs, ours = pair(kind, 4, 6)
    x, lstm = torch.randn(3, 4), kind is nn.LSTMCell
    hx = (torch.randn(3, 6), torch.randn(3, 6)) if lstm else torch.randn(3, 6)
    with cs.packed_weights(ours) if packed else nullcontext(), torch.set_grad_enabled(not packed):
        state, trace = ours(x, hx, return_gates=True)
        same([*state] if lstm else [state], theirs(x, hx), 1e-6)
        h = state[0] if lstm else state
        torch.testing.assert_close(trace.h, h)
        if lstm:  # gates after their activations, as for a sequence
            torch.testing.assert_close(trace.f * hx[1] + trace.i * trace.g, state[1])
            torch.testing.assert_close(trace.o * torch.tanh(trace.c), h)
        elif kind is nn.GRUCell:
            torch.testing.assert_close(trace.z * hx + (1 - trace.z) * trace.g, h)
        reset = torch.tensor([True, False, True])
        zeros = [torch.where(reset[:, None], 0.0, part) for part in (hx if lstm else [hx])]
        begun = ours(x, hx, reset=reset)
        same([*begun] if lstm else [begun], theirs(x, tuple(zeros) if lstm else zeros[0]), 1e-6)
        both, _ = ours(x, hx, reset=reset, return_gates=True)
        same([*both] if lstm else [both], [*begun] if lstm else [begun], 1e-6)
        row, trace = ours(x[0], return_gates=True)  # without a batch, from zeros
        same([*row] if lstm else [row], theirs(x[0]), 1e-6)
        assert trace.h.shape == (6,)


def test_gates_of_a_cell_are_differentiable():
    _, ours = pair(nn.GRUCell, 4, 6)
    x = torch.randn(3, 4, requires_grad=True)
    _, trace = ours(x, torch.randn(3, 6), return_gates=True)
    trace.z.sum().backward()
    assert x.grad.abs().sum() > 0


def test_unsupported_gates_and_resets_of_a_cell_are_refused():
    _, ours = pair(nn.LSTMCell, 4, 6)
    with pytest.raises(ValueError, match=r"LSTMCell: expected reset \(3,\), the shape of input .*, got \(2,\)"):
        ours(torch.randn(3, 4), reset=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="LSTMCell: expected reset to be a bool tensor, got list"):
        ours(torch.randn(3, 4), reset=[False] * 3)
    with pytest.raises(RuntimeError, match="LSTMCell: reset and return_gates need the kernel, but PyTorch"):
        ours.half()(torch.randn(3, 4).half(), return_gates=True)


# ── compatibility with users' programs ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_only_the_class_changes_to_a_subclass(kind):
    module = kind(3, 4)
    before, shown, keys = list(module.parameters()), repr(module), list(module.state_dict())
    assert cs.accelerate(module) is module
    assert isinstance(module, kind)
    assert type(module) is not kind
    assert getattr(nn, type(module).__name__) is kind
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    assert repr(module) == shown
    assert list(module.state_dict()) == keys
    assert cs.restore(module) is module
    assert type(module) is kind


def test_earlier_optimisers_and_hooks_still_work():
    model = nn.Sequential(nn.LSTM(3, 4))
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    cs.accelerate(model)
    before = model[0].weight_hh_l0.detach().clone()
    model(torch.randn(5, 2, 3))[0].sum().backward()
    optimiser.step()
    assert seen == [1]
    assert not torch.equal(before, model[0].weight_hh_l0)


@pytest.mark.parametrize("kind", [*MODULES, *CELLS])
def test_the_next_call_uses_weights_written_in_any_way(kind):
    theirs, ours = pair(kind, 3, 4)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    same(ours(x), theirs(x), 1e-6)
    for write in (
        lambda m: getattr(m, name).data.mul_(1.5),
        lambda m: setattr(getattr(m, name), "data", getattr(m, name).data * 0.5),
        lambda m: setattr(m, name, nn.Parameter(getattr(m, name).detach() + 0.1)),
        lambda m: getattr(m, name).detach().numpy().__imul__(0.9),
    ):
        with torch.no_grad():
            write(theirs), write(ours)
        same(ours(x), theirs(x), 1e-6)


def test_copies_are_accelerated_and_pickles_are_pytorch_modules():
    _, ours = pair(nn.LSTM, 3, 4, 2)
    copied = copy.deepcopy(nn.Sequential(ours))[0]
    assert type(copied) is type(ours)
    assert copied.weight_hh_l0 is not ours.weight_hh_l0
    x = torch.randn(5, 2, 3)
    same(copied(x), ours(x), 0.0)
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded) is nn.LSTM
    same(loaded(x), ours(x), 1e-6)
    loaded.weight_hh_l0 = nn.Parameter(loaded.weight_hh_l0 * 2)  # weight sharing still works
    assert loaded._flat_weights[1] is loaded.weight_hh_l0


WITHOUT = """
import sys, torch
sys.modules["cellstack"] = None
model = torch.load({path!r}, weights_only=False)
assert type(model[0]) is torch.nn.LSTM, type(model[0])
torch.save((model(torch.ones(5, 2, 3))[0].detach(), torch.load({weights!r})), {out!r})
"""


@pytest.mark.long
def test_saved_modules_load_with_and_without_cellstack(tmp_path):
    _, ours = pair(nn.LSTM, 3, 4)
    model = nn.Sequential(ours)
    path, weights, out = (str(tmp_path / name) for name in ("model.pt", "weights.pt", "out.pt"))
    torch.save(model, path)
    torch.save(model.state_dict(), weights)
    subprocess.run([sys.executable, "-c", WITHOUT.format(path=path, weights=weights, out=out)], check=True)
    y, state = torch.load(out)
    torch.testing.assert_close(y, model(torch.ones(5, 2, 3))[0].detach())
    theirs = nn.Sequential(nn.LSTM(3, 4))
    torch.save(theirs.state_dict(), weights)
    fresh = cs.accelerate(nn.Sequential(nn.LSTM(3, 4)))
    fresh.load_state_dict(torch.load(weights))
    fresh.load_state_dict(state)
    assert torch.equal(fresh[0].weight_hh_l0, ours.weight_hh_l0)


def test_from_torch_reads_an_accelerated_module():
    _, ours = pair(nn.LSTM, 3, 4, 2, batch_first=True)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(torch.from_numpy(cs.load(ours)(x.numpy())), ours(x)[0].detach())


def test_a_subclass_that_does_not_override_forward_is_accelerated(runs):
    class Named(nn.LSTM):
        def __init__(self, *args):
            super().__init__(*args)
            self.label = "mine"

    module = cs.accelerate(Named(3, 4))
    assert isinstance(module, Named)
    assert module.label == "mine"
    assert type(module).__name__ == "Named"
    module(torch.randn(5, 2, 3))
    assert runs
    assert type(cs.restore(module)) is Named


class OwnLSTM(nn.LSTM):
    """Its forward is decorated, changes results by a parameter, and calls super() in another method."""

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.scale = nn.Parameter(torch.ones((), dtype=self.weight_ih_l0.dtype))

    @torch.enable_grad()
    def forward(self, input, state=None):
        y, state = self.run(input, state)
        return PackedSequence(y.data * self.scale, *y[1:]) if isinstance(y, PackedSequence) else y * self.scale, state

    def run(self, x, state):
        return super().forward(x, hx=state)


class Doubles:
    """A mixin whose forward calls the next class's."""

    def forward(self, input, hx=None):
        data = PackedSequence(2 * input.data, *input[1:]) if isinstance(input, PackedSequence) else 2 * input
        return super().forward(data, hx)


class OwnGRU(Doubles, ABC, nn.GRU):
    """Gets another layout in memory from `ABC`, which has no attribute dictionary."""


class Base(nn.RNN):
    def forward(self, *args):
        y, h = super(Base, self).forward(*args)  # noqa: UP008
        return y, h.tanh()


class Middle(Base):
    pass


class OwnRNN(Doubles, Middle):
    pass


@pytest.mark.parametrize("form", ["padded", "states", "packed", "unbatched"])
@pytest.mark.parametrize("kind", [OwnLSTM, OwnGRU, OwnRNN])
def test_the_kernel_runs_calls_of_super_forward(kind, form, runs):
    theirs, ours = pair(kind, 3, 4, 2, dropout=0.5, bidirectional=True, dtype=torch.float64)

    def make():
        shape = (5, 3) if form == "unbatched" else (5, 2, 3)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        h = torch.randn(4, 2, 4, dtype=torch.float64)
        state = None if form != "states" else (h, h.tanh()) if kind is OwnLSTM else h
        return pack_padded_sequence(x, torch.tensor([5, 3])) if form == "packed" else x, state

    check(theirs, ours, make, second=True)
    assert len(runs) >= 2
    theirs.eval(), ours.eval()
    runs.clear()
    given = make()
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(*given), theirs(*given), 1e-10)
        same(ours(*given), theirs(*given), 1e-10)
    assert runs


@pytest.mark.parametrize("base", CELLS)
def test_the_kernel_runs_calls_of_super_forward_of_a_cell(base, runs):
    class Own(base):
        def forward(self, input, hx=None):
            return super().forward(input.tanh(), hx)

    theirs, ours = pair(Own, 3, 4)
    x = torch.randn(2, 3)
    same(ours(x), theirs(x), 0.0)
    assert not runs
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(x), theirs(x), 1e-6)
    assert runs
    assert "through super().forward within packed_weights()" in str(cs.plan(ours))


def test_a_class_with_its_own_forward_keeps_its_identity():
    theirs, ours = pair(OwnLSTM, 3, 4)
    assert isinstance(ours, OwnLSTM)
    assert (type(ours).__name__, type(ours).__module__) == ("OwnLSTM", __name__)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for copied in (copy.copy(ours), copy.deepcopy(ours)):
        assert type(copied) is type(ours)
    assert type(copy_of_module(ours)) is OwnLSTM
    assert "OwnLSTM 3 -> 4: fused cpu kernel" in str(cs.plan(ours))
    assert " through super().forward" in str(cs.plan(ours))
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours)
    assert type(cs.restore(ours)) is OwnLSTM


def test_arguments_of_super_forward_reach_the_kernel():
    class Episodes(nn.LSTM):
        def forward(self, input, starts):
            return super().forward(input, reset=starts, return_gates=True)

    x, starts = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.5
    theirs, ours = pair(Episodes, 3, 4)
    assert len(ours(x, starts)) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        theirs(x, starts)


class DropsWeights(nn.LSTM):
    """Replaces a weight in its forward: as an attribute, or in the list that PyTorch's forward reads."""

    def __init__(self, *args):
        super().__init__(*args)
        self.raw = nn.Parameter(self.weight_hh_l0.detach().clone())
        self.in_list = False

    def forward(self, input, hx=None):
        dropped = nn.functional.dropout(self.raw, 0.5)
        if self.in_list:
            self._flat_weights[1] = dropped
        else:
            self._parameters.pop("weight_hh_l0", None)
            self.weight_hh_l0 = dropped
        return super().forward(input, hx)


@pytest.mark.parametrize("in_list", [False, True])
def test_weights_that_a_forward_replaces_are_used(in_list, runs):
    theirs, ours = pair(DropsWeights, 3, 4)
    theirs.in_list = ours.in_list = in_list
    x, found = torch.randn(5, 2, 3), []
    for module in (theirs, ours):
        torch.manual_seed(1)
        y = [module(x)[0] for _ in range(3)]
        sum(part.square().sum() for part in y).backward()
        found.append([*y, module.raw.grad])
    same(found[1], found[0], 1e-5)
    assert len(runs) == 3


class ByName(nn.LSTM):
    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, input, hx)


class ByType(nn.LSTM):
    def forward(self, input, hx=None):
        return super(type(self), self).forward(input, hx)  # ruff's UP008 doesn't apply: no name is given


class ByClass(nn.GRU):
    def forward(self, input, hx=None):
        return super(self.__class__, self).forward(input, hx)


class Hidden(OwnGRU):
    """Its forward ends the chain of super().forward calls."""

    def forward(self, input, hx=None):
        return nn.GRU.forward(self, input, hx)


class Checks(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)

    def permute_hidden(self, hx, permutation):
        return super().permute_hidden(hx, permutation)


REFUSED = {
    ByName: r"ByName.forward doesn't call super\(\).forward",
    ByType: r"ByType.forward calls super\(type\(self\), self\), which fails in every subclass",
    ByClass: r"ByClass.forward calls super\(type\(self\), self\)",
    Hidden: r"Hidden.forward doesn't call super\(\).forward",
    Checks: "Checks overrides permute_hidden",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pytorch_runs_forwards_that_cannot_reach_the_kernel(kind, runs):
    own = kind(3, 4)
    model = nn.ModuleDict({"own": own, "plain": nn.LSTM(3, 4)})
    expected = own(torch.ones(5, 2, 3))
    cs.accelerate(model)
    assert type(own) is kind
    assert re.search(f"^own: {kind.__name__} 3 -> 4: PyTorch: {REFUSED[kind]}", cs.plan(model)[0])
    assert "fused cpu kernel" in cs.plan(model)[1]
    same(own(torch.ones(5, 2, 3)), expected, 0.0)
    assert not runs
    with pytest.raises(ValueError, match=rf"expected a module that contains an nn.LSTM.*{REFUSED[kind]}"):
        cs.accelerate(own)


def test_the_plan_mentions_a_forward_set_on_the_module(runs):
    theirs, ours = pair(nn.LSTM, 3, 4)
    before = ours.forward
    ours.forward = lambda x: before(2 * x)
    assert " if its attribute forward calls the forward of its class" in str(cs.plan(ours))
    x = torch.randn(5, 2, 3)
    same(ours(x), theirs(2 * x), 1e-6)
    assert runs


def test_pytorch_runs_parametrised_weights(runs):
    changed = nn.GRU(3, 4)
    parametrize.register_parametrization(changed, "weight_hh_l0", nn.Tanh())
    model, kept = nn.ModuleList([changed, nn.LSTM(3, 4)]), type(changed)
    cs.accelerate(model)
    assert type(changed) is kept
    assert cs.plan(model)[0].endswith("PyTorch: its weights are parametrised")
    changed(torch.randn(5, 2, 3))
    assert not runs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("allow_rnn", [False, True])
def test_torch_compile_of_a_class_with_its_own_forward(allow_rnn):
    theirs, ours = pair(OwnLSTM, 3, 4)
    x = torch.randn(20, 2, 3)
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        same(torch.compile(lambda x: ours(x)[0] * 2, backend="aot_eager")(x), theirs(x)[0] * 2, 1e-5)


def test_weight_norm_by_a_hook_is_followed(runs):
    theirs = nn.LSTM(3, 4)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(theirs, "weight_hh_l0")
    ours = cs.accelerate(copy_of_module(theirs))
    x = torch.randn(5, 2, 3)
    same(ours(x), theirs(x), 1e-6)
    ours(x)[0].sum().backward()
    assert ours.weight_hh_l0_g.grad is not None
    assert runs


def copy_of_module(module):
    return pickle.loads(pickle.dumps(module))


def test_shared_and_frozen_weights():
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].weight_ih_l0.requires_grad_(False)
    ours = cs.accelerate(copy.deepcopy(model))
    assert ours[1].weight_hh_l0 is ours[0].weight_hh_l0
    for m in (model, ours):
        m[1](m[0](torch.ones(5, 2, 4))[0])[0].sum().backward()
    torch.testing.assert_close(ours[0].weight_hh_l0.grad, model[0].weight_hh_l0.grad)
    assert ours[0].weight_ih_l0.grad is None


# ── calls that PyTorch runs, or refuses ───────────────────────────────────────────────────────────────────────────────

WRONG = {
    "width": lambda m: m(torch.randn(5, 2, 4)),
    "rank": lambda m: m(torch.randn(5, 2, 2, 3)),
    "dtype": lambda m: m(torch.randn(5, 2, 3).double()),
    "state": lambda m: m(torch.randn(5, 2, 3), (torch.randn(2, 3, 4), torch.randn(2, 2, 4))),
    "states": lambda m: m(torch.randn(5, 2, 3), torch.randn(2, 2, 4)),
    "steps": lambda m: m(torch.randn(0, 2, 3)),
    "meta": lambda m: m(torch.randn(5, 2, 3, device="meta")),
    "nothing": lambda m: m(None),
    "no states": lambda m: m(torch.randn(20, 2, 3), ()),
    "a list of no states": lambda m: m(torch.randn(20, 2, 3), []),
    "sparse": lambda m: m(torch.randn(20, 2, 3).to_sparse()),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_calls_raise_pytorch_s_errors(name):
    theirs, ours = pair(nn.LSTM, 3, 4, 2)
    with pytest.raises((ValueError, RuntimeError, AttributeError, TypeError, IndexError)) as expected:
        WRONG[name](theirs)
    with pytest.raises(type(expected.value)) as found:
        WRONG[name](ours)
    assert str(found.value) == str(expected.value)


def test_an_empty_batch_gives_empty_outputs():
    theirs, ours = pair(nn.LSTM, 3, 4)
    same(ours(torch.randn(5, 0, 3)), theirs(torch.randn(5, 0, 3)), 0.0)


def test_bfloat16_meta_and_objects_that_are_no_modules():
    module = cs.accelerate(nn.LSTM(3, 4).bfloat16())
    assert cs.plan(module) == ("LSTM 3 -> 4: PyTorch: its weights are bfloat16, not float32 or float64",)
    assert module(torch.randn(5, 2, 3).bfloat16())[0].dtype is torch.bfloat16
    meta = cs.accelerate(nn.LSTM(3, 4, device="meta"))
    assert "its weights are on meta" in cs.plan(meta)[0]
    for call in (cs.accelerate, cs.restore, cs.plan):
        with pytest.raises(TypeError, match="expected a module of PyTorch or a model of Keras, got list"):
            call([nn.LSTM(3, 4)])
    with pytest.raises(ValueError, match="got Linear without one; cells=True also looks for hand-written ones"):
        cs.accelerate(nn.Linear(3, 4))
    assert cs.plan(nn.Linear(3, 4)) == ("Linear: no recurrent module",)


def test_a_plan_says_what_runs_each_module():
    from cellstack import layers

    model = nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True), nn.GRUCell(8, 5), layers.LSTM(6, input_size=5))
    assert cs.plan(model)[0] == (
        "0: LSTM 3 -> 4, 2 layers, both directions: PyTorch: not accelerated; "
        "accelerate() makes the fused kernel run it"
    )
    lines = cs.plan(cs.accelerate(model))
    assert [line.split(":")[0] for line in lines] == ["0", "1", "2"]
    assert all("fused cpu kernel" in line for line in lines)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("start", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*MODULES, *CELLS, "projection", "packed"])
def test_autocast_gives_the_dtypes_that_pytorch_gives(kind, dtype, start, runs):
    projects, packed = kind == "projection", kind == "packed"
    if kind is nn.LSTM and dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("which of its LSTMs PyTorch takes for float16 depends on the processor")
    kind = nn.LSTM if projects or packed else kind
    theirs, ours = pair(kind, 3, 4, **({"proj_size": 2} if projects else {}))
    x = torch.randn(2, 3, dtype=dtype) if kind in CELLS else torch.randn(9, 2, 3, dtype=dtype)
    width = 2 if projects else 4
    state = None
    if start is not None:
        shapes = [(2, width), (2, 4)] if kind in CELLS else [(1, 2, width), (1, 2, 4)]
        state = tuple(torch.zeros(shape, dtype=start) for shape in shapes)
        state = state if kind in (nn.LSTM, nn.LSTMCell) else state[0]
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [9, 4])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), cs.packed_weights(ours):
        expected, found = under_autocast(theirs, x, state), flat(ours(x, state))
        assert "under torch.autocast" in cs.plan(ours)[0]
    assert "autocast" not in cs.plan(ours)[0]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert runs
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < tolerances.BFLOAT16


@pytest.mark.parametrize("lengths", [[5], [5, 5], [1, 1], [5, 3]], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_autocast_gives_packed_rows_the_dtypes_that_pytorch_gives(kind, lengths, runs):
    if torch.__version__ < (2, 13) and kind is nn.LSTM and len(set(lengths)) == 1:
        pytest.skip("PyTorch gave these float32, unlike other rows")
    theirs, ours = pair(kind, 3, 4)
    x = pack_sequence([torch.randn(length, 3) for length in lengths])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, found = under_autocast(theirs, x), flat(ours(x))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert runs


def test_pytorch_runs_transforms():
    theirs, ours = pair(nn.LSTM, 3, 4)
    x = torch.randn(5, 2, 3)
    weights = {name: w * 2 for name, w in theirs.state_dict().items()}
    same(torch.func.functional_call(ours, weights, x), torch.func.functional_call(theirs, weights, x), 1e-6)
    first, second = (
        torch.func.grad(lambda w, module=m: torch.func.functional_call(module, w, x)[0].sum())(weights)
        for m in (ours, theirs)
    )
    for name in weights:
        torch.testing.assert_close(first[name], second[name])


@pytest.mark.filterwarnings("ignore")  # deprecation warnings of tracing and scripting
def test_tracing_records_pytorch_and_scripting_is_refused():
    theirs, ours = pair(nn.LSTM, 3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    expected = theirs(x)
    same(torch.jit.trace(ours, x, check_trace=False)(x), expected, 1e-6)
    model = nn.Sequential(ours)
    with pytest.raises(RuntimeError, match=r"jit.script doesn't support .*: call cellstack.restore\(model\) before"):
        torch.jit.script(model)
    torch.jit.script(cs.restore(model))


class Chain(nn.Module):
    """Recurrent modules in sequence, whose forward has local variables."""

    def __init__(self, kind, count, states=False, **rest):
        super().__init__()
        width = rest.get("proj_size", 4) * (1 + rest.get("bidirectional", False))
        self.parts = nn.ModuleList(kind(4, 4, **rest) for _ in range(count))
        self.heads = nn.ModuleList(nn.Linear(width, 4) for _ in range(count))
        self.states = states

    def forward(self, x):
        state = None
        for part, head in zip(self.parts, self.heads, strict=True):
            y, last = part(x, state)
            state = last if self.states else None
            x = head(y.data if isinstance(y, PackedSequence) else y)
            x = PackedSequence(x, *y[1:]) if isinstance(y, PackedSequence) else x
        return x, last


class OfPacked(nn.Module):
    def __init__(self, *args, **rest):
        super().__init__()
        self.chain = Chain(*args, **rest)

    def forward(self, x):
        y, last = self.chain(pack_padded_sequence(x, torch.arange(len(x), len(x) - x.shape[1], -1).clamp(min=1)))
        return y.data, last


TRACED = {
    "one": (1, 4, {}),
    "two": (2, 4, {}),
    "one step": (2, 1, {}),
    "many steps": (2, 12, {}),
    "three": (3, 2, {}),
    "states": (2, 4, {"states": True}),
    "both directions": (2, 2, {"bidirectional": True}),
    "projected": (2, 4, {"proj_size": 3, "states": True}),
}


@pytest.mark.filterwarnings("ignore")  # deprecation warnings of tracing
@pairs.parametrize(
    "kind, name, training",
    [*MODULES, OwnLSTM],
    list(TRACED),
    [False, True],
    unless=lambda kind, name, training: name == "projected" and not issubclass(kind, nn.LSTM),
)
def test_a_model_of_several_modules_passes_the_checks_of_a_trace(kind, name, training):
    count, steps, options = TRACED[name]
    chain = OfPacked if name in ("two", "states") and training else Chain
    theirs, ours = pair(chain, kind, count, **options)
    x = torch.randn(steps, 2, 4)
    same(torch.jit.trace(ours.train(training), x)(x), theirs.train(training)(x), 1e-6)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_cell_takes_sparse_inputs_as_pytorch_does(kind, layout, runs):
    theirs, ours = pair(kind, 3, 4)
    x = getattr(torch.randn(2, 3), layout)()
    with torch.no_grad(), cs.packed_weights(ours):
        same(ours(x), theirs(x), 0.0)
    assert not runs


def result_of(call):
    try:
        return call()
    except RuntimeError as error:
        return str(error)


def test_pytorch_runs_a_module_with_sparse_weights():
    theirs, ours = pair(nn.LSTMCell, 3, 4)
    for module in (theirs, ours):
        module.weight_ih = nn.Parameter(module.weight_ih.detach().to_sparse())
    assert cs.plan(ours) == ("LSTMCell 3 -> 4: PyTorch: its weights are sparse",)
    with torch.no_grad(), cs.packed_weights(ours):
        found, expected = (result_of(lambda m=module: m(torch.ones(2, 3))[0].tolist()) for module in (ours, theirs))
    assert found == expected


def test_a_compiled_model_gives_the_same_results_and_trains():
    theirs, ours = pair(nn.LSTM, 3, 4)
    x = torch.randn(5, 2, 3)
    compiled = torch.compile(ours, backend="aot_eager")
    same(compiled(x), theirs(x), 1e-6)
    compiled(x)[0].sum().backward(), theirs(x)[0].sum().backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)


def test_data_parallel_training_in_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        theirs, ours = pair(nn.LSTM, 3, 4)
        x = torch.randn(5, 2, 3)
        nn.parallel.DistributedDataParallel(ours)(x)[0].sum().backward()
        theirs(x)[0].sum().backward()
        torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_accelerating_twice_changes_nothing():
    module = cs.accelerate(nn.LSTM(3, 4))
    kind = type(module)
    assert type(cs.accelerate(module)) is kind
    assert accelerated.class_of(nn.LSTM) is kind
    kind_of_cells = type(cs.accelerate(nn.LSTMCell(3, 4)))
    assert issubclass(kind_of_cells, nn.LSTMCell)
    assert not issubclass(kind_of_cells, nn.LSTM)


# ── unusual programs ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_outputs_can_be_written_to_like_those_of_pytorch(kind, first, runs):
    theirs, ours = pair(kind, 3, 4, batch_first=first)
    for module in (theirs, ours):
        y = module(torch.ones(5, 2, 3))[0]
        y[0] = 0
        y.relu_()
        y.sum().backward()
    assert runs
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("hx", [[torch.zeros(1, 2, 4)], (torch.zeros(1, 2, 4),)])
def test_a_state_in_a_list_is_refused_unless_it_is_a_pair(hx, runs):
    theirs, ours = pair(nn.GRU, 3, 4)
    for x in (torch.ones(5, 2, 3), pack_sequence([torch.ones(3, 3), torch.ones(2, 3)])):
        for module in (theirs, ours):
            with pytest.raises(AttributeError, match="has no attribute"):
                module(x, hx)
    assert not runs


def test_packed_rows_of_another_width_are_refused():
    _, ours = pair(nn.LSTM, 3, 4)
    with pytest.raises(RuntimeError, match=r"must be equal to input_size. Expected 3, got 5"):
        ours(pack_sequence([torch.ones(3, 5)]))


def test_weights_parametrised_afterwards_are_used_and_restored(runs):
    theirs, ours = pair(nn.LSTM, 3, 4)
    x = torch.randn(5, 2, 3)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh_l0", nn.Tanh())
    with torch.no_grad():
        same(ours(x), theirs(x), 1e-6)
        assert runs
        assert "fused cpu kernel" in cs.plan(ours)[0]
        same(copy.deepcopy(ours)(x), theirs(x), 1e-6)
        count = len(runs)
        cs.restore(ours)
        same(ours(x), theirs(x), 1e-6)
        same(copy.deepcopy(ours)(x), theirs(x), 1e-6)
        assert len(runs) == count
        assert "weights are parametrised" in cs.plan(ours)[0]
        for module in (theirs, ours):
            parametrize.remove_parametrizations(module, "weight_hh_l0")
        assert type(ours) is nn.LSTM
        same(ours(x), theirs(x), 1e-6)


def test_a_cell_parametrised_afterwards_is_followed_while_packed(runs):
    theirs, ours = pair(nn.GRUCell, 3, 4)
    x = torch.randn(2, 3)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh", nn.Tanh())
    with torch.no_grad(), cs.packed_weights(ours):
        for _ in range(4):  # each call computes a tensor, possibly at the address of the last one
            same(ours(x, torch.ones(2, 4)), theirs(x, torch.ones(2, 4)), 1e-6)
            for module in (theirs, ours):
                module.parametrizations.weight_hh.original.mul_(1.5)
    assert runs


def test_packed_contexts_may_end_in_any_order():
    _, ours = pair(nn.LSTM, 3, 4)
    first, second = cs.packed_weights(ours), cs.packed_weights(ours)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert ours._packed is not None
    second.__exit__(None, None, None)
    assert ours._packed is None
    assert not {"_packed", "_contexts"} & set(vars(ours))
    with cs.packed_weights(ours), torch.no_grad():
        ours(torch.ones(20, 2, 3))
        cs.restore(ours)
        assert not {"_packed", "_contexts"} & set(vars(ours))
        pickle.dumps(ours)
    assert not {"_packed", "_contexts"} & set(vars(ours))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_weights_created_in_inference_mode_can_be_packed(kind, runs):
    with torch.inference_mode():
        theirs, ours = pair(kind, 3, 4)
        x = torch.ones(2, 3) if kind in CELLS else torch.ones(5, 2, 3)
        with cs.packed_weights(ours):
            for _ in range(2):
                same(ours(x), theirs(x), 1e-6)
                for module in (theirs, ours):
                    next(module.parameters()).mul_(2)
    assert len(runs) == 2


def test_packed_weights_are_not_used_for_a_later_tensor_at_the_same_address():
    theirs, ours = pair(nn.LSTM, 3, 4)
    x = torch.ones(5, 2, 3)
    with torch.no_grad(), cs.packed_weights(ours):
        for scale in range(1, 30):
            for module in (theirs, ours):
                module.weight_hh_l0 = None
                module.weight_hh_l0 = nn.Parameter(torch.full((16, 4), scale / 30))
            same(ours(x), theirs(x), 1e-6)


def test_shallow_copies_are_accelerated_too():
    _, ours = pair(nn.LSTM, 3, 4)
    copied = copy.copy(ours)
    assert type(copied) is type(ours)
    assert copied.weight_hh_l0 is ours.weight_hh_l0


class Reduced(nn.LSTM):
    """A class that defines how it is copied and pickled."""

    def __init__(self, width, units, tag="new"):
        super().__init__(width, units)
        self.tag = tag

    def __reduce__(self):
        return type(self), (self.input_size, self.hidden_size, self.tag + ", reduced"), self.__getstate__() | {"own": 1}

    def __setstate__(self, state):
        super().__setstate__({**state, "tag": self.tag})


class Copied(nn.GRU):
    def __deepcopy__(self, memo):
        new = type(self)(self.input_size, self.hidden_size)
        new.own = True
        return new


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_copy_and_pickle_methods_of_a_class_are_called(protocol):
    ours = cs.accelerate(Reduced(3, 4))
    loaded, copied = pickle.loads(pickle.dumps(ours, protocol)), copy.deepcopy(ours)
    assert type(loaded) is Reduced
    assert type(copied) is type(ours)
    for module in (loaded, copied):
        assert (module.tag, module.own) == ("new, reduced", 1)
        assert torch.equal(module.weight_hh_l0, ours.weight_hh_l0)
    ours = cs.accelerate(Copied(3, 4))
    assert copy.deepcopy(ours).own
    assert type(copy.deepcopy(ours)) is type(ours)
    assert type(pickle.loads(pickle.dumps(ours, protocol))) is Copied


def test_init_subclass_of_a_user_s_class_is_not_called_for_ours():
    heard = []

    class Listed(nn.LSTM):
        def __init_subclass__(cls, *, name, **rest):
            heard.append(name)

    module = cs.accelerate(Listed(3, 4))
    assert "fused cpu kernel" in cs.plan(module)[0]
    assert not heard


class Strict(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise ValueError("no")


def test_a_class_that_overrides_a_check_stays_with_pytorch():
    model = cs.accelerate(nn.ModuleList([Strict(3, 4), nn.GRU(3, 4)]))
    assert cs.plan(model)[0] == "0: Strict 3 -> 4: PyTorch: Strict overrides check_forward_args"
    with pytest.raises(ValueError, match="no"):
        model[0](torch.ones(5, 2, 3))


class Lazy(nn.modules.lazy.LazyModuleMixin, nn.LSTM):
    cls_to_become = nn.LSTM

    def __init__(self, units):
        super().__init__(1, units)
        self.weight_ih_l0 = nn.UninitializedParameter()

    def reset_parameters(self):
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, x):
        self.input_size = x.shape[-1]
        self.weight_ih_l0.materialize((4 * self.hidden_size, self.input_size))
        self.reset_parameters()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_module_with_uninitialised_weights_is_not_accelerated_yet(runs):
    module = Lazy(4)
    with pytest.raises(ValueError, match="its weights aren't initialised yet"):
        cs.accelerate(module)
    x = torch.ones(20, 2, 3)
    y = module(x)[0]
    assert not runs
    same([cs.accelerate(module)(x)[0]], [y], 1e-6)
    assert runs


# ── weights in PyTorch's layout ───────────────────────────────────────────────────────────────────────────────────────

CELLS_IN_ROWS = {
    "lstm": CellSpec(5, 2),
    "lstm, projection": CellSpec(5, 2, proj_size=1),
    "gru": CellSpec(5, 2, kind="gru"),
    "rnn": CellSpec(5, 2, "relu", kind="rnn"),
}


@pairs.parametrize(
    "isa, name, units, dtype, bias",
    _kernel.isas(),
    list(CELLS_IN_ROWS),
    [2, 7, 16, 33, 130],
    [torch.float32, torch.float64],
    [True, False],
    also=(0, 2, 3),
)
def test_weights_in_pytorch_s_layout_give_the_same_bits(name, units, dtype, bias, isa):
    proj = (units + 1) // 2 if "projection" in name else 0
    spec = replace(CELLS_IN_ROWS[name], units=units, use_bias=bias, proj_size=proj)
    plain, in_rows = op.CellCall(spec), op.CellCall(spec, torch_layout=True)
    torch.manual_seed(0)
    rows = [torch.randn(shape, dtype=dtype) * 0.3 for shape in in_rows.shapes.values()]
    columns = [array.contiguous() for array in kernel_calls.in_columns(in_rows, rows)]
    before = _kernel.isa()
    _kernel.set_isa(isa)
    try:
        found = [
            results_and_gradients(cell, weights, time_major)
            for cell, weights in ((plain, columns), (in_rows, rows))
            for time_major in (False, True)
        ]
    finally:
        _kernel.set_isa(before)
    for results, gradients in found[1:]:
        for a, b in zip(results, found[0][0], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(gradients[:4], found[0][1][:4], strict=True):
            assert torch.equal(a, b)
    wanted = found[0][1][4:]
    assert all(torch.equal(a, b) for a, b in zip(found[1][1][4:], wanted, strict=True))
    for _, gradients in found[2:]:  # convert those of PyTorch's layout
        turned = list(gradients[4:])
        if bias:
            assert name == "gru" or torch.equal(turned[2], turned[3])
            turned[2:4] = [torch.zeros_like(turned[2]), turned[3]] if name != "gru" else turned[2:4]
        for a, b in zip(kernel_calls.in_columns(in_rows, turned), wanted, strict=True):
            assert torch.equal(a, b)


def results_and_gradients(cell, weights, time_major):
    """Return a call's results, y with the batch first, and the gradients of x, the state and the weights."""
    torch.manual_seed(1)
    dtype = weights[0].dtype
    x = torch.randn(9, 3, cell.spec.input_size, dtype=dtype).transpose(0, 1)
    starts = [torch.randn(3, size, dtype=dtype) for size in cell.sizes]
    mask = torch.rand(3, 9) < 0.8
    leaves = [t.clone().requires_grad_() for t in (x, *starts, *weights)]
    count = len(starts)
    call = op.OpCall(leaves[0], leaves[1 : 1 + count], leaves[1 + count :], [], mask, None, [cell], save=True)
    out = op.run_op(call._replace(time_major=time_major))
    results = [*out[:count], out[count].transpose(0, 1) if time_major else out[count], out[count + 1]]
    draws = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=draws, dtype=dtype)).sum() for t in results)
    gradients = torch.autograd.grad(loss, leaves)
    pad = [torch.zeros(())] * (3 - 1 - count)
    return results, [gradients[0], *gradients[1 : 1 + count], *pad, torch.zeros(()), *gradients[1 + count :]]

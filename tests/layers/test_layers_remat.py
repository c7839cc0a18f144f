"""`remat=True`: the backward pass recomputes the gates, with the same bits, to save memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_sequence

from cellstack import layers
from cellstack.layers import op

STEPS, WIDTH, UNITS = 37, 6, 20
CELLS = {
    "lstm": lambda: layers.LSTMCell(UNITS),
    "every flag": lambda: layers.LSTMCell(
        UNITS, peepholes=True, coupled=True, layer_norm=True, clip=3.0, cell_clip=2.0, zoneout=0.2, zoneout_cell=0.1,
        proj_size=7, learn_initial_state=True, recurrent_dropout=0.3, dropout=0.2, seed=3,
    ),
    "dropout": lambda: layers.LSTMCell(UNITS, recurrent_dropout=0.3, zoneout=0.1, seed=3),
    "gru": lambda: layers.GRUCell(UNITS, recurrent_dropout=0.3, seed=3),
    "gru, reset before": lambda: layers.GRUCell(UNITS, reset_after=False, recurrent_dropout=0.3, zoneout=0.2, seed=3),
    "gru, norm": lambda: layers.GRUCell(UNITS, layer_norm=True),
    "rnn": lambda: layers.SimpleRNNCell(UNITS, layer_norm=True),
}  # fmt: skip


def twins(make, **flags):
    """The same layer twice, the second with remat."""
    torch.manual_seed(1)
    plain, again = (
        layers.RNN(make(), return_sequences=True, input_size=WIDTH, remat=r, **flags) for r in (False, True)
    )
    again.set_weights(plain.get_weights())
    return plain, again


def results(layer, x, **call):
    """The results of a training step: outputs, and gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, *rest = layer(x, **call) if layer.return_state else (layer(x, **call),)
    sums = [part for state in rest for part in state]
    sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in (y, *sums)).backward()
    return [y, *sums, x.grad, *(parameter.grad for parameter in layer.parameters())]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["direct", "registered"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backwards", [False, True])
def test_outputs_and_gradients_have_the_same_bits(cell, backwards, path, monkeypatch):
    if path == "registered":
        monkeypatch.setattr(op, "direct", lambda x: False)
    x = torch.randn(3, STEPS, WIDTH)
    call = {"mask": torch.rand(3, STEPS) < 0.8, "reset": torch.rand(3, STEPS) < 0.2}
    for given in ({}, call):
        plain, again = twins(CELLS[cell], go_backwards=backwards, return_state=True)
        plain.train(), again.train()
        assert_same(results(again, x, **given), results(plain, x, **given))


def test_stacks_and_packed_rows_and_both_directions():
    x = torch.randn(3, STEPS, WIDTH)
    plain, again = twins(lambda: [layers.LSTMCell(5), layers.GRUCell(9), layers.SimpleRNNCell(4)])
    assert_same(results(again, x), results(plain, x))
    rows = [torch.randn(length, WIDTH) for length in (9, 4, 1)]
    packed = [layer(pack_sequence(rows)).data for layer in (plain, again)]
    assert torch.equal(*packed)
    for layer, out in zip((plain, again), packed, strict=True):
        layer.zero_grad()
        out.square().sum().backward()
    assert_same([p.grad for p in again.parameters()], [p.grad for p in plain.parameters()])
    both = [layers.Bidirectional(layer) for layer in twins(CELLS["lstm"])]
    both[1].set_weights(both[0].get_weights())
    assert both[1].backward_layer.remat
    assert_same(results_of_both(both[1], x), results_of_both(both[0], x))


def results_of_both(layer, x):
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in layer.parameters())]


def kept(call):
    """Bytes of the tensors that a call saves for its backward pass, each counted once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize(("cell", "plain_arrays", "again_arrays"), [("lstm", 6, 2), ("gru", 5, 1)])
def test_the_saved_values_per_step_and_unit(cell, plain_arrays, again_arrays):
    flags = {"lstm": layers.LSTMCell, "gru": layers.GRUCell}[cell]
    plain, again = twins(lambda: flags(UNITS))
    x, every = torch.randn(8, STEPS, WIDTH), 8 * STEPS * UNITS * 4
    rest = x.nbytes + sum(p.nbytes for p in plain.parameters())
    assert kept(lambda: plain(x)) == rest + plain_arrays * every
    assert kept(lambda: again(x)) == rest + again_arrays * every


def test_returned_gates_are_saved():
    plain, again = twins(CELLS["lstm"])
    x = torch.randn(2, STEPS, WIDTH)
    traces = [layer(x, return_gates=True)[1] for layer in (plain, again)]
    for a, b in zip(*traces, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad


def test_second_derivatives():
    found = []
    for layer in twins(CELLS["lstm"]):
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.long
def test_opcheck_is_clean():
    cell = layers.LSTMCell(3, input_size=2, layer_norm=True)
    arrays = [array.detach().requires_grad_() for array in cell.arrays()]
    given = torch.randn(2, 4, 2, requires_grad=True), [], arrays, [], None, None, [cell._call.recomputing.text]
    torch.library.opcheck(op.recurrent, (*given, False, True, True, 0, False))


def test_the_plan_reports_remat():
    (line,) = layers.LSTM(4, remat=True, input_size=2).plan()
    assert line.endswith("backward recomputes the gates")
    (line,) = layers.LSTM(4, remat=True, input_size=2, dtype="bfloat16").plan()
    assert line.endswith("no effect: remat=True")
    with pytest.raises(TypeError, match="remat"):
        layers.LSTM(4, remat=2)
    assert "remat=True" in repr(layers.GRU(4, remat=True))

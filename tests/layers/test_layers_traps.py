"""The tutorial's steps, and cases in which Keras's behaviour is surprising and ours isn't."""

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from cellstack import layers
from cellstack.layers import ShapeError, State

# ── The tutorial, with our layers ─────────────────────────────────────────────────────────────────────────────────────

LSTM_CELL_SIZE = 4
STACK_INPUT = [
    [[1, 2, 3, 4, 3, 2], [1, 2, 1, 1, 1, 2], [1, 2, 2, 2, 2, 2]],
    [[1, 2, 3, 4, 3, 2], [3, 2, 2, 1, 1, 2], [0, 0, 0, 0, 3, 2]],
]


def test_the_tiny_lstm_of_the_tutorial():
    state = (torch.zeros([1, LSTM_CELL_SIZE]),) * 2
    lstm = layers.LSTM(LSTM_CELL_SIZE, return_sequences=True, return_state=True)
    lstm.states = state
    assert all(torch.equal(a, b) for a, b in zip(lstm.states, state, strict=True))
    sample_input = [[3, 2, 2, 2, 2, 2]]
    inputs = torch.tensor(np.reshape(sample_input, (1, 1, 6)), dtype=torch.float32)
    output, final_memory_state, final_carry_state = lstm(inputs)
    assert list(output.shape) == [1, 1, 4]
    assert list(final_memory_state.shape) == [1, 4]
    assert list(final_carry_state.shape) == [1, 4]


def test_the_stacked_lstm_of_the_tutorial():
    cells = []
    cells.append(layers.LSTMCell(4))
    cells.append(layers.LSTMCell(5))
    stacked_lstm = layers.StackedRNNCells(cells)
    lstm_layer = layers.RNN(stacked_lstm, return_sequences=True, return_state=True)
    x = torch.tensor(np.reshape(STACK_INPUT, (2, 3, 6)), dtype=torch.float32)
    output, final_memory_state, final_carry_state = lstm_layer(x)
    assert list(output.shape) == [2, 3, 5]
    assert list(final_memory_state.shape) == [2, 2, 4]
    assert list(final_carry_state.shape) == [2, 2, 5]
    h, _c = final_carry_state
    assert torch.equal(h, output[:, -1])


def test_plain_lists_and_integers_are_taken():
    lstm = layers.LSTM(3)
    as_list, as_array = lstm(STACK_INPUT), lstm(np.array(STACK_INPUT))
    assert torch.equal(as_list, as_array)
    assert torch.equal(as_list, lstm(torch.tensor(STACK_INPUT)))
    assert torch.equal(as_list, lstm(np.array(STACK_INPUT, dtype=np.float64)))


# ── Traps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_1_states_that_were_set_are_used():
    lstm = layers.LSTM(4, input_size=3)
    x, h, c = torch.randn(2, 5, 3), torch.randn(2, 4), torch.randn(2, 4)
    expected = lstm(x, initial_state=(h, c))
    plain = lstm(x)
    for state in ((h, c), [h, c], State(h, c), (h.numpy(), c.numpy()), torch.stack([h, c])):
        lstm.states = state
        assert isinstance(lstm.states, State)
        assert torch.equal(lstm(x), expected)
        assert lstm.states is None
        assert torch.equal(lstm(x), plain)
    assert not torch.equal(expected, plain)


def test_1_a_refused_call_keeps_the_states():
    lstm = layers.LSTM(4, input_size=3)
    lstm.states = torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(ShapeError, match="batch of 2"):
        lstm(torch.randn(3, 5, 3))
    assert lstm.states is not None


def test_1_states_of_a_stack_and_of_both_directions():
    rnn = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], input_size=3)
    x = torch.randn(2, 5, 3)
    states = [(torch.randn(2, units), torch.randn(2, units)) for units in (4, 5)]
    rnn.states = states
    assert [state.shape for state in rnn.states] == [(2, 2, 4), (2, 2, 5)]
    assert torch.equal(rnn(x), rnn(x, initial_state=states))
    both = layers.Bidirectional(layers.LSTM(4), input_size=3)
    states = [torch.randn(2, 4) for _ in range(4)]
    both.states = states
    assert len(both.states) == 4
    assert torch.equal(both(x), both(x, initial_state=states))
    assert not torch.equal(both(x), both(x, initial_state=states))


def test_2_reset_states_resets_all_some_or_sets():
    rnn = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], stateful=True, input_size=3)
    x = torch.randn(3, 2, 3)
    first = rnn(x)
    kept = [torch.stack(tuple(state)) for state in rnn.states]
    rnn.reset_states(indices=[0, 2])
    for state, before in zip(rnn.states, kept, strict=True):
        after = torch.stack(tuple(state))
        assert torch.count_nonzero(after[:, [0, 2]]) == 0
        assert torch.equal(after[:, 1], before[:, 1])
    rows = [(torch.ones(1, units), torch.ones(1, units)) for units in (4, 5)]
    rnn.reset_states(rows, indices=1)
    assert torch.equal(rnn.states[1].c[1], torch.ones(5))
    rnn.reset_states()
    assert rnn.states is None
    assert torch.equal(rnn(x), first)
    rnn.reset_states([(torch.ones(3, u), torch.ones(3, u)) for u in (4, 5)])
    assert torch.equal(rnn.states[0].h, torch.ones(3, 4))
    with pytest.raises(IndexError, match="batch of 3"):
        rnn.reset_states(indices=[3])
    with pytest.raises(ShapeError, match="B=2"):
        rnn.reset_states(rows, indices=[0, 1])
    rnn.reset_states()
    with pytest.raises(ShapeError, match="indices need a state"):
        rnn.reset_states(indices=[0])


@pytest.mark.parametrize("masked", [False, True])
def test_3_a_stack_of_one_cell(masked):
    cell = layers.LSTMCell(4, input_size=3)
    x = torch.randn(2, 5, 3)
    mask = torch.rand(2, 5) < 0.5 if masked else None
    y, state = layers.RNN([cell], return_sequences=True, return_state=True)(x, mask=mask)
    z, h, c = layers.RNN(cell, return_sequences=True, return_state=True)(x, mask=mask)
    assert torch.equal(y, z)
    assert torch.equal(state.h, h)
    assert torch.equal(state.c, c)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_4_dropout_works_in_every_combination(seed, dropout, recurrent_dropout, masked, stateful, both):
    cells = [
        layers.LSTMCell(units, dropout=dropout, recurrent_dropout=recurrent_dropout, seed=seed) for units in (40, 50)
    ]
    layer = layers.RNN(cells, return_sequences=True, stateful=stateful)
    layer = layers.Bidirectional(layer) if both else layer
    x = torch.randn(2, 4, 30)
    mask = torch.tensor([[True] * 4, [True, False, True, False]]) if masked else None
    dropped = layer(x, mask=mask)
    dropped.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())
    if stateful:
        layer.reset_states()
    again = layer(x, mask=mask)
    assert torch.equal(again, dropped) == (dropout == recurrent_dropout == 0.0)
    layer.eval()
    if stateful:
        layer.reset_states()
    calm = layer(x, mask=mask)
    if stateful:
        layer.reset_states()
    assert torch.equal(layer(x, mask=mask, training=False), calm)


def test_4_masks_are_drawn_once_a_call_and_scaled():
    cell = layers.LSTMCell(1000, dropout=0.25, recurrent_dropout=0.5, seed=1, input_size=1000)
    x_mask, h_mask, *_ = cell.masks(4, 1, True)
    assert x_mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert h_mask.unique().tolist() == [0.0, 2.0]
    assert abs(float(x_mask.mean()) - 1.0) < 0.05
    assert abs(float(h_mask.mean()) - 1.0) < 0.05
    # Constant input and a cell without memory: every step has the same output.
    cell = layers.LSTMCell(8, dropout=0.5, recurrent_activation="linear", input_size=6)
    with torch.no_grad():
        cell.recurrent_kernel.zero_()
        cell.kernel[:, 8:16] = 0.0
        cell.bias[8:16] = 0.0
    y = layers.RNN(cell, return_sequences=True)(torch.randn(2, 1, 6).expand(2, 5, 6))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


def test_4_a_seed_makes_masks_repeatable_and_resumable():
    def make():
        return layers.LSTM(6, dropout=0.5, recurrent_dropout=0.5, seed=7, input_size=5)

    a, b, x = make(), make(), torch.randn(2, 3, 5)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert not torch.equal(a(x), a(x))
    resumed = make()
    resumed.load_state_dict(a.state_dict())
    assert torch.equal(a(x), resumed(x))


def test_4_both_directions_draw_masks_from_their_seed():
    def masks(layer):
        return layer.cell.masks(2, 1, True)[:2]

    both = layers.Bidirectional(layers.LSTM(6, dropout=0.5, recurrent_dropout=0.5, seed=7), input_size=5)
    for ahead, back in zip(masks(both.forward_layer), masks(both.backward_layer), strict=True):
        assert torch.equal(ahead, back)
    given = [layers.LSTM(6, dropout=0.5, seed=seed, go_backwards=seed == 8) for seed in (7, 8)]
    both = layers.Bidirectional(given[0], backward_layer=given[1], input_size=50)
    assert not torch.equal(masks(both.forward_layer)[0], masks(both.backward_layer)[0])


@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_5_a_leading_masked_step_emits_the_initial_h(return_sequences, go_backwards, stacked):
    cell = [layers.LSTMCell(5), layers.LSTMCell(4)] if stacked else layers.LSTMCell(4)
    rnn = layers.RNN(cell, return_sequences=return_sequences, go_backwards=go_backwards, input_size=3)
    state = [(torch.randn(2, u), torch.randn(2, u)) for u in (5, 4)] if stacked else (torch.randn(2, 4),) * 2
    top = state[1] if stacked else state
    mask = torch.tensor([[False, False, False], [False, True, False]])
    y = rnn(torch.randn(2, 3, 3), initial_state=state, mask=mask)
    if return_sequences:
        assert torch.equal(y[:, 0], top[0])
        assert torch.equal(y[0], top[0][0].expand(3, 4))
        assert torch.equal(y[1, 1], y[1, 2])
    else:
        assert torch.equal(y[0], top[0][0])


def test_6_a_stateful_layer_keeps_the_final_state_after_initial_state():
    lstm = layers.LSTM(4, stateful=True, return_state=True, input_size=3)
    x, start = torch.randn(2, 5, 3), (torch.randn(2, 4), torch.randn(2, 4))
    _, h, c = lstm(x, initial_state=start)
    assert torch.equal(lstm.states.h, h)
    assert torch.equal(lstm.states.c, c)
    assert not lstm.states.h.requires_grad
    twin = layers.LSTM(4, return_state=True)
    twin.load_state_dict({key: value for key, value in lstm.state_dict().items() if "states" not in key})
    assert torch.equal(lstm(x)[0], twin(x, initial_state=(h, c))[0])
    lstm.states = start
    assert torch.equal(lstm(x)[0], twin(x, initial_state=start)[0])
    with pytest.raises(ShapeError, match="reset_states"):
        lstm(torch.randn(3, 5, 3))


def test_7_the_state_is_saved_and_loaded_with_the_model(tmp_path):
    def make():
        return layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], stateful=True)

    rnn, x = make(), torch.randn(2, 5, 3)
    rnn(x)
    torch.save(rnn.state_dict(), tmp_path / "rnn.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "rnn.pt", weights_only=True))
    assert torch.equal(other(x), rnn(x))
    torch.save(rnn, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), rnn(x))


class Counting(torch.nn.Module):
    state_size = 3

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, states):
        self.calls += 1
        h = torch.tanh(x[:, :3] + states[0])
        return h, [h]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_8_a_stack_evaluates_each_cell_exactly_t_times(masked, dropout):
    cells = [Counting(), layers.LSTMCell(4, dropout=dropout), Counting()]
    steps = []
    plain = cells[1].step
    cells[1].step = lambda *args: (steps.append(1), plain(*args))[1]
    layers.RNN(cells)(torch.randn(2, 7, 5), mask=torch.rand(2, 7) < 0.5 if masked else None)
    assert [cells[0].calls, len(steps), cells[2].calls] == [7, 7, 7]


def test_9_no_steps_return_empty_sequences_and_the_initial_state():
    rnn = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_sequences=True, return_state=True)
    start = [(torch.randn(2, units), torch.randn(2, units)) for units in (4, 5)]
    y, *states = rnn(torch.zeros(2, 0, 3), initial_state=start)
    assert y.shape == (2, 0, 5)
    for state, (h, c) in zip(states, start, strict=True):
        assert torch.equal(state.h, h)
        assert torch.equal(state.c, c)
    assert torch.equal(layers.LSTM(4)(torch.zeros(2, 0, 3)), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan"), "half"])
def test_10_a_dropout_of_one_is_refused(name, value):
    for make in (layers.LSTM, layers.LSTMCell):
        with pytest.raises(ValueError, match=name):
            make(4, **{name: value})


def test_the_state_is_a_copy():
    lstm = layers.LSTM(4, input_size=3, return_state=True, stateful=True)
    with torch.no_grad():
        y, h, c = lstm(torch.randn(2, 5, 3))
        kept = [part.clone() for part in lstm.states]
        for given in (y, h, c):
            given.zero_()
        assert all(torch.equal(a, b) for a, b in zip(lstm.states, kept, strict=True))
        mine = torch.ones(2, 4)
        lstm.states = (mine, mine)
        mine.zero_()
        assert (lstm.states.h == 1).all()


def test_rows_may_be_given_as_a_mask():
    lstm = layers.LSTM(4, input_size=3, stateful=True)
    lstm(torch.randn(3, 5, 3))
    lstm.reset_states(indices=torch.tensor([False, False, True]))
    assert [bool(row.any()) for row in lstm.states.h] == [True, True, False]
    with pytest.raises(layers.ShapeError, match=r"bool mask \[B=3\], got \(2,\)"):
        lstm.reset_states(indices=[True, False])
    with pytest.raises(TypeError, match="integers or a bool mask"):
        lstm.reset_states(indices=[1.9])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_that_would_differ_is_refused(reentrant):
    x = torch.randn(2, 5, 3, requires_grad=True)
    plain = layers.LSTM(4, input_size=3, dropout=0.5)
    torch.manual_seed(1)
    checkpoint(plain, x, use_reentrant=reentrant).sum().backward()
    again, plain.cell.kernel.grad = plain.cell.kernel.grad, None
    torch.manual_seed(1)
    plain(x).sum().backward()
    torch.testing.assert_close(plain.cell.kernel.grad, again)

    seeded = layers.LSTM(4, input_size=3, dropout=0.5, seed=1)
    stateful = layers.LSTM(4, input_size=3, stateful=True)
    stateful(x)
    once = layers.LSTM(4, input_size=3)
    once.states = (torch.ones(2, 4), torch.ones(2, 4))
    for layer, message in ((seeded, "seed="), (stateful, "initial_state="), (once, "initial_state=")):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=message):
            y.sum().backward()


def test_inference_mode_does_not_spoil_training():
    lstm = layers.LSTM(4, stateful=True)
    with torch.inference_mode():
        lstm(torch.randn(2, 5, 3))
    lstm(torch.randn(2, 5, 3)).sum().backward()
    assert lstm.cell.kernel.grad is not None


def test_hooks_that_would_not_run_are_refused():
    lstm = layers.LSTM(4, input_size=3)
    prune.l1_unstructured(lstm.cell, "kernel", 0.5)
    with pytest.raises(TypeError, match=r"prune\.remove"):
        lstm(torch.randn(2, 5, 3))
    prune.remove(lstm.cell, "kernel")
    assert (lstm.cell.kernel == 0).sum() >= 24
    lstm(torch.randn(2, 5, 3))


def test_arrays_of_any_kind_are_taken():
    lstm = layers.LSTM(4, input_size=3)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    for given in (x[:, ::-1], x.astype(">f4"), x.astype(np.longdouble), x.astype(">f8")):
        expected = lstm(torch.from_numpy(np.array(given, np.float32)))
        torch.testing.assert_close(lstm(given), expected)


def test_a_negated_view_has_the_right_values():
    lstm = layers.LSTM(4, input_size=3)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(lstm(torch._neg_view(x)), lstm(-x))
    state = torch.randn(2, 4), torch.randn(2, 4)
    negated = [torch._neg_view(part) for part in state]
    torch.testing.assert_close(lstm(x, initial_state=negated), lstm(x, initial_state=[-part for part in state]))
    given = torch.randn(2, 4)
    grads = [torch.autograd.grad(lstm(x), lstm.cell.kernel, g)[0] for g in (torch._neg_view(given), -given)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("width", [1, 3, 9, 1000])
def test_a_stack_refuses_a_cell_with_weights_for_another_width_than_that_below(width):
    cells = [layers.LSTMCell(4, input_size=2), layers.LSTMCell(3, input_size=width)]
    message = f"cell 1 has weights for input_size {width}, but the cell below it returns 4 values"
    with pytest.raises(ShapeError, match=message):
        layers.RNN(cells)
    stack = layers.RNN([layers.GRUCell(4), layers.GRUCell(3)], return_sequences=True)
    stack.cell.cells[0].build(2)
    stack.cell.cells[1].build(width)  # after it was put into the stack
    with pytest.raises(ShapeError, match=message):
        stack(torch.zeros(1, 5, 2))
    with pytest.raises(ShapeError, match=message):
        stack.cell(torch.zeros(1, 2), stack.cell.get_initial_state(1))


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN, layers.LSTMCell])
def test_sizes_in_pytorch_s_order_are_explained(kind):
    with pytest.raises(TypeError, match=r"got int 8: the first argument is units, and input_size= is the width of x"):
        kind(4, 8)


def test_pytorch_s_states_of_two_layers_are_not_read_as_the_pairs_of_two_cells():
    stack = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(4)], return_sequences=True, input_size=3)
    theirs = torch.nn.LSTM(3, 4, 2, batch_first=True)
    with torch.no_grad():
        for n, cell in enumerate(stack.cell.cells):
            cell.kernel.copy_(getattr(theirs, f"weight_ih_l{n}").T)
            cell.recurrent_kernel.copy_(getattr(theirs, f"weight_hh_l{n}").T)
            cell.bias.copy_(getattr(theirs, f"bias_ih_l{n}") + getattr(theirs, f"bias_hh_l{n}"))
    x, h, c = torch.randn(5, 6, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    with pytest.raises(ShapeError, match=r"two arrays \[2, 5, 4\] may be h and c of all layers, as in PyTorch"):
        stack(x, initial_state=(h, c))
    torch.testing.assert_close(stack(x, initial_state=list(zip(h, c, strict=True))), theirs(x, (h, c))[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_bidirectional_layer_returns_both_final_states_like_torch_s_h(kind):
    theirs = getattr(torch.nn, kind)(3, 4, batch_first=True, bidirectional=True)
    ours = layers.Bidirectional(getattr(layers, kind)(4), input_size=3)
    for end, layer in (("", ours.forward_layer), ("_reverse", ours.backward_layer)):
        w, r, b, s = (getattr(theirs, f"{name}_l0{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        gates = [1, 0, 2] if kind == "GRU" else range(4)  # torch's r z n, here z r g

        def turned(array, gates=gates):
            return torch.cat([array.chunk(len(gates))[n] for n in gates])

        bias = torch.stack([turned(b), turned(s)]) if kind == "GRU" else b + s
        with torch.no_grad():
            layer.cell.kernel.copy_(turned(w).T)
            layer.cell.recurrent_kernel.copy_(turned(r).T)
            layer.cell.bias.copy_(bias)
    x = torch.randn(2, 5, 3)
    h = theirs(x)[1][0] if kind == "LSTM" else theirs(x)[1]
    torch.testing.assert_close(ours(x), torch.cat((h[-2], h[-1]), 1))

"""Resets, lengths, PackedSequence, and truncated backpropagation."""

import gc

import numpy as np
import pytest
import tolerances
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from cellstack import layers
from cellstack.layers import ShapeError, truncated_backward

B, T, I, H = 3, 9, 3, 4  # noqa: E741
DOUBLE = {"dtype": "float64"}
MAKERS = {
    "lstm": lambda **flags: layers.LSTM(H, input_size=I, **DOUBLE, **flags),
    "lstm flags": lambda **flags: layers.LSTM(
        H, peepholes=True, proj_size=2, layer_norm=True, learn_initial_state=True, input_size=I, **DOUBLE, **flags
    ),
    "gru": lambda **flags: layers.GRU(H, learn_initial_state=True, input_size=I, **DOUBLE, **flags),
    "gru before": lambda **flags: layers.GRU(H, reset_after=False, input_size=I, **DOUBLE, **flags),
    "simple": lambda **flags: layers.SimpleRNN(H, input_size=I, **DOUBLE, **flags),
    "stack": lambda **flags: layers.RNN(
        layers.StackedRNNCells(
            [
                layers.LSTMCell(3, learn_initial_state=True, **DOUBLE),
                layers.GRUCell(3, **DOUBLE),
                layers.SimpleRNNCell(H, activation="gelu", **DOUBLE),
            ],
            residual=True,
        ),
        input_size=I,
        **flags,
    ),
}


@pytest.fixture(params=MAKERS)
def make(request):
    def made(**flags):
        layer = MAKERS[request.param](**flags)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        return layer

    return made


@pytest.fixture
def x():
    return torch.randn(B, T, I, dtype=torch.float64)


def flatten(results):
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    return [part for result in results for part in flatten(result)]


def assert_close(got, wanted, atol=tolerances.REFERENCE_DOUBLE):
    got, wanted = flatten(got), flatten(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(results, leaves):
    """The gradients of a sum in which every number has another weight; zeros if there is none."""
    generator = np.random.default_rng(0)
    loss = sum((part * torch.from_numpy(generator.normal(size=part.shape)).to(part)).sum() for part in flatten(results))
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


# ── Resets ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pieces(reset):
    """The first and last step of each piece of a row."""
    starts = sorted({0, *reset.nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], T], strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_resets_equal_separate_runs_of_the_pieces(make, direction, masked, x):
    layer = make(return_sequences=True, go_backwards=direction == "backward")
    layer = layers.Bidirectional(layer) if direction == "both" else layer
    reset = torch.rand(B, T) < 0.3
    reset[0, [2, 3]] = True  # a piece of one step
    mask = torch.rand(B, T) < 0.7 if masked else None
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = layer(x, mask=mask, reset=reset)
    rows = []
    for b in range(B):
        parts = [
            layer(x[b : b + 1, start:stop], mask=None if mask is None else mask[b : b + 1, start:stop])
            for start, stop in pieces(reset[b])
        ]
        rows.append(torch.cat(parts[::-1] if direction == "backward" else parts, dim=1))
    apart = torch.cat(rows)
    assert_close(y, apart)
    assert_close(gradients(y, leaves), gradients(apart, leaves))
    changed = x.detach().clone()
    changed[0, :2] += 1.0
    y, moved = y.detach(), layer(changed, mask=mask, reset=reset).detach()
    if direction == "backward":
        y, moved = y.flip(1), moved.flip(1)
    assert torch.equal(y[0, 2:], moved[0, 2:])  # the steps before change no bit


@pytest.mark.parametrize("go_backwards", [False, True])
def test_an_initial_state_applies_only_to_the_first_piece(make, go_backwards, x):
    layer = make(return_sequences=True, return_state=True, go_backwards=go_backwards)
    _, *state = layer(torch.randn(B, 2, I, dtype=torch.float64))
    start = [part.detach().requires_grad_() for part in flatten(state)]
    given = iter(start)
    nested = [cell.State(*(next(given) for _ in cell.State._fields)) for cell in layer.cells]
    nested = nested if layer.stacked else nested[0]
    reset = torch.zeros(B, T).bool()
    reset[1, 4] = reset[2, 0] = True  # row 2: at the first step of the call
    y = layer(x, initial_state=nested, reset=reset)[0]
    with_start, fresh = (layer(x, initial_state=s)[0] for s in (nested, None))
    y, with_start, fresh = ((a.flip(1) if go_backwards else a).detach() for a in (y, with_start, fresh))
    assert_close(y[0], with_start[0])
    early, late = layer(x[1:2, :4])[0], layer(x[1:2, 4:])[0]
    if go_backwards:  # it applies to the last piece; a reset at step 0 has no effect
        assert_close(y[1, 4:], with_start[1, 4:])
        assert_close(y[1, :4], early[0].flip(0))
        assert_close(y[2], with_start[2])
    else:
        assert_close(y[1, :4], with_start[1, :4])
        assert_close(y[1, 4:], late[0])
        assert_close(y[2], fresh[2])
    found = gradients(layer(x, initial_state=nested, reset=reset), start)
    for part in found:
        assert part[0].abs().min() > 0
        assert (part[2].abs().max() > 0) == go_backwards


def test_a_reset_at_a_masked_step_outputs_the_initial_state(x):
    layer = layers.GRU(H, return_sequences=True, learn_initial_state=True, input_size=I, **DOUBLE)
    with torch.no_grad():
        layer.cell.initial_h.normal_()
    mask, reset = torch.ones(B, T).bool(), torch.zeros(B, T).bool()
    mask[:, 3:5], reset[:, 3] = False, True
    y = layer(x, mask=mask, reset=reset)
    assert torch.equal(y[:, 3], layer.cell.initial_h.expand(B, H))
    assert torch.equal(y[:, 4], y[:, 3])
    assert_close(y[:, 5:], layer(x[:, 5:]))


def test_resets_of_custom_cells_and_stateful_layers(x):
    class Sum:
        state_size = I

        def call(self, x, states):
            return x + states[0], [x + states[0]]

    reset = torch.zeros(B, T).bool()
    reset[1, 4] = True
    y = layers.RNN(Sum(), return_sequences=True).double()(x, reset=reset)
    assert_close(y[1], torch.cat([x[1, :4].cumsum(0), x[1, 4:].cumsum(0)]))
    assert_close(y[0], x[0].cumsum(0))

    layer = layers.LSTM(H, stateful=True, return_sequences=True, input_size=I, **DOUBLE)
    fresh = layer(x)
    first = torch.zeros(B, T).bool()
    first[1, 0] = True  # reset one row of the stream
    again = layer(x, reset=first)
    assert_close(again[1], fresh[1])
    assert not torch.allclose(again[0], fresh[0])


# ── Lengths ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_lengths_are_a_mask(make, kind, both, x):
    layer = make(return_sequences=True, return_state=True)
    layer = layers.Bidirectional(layer) if both else layer
    lengths = [T, 0, 4]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    for part, wanted in zip(flatten(layer(x, lengths=kind(lengths))), flatten(layer(x, mask=mask)), strict=True):
        assert torch.equal(part, wanted)


# ── PackedSequence ────────────────────────────────────────────────────────────────────────────────────────────────────

LENGTHS = torch.tensor([4, 9, 1])


def ours_of(module):
    """Our layer with the weights of a torch.nn.LSTM or GRU of one layer: gates i f g o, or z r g, in columns."""
    kind = {"LSTM": layers.LSTM, "GRU": layers.GRU}[type(module).__name__]
    layer = kind(module.hidden_size, return_sequences=True, return_state=True, input_size=I)
    layer = layers.Bidirectional(layer) if module.bidirectional else layer
    order = [0, 1, 2, 3] if kind is layers.LSTM else [1, 0, 2]

    def columns(w):
        return torch.cat([w.chunk(len(order))[k] for k in order])

    arrays = []
    for suffix in ("l0", "l0_reverse")[: 1 + module.bidirectional]:
        w = {name: columns(getattr(module, f"{name}_{suffix}").detach()) for name in ("weight_ih", "weight_hh")}
        b = [columns(getattr(module, f"bias_{name}_{suffix}").detach()) for name in ("ih", "hh")]
        arrays += [w["weight_ih"].t(), w["weight_hh"].t(), b[0] + b[1] if kind is layers.LSTM else torch.stack(b)]
    layer.set_weights(arrays)
    return layer


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_packed_call_equals_that_of_torch(kind, both, is_sorted):
    theirs = kind(I, H, batch_first=True, bidirectional=both)
    ours = ours_of(theirs)
    lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
    x = torch.randn(B, T, I, requires_grad=True)
    start = torch.randn(2, 1 + both, B, H)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
    y, state = theirs(packed, tuple(start) if kind is nn.LSTM else start[0])
    per_direction = [start[: 2 if kind is nn.LSTM else 1, d] for d in range(1 + both)]
    z, *found = ours(packed, initial_state=[part for direction in per_direction for part in direction])
    expected = state if kind is nn.LSTM else (state,)
    expected = [part[d] for d in range(1 + both) for part in expected]
    assert isinstance(z, PackedSequence)
    assert torch.equal(z.batch_sizes, y.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(z, name), getattr(y, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert_close([z, *found], [y, *expected], atol=tolerances.LOOP)
    grads = [gradients(results, [x])[0] for results in ([y, *expected], [z, *found])]
    assert (grads[0] - grads[1]).abs().max() <= tolerances.REFERENCE_GRADIENT * grads[0].abs().max()
    padded, its_lengths = pad_packed_sequence(z, batch_first=True)
    assert torch.equal(its_lengths, lengths)
    counted = torch.arange(T) < lengths[:, None]
    masked = ours(x, initial_state=[part for direction in per_direction for part in direction], mask=counted)[0]
    assert torch.equal(padded[counted], masked[counted])


@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_a_packed_call_equals_separate_calls_of_its_rows(make, go_backwards, return_sequences, x):
    layer = make(return_sequences=return_sequences, return_state=True, go_backwards=go_backwards)
    rows = [x[b, : LENGTHS[b]] for b in range(B)]
    packed = pack_sequence(rows, enforce_sorted=False)
    y, *state, traces = layer(packed, return_gates=True)
    alone = [layer(row[None], return_gates=True) for row in rows]
    if return_sequences:
        assert_close(y, pack_sequence([one[0][0] for one in alone], enforce_sorted=False))
    else:
        assert_close(y, torch.cat([one[0] for one in alone]))
    states = [torch.cat(parts) for parts in zip(*(flatten(one[1:-1]) for one in alone), strict=True)]
    assert_close(state, states)
    counted = torch.arange(T) < LENGTHS[:, None]
    for b, one in enumerate(alone):
        for part, wanted in zip(flatten(traces), flatten(one[-1]), strict=True):
            assert part.shape[:2] == (B, T)
            assert_close(part[b, : LENGTHS[b]], wanted[0])
    for trace in traces if layer.stacked else [traces]:
        assert torch.count_nonzero(trace.g[~counted]) == 0


def test_packed_through_a_model(x):
    first = layers.Bidirectional(layers.GRU(H, return_sequences=True, input_size=I, **DOUBLE), None)
    second = layers.LSTM(H, return_sequences=True, activity_regularizer="l2", input_size=H, **DOUBLE)
    dense = layers.TimeDistributed(nn.Linear(H, 2).double())
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    ahead, back = first(packed)
    assert isinstance(back, PackedSequence)
    hidden = second(ahead)
    y = dense(hidden)
    padded, _ = pad_packed_sequence(y, batch_first=True)
    mask = torch.arange(T) < LENGTHS[:, None]
    wanted = second(first(x, mask=mask)[0], mask=mask)
    assert_close(padded[mask], dense(wanted)[mask])
    second(ahead)
    assert_close(second.losses, [0.01 * hidden.data.square().sum()])  # without padding
    with pytest.raises(ValueError, match="a mask isn't supported with a PackedSequence"):
        dense(hidden, mask=mask)
    reset = torch.zeros(B, T).bool()
    reset[1, 5] = True
    again, _ = pad_packed_sequence(second(ahead, reset=reset), batch_first=True)
    assert_close(again[1, :5], wanted[1, :5])
    assert not torch.allclose(again[1, 5:], wanted[1, 5:])


# ── Truncated backpropagation ─────────────────────────────────────────────────────────────────────────────────────────


def by_hand(layer, x, targets, loss, steps):
    """The equivalent training loop."""
    batch, length = x.shape[:2]
    state, total = None, 0.0
    for start in range(0, length, steps):
        y, *ends = layer(x[:, start : start + steps], initial_state=state)
        value = loss(y.flatten(0, 1), targets[:, start : start + steps].flatten(0, 1))
        share = batch * y.shape[1] / (batch * length)
        (share * value).backward()
        total += share * float(value.detach())
        state = [part.detach() if isinstance(part, torch.Tensor) else [p.detach() for p in part] for part in ends]
    return total, state


def grads_of(layer):
    found = [weight.grad for weight in layer.parameters()]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("steps", [1, 4, T, 100])
def test_a_truncated_pass_equals_the_manual_loop(make, steps, x):
    layer = make(return_sequences=True, return_state=True)
    targets = torch.randn(B, T, layer(x)[0].shape[2], dtype=torch.float64)
    total, ends = by_hand(layer, x, targets, functional.mse_loss, steps)
    wanted = grads_of(layer)
    mean, state = truncated_backward(layer, x, targets, functional.mse_loss, steps)
    assert all(torch.equal(a, b) for a, b in zip(grads_of(layer), wanted, strict=True))
    assert not mean.requires_grad
    assert float(mean) == pytest.approx(total, rel=1e-12)
    assert_close(state, ends)
    if steps >= T:
        functional.mse_loss(layer(x)[0], targets).backward()
        assert_close(grads_of(layer), wanted)
    # A second part of the sequence continues from the state of the first.
    more = truncated_backward(layer, x, targets, functional.mse_loss, steps, initial_state=state)[1]
    assert_close(more, layer(torch.cat([x, x], dim=1))[1:])


def test_the_gradient_reaches_no_further_than_a_chunk(x):
    layer = layers.LSTM(H, return_sequences=True, input_size=I, **DOUBLE)
    leaf = x.clone().requires_grad_()
    targets = torch.zeros(B, T, H, dtype=torch.float64)
    scale = torch.zeros(B, T, 1, dtype=torch.float64)
    scale[:, 5] = 1.0
    truncated_backward(layer, leaf, torch.cat([targets, scale], -1), lambda y, t: (y * t[:, -1:]).square().mean(), 3)
    assert leaf.grad is not None
    reached = leaf.grad.abs().sum((0, 2)) > 0
    assert reached.tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("with_lengths", [False, True])
def test_masks_and_resets_are_split_into_chunks(make, with_lengths, x):
    layer = make(return_sequences=True)
    lengths = torch.tensor([T, 2, 5])
    mask = torch.arange(T) < lengths[:, None] if with_lengths else torch.rand(B, T) < 0.5
    mask[:, 3:6] &= with_lengths  # without lengths, one chunk is completely masked
    reset = torch.rand(B, T) < 0.2
    reset[:, 4] = True
    targets = torch.randn(B, T, layer(x).shape[2], dtype=torch.float64)

    def loss(y, t):
        assert len(y) > 0
        return functional.l1_loss(y, t)

    given = {"lengths": lengths} if with_lengths else {"mask": mask}
    mean, _ = truncated_backward(layer, x, targets, loss, T, reset=reset, **given)
    wanted = grads_of(layer)
    loss(layer(x, mask=mask, reset=reset)[mask], targets[mask]).backward()
    assert_close(grads_of(layer), wanted)
    in_chunks, _ = truncated_backward(layer, x, targets, loss, 3, reset=reset, **given)
    assert_close(in_chunks, mean)
    grads_of(layer)
    # With a reset at every chunk, truncation changes nothing.
    reset[:, ::3] = True
    truncated_backward(layer, x, targets, loss, 3, reset=reset, **given)
    found = grads_of(layer)
    truncated_backward(layer, x, targets, loss, T, reset=reset, **given)
    assert_close(found, grads_of(layer))


@pytest.mark.long
def test_memory_is_that_of_one_chunk():
    class Saved:
        living = most = 0

        def __init__(self, tensor):
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.size = 0 if storage.data_ptr() in given else storage.nbytes()
            Saved.living += self.size
            Saved.most = max(Saved.most, Saved.living)

        def __del__(self):
            Saved.living -= self.size

    def most(length):
        Saved.most = 0
        x, targets = torch.randn(2, length, I), torch.randn(2, length, H)
        given.update(t.untyped_storage().data_ptr() for t in (x, targets))
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            truncated_backward(layer, x, targets, functional.mse_loss, 10)
        gc.collect()
        assert Saved.living == 0
        return Saved.most

    layer = layers.RNN([layers.LSTMCell(H), layers.GRUCell(H)], return_sequences=True, input_size=I)
    given = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}  # counted in any case
    assert most(400) <= most(20)  # from the second chunk on there is a state
    assert most(10) > 2 * 10 * H * 4


def test_a_step_of_an_optimizer_for_each_chunk(x):
    def make():
        torch.manual_seed(1)
        return layers.LSTM(H, kernel_constraint="non_neg", return_sequences=True, input_size=I, **DOUBLE)

    targets = torch.randn(B, T, H, dtype=torch.float64)
    layer, twin = make(), make()
    optimizer, its = (torch.optim.SGD(one.parameters(), 0.5) for one in (layer, twin))
    mean, _ = truncated_backward(layer, x, targets, functional.mse_loss, 4, optimizer=optimizer, max_norm=0.01)
    state, total = None, 0.0
    twin.return_state = True
    for start in (0, 4, 8):
        y, *state = twin(x[:, start : start + 4], initial_state=state)
        its.zero_grad()
        value = functional.mse_loss(y, targets[:, start : start + 4])
        value.backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.01) > 0.01
        its.step()
        twin.apply_constraints()
        state = [part.detach() for part in state]
        total += float(value.detach()) * y.shape[1] / T
    assert_close(list(layer.parameters()), list(twin.parameters()))
    assert layer.cell.kernel.min() >= 0.0
    assert float(mean) == pytest.approx(total, rel=1e-12)


def test_stateful_layers_and_models_of_any_kind(x):
    layer = layers.GRU(H, return_sequences=True, stateful=True, input_size=I, **DOUBLE)
    head = nn.Linear(H, 2).double()
    classes = torch.randint(2, (B, T))
    _, state = truncated_backward(layer, x, classes, lambda y, t: functional.cross_entropy(head(y), t), 4)
    assert_close(layer.states, state)
    assert head.weight.grad is not None
    layer.reset_states()
    assert_close(truncated_backward(layer, x.numpy(), x[..., :1], lambda y, t: (y - t).square().mean(), 4)[1], state)

    theirs = nn.LSTM(I, H, batch_first=True).double()
    targets = torch.randn(B, T, H, dtype=torch.float64)
    _, (h, c) = truncated_backward(theirs, x, targets, functional.mse_loss, 4)
    assert_close((h, c), theirs(x)[1])
    assert not h.requires_grad

    seen = []

    def model(chunk, state, **cut):
        seen.append({name: tuple(part.shape) for name, part in cut.items()})
        y, h = layer.run(layer.given(chunk, None, None, None), state, None, False, False)[:2]
        return head(y), h

    mask = torch.ones(B, T).bool()
    truncated_backward(model, x, classes, functional.cross_entropy, 4, mask=mask, reset=~mask)
    assert seen == [{"mask": (B, 4), "reset": (B, 4)}] * 2 + [{"mask": (B, 1), "reset": (B, 1)}]


@pytest.mark.parametrize("units", [None, (5,), (5, H)], ids=["a layer", "a stack of one", "a stack"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_model_can_return_the_results_of_a_layer(kind, units, x):
    flags = {"return_sequences": True, "return_state": True, "input_size": I}
    if units is None:
        layer = getattr(layers, kind)(H, **flags, **DOUBLE)
    else:
        layer = layers.RNN([getattr(layers, f"{kind}Cell")(size, **DOUBLE) for size in units], **flags)
    y, *states = layer(x)
    targets = torch.randn(B, T, y.shape[-1], dtype=torch.float64)

    def model(chunk, state):
        return layer(chunk, state)

    mean, ends = truncated_backward(model, x, targets, functional.mse_loss, 4)
    found = grads_of(layer)
    alone, _ = truncated_backward(layer, x, targets, functional.mse_loss, 4)
    assert_close(found, grads_of(layer))
    assert float(mean) == float(alone)
    assert_close(flatten(ends), flatten(states))


def test_an_error_suggests_to_add_a_batch_axis(x):
    hint = r"add a batch axis: x\[None\], or set return_sequences=True in the layer below$"
    for layer in (layers.LSTM(H), layers.LSTM(H, input_size=I), layers.RNN([layers.GRUCell(H)])):
        with pytest.raises(ShapeError, match=rf"got \(9, 3\): {hint}"):
            layer(x[0].float())
    with pytest.raises(ShapeError, match=r"got \(3, 9\): add a feature axis: x\[..., None\]$"):
        layers.LSTM(H, input_size=1)(x[..., 0].float())


TARGETS = torch.zeros(B, T, H)
SEQUENCES = torch.zeros(B, T, I)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 0), ValueError, "steps >= 1, got 0"),
        (lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 2.5), TypeError, "steps to be an integer"),
        (lambda f, r: f(r, SEQUENCES, TARGETS[:, 1:], functional.mse_loss, 2), ShapeError, r"\(3, 9, 3\), \(3, 8, 4\)"),
        (lambda f, r: f(r, SEQUENCES.tolist(), TARGETS, functional.mse_loss, 2), TypeError, "got list, Tensor"),
        (lambda f, r: f(3, SEQUENCES, TARGETS, functional.mse_loss, 2), TypeError, "cellstack RNN or a callable.*int"),
        (
            lambda f, r: f(layers.Bidirectional(r), SEQUENCES, TARGETS, functional.mse_loss, 2),
            TypeError,
            "got Bidirectional",
        ),
        (lambda f, r: f(layers.LSTM(H), SEQUENCES, TARGETS, functional.mse_loss, 2), ValueError, "return_sequences"),
        (
            lambda f, r: f(
                layers.LSTM(H, return_sequences=True, go_backwards=True), SEQUENCES, TARGETS, functional.mse_loss, 2
            ),
            ValueError,
            "go_backwards=False",
        ),
        (
            lambda f, r: f(lambda chunk, _: r(chunk), SEQUENCES, TARGETS, functional.mse_loss, 2),
            TypeError,
            "got Tensor: .*return_state=True",
        ),
        (lambda f, r: f(lambda *_: (1,), SEQUENCES, TARGETS, functional.mse_loss, 2), TypeError, "got 1 value"),
        (lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 2, max_norm=1.0), ValueError, "max_norm needs"),
        (lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 2, lengths=[0] * 3), ValueError, "at least one"),
        (lambda f, r: f(r, SEQUENCES[:, :0], TARGETS[:, :0], functional.mse_loss, 2), ValueError, "at least one"),
        (
            lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 2, mask=TARGETS[..., 0] == 0, lengths=[1] * 3),
            ValueError,
            "got both",
        ),
        (lambda f, r: f(r, SEQUENCES, TARGETS, functional.mse_loss, 2, reset=[True]), ShapeError, "reset"),
    ],
)
def test_unsupported_models_and_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=f"^truncated_backward.*{message}"):
        call(truncated_backward, layers.LSTM(H, return_sequences=True, input_size=I))

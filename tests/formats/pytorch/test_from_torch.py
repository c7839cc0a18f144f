"""Torch modules as Networks: equal outputs, gates in order, and unsupported modules named by their paths."""

import contextlib
import itertools
import subprocess
import sys

import numpy as np
import pairs
import pytest
import tolerances
import torch
from family import random_spec
from torch import nn

import cellstack as cs
from cellstack import layers
from cellstack.cells.layout import OURS, from_rows, reorder, to_rows
from cellstack.cells.spec import GATES

ORDERS = [(kind, "".join(order)) for kind, ours in OURS.items() for order in itertools.permutations(ours)]


def close(got, want, tolerance=tolerances.LOOP):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=tolerance, rtol=tolerance)


def randomise(module):
    for weight in module.parameters():
        nn.init.normal_(weight, 0.0, 0.5)
    return module.eval()


# ── layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "order"), ORDERS)
def test_gates_are_reordered(kind, order):
    blocks = {gate: np.arange(6.0).reshape(3, 2) + 10 * n for n, gate in enumerate(OURS[kind])}
    theirs = np.concatenate([blocks[gate] for gate in order], axis=1)
    ours = np.concatenate([blocks[gate] for gate in OURS[kind]], axis=1)
    assert np.array_equal(reorder(theirs, order, OURS[kind]), ours)
    assert np.array_equal(reorder(ours, OURS[kind], order), theirs)
    assert (order == OURS[kind]) == np.array_equal(theirs, ours)
    apart = kind == "gru"  # the reset gate acts on the second bias alone
    arrays = from_rows(kind, theirs.T, theirs.T, (theirs[0], theirs[1]), order)
    assert np.array_equal(arrays.kernel, ours)
    assert np.array_equal(arrays.recurrent_kernel, ours)
    assert np.array_equal(arrays.bias, ours[:2] if apart else ours[0] + ours[1])
    weight, recurrent, bias = to_rows(kind, arrays, order)
    assert np.array_equal(weight, theirs.T)
    assert np.array_equal(recurrent, theirs.T)
    assert np.array_equal(bias, theirs[:2] if apart else theirs[0] + theirs[1])
    together = from_rows(kind, theirs.T, theirs.T, (theirs[0], theirs[1]), order, reset_after=False)
    assert np.array_equal(together.bias, ours[0] + ours[1])


def test_our_gate_orders():
    recurrent = {"lstm": "ifgo", "gru": "zrg", "rnn": "g", "ligru": "zg", "slstm": "ifgo", "cfc": "gkst"}
    assert recurrent | {"mingru": "zg", "minlstm": "ifg", "sru": "gfrs", "cfs": "g"} == OURS
    assert len(ORDERS) == 24 + 6 + 1 + 2 + 24 + 24 + 2 + 6 + 24 + 1


def test_invalid_gate_orders_are_refused():
    for order in ("iofc", "ifg", "ifgg", "zrg", ""):
        with pytest.raises(ValueError, match=f"permutation of ifgo, got '{order}'"):
            reorder(np.zeros(4), order, "ifgo")
    with pytest.raises(cs.ShapeError, match=r"4 equal blocks along axis -1, got \(2, 6\)"):
        reorder(np.zeros((2, 6)), "iofg", "ifgo")
    with pytest.raises(cs.ShapeError, match=r"3 equal blocks along axis 0, got \(4, 1\)"):
        from_rows("gru", np.zeros((4, 1)), np.zeros((4, 1)), (), "rzg")
    assert from_rows("lstm", np.zeros((8, 3)), np.zeros((8, 2)), (), "ifgo").bias is None


# ── torch.nn ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_lstm(depth, bidirectional, bias, batch_first, dtype):
    settings = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dropout": 0.5 * (depth > 1)}
    module = nn.LSTM(5, 7, depth, **settings, dtype=dtype).eval()
    with contextlib.nullcontext() if batch_first else pytest.warns(UserWarning, match=r"LSTM\) has batch_first=False"):
        net = cs.load(module)
    x = torch.randn(3, 9, 5, dtype=dtype)
    h0, c0 = torch.randn(2, depth * (1 + bidirectional), 3, 7, dtype=dtype)
    y, (h, c) = module(x if batch_first else x.transpose(0, 1), (h0, c0))
    got, states = net.run(x.numpy(), state=[cs.State(*pair) for pair in zip(h0.numpy(), c0.numpy(), strict=True)])
    tolerance = tolerances.LOOP if dtype == torch.float32 else tolerances.REFERENCE_DOUBLE
    close(got, y if batch_first else y.transpose(0, 1), tolerance)
    close(np.stack([state.h for state in states]), h, tolerance)
    close(np.stack([state.c for state in states]), c, tolerance)
    assert got.dtype == net.dtype == str(dtype).removeprefix("torch.")


OTHERS = {
    "projection": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own word
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_gru_and_rnn_and_projection(case, depth, bidirectional, bias, dtype):
    kind, flags = OTHERS[case]
    settings = {"bias": bias, "batch_first": True, "bidirectional": bidirectional, "dropout": 0.5 * (depth > 1)}
    module = randomise(kind(5, 7, depth, **flags, **settings, dtype=dtype))
    net = cs.load(module)
    width = flags.get("proj_size", 7)
    x, h0 = torch.randn(3, 9, 5, dtype=dtype), torch.randn(depth * (1 + bidirectional), 3, width, dtype=dtype)
    c0 = torch.randn(len(h0), 3, 7, dtype=dtype)
    y, ends = module(x, (h0, c0) if kind is nn.LSTM else h0)
    starts = zip(h0.numpy(), c0.numpy(), strict=True) if kind is nn.LSTM else h0.numpy()
    got, states = net.run(x.numpy(), state=list(starts))
    tolerance = tolerances.LOOP if dtype == torch.float32 else tolerances.REFERENCE_DOUBLE
    if case == "relu":  # values grow without bound
        tolerance *= float(y.detach().abs().max())
    close(got, y, tolerance)
    for n, end in enumerate(ends if kind is nn.LSTM else (ends,)):
        close(np.stack([state[n] for state in states]), end, tolerance)
    assert got.dtype == net.dtype == str(dtype).removeprefix("torch.")
    assert {cell.spec.kind for cell in net.cells} == {{nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}[kind]}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_lengths_are_packed_sequences(bidirectional, kind):
    module = kind(5, 7, 2, batch_first=True, bidirectional=bidirectional)
    x, lengths = torch.randn(4, 9, 5), torch.tensor([9, 1, 4, 6])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, h = module(packed)
    h = h[0] if kind is nn.LSTM else h
    y = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
    got, states = cs.load(module).run(x.numpy(), lengths=lengths)
    close(np.stack([state.h for state in states]), h)
    for row, length in enumerate(lengths):
        close(got[row, :length], y[row, :length])


def test_the_network_has_copies_of_the_weights():
    module = nn.LSTM(3, 4, batch_first=True)
    x, net = torch.randn(1, 2, 3), cs.load(module)
    y = net(x)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    assert np.array_equal(net(x), y)


ACTIVATIONS = [
    nn.ReLU(),
    nn.Sigmoid(),
    nn.Softsign(),
    nn.Tanh(),
    nn.Hardsigmoid(),
    nn.Softmax(dim=-1),
    nn.ELU(),
    nn.ELU(0.5),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3),
    nn.Softplus(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.8),
    nn.SiLU(),
    nn.SELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.LogSoftmax(dim=-1),
    nn.Hardswish(),
    nn.Mish(),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_sequential(activation):
    inner = nn.Sequential(nn.Linear(6, 8, bias=False), activation, nn.Dropout(0.5))
    module = nn.Sequential(nn.Identity(), inner, nn.Linear(8, 4)).eval()
    x = torch.randn(2, 5, 6)
    close(cs.load(module)(x), module(x))


def test_an_lstm_within_a_sequential_passes_on_its_output():
    lstm, head = nn.LSTM(3, 4, 2, batch_first=True), nn.Linear(4, 2)
    x = torch.randn(2, 5, 3)
    close(cs.load(nn.Sequential(lstm, head))(x), head(lstm(x)[0]))


def test_objects_with_to_nodes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def to_nodes(self):
            return [cs.nodes.Dense(self.weight.detach().numpy())]

    assert (cs.load(nn.Sequential(Model(), nn.ReLU()))(np.ones((1, 1, 3))) == 3).all()


class Last(nn.Module):
    """Takes the last step, or the final states, of the layer before it."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def to_nodes(self):
        return [cs.nodes.GlobalPool(self.mode)]


def test_final_states_in_to_nodes():
    gru, head = nn.GRU(3, 4, 2, batch_first=True, bidirectional=True), nn.Linear(8, 2)
    x = torch.randn(2, 5, 3)
    y, h = gru(x)
    net = cs.load(nn.Sequential(gru, Last("final"), head))
    assert [type(node).__name__ for node in net.nodes] == ["Bidirectional", "Bidirectional", "Dense"]
    close(net(x), head(torch.cat((h[-2], h[-1]), 1)))
    with pytest.warns(UserWarning, match=r'^load: GlobalPool\("last"\) .* use GlobalPool\("final"\)$') as record:
        net = cs.load(nn.Sequential(gru, Last("last"), head))
    assert [warning.filename for warning in record] == [__file__]
    close(net(x), head(y[:, -1]))
    with pytest.raises(cs.ShapeError, match=r'GlobalPool\("final"\) must directly follow a recurrent layer'):
        cs.load(nn.Sequential(head, Last("final")))


def test_a_module_that_takes_time_before_batch_gives_a_warning_with_its_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4), nn.LSTM(4, 2))
    with pytest.warns(UserWarning, match=r"^load: 1 \(GRU\) has batch_first=False and takes \[T, B, I\]") as record:
        cs.load(model)
    assert [warning.filename for warning in record] == [__file__]


# ── modules around recurrent layers ─────────────────────────────────────────────────────────────────────────────


class Turned(nn.Module):
    """A custom transposition between a convolution and an LSTM."""

    def forward(self, x):
        return x.transpose(1, 2)

    def to_nodes(self):
        return [cs.nodes.Permute((2, 1))]


class Output(nn.LSTM):
    """An LSTM that returns its output only, as load converts every LSTM within a Sequential."""

    def forward(self, x):
        return super().forward(x)[0]

    def to_nodes(self):
        plain = nn.LSTM(self.input_size, self.hidden_size, self.num_layers, batch_first=True)
        plain.to(self.weight_ih_l0.dtype).load_state_dict(self.state_dict())
        return cs.load(plain).nodes


def worn(module):
    """Randomise the statistics and weights of batch normalisations."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 3.0)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return module.eval()


AROUND = {  # a module, the shape of its input, how many Permutes are left
    "conv": (lambda: [nn.Conv1d(3, 5, 4)], (3, 20), 2),
    "conv of every setting": (lambda: [nn.Conv1d(6, 4, 3, 2, 2, 2, 2, bias=False)], (6, 20), 2),
    "same": (lambda: [nn.Conv1d(3, 5, 4, padding="same", dilation=3)], (3, 20), 2),
    "one conv after another": (
        lambda: [nn.Conv1d(3, 5, 3), nn.ReLU(), nn.BatchNorm1d(5), nn.LeakyReLU(0.1), nn.Dropout(), nn.Conv1d(5, 2, 3)],
        (3, 20),
        2,
    ),
    "pools": (lambda: [nn.MaxPool1d(3), nn.Sigmoid(), nn.AvgPool1d(2, 1), nn.Linear(5, 2)], (3, 20), 2),
    "padded pools": (
        lambda: [
            nn.Conv1d(3, 5, 1),
            nn.MaxPool1d(3, padding=1),
            nn.AvgPool1d(3, padding=1),
            nn.AvgPool1d(4, 1, 2, count_include_pad=False),
            nn.MaxPool1d(3, 1, 1),
        ],
        (3, 20),
        2,
    ),
    "softmax over channels": (lambda: [nn.Conv1d(3, 5, 3), nn.Softmax(1), nn.MaxPool1d(2)], (3, 20), 2),
    "softmax over time": (lambda: [nn.Conv1d(3, 5, 3), nn.Softmax(-1), nn.MaxPool1d(2)], (3, 20), 4),
    "mean over time": (
        lambda: [nn.Conv1d(3, 5, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(5, affine=False)],
        (3, 20),
        1,
    ),
    "greatest over time": (
        lambda: [nn.AdaptiveMaxPool1d((1,)), nn.Flatten(1, 2), nn.Linear(3, 2), nn.Softmax(1)],
        (3, 9),
        1,
    ),
    "flat": (
        lambda: [nn.Conv1d(3, 5, 3), nn.ELU(), nn.Flatten(), nn.Flatten(), nn.Linear(90, 4), nn.BatchNorm1d(4)],
        (3, 20),
        2,
    ),
    "linear over time": (lambda: [nn.Conv1d(3, 5, 3), nn.Linear(18, 4), nn.Tanh()], (3, 20), 2),
    "norm": (
        lambda: [nn.Linear(6, 4), nn.LayerNorm(4, eps=1e-4), nn.LayerNorm(4, elementwise_affine=False)],
        (9, 6),
        0,
    ),
    "norm without bias": (lambda: [nn.LayerNorm(6, bias=False)], (9, 6), 0),
    "cnn-lstm": (
        lambda: [
            Turned(),
            nn.Conv1d(6, 5, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            Turned(),
            Output(5, 4, 2, batch_first=True),
        ],
        (9, 6),
        0,
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own word
@pytest.mark.parametrize("case", AROUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_around_recurrent_layers(case, dtype):
    make, shape, turns = AROUND[case]
    module = worn(nn.Sequential(*make()).to(dtype))
    net = cs.load(module)
    x = torch.randn(4, *shape, dtype=dtype)
    close(net(x.numpy()), module(x), 1e-5 if dtype == torch.float32 else tolerances.REFERENCE_DOUBLE)
    assert sum(isinstance(node, cs.nodes.Permute) for node in net.nodes) == turns
    assert net(x.numpy()).dtype == str(dtype).removeprefix("torch.")


def test_an_embedding_and_later_layers():
    module = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), Output(6, 4, batch_first=True), nn.Linear(4, 2))
    ids = torch.randint(0, 11, (3, 7))
    close(cs.load(module)(ids.numpy()), module(ids))


# ── our layers ──────────────────────────────────────────────────────────────────────────────────────────────────────


MASKS = [None, np.array([[False, True, True, False], [True, False, True, True], [False] * 4])]


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "mask"])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activations", [("tanh", "sigmoid"), ("relu", "hard_sigmoid"), (None, "softsign")])
def test_our_lstm(mask, return_sequences, go_backwards, zero, use_bias, activations):
    flags = {"return_sequences": return_sequences, "go_backwards": go_backwards, "zero_output_for_mask": zero}
    lstm = randomise(layers.LSTM(6, *activations, use_bias, return_state=True, **flags, dropout=0.5, input_size=3))
    x = torch.randn(3, 4, 3)
    y, h, c = lstm(x, mask=mask)
    got, (state,) = cs.load(lstm).run(x, mask=mask)
    close(got, y)
    close(state.h, h)
    close(state.c, c)


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "mask"])
@pytest.mark.parametrize("go_backwards", [False, True])
def test_our_stack(mask, go_backwards):
    cells = [layers.LSTMCell(4), layers.LSTMCell(5, use_bias=False), layers.LSTMCell(3, "softsign")]
    flags = {"return_sequences": True, "return_state": True, "go_backwards": go_backwards}
    rnn = layers.RNN(cells, **flags)
    x = torch.randn(3, 4, 6)
    rnn(x)
    randomise(rnn)
    y, *states = rnn(x, mask=mask)
    got, got_states = cs.load(rnn).run(x, mask=mask)
    close(got, y)
    for one, other in zip(got_states, states, strict=True):
        close(one.h, other.h)
        close(one.c, other.c)


def make_cell(spec):
    """The built layer cell of this description."""
    kind = spec.of_kind
    settings = {name: value for name, value in spec.settings.items() if name != "kind"}
    if not kind.gated:
        settings.pop("recurrent_activation", None)
    dropout = {"dropout": 0.2} | ({"recurrent_dropout": 0.2} if kind.has_recurrent_kernel else {})
    return randomise(getattr(layers, f"{kind.title}Cell")(**settings, **dropout))


RESET = np.array([[False, True, False, False], [False] * 4, [True, False, False, True]])


@pytest.mark.parametrize("kind", GATES)
@pairs.seeds(10, 20)
def test_our_cells_of_any_flags(seed, kind):
    """Every flag and array is converted, with learned initial states and zoneout rates; dropout isn't."""
    spec = random_spec(np.random.default_rng(seed), kind)
    cell = make_cell(spec)
    rnn = layers.RNN(cell, return_sequences=True, return_state=True, go_backwards=bool(seed % 2)).eval()
    net = cs.load(rnn)
    assert net.cells[0].spec == cell.spec
    assert list(net.cells[0].arrays) == list(dict(cell.named_parameters()))
    x = torch.randn(3, 4, spec.input_size)
    for given in ({}, {"mask": MASKS[1]}, {"reset": RESET}, {"mask": MASKS[1], "reset": RESET}):
        y, *state = rnn(x, **given)
        got, (after,) = net.run(x, **given)
        tolerance = tolerances.LOOP * max(1.0, float(y.detach().abs().max()))
        close(got, y, tolerance)
        for one, other in zip(after, state, strict=True):
            close(one, other, tolerance)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "mask"])
@pytest.mark.parametrize("reset", [None, RESET], ids=["one piece", "pieces"])
def test_our_stack_of_every_kind(residual, go_backwards, return_sequences, mask, reset):
    cells = [
        layers.LSTMCell(5, peepholes=True, proj_size=4),
        layers.GRUCell(4, reset_after=False, learn_initial_state=True),
        layers.SimpleRNNCell(4, activation="softsign", layer_norm=True),
        layers.GRUCell(3, zoneout=0.2),
        layers.LSTMCell(3, coupled=True, clip=0.5, learn_initial_state=True),
    ]
    stack = layers.StackedRNNCells(cells, residual=residual, input_size=6)
    flags = {"return_sequences": return_sequences, "go_backwards": go_backwards, "return_state": True}
    rnn = randomise(layers.RNN(stack, **flags))
    x = torch.randn(3, 4, 6)
    y, *states = rnn(x, mask=mask, reset=reset)
    net = cs.load(rnn)
    got, after = net.run(x, mask=mask, reset=reset)
    close(got, y)
    for one, other in zip(after, states, strict=True):
        assert type(one) is type(other)
        for part, theirs in zip(one, other, strict=True):
            close(part, theirs)
    assert net.nodes[0].residual is residual


@pytest.mark.parametrize("inner", [layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_our_other_kinds_in_both_directions(inner, return_sequences):
    both = layers.Bidirectional(inner(4, return_sequences=return_sequences), "sum", input_size=3)
    randomise(both)
    x = torch.randn(3, 4, 3)
    for given in ({}, {"mask": MASKS[1]}, {"reset": RESET}, {"mask": MASKS[1], "reset": RESET}):
        close(cs.load(both).run(x, **given)[0], both(x, **given))


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "mask"])
@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave"])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_our_bidirectional(mask, merge_mode, return_sequences, stack):
    flags = {"return_sequences": return_sequences, "return_state": True}
    inner = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], **flags) if stack else layers.LSTM(4, **flags)
    both = randomise(layers.Bidirectional(inner, merge_mode, input_size=3))
    x = torch.randn(3, 4, 3)
    y, *states = both(x, mask=mask)
    got, got_states = cs.load(both).run(x, mask=mask)
    close(got, y)
    flat = [part for state in states for part in (state if stack else (state,))]
    for one, other in zip([part for state in got_states for part in state], flat, strict=True):
        close(one, other)


def test_our_layers_in_a_row():
    first, second = layers.LSTM(4, return_sequences=True), layers.Bidirectional(layers.LSTM(5, return_sequences=True))
    module = nn.Sequential(first, nn.Dropout(0.3), second, layers.TimeDistributed(nn.Linear(10, 2)), nn.Softmax(-1))
    x = torch.randn(2, 6, 3)
    module(x)
    randomise(module)
    close(cs.load(module)(x), module(x))
    single = layers.LSTM(3, return_sequences=True, dtype="float64", input_size=2)
    assert cs.load(single).dtype == np.float64


# ── unsupported modules ─────────────────────────────────────────────────────────────────────────────────────────────


def hooked():
    module = nn.Linear(3, 3)
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Foreign(nn.Module):
    state_size = output_size = 3

    def forward(self, x, states):
        return x, states


def backwards_first():
    back = layers.LSTM(4, go_backwards=True, return_sequences=True, input_size=3)
    return layers.Bidirectional(back, backward_layer=layers.LSTM(4, return_sequences=True, input_size=3))


REFUSED = {
    "norm": (lambda: nn.BatchNorm1d(3), r"1\.0 \(BatchNorm1d\): its input may be \[B, C\] or \[B, C, T\]"),
    "norm of the batch": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        r"1\.0 \(BatchNorm1d\): expected running statistics",
    ),
    "another norm": (lambda: nn.GroupNorm(1, 3), r"1\.0 \(GroupNorm\): expected a recurrent layer, a Linear"),
    "norm of two axes": (lambda: nn.LayerNorm((2, 3)), r"1\.0 \(LayerNorm\): expected one axis, the features"),
    "celu": (lambda: nn.CELU(), r"1\.0 \(CELU\): expected a recurrent layer, a Linear"),
    "slope learned": (lambda: nn.PReLU(), r"1\.0 \(PReLU\): expected a recurrent layer, a Linear"),
    "bounded embedding": (
        lambda: nn.Embedding(3, 3, max_norm=1.0),
        r"1\.0 \(Embedding\): expected max_norm=None, got 1",
    ),
    "reflected": (
        lambda: nn.Conv1d(3, 3, 3, padding=1, padding_mode="reflect"),
        r"1\.0 \(Conv1d\): expected padding_mode='zeros', got 'reflect'",
    ),
    "planes": (lambda: nn.Conv2d(3, 3, 3), r"1\.0 \(Conv2d\): expected a recurrent layer, a Linear"),
    "dilated pool": (lambda: nn.MaxPool1d(3, dilation=2), r"1\.0 \(MaxPool1d\): expected dilation=1, got 2"),
    "pool rounded up": (lambda: nn.AvgPool1d(3, ceil_mode=True), r"1\.0 \(AvgPool1d\): expected ceil_mode=False"),
    "pool to several": (lambda: nn.AdaptiveAvgPool1d(2), r"1\.0 \(AdaptiveAvgPool1d\): expected output_size=1, got 2"),
    "flat batch": (lambda: nn.Flatten(0), r"1\.0 \(Flatten\): expected start_dim=1 and end_dim=-1, got 0 to -1"),
    "flat in part": (lambda: nn.Flatten(1, 2), r"1\.0 \(Flatten\): expected start_dim=1 and end_dim=-1, got 1 to 2"),
    "a vector over time": (
        lambda: nn.Sequential(nn.Flatten(), nn.Conv1d(3, 3, 3)),
        r"1\.0\.1 \(Conv1d\): expected \[B, C, T\] as its input, got \[B, C\]",
    ),
    "both first": (
        lambda: nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3), nn.GRU(3, 3, batch_first=True)),
        r"1\.0\.0 \(LSTM\): expected batch_first=True, because 1\.0\.2 \(GRU\) takes the batch first",
    ),
    "ours and time first": (
        lambda: nn.Sequential(layers.LSTM(3, input_size=3, return_sequences=True), nn.RNN(3, 3)),
        r"1\.0\.1 \(RNN\): expected batch_first=True, because 1\.0\.0 \(LSTM\)",
    ),
    "time first": (
        lambda: nn.Sequential(nn.LSTM(3, 3), nn.Conv1d(3, 3, 3)),
        r"1\.0\.0 \(LSTM\): expected batch_first=True, because 1\.0\.1 \(Conv1d\)",
    ),
    "a cell alone": (lambda: nn.GRUCell(3, 3), r"1\.0 \(GRUCell\): expected a recurrent layer"),
    "half": (
        lambda: nn.Linear(3, 3, dtype=torch.bfloat16),
        r"1\.0 \(Linear\): .*float32 or float64, got torch.bfloat16",
    ),
    "hook": (hooked, r"1\.0 \(Linear\): forward hooks aren't supported"),
    "subclass": (lambda: Doubled(3, 3), r"1\.0 \(Doubled\): expected a recurrent layer"),
    "softmax axis": (lambda: nn.Softmax(dim=1), r"1\.0 \(Softmax\): expected dim=-1, the feature axis, got 1"),
    "elu": (lambda: nn.ELU(-0.5), r"1\.0 \(ELU\): expected a recurrent layer"),
    "softplus": (lambda: nn.Softplus(2.0), r"1\.0 \(Softplus\): expected a recurrent layer"),
    "not built": (lambda: layers.LSTM(3), r"1\.0 \(LSTM\): .*weights don't exist yet"),
    "activation": (lambda: layers.LSTM(3, "gelu", input_size=3), r"1\.0 \(LSTM\): .*activation gelu"),
    "foreign": (lambda: layers.RNN(Foreign()), r"1\.0 \(RNN\): expected cells of cellstack\.layers, got Foreign"),
    "two outputs": (
        lambda: layers.Bidirectional(layers.LSTM(3, input_size=3), None),
        r"1\.0 \(Bidirectional\): expected a merge_mode",
    ),
    "backwards first": (backwards_first, r"1\.0 \(Bidirectional\): .*expected forward with go_backwards=False"),
    "distributed": (
        lambda: layers.TimeDistributed(nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
        r"1\.0 \(TimeDistributed\): expected a TimeDistributed over one",
    ),
    "distributed gru": (
        lambda: layers.TimeDistributed(nn.GRU(3, 3)),
        r"1\.0 \(TimeDistributed\): expected a TimeDistributed over one",
    ),
    "distributed norm": (
        lambda: layers.TimeDistributed(nn.GroupNorm(1, 3)),
        r"1\.0\.layer \(GroupNorm\): expected a recurrent layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_modules_are_named_by_path(case):
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        cs.load(nn.Sequential(nn.Linear(3, 3), nn.Sequential(make())))


@pytest.mark.parametrize("module", [None, 3, nn.Linear])
def test_other_objects_are_refused(module):
    with pytest.raises(TypeError, match="load: expected a path, a PyTorch module or a Keras model, got"):
        cs.load(module)
    with pytest.raises(TypeError, match="load: order: only files take options, got a Linear"):
        cs.load(nn.Linear(3, 3), order=["fc"])
    with pytest.raises(TypeError, match="expected a module that computes something, got Sequential"):
        cs.load(nn.Sequential(nn.Identity()))


def test_modules_whose_widths_do_not_match():
    with pytest.raises(cs.ShapeError, match="layer_1: expected an input of 4 features, got 3"):
        cs.load(nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)))


def test_it_does_not_import_torch():
    code = (
        "import sys, cellstack as cs\n"
        "class Model:\n    def to_nodes(self): return [cs.nodes.GlobalPool()]\n"
        "print(cs.load(Model()).names, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "('layer_0',) False\n"

"""Layers as torch modules: saving, copying, weights, configuration, gates, custom cells, bad input."""

import copy
import inspect
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from torch.nn.utils.rnn import pack_sequence

from cellstack import _kernel, layers
from cellstack.cells import KINDS
from cellstack.cells.arrays import Array
from cellstack.layers import ShapeError, State, Trace

MAKERS = {
    "lstm": lambda: layers.LSTM(4, return_sequences=True),
    "cell": lambda: layers.RNN(layers.LSTMCell(4, use_bias=False)),
    "stack": lambda: layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_state=True),
    "bidirectional": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True), "sum"),
    "stateful": lambda: layers.LSTM(4, stateful=True),
    "gru": lambda: layers.GRU(4, stateful=True, go_backwards=True),
    "simple": lambda: layers.SimpleRNN(4, return_state=True),
    "mixed": lambda: layers.RNN(
        layers.StackedRNNCells([layers.GRUCell(4), layers.LSTMCell(5, proj_size=4), layers.SimpleRNNCell(4)], True)
    ),
    "time distributed": lambda: layers.TimeDistributed(torch.nn.Linear(3, 2)),
}


def flatten(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [part for result in results for part in flatten(result)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flatten(a), flatten(b), strict=True))


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def x():
    return torch.randn(2, 5, 3)


# ── Copies and files ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_state_dict_round_trip_into_a_layer_without_weights(make, x):
    layer, other = make(), make()
    layer(x)
    other.load_state_dict(layer.state_dict())
    assert same(layer(x), other(x))


def test_deepcopy_and_pickle_before_and_after_building(make, x, tmp_path):
    layer = make()
    for _ in range(2):
        copied = copy.deepcopy(layer)
        torch.save(layer, tmp_path / "layer.pt")
        loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
        results = []
        for one in (layer, copied, loaded):
            torch.manual_seed(3)  # for the weights of layers that aren't built yet
            results.append(one(x))
        assert same(results[0], results[1])
        assert same(results[0], results[2])


@pytest.mark.parametrize("stateful", [False, True])
def test_a_layer_whose_state_has_a_graph_can_be_copied(x, stateful, tmp_path):
    lstm = layers.LSTM(4, input_size=3, stateful=stateful)
    h = torch.randn(2, 4, requires_grad=True)
    lstm.states = h * 2, h.exp()
    copied = copy.deepcopy(lstm)
    copy.deepcopy(lstm.state_dict())
    torch.save(lstm, tmp_path / "layer.pt")
    assert not copied.states.h.requires_grad
    y = lstm(x)
    assert torch.equal(copied(x), y)
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), y)
    assert torch.autograd.grad(y.sum(), h)[0].abs().sum() > 0


def test_get_config_makes_the_same_layer(make, x):
    layer = make()
    twin = type(layer).from_config(layer.get_config())
    assert repr(twin) == repr(layer)
    layer(x)
    twin(x)
    twin.set_weights(layer.get_weights())
    for one in (layer, twin):
        if hasattr(one, "reset_states"):
            one.reset_states()
    assert same(layer(x), twin(x))


GIVEN = {
    "units": 3,
    "activation": torch.nn.functional.gelu,
    "recurrent_activation": "hard_sigmoid",
    "use_bias": True,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": {"class_name": "Orthogonal", "config": {"gain": 0.5}},
    "bias_initializer": torch.nn.init.ones_,
    "unit_forget_bias": False,
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l1",
    "bias_regularizer": {"class_name": "L2", "config": {"l2": 0.5}},
    "activity_regularizer": "l1",
    "kernel_constraint": "max_norm",
    "recurrent_constraint": "unit_norm",
    "bias_constraint": "non_neg",
    "dropout": 0.25,
    "recurrent_dropout": 0.5,
    "seed": 4,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "zero_output_for_mask": True,
    "peepholes": True,
    "attention": True,
    "coupled": False,
    "proj_size": 2,
    "heads": 3,
    "reset_after": True,
    "layer_norm": True,
    "norm_epsilon": 1e-3,
    "clip": 5.0,
    "cell_clip": 3.0,
    "zoneout": 0.25,
    "zoneout_cell": 0.5,
    "gate_activations": {"g": "scaled_tanh(1.7159, 0.6667)"},
    "forget_bias": 2.0,
    "learn_initial_state": True,
    "implementation": 1,
    "use_cudnn": False,
    "remat": True,
    "input_size": 2,
    "dtype": "float64",
    "device": "cpu",
    "name": "encoder",
}


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_get_config_returns_all_arguments(kind):
    given = {name: GIVEN[name] for name in inspect.signature(kind).parameters}
    if "proj_size" in given:  # a cell with a projection has no more heads
        given["heads"] = 1
    layer = kind(**given)
    assert layer.get_config() == given
    assert kind.from_config(layer.get_config()).get_config() == given
    assert layer.cell.kernel.dtype == torch.float64
    both = layers.Bidirectional(layer, "ave")
    assert layers.Bidirectional.from_config(both.get_config()).get_config() == both.get_config()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_a_layer_takes_the_arguments_of_its_cell(kind):
    layer, cell, rnn = (
        {name: p.default for name, p in inspect.signature(getattr(layers, one)).parameters.items()}
        for one in (kind, f"{kind}Cell", "RNN")
    )
    of_layer = {name: value for name, value in rnn.items() if name != "cell"}
    if kind != "SimpleRNN":
        of_layer["use_cudnn"] = "auto"  # only a layer has it, as in Keras
    assert layer == {**cell, **of_layer}


def test_weights_in_the_order_and_layout_of_keras(x):
    both = layers.Bidirectional(layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)]), input_size=3)
    shapes = [w.shape for w in both.get_weights()]
    assert shapes == [(3, 16), (4, 16), (16,), (4, 20), (5, 20), (20,)] * 2
    weights = [np.random.default_rng(0).normal(size=shape) for shape in shapes]
    unbuilt = layers.Bidirectional(layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)]))
    unbuilt.set_weights(weights)
    for got, wanted in zip(unbuilt.get_weights(), weights, strict=True):
        assert np.array_equal(got, wanted.astype(np.float32))
    before = both.get_weights()
    with pytest.raises(ShapeError, match="expected 12 arrays"):
        both.set_weights(weights[:-1])
    with pytest.raises(ShapeError, match=r"recurrent_kernel \(4, 16\), got \(16, 4\)"):
        both.set_weights([weights[0], weights[1].T, *weights[2:]])
    assert all(np.array_equal(a, b) for a, b in zip(before, both.get_weights(), strict=True))
    before[0][:] = 0.0
    assert np.count_nonzero(both.get_weights()[0])


def test_the_forget_bias_is_stored_and_optional():
    assert layers.LSTMCell(2, input_size=1).bias.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert layers.LSTMCell(2, input_size=1, unit_forget_bias=False).bias.tolist() == [0] * 8
    assert layers.LSTMCell(2, input_size=1, use_bias=False).bias is None


def test_moving_a_layer_works_before_the_first_call(x):
    lstm = layers.LSTM(4, stateful=True).double()
    assert lstm(x.double()).dtype == torch.float64
    assert lstm.float()(x).dtype == torch.float32
    assert lstm.states.h.dtype == torch.float32


def test_regularisers_and_constraints_within_a_model(x):
    model = torch.nn.Sequential(
        layers.LSTM(4, kernel_regularizer="l2", activity_regularizer="l1", input_size=3, kernel_constraint="non_neg")
    )
    y = model(x)
    terms = layers.losses(model)
    torch.testing.assert_close(terms[0], 0.01 * y.abs().sum())
    torch.testing.assert_close(terms[1], 0.01 * model[0].cell.kernel.square().sum())
    sum(terms).backward()
    assert model[0].cell.kernel.grad is not None
    copy.deepcopy(model)
    layers.apply_constraints(model)
    assert model[0].cell.kernel.min() >= 0.0


# ── Gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gates_satisfy_the_equations_and_have_gradients(x):
    lstm = layers.LSTM(4, return_sequences=True, input_size=3)
    y, trace = lstm(x, return_gates=True)
    assert isinstance(trace, Trace)
    assert torch.equal(trace.h, y)
    c_prev = torch.cat([torch.zeros(2, 1, 4), trace.c[:, :-1]], dim=1)
    torch.testing.assert_close(trace.c, trace.f * c_prev + trace.i * trace.g, rtol=0, atol=tolerances.LOOP)
    torch.testing.assert_close(trace.h, trace.o * trace.c.tanh(), rtol=0, atol=tolerances.LOOP)
    loop = layers.LSTM(4, activation=lambda z: z.tanh(), return_sequences=True)
    loop.set_weights(lstm.get_weights())
    _, expected = loop(x, return_gates=True)
    for part, wanted in zip(trace, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=tolerances.LOOP)
        got, want = (
            torch.autograd.grad(p.square().sum(), layer.cell.kernel, retain_graph=True)[0]
            for p, layer in ((part, lstm), (wanted, loop))
        )
        assert (got - want).abs().max() <= tolerances.REFERENCE_GRADIENT * want.abs().max()


def test_gates_of_stacks_and_both_directions_have_the_order_of_y(x):
    rnn = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_sequences=True, return_state=True)
    y, state_1, state_2, traces = rnn(x, return_gates=True)
    assert torch.equal(traces[1].h, y)
    assert torch.equal(traces[0].h[:, -1], state_1.h)
    assert torch.equal(traces[1].c[:, -1], state_2.c)
    both = layers.Bidirectional(layers.LSTM(4, return_sequences=True))
    y, (ahead, back) = both(x, return_gates=True)
    assert torch.equal(y, torch.cat([ahead.h, back.h], dim=-1))
    y, trace = layers.LSTM(4, return_sequences=True, go_backwards=True)(x, return_gates=True)
    assert torch.equal(trace.h, y)
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    _, trace = layers.LSTM(4)(x, mask=mask, return_gates=True)
    assert torch.count_nonzero(trace.i[:, [1, 4]]) == 0
    assert torch.equal(trace.c[:, 1], trace.c[:, 0])


# ── Custom cells ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Plain:
    """A cell that isn't a torch module, with one state."""

    state_size = 3

    def call(self, x, states):
        h = (x[:, :3] + states[0]).tanh()
        return h, [h]


class Copying(torch.nn.Module):
    """A custom cell with two states that computes the same as ours."""

    state_size = (4, 4)
    output_size = 4

    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def forward(self, x, states, training=False):
        h, state = self.inner(x, states, training=training)
        return h, state


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_custom_cells_give_the_results_of_ours(x, masked, go_backwards, return_sequences):
    cell = layers.LSTMCell(4, input_size=3)
    flags = {"return_sequences": return_sequences, "return_state": True, "go_backwards": go_backwards}
    mask = torch.rand(2, 5) < 0.5 if masked else None
    start = (torch.randn(2, 4), torch.randn(2, 4))
    ours = layers.RNN(cell, **flags)(x, mask=mask, initial_state=start)
    theirs = layers.RNN(Copying(cell), **flags)(x, mask=mask, initial_state=start)
    assert same(ours, theirs)


def test_custom_cells_in_stacks_and_alone(x):
    rnn = layers.RNN([Plain(), layers.LSTMCell(4)], return_sequences=True, return_state=True)
    y, first, second = rnn(x)
    assert y.shape == (2, 5, 4)
    assert first.shape == (2, 3)
    assert isinstance(second, State)
    assert "custom cell Plain" in repr(rnn.plan())
    with pytest.raises(TypeError, match="return_gates"):
        rnn(x, return_gates=True)
    alone = layers.RNN(Plain(), stateful=True, return_state=True)
    y, state = alone(x)
    assert torch.equal(y, state)
    assert torch.equal(alone.states, state)
    assert alone(torch.zeros(2, 0, 3))[0].shape == (2, 3)
    with pytest.raises(ShapeError, match=r"Plain \[B=2, 3\], got \(2, 4\)"):
        alone(x, initial_state=[torch.zeros(2, 4)])
    with pytest.raises(TypeError, match="expected a cell"):
        layers.RNN(torch.nn.Linear(3, 3))


def test_both_directions_have_their_own_custom_cell():
    for cell in (Plain(), [Plain(), layers.LSTMCell(4)], layers.StackedRNNCells([Plain()])):
        both = layers.Bidirectional(layers.RNN(cell))
        ahead, back = (layer.cells[0].cell for layer in (both.forward_layer, both.backward_layer))
        assert ahead is not back
        assert type(back) is Plain


def test_time_distributed_folds_layers_of_ours(x):
    clips = torch.randn(2, 4, 5, 3)
    mask = torch.rand(2, 4, 5) < 0.7
    lstm = layers.LSTM(6, return_state=True, input_size=3)
    y, h, _c = layers.TimeDistributed(lstm)(clips, mask=mask)
    assert y.shape == h.shape == (2, 4, 6)
    assert torch.equal(y[:, 1], lstm(clips[:, 1], mask=mask[:, 1])[0])
    assert layers.TimeDistributed(torch.nn.Linear(3, 2))(torch.zeros(2, 0, 3)).shape == (2, 0, 2)
    with pytest.raises(ShapeError, match="three axes"):
        layers.TimeDistributed(lstm)(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="stateful"):
        layers.TimeDistributed(layers.LSTM(3, stateful=True))


# ── Plans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_says_which_kernel_and_why(x):
    fused = layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5, activation="relu")], input_size=3)
    assert all("fused cpu kernel (" in line for line in fused.plan())
    assert len(fused.plan()) == 2
    assert "activation gelu is not one of" in layers.LSTM(4, activation="gelu").plan()[0]
    assert "bfloat16 is neither float32 nor float64" in layers.LSTM(4, dtype="bfloat16").plan()[0]
    assert layers.LSTM(4, dtype="bfloat16")(x.bfloat16()).dtype == torch.bfloat16
    lines = layers.Bidirectional(layers.LSTM(4)).plan()
    assert lines[0].startswith("forward: ")
    assert lines[1].startswith("backward: ")


def test_a_stack_with_one_layer_that_the_kernel_lacks(x):
    cells = [layers.LSTMCell(4), layers.LSTMCell(5, activation="silu"), layers.LSTMCell(3), layers.LSTMCell(2)]
    rnn = layers.RNN(cells, return_sequences=True, return_state=True)
    y, *states = rnn(x)
    value = x
    for cell, state in zip(cells, states, strict=True):
        value, h, c = layers.RNN(cell, return_sequences=True, return_state=True)(value)
        assert torch.equal(h, state.h)
        assert torch.equal(c, state.c)
    assert torch.equal(value, y)


def test_transforms_of_torch_func_take_the_torch_loop(x):
    lstm = layers.LSTM(4, input_size=3)
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(lstm, (x,), (tangent,))
    step = 1e-3
    difference = (lstm(x + step * tangent) - lstm(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(along, difference, rtol=0, atol=tolerances.DIFFERENCE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(lstm(dual)).tangent, along)
        assert "torch.func" in lstm.plan()[0]
    each = torch.func.vmap(torch.func.grad(lambda row: lstm(row[None]).sum()))(x)
    leaf = x.clone().requires_grad_()
    lstm(leaf).sum().backward()
    torch.testing.assert_close(each, leaf.grad)


# ── Inputs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
        lambda x: torch.cat([x, x], dim=1).repeat_interleave(2, dim=1)[:, : 2 * x.shape[1] : 2],
        lambda x: x.flip(1).flip(1),
    ],
)
def test_any_strides_give_the_same_result(x, change):
    lstm = layers.LSTM(4, return_sequences=True, input_size=3)
    moved = change(x)
    assert torch.equal(moved, x)
    leaf, moved_leaf = x.clone().requires_grad_(), moved.detach().requires_grad_()
    a, b = lstm(leaf), lstm(moved_leaf)
    assert torch.equal(a, b)
    ga, gb = (torch.autograd.grad(y.square().sum(), x)[0] for y, x in ((a, leaf), (b, moved_leaf)))
    assert torch.equal(ga, gb)
    row = x[:1, :1].expand(2, 5, 3)
    assert torch.equal(lstm(row), lstm(row.contiguous()))
    states = [torch.randn(4, 2).t() for _ in "hc"]
    assert torch.equal(lstm(x, initial_state=states), lstm(x, initial_state=[s.contiguous() for s in states]))
    mask = (torch.rand(5, 2) < 0.5).t()
    assert torch.equal(lstm(x, mask=mask), lstm(x, mask=mask.contiguous()))


def test_nan_stays_nan_and_in_its_row(x):
    lstm = layers.LSTM(4, input_size=3)
    x[0, 2, 1] = float("nan")
    y = lstm(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    with torch.no_grad():
        lstm.cell.kernel[0, 0] = float("nan")
    assert lstm(torch.ones(2, 5, 3)).isnan().any()


PAIR = (torch.zeros(2, 4), torch.zeros(2, 4))
BAD = {
    "rank 2": (lambda f: f(torch.zeros(5, 3)), ShapeError, r"expected sequences \[B, T, I=3\], got \(5, 3\)"),
    "rank 4": (lambda f: f(torch.zeros(2, 5, 3, 1)), ShapeError, r"\(2, 5, 3, 1\)"),
    "width": (lambda f: f(torch.zeros(2, 5, 7)), ShapeError, r"I=3\], got \(2, 5, 7\)"),
    "float64": (lambda f: f(torch.zeros(2, 5, 3).double()), TypeError, r"float32.*got float64.*to\(torch.float32\)"),
    "float16": (lambda f: f(torch.zeros(2, 5, 3).half()), TypeError, "got float16"),
    "bfloat16": (lambda f: f(torch.zeros(2, 5, 3).bfloat16()), TypeError, "got bfloat16"),
    "complex": (lambda f: f(torch.zeros(2, 5, 3, dtype=torch.complex64)), TypeError, "real numbers"),
    "complex array": (lambda f: f(np.zeros((2, 5, 3), complex)), TypeError, "real numbers"),
    "text": (lambda f: f([["a"]]), TypeError, "real numbers"),
    "none": (lambda f: f(None), TypeError, "real numbers"),
    "ragged": (lambda f: f([[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]]), TypeError, "array of numbers"),
    "packed with a mask": (
        lambda f: f(pack_sequence([X[0]]), mask=X[:1, :, 0] == 0),
        ValueError,
        "mask and lengths aren't",
    ),
    "packed with lengths": (lambda f: f(pack_sequence([X[0]]), lengths=[3]), ValueError, "mask and lengths aren't"),
    "packed float64": (lambda f: f(pack_sequence([X[0].double()])), TypeError, "sequences of float32"),
    "packed width": (lambda f: f(pack_sequence([X[0, :, :2]])), ShapeError, r"I=3\], got \(1, 5, 2\)"),
    "packed state": (lambda f: f(X, initial_state=[pack_sequence([X[0]])] * 2), TypeError, "pad_packed_sequence"),
    "mask and lengths": (lambda f: f(X, mask=X[..., 0] == 0, lengths=[5, 5]), ValueError, "mask or lengths, got both"),
    "lengths past T": (lambda f: f(X, lengths=[6, 5]), ValueError, r"from 0 to T=5, got \[6, 5\]"),
    "lengths below 0": (lambda f: f(X, lengths=torch.tensor([-1, 5])), ValueError, "from 0 to T=5"),
    "lengths of another batch": (lambda f: f(X, lengths=[5]), ShapeError, r"lengths \[B=2\], got \(1,\)"),
    "lengths no integers": (lambda f: f(X, lengths=[5.0, 5.0]), TypeError, "lengths to be integers, got float64"),
    "lengths a mask": (lambda f: f(X, lengths=[True, True]), TypeError, "lengths to be integers, got bool"),
    "reset of integers": (lambda f: f(X, reset=torch.ones(2, 5)), TypeError, "reset of dtype bool.*piece begins"),
    "reset shape": (lambda f: f(X, reset=torch.ones(5, 2) == 1), ShapeError, r"reset \[B=2, T=5\], got \(5, 2\)"),
    "mask ragged": (lambda f: f(X, mask=[[True], [True, True]]), TypeError, "array of bool"),
    "sparse": (lambda f: f(torch.zeros(2, 5, 3).to_sparse()), TypeError, "dense"),
    "device": (lambda f: f(torch.zeros(2, 5, 3, device="meta")), ValueError, "on cpu.*got meta"),
    "mask of integers": (lambda f: f(X, mask=torch.ones(2, 5)), TypeError, "mask of dtype bool"),
    "mask of a list of integers": (lambda f: f(X, mask=[[1] * 5] * 2), TypeError, "mask of dtype bool"),
    "mask shape": (lambda f: f(X, mask=torch.ones(5, 2).bool()), ShapeError, r"mask \[B=2, T=5\], got \(5, 2\)"),
    "mask rank": (lambda f: f(X, mask=torch.ones(2, 5, 1).bool()), ShapeError, "mask"),
    "mask of one row": (lambda f: f(X, mask=torch.ones(1, 5).bool()), ShapeError, "mask"),
    "state batch": (lambda f: f(X, initial_state=[torch.zeros(3, 4)] * 2), ShapeError, r"\[B=2, H=4\], got \(3, 4\)"),
    "state of one row": (lambda f: f(X, initial_state=[torch.zeros(1, 4)] * 2), ShapeError, r"got \(1, 4\)"),
    "state width": (lambda f: f(X, initial_state=[PAIR[0], torch.zeros(2, 5)]), ShapeError, "c of state"),
    "only h": (lambda f: f(X, initial_state=[PAIR[0]]), ShapeError, r"pair \(h, c\), got 1"),
    "only h, a tensor": (lambda f: f(X, initial_state=PAIR[0]), ShapeError, r"pair \(h, c\)"),
    "three states": (lambda f: f(X, initial_state=[PAIR[0]] * 3), ShapeError, r"pair \(h, c\), got 3"),
    "state dtype": (lambda f: f(X, initial_state=[p.double() for p in PAIR]), TypeError, "state of float32"),
    "state a number": (lambda f: f(X, initial_state=3), TypeError, "state of tensors"),
    "unknown argument": (lambda f: f(X, time_major=True), TypeError, "time_major"),
}
X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_error(name):
    call, error, message = BAD[name]
    for layer in (layers.LSTM(4, input_size=3), layers.LSTM(4, input_size=3, activation="gelu")):
        with pytest.raises(error, match=message):
            call(layer)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.LSTM(0), ShapeError, "units >= 1"),
        (lambda: layers.LSTM(2.5), TypeError, "integer"),
        (lambda: layers.LSTM(4, activation="tanhh"), ValueError, "tanhh"),
        (lambda: layers.LSTM(4, recurrent_activation=3), TypeError, "callable"),
        (lambda: layers.LSTM(4, kernel_initializer="glorot"), ValueError, "kernel_initializer.*glorot_uniform"),
        (lambda: layers.LSTM(4, kernel_regularizer="l3"), ValueError, "kernel_regularizer"),
        (lambda: layers.LSTM(4, bias_constraint=3), TypeError, "bias_constraint"),
        (lambda: layers.LSTM(4, time_major=True), TypeError, "time_major"),
        (lambda: layers.LSTM(4, dtype="int32"), TypeError, "floating"),
        (lambda: layers.LSTM(4, seed="a"), TypeError, "seed"),
        (lambda: layers.LSTM(True), TypeError, "units to be an integer"),
        (lambda: layers.LSTM(2**40), ShapeError, "units >= 1 and below"),
        (lambda: layers.LSTM(4).set_weights(["a"]), TypeError, "^LSTM: expected weights as arrays"),
        (lambda: layers.LSTM(4).set_weights([[[1.0], [2.0, 3.0]]]), TypeError, "^LSTM: expected weights as arrays"),
        (lambda: layers.LSTM(4).set_weights([np.zeros((3, 16), complex)]), TypeError, "real numbers"),
        (lambda: layers.LSTM(4)(X, training="x"), TypeError, "training to be True"),
        (lambda: layers.LSTMCell(4)(X[:, 0], training="x"), TypeError, "training to be True"),
        (lambda: layers.Bidirectional(layers.LSTM(4))(X, training="x"), TypeError, "training to be True"),
        (lambda: layers.LSTM(4).set_weights([]), ShapeError, "got 0 arrays"),
        (
            lambda: layers.LSTM(5).load_state_dict(layers.LSTM(4, input_size=3).state_dict()),
            RuntimeError,
            r"kernel \[I, 4H=20\], got \(3, 16\)",
        ),
        (lambda: layers.RNN([layers.LSTMCell(4)])(X, initial_state=[1]), TypeError, "state of tensors"),
        (lambda: layers.LSTM(4, input_size=0), ShapeError, "input_size"),
        (lambda: layers.RNN([]), ValueError, "at least one"),
        (lambda: layers.RNN(3), TypeError, "expected a cell"),
        (lambda: layers.RNN([layers.StackedRNNCells([layers.LSTMCell(3)])]), TypeError, "flat list"),
        (
            lambda: layers.RNN([layers.LSTMCell(3), layers.LSTMCell(4, input_size=5)], input_size=2),
            ShapeError,
            "cell 1 has weights for input_size 5, but the cell below it returns 3 values",
        ),
        (lambda: layers.Bidirectional(torch.nn.LSTM(3, 4)), TypeError, "RNN, LSTM, GRU or Simple"),
        (lambda: layers.Bidirectional(layers.LSTM(3), "max"), ValueError, "merge_mode"),
        (lambda: layers.Bidirectional(layers.LSTM(3), backward_layer=layers.LSTM(3)), ValueError, "opposite"),
        (
            lambda: layers.Bidirectional(
                layers.LSTM(3), backward_layer=layers.LSTM(3, go_backwards=True, return_state=True)
            ),
            ValueError,
            "return_state",
        ),
        (lambda: layers.Bidirectional(layers.LSTM(3))(X, initial_state=[PAIR[0]] * 3), ShapeError, "got 3"),
        (lambda: layers.LSTMCell(4)(X), ShapeError, "no time axis"),
        (
            lambda: layers.RNN([layers.LSTMCell(4), layers.LSTMCell(4)])(X, initial_state=[PAIR]),
            ShapeError,
            r"per cell \(2\)",
        ),
    ],
)
def test_bad_constructions_and_calls(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_of_numpy_are_integers():
    lstm = layers.LSTM(np.int64(4), seed=np.int64(3), dropout=0.5)
    assert json.loads(json.dumps(lstm.get_config()))["units"] == 4
    assert type(lstm.units) is type(lstm.get_config()["seed"]) is int
    assert lstm(X, training=np.bool_(False)).shape == (2, 4)


def test_errors_name_the_layer():
    with pytest.raises(ShapeError, match=r"^LSTM 'encoder': expected"):
        layers.LSTM(4, name="encoder")(torch.zeros(2, 3))


def test_autocast_feeds_a_layer_in_the_weights_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), layers.LSTM(4, input_size=6))
    x = torch.randn(2, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), atol=tolerances.BFLOAT16, rtol=0)
    y.sum().backward()
    assert model[0].weight.grad is not None


@pytest.fixture(params=_kernel.isas())
def isa(request):
    _kernel.set_isa(request.param)
    yield request.param
    _kernel.set_isa(os.environ.get("CELLSTACK_ISA", ""))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_training_under_autocast(isa, kind):
    """Inputs are widened; weights, states, sums and gradients stay float32.

    They have the bits of float32 too, but where the processor multiplies pairs of bfloat16.
    """
    torch.manual_seed(0)
    layer = getattr(layers, kind)(8, input_size=6, return_sequences=True)
    x = torch.randn(4, 9, 6).bfloat16()
    results = []
    for mixed in (True, False):
        layer.zero_grad()
        given = (x if mixed else x.float()).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            (line,) = layer.plan()
            assert "fused cpu kernel" in line
            products = " with products in bfloat16" if isa == "avx512bf16" else ""
            assert line.endswith(f"in float32{products} under torch.autocast") == mixed
            y = layer(given)
            y.square().mean().backward()
        assert given.grad is not None
        assert given.grad.dtype is given.dtype
        assert {weight.grad.dtype for weight in layer.parameters()} == {torch.float32}
        results.append([y.detach(), *(weight.grad.clone() for weight in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert one.dtype is torch.float32
        if isa == "avx512bf16":
            assert 0 < (one - other).norm() < 2e-2 * other.norm()
        else:
            torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_rounding_under_autocast_is_the_same_for_all_calls(isa):
    """Steps, sequences, with gradients and without, gates saved or recomputed: the same bits."""
    torch.manual_seed(0)
    cell = layers.LSTMCell(20, input_size=7)
    layer, again = layers.RNN(cell, return_sequences=True), layers.RNN(cell, return_sequences=True, remat=True)
    x = torch.randn(3, 5, 7)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            whole, state, steps = layer(x), None, []
            for t in range(5):
                h, state = cell(x[:, t], state)
                steps.append(h)
        for module in (layer, again):
            cell.zero_grad()
            y = module(x)
            torch.testing.assert_close(y, whole, atol=0, rtol=0)
            y.square().sum().backward()
            found.append([weight.grad.clone() for weight in cell.parameters()])
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=0, rtol=0)
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert (layer(x) == whole).all() == (isa != "avx512bf16")
    if isa == _kernel.isas()[0]:
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x), whole, atol=0, rtol=0)
    with torch.autocast("cpu", torch.float16):  # our kernels don't multiply float16
        mixed = layer(x)
    torch.testing.assert_close(mixed, layer(x), atol=0, rtol=0)


def test_an_array_without_an_initializer_is_an_error(monkeypatch):
    """An array of a new kind of cell must not stay zero unnoticed."""
    with pytest.raises(TypeError, match="first"):
        Array("weights", "H")  # pyright: ignore[reportCallIssue]
    own = [one._replace(first="unknown") if one.name == "peepholes" else one for one in KINDS["lstm"].arrays]
    monkeypatch.setitem(KINDS, "lstm", replace(KINDS["lstm"], arrays=tuple(own)))
    with pytest.raises(KeyError, match="unknown"):
        layers.LSTM(4, peepholes=True).build(3)
    layers.LSTM(4, layer_norm=True, learn_initial_state=True).build(3)

"""Every kind of layer with every flag, as a torch module: compared with the reference, saved, masked, stacked."""

import copy
import json

import numpy as np
import pytest
import tolerances
import torch
from kinds import TESTED

from cellstack import layers, reference
from cellstack.cells import KINDS as DECLARED
from cellstack.layers import HiddenState, State

KINDS = {
    kind.title: (getattr(layers, kind.title), getattr(layers, f"{kind.title}Cell"), kind.state, kind.trace)
    for kind in DECLARED.values()
}
CASES = [
    (DECLARED[kind].title, flags)
    for kind, tested in TESTED.items()
    for flags in (*tested.flags.values(), *([{"heads": 5}] if DECLARED[kind].has_recurrent_kernel else []))
]
each_case = pytest.mark.parametrize(("kind", "flags"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
B, T, I, H = 3, 6, 3, 5  # noqa: E741


def randomise(module):
    """Fill every array with different numbers, gains around 1."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(float(name.endswith("_gain")) + 0.5 * torch.randn_like(weight))
    return module


def make(kind, flags, **more):
    """Return a layer with random weights in evaluation mode, in which zoneout draws nothing."""
    return randomise(KINDS[kind][0](H, **flags, input_size=I, dtype="float64", **more)).eval()


def random_state(layer, batch=B):
    state = {name: torch.randn(batch, size).double() for name, size in layer.cell.spec.state_sizes.items()}
    if "n" in state:  # a sum of weights
        state["n"] = 0.5 + state["n"].abs()
    return KINDS[type(layer).__name__][2](*state.values())


def flatten(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [part for result in results for part in flatten(result)]


def assert_close(got, wanted):
    got, wanted = flatten(got), flatten(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.REFERENCE_DOUBLE)


@pytest.fixture
def x():
    return torch.randn(B, T, I).double()


# ── One layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@each_case
@pytest.mark.parametrize("go_backwards", [False, True])
def test_a_call_is_the_reference(kind, flags, go_backwards, x):
    layer = make(kind, flags, return_sequences=True, return_state=True, go_backwards=go_backwards)
    mask, reset, start = torch.rand(B, T) < 0.7, torch.rand(B, T) < 0.3, random_state(layer)
    y, *state, trace = layer(x, initial_state=start, mask=mask, reset=reset, return_gates=True)
    spec = layer.spec
    arrays = {name: getattr(layer.cell, name).detach().numpy() for name in spec.shapes}
    shifted = reset if not go_backwards else torch.cat([reset[:, 1:], torch.zeros(B, 1).bool()], dim=1)
    out = reference.forward(
        spec,
        arrays,
        x.numpy(),
        [part.numpy() for part in start],
        mask=mask.numpy(),
        reset=shifted.numpy(),
        reverse=go_backwards,
    )

    def in_order(array):
        return torch.from_numpy(np.array(array[:, ::-1] if go_backwards else array))

    assert y.shape == (B, T, spec.output_size)
    assert_close([y, *state], [in_order(out.y), *map(torch.from_numpy, out.state)])
    assert type(trace) is KINDS[kind][3]
    assert torch.equal(trace.h, y)
    gates = [getattr(trace, gate) for gate in trace._fields if gate not in spec.state_sizes]
    assert_close(gates, [in_order(out.gates[:, :, k]) for k in range(len(gates))])
    assert_close([getattr(trace, name) for name in out.state._fields[1:]], list(map(in_order, out.states)))


@each_case
def test_a_layer_comes_back_from_its_configuration_and_its_files(kind, flags, x):
    layer = make(kind, flags, stateful=True, return_state=True)
    layer(x)
    config = json.loads(json.dumps(layer.get_config()))
    saved = layer.state_dict()
    assert {f"states.0.{name}" for name in layer.spec.state_sizes} <= set(saved)
    for other in (KINDS[kind][0].from_config({**config, "input_size": None}), KINDS[kind][0].from_config(config)):
        other.load_state_dict(saved)
        other.eval()
        assert repr(other) == repr(layer)
        assert type(other.states) is KINDS[kind][2]
        assert all(torch.equal(a, b) for a, b in zip(other.states, layer.states, strict=True))
        assert other.spec == layer.spec
    results = [one(x) for one in (layer, other, copy.deepcopy(other))]
    assert all(torch.equal(a, b) for a, b in zip(flatten(results[0]), flatten(results[1]), strict=True))


@each_case
def test_states_are_honoured(kind, flags, x):
    layer = make(kind, flags, return_sequences=True, return_state=True)
    start = random_state(layer)
    expected = layer(x, initial_state=start)
    plain = layer(x)
    for given in (start, tuple(start), [part.numpy() for part in start]):
        layer.states = given
        assert type(layer.states) is type(start)
        assert_close(layer(x), expected)
        assert layer.states is None
    assert_close(layer(x), plain)
    fresh = [part.detach() for part in layer.cell.get_initial_state(B)]
    assert_close(layer(x, initial_state=fresh), plain)
    assert not torch.allclose(expected[0], plain[0])

    carrying = make(kind, flags, return_sequences=True, return_state=True, stateful=True)
    carrying.set_weights(layer.get_weights())
    first, last = carrying(x[:, :2]), carrying(x[:, 2:])
    assert_close([torch.cat([first[0], last[0]], dim=1), *last[1:]], plain)
    carrying.reset_states(indices=[0, 2])
    for part, begin in zip(carrying.states, fresh, strict=True):
        assert torch.equal(part[[0, 2]], begin[:2])
        assert not torch.equal(part[1], begin[1])
    carrying.reset_states()
    assert_close(carrying(x), plain)


def test_a_single_h_is_a_state():
    for kind in (layers.GRU, layers.SimpleRNN, layers.MinGRU, layers.MinLSTM):
        layer = kind(4, input_size=3)
        x, h = torch.randn(2, 5, 3), torch.randn(2, 4)
        expected = layer(x, initial_state=(h,))
        for given in (h, [h], HiddenState(h), [HiddenState(h)], h.numpy(), [h.tolist()]):
            assert torch.equal(layer(x, initial_state=given), expected)
        with pytest.raises(layers.ShapeError, match=r"1 array\(s\), h, got 2"):
            layer(x, initial_state=(h, h))
        with pytest.raises(layers.ShapeError, match=r"\[B=2, H=4\], got \(2, 5\)"):
            layer(x, initial_state=torch.zeros(2, 5))


@each_case
@pytest.mark.parametrize("go_backwards", [False, True])
def test_a_masked_row_is_the_row_without_its_masked_steps(kind, flags, go_backwards, x):
    layer = make(kind, flags, return_state=True, return_sequences=True, go_backwards=go_backwards)
    mask = torch.rand(B, T) < 0.6
    y, *state, trace = layer(x, mask=mask, return_gates=True)
    x[~mask] = torch.nan  # must have no effect
    assert_close([*layer(x, mask=mask)], [y, *state])
    processed = mask.flip(1) if go_backwards else mask
    for b in range(B):
        row, *end = layer(x[b : b + 1, mask[b]])
        assert_close(end, [part[b : b + 1] for part in state])
        assert_close(row[0], y[b, processed[b]])
    gates = [getattr(trace, gate) for gate in trace._fields if gate not in layer.spec.state_sizes]
    assert all(torch.count_nonzero(gate[~processed]) == 0 for gate in gates)
    begin = layer.cell.get_initial_state(B)[0]
    previous = torch.cat([begin[:, None], y[:, :-1]], dim=1)
    assert torch.equal(y[~processed], previous[~processed])
    zeroed = make(kind, flags, return_sequences=True, go_backwards=go_backwards, zero_output_for_mask=True)
    zeroed.set_weights(layer.get_weights())
    assert_close(zeroed(x, mask=mask), torch.where(processed[:, :, None], y, 0.0))


@each_case
def test_going_backwards_equals_going_forwards_over_the_reversed_sequence(kind, flags, x):
    ahead = make(kind, flags, return_sequences=True, return_state=True)
    back = make(kind, flags, return_sequences=True, return_state=True, go_backwards=True)
    back.set_weights(ahead.get_weights())
    assert_close(back(x, return_gates=True), ahead(x.flip(1), return_gates=True))


@pytest.mark.parametrize(
    ("kind", "flags", "merge_mode"),
    [
        pytest.param(*case, merge_mode, marks=() if (n + place) % 3 == 0 else pytest.mark.slow)
        for n, case in enumerate(CASES)
        for place, merge_mode in enumerate(["concat", "sum", None])
    ],
)
def test_both_directions(kind, flags, merge_mode, x):
    layer = make(kind, flags, return_sequences=True, return_state=True)
    both = randomise(layers.Bidirectional(layer, merge_mode)).eval()
    ahead, back = both.forward_layer, both.backward_layer
    assert type(back) is type(ahead)
    assert back.go_backwards
    start = [*random_state(layer), *random_state(layer)]
    half = len(start) // 2
    results = both(x, initial_state=start, return_gates=True)
    y, *state, trace = ahead(x, initial_state=start[:half], return_gates=True)
    y_back, *state_back, trace_back = back(x, initial_state=start[half:], return_gates=True)
    y_back = y_back.flip(1)
    trace_back = [part.flip(1) for part in trace_back]
    merged = {"concat": [torch.cat([y, y_back], dim=-1)], "sum": [y + y_back], None: [y, y_back]}[merge_mode]
    assert_close(results, [*merged, *state, *state_back, (trace, trace_back)])
    config = json.loads(json.dumps(both.get_config()))
    twin = layers.Bidirectional.from_config(config)
    twin.load_state_dict(both.state_dict())
    assert_close(twin.eval()(x, initial_state=start)[0], results[0])


def test_both_directions_of_two_kinds(x):
    ahead = layers.LSTM(4, return_state=True, input_size=I, dtype="float64")
    back = layers.GRU(4, return_state=True, go_backwards=True, input_size=I, dtype="float64")
    both = layers.Bidirectional(ahead, backward_layer=back)
    _, *states = both(x)
    assert [part.shape for part in states] == [(B, 4)] * 3
    assert_close(both(x, initial_state=states)[1:3], ahead(x, initial_state=states[:2])[1:])
    both.states = states
    assert len(both.states) == 3
    with pytest.raises(layers.ShapeError, match="2 states for the forward layer, then 1 for the backward layer, got 4"):
        both(x, initial_state=[*states, states[0]])


def test_a_learned_start_is_trained_and_saved(x):
    for kind in (name for name, (_, cell, _, _) in KINDS.items() if "learn_initial_state" in cell.signature):
        layer = make(kind, {"learn_initial_state": True}, stateful=True)
        layer(x).sum().backward()
        assert getattr(layer.cell, f"initial_{DECLARED[layer.kind].memory}").grad.abs().min() > 0
        layer.zero_grad()
        layer(x).sum().backward()  # uses and trains the initial state
        assert layer.cell.initial_h.grad is None or torch.count_nonzero(layer.cell.initial_h.grad) == 0
        layer.reset_states()
        with torch.no_grad():
            layer.cell.initial_h.add_(1.0)
        twin = make(kind, {"learn_initial_state": True})
        twin.load_state_dict(layer.state_dict())
        assert_close(twin(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_keeps_old_values_in_training_and_their_share_at_inference(kind, x):
    layer = make(kind, {"zoneout": 0.5, "seed": 3}, return_sequences=True)
    calm = layer(x)
    assert torch.equal(calm, layer(x))
    layer.train()
    _, trace = layer(x, return_gates=True)
    before = torch.cat([torch.zeros(B, 1, H).double(), trace.h[:, :-1]], dim=1)
    kept = (trace.h == before).double().mean()
    assert 0.3 < kept < 0.7
    assert not torch.equal(layer(x), trace.h)
    twin = make(kind, {"zoneout": 0.5, "seed": 3}, return_sequences=True).train()
    twin.set_weights(layer.get_weights())
    assert torch.equal(twin(x), trace.h)


# ── Stacks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STACK = [
    (layers.LSTMCell, 4, {"proj_size": 3, "peepholes": True}),
    (layers.GRUCell, 3, {"learn_initial_state": True}),
    (layers.SimpleRNNCell, 5, {"layer_norm": True}),
    (layers.MinLSTMCell, 5, {"zoneout": 0.1}),
    (layers.MinGRUCell, 5, {"learn_initial_state": True}),
    (layers.GRUCell, 5, {"reset_after": False}),
    (layers.LSTMCell, 5, {"activation": "gelu"}),  # the kernel doesn't support gelu
    (layers.LSTMCell, 5, {"coupled": True, "zoneout": 0.2, "learn_initial_state": True}),
]


def make_stack(residual=False, **flags):
    cells = [cell(units, dtype="float64", **more) for cell, units, more in STACK]
    rnn = layers.RNN(layers.StackedRNNCells(cells, residual=residual), input_size=I, **flags)
    return randomise(rnn).eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
def test_a_mixed_stack_is_its_layers_one_after_the_other(masked, resets, residual, go_backwards, x):
    flags = {"return_sequences": True, "return_state": True, "go_backwards": go_backwards}
    stack = make_stack(residual, **flags)
    mask = torch.rand(B, T) < 0.7 if masked else None
    reset = torch.rand(B, T) < 0.3 if resets else None
    y, *states, traces = stack(x, mask=mask, reset=reset, return_gates=True)
    assert [type(state) for state in states] == [cell.State for cell in stack.cells]
    value = x
    counts = torch.ones(B, T, 1).bool() if mask is None else mask[:, :, None]
    for n, (cell, state, trace) in enumerate(zip(stack.cells, states, traces, strict=True)):
        h, *end, its_trace = layers.RNN(cell, **flags).eval()(value, mask=mask, reset=reset, return_gates=True)
        assert_close(end, [*state])
        assert_close(its_trace, trace)
        h = h.flip(1) if go_backwards else h
        value = h + value if residual and n and h.shape == value.shape else h
    y = y.flip(1) if go_backwards else y
    assert_close(torch.where(counts, y, 0.0), torch.where(counts, value, 0.0))
    last = make_stack(residual, return_sequences=False, go_backwards=go_backwards)
    last.set_weights(stack.get_weights())
    assert_close(last(x, mask=mask, reset=reset), y[:, 0 if go_backwards else -1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
def test_a_custom_cell_in_a_stack_gives_the_same_results(masked, resets, residual, go_backwards, x):
    class Foreign(torch.nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.inner, self.state_size, self.output_size = cell, cell.state_size, cell.output_size
            self.get_initial_state = cell.get_initial_state

        def forward(self, x, states):
            return self.inner(x, states)

    flags = {"return_sequences": True, "return_state": True, "go_backwards": go_backwards}
    ours = make_stack(residual, **flags)
    cells = [Foreign(cell) if n in (1, 7) else cell for n, cell in enumerate(ours.cells)]
    theirs = layers.RNN(layers.StackedRNNCells(cells, residual=residual), **flags).eval()
    mask = torch.rand(B, T) < 0.7 if masked else None
    reset = torch.rand(B, T) < 0.3 if resets else None
    start = [[part + 1.0 for part in state] for state in ours(x)[1:]]
    for begin in (start, None):
        wanted, got = (layer(x, initial_state=begin, mask=mask, reset=reset) for layer in (ours, theirs))
        assert_close(got, wanted)
    assert_close(theirs(x[:, :0]), ours(x[:, :0]))
    assert isinstance(got[1], State)


def test_a_stack_is_saved_and_loaded(x):
    stack = make_stack(True, stateful=True)
    stack(x)
    config = json.loads(json.dumps(stack.get_config()))
    saved = stack.state_dict()
    assert {"states.0.h", "states.0.c", "states.1.h", "states.2.h"} <= set(saved)
    assert "states.1.c" not in saved
    twin = layers.RNN.from_config({**config, "input_size": None})
    assert twin.residual
    twin.load_state_dict(saved)
    assert torch.equal(twin.eval()(x), stack(x))
    twin.states = [tuple(state) for state in stack.states]
    assert torch.equal(twin(x), stack(x))


def test_a_stack_of_both_directions(x):
    both = layers.Bidirectional(make_stack(True, return_sequences=True, return_state=True), "sum").eval()
    both.set_weights([0.5 * np.random.default_rng(0).normal(size=w.shape) for w in both.get_weights()])
    y, *states = both(x)
    assert y.shape == (B, T, 5)
    assert len(states) == 2 * len(STACK)
    ahead, back = both.forward_layer(x)[0], both.backward_layer(x)[0].flip(1)
    assert_close(y, ahead + back)
    assert_close(both(x, initial_state=states)[1 : len(STACK) + 1], both.forward_layer(x, states[: len(STACK)])[1:])


def test_flags_that_a_kind_lacks_are_refused():
    for kind, name in (
        (layers.GRU, "peepholes"),
        (layers.SimpleRNN, "reset_after"),
        (layers.GRU, "forget_bias"),
        *(
            (kind, f"recurrent_{name}")
            for kind in (layers.MinGRU, layers.MinLSTM)
            for name in ("dropout", "initializer")
        ),
    ):
        with pytest.raises(TypeError, match=name):
            kind(4, **{name: True})
    with pytest.raises(ValueError, match=r"^GRU.*reset_after=True with layer_norm"):
        layers.GRU(4, reset_after=False, layer_norm=True)
    with pytest.raises(layers.ShapeError, match=r"^LSTM.*proj_size"):
        layers.LSTM(4, proj_size=4)


def test_a_configuration_is_a_copy():
    gates = {"o": "relu"}
    layer = layers.LSTM(4, gate_activations=gates, input_size=3)
    gates["o"] = "softsign"
    layer.get_config()["gate_activations"]["o"] = "elu"
    assert layer.get_config()["gate_activations"] == {"o": "relu"}
    both = layers.Bidirectional(layer)
    assert both.backward_layer.spec == layer.spec


@pytest.mark.parametrize("flag", ["return_sequences", "return_state", "go_backwards", "stateful"])
def test_flags_are_bools(flag):
    with pytest.raises(TypeError, match=f"GRU: expected {flag} to be True or False, got 'False'"):
        layers.GRU(4, **{flag: "False"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0]])
def test_a_forget_bias_is_a_finite_number_or_an_initializer(value):
    with pytest.raises(ValueError, match="LSTMCell: expected forget_bias to be a finite number or an initializer"):
        layers.LSTM(4, forget_bias=value, input_size=3)

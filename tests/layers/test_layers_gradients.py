"""Gradients of whole layers: of first and second order, of negated views, and with masked steps."""

from functools import partial

import pytest
import tolerances
import torch

from cellstack import layers
from cellstack.cells.spec import CellSpec
from cellstack.layers import op

BATCH, STEPS, WIDTH = 2, 3, 2
MASK = torch.tensor([[False, True, False], [True, True, False]])


@pytest.fixture(params=["direct", "registered"])
def path(request, monkeypatch):
    """Calls of the kernel with and without torch's dispatcher."""
    if request.param == "registered":
        monkeypatch.setattr(op, "direct", lambda x: False)


def flatten(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [part for result in results for part in flatten(result)]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def function_of(layer, **kwargs):
    """Return the layer as a function of x and of its parameters, with constant dropout masks."""
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        for name, buffer in layer.named_buffers():
            if name.endswith("draws"):
                buffer.zero_()
        results = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), kwargs)
        return tuple(flatten(results))

    return run, [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]


# ── Finite differences ────────────────────────────────────────────────────────────────────────────────────────────────


def lstm(units=2, **kwargs):
    return layers.LSTM(units, input_size=WIDTH, dtype="float64", **kwargs)


FLAGS = {"peepholes": True, "proj_size": 1, "layer_norm": True, "clip": 2.0, "cell_clip": 2.0, "zoneout": 0.2}
FLAGS |= {"zoneout_cell": 0.3, "recurrent_dropout": 0.3, "learn_initial_state": True}


def one(kind, **kwargs):
    """A layer of that kind with random parameters, including those that are initialised with zeros or ones."""
    settings = {"return_sequences": True, "return_state": True, "input_size": WIDTH, "dtype": "float64"}
    return shaken(getattr(layers, kind)(3, **{**settings, **kwargs}))


def shaken(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def residual(**kwargs):
    cells = [layers.LSTMCell(3, proj_size=2, dtype="float64"), layers.GRUCell(2, dtype="float64")]
    cells += [layers.SimpleRNNCell(2, activation="gelu", dtype="float64")]
    return shaken(layers.RNN(layers.StackedRNNCells(cells, residual=True), input_size=WIDTH, **kwargs))


def stack(**kwargs):
    cells = [layers.LSTMCell(2, dtype="float64"), layers.LSTMCell(3, dtype="float64", activation="softsign")]
    return layers.RNN(cells, input_size=WIDTH, **kwargs)


LAYERS = {
    "last": lambda: lstm(),
    "sequences": lambda: lstm(return_sequences=True),
    "state": lambda: lstm(return_state=True),
    "backwards": lambda: lstm(return_sequences=True, return_state=True, go_backwards=True),
    "zeros": lambda: lstm(return_sequences=True, zero_output_for_mask=True),
    "zeros at the end": lambda: lstm(zero_output_for_mask=True),
    "stateful": lambda: lstm(return_sequences=True, return_state=True, stateful=True),
    "dropout": lambda: lstm(return_sequences=True, dropout=0.4, recurrent_dropout=0.4, seed=5),
    "torch loop": lambda: lstm(return_sequences=True, return_state=True, activation="silu"),
    "gru": lambda: one("GRU", zoneout=0.3, dropout=0.4, recurrent_dropout=0.4, seed=2),
    "gru, reset before": lambda: one("GRU", reset_after=False, learn_initial_state=True, go_backwards=True),
    "gru, torch loop": lambda: one("GRU", activation="gelu", layer_norm=True),
    "simple": lambda: one("SimpleRNN", layer_norm=True, zoneout=0.2, seed=2),
    "minimal gru": lambda: one("MinGRU", dropout=0.4, zoneout=0.2, seed=2),
    "minimal gru, torch loop": lambda: one("MinGRU", activation="gelu", layer_norm=True),
    "minimal lstm": lambda: one("MinLSTM", learn_initial_state=True, go_backwards=True),
    "minimal lstm, torch loop": lambda: one("MinLSTM", activation="gelu"),
    "flags": lambda: one("LSTM", **FLAGS, seed=3),
    "flags, torch loop": lambda: one("LSTM", **FLAGS, activation="silu", seed=3),
    "residual": lambda: residual(return_sequences=True, return_state=True),
    "residual backwards": lambda: residual(go_backwards=True),
    "stack": lambda: stack(return_sequences=True, return_state=True),
    "stack backwards": lambda: stack(return_sequences=True, go_backwards=True),
    **{
        f"both, {mode}": lambda mode=mode: layers.Bidirectional(lstm(return_sequences=True, return_state=True), mode)
        for mode in ("concat", "sum", "mul", "ave", None)
    },
    "both, stack": lambda: layers.Bidirectional(stack()),
    "time distributed": lambda: layers.TimeDistributed(torch.nn.Linear(WIDTH, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers_are_finite_differences(name, masked):
    layer = LAYERS[name]()
    run, parameters = function_of(layer, mask=MASK if masked else None)

    def fresh(x, *values):
        if getattr(layer, "stateful", False):
            layer.reset_states()
        return run(x, *values)

    assert torch.autograd.gradcheck(fresh, (draw(BATCH, STEPS, WIDTH), *parameters), fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("sequences", "backwards", "dropout", "torch loop", "stack", "both, concat", "gru", "gru, reset before"),
        *("gru, torch loop", "simple", "flags", "flags, torch loop", "residual"),
        *("minimal gru", "minimal gru, torch loop", "minimal lstm", "minimal lstm, torch loop"),
    ],
)
def test_gradients_of_traces_are_finite_differences(name, masked):
    run, parameters = function_of(LAYERS[name](), return_gates=True, mask=MASK if masked else None)
    assert torch.autograd.gradcheck(run, (draw(BATCH, STEPS, WIDTH), *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "name",
    [
        "sequences",
        "backwards",
        "gru",
        "gru, reset before",
        "simple",
        "minimal gru",
        "minimal lstm",
        "flags",
        "residual",
    ],
)
def test_gradients_of_pieces_are_finite_differences(name):
    reset = torch.tensor([[False, True, False], [True, False, True]])
    run, parameters = function_of(LAYERS[name](), reset=reset, mask=torch.tensor([[True] * 3, [True, True, False]]))
    assert torch.autograd.gradcheck(run, (draw(BATCH, STEPS, WIDTH), *parameters), fast_mode=True)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_gradients_of_a_state_are_finite_differences(stateful, given):
    layer = lstm(return_sequences=True, return_state=True, stateful=stateful)

    def run(x, h, c):
        if given:
            return layer(x, initial_state=(h, c))
        layer.states = h, c
        return layer(x)

    assert torch.autograd.gradcheck(run, (draw(BATCH, STEPS, WIDTH), draw(BATCH, 2), draw(BATCH, 2)))


# ── With a graph of the gradients ─────────────────────────────────────────────────────────────────────────────────────


CELLS = {"lstm": CellSpec(WIDTH, 2), "gru": CellSpec(WIDTH, 2, kind="gru"), "rnn": CellSpec(WIDTH, 2, kind="rnn")}
CELLS["lstm, flags"] = CellSpec(WIDTH, 2, peepholes=True, layer_norm=True, zoneout=0.3)


def chained(spec, x, *weights):
    """Two calls on the same weights; the first one's state depends on x, the second one's on the first."""
    start, count = x[:, 0, :1].expand(BATCH, 2), len(spec.state_sizes)
    options = list(weights), [], None, None, [op.CellCall(spec)], False, True, True
    out = op.run_op(op.OpCall(x, [start.tanh(), start][:count], *options))
    (states,), ((y, gates, inner, _),) = op.by_layer([spec], out)
    h, *others = states
    states = [h, *(state + every[:, 0] for state, every in zip(others, inner, strict=True))]
    again = op.run_op(op.OpCall(x + y, states, *options))
    return *again[:count], y * again[count], gates[:, :, :1]


def chain(spec):
    return draw(BATCH, STEPS, WIDTH), *(draw(*shape) for shape in spec.shapes.values())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CELLS)
def test_a_graph_of_the_gradients_leaves_them_as_they_are(name):
    inputs = chain(CELLS[name])
    loss = sum(part.square().sum() for part in chained(CELLS[name], *inputs))
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, inputs, create_graph=True), plain, strict=True):
        assert (a - b).abs().max() <= tolerances.REFERENCE_DOUBLE * b.abs().max()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives_through_a_carried_state(name):
    run = partial(chained, CELLS[name])
    assert torch.autograd.gradgradcheck(run, chain(CELLS[name]), fast_mode=True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CELLS)
def test_a_tensor_given_twice_gets_each_of_its_gradients_once(name):
    spec, (x, *weights), state = CELLS[name], chain(CELLS[name]), draw(BATCH, 2)
    starts = [state] * 2 * len(spec.state_sizes)

    def run(x, state, *weights):
        results = op.run_op(op.OpCall(x, starts, [*weights] * 2, [], None, None, [op.CellCall(spec)] * 2, save=True))
        return results[: 2 * len(spec.state_sizes) + 2]

    loss = sum(part.square().sum() for part in run(x, state, *weights))
    inputs = x, state, *weights
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, inputs, create_graph=True), plain, strict=True):
        assert (a - b).abs().max() <= tolerances.REFERENCE_DOUBLE * b.abs().max()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", CELLS)
def test_a_graph_of_the_gradients_of_what_is_partly_frozen(steps, name):
    """The lower layer's results depend on no wanted input, but may be part of the loss."""
    spec = CELLS[name]
    lower, upper = [w.detach() for w in chain(spec)[1:]], chain(spec)[1:]
    x, cells = torch.randn(BATCH, steps, 2).double(), [op.CellCall(spec)] * 2
    out = op.run_op(op.OpCall(x, [], [*lower, *upper], [], None, None, cells, save=True))
    loss = sum(part.square().sum() for part in out if part.requires_grad)
    plain = torch.autograd.grad(loss, upper, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, upper, create_graph=True, allow_unused=True), plain, strict=True):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.REFERENCE_DOUBLE * 10)


# ── Functions of the parameters ───────────────────────────────────────────────────────────────────────────────────────

FUNCTIONAL = ["state", "gru", "gru, reset before", "simple", "flags", "stack", "residual", "torch loop", "both, concat"]


def parts_of(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_torch_func_differentiates_by_parameters(name):
    layer, x = LAYERS[name]().eval(), draw(BATCH, STEPS, WIDTH).detach()

    def loss(parameters):
        results = torch.func.functional_call(layer, parameters, (x,), {"mask": MASK})
        return sum(part.square().sum() for part in flatten(results))

    found = torch.func.grad(loss)(parts_of(layer))
    sum(part.square().sum() for part in flatten(layer(x, mask=MASK))).backward()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=0, atol=tolerances.REFERENCE_DOUBLE * 100)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_torch_func_maps_over_parameters(name):
    """An ensemble: several members' parameters stacked, run at once."""
    members, x = [LAYERS[name]().eval() for _ in range(3)], draw(BATCH, STEPS, WIDTH).detach()
    parameters, _ = torch.func.stack_module_state(members)
    together = torch.func.vmap(lambda p: tuple(flatten(torch.func.functional_call(members[0], p, (x,)))))(parameters)
    for n, member in enumerate(members):
        for a, b in zip(together, flatten(member(x)), strict=True):
            torch.testing.assert_close(a[n], b, rtol=0, atol=tolerances.REFERENCE_DOUBLE * 10)


# ── Batches of gradients ──────────────────────────────────────────────────────────────────────────────────────────────


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerances.REFERENCE_DOUBLE * 100)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("way", ["is_grads_batched", "is_grads_batched, with a graph", "vmap"])
@pytest.mark.parametrize("name", CELLS)
def test_a_batch_of_gradients_is_each_of_them(name, way):
    inputs = chain(CELLS[name])
    outputs = chained(CELLS[name], *inputs)
    batch = [torch.randn(4, *out.shape, dtype=out.dtype) for out in outputs]

    def back(batch, **options):
        return torch.autograd.grad(outputs, inputs, batch, retain_graph=True, **options)

    if way == "vmap":
        together = torch.func.vmap(back)(batch)
    else:
        together = back(batch, is_grads_batched=True, create_graph="graph" in way)
    for n in range(4):
        for a, b in zip(together, back([part[n] for part in batch]), strict=True):
            close(a[n], b)


@pytest.mark.usefixtures("path")
def test_a_batch_of_gradients_of_one_output_among_several():
    """The others' gradients are absent, or the same for the whole batch."""
    spec = CELLS["lstm"]
    inputs = chain(spec)
    *_, y, gates = chained(spec, *inputs)
    loss = y.sum() + gates.square().sum()
    batch = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad([y, loss], inputs, [batch, torch.ones(3)], is_grads_batched=True, retain_graph=True)
    for n in range(3):
        alone = torch.autograd.grad([y, loss], inputs, [batch[n], torch.ones(())], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            close(a[n], b)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["sequences", "gru", "stack", "flags"])
def test_vectorized_jacobians_and_hessians(name):
    run, parameters = function_of(LAYERS[name](), mask=MASK)
    x = draw(BATCH, STEPS, WIDTH)
    functional = torch.autograd.functional
    inputs = x, parameters[0]
    results = [
        functional.jacobian(lambda x, w: run(x, w, *parameters[1:])[0], inputs, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    results += [
        functional.hessian(lambda x: run(x, *parameters)[0].square().sum(), x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    for a, b in (*zip(*results[:2], strict=True), results[2:]):
        close(a, b)


@pytest.mark.usefixtures("path")
def test_forward_mode_over_gradients():
    """Forward-mode tangents of incoming gradients are computed, though the kernel doesn't support them."""
    spec = CELLS["lstm"]
    inputs = chain(spec)
    outputs = chained(spec, *inputs)
    grads, tangents = ([torch.randn_like(out) for out in outputs] for _ in range(2))
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(g, t) for g, t in zip(grads, tangents, strict=True)]
        found = torch.autograd.grad(outputs, inputs, dual, retain_graph=True)
        found = [torch.autograd.forward_ad.unpack_dual(part).tangent for part in found]
    for a, b in zip(found, torch.autograd.grad(outputs, inputs, tangents), strict=True):
        close(a, b)


# ── Negated views ─────────────────────────────────────────────────────────────────────────────────────────────────────


def negated(t):
    """Return `t` as a negated view, like the imaginary part of a conjugate: memory has the other sign."""
    view = torch._neg_view(-t)
    assert view.is_neg()
    assert view.is_contiguous()
    return view


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_negated_views_have_the_right_values(activation):
    layer = layers.LSTM(4, activation=activation, return_sequences=True, return_state=True, input_size=3)
    cell, x, state = layer.cell, torch.randn(2, 5, 3), [torch.randn(2, 4) for _ in "hc"]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for run, given in ((layer, x), (cell, x[:, 0])):
                plain = flatten(run(given, state))
                for a, b in zip(flatten(run(negated(given), [negated(s) for s in state])), plain, strict=True):
                    assert torch.equal(a, b)
                # Neither requires a gradient, as torch.matmul then sums in another order.
                weights = {name: w.detach() for name, w in run.named_parameters()}
                plain = flatten(torch.func.functional_call(run, weights, (given, state)))
                weights = {name: negated(w) for name, w in weights.items()}
                for a, b in zip(flatten(torch.func.functional_call(run, weights, (given, state))), plain, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.usefixtures("path")
def test_negated_gradients_have_the_right_values():
    layer, x = layers.LSTM(4, return_sequences=True, input_size=3), torch.randn(2, 5, 3)
    y = layer(x)
    given = torch.randn_like(y)
    plain = torch.autograd.grad(y, layer.cell.kernel, given, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, layer.cell.kernel, negated(given))[0], plain)


class Turned(torch.nn.Module):
    """A custom cell whose output is a negated view."""

    state_size = 3

    def forward(self, x, states):
        return negated(x), states


def test_negated_views_from_a_custom_cell():
    cell, x = layers.LSTMCell(4, input_size=3), torch.randn(2, 5, 3)
    with torch.no_grad():
        assert torch.equal(layers.RNN([Turned(), cell])(x), layers.RNN(cell)(x))


# ── Masked steps ──────────────────────────────────────────────────────────────────────────────────────────────────────

MASKED = {
    "gru": lambda: layers.GRU(4, return_sequences=True, input_size=3, learn_initial_state=True),
    "gru, torch loop": lambda: layers.GRU(4, activation="silu", return_sequences=True, input_size=3),
    "simple": lambda: layers.SimpleRNN(4, return_sequences=True, input_size=3, layer_norm=True),
    "minimal gru": lambda: layers.MinGRU(4, return_sequences=True, input_size=3, learn_initial_state=True),
    "minimal lstm": lambda: layers.MinLSTM(4, return_sequences=True, input_size=3, layer_norm=True),
    "minimal lstm, torch loop": lambda: layers.MinLSTM(4, activation="silu", return_sequences=True, input_size=3),
    "flags": lambda: layers.LSTM(4, **FLAGS, seed=1, return_sequences=True, input_size=3),
    "flags, torch loop": lambda: layers.LSTM(
        4, **FLAGS, activation="silu", seed=1, return_sequences=True, input_size=3
    ),
    "kernel": lambda: layers.LSTM(4, return_sequences=True, input_size=3),
    "stack": lambda: layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_sequences=True, input_size=3),
    "torch loop": lambda: layers.LSTM(4, activation="silu", return_sequences=True, input_size=3),
    "foreign": lambda: layers.RNN([layers.LSTMCell(3, input_size=3), Tripled()], return_sequences=True),
    "dropout": lambda: layers.LSTM(4, dropout=0.5, recurrent_dropout=0.5, seed=1, return_sequences=True, input_size=3),
    "both": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True, input_size=3)),
}


class Tripled(torch.nn.Module):
    """A custom cell with a weight."""

    state_size = 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 3.0))

    def forward(self, x, states):
        h = (x * self.weight + states[0]).tanh()
        return h, [h]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MASKED)
def test_masked_steps_change_neither_outputs_nor_gradients(name, value):
    layer = MASKED[name]()
    mask = torch.tensor([[False, True, True, False, True], [False] * 5])
    x = torch.randn(2, 5, 3)
    results = []
    for filler in (0.0, value):
        layer.zero_grad()
        for key, buffer in layer.named_buffers():
            if key.endswith("draws"):
                buffer.zero_()
        leaf = torch.where(mask[:, :, None], x, filler).requires_grad_()
        y = layer(leaf, mask=mask)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN, layers.MinGRU, layers.MinLSTM])
def test_a_state_that_no_step_uses_changes_no_gradient_of_a_weight(kind, activation):
    layer = kind(4, activation=activation, return_sequences=True, input_size=3)
    mask, x = torch.tensor([[True] * 5, [False] * 5]), torch.randn(2, 5, 3)
    gradients = []
    for filler in (0.0, float("nan")):
        state = [torch.stack([torch.zeros(4), torch.full((4,), filler)]) for _ in layer.cell.State._fields]
        layer.zero_grad()
        y = layer(x, mask=mask, initial_state=state)
        assert y[0].isfinite().all()
        y[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)

"""Keras's layers on our op: the same results, gradients and structures, and the calls that Keras runs."""

import keras
import numpy as np
import pytest
import torch

import cellstack.keras
from cellstack import ShapeError
from cellstack.keras import accelerate, calls, patch, patching, plan, restore, unpatch

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's with NumPy 2

L = keras.layers
ORIGINAL = L.LSTM.inner_loop, L.GRU.inner_loop, L.RNN.inner_loop, L.RNN.call, L.RNN.reset_state


@pytest.fixture(autouse=True)
def _as_it_was():
    calls(reset=True)
    yield
    patching._accelerated.clear()  # models of a failed test
    unpatch()


def leaves(value):
    return keras.tree.flatten(value)


def run(layer, x, *, seed=1, start=None, **how):
    """Call a layer, and compute the gradients of its weights, of x and of the initial state."""
    x = torch.tensor(x, requires_grad=x.dtype.kind == "f")
    given = {} if start is None else {"initial_state": keras.tree.map_structure(torch.clone, start)}
    inputs = [t.requires_grad_() for t in leaves(given)] + [x] * x.requires_grad
    keras.utils.set_random_seed(seed)
    y = layer(x, **given, **how)
    loss = sum((part * torch.linspace(-1, 1, part.numel()).reshape(part.shape)).sum() for part in leaves(y))
    wanted = [*(variable.value for variable in layer.trainable_variables), *inputs]
    return y, [g if g is not None else 0.0 for g in torch.autograd.grad(loss, wanted, allow_unused=True)]


def same(layer, x, atol=1e-5, served=True, **how):
    """Compare a layer with and without `patch`."""
    theirs, their_gradients = run(layer, x, **how)
    before = calls().served
    with patch():
        ours, our_gradients = run(layer, x, **how)
    assert (calls().served > before) is served, calls()
    assert keras.tree.map_structure(lambda t: tuple(t.shape), ours) == keras.tree.map_structure(
        lambda t: tuple(t.shape), theirs
    )
    for a, b in zip([*leaves(ours), *our_gradients], [*leaves(theirs), *their_gradients], strict=True):
        if not isinstance(a, float):
            assert a.dtype == getattr(b, "dtype", a.dtype)
        torch.testing.assert_close(
            torch.as_tensor(a), torch.as_tensor(b).expand_as(torch.as_tensor(a)), atol=atol, rtol=1e-4
        )
    return ours


LAYERS = {
    "LSTM": lambda **k: L.LSTM(6, **k),
    "LSTM, other activations": lambda **k: L.LSTM(6, activation="elu", recurrent_activation="hard_sigmoid", **k),
    "LSTM without bias": lambda **k: L.LSTM(6, use_bias=False, activation=None, use_cudnn=False, **k),
    "GRU": lambda **k: L.GRU(6, **k),
    "GRU, reset before": lambda **k: L.GRU(6, reset_after=False, **k),
    "SimpleRNN": lambda **k: L.SimpleRNN(6, **k),
    "a cell": lambda **k: L.RNN(L.GRUCell(6, bias_initializer="uniform"), **k),
    "a stack": lambda **k: L.RNN([L.LSTMCell(6), L.GRUCell(3), L.SimpleRNNCell(4)], **k),
    "a stack of twins": lambda **k: L.RNN(L.StackedRNNCells([L.LSTMCell(6), L.LSTMCell(6)]), **k),
}
FLAGS = [
    {},
    {"return_sequences": True, "return_state": True},
    {"return_sequences": True, "return_state": True, "go_backwards": True},
    {"return_sequences": True, "zero_output_for_mask": True},
    {"return_state": True, "go_backwards": True, "zero_output_for_mask": True},
    {"return_sequences": True, "unroll": True},
]


def starts(layer, batch):
    return keras.tree.map_structure(
        lambda state: torch.rand(state.shape, dtype=state.dtype) - 0.5, layer.get_initial_state(batch)
    )


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "plain")
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_as_keras(name, flags, rng):
    dtype = "float64" if "other" in name or flags.get("unroll") else "float32"
    layer = LAYERS[name](**flags, dtype=dtype) if "stack" not in name and name != "a cell" else LAYERS[name](**flags)
    dtype = layer.compute_dtype
    x, mask = rng.normal(size=(4, 7, 5)).astype(dtype), rng.random((4, 7)) < 0.6
    mask[0, :3], mask[1] = False, False  # masked steps at the start; a completely masked row
    layer.build((4, 7, 5))
    same(layer, x)
    same(layer, x, mask=torch.from_numpy(mask))
    same(layer, x, mask=torch.from_numpy(mask), start=starts(layer, 4))
    assert calls().left == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.LSTM(6, dropout=0.4, return_sequences=True),
        lambda: L.GRU(6, dropout=0.4),
        lambda: L.SimpleRNN(6, dropout=0.3, recurrent_dropout=0.5),
        lambda: L.RNN(
            [L.LSTMCell(6, dropout=0.2), L.GRUCell(3, dropout=0.5), L.SimpleRNNCell(4, recurrent_dropout=0.4)]
        ),
        lambda: L.RNN([L.LSTMCell(6), L.LSTMCell(6, dropout=0.5)], return_sequences=True, go_backwards=True),
    ],
)
def test_dropout_draws_the_masks_of_keras(make, rng):
    layer, x = make(), rng.normal(size=(4, 7, 5)).astype("float32")
    mask = torch.from_numpy(rng.random((4, 7)) < 0.6)
    first = same(layer, x, training=True)
    same(layer, x, training=True, mask=mask)
    assert not torch.equal(same(layer, x, training=True, seed=2), first)
    torch.manual_seed(3)
    layer(torch.from_numpy(x), training=False)
    after = torch.rand(())  # unused draws of Keras advance the generator too
    with patch():
        torch.manual_seed(3)
        layer(torch.from_numpy(x), training=False)
    assert torch.rand(()) == after


def test_a_seed_draws_the_masks_of_keras(rng):
    x = torch.from_numpy(rng.normal(size=(4, 7, 5)).astype("float32"))
    theirs, ours = (L.LSTM(6, dropout=0.4, seed=3) for _ in range(2))
    ours.build(x.shape)
    theirs.build(x.shape)
    ours.set_weights(theirs.get_weights())
    for _ in range(2):  # the second call continues the draws
        wanted = theirs(x, training=True)
        with patch():
            torch.testing.assert_close(ours(x, training=True), wanted)


def test_bidirectional_through_its_two_layers(rng):
    x, mask = rng.normal(size=(4, 7, 5)).astype("float32"), torch.from_numpy(rng.random((4, 7)) < 0.6)
    for merge in ("concat", "sum", None):
        layer = L.Bidirectional(L.GRU(6, return_sequences=True), merge_mode=merge)
        same(layer, x)
        same(layer, x, mask=mask)
    assert calls().served == 12


def test_integers_are_converted(rng):
    same(L.LSTM(6), rng.integers(0, 3, (4, 7, 5)))


def test_second_derivatives(rng):
    layer, x = L.LSTM(3, dtype="float64"), rng.normal(size=(2, 4, 3))

    def second():
        inputs = torch.tensor(x, requires_grad=True)
        (first,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)[0]

    theirs = second()
    with patch():
        torch.testing.assert_close(second(), theirs)
    assert calls().served == 1


def test_calls_in_which_keras_fails(rng):
    x, mask = torch.from_numpy(rng.normal(size=(4, 7, 5)).astype("float32")), torch.from_numpy(rng.random((4, 7)) < 0.6)
    alone, plain = L.RNN([L.LSTMCell(6)], return_state=True), L.LSTM(6, return_state=True)
    unrolled, rolled = (L.GRU(6, go_backwards=True, unroll=flag) for flag in (True, False))
    for one, other in ((alone, plain), (unrolled, rolled)):
        one.build(x.shape)
        other.build(x.shape)
        one.set_weights(other.get_weights())
        with pytest.raises((IndexError, TypeError, AttributeError)):
            one(x, mask=mask)
        with patch():
            ours = one(x, mask=mask)
        for a, b in zip(leaves(ours), leaves(other(x, mask=mask)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ── States ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["LSTM", "GRU", "a stack"])
def test_stateful_layers_continue_from_their_state(name, rng):
    x = torch.from_numpy(rng.normal(size=(4, 7, 5)).astype("float32"))
    layer = LAYERS[name](stateful=True, return_state=True)
    theirs = leaves([layer(x) for _ in range(2)])
    with patch():
        layer.reset_state()
        ours = leaves([layer(x) for _ in range(2)])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        layer(x)[0].sum().backward()  # Keras overwrites values that its backward pass needs
        layer.reset_state()
        torch.testing.assert_close(layer(x)[0], theirs[0], atol=1e-6, rtol=1e-4)


def test_states_set_by_users_are_the_next_initial_state(rng):
    x = torch.from_numpy(rng.normal(size=(2, 5, 3)).astype("float32"))
    for name, given in (
        ("LSTM", (torch.rand(2, 6), torch.rand(2, 6))),
        ("GRU", np.ones((2, 6), "float32")),
        ("a stack", [[torch.rand(2, 6), torch.rand(2, 6)], torch.rand(2, 3), [torch.rand(2, 4)]]),
    ):
        layer = LAYERS[name](return_sequences=True)
        plain = layer(x)
        layer.states = given
        assert torch.equal(layer(x), plain)  # Keras ignores them
        flat = [torch.as_tensor(state) for state in leaves(given)]
        start = keras.tree.pack_sequence_as(layer.get_initial_state(2), flat)
        wanted = layer(x, initial_state=start)
        assert not torch.equal(wanted, plain)
        with patch():
            torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-4)
            assert layer.states is None  # they apply to one call
            torch.testing.assert_close(layer(x), plain, atol=1e-6, rtol=1e-4)
            layer.states = given
            layer.reset_state()
            torch.testing.assert_close(layer(x), plain, atol=1e-6, rtol=1e-4)


def test_states_set_by_users_of_a_stateful_layer_are_its_variables(rng):
    x = torch.from_numpy(rng.normal(size=(2, 5, 3)).astype("float32"))
    start = torch.rand(2, 6), torch.rand(2, 6)
    plain = L.LSTM(6)
    with patch():
        layer = L.LSTM(6, stateful=True)
        layer.states = start  # before it is built
        first = layer(x)
        plain.build(x.shape)
        plain.set_weights(layer.get_weights()[:3])
        torch.testing.assert_close(first, plain(x, initial_state=list(start)))
        assert all(isinstance(state, keras.Variable) for state in layer.states)
        second = layer(x)
        layer.states = start
        torch.testing.assert_close(layer(x), first)
        torch.testing.assert_close(layer(x), second)
        layer.states = start
        layer.reset_state()
        torch.testing.assert_close(layer(x), plain(x))


def test_states_of_a_wrong_shape_are_refused():
    layer = L.LSTM(6, name="memory")
    layer.states = (torch.zeros(2, 6),) * 2
    with patch(), pytest.raises(ShapeError, match=r"memory: expected states of shapes \[\(3, 6\), \(3, 6\)\]"):
        layer(torch.zeros(3, 5, 3))


# ── Calls that Keras runs ─────────────────────────────────────────────────────────────────────────────────────────────


class OwnCell(L.LSTMCell):
    pass


LEFT = {
    "float16": (lambda: L.LSTM(6, dtype="mixed_float16"), {}, "mixed_float16 is neither float32 nor float64"),
    "another cell": (lambda: L.RNN(OwnCell(6)), {}, "OwnCell is not Keras's"),
    "activation": (lambda: L.GRU(6, activation="gelu"), {}, "an activation is not one of"),
    "recurrent dropout": (
        lambda: L.LSTM(6, recurrent_dropout=0.3),
        {"training": True},
        "Keras draws a mask per gate",
    ),
    "cells of their own dtype": (lambda: L.RNN(L.GRUCell(6, dtype="float64")), {}, "its cell has dtype float64"),
    "a cell's activity": (
        lambda: L.RNN(L.GRUCell(6, activity_regularizer="l2")),
        {},
        "a cell's activity_regularizer adds a term at every step",
    ),
    "a state for all rows": (
        lambda: L.GRU(6),
        {"initial_state": [torch.zeros(1, 6)]},
        "an initial state that isn't",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_calls_that_keras_runs_are_counted_and_in_the_plan(name, rng):
    make, how, why = LEFT[name]
    layer, x = make(), torch.from_numpy(rng.normal(size=(4, 7, 5)).astype("float32"))
    keras.utils.set_random_seed(0)
    theirs = layer(x, **how)
    with patch():
        keras.utils.set_random_seed(0)
        ours = layer(x, **how)
        said = str(plan(layer))
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(theirs), strict=True))
    (reason,) = calls().left
    assert why in reason
    assert calls().served == 0
    assert name == "a state for all rows" or why in said  # which depends on the call


def test_keras_runs_calls_of_few_steps(rng):
    layer = L.LSTM(6)
    with patch():
        layer(torch.zeros(4, 1, 5))
        assert calls() == (0, {"too few steps for a gain": 1})
        layer(torch.zeros(4, 2, 5))
    assert calls().served == 1


def test_modes_and_tracers_see_torch_s_operators():
    layer = L.LSTM(6)
    x = torch.rand(4, 7, 5)
    layer(x)
    with patch():
        torch.func.vjp(layer, x)
        with torch.autocast("cpu"):
            layer(x)
        keras.src.backend.compute_output_spec(layer.call, keras.KerasTensor((2, 7, 5)))
    assert calls().served == 0
    assert sum(calls().left.values()) == 2  # calls that only infer shapes aren't counted


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((9, 5))
    h = L.Masking()(inputs)
    h = L.Bidirectional(L.LSTM(6, return_sequences=True))(h)
    outputs = L.Dense(2)(L.RNN([L.GRUCell(4), L.GRUCell(4)])(h))
    made = keras.Model(inputs, outputs)
    made.compile("adam", "mse")
    return made


def data(rng):
    x = rng.normal(size=(16, 9, 5)).astype("float32")
    x[::2, 5:] = 0.0
    return x, rng.normal(size=(16, 2)).astype("float32")


@pytest.mark.long
def test_fit_predict_and_save_work_as_in_keras(rng, tmp_path):
    x, y = data(rng)
    theirs = model()
    their_history = theirs.fit(x, y, epochs=2, batch_size=8, verbose=0, shuffle=False).history
    ours = model()
    config = ours.get_config()
    assert accelerate(ours).get_config() == config
    our_history = ours.fit(x, y, epochs=2, batch_size=8, verbose=0, shuffle=False).history
    np.testing.assert_allclose(our_history["loss"], their_history["loss"], rtol=1e-4)
    np.testing.assert_allclose(ours.predict(x, verbose=0), theirs.predict(x, verbose=0), atol=1e-5)
    assert calls().served > 0
    assert not calls().left  # symbolic calls, in which Keras infers shapes, aren't counted
    ours.save(tmp_path / "model.keras")
    served = calls().served
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), ours.predict(x, verbose=0), atol=1e-6)
    assert calls().served > served
    assert "not accelerated" in str(plan(loaded))  # loaded models aren't accelerated


def test_one_model_can_be_accelerated_alone(rng):
    x, _ = data(rng)
    one, other = model(), model()
    assert accelerate(one) is one
    other.predict(x, verbose=0)
    assert calls() == (0, {})
    one.predict(x, verbose=0)
    assert calls().served == 3
    unpatch()  # undoes only patch()
    one.predict(x, verbose=0)
    assert calls().served == 6
    assert "fused cpu kernel" in str(plan(one))
    assert restore(one) is one
    one.predict(x, verbose=0)
    assert calls().served == 6
    with pytest.raises(ValueError, match="accelerate: the model plain has no recurrent layer: build it first"):
        accelerate(keras.Sequential([L.Dense(2)], name="plain"))
    for name in ("accelerate", "restore", "plan"):
        with pytest.raises(TypeError, match=f"{name}: expected a Keras layer or model, got Linear"):
            getattr(cellstack.keras, name)(torch.nn.Linear(2, 2))


def test_keras_is_restored_afterwards():
    def now():
        return L.LSTM.inner_loop, L.GRU.inner_loop, L.RNN.inner_loop, L.RNN.call, L.RNN.reset_state

    patch()
    assert not set(now()) & set(ORIGINAL)
    with patch():
        pass
    assert not set(now()) & set(ORIGINAL)  # the inner context restores the state before it
    unpatch()
    assert now() == ORIGINAL
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert now() == ORIGINAL


def test_a_plan_says_where_the_weights_are():
    layer = L.LSTM(4, name="far")
    with keras.device("meta"):
        layer.build((None, None, 3))
    with patch():
        assert plan(layer) == ("far LSTM: Keras: weights on meta",)


def test_a_plan_has_a_line_for_every_recurrent_layer():
    made = model()
    assert len(plan(made)) == 3
    assert all("not accelerated" in line for line in plan(made))
    with patch():
        lines = plan(
            keras.Sequential([L.LSTM(4, name="a", recurrent_dropout=0.1), L.TimeDistributed(L.GRU(3, name="b"))])
        )
    assert lines[0].startswith("a LSTM: fused cpu kernel (")
    assert "; Keras in training: recurrent_dropout" in lines[0]
    assert lines[1].startswith("b GRU: fused cpu kernel (")
    assert len(lines) == 2

"""Models with layers of cellstack.keras are read as Keras's own, with the same outputs as in Keras."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("they run on Keras's torch backend alone", allow_module_level=True)

import cellstack as cs  # noqa: E402
import cellstack.keras as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's with NumPy 2


def scattered(model, seed=0):
    """Randomise every weight: zeros in a bias or a peephole would hide whether it is read."""
    rng = np.random.default_rng(seed)
    model.set_weights([w + rng.normal(0, 0.2, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


LAYERS = {
    "peepholes": lambda: ours.LSTM(5, peepholes=True, return_sequences=True),
    "projected": lambda: ours.LSTM(5, proj_size=3, learn_initial_state=True, zoneout=0.1, zoneout_cell=0.2),
    "coupled": lambda: ours.LSTM(4, coupled=True, peepholes=True, cell_clip=1.0, use_bias=False),
    "normed": lambda: ours.LSTM(4, layer_norm=True, norm_epsilon=1e-3, go_backwards=True, return_sequences=True),
    "activations": lambda: ours.LSTM(
        4, "relu", recurrent_activation="hard_sigmoid(0.2, 0.5)", gate_activations={"o": "hard_sigmoid", "cell": "tanh"}
    ),
    "GRU": lambda: ours.GRU(4, layer_norm=True, return_sequences=True, dropout=0.3, recurrent_dropout=0.2),
    "GRU, before": lambda: ours.GRU(4, reset_after=False, clip=2.0, zoneout=0.1),
    "SimpleRNN": lambda: ours.SimpleRNN(4, activation="softsign", learn_initial_state=True, zero_output_for_mask=True),
    "SLSTM": lambda: ours.SLSTM(4, heads=2, exponential_forget=True, return_sequences=True),
    "MinGRU": lambda: ours.MinGRU(4, layer_norm=True),
    "MinLSTM": lambda: ours.MinLSTM(4, use_bias=False),
    "CfC": lambda: ours.CfC(4, timespans=True, mode="no_gate"),
    "CfC, backbone": lambda: ours.CfC(4, backbone_units=7, backbone_activation="tanh", return_sequences=True),
    "LiGRU": lambda: ours.LiGRU(4),
    "both ways": lambda: keras.layers.Bidirectional(ours.LSTM(4, peepholes=True, return_sequences=True)),
    "two ways": lambda: keras.layers.Bidirectional(
        ours.GRU(4), backward_layer=ours.LSTM(5, proj_size=4, go_backwards=True)
    ),
}


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_file_gives_the_same_network_as_the_layers(tmp_path, name, suffix):
    masked = name not in ("both ways", "two ways", "normed")  # Keras treats masks differently backwards
    layers = [keras.layers.LSTM(3, return_sequences=True), LAYERS[name](), keras.layers.Dense(2)]
    model = scattered(keras.Sequential([keras.Input((None, 6)), *[keras.layers.Masking()] * masked, *layers]))
    x = np.random.default_rng(1).normal(size=(3, 7, 6)).astype("float32")
    x[0, 5:] = x[1, :2] = 0.0
    path = f"{tmp_path}/m.{suffix}"
    model.save(path)
    expected = keras.ops.convert_to_numpy(model(x))
    for net in (cs.load(path), cs.load(model)):
        np.testing.assert_allclose(net(x), expected, atol=1e-5)


@pytest.mark.slow
def test_verify_and_convert_take_it(tmp_path):
    layers = [
        ours.LSTM(5, peepholes=True, proj_size=3, return_sequences=True),
        keras.layers.Bidirectional(ours.GRU(3, return_sequences=True)),
        ours.SimpleRNN(4),
    ]
    model = scattered(keras.Sequential([keras.Input((None, 6)), *layers]))
    path = tmp_path / "m.keras"
    model.save(path)
    net = cs.load(path)
    report = cs.verify(net, path)
    assert report.ok()
    assert "cell 0 c" in str(report)
    assert "not compared" not in str(report)
    net.save(tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    np.testing.assert_allclose(cs.load(tmp_path / "m.onnx")(x), keras.ops.convert_to_numpy(model(x)), atol=1e-5)


def test_states_between_layers_together_with_a_mask(tmp_path):
    x, h0 = keras.Input((None, 6), name="x"), keras.Input((4,), name="h0")
    y, h = ours.GRU(4, return_sequences=True, return_state=True)(keras.layers.Masking()(x), initial_state=h0)
    y = ours.GRU(4)(y, initial_state=h)
    model = scattered(keras.Model([x, h0], y))
    path = tmp_path / "m.keras"
    model.save(path)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=shape).astype("float32") for shape in ((2, 6, 6), (2, 4))]
    inputs[0][0, 4:] = inputs[0][1, :2] = 0.0
    expected = keras.ops.convert_to_numpy(model(inputs))
    np.testing.assert_allclose(cs.load(path)(tuple(inputs)), expected, atol=1e-5)
    short = [inputs[0][:1, :4], inputs[1][:1]]  # masked steps have no influence
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(short)), expected[:1], atol=1e-5)


def test_layers_with_the_same_name_from_two_packages_are_distinguished(tmp_path):
    layers = [ours.GRU(4, return_sequences=True), keras.layers.GRU(4, return_sequences=True), ours.GRU(4)]
    model = scattered(keras.Sequential([keras.Input((None, 4)), *layers]))
    path = tmp_path / "m.keras"
    model.save(path)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    np.testing.assert_allclose(cs.load(path)(x), keras.ops.convert_to_numpy(model(x)), atol=1e-5)


def test_gates_and_resets_are_refused_with_the_alternative(tmp_path):
    x, starts = keras.Input((None, 6)), keras.Input((None,), dtype="bool")
    y, *gates = ours.LSTM(4, return_sequences=True, return_gates=True, name="a")(x)
    keras.Model(x, y).save(tmp_path / "y.keras")
    assert len(cs.load(tmp_path / "y.keras").cells) == 1  # unused gates are ignored
    keras.Model(x, gates[1]).save(tmp_path / "gates.keras")
    with pytest.raises(
        cs.FormatError, match=r"LSTM 'a': a Network doesn't return the gates of every step: use net\.trace\(x\)"
    ):
        cs.load(tmp_path / "gates.keras")
    keras.Model([x, starts], ours.GRU(4, name="b")(x, reset=starts)).save(tmp_path / "reset.keras")
    with pytest.raises(
        cs.FormatError, match=r"GRU 'b': reset as an input of the model isn't supported: use net\.run\(x, reset="
    ):
        cs.load(tmp_path / "reset.keras")

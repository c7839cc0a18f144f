"""Keras models with states as inputs and outputs of layers: Keras's examples, compared with Keras."""

import json
import warnings
import zipfile

import keras
import numpy as np
import pytest

import cellstack as cs
from cellstack.cells.errors import FormatError
from cellstack.formats import keras as adapter

L = keras.layers
SOURCE, TARGET, UNITS = 7, 9, 6


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def written(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HDF5 is called legacy
        model.save(path)
    return path


def answers(model, x):
    y = model(x)
    return [one.detach().numpy() for one in (y if isinstance(y, (list, tuple)) else [y])]


def ours(net, x):
    y = net(tuple(x) if isinstance(x, list) else x)
    return y if isinstance(y, tuple) else (y,)


def assert_near(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def seq2seq():
    """The training model, the encoder and the decoder of Keras's example."""
    encoder_in, decoder_in = keras.Input((None, SOURCE), name="source"), keras.Input((None, TARGET), name="target")
    _, *states = L.LSTM(UNITS, return_state=True, name="encoder")(encoder_in)
    decoder = L.LSTM(UNITS, return_sequences=True, return_state=True, name="decoder")
    head = L.Dense(TARGET, activation="softmax", name="head")
    trained = keras.Model([encoder_in, decoder_in], head(decoder(decoder_in, initial_state=states)[0]))
    given = [keras.Input((UNITS,), name="h"), keras.Input((UNITS,), name="c")]
    y, *after = decoder(decoder_in, initial_state=given)
    return trained, keras.Model(encoder_in, states), keras.Model([decoder_in, *given], [head(y), *after])


def addition():
    """A sum, read and written digit by digit."""
    model = keras.Sequential([keras.Input((7, 12)), L.LSTM(16), L.RepeatVector(4)])
    model.add(L.LSTM(16, return_sequences=True))
    model.add(L.Dense(12, activation="softmax"))
    return model, floats(3, 7, 12)


def imdb():
    ids = keras.Input((None,), dtype="int32")
    x = L.Embedding(30, 8)(ids)
    x = L.Bidirectional(L.LSTM(6, return_sequences=True))(x)
    x = L.Bidirectional(L.LSTM(6))(x)
    return keras.Model(ids, L.Dense(1, activation="sigmoid")(x)), np.arange(21).reshape(3, 7)


def word_embeddings():
    ids = keras.Input((24,), dtype="int32")
    x = L.Embedding(30, 8, trainable=False)(ids)
    x = L.MaxPooling1D(2)(L.Conv1D(8, 3, activation="relu")(x))
    x = L.GlobalMaxPooling1D()(L.Conv1D(8, 3, activation="relu")(x))
    x = L.Dropout(0.5)(L.Dense(8, activation="relu")(x))
    return keras.Model(ids, L.Dense(5, activation="softmax")(x)), np.arange(72).reshape(3, 24) % 30


def weather():
    x = keras.Input((12, 7))
    return keras.Model(x, L.Dense(1)(L.LSTM(16)(x))), floats(3, 12, 7)


def characters():
    model = keras.Sequential([keras.Input((10, 12)), L.LSTM(16), L.Dense(12, activation="softmax")])
    return model, floats(3, 10, 12)


def video():
    """Features of frames, and the mask of a clip's frames as a separate input."""
    frames, used = keras.Input((8, 5)), keras.Input((8,), dtype="bool")
    x = L.GRU(8, return_sequences=True)(frames, mask=used)
    x = L.Dropout(0.4)(L.GRU(4)(x))
    model = keras.Model([frames, used], L.Dense(3, activation="softmax")(L.Dense(4, activation="relu")(x)))
    return model, [floats(4, 8, 5), np.arange(8) < np.array([[8], [3], [0], [5]])]


def stacks():
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    _, *states = L.RNN([L.LSTMCell(4), L.LSTMCell(5)], return_state=True)(x)
    decoder = L.RNN([L.LSTMCell(4), L.LSTMCell(5)], return_sequences=True)
    return keras.Model([x, y], decoder(y, initial_state=states)), [floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)]


def both_ways():
    """The concatenated states of both directions, from which a decoder of twice the width starts."""
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    _, h_ahead, c_ahead, h_back, c_back = L.Bidirectional(L.LSTM(4, return_state=True))(x)
    states = [L.Concatenate()([h_ahead, h_back]), L.Concatenate()([c_ahead, c_back])]
    z = L.LSTM(8, return_sequences=True)(y, initial_state=states)
    return keras.Model([x, y], z), [floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)]


def merged_both_ways():
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    merged = L.Bidirectional(L.GRU(4, return_state=True, return_sequences=True), merge_mode="sum")
    z, *states = merged(x)
    out = L.Bidirectional(L.GRU(4, return_sequences=True))(y, initial_state=states)
    return keras.Model([x, y], [out, z]), [floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)]


def computed():
    """The initial state of a caption's cell, computed from an image's features, not another state."""
    features, words = keras.Input((5,)), keras.Input((None, SOURCE))
    start = [L.Dense(UNITS, activation="tanh")(features), L.Dense(UNITS)(features)]
    y = L.LSTM(UNITS, return_sequences=True)(words, initial_state=start)
    return keras.Model([features, words], y), [floats(3, 5), floats(3, 4, SOURCE, seed=1)]


def states_as_values():
    x = keras.Input((None, SOURCE))
    y, h, c = L.LSTM(UNITS, return_sequences=True, return_state=True)(x)
    return keras.Model(x, [L.Dense(3)(h), L.Dense(2)(c), y]), floats(3, 5, SOURCE)


def masked():
    """Ids of 0 are padding: the encoder skips them; the decoder, which has initial states, doesn't in Keras 3."""
    source, target = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    _, *states = L.LSTM(UNITS, return_state=True)(L.Embedding(11, 5, mask_zero=True)(source))
    y = L.LSTM(UNITS, return_sequences=True)(L.Embedding(11, 5, mask_zero=True)(target), initial_state=states)
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 11, (3, 6)), rng.integers(1, 11, (3, 5))]
    ids[0][0, 4:] = ids[1][1, 3:] = 0
    return keras.Model([source, target], L.Dense(11, activation="softmax")(y)), ids


def masked_and_merged():
    """Values that no mask changes, after a layer that ignores its mask."""
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    _, *states = L.LSTM(UNITS, return_state=True)(x)
    z = L.LSTM(UNITS, return_sequences=True)(L.Masking()(y), initial_state=states)
    z = L.TimeDistributed(L.Dense(2))(L.Concatenate()([z, y]))
    given = floats(3, 4, TARGET, seed=1)
    given[2, 1:] = 0.0
    return keras.Model([x, y], z), [floats(3, 5, SOURCE), given]


def models_within():
    """An encoder and a decoder that are models, each called as a layer; the states pass through a Dropout."""
    _, encoder, decoder = seq2seq()
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    states = [L.Dropout(0.1)(state) for state in encoder(x)]
    return keras.Model([x, y], decoder([y, *states])), [floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)]


def two_decoders():
    """A state from which two layers start, and which is also an output."""
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    z, state = L.GRU(UNITS, return_sequences=True, return_state=True)(x)
    first, second = (L.GRU(UNITS, return_sequences=more)(y, initial_state=state) for more in (True, False))
    return keras.Model([x, y], [L.Dense(2)(z), first, second]), [floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)]


def zeros_where_masked():
    """Its output at masked steps is zero, and so not its state."""
    x, y = keras.Input((None, SOURCE)), keras.Input((None, TARGET))
    encoder = L.GRU(UNITS, return_state=True, return_sequences=True, zero_output_for_mask=True)
    _, state = encoder(L.Masking()(x))
    given = floats(3, 5, SOURCE)
    given[1, 3:] = 0.0
    model = keras.Model([x, y], L.GRU(UNITS)(y, initial_state=state))
    return model, [given, floats(3, 4, TARGET, seed=1)]


CASES = {
    function.__name__: function
    for function in (
        addition, imdb, word_embeddings, weather, characters, video, stacks, both_ways, merged_both_ways, computed,
        states_as_values, masked, masked_and_merged, models_within, two_decoders, zeros_where_masked,
    )
}  # fmt: skip
UNWRITTEN = {"video": "StepMask"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
def test_a_model_agrees_with_keras_and_round_trips(tmp_path, case):
    model, x = CASES[case]()
    wanted = answers(model, x)
    for suffix in (".keras", ".h5"):
        net = cs.load(written(model, tmp_path / f"model{suffix}"))
        assert_near(ours(net, x), wanted)
    assert_near(ours(adapter.of_model(model), x), wanted)
    if case in UNWRITTEN:
        with pytest.raises(ValueError, match=UNWRITTEN[case]):
            net.save(tmp_path / "again.keras")
        return
    net.save(tmp_path / "again.keras")
    assert_near(answers(keras.models.load_model(tmp_path / "again.keras"), x), wanted)
    again = cs.load(tmp_path / "again.keras")
    assert len(again.nodes) == len(net.nodes)
    assert_near(ours(again, x), wanted)


def test_the_seq2seq_models_load_and_decode_step_by_step(tmp_path):
    trained, encoder, decoder = seq2seq()
    x, y = floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)
    nets = [cs.load(written(model, tmp_path / f"{n}.keras")) for n, model in enumerate((trained, encoder, decoder))]
    assert nets[0].wires == (("source",), ("target", "encoder/h", "encoder/c"), ("decoder",))
    assert nets[1].outputs == ("encoder", "encoder/c")
    assert nets[2].inputs == ("target", "h", "c")
    assert nets[2].outputs == ("head", "decoder/h", "decoder/c")
    whole = answers(trained, [x, y])
    assert_near(ours(nets[0], [x, y]), whole)
    states = ours(nets[1], x)
    assert_near(states, answers(encoder, x))
    for t in range(4):
        wanted = answers(decoder, [y[:, t : t + 1], *states])
        found, *states = ours(nets[2], [y[:, t : t + 1], *states])
        assert_near([found, *states], wanted)
        assert_near([found[:, 0]], [whole[0][:, t]])
    for number, net in enumerate(nets):
        net.save(tmp_path / f"again{number}.h5")
    assert_near(answers(keras.models.load_model(tmp_path / "again0.h5"), [x, y]), whole)
    given = [y, floats(3, UNITS, seed=2), floats(3, UNITS, seed=3)]
    assert_near(answers(keras.models.load_model(tmp_path / "again2.h5"), given), answers(decoder, given))


def test_keras_2_lists_states_after_a_layers_inputs(tmp_path):
    """Its files have no names for them: `[[["target", 0, 0, {}], ["encoder", 0, 1, {}], ["encoder", 0, 2, {}]]]`."""
    trained, _, _ = seq2seq()
    path = written(trained, tmp_path / "model.keras")
    x, y = floats(3, 5, SOURCE), floats(3, 4, TARGET, seed=1)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    for layer in config["config"]["layers"]:
        if layer["name"] == "decoder":
            layer["inbound_nodes"] = [[["target", 0, 0, {}], ["encoder", 0, 1, {}], ["encoder", 0, 2, {}]]]
    contents["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert_near(ours(cs.load(path), [x, y]), answers(trained, [x, y]))


def _mask_passed_on(x, y):
    """Keras 3 ignores the mask of y if states are given, but passes it on to the next layer."""
    _, *states = L.LSTM(UNITS, return_state=True)(x)
    return L.LSTM(3)(L.LSTM(UNITS, return_sequences=True)(L.Masking()(y), initial_state=states))


def _mask_passed_on_and_merged(x, y):
    _, *states = L.LSTM(UNITS, return_state=True)(x)
    z = L.LSTM(UNITS, return_sequences=True)(L.Masking()(y), initial_state=states)
    return L.LSTM(3)(L.Concatenate()([L.Dense(2)(z), y]))


def _at_every_frame(x, y):
    return L.ConvLSTM1D(3, 2)(L.Reshape((4, 3, 3))(y[:, :4]))


REFUSED = {
    "a mask passed on": (_mask_passed_on, "a mask that Keras ignored in an earlier layer with an initial state"),
    "and is merged": (
        _mask_passed_on_and_merged,
        "a mask that Keras ignored in an earlier layer with an initial state",
    ),
    "ConvLSTM": (_at_every_frame, "ConvLSTM1D"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_by_name(tmp_path, case):
    build, message = REFUSED[case]
    x, y = keras.Input((None, SOURCE)), keras.Input((4, TARGET))
    out = build(x, y)
    inputs = [x, y] if case != "ConvLSTM" else [y]
    path = written(keras.Model(inputs, out), tmp_path / "model.keras")
    with pytest.raises(FormatError, match=message):
        cs.load(path)


def test_images_are_refused_and_the_recurrent_parts_extracted(tmp_path):
    """An OCR model: convolutions of images, then bidirectional LSTMs and CTC's extra class."""
    picture = keras.Input((20, 8, 1))
    x = L.MaxPooling2D((2, 2))(L.Conv2D(4, 3, activation="relu", padding="same")(picture))
    x = L.Dense(6, activation="relu")(L.Reshape((10, 16))(x))
    x = L.Bidirectional(L.LSTM(4, return_sequences=True), name="lines")(x)
    path = written(keras.Model(picture, L.Dense(5, activation="softmax")(x)), tmp_path / "model.keras")
    with pytest.raises(FormatError, match="Conv2D"):
        cs.load(path)
    assert cs.extract(path).keys() == {"lines"}

"""Networks written as Keras files: Keras 3 loads them and gives the same outputs; unsupported nodes are refused."""

import warnings

import keras
import numpy as np
import pairs
import pytest
from networks import fill, make_cell
from test_keras_load import compare, functional, random_sequential, randomise

from cellstack import CellSpec, Network
from cellstack.formats import keras as adapter
from cellstack.formats.build import Builder
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)

SUFFIXES = [".keras", ".h5"]


def loaded(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keras.models.load_model(path, compile=False)


def same(net, again, x):
    """Our reader returns the same network, except for arrays that were converted to another layer's."""
    for one, other in zip(np.atleast_1d(net(x)), np.atleast_1d(again(x)), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pairs.seeds(15, 25)
@pytest.mark.filterwarnings("ignore:Layer .* does not support")
def test_keras_models_round_trip(tmp_path, seed, suffix):
    rng = np.random.default_rng(seed)
    model, x = random_sequential(rng)
    randomise(model, rng)
    net = adapter.of_model(model)
    path = str(tmp_path / f"model{suffix}")
    adapter.save(net, path)
    compare(net, loaded(path), x)
    same(net, adapter.load(path), x)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("masked", [False, True])
def test_graphs(tmp_path, suffix, masked):
    rng = np.random.default_rng(3)
    model = functional(rng, masked)
    randomise(model, rng)
    net = adapter.of_model(model)
    x = [rng.integers(0, 9, (3, 7)), rng.normal(size=(3, 7, 3)).astype("float32")]
    x[0][:, 4:] = 0
    path = str(tmp_path / f"model{suffix}")
    adapter.save(net, path)
    compare(net, loaded(path), x)


def nodes_of_every_kind(rng):
    def f32(*shape):
        return rng.uniform(0.3, 1.2, shape).astype("float32")

    stack = Recurrent((make_cell(rng, 3, 4), make_cell(rng, 4, 4, kind="gru", reset_after=False)))
    back = Recurrent((make_cell(rng, 4, 5, kind="rnn"),), go_backwards=True)
    both = Bidirectional(Recurrent((make_cell(rng, 4, 5),)), back, "ave")
    return [
        Standardise(f32(3) * 10, f32(3)),
        Masking(0.5),
        stack,
        Scale(f32(4), f32(4)),
        both,
        LayerNorm(None, f32(5), 0.01),
        Activation("leaky_relu(0.3)"),
        Activation("thresholded_relu(0.1)"),
        Dense(f32(5, 4), None, "elu(0.5)"),
        Conv1D(f32(2, 2, 6), f32(6), padding="causal", groups=2, activation="leaky_relu"),
        Pool1D("mean", 2, 1, "same"),
        Pool1D("max", 2),
        Select(1, -1),
        Permute((2, 1)),
        Reshape((-1, 3)),
        Flatten(),
        Repeat(3),
        Recurrent((make_cell(rng, 12, 2, activation="hard_sigmoid", recurrent_activation="softsign"),)),
        GlobalPool("mean"),
        Activation("softmax"),
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore:Exception encountered", "ignore:Layer .* does not support")
def test_nodes_of_every_kind(tmp_path, suffix):
    rng = np.random.default_rng(5)
    net = Network(nodes_of_every_kind(rng), inputs={"series": (8, 3)})
    x = rng.normal(size=(3, 8, 3)).astype("float32") * 3
    path = str(tmp_path / f"model{suffix}")
    adapter.save(net, path)
    compare(net, loaded(path), x)
    again = adapter.load(path)
    np.testing.assert_allclose(again(x), net(x), rtol=0, atol=1e-6)
    assert again.inputs == ("series",)
    builder = Builder()
    wire = builder.input("series", (8, 3))
    for name, node in zip(net.names, net.nodes, strict=True):
        wire = builder.add(name, node, wire)
    builder.output(wire)
    assert [type(node) for node in again.nodes if not isinstance(node, Activation)] == [
        type(node) for node in builder.network().nodes if not isinstance(node, Activation)
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parallel_layers_keep_their_own_weights(tmp_path, suffix):
    """Keras assigns weights by the order of its layers: by their distance from the outputs."""
    rng = np.random.default_rng(0)
    dense = [Dense(rng.normal(size=(4, 4)).astype("float32")) for _ in range(5)]
    nodes = [dense[0], dense[1], dense[2], Merge("add"), dense[3], dense[4], Merge("concat")]
    wires = [("x",), ("x",), ("b",), ("c", "a"), ("m",), ("a",), ("e", "d")]
    net = Network(nodes, ["a", "b", "c", "m", "d", "e", "out"], inputs={"x": (None, 4)}, wires=wires)
    path = str(tmp_path / f"model{suffix}")
    adapter.save(net, path)
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    compare(net, loaded(path), x)
    same(net, adapter.load(path), x)


def test_float64_and_equal_networks_give_equal_files(tmp_path):
    rng = np.random.default_rng(0)
    net = Network([Recurrent((make_cell(rng, 3, 4, "float64"),)), Dense(rng.normal(size=(4, 2)), rng.normal(size=2))])
    for suffix in SUFFIXES:
        first, second = (str(tmp_path / f"{name}{suffix}") for name in "ab")
        adapter.save(net, first)
        adapter.save(net, second)
        with open(first, "rb") as one, open(second, "rb") as other:
            assert one.read() == other.read()
        again, x = adapter.load(first), rng.normal(size=(2, 5, 3))  # Keras's model casts to float32
        assert again.dtype == np.float64
        assert again.names == net.names
        assert np.array_equal(again(x), net(x))
        np.testing.assert_allclose(loaded(first)(x).detach().numpy(), net(x), rtol=0, atol=1e-6)


ODD_CELLS = {
    "peepholes": {"peepholes": True},
    "coupled": {"coupled": True},
    "proj_size": {"proj_size": 2},
    "layer_norm": {"layer_norm": True},
    "clip": {"clip": 1.0},
    "cell_clip": {"cell_clip": 1.0},
    "zoneout": {"zoneout": 0.1},
    "learn_initial_state": {"learn_initial_state": True},
    "gate_activations": {"gate_activations": {"o": "tanh"}},
    "hard_sigmoid(0.2, 0.5)": {"recurrent_activation": "hard_sigmoid(0.2, 0.5)"},
    "elu(0.3)": {"activation": "elu(0.3)"},
}


@pytest.mark.parametrize("what", ODD_CELLS)
def test_cells_that_keras_does_not_have(tmp_path, rng, what):
    net = Network([Recurrent((fill(rng, CellSpec(3, 4, **ODD_CELLS[what])),))], ["odd"])
    with pytest.raises(ValueError, match=r"^save: Keras can't represent this network: odd: ") as caught:
        adapter.save(net, str(tmp_path / "model.keras"))
    assert what in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_all_nodes_that_keras_does_not_have_are_named(tmp_path, rng):
    cells = (make_cell(rng, 4, 4), make_cell(rng, 4, 4))
    net = Network(
        [
            Embedding(rng.normal(size=(5, 4)).astype("float32"), mask_zero=True),
            Recurrent(cells, residual=True),
            Activation("affine(2.0, 1.0)"),
            Select(0, None, 2),
            GlobalPool("last"),
            Recurrent((make_cell(rng, 4, 4),), return_sequences=False),
            GlobalPool("max"),
            Merge("add"),
        ],
        ["ids", "stack", "line", "every other", "end", "rnn", "greatest", "sum"],
        wires=[
            ("x",),
            ("ids",),
            ("stack",),
            ("line",),
            ("every other",),
            ("ids",),
            ("ids",),
            ("end", "rnn", "greatest"),
        ],
    )
    with pytest.raises(ValueError, match="save: Keras can't represent this network") as caught:
        adapter.save(net, str(tmp_path / "model.h5"))
    text = str(caught.value)
    for name in (
        "stack: a residual stack",
        "line: the activation affine(2.0, 1.0)",
        "every other: the slice",
        "end: the last",
    ):
        assert name in text
    assert "greatest: Keras's max over time ignores the mask" in text
    assert "rnn:" not in text


def test_every_array_of_a_cell_is_written_bit_by_bit(tmp_path):
    """Every array of a cell is in its place: all numbers differ."""
    spec = CellSpec(2, 3, kind="gru")
    arrays = {}
    for number, (name, shape) in enumerate(spec.shapes.items()):
        arrays[name] = np.arange(np.prod(shape), dtype="float32").reshape(shape) + 100 * number
    net = Network([Recurrent((Cell(spec, **arrays),))])
    for suffix in SUFFIXES:
        path = str(tmp_path / f"model{suffix}")
        adapter.save(net, path)
        for weight, array in zip(loaded(path).weights, arrays.values(), strict=True):
            assert np.array_equal(weight.value.detach().numpy(), array)
        (node,) = adapter.load(path).nodes
        assert all(np.array_equal(array, arrays[name]) for name, array in node.cells[0].arrays.items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_is_kept(tmp_path, rng, suffix):
    net = Network(
        [Recurrent((make_cell(rng, 3, 4),), return_sequences=False)],
        metadata={"task": "classify", "labels": ["ä", 1], "note": "x" * 100_000},  # more than HDF5 has in an attribute
    )
    path, x = str(tmp_path / f"model{suffix}"), rng.normal(size=(2, 5, 3)).astype("f4")
    adapter.save(net, path)
    again = adapter.load(path)
    assert again.metadata == {**net.metadata, "source": {"format": "keras", "producer": "Keras 3.10.0"}}
    assert again.labels == ("ä", 1)
    compare(net, loaded(path), x)
    assert "labels" not in next(iter(adapter.extract(path).values())).metadata


def test_a_suffix_that_keras_reads_as_weights_only(tmp_path):
    net = Network([Dense(np.ones((3, 2), "f4"))])
    with pytest.raises(ValueError, match=r"as weights without a model; leave out \.weights"):
        net.save(tmp_path / "net.weights.h5")
    assert not list(tmp_path.iterdir())

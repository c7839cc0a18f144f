"""Damaged and hostile Keras files raise `FormatError` in bounded memory and time, and read no other file."""

import io
import json
import random
import subprocess
import sys
import time
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from networks import make_cell

from cellstack import FormatError, Network
from cellstack.formats import keras as adapter
from cellstack.nodes import Bidirectional, Dense, Recurrent

SUFFIXES = [".keras", ".h5"]


@pytest.fixture
def good(tmp_path, rng):
    """A small file of each kind, written by our writer."""
    back = Recurrent((make_cell(rng, 3, 2),), go_backwards=True)
    nodes = [Bidirectional(Recurrent((make_cell(rng, 3, 2),)), back), Dense(np.ones((4, 2), "float32"))]
    net = Network(nodes, metadata={"labels": ["a", "b"]})
    for suffix in SUFFIXES:
        adapter.save(net, str(tmp_path / f"good{suffix}"))
    return {suffix: (tmp_path / f"good{suffix}").read_bytes() for suffix in SUFFIXES}


def attempt(path, data):
    """Load and extract; return whether the file was accepted. Any error but `FormatError` fails the test."""
    path.write_bytes(data)
    return any([passed(adapter.load, path), passed(adapter.extract, path)])


def passed(function, path):
    try:
        function(path)
    except FormatError as error:
        text = str(error)
    else:
        return True
    assert text.startswith(str(path)), text
    assert len(text) < 4000
    return False


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated(tmp_path, good, suffix):
    data = good[suffix]
    rng = random.Random(0)
    for length in [*range(70), *(rng.randrange(len(data)) for _ in range(120)), len(data) - 1]:
        assert not attempt(tmp_path / f"bad{suffix}", data[:length])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bits(tmp_path, good, suffix):
    """For a few seconds: a file may load if only its weights are damaged; others are refused."""
    data, end, seed, tried = good[suffix], time.monotonic() + 2.5, 0, 0
    while time.monotonic() < end or tried < 50:
        rng = random.Random(seed)
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        attempt(tmp_path / f"bad{suffix}", bytes(bad))
        seed, tried = seed + 1, tried + 1


@pytest.mark.long
def test_changed_descriptions(tmp_path, good):
    """Values of the description are replaced, one at a time; the archive stays intact."""
    with zipfile.ZipFile(io.BytesIO(good[".keras"])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    places = []

    def walk(value, place):
        places.append(place)
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            walk(inner, (*place, key))

    walk(config, ())
    order = [(place, value) for place in places[1:] for value in (None, -1, 2**40, "x", [], {}, [[]], True, 1e300)]
    for place, value in random.Random(1).sample(order, 80):
        changed = json.loads(members["config.json"])
        at = changed
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        image = io.BytesIO()
        with zipfile.ZipFile(image, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, json.dumps(changed) if name == "config.json" else content)
        attempt(tmp_path / "bad.keras", image.getvalue())


def zipped(members):
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return image.getvalue()


USUAL = {"metadata.json": '{"keras_version": "3.0.0"}', "config.json": "{}", "model.weights.h5": b""}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**USUAL, "../evil": "x"}, "the archive has a member with a path outside it"),
        ({**USUAL, "/etc/evil": "x"}, "the archive has a member with a path outside it"),
        ({**USUAL, "a\\..\\evil": "x"}, "the archive has a member with a path outside it"),
        ({"config.json": "{}"}, "found no metadata.json, model.weights.h5"),
        ({**USUAL, "metadata.json": "{}"}, "expected keras_version"),
        ({**USUAL, "metadata.json": "[1"}, "expected JSON"),
        ({**USUAL, "config.json": "[" * 100_000}, "nested too deep"),
        ({**USUAL, "model.weights.h5": b"\0" * (1 << 28)}, "bytes are more than the limit of"),
        ({**USUAL, "config.json": b" " * (1 << 28)}, "bytes are more than the limit of"),
        (USUAL, "expected an HDF5 file"),
    ],
)
def test_hostile_archives(tmp_path, members, message):
    path = tmp_path / "bad.keras"
    path.write_bytes(zipped(members))
    before = {*tmp_path.parent.rglob("*")}
    tracemalloc.start()
    with pytest.raises(FormatError, match=message):
        adapter.load(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert {*tmp_path.parent.rglob("*")} == before


def test_a_member_twice(tmp_path):
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w") as archive:
        for name, content in USUAL.items():
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("config.json", "[]")
    (tmp_path / "bad.keras").write_bytes(image.getvalue())
    with pytest.raises(FormatError, match="the archive has two members of one name"):
        adapter.load(tmp_path / "bad.keras")


# ── HDF5 ────────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = {"kernel": (3, 8), "recurrent_kernel": (2, 8), "bias": (8,)}
CONFIG = {"name": "r", "units": 2, "activation": "tanh", "recurrent_activation": "sigmoid"}


def hdf5(path, change=None, config=None, names=(b"r",)):
    layers = {"class_name": "Sequential", "config": [{"class_name": "LSTM", "config": CONFIG}]}
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(layers) if config is None else config
        group = file.create_group("model_weights")
        file.attrs["keras_version"] = "2.2.4"
        group.attrs["layer_names"] = np.array(names)
        own = group.create_group("r")
        own.attrs["weight_names"] = np.array([name.encode() for name in NAMES])
        for name, shape in NAMES.items():
            own.create_dataset(name, data=np.ones(shape, "float32"))
        if change is not None:
            change(file, own)
    return path


def replace(own, name, item=None, **settings):
    del own[name]
    if item is not None:
        own[name] = item
    else:
        own.create_dataset(name, **settings)


def external(file, own):
    own.attrs["secret"] = 1
    replace(own, "bias", h5py.ExternalLink("secret.h5", "/bias"))


def raw_external(file, own):
    replace(own, "bias", shape=(8,), dtype="float32", external=[("secret.bin", 0, 32)])


def virtual(file, own):
    layout = h5py.VirtualLayout((8,), "float32")
    layout[:] = h5py.VirtualSource("secret.h5", "bias", (8,))
    del own["bias"]
    own.create_virtual_dataset("bias", layout)


def circle(file, own):
    own["again"] = file["model_weights"]


HOSTILE = {
    "an external link": (external, r"HDF5 links aren't supported \(found ExternalLink at"),
    "a soft link": (
        lambda file, own: replace(own, "bias", h5py.SoftLink("/model_weights/r/kernel")),
        r"HDF5 links aren't supported \(found SoftLink at",
    ),
    "a link to a group": (
        lambda file, own: file.__setitem__("model_weights/s", h5py.SoftLink("/")),
        r"HDF5 links aren't supported \(found SoftLink at",
    ),
    "two names for one": (
        lambda file, own: own.__setitem__("more", own["bias"]),
        "the same HDF5 object has another name too",
    ),
    "a circle of groups": (circle, "the same HDF5 object has another name too"),
    "numbers in another file": (raw_external, "datasets stored in another file aren't supported"),
    "numbers of another file": (virtual, "datasets stored in another file aren't supported"),
    "a shape of terabytes": (
        lambda file, own: replace(own, "kernel", shape=(1 << 40, 8), dtype="float32", chunks=(1024, 8)),
        r"found 0 in the file",
    ),
    "compressed zeros": (
        lambda file, own: replace(own, "kernel", data=np.zeros((1 << 20, 8), "float32"), compression="gzip"),
        r"expected 33554432 bytes",
    ),
    "text": (lambda file, own: replace(own, "bias", data=np.array([b"evil"] * 8)), "expected float32 or float64"),
    "objects": (
        lambda file, own: replace(own, "bias", shape=(8,), dtype=h5py.special_dtype(ref=h5py.Reference)),
        "expected float32 or float64",
    ),
    "nothing at all": (lambda file, own: replace(own, "bias", data=h5py.Empty("float32")), "expected an array"),
    "a scalar": (lambda file, own: replace(own, "bias", data=np.float32(1.0)), "expected a bias"),
    "a datatype": (lambda file, own: own.__setitem__("type", np.dtype("float32")), "expected a group or numbers"),
    "another shape": (lambda file, own: replace(own, "bias", data=np.ones(7, "float32")), r"expected a bias \[8\]"),
    "no names": (lambda file, own: own.attrs.__delitem__("weight_names"), "expected weight_names, found none"),
    "numbers as names": (lambda file, own: own.attrs.__setitem__("weight_names", [1.0]), "expected text"),
    "metadata that isn't an object": (
        lambda file, own: file.attrs.__setitem__("cellstack", "[1]"),
        "cellstack: expected the network's metadata, found",
    ),
    "metadata with NaN": (lambda file, own: file.attrs.__setitem__("cellstack", '{"a": NaN}'), "without NaN"),
    "names of nothing": (lambda file, own: own.attrs.__setitem__("weight_names", [b"../../x"]), "expected a weight"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_hdf5(tmp_path, what):
    change, message = HOSTILE[what]
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["bias"] = np.ones(8, "float32")
    (tmp_path / "secret.bin").write_bytes(np.ones(8, "float32").tobytes())
    path = hdf5(tmp_path / "bad.h5", change)
    tracemalloc.start()
    with pytest.raises(FormatError, match=message):
        adapter.load(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def deep(file, own):
    for _ in range(100):
        own = own.create_group("g")


def test_deeply_nested_groups(tmp_path):
    with pytest.raises(FormatError, match="groups are nested more than 32 deep"):
        adapter.load(hdf5(tmp_path / "bad.h5", deep))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 50_000, "nested too deep|expected JSON"),
        ("{", "expected JSON"),
        ('"LSTM"', "expected a Sequential or functional model"),
        ('{"class_name": "Mine", "config": {}}', "expected a Sequential or functional model, found 'Mine'"),
        ('{"class_name": "Sequential", "config": 3}', "expected the layers of the model"),
        ('{"class_name": "Sequential", "config": []}', "no layer uses the weights"),
        ('{"class_name": "Model", "config": {"layers": [], "input_layers": [], "output_layers": []}}', "input_layers"),
    ],
)
def test_hostile_descriptions(tmp_path, config, message):
    with pytest.raises(FormatError, match=message):
        adapter.load(hdf5(tmp_path / "bad.h5", config=config))


def call(*sources):
    return [[[source, 0, 0, {}] for source in sources]]


@pytest.mark.long
def test_cycles_and_too_many_nodes(tmp_path):
    """Layers that take each other's outputs; nested models that are each used twice."""
    layers = [
        {"class_name": "InputLayer", "name": "x", "config": {"name": "x"}, "inbound_nodes": []},
        {"class_name": "Add", "name": "a", "config": {"name": "a"}, "inbound_nodes": call("x", "b")},
        {"class_name": "Add", "name": "b", "config": {"name": "b"}, "inbound_nodes": call("x", "a")},
    ]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": [["b", 0, 0]]}
    config = json.dumps({"class_name": "Model", "config": {"layers": layers, **ends}})
    with pytest.raises(FormatError, match="its inputs form a cycle"):
        adapter.load(hdf5(tmp_path / "bad.h5", config=config))
    inner = {
        "class_name": "Sequential",
        "config": [{"class_name": "Activation", "config": {"name": "t", "activation": "tanh"}}],
    }
    for depth in range(15):
        twice = [*call("x"), [[f"m{depth}", 0, 0, {}]]]
        layers = [layers[0], {**inner, "name": f"m{depth}", "inbound_nodes": twice}]
        ends = {"input_layers": [["x", 0, 0]], "output_layers": [[f"m{depth}", 1, 0]]}
        inner = {"class_name": "Model", "config": {"layers": layers, **ends}}
        if isinstance(layers[1]["config"], dict):
            layers[1]["config"]["name"] = f"m{depth}"
        else:
            layers[1]["config"] = {"name": f"m{depth}", "layers": layers[1]["config"]}
    start = time.process_time()
    with pytest.raises(FormatError, match="more than 10000 nodes"):
        adapter.load(hdf5(tmp_path / "bad.h5", config=json.dumps(inner)))
    assert time.process_time() - start < 20


def heap_of(data):
    """The positions of a file's heap of texts and of its first text's length."""
    at = data.index(b"GCOL\x01")
    return at, at + 16 + 8


@pytest.mark.parametrize("size", [0, 1 << 63])
def test_heaps_with_inconsistent_lengths(tmp_path, good, size):
    """The HDF5 library never stops reading such a heap."""
    data = bytearray(good[".h5"])
    heap, length = heap_of(data)
    data[length : length + 8] = size.to_bytes(8, "little")
    data[heap + 16 : heap + 18] = b"\0\0"
    path = tmp_path / "bad.h5"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="expected texts within a global heap, found one of"):
        adapter.load(path)


def test_texts_with_lengths_of_gigabytes(tmp_path, good):
    data = bytearray(good[".h5"])
    heap, length = heap_of(data)
    size = int.from_bytes(data[length : length + 8], "little")
    first = data.index(size.to_bytes(4, "little") + heap.to_bytes(8, "little"))
    data[first : first + 4] = (1 << 31).to_bytes(4, "little")
    path = tmp_path / "bad.h5"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"expected a text of .* bytes, found the length 2147483648"):
        adapter.load(path)


def test_names_that_are_invalid_for_nodes(tmp_path):
    layer = {"class_name": "LSTM", "config": {**CONFIG, "name": "r\u0000"}}
    path = hdf5(tmp_path / "bad.h5", config=json.dumps({"class_name": "Sequential", "config": [layer]}))
    assert adapter.load(path).names == ("r_",)
    assert adapter.extract(path)["r\u0000"].names == ("r_",)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        adapter.load(tmp_path / "none.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = np.ones(3)
    with pytest.raises(FormatError, match="expected weights by layers, found HDF5 that isn't Keras's"):
        adapter.load(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("Dear reader")
    with pytest.raises(FormatError, match="expected an HDF5 file"):
        adapter.load(tmp_path / "text.h5")


def test_recognised_files(good):
    for suffix, data in good.items():
        assert adapter.recognises(data[:64]), suffix
    assert not adapter.recognises(b"")
    assert not adapter.recognises(zipped({"data.pkl": b"x"})[:64])


def test_without_h5py_the_message_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from cellstack.formats import keras\n"
        "try:\n    keras.load('x.h5')\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "pip install 'cellstack[keras]'" in done.stdout

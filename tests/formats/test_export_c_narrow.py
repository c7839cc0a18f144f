"""Networks as C with int8 and bfloat16 weights: the same bits as a stream with such weights."""

import ctypes
import dataclasses
import re
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from family import random_spec
from networks import fill, make_cell
from test_export_c import STRICT, compiled
from tools import need

from cellstack import CellSpec, Network, native, verify
from cellstack.cells.spec import GATES
from cellstack.cli import main as cli
from cellstack.formats.c import export, sizes
from cellstack.nodes import Activation, Bidirectional, Cell, Dense, GlobalPool, Recurrent
from cellstack.nodes.cell_arrays import MOST_DEPTH

NARROW = ("int8", "bfloat16")
FUSED = native.isa() != "baseline"  # which has no fused multiply-add
ROUNDING = 2e-2  # a sum that differs in the last bit may be rounded to the next step of int8, or the next bfloat16


class InC:
    """A network in C in a loaded library, with its own state."""

    def __init__(self, library, name, net, weights):
        self.library, self.name, self.net = library, name, net
        self.state = np.full(sizes(net, weights).ram, 0xFF, np.uint8)
        self.outputs = net.shapes[net.outputs[0]][-1]
        self.call("init")

    def call(self, what, *arguments):
        given = [
            each if isinstance(each, ctypes.c_size_t) else each.ctypes.data_as(ctypes.c_void_p) for each in arguments
        ]
        getattr(self.library, f"{self.name}_{what}")(self.state.ctypes.data_as(ctypes.c_void_p), *given)

    def run(self, x):
        y = np.full((len(x), self.outputs), np.nan, "f4")
        for frame, out in zip(np.ascontiguousarray(x, "f4"), y, strict=True):
            self.call("step", frame, out)
        return y

    def cells(self):
        """Return the states of all cells, which come first in the struct."""
        shapes = [(size,) for cell in self.net.cells for size in cell.spec.state_sizes.values()]
        ends = np.cumsum([0, *(size for (size,) in shapes)])
        floats = self.state.view("f4")
        return [floats[start:end] for start, end in pairwise(ends)]


def build(folder, networks, *, language="c", standard="c99"):
    """Write networks with each kind of weights, compile them strictly, and return them by (name, weights)."""
    names = {(name, weights): f"{name}_{weights}" for name in networks for weights in NARROW}
    for (name, weights), file in names.items():
        export(networks[name], folder, file, weights)
    compiler = {"c": "gcc", "c++": "g++"}[language]
    options = ["-x", language, f"-std={standard}", "-ffp-contract=off", *STRICT, "-O1", "-shared", "-fPIC"]
    compiled([compiler, *options, "-o", "library.so", *(f"{file}.c" for file in names.values()), "-lm"], folder)
    library = ctypes.CDLL(str(folder / "library.so"))
    return {key: InC(library, file, networks[key[0]], key[1]) for key, file in names.items()}


def frames(net, steps=24, seed=0):
    return (2 * np.random.default_rng(seed).normal(size=(steps, net.input_size))).astype("f4")


def streamed(net, x, weights):
    stream = net.stream(weights=weights)
    return np.concatenate([stream.step(frame[None]) for frame in x]), [
        array[0] for each in stream.state for array in each
    ]


def without_denormals(array):
    """Return an array with zeros in place of denormal numbers, as a stream computes it."""
    return np.where(np.abs(array) < np.finfo(np.float32).tiny, np.float32(0), array)


EXPONENTIAL = ("slstm", "cfs")
"""The kinds whose steps call `expf`, an sLSTM's log σ as a softplus."""


def has_the_streams_bits(spec):
    """Whether all that a cell computes is the same in every implementation."""
    vague = spec.layer_norm or spec.settings.get("attention") or spec.kind in EXPONENTIAL
    return FUSED and not vague and all(found.name not in ("softplus", "silu", "gelu") for found in spec.activations)


def compare(made, net, weights, exact, x=None):
    x = frames(net) if x is None else x
    expected, states = streamed(net, x, weights)
    got, own = made.run(x), made.cells()
    if exact:
        for ours, theirs in zip([got, *own], [expected, *states], strict=True):
            assert np.array_equal(without_denormals(ours), theirs, equal_nan=True)
    else:
        np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING * max(1.0, np.abs(expected).max()))
    made.call("reset")
    assert np.array_equal(made.run(x), got, equal_nan=True)


def cells_of(kind, seeds):
    """Yield networks of a random cell, whose states stay of moderate size."""
    yield f"{kind}_plain", Network([Recurrent((fill(np.random.default_rng(0), CellSpec(5, 13, kind=kind)),))])
    for seed in seeds:
        rng = np.random.default_rng(seed)
        net = Network([Recurrent((fill(rng, random_spec(rng, kind, 12)),))])
        if np.abs(net.stream().run(frames(net)[None])).max() < 10:
            yield f"{kind}_{seed}", net


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", GATES)
def test_every_kind_of_cell(tmp_path, kind, first):
    networks = dict(cells_of(kind, range(60, 80) if first else range(3, 6)))
    exact = {name: has_the_streams_bits(net.cells[0].spec) for name, net in networks.items()}
    assert any(exact.values()) == (FUSED and kind not in EXPONENTIAL)
    for (name, weights), made in build(tmp_path, networks).items():
        compare(made, networks[name], weights, exact[name])


def chain(rng, kind="lstm"):
    floats = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    first = Dense(floats(4, 6), floats(6), "relu")
    cells = make_cell(rng, 6, 7, kind=kind), make_cell(rng, 7, 9, kind=kind)
    return [Recurrent((make_cell(rng, 3, 4),)), first, Recurrent(cells), Dense(floats(9, 3), floats(3), "tanh")]


@pytest.mark.parametrize(("language", "standard"), [("c", "c99"), ("c++", "c++11")])
def test_stacks_and_the_layers_between_them(tmp_path, language, standard):
    networks = {kind: Network(chain(np.random.default_rng(0), kind)) for kind in ("lstm", "gru")}
    for (name, weights), made in build(tmp_path, networks, language=language, standard=standard).items():
        compare(made, networks[name], weights, FUSED)


def test_a_softmax_is_within_float_rounding(tmp_path):
    net = Network([*chain(np.random.default_rng(1)), Activation("softmax")])
    for (_, weights), made in build(tmp_path, {"net": net}).items():
        x = frames(net)
        np.testing.assert_allclose(made.run(x), streamed(net, x, weights)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", NARROW)
def test_whole_sequences(tmp_path, weights):
    need("cc")
    rng = np.random.default_rng(0)
    ahead, back = (Recurrent((make_cell(rng, 3, 5),), go_backwards=way) for way in (False, True))
    for name, nodes in {"tagger": [Bidirectional(ahead, back)], "last": [back, GlobalPool("last")]}.items():
        net = Network(nodes, _warn=False)
        _, source = export(net, tmp_path, name, weights)
        assert verify(net, source, streams=False).ok(0.0 if FUSED else ROUNDING)


def test_unusual_numbers(tmp_path):
    """Rows of zeros, very large and infinite numbers and NaN, weights that are zero or NaN, and rounding ties."""
    rng = np.random.default_rng(0)
    cell = make_cell(rng, 5, 6)
    arrays = {name: np.array(array) for name, array in cell.arrays.items()}
    arrays["kernel"][:, 1] = 0.0
    arrays["kernel"][:, 2] = np.linspace(-127, 127, 5) * 0.5  # halfway between two steps, and between two bfloat16
    plain, odd = Network([Recurrent((Cell(cell.spec, **arrays),))]), dict(arrays)
    odd["recurrent_kernel"] = odd["recurrent_kernel"].copy()
    odd["recurrent_kernel"][2, 3] = np.nan
    networks = {"plain": plain, "odd": Network([Recurrent((Cell(cell.spec, **odd),))])}
    x = np.ones((8, 5), "f4")
    x[1], x[2], x[3] = 0.0, [1e30, -1e30, 1.0, 0.5, 127.5], [3e38, 1, 2, 3, 4]
    x[4], x[5] = np.arange(5) / 127, np.float32(1 + 2.0**-8) * np.arange(5)
    x[6, 2] = np.inf
    for (name, weights), made in build(tmp_path, networks).items():
        compare(made, networks[name], weights, FUSED, x)
        x[7, 2] = np.nan
        made.call("reset")
        assert np.isnan(made.run(x)[-1]).any()


@pytest.mark.parametrize("weights", NARROW)
def test_the_sizes_are_known_beforehand(tmp_path, weights):
    rng = np.random.default_rng(0)
    net = Network([Recurrent((fill(rng, CellSpec(5, 9, proj_size=3, peepholes=True)),)), Dense(np.ones((3, 2), "f4"))])
    said = sizes(net, weights)
    matrices = 5 * 36 + 3 * 36 + 9 * 3 + 3 * 2
    scales = 36 + 36 + 3 + 2 if weights == "int8" else 0
    assert said.constants == matrices * (1 if weights == "int8" else 2) + 4 * (scales + 36 + 27)
    header, source = net.export_c(tmp_path, "net", weights)
    assert f"Flash:  {said.constants:,} bytes" in header.read_text()
    assert f"RAM:    {said.ram:,} bytes" in header.read_text()
    program = 'int main(void) { return printf("%u", (unsigned)sizeof(net_state)) < 0; }\n'
    (tmp_path / "size.c").write_text(f'#include <stdio.h>\n#include "net.h"\n{program}')
    compiled(["gcc", "-o", "size", "size.c"], tmp_path)
    ran = subprocess.run([tmp_path / "size"], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == said.ram == said.state + said.scratch
    compiled(["gcc", "-std=c99", "-O2", "-c", source.name], tmp_path)
    listed = subprocess.run(["nm", "-S", tmp_path / "net.o"], capture_output=True, text=True, check=True).stdout
    arrays = re.findall(r"^\w+ (\w+) [rd] (?!.*weights)\w+$", listed, re.MULTILINE)
    assert sum(int(size, 16) for size in arrays) == said.constants
    undefined = {name for name in re.findall(r" U (\w+)", listed) if not name.startswith("_")}
    assert undefined <= {"memcpy", "memset", "fmaf"}, undefined
    sections = subprocess.run(["size", "-A", tmp_path / "net.o"], capture_output=True, text=True, check=True).stdout
    assert {name: int(size) for name, size in re.findall(r"^(\.data|\.bss) +(\d+)", sections, re.MULTILINE)} == {
        ".data": 0,
        ".bss": 0,
    }


@pytest.mark.parametrize("weights", NARROW)
def test_the_stack_stays_small(tmp_path, weights):
    net = Network([Recurrent((fill(np.random.default_rng(0), CellSpec(40, 64, peepholes=True, proj_size=32)),))])
    net.export_c(tmp_path, "net", weights)
    compiled(["gcc", "-std=c99", "-c", "-O2", "-fno-inline", "-fstack-usage", "net.c"], tmp_path)
    lines = [line.split("\t") for line in (tmp_path / "net.su").read_text().splitlines()]
    assert {kind for _, _, kind in lines} <= {"static", "dynamic,bounded"}  # the latter pushes arguments
    used = {place.split(":")[-1].split(".")[0]: int(size) for place, size, _ in lines}
    callers = used.pop("net_step") + used.pop("net_lstm_cell_step") + used.pop("net_multiply")
    assert callers + max(used.values()) < 512, (callers, used)


def test_the_default_is_the_networks_own_format(tmp_path):
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 4),))])
    texts = {
        name: [path.read_text() for path in given.export_c(tmp_path, "net", weights)]
        for name, given, weights in (
            ("own", net, None),
            ("float32", net, "float32"),
            ("bfloat16", net, "bfloat16"),
            ("stored", net.with_weights("bfloat16"), None),
        )
    }
    assert texts["own"] == texts["float32"]
    assert "uint16_t" not in texts["own"][1]
    assert texts["bfloat16"][1] == texts["stored"][1].replace(" (matrices in bfloat16)", "")


def test_refused_formats(tmp_path):
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 4),))])
    with pytest.raises(ValueError, match=r"export_c: expected weights to be .*int8.*, got 'int4'"):
        net.export_c(tmp_path, weights="int4")
    wide = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 4, dtype="float64"),))])
    with pytest.raises(TypeError, match="export_c: expected a float32 network for weights='int8', got float64"):
        wide.export_c(tmp_path, weights="int8")
    spec = CellSpec(MOST_DEPTH + 1, 1, kind="mingru")
    deep = Cell(spec, **{name: np.zeros(shape, "f4") for name, shape in spec.shapes.items()})
    with pytest.raises(ValueError, match=f"export_c: expected at most {MOST_DEPTH} features and units"):
        Network([Recurrent((deep,))]).export_c(tmp_path, weights="int8")
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_and_verifies_narrow_weights(tmp_path, capsys):
    need("cc")
    model = tmp_path / "net.safetensors"
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 8),)), Dense(np.ones((8, 2), "f4"))])
    net.save(model)
    assert cli.main(["convert", str(model), str(tmp_path / "net.c"), "--weights", "int8", "--tolerance", "1e-6"]) == 0
    said, (constants, state, scratch) = capsys.readouterr().out, sizes(net, "int8")
    assert f"flash: {constants:,} bytes of constants, and the code; RAM: {state + scratch:,} bytes" in said
    assert verify(net, tmp_path / "net.c", streams=False).ok(0.0 if FUSED else ROUNDING)
    assert cli.main(["convert", str(model), str(tmp_path / "net.onnx"), "--weights", "int8"]) == 2
    assert "only a target in C can have such weights" in capsys.readouterr().err


def test_a_changed_file_in_a_narrow_format_is_not_verified(tmp_path):
    need("cc")
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 4),))])
    _, source = net.export_c(tmp_path, "net", "int8")
    other = dataclasses.replace(net.cells[0], bias=np.ones(16, "f4"))
    report = verify(Network([Recurrent((other,))]), source, streams=False)
    assert report.runtime is None
    assert "isn't the file that export_c writes" in report.note

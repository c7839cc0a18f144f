"""Networks as C: compiled without a warning, compared with the stream, run under sanitizers."""

import ctypes
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pairs
import pytest
from family import random_spec
from networks import fill, make_cell, make_network
from tolerances import KERNEL
from tools import need

from cellstack import CellSpec, Network
from cellstack.cells import KINDS
from cellstack.cells.spec import GATES
from cellstack.formats.c import export
from cellstack.formats.verify import verify
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Function,
    GlobalPool,
    LayerNorm,
    Merge,
    Power,
    Recurrent,
    Reduce,
    Scale,
    Standardise,
    TimeSoftmax,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wconversion", "-Wdouble-promotion", "-Wshadow"]
REAL = {"float32": ctypes.c_float, "float64": ctypes.c_double}


def compiled(command, folder):
    need(command[0])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


class InC:
    """A network in C in a loaded library, with its own state; members by name."""

    def __init__(self, library, folder, name, dtype):
        self.library, self.name, self.dtype = library, name, np.dtype(dtype)
        self.header = (folder / f"{name}.h").read_text()
        members = re.findall(r"^    (?:float|double) (\w+)\[(\d+)\]; /\* (.*) \*/$", self.header, re.MULTILINE)
        self.members = {member: (int(size), text) for member, size, text in members}
        self.memory = np.full(sum(size for size, _ in self.members.values()), np.nan, dtype)
        self.inputs, self.outputs = (
            int(re.search(rf"^#define {name}_{end} (\d+)$", self.header, re.MULTILINE)[1]) for end in ("IN", "OUT")
        )
        self.call("init")

    def call(self, what, *arrays):
        getattr(self.library, f"{self.name}_{what}")(
            *(array.ctypes.data_as(ctypes.c_void_p) for array in (self.memory, *arrays))
        )

    def step(self, x):
        x = np.array(x, self.dtype).reshape(self.inputs)
        y = np.full(self.outputs, np.nan, self.dtype)
        self.call("step", x, y)
        return y

    def run(self, x):
        return np.stack([self.step(frame) for frame in x])

    def member(self, name):
        at = 0
        for other, (size, _) in self.members.items():
            if other == name:
                return self.memory[at : at + size]
            at += size
        raise KeyError(name)

    def spoil(self):
        """Write NaN into everything that needn't be kept between steps."""
        for name, (_, text) in self.members.items():
            if text == "scratch":
                self.member(name)[:] = np.nan


def build(folder, networks, *, language="c", standard="c99"):
    """Write networks, compile them strictly into one library, and return a wrapper of each."""
    for name, net in networks.items():
        export(net, folder, name)
    sources = [f"{name}.c" for name in networks]
    compiler = {"c": "gcc", "c++": "g++"}[language]
    compiled([compiler, "-x", language, f"-std={standard}", *STRICT, "-O1", "-shared", "-fPIC", "-o", "library.so",
              *sources, "-lm"], folder)  # fmt: skip
    library = ctypes.CDLL(str(folder / "library.so"))
    return {name: InC(library, folder, name, net.dtype) for name, net in networks.items()}


def frames(net, steps, seed=0):
    rng = np.random.default_rng(seed)
    first = next(node for node in net.nodes if not isinstance(node, GlobalPool))
    if isinstance(first, Embedding):
        return rng.integers(0, len(first.table), size=(steps, 1)).astype(net.dtype)
    return rng.normal(size=(steps, net.input_size)).astype(net.dtype)


def streamed(net, x):
    stream, ids = net.stream(), net.inputs[0] in net.graph.ids
    return np.concatenate([stream.step(frame if ids else frame[None]) for frame in x]), stream


def near(got, expected, moved=0.0):
    """Within the kernel's tolerance, or ten times the change that rounding of the inputs causes in this network."""
    scale = max(1.0, np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    within = KERNEL[got.dtype.name] * scale + 10 * np.abs(np.nan_to_num(moved)).max(initial=0.0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=within)


def compared_with_the_stream(net, inside, steps=20):
    x = frames(net, steps)
    expected, stream = streamed(net, x)
    rounded = x if np.array_equal(x, np.floor(x)) else np.nextafter(x, np.inf, dtype=x.dtype)
    other, other_stream = streamed(net, rounded)
    moved = other - expected
    near(inside.run(x[: steps // 2]), expected[: steps // 2], moved)
    inside.spoil()
    near(inside.run(x[steps // 2 :]), expected[steps // 2 :], moved)
    kept = [name for name, (_, text) in inside.members.items() if text != "scratch"]
    states = [[array[0] for state in one.state for array in state] for one in (stream, other_stream)]
    assert len(kept) == len(states[0])
    for name, state, near_by in zip(kept, *states, strict=True):
        near(inside.member(name)[: state.size], state.ravel(), near_by - state)
    inside.call("reset")
    near(inside.run(x), expected, moved)


# ── the whole family, compiled strictly ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "seeds"),
    [
        ("float32", range(0, 30, 6)),
        ("float64", range(1, 30, 10)),
        pytest.param("float32", [seed for seed in range(30) if seed % 6], marks=pytest.mark.slow),
        pytest.param("float64", range(0, 60, 2), marks=pytest.mark.slow),
    ],
    ids=["float32", "float64", "float32, more", "float64, more"],
)
@pytest.mark.parametrize("kind", GATES)
def test_every_kind_of_cell_with_every_flag(tmp_path, kind, dtype, seeds):
    networks = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        networks[f"{kind}_{seed}"] = Network([Recurrent((fill(rng, random_spec(rng, kind, 12), dtype),))])
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)


def test_all_flags_are_covered():
    flags = {kind: set() for kind in GATES}
    for kind, seen in flags.items():
        for seed in range(0, 60, 2):
            seen.update(random_spec(np.random.default_rng(seed), kind, 12).settings)
    common = {"layer_norm", "clip", "zoneout", "learn_initial_state", "use_bias", "gate_activations"}
    own = {name: common & kind.settings.keys() for name, kind in KINDS.items()}
    assert common | {"peepholes", "coupled", "proj_size", "cell_clip", "zoneout_cell"} <= flags["lstm"]
    assert common | {"reset_after"} <= flags["gru"]
    assert all(own[kind] <= seen for kind, seen in flags.items())


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "seeds"),
    [
        ("float32", range(20)),
        ("float64", range(20, 30)),
        pytest.param("float32", range(20, 60), marks=pytest.mark.slow),
        pytest.param("float64", range(30, 60), marks=pytest.mark.slow),
    ],
    ids=["float32", "float64", "float32, more", "float64, more"],
)
def test_random_networks(tmp_path, dtype, seeds):
    networks = {f"net{seed}": make_network(seed, dtype, streams=True) for seed in seeds}
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)


def around(dtype="float32"):
    """A network of every node that can surround the cells, and stacks with residuals."""
    rng = np.random.default_rng(5)
    array = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    stack = Recurrent(tuple(make_cell(rng, 6, 6, dtype, kind=kind) for kind in GATES), residual=True)
    return Network(
        [
            Embedding(array(9, 5)),
            Scale(array(5), array(5)),
            LayerNorm(array(5), array(5)),
            Activation("linear"),
            Conv1D(array(3, 5, 4), array(4), padding="causal", dilation=2, activation="softsign"),
            Dense(array(4, 6), array(6), "relu"),
            stack,
            Conv1D(array(1, 6, 6), padding="causal", activation="softmax"),
            LayerNorm(),
            Clip(-1.0, 0.8),
            Clip(None, 0.5),
            Activation("softmax"),
            GlobalPool("last"),
            Standardise(array(6), array(6)),
            Dense(array(6, 3), activation="softmax"),
        ]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_node_around_the_cells(tmp_path, dtype):
    net = around(dtype)
    inside = build(tmp_path, {"around": net})["around"]
    compared_with_the_stream(net, inside)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_that_only_nodes_have(tmp_path, dtype):
    networks = {}
    for number, name in enumerate(MORE_ACTIVATIONS):
        kernel = np.random.default_rng(number).normal(size=(4, 3)).astype(dtype)
        networks[f"net{number}"] = Network([Dense(kernel, activation=name), Activation("tanh"), Activation(name)])
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_and_powers(tmp_path, dtype):
    first = Scale(np.full(3, 0.7, dtype), np.array([0.2, -0.1, 0.4], dtype))
    functions = [[Function(name)] for name in ("abs", "cos", "sin")] + [[Function("abs"), Function("log")]]
    powers = [[Function("abs"), Power(exponent)] for exponent in (0.5, -1.0, 2.0, 1.7)]
    networks = {f"net{n}": Network([first, *nodes]) for n, nodes in enumerate(functions + powers)}
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)


def test_an_id_out_of_range_is_treated_as_0(tmp_path):
    inside = build(tmp_path, {"around": around()})["around"]
    first = inside.step([0])
    for id_ in (-1, 9, 1e30, np.nan, -np.inf):
        inside.call("reset")
        assert np.array_equal(inside.step([id_]), first)
    inside.call("reset")
    assert not np.array_equal(inside.step([8]), first)


LATER = [pytest.param(*case, marks=pytest.mark.slow) for case in (("c", "c11"), ("c++", "c++17"))]


@pytest.mark.parametrize(("language", "standard"), [("c", "c99"), ("c++", "c++11"), *LATER])
def test_it_is_c_and_c_plus_plus(tmp_path, language, standard):
    networks = {f"net{seed}": make_network(seed, streams=True) for seed in range(3)} | {"around": around()}
    for name, inside in build(tmp_path, networks, language=language, standard=standard).items():
        compared_with_the_stream(networks[name], inside)


DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include "NAME.h"

int main(void)
{
    NAME_state *s = malloc(sizeof *s);
    REAL *x = malloc(NAME_IN * sizeof *x), *y = malloc(NAME_OUT * sizeof *y);
    if (s == NULL || x == NULL || y == NULL) {
        return 1;
    }
    NAME_init(s);
    while (fread(x, sizeof *x, NAME_IN, stdin) == NAME_IN) {
        NAME_step(s, x, y);
        fwrite(y, sizeof *y, NAME_OUT, stdout);
    }
    free(y);
    free(x);
    free(s);
    return 0;
}
"""


@pytest.mark.parametrize("seed", [*range(8), None])
def test_under_sanitizers(tmp_path, seed):
    dtype = ("float32", "float64")[(seed or 0) % 2]
    net = around() if seed is None else make_network(seed + 100, dtype, streams=True)
    export(net, tmp_path, "net")
    (tmp_path / "main.c").write_text(
        DRIVER.replace("NAME", "net").replace("REAL", {"float32": "float", "float64": "double"}[net.dtype.name])
    )
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    compiled(["gcc", "-std=c99", *STRICT, *sanitize, "-o", "run", "main.c", "net.c", "-lm"], tmp_path)
    x = frames(net, 12)
    done = subprocess.run([tmp_path / "run"], input=x.tobytes(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    expected, _ = streamed(net, x)
    near(np.frombuffer(done.stdout, net.dtype).reshape(expected.shape), expected)


# ── networks that need the whole sequence ─────────────────────────────────────────────────────────────────────────────

WHOLE_DRIVER = """
#include "net.h"

#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    const size_t steps = STEPS;
    net_state *s = malloc(sizeof *s);
    REAL *x = malloc(steps * net_IN * sizeof *x), *y = malloc(ANSWERS * net_OUT * sizeof *y);
    static REAL work[net_WORK(STEPS)]; /* as documented: an error if it were empty */
    while (fread(x, sizeof *x, steps * net_IN, stdin) == steps * net_IN) { /* the state is neither set nor reset */
        net_run(s, x, steps, y, work);
        fwrite(y, sizeof *y, ANSWERS * net_OUT, stdout);
    }
    free(s), free(x), free(y);
    return 0;
}
"""


def layer(rng, dtype, width, deep=1, **flags):
    """A stack of random cells of the family, of which the first takes `width` features."""
    cells = []
    for _ in range(deep):
        cells.append(fill(rng, dataclasses.replace(random_spec(rng), input_size=width), dtype))
        width = cells[-1].spec.output_size
    return Recurrent(tuple(cells), **flags)


def both(rng, dtype, width, mode="concat", sequences=True):
    ahead = layer(rng, dtype, width, return_sequences=sequences)
    back = layer(rng, dtype, width, return_sequences=sequences) if mode == "concat" else ahead
    return Bidirectional(ahead, dataclasses.replace(back, go_backwards=True), mode)


def wide(node):
    return node.check("node", (None, node.input_size))[-1]


def sequence_cases(rng, dtype):
    """Chains with every node that needs the whole sequence, at the beginning, in the middle and at the end."""
    floats = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    two = both(rng, dtype, 3)
    top = both(rng, dtype, wide(two))
    yield "stack", [two, top, GlobalPool("final"), Dense(floats(wide(top), 2), floats(2), "softmax")]
    yield "tagger", [two, top, Dense(floats(wide(top), 2), activation="softmax"), Activation("linear")]
    yield "alone", [two]
    yield "final", [two, GlobalPool("final")]
    yield "last", [two, GlobalPool("last")]
    for mode in ("sum", "mul", "ave"):
        yield mode, [Standardise(floats(3), np.abs(floats(3)) + 1), both(rng, dtype, 3, mode), Activation("tanh")]
        yield f"{mode} final", [both(rng, dtype, 3, mode, sequences=False)]
    yield "ids", [Embedding(floats(7, 3)), two, GlobalPool("max")]
    yield "table", [Embedding(floats(7, 3)), GlobalPool("mean")]
    ahead = layer(rng, dtype, 3, deep=2)
    yield "max", [ahead, Dense(floats(wide(ahead), 3)), GlobalPool("max"), LayerNorm(floats(3), floats(3))]
    back = layer(rng, dtype, 3, deep=2, go_backwards=True)
    yield "backwards", [Conv1D(floats(2, 3, 3), padding="causal"), back]
    yield "backwards, last", [dataclasses.replace(back, return_sequences=False), Scale(*floats(2, wide(back)))]
    over = both(rng, dtype, wide(ahead))
    top = layer(rng, dtype, wide(over), return_sequences=False)
    yield "up and down", [ahead, over, top, Clip(-0.5, 0.5)]
    cells = tuple(make_cell(rng, 4, 4, dtype=dtype) for _ in range(2))
    ends = [Recurrent(cells, return_sequences=False, go_backwards=way, residual=True) for way in (False, True)]
    yield "residual", [Dense(floats(3, 4)), Bidirectional(*ends)]
    score = [Dense(floats(3, 5), activation="tanh"), Dense(floats(5, 1))]
    yield "attention", attention([Dense(floats(3, 3))], score, [Dense(floats(3, 2), activation="softmax")])
    yield "attention of each feature", attention([Dense(floats(3, 3))], [Dense(floats(3, 3), floats(3))], [])
    yield "attention of cells", attention([layer(rng, dtype, 3)], [], [Clip(-0.5, 0.5)])
    yield "attention of both ways", attention([two], [Dense(floats(wide(two), 1))], [])
    yield "attention of the input", attention([], score, [])


def attention(before, scores, after):
    """A network with attention pooling: its nodes, names and wires."""
    nodes = [*before, *scores, TimeSoftmax(), Merge("mul"), Reduce("sum", 1), *after]
    names = [f"n{number}" for number in range(len(nodes))]
    values = ["x", *names]
    wires = [(value,) for value in values[:-1]]
    at = len(before) + len(scores)
    wires[at + 1] = (values[len(before)], names[at])
    return nodes, names, wires


def sequence_network(case):
    return Network(*case[:2], wires=case[2]) if isinstance(case, tuple) else Network(case, _warn=False)


CASES = [name for name, _ in sequence_cases(np.random.default_rng(0), "float64")]


@pairs.parametrize("seed, name", range(2), CASES, unpaired=[0])
def test_whole_sequences_under_sanitizers(tmp_path, name, seed):
    rng, dtype = np.random.default_rng(seed), ("float64", "float32")[seed]
    net = sequence_network(dict(sequence_cases(rng, dtype))[name])
    export(net, tmp_path, "net")
    every_step, steps = len(net.shapes[net.outputs[0]]) == 2, (9, 1)[seed]
    text = WHOLE_DRIVER.replace("STEPS", str(steps)).replace("ANSWERS", str(steps if every_step else 1))
    (tmp_path / "main.c").write_text(text.replace("REAL", {"float32": "float", "float64": "double"}[dtype]))
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    compiled(["gcc", "-std=c99", *STRICT, *sanitize, "-o", "run", "main.c", "net.c", "-lm"], tmp_path)
    x = np.stack([frames(net, steps, seed) for seed in range(3)])
    done = subprocess.run([tmp_path / "run"], input=x.tobytes(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = net(x[..., 0].astype(int) if net.inputs[0] in net.graph.ids else x)
    near(np.frombuffer(done.stdout, net.dtype).reshape(expected.shape), expected)
    if seed == 0:  # which compiles the file once more
        assert verify(net, tmp_path / "net.c", streams=False).ok(1e-9)
    else:
        compiled(["g++", "-x", "c++", "-std=c++11", *STRICT, "-fsyntax-only", "net.c"], tmp_path)


def test_the_maximum_of_nan_is_nan_in_c(tmp_path):
    need("cc")
    rng = np.random.default_rng(0)
    net = Network([layer(rng, "float32", 3), GlobalPool("max")])
    x = frames(net, 6)[None]
    x[0, 2] = np.nan
    _, source = export(net, tmp_path, "net")
    assert np.isnan(net(x)).any()
    assert verify(net, source, x, streams=False).ok(1e-4)


# ── guarantees of the files ───────────────────────────────────────────────────────────────────────────────────────────


def test_linear_cells_of_whole_numbers_are_exact(tmp_path):
    """Every gate and array has unique numbers, so that misplaced ones show."""
    networks = {}
    for kind, flags in (("lstm", {"proj_size": 2, "peepholes": True}), ("gru", {}), ("gru", {"reset_after": False})):
        spec = CellSpec(2, 3, "linear", "linear", kind=kind, **flags)
        rng = np.random.default_rng(0)
        arrays = {name: rng.integers(-2, 3, size=shape).astype("float64") for name, shape in spec.shapes.items()}
        networks[f"exact_{len(networks)}"] = Network([Recurrent((Cell(spec, **arrays),))])
    for name, inside in build(tmp_path, networks).items():
        x = np.random.default_rng(1).integers(-2, 3, size=(4, 2)).astype("float64")
        assert np.array_equal(inside.run(x), streamed(networks[name], x)[0])


def test_a_convolution_alone_remembers(tmp_path):
    rng = np.random.default_rng(0)
    networks = {
        f"taps_{taps}_{dilation}": Network(
            [Conv1D(rng.normal(size=(taps, 3, 2)).astype("f4"), padding="causal", dilation=dilation)]
        )
        for taps, dilation in ((2, 1), (2, 4), (5, 1), (3, 3))
    }
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)


def test_narrow_layers_compile_without_a_warning(tmp_path):
    """The number of bytes equals the number of array elements: GCC warns of a memset like this."""
    rng = np.random.default_rng(0)
    nodes = [Dense(rng.normal(size=(2, 4)).astype("f4"), None, "tanh"), Dense(rng.normal(size=(4, 1)).astype("f4"))]
    networks = {"narrow": Network([*nodes, Dense(rng.normal(size=(1, 4)).astype("f4"), None, "relu")])}
    for name, inside in build(tmp_path, networks).items():
        compared_with_the_stream(networks[name], inside)
    with pytest.raises(
        ValueError, match=r"export_c: expected a name of letters, digits and single underscores, .*got 5"
    ):
        networks["narrow"].export_c(tmp_path, 5)


def test_x_and_y_may_be_the_same_array(tmp_path):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4)).astype("float32")
    networks = {
        "dense": Network([Dense(kernel)]),
        "deep": Network([Dense(kernel), Recurrent((make_cell(rng, 4, 4), make_cell(rng, 4, 4))), Dense(kernel)]),
    }
    for name, inside in build(tmp_path, networks).items():
        x = frames(networks[name], 5)
        expected = inside.run(x)
        inside.call("reset")
        for frame, y in zip(x.copy(), expected, strict=True):
            inside.call("step", frame, frame)
            assert np.array_equal(frame, y)


def test_states_are_plain_memory_and_independent(tmp_path):
    net = make_network(3, streams=True)
    one = build(tmp_path, {"net": net})["net"]
    other = InC(one.library, tmp_path, "net", net.dtype)
    x = frames(net, 8)
    expected = one.run(x)
    for _ in range(2):
        other.run(frames(net, 3, seed=1))
    one.call("reset")
    assert np.array_equal(one.run(x[:4]), expected[:4])
    other.memory[:] = one.memory
    assert np.array_equal(other.run(x[4:]), expected[4:])


def test_sizes_are_as_the_header_says(tmp_path):
    net = make_network(3, streams=True)
    header, source = export(net, tmp_path, "net")
    flash, ram = (
        int(re.search(rf"{what}: +([\d,]+) bytes", header.read_text())[1].replace(",", "")) for what in ("Flash", "RAM")
    )
    assert flash == sum(node.parameters for node in net.nodes) * net.dtype.itemsize
    program = 'int main(void) { return printf("%u", (unsigned)sizeof(net_state)) < 0; }\n'
    (tmp_path / "size.c").write_text(f'#include <stdio.h>\n#include "net.h"\n{program}')
    compiled(["gcc", "-o", "size", "size.c"], tmp_path)
    assert int(subprocess.run([tmp_path / "size"], capture_output=True, text=True, check=True).stdout) == ram
    compiled(["gcc", "-c", "-O2", "-o", "net.o", source.name], tmp_path)
    sections = subprocess.run(["size", "-A", tmp_path / "net.o"], capture_output=True, text=True, check=True).stdout
    writable = {name: int(size) for name, size in re.findall(r"^(\.data|\.bss) +(\d+)", sections, re.MULTILINE)}
    assert writable == {".data": 0, ".bss": 0}
    symbols = subprocess.run(["nm", "-u", tmp_path / "net.o"], capture_output=True, text=True, check=True).stdout
    allowed = r"(exp|expm1|log1p|tanh|fabs|sqrt)f?|mem(cpy|set|move)|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail"
    assert all(re.fullmatch(allowed, symbol) for symbol in re.findall(r"U (\w+)", symbols)), symbols


def test_the_stack_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    spec = CellSpec(40, 64, layer_norm=True, peepholes=True, proj_size=32, zoneout=0.1)
    export(Network([Recurrent((fill(rng, spec),)), Dense(rng.normal(size=(32, 9)).astype("f4"))]), tmp_path, "net")
    compiled(["gcc", "-c", "-O2", "-fno-inline", "-fstack-usage", "net.c"], tmp_path)
    used = {}
    for line in (tmp_path / "net.su").read_text().splitlines():
        place, size, kind = line.split("\t")
        assert kind == "static"
        used[place.split(":")[-1].split(".")[0]] = int(size)
    deepest = used["net_step"] + used["net_lstm_cell_step"] + max(used.values())
    assert deepest < 512, used


def test_a_function_is_written_once_and_only_where_it_is_used(tmp_path):
    rng = np.random.default_rng(0)
    cells = (make_cell(rng, 3, 4), make_cell(rng, 4, 7), make_cell(rng, 7, 2, peepholes=True))
    text = export(Network([Recurrent(cells), Dense(rng.normal(size=(2, 2)).astype("f4"))]), tmp_path)[1].read_text()
    functions = re.findall(r"^(?:static )?\w+ (model_\w+)\(", text, re.MULTILINE)
    assert functions == [
        "model_accumulate",
        "model_sigmoid",
        "model_lstm_cell_step",
        "model_lstm_cell_2_step",
        "model_init",
        "model_reset",
        "model_step",
    ]
    assert "gru" not in text


def test_names_that_are_invalid_in_c(tmp_path):
    rng = np.random.default_rng(0)
    names = ["int", "a b", "a_b", "a-b", "0", "schön *", "$real ${x}", "a_b_kernel", "λ", "??)"]
    nodes = [Dense(rng.normal(size=(3, 3)).astype("f4"), np.zeros(3, "f4")) for _ in names[1:]]
    net = Network([Recurrent((make_cell(rng, 3, 3), make_cell(rng, 3, 3))), *nodes], names)
    compared_with_the_stream(net, build(tmp_path, {"n": net})["n"])
    with pytest.raises(ValueError, match="expected a name"):
        export(net, tmp_path, "3d")
    for name in ("", "a-b", "a__b", "a_", "../a", "a.b"):
        with pytest.raises(ValueError, match="expected a name"):
            export(net, tmp_path, name)


def test_numbers_that_aren_t_finite_and_those_that_are_tiny(tmp_path):
    kernel = np.array([[np.inf, -np.inf, np.nan, 1e-45, 1.17e-38, 3.4e38, -0.0, 1e10, 0.1]], "f4")
    inside = build(tmp_path, {"net": Network([Dense(kernel)])})["net"]
    assert np.array_equal(inside.step([1.0]), kernel[0], equal_nan=True)
    assert np.array_equal(np.signbit(inside.step([1.0])[:2]), [False, True])


def test_the_program_on_the_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "c.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```c\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    rng = np.random.default_rng(0)
    net = Network([Recurrent((make_cell(rng, 3, 8),)), Dense(rng.normal(size=(8, 2)).astype("f4"))])
    export(net, tmp_path, "tagger")
    (tmp_path / "main.c").write_text(program)
    compiled(["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-o", "run", "main.c", "tagger.c", "-lm"], tmp_path)
    x = frames(net, 6)
    text = "\n".join(" ".join(f"{value:.9g}" for value in frame) for frame in x)
    said = subprocess.run([tmp_path / "run"], input=text, capture_output=True, text=True, check=True).stdout
    y = np.array([line.split() for line in said.splitlines()], float)
    np.testing.assert_allclose(y, streamed(net, x)[0], rtol=0, atol=1e-5)


# ── errors, and files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_unsupported_nodes_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(0)
    ahead = Recurrent((make_cell(rng, 3, 4),))
    back = Recurrent(ahead.cells, go_backwards=True)
    with pytest.raises(ValueError, match=r"layer_0 can't be written as C: .*padding"):
        export(Network([Conv1D(np.ones((2, 3, 3), "f4")), Bidirectional(ahead, back)]), tmp_path)
    alone = "layer_1: TimeSoftmax is only supported in attention pooling"
    with pytest.raises(ValueError, match=alone):
        export(Network([ahead, TimeSoftmax()]), tmp_path)
    cut = attention([Bidirectional(ahead, back)], [Dense(np.ones((8, 8), "f4"))], [])
    cut[0][3] = Merge("max")
    with pytest.raises(ValueError, match="n2: TimeSoftmax is only supported in attention pooling"):
        export(sequence_network(cut), tmp_path)
    with pytest.raises(ValueError, match="must fix the width"):
        export(Network([Activation("tanh")]), tmp_path)
    wires = [("x",), ("x",), ("layer_0", "layer_1")]
    branched = Network([Scale(np.ones(3, "f4"), np.ones(3, "f4")), ahead, Merge("concat")], wires=wires)
    with pytest.raises(ValueError, match="layer_1 reads x"):
        export(branched, tmp_path)
    with pytest.raises(ValueError, match="the last node must be the only output, got layer_0, layer_1"):
        export(Network([ahead, Activation("tanh")], outputs=("layer_0", "layer_1")), tmp_path)
    with pytest.raises(ValueError, match="layer_0 can't run step by step"):
        export(Network([Conv1D(np.ones((2, 3, 3), "f4")), ahead]), tmp_path)
    with pytest.raises(ValueError, match="layer_0: expected a Conv1D with one group"):
        export(Network([Conv1D(np.ones((2, 1, 3), "f4"), groups=3, padding="causal"), ahead]), tmp_path)
    with pytest.raises(ValueError, match="layer_0: mask_zero isn't supported"):
        export(Network([Embedding(np.ones((4, 3), "f4"), mask_zero=True), ahead]), tmp_path)
    spec = CellSpec(16, 4, use_kernel=False)
    without = Cell(spec, *(np.ones(shape, "f4") for shape in spec.shapes.values()))
    sums, back = Recurrent((without,)), Recurrent((without,), go_backwards=True)
    for node in (sums, back, Bidirectional(sums, back)):
        with pytest.raises(ValueError, match="layer_0: cells with use_kernel=False aren't supported"):
            export(Network([node]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_and_folders_made(tmp_path):
    net = make_network(3, streams=True)
    for _ in range(2):
        header, source = net.export_c(tmp_path / "made" / "here", "net")
        assert (header.name, source.name) == ("net.h", "net.c")
    assert sorted(path.name for path in header.parent.iterdir()) == ["net.c", "net.h"]
    assert header.read_bytes().isascii()
    assert source.read_bytes().isascii()


@pytest.mark.parametrize("name", ["string", "math", "stdio", "Float"])
def test_names_of_c_s_own_headers(tmp_path, name):
    with pytest.raises(ValueError, match="is the name of a standard C header"):
        export(make_network(0, "float32", streams=True), tmp_path, name)
    with pytest.raises(ValueError, match="expected a folder, got"):
        export(make_network(0, "float32", streams=True), tmp_path / "model.c", "model")
    assert not list(tmp_path.iterdir())


def test_networks_without_state_compile_without_a_warning(tmp_path, rng):
    nets = {
        "scaled": Network([Standardise(np.zeros(3, "f4"), np.ones(3, "f4"))]),
        "plain": Network([Dense(rng.normal(size=(3, 2)).astype("f4"))]),
        "tap": Network([Conv1D(rng.normal(size=(1, 3, 2)).astype("f4"), padding="causal")]),
        "ids": Network([Embedding(rng.normal(size=(5, 2)).astype("f4"))]),
    }
    for language, standard in (("c", "c99"), ("c++", "c++11")):
        folder = tmp_path / language
        for name, made in build(folder, nets, language=language, standard=standard).items():
            net = nets[name]
            x = np.array([[[1, 4]], [[2, 0]]])[0] if name == "ids" else rng.normal(size=(1, 2, 3)).astype("f4")
            np.testing.assert_allclose(made.run(x[0]), net.run(x)[0][0], rtol=1e-6)


def test_a_full_disk_leaves_both_files_unchanged(tmp_path):
    net, changed = (Network([Recurrent((make_cell(np.random.default_rng(seed), 3, 16),))]) for seed in range(2))
    export(net, tmp_path, "net")
    changed.save(tmp_path / "net.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    header, source = (len(before[name]) for name in ("net.h", "net.c"))
    assert header < source
    script = f"""
import resource, signal, sys
from cellstack import load
net = load({str(tmp_path / "net.safetensors")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({(header + source) // 2},) * 2)
try:
    net.export_c({str(tmp_path)!r}, "net")
except OSError:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

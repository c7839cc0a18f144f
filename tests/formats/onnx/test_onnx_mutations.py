"""Models with one change each: they agree with ONNX Runtime, or raise a FormatError."""

import time
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx_batchless import model_of, plans
from onnx_graphs import export, operator_model, random_operator
from onnx_mutations import Runtime, mutated
from torch import nn

from cellstack import CellSpec
from cellstack.cells.base import HiddenState, State
from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats import onnx as adapter
from cellstack.network import Network
from cellstack.nodes import Bidirectional, Cell, Conv1D, Dense, LayerNorm, Pool1D, Recurrent, Scale

SECONDS, LONG = 12.0, 300.0
PERMUTED = ("BFT", "FT")  # axes of outputs that end in a Permute, in files that we wrote
NEAR = (
    2e-4  # relative to the greatest number above 1: a change may enlarge numbers and the rounding errors of their sums
)


class Whole(nn.Module):
    """A convolution, norms, two layers both ways, a head on the last step."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.bn = nn.Conv1d(3, 4, 3, padding=1), nn.LayerNorm(6), nn.BatchNorm1d(4)
        self.rnn, self.head = getattr(nn, kind)(4, 3, 2, bidirectional=True, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return torch.softmax(self.head(self.norm(self.rnn(y)[0])[:, -1]), -1)


class Stateful(nn.Module):
    """Two layers with states as inputs and outputs."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = getattr(nn, kind)(3, 4, 2), nn.Linear(4, 2)

    def forward(self, x, *states):
        y, after = self.rnn(x, states if len(states) > 1 else states[0])
        return self.head(torch.tanh(y)), *(after if isinstance(after, tuple) else (after,))


class Words(nn.Module):
    """Ids, a GRU, its mean."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(9, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(self.table(x))[0].mean(1))


class Loop(nn.Module):
    """A loop over a cell."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 4)
        outputs = []
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs, 1))


def networks(rng):
    """cellstack networks, some of whose cells are written as Scans."""

    def floats(*shape):
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)

    def cell(inputs, units, **flags):
        spec = CellSpec(inputs, units, **flags)
        return Cell(spec, *(floats(*shape) for shape in spec.shapes.values()))

    pair = Bidirectional(Recurrent((cell(4, 3),)), Recurrent((cell(4, 3),), go_backwards=True))
    yield Network([Conv1D(floats(3, 3, 4), floats(4), padding="causal"), pair, Dense(floats(6, 2), floats(2), "gelu")])
    yield Network(
        [Scale(floats(3), floats(3)), Recurrent((cell(3, 3, layer_norm=True, zoneout=0.1),)), LayerNorm(floats(3))]
    )
    yield Network([Recurrent((cell(3, 4, kind="gru"), cell(4, 4, kind="rnn", clip=0.5)), False), Dense(floats(4, 1))])
    yield Network([Pool1D("max", 2), Recurrent((cell(3, 4, peepholes=True, proj_size=2),), go_backwards=True)])


def models(folder):
    """Models as bytes, by name, with their inputs."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    path = folder / "net.onnx"
    found = {}
    states = {"LSTM": (torch.randn(2, 2, 4), torch.randn(2, 2, 4)), "GRU": (torch.randn(2, 2, 4),)}
    exports = {
        "whole": (Whole("LSTM"), (torch.randn(2, 5, 3),)),
        "whole GRU": (Whole("GRU"), (torch.randn(2, 5, 3),)),
        "words": (Words(), (torch.randint(0, 9, (2, 5)),)),
        "loop": (Loop(), (torch.randn(2, 3, 3),)),
        **{f"stateful {kind}": (Stateful(kind), (torch.randn(5, 2, 3), *given)) for kind, given in states.items()},
    }
    for name, (module, given) in exports.items():
        feeds = export(path, module, given, ("in0",) if name == "loop" else ())[1]
        found[name] = path.read_bytes(), feeds
    for n, net in enumerate(networks(rng)):
        adapter.save(net, str(path))
        found[f"ours {n}"] = path.read_bytes(), {net.inputs[0]: rng.standard_normal((2, 6, 3)).astype(np.float32)}
    for kind in ("LSTM", "GRU", "RNN"):
        for n in range(2):
            node, arrays, feeds, outputs = random_operator(rng, kind, lengths=False)
            found[f"operator {kind} {n}"] = operator_model(node, arrays, feeds, outputs).SerializeToString(), feeds
    for name in list(plans())[::6]:
        made = model_of(plans()[name])
        feeds = {"input": rng.standard_normal((5, 3)).astype(np.float32)}
        for value in made.graph.input[1:]:
            sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            feeds[value.name] = rng.standard_normal(sizes).astype(np.float32)
        found[f"batchless {name}"] = made.SerializeToString(), feeds
    return found


def newer(folder):
    """The same modules from PyTorch's newer exporter."""
    torch.manual_seed(0)
    found = {}
    for name, module in {"whole": Whole("LSTM"), "loop": Loop()}.items():
        path, x = folder / "newer.onnx", torch.randn(2, 4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), (x,), str(path), dynamo=True, input_names=["in0"], verbose=False, external_data=False
            )
        found[f"newer {name}"] = path.read_bytes(), {"in0": x.numpy()}
    return found


def states_of(net, feeds):
    """The network's initial states, from the inputs that hold them according to the metadata; zeros elsewhere."""
    said, batch = net.metadata["onnx"], None
    cells = [{} for _ in net.cells]
    firsts = np.cumsum([0, *(len(node.cells) for node in net.nodes if node.cells)])
    for name, refs in said.get("starts", {}).items():
        for row, ref in zip(_parts(feeds[name], said["state_axes"][name]), refs, strict=False):
            if ref is not None:
                cells[firsts[ref[0]] + ref[1]][ref[2]] = row
                batch = len(row)
    if batch is None:
        return None
    for cell, own in zip(net.cells, cells, strict=True):
        for part, size in cell.spec.state_sizes.items():
            usual = cell.arrays.get(f"initial_{part}", np.zeros(size, np.float32))
            own.setdefault(part, np.tile(usual, (batch, 1)))
    states = [(State if "c" in own else HiddenState)(**own) for own in cells]
    # A cell that starts from a computed state gets none.
    return tuple(None if starts else state for state, starts in zip(states, net.initial_state_sources, strict=True))


def _parts(array, axes):
    """The states `[B, H]` that an array holds."""
    order = sorted(range(len(axes)), key=lambda n: ("SBF".index(axes[n]), n))
    array = array.transpose(order)
    array = array if "B" in axes else array[..., None, :]
    return array.reshape(-1, *array.shape[-2:])


def as_ours(array, axes, shape, as_in_file):
    """An output of the file in the network's order of axes, which is the file's where a network ends in a Permute."""
    assert array.ndim == len(axes), f"{axes} of {array.shape}"
    order = [n for label in "BTNDCF" for n in range(len(axes)) if axes[n] == label] or [0] * 0
    order += [n for n in range(len(axes)) if axes[n] == "1"]
    if not as_in_file:
        array = array.transpose(order)
    assert array.size == np.prod(shape, dtype=int), f"{axes} of {array.shape}, ours {shape}"
    return array.reshape(shape)


def near(got, expected, what):
    assert got.shape == expected.shape, what
    finite = np.isfinite(expected)
    assert (np.isfinite(got) == finite).all() or np.abs(expected[finite]).max(initial=0) > 1e6, what
    both = finite & np.isfinite(got)
    largest = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    assert np.abs(got[both] - expected[both]).max(initial=0.0) <= NEAR * largest, what


def check(path, data, feeds, runtime, what):
    """Read a model and compare it with ONNX Runtime; return "refused", "left" (nothing to compare with) or "agreed"."""
    path.write_bytes(data)
    try:
        net = adapter.load(str(path))
    except FormatError as error:
        assert str(error).startswith(f"{path}: "), what  # noqa: PT017
        return "refused"
    answers = runtime(data, feeds)
    if answers is None:
        return "left"
    said = net.metadata["onnx"]
    x = {}
    for ours, (name, axes) in zip(net.inputs, said["inputs"].items(), strict=True):
        array = feeds[name].transpose([axes.index(label) for label in "BTF" if label in axes])
        x[ours] = array if "B" in axes else array[None]
    try:
        y, after = net.run(x if len(x) > 1 else next(iter(x.values())), states_of(net, feeds))
    except ShapeError as error:  # ONNX Runtime's inputs must fit: otherwise axes were misread
        raise AssertionError(f"{what}: {error}") from None
    except ValueError as error:  # ONNX counts negative ids from the end
        assert "expected ids from" in str(error), what  # noqa: PT017
        return "left"
    outputs = y if isinstance(y, tuple) else (y,)
    ends = net.metadata.get("layout", {}).get("outputs", {})  # that have other axes in the file
    for own, (name, axes), got in zip(net.outputs, said["outputs"].items(), outputs, strict=True):
        near(
            got,
            as_ours(answers[name], axes, got.shape, axes.replace("1", "") in PERMUTED and own not in ends),
            f"{what}: {name} {axes}",
        )
    firsts = np.cumsum([0, *(len(node.cells) for node in net.nodes if node.cells)])
    for name, refs in said["states"].items():
        for row, (node, cell, part) in zip(_parts(answers[name], said["state_axes"][name]), refs, strict=True):
            near(getattr(after[firsts[node] + cell], part), row, f"{what}: {name}")
    return "agreed"


def mutate(folder, found, seconds, seed):
    """Change models for a limited time; check each one unchanged first."""
    runtime, path, rng = Runtime(), folder / "changed.onnx", np.random.default_rng(seed)
    counts = {"refused": 0, "left": 0, "agreed": 0}
    try:
        for name, (data, feeds) in found.items():
            assert check(path, data, feeds, runtime, name) == "agreed", name
        end, names = time.monotonic() + seconds, list(found)
        while time.monotonic() < end:
            name = names[sum(counts.values()) % len(names)]
            data, feeds = found[name]
            made, change = mutated(data, rng)
            counts[check(path, made.SerializeToString(), feeds, runtime, f"{name}, {change}")] += 1
    finally:
        runtime.close()
    return counts


@pytest.mark.slow
def test_models_with_one_change(tmp_path):
    counts = mutate(tmp_path, models(tmp_path), SECONDS, 0)
    assert counts["agreed"] > 20
    assert counts["refused"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_models_with_one_change(tmp_path, seed):
    assert onnx.defs.onnx_opset_version() > 17
    counts = mutate(tmp_path, models(tmp_path) | newer(tmp_path), LONG, seed)
    assert counts["agreed"] > 100

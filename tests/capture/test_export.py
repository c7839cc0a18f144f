"""Exports with an open length: torch.export of accelerated modules, and ONNX files of them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import tolerances
import torch
from tools import need
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.onnx._internal.exporter._registration import ONNXRegistry

import cellstack as cs
from cellstack import layers
from cellstack.capture import export_onnx
from cellstack.formats.onnx.runtime import RuntimeModel

B, T = torch.export.Dim("batch"), torch.export.Dim("time")
SIZES = ((2, 9), (3, 31), (1, 7), (5, 1))  # the first is that of the example


class Tagger(nn.Module):
    """A convolution, and a recurrent layer with or without a given state; returns y, its mean and the state."""

    def __init__(self, kind, states=False, batch_first=True, **flags):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.rnn = kind(6, 5, batch_first=batch_first, **flags)
        width = (flags.get("proj_size") or 5) * (1 + self.rnn.bidirectional)
        self.head, self.states, self.batch_first = nn.Linear(width, 2), states, batch_first

    def forward(self, x, hx=None):
        x = torch.relu(self.conv(x.transpose(1, 2)))
        y, state = self.rnn(x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1), hx)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y), y.mean(1), state

    def inputs(self, batch, steps):
        x = torch.randn(batch, steps, 4)
        if not self.states:
            return (x,)
        count = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        h, c = torch.randn(count, batch, self.rnn.proj_size or 5), torch.randn(count, batch, 5)
        return x, (h, c) if isinstance(self.rnn, nn.LSTM) else h

    @property
    def shapes(self):
        if not self.states:
            return ({0: B, 1: T},)
        return {0: B, 1: T}, ({1: B}, {1: B}) if isinstance(self.rnn, nn.LSTM) else {1: B}


def drawn(module):
    """Give every gate and bias its own values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return module.eval()


def flat(value):
    return [part for one in value for part in flat(one)] if isinstance(value, (tuple, list)) else [value]


MODULES = {
    "lstm": lambda: Tagger(nn.LSTM),
    "deep, both directions": lambda: Tagger(nn.LSTM, bidirectional=True, num_layers=2, dropout=0.5),
    "states": lambda: Tagger(nn.LSTM, states=True, num_layers=2, bidirectional=True),
    "time first": lambda: Tagger(nn.GRU, batch_first=False, num_layers=2),
    "gru with states": lambda: Tagger(nn.GRU, states=True, bidirectional=True),
    "relu": lambda: Tagger(nn.RNN, nonlinearity="relu", bias=False),
    "projected": lambda: Tagger(nn.LSTM, states=True, proj_size=3),
}


def some_slow(names, quick):
    """Return the names as parameters of a test, of which only some run in the fast tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some_slow(MODULES, ("states", "gru with states", "projected")))
def test_an_export_has_one_operator_per_layer_and_open_sizes(name, strict):
    module = cs.accelerate(drawn(MODULES[name]()))
    with torch.no_grad():
        example = module.inputs(*SIZES[0])
        program = torch.export.export(module, example, dynamic_shapes=module.shapes, strict=strict)
        targets = [str(node.target) for node in program.graph.nodes]
        both, count = module.rnn.bidirectional, module.rnn.num_layers
        assert targets.count("cellstack.recurrent.default") == (2 * count if both else 1)
        assert not any("aten.lstm" in target or "aten.gru" in target or "aten.rnn" in target for target in targets)
        for batch, steps in SIZES:
            given = module.inputs(batch, steps)
            for a, b in zip(flat(program.module()(*given)), flat(module(*given)), strict=True):
                torch.testing.assert_close(a, b, atol=tolerances.NETWORK, rtol=0)


def test_an_export_for_training_has_gradients():
    module = cs.accelerate(drawn(MODULES["gru with states"]())).train()
    program = torch.export.export(module, module.inputs(*SIZES[0]), dynamic_shapes=module.shapes)
    given = module.inputs(3, 11)
    exported = program.module()
    for one in (exported, module):
        one(*given)[0].square().sum().backward()
    for (name, a), b in zip(module.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_a_cell_keeps_its_operator_of_pytorch():
    cell = cs.accelerate(nn.LSTMCell(3, 4))
    program = torch.export.export(cell, (torch.randn(2, 3),), dynamic_shapes=({0: B},))
    assert "aten.lstm_cell" in str(program.graph)
    x = torch.randn(5, 3)
    torch.testing.assert_close(program.module()(x), cell(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_inductor_compiles_an_export(tmp_path):
    need("g++")
    module = cs.accelerate(drawn(MODULES["states"]()))
    with torch.no_grad():
        program = torch.export.export(module, module.inputs(*SIZES[0]), dynamic_shapes=module.shapes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for size in SIZES[:3]:
            given = module.inputs(*size)
            for a, b in zip(flat(run(*given)), flat(module(*given)), strict=True):
                torch.testing.assert_close(a, b, atol=tolerances.NETWORK, rtol=0)


# ── ONNX ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def compared(module, inputs, path):
    """Compare a file with a module at several sizes, in ONNX Runtime and, if it can be read, in cellstack."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch, steps in SIZES:
        given = inputs(batch, steps)
        fed = {one.name: value.numpy() for one, value in zip(session.get_inputs(), flat(given), strict=True)}
        with torch.no_grad():
            expected = flat(module(*given))
        for a, b in zip(session.run(None, fed), expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=tolerances.NETWORK, rtol=0)


def operators(path):
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return [node.op_type for node in model.graph.node]


def test_a_tensor_that_is_two_inputs_stays_two(tmp_path):
    x, zeros, (h, c) = torch.randn(2, 9, 4), torch.zeros(1, 2, 5), torch.randn(2, 1, 2, 5)
    module, path = nn.LSTM(4, 5, batch_first=True), tmp_path / "model.onnx"
    export_onnx(module, (x, (zeros, zeros)), path)
    y = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy(), "hx_0": h.numpy(), "hx_1": c.numpy()})[0]
    np.testing.assert_allclose(y, module(x, (h, c))[0].detach().numpy(), atol=tolerances.NETWORK)


def transposed_after_a_view(y):
    y = y.clone()
    view = y.view(len(y), -1, 2, 3)
    y.transpose_(0, 1)
    return view.view(len(view), -1, 6)


def cast_and_changed(y):
    """A cast to the tensor's own type is the tensor itself, one to another type is a copy."""
    (same := y.to(torch.float32)).mul_(2)
    (copied := y.to(torch.float64)).add_(1)
    return same + y + copied.float() + (3 - y) + torch.rsub((y > 0).long(), 1.5, alpha=2)


def written_entry(y):
    first, _, last = y.clone().split(2, dim=-1)
    first.mul_(3)
    return torch.cat([last, first], -1)


VIEWS = {
    "transposed": transposed_after_a_view,
    "written": written_entry,
    "entries": lambda y: torch.stack([n * one for n, one in enumerate(y.unbind(dim=-1))], -1),
    "cast": cast_and_changed,
    "number": lambda y: y / (1 + (y > 0).sum().item()),
    "count": lambda y: y / (1 + y[y > 0].numel()),
    "short last": lambda y: torch.cat([part.cumsum(-1) for part in y.split(4, dim=2)[::-1]], -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_entries_of_lists(name, tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 6, batch_first=True)

        def forward(self, x):
            return VIEWS[name](self.rnn(x)[0])

    module, path = drawn(Views()), tmp_path / "model.onnx"
    with torch.no_grad():
        export_onnx(module, (torch.randn(2, 5, 4),), path, dynamic_shapes=({0: B, 1: T},))
        compared(module, lambda batch, steps: (torch.randn(batch, steps, 4),), path)


@pytest.mark.parametrize("name", some_slow(sorted(MODULES.keys() - {"projected"}), ("states", "time first")))
def test_a_file_takes_any_size(name, tmp_path):
    module, path = drawn(MODULES[name]()), tmp_path / "net.onnx"
    export_onnx(module, module.inputs(*SIZES[0]), path, dynamic_shapes=module.shapes)
    assert type(module.rnn) in (nn.LSTM, nn.GRU, nn.RNN)
    found = operators(path)
    assert found.count(type(module.rnn).__name__) == module.rnn.num_layers * (1 + module.rnn.bidirectional)
    graph = onnx.load(path).graph
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    assert gathered.isdisjoint(tensor.name for tensor in graph.initializer)  # the weights are stored in ONNX's order
    compared(module, module.inputs, path)


EVERY = {"return_sequences": True, "return_state": True, "input_size": 4}
OURS = {
    "lstm": lambda: layers.LSTM(5, **EVERY),
    "peepholes": lambda: layers.LSTM(5, peepholes=True, gate_activations={"o": "hard_sigmoid"}, **EVERY),
    "backwards": lambda: layers.LSTM(5, go_backwards=True, **EVERY),
    "gru": lambda: layers.GRU(5, **EVERY),
    "gru, reset before": lambda: layers.GRU(5, reset_after=False, **EVERY),
    "both": lambda: layers.Bidirectional(layers.LSTM(5, return_sequences=True), input_size=4),
    "last": lambda: layers.SimpleRNN(5, input_size=4),
}


class WithLengths(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        return self.layer(x, lengths=lengths)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", some_slow(sorted(OURS.keys() - {"peepholes"}), ("backwards", "gru, reset before")))
def test_our_layers(name, lengths, tmp_path):
    layer, path = drawn(OURS[name]()), tmp_path / "net.onnx"
    module = WithLengths(layer) if lengths else layer
    shapes = ({0: B, 1: T}, {0: B}) if lengths else ({0: B, 1: T},)

    def inputs(batch, steps):
        x = torch.randn(batch, steps, 4)
        return (x, torch.randint(1, steps + 1, (batch,))) if lengths else (x,)

    export_onnx(module, inputs(*SIZES[0]), path, dynamic_shapes=shapes)
    compared(module, inputs, path)


def test_peepholes_and_names(tmp_path):
    layer, path = layers.LSTM(5, peepholes=True, **EVERY), tmp_path / "net.onnx"
    shapes, outputs = ({0: B, 1: T},), ["y", "h", "c"]
    export_onnx(
        drawn(layer), (torch.randn(2, 9, 4),), path, dynamic_shapes=shapes, input_names=["x"], output_names=outputs
    )
    model = onnx.load(path)
    assert [one.name for one in (*model.graph.input, *model.graph.output)] == ["x", "y", "h", "c"]
    compared(layer, lambda batch, steps: (torch.randn(batch, steps, 4),), path)


class Repeated(nn.Module):
    """Returns its input, and an output twice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 5, batch_first=True)

    def forward(self, x):
        y = self.rnn(x)[0]
        return x, y, y


@pytest.mark.parametrize("names", [{}, {"input_names": ["cell_0.W"], "output_names": ["a", "b", "c"]}])
def test_inputs_and_outputs_have_names_of_their_own(names, tmp_path):
    module, path = drawn(Repeated()), tmp_path / "net.onnx"
    export_onnx(module, (torch.randn(2, 9, 4),), path, dynamic_shapes=({0: B, 1: T},), **names)
    graph = onnx.load(path).graph
    found = [one.name for one in (*graph.input, *graph.output)]
    assert len(set(found)) == 4
    assert found == ["cell_0.W", "a", "b", "c"] if names else found[0] == "x"
    compared(module, lambda batch, steps: (torch.randn(batch, steps, 4),), path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["x", "z"]}, r"input_names of at most 1 inputs, got \['x', 'z'\]"),
        ({"input_names": ["x"], "output_names": ["x"]}, "names of inputs and outputs must differ, found x, x, "),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(nn.GRU(4, 5), (torch.randn(9, 2, 4),), tmp_path / "net.onnx", **names)


def test_a_file_is_read_back_as_a_network(tmp_path):
    module, path = drawn(nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)), tmp_path / "net.onnx"
    export_onnx(module, (torch.randn(2, 9, 4),), path, dynamic_shapes=({0: B, 1: T},))
    x = torch.randn(3, 20, 4)
    np.testing.assert_allclose(cs.load(path)(x.numpy()), module(x)[0].detach(), atol=tolerances.NETWORK, rtol=0)


class Given(nn.Module):
    def __init__(self, layer, **given):
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x):
        return self.layer(x, **self.given)


LACKED = {
    "projection": lambda: nn.LSTM(4, 5, 2, proj_size=3, batch_first=True),
    "kind": lambda: layers.MinGRU(5, **EVERY),
    "flag": lambda: layers.LSTM(5, layer_norm=True, **EVERY),
    "heads": lambda: layers.GRU(6, heads=2, go_backwards=True, **EVERY),
    "states": lambda: layers.SLSTM(6, **EVERY),
}
OPERATORS = {
    "coupled": lambda: layers.LSTM(5, coupled=True, **EVERY),
    "learned": lambda: layers.GRU(5, learn_initial_state=True, **EVERY),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", [*LACKED, *OPERATORS])
def test_other_cells_are_scans_which_run_on_the_kernel(name, tmp_path):
    module, path = drawn((LACKED | OPERATORS)[name]()), str(tmp_path / "net.onnx")

    def inputs(batch, steps):
        return (torch.randn(batch, steps, 4),)

    export_onnx(module, inputs(*SIZES[0]), path, dynamic_shapes=({0: B, 1: T},))
    assert ("Scan" in operators(path)) == (name in LACKED)
    compared(module, inputs, path)
    model = RuntimeModel(path)
    assert len(model.kernels) == (2 if name == "projection" else 1), model.plan()
    for size in SIZES:
        x = inputs(*size)
        with torch.no_grad():
            expected = flat(module(*x))
        for a, b in zip(model(x[0].numpy()), expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=tolerances.NETWORK, rtol=0)


REFUSED = {
    "lengths": (lambda: Given(layers.MinGRU(5, **EVERY), lengths=torch.tensor([3, 9])), "a Scan takes no lengths"),
    "mask": (lambda: Given(layers.LSTM(5, **EVERY), mask=torch.ones(2, 9, dtype=torch.bool)), "a mask, only lengths"),
    "reset": (lambda: Given(layers.LSTM(5, **EVERY), reset=torch.ones(2, 9, dtype=torch.bool)), "don't take resets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_lacks_is_refused(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        export_onnx(make(), (torch.randn(2, 9, 4),), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def returned(module, x):
    return *module.rnn(x), 3


def test_arguments_that_cannot_be_recorded_are_refused(tmp_path):
    x, path = torch.randn(9, 2, 4), tmp_path / "net.onnx"
    for module, args in ((nn.GRU(4, 5), x), (torch.relu, (x,)), (nn.GRU, (x,))):
        with pytest.raises(TypeError, match="expected a module of PyTorch and a tuple of its inputs, such as"):
            export_onnx(module, args, path)
    with pytest.raises(
        ValueError, match=r"can't record torch\.jit\._script\.RecursiveScriptModule: pass the module from"
    ):
        export_onnx(torch.jit.script(nn.Sequential(nn.GRU(4, 5))), (x,), path)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"a recurrent layer of {dtype}: export module.float\(\)"):
            export_onnx(nn.GRU(4, 5).to(dtype), (x.to(dtype),), path)
    with pytest.raises(ValueError, match="no float64 cells that take lengths"):
        export_onnx(
            Given(layers.GRU(5, **EVERY), lengths=torch.tensor([3, 9])).double(), (x.transpose(0, 1).double(),), path
        )
    with pytest.raises(ValueError, match="the module returns 3: a file returns tensors only"):
        export_onnx(Model(returned, nn.GRU(4, 5)), (x,), path)


def svd(module, x):
    return torch.linalg.svd(module.rnn(x)[0])[1]


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"export_onnx: No ONNX function found for <OpOverload\(op='aten\._linalg_svd'"
    ):
        export_onnx(Model(svd, nn.GRU(4, 5)), (torch.randn(9, 2, 4),), tmp_path / "net.onnx")


class Model(nn.Module):
    def __init__(self, run, rnn):
        super().__init__()
        self.rnn, self.run = rnn, run
        self.register_buffer("calls", torch.zeros(()))
        self.last = torch.zeros(())

    def forward(self, *given):
        return self.run(self, *given)


def counted(module, x):
    module.calls += 1
    return module.rnn(x)[0] * module.calls


def kept(module, x):
    module.last = module.rnn(x)[0]
    return module.last


@pytest.mark.parametrize(
    ("run", "message"), [(counted, "changes the buffers calls"), (kept, r"self\.last was assigned")]
)
def test_state_that_a_file_does_not_keep_is_warned_of(run, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        export_onnx(Model(run, nn.GRU(4, 5)), (torch.randn(9, 2, 4),), tmp_path / "net.onnx")


def turned(module, x):
    z = torch.view_as_complex(x.unflatten(-1, (2, 2)))
    return module.rnn(torch.view_as_real(1 - (z * 2j + module.turn)).flatten(2))[0]


@pytest.mark.long
def test_complex_numbers_and_buffers(tmp_path):
    module = Model(turned, drawn(nn.GRU(4, 5, batch_first=True)))
    module.register_buffer("turn", torch.randn(2, dtype=torch.complex64))

    def inputs(batch, steps):
        return (torch.randn(batch, steps, 4),)

    export_onnx(module, inputs(*SIZES[0]), tmp_path / "net.onnx", dynamic_shapes=(({0: B, 1: T},),))
    compared(module, inputs, tmp_path / "net.onnx")


def double(module):
    return module.double()


PREPARED = {
    "weight_norm": lambda module: nn.utils.parametrizations.weight_norm(module, "weight_hh_l0"),
    "spectral_norm": lambda module: nn.utils.parametrizations.spectral_norm(module, "weight_ih_l0"),
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "float64": double,
}


@pytest.mark.parametrize("name", PREPARED)
def test_computed_weights_compiled_modules_and_float64(name, tmp_path):
    module, path = drawn(nn.LSTM(4, 5, batch_first=True)), tmp_path / "net.onnx"
    ready, dtype = PREPARED[name](module), torch.float64 if name == "float64" else torch.float32

    def inputs(batch, steps):
        return (torch.randn(batch, steps, 4, dtype=dtype),)

    export_onnx(ready, inputs(*SIZES[0]), path, dynamic_shapes=({0: B, 1: T},))
    assert ("LSTM" in operators(path)) == (name != "float64")  # which ONNX Runtime doesn't run
    compared(module.eval(), inputs, path)


def of_lengths(module, x, lengths, h):
    return module.rnn(x, lengths=lengths, initial_state=h)


@pytest.mark.parametrize("back", [False, True])
def test_rows_without_steps_keep_their_states(back, tmp_path):
    module = drawn(Model(of_lengths, layers.GRU(5, go_backwards=back, **EVERY)))

    def inputs(batch, steps):
        return torch.randn(batch, steps, 4), torch.randint(0, 2, (batch,)) * steps, torch.randn(batch, 5)

    export_onnx(module, inputs(*SIZES[0]), tmp_path / "net.onnx", dynamic_shapes=(({0: B, 1: T}, {0: B}, {0: B}),))
    compared(module, inputs, tmp_path / "net.onnx")


class Own(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        pass


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRU(4, 4), Own(4, 4)

    def forward(self, x):
        return self.second(self.first(x)[0])


@pytest.mark.long
def test_a_class_of_the_users_own(tmp_path):
    module, path = drawn(Mixed()), tmp_path / "net.onnx"
    export_onnx(module, (torch.randn(2, 9, 4),), path, dynamic_shapes=({0: B, 1: T},))
    compared(module, lambda batch, steps: (torch.randn(batch, steps, 4),), path)
    with pytest.raises(ValueError, match=r"aten\.lstm\.input, which fixes the number of steps"):
        export_onnx(module, (torch.randn(2, 9, 4),), path, strict=True)


class Packed(nn.Module):
    """An LSTM over packed rows; lengths are an argument, or are computed from a mask or from ids."""

    def __init__(self, lengths, total=False, ordered=False):
        super().__init__()
        self.words, self.rnn = nn.Embedding(20, 6), nn.LSTM(6, 5, bidirectional=True, batch_first=True)
        self.head, self.lengths, self.total, self.ordered = nn.Linear(10, 3), lengths, total, ordered

    def forward(self, ids, given=None):
        lengths = {"argument": lambda: given, "mask": lambda: given.sum(1), "ids": lambda: (ids != 0).sum(1)}
        x = pack_padded_sequence(self.words(ids), lengths[self.lengths]().cpu(), True, self.ordered)
        x = PackedSequence(torch.relu(x.data), *x[1:])
        y, (h, _) = self.rnn(x)
        y, count = pad_packed_sequence(y, True, -1.0, ids.shape[1] if self.total else None)
        return self.head(y), torch.cat([h[-2], h[-1]], -1), count

    def inputs(self, batch, steps):
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[-1] = steps if self.total else max(steps - 1, 1)
        lengths = lengths.sort(descending=True).values if self.ordered else lengths
        mask = torch.arange(steps) < lengths[:, None]
        ids = torch.randint(1, 20, (batch, steps)) * mask
        return {"argument": (ids, lengths), "mask": (ids, mask), "ids": (ids,)}[self.lengths]


@pytest.mark.long
@pytest.mark.parametrize(
    ("lengths", "total", "ordered"), [("argument", True, True), ("mask", False, False), ("ids", True, False)]
)
def test_packed_rows(lengths, total, ordered, tmp_path):
    module, path = drawn(Packed(lengths, total, ordered)), tmp_path / "net.onnx"
    shapes = ({0: B, 1: T}, *{"argument": [{0: B}], "mask": [{0: B, 1: T}], "ids": []}[lengths])
    export_onnx(module, module.inputs(*SIZES[0]), path, dynamic_shapes=shapes)
    assert operators(path).count("LSTM") == 2
    compared(module, module.inputs, path)


def mean(module, x, lengths):
    return module.rnn(pack_padded_sequence(x, lengths, True))[0].data.mean(0)


def unpacked_outside(module, x, lengths):
    return module.rnn(pack_padded_sequence(x, lengths, True))[0]


def given_packed(module, x):
    return pad_packed_sequence(module.rnn(x)[0], True)[0]


def test_what_padded_rows_would_change_is_refused(tmp_path):
    x, lengths = torch.randn(2, 9, 4), torch.tensor([9, 9])
    for run in (mean, unpacked_outside):
        with pytest.raises(ValueError, match="returns a packed sequence, or computes across its steps"):
            export_onnx(Model(run, nn.GRU(4, 5, batch_first=True)), (x, lengths), tmp_path / "net.onnx")
    packed, model = pack_padded_sequence(x, lengths, True), Model(given_packed, nn.GRU(4, 5, batch_first=True))
    for args, kwargs in (((packed,), {}), ((), {"x": packed})):
        with pytest.raises(ValueError, match="a packed sequence can't be an input"):
            export_onnx(model, args, tmp_path / "net.onnx", kwargs=kwargs)


@pytest.mark.long
def test_the_table_of_operators_is_built_once_and_stays_as_pytorch_has_it(tmp_path, monkeypatch):
    own, tables, sizes = ONNXRegistry.from_torchlib, [], []

    def build(opset_version):
        tables.append(own(opset_version))
        sizes.append({name: len(functions) for name, functions in tables[-1].functions.items()})
        return tables[-1]

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(build))
    module = drawn(Tagger(nn.LSTM))
    for name in ("first", "second"):
        export_onnx(module, module.inputs(2, 9), tmp_path / name, dynamic_shapes=module.shapes)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sizes == [{name: len(functions) for name, functions in table.functions.items()} for table in tables]
    assert len(tables) == 1

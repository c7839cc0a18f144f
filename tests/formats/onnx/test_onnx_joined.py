"""Hand-written cells that multiply `Concat(x, h)` by a matrix, as a loop over time, as a step and as an ONNX file."""

import warnings

import numpy as np
import pytest
import torch
from onnx_graphs import compare, export
from torch import nn

import cellstack as cs
from cellstack.capture.nested import array_of
from cellstack.network import Network

INPUTS, UNITS = 5, 7


class Lstm(nn.Module):
    """The gates in TensorFlow's order, with its forget bias."""

    kind, states = "lstm", 2

    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(INPUTS + UNITS, 4 * UNITS)

    def forward(self, x, h, c):
        i, g, f, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class FourMatrices(nn.Module):
    """An LSTM with a matrix for each gate; h comes first."""

    kind, states = "lstm", 2

    def __init__(self):
        super().__init__()
        self.f, self.i, self.o, self.g = (nn.Linear(UNITS + INPUTS, UNITS) for _ in range(4))

    def forward(self, x, h, c):
        joined = torch.cat((h, x), 1)
        c = torch.sigmoid(self.f(joined)) * c + torch.sigmoid(self.i(joined)) * torch.tanh(self.g(joined))
        return torch.sigmoid(self.o(joined)) * torch.tanh(c), c


class Gru(nn.Module):
    kind, states = "gru", 1

    def __init__(self):
        super().__init__()
        self.z, self.r, self.n = (nn.Linear(INPUTS + UNITS, UNITS) for _ in range(3))

    def forward(self, x, h):
        joined = torch.cat([x, h], 1)
        z, r = torch.sigmoid(self.z(joined)), torch.sigmoid(self.r(joined))
        return ((1 - z) * torch.tanh(self.n(torch.cat([x, r * h], 1))) + z * h,)


class CutGru(Gru):
    """Both gates are one product, which is cut after the activation."""

    def __init__(self):
        super().__init__()
        self.gates = nn.Linear(INPUTS + UNITS, 2 * UNITS)

    def forward(self, x, h):
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        return (z * h + (1 - z) * torch.tanh(self.n(torch.cat([x, r * h], 1))),)


class CutLstm(Lstm):
    """Three gates have one activation."""

    def forward(self, x, h, c):
        z = self.gates(torch.cat([x, h], -1))
        i, f, o = torch.sigmoid(z[:, : 3 * UNITS]).chunk(3, -1)
        c = f * c + i * torch.tanh(z[:, 3 * UNITS :])
        return o * torch.tanh(c), c


class Rnn(nn.Module):
    """h comes first, and there is no bias."""

    kind, states = "rnn", 1

    def __init__(self):
        super().__init__()
        self.product = nn.Linear(INPUTS + UNITS, UNITS, bias=False)

    def forward(self, x, h):
        return (torch.tanh(self.product(torch.cat((h, x), 1))),)


class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(), nn.Linear(UNITS + INPUTS, 2)

    def forward(self, x):
        state, outputs = [x.new_zeros(len(x), UNITS)] * self.cell.states, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], *state)
            outputs.append(state[0])
        return self.head(torch.cat([torch.stack(outputs, 1), x], -1))


class JoinedInput(Lstm):
    """x and h have a matrix each, and x itself is joined: its product stays one."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(INPUTS + 2, 4 * UNITS), nn.Linear(UNITS, 4 * UNITS)

    def forward(self, x, h, c):
        i, g, f, o = (self.x(torch.cat([x, x[:, :2]], -1)) + self.h(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


CELLS = [Lstm, FourMatrices, Gru, CutGru, CutLstm, Rnn]


def shown(net):
    return [(type(node).__name__, *(cell.spec.kind for cell in node.cells)) for node in net.nodes]


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS)
def test_a_loop_over_joined_values_is_a_network(cell):
    module = Loop(cell).eval()
    net = cs.compile(module, (torch.randn(2, 6, INPUTS),))
    assert isinstance(net, Network)
    assert shown(net) == [("Recurrent", cell.kind), ("Merge",), ("Dense",)]  # the head's product stays one
    for rows, steps in ((1, 9), (3, 2), (2, 1)):
        x = torch.randn(rows, steps, INPUTS)
        np.testing.assert_allclose(net(x.numpy()), array_of(module(x)), rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS)
def test_accelerate_finds_a_cell_of_joined_values(cell):
    module = Loop(cell).eval()
    x = torch.randn(2, 6, INPUTS)
    expected = module(x)
    fast = cs.accelerate(module, cells=True, example=(x,))
    assert type(fast.cell) is not cell or "forward" in vars(fast.cell)
    np.testing.assert_allclose(array_of(fast(x)), array_of(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.states == 2])
def test_compile_finds_a_step(cell):
    (found,) = cs.compile(cell().eval(), (torch.randn(2, INPUTS), *[torch.randn(2, UNITS)] * 2)).cells
    assert found.spec.kind == cell.kind


@pytest.mark.parametrize("cell", CELLS)
def test_a_file_of_a_loop(tmp_path, cell):
    path, inputs = export(tmp_path / "loop.onnx", Loop(cell), (torch.randn(2, 4, INPUTS),))
    assert ("Recurrent", cell.kind) in shown(compare(path, inputs))
    ((part,),) = (part.cells for part in cs.extract(path).values())
    assert (part.spec.kind, part.spec.input_size, part.spec.units) == (cell.kind, INPUTS, UNITS)


@pytest.mark.long
def test_a_joined_input_with_a_matrix_of_its_own():
    module = Loop(JoinedInput).eval()
    net = cs.compile(module, (torch.randn(2, 6, INPUTS),))
    assert [cell.spec.kind for cell in net.cells] == ["lstm"]
    x = torch.randn(3, 9, INPUTS)
    np.testing.assert_allclose(net(x.numpy()), array_of(module(x)), rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("cell", [Lstm, FourMatrices, CutLstm])
def test_a_file_of_one_step_is_a_stream(tmp_path, cell, dynamo):
    module, state = cell().eval(), [torch.zeros(3, UNITS) for _ in range(2)]
    path = tmp_path / "step.onnx"
    given = {"dynamic_shapes": [{0: torch.export.Dim("batch")}] * 3} if dynamo else {}
    names = ["x", "h", "c"]
    given = given or {"dynamic_axes": {name: {0: "batch"} for name in names}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(3, INPUTS), *state), path, dynamo=dynamo, input_names=names, **given)
    net = cs.load(path)
    assert shown(net) == [("Recurrent", "lstm")]
    ((part,),) = (part.cells for part in cs.extract(path).values())
    assert (part.spec.input_size, part.spec.units) == (INPUTS, UNITS)
    stream = net.stream(batch=3)
    for _ in range(4):
        x = torch.randn(3, INPUTS)
        state = module(x, *state)
        np.testing.assert_allclose(stream.step(x.numpy()), array_of(state[0]), rtol=0, atol=1e-6)

"""ONNX's own 18 node cases of LSTM, GRU and RNN as networks: unchanged, and with all weights different."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import _NodeTestCases as CASES
from onnx.backend.test.case.node import gru, lstm, rnn
from onnx.reference import ReferenceEvaluator

from cellstack.cells.base import HiddenState, State
from cellstack.formats import onnx as adapter
from cellstack.nodes import Bidirectional

MODULES = (lstm, gru, rnn)  # importing them registers their cases
OPERATORS = ("LSTM", "GRU", "RNN")
FOUND = {case.name: case for case in CASES if case.model.graph.node[0].op_type in OPERATORS}
WEIGHTS = ("W", "R", "B", "P")
DATA = ("X", "sequence_lens", "initial_h", "initial_c")
NAMES = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def given(case, seed=None):
    """The operator's inputs in a case, by name; with a seed, all numbers differ."""
    node = case.model.graph.node[0]
    names = [name for name, used in zip(NAMES, node.input, strict=False) if used]
    arrays = dict(zip(names, case.data_sets[0][0], strict=True))
    if seed is not None:
        rng = np.random.default_rng(seed)
        for name, array in arrays.items():
            if name != "sequence_lens":
                arrays[name] = (rng.normal(size=array.shape) * 0.5).astype(np.float32)
    return arrays


def with_weights(case, arrays):
    """The case's model, whose weights are constants of the file."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    node, graph = model.graph.node[0], model.graph
    for place, name in enumerate(NAMES[: len(node.input)]):
        if name in WEIGHTS and node.input[place]:
            graph.initializer.append(numpy_helper.from_array(arrays[name], node.input[place]))
            left = [value for value in graph.input if value.name != node.input[place]]
            del graph.input[:]
            graph.input.extend(left)
    return model


def ours(net, arrays, batch_first):
    """Y, Y_h and Y_c of a network from one operator, in the operator's own axes."""
    x = arrays["X"] if batch_first else arrays["X"].swapaxes(0, 1)
    state = None
    if "initial_h" in arrays:
        parts = [arrays[name] for name in ("initial_h", "initial_c") if name in arrays]
        parts = [part.swapaxes(0, 1) if batch_first else part for part in parts]
        kind = State if len(net.cells) and net.cells[0].spec.kind == "lstm" else HiddenState
        state = tuple(kind(*(part[way] for part in parts)) for way in range(len(net.cells)))
    y, after = net.run(x, state, lengths=arrays.get("sequence_lens"))
    ways = 2 if isinstance(net.nodes[0], Bidirectional) else 1
    y = y.reshape(*y.shape[:2], ways, -1)  # [B, T, D, H]
    ends = [np.stack(part) for part in zip(*after, strict=True)]  # [D, B, H]
    if batch_first:
        return y, *(end.swapaxes(0, 1) for end in ends)
    return y.transpose(1, 2, 0, 3), *ends


def test_all_are_here():
    assert len(MODULES) == 3
    assert len(FOUND) in (12, 18)  # onnx 1.20 lacks six


@pytest.mark.parametrize("seed", [None, 0, 1], ids=["as it is", "random", "random again"])
@pytest.mark.parametrize("name", FOUND)
def test_a_case_gives_what_onnx_says(tmp_path, name, seed):
    case = FOUND[name]
    arrays = given(case, seed)
    path = tmp_path / "case.onnx"
    model = with_weights(case, arrays)
    onnx.save(model, path)
    node = model.graph.node[0]
    if seed is None:
        wanted = dict(zip([name for name in node.output if name], case.data_sets[0][1], strict=True))
    else:
        feeds = {value.name: arrays[NAMES[list(node.input).index(value.name)]] for value in model.graph.input}
        outputs = [name for name in node.output if name]
        wanted = dict(zip(outputs, ReferenceEvaluator(model).run(outputs, feeds), strict=True))
    (net,) = adapter.extract(str(path)).values()
    layout = next((entry.i for entry in node.attribute if entry.name == "layout"), 0)
    found = ours(net, arrays, bool(layout))
    assert wanted
    for place, output in enumerate(node.output):
        if output:
            np.testing.assert_allclose(found[place], wanted[output], rtol=1e-5, atol=1e-6)
    if seed is not None:  # equal weights can't distinguish gates
        assert len(np.unique(arrays["W"])) == arrays["W"].size

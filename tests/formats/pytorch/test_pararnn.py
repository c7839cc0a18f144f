"""ParaLSTM and ParaGRU, as Apple's package and pararnn-torch store them, compared with their equations."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import cellstack as cs
from cellstack.cells.errors import FormatError

HIDDEN, INPUTS = 6, 4


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm(z, a_f, a_g, a_o, c_f, c_o):
    """Return h of every step, from `z`, the products with x of f g o, `[T, 3, H]` (eq. 3.1b)."""
    h, c, out = np.zeros(HIDDEN), np.zeros(HIDDEN), []
    for f, g, o in z:
        f = sigmoid(f + a_f * h + c_f * c)
        c = f * c + (1 - f) * np.tanh(g + a_g * h)
        h = sigmoid(o + a_o * h + c_o * c) * np.tanh(c)
        out.append(h)
    return np.array(out)


def gru(z, a_z, a_r, a_g):
    """Return h of every step, from `z`, the products with x of z r g, `[T, 3, H]` (eq. 3.1a); `a`: vectors or heads."""

    def times(a, h):
        return a * h if a.ndim == 1 else np.einsum("nd,nde->ne", h.reshape(len(a), -1), a).reshape(-1)

    h, out = np.zeros(HIDDEN), []
    for u, r, g in z:
        u, r = sigmoid(u + times(a_z, h)), sigmoid(r + times(a_r, h))
        h = u * np.tanh(g + times(a_g, h * r)) + (1 - u) * h
        out.append(h)
    return np.array(out)


def draws(shape, largest=0.5):
    return np.random.default_rng(sum(shape)).uniform(-largest, largest, shape)


def state(prefix, names, inputs=INPUTS):
    """Return the weights of a cell of pararnn-torch; names in capitals are of two heads."""
    values = {}
    for number, name in enumerate(names):
        shape = (2, HIDDEN // 2, HIDDEN // 2) if name[0] == "A" else (HIDDEN,)
        values[prefix + name] = np.random.default_rng(number).uniform(-0.5, 0.5, shape)
    return values | {
        f"{prefix}W_x.weight": draws((3 * HIDDEN, inputs), 1),
        f"{prefix}W_x.bias": draws((3 * HIDDEN,), 1),
    }


def saved(tmp_path, values):
    path = tmp_path / "weights.pt"
    torch.save({name: torch.from_numpy(value) for name, value in values.items()}, path)
    return path


def products(values, x, prefix=""):
    return (x @ values[f"{prefix}W_x.weight"].T + values[f"{prefix}W_x.bias"]).reshape(len(x), 3, HIDDEN)


LSTM_NAMES, GRU_NAMES = ("a_f", "a_z", "a_o", "c_f", "c_o"), ("a_z", "a_r", "a_n")


@pytest.mark.parametrize("names", [LSTM_NAMES, GRU_NAMES, ("A_z", "A_r", "A_n")], ids=["lstm", "gru", "gru of heads"])
def test_a_stack_of_pararnn_torch(tmp_path, names):
    values = state("layers.0.", names) | state("layers.1.", names, HIDDEN)
    net = cs.load(saved(tmp_path, values))
    assert [cell.spec.heads for cell in net.cells] == [2 if names[0] == "A_z" else HIDDEN] * 2
    x = draws((7, INPUTS), 2)
    y = x
    for prefix in ("layers.0.", "layers.1."):
        run = lstm if names is LSTM_NAMES else gru
        y = run(products(values, y, prefix), *(values[prefix + name] for name in names))
    np.testing.assert_allclose(net(x[None])[0], y, atol=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_cell_of_apples_package(tmp_path, kind, blocks):
    values = {"cell.A": draws((3, HIDDEN), 2), "cell.b": draws((3, HIDDEN), 1)}
    values["cell.B"] = draws((blocks, INPUTS // blocks, 3, HIDDEN // blocks), 1)
    if kind == "lstm":
        values["cell.C"] = draws((2, HIDDEN), 2)
    net = cs.load(saved(tmp_path, values))
    assert net.metadata["source"]["module"] == "cell"
    x = draws((7, INPUTS), 2)
    z = np.einsum("thi,hivj->tvhj", x.reshape(7, blocks, -1), values["cell.B"]).reshape(7, 3, HIDDEN) + values["cell.b"]
    a = values["cell.A"]
    y = lstm(z[:, [0, 2, 1]], *a[[0, 2, 1]], *values["cell.C"]) if kind == "lstm" else gru(z, *a)
    np.testing.assert_allclose(net(x[None])[0], y, atol=1e-12)


def test_a_file_of_safetensors(tmp_path):
    values = state("model.rnn.layers.0.", LSTM_NAMES)
    save_file(values, tmp_path / "weights.safetensors")
    x = draws((7, INPUTS), 2)
    y = lstm(products(values, x, "model.rnn.layers.0."), *(values[f"model.rnn.layers.0.{name}"] for name in LSTM_NAMES))
    np.testing.assert_allclose(cs.load(tmp_path / "weights.safetensors")(x[None])[0], y, atol=1e-12)


def test_weights_that_the_module_would_limit_are_refused(tmp_path):
    values = state("", GRU_NAMES)
    values["a_r"][2] = -0.75
    with pytest.raises(FormatError, match=r"'a_r': expected values up to 0.5.* found 0.75;.* max_recurrent_norm"):
        cs.load(saved(tmp_path, values))


def test_shapes_that_do_not_match_are_refused(tmp_path):
    values = {"A": draws((3, HIDDEN)), "b": draws((3, HIDDEN - 1)), "B": draws((1, INPUTS, 3, HIDDEN))}
    with pytest.raises(FormatError, match=r"expected A and b \[3, H\].* found .*'b': \[3, 5\]"):
        cs.load(saved(tmp_path, values))
    values = state("", GRU_NAMES)
    values["a_n"] = values["a_n"][:-1]
    with pytest.raises(FormatError, match="the module"):
        cs.load(saved(tmp_path, values))


def test_cells_that_are_not_numbered_consecutively_are_no_stack(tmp_path):
    """Between them may be a module without weights, such as an activation."""
    path = saved(tmp_path, state("layers.0.", LSTM_NAMES) | state("layers.2.", LSTM_NAMES, HIDDEN))
    with pytest.raises(FormatError, match=r"expected only one recurrent module.*found 2 recurrent"):
        cs.load(path)
    assert list(cs.extract(path)) == ["layers.0", "layers.2"]


def test_other_modules_beside_the_cells_are_named_and_the_cells_extracted(tmp_path):
    values = state("rnn.layers.0.", LSTM_NAMES) | {"head.weight": draws((2, HIDDEN)), "head.bias": draws((2,))}
    path = saved(tmp_path, values)
    with pytest.raises(FormatError, match=r"expected only one recurrent module.*head"):
        cs.load(path)
    assert list(cs.extract(path)) == ["rnn", "head"]

"""Cells with heads in files: native files keep the heads, the other formats get one block-diagonal matrix."""

import numpy as np
import pytest
import tolerances
import torch

import cellstack as cs
from cellstack import layers
from cellstack.cells.layout import block_diagonal

KINDS = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN, "ligru": layers.LiGRU}
NEAR = tolerances.KERNEL["float32"]


def make(kind, **flags):
    """Return a trained-like layer of 12 units in 3 heads, its network, an input and the outputs."""
    torch.manual_seed(0)
    layer = KINDS[kind](12, heads=3, return_sequences=True, input_size=5, **flags)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    x = torch.randn(2, 6, 5)
    return layer, cs.load(layer), x.numpy(), layer(x).detach().numpy()


def test_a_block_diagonal_matrix_has_each_head_in_its_place():
    heads = np.arange(1.0, 17.0).reshape(2, 2, 4)  # two gates, two units of each head
    assert block_diagonal(heads, 2).tolist() == [
        [1, 2, 0, 0, 3, 4, 0, 0],
        [5, 6, 0, 0, 7, 8, 0, 0],
        [0, 0, 9, 10, 0, 0, 11, 12],
        [0, 0, 13, 14, 0, 0, 15, 16],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_native_files_and_state_dicts_keep_the_heads(kind, tmp_path):
    layer, net, x, y = make(kind, **({"activation": "tanh"} if kind == "ligru" else {}))
    net.save(tmp_path / "n.safetensors")
    torch.save(layer.state_dict(), tmp_path / "n.pt")
    torch.save(layer, tmp_path / "whole.pt")
    names = ["n.safetensors", "whole.pt"] + (["n.pt"] if kind in ("lstm", "gru", "rnn") else [])
    for name in names:
        loaded = cs.load(tmp_path / name)
        assert loaded.cells[0].spec.heads == 3, name
        np.testing.assert_array_equal(loaded(x), y, err_msg=name)


@pytest.mark.parametrize("suffix", ["onnx", "pt", "keras"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_other_formats_have_a_block_diagonal_matrix(kind, suffix, tmp_path):
    _, net, x, y = make(kind)
    net.save(tmp_path / f"n.{suffix}")
    loaded = cs.load(tmp_path / f"n.{suffix}")
    (cell,), (own,) = loaded.cells, net.cells
    assert cell.spec.heads == 1
    np.testing.assert_array_equal(cell.recurrent_kernel, block_diagonal(own.recurrent_kernel, len(own.spec.gates)))
    np.testing.assert_allclose(loaded(x), y, rtol=0, atol=NEAR)


def test_pytorch_computes_the_same(tmp_path):
    _, net, x, y = make("lstm")
    net.save(tmp_path / "n.pt")
    lstm = torch.nn.LSTM(5, 12, batch_first=True)
    lstm.load_state_dict(torch.load(tmp_path / "n.pt"))
    np.testing.assert_allclose(lstm(torch.from_numpy(x))[0].detach().numpy(), y, rtol=0, atol=NEAR)


def test_a_file_whose_matrices_do_not_fit_the_heads_is_refused(tmp_path):
    layer, *_ = make("lstm")
    tensors = dict(layer.state_dict())
    tensors["cell.recurrent_kernel"] = tensors["cell.recurrent_kernel"][:2].contiguous()
    torch.save(tensors, tmp_path / "n.pt")
    with pytest.raises(cs.FormatError, match=r"cell\.kernel'?: expected"):
        cs.load(tmp_path / "n.pt")

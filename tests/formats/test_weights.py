"""Safetensors files that hold only weights, as torch models are often published."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cellstack as cs
from cellstack import FormatError


def saved(tmp_path, module, **others):
    path = tmp_path / "model.safetensors"
    save_file({**module.state_dict(), **others}, path)
    return path


def test_one_module_is_a_network(tmp_path):
    gru = torch.nn.GRU(3, 5, 2, batch_first=True)
    net = cs.load(saved(tmp_path, gru))
    x = torch.randn(2, 7, 3)
    np.testing.assert_allclose(net(x.numpy()), gru(x)[0].detach().numpy(), atol=1e-6)


def test_parts_of_a_model(tmp_path):
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 5, batch_first=True), "head": torch.nn.Linear(5, 2)})
    path = saved(tmp_path, model)
    with pytest.raises(FormatError, match="head"):
        cs.load(path)
    parts = cs.extract(path)
    assert list(parts) == ["encoder", "head"]
    x = torch.randn(2, 7, 3)
    np.testing.assert_allclose(parts["encoder"](x.numpy()), model["encoder"](x)[0].detach().numpy(), atol=1e-6)


def test_half_precision_is_widened_and_other_dtypes_are_named(tmp_path):
    lstm = torch.nn.LSTM(3, 5).half()
    assert cs.load(saved(tmp_path, lstm)).dtype == np.float32
    assert cs.load(saved(tmp_path, lstm.bfloat16())).dtype == np.float32
    with pytest.raises(FormatError, match=r"tensor .*expected dtype F16, F32, F64, BF16, found F8_E4M3"):
        cs.load(saved(tmp_path, lstm.to(torch.float8_e4m3fn)))


def test_extract_of_native_files(tmp_path):
    rng = np.random.default_rng(0)
    spec = cs.CellSpec(3, 4)
    cell = cs.Cell(spec, *(rng.normal(size=shape) for shape in spec.shapes.values()))
    net = cs.Network([cs.Recurrent((cell,)), cs.Dense(rng.normal(size=(4, 2)))], ["memory", "head"])
    net.save(tmp_path / "net.safetensors")
    parts = cs.extract(tmp_path / "net.safetensors")
    x = rng.normal(size=(1, 5, 3))
    np.testing.assert_array_equal(parts["memory"](x), cs.Network(net.nodes[:1])(x))

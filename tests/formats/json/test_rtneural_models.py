"""Compares with neural-amp-modeler: its exporter's files, and its module's outputs."""

import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

import cellstack as cs

pytestmark = pytest.mark.models

# Run with the package on the path; its imports for sound and training aren't needed to write a model.
EXPORT = """
import json, sys, types
from unittest.mock import MagicMock

folder, out = sys.argv[1:]
for name, place in (("nam", "nam"), ("nam.models", "nam/models")):  # without the imports of their __init__
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [f"{folder}/{place}"]
for name in ("librosa", "wavio", "sounddevice", "auraloss"):
    sys.modules[name] = MagicMock()


class BaseModel:
    def __init__(self, **values):
        self.__dict__.update(values)


sys.modules["pydantic"] = types.ModuleType("pydantic")
sys.modules["pydantic"].BaseModel = BaseModel
import numpy as np, torch
from nam.models.linear import Linear
from nam.models.recurrent import LSTM

torch.manual_seed(0)
x = np.random.default_rng(0).standard_normal((1, 3000)).astype("f4")
for name, model in {
    "lstm": LSTM(16, sample_rate=48000.0),
    "stack": LSTM(20, num_layers=2, sample_rate=44100.0),
    "filter": Linear(64, bias=True, sample_rate=48000.0),
}.items():
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()
    model._get_non_user_metadata = lambda: {"name": "made for a test"}  # by default it processes a recording
    model.export(out, basename=name)
    if hasattr(model, "_get_initial_state"):  # the exported model's initial state
        h, c = model._get_initial_state()
        model._initial_hidden.data, model._initial_cell.data = h.reshape(-1, h.shape[-1]), c.reshape(-1, c.shape[-1])
    with torch.no_grad():
        y = model(torch.from_numpy(x), pad_start=True).numpy()
    np.savez(f"{out}/{name}.npz", x=x, y=y)
"""


def test_what_neural_amp_modeler_exports(tmp_path):
    ask = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "neural-amp-modeler==0.13.0", "-d", tmp_path]
    subprocess.run(ask, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "package")
    subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path / "package"), str(tmp_path)], check=True)
    for name, rate in (("lstm", 48000.0), ("stack", 44100.0), ("filter", 48000.0)):
        net = cs.load(tmp_path / f"{name}.nam")
        held = np.load(tmp_path / f"{name}.npz")
        x, y = held["x"][:, :, None], held["y"][:, :, None]
        stream = net.stream()
        got = np.stack([stream.step(x[:, t]) for t in range(x.shape[1])], axis=1)
        apart = np.abs(got - y).max()
        assert apart <= 1e-6 * max(1.0, np.abs(y).max())
        assert net.metadata["nam"]["sample_rate"] == rate
        assert net.metadata["nam"]["metadata"]["name"] == "made for a test"
        frame, best = np.ascontiguousarray(x[:, 0]), np.inf
        for _ in range(5):
            begun = time.process_time()
            for _ in range(1000):
                stream.step(frame)
            best = min(best, time.process_time() - begun)
        config = json.loads((tmp_path / f"{name}.nam").read_text())["config"]
        print(f"{name} {config}: apart by {apart:.1e} of {np.abs(y).max():.2f}; a sample {1000 * best:.2f} us")

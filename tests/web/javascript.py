"""Runs the npm package in Node, and compares its results with Python's."""

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
from tolerances import KERNEL
from tools import need

PACKAGE = Path(__file__).parents[2] / "web" / "dist"
TYPES = {"Float32Array": "<f4", "Float64Array": "<f8"}


def pack(one):
    if isinstance(one, np.ndarray):
        data = np.ascontiguousarray(one.astype({"b": "u1", "i": "f8"}.get(one.dtype.kind, one.dtype)))
        text = base64.b64encode(data.tobytes()).decode()
        return {"base64": text, "dtype": data.dtype.name, "shape": list(data.shape)}
    if isinstance(one, dict):
        return {name: pack(value) for name, value in one.items()}
    return [pack(value) for value in one] if isinstance(one, (list, tuple)) else one


def unpack(one):
    """Return results with arrays, in their shapes where they have one."""
    if isinstance(one, list):
        return [unpack(value) for value in one]
    if not isinstance(one, dict):
        return one
    if "base64" in one:
        return np.frombuffer(base64.b64decode(one["base64"]), TYPES[one["type"]])
    found = {name: unpack(value) for name, value in one.items()}
    return found["data"].reshape(found["shape"]) if found.keys() == {"data", "shape"} else found


class Package:
    """The package in a Node process, which runs cases."""

    def __init__(self, folder):
        self.folder = folder
        self.cases = []

    def add(self, network, action=None, load=None, **given):
        """Add a case; `network`: a Network, or the bytes of a file."""
        file = self.folder / f"{len(self.cases)}.safetensors"
        file.write_bytes(network) if isinstance(network, bytes) else network.save(file)
        self.cases.append({"file": str(file), "action": action, "load": load, **pack(given)})

    def run(self):
        cases, results = self.folder / "cases.json", self.folder / "results.json"
        cases.write_text(json.dumps([{k: v for k, v in case.items() if v is not None} for case in self.cases]))
        need("node")
        script = Path(__file__).parent / "run.mjs"
        subprocess.run(["node", script, PACKAGE, cases, results], check=True, timeout=300)
        return [unpack(one) for one in json.loads(results.read_text())]


def by_name(states):
    return [state._asdict() for state in states]


def assert_same(found, expected):
    """Assert equal shapes and bits, for arrays in lists and dicts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(found, expected, strict=True)


def assert_near(found, expected):
    """Assert equal shapes, and numbers that differ by rounding, for arrays in lists and dicts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found.shape == expected.shape
        assert np.abs(found - expected).max(initial=0) <= KERNEL["float32"] * max(1.0, np.abs(expected).max(initial=0))


def flags_of(rng, B, T):
    return {"mask": rng.random((B, T)) < 0.7, "reset": rng.random((B, T)) < 0.2}

"""An installation without the compiled kernel runs and streams networks in NumPy, and refuses the rest."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import NETWORK

import cellstack as cs

FOLDER = Path(__file__).parents[1] / "fixtures" / "0.1.0"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
STREAMS = sorted(path.stem for path in FOLDER.glob("*.state"))

WITHOUT_KERNEL = """
import importlib.util, sys, warnings

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "cellstack._kernel" else find(name, package)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cellstack as cs
"""

RESULTS = """
import numpy as np

folder, given, made = sys.argv[1:]
results = {"warning": np.array([str(one.message) for one in caught])}
with np.load(given) as inputs:
    answers = dict(inputs)
for name in {path.split("/")[1] for path in answers}:
    net = cs.load(f"{folder}/{name}.safetensors")
    x = {path.split("/")[2]: value for path, value in answers.items() if path.startswith(f"x/{name}/")}
    x = x if len(x) > 1 else next(iter(x.values()))
    flags = {key: answers[f"{key}/{name}"] for key in ("mask", "reset") if f"{key}/{name}" in answers}
    y, state = net.run(x, **flags)
    for number, one in enumerate(y if isinstance(y, tuple) else (y,)):
        results[f"y/{name}/{number}"] = one
    for number, one in enumerate(state):
        results |= {f"state/{name}/{number}/{key}": getattr(one, key) for key in one._fields}
    if f"stream/{name}" in answers:
        stream = net.stream(batch=len(x))
        results[f"stream/{name}"] = np.concatenate([stream.run(x[:, :4]), stream.run(x[:, 4:])], axis=1)
np.savez(made, **results)
"""


def run(script, *arguments):
    """Run a script in a process whose installation has no compiled kernel."""
    command = [sys.executable, "-c", WITHOUT_KERNEL + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_networks_run_and_stream_as_with_the_kernel(tmp_path):
    with np.load(FOLDER / "answers.npz") as file:
        given = {key: file[key] for key in file.files if key.split("/")[0] in ("x", "mask", "reset")}
    given |= {f"stream/{name}": np.zeros(0) for name in STREAMS}
    np.savez(tmp_path / "given.npz", **given)
    done = run(RESULTS, FOLDER, tmp_path / "given.npz", tmp_path / "made.npz")
    assert not done.returncode, done.stderr
    # the same script in this process, which has the kernel
    names = {
        "cs": cs,
        "caught": [],
        "sys": type("", (), {"argv": ["", FOLDER, tmp_path / "given.npz", tmp_path / "k.npz"]}),
    }
    exec(RESULTS, names)
    with np.load(tmp_path / "made.npz") as made, np.load(tmp_path / "k.npz") as expected:
        (warning,) = made["warning"]
        assert "the compiled kernel is missing" in warning
        assert "C++17 compiler" in warning
        assert set(made.files) == set(expected.files)
        assert {name.split("/")[1] for name in made.files if "/" in name} == set(NAMES)
        for name in set(made.files) - {"warning"}:
            scale = np.abs(expected[name]).max(initial=1.0)
            np.testing.assert_allclose(made[name], expected[name], rtol=0, atol=NETWORK * scale, err_msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("net.pool(2)", "a pool of sessions needs the compiled kernel"),
        ("net.stream(weights='int8')", "int8 weights need the compiled kernel"),
        ("net.trace(x).gradient(0)", "gradients need the compiled kernel"),
        ("net.edit(cs.Patch('layer_0', 'z', value=0.5, cell=0))(x)", "patches need the compiled kernel"),
    ],
)
def test_the_rest_is_refused_with_a_way_out(call, message, tmp_path):
    script = f"""
import numpy as np
net, x = cs.load({str(FOLDER / "gru_rnn.safetensors")!r}), np.zeros((1, 2, 3), np.float32)
print(net)
{call}
"""
    done = run(script)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert message in last
    assert "install a wheel of cellstack for this platform, or a C++17 compiler" in last

"""Keras's tests of its recurrent layers, from its wheel, under `cellstack.keras.patch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

FOLDER = Path(keras.__file__).parent / "src" / "layers" / "rnn"
FILES = sorted(path.name for path in FOLDER.glob("*_test.py"))
QUICK = [
    "bidirectional_test.py",
    "dropout_rnn_cell_test.py",
    "gru_test.py",
    "lstm_test.py",
    "rnn_test.py",
    "simple_rnn_test.py",
    "stacked_rnn_cells_test.py",
]

if not FILES:
    pytest.skip("this Keras came without its tests", allow_module_level=True)


def run(files, folder, patched, only=()):
    """Run Keras's tests in a separate process; return their outcomes and the counts of calls."""
    to = folder / "written.json"
    environment = os.environ | {
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        "PATCHED": str(int(patched)),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WRITE_TO": str(to),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "patched", "-p", "no:cacheprovider", "-W", "ignore"]
    tests = [f"{FOLDER / name}" for name in files]
    names = ["-k", " or ".join(only)] if only else []
    (folder / "pytest.ini").write_text("[pytest]\n")  # ignore the configuration of parent folders
    done = subprocess.run(
        [*command, "-c", str(folder / "pytest.ini"), f"--rootdir={folder}", *names, *tests],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert to.exists(), done.stdout + done.stderr
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: some tests failed
    return json.loads(to.read_text()) | {"said": done.stdout}


def all_pass_that_pass_on_keras_itself(files, folder):
    found = run(files, folder, patched=True)
    failed = {name for name, outcome in found["outcomes"].items() if outcome == "failed"}
    if failed:
        without = run(files, folder, patched=False, only={name.split(".")[-1].split("[")[0] for name in failed})
        broken = {name for name in failed if without["outcomes"].get(name) == "passed"}
        assert not broken, found["said"]
    return found


def test_keras_s_recurrent_tests(tmp_path):
    found = all_pass_that_pass_on_keras_itself([name for name in QUICK if name in FILES], tmp_path)
    passed = sum(outcome == "passed" for outcome in found["outcomes"].values())
    print(f"{passed} passed; {found['served']} calls run by the kernel, by Keras: {found['left']}")
    assert passed >= 40
    assert found["served"] >= 100


@pytest.mark.slow
def test_keras_s_recurrent_tests_all_of_them(tmp_path):
    found = all_pass_that_pass_on_keras_itself(FILES, tmp_path)
    passed = sum(outcome == "passed" for outcome in found["outcomes"].values())
    print(f"{passed} passed; {found['served']} calls run by the kernel, by Keras: {found['left']}")
    assert passed >= 60

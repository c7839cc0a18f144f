"""Keras's tests of its recurrent layers, from its wheel, under `cellstack.keras.patch`."""

import json
import os
import subprocess
import sys
import unittest
from pathlib import Path

import keras
import pytest

from cellstack.keras import calls, patch

FOLDER = Path(keras.__file__).parent / "src" / "layers" / "rnn"
FILES = sorted(path.name for path in FOLDER.glob("*_test.py"))
QUICK = ["bidirectional_test", "gru_test", "lstm_test", "simple_rnn_test"]

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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_keras_s_tests_of_the_layers():
    """In this process: a new one would take far longer than the tests."""
    names = [f"keras.src.layers.rnn.{name}" for name in QUICK if f"{name}.py" in FILES]
    result = unittest.TestResult()
    calls(reset=True)
    with patch():
        unittest.defaultTestLoader.loadTestsFromNames(names).run(result)
    keras.config.enable_traceback_filtering()  # which Keras's tests disable
    assert result.testsRun >= 25
    failed = [text for _, text in (*result.failures, *result.errors)]
    assert [text for text in failed if "No module named 'tensorflow'" not in text] == []
    assert len(failed) <= 1
    assert calls().served >= 100


@pytest.mark.slow
def test_keras_s_recurrent_tests_all_of_them(tmp_path):
    found = all_pass_that_pass_on_keras_itself(FILES, tmp_path)
    passed = sum(outcome == "passed" for outcome in found["outcomes"].values())
    print(f"{passed} passed; {found['served']} calls run by the kernel, by Keras: {found['left']}")
    assert passed >= 60

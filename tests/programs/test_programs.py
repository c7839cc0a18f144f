"""Modules of published packages: what `accelerate` serves and `compile` converts, with the package's own results.

The packages are installed in a temporary folder, without their dependencies; each program runs in its own process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from programs.harness import Result, all_programs

pytestmark = pytest.mark.models

TESTS = Path(__file__).parents[1]
CLOSE = 2e-5  # of the largest value: float32 on both sides, with sums in different orders


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the folder of an installed requirement; each is installed once."""
    root = tmp_path_factory.mktemp("packages")

    def install(requirement):
        folder = root / requirement
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), requirement]
            subprocess.run(command, check=True, capture_output=True)
            # The extension in PyPI's wheel needs CUDA's libraries. Without it, torchaudio runs in Python.
            for library in (folder / "torchaudio" / "lib").glob("*.so"):
                library.unlink()
        return str(folder)

    return install


@pytest.mark.parametrize("name", all_programs())
def test_programs(installed, name):
    program = all_programs()[name]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *map(installed, program.needs)])}
    command = [sys.executable, "-m", "programs.harness", name, "--untimed"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    found = Result(**json.loads(run.stdout.splitlines()[-1]))
    print(found)
    assert found.served == program.served
    assert found.same_draws
    assert found.off <= CLOSE
    assert found.off_gradients <= CLOSE
    if program.refused is not None:
        assert found.refused is not None
        assert program.refused in found.refused
        return
    assert found.refused is None
    assert found.runtime == program.runtime
    assert found.off_compiled <= CLOSE
    assert found.sizes == f"{program.accepts or len(program.sizes)}/{len(program.sizes)}"
    assert found.streams == program.streams, found.no_stream
    assert found.off_stream <= CLOSE

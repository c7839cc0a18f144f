"""What `make` does before the first test: it checks the system, and installs while the kernel compiles."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import system
from dependencies import dependencies
from packaging.requirements import Requirement
from tools import need

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_extras_of_extras_are_dependencies_too():
    extras = {"torch": ["torch>=2.6", "cellstack[table]"], "table": ["pandas>=2.2"], "keras": ["h5py"]}
    project = {"name": "cellstack", "dependencies": ["numpy"], "optional-dependencies": extras}
    assert dependencies(project, ["torch", "table"]) == ["numpy", "torch>=2.6", "pandas>=2.2"]


def test_no_extra_installs_the_package():
    found = dependencies(PROJECT, PROJECT["optional-dependencies"])
    assert "cellstack" not in {Requirement(line).name for line in found}
    assert {Requirement(line).name for line in found} > {"numpy", "torch", "pandas", "pytest", "sphinx", "ray"}


def test_a_system_that_has_all_it_takes(monkeypatch, tmp_path):
    for name in ("Python.h", "g++"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(system.importlib.util, "find_spec", lambda name: sys)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert system.lacking() == {}
    system.main()


def test_what_is_missing_is_named_in_one_line_with_its_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(system.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "version_info", (3, 13, 5))
    with pytest.raises(SystemExit) as stopped:
        system.main()
    assert stopped.value.code == (
        "make: expected Python's module ensurepip, Python's headers, a C++ compiler: "
        "on Debian or Ubuntu, apt-get install python3.13-venv python3.13-dev g++"
    )
    monkeypatch.setenv("CXX", "clang++ -m64")
    assert "a C++ compiler (CXX=clang++)" in system.lacking()


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit) as stopped:
        system.main()
    assert stopped.value.code == (
        "make: expected Python 3.10 or newer, found 3.9: choose one with `make demo PYTHON=python3.12`"
    )
    assert PROJECT["requires-python"] == ">={}.{}".format(*system.OLDEST)


# A program that ends when the other one has started too, or after a minute.
PROGRAM = """#!/bin/sh
cd '{folder}' && touch {name}.started
n=0; while [ ! -e {other}.started ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 9; sleep 0.1; done
touch {name}.ended
exit {status}
"""


@pytest.mark.parametrize(("pip", "python"), [(0, 0), (1, 0), (0, 1)], ids=["both succeed", "the kernel", "packages"])
def test_packages_are_installed_while_the_kernel_compiles_and_either_can_fail(pip, python, tmp_path):
    need("make")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, other, status in (("pip", "python", pip), ("python", "pip", python)):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(PROGRAM.format(folder=tmp_path, name=name, other=other, status=status))
        program.chmod(0o755)
    for name in ("pyproject.toml", "CMakeLists.txt", ".venv/ready"):
        (tmp_path / name).touch()
    command = ["make", "-s", "-f", ROOT / "Makefile", ".venv/installed"]
    environment = {
        name: value for name, value in os.environ.items() if name != "MAKEFLAGS"
    }  # of a `make test` around it
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (tmp_path / "pip.ended").exists()
    assert (tmp_path / "python.ended").exists()
    assert (done.returncode == 0) == (pip == python == 0), done.stderr
    assert (tmp_path / ".venv" / "installed").exists() == (pip == python == 0)

"""What a build of the package makes: with a compiler that doesn't work, and in two folders; the kernel's size."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cellstack import _kernel

ROOT = Path(__file__).parents[2]


def source(folder):
    """Copy what a wheel is made of, without build folders."""
    for name in ("src", "kernel", "licenses", "benchmarks/cellstack_bench", "examples/cellstack_demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


BUILD = """
import json, sys
from scikit_build_core.build import build_wheel

build_wheel(sys.argv[1], json.loads(sys.argv[2]))
"""


def wheel(folder, out, settings, **environment):
    """Build a wheel, and return its path and what the build printed."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, out, json.dumps(settings)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    (made,) = out.glob("*.whl")
    return made, done.stdout + done.stderr


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(tmp_path):
    settings = {"cmake.define.CELLSTACK_SETS": "baseline"}
    one, _ = wheel(source(tmp_path / "one"), tmp_path / "a", settings, SOURCE_DATE_EPOCH="1750000000")
    other, _ = wheel(source(tmp_path / "another folder"), tmp_path / "b", settings, SOURCE_DATE_EPOCH="1750000000")
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as file:
        names = file.namelist()
    assert any(re.fullmatch(r"cellstack/_kernel\..*\.(so|pyd)", name) for name in names)
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "nanobind.txt", "robin-map.txt"}


def test_the_kernel_takes_less_than_3_mb():
    assert os.path.getsize(_kernel.__file__) < 3_000_000

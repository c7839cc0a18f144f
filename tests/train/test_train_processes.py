"""Two processes of torchrun give the result of one, also with uneven and empty shards."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from cellstack import load, train
from cellstack.cli import main as cli
from cellstack.train import custom, workflow

# 13 sequences of 5 lengths in batches of up to 3, one of them alone: shards of 2 + 1 and of 1 + 0 rows
MAKE = textwrap.dedent(
    """
    import numpy as np
    rng = np.random.default_rng(5)
    lines = ["@problemName toy", "@timeStamps false", "@missing false", "@univariate false", "@dimensions 3"]
    lines += ["@equalLength false", "@classLabel true a b", "@data"]
    for n, length in enumerate([4] * 5 + [5] * 4 + [6] * 2 + [7, 20]):
        x = rng.normal(size=(3, length)) + n % 2
        lines.append(":".join(",".join(f"{v:.4f}" for v in row) for row in x) + ":" + "ab"[n % 2])
    PATH.write_text("\\n".join(lines) + "\\n")
    """
)

OPTIONS = [
    "--units",
    "6,5",
    "--batch",
    "3",
    "--epochs",
    "3",
    "--validation",
    "0.3",
    "--dropout",
    "0.4",
    "--noise",
    "0.2",
]


def words(path, output, *extra):
    return ["train", str(path), "-o", str(output), *OPTIONS, "--threads", "1", "--quiet", "--device", "cpu", *extra]


def in_one(path, output, *extra):
    assert cli.main(words(path, output, *extra)) == 0
    return load(output)


def in_two(path, output, *extra):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cellstack"]
    command = [*start, *words(path, output, *extra)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"wrote {output}\n") == 1
    return load(output)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_two_processes_give_the_same_as_one(tmp_path, bidirectional):
    path = tmp_path / "toy.ts"
    exec(MAKE, {"PATH": path})
    extra, inspected = (["--bidirectional"], ["--inspect"]) if bidirectional else (["--every-step"], [])
    one = in_one(path, tmp_path / "one.safetensors", *extra)
    two = in_two(path, tmp_path / "two.safetensors", *extra, *inspected)
    assert (tmp_path / "two-inspect" / "report.html").exists() == bidirectional
    start = in_one(path, tmp_path / "start.safetensors", *extra, "--lr", "1e-12")
    moved = 0.0
    for cell, other, before in zip(one.cells, two.cells, start.cells, strict=True):
        for name in ("kernel", "recurrent_kernel", "bias"):
            np.testing.assert_allclose(getattr(cell, name), getattr(other, name), atol=1e-5, rtol=0)
            moved = max(moved, float(np.abs(getattr(cell, name) - getattr(before, name)).max()))
    assert moved > 1e-2  # the weights have changed by much more than 1e-5


LEFT_OVER = """
import os
import sys
from cellstack.train import read_ts
from cellstack.train.options import Architecture, FitOptions
from cellstack.train.workflow import train_sequences
data, shape = read_ts(sys.argv[1]), Architecture((4,), dropout=0.0)
outcome = train_sequences(data, None, shape, FitOptions(epochs=1, validation=0.3, device="cpu"))
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
sys.exit(sum("gloo" in name for name in names))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_thread_of_the_group_is_left(tmp_path):
    """A thread that still runs while the interpreter shuts down can abort the process."""
    exec(MAKE, {"PATH": tmp_path / "toy.ts"})
    (tmp_path / "left_over.py").write_text(LEFT_OVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "left_over.py"), str(tmp_path / "toy.ts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_batches_are_padded_on_the_cpu_only(monkeypatch):
    """cuDNN's LSTM has no masks."""
    gaps = []
    for gpus in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        gaps += [workflow.gap_of(device) for device in ("auto", "cpu", "cuda")]
    assert gaps == [2.0, 2.0, 2.0, 1.0, 2.0, 1.0]
    lengths = np.repeat([9, 10], 4)
    sequences = train.Sequences([np.ones((length, 1), np.float32) for length in lengths], lengths - 9, ("a", "b"), "x")
    examples, chosen = custom.Labelled(sequences), np.arange(8)
    for gap, steps in ((1.0, 2), (2.0, 1)):
        data = custom.Indexed(examples, custom.Inputs.measure(examples, chosen), chosen, chosen, 8, 0, gap=gap)
        assert [len(batch.x) for batch in data.epoch(0)] == [8 // steps] * steps
        assert all((batch.mask is None) == (gap == 1) for batch in data.epoch(0))
        assert ("batches" in data.describe()) == (gap > 1)

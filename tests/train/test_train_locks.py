"""Two trainings never write to the same file at the same time, and a killed process leaves no lock."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from cellstack import load, train
from cellstack.cli import main as cli
from cellstack.train import UsageError, locks
from cellstack.train.locks import locked

VOWELS = str(files("cellstack_demo") / "data" / "JapaneseVowels_TRAIN.ts")
SMALL = ["--units", "4", "--batch", "64", "--threads", "1", "--quiet", "--patience", "0"]
BUSY = r"another training \(process \d+ on .+\) is writing to this file: wait for it to end, or name another file"


def test_a_file_is_locked_once(tmp_path):
    path = tmp_path / "run.ckpt"
    link = tmp_path / "link"
    link.symlink_to(path)
    with locked(path), locked(tmp_path / "other"):
        for name in (path, link, tmp_path / "." / "run.ckpt"):
            with pytest.raises(UsageError, match=f"{name}: {BUSY}"), locked(name):
                pass
    with locked(path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "run.ckpt"
    code = (
        "import sys, time; from cellstack.train.locks import locked\nwith locked(sys.argv[1]): print(1); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-uc", code, path], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(UsageError, match=rf"\(process {process.pid} on "), locked(path):
            pass
    finally:
        process.kill()
        process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".cellstack-")
    with locked(path), pytest.raises(UsageError, match=rf"\(process {os.getpid()} on "), locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_threads_that_lock_and_release_exclude_each_other(tmp_path):
    """Releasing a lock removes its file, which another thread may have opened just before."""
    inside, most = [0], [0]

    def often(_):
        done = 0
        while done < 15:
            with suppress(UsageError), locked(tmp_path / "file"):
                inside[0] += 1
                most[0], done = max(most[0], inside[0]), done + 1
                time.sleep(1e-4)
                inside[0] -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(often, range(8)))
    assert most == [1]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.warns(RuntimeWarning, match="file: the file system has no locks: don't"), locked(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


# ── trainings ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_checkpoint_has_one_training(tmp_path, rng, how):
    x, y = rng.normal(size=(20, 4, 2)), np.repeat(["a", "b"], 10)
    path, said = tmp_path / "run.ckpt", []
    small = {"units": 3, "batch": 20, "threads": 1, "checkpoint": path}

    def second(epoch):
        with pytest.raises(UsageError) as caught:
            train.fit(x, y, epochs=1, **small, **how)
        said.append(str(caught.value))

    first = train.fit(x, y, epochs=2, **small, callbacks=[second])
    assert len(first.history) == len(said) == 2
    assert all("run.ckpt: another training (process" in message for message in said)
    assert train.fit(x, y, epochs=3, **small, resume=True).fit.resumed == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.long
def test_a_forecast_locks_the_checkpoint_of_all_its_members(tmp_path, monkeypatch):
    from cellstack.train.forecasting import training

    table = pd.DataFrame({"y": np.sin(np.arange(200) / 3)})
    small = {"horizon": 2, "window": 8, "units": 3, "members": 2, "epochs": 1, "threads": 1}
    fitted, said = training.fitted, []

    def around(*arguments):
        with pytest.raises(UsageError) as caught:
            train.fit_forecast(table, "y", checkpoint=tmp_path / "run.ckpt", resume=True, **small)
        said.append(str(caught.value))
        return fitted(*arguments)

    monkeypatch.setattr(training, "fitted", around)
    train.fit_forecast(table, "y", checkpoint=tmp_path / "run.ckpt", **small)
    assert len(said) >= 2
    assert all("run.ckpt: another training (process" in message for message in said)
    assert not list(tmp_path.glob(".cellstack-*"))


@pytest.mark.long
def test_the_command_line_trains_once_to_an_output_and_a_checkpoint(tmp_path, capsys):
    """And a training stopped by SIGKILL can be resumed."""
    output, checkpoint = tmp_path / "net.safetensors", tmp_path / "run.ckpt"
    words = ["train", VOWELS, *SMALL, "--noise", "0", "-o", str(output), "--checkpoint", str(checkpoint)]
    process = subprocess.Popen([sys.executable, "-m", "cellstack", *words, "--epochs", "100000"])
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        elsewhere = [
            "train",
            VOWELS,
            *SMALL,
            "--noise",
            "0",
            "-o",
            str(tmp_path / "other"),
            "--checkpoint",
            str(checkpoint),
        ]
        for other, path in (
            (words[:-2], output),
            ([*words, "--resume"], output),
            ([*elsewhere, "--overwrite"], checkpoint),
        ):
            status = cli.main(other)
            err = capsys.readouterr().err
            assert (status, err.count("\n")) == (2, 1)
            assert err.startswith(f"cellstack train: error: {path}: another training (process {process.pid} on ")
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not output.exists()
    assert cli.main([*words, "--resume", "--epochs", "1"]) == 0
    assert load(output).metadata["task"] == "classify"
    assert {entry.name for entry in tmp_path.iterdir() if entry.suffix != ".tmp"} == {output.name, checkpoint.name}


def test_one_file_for_network_and_checkpoint_is_refused(tmp_path, capsys):
    path = str(tmp_path / "net.safetensors")
    assert cli.main(["train", VOWELS, *SMALL, "-o", str(tmp_path / "net"), "--checkpoint", path]) == 2
    assert f"--checkpoint and -o name the same file, {path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""The progress bar: where it is shown by default, and what it shows; in a terminal, redirected, and in a notebook."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress

import nbformat
import pytest
from nbclient import NotebookClient

from cellstack.train import progress

FIT = """
import numpy as np
from cellstack import train
rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 12, 3)), np.repeat(["calm", "busy"], 20)
result = train.fit(x, y, units=4, epochs=3, threads=1{})
"""
FORECAST = """
import numpy as np, pandas as pd
from cellstack import train
frame = pd.DataFrame({"y": 5 + np.sin(np.arange(120) * np.pi / 6)})
quick = {"units": 4, "members": 2, "epochs": 2, "patience": 0, "threads": 1}
done = train.fit_forecast(frame, "y", horizon=4, seasons=(12,), **quick)
"""


def in_a_terminal(code, columns=120):
    """Return what a process writes to a pseudo-terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", code])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    with suppress(OSError):  # the process has ended
        while True:
            written += os.read(terminal, 65536)
    assert os.waitpid(pid, 0)[1] == 0, written.decode()
    return written.decode()


def in_a_notebook(code, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    return "".join(out.get("text", "") for out in notebook.cells[0].outputs)


@pytest.mark.long
def test_a_terminal_shows_a_bar_by_default():
    shown = in_a_terminal(FIT.format("") + "print('another')" + FIT.format(", progress=False"))
    shown, without = shown.split("another")
    assert re.search(r"epoch 3/3 100%\|.*\| 00:0\d<00:00, loss 0.\d+; validation loss 0.\d+, accuracy [01]", shown)
    assert "epoch" not in without


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "end"), [(50, r"loss 0\.\d+"), (70, r"; validation loss 0\.\d+")])
def test_a_narrow_terminal_shows_fewer_figures_instead_of_cut_ones(columns, end):
    lines = [line for line in re.split("[\r\n]+", in_a_terminal(FIT.format(""), columns)) if "epoch 3/3 100%" in line]
    assert lines
    assert all(re.search(rf"00:0\d<00:00, .*{end} *$", line) for line in lines)


def test_redirected_output_has_no_bar_unless_it_is_asked_for(capfd):
    for given, bars in (("", False), (", progress=True", True)):
        exec(FIT.format(given), {})
        out, err = capfd.readouterr()
        assert not out
        assert ("epoch 3/3 100%" in err) == bars
        assert bars or not err


@pytest.mark.slow
def test_a_notebook_shows_a_bar_by_default(tmp_path, monkeypatch):
    assert "epoch 3/3 100%" in in_a_notebook(FIT.format(""), tmp_path, monkeypatch)
    assert not in_a_notebook(FIT.format(", progress=False"), tmp_path, monkeypatch)


@pytest.mark.slow
def test_all_networks_of_a_forecast_share_one_bar():
    shown = in_a_terminal(FORECAST)
    lines = [line for line in shown.split("\n") if line.strip()]
    assert len(lines) == 1
    assert "network 1 of 2, epoch 1/2" in shown
    assert "network 2 of 2, epoch 2/2" in shown
    assert " 100%|" in lines[0].split("\r")[-2 if lines[0].endswith("\r") else -1]
    shares = [int(share) for share in re.findall(r"(\d+)%\|", shown)]
    assert shares[0] == 0
    assert shares[-1] == 100


@pytest.mark.parametrize(("completed", "share"), [(True, "100%"), (False, " 50%")])
def test_a_bar_ends_full_unless_the_training_was_interrupted(capsys, completed, share):
    with progress.opened(True) as bar:
        bar.begin("", epochs=2, steps=4, done=0)
        for _ in range(4):
            bar.step(1, 0.5)
        bar.end(completed)
    assert f"{share}|" in capsys.readouterr().err.split("\r")[-1]


def test_a_resumed_bar_starts_where_the_checkpoint_ended(capsys):
    with progress.opened(True) as bar:
        bar.begin("", epochs=2, steps=4, done=5)
        assert (bar.bar.n, bar.bar.total) == (5, 8)
    assert "epoch 2/2" in capsys.readouterr().err


def test_further_processes_show_no_bar(capsys):
    with progress.opened(True, hidden=True) as bar:
        bar.begin("", epochs=1, steps=1, done=0)
        bar.step(1, 0.5)
    assert capsys.readouterr().err == ""

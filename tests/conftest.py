"""Settings and fixtures of all tests."""

import gc
import os
import random
import signal
import sys
from importlib.resources import files

os.environ["KERAS_BACKEND"] = "torch"  # before anything imports keras
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before anything imports torch
    # Workers share the processors, and spinning threads of one worker would slow down the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import numpy as np
import pytest
import tools
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a background job of a shell: some tests send SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files with few but long tests: first, so that no worker is left alone with them at the end.
FIRST = (
    "tests/train/",
    "tests/architecture/",
    "tests/cli/",
    "tests/inspect/",
    "test_torch_bad.py",
    "test_onnx_unrolled.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return (os.cpu_count() or 1) + 1  # some tests wait, for a browser or a process


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(part in item.path.as_posix() for part in FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Make the garbage collector skip the libraries and the tests: millions of objects that stay until the end.

    Full collections are rare after that: what the tests import and cache stays too.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], 200)
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Say what wasn't tested, and release what a failed test's traceback refers to: triton would list it at length."""
    tools.pytest_unconfigure(config)
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.default_generator.manual_seed(0)  # torch.manual_seed also writes down the stack, for every kind of device
    random.seed(0)  # seeds Keras's initializers


@pytest.fixture(autouse=True)
def _exporter_without_warnings(request, caplog):
    """Whatever is compiled or exported, nobody sees warnings of PyTorch's exporter about graphs that we changed."""
    yield
    if request.path.parent.name == "capture":  # other tests also call the exporter itself
        records = caplog.get_records("call")
        assert not [record.getMessage() for record in records if record.name.startswith("torch.onnx")]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the system's, or the one that Playwright has installed.

    One per module, closed after it: while it runs, no other event loop can run in this thread.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = tools.chromium(playwright)
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """The file of a small LSTM."""
    from serving import lstm

    path = tmp_path_factory.mktemp("models") / "lstm.safetensors"
    lstm().save(path)
    return path


@pytest.fixture(scope="module")
def served(model_file):
    """A server of this file, in a thread."""
    from serving import running

    with running(model_file) as found:
        yield found


@pytest.fixture(scope="session")
def co2_table(tmp_path_factory):
    """The last ten years of the demo's weekly measurements: training on all 44 takes several times as long."""
    head, *rows = (files("cellstack_demo") / "data" / "co2.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("tables") / "co2.csv"
    path.write_text("\n".join([head, *rows[-520:], ""]), encoding="utf-8")
    return str(path)

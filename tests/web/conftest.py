import functools
import http.server
import shutil
import threading

import pytest
from javascript import PACKAGE, Package

from cellstack import _kernel


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


@pytest.fixture
def baseline():
    """Compute on the baseline instruction set, which rounds products and sums separately, as WebAssembly does."""
    _kernel.set_isa("baseline")
    yield
    _kernel.set_isa("")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """A folder that is served, and its address."""
    folder = tmp_path / "site"
    shutil.copytree(PACKAGE, folder / "dist")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

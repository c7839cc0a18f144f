"""The npm package in Chromium."""

import numpy as np
import pytest
from networks import make_cell

from cellstack import Network
from cellstack.nodes import Recurrent

pytestmark = pytest.mark.web


def test_chromium_computes_what_python_does(site, browser, rng):
    folder, address = site
    net = Network([Recurrent((make_cell(rng, 5, 24), make_cell(rng, 24, 7, kind="gru")))])
    net.save(folder / "net.safetensors")
    (folder / "index.html").write_text("<!doctype html><title>test</title>")
    x = rng.normal(size=(2, 6, 5)).astype("f4")
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    found = page.evaluate(
        """async ([data, shape]) => {
          const { load } = await import("/dist/index.js");
          const net = await load("/net.safetensors");
          return [...net.run({ data, shape }).y.data];
        }""",
        [x.ravel().tolist(), x.shape],
    )
    page.close()
    np.testing.assert_allclose(found, net(x).ravel(), atol=1e-6)
    assert all(url.startswith(address) for url in asked), "requests go to the page's own server only"

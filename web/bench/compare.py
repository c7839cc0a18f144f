"""Compare the npm package with onnxruntime-web in headless Chromium: the same weights, outputs first, then times.

    npm install --prefix /tmp/peers onnxruntime-web
    make web
    python web/bench/compare.py /tmp/peers/node_modules/onnxruntime-web

Both have one thread. The engines take turns in every round; the times are the least of all rounds.
"""

import http.server
import json
import shutil
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

import cellstack as cs
from cellstack_bench.engines import onnx_model, onnx_step

WEB = Path(__file__).parents[1]
STEPS = 200
UNITS = {"step": (16, 32, 64, 128, 256), "sequence": (64, 128, 256)}
BOUND = 2e-6  # between the outputs: float32 on both sides


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files to a page that is isolated from other origins, whose clock has a resolution of 5 µs."""

    def end_headers(self) -> None:
        """Isolate the page."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_) -> None:
        """Print nothing."""


def models(folder: Path) -> None:
    """Write the same weights for both engines."""
    rng = np.random.default_rng(0)
    for units in sorted({*UNITS["step"], *UNITS["sequence"]}):
        spec = cs.CellSpec(units, units)
        arrays = [(rng.uniform(-1, 1, shape) / np.sqrt(units)).astype("f4") for shape in spec.shapes.values()]
        cs.Network([cs.nodes.Recurrent((cs.nodes.Cell(spec, *arrays),))]).save(folder / f"{units}.safetensors")
        (folder / f"step-{units}.onnx").write_bytes(onnx_step(tuple(arrays)))
        (folder / f"sequence-{units}.onnx").write_bytes(onnx_model([tuple(arrays)], 1, STEPS, units))


def measure(peer: Path, folder: Path) -> list[dict]:
    """Run the page, and return its rows."""
    shutil.copytree(WEB / "dist", folder / "cellstack")
    shutil.copytree(peer / "dist", folder / "ort")
    shutil.copy(WEB / "bench" / "compare.js", folder)
    (folder / "index.html").write_text("<!doctype html><title>compare</title>")
    models(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or playwright.chromium.executable_path, args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        rows = page.evaluate(
            "async ([units, steps]) => (await import('/compare.js')).compare(units, steps)", [UNITS, STEPS]
        )
        print(
            f"Chromium {browser.version}, onnxruntime-web {json.loads((peer / 'package.json').read_text())['version']}"
        )
        browser.close()
    server.shutdown()
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(sys.argv[1]), Path(folder))
    print("| | units | difference | cellstack | onnxruntime-web | ratio |\n|---|---|---|---|---|---|")
    for row in rows:
        if row["difference"] > BOUND:
            sys.exit(f"{row}: expected outputs that differ by at most {BOUND}")
        ours, theirs = row["ours"], row["theirs"]
        print(
            f"| {row['what']} | {row['units']} | {row['difference']:.1e} | {ours:.1f} µs | {theirs:.1f} µs "
            f"| {theirs / ours:.1f} |"
        )

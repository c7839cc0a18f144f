"""The npm package as Node sees it: installed from a tarball, its memory, a machine without SIMD."""

import json
import subprocess

import numpy as np
import pytest
from javascript import PACKAGE
from networks import make_cell
from tools import need

from cellstack import Network
from cellstack.nodes import Recurrent

pytestmark = pytest.mark.web


def script(text, folder):
    """Run a module in Node, and return what it printed."""
    need("node")
    done = subprocess.run(
        ["node", "--expose-gc", "--input-type=module", "-e", text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def net(rng, tmp_path):
    net = Network([Recurrent((make_cell(rng, 3, 64),))])
    net.save(tmp_path / "net.safetensors")
    return net


def test_installed_from_a_tarball(net, tmp_path):
    need("node", "npm")
    tarball = subprocess.run(["npm", "pack", PACKAGE], cwd=tmp_path, capture_output=True, text=True, check=True)
    name = tarball.stdout.split()[-1]
    (tmp_path / "package.json").write_text('{"name": "user", "private": true}')
    subprocess.run(["npm", "install", "--offline", "--no-audit", f"./{name}"], cwd=tmp_path, check=True, timeout=120)
    found = script(
        """
        import { load } from "cellstack";
        const net = await load("net.safetensors");
        console.log(JSON.stringify([...net.run({ data: [1, 2, 3, 4, 5, 6], shape: [1, 2, 3] }).y.data]));
        """,
        tmp_path,
    )
    expected = net(np.arange(1, 7, dtype="f4").reshape(1, 2, 3))
    np.testing.assert_allclose(json.loads(found), expected.ravel(), atol=1e-6)


def test_memory_of_runs_and_streams_is_freed(net, tmp_path):
    """Closed streams, and those that are garbage-collected: the kernel's memory stops growing."""
    found = script(
        f"""
        import {{ load }} from "{PACKAGE}/index.js";
        const net = await load("net.safetensors");
        const bytes = () => net.kernel.exports.memory.buffer.byteLength;
        const x = {{ data: new Float32Array(3 * 100), shape: [1, 100, 3] }};
        const sizes = [];
        let collected = 0;
        const collector = new FinalizationRegistry(() => {{ collected += 1; }});
        for (let round = 0; round < 4; round += 1) {{
          for (let n = 0; n < 500; n += 1) {{
            const stream = net.stream({{ batch: 8 }});
            stream.step(new Float32Array(24));
            stream.close();
            net.run(x);
          }}
          for (let n = 0; n < 100; n += 1) {{
            const stream = net.stream({{ batch: 8 }});
            stream.step(new Float32Array(24));
            collector.register(stream);
          }}
          for (let n = 0; n < 500 && collected < 100 * round + 99; n += 1) {{  // the last may still be in a register
            gc();
            await new Promise((done) => setTimeout(done, 20));
          }}
          sizes.push(bytes());
        }}
        const stream = net.stream();
        stream.close();
        let message = "";
        try {{ stream.step(new Float32Array(3)); }} catch (error) {{ message = error.message; }}
        console.log(JSON.stringify({{ sizes, collected, message }}));
        """,
        tmp_path,
    )
    answer = json.loads(found)
    assert answer["collected"] >= 399
    sizes = answer["sizes"][1:]
    assert max(sizes) - min(sizes) < 2**19  # the collector's timing may cost a page or two; a leak takes more per round
    assert answer["message"] == "stream: it is closed"


def test_two_streams_do_not_affect_each_other(net, tmp_path):
    found = script(
        f"""
        import {{ load }} from "{PACKAGE}/index.js";
        const net = await load("net.safetensors");
        const [one, other] = [net.stream(), net.stream()];
        const [a, b] = [[1, 2, 3], [-1, 0, 2]];
        one.step(a); other.step(b);
        const mixed = [one.step(b), other.step(a)];
        const alone = [[a, b], [b, a]].map((steps) => {{
          const stream = net.stream();
          stream.step(steps[0]);
          const copied = net.stream();
          copied.state = stream.state;
          stream.reset();
          return [copied.step(steps[1]), stream.step(a)];
        }});
        const first = net.stream().step(a);
        const same = (p, q) => p.every((value, n) => value === q[n]);
        const found = [same(mixed[0], alone[0][0]), same(mixed[1], alone[1][0]), same(alone[1][1], first)];
        console.log(JSON.stringify(found));
        """,
        tmp_path,
    )
    assert json.loads(found) == [True, True, True]


def test_a_browser_without_simd_is_told_so(tmp_path):
    found = script(
        f"""
        import {{ load }} from "{PACKAGE}/index.js";
        WebAssembly.validate = () => false;
        await load(new Uint8Array(8)).catch((error) => console.log(error.message));
        """,
        tmp_path,
    )
    assert found.startswith("cellstack needs WebAssembly with SIMD, which this browser doesn't have")

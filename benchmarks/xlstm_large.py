"""An xLSTM language model of real width, with random weights: tokens per second, memory, and a long prompt.

The package's model runs first, in float32: its kernels for CPUs refuse bfloat16. Its weights are then written as
checkpoint folders in float32 and bfloat16, and cellstack reads them in processes without torch, one for each number
format. Outputs in float32 are compared first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS, CHUNK = 24, 256  # steps that are timed; tokens of a prompt in one call


def resident() -> float:
    """Return the memory of this process in GB, without files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def row(name: str, threads: int, step, prompt: int, run) -> None:
    """Print the time of a step and of a prompt."""
    times = []
    for n in range(STEPS):
        begin = time.perf_counter()
        step(n)
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    run(prompt)
    whole = time.perf_counter() - begin
    fast = np.median(times)
    print(f"| {name} | {threads} | {1e3 * fast:.0f} | {1 / fast:.1f} | {whole:.1f} | {resident():.1f} |", flush=True)


def package(folder: Path, sizes: dict[str, int], prompt: int, threads: int) -> None:
    """Time the package's model, and write its weights in float32 and in bfloat16, and some of its outputs."""
    import torch
    from safetensors.torch import save_file
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    kernels = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    }
    states = {"mode": "inference", "return_last_states": True, "inference_state_dtype": "float32"}
    model: Any = xLSTMLarge(xLSTMLargeConfig(**sizes, **kernels, **states, autocast_kernel_dtype="float32")).eval()
    print(f"{sum(each.numel() for each in model.parameters()) / 1e6:.0f} million parameters: {sizes}")
    print(f"\n| | threads | ms per token | tokens per second | prompt of {prompt}, s | memory, GB |")
    print("|---|---|---|---|---|---|", flush=True)
    ids = torch.randint(0, sizes["vocab_size"], (1, max(prompt, STEPS)))
    state = None

    def call(start: int, stop: int) -> None:
        nonlocal state
        _, state = model(ids[:, start:stop], state)

    def run(count: int) -> None:
        nonlocal state
        state = None
        for start in range(0, count, CHUNK):
            call(start, start + CHUNK)

    with torch.no_grad():
        np.savez(folder / "wanted.npz", ids=ids.numpy(), y=model(ids[:, :16])[0].numpy())
        state = None
        row("package, float32", threads, lambda n: call(n, n + 1), prompt, run)
        for name in ("float32", "bfloat16"):
            (folder / name).mkdir()
            save_file(model.to(getattr(torch, name)).state_dict(), folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(sizes))


def ours(folder: Path, weights: str, prompt: int, threads: int) -> None:
    """Time the same model in cellstack."""
    import cellstack as cs

    net = cs.load(folder / ("float32" if weights == "float32" else "bfloat16"))
    stored = np.load(folder / "wanted.npz")
    ids = stored["ids"]
    stream = net.stream(threads=threads, weights=weights)
    y = stream.run(ids[:, :16])
    if weights == "float32":
        difference = abs(y - stored["y"]).max() / abs(stored["y"]).max()
        assert difference < 1e-3, difference

    def run(count: int) -> None:
        stream.reset()
        for start in range(0, count, CHUNK):
            stream.run(ids[:, start : start + CHUNK])

    row(f"cellstack, {weights}", threads, lambda n: stream.step(ids[:, n]), prompt, run)
    assert "torch" not in sys.modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="features, a multiple of the heads (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--blocks", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--words", type=int, default=50304, help="size of the vocabulary (%(default)s)")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--only", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = {
        "embedding_dim": given.width,
        "num_heads": given.heads,
        "num_blocks": given.blocks,
        "vocab_size": given.words,
    }
    if given.only:
        who, folder = given.only
        if who == "package":
            package(Path(folder), sizes, given.prompt, given.threads)
        else:
            ours(Path(folder), who, given.prompt, given.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        for who in ("package", "float32", "bfloat16", "int8"):  # each in a process of its own, for its memory
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", who, folder], check=True)


if __name__ == "__main__":
    main()

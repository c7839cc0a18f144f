"""An mLSTM on one thread: a step of its memory next to reading the state, a step of a stream of a whole layer next to
reading its weights and state, and sequences next to xlstm and mlstm_kernels.

Outputs and gradients are compared first. Times are the fastest of interleaved rounds.
"""

import argparse
import time

import numpy as np
import torch
from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as chunkwise
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple as parallel

import cellstack as cs
from cellstack import layers, native
from cellstack.nodes.mlstm import MLSTM

HEADS, CHUNK = 4, 64
WIDTHS = (64, 128, 256, 512)
UNITS = (128, 256, 512)
SEQUENCES = ((1, 256, 64), (1, 1024, 64), (8, 256, 64), (1, 512, 128), (4, 256, 256), (1, 512, 512))  # B, T, width


def fastest(engines, rounds, inner=1):
    """Return the least time of each engine in milliseconds."""
    best = dict.fromkeys(engines, float("inf"))
    for _ in range(rounds):
        for name, call in engines.items():
            begin = time.perf_counter()
            for _ in range(inner):
                call()
            best[name] = min(best[name], (time.perf_counter() - begin) / inner * 1e3)
    return best


def kernel_call(node, x, before, after, y, **more):
    """Return the kernel's object for a call."""
    return node.kernel_call(native.sequences(x), before, after, y, **more)


def steps():
    """Print a step next to a sum over the same state, which reads it once."""
    print("| width of a head | state | a step | reading the state | ratio |\n|---|---|---|---|---|")
    for width in WIDTHS:
        node = MLSTM(HEADS, width, width)
        x = np.random.default_rng(0).normal(size=(1, 1, node.core_size)).astype("f4")
        state, y = node.memory_in(np.dtype(np.float32)).zeros(1), np.empty((1, 1, node.units), np.float32)
        call, memory = kernel_call(node, x, state, state, y), torch.from_numpy(state.C)
        engines = {"step": lambda call=call: native.memory_forward(call, False, 1), "read": memory.sum}
        best = fastest(engines, 15, max(5, 2_000_000 // state.C.size))
        numbers = f"{best['step'] * 1e3:.1f} µs | {best['read'] * 1e3:.1f} µs | {best['step'] / best['read']:.2f}"
        print(f"| {width} | {state.C.nbytes >> 10} KB | {numbers} |", flush=True)


def streams():
    """Print a step of a stream of a layer next to sums over its weights and its state."""
    print("\n| units | weights and state | a step of a stream | reading them | ratio |\n|---|---|---|---|---|")
    for units in UNITS:
        net = cs.load(layers.MLSTM(units, heads=HEADS, input_size=units, return_sequences=True))
        stream, x = net.stream(), np.random.default_rng(0).normal(size=(1, units)).astype("f4")
        arrays = [net.nodes[0].kernel.copy(), *(np.array(part) for part in stream.state[0])]
        weights, state = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
        calls = {"step": lambda: stream.step(x), "weights": weights.sum, "state": state.sum}  # noqa: B023
        best = fastest(calls, 15, max(5, 10_000_000 // arrays[0].size))
        step, read = best["step"] * 1e3, (best["weights"] + best["state"]) * 1e3
        size = sum(array.nbytes for array in arrays) >> 10
        print(f"| {units} | {size} KB | {step:.1f} µs | {read:.1f} µs | {step / read:.2f} |", flush=True)


def sequences():
    """Print sequences next to the functions of xlstm (parallel) and of mlstm_kernels (in chunks)."""
    print("\n| B, T, width | forward | xlstm | mlstm_kernels | with backward | xlstm | mlstm_kernels |")
    print("|---|---|---|---|---|---|---|")
    for batch, count, width in SEQUENCES:
        node = MLSTM(HEADS, width, width)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(batch, count, node.core_size)).astype("f4")
        x[..., -HEADS:] += 3
        y, dy = (rng.normal(size=(batch, count, node.units)).astype("f4") for _ in range(2))
        dx, call = np.empty_like(x), kernel_call(node, x, (), (), y)
        row = native.score_row(width, width, count, False, False)  # as in training, backward reuses what forward keeps
        scores = np.empty((batch, HEADS, count, row), np.float32)
        trained = kernel_call(node, x, (), (), y, scores=scores if row else None, score_row=row)
        ends = np.cumsum([HEADS * width] * 3 + [HEADS])
        q, k, v, i, f = (
            torch.from_numpy(np.moveaxis(part.reshape(batch, count, HEADS, -1), 2, 1).copy())
            for part in np.split(x, ends, axis=-1)
        )
        parts = [part.requires_grad_() for part in (q, k, v, i, f)]
        upper = torch.from_numpy(np.moveaxis(dy.reshape(batch, count, HEADS, width), 2, 1).copy())

        def ours(call=call):
            native.memory_forward(call, False, 1)

        def ours_back(call=trained, dy=dy, dx=dx):
            native.memory_forward(call, False, 1)
            native.memory_backward(call, False, dy, (), dx, (), 1)

        theirs = {
            "xlstm": lambda p=parts: parallel(*p),
            "mlstm_kernels": lambda p=parts: chunkwise(p[0], p[1], p[2], p[3][..., 0], p[4][..., 0], chunk_size=CHUNK),
        }

        def without(run):
            with torch.no_grad():
                return run()

        ours_back()
        own = np.moveaxis(y.reshape(batch, count, HEADS, width), 2, 1)
        own_q = np.moveaxis(dx[..., : HEADS * width].reshape(batch, count, HEADS, width), 2, 1)
        for name, run in theirs.items():
            output = run()
            (gradient,) = torch.autograd.grad(output, parts[:1], upper)
            error = np.abs(output.detach().numpy() - own).max() / np.abs(own).max()
            error_q = np.abs(gradient.numpy() - own_q).max() / np.abs(own_q).max()
            if max(error, error_q) > 1e-3:
                raise AssertionError(f"{name}: outputs differ by {error:.1e}, gradients by {error_q:.1e}")
        forward = {"ours": ours} | {name: (lambda run=run: without(run)) for name, run in theirs.items()}
        back = {"ours": ours_back} | {
            name: (lambda run=run, p=parts, up=upper: torch.autograd.grad(run(), p, up)) for name, run in theirs.items()
        }
        found = [fastest(engines, 7) for engines in (forward, back)]
        cells = []
        for best in found:
            cells += [f"{best['ours']:.2f} ms", *(f"{best[name] / best['ours']:.1f}" for name in theirs)]
        print(f"| {batch}, {count}, {width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0]).parse_args()
    torch.set_num_threads(1)
    print(f"{native.isa()}, torch {torch.__version__}, one thread, float32, {HEADS} heads\n")
    steps()
    streams()
    sequences()

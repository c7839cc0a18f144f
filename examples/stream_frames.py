"""Run a network step by step, without torch: many steps, a state that can be saved, and the time per step.

python examples/stream_frames.py [MODEL.safetensors]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import cellstack as cs


def made_here(path):
    """Write a network with random weights: two LSTM cells and a head of three classes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

    specs = [cs.CellSpec(input_size=12, units=48), cs.CellSpec(input_size=48, units=48)]
    cells = [cs.nodes.Cell(spec, *(draw(*shape) for shape in spec.shapes.values())) for spec in specs]
    cs.Network([cs.nodes.Recurrent(tuple(cells)), cs.nodes.Dense(draw(48, 3), activation="softmax")]).save(path)


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "made-here.safetensors"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    else:
        made_here(path)
    net = cs.load(path)
if isinstance(net.nodes[-1], cs.nodes.GlobalPool):  # it pools over all steps, but a stream answers after each
    net = cs.Network(net.nodes[:-1], net.names[:-1], net.metadata)
print(net)
print(net.plan())

frames = np.random.default_rng(1).standard_normal((1, 1000, net.input_size)).astype(net.dtype)
stream = net.stream()
for t in range(3):
    print(f"frame {t}:", stream.step(frames[:, t])[0].round(3))

# The stream owns its state: it can be saved and restored, here or in another process.
kept = stream.state
other = net.stream()
other.state = kept
assert np.array_equal(other.step(frames[:, 3]), stream.step(frames[:, 3]))

stream.reset()
took = []
for t in range(frames.shape[1]):
    frame = np.ascontiguousarray(frames[:, t])
    start = time.perf_counter()
    y = stream.step(frame)
    took.append(time.perf_counter() - start)
print(f"a step takes {np.median(took) * 1e6:.1f} us (median of {len(took)})")

stream.reset()
chunks = [stream.run(frames[:, a:b]) for a, b in ((0, 1), (1, 17), (17, 1000))]
print("chunks and steps give bit-identical results:", np.array_equal(chunks[-1][:, -1], y))
print("torch was imported:", "torch" in sys.modules)

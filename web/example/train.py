"""Train the example's model on synthetic sound: is somebody whistling? About twenty seconds.

    python web/example/train.py web/example/whistle.safetensors

A whistle is one tone whose pitch moves slowly. The sounds contain noise, clicks and voices, with and without a whistle.
"""

import sys

import numpy as np
import torch

import cellstack as cs

RATE = 16_000
FRAME = 320  # samples: 20 ms
BANDS = 500.0 + 100.0 * np.arange(32)  # Hz: those of features.js
STEPS = 100


def features(sound: np.ndarray) -> np.ndarray:
    """Return the level of each band in each frame, relative to the frame's mean, `[T, 32]`: see features.js."""
    n = np.arange(FRAME)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * (n + 0.5) / FRAME)
    waves = window[:, None] * np.exp(-2j * np.pi * n[:, None] * BANDS / RATE)
    frames = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
    energy = np.abs(frames @ waves) ** 2
    levels = np.log10(energy + 1e-7)
    return (levels - levels.mean(axis=1, keepdims=True)).astype("f4")


def example(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of two seconds of sound, and for each frame whether there is a whistle."""
    count = STEPS * FRAME
    seconds = np.arange(count) / RATE
    sound = rng.normal(size=count)
    for _ in range(rng.integers(0, 3)):  # coloured noise
        sound = np.convolve(sound, rng.normal(size=8), "same")
    level = 10 ** rng.uniform(-3.5, -1.7)
    sound *= level / sound.std()
    for _ in range(rng.integers(0, 4)):  # clicks
        at = rng.integers(count - 200)
        sound[at : at + 200] += rng.normal(0, 10 ** rng.uniform(-2, -0.5), 200)
    if rng.random() < 0.3:  # a voice has many harmonics
        pitch, loudness = rng.uniform(100, 250), level * 10 ** rng.uniform(0, 2)
        for harmonic in range(1, 20):
            sound += loudness / harmonic * np.sin(2 * np.pi * harmonic * pitch * seconds + rng.uniform(0, 6))
    label = np.zeros(STEPS, "f4")
    if rng.random() < 0.7:
        start, length = rng.integers(0, STEPS - 20), rng.integers(15, 60)
        label[start : start + length] = 1
        pitch = rng.uniform(600, 3200) * 2 ** (0.1 * np.sin(2 * np.pi * rng.uniform(0.2, 4) * seconds))
        tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
        sound += level * 10 ** rng.uniform(0.2, 2.2) * tone * np.repeat(label, FRAME)
    return features(sound), label


def main(path: str) -> None:
    """Train, and write the network to `path`."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sounds, labels = (np.stack(part) for part in zip(*(example(rng) for _ in range(800)), strict=True))
    x, y = torch.from_numpy(sounds), torch.from_numpy(labels)[:, :, None]
    mean, scale = x.mean((0, 1)), x.std((0, 1))
    lstm = cs.layers.LSTM(24, return_sequences=True, input_size=24)
    model = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), lstm, torch.nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(12):
        losses = []
        for rows in torch.randperm(len(x)).split(30):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model((x[rows] - mean) / scale), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}")
    trained = cs.load(model)
    nodes = [cs.nodes.Standardise(mean.numpy(), scale.numpy()), *trained.nodes, cs.nodes.Activation("sigmoid")]
    cs.Network(nodes, metadata={"source": "web/example/train.py"}).save(path)


if __name__ == "__main__":
    main(sys.argv[1])

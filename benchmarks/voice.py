"""Voice detection for many calls in one process: `PipecatVAD` compared with pipecat's `SileroVADAnalyzer`.

    pip install pipecat-ai
    python benchmarks/voice.py [--streams 500] [--originals 50] [--seconds 10] [--frame 20] [--rate 16000] [--phases 20]

Each stream receives speech in real time, a frame every --frame milliseconds; the streams of a phase receive theirs at
once, and the phases follow each other evenly. The states of some streams are compared first. Every variant is a process
of its own: ours uses one core, the original as many as there are. "nothing" only sends the audio: its processor time is
subtracted. Latency is from the time at which the frame that completes a window was due to the answer in the caller, so
that a late process counts.
"""

import argparse
import asyncio
import logging
import os
import platform
import resource
import sys
import time
import warnings
from importlib.metadata import version
from multiprocessing import get_context

import numpy as np

WARM = 2.0  # seconds before the measured interval
COMPARED = 10  # streams


def speech(seconds, rate, seed=0):
    """A sound that Silero partly classifies as speech, from -1 to 1: a buzz with three formants, and pauses."""
    t = np.arange(int(seconds * rate)) / rate + seed
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * t)) / rate
    formants = (500 + 200 * np.sin(2 * np.pi * 1.3 * t), 1500 + 400 * np.sin(2 * np.pi * 0.9 * t), 2500 + 0 * t)
    sound = sum(
        np.sin(n * phase) / n * sum(np.exp(-(((n * 120 - formant) / 150) ** 2)) for formant in formants)
        for n in range(1, 30)
    )
    spoken = (np.sin(2 * np.pi * 0.35 * t) > 0) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    noise = 0.001 * np.random.default_rng(seed).standard_normal(len(t))
    return 0.3 * sound * spoken + noise


def frames_of(args, seed=0):
    samples = (32767 * speech(args.seconds + WARM + 1, args.rate, seed)).astype("<i2")
    count = args.rate * args.frame // 1000
    return [samples[at : at + count].tobytes() for at in range(0, len(samples) - count + 1, count)]


# ── the variants: each sends a stream a frame, and tells when a window is answered ────────────────────────────────────


class Pipecat:
    """A task per stream, which receives frames and calls the analyzer, as pipecat's processors do."""

    def __init__(self, name, args):
        if name == "nothing":
            self.analyzer = None
        elif name == "PipecatVAD":
            from cellstack.adapters.voice import PipecatVAD

            self.analyzer = PipecatVAD
        else:
            from pipecat.audio.vad.silero import SileroVADAnalyzer

            self.analyzer = SileroVADAnalyzer
        self.rate = args.rate

    def opened(self):
        if self.analyzer is None:
            return None
        analyzer = self.analyzer(sample_rate=self.rate)
        analyzer.set_sample_rate(self.rate)
        return analyzer

    def start(self, answered):
        """Return the function that sends a frame, and the stream's task."""
        queue, analyzer = asyncio.Queue(), self.opened()

        async def work():
            while (frame := await queue.get()) is not None:
                if analyzer is not None:
                    await analyzer.analyze_audio(frame)
                answered()
            if analyzer is not None:
                await analyzer.cleanup()

        return queue.put_nowait, asyncio.ensure_future(work())

    async def results(self, frames):
        analyzer = self.opened()
        found = [await analyzer.analyze_audio(frame) for frame in frames]
        await analyzer.cleanup()
        return found


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def compare(name, args):
    """Return what a variant answers to `COMPARED` streams."""

    async def run():
        variant = Pipecat(name, args)
        return await asyncio.gather(*(variant.results(frames_of(args, seed)) for seed in range(COMPARED)))

    return asyncio.run(run())


def load(name, streams, args):
    """Run streams in real time; return processor seconds per second of audio, latencies in seconds, and megabytes."""
    frames, period, size = frames_of(args), args.frame / 1000, 0.032

    async def run():
        variant, loop, latencies, counts = Pipecat(name, args), asyncio.get_running_loop(), [], [0] * streams
        phases = [n % args.phases * period / args.phases for n in range(streams)]

        def answered(n):
            number = counts[n]
            counts[n] += 1
            completes = int((number + 1) * period / size + 1e-9) > int(number * period / size + 1e-9)
            if completes and number * period > WARM:
                latencies.append(loop.time() - begun - phases[n] - number * period)

        begun = loop.time()
        started = [variant.start(lambda n=n: answered(n)) for n in range(streams)]
        begun, cpu, marked = loop.time() + 0.2, 0.0, 0.0
        for number, frame in enumerate(frames):
            for phase in range(args.phases):
                due = begun + number * period + phase * period / args.phases
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                elif phase % 8 == 0:
                    await asyncio.sleep(0)
                for send, _ in started[phase :: args.phases]:
                    send(frame)
            if not marked and number * period >= WARM:
                cpu, marked = time.process_time(), number * period
        cpu, seconds = time.process_time() - cpu, len(frames) * period - marked
        late = loop.time() - begun - len(frames) * period
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        for send, _ in started:
            send(None)
        await asyncio.gather(*(task for _, task in started))
        return cpu / seconds / streams, latencies, memory, late

    return asyncio.run(run())


def in_process(function, name, *args):
    cores = os.sched_getaffinity(0)
    if name != "SileroVADAnalyzer":
        os.sched_setaffinity(0, {max(cores)})  # before NumPy is loaded, which starts a thread per core
    try:
        with get_context("spawn").Pool(1, quiet) as pool:
            return pool.apply(function, (name, *args))
    finally:
        os.sched_setaffinity(0, cores)


def quiet():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["LOGURU_LEVEL"] = "ERROR"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--originals", type=int, default=50, help="streams of the original; 0: leave it out")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--frame", type=int, default=20, help="milliseconds")
    parser.add_argument("--rate", type=int, default=16000, help="of the audio: 8000 or 16000")
    parser.add_argument("--phases", type=int, default=20, help="1: all streams at once")
    args = parser.parse_args()
    packages = ("cellstack", "pipecat-ai", "onnxruntime", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in packages), "on", platform.processor() or platform.machine())
    print(f"frames of {args.frame} ms at {args.rate} Hz, {args.phases} phases, {args.seconds:g} s", flush=True)
    ours, original = "PipecatVAD", "SileroVADAnalyzer"
    if args.originals:
        expected, found = (in_process(compare, name, args) for name in (original, ours))
        if found != expected:
            sys.exit(f"{ours}: the results differ from those of {original}")
        kinds_found = len({one for stream in found for one in stream})
        print(f"{ours}: {COMPARED} streams have the results of {original}, of {kinds_found} kinds")
    runs = [("nothing", args.streams), (ours, args.streams)]
    runs += [("nothing", args.originals), (original, args.originals)] if args.originals else []
    sender = 0.0
    for name, streams in runs:
        cost, latencies, memory, late = in_process(load, name, streams, args)
        sender = cost if name == "nothing" else sender
        line = f"{name:<18}{streams:>5} streams {100 * cost * streams:>7.1f} % of a core, {1e3 * cost:>6.3f} ms per "
        line += f"stream-second, {1e3 * (cost - sender):>6.3f} without the sender; {memory:.0f} MB"
        if name != "nothing":
            middle, most = np.percentile(latencies, [50, 99]) * 1e3
            line += f"; latency {middle:.1f} ms, 99th percentile {most:.1f} ms; at the end {1e3 * late:.0f} ms late"
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""Existing programs, before and after the one or two lines of docs/recipes.md.

    python benchmarks/recipes.py ppo [--learn SEEDS]   pip install sb3-contrib
    python benchmarks/recipes.py stanza                pip install stanza
    python benchmarks/recipes.py kokoro                pip install --no-deps kokoro; pip install transformers
    python benchmarks/recipes.py hydrology             pip install neuralhydrology
    python benchmarks/recipes.py silero                pip install silero-vad onnxruntime onnx

One thread. The results of both variants are compared first; then they run in turn, and the result is the processor time
of the fastest of --rounds. Where a package downloads its weights, they are random here: architecture and sizes are the
package's.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import logging
import sys
import time
from importlib.metadata import version
from importlib.resources import files

import numpy as np
import torch
from voice import speech

import cellstack as cs
from cellstack_bench.turns import alternate

WORDS = ("the", "of", "Berlin", "and", "Anna", "to", "in", "is", "Danube", "was", "for", "with", "Acme", "not", "from")


def show_versions(packages):
    names = ", ".join(f"{name} {version(name)}" for name in ("cellstack", "torch", *packages))
    print(f"{names}; {torch.get_num_threads()} thread", flush=True)


def turns(title, runs, rounds):
    """Time two variants in turn and print both with their ratio."""
    (before, slow), (after, fast) = ((n, low) for n, (low, _) in alternate(runs, rounds, time.process_time).items())
    print(f"{title:<44}{before} {slow:>9.3f}   {after} {fast:>9.3f} ms   {slow / fast:.2f} times", flush=True)


def agree(what, pairs, within=1e-10, dtype="float64"):
    """Print the difference between both variants' results, and stop if it exceeds rounding."""
    pairs = list(pairs)
    largest = max(float(a.abs().max()) for a, _ in pairs)
    far = max(float((a - b).abs().max()) for a, b in pairs) / largest
    print(f"  {what}, in {dtype}, differ by {far:.1e} relative to the largest", flush=True)
    if not far < within:
        raise SystemExit(f"{what}: expected a difference below {within}")


@contextlib.contextmanager
def float64():
    """Create new tensors in float64, where two orders of summation differ by 1e-16 rather than 1e-7."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def as_default(tensor):
    return tensor.to(torch.get_default_dtype())


# ── sb3-contrib's RecurrentPPO ────────────────────────────────────────────────────────────────────────────────────────


def without_velocities(envs, **settings):
    """Return a RecurrentPPO on CartPole with only the positions observed: it must remember the velocities."""
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    class Positions(gymnasium.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            low, high = (edge[[0, 2]] for edge in (env.observation_space.low, env.observation_space.high))
            self.observation_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

        def observation(self, observation):
            return observation[[0, 2]]

    env = make_vec_env("CartPole-v1", envs, seed=settings["seed"], wrapper_class=Positions)
    return RecurrentPPO("MlpLstmPolicy", env, device="cpu", **settings)


def ppo(rounds, seeds):
    from cellstack.adapters import sb3_contrib

    show_versions(["sb3-contrib", "stable-baselines3", "gymnasium"])
    ways = {"sb3": sb3_contrib.restore, "cellstack": sb3_contrib.accelerate}
    for envs in (1, 8):
        model = without_velocities(envs, seed=0)
        _, callback = model._setup_learn(total_timesteps=10**9)
        collect = lambda model=model, callback=callback: model.collect_rollouts(  # noqa: E731
            model.env, callback, model.rollout_buffer, model.n_steps
        )
        collect()
        batch = next(iter(model.rollout_buffer.get(128)))
        actions = batch.actions.long().flatten()
        found = []
        for way in ways.values():
            way(model)
            model.policy.zero_grad()
            values, logs, _ = model.policy.evaluate_actions(
                batch.observations, actions, batch.lstm_states, batch.episode_starts
            )
            (values.square().mean() + logs.mean()).backward()
            found.append([values, logs, *(p.grad.clone() for p in model.policy.parameters())])
        print(f"{envs} environments, {int(batch.episode_starts.sum())} episode starts in {len(actions)} steps")
        agree("values, log-probabilities and gradients", zip(*found, strict=True), 1e-5, "float32")
        before = copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))

        def train(way, model=model, before=before):
            way(model)
            model.policy.load_state_dict(before[0])
            model.policy.optimizer.load_state_dict(copy.deepcopy(before[1]))
            model.set_random_seed(0)  # the buffer is split at random
            model.train()

        turns("  train()", {name: lambda way=way: train(way) for name, way in ways.items()}, rounds)
        model.policy.load_state_dict(before[0])
        runs = {name: lambda way=way: (way(model), collect()) for name, way in ways.items()}  # noqa: B023
        turns(f"  collect_rollouts(), {envs * model.n_steps} steps", runs, 4 * rounds)
    if seeds:
        learn(ways, seeds)


def learn(ways, seeds):
    from stable_baselines3.common.callbacks import BaseCallback

    class Returns(BaseCallback):
        def __init__(self):
            super().__init__()
            self.course = {}

        def _on_rollout_end(self):
            self.course[self.num_timesteps] = np.mean([one["r"] for one in self.model.ep_info_buffer])

        def _on_step(self):
            return True

    settings = {"n_epochs": 4, "batch_size": 256, "learning_rate": 3e-3, "policy_kwargs": {"lstm_hidden_size": 32}}
    print("CartPole without velocities, 8 environments, 32 units: mean return of the last 100 episodes", flush=True)
    courses, taken = {name: [] for name in ways}, {name: [] for name in ways}
    for seed in range(seeds):
        for name, way in ways.items():
            model, returns = way(without_velocities(8, seed=seed, **settings)), Returns()
            start = time.process_time()
            model.learn(25_600, callback=returns)
            taken[name].append(time.process_time() - start)
            courses[name].append(returns.course)
            last = list(returns.course.values())[-1]
            print(f"  seed {seed}, {name:<10} {taken[name][-1]:6.1f} s, at the end {last:.0f}", flush=True)
    for name in ways:
        print(f"  {name}: {np.mean(taken[name]):.1f} s of processor time per run; mean return ± standard error after")
        for at in list(courses[name][0])[4::5]:
            course = np.array([one[at] for one in courses[name]])
            error = course.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
            print(f"    {at:>6} steps {course.mean():6.1f} ± {error:.1f}")


# ── packed sequences: stanza's tagger of names, kokoro's prosody ──────────────────────────────────────────────────────


def stanza(rounds, _):
    from stanza.models.common.doc import Document
    from stanza.models.ner.data import DataLoader
    from stanza.models.ner.model import NERTagger
    from stanza.models.ner_tagger import build_argparse

    show_versions(["stanza"])
    logging.getLogger("stanza").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    tag = lambda word: "S-PER" if word.istitle() else "O"  # noqa: E731
    sentences = [list(rng.choice(WORDS, size)) for size in rng.integers(5, 50, 32)]
    document = Document([[{"id": n, "text": w, "ner": tag(w)} for n, w in enumerate(s, 1)] for s in sentences])
    settings = {**vars(build_argparse().parse_args([])), "shorthand": "en_none", "word_emb_dim": 100}
    batches = DataLoader(document, 32, settings)
    (
        words,
        chars,
        chars_mask,
        all_chars,
        tags,
        _,
        word_order,
        char_order,
        lengths,
        word_lengths,
        char_lengths,
        offsets,
    ) = batches[0]
    given = (
        words,
        chars,
        chars_mask,
        tags,
        word_order,
        lengths,
        word_lengths,
        all_chars,
        offsets,
        char_lengths,
        char_order,
    )
    print(f"NERTagger, 32 sentences of {min(lengths)} to {max(lengths)} words, {len(word_lengths)} words as letters")
    packed(lambda: NERTagger(settings, batches.vocab), lambda model: model(*given)[:2], rounds)


def kokoro(rounds, _):
    spec = importlib.util.find_spec("kokoro")
    if spec is None:
        raise SystemExit("kokoro isn't installed: pip install --no-deps kokoro")
    # Its modules without its __init__, which imports the phonemiser.
    sys.modules["kokoro"] = importlib.util.module_from_spec(
        importlib.machinery.ModuleSpec("kokoro", None, is_package=True)
    )
    sys.modules["kokoro"].__path__ = list(spec.submodule_search_locations)
    modules = importlib.import_module("kokoro.modules")
    show_versions(["kokoro"])

    class Front(torch.nn.Module):
        """kokoro's computation on a text before its decoder, with the sizes of Kokoro-82M."""

        def __init__(self):
            super().__init__()
            self.predictor = modules.ProsodyPredictor(style_dim=128, d_hid=512, nlayers=3, max_dur=50, dropout=0.2)
            self.text_encoder = modules.TextEncoder(channels=512, kernel_size=5, depth=3, n_symbols=178)

        def forward(self, ids, features, style, lengths, mask):
            d = self.predictor.text_encoder(features, style, lengths, mask)
            durations = self.predictor.duration_proj(self.predictor.lstm(d)[0])
            return (
                durations,
                self.text_encoder(ids, lengths, mask),
                self.predictor.F0Ntrain(d.transpose(1, 2), style)[0],
            )

    for rows, longest in ((1, 120), (8, 120)):
        torch.manual_seed(0)
        lengths = torch.linspace(longest, longest / 4, rows).round().long()
        mask = torch.arange(longest) >= lengths[:, None]
        ids, style = torch.randint(1, 178, (rows, longest)), torch.randn(rows, 128)
        features = torch.randn(rows, 512, longest)
        print(f"kokoro's text encoder and prosody, {rows} texts of {int(lengths.min())} to {longest} phonemes")
        run = lambda model: model(ids, as_default(features), as_default(style), lengths, mask)  # noqa: B023, E731
        packed(Front, run, rounds)


def packed(make, run, rounds):
    """Compare outputs and gradients of a model and its accelerated copy, and time both, in training and inference."""

    def trained(model):
        model.train()
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        total = sum(one.square().mean() for one in tensors_of(run(model)))
        total.backward()
        return [total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    @torch.no_grad()
    def inferred(model):
        model.eval()
        return tensors_of(run(model))

    def both():
        before, after = (torch.manual_seed(0) and make() for _ in range(2))
        return before, cs.accelerate(after)

    with float64():
        before, after = both()
        agree("outputs", zip(inferred(before), inferred(after), strict=True))
        agree("loss and gradients", zip(trained(before), trained(after), strict=True))
    before, after = both()
    print(cs.plan(after))
    for what, way in (("inference", inferred), ("forward and backward", trained)):
        turns(f"  {what}", {"torch": lambda way=way: way(before), "cellstack": lambda way=way: way(after)}, rounds)


def tensors_of(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for one in results for tensor in tensors_of(one)]


# ── NeuralHydrology ───────────────────────────────────────────────────────────────────────────────────────────────────


def hydrology(rounds, _):
    from neuralhydrology.modelzoo.cudalstm import CudaLSTM
    from neuralhydrology.modelzoo.customlstm import CustomLSTM
    from neuralhydrology.utils.config import Config

    show_versions(["neuralhydrology"])
    for rows, steps, units in ((32, 365, 20), (32, 365, 64)):
        settings = {
            "model": "customlstm",
            "dynamic_inputs": ["prcp", "srad", "tmax", "tmin", "vp"],
            "static_attributes": [f"attribute_{n}" for n in range(27)],
            "hidden_size": units,
            "initial_forget_bias": 3,
            "output_dropout": 0.4,
            "head": "regression",
            "output_activation": "linear",
            "target_variables": ["QObs"],
            "seq_length": steps,
        }
        generator = torch.Generator().manual_seed(0)
        daily = {name: torch.randn(rows, steps, 1, generator=generator) for name in settings["dynamic_inputs"]}
        fixed = torch.randn(rows, 27, generator=generator)

        def inputs(daily=daily, fixed=fixed):
            return {"x_d": {name: as_default(days) for name, days in daily.items()}, "x_s": as_default(fixed)}

        @torch.no_grad()
        def inferred(model, inputs=inputs):
            return model(inputs())

        def trained(model, inputs=inputs):
            model.zero_grad()
            model(inputs())["y_hat"][:, -1].square().mean().backward()
            return [p.grad for p in model.parameters()]

        def made(kind, settings=settings):
            return torch.manual_seed(0) and kind(Config(settings)).eval()

        print(f"{rows} rows of {steps} days, {units} units")
        with float64():
            before, after = made(CudaLSTM), cs.accelerate(made(CudaLSTM))
            one, other = inferred(before), inferred(after)
            agree(", ".join(one), ((one[name], other[name]) for name in one))
            agree("gradients", zip(trained(before), trained(after), strict=True))
        before, after, custom = made(CudaLSTM), cs.accelerate(made(CudaLSTM)), made(CustomLSTM)
        custom.copy_weights(before)
        for what, way in (("inference", inferred), ("forward and backward", trained)):
            runs = {"before": lambda way=way: way(before), "after": lambda way=way: way(after)}  # noqa: B023
            turns(f"  CudaLSTM, {what}", runs, rounds)

        @torch.no_grad()
        def active(model=after, inputs=inputs):
            y, _, (gates,) = model.lstm(model.embedding_net(inputs()), return_gates=True)
            return model.head(y.transpose(0, 1)), gates

        runs = {"CustomLSTM": lambda: inferred(custom), "CudaLSTM": active}  # noqa: B023
        turns("  gates, inference", runs, rounds)


# ── Silero VAD ────────────────────────────────────────────────────────────────────────────────────────────────────────


def silero(rounds, _):
    from silero_vad import load_silero_vad

    show_versions(["silero-vad", "onnxruntime"])
    sound = speech(20, 16000).astype(np.float32)
    frames = sound[: len(sound) // 512 * 512].reshape(-1, 1, 512)
    as_tensors = torch.from_numpy(frames[:, 0])
    path = files("silero_vad.data") / "silero_vad.onnx"
    net = cs.load(path, constants={"sr": 16000}, frames={"input": 512}, context={"input": 64})
    print(net)
    jit, onnx, sequence = load_silero_vad(), load_silero_vad(onnx=True), load_silero_vad(sequence=True)
    stream, pool = net.stream(), net.pool(64)
    sessions = [pool.open() for _ in range(64)]
    many = np.repeat(frames, 64, axis=1)  # [T, 64, 512]
    many_tensors = torch.from_numpy(many)

    @torch.no_grad()
    def theirs(model, frames):
        model.reset_states()
        return np.array([model(frame, 16000).numpy().ravel() for frame in frames])

    def ours():
        stream.reset()
        return np.array([stream.step(frame)[0] for frame in frames])

    ways = {
        "frame by frame": ({"JIT": lambda: theirs(jit, as_tensors), "ONNX": lambda: theirs(onnx, as_tensors)}, ours),
        "64 streams, one frame each": (
            {"ONNX": lambda: theirs(onnx, many_tensors)},
            lambda: np.array([pool.step(sessions, frame)[:, 0] for frame in many]),
        ),
        "a recording at once": (
            {"ONNX, a file for sequences": lambda: sequence.audio_forward(frames.ravel())[:, None]},
            lambda: net(frames[:, 0][None])[0],
        ),
    }
    for what, (packages, way) in ways.items():
        found = way()
        for name, package in packages.items():
            far = float(np.abs(package() - found).max())
            print(
                f"{what}: probabilities, {found.min():.3f} to {found.max():.3f}, differ by {far:.1e} from those of "
                f"{name}"
            )
            if not far < 1e-5:
                raise SystemExit("expected a difference below 1e-5")
        figures = alternate({**packages, "cellstack": way}, rounds, time.process_time)
        for name, (low, _) in figures.items():
            ratio = low / figures["cellstack"][0]
            print(f"  {name:<32}{low / found.size * 1e3:>9.1f} us per frame   {ratio:.2f} times", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["ppo", "stanza", "kokoro", "hydrology", "silero"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--learn", type=int, default=0, metavar="SEEDS", help="for ppo: learning curves of this many seeds"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    globals()[args.recipe](args.rounds, args.learn)


if __name__ == "__main__":
    main()

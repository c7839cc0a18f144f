"""Files of an earlier version load and give the same outputs (tests/fixtures/README.md)."""

from pathlib import Path

import numpy as np
import pytest

import cellstack as cs
from cellstack import _kernel
from cellstack.formats.state import load_state

FOLDER = Path(__file__).parents[1] / "fixtures" / "0.1.0"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
STREAMS = sorted(path.stem for path in FOLDER.glob("*.state"))


@pytest.fixture(scope="module")
def answers():
    with np.load(FOLDER / "answers.npz") as file:
        return dict(file)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512vnni"])
def isa(request):
    """An instruction set, used during a test."""
    if request.param not in _kernel.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = _kernel.isa()
    _kernel.set_isa(request.param)
    yield request.param
    _kernel.set_isa(before)


def given(answers, name):
    inputs = {key.split("/")[2]: value for key, value in answers.items() if key.startswith(f"x/{name}/")}
    flags = {key: answers[f"{key}/{name}"] for key in ("mask", "reset") if f"{key}/{name}" in answers}
    return (inputs if len(inputs) > 1 else next(iter(inputs.values()))), flags


def check(got, want):
    """Sums over x and h were computed in one chain then, and in two now; NumPy's BLAS uses another order anyway."""
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_networks(name, isa, answers):
    net = cs.load(FOLDER / f"{name}.safetensors")
    x, flags = given(answers, name)
    y, state = net.run(x, **flags)
    for number, one in enumerate(y if isinstance(y, tuple) else (y,)):
        check(one, answers[f"{isa}/{name}/y{number}"])
    wanted = [key for key in answers if key.startswith(f"{isa}/{name}/state")]
    assert wanted == [f"{isa}/{name}/state{n}/{key}" for n, one in enumerate(state) for key in one._fields]
    for key in wanted:
        number, part = key.split("/")[2:]
        check(getattr(state[int(number.removeprefix("state"))], part), answers[key])


@pytest.mark.parametrize("name", STREAMS)
def test_states_of_streams(name, isa, answers):
    net = cs.load(FOLDER / f"{name}.safetensors")
    x, _ = given(answers, name)
    stream = net.stream(batch=len(x))
    stream.run(x[:, :4])
    now = stream.state
    kept = load_state(FOLDER / f"{name}.state", stream)  # written on AVX2
    for ours, theirs in zip(now, kept, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if isa == "avx2":
                check(one, other)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    check(stream.run(x[:, 4:]), answers[f"{isa}/{name}/after"])
    if isa == "avx2":
        stream.state = kept
        check(stream.run(x[:, 4:]), answers[f"{isa}/{name}/after"])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_reduced_precision_streams(weights, isa, answers):
    x, _ = given(answers, "gru_rnn")
    stream = cs.load(FOLDER / "gru_rnn.safetensors").stream(batch=len(x), weights=weights)
    # 0.1.0 rounded no x and h for matrices of bfloat16, and no dense layers
    np.testing.assert_allclose(stream.run(x), answers[f"{isa}/gru_rnn/{weights}"], rtol=0, atol=5e-3)

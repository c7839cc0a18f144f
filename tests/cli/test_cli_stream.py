"""`cellstack stream`: an immediate output for every step, and a state that is saved however it ends."""

import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from networks import make_cell

from cellstack import FormatError, Network
from cellstack.cli import main as cli
from cellstack.formats.lines import Lines
from cellstack.formats.state import load_state, save_state
from cellstack.nodes import Bidirectional, Conv1D, Dense, Embedding, GlobalPool, Merge, Recurrent, Standardise

COMMAND = [sys.executable, "-W", "error", "-m", "cellstack", "stream"]
PATIENCE = 20.0  # seconds that a test waits for immediate output


def make_net(dtype="float32", kinds=("lstm", "gru"), outputs=2):
    rng = np.random.default_rng(0)
    cells = tuple(make_cell(rng, 3 if n == 0 else 5, 5, dtype, kind=kind) for n, kind in enumerate(kinds))
    standardise = Standardise(rng.normal(size=3).astype(dtype), rng.uniform(1, 2, size=3).astype(dtype))
    return Network([standardise, Recurrent(cells), Dense(rng.normal(size=(5, outputs)).astype(dtype))])


@pytest.fixture(scope="module")
def net():
    return make_net()


@pytest.fixture(scope="module")
def model(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "net.safetensors"
    net.save(path)
    return str(path)


def frames(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype("float32")


def as_csv(x):
    return "".join(",".join(repr(float(value)) for value in frame) + "\n" for frame in x)


def as_json(x):
    return "".join(json.dumps(frame.tolist()) + "\n" for frame in x)


def answers(net, x):
    stream = net.stream()
    return np.concatenate([stream.step(frame[None]) for frame in x])


def numbers(text, dtype="float32"):
    return np.array([[float(value) for value in line.strip("[]").split(",")] for line in text.splitlines()], dtype)


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the command in this process: `run(words, text)` returns what a process would have returned."""

    def run(words, text):
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = cli.main(["stream", *words])
        return subprocess.CompletedProcess(words, status, *capfd.readouterr())

    return run


class Running:
    """A running command, used a line at a time."""

    def __init__(self, *words):
        self.process = subprocess.Popen([*COMMAND, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, bufsize=0)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def ask(self, text):
        self.process.stdin.write(text.encode())
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, "no answer"
        return self.process.stdout.readline().decode()

    def end(self):
        status = self.process.wait(PATIENCE)
        return status, self.process.stderr.read().decode()


# ── lines ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("written", [as_csv, as_json])
def test_outputs_equal_the_stream_s_bit_for_bit(run, tmp_path, dtype, written):
    net = make_net(dtype)
    net.save(tmp_path / "net.safetensors")
    x = frames(20)
    done = run([str(tmp_path / "net")], written(x))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[") == (written is as_json)
    assert np.array_equal(numbers(done.stdout, dtype), answers(net, x.astype(dtype)))


def test_forms_of_input_and_output(run, model, net):
    x = frames(3)
    expected = answers(net, x)
    for words, text in (
        ([], "a,b,c\n" + as_csv(x)),
        ([], "\n  \n" + as_csv(x).replace("\n", "\r\n\n")),
        ([], "\ufeff" + as_csv(x).rstrip("\n")),
        (["--format", "csv"], as_csv(x)),
        (["--format", "json"], as_json(x)),
    ):
        done = run([model, *words], text)
        assert (done.returncode, done.stderr) == (0, "")
        assert np.array_equal(numbers(done.stdout), expected)
    done = run([model, "--json"], as_csv(x))
    assert np.array_equal(np.array([json.loads(line) for line in done.stdout.splitlines()], "f4"), expected)
    assert run([model], "").stdout == ""


def test_numbers_beyond_float32_are_infinite(run, model, net):
    done = run([model], "1e300,2,3\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert np.array_equal(numbers(done.stdout), net.stream().step(np.array([[np.inf, 2, 3]], "f4")))


def test_closed_standard_input_and_output(model):
    for closing, name in (("<&-", "input"), (">&-", "output")):
        command = f"{shlex.join([*COMMAND, str(model)])} {closing}"
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"expected standard {name} to be open" in done.stderr


@pytest.mark.parametrize(
    "first", ["1;2;3", "1\t2\t3", "1 2 3", '"1","2","3"', "'1','2','3'", "1_0,2_0,3_0", "a,b,2", "a,b", "a;b;c"]
)
def test_a_first_line_that_isn_t_a_header_is_refused(run, model, first):
    done = run([model], f"{first}\n1,2,3\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    counted = first in ("a,b", "a;b;c")
    expected = "3 numbers, or 3 names, found " + str(len(first.split(","))) if counted else "numbers, found "
    assert f"standard input, line 1: expected {expected}" in done.stderr


def test_a_header_is_skipped(run, model, net):
    x = frames(2)
    for first in ("a,b,c", '"a","b b","c"', "sensor 1,sensor 2,t [s]", "x_1,x_2,"):
        assert np.array_equal(numbers(run([model], f"{first}\n{as_csv(x)}").stdout), answers(net, x))


@pytest.mark.parametrize("text", ["", "\n\n", "a,b,c\n"])
def test_input_without_steps_is_reported(run, model, text):
    done = run([model], text)
    said = "0 steps: standard input was empty, or had only a header line\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


def test_a_state_that_isn_t_finite_is_reported(run, model, tmp_path):
    state = str(tmp_path / "state")
    said = run([model, "--state", state], "1,2,3\n").stderr
    assert said == f"1 steps, state in {state}\n"
    said = run([model, "--state", state], "1,nan,2\n").stderr
    assert said == f"1 steps, state in {state}; the state is no longer finite: a step contained nan or inf\n"
    said = run([model, "--state", state], "1,2,3\n").stderr
    assert said.endswith("tensor 'cell_0/h': expected finite numbers, found NaN or infinity\n")
    assert run([model], "1,nan,2\n1,2,3\n").stderr.startswith("2 steps; the state is no longer finite: ")


def test_a_model_with_mean_pooling_says_how_to_train_one_that_streams(run, tmp_path):
    path = str(tmp_path / "mean.safetensors")
    for task, fix in (
        ("classify", "; train with --pooling last for a network that can be streamed\n"),
        (None, "which a stream doesn't have; it runs whole sequences only: net(x), cellstack run\n"),
    ):
        Network([make_net().nodes[1], GlobalPool("mean")], metadata={"task": task}).save(path)
        done = run([path], "1,2,3\n")
        assert (done.returncode, done.stderr.endswith(fix)) == (2, True)


def test_nan_and_infinity_are_null_in_json(run, model):
    assert run([model], "1,nan,2\n").stdout == "nan,nan\n"
    assert run([model, "--json"], "1,2,3\n1,nan,3\n").stdout.splitlines()[1] == "[null,null]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n1,2\n", r"line 2: expected 3 numbers, found 2"),
        ("1,2,3\n\n1,2,3,4\n", r"line 3: expected 3 numbers, found 4"),
        ("a,b,c\nd,e,f\n", r"line 2: expected numbers, found 'd'"),
        ("1,x,3\n", r"line 1: expected numbers, found 'x'"),
        ("1,2,3\n1,1_0,3\n", r"line 2: expected numbers, found '1_0'"),
        ("1,2,3\n1,,3\n", r"line 2: expected numbers, found ''"),
        ("[1,2,3]\n1,2,3\n", r"line 2: expected numbers, found Extra data"),
        ("[1,2,true]\n", r"line 1: expected numbers, found true"),
        ('[1,2,"3"]\n', r'line 1: expected numbers, found "3"'),
        ("[1,2,null]\n", r"line 1: expected numbers, found null"),
        ("[1,2,[3]]\n", r"line 1: expected numbers, found \[3\]"),
        ('{"x": 1}\n', r'line 1: expected numbers, found {"x": 1}'),
        ("[1,2,NaN]\n", r"line 1: expected numbers, found NaN, which isn't JSON"),
        ("[1,2," + "9" * 400 + "]\n", r"line 1: expected numbers, found int too large"),
        (
            "[" * 1200 + "\n",
            r"line 1: expected numbers, found maximum recursion|line 1: expected numbers, found Expect",
        ),
        ("1" * 5000, r"line 1: the line is longer than 1216 bytes"),
        ("1,2,3\n\x00\n", r"line 2: expected numbers, found '\\x00'"),
        ("7\n", r"line 1: expected 3 numbers, found 1"),
    ],
)
def test_an_invalid_line_is_named(model, tmp_path, monkeypatch, capfd, text, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    state = tmp_path / "state"
    status = cli.main(["stream", model, "--state", str(state)])
    out, err = capfd.readouterr()
    assert status == 2
    assert err.count("\n") == 1
    assert re.search(r"^cellstack stream: error: standard input, " + message, err), err
    assert len(out.splitlines()) == len([line for line in text.splitlines()[:-1] if re.match(r"[\[\d]", line)])
    assert state.exists()


def test_a_step_of_one_number():
    lines = Lines("here", 1)
    assert lines.frame(b"[1]") == lines.frame(b"1.0") == [1.0]
    assert lines.text([2.0]) == b"[2]\n"
    assert Lines("here", 1, "csv", 17).text([0.1]) == b"0.10000000000000001\n"


# ── latency ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_step_is_answered_before_the_next_arrives(model, net):
    x = frames(200)
    expected, took = answers(net, x), []
    with Running(model) as running:
        for line, y in zip(as_csv(x).splitlines(True), expected, strict=True):
            start = time.perf_counter()
            answer = running.ask(line)
            took.append(time.perf_counter() - start)
            assert np.array_equal(numbers(answer)[0], y)
        running.process.stdin.close()
        assert running.end() == (0, "")
    print(f"there and back: {1e6 * np.median(took):.0f} µs, at least {1e6 * min(took):.0f}")
    assert min(took) < 0.01  # without polling; the other steps may wait for other processes


def test_an_incomplete_line_is_waited_for(model, net):
    x = frames(2)
    one, other = as_csv(x).splitlines(True)
    with Running(model) as running:
        assert running.ask(one)
        running.process.stdin.write(other[:5].encode())
        assert not select.select([running.process.stdout], [], [], 0.2)[0]
        assert np.array_equal(numbers(running.ask(other[5:]))[0], answers(net, x)[1])


# ── the state ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_state_is_continued(run, model, net, tmp_path):
    x, state = frames(30), str(tmp_path / "state.safetensors")
    expected, got = answers(net, x), []
    for part in (x[:10], x[10:11], x[11:11], x[11:]):
        done = run([model, "--state", state], as_csv(part))
        assert done.returncode == 0
        assert done.stderr == f"{len(part)} steps, state in {state}\n"
        got.append(numbers(done.stdout).reshape(-1, 2))
    assert np.array_equal(np.concatenate(got), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    stream = net.stream()
    stream.run(x[None])
    for one, other in zip(load_state(state, net.stream()), stream.state, strict=True):
        assert type(one) is type(other)
        assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_it_and_the_state_is_saved(run, model, net, tmp_path, number, status):
    x, state = frames(6), str(tmp_path / "state")
    expected = answers(net, x)
    with Running(model, "--state", state) as running:
        for line, y in zip(as_csv(x[:4]).splitlines(True), expected, strict=False):
            assert np.array_equal(numbers(running.ask(line))[0], y)
        running.process.send_signal(number)
        assert running.end() == (status, f"4 steps, stopped by {number.name}, state in {state}\n")
    done = run([model, "--state", state], as_csv(x[4:]))
    assert np.array_equal(numbers(done.stdout), expected[4:])


@pytest.mark.long
def test_repeated_signals_leave_a_state_between_two_steps(model, net, tmp_path):
    x, state = frames(400), str(tmp_path / "state")
    expected = answers(net, x)
    at = 0
    for turn in range(0, 6, 2):
        with Running(model, "--state", state) as running:
            running.process.stdin.write(as_csv(x[at : at + 5]).encode())
            got = [running.process.stdout.readline() for _ in range(5)]
            running.process.stdin.write(as_csv(x[at + 5 : at + 50]).encode())
            time.sleep(0.0003 * turn)
            for _ in range(3):
                running.process.send_signal(signal.SIGTERM)
            status, said = running.end()
            got += running.process.stdout.readlines()
        assert status == 143
        taken = int(re.match(r"(\d+) steps, stopped by SIGTERM", said)[1])
        assert taken == len(got)
        assert np.array_equal(numbers(b"".join(got).decode()), expected[at : at + taken])
        at += taken


def test_a_reader_that_closes_the_pipe(model, net, tmp_path):
    x, state = frames(5000), str(tmp_path / "state")
    with Running(model, "--state", state) as running:
        assert running.ask(as_csv(x[:1]))
        running.process.stdout.close()
        with suppress(BrokenPipeError):
            running.process.stdin.write(as_csv(x[1:]).encode())
        status, said = running.end()
    assert status == 0
    taken = int(re.fullmatch(r"(\d+) steps, state in .*\n", said)[1])
    stream = net.stream()
    stream.run(x[None, :taken])
    assert all(map(np.array_equal, load_state(state, net.stream())[0], stream.state[0]))


@pytest.mark.long
def test_a_reader_that_doesn_t_read_delays_the_end_only_briefly(model, net, tmp_path):
    state = tmp_path / "state"
    with Running(model, "--state", str(state)) as running:
        assert running.ask(as_csv(frames(1)))  # it has started
        os.set_blocking(running.process.stdin.fileno(), False)
        text, until = as_csv(frames(20000)).encode(), time.monotonic() + PATIENCE
        while time.monotonic() < until:  # until both pipes are full
            if not select.select([], [running.process.stdin], [], 0.5)[1]:
                break
            text = text[running.process.stdin.write(text) :] or text
        running.process.send_signal(signal.SIGTERM)
        status, said = running.end()
    assert status == 143
    assert "stopped by SIGTERM" in said
    assert state.exists()


@pytest.mark.long
def test_a_state_that_can_t_be_written_is_reported_before_the_first_step(model, tmp_path):
    (tmp_path / "folder").mkdir()
    for state, message in (("nowhere/state", "there is no folder"), ("folder", "it exists and isn't a regular file")):
        with Running(model, "--state", str(tmp_path / state)) as running:  # no step is sent
            status, said = running.end()
        assert (status, said.count("\n")) == (2, 1)
        assert f"{state}: {message}" in said


def test_states_that_don_t_fit(model, net, tmp_path, capfd, monkeypatch):
    state = tmp_path / "state"

    def refused(pattern):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1,2,3\n")))
        before = state.read_bytes()
        assert cli.main(["stream", model, "--state", str(state)]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert re.search(pattern, err), err
        assert state.read_bytes() == before  # the file is unchanged

    save_state(state, make_net("float64").stream())
    refused(r"state: tensor 'cell_0/h': expected float32 \[1, 5\], found float64 \[1, 5\]")
    save_state(state, make_net(kinds=("lstm",)).stream())
    refused(r"state: tensor 'cell_1/h' is missing")
    save_state(state, make_net(kinds=("lstm", "lstm")).stream())
    refused(r"state: tensor 'cell_1/c' belongs to no cell")
    save_state(state, net.stream(2))
    refused(r"expected float32 \[1, 5\], found float32 \[2, 5\]")
    whole = state.read_bytes()
    for cut in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        state.write_bytes(whole[:cut])
        refused(r"state: expected a safetensors file, found")
    state.write_bytes(Path(model).read_bytes())
    refused(r"state: expected cellstack_state of version 1 under __metadata__, found none")
    state.write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match="expected a safetensors file"):
        load_state(state, net.stream())


def test_states_with_bits_flipped(net, tmp_path):
    """Any file gives a state of the right shapes, or a `FormatError`."""
    rng, stream, refused = np.random.default_rng(0), net.stream(), []
    save_state(tmp_path / "whole", stream)
    whole = (tmp_path / "whole").read_bytes()
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data) - 60, size=rng.integers(1, 4)):
            data[at] ^= 1 << rng.integers(8)
        (tmp_path / "flipped").write_bytes(data)
        try:
            stream.state = load_state(tmp_path / "flipped", stream)
        except FormatError as error:
            refused.append(str(error))
    assert 200 < len(refused) <= 400
    assert all(text.startswith(f"{tmp_path / 'flipped'}: ") for text in refused)


def test_states_of_every_kind_and_of_none(tmp_path):
    rng = np.random.default_rng(0)
    for kinds in (("lstm",), ("gru", "rnn"), ("rnn", "lstm", "gru")):
        net = make_net("float64", kinds)
        causal = Conv1D(rng.normal(size=(3, 3, 3)), padding="causal")
        for nodes in (net.nodes, [causal, *net.nodes]):
            one, other = Network(nodes).stream(3), Network(nodes).stream(3)
            one.run(rng.normal(size=(3, 4, 3)))
            save_state(tmp_path / "state", one)
            other.state = load_state(tmp_path / "state", other)
            x = rng.normal(size=(3, 3))
            assert np.array_equal(one.step(x), other.step(x))
    stream = Network([Dense(np.ones((2, 2)))]).stream()
    save_state(tmp_path / "state", stream)
    assert load_state(tmp_path / "state", stream) == ()


# ── models and flags ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_can_t_be_streamed(tmp_path, capfd):
    rng = np.random.default_rng(0)
    ahead = Recurrent((make_cell(rng, 3, 4),))
    Network([Bidirectional(ahead, Recurrent(ahead.cells, go_backwards=True))], ["both"]).save(
        tmp_path / "n.safetensors"
    )
    assert cli.main(["stream", str(tmp_path / "n")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(r"n\.safetensors: .*both can't run step by step: .*backwards", err), err


def test_ids(run, tmp_path):
    rng = np.random.default_rng(0)
    net = Network([Embedding(rng.normal(size=(9, 3)).astype("f4"), mask_zero=True), *make_net().nodes])
    net.save(tmp_path / "net.safetensors")
    stream = net.stream()
    expected = np.concatenate([stream.step([id_]) for id_ in (3, 8, 1)])
    done = run([str(tmp_path / "net")], "3\n8\n1.0\n")
    assert np.array_equal(numbers(done.stdout), expected)
    for text, message in (("3\n9\n", "ids from 0 to 8"), ("3\n1.5\n", "aren't whole"), ("3\n0\n", "masks")):
        done = run([str(tmp_path / "net"), "--state", str(tmp_path / "state")], text)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert re.search("error: standard input, line 2: .*" + message, done.stderr), done.stderr
        assert np.array_equal(numbers(done.stdout), expected[:1])
        (tmp_path / "state").unlink()


def test_networks_without_one_input_and_one_output(tmp_path, capfd):
    two = Network([Merge("add")], inputs={"a": (None, 2), "b": (None, 2)}, wires=[("a", "b")])
    ends = Network([Dense(np.ones((2, 2), "f4")), Dense(np.ones((2, 2), "f4"))], outputs=("layer_0", "layer_1"))
    for net, message in (
        (two, "expected one input and one output, found the inputs a, b"),
        (ends, "and the outputs layer_0, layer_1"),
        (Network([GlobalPool("last")]), "networks that don't fix the width of their input aren't supported"),
    ):
        net.save(tmp_path / "net.safetensors")
        assert cli.main(["stream", str(tmp_path / "net")]) == 2
        assert message in capfd.readouterr().err


def test_it_needs_no_torch(model):
    code = (
        "import sys; from cellstack.cli import main as cli; status = cli.main(['stream', sys.argv[1]]); "
        "assert not {'torch', 'matplotlib', 'tqdm', 'keras', 'onnx'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, model], input=b"1,2,3\n", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")

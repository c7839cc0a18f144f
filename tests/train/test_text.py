"""Texts: reading, parts and streams, bits per character, and generation."""

import math
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
from networks import make_cell

from cellstack import Network
from cellstack.cells.errors import FormatError
from cellstack.nodes import Activation, Dense, Embedding, GlobalPool, Recurrent
from cellstack.train.checks import UsageError
from cellstack.train.text.data import (
    Alphabet,
    Streams,
    Text,
    alphabet_of,
    bits_per_character,
    content,
    measured,
)
from cellstack.train.text.sampling import generate

ALICE = files("cellstack_demo") / "data" / "alice.txt"
LETTERS = "ab c\n"


def network(rng, characters=LETTERS, ids=True, logits=False, metadata=None, units=6):
    size = 256 if characters is None else len(characters)
    table = [Embedding(rng.normal(size=(size, 3)).astype("f4"))] if ids else []
    cell = make_cell(rng, 3 if ids else size, units)
    head = Dense(2 * rng.normal(size=(units, size)).astype("f4"), None, "linear" if logits else "softmax")
    nodes = [*table, Recurrent((cell,), return_sequences=True), head]
    return Network(nodes, metadata={"characters": characters} if metadata is None else metadata)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_description_of_a_text():
    text = Text.of(content(str(ALICE)), "alice.txt")
    assert text.summary(text.parts()) == (
        "147,815 characters, 68 distinct; 133,033 to train on, 7,391 to validate on, 7,391 to test on; "
        "rare: 'Z' 1x, 'X' 4x, '_' 4x"
    )
    assert "".join(text.alphabet.characters[n] for n in text.ids[:400]) == ALICE.read_text()[:400]
    assert text.ids.dtype == np.uint8
    late = Text.of("ab" * 200 + "c", "late")
    assert late.summary(late.parts()).endswith("1 only in the held-out parts, not in training: 'c'")
    of_bytes = Text.of("aé".encode() * 100)
    assert of_bytes.summary(of_bytes.parts(0.1, 0)) == "300 bytes, 3 distinct; 270 to train on, 30 to validate on"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("é".encode("latin1") * 300, FormatError, "found byte 0xe9 at 0: convert it .iconv"),
        ("a text".encode("utf-16"), FormatError, "expected UTF-8 text, found UTF-16"),
        ("a text".encode("utf-32"), FormatError, "expected UTF-8 text, found UTF-32"),
        (b"ab\0c", FormatError, "found a NUL byte at 2"),
        (b"", UsageError, "at least 200 characters, found none"),
        (b"short", UsageError, "at least 200 characters, found 5"),
        (b"a" * 300, UsageError, "at least two distinct characters, found one"),
    ],
)
def test_invalid_texts_are_refused(tmp_path, data, error, message):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(error, match=f"book.txt: .*{message}"):
        Text.of(content(str(path)), str(path))


def test_marks_line_ends_and_characters_of_any_plane_are_kept(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffa\r\n😀ß".encode())
    assert content(str(path)) == "a\r\n😀ß"
    assert content(str(path), as_bytes=True)[:3] == b"\xef\xbb\xbf"
    alphabet = Alphabet(("😀", "ß", "a"))
    assert alphabet.encode("aß😀").tolist() == [2, 1, 0]
    with pytest.raises(
        UsageError, match=r"the model doesn't know 'x' \(U\+0078\) and 1 other: its alphabet has 3 characters"
    ):
        alphabet.encode("axy")
    with pytest.raises(UsageError, match="found the surrogate"):
        alphabet.encode("a\ud800")
    assert Alphabet(None).encode("ß").tolist() == [0xC3, 0x9F]
    with pytest.raises(UsageError, match=r"together at most 0\.5, got 0\.05 and 0\.6"):
        Text.of("ab" * 200).parts(0.05, 0.6)


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [2, 3, 100, 101, 1000, 1003])
@pytest.mark.parametrize(("rows", "steps"), [(1, 7), (4, 10), (16, 32)])
def test_streams_are_continued_and_complete(count, rows, steps):
    ids = np.arange(5, 5 + count + 20)
    streams = Streams(ids, (10, 10 + count), rows, steps)
    chunks = [streams.chunk(n) for n in range(len(streams))]
    assert all(x.shape[1] == streams.steps for x, _ in chunks[:-1])
    assert all((y == x + 1).all() for x, y in chunks)
    for (_, before), (after, _) in pairwise(chunks):
        assert np.array_equal(before[:, -1], after[:, 0])
    targets = np.concatenate([y for _, y in chunks], axis=1)
    assert set(targets.ravel()) == set(ids[11 : 10 + count])
    assert targets.size - (count - 1) < streams.rows


@pytest.mark.parametrize("part", [(0, 300), (500, 900), (0, 5000), (4000, 9001), (8999, 9001)])
def test_every_character_is_measured_once_with_its_context(part):
    ids = np.arange(9001)
    chunks = list(measured(ids, part))
    assert sorted(n for _, y, counts in chunks for n in y[counts]) == list(range(max(part[0], 1), part[1]))
    x, y, counts = (np.concatenate(each, axis=1) for each in zip(*chunks, strict=True))
    for row, targets, used in zip(x, y, counts, strict=True):
        last = np.flatnonzero(used)[-1] + 1
        assert row[:last].tolist() == list(range(row[0], row[0] + last))
        assert (row[:last] + 1 == targets[:last]).all()
        assert row[0] == 0 or np.flatnonzero(used)[0] == 256


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_bits_per_character_are_those_of_one_pass(rng, ids, logits):
    net = network(rng, ids=ids, logits=logits)
    given = rng.integers(5, size=200)
    y = net(given[None] if ids else np.eye(5)[given][None])[0, :-1].astype("f8")
    p = np.exp(y) / np.exp(y).sum(1, keepdims=True) if logits else y
    expected = -np.log2(p[np.arange(199), given[1:]]).mean()
    assert bits_per_character(net, given) == pytest.approx(expected, rel=1e-5)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_the_most_likely_characters_are_those_of_one_pass(rng, ids, logits):
    net = network(rng, ids=ids, logits=logits)
    text = "".join(generate(net, "ab", length=30, temperature=0))
    places = np.array([LETTERS.index(c) for c in "ab" + text])
    y = net(places[None] if ids else np.eye(5)[places][None])[0]
    assert "".join(LETTERS[n] for n in y.argmax(-1)[1:-1]) == text


@pytest.mark.long
def test_characters_are_sampled_with_their_probabilities(rng):
    table = np.log(np.array([[0.5, 0.3, 0.15, 0.04, 0.01]] * 5, "f4"))
    for activation, temperature in (("linear", 1.0), ("softmax", 0.5)):
        net = Network([Embedding(table), Activation(activation)], metadata={"characters": LETTERS})
        p = np.exp(table[0].astype("f8") / temperature)
        text = "".join(generate(net, length=20_000, temperature=temperature, seed=1))
        found = np.array([text.count(c) for c in LETTERS]) / len(text)
        np.testing.assert_allclose(found, p / p.sum(), atol=0.012)
        assert set(generate(net, length=500, top_k=2, temperature=5.0, seed=0)) == {"a", "b"}
        assert set(generate(net, length=500, top_p=0.6 if temperature == 1 else 0.9, temperature=temperature)) == {
            "a",
            "b",
        }
        assert set(generate(net, length=500, top_p=1e-9)) == {"a"}


def test_a_seed_repeats_and_a_stop_ends(rng):
    net = network(rng)
    first = "".join(generate(net, "a", length=200, seed=3))
    assert first == "".join(generate(net, "a", length=200, seed=3))
    assert first != "".join(generate(net, "a", length=200, seed=4))
    stop = first[50:53]
    assert "".join(generate(net, "a", length=200, seed=3, stop=stop)) == first[: first.index(stop) + 3]
    assert list(generate(net, "a", length=0)) == []
    # Without a prompt it starts after a line end.
    assert "".join(generate(net, seed=3)) == "".join(generate(net, "\n", seed=3))


def test_bytes_are_decoded_incrementally():
    order = "aé😀\n".encode()
    logits = np.full((256, 256), -9.0, "f4")
    for before, after in zip(order, order[1:] + order[:1], strict=True):
        logits[before, after] = 9.0
    net = Network([Embedding(logits), Activation("softmax")])
    assert list(generate(net, "\n", length=8, temperature=0)) == ["a", "é", "😀", "\n"]
    assert list(generate(net, "\n", length=5, temperature=0)) == ["a", "é", "\ufffd"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"prompt": "abX"}, r"the prompt: the model doesn't know 'X' .*: its alphabet has 5 characters"),
        ({}, {"temperature": -1.0}, "temperature of at least 0, got -1"),
        ({}, {"temperature": math.nan}, "temperature of at least 0"),
        ({}, {"top_k": 0}, "top_k of at least 1, got 0"),
        ({}, {"top_p": 0.0}, "top_p above 0"),
        ({}, {"top_p": 1.5}, "top_p above 0"),
        ({}, {"length": -1}, "length of at least 0"),
        ({}, {"stop": ""}, "expected stop to be a text"),
        ({"characters": "ab"}, {}, "a prompt is required, because the model has neither"),
        ({"metadata": {}}, {}, "with its characters in its metadata"),
        ({"metadata": {"characters": "abca "}}, {}, "distinct characters"),
        (
            {"metadata": {"characters": ["a", "bc"]}},
            {},
            "expected characters in the metadata as a string or a list of characters",
        ),
        ({"metadata": {"characters": "a "}}, {}, "one output per step for each of its 2 characters"),
    ],
)
def test_invalid_arguments_are_refused_by_the_call(rng, change, options, message):
    with pytest.raises(UsageError, match=message):
        generate(network(rng, **change), **options)


def test_networks_that_aren_t_text_models(rng):
    whole = Network([*network(rng).nodes, GlobalPool("mean")], metadata={"characters": LETTERS})
    with pytest.raises(UsageError, match="one output per step for each of its 5 characters"):
        generate(whole)
    back = Recurrent(network(rng, ids=False).nodes[0].cells, return_sequences=True, go_backwards=True)
    with pytest.raises(UsageError, match="the network doesn't support streaming"):
        generate(Network([back, Dense(np.ones((6, 5), "f4"))], metadata={"characters": LETTERS}))
    broken = Network([Embedding(np.full((5, 5), np.nan, "f4"))], metadata={"characters": LETTERS})
    with pytest.raises(UsageError, match="expected finite outputs of the network"):
        list(generate(broken))
    assert alphabet_of(network(rng, None), "bytes") == Alphabet(None)

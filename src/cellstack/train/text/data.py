"""Texts: their characters as ids, the parts to train and measure on, the streams of a batch. Needs no torch."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.nodes import Embedding
from cellstack.spec import FormatError
from cellstack.train.checks import UsageError

CELLS = ("lstm", "gru", "rnn")
BYTES = 256
LEAST = 200  # characters: 10 each to validate and to test on
EPOCH = 128  # steps that an epoch is to have
RARE = 5  # times that a character occurs at most, to be named
CONTEXT = 256  # characters before the first that counts, in each stream that is measured
MEASURED = 16  # streams that a part is measured in
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Architecture:
    """How a model of text is built.

    Args:
        units: width of each layer, bottom first.
        cell: what each layer is made of, `"lstm"`, `"gru"` or `"rnn"`.
        embedding: width of a character's vector, which is learned; 0: one-hot.
        dropout: share of what each layer returns that is dropped out in training.

    Raises:
        UsageError: an option out of its range.
    """

    units: tuple[int, ...] = (256, 256)
    cell: str = "lstm"
    embedding: int = 64
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if not self.units or min(self.units) < 1:
            raise UsageError(f"expected units of at least 1 for at least one layer, got {self.units}")
        if self.cell not in CELLS:
            raise UsageError(f"expected cell to be one of {', '.join(CELLS)}, got {self.cell!r}")
        if self.embedding < 0:
            raise UsageError(f"expected embedding of at least 0, got {self.embedding}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"expected dropout in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Alphabet:
    """What a model of text tells apart, in the order of its ids.

    Args:
        characters: single characters, all different; None: the 256 bytes.
    """

    characters: tuple[str, ...] | None

    @property
    def size(self) -> int:
        """How many there are."""
        return BYTES if self.characters is None else len(self.characters)

    @property
    def unit(self) -> str:
        """What one of them is called."""
        return "bytes" if self.characters is None else "characters"

    def encode(self, text: str | bytes, name: str = "the text") -> Ids:
        """Return the ids of a text `[N]`: of its characters, or of its bytes in UTF-8.

        Args:
            text: any text; bytes for an alphabet of bytes.
            name: what it is called in messages.

        Raises:
            UsageError: a character that isn't there, which is named, or one that is half of a pair (a surrogate).
        """
        if self.characters is None:
            return np.frombuffer(text if isinstance(text, bytes) else _encoded(text, "utf-8", name), np.uint8)
        if isinstance(text, bytes):
            raise UsageError(f"{name}: expected a text as str for a network of characters, got bytes")
        points, own = code_points(text, name), code_points("".join(self.characters), name)
        places = np.full(sys.maxunicode + 1, -1, np.int32)
        places[own] = np.arange(len(own))
        ids = places[points]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            others = len(np.unique(points[unknown])) - 1
            more = "" if not others else f" and {others} other{'s' * (others > 1)}"
            raise UsageError(
                f"{name}: expected the network's {len(own)} characters, found {shown(chr(points[unknown[0]]))}{more}"
            )
        return ids

    def decoder(self) -> Callable[[int, bool], str]:
        """Return what makes characters of ids as they come, each with whether it is the last.

        Bytes make one once all of its are there, and U+FFFD where they make none.
        """
        if self.characters is not None:
            characters = self.characters
            return lambda number, last: characters[number]
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda number, last: decode(bytes([number]), last)

    def metadata(self) -> dict[str, Any]:
        """Return what `alphabet_of` finds in a network's metadata."""
        return {"task": "text", "characters": None if self.characters is None else list(self.characters)}


def code_points(text: str, name: str) -> NDArray[np.uint32]:
    """Return a text's characters as numbers `[N]`."""
    return np.frombuffer(_encoded(text, "utf-32-le", name), np.dtype("<u4"))


def _encoded(text: str, encoding: str, name: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        found = shown(error.object[error.start])
        raise UsageError(f"{name}: expected characters of Unicode, found half of a pair, {found}") from None


def shown(character: str) -> str:
    """Return a character as messages show it."""
    return f"{character!r} (U+{ord(character):04X})"


def alphabet_of(net: Network, path: str) -> Alphabet:
    """Return what a network of text tells apart: its metadata's `characters`, or the bytes, where it takes 256.

    Args:
        net: a network that takes one sequence, of ids or of one feature a character.
        path: its file, or what else it is called, for messages.

    Raises:
        UsageError: no such network, or metadata that don't fit it.
    """
    if len(net.inputs) != 1 or not net.graph.timed(net.inputs[0]):
        raise UsageError(
            f"{path}: expected a network that takes one sequence, found the inputs {', '.join(net.inputs)}"
        )
    width, characters = _width(net), net.metadata.get("characters")
    if characters is None:
        if width != BYTES:
            raise UsageError(
                f'{path}: expected a network whose metadata has its characters, {{"characters": "abc"}}, or one that '
                f"takes {BYTES} bytes, found one that takes {'any width' if width is None else width}"
            )
        return Alphabet(None)
    if not isinstance(characters, (str, list)) or not all(isinstance(c, str) and len(c) == 1 for c in characters):
        raise UsageError(
            f"{path}: expected the network's metadata to have its characters as a text, got {characters!r:.80}"
        )
    if not characters or len(set(characters)) < len(characters):
        raise UsageError(f"{path}: expected different characters in the network's metadata, got {characters!r:.80}")
    if width is not None and len(characters) > width:
        raise UsageError(f"{path}: expected at most {width} characters in its metadata, got {len(characters)}")
    return Alphabet(tuple(characters))


def _width(net: Network) -> int | None:
    """Return how many different characters the network can take, None where any number."""
    name = net.inputs[0]
    if name not in net.graph.ids:
        return net.input_size
    tables = [node for node, wires in zip(net.nodes, net.wires, strict=True) if wires == (name,)]
    return len(tables[0].table) if isinstance(tables[0], Embedding) else None


def as_input(net: Network, ids: Ids) -> NDArray:
    """Return ids `[...]` as a network takes them: themselves, or one-hot `[..., I]` where it takes features."""
    if net.inputs[0] in net.graph.ids:
        return ids.astype(np.int64)
    return np.eye(net.input_size or int(ids.max(initial=0)) + 1, dtype=net.dtype)[ids]


def content(path: str, as_bytes: bool = False) -> str | bytes:
    """Return what a text file holds: text out of UTF-8, without the mark that it may begin with; or its bytes.

    Args:
        path: the file.
        as_bytes: take its bytes as they are, whatever they mean.

    Raises:
        FormatError: another encoding, which is named where the file says it.
        OSError: it can't be read.
    """
    data = Path(path).read_bytes()
    if as_bytes:
        return data
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise FormatError(f"{path}: expected UTF-8 text, found {encoding}: convert it, or train on its bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x} at {error.start:,}: convert it "
            f"(iconv -f latin1 -t utf-8), or train on its bytes"
        ) from None
    if "\0" in text:
        raise FormatError(f"{path}: expected text, found a zero byte at {text.index(chr(0)):,}: train on its bytes")
    return text


@dataclass(frozen=True, eq=False)
class Text:
    """A text as a model of it is trained.

    Args:
        name: its file, or what else it is called.
        ids: what stands in it, `[N]`, of as few bytes each as hold them.
        alphabet: what the ids mean.
        counts: how often each occurs, `[V]`.
    """

    name: str
    ids: Ids
    alphabet: Alphabet
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, text: str | bytes, name: str = "the text", alphabet: Alphabet | None = None) -> Text:
        """Return a text.

        Args:
            text: what stands in it.
            name: what it is called in messages.
            alphabet: of another text; the characters that occur in this one, or for bytes all 256, where None.

        Raises:
            UsageError: fewer than 200 characters, one that stands there again and again, or one that isn't in an
                alphabet that is given.
        """
        if not isinstance(text, (str, bytes)):
            raise UsageError(f"expected a text as str or bytes, got {type(text).__name__}")
        if len(text) < LEAST:
            unit = "bytes" if isinstance(text, bytes) else "characters"
            raise UsageError(f"{name}: expected a text of at least {LEAST} {unit}, found {len(text) or 'none'}")
        if alphabet is None:
            characters = (
                None if isinstance(text, bytes) else map(chr, np.flatnonzero(np.bincount(code_points(text, name))))
            )
            alphabet = Alphabet(None if characters is None else tuple(characters))
        ids = alphabet.encode(text, name)
        ids = ids.astype(np.min_scalar_type(alphabet.size), copy=False)
        counts = np.bincount(ids, minlength=alphabet.size)
        if np.count_nonzero(counts) < 2:
            raise UsageError(f"{name}: expected a text of at least two different {alphabet.unit}, found one alone")
        return cls(name, ids, alphabet, counts)

    def parts(self, validation: float = 0.05, test: float = 0.05) -> Parts:
        """Return where its parts begin and end: the first one is trained on, the last ones are held out.

        Args:
            validation, test: their shares; at least one character each, none for a share of 0.

        Raises:
            UsageError: shares that leave less than half to train on.
        """
        if not (validation >= 0.0 and test >= 0.0 and validation + test <= 0.5):
            raise UsageError(
                f"expected shares for validation and test of at least 0, at most a half together, got {validation} "
                f"and {test}"
            )
        count = len(self.ids)
        sizes = [max(1, round(count * share)) if share else 0 for share in (validation, test)]
        first = count - sum(sizes)
        return Parts((0, first), (first, first + sizes[0]), (first + sizes[0], count))

    def summary(self, parts: Parts) -> str:
        """Return what was understood, in one line."""
        unit, different = self.alphabet.unit, int(np.count_nonzero(self.counts))
        sizes = [end - begin for begin, end in parts]
        said = [f"{len(self.ids):,} {unit}, {different} different"]
        held = [
            f"{size:,} to {verb} on" for size, verb in zip(sizes, ("train", "validate", "test"), strict=True) if size
        ]
        said.append(", ".join(held))
        rare = [n for n in np.argsort(self.counts, kind="stable") if 0 < self.counts[n] <= RARE]
        if rare and self.alphabet.characters is not None:
            names = [f"{self.alphabet.characters[n]!r} {self.counts[n]}x" for n in rare[:8]]
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            said.append(f"rare ones: {', '.join(names)}{more}")
        unseen = self.counts > 0
        unseen[np.unique(self.ids[slice(*parts.training)])] = False
        if unseen.any() and self.alphabet.characters is not None:
            names = ", ".join(repr(self.alphabet.characters[n]) for n in np.flatnonzero(unseen)[:8])
            said.append(f"{int(unseen.sum())} in the held-out parts alone, which training never sees: {names}")
        return "; ".join(said)


class Parts(NamedTuple):
    """Where the parts of a text begin and end."""

    training: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]


def usual_batch(characters: int, steps: int) -> int:
    """Return how many streams go through a part of so many characters, where nobody says.

    As many as leave `EPOCH` steps an epoch, from 8, below which a step costs hardly less, to 32: what a text is learned
    in is steps, and a small one has few.
    """
    return min(32, max(8, characters // (max(steps, 1) * EPOCH)))


class Streams:
    """A part of a text as rows side by side, each read from its begin to its end, some steps at a time.

    The row of a stream goes on where it stood, so that a model may carry its state from chunk to chunk. What has to be
    told is the character after each: every one of the part is, but for its very first.

    Args:
        ids: of the text, `[N]`.
        part: where the part begins and ends.
        rows: at most so many streams; fewer where each would be shorter than a chunk.
        steps: of a chunk; the last may have fewer.

    Raises:
        UsageError: steps below 1.
    """

    def __init__(self, ids: Ids, part: tuple[int, int], rows: int, steps: int):
        if steps < 1:
            raise UsageError(f"expected steps >= 1, got {steps}")
        count = part[1] - part[0] - 1
        self.ids, self.steps = ids, min(steps, count)
        self.rows = max(1, min(rows, count // self.steps))
        self.length = -(-count // self.rows)
        # Rows of one length: neighbours share a character or two where the part can't be cut evenly.
        self.starts = part[0] + np.linspace(0, count - self.length, self.rows).round().astype(np.int64)

    def __len__(self) -> int:
        return -(-self.length // self.steps)

    def chunk(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return x and what comes after each, `[B, t]` both."""
        first = number * self.steps
        many = min(self.steps, self.length - first)
        window = self.ids[self.starts[:, None] + np.arange(first, first + many + 1)].astype(np.int64)
        return window[:, :-1], window[:, 1:]


def measured(ids: Ids, part: tuple[int, int]) -> Iterator[tuple[NDArray, NDArray, NDArray[np.bool_]]]:
    """Yield x, what comes after each, and whether it counts, `[B, t]`, chunk by chunk of streams to be measured.

    Every character of the part counts once. Each is told out of at least `CONTEXT` before it, where the text has so
    many: streams begin earlier than what counts of them.

    Args:
        ids: of the text, `[N]`.
        part: where the part begins and ends.
    """
    begin, end = max(part[0], 1), part[1]
    before = min(CONTEXT, begin - 1)
    rows = min(MEASURED, max(1, (end - begin) // CONTEXT)) if before == CONTEXT else 1
    length = -(-(end - begin) // rows)
    for first in range(0, before + length, CONTEXT):
        steps = np.arange(first, min(first + CONTEXT, before + length))
        told = begin + length * np.arange(rows)[:, None] + steps - before  # [B, t]
        counts = (steps >= before) & (told < end)
        told = np.minimum(told, end - 1)
        yield ids[told - 1].astype(np.int64), ids[told].astype(np.int64), counts


def bits_per_character(
    net: Network, ids: Ids, part: tuple[int, int] | None = None, threads: int | None = None
) -> float:
    """Return the mean of `-log2 p` over a text, p being what the network gave the character that came.

    Args:
        net: a network of text, see `alphabet_of`, that answers after every character.
        ids: of the text, `[N]`.
        part: where what is measured begins and ends, see `measured`; None: all but the first character.
        threads: how many the kernel may use.
    """
    state, total, count = None, 0.0, 0
    logits = not gives_probabilities(net)
    for x, y, counts in measured(ids, part or (0, len(ids))):
        out, state = net.run(as_input(net, x), state, threads=threads)
        found = np.take_along_axis(out, y[..., None], axis=-1)[..., 0].astype(np.float64)
        if logits:
            top = out.max(axis=-1)
            logs = found - top - np.log(np.exp(out - top[..., None]).sum(axis=-1, dtype=np.float64))
        else:
            logs = np.log(np.maximum(found, np.finfo(np.float32).tiny))
        total -= float(logs[counts].sum())
        count += int(counts.sum())
    return total / count / float(np.log(2.0))


def gives_probabilities(net: Network) -> bool:
    """Return whether a network's answers are probabilities: whether its last node ends in a softmax."""
    return getattr(net.nodes[net.names.index(net.outputs[0])], "activation", None) == "softmax"


def beginning(alphabet: Alphabet) -> str:
    """Return the default prompt: a line end, or a blank where the alphabet has none; "" where it has neither."""
    known = alphabet.characters
    return next((character for character in "\n " if known is None or character in known), "")


def one_line(text: str) -> str:
    """Return a text as one line that a terminal can show: line ends as ⏎, what isn't printable left out."""
    return "".join(c if c.isprintable() else "⏎" * (c == "\n") for c in text)

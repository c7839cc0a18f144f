"""Texts: their characters as ids, the parts to train and test on, the streams of a batch. Needs no torch."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError
from cellstack.network import Network
from cellstack.nodes import Embedding
from cellstack.train.checks import UsageError

BYTES = 256
LEAST = 200  # least length of a text: 10 characters each to validate and to test on
EPOCH = 128  # target number of training steps per epoch
RARE = 5  # characters that occur at most so often are listed as rare
CONTEXT = 256  # characters of context before the first that counts, in each measured stream
MEASURED = 16  # streams into which a measured part is divided
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Alphabet:
    """The vocabulary of a text model, in the order of its ids.

    Args:
        characters: distinct single characters; None: the 256 bytes.
    """

    characters: tuple[str, ...] | None

    @property
    def size(self) -> int:
        """Number of characters or bytes."""
        return BYTES if self.characters is None else len(self.characters)

    @property
    def unit(self) -> str:
        """The unit's name for messages."""
        return "bytes" if self.characters is None else "characters"

    def encode(self, text: str | bytes, name: str = "the text") -> Ids:
        """Return the ids of a text `[N]`: of its characters, or of its bytes in UTF-8.

        Args:
            text: any text; bytes for an alphabet of bytes.
            name: of the text, for messages.

        Raises:
            UsageError: a character that isn't in the alphabet, or a surrogate.
        """
        if self.characters is None:
            return np.frombuffer(text if isinstance(text, bytes) else _encoded(text, "utf-8", name), np.uint8)
        if isinstance(text, bytes):
            raise UsageError(f"{name}: expected str for a model of characters, got bytes")
        points, known = code_points(text, name), code_points("".join(self.characters), name)
        places = np.full(sys.maxunicode + 1, -1, np.int32)
        places[known] = np.arange(len(known))
        ids = places[points]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            others = len(np.unique(points[unknown])) - 1
            more = "" if not others else f" and {others} other{'s' * (others > 1)}"
            raise UsageError(
                f"{name}: the model doesn't know {shown(chr(points[unknown[0]]))}{more}: its alphabet has {len(known)} "
                "characters"
            )
        return ids

    def decoder(self) -> Callable[[int, bool], str]:
        """Return an incremental decoder, a function of an id and of whether it is the last.

        It returns a character as soon as all of its bytes are decoded, and U+FFFD for invalid bytes.
        """
        if self.characters is not None:
            characters = self.characters
            return lambda number, last: characters[number]
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda number, last: decode(bytes([number]), last)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that `alphabet_of` reads."""
        return {"task": "text", "characters": None if self.characters is None else list(self.characters)}


def code_points(text: str, name: str) -> NDArray[np.uint32]:
    """Return the code points of a text's characters, `[N]`."""
    return np.frombuffer(_encoded(text, "utf-32-le", name), np.dtype("<u4"))


def _encoded(text: str, encoding: str, name: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        surrogate = shown(error.object[error.start])
        raise UsageError(f"{name}: expected Unicode characters, found the surrogate {surrogate}") from None


def shown(character: str) -> str:
    """Return a character for messages."""
    return f"{character!r} (U+{ord(character):04X})"


def alphabet_of(net: Network, path: str) -> Alphabet:
    """Return a text model's alphabet: its metadata's `characters`, or bytes if its input has 256 ids or features.

    Args:
        net: a network with one input sequence, of ids or one-hot.
        path: its file or name, for messages.

    Raises:
        UsageError: another kind of network, or metadata that doesn't fit it.
    """
    if len(net.inputs) != 1 or not net.graph.timed(net.inputs[0]):
        raise UsageError(
            f"{path}: expected a network with one input sequence, found the inputs {', '.join(net.inputs)}"
        )
    width, characters = _width(net), net.metadata.get("characters")
    if characters is None:
        if width != BYTES:
            raise UsageError(
                f'{path}: expected a network with its characters in its metadata, {{"characters": "abc"}}, or with an '
                f"input of {BYTES} bytes, found an input of {'any width' if width is None else f'width {width}'}"
            )
        return Alphabet(None)
    if not isinstance(characters, (str, list)) or not all(isinstance(c, str) and len(c) == 1 for c in characters):
        raise UsageError(
            f"{path}: expected characters in the metadata as a string or a list of characters, got {characters!r:.80}"
        )
    if not characters or len(set(characters)) < len(characters):
        raise UsageError(f"{path}: expected distinct characters in the metadata, got {characters!r:.80}")
    if width is not None and len(characters) > width:
        raise UsageError(f"{path}: expected at most {width} characters in its metadata, got {len(characters)}")
    return Alphabet(tuple(characters))


def _width(net: Network) -> int | None:
    """Return the number of distinct characters that the network's input allows, None for any number."""
    name = net.inputs[0]
    if name not in net.graph.ids:
        return net.input_size
    tables = [node for node, wires in zip(net.nodes, net.wires, strict=True) if wires == (name,)]
    return len(tables[0].table) if isinstance(tables[0], Embedding) else None


def as_input(net: Network, ids: Ids) -> NDArray:
    """Return ids `[...]` as a network's input: as they are, or one-hot `[..., I]` if it takes features."""
    if net.inputs[0] in net.graph.ids:
        return ids.astype(np.int64)
    return np.eye(net.input_size or int(ids.max(initial=0)) + 1, dtype=net.dtype)[ids]


def content(path: str, as_bytes: bool = False) -> str | bytes:
    """Return the text of a UTF-8 file, without a byte order mark; or its bytes.

    Args:
        path: the file.
        as_bytes: return its bytes.

    Raises:
        FormatError: the file has another encoding.
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
        raise FormatError(f"{path}: expected text, found a NUL byte at {text.index(chr(0)):,}: train on its bytes")
    return text


@dataclass(frozen=True, eq=False)
class Text:
    """A text to train a model on.

    Args:
        name: its file or name, for messages.
        ids: its characters or bytes as ids, `[N]`, in the smallest integer dtype.
        alphabet: the characters of the ids.
        counts: number of occurrences of each id, `[V]`.
    """

    name: str
    ids: Ids
    alphabet: Alphabet
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, text: str | bytes, name: str = "the text", alphabet: Alphabet | None = None) -> Text:
        """Encode a text.

        Args:
            text: the text.
            name: of the text, for messages.
            alphabet: of another text; None = the characters that occur in this one, or all 256 bytes.

        Raises:
            UsageError: fewer than 200 characters, only one distinct character, or one that isn't in `alphabet`.
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
            raise UsageError(f"{name}: expected a text with at least two distinct {alphabet.unit}, found one")
        return cls(name, ids, alphabet, counts)

    def parts(self, validation: float = 0.05, test: float = 0.05) -> TextParts:
        """Divide the text into a training part and, at the end, a validation and a test part.

        Args:
            validation, test: shares of the parts; at least one character each, none for a share of 0.

        Raises:
            UsageError: shares that leave less than half to train on.
        """
        if not (validation >= 0.0 and test >= 0.0 and validation + test <= 0.5):
            raise UsageError(
                f"expected validation and test shares of at least 0 and together at most 0.5, got {validation} and "
                f"{test}"
            )
        count = len(self.ids)
        sizes = [max(1, round(count * share)) if share else 0 for share in (validation, test)]
        first = count - sum(sizes)
        return TextParts((0, first), (first, first + sizes[0]), (first + sizes[0], count))

    def summary(self, parts: TextParts) -> str:
        """Describe the text and its parts in one line."""
        unit, different = self.alphabet.unit, int(np.count_nonzero(self.counts))
        sizes = [end - begin for begin, end in parts]
        said = [f"{len(self.ids):,} {unit}, {different} distinct"]
        shares = [
            f"{size:,} to {verb} on" for size, verb in zip(sizes, ("train", "validate", "test"), strict=True) if size
        ]
        said.append(", ".join(shares))
        rare = [n for n in np.argsort(self.counts, kind="stable") if 0 < self.counts[n] <= RARE]
        if rare and self.alphabet.characters is not None:
            names = [f"{self.alphabet.characters[n]!r} {self.counts[n]}x" for n in rare[:8]]
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            said.append(f"rare: {', '.join(names)}{more}")
        unseen = self.counts > 0
        unseen[np.unique(self.ids[slice(*parts.training)])] = False
        if unseen.any() and self.alphabet.characters is not None:
            names = ", ".join(repr(self.alphabet.characters[n]) for n in np.flatnonzero(unseen)[:8])
            said.append(f"{int(unseen.sum())} only in the held-out parts, not in training: {names}")
        return "; ".join(said)


class TextParts(NamedTuple):
    """Start and end of each part of a text."""

    training: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]


def usual_batch(characters: int, steps: int) -> int:
    """Return the default number of streams for a training part of so many characters.

    The number that gives about `EPOCH` training steps per epoch, because a small text has too few steps otherwise; at
    least 8, as fewer streams hardly make a step faster, and at most 32.
    """
    return min(32, max(8, characters // (max(steps, 1) * EPOCH)))


class Streams:
    """A part of a text as parallel streams, the rows of a batch, which are read in chunks of some steps.

    Each chunk continues the previous one in every row, so that a model may carry its state from chunk to chunk. The
    targets are the next characters: all characters of the part except the first.

    Args:
        ids: of the text, `[N]`.
        part: start and end of the part.
        rows: maximum number of streams; fewer if each would be shorter than a chunk.
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
        # Rows of equal length: neighbours overlap by a character or two if the part can't be divided evenly.
        self.starts = part[0] + np.linspace(0, count - self.length, self.rows).round().astype(np.int64)

    def __len__(self) -> int:
        return -(-self.length // self.steps)

    def chunk(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return x and the next characters, both `[B, t]`."""
        first = number * self.steps
        many = min(self.steps, self.length - first)
        window = self.ids[self.starts[:, None] + np.arange(first, first + many + 1)].astype(np.int64)
        return window[:, :-1], window[:, 1:]


def measured(ids: Ids, part: tuple[int, int]) -> Iterator[tuple[NDArray, NDArray, NDArray[np.bool_]]]:
    """Yield x, the next characters, and whether these count, `[B, t]` each, chunk by chunk.

    Every character of the part counts once, and is predicted from at least `CONTEXT` previous characters, if the text
    has so many: streams start before the first character that counts.

    Args:
        ids: of the text, `[N]`.
        part: start and end of the part.
    """
    begin, end = max(part[0], 1), part[1]
    before = min(CONTEXT, begin - 1)
    rows = min(MEASURED, max(1, (end - begin) // CONTEXT)) if before == CONTEXT else 1
    length = -(-(end - begin) // rows)
    for first in range(0, before + length, CONTEXT):
        steps = np.arange(first, min(first + CONTEXT, before + length))
        targets = begin + length * np.arange(rows)[:, None] + steps - before  # [B, t]
        counts = (steps >= before) & (targets < end)
        targets = np.minimum(targets, end - 1)
        yield ids[targets - 1].astype(np.int64), ids[targets].astype(np.int64), counts


def bits_per_character(
    net: Network, ids: Ids, part: tuple[int, int] | None = None, threads: int | None = None
) -> float:
    """Return the mean of `-log2 p` over a text, where p is the network's probability of the actual next character.

    Args:
        net: a text model, see `alphabet_of`, with an output after every character.
        ids: of the text, `[N]`.
        part: start and end of the part to measure, see `measured`; None: all but the first character.
        threads: number of the kernel's threads.
    """
    state, total, count = None, 0.0, 0
    logits = not gives_probabilities(net)
    for x, y, counts in measured(ids, part or (0, len(ids))):
        out, state = net.run(as_input(net, x), state, threads=threads)
        of_next = np.take_along_axis(out, y[..., None], axis=-1)[..., 0].astype(np.float64)
        if logits:
            top = out.max(axis=-1)
            logs = of_next - top - np.log(np.exp(out - top[..., None]).sum(axis=-1, dtype=np.float64))
        else:
            logs = np.log(np.maximum(of_next, np.finfo(np.float32).tiny))
        total -= float(logs[counts].sum())
        count += int(counts.sum())
    return total / count / float(np.log(2.0))


def gives_probabilities(net: Network) -> bool:
    """Return whether a network's outputs are probabilities: whether its last node ends in a softmax."""
    return getattr(net.nodes[net.names.index(net.outputs[0])], "activation", None) == "softmax"


def beginning(alphabet: Alphabet) -> str:
    """Return the default prompt: a line end, or a space if the alphabet has none; "" if it has neither."""
    known = alphabet.characters
    return next((character for character in "\n " if known is None or character in known), "")


def one_line(text: str) -> str:
    """Return a text as one line for a terminal: line ends as ⏎, without unprintable characters."""
    return "".join(c if c.isprintable() else "⏎" * (c == "\n") for c in text)

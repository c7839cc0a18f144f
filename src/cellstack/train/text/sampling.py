"""Text out of a network of text, a character at a time, as it comes. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network
from cellstack.train.checks import UsageError
from cellstack.train.text.data import alphabet_of, as_input, beginning, gives_probabilities


def generate(
    net: Network,
    prompt: str = "",
    *,
    length: int = 1000,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | None = None,
    name: str = "the network",
) -> Iterator[str]:
    """Return an iterator of the characters that a network of text writes after a prompt.

    Each is drawn from what the network gives after all before it, `p^(1/temperature)`, and fed back.

    Args:
        net: a network that takes characters, as ids or one-hot, and gives probabilities or logits of the next after
            each; its metadata say which: `{"characters": "abc"}`, or `{}` for 256 bytes of UTF-8. Such is what
            `fit_text` and `cellstack train book.txt` make. It has to be one that streams.
        prompt: what goes before; without one it begins as after a line end, or after a blank where it knows none.
        length: at most so many characters (bytes, for a network of bytes).
        temperature: above 1 it dares more, below 1 less; 0 always takes the likeliest.
        top_k: draw from the likeliest k alone.
        top_p: draw from the fewest that have this probability together, after the temperature; in (0, 1].
        seed: fixes the draws; None: others each time.
        stop: end once this has been written; the text ends with it.
        name: what the network is called in messages.

    Returns:
        An iterator of single characters. A network of bytes gives one as soon as its bytes are there, and U+FFFD for
        bytes that make none.

    Raises:
        UsageError: no such network, a character of the prompt that it doesn't know, an option out of its range. All of
            it at the call, not at the first character.

    >>> from cellstack import Cell, CellSpec, Dense, Recurrent
    >>> from cellstack.nodes import Embedding
    >>> rng = np.random.default_rng(0)
    >>> cell = Cell(CellSpec(2, 3), *(rng.normal(size=shape) for shape in CellSpec(2, 3).shapes.values()))
    >>> head = Dense(rng.normal(size=(3, 3)), None, "softmax")
    >>> nodes = [Embedding(rng.normal(size=(3, 2))), Recurrent((cell,)), head]
    >>> net = Network(nodes, metadata={"characters": "ab "})
    >>> text = "".join(generate(net, "ab", length=20, seed=0))
    >>> len(text), sorted(set(text))
    (20, [' ', 'a', 'b'])
    """
    alphabet = alphabet_of(net, name)
    answer = [net.shapes[output] for output in net.outputs]
    if len(answer) != 1 or len(answer[0]) != 2 or answer[0][-1] != alphabet.size:
        raise UsageError(
            f"{name}: expected a network that gives one number for each of its {alphabet.size} {alphabet.unit} after "
            f"every one, found one that gives {', '.join(map(str, answer))}"
        )
    choose = _Choice(alphabet.size, temperature, top_k, top_p, gives_probabilities(net))
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise UsageError(f"expected a length of at least 0, got {length!r}")
    if seed is not None and seed < 0:
        raise UsageError(f"expected a seed of at least 0, got {seed}")
    if stop == "":
        raise UsageError("expected a text to stop at, got ''")
    prompt = prompt or beginning(alphabet)
    if not prompt:
        raise UsageError(f"{name}: expected a prompt: the network knows neither a line end nor a blank to begin after")
    begin = alphabet.encode(prompt, "the prompt")
    try:
        stream = net.stream()
    except ValueError as error:
        raise UsageError(f"{name}: expected a network that streams: {error}") from None
    rng = np.random.default_rng(seed)

    def characters() -> Iterator[str]:
        """Yield them."""
        decode, written = alphabet.decoder(), ""
        answers = stream.run(as_input(net, begin)[None])[0, -1]  # [V]
        for count in range(length):
            chosen = choose(answers, rng)
            for character in decode(chosen, count == length - 1):
                yield character
                if stop is not None:
                    written = (written + character)[-len(stop) :]
                    if written == stop:
                        return
            if count < length - 1:
                answers = stream.step(as_input(net, np.array([chosen])))[0]

    return characters()


class _Choice:
    """Draws an id from what a network gives."""

    def __init__(self, size: int, temperature: float, top_k: int | None, top_p: float | None, probabilities: bool):
        if not (math.isfinite(temperature) and temperature >= 0.0):
            raise UsageError(f"expected a temperature of at least 0, got {temperature}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise UsageError(f"expected top_k of at least 1, got {top_k!r}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise UsageError(f"expected top_p above 0 and at most 1, got {top_p}")
        self.temperature, self.probabilities = temperature, probabilities
        self.top_k = top_k if top_k is not None and top_k < size else None
        self.top_p = top_p if top_p is not None and top_p < 1.0 else None

    def __call__(self, given: NDArray, rng: np.random.Generator) -> int:
        """Return an id for probabilities or logits `[V]`."""
        if not self.temperature:
            return int(given.argmax())
        weights = given.astype(np.float64)
        if not self.probabilities:
            weights = np.exp((weights - weights.max()) / self.temperature)
        elif self.temperature != 1.0:
            weights = (weights / weights.max()) ** (1.0 / self.temperature)
        if self.top_k is not None or self.top_p is not None:
            weights = self._likeliest(weights)
        sums = weights.cumsum()
        if not 0.0 < sums[-1] < math.inf:
            raise UsageError(f"expected numbers from the network, got {given.tolist()!r:.60}")
        return min(int(sums.searchsorted(rng.random() * sums[-1], "right")), len(sums) - 1)

    def _likeliest(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weights, 0 for all but the likeliest."""
        order = np.argsort(-weights, kind="stable")[: self.top_k]
        if self.top_p is not None:
            sums = weights[order].cumsum()
            order = order[: 1 + int(sums.searchsorted(self.top_p * sums[-1]))]
        kept = np.zeros_like(weights)
        kept[order] = weights[order]
        return kept

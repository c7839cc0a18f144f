"""Generate text with a text model, one character at a time. Needs no torch."""

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
    prompt: str | bytes = "",
    *,
    length: int = 1000,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | None = None,
    name: str = "the network",
) -> Iterator[str]:
    """Continue a prompt with a text model; return an iterator of characters.

    Each character is sampled from the model's probabilities given all previous ones, `p^(1/temperature)`, and fed back.

    Args:
        net: a text model, such as one from `fit_text` or `cellstack train book.txt`: its input is characters, as ids or
            one-hot, its output probabilities or logits of the next one after each; its metadata has the characters,
            `{"characters": "abc"}`, or `{}` for the 256 bytes of UTF-8. It must support streaming.
        prompt: the text to continue, or bytes for a model of bytes; "" = a line end, or a space if the model has no
            line end.
        length: maximum number of characters (bytes, for a model of bytes).
        temperature: above 1 is more varied, below 1 more predictable; 0 always selects the most likely character.
        top_k: sample only from the k most likely characters.
        top_p: sample only from the smallest set of characters with this total probability, after the temperature; in
            (0, 1].
        seed: of the random numbers; None: a new one each time.
        stop: stop after writing this text.
        name: of the network, for messages.

    Returns:
        An iterator of single characters. A model of bytes yields a character as soon as its bytes are complete, and
        U+FFFD for invalid bytes.

    Raises:
        UsageError: another kind of network, a character of the prompt that it doesn't know, or an option out of range;
            raised by the call, not by the first character.

    >>> from cellstack import CellSpec
    >>> from cellstack.nodes import Cell, Dense, Recurrent
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
            f"{name}: expected a network with one output per step for each of its {alphabet.size} {alphabet.unit}, "
            f"found the outputs {', '.join(map(str, answer))}"
        )
    choose = _Choice(alphabet.size, temperature, top_k, top_p, gives_probabilities(net))
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise UsageError(f"expected a length of at least 0, got {length!r}")
    if seed is not None and seed < 0:
        raise UsageError(f"expected a seed of at least 0, got {seed}")
    if stop == "":
        raise UsageError("expected stop to be a text, got ''")
    prompt = prompt or beginning(alphabet)
    if not prompt:
        raise UsageError(f"{name}: a prompt is required, because the model has neither a line end nor a space")
    begin = alphabet.encode(prompt, "the prompt")
    try:
        stream = net.stream()
    except ValueError as error:
        raise UsageError(f"{name}: the network doesn't support streaming: {error}") from None
    rng = np.random.default_rng(seed)

    def characters() -> Iterator[str]:
        """Yield the characters."""
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
    """Samples an id from a network's output."""

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
            raise UsageError(f"expected finite outputs of the network, got {given.tolist()!r:.60}")
        return min(int(sums.searchsorted(rng.random() * sums[-1], "right")), len(sums) - 1)

    def _likeliest(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weights, with 0 for all but the most likely ids."""
        order = np.argsort(-weights, kind="stable")[: self.top_k]
        if self.top_p is not None:
            sums = weights[order].cumsum()
            order = order[: 1 + int(sums.searchsorted(self.top_p * sums[-1]))]
        kept = np.zeros_like(weights)
        kept[order] = weights[order]
        return kept

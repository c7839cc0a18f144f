"""Draws the confusion matrix of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.train.history import Panel

MOST_NUMBERS = 12  # classes up to which each cell shows its count
MOST_NAMES = 30  # classes up to which the axes show all names


def confusion_panels(scores: dict[str, Any], labels: Sequence[Any]) -> list[Panel]:
    """Return a function that draws the confusion matrix of test data; none if the scores have no such matrix.

    Args:
        scores: `Predictions.scores`.
        labels: the classes, in the order of the matrix.
    """
    return [partial(_draw, counts=scores["confusion"], labels=labels)] if "confusion" in scores else []


def _draw(axis: Any, counts: NDArray[np.int64], labels: Sequence[Any]) -> None:
    """Draw each true class as a row, in the shares of what it was predicted as, with the counts."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    if len(labels) <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)
    places = range(0, len(labels), -(-len(labels) // MOST_NAMES))
    names = [str(labels[place]).replace("$", r"\$") for place in places]  # $ would start a formula
    axis.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel("predicted class, test part")
    axis.set_ylabel("true class")

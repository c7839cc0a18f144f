"""Weights that a file holds in pieces: what PyTorch computes out of them before it uses them.

`torch.nn.utils` gives modules weights that are computed: a weight norm is a direction and its length, a spectral norm
a weight and two vectors, pruning a weight and a mask; dynamic quantisation packs a layer's weights together. The pieces
go by the weight's name with an ending, or by one with `parametrizations.` in it. What is known becomes the weight.

Ref: https://docs.pytorch.org/docs/stable/nn.html#utilities
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.formats.pytorch.tensors import short
from cellstack.spec import FormatError

PIECE = re.compile(
    r"(?P<prefix>(?:.*[./:])?)(?:(?P<ended>[^./:]+)_(?P<ending>orig|mask|g|v|u)"
    r"|parametrizations\.(?P<within>[^./:]+)\.(?P<inner>original[01]?|\d+\..+))",
    re.DOTALL,
)
PACKED = re.compile(
    r"(?P<prefix>(?:.*[./:])?)(?:_all_weight_values\.(?P<number>\d{1,4})\.param\.(?P<what>.+)"
    r"|_packed_(?P<weight>weight_[ih]h)\.(?P<part>weight|bias)"
    r"|_packed_params\._packed_params\.(?P<linear>weight|bias))",
    re.DOTALL,
)
ALIKE, CLEARER = 1e-6, 10.0  # how far numbers of float32 may be apart; how much the one way must beat the other
WEIGHT_NORM, SPECTRAL_NORM, PRUNED = "weight norm", "spectral norm", "pruned"
KNOWN: dict[frozenset[str], tuple[str, tuple[str, ...]]] = {  # which pieces make what, and in which order it takes them
    frozenset(("g", "v")): (WEIGHT_NORM, ("g", "v")),
    frozenset(("original0", "original1")): (WEIGHT_NORM, ("original0", "original1")),
    frozenset(("orig", "mask")): (PRUNED, ("orig", "mask")),
    frozenset(("orig", "u", "v")): (SPECTRAL_NORM, ("orig", "u", "v")),
    frozenset(("original", "0._u", "0._v")): (SPECTRAL_NORM, ("original", "0._u", "0._v")),
}


@dataclass(eq=False, frozen=True)
class Derived:
    """A weight that is computed out of others when it is asked for; `np.asarray` computes it.

    Attributes:
        shape: its axes.
        how: in words.
        pieces: what it is computed out of.
        make: computes it.
    """

    shape: tuple[int, ...]
    how: str
    pieces: tuple[Any, ...]
    make: Callable[..., NDArray[Any]] = field(repr=False)

    dtype = "float32"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the weight: float64 where the first of its pieces is, else float32."""
        arrays = [np.asarray(piece) for piece in self.pieces]
        wanted = np.float64 if arrays[0].dtype == np.float64 else np.float32
        with np.errstate(all="ignore"):  # a direction of length 0 gives no number, as it does in PyTorch
            made = self.make(*(array.astype(np.float64) for array in arrays))
            return made.astype(wanted if dtype is None else dtype)


def joined(
    tensors: Mapping[str, Any],
    where: str,
    weights: re.Pattern[str] | None = None,
    directions: Mapping[str, int] | None = None,
    axes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return tensors by name, with weights in the place of their pieces.

    Args:
        tensors: by name; they aren't read.
        where: what messages call the file.
        weights: the names of weights to look for; None = any.
        directions: how many quantised layers have, by name, where it is known.
        axes: which axis of a weight under a spectral norm its u is of, by the weight's name, where it is known.

    Returns:
        The same, but for the pieces; in the same order, a weight where its first piece stood.

    Raises:
        FormatError: pieces that don't make a weight, or make one that is there too; packed weights of which it can't be
            told whose they are.
    """
    tensors = _unpacked(tensors, where, directions or {})
    groups: dict[str, dict[str, str]] = {}
    whose: dict[str, str] = {}
    for name in tensors:
        match = PIECE.fullmatch(name)
        if match is None:
            continue
        weight = match["prefix"] + (match["ended"] or match["within"])
        if weights is None or weights.fullmatch(weight):
            groups.setdefault(weight, {})[match["ending"] or match["inner"]] = name
            whose[name] = weight
    made = {
        weight: _made(f"{where}: tensor {short(weight, 200)}", tensors, pieces, (axes or {}).get(weight))
        for weight, pieces in groups.items()
    }
    for weight, tensor in made.items():
        if tensor is not None and weight in tensors:
            raise _twice(where, weight)
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        weight = whose.get(name, name)
        found[weight if made.get(weight) is not None else name] = made.get(weight) or tensor
    return found


def _twice(where: str, name: str) -> FormatError:
    return FormatError(f"{where}: tensor {short(name, 200)}: expected it once, found it whole and in pieces")


def _made(where: str, tensors: Mapping[str, Any], pieces: Mapping[str, str], axis: int | None) -> Derived | None:
    """Return the weight that these pieces make; None where they aren't pieces."""
    known = KNOWN.get(frozenset(pieces))
    if known is None:
        if any(name.startswith("original") for name in pieces):
            found = ", ".join(short(name, 200) for name in pieces.values())
            raise FormatError(
                f"{where}: expected what computes it to be a weight norm or a spectral norm, found {found}, which "
                "PyTorch computes it out of in a way that isn't known: remove_parametrizations before it is saved"
            )
        return None
    how, order = known
    parts = tuple(tensors[pieces[piece]] for piece in order)
    shapes = [tuple(part.shape) for part in parts]
    if how == WEIGHT_NORM:
        shape, fits = shapes[1], _norm_fits(*shapes)
        make = _weight_norm
    elif how == PRUNED:
        shape, fits = shapes[0], shapes[0] == shapes[1]
        make = np.multiply
    else:
        shape = shapes[0]
        ways = [at for at in (0, 1) if axis in (at, at - 2, None) and len(shape) == 2]
        ways = [at for at in ways if shapes[1:] == [(shape[at],), (shape[1 - at],)]]
        fits = bool(ways)
        make = partial(_spectral_norm, where, ways)
    if not fits:
        raise FormatError(f"{where}: expected the pieces of a {how}, found {', '.join(short(list(s)) for s in shapes)}")
    return Derived(shape, how, parts, make)


def _norm_fits(length: tuple[int, ...], direction: tuple[int, ...]) -> bool:
    return not length or (
        len(length) == len(direction) and all(a in (1, b) for a, b in zip(length, direction, strict=True))
    )


def _weight_norm(length: NDArray[Any], direction: NDArray[Any]) -> NDArray[Any]:
    """Return `length · direction / |direction|`, the norm over every axis along which there is one length."""
    axes = tuple(n for n in range(direction.ndim) if not length.ndim or length.shape[n] == 1)
    return direction * (length / np.sqrt(np.sum(direction**2, axis=axes, keepdims=True)))


def _spectral_norm(where: str, ways: list[int], weight: NDArray[Any], u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """Return the weight through its greatest singular value, as u and v have it.

    `ways` says which axes u may be of. Where a square weight leaves both, u tells: PyTorch makes it the direction of
    the weight times v, along the right axis, so it points there.
    """
    products = [(weight if at == 0 else weight.T) @ v for at in ways]
    sigmas = [u @ product for product in products]
    if len(ways) == 2 and abs(sigmas[0] - sigmas[1]) > ALIKE * abs(sigmas[0]):
        off = [1.0 - abs(sigma) / np.linalg.norm(product) for sigma, product in zip(sigmas, products, strict=True)]
        best = int(off[1] < off[0])
        if not off[1 - best] > CLEARER * max(off[best], ALIKE):
            raise FormatError(
                f"{where}: expected the vectors of a spectral norm to tell which axis of the square weight it is of, "
                "found that they don't: remove_spectral_norm before it is saved"
            )
        return weight / sigmas[best]
    return weight / sigmas[0]


def _unpacked(tensors: Mapping[str, Any], where: str, directions: Mapping[str, int]) -> dict[str, Any]:
    """Return the tensors with those of dynamically quantised layers under the names that they have in others."""
    counts: dict[str, set[int]] = {}
    matches = {name: PACKED.fullmatch(name) for name in tensors}
    for match in matches.values():
        if match and match["number"]:
            counts.setdefault(match["prefix"], set()).add(int(match["number"]))
    if not any(matches.values()):
        return dict(tensors)
    ways = {
        prefix: directions.get(prefix[:-1]) or _ways(prefix, len(numbers), tensors, where)
        for prefix, numbers in counts.items()
    }
    found: dict[str, Any] = {}
    biases = {
        match["prefix"] + match["weight"].replace("weight", "bias")
        for match in matches.values()
        if match and match["part"] == "bias"
    }
    for name, match in matches.items():
        if match is None:
            if name in biases:  # cells have theirs twice, and add the packed ones
                continue
            whole = name
        elif match["number"]:
            layer, back = divmod(int(match["number"]), ways[match["prefix"]])
            whole = f"{match['prefix']}{match['what']}_l{layer}{'_reverse' * back}"
        elif match["weight"]:
            what = match["weight"] if match["part"] == "weight" else match["weight"].replace("weight", "bias")
            whole = match["prefix"] + what
        else:
            whole = match["prefix"] + match["linear"]
        if match is not None and (whole in found or (whole in tensors and whole not in biases)):
            raise _twice(where, whole)
        found[whole] = tensors[name]
    return found


def _ways(prefix: str, count: int, tensors: Mapping[str, Any], where: str) -> int:
    """Return how many directions a packed layer has: its second one takes what the first takes, or what that gives."""
    shapes = []
    for number in range(min(count, 3)):
        weights = [tensors.get(f"{prefix}_all_weight_values.{number}.param.weight_{part}") for part in ("ih", "hh")]
        if any(weight is None or len(weight.shape) != 2 for weight in weights):
            raise FormatError(
                f"{where}: {short(prefix, 200)}: expected the packed weights of every layer, found others"
            )
        shapes.append([weight.shape[1] for weight in weights if weight is not None])
    widths, units = [width for width, _ in shapes], shapes[0][1]
    one = widths[1:] == [units] * (len(widths) - 1)
    both = count % 2 == 0 and widths[1] == widths[0] and widths[2:] == [2 * units] * (len(widths) - 2)
    if one and both:
        raise FormatError(
            f"{where}: {short(prefix, 200)}: expected packed weights whose widths tell two layers from two directions, "
            f"found {units} numbers in and {units} units"
        )
    return 2 if both else 1

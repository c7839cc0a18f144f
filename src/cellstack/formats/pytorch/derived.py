"""Weights that a file stores in pieces, from which PyTorch computes them before use.

`torch.nn.utils` computes weights of modules: weight norm from a direction and its length, spectral norm from a weight
and two vectors, pruning from a weight and a mask; dynamic quantisation packs a layer's weights together. The pieces are
named after the weight, with a suffix or with `parametrizations.` before it. Known pieces are joined to the weight.

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

from cellstack.cells.errors import FormatError
from cellstack.formats.pytorch.tensors import short

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
ALIKE, CLEARER = 1e-6, 10.0  # the tolerance for float32; by which factor one axis has to fit better than the other
WEIGHT_NORM, SPECTRAL_NORM, PRUNED = "weight norm", "spectral norm", "pruned"
KNOWN: dict[frozenset[str], tuple[str, tuple[str, ...]]] = {  # by its pieces, the method and the order of its arguments
    frozenset(("g", "v")): (WEIGHT_NORM, ("g", "v")),
    frozenset(("original0", "original1")): (WEIGHT_NORM, ("original0", "original1")),
    frozenset(("orig", "mask")): (PRUNED, ("orig", "mask")),
    frozenset(("orig", "u", "v")): (SPECTRAL_NORM, ("orig", "u", "v")),
    frozenset(("original", "0._u", "0._v")): (SPECTRAL_NORM, ("original", "0._u", "0._v")),
}


@dataclass(eq=False, frozen=True)
class Derived:
    """A weight that is computed from others on use; `np.asarray` computes it.

    Attributes:
        shape: its shape.
        how: the name of the method.
        pieces: the arguments of `make`.
        make: computes the weight.
    """

    shape: tuple[int, ...]
    how: str
    pieces: tuple[Any, ...]
    make: Callable[..., NDArray[Any]] = field(repr=False)

    dtype = "float32"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the weight: float64 if the first of its pieces is, else float32."""
        arrays = [np.asarray(piece) for piece in self.pieces]
        wanted = np.float64 if arrays[0].dtype == np.float64 else np.float32
        with np.errstate(all="ignore"):  # a direction of length 0 gives NaN, as in PyTorch
            made = self.make(*(array.astype(np.float64) for array in arrays))
            return made.astype(wanted if dtype is None else dtype)


def joined(
    tensors: Mapping[str, Any],
    where: str,
    weights: re.Pattern[str] | None = None,
    directions: Mapping[str, int] | None = None,
    axes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return tensors by name, with the pieces of weights replaced by the weights.

    Args:
        tensors: tensors by name; they aren't read.
        where: the file's name, for messages.
        weights: the names of weights to look for; None = any.
        directions: the number of directions of quantised layers, by name, if known.
        axes: for weights with spectral norm, the axis that u belongs to, by the weight's name, if known.

    Returns:
        The tensors in the same order, with each weight at the position of its first piece.

    Raises:
        FormatError: the pieces don't form a weight, the weight is also stored whole, or packed weights can't be
            assigned to layers and directions.
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
    return FormatError(f"{where}: tensor {short(name, 200)} is stored both whole and in pieces")


def _made(where: str, tensors: Mapping[str, Any], pieces: Mapping[str, str], axis: int | None) -> Derived | None:
    """Return the weight of these pieces; None if they aren't pieces."""
    known = KNOWN.get(frozenset(pieces))
    if known is None:
        if any(name.startswith("original") for name in pieces):
            found = ", ".join(short(name, 200) for name in pieces.values())
            raise FormatError(
                f"{where}: this parametrization isn't supported (found {found}), only weight norm and spectral norm: "
                "call remove_parametrizations before saving"
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
    """Return `length · direction / |direction|`, with the norm over the axes on which `length` has size 1."""
    axes = tuple(n for n in range(direction.ndim) if not length.ndim or length.shape[n] == 1)
    return direction * (length / np.sqrt(np.sum(direction**2, axis=axes, keepdims=True)))


def _spectral_norm(where: str, ways: list[int], weight: NDArray[Any], u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """Return the weight divided by its greatest singular value, computed from u and v.

    `ways` holds the axes that u may belong to. For a square weight these may be both; then the axis is the one on which
    u has the direction of the weight times v, because PyTorch computes u that way.
    """
    products = [(weight if at == 0 else weight.T) @ v for at in ways]
    sigmas = [u @ product for product in products]
    if len(ways) == 2 and abs(sigmas[0] - sigmas[1]) > ALIKE * abs(sigmas[0]):
        off = [1.0 - abs(sigma) / np.linalg.norm(product) for sigma, product in zip(sigmas, products, strict=True)]
        best = int(off[1] < off[0])
        if not off[1 - best] > CLEARER * max(off[best], ALIKE):
            raise FormatError(
                f"{where}: the axis of the spectral norm of this square weight can't be determined: call "
                "remove_spectral_norm before saving"
            )
        return weight / sigmas[best]
    return weight / sigmas[0]


def _unpacked(tensors: Mapping[str, Any], where: str, directions: Mapping[str, int]) -> dict[str, Any]:
    """Return the tensors, with those of dynamically quantised layers renamed to the names of plain layers."""
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
            if name in biases:  # cells store their biases twice, and use the packed ones
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
    """Return the number of directions of a packed layer, from the input widths of its first weights.

    The second weights have the width of the input if they are the other direction, that of the output if they are the
    next layer.
    """
    shapes = []
    for number in range(min(count, 3)):
        weights = [tensors.get(f"{prefix}_all_weight_values.{number}.param.weight_{part}") for part in ("ih", "hh")]
        if any(weight is None or len(weight.shape) != 2 for weight in weights):
            raise FormatError(
                f"{where}: {short(prefix, 200)}: the packed weights of a layer are missing or have another shape"
            )
        shapes.append([weight.shape[1] for weight in weights if weight is not None])
    widths, units = [width for width, _ in shapes], shapes[0][1]
    one = widths[1:] == [units] * (len(widths) - 1)
    both = count % 2 == 0 and widths[1] == widths[0] and widths[2:] == [2 * units] * (len(widths) - 2)
    if one and both:
        raise FormatError(
            f"{where}: {short(prefix, 200)}: packed weights with {units} features in and {units} units may be two "
            "layers or two directions, which isn't supported"
        )
    return 2 if both else 1

"""Complex tensors as pairs of real ones while `torch.export` records a module: ONNX computes with real numbers.

A complex input or output of the module is a real one with a last axis of 2 for the real and the imaginary part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold, pad
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from cellstack.capture.copied import duplicate

SUMS = ("add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__")
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply", "matmul", "__matmul__", "bmm", "einsum")
QUOTIENTS = ("div", "__truediv__", "divide")  # by real numbers
# Functions that compute each part of the result from the same part of the arguments
EACH = (
    *("permute", "transpose", "reshape", "view", "flatten", "unsqueeze", "squeeze", "expand", "repeat", "contiguous"),
    *("clone", "detach", "narrow", "slice", "select", "__getitem__", "chunk", "split", "unbind", "unfold", "pad"),
    *("roll", "flip", "cat", "stack", "neg", "sum", "mean"),
)
TRANSFORM = "fft_"  # which ONNX computes of pairs
FACTS = ("__get__", "size", "dim", "numel", "is_complex", "is_floating_point")  # of a tensor's type and shape


class Pair(Tensor):
    """A complex tensor, as its real and its imaginary part."""

    parts: tuple[Tensor, Tensor]

    @staticmethod
    def __new__(cls: Any, re: Tensor, im: Tensor) -> Pair:
        """Return the pair of two tensors of one shape."""
        made = Tensor._make_wrapper_subclass(cls, re.shape, dtype=re.dtype.to_complex(), device=re.device)
        made.parts = re, im
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what `run` doesn't compute."""
        raise NotImplementedError(f"{func} of complex tensors")


def paired(x: Tensor) -> Pair:
    """Return a real tensor with a last axis of 2, or a complex one, as a pair."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return Pair(x[..., 0], x[..., 1])


def run(func: Any, args: Any, kwargs: Any, again: Any) -> Any:
    """Return what a function of PyTorch returns, with pairs in the place of complex tensors.

    Args:
        func: the function.
        args, kwargs: its arguments.
        again: calls the function with other arguments.

    Returns:
        NotImplemented for a function that neither takes nor makes complex tensors.

    Raises:
        NotImplementedError: a function of complex tensors that isn't among those above.
    """
    name = getattr(func, "__name__", "")
    if name in MADE:
        return MADE[name](*args, **kwargs)
    if name.startswith(TRANSFORM):
        own, named = tree_map(lambda one: torch.complex(*one.parts) if isinstance(one, Pair) else one, (args, kwargs))
        return tree_map(lambda one: paired(one) if one.is_complex() else one, func(*own, **named))
    values, structure = tree_flatten((args, kwargs))
    if not any(isinstance(one, Pair) for one in values):
        return NotImplemented
    values = [paired(torch.as_tensor(one)) if _is_complex(one) else one for one in values]
    pairs = [one for one in values if isinstance(one, Pair)]
    made = OF_ONE.get(func, OF_ONE.get(name))
    if made is not None or name in FACTS:
        return func(*args, **kwargs) if made is None else made(pairs[0])

    def of(*parts: int) -> Any:
        """Call the function with these parts of its pairs, in order."""
        order, put = iter(parts), list[Any]()
        for one in values:
            real = isinstance(one, (Tensor, int, float)) and not isinstance(one, Pair)
            put.append(one.parts[next(order)] if isinstance(one, Pair) else one * 0 if real and drop else one)
        own, named = tree_unflatten(put, structure)
        return again(*own, **named)

    drop = False  # real numbers, of which the imaginary part is 0
    re = of(*[0] * len(pairs))
    if name in PRODUCTS and len(pairs) == 2:
        return Pair(re - of(1, 1), of(0, 1) + of(1, 0))
    drop = name in SUMS
    if name in EACH or drop or name in PRODUCTS or (name in QUOTIENTS and values[0] is pairs[-1]):
        im = of(*[1] * len(pairs))
        return type(re)(map(Pair, re, im)) if isinstance(re, (tuple, list)) else Pair(re, im)
    raise NotImplementedError(f"{name} of complex tensors: compute it from their real and imaginary parts")


def _is_complex(value: Any) -> bool:
    """Whether a value is a complex number, or a complex tensor that isn't a pair."""
    return isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex() and type(value) is not Pair)


def as_real(value: Any) -> Any:
    """Return a complex tensor, also as a pair, with a last axis of 2; anything else as it is."""
    if isinstance(value, Pair):
        return torch.stack(value.parts, -1)
    return torch.view_as_real(value.resolve_conj()) if isinstance(value, Tensor) and value.is_complex() else value


def with_real_ends(module: Any, inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a copy of a module that takes and returns real tensors in the place of complex ones, and its inputs."""
    made = duplicate(module)
    made.forward = partial(_real_forward, made.forward, [one.is_complex() for one in inputs])
    return made, tuple(map(as_real, inputs))


def _real_forward(forward: Any, places: list[bool], *args: Tensor) -> Any:
    given = [paired(one) if place else one for one, place in zip(args, places, strict=True)]
    return tree_map(as_real, forward(*given))


def _spectrum(
    x: Tensor,
    n_fft: int,
    hop_length: Any = None,
    win_length: Any = None,
    window: Any = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: Any = None,
    **_: Any,
) -> Pair:
    """Return `torch.stft` of real signals `[B, T]`: a pair `[B, F, frames]`."""
    x = pad(x[:, None], (n_fft // 2, n_fft // 2), mode=pad_mode)[:, 0] if center else x
    frames = x.unfold(-1, n_fft, hop_length or n_fft // 4) * _window(window, win_length, n_fft)
    spectrum = torch.fft.fft if onesided is False else torch.fft.rfft
    made = paired(spectrum(frames, norm="ortho" if normalized else "backward"))
    return Pair(*(part.transpose(1, 2) for part in made.parts))


def _signal(
    spectrum: Pair,
    n_fft: int,
    hop_length: Any = None,
    win_length: Any = None,
    window: Any = None,
    center: bool = True,
    normalized: bool = False,
    length: Any = None,
    **_: Any,
) -> Tensor:
    """Return `torch.istft` of one-sided spectra `[B, F, frames]`: real signals `[B, T]`."""
    window, hop = _window(window, win_length, n_fft), hop_length or n_fft // 4
    bins = torch.complex(*(part.transpose(1, 2) for part in spectrum.parts))
    frames = torch.fft.irfft(bins, n_fft, norm="ortho" if normalized else "backward") * window
    steps = (frames.shape[1] - 1) * hop + n_fft

    def added(parts: Tensor) -> Tensor:
        return fold(parts.transpose(1, 2), (1, steps), (1, n_fft), stride=(1, hop))[:, 0, 0]

    y = added(frames) / added((window * window).expand(1, frames.shape[1], n_fft))
    first = n_fft // 2 if center else 0
    return y[:, first : steps - first if length is None else first + length]


def _window(window: Any, length: Any, n_fft: int) -> Any:
    """Return a window of the length of the transform, with zeros on both sides."""
    window = torch.ones(length or n_fft) if window is None else window
    before = (n_fft - window.shape[0]) // 2
    return pad(window, (before, n_fft - window.shape[0] - before))


MADE = {
    "view_as_complex": paired,
    "complex": Pair,
    "polar": lambda size, angle: Pair(size * angle.cos(), size * angle.sin()),
    "stft": _spectrum,
    "istft": _signal,
}
OF_ONE = {
    "view_as_real": as_real,
    "abs": lambda x: (x.parts[0].square() + x.parts[1].square()).sqrt(),
    "angle": lambda x: torch.atan2(x.parts[1], x.parts[0]),
    "conj": lambda x: Pair(x.parts[0], -x.parts[1]),
    "real": lambda x: x.parts[0],
    "imag": lambda x: x.parts[1],
    Tensor.real.__get__: lambda x: x.parts[0],  # type: ignore[attr-defined]
    Tensor.imag.__get__: lambda x: x.parts[1],  # type: ignore[attr-defined]
}

"""Checks a module and its example, and prepares a copy of the module that `compile` can read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from cellstack.capture.copied import copied, duplicate, fold
from cellstack.capture.equality import agree
from cellstack.capture.nested import (
    array_of,
    flattened,
    fresh,
    has_packed,
    leaves_in,
    like,
    tensors_in,
)
from cellstack.capture.routes import directly
from cellstack.cells.errors import FormatError
from cellstack.network import Network

SETTINGS = (type(None), bool, int, float, str)  # types of arguments that keep their values in the example


class Prepared(NamedTuple):
    """A copy of a module, in evaluation mode and float32, without weights that are computed before each call.

    Attributes:
        name: the class of the module.
        module: the copy, which takes tensors as arguments, and returns a tuple of tensors: see `flattened`.
        inputs: the example: tensors.
        answers: its outputs for the example.
        direct: the network that `load` returns for the copy, or why it returns none.
        again: whether a second call returns the same.
        notes: differences from the module, for warnings.
    """

    name: str
    module: Any
    inputs: tuple[Any, ...]
    answers: list[Any]
    direct: Network | Exception
    again: bool
    notes: tuple[str, ...]


def named(module: Any) -> str:
    """Return the name of a module's class, of a scripted module that of the class before scripting."""
    return getattr(module, "original_name", type(module).__name__)


def checked(module: Any, example: Any, tolerance: Any) -> tuple[Any, ...]:
    """Check the arguments of `compile`, and return the example as a tuple.

    Raises:
        TypeError, ValueError: see `compile`.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"compile: expected a module of PyTorch, got {type(module).__name__}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(
            f"compile: expected tolerance to be a number, got {type(tolerance).__name__}: "
            "several inputs go into example as one tuple"
        )
    inputs = example if type(example) is tuple else (example,)
    leaves, tensors = leaves_in(inputs), tensors_in(inputs)
    if not tensors or not all(isinstance(value, (torch.Tensor, *SETTINGS)) for value in leaves):
        got = f"a tuple of {', '.join(type(v).__name__ for v in leaves)}" if isinstance(example, tuple) else None
        raise TypeError(
            "compile: expected example to be a tensor, such as torch.zeros(1, 10, 3), or a tuple of tensors, as the "
            f"module takes them, got {got or type(example).__name__}"
        )
    if not all(value.numel() for value in tensors):
        shapes = " and ".join(str(list(value.shape)) for value in tensors)
        raise ValueError(f"compile: expected an example with at least one row and one step, got {shapes}")
    return inputs


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore, at the end, the states of the random number generators from which a module may draw."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def copied_for(module: Any, inputs: tuple[Any, ...]) -> Prepared:
    """Return a copy of a module that is ready to be read.

    Raises:
        FormatError: the module can't be copied, or stores no values.
        ValueError: the module itself rejects the inputs, or returns NaN or no tensors for them.
    """
    name, still, notes = named(module), copied(module), list[str]()
    if has_packed(inputs):
        notes.append(
            "takes a packed sequence, which counts as two inputs: the padded sequence [B, T, I] and its lengths"
        )
    tensors = tensors_in(inputs)
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in still.parameters()):
        still = still.float()
        wide = [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in leaves_in(inputs)]
        inputs = like(inputs, wide)
    if any(part.is_meta for part in (*tensors, *still.parameters(), *still.buffers())):
        raise FormatError(
            f"compile: {name} is on the device 'meta', which stores no values: load its weights, by "
            "module.to_empty(device='cpu') and module.load_state_dict(...), and pass an example on the CPU"
        )
    if any(map(is_lazy, (*still.parameters(), *still.buffers()))):
        raise FormatError(f"compile: {name} draws its weights in its first call: call it with the example first")
    leaves, again = _first_calls(name, still, inputs)
    others = [type(value).__name__ for value in leaves if not isinstance(value, torch.Tensor)]
    answers = tensors_in(leaves)
    if not answers:
        raise ValueError(
            f"compile: {name} itself returns no tensor for the example, but {', '.join(others) or 'nothing'}"
        )
    dropped = [other for other in others if other != "NoneType"]
    if dropped:
        notes.append(
            f"also returns values that aren't tensors ({', '.join(dropped)}): the network returns the tensors only"
        )
    if any(value.is_floating_point() and bool(value.isnan().any()) for value in answers):
        raise ValueError(
            f"compile: {name} itself returns NaN for the example, so there is nothing to compare "
            "with: check its weights, and give an example for which it returns numbers"
        )
    folded = fold(still)
    direct, still = directly(still, len(tensors)), flattened(still, inputs)
    inputs = tuple(tensors_in(inputs))
    if folded and again:
        with torch.no_grad():
            after = still(*fresh(inputs))
        same = (agree(array_of(a), array_of(b), 1e-5) for a, b in zip(after, answers, strict=True))
        if not all(same):
            raise FormatError(
                f"compile: {name}: the values of {', '.join(folded)} are computed before each call, and fixing them "
                "changes the output: remove their parametrization first"
            )
    return Prepared(name, still, inputs, answers, direct, again, tuple(notes))


def _first_calls(name: str, module: Any, inputs: tuple[Any, ...]) -> tuple[list[Any], bool]:
    """Call a module twice; return its outputs, and whether the second call returns the same."""
    try:
        with torch.no_grad():
            answers, second = (leaves_in(module(*_copies(inputs))) for _ in range(2))
    except Exception as error:  # a module may raise any exception
        said = f"{type(error).__name__}: {error}"
        where = ", in evaluation mode, but accepts it in training mode" if _accepts_in_training(module, inputs) else ""
        raise ValueError(f"compile: {name} itself rejects the example{where}: {said}") from error
    same = [
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)
        for one, other in zip(answers, second, strict=False)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    ]
    return answers, all(same)


def _copies(inputs: tuple[Any, ...]) -> Any:
    """Return nested inputs with copies of their tensors."""
    return like(inputs, [fresh([one])[0] if isinstance(one, torch.Tensor) else one for one in leaves_in(inputs)])


def _accepts_in_training(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Return whether a module accepts the inputs in training mode."""
    try:
        with torch.no_grad():
            made = duplicate(module)
            made.train()
            made(*_copies(inputs))
    except Exception:  # it rejects them there too
        return False
    return True

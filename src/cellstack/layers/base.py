"""Base class and helpers of all layers: checking arguments, configuration, weights as NumPy, losses, constraints."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cellstack.cells.errors import ShapeError
from cellstack.layers import op, weights

Self = TypeVar("Self", bound="Layer")

CLASSES: dict[str, type[Layer]] = {}
"""All layer classes by name, to rebuild layers from nested configurations."""


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the torch dtype of that name; torch's default for None."""
    if dtype is None:
        return torch.get_default_dtype()
    as_torch = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(as_torch, torch.dtype) or not as_torch.is_floating_point:
        raise TypeError(f"expected dtype to be a floating dtype such as 'float32', got {dtype!r}")
    return as_torch


def as_input(owner: str, name: str, value: Any, like: Tensor) -> Tensor:
    """Return `value` as a tensor of the dtype and on the device of `like`.

    A tensor must already have them, unless it holds integers or `torch.autocast` is on. Arrays, lists and numbers are
    converted.

    Raises:
        TypeError: complex numbers, another floating dtype, a sparse tensor, or not an array of numbers.
        ValueError: a tensor on another device.
    """
    as_is = type(value) is Tensor and value.dtype is like.dtype and value.device == like.device
    if as_is and value.layout is torch.strided:
        return value
    if not isinstance(value, Tensor):
        if isinstance(value, PackedSequence):
            raise TypeError(
                f"{owner}: expected {name} as one tensor, got a PackedSequence, which only RNN, LSTM, GRU, SimpleRNN "
                "and Bidirectional support: use torch.nn.utils.rnn.pad_packed_sequence"
            )
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
            return as_input(owner, name, torch.stack(list(value)), like)
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{owner}: NumPy masked arrays aren't supported as {name}: pass the mask as mask=")
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise TypeError(f"{owner}: expected {name} to be an array of numbers: {error}") from None
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{owner}: expected {name} to hold real numbers, got an array of {array.dtype}")
        # torch supports only native byte order, at most 8 bytes per number, and no negative strides
        plain = (
            np.dtype(np.float64) if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
        )
        return torch.tensor(np.array(array, plain), dtype=like.dtype, device=like.device)
    if value.layout is not torch.strided:
        raise TypeError(f"{owner}: expected {name} to be a dense tensor, got one of layout {value.layout}")
    if value.device != like.device:
        raise ValueError(
            f"{owner}: expected {name} on {like.device}, the device of the weights, got {value.device}: "
            f"move one of them with .to()"
        )
    if value.is_complex():
        raise TypeError(f"{owner}: expected {name} to hold real numbers, got {value.dtype}")
    if value.is_floating_point() and value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        expected, came = (str(t.dtype).removeprefix("torch.") for t in (like, value))
        raise TypeError(
            f"{owner}: expected {name} of {expected}, the dtype of the weights, got {came}: "
            f"convert it with {name}.to(torch.{expected}), or the layer with layer.to(torch.{came})"
        )
    return value if value.dtype == like.dtype else value.to(like.dtype)


EXPORT_HINT = "cellstack.load(model).save('model.onnx') exports any cell of cellstack.layers"
"""What to use where torch's exporters don't support a layer."""


def recomputing() -> bool:
    """Whether a backward pass makes this call: torch.utils.checkpoint runs its part of the model a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records this call: these support only torch's operators."""
    if not torch.compiler.is_compiling():
        return torch._C._get_tracing_state() is not None
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def training_tensors() -> AbstractContextManager[Any]:
    """Return a context that leaves `torch.inference_mode`: tensors created in that mode can never be trained."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


MASKS = {"mask": "use the step", "reset": "a piece begins at the step"}
"""The meaning of True in each argument that has a bool per step."""


def as_mask(owner: str, value: Any, like: Tensor, name: str = "mask") -> Tensor:
    """Return one of the arguments in `MASKS` as a bool tensor on the device of `like`.

    Raises:
        TypeError: not bools. Other types are ambiguous: libraries disagree on whether 1 means to use or to skip a step.
    """
    if isinstance(value, Tensor):
        mask = value
    else:
        try:
            mask = torch.from_numpy(np.array(value))
        except (ValueError, TypeError) as error:
            raise TypeError(f"{owner}: expected {name} to be an array of bool: {error}") from None
    if op.wraps(mask) and not op.symbolic(mask):
        raise TypeError(
            f"{owner}: expected {name} as torch.Tensor, got {type(mask).__name__}: subclasses of torch.Tensor that "
            "define __torch_dispatch__ aren't supported here"
        )
    if mask.dtype != torch.bool:
        came = str(mask.dtype).removeprefix("torch.")
        raise TypeError(
            f"{owner}: expected {name} of dtype bool (True: {MASKS[name]}), got {came}: convert it, e.g. {name} != 0"
        )
    if mask.device != like.device:
        if isinstance(value, Tensor):
            raise ValueError(f"{owner}: expected {name} on {like.device}, got {mask.device}")
        mask = mask.to(like.device)
    return mask


def last_axis(owner: str, input_size: int | Sequence[int | None]) -> int:
    """Return the width I from an integer or from a shape, as its last axis (Keras's `build` takes shapes).

    Raises:
        ShapeError: not a width, or one below 1.
    """
    width = input_size[-1] if isinstance(input_size, Sequence) and len(input_size) else input_size
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or width < 1:
        raise ShapeError(f"{owner}: expected input_size to be a width of at least 1, got {input_size!r}")
    return int(width)


def _weight(owner: str, value: Any) -> Tensor:
    try:
        array = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (ValueError, TypeError) as error:
        raise TypeError(f"{owner}: expected weights as arrays of numbers: {error}") from None
    if array.is_complex():
        raise TypeError(f"{owner}: expected weights as arrays of real numbers, got {array.dtype}")
    return array


class Layer(nn.Module):
    """Base of all layers. A subclass records its constructor's arguments in `_config` and defines `build`."""

    _config: dict[str, Any]
    _like: Tensor  # carries dtype and device while a layer has no weights

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CLASSES.setdefault(cls.__name__, cls)

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name

    @property
    def _owner(self) -> str:
        return type(self).__name__ if self.name is None else f"{type(self).__name__} {self.name!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)
        if "_like" in self.__dict__:
            self._like = fn(self._like)
        return self

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        # `children()`, which skips repeated modules, takes a tenth of the time of a step.
        return all(child.built for child in self._modules.values() if isinstance(child, Layer))

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights for inputs of width `input_size`, or of this shape."""
        raise NotImplementedError

    def _trains(self, training: Any) -> bool:
        """Return the argument `training`, or the module's mode where it is None."""
        if training is None:
            return self.training
        if not isinstance(training, (bool, int, np.bool_)) or training not in (0, 1):
            raise TypeError(f"{self._owner}: expected training to be True, False or None, got {training!r}")
        return bool(training)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        return {key: describe(value) for key, value in self._config.items()}

    @classmethod
    def from_config(cls: type[Self], config: dict[str, Any]) -> Self:
        """Create a new layer, with new weights, from the result of `get_config`."""
        return cls(**{key: revive(value) for key, value in config.items()})

    def get_weights(self) -> list[NDArray[Any]]:
        """Return copies of all weights, cell by cell in the order of `cells.spec.ARRAYS`, in Keras's layout."""
        return [weight.detach().cpu().numpy().copy() for weight in self.parameters()]

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights, in the order of `get_weights`; build the layer first if necessary.

        Raises:
            ShapeError: the number of arrays or a shape differs; no weight is set.
            TypeError: not an array of real numbers.
        """
        arrays = [_weight(self._owner, value) for value in weights]
        if not self.built and arrays and arrays[0].ndim == 2:
            self.build(arrays[0].shape[0])
        named = list(self.named_parameters())
        if not self.built:
            raise ShapeError(f"{self._owner}: expected arrays of which the first is a kernel, got {len(arrays)} arrays")
        if len(named) != len(arrays):
            raise ShapeError(
                f"{self._owner}: expected {len(named)} arrays ({', '.join(name for name, _ in named)}), "
                f"got {len(arrays)}"
            )
        for (name, parameter), array in zip(named, arrays, strict=True):
            if parameter.shape != array.shape:
                raise ShapeError(f"{self._owner}: expected {name} {tuple(parameter.shape)}, got {tuple(array.shape)}")
        for (_, parameter), array in zip(named, arrays, strict=True):
            parameter.copy_(array)

    def count_params(self) -> int:
        """Return the total number of elements of the weights."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def losses(self) -> list[Tensor]:
        """Regularisation terms, one scalar each: of the current weights, and of the last call's output."""
        return losses(self)

    def apply_constraints(self) -> None:
        """Project the weights onto their constraints; call it after each step of the optimiser."""
        apply_constraints(self)

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which calls this method, and name the alternatives."""
        raise TypeError(
            f"{self._owner}: torch.jit.script isn't supported: use torch.jit.trace or torch.export; {EXPORT_HINT}"
        )

    def _loss_terms(self) -> Iterator[Tensor]:
        """Yield the layer's own terms, without those of its children."""
        yield from ()

    def _constrain(self) -> None:
        """Apply the layer's own constraints, without those of its children."""


def losses(module: nn.Module) -> list[Tensor]:
    """Return the regularisation terms of all layers in `module`; add their sum to the loss.

    Args:
        module: any torch module.

    Returns:
        One scalar tensor per term: of the current weights, and of the outputs of each layer's last call.

    >>> from cellstack import layers
    >>> [term.ndim for term in layers.losses(torch.nn.Sequential(layers.LSTMCell(4, kernel_regularizer="l2",
    ...                                                                          input_size=3)))]
    [0]
    """
    return [term for part in module.modules() if isinstance(part, Layer) for term in part._loss_terms()]


def apply_constraints(module: nn.Module) -> None:
    """Apply the constraints of all layers in `module`; call it after each step of the optimiser.

    Args:
        module: any torch module; its weights are changed in place.
    """
    for part in module.modules():
        if isinstance(part, Layer):
            part._constrain()


def describe(value: Any) -> Any:
    """Return `value` as it is represented in a configuration: a layer of ours as its class name and configuration."""
    if isinstance(value, Layer):
        return {"class_name": type(value).__name__, "config": value.get_config()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return storable(value)


def storable(value: Any) -> Any:
    """Return an argument in the form that a layer stores: dicts copied, NumPy's and Keras's objects as JSON types."""
    value = weights.described(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if isinstance(value, np.generic) else value


def revive(value: Any) -> Any:
    """Undo `describe`."""
    if isinstance(value, dict) and value.get("class_name") in CLASSES:
        return CLASSES[value["class_name"]].from_config(value["config"])
    if isinstance(value, list):
        return [revive(item) for item in value]
    return copy.deepcopy(value) if isinstance(value, nn.Module) or hasattr(value, "state_size") else value


def of_cell(name: str) -> Any:
    """Return a property that reads `name` from the layer's cell."""

    def read(self: Any) -> Any:
        return getattr(self.cell, name)

    read.__doc__ = f"`{name}` of the cell."
    return property(read)

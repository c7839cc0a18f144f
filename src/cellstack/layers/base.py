"""What every layer shares: arguments checked and converted, configuration, weights as NumPy, losses, constraints."""

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

from cellstack.layers import op, weights
from cellstack.spec import ShapeError

Self = TypeVar("Self", bound="Layer")

CLASSES: dict[str, type[Layer]] = {}
"""Every layer class by its name, so that a nested configuration finds its way back."""


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the torch dtype by its name; torch's default for None."""
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"expected dtype to be a floating dtype such as 'float32', got {dtype!r}")
    return found


def as_input(owner: str, name: str, value: Any, like: Tensor) -> Tensor:
    """Return `value` as a tensor of the dtype and on the device of `like`.

    A tensor has to have them already, unless it holds integers or `torch.autocast` is on, whose mixture of dtypes is
    meant; arrays, lists and numbers are converted.

    Raises:
        TypeError: complex numbers, another floating dtype, a sparse tensor, something that is no array of numbers.
        ValueError: a tensor on another device.
    """
    if type(value) is Tensor and value.dtype is like.dtype and value.device == like.device:
        if value.layout is torch.strided:
            return value
        raise TypeError(f"{owner}: expected {name} to be a dense tensor, got one of layout {value.layout}")
    if not isinstance(value, Tensor):
        if isinstance(value, PackedSequence):
            raise TypeError(
                f"{owner}: expected {name} as one tensor: a PackedSequence goes into an RNN, its kinds or a "
                "Bidirectional; elsewhere use torch.nn.utils.rnn.pad_packed_sequence"
            )
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
            return as_input(owner, name, torch.stack(list(value)), like)
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{owner}: expected {name} without a mask of its own, got a NumPy masked array: give mask=")
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:
            raise TypeError(f"{owner}: expected {name} to be an array of numbers: {error}") from None
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{owner}: expected {name} to hold real numbers, got an array of {array.dtype}")
        # torch takes native numbers of at most 8 bytes, with strides that don't turn back
        plain = (
            np.dtype(np.float64) if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
        )
        return torch.tensor(np.array(array, plain), dtype=like.dtype, device=like.device)
    if value.layout is not torch.strided:
        raise TypeError(f"{owner}: expected {name} to be a dense tensor, got one of layout {value.layout}")
    if value.device != like.device:
        raise ValueError(
            f"{owner}: expected {name} on {like.device}, where the weights are, got it on {value.device}: "
            f"move one of them with .to()"
        )
    if value.is_complex():
        raise TypeError(f"{owner}: expected {name} to hold real numbers, got {value.dtype}")
    if value.is_floating_point() and value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        wanted, came = (str(t.dtype).removeprefix("torch.") for t in (like, value))
        raise TypeError(
            f"{owner}: expected {name} of {wanted}, the dtype of the weights, got {came}: "
            f"convert it with {name}.to(torch.{wanted}), or the layer with layer.to(torch.{came})"
        )
    return value if value.dtype == like.dtype else value.to(like.dtype)


MEND = "cellstack.from_torch(model).save('model.onnx') writes any cell of ours"
"""What to do about an exporter of torch's that can't have a layer."""


def recomputing() -> bool:
    """Whether this call is made by a backward pass: torch.utils.checkpoint runs its part of the model a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """Whether this call is recorded by torch.jit.trace or for torch.onnx.export, which know torch's operators alone."""
    if not torch.compiler.is_compiling():
        return torch._C._get_tracing_state() is not None
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def training_tensors() -> AbstractContextManager[Any]:
    """Give a scope whose tensors outlive `torch.inference_mode`: those made within it could never be trained."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


MASKS = {"mask": "use the step", "reset": "a piece begins at the step"}
"""What True means in each argument that holds a bool for every step."""


def as_mask(owner: str, value: Any, like: Tensor, name: str = "mask") -> Tensor:
    """Return a mask, or what else `MASKS` names, as a bool tensor on the device of `like`.

    Raises:
        TypeError: anything but bools. Whether 0 and 1 mean "use" or "leave out" differs from place to place.
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
            f"{owner}: expected {name} of bool (True: {MASKS[name]}), got {came}: convert it, e.g. {name} != 0"
        )
    if mask.device != like.device:
        if isinstance(value, Tensor):
            raise ValueError(f"{owner}: expected {name} on {like.device}, got it on {mask.device}")
        mask = mask.to(like.device)
    return mask


def last_axis(owner: str, input_size: int | Sequence[int | None]) -> int:
    """Return the width I from itself or from a shape that ends in it (Keras's `build` takes shapes).

    Raises:
        ShapeError: no width, or one below 1.
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CLASSES.setdefault(cls.__name__, cls)

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name

    @property
    def _owner(self) -> str:
        return type(self).__name__ if self.name is None else f"{type(self).__name__} {self.name!r}"

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return all(child.built for child in self.children() if isinstance(child, Layer))

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Make the weights for inputs of width `input_size` (or of a shape that ends in it)."""
        raise NotImplementedError

    def _trains(self, training: Any) -> bool:
        """Return the argument `training`, or the module's mode where it is None."""
        if training is None:
            return self.training
        if not isinstance(training, (bool, int, np.bool_)) or training not in (0, 1):
            raise TypeError(f"{self._owner}: expected training to be True, False or None, got {training!r}")
        return bool(training)

    def get_config(self) -> dict[str, Any]:
        """Return everything that was given to the constructor, by argument."""
        return {key: describe(value) for key, value in self._config.items()}

    @classmethod
    def from_config(cls: type[Self], config: dict[str, Any]) -> Self:
        """Make a new layer, with weights of its own, from what `get_config` returned."""
        return cls(**{key: revive(value) for key, value in config.items()})

    def get_weights(self) -> list[NDArray[Any]]:
        """Return copies of all weights, cell by cell in the order of `cellstack.spec.ARRAYS`, in Keras's layout."""
        return [weight.detach().cpu().numpy().copy() for weight in self.parameters()]

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights, in the order of `get_weights`; builds the layer where it isn't built.

        Raises:
            ShapeError: the number of arrays or a shape differs. Nothing is set then.
            TypeError: something that is no array of real numbers.
        """
        arrays = [_weight(self._owner, value) for value in weights]
        if not self.built and arrays and arrays[0].ndim == 2:
            self.build(arrays[0].shape[0])
        named = list(self.named_parameters())
        if not self.built:
            raise ShapeError(f"{self._owner}: expected the weights, a kernel first, got {len(arrays)} arrays")
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
        """Return how many numbers the weights hold."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def losses(self) -> list[Tensor]:
        """Regularisation terms, one scalar each: of the weights as they are, and of the last call's output."""
        return losses(self)

    def apply_constraints(self) -> None:
        """Bring the weights back within their constraints; to be called after each step of an optimiser."""
        apply_constraints(self)

    def __prepare_scriptable__(self) -> Any:
        """Say what there is in place of torch.jit.script, which asks for this."""
        raise TypeError(f"{self._owner}: expected torch.jit.trace or torch.export in place of torch.jit.script; {MEND}")

    def _loss_terms(self) -> Iterator[Tensor]:
        """Give the layer's own terms, without those of its children."""
        yield from ()

    def _constrain(self) -> None:
        """Apply the layer's own constraints, without those of its children."""


def losses(module: nn.Module) -> list[Tensor]:
    """Return the regularisation terms of all layers within `module`; add their sum to the loss.

    Args:
        module: any torch module.

    Returns:
        One scalar tensor a term: of the weights as they are, and of the outputs of each layer's last call.

    >>> from cellstack import layers
    >>> [term.ndim for term in layers.losses(torch.nn.Sequential(layers.LSTMCell(4, kernel_regularizer="l2",
    ...                                                                          input_size=3)))]
    [0]
    """
    return [term for part in module.modules() if isinstance(part, Layer) for term in part._loss_terms()]


def apply_constraints(module: nn.Module) -> None:
    """Apply the constraints of all layers within `module`; to be called after each step of an optimiser.

    Args:
        module: any torch module; its weights are changed in place.
    """
    for part in module.modules():
        if isinstance(part, Layer):
            part._constrain()


def describe(value: Any) -> Any:
    """Return what stands for `value` in a configuration: a class name and a configuration for a layer of ours."""
    if isinstance(value, Layer):
        return {"class_name": type(value).__name__, "config": value.get_config()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return own(value)


def own(value: Any) -> Any:
    """Return an argument as a layer keeps it: a dict of its own, what JSON knows in place of NumPy's and Keras's."""
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

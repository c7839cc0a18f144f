"""`Dense`: a product along the last axis, run by the kernel, so that a stack and its head are one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from cellstack import native, spec
from cellstack.nodes.activations import MORE_ACTIVATIONS, activation_function, activation_gradient, check_activation
from cellstack.nodes.base import Array, KernelLayers, NodeRun, Shape, StateGradients, Stepwise, frozen_copy, one_dtype
from cellstack.spec import ShapeError


@dataclass(frozen=True, eq=False)
class Dense(Stepwise):
    """`activation(x·kernel + bias)` along the last axis.

    Args:
        kernel: `[I, O]`, float32 or float64.
        bias: `[O]` of the same dtype, or None.
        activation: see `Activation`.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a wrong dtype.
        ValueError: an unknown activation.
    """

    kernel: Array
    bias: Array | None = None
    activation: str = "linear"
    file_type = "dense"
    arrays: ClassVar = {"kernel": ("input_size", "units"), "bias": ("units",)}
    settings: ClassVar = {"activation": str}
    multiplied = ("kernel",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", frozen_copy("Dense", "kernel", self.kernel, ("I", "O")))
        if self.bias is not None:
            object.__setattr__(self, "bias", frozen_copy("Dense", "bias", self.bias, self.kernel.shape[1:]))
        object.__setattr__(self, "dtype", one_dtype("Dense", {"kernel": self.kernel, "bias": self.bias}))
        object.__setattr__(self, "input_size", self.kernel.shape[0])
        object.__setattr__(self, "activation", check_activation("Dense", self.activation))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        return (*super().check(owner, *shapes)[:-1], self.kernel.shape[1])

    @cached_property
    def packed(self) -> Any:
        """The weights in the kernel's layout, packed at the first use."""
        return native.dense(
            self.kernel, self.bias, spec.activation("linear" if self.numpy_activation else self.activation)
        )

    @cached_property
    def numpy_activation(self) -> Callable[[Array], Array] | None:
        """The activation as a NumPy function if the kernel doesn't implement it, else None."""
        return activation_function(self.activation) if self.activation in MORE_ACTIVATIONS else None

    @property
    def kernel_layers(self) -> KernelLayers:
        return KernelLayers((((self,), False),), 1, finish=self.numpy_activation)

    def apply(self, x: Array) -> Array:
        """Return `[..., O]` for `x [..., I]` of the kernel's dtype.

        Raises:
            ShapeError: a wrong width.
            TypeError: a wrong dtype.
        """
        if not x.ndim or x.shape[-1] != self.kernel.shape[0]:
            raise ShapeError(f"Dense: expected x [..., I={self.kernel.shape[0]}], got {x.shape}")
        if x.dtype != self.kernel.dtype:
            raise TypeError(f"Dense: expected x of {self.kernel.dtype}, got {x.dtype}")
        x = np.require(x, requirements=("C", "A"))
        y = np.empty((*x.shape[:-1], self.kernel.shape[1]), x.dtype)
        rows = native.Sequences(1, x.size // self.kernel.shape[0], x, 0, x.shape[-1])
        native.forward(rows, [native.Layer(self.packed, y=y)], 1)
        return self.numpy_activation(y) if self.numpy_activation else y

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        z = run.inputs[0].x @ self.kernel + (0 if self.bias is None else self.bias)
        return [activation_gradient(self.activation, z, dy) @ self.kernel.T]

    @property
    def summary(self) -> str:
        return self.activation

    def engine(self, dtype: np.dtype[Any]) -> str:
        after = f", {self.activation} in NumPy" if self.numpy_activation else ""
        return f"fused kernel ({native.isa()}, {dtype}): one product{after}"


WIDE = 128  # features that a product of the kernel should have: smaller groups share one, with zeros between them


@dataclass(frozen=True, eq=False)
class GroupedDense(Stepwise):
    """A dense layer of equal groups of features, each with its own matrix: a block-diagonal `x·kernel + bias`.

    Args:
        kernel: `[groups, I/groups, O/groups]`, float32 or float64.
        bias: `[O]` of the same dtype, or None.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a wrong dtype.

    >>> GroupedDense(np.array([[[2.0]], [[3.0]]])).apply(np.array([[1.0, 10.0]]))
    array([[ 2., 30.]])
    """

    kernel: Array
    bias: Array | None = None
    file_type = "grouped_dense"
    arrays: ClassVar = {"kernel": ("groups", "group_input_size", "group_units"), "bias": ("units",)}
    multiplied = ("kernel",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", frozen_copy("GroupedDense", "kernel", self.kernel, ("G", "I/G", "O/G")))
        if self.bias is not None:
            object.__setattr__(self, "bias", frozen_copy("GroupedDense", "bias", self.bias, (self.units,)))
        object.__setattr__(self, "dtype", one_dtype("GroupedDense", {"kernel": self.kernel, "bias": self.bias}))
        object.__setattr__(self, "input_size", self.kernel.shape[0] * self.kernel.shape[1])

    @property
    def units(self) -> int:
        """Width of the output."""
        return self.kernel.shape[0] * self.kernel.shape[2]

    def check(self, owner: str, *shapes: Shape) -> Shape:
        return (*super().check(owner, *shapes)[:-1], self.units)

    @cached_property
    def _packed(self) -> list[Any]:
        """The matrices in the kernel's layout, packed at the first use; small groups as one block-diagonal matrix."""
        groups, inputs, outputs = self.kernel.shape
        each = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * inputs <= WIDE))
        wide = np.zeros((groups // each, each, inputs, each, outputs), self.dtype)
        for n in range(each):
            wide[:, n, :, n] = self.kernel[n::each]
        matrices = wide.reshape(groups // each, each * inputs, each * outputs)
        return [native.dense(matrix, None, spec.activation("linear")) for matrix in matrices]

    def apply(self, x: Array) -> Array:
        """Return `[..., O]` for `x [..., I]`."""
        count = len(self._packed)
        inputs, rows = x.shape[-1] // count, x.reshape(1, -1, x.shape[-1])
        parts = np.empty((count, rows.shape[1], self.units // count), x.dtype)
        for number, packed in enumerate(self._packed):
            own = native.sequences(rows[:, :, number * inputs : (number + 1) * inputs])
            native.forward(own, [native.Layer(packed, y=parts[number])], 1)
        y = parts.swapaxes(0, 1).reshape(*x.shape[:-1], self.units)
        if self.bias is not None:
            y += self.bias
        return y

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        groups, inputs, outputs = self.kernel.shape
        parts = dy.reshape(*dy.shape[:-1], groups, 1, outputs)
        return [(parts @ self.kernel.swapaxes(1, 2)).reshape(*dy.shape[:-1], groups * inputs)]

    @property
    def summary(self) -> str:
        return f"{len(self.kernel)} groups"

    def engine(self, dtype: np.dtype[Any]) -> str:
        count = len(self._packed)
        return f"fused kernel ({native.isa()}, {dtype}): {count} product{'s' if count > 1 else ''}"

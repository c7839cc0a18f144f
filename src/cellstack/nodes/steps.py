"""Nodes in NumPy whose output at a step depends only on the input at that step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.activations import activation_function, activation_gradient, check_activation
from cellstack.nodes.base import Array, CellState, Flow, Node, NodeRun, Shape, StateGradients, Stepwise, shown
from cellstack.nodes.checks import check_choice, check_flag, check_number, frozen_copy, one_dtype
from cellstack.nodes.elementwise import Elementwise


@dataclass(frozen=True, eq=False)
class Standardise(Elementwise):
    """`(x - mean) / scale` per feature, so that a model takes raw data.

    Args:
        mean: `[I]`.
        scale: `[I]`, without zeros.

    Raises:
        ShapeError: the shapes aren't both `[I]`.
        TypeError: the dtypes aren't both float32 or both float64.
        ValueError: a scale of zero.
    """

    mean: Array
    scale: Array
    file_type = "standardise"
    about = "(x - mean) / scale"
    arrays: ClassVar = {"mean": ("input_size",), "scale": ("input_size",)}
    multiplied = ("scale",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", frozen_copy("Standardise", "mean", self.mean, ("I",)))
        object.__setattr__(self, "scale", frozen_copy("Standardise", "scale", self.scale, self.mean.shape))
        object.__setattr__(self, "dtype", one_dtype("Standardise", {"mean": self.mean, "scale": self.scale}))
        object.__setattr__(self, "input_size", len(self.mean))
        if (self.scale == 0).any():
            at = int(np.argmax(self.scale == 0))
            raise ValueError(f"Standardise: expected a nonzero scale for every feature, got 0 for feature {at}")

    def apply(self, x: Array) -> Array:
        """Return `(x - mean) / scale`, in the shape of `x [..., I]`."""
        return (x - self.mean) / self.scale


@dataclass(frozen=True, eq=False)
class Scale(Elementwise):
    """`x·scale + shift` per feature, such as a folded batch normalisation in inference.

    For a batch normalisation, `scale = gamma / sqrt(variance + epsilon)` and `shift = beta - mean·scale`: see
    `of_statistics`.

    Args:
        scale: `[W]`.
        shift: `[W]`.

    Raises:
        ShapeError: the shapes aren't both `[W]`.
        TypeError: the dtypes aren't both float32 or both float64.

    >>> Scale(np.array([2.0, 3.0]), np.array([0.0, 1.0])).apply(np.ones((1, 2)))
    array([[2., 4.]])

    Ref: Ioffe and Szegedy 2015, "Batch Normalization", alg. 2, line 11.
    """

    scale: Array
    shift: Array
    file_type = "scale"
    about = "x·scale + shift"
    arrays: ClassVar = {"scale": ("input_size",), "shift": ("input_size",)}
    multiplied = ("scale",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", frozen_copy("Scale", "scale", self.scale, ("W",)))
        object.__setattr__(self, "shift", frozen_copy("Scale", "shift", self.shift, self.scale.shape))
        object.__setattr__(self, "dtype", one_dtype("Scale", {"scale": self.scale, "shift": self.shift}))
        object.__setattr__(self, "input_size", len(self.scale))

    @classmethod
    def of_statistics(
        cls, mean: Array, variance: Array, epsilon: float, gamma: Array | None = None, beta: Array | None = None
    ) -> Scale:
        """Return the node for a batch normalisation in inference, folded in float64.

        Args:
            mean: `[W]`; determines the dtype of the node.
            variance: `[W]`.
            epsilon: added to the variance.
            gamma: `[W]`; None: ones.
            beta: `[W]`; None: zeros.

        Raises:
            ValueError: a variance plus epsilon that isn't positive.
        """
        deviation = variance.astype(np.float64) + epsilon
        if not (deviation > 0.0).all():
            raise ValueError("expected positive variances, found others")
        scale = (1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(deviation)
        shift = (0.0 if beta is None else beta.astype(np.float64)) - mean.astype(np.float64) * scale
        return cls(scale.astype(mean.dtype), shift.astype(mean.dtype))

    def apply(self, x: Array) -> Array:
        """Return `x·scale + shift`, in the shape of `x [..., W]`."""
        return x * self.scale + self.shift


@dataclass(frozen=True, eq=False)
class Activation(Stepwise):
    """An activation of cells, or one that only nodes have, such as softmax.

    Args:
        activation: what `cells.activations.activation` parses, such as `"relu"` or `"hard_sigmoid(0.2, 0.5)"`; or a
            name in `nodes.activations.MORE_ACTIVATIONS`, such as `"softmax"`.

    Raises:
        ValueError: an unknown name, or invalid parameters.
    """

    activation: str
    file_type = "activation"
    about = "{0.activation}"
    keeps_width = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", check_activation("Activation", self.activation))

    def apply(self, x: Array) -> Array:
        """Return the activation of `x [..., W]`."""
        return activation_function(self.activation)(x)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [activation_gradient(self.activation, run.inputs[0].x, dy)]


@dataclass(frozen=True, eq=False)
class Power(Elementwise):
    """`x^exponent`, elementwise: 0.5 is the square root, -1 the reciprocal.

    Args:
        exponent: a finite number.

    Raises:
        ValueError: another exponent.

    >>> Power(0.5).apply(np.array([4.0, 9.0]))
    array([2., 3.])
    """

    exponent: float
    file_type = "power"
    about = "x^{0.exponent:g}"
    keeps_width = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponent", check_number("Power", "exponent", self.exponent))

    def apply(self, x: Array) -> Array:
        """Return the powers of `x [..., W]`."""
        with np.errstate(all="ignore"):
            known = {0.5: np.sqrt, -1.0: np.reciprocal}.get(self.exponent)
            return known(x) if known else x**self.exponent


FUNCTIONS = ("abs", "cos", "log", "sin")


@dataclass(frozen=True, eq=False)
class Function(Elementwise):
    """A function of each number that isn't an activation of cells.

    Args:
        function: `"abs"`, `"cos"`, `"log"` or `"sin"`.

    Raises:
        ValueError: another function.

    >>> Function("abs").apply(np.array([-2.0, 3.0]))
    array([2., 3.])
    """

    function: str
    file_type = "function"
    about = "{0.function}"
    keeps_width = True

    def __post_init__(self) -> None:
        check_choice("Function", "function", self.function, FUNCTIONS)

    def apply(self, x: Array) -> Array:
        """Return the function of `x [..., W]`."""
        with np.errstate(all="ignore"):
            return getattr(np, self.function)(x)


@dataclass(frozen=True, eq=False)
class Clip(Elementwise):
    """`min(max(x, low), high)`, elementwise; NaN stays NaN.

    Args:
        low: the lower bound; None: no bound.
        high: the upper bound; None: no bound.

    Raises:
        ValueError: no bound at all, a bound that isn't a finite number, or low above high.

    >>> Clip(0.0, 2.0).apply(np.array([-1.0, 1.0, 3.0]))
    array([0., 1., 2.])
    """

    low: float | None = None
    high: float | None = None
    file_type = "clip"
    keeps_width = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_number("Clip", name, getattr(self, name)))
        if self.low is None and self.high is None:
            raise ValueError("Clip: expected low or high, got neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"Clip: expected low <= high, got {self.low:g} and {self.high:g}")

    def apply(self, x: Array) -> Array:
        """Return `x [..., W]` clipped to the bounds."""
        y = x if self.low is None else np.maximum(x, self.low)
        return y if self.high is None else np.minimum(y, self.high)

    @property
    def summary(self) -> str:
        ends = [f"{word} {bound:g}" for word, bound in (("from", self.low), ("to", self.high)) if bound is not None]
        return " ".join(ends)


@dataclass(frozen=True, eq=False)
class Embedding(Stepwise):
    """Look up rows of a table: ids `[B, T]` to `[B, T, E]`.

    Ids are integers, or floats with integer values. At masked steps they may have any value.

    Args:
        table: `[V, E]`, float32 or float64.
        mask_zero: mask the steps whose id is 0 for the following nodes, as in Keras.

    Raises:
        ShapeError: the shape isn't `[V, E]`.
        TypeError: a wrong dtype, or a flag that isn't a bool.

    >>> Embedding(np.arange(6.0).reshape(3, 2)).apply(np.array([[2, 0]]))
    array([[[4., 5.],
            [0., 1.]]])
    """

    table: Array
    mask_zero: bool = False
    file_type = "embedding"
    arrays: ClassVar = {"table": ("ids", "units")}
    axes = (1, 2)
    takes_ids = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", frozen_copy("Embedding", "table", self.table, ("V", "E")))
        object.__setattr__(self, "dtype", self.table.dtype)
        check_flag("Embedding", "mask_zero", self.mask_zero)
        object.__setattr__(self, "makes_mask", self.mask_zero)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != 1:
            raise ShapeError(f"{owner}: Embedding expected ids [B, T], got {shown(shape)}")
        return (*shape, self.table.shape[1])

    def ids(self, x: Array) -> NDArray[np.intp]:
        """Return the ids `x` as row indices.

        Raises:
            TypeError: ids that aren't numbers.
            ValueError: ids that aren't integers, or out of range.
        """
        if x.dtype.kind not in "biuf":
            raise TypeError(f"Embedding: expected ids to be integers, got {x.dtype}")
        if x.dtype.kind == "f" and not (x == np.floor(x)).all():  # True for NaN too
            raise ValueError("Embedding: expected ids to be integers, got numbers that aren't whole")
        last = len(self.table) - 1
        if x.size and (x.min() < 0 or x.max() > last):
            got = f"{x.min()}" if x.min() == x.max() else f"{x.min()} to {x.max()}"
            raise ValueError(f"Embedding: expected ids from 0 to {last}, got {got}")
        return x.astype(np.intp)

    def apply(self, x: Array) -> Array:
        """Return the rows `[..., E]` for the ids `x [...]`."""
        return self.table[self.ids(x)]

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        ids = self.ids(flow.x if flow.mask is None else np.where(flow.mask, flow.x, 0))
        return flow._replace(x=self.table[ids], mask=self.mask_of(flows))

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        """Return nothing: ids have no gradient."""
        return []

    def kept(self, x: Array, *others: Array) -> NDArray[np.bool_]:
        return x != 0

    @property
    def numbers_read(self) -> int:
        """See `Node.numbers_read`: one row of the table."""
        return self.table.shape[1]

    @property
    def summary(self) -> str:
        return f"{self.table.shape[0]:,} ids{', 0 is masked' if self.mask_zero else ''}"


@dataclass(frozen=True, eq=False)
class StepMask(Node):
    """Mask the steps of a sequence `x [B, T, W]` whose flag, in a second input `[B, T]`, is 0.

    The values of the steps don't change.

    >>> StepMask().kept(np.ones((1, 3, 2)), np.array([[1.0, 1.0, 0.0]]))
    array([[ True,  True, False]])
    """

    file_type = "step_mask"
    why_whole = "it takes the flags of a whole sequence, which a stream doesn't have: leave padding out of the stream"
    about = "steps whose flag is 0"
    inputs = 2
    axes = (None, 2)
    makes_mask = True
    checks_late = True

    def check(self, owner: str, *shapes: Shape) -> Shape:
        x, flags = shapes
        if len(x) != 2 or len(flags) != 1 or (None not in (x[0], flags[0]) and x[0] != flags[0]):
            raise ShapeError(
                f"{owner}: StepMask expected a sequence [B, T, W] and its flags [B, T], "
                f"got {shown(x)} and {shown(flags)}"
            )
        return (flags[0] if x[0] is None else x[0], x[1])

    def kept(self, x: Array, *others: Array) -> NDArray[np.bool_]:
        return others[0] != 0

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        return Flow(flows[0].x, self.mask_of(flows), flows[0].reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [dy, np.zeros_like(run.inputs[1].x)]


@dataclass(frozen=True, eq=False)
class Masking(Stepwise):
    """Mask the steps all of whose features equal `value`, and set them to zeros.

    Args:
        value: the value that marks a masked step.

    Raises:
        ValueError: the value isn't a finite number.

    >>> Masking(-1.0).kept(np.array([[[-1.0, -1.0], [-1.0, 2.0]]]))
    array([[False,  True]])
    """

    value: float = 0.0
    file_type = "masking"
    about = "steps of {0.value:g}"
    axes = (2, 2)
    keeps_width = True
    makes_mask = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", check_number("Masking", "value", self.value))

    def kept(self, x: Array, *others: Array) -> NDArray[np.bool_]:
        return (x != x.dtype.type(self.value)).any(axis=-1)

    def apply(self, x: Array) -> Array:
        """Return `x [..., W]` with zeros at masked steps."""
        return np.where(self.kept(x)[..., None], x, x.dtype.type(0))

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [np.where(self.kept(run.inputs[0].x)[..., None], dy, 0)]

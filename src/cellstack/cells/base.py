"""What a kind of cell declares, and the operations over which its step is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from cellstack.cells.arguments import KEYWORD, POSITIONAL, RECURRENT, Argument
from cellstack.cells.arrays import BIAS, KERNEL, KERNEL_GAIN, RECURRENT_GAIN, RECURRENT_KERNEL, Array

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec

V = TypeVar("V")  # a vector of a view: an array, a tensor, the name of a value in a graph …


class State(NamedTuple):
    """State of one LSTM layer after a step, each `[B, H]`; a projected h is `[B, P]`. A stack has a tuple of these."""

    h: Any
    c: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pair when stacked, `(2, B, H)`."""
        return (len(self), *self.h.shape)


class HiddenState(NamedTuple):
    """State of one GRU or SimpleRNN layer, which has no cell state: h alone, `[B, H]`."""

    h: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape when stacked, `(1, B, H)`."""
        return (len(self), *self.h.shape)


class MatrixState(NamedTuple):
    """The state of an mLSTM.

    Attributes:
        C: the memory, `[B, heads, dk, dv]`: what `q` retrieves is `Cᵀq`.
        n: the normaliser, `[B, heads, dk]`.
        m: the stabiliser, `[B, heads]`: C and n are stored divided by e^m.
    """

    C: Any
    n: Any
    m: Any


class Ops(Protocol[V]):
    """The operations of a step, over row vectors; each view implements them once for all kinds.

    A vector has H columns, or G·H with a block of H for each of G gates; that of a backbone has U. `product` and
    `weight` take the names of arrays, as in `CellSpec.shapes`. Values of an mLSTM have a part for each head: a number,
    a vector or a matrix.
    """

    def product(self, v: V, name: str, part: slice | int | None = None) -> V:
        """Return `v` times a matrix; or times the columns of some of its gates, or one of several matrices."""
        ...

    def weight(self, name: str, row: int | None = None) -> V:
        """Return a vector of weights, or a row of an array of them."""
        ...

    def split(self, v: V, count: int) -> Sequence[V]:
        """Return the `count` blocks of H columns of a vector."""
        ...

    def add(self, a: V, b: V) -> V:
        """Return `a + b`."""
        ...

    def mul(self, a: V, b: V) -> V:
        """Return `a⊙b`."""
        ...

    def div(self, a: V, b: V) -> V:
        """Return `a / b`, elementwise."""
        ...

    def sub(self, a: V, b: V) -> V:
        """Return `a - b`."""
        ...

    def one_minus(self, v: V) -> V:
        """Return `1 - v`."""
        ...

    def exp(self, v: V) -> V:
        """Return `e^v`."""
        ...

    def log_sigmoid(self, v: V) -> V:
        """Return `log σ(v)`."""
        ...

    def maximum(self, a: V, b: V) -> V:
        """Return the larger of `a` and `b`, elementwise. Where they are equal, each has half of the gradient."""
        ...

    def select(self, test: V, a: V, b: V | None = None) -> V:
        """Return `a` where `test` isn't 0, else `b`, or 0 without one; `test` has no gradient."""
        ...

    def clip(self, v: V, bound: float | None) -> V:
        """Return `v` clipped to ±bound; its slope is 0 at the bounds. None: `v` itself."""
        ...

    def norm(self, v: V, blocks: Sequence[int] = (1,)) -> V:
        """Return `(v - mean) / sqrt(variance + epsilon)`, separately for each block, given as a number of gates."""
        ...

    def gate(self, name: str, z: V) -> V:
        """Return a gate: the activation of `z` clipped to ±`spec.clip`. Views may trace and patch it."""
        ...

    def record(self, name: str, v: V) -> V:
        """Return `v`: a gate without activation, or a state that the step uses. Views may trace and patch it."""
        ...

    def activation(self, slot: str, v: V) -> V:
        """Return the activation of one of the kind's `outputs`, or of the `"backbone"`."""
        ...

    def dropped(self, v: V) -> V:
        """Return h or the candidate, see `Kind.drops`, after recurrent dropout, in training."""
        ...

    def features(self, x: V) -> V:
        """Return the columns of x that the kernel multiplies: all but the last one, of a cell with a scalar."""
        ...

    def scalar(self, x: V) -> V:
        """Return the last column of x, a number of the step that is the same for all units."""
        ...

    def absolute(self, v: V) -> V:
        """Return `|v|`."""
        ...

    def affine(self, v: V, factor: float = 1.0, offset: float = 0.0) -> V:
        """Return `factor·v + offset`."""
        ...

    def parts(self, x: V, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[V]:
        """Return consecutive columns of x by head, in these shapes."""
        ...

    def joined(self, v: V) -> V:
        """Return the vectors of all heads, one after the other."""
        ...

    def scaled(self, v: V, s: V, axes: int = 1) -> V:
        """Return the vector, or with two axes the matrix, of each head times the head's number."""
        ...

    def divided(self, v: V, s: V) -> V:
        """Return the vector of each head divided by the head's number."""
        ...

    def dot(self, a: V, b: V) -> V:
        """Return the inner product of two vectors of each head, a number."""
        ...

    def outer(self, a: V, b: V) -> V:
        """Return `a·bᵀ` of two vectors of each head, a matrix."""
        ...

    def retrieved(self, M: V, q: V) -> V:
        """Return `Mᵀq` of each head."""
        ...


def product(ops: Ops[V], spec: CellSpec, v: V, name: str) -> V:
    """Return `v` times `kernel` or `recurrent_kernel`, normalised if layer normalisation applies to each product.

    Without a kernel, x is the product with it.
    """
    out = ops.product(v, name) if spec.use_kernel or name != "kernel" else v
    if not spec.layer_norm or spec.joint:
        return out
    gain = {"kernel": "kernel_gain", "recurrent_kernel": "recurrent_gain"}[name]
    return ops.mul(ops.norm(out, spec.of_kind.blocks(spec)), ops.weight(gain))


def biased(ops: Ops[V], spec: CellSpec, v: V, row: int | None = None) -> V:
    """Return `v` plus the bias, or a row of it; `v` itself where the cell has none."""
    return ops.add(v, ops.weight("bias", row)) if spec.use_bias else v


def inputs(ops: Ops[V], spec: CellSpec, x: V) -> V:
    """Return `x·kernel + bias`, for kinds with one bias; without the bias if joint normalisation comes before it."""
    out = product(ops, spec, x, "kernel")
    return out if spec.joint else biased(ops, spec, out)


def sums(ops: Ops[V], spec: CellSpec, a: V, h: V) -> V:
    """Return the pre-activations for kinds that add the two products; `a` is the result of `inputs`.

    With a backbone, the two products add up to its first pre-activations, and the result is a product with its output.
    """
    z = ops.add(a, product(ops, spec, h, "recurrent_kernel"))
    if spec.backbone_units:
        for layer in range(spec.backbone_layers - 1):
            z = ops.product(ops.activation("backbone", z), "backbone_kernel", layer)
            z = ops.add(z, ops.weight("backbone_bias", layer)) if spec.use_bias else z
        z = ops.product(ops.activation("backbone", z), "gate_kernel")
        return ops.add(z, ops.weight("gate_bias")) if spec.use_bias else z
    if not spec.joint:
        return z
    return biased(ops, spec, ops.mul(ops.norm(z, spec.of_kind.blocks(spec)), ops.weight("kernel_gain")))


ROLES = {
    "write": "input gate: how much of the candidate is written",
    "keep": "forget gate: how much of the state is kept",
    "candidate": "candidate: the new value that may be written",
    "output": "output gate: how much of the state is output",
    "reset": "reset gate: how much of the state the candidate uses",
    "time": "time gate: how far the candidates have changed since the previous step",
    "slope": "slope: how fast the time gate changes with the time since the previous step",
}
"""The roles of gates, and what they mean."""


def gated_update(spec: CellSpec, gates: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the factor by which a step keeps its memory, and what it adds to it; see `Kind.update`.

    A missing gate of the two that keep and write is 1 minus the other one.
    """
    if spec.scalar or (spec.joint and spec.of_kind.memory != "h"):
        return None  # an attention, or the normalisation of the state, scales both
    values = {role: gates[gate] for gate, role in spec.of_kind.gates.items()}
    if len(values) < len(spec.of_kind.gates):
        raise NotImplementedError(f"{spec.of_kind.title}: several gates have the same role, so it needs its own update")
    if not {"keep", "write"} & set(values):
        return None
    kept = values["keep"] if "keep" in values else 1.0 - values["write"]
    return kept, (values["write"] if "write" in values else 1.0 - kept) * values["candidate"]


class Foreign(NamedTuple):
    """A kind of cell in another format.

    Args:
        name: its name there.
        order: the order of its gates there, in our letters.
        letters: that format's letters of these gates, where it has an array for each of them.
    """

    name: str
    order: str
    letters: str = ""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of cell.

    Args:
        name: the kind's name in a `CellSpec` and in files.
        title: its name in texts, and that of the layer.
        gates: the order of their blocks in every array that has H columns per gate, with each gate's role, one of
            `ROLES`.
        state: the type of the state, h first if it is one.
        trace: the type of the values at every step: the gates, then the states, h last.
        step: the equations: returns the gates, followed by the `planes`, and the states after a step before zoneout,
            after h if that isn't a state, from the operations, the description, the result of `prepared`, and the
            states before.
        inputs: returns the part of the pre-activations that depends on x only, `[…, G·H]`, from the operations, the
            description and the features of x; it is computed for all steps at once where the view has them.
        arrays: its arrays in the order in which they are listed, passed and saved, without initial states. Without
            `RECURRENT_KERNEL` no sum has a product with h.
        drops: what recurrent dropout applies to: h in that product, `"h"`, or the `"candidate"`.
        scalar: the flag with which the last column of x is a number of the step, which isn't multiplied by the kernel;
            "": the kind has none.
        flags: arguments that not all kinds have: settings of `CellSpec`, and arguments of layers and cells.
        without: arguments of all other kinds that this one doesn't have.
        defaults: values of arguments whose default differs from that of other kinds.
        positions: which arguments Keras has at another position than `arguments.POSITIONAL`, and which of its `flags`
            it takes by position: the arguments after the first of which each follows.
        outputs: activations in addition to the gates'.
        fixed: gates whose activations are part of the step: `gate_activations` can't set them.
        normed: numbers of gates that layer normalisation normalises together.
        planes: what the forward pass of the kernel saves per step in addition to the gates.
        memory: the state that the gates keep and write.
        stabiliser: the state that is the logarithm of the scale of `memory`, and with which f is scaled; "": none.
        zoneout: the states that zoneout may keep, and the argument that is the rate of each.
        update: returns, from the description and the values of the gates by name, the factor by which a step keeps
            `memory`, and what it adds to it, before zoneout and clipping; None if the gates alone don't determine it.
        names: its name and order of gates in `"torch"`, `"keras"` (2 and later), `"keras1"`, `"cudnn"` (Keras's layers
            on it), `"rtneural"` and `"onnx"`, where they have it. Writers refuse kinds that their format doesn't have.
        refuses: returns why a state from the caller can't be one, from its arrays or tensors by name; "" if it can.
        meanings: of states other than h, and of gates where `ROLES` isn't precise.
        ref: papers.
        doc: what follows "One step of" in the documentation of torch's cell: its long name and equations, and after
            `Ref:` papers for its flags too.
    """

    name: str
    title: str
    gates: dict[str, str]
    state: type[Any]
    trace: type[Any]
    step: Callable[..., tuple[Sequence[Any], Sequence[Any]]]
    inputs: Callable[..., Any] = inputs
    arrays: tuple[Array, ...] = (KERNEL, RECURRENT_KERNEL, BIAS, KERNEL_GAIN, RECURRENT_GAIN)
    drops: str = "h"
    scalar: str = ""
    flags: tuple[Argument, ...] = ()
    without: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    normed: tuple[int, ...] | None = None
    planes: Callable[[CellSpec], tuple[str, ...]] = lambda spec: ()
    memory: str = "h"
    stabiliser: str = ""
    zoneout: dict[str, str] = field(default_factory=lambda: {"h": "zoneout"})
    update: Callable[[CellSpec, Mapping[str, Any]], tuple[Any, Any] | None] = gated_update
    names: dict[str, Foreign] = field(default_factory=dict)
    refuses: Callable[[Mapping[str, Any]], str] = lambda state: ""
    meanings: dict[str, str] = field(default_factory=dict)
    ref: str = ""
    doc: str = ""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the activations: the gates, then `outputs`."""
        return (*self.gates, *self.outputs)

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the random masks of a step in training, those that the kernel has for them."""
        return ("recurrent_dropout", *self.zoneout.values())

    @property
    def joins(self) -> bool:
        """Whether every pre-activation is the sum of a product with x and one with h, which may be normalised."""
        return self.has_recurrent_kernel and "reset" not in self.gates.values()

    @property
    def has_recurrent_kernel(self) -> bool:
        """Whether h is multiplied by a matrix, `recurrent_kernel`."""
        return RECURRENT_KERNEL in self.arrays

    @cached_property
    def every_array(self) -> tuple[Array, ...]:
        """Its arrays, then the initial states."""
        names = self.state._fields if "learn_initial_state" in self.settings else ()
        initial = (Array(f"initial_{s}", "P" if s == "h" else "H", "zeros", "learn_initial_state") for s in names)
        return (*self.arrays, *initial)

    @property
    def gated(self) -> bool:
        """Whether the cell has gates in addition to the candidate, and hence a recurrent activation."""
        return bool(self.multipliers)

    @cached_property
    def lacks(self) -> frozenset[str]:
        """Names of the arguments that all kinds have except this one and kinds like it."""
        activation = () if self.gated else ("recurrent_activation",)
        return frozenset((*self.without, *activation, *(() if self.has_recurrent_kernel else RECURRENT)))

    @cached_property
    def settings(self) -> dict[str, Argument]:
        """The fields of `CellSpec` that this kind has, except `input_size` and `kind`."""
        every = (*POSITIONAL, *self.flags, *KEYWORD)
        return {one.name: self.with_default(one) for one in every if "spec" in one.of and one.name not in self.lacks}

    def prepared(self, ops: Ops[V], spec: Any, x: V) -> Any:
        """Return what a step takes of x: the result of `inputs`, and with a scalar, a tuple of it and the scalar."""
        if not spec.scalar:
            return self.inputs(ops, spec, x)
        return self.inputs(ops, spec, ops.features(x)), ops.scalar(x)

    def with_default(self, argument: Argument) -> Argument:
        """Return an argument with the default that it has in this kind."""
        return argument._replace(default=self.defaults.get(argument.name, argument.default))

    def activation(self, slot: str) -> str:
        """Return which argument sets the activation of a slot by default."""
        if slot == "backbone":
            return "backbone_activation"
        return "activation" if self.gates.get(slot, "candidate") == "candidate" else "recurrent_activation"

    def meaning(self, name: str) -> str:
        """Return what a gate or state is."""
        usual = ROLES[self.gates[name]] if name in self.gates else "output of the unit, also an input of the next step"
        return self.meanings.get(name, usual)

    @property
    def carries_h(self) -> bool:
        """Whether h is a state, which masked steps repeat; else they output zeros."""
        return "h" in self.state._fields

    @property
    def multipliers(self) -> tuple[str, ...]:
        """The gates that scale something, with the usual activations by 0 to 1: all but candidates."""
        return tuple(gate for gate, role in self.gates.items() if role != "candidate")

    def blocks(self, spec: CellSpec) -> tuple[int, ...]:
        """Return the numbers of gates whose columns layer normalisation normalises together."""
        return self.normed or (len(spec.gates),)

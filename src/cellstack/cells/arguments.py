"""The arguments of all layers and cells, declared once: name, type, default, allowed values, and one line of text each.

`CellSpec`, torch's cells and layers, and Keras's layers take theirs from here and from their kind's `Kind.flags`.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cellstack.cells.base import Kind

WIDTH = 116  # of a line inside a class


class Limit:
    """The values that an argument may have: a test, its description in messages, and a hint that follows.

    `options` are these values, if they are few.
    """

    def __init__(self, allows: Callable[[Any], bool], text: str, hint: str = "", options: tuple[Any, ...] = ()) -> None:
        self.allows, self.text, self.hint, self.options = allows, text, hint, options


def among(*options: Any, hint: str = "") -> Limit:
    """Return the limit of an argument that has one of a few values."""
    *others, last = map(repr, options)
    return Limit(lambda value: value in options, f"to be {', '.join(others)} or {last}", hint, options)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


POSITIVE = Limit(lambda value: 0.0 < value < math.inf, "above 0 and finite")
FINITE = Limit(lambda value: _number(value) and math.isfinite(value), "to be a finite number")
FINITE_OR_INITIALIZER = Limit(
    lambda value: isinstance(value, (str, Mapping)) or callable(value) or FINITE.allows(value),
    "to be a finite number or an initializer",
)
SHARE = Limit(lambda value: _number(value) and 0.0 <= value < 1.0, "in [0, 1)")
BELOW_ONE = Limit(SHARE.allows, SHARE.text, ": at 1 the state never changes")

FLAG = ("spec", "cell", "layer", "keras")
CELL = ("cell", "layer", "keras")
LAYER = ("layer", "keras")
TORCH = ("cell", "layer")


class Argument(NamedTuple):
    """An argument, and what has it: `CellSpec` ("spec"), torch's "cell" and "layer", and the "keras" layer.

    `type` is the annotation in torch's signatures. None is allowed regardless of `limit` where it is the default.
    """

    name: str
    type: str
    default: Any
    text: str
    limit: Limit | None = None
    of: tuple[str, ...] = FLAG

    def check(self, owner: str, value: Any) -> None:
        """Raise `ValueError` if the argument can't have this value."""
        if value is None and self.default is None:
            return
        if self.limit is not None and not self.limit.allows(value):
            raise ValueError(f"{owner}: expected {self.name} {self.limit.text}, got {value!r}{self.limit.hint}")


REQUIRED: Any = inspect.Parameter.empty
_GIVEN = "weights.Given"
_FORMS = "a name, a description or a callable."

POSITIONAL = (
    Argument("units", "int", REQUIRED, "width H of the gates, and of the state."),
    Argument("activation", "Any", "tanh", "φ, by Keras's name or as a callable; None means linear."),
    Argument("recurrent_activation", "Any", "sigmoid", "σ, likewise."),
    Argument("use_bias", "bool", True, "whether the cell has a bias."),
    Argument("kernel_initializer", _GIVEN, "glorot_uniform", f"how the kernel is initialised: {_FORMS}", of=CELL),
    Argument("recurrent_initializer", _GIVEN, "orthogonal", "the same for the recurrent kernel.", of=CELL),
    Argument("bias_initializer", _GIVEN, "zeros", "the same for the bias.", of=CELL),
    Argument("kernel_regularizer", _GIVEN, None, f"term of the kernel in `losses`: {_FORMS}", of=CELL),
    Argument("recurrent_regularizer", _GIVEN, None, "the same for the recurrent kernel.", of=CELL),
    Argument("bias_regularizer", _GIVEN, None, "the same for the bias.", of=CELL),
    Argument("activity_regularizer", _GIVEN, None, "the same for the output of a call.", of=LAYER),
    Argument("kernel_constraint", _GIVEN, None, f"projects the kernel after optimiser steps: {_FORMS}", of=CELL),
    Argument("recurrent_constraint", _GIVEN, None, "the same for the recurrent kernel.", of=CELL),
    Argument("bias_constraint", _GIVEN, None, "the same for the bias.", of=CELL),
    Argument(
        "dropout",
        "float",
        0.0,
        "share of x that is dropped in training, in [0, 1); the rest is scaled by 1/(1-dropout). A layer draws one "
        "mask per call, for all steps and gates; a cell that is called by itself draws one at each call.",
        SHARE,
        CELL,
    ),
    Argument("recurrent_dropout", "float", 0.0, "the same for h_prev; of a LiGRU, for the candidate.", SHARE, CELL),
    Argument(
        "seed",
        "int | None",
        None,
        "makes the masks of dropout and zoneout repeatable: the n-th draw depends only on the seed and n, and the "
        "count is saved with the weights. None: the framework's own generator.",
        of=CELL,
    ),
    Argument("return_sequences", "bool", False, "return the output of every step, not only the last.", of=LAYER),
    Argument("return_state", "bool", False, "also return the state after the last step.", of=LAYER),
    Argument("go_backwards", "bool", False, "run backwards in time. Outputs are in the order processed.", of=LAYER),
    Argument(
        "stateful",
        "bool",
        False,
        "start each call from the final state of the previous one; it is saved in the `state_dict`.",
        of=("layer",),
    ),
    Argument("unroll", "bool", False, "for compatibility with Keras; it has no effect.", of=("layer",)),
    Argument("zero_output_for_mask", "bool", False, "output zeros at masked steps, not the previous output.", of=LAYER),
)
"""The arguments of every kind that may be given by position, in Keras's order; see `Kind.positions`."""

KEYWORD = (
    Argument(
        "gate_activations",
        "Any",
        (),
        'other activations by gate, such as `{"o": "hard_sigmoid"}`; the key of φ(c) is "cell".',
    ),
    Argument(
        "layer_norm",
        "bool | str",
        False,
        "normalise each product, and a cell state before its activation, each times a gain: see `cellstack.reference`. "
        '"joint": the sum of the two products, and the cell state itself.',
        among(True, False, "joint"),
    ),
    Argument(
        "heads",
        "int",
        1,
        "divide h and the units into this many heads of equal size, each with its own recurrent matrix: the recurrent "
        "kernel is `[heads, H/heads, G·H/heads]`.",
        Limit(lambda value: value >= 1, "to be at least 1"),
    ),
    Argument(
        "use_kernel",
        "bool",
        True,
        "whether x is multiplied by a kernel. False: x has the sums over the input themselves, of all gates, `[G·H]`.",
        of=("spec",),
    ),
    Argument("norm_epsilon", "float", 1e-5, "constant that layer normalisation adds to a variance.", POSITIVE),
    Argument("clip", "float | None", None, "clip pre-activations to ±clip. None: no clipping.", POSITIVE),
    Argument(
        "zoneout",
        "float",
        0.0,
        "share of units of h that keep their value in a training step, in [0, 1); at inference each unit keeps that "
        "share of its value.",
        BELOW_ONE,
    ),
    Argument(
        "learn_initial_state", "bool", False, "use parameters, initially zeros, as the initial state and after a reset."
    ),
    Argument(
        "remat",
        "bool",
        False,
        "save only the state of each step, and recompute the gates in the backward pass: see `RNN`.",
        of=("layer",),
    ),
    Argument(
        "return_gates",
        "bool",
        False,
        "also return the gates and states of every step, in the order of the kind's trace and as processed.",
        of=("keras",),
    ),
    Argument(
        "input_size", "int | None", None, "width I, to create the weights at once; None: at the first call.", of=TORCH
    ),
    Argument("dtype", "str | torch.dtype | None", None, "of the weights; None: torch's default.", of=TORCH),
    Argument("device", "Any", None, "of the weights; None: the CPU.", of=TORCH),
    Argument("name", "str | None", None, "the name in error messages.", of=TORCH),
)
"""The other arguments of every kind, given by name, after the kind's own."""

ACTIVATION_ARGUMENTS = ("activation", "recurrent_activation", "backbone_activation")
"""The arguments that are activations."""

RECURRENT = ("recurrent_initializer", "recurrent_regularizer", "recurrent_constraint", "recurrent_dropout", "heads")
"""The arguments that kinds without a recurrent product don't have."""

COMPATIBLE = (
    Argument(
        "use_cudnn",
        "bool | str",
        "auto",
        '"auto", True or False, for compatibility with Keras; it has no effect. Device, dtype and flags determine the '
        "implementation, see `plan`.",
        Limit(lambda value: value in ("auto", True, False), "to be 'auto', True or False"),
        ("layer",),
    ),
    Argument(
        "implementation",
        "int",
        2,
        "1 or 2, for compatibility with Keras; it has no effect.",
        Limit(lambda value: value in (1, 2), "to be 1 or 2"),
        TORCH,
    ),
)
"""Arguments without effect of the kinds for which Keras has several implementations."""

FORGET_BIAS = (
    Argument(
        "unit_forget_bias",
        "bool",
        True,
        "initialise the forget gate's bias with 1. It is part of the bias, never added at run time.",
        of=CELL,
    ),
    Argument(
        "forget_bias",
        "float | weights.Given",
        None,
        'initial value of the forget gate\'s bias; or how that of each head is initialised, such as `"power_law"` (see '
        "`cellstack.layers.weights.power_law`). None: `unit_forget_bias` determines it.",
        FINITE_OR_INITIALIZER,
        TORCH,
    ),
)
"""Arguments of the kinds that have a forget gate f."""


def signature(kind: Kind, of: str) -> tuple[list[Argument], list[Argument]]:
    """Return the arguments of a kind's `"cell"`, `"layer"` or `"keras"` layer: by position, and by name only."""
    shared, keyword, own = (
        {one.name: kind.with_default(one) for one in some if of in one.of and one.name not in kind.lacks}
        for some in (POSITIONAL, KEYWORD, kind.flags)
    )
    order = [name for name in shared if name not in kind.positions]
    positional = {**shared, **{name: own.pop(name) for name in kind.positions if name in own}}
    for name in kind.positions:
        if name in positional:
            previous = next((other for other in kind.positions[name] if other in order), order[-1])
            order.insert(1 + order.index(previous), name)
    return [positional[name] for name in order], [*own.values(), *keyword.values()]


def constructor(kind: Kind, of: str) -> str:
    """Return the head of the `__init__` of a kind's `"cell"`, `"layer"` or `"keras"` layer as source text."""
    positional, keyword = signature(kind, of)
    parts = ["self", *(_typed(one, of) for one in positional), "*", *(_typed(one, of) for one in keyword)]
    parts += ["**kwargs: Any"] if of == "keras" else []
    text = ", ".join(part.replace(" ", "\0") for part in parts)  # no line ends within an argument
    lines = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(["def __init__(", *lines, ") -> None"]).replace("\0", " ")


def _typed(one: Argument, of: str) -> str:
    annotation = "Any" if of == "keras" and one.type == _GIVEN else one.type
    return f"{one.name}: {annotation}" + ("" if one.default is REQUIRED else f" = {one.default!r}")


def sign(cls: type, kind: Kind, of: str, names: dict[str, Any]) -> dict[str, Argument]:
    """Give a class the constructor and the documentation of its kind's arguments; return these by name.

    The constructor is compiled, as in `dataclasses`, so that its signature and messages are those of a function written
    by hand. It passes all arguments to the base class, in one dict. `names` has the types in the annotations.
    """
    positional, keyword = signature(kind, of)
    found = {one.name: one for one in (*positional, *keyword)}
    if "__init__" in vars(cls):  # a user's class with a constructor of its own
        return found
    given = ", ".join(f"{name!r}: {name}" for name in (*found, *(["kwargs"] if of == "keras" else [])))
    head, refuse = constructor(kind, of), ""
    if of != "keras":  # which passes further arguments to Keras
        head = head.replace(") -> None", ", **unknown) -> None")
        refuse = "    if unknown:\n        raise refuse(cls, unknown, found)\n"
    body = textwrap.indent(f"{head}:\n{refuse}    super(cls, self).__init__({{{given}}})", "    ")
    local: dict[str, Any] = {}
    source = f"def made(cls, found, refuse):\n{body}\n    return __init__"
    exec(compile(source, f"<{cls.__qualname__}>", "exec"), names, local)
    init = local["made"](cls, found, _unexpected)
    init.__module__, init.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    if of != "keras":
        shown = inspect.signature(init)
        init.__signature__ = shown.replace(parameters=list(shown.parameters.values())[:-1])
    cls.__init__ = init  # type: ignore[misc]
    cls.__doc__ = documented(cls.__doc__, found.values(), "\n\n>>> ", RAISES)
    return found


def _unexpected(cls: type, unknown: Mapping[str, Any], known: Iterable[str]) -> TypeError:
    """Return the error for an argument that a class doesn't have, in Python's words, with the closest one it has."""
    name = next(iter(unknown))
    close = get_close_matches(name, known, 1)
    fix = f": did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{cls.__qualname__}.__init__() got an unexpected keyword argument {name!r}{fix}")


RAISES = """

Raises:
    ShapeError: a width out of range.
    TypeError: an argument of the wrong type.
    ValueError: an unknown name, or a value out of range."""


def documented(
    doc: str | None, arguments: Iterable[Argument], before: str = "\n\nRaises:", more: str = ""
) -> str | None:
    """Return a docstring with lines for `arguments` in its `Args:`, which end where `before` is found."""
    if doc is None:  # python -OO
        return None
    head, found, rest = inspect.cleandoc(doc).partition(before)
    lines = [f"    {one.name}: {one.text}" for one in arguments]
    lines = [line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, subsequent_indent=" " * 8) for line in lines]
    start = "" if "\nArgs:" in head else "\n\nArgs:"
    return "\n".join([head + start, *lines]) + more + found + rest

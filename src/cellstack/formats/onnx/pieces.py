"""Parts of a graph that is being written: operators, constants, and activations built from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cellstack.cells.activations import PARAMETERS, activation
from cellstack.cells.layout import Array
from cellstack.formats.build import Names
from cellstack.formats.onnx.cells import ONNX_NAMES, OPERATORS
from cellstack.nodes.activations import MORE_ACTIVATIONS

FIRST, LAST = -(2**63), 2**63 - 1
MERGES = {"concat": "Concat", "add": "Add", "mul": "Mul", "ave": "Mean", "max": "Max", "min": "Min", "sub": "Sub"}
SINGLE = ("Elu", "HardSigmoid", "LeakyRelu", "Softplus", "Softsign", "ThresholdedRelu")
"""Activations that ONNX Runtime supports in float32 only, or whose parameters ONNX stores in float32 only."""


class Pieces:
    """A graph's operators and constants, with unique names, which begin with `prefix` where they are generated."""

    def __init__(self, onnx: Any, dtype: np.dtype[Any], taken: set[str], prefix: str = "") -> None:
        self.onnx, self.dtype, self.prefix = onnx, dtype, prefix
        self.names = Names(taken)
        self.type = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.constants: dict[Any, str] = {}

    def fresh(self, name: str) -> str:
        """Return an unused name, and reserve it."""
        return self.names.fresh(name)

    def put(self, operator: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        """Add an operator with the output `output`, and return that; it is named `name`, else after its output."""
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [output], name=name or output, **attributes))
        return output

    def of(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with a generated output name, and return that."""
        return self.put(operator, list(inputs), self.fresh(f"{self.prefix}{operator}"), **attributes)

    def tensor(self, name: str, array: Array) -> str:
        """Add an array, and return its name."""
        name = self.fresh(name)
        self.tensors.append(self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a list of integers; equal lists are shared."""
        if values not in self.constants:
            name = f"{self.prefix}to_" + "_".join(str(value).replace("-", "minus") for value in values)
            self.constants[values] = self.tensor(name, np.array(values, np.int64))
        return self.constants[values]

    def number(self, value: float) -> str:
        """Return the name of a number of the graph's dtype; equal numbers are shared."""
        key = repr(float(value))
        if key not in self.constants:
            self.constants[key] = self.tensor(f"{self.prefix}number", np.array(value, self.dtype))
        return self.constants[key]

    def cut(self, x: str, taken: slice, axis: int, output: str, name: str = "") -> str:
        """Add a slice of an axis."""
        step = taken.step or 1
        start = taken.start if taken.start is not None else 0 if step > 0 else LAST
        stop = taken.stop if taken.stop is not None else LAST if step > 0 else FIRST
        given = [self.integers(value) for value in (start, stop, axis, step)]
        return self.put("Slice", [x, *given], output, name)

    def merge(self, mode: str, sources: list[str], axis: int, output: str, name: str = "") -> None:
        """Add a merge of values, elementwise or along an axis."""
        if mode == "sub" or len(sources) == 2 or mode in ("concat", "ave", "max", "min"):
            self.put(MERGES[mode], sources, output, name, **({"axis": axis} if mode == "concat" else {}))
            return
        total = sources[0]
        for number, source in enumerate(sources[1:]):
            last = number == len(sources) - 2
            total = self.put(MERGES[mode], [total, source], output if last else self.fresh(f"{output}.{number}"))

    def finish(self, name: str, x: str, text: str, output: str) -> None:
        """Add a node's final activation of `x`, the output of the last operator added."""
        if text == "linear":
            self.nodes[-1].output[0] = output
        else:
            self.activate(f"{name}.activation", x, text, output)

    def activate(self, name: str, x: str, text: str, output: str, plain: bool = False) -> str:
        """Add an activation.

        Args:
            name: the name of the operator.
            x: the input.
            text: the activation, as `check_activation` accepts it.
            output: the name of the output.
            plain: whether to use only operators that ONNX and ONNX Runtime also support in float64.
        """
        if text in MORE_ACTIVATIONS:
            return self._more(name, x, text, output)
        kind, alpha, beta = activation(text)
        if kind == "linear":
            return self.put("Identity", [x], output, name)
        if kind in ("affine", "scaled_tanh", "positive") or (plain and ONNX_NAMES[kind] in SINGLE):
            self._made(kind, alpha, beta, x)
            last = self.nodes[-1]
            last.output[0], last.name = output, name
            return output
        keys = ("alpha", "beta")[: len(PARAMETERS.get(kind, ()))]
        return self.put(ONNX_NAMES[kind], [x], output, name, **dict(zip(keys, (alpha, beta), strict=False)))

    def log_sigmoid(self, v: str) -> str:
        """Return `log σ(v)`: -softplus(-v)."""
        softplus = self.fresh(f"{self.prefix}softplus")
        plain = self.dtype == np.float64
        return self.of("Neg", self.activate(softplus, self.of("Neg", v), "softplus", softplus, plain))

    def _made(self, kind: str, alpha: float, beta: float, x: str) -> str:
        """Add an activation that ONNX has in recurrent operators only, or ONNX Runtime in float32 only."""
        of, number = self.of, self.number
        if kind == "affine":
            return of("Add", of("Mul", x, number(alpha)), number(beta))
        if kind == "scaled_tanh":
            return of("Mul", of("Tanh", of("Mul", x, number(beta))), number(alpha))
        if kind == "positive":
            return of("Where", of("Less", x, number(0.0)), of("Sigmoid", x), of("Add", x, number(0.5)))
        if kind == "hard_sigmoid":
            return of("Clip", of("Add", of("Mul", x, number(alpha)), number(beta)), number(0.0), number(1.0))
        if kind == "softsign":
            return of("Div", x, of("Add", of("Abs", x), number(1.0)))
        if kind == "softplus":
            small = of("Log", of("Add", of("Exp", of("Neg", of("Abs", x))), number(1.0)))
            return of("Add", of("Relu", x), small)
        if kind == "elu":
            below = of("Sub", of("Exp", of("Min", x, number(0.0))), number(1.0))
            return of("Where", of("Greater", x, number(0.0)), x, of("Mul", below, number(alpha)))
        above = number(0.0 if kind == "leaky_relu" else alpha)
        below = of("Mul", x, number(alpha)) if kind == "leaky_relu" else number(0.0)  # else thresholded_relu
        return of("Where", of("Greater", x, above), x, below)

    def _more(self, name: str, x: str, text: str, output: str) -> str:
        """Add an activation that nodes have in addition to those of cells."""
        of, number = self.of, self.number
        if text == "silu":
            return self.put("Mul", [x, of("Sigmoid", x)], output, name)
        operator = next((operator for operator, own in OPERATORS.items() if own == text), None)
        if operator is not None:
            return self.put(operator, [x], output, name, **({"axis": -1} if operator.endswith("Softmax") else {}))
        if text == "relu6":
            return self.put("Clip", [x, number(0.0), number(6.0)], output, name)
        if text == "gelu":
            bell = of("Erf", of("Mul", x, number(math.sqrt(0.5))))
        else:  # gelu_tanh
            cube = of("Mul", of("Mul", of("Mul", x, x), x), number(0.044715))
            bell = of("Tanh", of("Mul", of("Add", x, cube), number(math.sqrt(2.0 / math.pi))))
        return self.put("Mul", [of("Mul", x, number(0.5)), of("Add", bell, number(1.0))], output, name)

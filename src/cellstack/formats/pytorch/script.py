"""What TorchScript's source says of a module's class: settings, hooks, and whether it computes what PyTorch's does.

The source is read as text, never run. A class's name says what the module was before it was scripted or traced; what
runs is its code, where hooks and other forward passes end up. So the code counts only where it is known: a Sequential
that calls its children in their order, and a layer that calls the one function that its class is known for.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cellstack.formats.pytorch.tensors import short
from cellstack.spec import FormatError

CLASS = re.compile(r"^class (\w+)\((?:Module|NamedTuple)\):\n", re.MULTILINE)
CONSTANT = re.compile(
    r" +(?P<name>\w{1,80}) : Final\[[^\]]{1,80}\]? *\]? = "
    r"(?P<value>-?[\d.e+-]{1,40}|True|False|None|\"[^\"\\]{0,80}\"|\((?:-?\d{1,18},? ?){0,8}\))"
)
ARGUMENT = re.compile(r"    (\w+): Tensor\) -> .*:")
CHILD = re.compile(r' +(\w+) = getattr\(self, "([^"\\]*)"\)')
CALL = re.compile(  # of children, within each other or alone
    r" +(?:(?P<made>\w+) = |return )(?P<calls>(?:\(\w+\)\.forward(?:__0|_tensor)?\()*)"
    r"(?P<of>\w+)(?P<ends>(?:, (?:None, )?\))*)"
)
FUNCTION = re.compile(r"(?<![\w.])(?:(?:__torch__|torch|ops|CONSTANTS)(?:\.\w+)+|\(self\)\.\w+)")
FLOAT = re.compile(r"(?<![\w.])\d{1,40}\.\d{0,40}(?:e[+-]?\d{1,3})?")
COUNTED = re.compile(r"torch\.mul\(num_layers\d*, num_directions\d*\)|torch\.add_\(num_batches_tracked\d*, 1\)")
LONGEST_SOURCE = 1 << 24
UNKNOWN = "expected the forward pass that PyTorch's class has, found TorchScript of another: traced, changed or hooked"

CHECKS = {  # what layers call beside it: checks of what comes in
    "dim",
    "ne",
    "eq",
    "lt",
    "not",
    "contains",
    "is",
    "isnot",
    "size",
    "list",
    "format",
    "RaiseException",
    "check_input_dim",
}
STEPS = {  # what recurrent layers call beside it: states to start from, and packed sequences
    *CHECKS,
    "zeros",
    "dtype",
    "device",
    "select",
    "squeeze",
    "unsqueeze",
    "index_select",
    "NumToTensor",
    "append",
    "PackedSequence",
    "CellParamsBase",
    "ModuleList",
    "update_flat_weights",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "apply_permutation",
    "forward_impl",
}
DROPOUTS = ("dropout", "feature_dropout", "dropout1d", "alpha_dropout", "feature_alpha_dropout")
FUNCTIONS: dict[str, tuple[str, ...]] = {  # what a layer calls, one of these
    "Linear": ("linear", "linear_dynamic", "linear_dynamic_fp16"),
    "Embedding": ("embedding",),
    "Conv1d": ("conv1d", "convolution", "convolution_mode"),
    "BatchNorm1d": ("batch_norm",),
    "LayerNorm": ("layer_norm",),
    "MaxPool1d": ("max_pool1d",),
    "AvgPool1d": ("avg_pool1d",),
    "AdaptiveAvgPool1d": ("adaptive_avg_pool1d",),
    "AdaptiveMaxPool1d": ("adaptive_max_pool1d",),
    "Flatten": ("flatten",),
    "Softmax": ("softmax",),
    "ReLU": ("relu",),
    "Sigmoid": ("sigmoid",),
    "Softsign": ("softsign",),
    "Tanh": ("tanh",),
    "Hardsigmoid": ("hardsigmoid",),
    "ELU": ("elu",),
    "LeakyReLU": ("leaky_relu",),
    "Softplus": ("softplus",),
    "Identity": (),
    "Dropout": DROPOUTS,
    "Dropout1d": DROPOUTS,
    "AlphaDropout": DROPOUTS,
}
RECURRENT: dict[str, tuple[str, ...]] = {
    "LSTM": ("lstm", "quantized_lstm"),
    "GRU": ("gru", "quantized_gru"),
    "RNN": ("rnn_tanh", "rnn_relu"),
    "LSTMCell": ("lstm_cell", "quantized_lstm_cell_dynamic"),
    "GRUCell": ("gru_cell", "quantized_gru_cell_dynamic"),
    "RNNCell": ("rnn_tanh_cell", "rnn_relu_cell", "quantized_rnn_tanh_cell_dynamic", "quantized_rnn_relu_cell_dynamic"),
}


class Written(NamedTuple):
    """What the source says of a class.

    Attributes:
        constants: its settings.
        why: what keeps it from being PyTorch's own class; "" where nothing does.
        order: its children as it calls them; None where it isn't one that does nothing but that.
    """

    constants: dict[str, Any]
    why: str
    order: list[str] | None

    def problem(self, children: list[str]) -> str:
        """Return what keeps a module with these children from being PyTorch's own; "" where nothing does."""
        return self.why or ("" if self.order in (None, children) else UNKNOWN)


@dataclass
class Scripts:
    """The source of a file's classes, read when it is asked for, each module of classes once.

    Attributes:
        where: what messages call the file.
        code: gives the source of a module of classes.
        unread: how much source may still be read, in characters.
        met: the modules of classes that were read.
        known: what they say, by class.
    """

    where: str
    code: Callable[[str], str]
    unread: int = LONGEST_SOURCE
    met: set[str] = field(default_factory=set)
    known: dict[str, Written] = field(default_factory=dict)

    def written(self, kind: str) -> Written | None:
        """Return what the source says of a class; None where the class isn't TorchScript's."""
        if not kind.startswith("__torch__."):
            return None
        module = kind.rpartition(".")[0]
        if module not in self.met:
            self.met.add(module)
            code = self.code(module)
            self.unread -= len(code)
            if self.unread < 0:
                raise FormatError(f"{self.where}: expected at most {LONGEST_SOURCE} characters of source, found more")
            starts = [*CLASS.finditer(code)]
            ends = [*(start.start() for start in starts[1:]), len(code)]
            for start, end in zip(starts, ends, strict=False):
                self.known[f"{module}.{start[1]}"] = _written(self.where, start[1], code[start.end() : end])
        found = self.known.get(kind)
        return found or Written({}, "expected the source of its class, found none", None)


def _written(where: str, name: str, body: str) -> Written:
    """Return what the source of one class says."""
    head, found, rest = body.partition("\n  def ")
    methods = f"  def {rest}" if found else ""
    constants: dict[str, Any] = {}
    hooks, weights = False, set()
    for line in head.splitlines():
        if match := CONSTANT.fullmatch(line):
            try:
                constants[match["name"]] = literal_eval(match["value"])
            except (ValueError, SyntaxError):
                raise FormatError(
                    f"{where}: expected a number as the constant {match['name']}, found {short(match['value'])}"
                ) from None
        elif line.startswith(("  __forward_hooks__ = ", "  __forward_pre_hooks__ = ")):
            hooks = hooks or not line.endswith("= []")
        elif line.startswith("  __parameters__ = "):
            weights = set(re.findall(r'"(\w+)"', line))
    if hooks:
        return Written(constants, "expected a module without forward hooks, which a Network can't hold", None)
    if name == "Sequential":
        order = _order(methods)
        return Written(constants, UNKNOWN if order is None else "", order)
    words = FUNCTIONS.get(name, RECURRENT.get(name))
    if words is None:  # what isn't known is refused by its name
        return Written(constants, "", None)
    code = COUNTED.sub("", "\n".join(_statements(methods)))
    called = [_word(path) for path in FUNCTION.findall(code)]
    spoken = [word for word in called if word in words]
    for activation in ("tanh", "relu") if name in ("RNN", "RNNCell") and "mode" not in constants else ():
        if spoken and all(f"rnn_{activation}" in word for word in spoken):
            constants.setdefault("nonlinearity", activation)
    known = {*words, *(STEPS if name in RECURRENT else CHECKS), *(("conv_forward",) if name == "Conv1d" else ())}
    known |= {"to", "dtype"} if "linear_dynamic" in spoken else set()
    once = len(spoken) == bool(words) if name in FUNCTIONS and "linear_dynamic" not in spoken else bool(spoken)
    read = set(re.findall(r"\bself\.(\w+)", code))
    own = once and known.issuperset(called) and (weights <= read or "_flat_weights" in read)
    said = {abs(float(value)) for value in constants.values() if isinstance(value, (int, float))}
    if name in FUNCTIONS and constants:  # a setting that its code has otherwise
        own = own and said.issuperset(map(float, FLOAT.findall(code)))
    return Written(constants, "" if own else UNKNOWN, None)


def _word(path: str) -> str:
    """Return the name of a function of torch's without its module, or the whole path of any other."""
    foreign = path.startswith("__torch__.") and not path.startswith("__torch__.torch.")
    return path if foreign else path.rpartition(".")[2].strip("_")


def _statements(methods: str) -> list[str]:
    """Return the lines of methods without the methods' heads, which reach to the first line that ends in a colon."""
    found, head = [], False
    for line in methods.splitlines():
        if line.startswith("  def "):
            head = True
        if not head:
            found.append(line)
        elif line.endswith(":"):
            head = False
    return found


def _order(methods: str) -> list[str] | None:
    """Return the children that a Sequential calls, in order; None where it does anything but that."""
    lines = methods.splitlines()
    argument = ARGUMENT.fullmatch(lines[1]) if len(lines) > 1 and lines[0].startswith("  def forward(") else None
    if argument is None:
        return None
    children: dict[str, str] = {}
    order: list[str] = []
    last: str | None = argument[1]
    for line in lines[2:]:
        if child := CHILD.fullmatch(line):
            children[child[1]] = child[2]
            continue
        if line.startswith("  def "):  # the next method
            break
        call = CALL.fullmatch(line)
        if call is None or call["of"] != last:
            return None
        called = re.findall(r"\((\w+)\)", call["calls"])
        if call["ends"].count(")") != len(called) or not children.keys() >= set(called):
            return None
        order += [children[name] for name in reversed(called)]
        last = call["made"]
    return order if last is None else None

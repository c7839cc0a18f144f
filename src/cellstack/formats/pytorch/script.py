"""Reads a module's settings from TorchScript's source, and checks that it computes what PyTorch's class does.

A class's name only says what the module was before it was scripted or traced; its code may also contain hooks or
another forward pass. So the code is evaluated symbolically, statement by statement; nothing in it is run. The result
has to be the call that defines the class, with the module's own weights; its other arguments are the settings. The
source of functions of `torch.nn.functional` is in the file and evaluated too.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.tensors import Tensor, short
from cellstack.spec import FormatError

DEFINED = re.compile(r"^(?:class|def) (\w+)\(", re.MULTILINE)
LONGEST_SOURCE = 1 << 24  # characters that are read
LONGEST_PARSED = 1 << 20  # characters that are parsed
MOST_STEPS = 1 << 20  # expressions that are evaluated
DEEPEST_CALL = 20
UNKNOWN = "its TorchScript code doesn't compute the forward pass of PyTorch's class: it was changed, or has hooks"
HOOKED = "forward hooks aren't supported"
METHODS = ("forward", "forward__0", "forward_tensor")  # the last two exist if packed sequences have another method
WEIGHTS = ("weight", "bias", "running_mean", "running_var", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
PACKED = ("_packed_params._packed_params", "_packed_weight_ih", "_packed_weight_hh")
NEEDED = object()  # marks arguments without a default

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
SEQUENCE = "input, _hx, _params, bias, num_layers, _dropout, _train, bidirectional, batch_first"
ARGUMENTS = {
    "linear": "input, weight, bias=None",
    "linear_dynamic": "input, _packed_params._packed_params, _reduce_range=False",
    "linear_dynamic_fp16": "input, _packed_params._packed_params",
    "embedding": "weight, input, _padding_idx=-1, _scale_grad_by_freq=False, _sparse=False",
    "conv1d": "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1",
    "convolution": "input, weight, bias, stride, padding, dilation, transposed, _output_padding, groups, _benchmark, "
    "_deterministic, _cudnn_enabled, _allow_tf32=True",
    "convolution_mode": "input, weight, bias, stride, padding, dilation, groups",
    "batch_norm": "input, weight, bias, running_mean, running_var, train, _momentum, eps, _cudnn_enabled",
    "layer_norm": "input, normalized_shape, weight=None, bias=None, eps=1e-5, _cudnn_enable=True",
    "max_pool1d": "input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False",
    "avg_pool1d": "input, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True",
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_max_pool1d"), "input, output_size"),
    "flatten": "input, start_dim=0, end_dim=-1",
    **dict.fromkeys(("softmax", "log_softmax"), "input, dim, cast=None"),
    **dict.fromkeys(
        ("hardsigmoid", "hardswish", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softsign", "tanh"), "input"
    ),
    "gelu": "input, approximate='none'",
    "hardtanh": "input, min_val=-1.0, max_val=1.0",
    "elu": "input, alpha=1.0, scale=1, input_scale=1",
    "leaky_relu": "input, negative_slope=0.01",
    "softplus": "input, beta=1.0, threshold=20.0",
    **dict.fromkeys(DROPOUTS, "input, _p, train"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), SEQUENCE),
    **dict.fromkeys(("quantized_lstm", "quantized_gru"), f"{SEQUENCE}, _dtype=None, _use_dynamic=False"),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        "input, _hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None",
    ),
    **dict.fromkeys(
        [f"quantized_{kind}_cell_dynamic" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")],
        "input, _hx, _packed_weight_ih, _packed_weight_hh, bias_ih, bias_hh",
    ),
}
"""Arguments of torch's functions, in order, with their defaults.

Those in `WEIGHTS` and `PACKED` have to be the module's own weights, `input` the module's input, and those in `FIXED`
have to have that value; others that begin with `_` don't matter in evaluation mode, and the rest are settings.
"""
FIXED = {"train": False, "transposed": False, "scale": 1, "input_scale": 1, "cast": None}
FUNCTIONS: dict[str, tuple[str, ...]] = {  # the functions of which a class calls one
    "Linear": ("linear", "linear_dynamic", "linear_dynamic_fp16"),
    "Conv1d": ("conv1d", "convolution", "convolution_mode"),
    "BatchNorm1d": ("batch_norm",),
    "LayerNorm": ("layer_norm",),
    "MaxPool1d": ("max_pool1d",),
    "AvgPool1d": ("avg_pool1d",),
    "AdaptiveAvgPool1d": ("adaptive_avg_pool1d",),
    "AdaptiveMaxPool1d": ("adaptive_max_pool1d",),
    "LeakyReLU": ("leaky_relu",),
    "LogSoftmax": ("log_softmax",),
    "ReLU6": ("relu6", "hardtanh"),
    **{
        kind: (kind.lower(),)
        for kind in (
            "ELU",
            "Embedding",
            "Flatten",
            "GELU",
            "Hardsigmoid",
            "Hardswish",
            "Hardtanh",
            "Mish",
            "ReLU",
            "SELU",
            "SiLU",
            "Sigmoid",
            "Softmax",
            "Softplus",
            "Softsign",
            "Tanh",
        )
    },
    "Identity": (),
    **dict.fromkeys(("Dropout", "Dropout1d", "AlphaDropout"), DROPOUTS),
}
RECURRENT: dict[str, tuple[str, ...]] = {
    "LSTM": ("lstm", "quantized_lstm"),
    "GRU": ("gru", "quantized_gru"),
    "RNN": ("rnn_tanh", "rnn_relu"),
    "LSTMCell": ("lstm_cell", "quantized_lstm_cell_dynamic"),
    "GRUCell": ("gru_cell", "quantized_gru_cell_dynamic"),
    "RNNCell": ("rnn_tanh_cell", "rnn_relu_cell", "quantized_rnn_tanh_cell_dynamic", "quantized_rnn_relu_cell_dynamic"),
}
IMPLIED = {  # settings that don't occur in the code
    "Conv1d": {"padding_mode": "zeros"},
    "Embedding": {"max_norm": None},
    "ReLU6": {"min_val": 0.0, "max_val": 6.0},
}
COMPUTED: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "mul")},
    "__not__": operator.not_,
    "__contains__": operator.contains,
    "len": len,
}


class Written(NamedTuple):
    """The result of evaluating a module's source.

    Attributes:
        constants: its settings.
        why: why it computes something else than PyTorch's class; "" if it doesn't.
    """

    constants: dict[str, Any]
    why: str


class UnreadError(Exception):
    """Code that can't be evaluated."""


class RaisedError(Exception):
    """The code raises an exception for its input."""


@dataclass(eq=False, frozen=True)
class Symbol:
    """A value that is only known when the code runs, such as the result of a torch function or a weight.

    Attributes:
        word: the function's name, or the kind of value.
        given: the positional arguments.
        named: the keyword arguments.
    """

    word: str
    given: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Scripts:
    """The source of a file's classes, read on first use, each module of classes once.

    Attributes:
        where: the file's name, for messages.
        code: returns the source of a module of classes.
        unread: how many more characters of source may be read.
        unparsed: how many more characters may be parsed.
        steps: how many more expressions may be evaluated.
        met: the source of every class and function in the modules of classes that were read.
        parsed: the syntax trees of the parsed ones.
        known: the results by the module's id; each module is kept alive, so that no other gets its id.
    """

    where: str
    code: Callable[[str], str]
    unread: int = LONGEST_SOURCE
    unparsed: int = LONGEST_PARSED
    steps: int = MOST_STEPS
    met: dict[str, dict[str, str]] = field(default_factory=dict)
    parsed: dict[str, Any] = field(default_factory=dict)
    known: dict[int, tuple[Standin, Written]] = field(default_factory=dict)

    def written(self, module: Standin, attributes: dict[Any, Any]) -> Written | None:
        """Evaluate the source of a module; return None if its class isn't TorchScript's.

        Args:
            module: the module in the pickle.
            attributes: its attributes.
        """
        if not module.kind.startswith("__torch__."):
            return None
        if id(module) not in self.known:
            self.known[id(module)] = module, self._written(module.kind, attributes)
        return self.known[id(module)][1]

    def _written(self, kind: str, attributes: dict[Any, Any]) -> Written:
        found, name = self.defined(kind), kind.rpartition(".")[2]
        if not isinstance(found, ast.ClassDef):
            return Written({}, "the file doesn't hold the source of its class")
        constants, hooks = self._constants(found)
        if hooks:
            return Written(constants, HOOKED)
        words = FUNCTIONS.get(name, RECURRENT.get(name))
        if words is None and name != "Sequential":  # an unknown class is refused by its name
            return Written(constants, "")
        try:
            run = _Run(self, found, attributes, constants, name)
            if words is None:
                run.expect_chain()
                return Written(constants, "")
            return Written(run.settings(words), "")
        except (UnreadError, RaisedError, RecursionError):
            return Written(constants, UNKNOWN)

    def defined(self, path: str) -> Any:
        """Return the syntax tree of a class or function; None if the source has none of that name."""
        if path not in self.parsed:
            module, _, name = path.rpartition(".")
            if module not in self.met:
                code = self.code(module)
                self.unread -= len(code)
                if self.unread < 0:
                    raise FormatError(f"{self.where}: more than {LONGEST_SOURCE} characters of source aren't supported")
                starts = [*DEFINED.finditer(code)]
                ends = [*(start.start() for start in starts[1:]), len(code)]
                self.met[module] = {
                    start[1]: code[start.start() : end] for start, end in zip(starts, ends, strict=False)
                }
            self.parsed[path] = self._parsed(name, self.met[module].get(name, ""))
        return self.parsed[path]

    def _parsed(self, name: str, text: str) -> Any:
        self.unparsed -= len(text)
        if self.unparsed < 0:
            raise FormatError(f"{self.where}: more than {LONGEST_PARSED} characters of source to parse")
        try:
            return next(iter(ast.parse(text).body), None)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            what = short(str(error), 200)
            raise FormatError(f"{self.where}: expected the source of {short(name)}, found {what}") from None

    def _constants(self, found: ast.ClassDef) -> tuple[dict[str, Any], bool]:
        """Return the constants in a class's body, and whether it has hooks."""
        constants, hooks = {}, False
        for line in found.body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                hooked = line.targets[0].id in ("__forward_hooks__", "__forward_pre_hooks__")
                hooks = hooks or (hooked and not (isinstance(line.value, ast.List) and not line.value.elts))
            elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                try:
                    constants[line.target.id] = ast.literal_eval(line.value)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    here = f"{self.where}: expected a number as the constant {short(line.target.id)}"
                    raise FormatError(f"{here}, found {short(ast.unparse(line.value))}") from None
        return constants, hooks


class _Run:
    """Evaluates a module's forward pass symbolically.

    Args:
        scripts: the file's source.
        found: the module's class.
        attributes: its attributes.
        constants: the constants of its class.
        name: the class's name.
    """

    def __init__(
        self, scripts: Scripts, found: ast.ClassDef, attributes: dict[Any, Any], constants: dict[str, Any], name: str
    ) -> None:
        self.scripts, self.attributes, self.constants, self.name = scripts, attributes, constants, name
        self.methods = {one.name: one for one in found.body if isinstance(one, ast.FunctionDef)}
        self.rank = None if name not in RECURRENT else 2 if name.endswith("Cell") else 3
        self.input, self.self = Symbol("input"), Symbol("self")
        self.held: dict[Any, Symbol] = {}
        self.spent: list[Any] = []  # values that an in-place operation has changed
        self.depth = 0

    # ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def forward(self) -> Any:
        """Return the output of the forward pass, without the states."""
        method = next((self.methods[name] for name in METHODS if name in self.methods), None)
        if method is None:
            raise UnreadError
        value = self.call(method, [self.self, self.input][: len(method.args.args)], {})
        value = value[0] if isinstance(value, tuple) and value else value
        return value.given[0] if isinstance(value, Symbol) and value.word == "item" and value.given[1] == 0 else value

    def expect_chain(self) -> None:
        """Check that a Sequential only calls its children in their order."""
        value = self.forward()
        for name, child in reversed(self.attributes.items()):
            if not isinstance(child, Standin) or not child.kind.startswith("__torch__."):
                continue
            if isinstance(value, Symbol) and value.word == "child" and value.given[0] == name:
                value = value.given[1]
            elif not child.kind.endswith(".Identity"):  # the tracer writes a call without argument or result for it
                raise UnreadError
        if value is not self.input:
            raise UnreadError

    def settings(self, words: tuple[str, ...]) -> dict[str, Any]:
        """Return the settings of a module that computes one of the functions `words`; else raise `UnreadError`."""
        value = self.forward()
        if isinstance(value, Symbol) and value.word == "to" and value.given:  # casts a quantised result back
            value = value.given[0] if getattr(value.given[0], "word", "").startswith("linear_dynamic") else value
        if (value is self.input and words in ((), DROPOUTS)) or (value is None and not words):
            return self.constants
        value = self._softsign(value)
        if not isinstance(value, Symbol) or value.word not in words:
            raise UnreadError
        usual = _arguments(value.word)
        given = dict(zip(usual, value.given, strict=False))
        if len(value.given) > len(given) or not value.named.keys().isdisjoint(given):
            raise UnreadError
        given = usual | given | {key if key in usual else f"_{key}": part for key, part in value.named.items()}
        found = {key: self._checked(key, part) for key, part in given.items() if not key.startswith("_")}
        self._check_sequence(value.word, given)
        passed = (*WEIGHTS, *PACKED, *FIXED, "input")
        own = {key: part for key, part in found.items() if key not in passed or (key in WEIGHTS and part is None)}
        if "stride" in own and own["stride"] == ():
            own["stride"] = own["kernel_size"]
        for word in ("tanh", "relu"):
            if f"rnn_{word}" in value.word:
                own |= {"nonlinearity": word} | ({"mode": f"RNN_{word.upper()}"} if self.name == "RNN" else {})
        said = self.constants | {key: self.attributes[key] for key in own if key in self.attributes}
        for key, part in own.items():
            usual = key == "stride" and said.get(key, part) is None
            if key in said and not usual and _plain(said[key]) != _plain(part):
                raise UnreadError
        return IMPLIED.get(self.name, {}) | said | own

    def _softsign(self, value: Any) -> Any:
        """Return x / (|x| + 1) as a call of softsign; other values unchanged."""
        match value:
            case Symbol("div", (x, Symbol("add", (Symbol("abs", (same,)), 1)))) if x is same:
                return Symbol("softsign", (x,))
        return value

    def _checked(self, key: str, part: Any) -> Any:
        """Return an argument; raise `UnreadError` if the class would pass another one."""
        recurrent = self.name in RECURRENT and not self.name.endswith("Cell")
        if part is NEEDED or (key == "input" and part is not self.input):
            raise UnreadError
        if key in FIXED and part != FIXED[key]:
            raise UnreadError
        if key in PACKED or (key in WEIGHTS and not (recurrent and key == "bias")):
            own = None if part is None and self.attributes.get(key) is None else self.self
            for name in key.split(".") if own is not None else ():
                own = self.attribute(own, name)
            if part is not own:
                raise UnreadError
        elif isinstance(part, Symbol) and key != "input":
            raise UnreadError
        return part

    def _check_sequence(self, word: str, given: dict[str, Any]) -> None:
        """Check that a recurrent layer or cell starts from zeros, and that a layer uses its own weights in order."""
        if "_hx" not in given:
            return
        starts = given["_hx"] if isinstance(given["_hx"], (tuple, list)) else [given["_hx"]]
        if not all(isinstance(start, Symbol) and start.word == "zeros" for start in starts):
            raise UnreadError
        if "_params" not in given:
            return
        ways = [f"_l{n}{way}" for n in range(_count(given["num_layers"])) for way in ("", "_reverse")]
        ways = ways if given["bidirectional"] else ways[::2]
        if word.startswith("quantized"):
            packs = self.attribute(self.self, "_all_weight_values")
            own = [self.attribute(self.attribute(packs, str(n)), "param") for n in range(len(ways))]
        else:
            kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if given["bias"] else [])]
            kinds += ["weight_hr"] if "weight_hr_l0" in self.attributes else []
            own = [self.attribute(self.self, f"{kind}{way}") for way in ways for kind in kinds]
        params = given["_params"]
        if not isinstance(params, (list, tuple)) or len(params) != len(own):
            raise UnreadError
        if any(one is not other for one, other in zip(params, own, strict=True)) or given["_train"] not in (False,):
            raise UnreadError

    # ── statements ──────────────────────────────────────────────────────────────────────────────────────────────────

    def call(self, function: ast.FunctionDef, given: list[Any], named: dict[str, Any]) -> Any:
        """Return the result of a function of the source."""
        self.depth += 1
        names = [one.arg for one in function.args.args]
        if self.depth > DEEPEST_CALL or len(given) > len(names) or not set(names[len(given) :]) >= named.keys():
            raise UnreadError
        defaults = function.args.defaults
        usual = {
            name: self.value(one, {}) for name, one in zip(names[len(names) - len(defaults) :], defaults, strict=True)
        }
        scope = usual | dict(zip(names, given, strict=False)) | named
        if scope.keys() != set(names):
            raise UnreadError
        returned = self.block(function.body, scope)
        self.depth -= 1
        return returned[0] if returned else None

    def block(self, body: list[ast.stmt], scope: dict[str, Any]) -> tuple[Any] | None:
        """Evaluate statements; return their return value in a tuple of one, or None without a return statement."""
        for line in body:
            match line:
                case ast.Pass():
                    pass
                case ast.Return(value):
                    return (None if value is None else self.value(value, scope),)
                case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                    self.assign(target, self.value(value, scope), scope)
                case ast.Expr(value):
                    if self.value(value, scope) is not None:
                        raise UnreadError
                case ast.If(test, yes, no):
                    returned = self.branch(self.value(test, scope), yes, no, scope)
                    if returned:
                        return returned
                case _:
                    raise UnreadError
        return None

    def assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        """Assign a value to a name, or its parts to several names."""
        if isinstance(target, ast.Name):
            scope[target.id] = value
            return
        if not isinstance(target, ast.Tuple):
            raise UnreadError
        for number, one in enumerate(target.elts):
            self.assign(one, self.item(value, number, len(target.elts)), scope)

    def item(self, value: Any, number: Any, count: int | None = None) -> Any:
        """Return an element of a value, which has `count` elements."""
        if isinstance(value, Symbol):
            return Symbol("item", (value, number))
        fits = isinstance(value, (tuple, list)) and type(number) is int and -len(value) <= number < len(value)
        if not fits or count not in (None, len(value)):
            raise UnreadError
        return value[number]

    def branch(self, test: Any, yes: list[ast.stmt], no: list[ast.stmt], scope: dict[str, Any]) -> tuple[Any] | None:
        """Evaluate an if; both branches if the condition isn't known, one of which may raise an exception."""
        if isinstance(test, bool):
            return self.block(yes if test else no, scope)
        if not isinstance(test, Symbol):
            raise UnreadError
        ends: list[dict[str, Any]] = []
        depth = self.depth
        for body in (yes, no):
            inner = dict(scope)
            try:
                if self.block(body, inner):
                    raise UnreadError
                ends.append(inner)
            except RaisedError:
                self.depth = depth
        if not ends:
            raise RaisedError
        for name in ends[0].keys() & ends[-1].keys():
            one, other = ends[0][name], ends[-1][name]
            same = one is other or (_known(one) and _known(other) and one == other)
            scope[name] = one if same else Symbol("either", (test, one, other))
        return None

    # ── expressions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        """Return the value of an expression."""
        self.scripts.steps -= 1
        if self.scripts.steps < 0:
            raise FormatError(f"{self.scripts.where}: the source takes more than {MOST_STEPS} steps to evaluate")
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name) if name in scope:
                if any(scope[name] is one for one in self.spent):
                    raise UnreadError
                return scope[name]
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
                return -value
            case ast.Tuple(parts) | ast.List(parts):
                found = [self.value(part, scope) for part in parts]
                return found if isinstance(node, ast.List) else tuple(found)
            case ast.Subscript(value, number):
                return self.item(self.value(value, scope), self.value(number, scope))
            case ast.Call():
                return self.called(node, scope)
            case ast.Attribute(value, name):
                path = _path(node)
                return self.attribute(self.value(value, scope), name) if path is None else Symbol("function", (path,))
        raise UnreadError

    def attribute(self, owner: Any, name: str) -> Any:
        """Return an attribute of the module or a child; equal tensors give the same symbol."""
        if not isinstance(owner, Symbol) or owner.word not in ("self", "held"):
            raise UnreadError
        inside = self.attributes if owner is self.self else owner.given[1]
        if name == "training":
            return False  # a Network computes the module in evaluation mode
        if not isinstance(inside, dict) or name not in inside:
            if owner is self.self and name in self.constants:
                return self.constants[name]
            raise UnreadError
        return self._symbol(inside[name], (*owner.given[:1], name))

    def _symbol(self, value: Any, key: Any) -> Any:
        if isinstance(value, list):
            return [self._symbol(part, (key, number)) for number, part in enumerate(value)]
        if isinstance(value, Tensor):
            one = value.storage
            key = (one.key, one.dtype, one.start, value.offset, value.shape, value.strides)
        elif value is None or isinstance(value, (bool, int, float, str)):
            return value
        inside = value.state if isinstance(value, Standin) and value.kind.startswith("__torch__.") else None
        return self.held.setdefault(key, Symbol("held", (key, inside)))

    def called(self, node: ast.Call, scope: dict[str, Any]) -> Any:
        """Return the result of a call."""
        function, path = node.func, _path(node.func)
        if isinstance(function, ast.Name) and function.id not in scope:
            return self._builtin(function.id, node.args, scope)
        given = [self.value(one, scope) for one in node.args]
        named = {one.arg or "": self.value(one.value, scope) for one in node.keywords}
        if path is None and isinstance(function, ast.Attribute):
            owner = self.value(function.value, scope)
            if owner is self.self and function.attr in self.methods:
                return self.call(self.methods[function.attr], [owner, *given], named)
            child = isinstance(owner, Symbol) and owner.word == "held" and function.attr in METHODS
            if not child or any(one is not None for one in given[1:]) or named:
                raise UnreadError
            return Symbol("child", (owner.given[0][-1], *given[:1]))
        if path is None:
            found = self.value(function, scope)
            if not isinstance(found, Symbol) or found.word != "function":
                raise UnreadError
            path = found.given[0]
        if path.startswith("__torch__."):
            own = self.scripts.defined(path)
            return self.call(own, given, named) if isinstance(own, ast.FunctionDef) else Symbol(path, tuple(given))
        return self._of_torch(path, given, named)

    def _builtin(self, name: str, nodes: list[ast.expr], scope: dict[str, Any]) -> Any:
        if name == "getattr" and len(nodes) == 2:
            return self.attribute(self.value(nodes[0], scope), str(self.value(nodes[1], scope)))
        if name in ("unchecked_cast", "annotate") and len(nodes) == 2:  # to a type
            return self.value(nodes[1], scope)
        if name == "int" and len(nodes) == 1:
            return Symbol("int", (self.value(nodes[0], scope),))
        if name == "uninitialized":
            return Symbol("uninitialized")
        raise UnreadError

    def _of_torch(self, path: str, given: list[Any], named: dict[str, Any]) -> Any:
        """Return the result of a torch function: computed if its arguments are plain values, else a symbol."""
        word = path.rpartition(".")[2]
        if word == "RaiseException":
            raise RaisedError
        if word in ("__is__", "__isnot__") and len(given) == 2 and given[1] is None:
            return (given[0] is None) == (word == "__is__")
        if word == "dim" and len(given) == 1 and given[0] is self.input and self.rank:
            return self.rank
        if word == "append" and len(given) == 2 and isinstance(given[0], list):
            given[0].append(given[1])
            return given[0]
        if word == "warn":
            return None
        if word in COMPUTED and all(map(_known, given)):
            try:
                found = COMPUTED[word](*given)
            except TypeError:
                raise UnreadError from None
            return found if type(found) is not int or abs(found) < 2**63 else Symbol(word)
        if word.endswith("_") and not word.endswith("__"):  # in place: the old value no longer exists
            self.spent += _roots(given[0]) if given else []
        return Symbol(word.strip("_"), tuple(given), named)


def _arguments(word: str) -> dict[str, Any]:
    """Return the arguments of a torch function, each with its default."""
    parts = (part.partition("=") for part in ARGUMENTS[word].split(", "))
    return {name: ast.literal_eval(usual) if usual else NEEDED for name, _, usual in parts}


def _path(node: ast.expr) -> str | None:
    """Return the dotted path of a function of torch or of the file; None for another expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in ("torch", "ops", "__torch__", "CONSTANTS"):
        return None
    return ".".join([node.id, *reversed(parts)])


def _roots(value: Any) -> list[Any]:
    """Return a value, and the values that it may be a view of."""
    found = []
    while isinstance(value, Symbol):
        found.append(value)
        value = value.given[0] if value.given else None
    return found


def _known(value: Any) -> bool:
    """Return whether a value contains no symbols."""
    if isinstance(value, (tuple, list)):
        return all(map(_known, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """Return a setting in one form: torch stores one for one axis as a number, or as a list of one."""
    row = isinstance(value, (tuple, list))
    return value[0] if row and len(value) == 1 else tuple(value) if row else value


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1000:
        raise UnreadError
    return value

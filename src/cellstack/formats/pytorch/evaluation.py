"""Evaluates TorchScript's source symbolically: values that depend on the input or on weights are symbols."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cellstack.cells.errors import FormatError
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.tensors import Tensor

MOST_STEPS = 1 << 20  # expressions that are evaluated, in a file
DEEPEST_CALL = 20
METHODS = ("forward", "forward__0", "forward_tensor")  # the last two exist if packed sequences have another method
COMPUTED: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "mul")},
    "__not__": operator.not_,
    "__contains__": operator.contains,
    "len": len,
}


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


class Definitions(Protocol):
    """The source of a file's classes: `script.Scripts`."""

    where: str
    steps: int  # how many more expressions may be evaluated

    def defined(self, path: str) -> Any:
        """Return the syntax tree of a class or function; None if the source has none of that name."""


class Evaluation:
    """Evaluates a module's forward pass symbolically.

    Args:
        scripts: the file's source.
        found: the module's class.
        attributes: its attributes.
        constants: the constants of its class.
        name: the class's name.
        rank: the number of axes of its input, if its class determines it.
    """

    def __init__(
        self,
        scripts: Definitions,
        found: ast.ClassDef,
        attributes: dict[Any, Any],
        constants: dict[str, Any],
        name: str,
        rank: int | None,
    ) -> None:
        self.scripts, self.attributes, self.constants, self.name = scripts, attributes, constants, name
        self.methods = {one.name: one for one in found.body if isinstance(one, ast.FunctionDef)}
        self.rank = rank
        self.input, self.self = Symbol("input"), Symbol("self")
        self.held: dict[Any, Symbol] = {}
        self.spent: list[Any] = []  # values that an in-place operation has changed
        self.depth = 0

    def forward(self) -> Any:
        """Return the output of the forward pass, without the states."""
        method = next((self.methods[name] for name in METHODS if name in self.methods), None)
        if method is None:
            raise UnreadError
        value = self.call(method, [self.self, self.input][: len(method.args.args)], {})
        value = value[0] if isinstance(value, tuple) and value else value
        return value.given[0] if isinstance(value, Symbol) and value.word == "item" and value.given[1] == 0 else value

    # ── statements ──────────────────────────────────────────────────────────────────────────────────────────────────

    def call(self, function: ast.FunctionDef, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Return the result of a function of the source."""
        self.depth += 1
        names = [one.arg for one in function.args.args]
        if self.depth > DEEPEST_CALL or len(arguments) > len(names) or not set(names[len(arguments) :]) >= named.keys():
            raise UnreadError
        defaults = function.args.defaults
        usual = {
            name: self.value(one, {}) for name, one in zip(names[len(names) - len(defaults) :], defaults, strict=True)
        }
        scope = usual | dict(zip(names, arguments, strict=False)) | named
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
                values = [self.value(part, scope) for part in parts]
                return values if isinstance(node, ast.List) else tuple(values)
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
        arguments = [self.value(one, scope) for one in node.args]
        named = {one.arg or "": self.value(one.value, scope) for one in node.keywords}
        if path is None and isinstance(function, ast.Attribute):
            owner = self.value(function.value, scope)
            if owner is self.self and function.attr in self.methods:
                return self.call(self.methods[function.attr], [owner, *arguments], named)
            child = isinstance(owner, Symbol) and owner.word == "held" and function.attr in METHODS
            if not child or any(one is not None for one in arguments[1:]) or named:
                raise UnreadError
            return Symbol("child", (owner.given[0][-1], *arguments[:1]))
        if path is None:
            callee = self.value(function, scope)
            if not isinstance(callee, Symbol) or callee.word != "function":
                raise UnreadError
            path = callee.given[0]
        if path.startswith("__torch__."):
            definition = self.scripts.defined(path)
            return (
                self.call(definition, arguments, named)
                if isinstance(definition, ast.FunctionDef)
                else Symbol(path, tuple(arguments))
            )
        return self._of_torch(path, arguments, named)

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

    def _of_torch(self, path: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Return the result of a torch function: computed if its arguments are plain values, else a symbol."""
        word = path.rpartition(".")[2]
        if word == "RaiseException":
            raise RaisedError
        if word in ("__is__", "__isnot__") and len(arguments) == 2 and arguments[1] is None:
            return (arguments[0] is None) == (word == "__is__")
        if word == "dim" and len(arguments) == 1 and arguments[0] is self.input and self.rank:
            return self.rank
        if word == "append" and len(arguments) == 2 and isinstance(arguments[0], list):
            arguments[0].append(arguments[1])
            return arguments[0]
        if word == "warn":
            return None
        if word in COMPUTED and all(map(_known, arguments)):
            try:
                result = COMPUTED[word](*arguments)
            except TypeError:
                raise UnreadError from None
            return result if type(result) is not int or abs(result) < 2**63 else Symbol(word)
        if word.endswith("_") and not word.endswith("__"):  # in place: the old value no longer exists
            self.spent += _roots(arguments[0]) if arguments else []
        return Symbol(word.strip("_"), tuple(arguments), named)


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
    roots = []
    while isinstance(value, Symbol):
        roots.append(value)
        value = value.given[0] if value.given else None
    return roots


def _known(value: Any) -> bool:
    """Return whether a value contains no symbols."""
    if isinstance(value, (tuple, list)):
        return all(map(_known, value))
    return value is None or isinstance(value, (bool, int, float, str))

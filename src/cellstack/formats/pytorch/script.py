"""Reads a module's settings from TorchScript's source, and checks that it computes what PyTorch's class does.

A class's name only says what the module was before it was scripted or traced; its code may also contain hooks or
another forward pass. So the code is evaluated symbolically, statement by statement; nothing in it is run. The result
has to be the call that defines the class, with the module's own weights; its other arguments are the settings. The
source of functions of `torch.nn.functional` is in the file and evaluated too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cellstack.cells.errors import FormatError
from cellstack.formats.pytorch.evaluation import MOST_STEPS, Evaluation, RaisedError, UnreadError
from cellstack.formats.pytorch.pickles import Standin
from cellstack.formats.pytorch.tensors import short
from cellstack.formats.pytorch.torch_functions import FUNCTIONS, RECURRENT, check_chain, settings

DEFINED = re.compile(r"^(?:class|def) (\w+)\(", re.MULTILINE)
LONGEST_SOURCE = 1 << 24  # characters that are read
LONGEST_PARSED = 1 << 20  # characters that are parsed
UNKNOWN = "its TorchScript code doesn't compute the forward pass of PyTorch's class: it was changed, or has hooks"
HOOKED = "forward hooks aren't supported"


class Written(NamedTuple):
    """The result of evaluating a module's source.

    Attributes:
        constants: its settings.
        why: why it computes something else than PyTorch's class; "" if it doesn't.
    """

    constants: dict[str, Any]
    why: str


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
        """Evaluate the source of a module; return None if its class isn't TorchScript's."""
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
            rank = None if name not in RECURRENT else 2 if name.endswith("Cell") else 3
            run = Evaluation(self, found, attributes, constants, name, rank)
            if words is None:
                check_chain(run)
                return Written(constants, "")
            return Written(settings(run, words), "")
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

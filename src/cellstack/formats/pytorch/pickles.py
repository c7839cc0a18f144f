"""Reads pickles as data, with placeholders for everything that a pickle would import, create or call.

Python's unpickler imports and calls what a pickle names, allocates as much memory as the pickle claims, and can be made
to overflow the stack. This reader does none of it: `pickletools` decodes the opcodes, and checks every length against
the available bytes; they are interpreted here without recursion, and no name is imported. Classes and functions are
returned as `Global`, and objects made with them as `Standin`, unless the caller passes a builder for them. Dicts,
lists, tuples, text and numbers are returned as such; sets as lists, because only text and numbers are hashed.

The opcodes are those of protocols 2 to 5; the text protocols 0 and 1, which torch doesn't write, aren't supported.
Memory and time stay within some hundred times the pickle's length.

Ref: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, NamedTuple, NoReturn

from cellstack.cells.errors import FormatError

# Modules for access to the system, the interpreter or the network, which no model needs. Nothing in a pickle is run
# here, but a file that names them was made to do harm elsewhere, so it is refused with a message.
SYSTEM = (
    "os posix nt subprocess sys runpy importlib pkgutil pty socket shutil ctypes _ctypes webbrowser codeop pdb bdb "
    "timeit cProfile marshal multiprocessing asyncio http urllib ftplib smtplib telnetlib pip ensurepip"
)
BUILT_IN = (
    "eval exec compile __import__ open input breakpoint globals locals vars setattr delattr exit quit help execfile "
    "file reload"
)
DANGEROUS = frozenset(SYSTEM.split())
DANGEROUS_BUILT_IN = frozenset(BUILT_IN.split())
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}  # Python 2's modules
MOST_KEY = 1 << 60  # larger integers may have equal hashes, and make a dict of them quadratically slow
LONGEST_NAME = 500  # of a class, including its module
LONGEST_KEY = 16  # of a tuple as a dict's key, which is hashed at each use


class Global(NamedTuple):
    """A class or function in a pickle, by its dotted path, such as `builtins.set`; it isn't imported."""

    path: str


class Standin:
    """A placeholder for an object that a pickle would create by calling `kind` with `args`.

    Attributes:
        kind: the dotted path of the class or function.
        args: its arguments.
        state: the state that would be set on the object, usually its attributes by name; None without any.
        items: the items that would be appended to it; None without any.
        pairs: the items that would be set in it by key; None without any.
    """

    __slots__ = ("args", "items", "kind", "pairs", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"Standin({self.kind!r})"


def read(
    where: str,
    data: bytes,
    start: int = 0,
    builders: Mapping[str, Callable[[tuple[Any, ...]], Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Return the object in the pickle at `start`, and the pickle's end.

    Args:
        where: its name in messages, such as the file's name.
        data: the bytes that hold the pickle.
        start: the index of its first byte.
        builders: by dotted path, functions that make an object from the arguments of a call.
        persistent: a function that makes an object from a persistent id; None = persistent ids aren't allowed.

    Returns:
        `(object, end)`.

    Raises:
        FormatError: the pickle is damaged, uses features that no model needs, or was made to do harm.

    >>> import pickle
    >>> read("x", pickle.dumps({"a": [1, 2.5]}))[0]
    {'a': [1, 2.5]}
    >>> read("x", pickle.dumps(FormatError("no")))[0]
    Standin('cellstack.cells.errors.FormatError')
    """
    machine = _Machine(where, data, builders or {}, persistent)
    machine.file.seek(start)
    try:
        return machine.run(), machine.at
    except FormatError:
        raise
    except IndexError:
        raise FormatError(f"{where}: the pickle is damaged: it empties its stack too early") from None
    except (ValueError, DeprecationWarning) as error:  # of `pickletools`; it warns of names with a backslash
        raise FormatError(f"{where}: the pickle is damaged: {str(error)[:200]}") from None


class _Machine:
    """An interpreter of pickle's opcodes, with its stack, its marks and its memo."""

    def __init__(
        self,
        where: str,
        data: bytes,
        builders: Mapping[str, Callable[[tuple[Any, ...]], Any]],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.where, self.size, self.file = where, len(data), BytesIO(data)
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def wrong(self, expected: str, found: Any) -> NoReturn:
        raise FormatError(f"{self.where}: byte {self.at}: expected {expected}, found {found}")

    @property
    def at(self) -> int:
        """The index of the byte after the last opcode."""
        return self.file.tell()

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name == "STOP":
                break
            operation = OPERATIONS.get(opcode.name)
            if operation is None:
                self.wrong("an opcode of pickle's protocols 2 to 5", opcode.name)
            operation(self, argument)
        return self.stack.pop()

    def charge(self, count: int) -> None:
        """Count copied items: a short pickle could copy the same long object many times."""
        self.copied += count
        if self.copied > self.size:
            raise FormatError(f"{self.where}: byte {self.at}: the pickle copies more items than it has bytes")

    # ── stack and memo ──────────────────────────────────────────────────────────────────────────────────────────────

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise FormatError(f"{self.where}: byte {self.at}: the memo has no entry {str(key)[:40]}")
        self.stack.append(self.memo[key])

    # ── containers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Standin):
            if target.items is None:
                target.items = []
            target.items.extend(values)
        else:
            self.wrong("a list to append to", type(target).__name__)

    def set_pairs(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Standin):
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        if not isinstance(target, dict) or len(flat) % 2:
            self.wrong("a dict and pairs for it", f"{type(target).__name__} and {len(flat)} values")
        for at in range(0, len(flat), 2):
            target[self.key(flat[at])] = flat[at + 1]

    def set_pair(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_pairs([key, value])

    def key(self, value: Any) -> Any:
        """Return `value` after checking that it is safe as a key of a dict."""
        for part in value[: LONGEST_KEY + 1] if type(value) is tuple else (value,):
            fits = type(part) in (str, bytes, float, bool, type(None), Global, Standin)
            if not fits and not (type(part) is int and -MOST_KEY < part < MOST_KEY):
                self.wrong("a dict's key to be text or a number", f"a key of {type(part).__name__}")
        if type(value) is tuple and len(value) > LONGEST_KEY:
            self.wrong(f"a dict's key of at most {LONGEST_KEY} parts", f"one of {len(value)}")
        return value

    # ── names and calls ─────────────────────────────────────────────────────────────────────────────────────────────

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            self.wrong("the name of a class as text", type(module if isinstance(name, str) else name).__name__)
        if not 0 < len(module) + len(name) <= LONGEST_NAME:
            self.wrong(f"the name of a class in {LONGEST_NAME} characters", f"one of {len(module) + len(name)}")
        module = RENAMED.get(module, module)
        parts = [*module.split(".")[:1], *name.split(".")[:-1]]  # a dotted name would look up attributes
        if not DANGEROUS.isdisjoint(parts) or (module == "builtins" and name.split(".")[0] in DANGEROUS_BUILT_IN):
            raise FormatError(
                f"{self.where}: byte {self.at}: expected the classes of a model, found {f'{module}.{name}'!r}: "
                "this file was made to run code; none of it was run"
            )
        return Global(f"{module}.{name}")

    def by_words(self, words: str) -> None:
        module, _, name = words.partition(" ")
        self.push(self.name(module, name))

    def by_stack(self) -> None:
        name = self.stack.pop()
        self.push(self.name(self.stack.pop(), name))

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            self.wrong("the arguments of a call in a tuple", type(args).__name__)
        if isinstance(function, Standin):
            return Standin(function.kind, args)
        if not isinstance(function, Global):
            self.wrong("something to call", type(function).__name__)
        path = function.path
        builder = self.builders.get(path)
        if builder is not None:
            return builder(args)
        if path in ("copyreg._reconstructor", "copyreg.__newobj__") and args and isinstance(args[0], Global):
            self.charge(len(args))
            return self.call(args[0], args[1:] if path.endswith("obj__") else ())
        if path in DICTS:
            return self.dict_from(args[0] if args and path != "collections.defaultdict" else [])
        if path in LISTS:
            values = args[0] if args else []
            if not isinstance(values, (list, tuple)):
                self.wrong(f"a list for {path}", type(values).__name__)
            self.charge(len(values))
            return list(values)
        if path == "builtins.bytes" and not args:
            return b""
        if path == "_codecs.encode" and args and isinstance(args[0], str):
            self.charge(len(args[0]))
            try:
                return args[0].encode("latin-1")
            except UnicodeEncodeError:
                self.wrong("bytes as text", "other text")
        return Standin(path, args)

    def dict_from(self, pairs: Any) -> dict[Any, Any]:
        if isinstance(pairs, dict):
            pairs = list(pairs.items())
        if not isinstance(pairs, (list, tuple)):
            self.wrong("pairs for a dict", type(pairs).__name__)
        self.charge(len(pairs))
        entries: dict[Any, Any] = {}
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                self.wrong("pairs for a dict", type(pair).__name__)
            entries[self.key(pair[0])] = pair[1]
        return entries

    def reduce(self) -> None:
        args = self.stack.pop()
        self.push(self.call(self.stack.pop(), args))

    def new_with_keywords(self) -> None:
        self.stack.pop()  # a constructor's keywords don't matter for tensors
        self.reduce()

    def object_of(self) -> None:
        function, *args = self.since_mark() or [None]
        self.push(self.call(function, tuple(args)))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Standin):
            target.state = state

    def persist(self, key: Any) -> None:
        if self.persistent is None:
            raise FormatError(f"{self.where}: byte {self.at}: persistent ids aren't supported in this kind of file")
        self.push(self.persistent(key))


def _text(letters: str) -> str | bytes:
    """Return a string of Python 2, which has one type for text and bytes: as text if it is UTF-8, else as bytes."""
    data = letters.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
LISTS = ("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset")
ARGUMENTS = (  # opcodes that push their argument
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8"
)
OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    # stack and memo
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    # numbers, text and bytes
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(ARGUMENTS.split(), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda m, letters: m.push(_text(letters))),
    "BYTEARRAY8": lambda m, data: m.push(bytes(data)),
    # containers
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    **{f"TUPLE{count}": lambda m, _, count=count: m.tuple_of(count) for count in (1, 2, 3)},
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.push([])),
    "APPEND": lambda m, _: m.append(),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.extend(m.since_mark())),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.set_pair(),
    "SETITEMS": lambda m, _: m.set_pairs(m.since_mark()),
    "FROZENSET": lambda m, _: m.push(m.since_mark()),
    # names and calls
    "GLOBAL": _Machine.by_words,
    "STACK_GLOBAL": lambda m, _: m.by_stack(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.reduce()),
    "NEWOBJ_EX": lambda m, _: m.new_with_keywords(),
    "OBJ": lambda m, _: m.object_of(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persist(m.stack.pop()),
}

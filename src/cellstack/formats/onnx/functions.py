"""Functions that an ONNX file defines: each call is replaced by the nodes of the function, as the format specifies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.formats.onnx.messages import DOMAINS, graphs_of, label, renamed, with_graphs, with_nodes

FREE = 1 << 20  # bytes that calls may expand to, regardless of the file's size
TIMES = 8  # further bytes per byte of the file
EACH = 64  # counted for each node, in addition to its bytes
DEEPEST = 32

Key = tuple[str, str, str]


class _Inliner:
    """Replaces calls by the nodes of their functions; the size of the file in bytes limits the expansion."""

    def __init__(self, path: str, functions: Sequence[Any], opset: int, size: int) -> None:
        self.path = path
        self.left = self.most = FREE + TIMES * size
        self.functions: dict[Key, Any] = {}
        self.calls: dict[str, int] = {}
        for function in functions:
            key = (function.domain, function.name, function.overload)
            if not all(isinstance(word, str) for word in (*key, *function.input, *function.output)):
                raise FormatError(f"{path}: names of functions must be UTF-8")
            if key in self.functions:
                raise FormatError(f"{path}: function {_shown(function)} occurs twice")
            other = {entry.version for entry in function.opset_import if entry.domain in DOMAINS} - {opset}
            if other:
                raise FormatError(
                    f"{path}: function {_shown(function)} has another opset than the file: {sorted(other)[0]}"
                )
            self.functions[key] = function

    def expanded(self, nodes: Iterable[Any], calls: tuple[Key, ...] = ()) -> Iterator[Any]:
        """Yield nodes, and in place of calls the nodes of the functions; in inner graphs too."""
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in self.functions:
                yield from self.expanded(self._body(node, self.functions[key], calls), (*calls, key))
            else:
                yield with_graphs(node, lambda graph: with_nodes(graph, list(self.expanded(graph.node, calls))))

    def _body(self, call: Any, function: Any, calls: tuple[Key, ...]) -> list[Any]:
        """Return the nodes that replace a call."""
        where = f"{self.path}: function {_shown(function)}"
        if (function.domain, function.name, function.overload) in calls or len(calls) >= DEEPEST:
            raise FormatError(f"{where}: recursive or too deeply nested functions aren't supported")
        if len(call.input) > len(function.input) or len(call.output) > len(function.output):
            raise FormatError(f"{where}: a call has more inputs or outputs than the function")
        self._take(where, EACH * (len(function.input) + len(function.output) + len(function.attribute_proto)))
        _check(where, call)
        prefix = self._prefix(call)
        names = dict.fromkeys(function.input, "") | dict(zip(function.input, call.input, strict=False))
        given = {entry.name: entry for entry in (*function.attribute_proto, *call.attribute)}
        if not all(isinstance(name, str) for name in given):
            raise FormatError(f"{where}: names must be UTF-8")
        same = []
        for inner, outer in zip(function.output, call.output, strict=False):
            if inner in names:  # an output that is also an input or another output
                same.append((names[inner], outer))
            elif outer:
                names[inner] = outer
        longest = max(map(len, (prefix, *names.values())))
        made = []
        for node in function.node:
            self._take(where, node.ByteSize() + EACH + _growth(node, longest, given))
            _check(where, node)
            made.append(renamed(node, lambda name: names.get(name, prefix + name), prefix, given))
        for source, target in same:
            if target:
                self._take(where, EACH + len(source) + len(prefix) + 2 * len(target))
                node = type(call)(op_type="Identity", name=f"{prefix}{target}")
                node.input.append(source)
                node.output.append(target)
                made.append(node)
        return made

    def _prefix(self, call: Any) -> str:
        own = label(call)
        number = self.calls[own] = self.calls.get(own, 0) + 1
        return f"{own}/" if number == 1 else f"{own}.{number}/"

    def _take(self, where: str, size: int) -> None:
        """Count the size of an expanded call; `FormatError` beyond the limit."""
        self.left -= size
        if self.left < 0:
            raise FormatError(f"{where}: the calls expand to more than the limit of {self.most} bytes")


def _shown(function: Any) -> str:
    return repr(function.name)[:80]


def _check(where: str, node: Any) -> None:
    """Raise `FormatError` where names of a node aren't text: protobuf returns bytes then."""
    words = [node.name, node.op_type, *node.input, *node.output]
    words += [word for entry in node.attribute for word in (entry.name, entry.ref_attr_name)]
    for graph in graphs_of(node):
        words += [value.name for value in (*graph.initializer, *graph.input, *graph.output)]
    if not all(isinstance(word, str) for word in words):
        raise FormatError(f"{where}: names must be UTF-8")
    for graph in graphs_of(node):
        for inner in graph.node:
            _check(where, inner)


def _growth(node: Any, longest: int, given: dict[str, Any]) -> int:
    """Return a bound on the bytes by which a node grows from renaming, up to `longest` per name, and attributes."""
    size = longest * (1 + len(node.input) + len(node.output))
    for entry in node.attribute:
        size += given[entry.ref_attr_name].ByteSize() if entry.ref_attr_name in given else 0
    for graph in graphs_of(node):
        size += longest * (len(graph.initializer) + len(graph.input) + len(graph.output))
        size += sum(_growth(inner, longest, given) for inner in graph.node)
    return size


def inline(path: str, nodes: tuple[Any, ...], functions: Sequence[Any], opset: int, size: int) -> tuple[Any, ...]:
    """Return a graph's nodes, and in place of each call of a function of the file the function's: see `_Inliner`.

    `onnx.inliner` isn't used: it doesn't limit how large calls expand, and its names don't say which call a node is of.

    Raises:
        FormatError: functions that are recursive, expand beyond the limit, or have another opset.
    """
    return tuple(_Inliner(path, functions, opset, size).expanded(nodes)) if functions else nodes

"""Functions that an ONNX file brings with it: each call becomes the nodes of the function, as the format defines it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cellstack.spec import FormatError

DOMAINS = ("", "ai.onnx")
FREE = 1 << 20  # bytes that any file's calls may become, however small it is
TIMES = 8  # and how many for each of its bytes
EACH = 64  # what a node counts for beyond its bytes
DEEPEST = 32

Key = tuple[str, str, str]


class _Inliner:
    """Puts the nodes of functions in the place of calls.

    Args:
        path: the file, for messages.
        proto: the ModelProto.
        size: of the file, in bytes.
    """

    def __init__(self, path: str, proto: Any, size: int) -> None:
        self.path = path
        self.left = self.most = FREE + TIMES * size
        self.functions: dict[Key, Any] = {}
        self.calls: dict[str, int] = {}
        opsets = {entry.version for entry in proto.opset_import if entry.domain in DOMAINS}
        for function in proto.functions:
            key = (function.domain, function.name, function.overload)
            if not all(isinstance(word, str) for word in (*key, *function.input, *function.output)):
                raise FormatError(f"{path}: expected names of functions in UTF-8, found others")
            if key in self.functions:
                raise FormatError(f"{path}: expected every function once, found {_shown(function)} twice")
            other = {entry.version for entry in function.opset_import if entry.domain in DOMAINS} - opsets
            if other:
                raise FormatError(
                    f"{path}: expected function {_shown(function)} in the file's opset, found {sorted(other)[0]}"
                )
            self.functions[key] = function

    def graph(self, graph: Any, calls: tuple[Key, ...] = ()) -> None:
        """Put nodes in the place of the calls of a graph, and of the graphs within it."""
        made = list(self._expanded(graph.node, calls))
        del graph.node[:]
        graph.node.extend(made)

    def _expanded(self, nodes: Iterable[Any], calls: tuple[Key, ...]) -> Iterable[Any]:
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in self.functions:
                yield from self._expanded(self._body(node, self.functions[key], calls), (*calls, key))
                continue
            for graph in _inner(node):
                self.graph(graph, calls)
            yield node

    def _body(self, call: Any, function: Any, calls: tuple[Key, ...]) -> list[Any]:
        """Return the nodes that one call is."""
        where = f"{self.path}: function {_shown(function)}"
        if (function.domain, function.name, function.overload) in calls or len(calls) >= DEEPEST:
            raise FormatError(f"{where}: expected no function to call itself, and few to call each other")
        if len(call.input) > len(function.input) or len(call.output) > len(function.output):
            raise FormatError(f"{where}: expected a call with its inputs and outputs, found more of them")
        self._take(where, EACH * (len(function.input) + len(function.output) + len(function.attribute_proto)))
        _check(where, call)
        prefix = self._prefix(call)
        names = dict.fromkeys(function.input, "") | dict(zip(function.input, call.input, strict=False))
        given = {entry.name: entry for entry in (*function.attribute_proto, *call.attribute)}
        if not all(isinstance(name, str) for name in given):
            raise FormatError(f"{where}: expected names in UTF-8, found others")
        same = []
        for inner, outer in zip(function.output, call.output, strict=False):
            if inner in names:  # an output that is an input, or another output, too
                same.append((names[inner], outer))
            elif outer:
                names[inner] = outer
        longest = max(map(len, (prefix, *names.values())))
        made = [self._copy(where, node, prefix, names, longest, given) for node in function.node]
        for source, target in same:
            if target:
                self._take(where, EACH + len(source) + len(prefix) + 2 * len(target))
                node = type(call)(op_type="Identity", name=f"{prefix}{target}")
                node.input.append(source)
                node.output.append(target)
                made.append(node)
        return made

    def _prefix(self, call: Any) -> str:
        own = call.name or next((name for name in call.output if name), call.op_type)
        number = self.calls[own] = self.calls.get(own, 0) + 1
        return f"{own}/" if number == 1 else f"{own}.{number}/"

    def _take(self, where: str, size: int) -> None:
        """Count what a call becomes; `FormatError` where there is no room for it."""
        self.left -= size
        if self.left < 0:
            raise FormatError(f"{where}: expected calls that become at most {self.most} bytes, found more")

    def _copy(
        self, where: str, node: Any, prefix: str, names: dict[str, str], longest: int, given: dict[str, Any]
    ) -> Any:
        self._take(where, node.ByteSize() + EACH + _growth(node, longest, given))
        made = type(node)()
        made.CopyFrom(node)
        self._rename(where, made, prefix, names, given)
        return made

    def _rename(self, where: str, node: Any, prefix: str, names: dict[str, str], given: dict[str, Any]) -> None:
        """Give a node of a function the names and the attributes that it has in a call."""
        _check(where, node)
        if node.name:
            node.name = prefix + node.name
        for field in (node.input, node.output):
            renamed = [names.get(name, prefix + name) if name else "" for name in field]
            del field[:]
            field.extend(renamed)
        kept = []
        for entry in node.attribute:
            if entry.ref_attr_name:
                if entry.ref_attr_name not in given:
                    continue  # the call doesn't give it, and so the node doesn't have it
                found = type(entry)()
                found.CopyFrom(given[entry.ref_attr_name])
                found.name = entry.name
                kept.append(found)
                continue
            for graph in [entry.g] if entry.type == 5 else entry.graphs:
                for value in (*graph.initializer, *graph.input, *graph.output):
                    value.name = names.get(value.name, prefix + value.name)
                for inner in graph.node:
                    self._rename(where, inner, prefix, names, given)
            kept.append(entry)
        made = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del node.attribute[:]
        node.attribute.extend(made)


def _shown(function: Any) -> str:
    return repr(function.name)[:80]


def _inner(node: Any) -> Iterable[Any]:
    for entry in node.attribute:
        yield from [entry.g] if entry.type == 5 else entry.graphs


def _check(where: str, node: Any) -> None:
    """Raise `FormatError` where names of a node are no text: protobuf gives bytes then."""
    words = [node.name, node.op_type, *node.input, *node.output]
    words += [word for entry in node.attribute for word in (entry.name, entry.ref_attr_name)]
    for graph in _inner(node):
        words += [value.name for value in (*graph.initializer, *graph.input, *graph.output)]
    if not all(isinstance(word, str) for word in words):
        raise FormatError(f"{where}: expected names in UTF-8, found others")


def _growth(node: Any, longest: int, given: dict[str, Any]) -> int:
    """Return by how many bytes a node may grow when it gets the names, each so long at most, and the attributes."""
    size = longest * (1 + len(node.input) + len(node.output))
    for entry in node.attribute:
        size += given[entry.ref_attr_name].ByteSize() if entry.ref_attr_name in given else 0
    for graph in _inner(node):
        size += longest * (len(graph.initializer) + len(graph.input) + len(graph.output))
        size += sum(_growth(inner, longest, given) for inner in graph.node)
    return size


def inline(path: str, proto: Any, size: int) -> None:
    """Put the nodes of functions in the place of calls, in a file that has functions.

    Args:
        path: the file, for messages.
        proto: the ModelProto, which is changed; it has no functions afterwards.
        size: of the file, in bytes, which bounds what its calls may become.

    Raises:
        FormatError: functions that call themselves, become too much, or are of another opset.
    """
    if proto.functions:
        _Inliner(path, proto, size).graph(proto.graph)
        del proto.functions[:]

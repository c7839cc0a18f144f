"""Nodes of an ONNX graph as protobuf messages: the graphs inside them, and copies with other names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

DOMAINS = ("", "ai.onnx")
OURS = str(Path(__file__).absolute().parents[2])
INNER_GRAPH = 5  # AttributeProto's type


def label(node: Any) -> str:
    """Return a node's name, else that of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def line_of(node: Any) -> str:
    """Return the line of a module's code that calls an operator, as `file.py:12`; "" if the exporter didn't note it."""
    trace = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.stack_trace"), "")
    calls = re.findall(r'^ *File "(.+)", line (\d+), in (.*)', trace, re.MULTILINE)[::-1]
    for path, line, function in calls or re.findall(r"^(.+)\((\d+)\): (.*)", node.doc_string, re.MULTILINE):
        ours = path.startswith(OURS)
        if ours and function == "export_scripted":
            break  # the following lines are those that call the exporter
        if not ours and not re.search(r"[\\/](site|dist)-packages[\\/]torch[\\/]", path):
            return f"{PureWindowsPath(path).name}:{line}"  # accepts / and \ as separators
    return ""


def graphs_of(node: Any) -> Iterator[Any]:
    """Yield the graphs inside a node: the body of a Loop or a Scan, the branches of an If."""
    for entry in node.attribute:
        yield from [entry.g] if entry.type == INNER_GRAPH else entry.graphs


def with_nodes(graph: Any, nodes: list[Any]) -> Any:
    """Return a copy of a GraphProto with other nodes."""
    made = copy.deepcopy(graph)
    del made.node[:]
    made.node.extend(nodes)
    return made


def with_graphs(node: Any, change: Callable[[Any], Any]) -> Any:
    """Return a node with every graph inside it replaced by `change` of it; a node without graphs is returned itself."""
    if not any(True for _ in graphs_of(node)):
        return node
    made = copy.deepcopy(node)
    for graph in graphs_of(made):
        graph.CopyFrom(change(graph))
    return made


def renamed(node: Any, rename: Callable[[str], str], prefix: str = "", given: Mapping[str, Any] | None = None) -> Any:
    """Return a copy of a node in which each value has another name, in its inner graphs too.

    Args:
        node: the node.
        rename: returns the new name of a value.
        prefix: of the names of nodes.
        given: attributes that a function's nodes refer to, by name; a node lacks those that aren't given.
    """
    given = given or {}

    def within(graph: Any) -> Any:
        made = with_nodes(graph, [renamed(inner, rename, prefix, given) for inner in graph.node])
        for value in (*made.initializer, *made.input, *made.output):
            value.name = rename(value.name)
        return made

    made = copy.deepcopy(node)
    made.name = prefix + node.name if node.name else ""
    made.input[:] = [rename(name) if name else "" for name in node.input]
    made.output[:] = [rename(name) if name else "" for name in node.output]
    if any(entry.ref_attr_name for entry in node.attribute):
        del made.attribute[:]
        for entry in node.attribute:
            if not entry.ref_attr_name or entry.ref_attr_name in given:
                made.attribute.add().CopyFrom(given[entry.ref_attr_name] if entry.ref_attr_name else entry)
                made.attribute[-1].name = entry.name
    return with_graphs(made, within)

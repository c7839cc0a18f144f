"""How each node is written: a function per node, which adds its lines to a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack import nodes
from cellstack.formats.c.step import called, literal
from cellstack.nodes.elementwise import Elementwise

if TYPE_CHECKING:
    from cellstack.formats.c.source import Writer

Output = tuple[str, int]  # the name and the width of a node's output


class Feed(NamedTuple):
    """What a node reads: the node's name, the name and width of its input in C, and whether the node is the last."""

    node: str
    at: str
    width: int
    last: bool


def _memory(out: Writer, owner: str, node: nodes.MLSTM, feed: Feed) -> Output:
    """The state of a memory starts with zeros."""
    target, state = out.target(feed, node.units), []
    for name, shape in node.memory.state_shapes.items():
        member = out.identifier(f"{owner}_{name}")
        out.memories.append((member, math.prod(shape), f"{name} of {owner}"))
        out.resets.append(f"    memset(s->{member}, 0, sizeof s->{member});")
        state.append(f"s->{member}")
    sizes = f"{node.heads}, {node.key_size}, {node.value_size}, {literal(node.epsilon)}"
    out.steps.append(f"    ${{name}}_memory_step({sizes}, {feed.at}, {', '.join(state)}, {target});")
    if node.output_gate:
        gate = f"${{name}}_sigmoid({feed.at}[{node.core_size} + j])"
        out.steps += out.each(node.units, target, f"{target}[j] * {gate}")
    return target, node.units


def _embedding(out: Writer, owner: str, node: nodes.Embedding, feed: Feed) -> Output:
    if node.mask_zero:
        raise ValueError(f"export_c: {feed.node}: mask_zero isn't supported, as the C code has no masks")
    rows, width = node.table.shape
    table = out.array(owner, "table", node.table, f"[V={rows}, E={width}]")
    at = f"{feed.at}[0]"
    choice = f"{at} >= 0.0{out.f} && {at} < {rows}.0{out.f} ? (size_t){at} : 0"
    pointer = out.identifier(f"{owner}_row")
    out.steps.append(f"    const {out.real} *const {pointer} = {table} + {width} * ({choice});")
    return pointer, width


def _elementwise(out: Writer, owner: str, node: Elementwise, feed: Feed) -> Output:
    target = out.target(feed, feed.width)

    def constant(value: Any) -> str:
        if isinstance(value, float):
            return literal(value)
        return f"{out.array(owner, node.name_of(value), value, f'[{feed.width}]')}[j]"

    out.steps += out.each(feed.width, target, node.formula.written(f"{feed.at}[j]", called, constant))
    return target, feed.width


def _activation(out: Writer, owner: str, node: nodes.Activation, feed: Feed) -> Output:
    target = out.target(feed, feed.width)
    out.steps += out.activated(target, feed.width, node.activation, feed.at)
    return target, feed.width


def _layer_norm(out: Writer, owner: str, node: nodes.LayerNorm, feed: Feed) -> Output:
    width, target = feed.width, out.target(feed, feed.width)
    out.steps += [
        f"    memcpy({target}, {feed.at}, {width} * sizeof *{target});",
        f"    ${{name}}_normalise({target}, {width}, {literal(node.epsilon)});",
    ]
    gain = "" if node.gain is None else f" * {out.array(owner, 'gain', node.gain, f'[{width}]')}[j]"
    bias = "" if node.bias is None else f" + {out.array(owner, 'bias', node.bias, f'[{width}]')}[j]"
    if gain or bias:
        out.steps += out.each(width, target, f"{target}[j]{gain}{bias}")
    return target, width


def _dense(out: Writer, owner: str, node: nodes.Dense, feed: Feed) -> Output:
    (width, units), narrow = node.kernel.shape, out.narrow
    target, shape = out.target(feed, units), f"[I={width}, O={units}]"
    if narrow is None or (out.as_stored and node.weights != narrow.name):
        kernel = out.array(owner, "kernel", node.kernel, shape)
        out.steps += out.start(owner, target, units, node.bias)
        out.steps.append(f"    ${{name}}_accumulate({target}, {units}, {feed.at}, {width}, {kernel});")
    else:
        bias = "NULL"
        if node.bias is None:
            out.steps += out.start(owner, target, units, None)
        else:
            bias = out.array(owner, "bias", node.bias, f"[{units}]")
        kernel = ", ".join(out.matrix(owner, "kernel", narrow, node.kernel, shape))
        out.steps.append(f"    ${{name}}_multiply({target}, {units}, {bias}, {feed.at}, {width}, {kernel}, s->row);")
    out.steps += out.activated(target, units, node.activation)
    return target, units


def _conv(out: Writer, owner: str, node: nodes.Conv1D, feed: Feed) -> Output:
    """A causal convolution. The steps in its window are stored in the state, the oldest first."""
    if node.groups > 1:
        raise ValueError(f"export_c: {feed.node}: expected a Conv1D with one group, got {node.groups}")
    taps, channels, filters = node.kernel.shape
    kernel = out.array(owner, "kernel", node.kernel, f"[K={taps}, C={channels}, F={filters}]")
    target = out.target(feed, filters)
    start, done = out.start(owner, target, filters, node.bias), out.activated(target, filters, node.activation)
    if taps == 1:
        taken = f"{target}, {filters}, {feed.at}, {channels}, {kernel}"
        out.steps += [*start, f"    ${{name}}_accumulate({taken});", *done]
        return target, filters
    seen, kept = out.identifier(f"{owner}_x"), (node.span - 1) * channels
    out.frames.append((seen, node.span * channels, f"the last steps into {owner}"))
    out.resets.append(f"    memset(s->{seen}, 0, sizeof s->{seen});")
    tap = f"s->{seen} + k * {node.dilation * channels}, {channels}, {kernel} + k * {channels * filters}"
    out.steps += [
        f"    memcpy(s->{seen} + {kept}, {feed.at}, {channels} * sizeof *s->{seen});",
        *start,
        f"    for (size_t k = 0; k < {taps}; k++) {{",
        f"        ${{name}}_accumulate({target}, {filters}, {tap});",
        "    }",
        f"    memmove(s->{seen}, s->{seen} + {channels}, {kept} * sizeof *s->{seen});",
        *done,
    ]
    return target, filters


WRITERS: dict[type[nodes.Node], Callable[[Writer, str, Any, Feed], Output]] = {
    **{node: _elementwise for node in nodes.NODES.values() if issubclass(node, Elementwise)},
    nodes.LayerNorm: _layer_norm,
    nodes.Embedding: _embedding,
    nodes.Dense: _dense,
    nodes.Activation: _activation,
    nodes.Conv1D: _conv,
    nodes.Recurrent: lambda out, owner, node, feed: out.recurrent(owner, node, feed),
    nodes.MLSTM: _memory,
}
"""The nodes that run step by step and can be written; a function returns the name and the width of its output."""

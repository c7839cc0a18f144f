"""Networks that need a whole sequence, as C: those that run backwards, or take a mean or maximum over time.

Attention pooling is one of these nodes too: a softmax over time, its product with the value that it was computed from,
and the sum of the product over time. A chain is cut at these nodes. The nodes between two cuts run step by step, in one
loop. If the next node reads the steps in another order, their outputs are stored in memory that the caller provides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cellstack.formats.c.node_writers import Feed
from cellstack.formats.c.source import Writer, check_chain, comment
from cellstack.network import Network
from cellstack.nodes import Activation, Bidirectional, GlobalPool, Merge, Node, Recurrent, Reduce, TimeSoftmax

Group = list[tuple[str, Node]]
VECTOR = "s->vector"  # the value after the time axis is removed
LEAST = {"float": "-3.40282347e+38f", "double": "-1.7976931348623157e+308"}
MERGES = {"sum": "{a} + {b}", "mul": "{a} * {b}", "ave": "({a} + {b}) * 0.5$f"}


def needs_sequence(network: Network) -> bool:
    """Return whether a node needs the whole sequence, so that the network can't run step by step."""
    return any(_whole(node) for node in network.nodes)


def _whole(node: Node) -> bool:
    backwards = isinstance(node, Bidirectional) or (isinstance(node, Recurrent) and node.go_backwards)
    return backwards or isinstance(node, TimeSoftmax) or (isinstance(node, GlobalPool) and node.mode != "last")


def pooled_by_attention(network: Network) -> dict[int, int]:
    """Return the number of the node that attention pooling weighs, -1 for the input, by that of its `TimeSoftmax`.

    The nodes between the two, which compute the scores, are a chain.
    """
    values, found = (network.inputs[0], *network.names), {}
    for number in range(len(network.nodes) - 2):
        softmax, merge, reduce = network.nodes[number : number + 3]
        if not isinstance(softmax, TimeSoftmax) or not isinstance(merge, Merge) or not isinstance(reduce, Reduce):
            continue
        others = [name for name in network.wires[number + 1] if name != network.names[number]]
        if merge.mode != "mul" or len(network.wires[number + 1]) != 2 or len(others) != 1 or reduce.keepdims:
            continue
        if network.shapes[network.names[number]][-1] not in (1, network.shapes[others[0]][-1]):
            continue  # one value, weighted in several ways
        at = values.index(others[0]) - 1
        scores = range(at + 1, number + 1)
        chained = all(network.wires[n] == (values[n],) for n in (*scores, number + 2))
        if (
            reduce.mode == "sum"
            and reduce.place(2) == 1
            and chained
            and not any(_whole(network.nodes[n]) for n in scores[:-1])
        ):
            found[number] = at
    return found


class SequenceWriter(Writer):
    """Writes a function that runs a whole sequence; see `Writer`."""

    unit = "one sequence"
    memory = "the state of a run; in addition, the array of _WORK(steps). Nothing is allocated."
    includes = "\n#include <stddef.h>\n"

    def check(self) -> None:
        """Raise `ValueError` where a node can't be written as C."""
        network = self.network
        self.attention = pooled_by_attention(network)
        ends = {network.names[number + n] for number in self.attention for n in range(3)}
        for label, node in zip(network.names, network.nodes, strict=True):
            if isinstance(node, TimeSoftmax) and label not in ends:
                raise ValueError(
                    f"export_c: {label}: TimeSoftmax is only supported in attention pooling: the sum over time of its "
                    "product with the value from which it was computed, step by step"
                )
        check_chain(network, (Bidirectional, TimeSoftmax, *((Merge, Reduce) if ends else ())), joined=ends)
        (name,) = network.inputs
        if not network.graph.timed(name):
            raise ValueError(f"export_c: expected an input with a time axis, got {name} {network.graph.shown(name)}")
        for name, node, (source, *_) in zip(network.names, network.nodes, network.wires, strict=True):
            why = None if _whole(node) or name in ends else node.step_rule(network.shapes[source]).why_not
            if why is not None and len(network.shapes[source]) > 1:
                raise ValueError(f"export_c: {name} can't be written as C: {why}")

    def write(self) -> None:
        """Write all nodes."""
        entries = [
            (label, node)
            for label, node in zip(self.network.names, self.network.nodes, strict=True)
            if not (isinstance(node, Activation) and node.activation == "linear")
            and not isinstance(node, (Merge, Reduce))  # they are written with their TimeSoftmax
        ]
        self.buffers = [0, 0]  # the width of each buffer: values per step
        self.sequence, self.width = "x", self.input_width([node for _, node in entries])
        group: Group = []  # consecutive nodes that run step by step
        at = ""  # the value, once the time axis is removed
        for number, (label, node) in enumerate(entries):
            last = number == len(entries) - 1
            if at:
                at, self.width = self.node(label, node, at, self.width, last)
            elif write := WHOLE.get(type(node)):
                at = write(self, group, label, node, "y" if last else "")
            else:
                group.append((label, node))
        if not at and group:
            self._store(group, "y")
        elif at and at != "y":
            self.steps.append(f"    memcpy(y, {at}, {self.width} * sizeof *y);")
        self.outputs, self.every_step = self.width, not at

    @contextmanager
    def _loop(self, backwards: bool = False) -> Iterator[None]:
        """Put the lines written inside into a loop over the steps of the current sequence, in which `v` is a step."""
        outer, self.steps = self.steps, []
        width = self.width
        yield
        head = "for (size_t t = steps; t-- > 0;) {" if backwards else "for (size_t t = 0; t < steps; t++) {"
        step = f"        const {self.real} *const v = {self.sequence} + t * {width};"
        apart = [] if outer and outer[-1].endswith("*/") else [""]
        self.steps = [
            *outer,
            *apart,
            f"    {head}",
            step,
            *(f"    {line}" if line else "" for line in self.steps),
            "    }",
        ]

    def _steps(self, group: Group) -> str:
        """Write nodes for one step; return the name of the last one's output."""
        at = "v"
        for label, node in group:
            at, self.width = self.node(label, node, at, self.width, False)
        return at

    def _store(self, group: Group, target: str) -> None:
        """Run nodes over all steps, and store their output."""
        with self._loop():
            at = self._steps(group)
            self._copy(f"{target} + t * {self.width}", at, self.width)
            self._filled(target, self.width)
        self.sequence = target

    def _buffer(self) -> str:
        """Return the name of the buffer that the current sequence isn't stored in."""
        return "buffer_1" if self.sequence == "buffer_0" else "buffer_0"

    def _filled(self, target: str, width: int) -> None:
        """Record the width of the sequence that is stored in a buffer."""
        if target != "y":
            number = int(target[-1])
            self.buffers[number] = max(width, self.buffers[number])

    def _copy(self, target: str, at: str, width: int) -> None:
        self.steps.append(f"    memcpy({target}, {at}, {width} * sizeof *{at});")

    def _vector(self, width: int) -> None:
        self.scratch["vector"] = max(width, self.scratch.get("vector", 0))

    def _pool(self, group: Group, label: str, node: GlobalPool, end: str) -> str:
        """Write nodes, and the mean, maximum or last value of their output."""
        before = len(self.steps)
        note = comment(f"    /* {label}: GlobalPool, {node.summary} */")
        with self._loop():
            at = self._steps(group)
            self.steps += ["", note]
            if node.mode == "last":
                self._copy(VECTOR, at, self.width)
            elif node.mode == "mean":
                self.steps += self.each(self.width, VECTOR, f"{VECTOR}[j] + {at}[j]")
            else:
                more = f"{at}[j] > {VECTOR}[j] || {at}[j] != {at}[j]"  # NaN stays
                self.steps += self.each(self.width, VECTOR, f"{more} ? {at}[j] : {VECTOR}[j]")
        self._vector(self.width)
        if node.mode != "last":
            self.steps[before:before] = self.each(self.width, VECTOR, "0" if node.mode == "mean" else "-INFINITY")
        if node.mode == "mean":
            self.steps += self.each(self.width, VECTOR, f"{VECTOR}[j] / ({self.real})steps")
        return VECTOR

    def _attention(self, group: Group, label: str, node: TimeSoftmax, end: str) -> str:
        """Write nodes, and attention pooling of the output of one of them; those after it compute the scores."""
        names = self.network.names
        at, before = self.attention[names.index(label)], len(self.steps)
        valued = [entry for entry in group if names.index(entry[0]) <= at]
        scored = group[len(valued) :]
        with self._loop():
            value = self._steps(valued)
            width = self.width
            if scored and value in ("s->a", "s->b"):  # the scores need these
                self.scratch["value"] = max(width, self.scratch.get("value", 0))
                self._copy("s->value", value, width)
                value = "s->value"
            scores = value
            for name, scorer in scored:
                scores, self.width = self.node(name, scorer, scores, self.width, False)
            given = f"{VECTOR}, {width}, {value}, {scores}, {self.width}, s->largest, s->total"
            self.steps += ["", comment(f"    /* {label}: attention pooling */"), f"    ${{name}}_weigh({given});"]
        for name in ("largest", "total"):
            self.scratch[name] = max(self.width, self.scratch.get(name, 0))
        self.steps[before:before] = [
            *self.each(width, VECTOR, "0"),
            *self.each(self.width, "s->largest", LEAST[self.real]),
            *self.each(self.width, "s->total", "0"),
        ]
        total = "s->total[j]" if self.width == width else "s->total[0]"
        self.steps += self.each(width, VECTOR, f"{total} == 0 ? 0 : {VECTOR}[j] / {total}")
        self._vector(width)
        self.width = width
        return VECTOR

    def _recurrent(self, group: Group, label: str, node: Recurrent, end: str) -> str:
        """Write a node that runs backwards, or returns its final output only; others run with the nodes around them."""
        if node.go_backwards:
            return self._backwards(group, label, node, end)
        group.append((label, node))
        if node.return_sequences:
            return ""
        with self._loop():
            return self._steps(group)

    def _backwards(self, group: Group, label: str, node: Bidirectional | Recurrent, end: str) -> str:
        """Write nodes, and one that runs backwards; return the name of its final output, "" if it has every step."""
        if group:
            self._store(group, self._buffer())
            group.clear()
        self.steps += ["", comment(f"    /* {label}: {type(node).__name__}, {node.summary} */")]
        owner, width = self.identifier(label), self.width
        if isinstance(node, Recurrent):
            target = end or self._buffer()
            with self._loop(backwards=True):
                at, self.width = self.recurrent(owner, node, Feed(label, "v", width, False))
                if node.return_sequences:  # in the order in which the steps are processed
                    self._copy(f"{target} + (steps - 1 - t) * {self.width}", at, self.width)
            if not node.return_sequences:
                return at
            self._filled(target, self.width)
            self.sequence = target
            return ""
        ways = {False: node.forward, True: node.backward}
        sequences, merge = node.forward.return_sequences, node.merge_mode
        first = node.forward.units
        out = first + (node.backward.units if merge == "concat" else 0)
        target = (end or self._buffer()) if sequences else VECTOR
        place = f"{target} + t * {out}" if sequences else VECTOR
        for backwards, part in ways.items():
            with self._loop(backwards):
                name = self.identifier(f"{owner}_{'back' if backwards else 'forward'}")
                at, _ = self.recurrent(name, part, Feed(label, "v", width, False))
                if sequences:
                    self._merge(place, f"{target}[t * {out} + j]", at, part.units, first, merge, backwards)
            if not sequences:
                self._merge(place, f"{VECTOR}[j]", at, part.units, first, merge, backwards)
            assert self.width == width
        self.width = out
        if not sequences:
            self._vector(out)
            return VECTOR
        self._filled(target, out)
        self.sequence = target
        return ""

    def _merge(self, place: str, entry: str, at: str, units: int, first: int, merge: str, backwards: bool) -> None:
        """Write the output of one direction to its place, after the other direction's or merged with it."""
        if not backwards or merge == "concat":
            self._copy(f"{place} + {first}" if backwards else place, at, units)
            return
        both = MERGES[merge].format(a=entry, b=f"{at}[j]")
        self.steps += [f"    for (size_t j = 0; j < {units}; j++) {{", f"        {entry} = {both};", "    }"]

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def declarations(self) -> str:
        """Return the function's declaration, with comments."""
        name, real = self.name, self.real
        y = f"[steps, {name}_OUT]" if self.every_step else f"[{name}_OUT]"
        work = sum(self.buffers)
        least = "" if work else " + 1"  # C doesn't allow an empty array
        unused = "" if work else "; this network doesn't use it, and it may be NULL"
        ids = f" * Each step of x is {self.ids}.\n" if self.ids else ""
        return f"""\
/* The length of the scratch array `work` for a run over this many steps. */
#define {name}_WORK(steps) ((size_t)(steps) * {work}{least})

/* Take a sequence x [steps, {name}_IN] of at least one step, and write the network's output to y {y}.
{ids} * work [{name}_WORK(steps)] is scratch memory{unused}. The arrays must not overlap. */
void {name}_run({name}_state *s, const {real} *x, size_t steps, {real} *y, {real} *work);
"""

    def functions(self, resets: str, steps: str) -> str:
        """Return the functions' source."""
        name, real = self.name, self.real
        places = ("work", f"work + steps * {self.buffers[0]}")
        used = [
            f"    {real} *const buffer_{number} = {place};"
            for number, place in enumerate(places)
            if self.buffers[number]
        ]
        lines = [*(used or ["    (void)work;"]), *([f"    {name}_reset(s);"] if self.resets else []), steps]
        reset = f"static void {name}_reset({name}_state *s)\n{{\n{resets}\n}}\n\n" if self.resets else ""
        return f"""\
{reset}void {name}_run({name}_state *s, const {real} *x, size_t steps, {real} *y, {real} *work)
{{
{chr(10).join(lines)}
}}
"""


WHOLE: dict[type[Node], Callable[[SequenceWriter, Group, str, Any, str], str]] = {
    GlobalPool: SequenceWriter._pool,
    TimeSoftmax: SequenceWriter._attention,
    Bidirectional: SequenceWriter._backwards,
    Recurrent: SequenceWriter._recurrent,
}
"""The nodes that may need every step of their input; a method writes the nodes before them too, and returns the name of
the output once it has no time axis, else ""."""

"""Export of a network as C99: one header and one source, for microcontrollers, audio plugins and any C compiler.

The source needs <math.h> and <string.h>, allocates nothing and has no global state: weights are constants, and
everything that changes is in a struct that the caller owns. The results equal those of a `Stream` of one row, up to
rounding. The cells' functions are in `cells`, networks that need whole sequences in `sequences`; docs/c.md describes
the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from cellstack.cells import activations
from cellstack.cells.spec import MATRICES
from cellstack.formats.c.cells import WIDTHS, by_gate, form_key, form_of, shape_text
from cellstack.formats.c.files import Files, acts
from cellstack.formats.c.step import activate, literal
from cellstack.network import Network
from cellstack.nodes import (
    MLSTM,
    Activation,
    Array,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    GlobalPool,
    LayerNorm,
    Node,
    Recurrent,
    Scale,
    Standardise,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.streaming.eligibility import check_streamable

NODES = (Standardise, Scale, LayerNorm, Clip, Embedding, Dense, Activation, GlobalPool, Conv1D, Recurrent, MLSTM)
WHOLE = ("softmax", "log_softmax")  # activations over all features of a step together


class Writer(Files):
    """Writes the nodes of a chain that runs step by step; see `Files`."""

    def check(self) -> None:
        """Raise `ValueError` where a node can't run step by step, or can't be written as C."""
        check_streamable("export_c", self.network)
        check_chain(self.network, NODES)

    def write(self) -> None:
        """Write all nodes."""
        nodes = [entry for entry in zip(self.network.names, self.network.nodes, strict=True) if acts(entry[1])]
        at, width = "x", self.input_width([node for _, node in nodes])
        for number, (label, node) in enumerate(nodes):
            at, width = self.node(label, node, at, width, number == len(nodes) - 1)
        self.outputs = width
        if at != "y":
            self.steps.append(f"    memcpy(y, {at}, {width} * sizeof *y);")

    def input_width(self, nodes: list[Node]) -> int:
        """Return the number of values of a step of x."""
        width = 1 if nodes and isinstance(nodes[0], Embedding) else self.network.input_size
        if width is None or not nodes:
            raise ValueError("export_c: the network must fix the width of its input")
        self.inputs = width
        return width

    # ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _target(self, at: str, width: int, last: bool) -> str:
        """Return the target of a node that reads `at`: y for the last node, unless it reads x, which y may alias."""
        if last and at != "x":
            return "y"
        name = "b" if at == "s->a" else "a"
        self.scratch[name] = max(width, self.scratch.get(name, 0))
        return f"s->{name}"

    def each(self, width: int, target: str, expression: str) -> list[str]:
        """Return the lines that set every entry j of `target [width]`."""
        return [f"    for (size_t j = 0; j < {width}; j++) {{", f"        {target}[j] = {expression};", "    }"]

    def _activated(self, target: str, width: int, text: str) -> list[str]:
        """Return the lines that apply an activation in place."""
        if text in WHOLE:
            return [f"    ${{name}}_{text}({target}, {width});"]
        return [] if text == "linear" else self.each(width, target, activate(_named(text), f"{target}[j]"))

    def node(self, label: str, node: Node, at: str, width: int, last: bool) -> tuple[str, int]:
        """Write a node that reads `at [width]`; return the name of its output and the output's width."""
        kind = type(node).__name__
        owner = self.identifier(label)
        self.steps += ["", comment(f"    /* {label}: {kind}, {node.summary} */")]
        if isinstance(node, Recurrent):
            return self.recurrent(owner, node, at, last)
        if isinstance(node, Conv1D):
            return self._convolution(owner, node, at, last)
        if isinstance(node, MLSTM):
            return self._memory(owner, node, at, last)
        if isinstance(node, Embedding):
            rows, width = node.table.shape
            table = self.array(owner, "table", node.table, f"[V={rows}, E={width}]")
            zero = f"0.0{self.f}"
            choice = f"{at}[0] >= {zero} && {at}[0] < {rows}.0{self.f} ? (size_t){at}[0] : 0"
            pointer = self.identifier(f"{owner}_row")
            self.steps.append(f"    const {self.real} *const {pointer} = {table} + {width} * ({choice});")
            return pointer, width
        width_out = node.units if isinstance(node, Dense) else width
        target = self._target(at, width_out, last)
        if isinstance(node, Standardise):
            mean, scale = (self.array(owner, name, getattr(node, name), f"[{width}]") for name in ("mean", "scale"))
            self.steps += self.each(width, target, f"({at}[j] - {mean}[j]) / {scale}[j]")
        elif isinstance(node, Scale):
            scale, shift = (self.array(owner, name, getattr(node, name), f"[{width}]") for name in ("scale", "shift"))
            self.steps += self.each(width, target, f"{at}[j] * {scale}[j] + {shift}[j]")
        elif isinstance(node, LayerNorm):
            self.steps += [
                f"    memcpy({target}, {at}, {width} * sizeof *{target});",
                f"    ${{name}}_normalise({target}, {width}, {literal(node.epsilon)});",
            ]
            gain = "" if node.gain is None else f" * {self.array(owner, 'gain', node.gain, f'[{width}]')}[j]"
            bias = "" if node.bias is None else f" + {self.array(owner, 'bias', node.bias, f'[{width}]')}[j]"
            if gain or bias:
                self.steps += self.each(width, target, f"{target}[j]{gain}{bias}")
        elif isinstance(node, Dense):
            self._product(owner, node, at, target)
            self.steps += self._activated(target, width_out, node.activation)
        elif isinstance(node, Clip):
            self.steps += self.each(width, target, _clipped(node, f"{at}[j]"))
        elif isinstance(node, Activation) and node.activation in WHOLE:
            self.steps.append(f"    memcpy({target}, {at}, {width} * sizeof *{target});")
            self.steps += self._activated(target, width, node.activation)
        elif isinstance(node, Activation):
            self.steps += self.each(width, target, activate(_named(node.activation), f"{at}[j]"))
        return target, width_out

    def _product(self, owner: str, node: Dense, at: str, target: str) -> None:
        """Write the product of a dense layer, with its bias."""
        (width, units), narrow = node.kernel.shape, self.narrow
        shape = f"[I={width}, O={units}]"
        if narrow is None or (self.as_stored and node.weights != narrow.name):
            kernel = self.array(owner, "kernel", node.kernel, shape)
            self.steps += self._start(owner, target, units, node.bias)
            self.steps.append(f"    ${{name}}_accumulate({target}, {units}, {at}, {width}, {kernel});")
            return
        if node.bias is None:
            self.steps += self._start(owner, target, units, None)
            bias = "NULL"
        else:
            bias = self.array(owner, "bias", node.bias, f"[{units}]")
        kernel = ", ".join(self.matrix(owner, "kernel", narrow, node.kernel, shape))
        self.steps.append(f"    ${{name}}_multiply({target}, {units}, {bias}, {at}, {width}, {kernel}, s->row);")

    def _start(self, owner: str, target: str, width: int, bias: Array | None) -> list[str]:
        """Return the lines that initialise a sum with the bias, or with zeros."""
        if bias is None:  # no memset: GCC warns where its byte count equals the array's length
            return self.each(width, target, "0")
        return [f"    memcpy({target}, {self.array(owner, 'bias', bias, f'[{width}]')}, {width} * sizeof *{target});"]

    def _convolution(self, owner: str, node: Conv1D, at: str, last: bool) -> tuple[str, int]:
        """Write a causal convolution. The steps in its window are stored in the state, the oldest first."""
        taps, channels, filters = node.kernel.shape
        kernel = self.array(owner, "kernel", node.kernel, f"[K={taps}, C={channels}, F={filters}]")
        target = self._target(at, filters, last)
        start, done = self._start(owner, target, filters, node.bias), self._activated(target, filters, node.activation)
        if taps == 1:
            taken = f"{target}, {filters}, {at}, {channels}, {kernel}"
            self.steps += [*start, f"    ${{name}}_accumulate({taken});", *done]
            return target, filters
        seen, kept = self.identifier(f"{owner}_x"), (node.span - 1) * channels
        self.frames.append((seen, node.span * channels, f"the last steps into {owner}"))
        self.resets.append(f"    memset(s->{seen}, 0, sizeof s->{seen});")
        tap = f"s->{seen} + k * {node.dilation * channels}, {channels}, {kernel} + k * {channels * filters}"
        self.steps += [
            f"    memcpy(s->{seen} + {kept}, {at}, {channels} * sizeof *s->{seen});",
            *start,
            f"    for (size_t k = 0; k < {taps}; k++) {{",
            f"        ${{name}}_accumulate({target}, {filters}, {tap});",
            "    }",
            f"    memmove(s->{seen}, s->{seen} + {channels}, {kept} * sizeof *s->{seen});",
            *done,
        ]
        return target, filters

    def _memory(self, owner: str, node: MLSTM, at: str, last: bool) -> tuple[str, int]:
        """Write an mLSTM's memory, whose state starts with zeros."""
        target, state = self._target(at, node.units, last), []
        for name, shape in node.memory.state_shapes.items():
            member = self.identifier(f"{owner}_{name}")
            self.memories.append((member, math.prod(shape), f"{name} of {owner}"))
            self.resets.append(f"    memset(s->{member}, 0, sizeof s->{member});")
            state.append(f"s->{member}")
        sizes = f"{node.heads}, {node.key_size}, {node.value_size}, {literal(node.epsilon)}"
        self.steps.append(f"    ${{name}}_memory_step({sizes}, {at}, {', '.join(state)}, {target});")
        if node.output_gate:
            gate = f"${{name}}_sigmoid({at}[{node.core_size} + j])"
            self.steps += self.each(node.units, target, f"{target}[j] * {gate}")
        return target, node.units

    def recurrent(self, owner: str, node: Recurrent, at: str, last: bool) -> tuple[str, int]:
        """Write a stack of cells. A cell's output is h, in the state."""
        for number, cell in enumerate(node.cells):
            name = owner if len(node.cells) == 1 else self.identifier(f"{owner}_{number}")
            below = at
            at = self._cell(name, cell, at)
            added = node.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            if added:
                target = self._target(below, cell.spec.output_size, last and number == len(node.cells) - 1)
                self.steps += self.each(cell.spec.output_size, target, f"{at}[j] + {below}[j]")
                at = target
        return at, node.units

    def _cell(self, owner: str, cell: Cell, at: str) -> str:
        cell = cell.one_head if self.narrow else cell
        key = form_key(cell.spec)
        if key not in self.forms:
            stem = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cell.spec.of_kind.title).lower()
            number = 1 + sum(called.split("_cell")[0] == stem for called, _ in self.forms.values())
            called = f"{stem}_cell" if number == 1 else f"{stem}_cell_{number}"
            self.forms[key] = called, form_of(cell.spec, called, self.narrow)
        called, form = self.forms[key]
        arrays, units = dict(cell.arrays), cell.spec.units
        pointers = []
        for name, matrix in form.arrays.items():
            array = arrays[matrix.array]
            if array.ndim == 3:
                array = by_gate(array, cell.spec, matrix.gates)
            elif matrix.gates is not None:
                start, stop = matrix.gates
                array = array[:, start * units : stop * units]
            shape = shape_text(cell.spec, matrix)
            if self.narrow and matrix.array in MATRICES:
                pointers += self.matrix(owner, matrix.name, self.narrow, array, shape)
            else:
                pointers.append(self.array(owner, name, array, shape))
        backbone = cell.spec.backbone_units
        sizes = {
            "inputs": cell.spec.features, "units": units, "projected": cell.spec.proj_size, "backbone": backbone
        }  # fmt: skip
        widths = [f"{sizes[width]} /* {WIDTHS[width]} */" for width in form.widths]
        weights = f"{self.name}_{self.identifier(f'{owner}_weights')}"
        self.arrays += [
            "",
            f"static const struct {self.name}_{called} {weights} = {{",
            *(f"    {entry}," for entry in (*widths, *pointers)),
            "};",
        ]
        state = []
        for array, size in cell.spec.state_sizes.items():
            member = self.identifier(f"{owner}_{array}")
            self.members.append((member, size, f"{array} of {owner}"))
            state.append(f"s->{member}")
            if cell.spec.learn_initial_state:
                start = self.array(owner, f"initial_{array}", arrays[f"initial_{array}"], f"[{size}]")
                self.resets.append(f"    memcpy(s->{member}, {start}, sizeof s->{member});")
            else:
                self.resets.append(f"    memset(s->{member}, 0, sizeof s->{member});")
        length = form.scratch[0] * units + form.scratch[1] * backbone
        self.scratch["gates"] = max(length, self.scratch.get("gates", 0))
        passed = ", ".join([f"&{weights}", at, *state, "s->gates", *(["s->row"] if self.narrow else [])])
        self.steps.append(f"    ${{name}}_{called}_step({passed});")
        return state[0]


def _named(text: str) -> activations.Activation:
    """Return an activation with its parameters."""
    return activations.Activation(text) if text in MORE_ACTIVATIONS else activations.activation(text)


def _clipped(node: Clip, inner: str) -> str:
    """Return a C expression, as a template, that clips `inner` to the bounds of a node."""
    below = "" if node.low is None else f"{inner} < {literal(node.low)} ? {literal(node.low)} : "
    above = "" if node.high is None else f"{inner} > {literal(node.high)} ? {literal(node.high)} : "
    return f"{below}{above}{inner}"


def comment(text: str) -> str:
    """Return a comment in which nothing ends the comment early or looks like a template field."""
    return text[:-2].replace("*/", "* /").replace("$", "$$") + text[-2:]


def check_chain(network: Network, nodes: tuple[type[Node], ...], joined: Collection[str] = ()) -> None:
    """Raise `ValueError` where a node isn't of one of these kinds or can't be written as C, or isn't in a chain.

    Nodes in `joined` may also read values before the preceding one.
    """
    expected = (network.inputs[0], *network.names)
    for name, node, sources, before in zip(network.names, network.nodes, network.wires, expected, strict=False):
        if not isinstance(node, nodes):
            found = ", ".join(kind.__name__ for kind in nodes)
            raise ValueError(f"export_c: {name}: {type(node).__name__} isn't supported; these nodes are: {found}")
        if isinstance(node, Embedding) and node.mask_zero:
            raise ValueError(f"export_c: {name}: mask_zero isn't supported, as the C code has no masks")
        if isinstance(node, Recurrent) and not all(cell.spec.use_kernel for cell in node.cells):
            raise ValueError(f"export_c: {name}: cells with use_kernel=False aren't supported")
        if isinstance(node, Conv1D) and node.groups > 1:
            raise ValueError(f"export_c: {name}: expected a Conv1D with one group, got {node.groups}")
        if sources != (before,) and name not in joined:
            raise ValueError(f"export_c: only a chain of nodes is supported, but {name} reads {', '.join(sources)}")
    if network.outputs != network.names[-1:]:
        raise ValueError(f"export_c: the last node must be the only output, got {', '.join(network.outputs)}")

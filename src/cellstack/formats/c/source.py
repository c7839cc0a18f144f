"""Export of a network as C99: one header and one source, for microcontrollers, audio plugins and any C compiler.

The source needs <math.h> and <string.h>, allocates nothing and has no global state: weights are constants, and
everything that changes is in a struct that the caller owns. The results equal those of a `Stream` of one row, up to
rounding. The cells' functions are in `cells`, networks that need whole sequences in `sequences`; docs/c.md describes
the files.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from cellstack.cells import activations
from cellstack.cells.spec import MATRICES
from cellstack.formats.c.cells import WIDTHS, by_gate, form_key, form_of, shape_text
from cellstack.formats.c.files import Files, acts
from cellstack.formats.c.node_writers import WRITERS, Feed
from cellstack.formats.c.step import activate
from cellstack.network import Network
from cellstack.nodes import Array, Cell, Embedding, GlobalPool, Node, Recurrent
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.streaming.eligibility import check_streamable

WHOLE = ("softmax", "log_softmax")  # activations over all features of a step together


class Writer(Files):
    """Writes the nodes of a chain that runs step by step; see `Files`."""

    def check(self) -> None:
        """Raise `ValueError` where a node can't run step by step, or can't be written as C."""
        check_streamable("export_c", self.network)
        check_chain(self.network)

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

    def node(self, label: str, node: Node, at: str, width: int, last: bool) -> tuple[str, int]:
        """Write a node that reads `at [width]`; return the name of its output and the output's width."""
        owner = self.identifier(label)
        self.steps += ["", comment(f"    /* {label}: {type(node).__name__}, {node.summary} */")]
        return WRITERS[type(node)](self, owner, node, Feed(label, at, width, last))

    def target(self, feed: Feed, width: int) -> str:
        """Return the target `[width]` of a node: y for the last node, unless it reads x, which y may alias."""
        if feed.last and feed.at != "x":
            return "y"
        name = "b" if feed.at == "s->a" else "a"
        self.scratch[name] = max(width, self.scratch.get(name, 0))
        return f"s->{name}"

    def each(self, width: int, target: str, expression: str) -> list[str]:
        """Return the lines that set every entry j of `target [width]`."""
        return [f"    for (size_t j = 0; j < {width}; j++) {{", f"        {target}[j] = {expression};", "    }"]

    def activated(self, target: str, width: int, text: str, at: str | None = None) -> list[str]:
        """Return the lines that write the activation of `at [width]` to `target`; None: of `target`, in place."""
        if text in WHOLE:
            copied = [f"    memcpy({target}, {at}, {width} * sizeof *{target});"] if at else []
            return [*copied, f"    ${{name}}_{text}({target}, {width});"]
        found = activations.Activation(text) if text in MORE_ACTIVATIONS else activations.activation(text)
        return [] if text == "linear" else self.each(width, target, activate(found, f"{at or target}[j]"))

    def start(self, owner: str, target: str, width: int, bias: Array | None) -> list[str]:
        """Return the lines that initialise a sum with the bias, or with zeros."""
        if bias is None:  # no memset: GCC warns where its byte count equals the array's length
            return self.each(width, target, "0")
        return [f"    memcpy({target}, {self.array(owner, 'bias', bias, f'[{width}]')}, {width} * sizeof *{target});"]

    def recurrent(self, owner: str, node: Recurrent, feed: Feed) -> tuple[str, int]:
        """Write a stack of cells. A cell's output is h, in the state."""
        if not all(cell.spec.use_kernel for cell in node.cells):
            raise ValueError(f"export_c: {feed.node}: cells with use_kernel=False aren't supported")
        at = feed.at
        for number, cell in enumerate(node.cells):
            name = owner if len(node.cells) == 1 else self.identifier(f"{owner}_{number}")
            below = at
            at = self._cell(name, cell, at)
            added = node.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            if added:
                last = feed.last and number == len(node.cells) - 1
                target = self.target(feed._replace(at=below, last=last), cell.spec.output_size)
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
            if isinstance(matrix.part, int):
                array = array[matrix.part]
            elif array.ndim == 3:
                array = by_gate(array, cell.spec, matrix.part)
            elif matrix.part is not None:
                start, stop = matrix.part
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


def comment(text: str) -> str:
    """Return a comment in which nothing ends the comment early or looks like a template field."""
    return text[:-2].replace("*/", "* /").replace("$", "$$") + text[-2:]


def check_chain(network: Network, more: tuple[type[Node], ...] = (), joined: Collection[str] = ()) -> None:
    """Raise `ValueError` unless a network is a chain of nodes in `WRITERS`, `GlobalPool` and `more`.

    Nodes in `joined` may also read values before the preceding one.
    """
    kinds = (*WRITERS, GlobalPool, *more)
    expected = (network.inputs[0], *network.names)
    for name, node, sources, before in zip(network.names, network.nodes, network.wires, expected, strict=False):
        if not isinstance(node, kinds):
            found = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"export_c: {name}: {type(node).__name__} isn't supported; these nodes are: {found}")
        if sources != (before,) and name not in joined:
            raise ValueError(f"export_c: only a chain of nodes is supported, but {name} reads {', '.join(sources)}")
    if network.outputs != network.names[-1:]:
        raise ValueError(f"export_c: the last node must be the only output, got {', '.join(network.outputs)}")

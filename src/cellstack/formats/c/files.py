"""The two files of C code: their parts, which are collected, and their text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import Template
from typing import NamedTuple

from cellstack.formats.build import Names
from cellstack.formats.c.cells import Form
from cellstack.formats.c.narrow import Narrow, functions
from cellstack.network import Network
from cellstack.nodes import Activation, Array, Embedding, GlobalPool, Node

NUMBERS_A_LINE = 8
TYPES = {"float32": ("float", "f"), "float64": ("double", "")}


class Sizes(NamedTuple):
    """The bytes that a network needs in C, in addition to its code.

    Args:
        constants: the weights, in flash.
        state: in RAM, what is kept between steps.
        scratch: in RAM, the rest of the struct of the state.
    """

    constants: int
    state: int
    scratch: int

    @property
    def ram(self) -> int:
        """The size of the struct of the state."""
        return self.state + self.scratch


class Files:
    """Collects the parts of the files: arrays, members of the state, functions, and the lines of a step.

    Args:
        network: the network.
        name: the prefix of every identifier.
        narrow: the format of the matrices; None: that of the other arrays.
        as_stored: whether only those dense layers have this format that the network stores in it.

    Raises:
        ValueError: the network can't be written.
    """

    unit = "one step"
    memory = "what is kept between steps, and scratch. Nothing is allocated."
    includes = ""

    def __init__(self, network: Network, name: str, narrow: Narrow | None = None, as_stored: bool = True) -> None:
        self.network, self.name, self.narrow, self.as_stored = network, name, narrow, as_stored
        self.check()
        self.real, self.f = TYPES[network.dtype.name]
        self.identifiers = Names(mark="_")  # keeps the nodes' identifiers distinct
        self.arrays: list[str] = []
        self.constants = 0  # their bytes
        self.row = 0  # the length of the longest vector that is multiplied by a narrow matrix
        self.forms: dict[str, tuple[str, Form]] = {}  # by `form_key`: its name, and the form
        self.members: list[tuple[str, int, str]] = []  # of the state: name, length, description
        self.memories: list[tuple[str, int, str]] = []  # members too, after those of all cells
        self.frames: list[tuple[str, int, str]] = []  # members too: the past steps that convolutions need
        self.scratch: dict[str, int] = {}
        self.steps: list[str] = []
        self.resets: list[str] = []
        self.inputs = self.outputs = 0
        self.write()

    def check(self) -> None:
        """Raise `ValueError` where a node can't be written as C."""
        raise NotImplementedError

    def write(self) -> None:
        """Write all nodes."""
        raise NotImplementedError

    def fill(self, template: str) -> str:
        """Return a template with the names of this network filled in."""
        tanh = f"{self.name}_tanh" if self.narrow else f"tanh{self.f}"
        return Template(template).substitute(name=self.name, real=self.real, f=self.f, tanh=tanh)

    def identifier(self, text: str) -> str:
        """Return `text` as part of a C identifier, made unique."""
        return self.identifiers.fresh(re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_") or "node")

    def array(self, owner: str, name: str, array: Array, shape: str) -> str:
        """Write an array of constants, and return its name."""
        digits = "%.9g" if self.real == "float" else "%.17g"  # as many as a round trip needs
        rows = ([self._number(digits % value) for value in row] for row in array.reshape(-1, array.shape[-1]).tolist())
        return self._constants(owner, name, self.real, array.nbytes, array.size, shape, rows)

    def matrix(self, owner: str, name: str, narrow: Narrow, array: Array, shape: str) -> list[str]:
        """Write a matrix `[m, n]` in a narrow format, column by column, and return the names of its arrays."""
        numbers, scales = narrow.columns(array)
        rows, columns = shape[1:-1].split(", ")
        self.row = max(len(array), self.row)
        size = narrow.bytes_each * array.size
        named = self._constants(owner, name, narrow.weights, size, array.size, f"[{columns}, {rows}]", numbers)
        if scales is None:
            return [named]
        return [named, self.array(owner, f"{name}_scales", scales, f"[{columns}]")]

    def _constants(
        self, owner: str, name: str, type_: str, size: int, count: int, shape: str, rows: Iterable[list[str]]
    ) -> str:
        """Write constants of `size` bytes, each row on a new line, and return the name of the array."""
        called = f"{self.name}_{self.identifier(f'{owner}_{name}')}"
        self.constants += size
        self.arrays += ["", f"static const {type_} {called}[{count}] = {{ /* {shape} */"]
        for row in rows:
            for start in range(0, len(row), NUMBERS_A_LINE):
                self.arrays.append(f"    {', '.join(row[start : start + NUMBERS_A_LINE])},")
        self.arrays.append("};")
        return called

    def _number(self, text: str) -> str:
        if "n" in text:  # inf and nan
            return text.replace("inf", "INFINITY").replace("nan", "NAN")
        return f"{text}{'' if '.' in text or 'e' in text else '.0'}{self.f}"

    @property
    def sizes(self) -> Sizes:
        """The bytes that the network needs."""
        item = self.network.dtype.itemsize
        state, scratch = sum(size for _, size, _ in self.state_members), sum(self.scratch.values())
        row = self.row_length if self.narrow is None or self.narrow.scaled else item * self.row_length
        if not state and not scratch:
            scratch = 1  # C doesn't allow an empty struct
        return Sizes(self.constants, item * state, item * scratch + row)

    @property
    def state_members(self) -> list[tuple[str, int, str]]:
        """The members that are kept between steps: name, length, description."""
        return self.members + self.memories + self.frames

    @property
    def row_length(self) -> int:
        """The length of the array for a vector that is multiplied by a narrow matrix; such a state has no padding."""
        return -(-self.row // 4) * 4

    def header(self) -> str:
        """Return the header."""
        name, real = self.name, self.real
        sizes = self.sizes
        stack, depth = "no arrays and no recursion: a few pointers and counters", "three"
        if self.narrow:
            stack, depth = "no recursion, no array of more than four numbers: a few pointers and counters", "four"
        in_format = f" * Matrices: {self.narrow.name}\n" if self.narrow else ""
        described = [f" *     {line}" for line in repr(self.network).splitlines()]
        kept = [f"    {real} {member}[{size}]; /* {text} */" for member, size, text in self.state_members]
        scratch = [f"    {real} {member}[{size}]; /* scratch */" for member, size in sorted(self.scratch.items())]
        if self.narrow and self.row:
            scratch.append(f"    {self.narrow.row} row[{self.row_length}]; /* scratch */")
        nothing = [] if kept or scratch else [f"    {real} unused[1]; /* nothing is kept between steps */"]
        text = f"""\
/* {name}: a recurrent network, {self.unit} at a time. Written by cellstack (export_c); don't edit, export again.
 *
{chr(10).join(described)}
 *
{in_format} * Flash:  {sizes.constants:,} bytes of constants, and the code.
 * RAM:    {sizes.ram:,} bytes, sizeof({name}_state): {self.memory}
 * Stack:  {stack} per call, {depth} calls deep, and <math.h>'s own.
 *
 * Build:  cc -std=c99 -O3{" -ffp-contract=off" if self.narrow else ""} program.c {name}.c -lm
 *
 * States are independent: use any number of them, in any threads. A state is plain memory, and may be copied.
 */
#ifndef {name.upper()}_H
#define {name.upper()}_H
{self.includes}{chr(10) + "#include <stdint.h>" + chr(10) if self.narrow else ""}
#ifdef __cplusplus
extern "C" {{
#endif

#define {name}_IN {self.inputs}
#define {name}_OUT {self.outputs}

typedef struct {{
{chr(10).join(kept + scratch + nothing)}
}} {name}_state;

{self.declarations()}
#ifdef __cplusplus
}}
#endif

#endif
"""
        return _ascii(text)

    def declarations(self) -> str:
        """Return the functions' declarations, with comments."""
        name, real = self.name, self.real
        return f"""\
/* Initialise a state: call this first. */
void {name}_init({name}_state *s);

/* Reset a state to the start of a sequence: every cell's own initial state. */
void {name}_reset({name}_state *s);

/* Take x, {self.ids or "one step"}, and write the network's output to y, which may be the same array as x. */
void {name}_step({name}_state *s, const {real} x[{name}_IN], {real} y[{name}_OUT]);
"""

    @property
    def ids(self) -> str | None:
        """What a step of x is, if it is an id."""
        ids = isinstance(next(filter(acts, self.network.nodes)), Embedding)
        return "one id, a whole number; ids out of range are treated as 0" if ids else None

    def functions(self, resets: str, steps: str) -> str:
        """Return the functions' source."""
        name, real = self.name, self.real
        steps += "" if "s->" in steps else "\n    (void)s;"
        return f"""\
void {name}_init({name}_state *s)
{{
    memset(s, 0, sizeof *s);
    {name}_reset(s);
}}

void {name}_reset({name}_state *s)
{{
{resets}
}}

void {name}_step({name}_state *s, const {real} x[{name}_IN], {real} y[{name}_OUT])
{{
{steps}
}}
"""

    def source(self) -> str:
        """Return the source."""
        name = self.name
        forms = "".join(self.fill(form.text) for _, form in self.forms.values())
        steps = self.fill("\n".join(self.steps)).lstrip("\n")
        helpers = self._helpers(forms + steps)
        resets = "\n".join(self.resets) or "    (void)s; /* no cell, no state */"
        text = f"""\
/* {name}: see {name}.h. Arrays are row-major; I is a cell's input width, H its units. */
#include "{name}.h"

#include <math.h>
#include <string.h>
{helpers}{forms}{chr(10).join(self.arrays)}

{self.functions(resets, steps)}"""
        return _ascii(text)

    def _helpers(self, code: str) -> str:
        """Return the functions that `code` calls."""
        helpers = dict(self.narrow.helpers) if self.narrow else {}
        for name, text in functions("real.c").items():
            helpers.setdefault(name, text)
        texts = {name: self.fill(text) for name, text in helpers.items()}
        called: set[str] = set()
        names = re.findall(rf"\b{self.name}_(\w+?)\(", code)
        while new := set(names) - called:
            called |= new
            names = [name for helper in new for name in re.findall(rf"\b{self.name}_(\w+?)\(", texts.get(helper, ""))]
        return "".join(text for name, text in texts.items() if name in called)


def acts(node: Node) -> bool:
    """Whether a node changes the values of a step."""
    return not isinstance(node, GlobalPool) and not (isinstance(node, Activation) and node.activation == "linear")


def _ascii(text: str) -> str:
    return text.replace("·", "*").encode("ascii", "backslashreplace").decode("ascii")

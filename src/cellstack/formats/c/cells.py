"""The cells of the family as C: for each form of cell, a struct of weights and a step function.

The texts are templates, as the files of helper functions in this folder are. Equations: `cellstack.reference`.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from cellstack.cells.spec import MATRICES, CellSpec
from cellstack.formats.c.narrow import Narrow
from cellstack.formats.c.step import Matrix, Step, times
from cellstack.nodes.base import Array

WIDTHS = {"inputs": "I", "units": "H", "projected": "P", "backbone": "U"}


class Form(NamedTuple):
    """A form of cell: cells of one form share a function, regardless of their widths.

    `arrays` are the members of the struct that point to weights: each is one of the cell's arrays, or columns of one.
    `scratch` is the length of the function's last argument: how many times H, and how many times U.
    """

    text: str
    widths: tuple[str, ...]
    arrays: dict[str, Matrix]
    scratch: tuple[int, int]


def form_key(spec: CellSpec) -> str:
    """Return what identifies a form: every setting except the widths and the initial state."""
    apart = ("input_size", "units", "learn_initial_state")
    settings = {name: value for name, value in spec.settings.items() if name not in apart}
    some = {"proj_size": spec.proj_size > 0, "backbone_units": spec.backbone_units > 0}
    return json.dumps({**settings, **some}, sort_keys=True)


def form_of(spec: CellSpec, stem: str, narrow: Narrow | None) -> Form:
    """Return the struct and the step function of `spec`'s form of cell.

    Args:
        spec: the cell.
        stem: the name of both, after the network's prefix.
        narrow: the format of the matrices; None: that of the other arrays.

    Returns:
        The form; its text is a template.
    """
    step = Step(spec, narrow)
    height = {name: "P" if name == "h" and spec.proj_size else "H" for name in spec.state_sizes}
    arrays: dict[str, Matrix] = {}
    for name in spec.shapes:
        if not name.startswith("initial_"):
            parts = [matrix for matrix in step.matrices if matrix.array == name] or [Matrix(name, None)]
            arrays |= {matrix.name: matrix for matrix in parts}
    some = {"projected": spec.proj_size, "backbone": spec.backbone_units}
    widths = ("inputs", "units", *(width for width, size in some.items() if size))
    members = [(f"size_t {width};", WIDTHS[width]) for width in widths]
    for name, matrix in arrays.items():
        shape = shape_text(spec, matrix)
        if narrow and matrix.array in MATRICES:
            rows, columns = shape[1:-1].split(", ")
            shapes = (f"[{columns}, {rows}]", f"[{columns}]")
            members += [
                (f"const {type_} *{member};", its)
                for (type_, member), its in zip(narrow.members(name), shapes, strict=False)
            ]
        else:
            members.append((f"const $real *{name};", shape))
    passed = "".join(f", $real *{name}" for name in (*spec.state_sizes, "scratch"))
    passed += f", {narrow.row} *row" if narrow else ""
    state = " and ".join(f"{name} [{letter}]" for name, letter in height.items())
    lengths = step.lengths(step.scratch.values())
    scratch = " + ".join(f"{count}{letter}" for count, letter in lengths if count)
    heads = f", in {spec.heads} heads of D = H / {spec.heads}" if spec.heads > 1 else ""
    lines = [
        "",
        f"/* {spec.of_kind.title}, gates {' '.join(spec.gates)}: a block of H columns each{heads}. */",
        f"struct ${{name}}_{stem} {{",
        *(f"    {member:<32} /* {shape} */" for member, shape in members),
        "};",
        "",
        f"/* {state} after x [{'I + 1' if spec.scalar else 'I'}]; scratch [{scratch}]. */",
        f"static void ${{name}}_{stem}_step(const struct ${{name}}_{stem} *w, const $real *x{passed})",
        "{",
        *(f"    {line}" if line else "" for line in step.lines),
        "}",
        "",
    ]
    return Form("\n".join(lines), widths, arrays, (lengths[0][0], lengths[1][0]))


def by_gate(matrices: Array, spec: CellSpec, gates: tuple[int, int] | None) -> Array:
    """Return a recurrent kernel of heads with a matrix for each gate and head, `[gates, heads, H/heads, H/heads]`."""
    parts = matrices.reshape(*matrices.shape[:2], len(spec.gates), -1).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(parts[slice(*gates) if gates else slice(None)])


def shape_text(spec: CellSpec, matrix: Matrix) -> str:
    """Return the shape of one of a cell's arrays in terms of its widths, such as `[I, 4H]`."""
    *rows, (count, letter) = spec.axes[matrix.array]
    if isinstance(matrix.part, int):
        rows = rows[1:]
    elif len(rows) == 2:
        first, end = matrix.part or (0, len(spec.gates))
        return f"[{end - first}, {spec.heads}, D, D]"
    elif matrix.part is not None:
        count = matrix.part[1] - matrix.part[0]
    axes = (times(*axis).replace(" * ", "") if axis[1] else str(axis[0]) for axis in (*rows, (count, letter)))
    return f"[{', '.join(axes)}]"

"""Write `declared.h` and `declared_rows.h`: the kernel's tables of kinds, arrays and flags, from their declarations."""

import re
from pathlib import Path

from cellstack.cells import KINDS
from cellstack.cells.arrays import Array
from cellstack.cells.base import Kind
from cellstack.cells.spec import FLAGS, CellSpec

HERE = Path(__file__).parent
WRITTEN = "// Written by kernel/declared.py from the declarations in src/cellstack/cells: change those instead.\n"
AXES = {
    "I": "d.multiplied()",
    "H": "d.units",
    "P": "d.output",
    "U": "d.backbone_units",
    "S": "d.sum_gates() * d.sum_units()",
    "GH": "d.gates() * d.units",
    "G-1": "(d.gates() - 1)",
    "L-1": "d.more_layers()",
    "heads": "d.heads",
    "P/heads": "(d.output / d.heads)",
    "S/heads": "d.sum_gates() * d.sum_units() / d.heads",
    "biases": "(1 + d.two_biases())",
}
MOST = {"S": "kMostGates", "GH": "kMostGates", "G-1": "kMostGates - 1", "biases S": "2 * kMostGates", "H": "1"}
TYPES = {
    "bool": "bool",
    "int": "int64_t",
    "float": "double",
    "float | None": "double",
    "bool | str": "int",
    "str": "int",
}


def kind_row(kind: Kind) -> list[str]:
    """Return the fields of a row of the table of kinds, see `Kind` in kinds.h."""
    usual = {"sigmoid": "s", "tanh": "t"}
    slots = [
        "-" if slot in kind.fixed else usual.get(kind.settings[kind.activation(slot)].default, "-")
        for slot in kind.slots
    ]
    order = kind.names["torch"].order if "torch" in kind.names else "".join(kind.gates)
    resets = "reset" in kind.gates.values()
    saved = 0 if resets else len(kind.planes(CellSpec(3, 4, kind=kind.name)))
    flags = [str(flag).lower() for flag in (kind.has_recurrent_kernel, kind.drops == "candidate", resets)]
    rows = f"{{{', '.join(str(order.index(gate)) for gate in kind.gates)}}}"
    name, text = (
        re.sub("([A-Z])([A-Z]+)(?![a-z])", lambda found: found[1] + found[2].lower(), kind.title),
        "".join(slots),
    )
    counts = [str(len(kind.gates)), f'"{text}"', rows, str(len(kind.state._fields))]
    return [name, f'"{kind.name}"', *counts, *flags, str(kind.normed[0] if kind.normed else 0), str(saved)]


def array_row(array: Array) -> list[str]:
    """Return the fields of a row of the table of arrays, see description.h."""
    numbers = " * ".join(AXES.get(axis, axis) for axis in array.shape.split())
    most = MOST.get(array.shape) or MOST.get(array.shape.removesuffix(" H")) or array.shape.removesuffix(" H")
    summed = array.pack == "vectors" or array.shape.startswith("biases")
    return [array.name, f"k{array.pack.title()}", numbers, most if summed else "0"]


def table(name: str, rows: list[list[str]]) -> str:
    """Return a macro that calls its argument with the fields of each row."""
    call = name[:-1].split("_")[-1]
    lines = [f"    {call}({', '.join(row)})" for row in rows]
    return f"#define {name}({call}) \\\n" + " \\\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """Return the text of each file."""
    kinds = [kind_row(kind) for kind in KINDS.values()]
    arrays = {array.name: array_row(array) for kind in KINDS.values() for array in kind.arrays}
    flags = [[TYPES[one.type], one.name, number(one.default)] for one in FLAGS.values()]
    return {
        HERE / "declared.h": WRITTEN
        + "// clang-format off\n#pragma once\n\n"
        + "// struct, name, gates, slots, in_rows, states, recurrent, drops, resets, normed, saved: see kinds.h\n"
        + table("CELLSTACK_KINDS", kinds)
        + "\n// name, form, numbers, sums: see description.h\n"
        + table("CELLSTACK_ARRAYS", list(arrays.values()))
        + "\n// type, name, default: settings of CellSpec; None is an infinity, a text its place in its options\n"
        + table("CELLSTACK_FLAGS", flags),
        HERE / "declared_rows.h": WRITTEN
        + "#pragma once\n"
        + "".join(f'#include "{name}.h"\n' for name in sorted(KINDS)),
    }


def number(default: object) -> str:
    """Return a default value in C++."""
    if default is None:
        return "__builtin_inf()"
    return "0" if isinstance(default, str) else str(default).lower()


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")

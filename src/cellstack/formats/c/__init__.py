"""Export of a network as C99: `export` writes one header and one source file (docs/c.md)."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

from cellstack.formats.c.files import Sizes
from cellstack.formats.c.narrow import format_of
from cellstack.formats.c.sequences import SequenceWriter, needs_sequence
from cellstack.formats.c.source import Writer
from cellstack.formats.files import check_unedited, replacing
from cellstack.network import Network

__all__ = ["Sizes", "export", "format_in", "sizes"]

# fmt: off
HEADERS = {
    "assert", "complex", "ctype", "errno", "fenv", "float", "inttypes", "iso646", "limits", "locale", "math",
    "setjmp", "signal", "stdalign", "stdarg", "stdatomic", "stdbool", "stddef", "stdint", "stdio", "stdlib",
    "stdnoreturn", "string", "tgmath", "threads", "time", "uchar", "wchar", "wctype",
}
# fmt: on


def export(
    network: Network, directory: str | PathLike[str], name: str = "model", weights: str | None = None
) -> tuple[Path, Path]:
    """Write a network as `name.h` and `name.c`, in C99 that also compiles as C++.

    The header defines `name_IN` and `name_OUT`, the widths of a step's input and output; the struct `name_state`; and
    `name_init`, `name_reset` and `name_step`. If the network needs whole sequences, because it has a layer that runs
    backwards or a mean or maximum over time, it defines `name_run` instead, which takes a sequence of any length, and
    `name_WORK(steps)`, the length of the scratch array that it needs. A float64 network computes in double, a float32
    one in float, with matrices in the same formats as a stream.

    Args:
        network: a chain of `Recurrent`, `Bidirectional`, `Standardise`, `Scale`, `LayerNorm`, `Clip`, `Power`,
            `Function`, `Embedding` (without `mask_zero`), `Dense`, `Activation`, causal `Conv1D` of one group,
            `GlobalPool`, `MLSTM`; `TimeSoftmax`, `Merge` and `Reduce` as attention pooling.
        directory: the output folder; it is created if it doesn't exist. Both files are replaced, or neither.
        name: the name of the files, and the prefix of every identifier in them.
        weights: the number format of the matrices: `"float32"`, `"bfloat16"` or `"int8"`, see `Stream`; None: as
            the network stores them.

    Returns:
        The paths of the header and of the source.

    Raises:
        ValueError: a node that can't be written as C, which the message names; an invalid C name; an unknown format;
            int8 with so many features or units that integer sums could overflow.
        TypeError: bfloat16 or int8 for a float64 network.
        OSError: the files can't be written.

    >>> import tempfile
    >>> import numpy as np
    >>> from cellstack import CellSpec
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(3, 4, kind="gru"), np.ones((3, 12)), np.ones((4, 12)), np.zeros((2, 12)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     header, source = export(Network([Recurrent((cell,))]), folder, "tagger")
    ...     print(header.name, source.name, "#define tagger_OUT 4" in header.read_text())
    tagger.h tagger.c True
    """
    if (
        not isinstance(name, str)
        or re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is None
        or "__" in name
        or name.endswith("_")
    ):
        raise ValueError(f"export_c: expected a name of letters, digits and single underscores, as in C, got {name!r}")
    if name.lower() in HEADERS:
        raise ValueError(f"export_c: {name!r} is the name of a standard C header")
    if not os.fspath(directory) or Path(directory).suffix in (".c", ".h"):
        raise ValueError(
            f"export_c: expected a folder, got {os.fspath(directory)!r}: name= sets the names of the files"
        )
    check_unedited(network, "C")
    writer = _writer(network, name, weights)
    header, source = writer.header(), writer.source()
    os.makedirs(directory, exist_ok=True)
    paths = Path(directory, f"{name}.h"), Path(directory, f"{name}.c")
    with ExitStack() as stack:  # both or neither: both are on disk before either replaces an old file
        for path, text in zip(paths, (header, source), strict=True):
            file = stack.enter_context(replacing(path))
            file.write(text.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
    return paths


def sizes(network: Network, weights: str | None = None) -> Sizes:
    """Return the bytes that `export` will need for a network's constants and state, without writing it.

    Args:
        network, weights: see `export`.

    Returns:
        The bytes of the constants (flash), of the state and of the scratch memory (RAM).

    Raises:
        ValueError, TypeError: see `export`.

    >>> import numpy as np
    >>> from cellstack import CellSpec
    >>> from cellstack.nodes import Cell, Recurrent
    >>> cell = Cell(CellSpec(3, 4, kind="gru"), *(np.ones(shape, "f4") for shape in ((3, 12), (4, 12), (2, 12))))
    >>> sizes(Network([Recurrent((cell,))]), "int8")
    Sizes(constants=276, state=16, scratch=100)
    """
    return _writer(network, "model", weights).sizes


def format_in(header: str) -> str:
    """Return the number format of the matrices in a header that `export` wrote.

    >>> format_in(" * Matrices: int8")
    'int8'
    """
    found = re.search(r"^ \* Matrices(?: of the cells)?: (\w+)$", header, re.MULTILINE)
    return found[1] if found else "float32"


def _writer(network: Network, name: str, weights: str | None) -> Writer:
    narrow = format_of(network, weights)
    return (SequenceWriter if needs_sequence(network) else Writer)(network, name, narrow, weights is None)

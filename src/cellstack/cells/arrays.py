"""The arrays of cells: what a kind declares of each, and those that many kinds have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cellstack.cells.spec import CellSpec

Axis = tuple[int, str]  # a number of blocks, and the letter of their width; "": the number itself


class Array(NamedTuple):
    """An array of a cell. The kernel's table of arrays and JavaScript's shapes are written from these declarations.

    Args:
        name: its name in every part.
        shape: its axes, numbers or symbols of `symbols` with spaces between them: `"I S"`, `"2 H"`, `"G-1 H"`.
        first: its first values: those of the initializer that a layer's `kernel_initializer`, `recurrent_initializer`
            or `bias_initializer` sets, `"kernel"`, `"recurrent"` or `"bias"`; or `"zeros"` or `"ones"`.
        needs: the settings with which a cell has it, such as `"layer_norm and not joint"`; "": always.
        pack: how the kernel stores it: in panels, as a `"matrix"`, whose numbers may have fewer bits, or the `"bias"`
            of a product with one; or as it is, as `"vectors"` of H numbers each.

    >>> BIAS.of({"use_bias": False})
    False
    """

    name: str
    shape: str
    first: str
    needs: str = ""
    pack: str = "vectors"

    def of(self, settings: Any) -> bool:
        """Return whether a cell with these settings, in a mapping, has the array."""
        for need in filter(None, self.needs.split(" and ")):
            if bool(settings[need.removeprefix("not ")]) is need.startswith("not "):
                return False
        return True


KERNEL = Array("kernel", "I S", "kernel", "use_kernel", pack="matrix")
RECURRENT_KERNEL = Array("recurrent_kernel", "heads P/heads S/heads", "recurrent", pack="matrix")
BIAS = Array("bias", "biases S", "bias", "use_bias", pack="bias")
KERNEL_GAIN = Array("kernel_gain", "S", "ones", "layer_norm")
RECURRENT_GAIN = Array("recurrent_gain", "S", "ones", "layer_norm and not joint")


def symbols(spec: CellSpec) -> dict[str, Axis | None]:
    """Return the axes that the symbols in `Array.shape` stand for; None: the axis is left out.

    I: features; H: units; G: gates; P: width of h; U: units of a backbone; L: its layers; S: columns of the products
    with x and h, of all gates or the backbone; D: units of a head. web/src/cells.js has the same.
    """
    gates, several = len(spec.gates), spec.heads > 1
    output = (1, "P" if spec.proj_size else "H")
    sums = (1, "U") if spec.backbone_units else (gates, "H")
    return {
        "I": (1, "I"),
        "H": (1, "H"),
        "P": output,
        "U": (1, "U"),
        "S": sums,
        "GH": (gates, "H"),
        "G-1": (gates - 1, ""),
        "L-1": (spec.backbone_layers - 1, ""),
        "heads": (spec.heads, "") if several else None,
        "P/heads": (1, "D") if several else output,
        "S/heads": (gates, "D") if several else sums,
        "biases": (2, "") if spec.two_biases else None,
    }


def axes_of(spec: CellSpec) -> dict[str, tuple[Axis, ...]]:
    """Return the axes of a cell's arrays by name, each as a number of blocks and the letter of their width.

    `CellSpec.axes` stores them.
    """
    settings, known = vars(spec) | {"joint": spec.joint, "deep": spec.backbone_layers > 1}, symbols(spec)
    return {
        array.name: tuple(
            axis
            for axis in (known[symbol] if symbol in known else (int(symbol), "") for symbol in array.shape.split())
            if axis is not None
        )
        for array in spec.of_kind.every_array
        if array.of(settings)
    }

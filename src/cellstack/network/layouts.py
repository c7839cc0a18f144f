"""The axes of a network's inputs and outputs in the file or module that it was read from.

A Network takes and returns `[B, T, features]` or `[B, features]`. A file or module may have another order of axes,
additional axes of length 1, or several axes of features. The metadata record these layouts:

    {"layout": {"of": "file", "inputs": {"x": "[T, B, F=40]"}, "outputs": {"dense": "[B, C=2, F=6, T]"}}}

Each axis is a letter, with its length if that is fixed:

    B  batch        T  time        F  features        C  with F: the features as a grid, of which C is the outer axis
    D  the two directions, the outer axis of the features        1  of length 1        N  batch and time merged
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.nodes.base import Array

if TYPE_CHECKING:
    from cellstack.network.network import Network

KEY = "layout"  # in the metadata
PART = r"[BTFCD1N](?:=[1-9]\d{0,9})?"


class Layout(NamedTuple):
    """The axes of an input or output in the file or module.

    Args:
        axes: a letter for each axis, see above.
        sizes: the length of each axis; None if open.
    """

    axes: str
    sizes: tuple[int | None, ...]

    @classmethod
    def of(cls, axes: str) -> Layout:
        """Return the layout with these axes, of any lengths."""
        return cls(axes, (None,) * len(axes))

    @classmethod
    def read(cls, text: Any) -> Layout | None:
        """Return the layout that a text in the metadata describes; None for anything else."""
        if not isinstance(text, str) or re.fullmatch(rf"\[{PART}(?:, {PART}){{0,15}}\]", text) is None:
            return None
        parts = text[1:-1].split(", ")
        return cls("".join(part[0] for part in parts), tuple(int(part[2:]) if part[2:] else None for part in parts))

    @property
    def text(self) -> str:
        """The layout as the metadata contain it."""
        parts = [f"{a}={n}" if n and a in "CF" else a for a, n in zip(self.axes, self.sizes, strict=True)]
        return f"[{', '.join(parts)}]"

    @property
    def shown(self) -> str:
        """The layout as messages show it: `[B, 40, T]`."""
        words = {"D": "2", "F": "I", "N": "B·T"}
        parts = [str(n) if n and a in "FC" else words.get(a, a) for a, n in zip(self.axes, self.sizes, strict=True)]
        return f"[{', '.join(parts)}]"

    @property
    def usual(self) -> bool:
        """Whether these are the network's axes, apart from one of length 1 or a missing axis of features."""
        return self.axes in ("BTF", "BF", "BT", "B1F", "BF1")

    @property
    def moved(self) -> bool:
        """Whether callers who have arrays with these axes must rearrange them for the network."""
        ordered = [axis for axis in self.axes if axis in "BTF"]
        steps = "T" in self.axes and not {"1", "C"}.isdisjoint(self.axes)
        return steps or "N" in self.axes or ordered != sorted(ordered, key="BTF".index)

    def to_network(self, array: Array, batch: int | None = None) -> Array:
        """Return an array in the network's layout: rows, steps, then features, with D and C as their outer axes.

        Args:
            array: an array in this layout; one with another number of axes is returned unchanged.
            batch: the number of rows, where the layout merges rows and steps.
        """
        axes = self.axes
        if "N" in axes and len(axes) == array.ndim:
            at = axes.index("N")
            if not batch or array.shape[at] % batch:
                return array
            array = array.reshape(*array.shape[:at], batch, -1, *array.shape[at + 1 :])
            axes = axes.replace("N", "BT")
        if len(axes) != array.ndim or not axes or axes in ("B1F", "BF1"):  # the network returns B1F and BF1 unchanged
            return array
        order = sorted(range(array.ndim), key=lambda n: "BT1DCF".index(axes[n]))
        array = array.transpose(order)
        kept = sum(axis in "BT" for axis in axes)
        if array.dtype.kind in "iu" and {"F", "C"}.isdisjoint(axes):  # ids have no axis of features
            array = array.reshape(array.shape[:kept])
        elif not {"1", "D", "C"}.isdisjoint(axes) or axes == "B":  # one number per row is one feature in a Network
            array = array.reshape(*array.shape[:kept], -1)
        return array if "B" in axes else array[None]

    def from_network(self, array: Array) -> Array:
        """Return an input of the network in this layout; only its first row if the layout has no batch axis.

        Args:
            array: `[B, T, features]`, `[B, features]` or ids `[B, T]`.
        """
        ours = [axis for axis in "BTCF" if axis in self.axes]
        if "B" not in self.axes:
            array = array[0]
        if "C" in self.axes:
            count = self.sizes[self.axes.index("C")] or 1
            array = array.reshape(*array.shape[:-1], count, array.shape[-1] // count)
        array = array.transpose([ours.index(axis) for axis in self.axes if axis != "1"])
        lengths = iter(array.shape)
        return array.reshape([1 if axis == "1" else next(lengths) for axis in self.axes])


def noted(of: str, inputs: Mapping[str, Layout], outputs: Mapping[str, Layout]) -> dict[str, Any]:
    """Return the metadata entry for layouts that differ from the network's; {} if none does.

    Args:
        of: `"file"` or `"module"`.
        inputs, outputs: the layouts by the network's names of inputs and outputs.
    """
    parts = {"inputs": inputs, "outputs": outputs}
    texts = {
        what: {name: layout.text for name, layout in own.items() if not layout.usual} for what, own in parts.items()
    }
    return {KEY: {"of": of, **texts}} if any(texts.values()) else {}


def time_first(network: Network) -> dict[str, Any]:
    """Return the metadata entry for a module with time before batch in all its sequences."""
    ends = []
    for names in (network.inputs, network.outputs):
        timed = [name for name in names if name in network.graph.ids or len(network.shapes[name]) == 2]
        ends.append({name: Layout("TBF", (None, None, network.shapes[name][-1])) for name in timed})
        ends[-1] |= {name: Layout.of("TB") for name in timed if name in network.graph.ids}
    return noted("module", *ends)


def layout_of(network: Network, what: str, name: str) -> Layout | None:
    """Return the layout of an input or output in the file or module; None if it is the network's.

    Args:
        network: the network.
        what: `"inputs"` or `"outputs"`.
        name: the network's name of it.
    """
    entry = network.metadata.get(KEY)
    own = entry.get(what) if isinstance(entry, dict) else None
    return Layout.read(own.get(name)) if isinstance(own, dict) else None


def one_row(network: Network) -> bool:
    """Return whether a file or module takes one row, without a batch axis."""
    layouts = [layout_of(network, "inputs", name) for name in network.inputs]
    return any(layout is not None and "B" not in layout.axes for layout in layouts)


def origin_of(network: Network) -> str:
    """Return what a network was read from, "source file" or "module", for messages.

    A file that the network is saved to has the network's own axes.
    """
    entry = network.metadata.get(KEY)
    return "module" if isinstance(entry, dict) and entry.get("of") == "module" else "source file"


def as_line(network: Network) -> str:
    """Return the axes of inputs and outputs in the file or module; "" where they are the network's."""
    ends = []
    for what, names in (("inputs", network.inputs), ("outputs", network.outputs)):
        found = [layout_of(network, what, name) for name in names]
        shapes = [
            network.graph.shown(name) if layout is None else layout.shown
            for name, layout in zip(names, found, strict=True)
        ]
        named = len(names) > 1
        ends.append((", ".join(f"{n} {s}" if named else s for n, s in zip(names, shapes, strict=True)), any(found)))
    (taken, one), (returned, other) = ends
    return f"axes in the {origin_of(network)}: {taken} -> {returned}" if one or other else ""


def warning(network: Network) -> str:
    """Return the text of a warning if callers must rearrange the axes of the file or module; otherwise ""."""
    said = []
    for what, names in (("input", network.inputs), ("output", network.outputs)):
        for name in names:
            layout = layout_of(network, f"{what}s", name)
            if layout is not None and layout.moved:
                said.append(f"{what} '{name}' {layout.shown} is {network.graph.shown(name)} in the network")
    return f"has other axes than the network: {', '.join(said)}" if said else ""


def rearranged(network: Network) -> str:
    """Return the note of `verify` that the file or module has other axes; "" if it has the network's."""
    line = as_line(network)
    return f"{line}, and arrays were rearranged accordingly" if line else ""


def hint(network: Network, name: str) -> str:
    """Return the end of an error message on an input's shape: its axes in the file or module; "" if they are equal."""
    layout = layout_of(network, "inputs", name)
    return "" if layout is None else f"; in the {origin_of(network)} its axes are {layout.shown}"

"""Pictures of a trace, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cellstack.inspect.trace import NetworkTrace

GATES = ("i", "f", "o", "z", "r")  # from 0 to 1; the others are states and candidates, about 0


def plot(t: NetworkTrace, nodes: str | Iterable[str] | None, fields: Iterable[str] | None, row: int) -> Figure:
    """Return a figure of one row of a trace: see `NetworkTrace.plot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    names = list(t) if nodes is None else [nodes] if isinstance(nodes, str) else list(nodes)
    wanted = None if fields is None else list(fields)
    panels = [
        (name if len(t[name].cells) == 1 else f"{name}.cells[{number}]", field, cell[field][row])
        for name in names
        for number, cell in enumerate(t[name].cells)
        for field in cell
        if wanted is None or field in wanted
    ]
    if not panels:
        raise ValueError(f"plot: expected cells with {', '.join(wanted or ['fields'])}, got none in {', '.join(names)}")
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, squeeze=False, figsize=(8, 0.6 + 1.3 * len(panels)), layout="constrained"
    )
    steps = t.steps
    for axis, (name, field, values) in zip(axes[:, 0], panels, strict=True):
        most = 1.0 if field in GATES else max(float(abs(values).max(initial=0.0)), 1e-9)
        image = axis.imshow(
            values.T,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap="cividis" if field in GATES else "PuOr",
            vmin=0.0 if field in GATES else -most,
            vmax=most,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, values.shape[1] - 0.5) if len(steps) else None,
        )
        axis.set_ylabel(f"{name}\n{field}, unit")
        figure.colorbar(image, ax=axis)
    axes[-1, 0].set_xlabel("step")
    pyplot.close(figure)  # whoever shows it has it: a notebook would draw it twice
    return figure

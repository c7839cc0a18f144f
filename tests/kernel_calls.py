"""Calls of the kernel with NumPy arrays, with results in the shapes of the reference."""

from typing import Any, NamedTuple

import numpy as np

from cellstack import native


class Out(NamedTuple):
    """Results of a forward pass; `case` are the arguments that its backward pass needs."""

    y: Any
    state: tuple
    gates: Any
    states: Any
    case: dict[str, Any]


class Gradients(NamedTuple):
    x: Any
    state: tuple
    arrays: dict[str, Any]


def layer(weights, state, drop, **results):
    return native.Layer(weights, state, **results, **dict(zip(DROPS, drop, strict=True)))


DROPS = ("recurrent_dropout", "zoneout", "zoneout_cell")


def forward_stack(
    x,
    cells,
    states,
    *,
    drops=None,
    mask=None,
    reset=None,
    reverse=False,
    threads=1,
    save=True,
    copy=True,
    element=None,
):
    """Run a stack of cells, `(spec, arrays)` each; `drops` has a tuple in the order of DROPS for each cell."""
    batch, steps, _ = x.shape
    layers, outs = [], []
    for n, ((spec, arrays), state) in enumerate(zip(cells, states, strict=True)):
        drop = drops[n] if drops else (None, None, None)
        names = ("after", "y", "gates", "states", "intermediate") if save else ("after", "y")
        results = native.results(spec, batch, steps, lambda shape: np.full(shape, np.nan, x.dtype), names)
        layers.append(layer(native.weights(spec, arrays, element, copy), state, drop, **results))
        case = {"spec": spec, "x": x, "state": state, "drop": drop, "mask": mask, "reset": reset, "reverse": reverse}
        intermediate = {"intermediate": results.get("intermediate")}
        seen = results.get("gates"), results.get("states")
        outs.append(Out(results["y"], results["after"], *seen, {**case, **intermediate}))
    native.forward(native.sequences(x, mask, reset, reverse), layers, threads)
    return outs


def forward(spec, arrays, x, state=None, *, recurrent_dropout=None, zoneout=None, zoneout_cell=None, **rest):
    drops = [(recurrent_dropout, zoneout, zoneout_cell)]
    return forward_stack(x, [(spec, arrays)], [state], drops=drops, **rest)[0]


def backward_stack(cells, outs, gradients, *, threads=1, wanted=None, element=None):
    """Run the backward pass of a stack.

    Args:
        cells: the arguments of `forward_stack`.
        outs: its results.
        gradients: for each layer, some of dy, dstate, dgates and dstates by name.
        threads: the number of threads that the kernel may use.
        wanted: for each layer, the names of the gradients to compute: x (lowest layer only), h0, c0 and its arrays;
            None: all.
        element: the number format of the matrices.

    Returns:
        `Gradients` for each layer; NaN for gradients that weren't requested.
    """
    case = outs[0].case
    x, new = case["x"], lambda like: np.full(like.shape, np.nan, case["x"].dtype)
    layers, asked, results = [], [], []
    for n, ((spec, arrays), out, given) in enumerate(zip(cells, outs, gradients, strict=True)):
        names = None if wanted is None else wanted[n]
        want = lambda name, array, names=names: array if names is None or name in names else None  # noqa: E731
        kept = {"y": out.y, "gates": out.gates, "states": out.states, "intermediate": out.case["intermediate"]}
        state = out.case["state"]
        layers.append(layer(native.weights(spec, arrays, element, False), state, out.case["drop"], **kept))
        start = () if state is None else tuple(map(new, state))
        found = Gradients(new(x), start, {name: new(array) for name, array in arrays.items()})
        results.append(found)
        asked.append(
            native.Gradients(
                given.get("dy"),
                given.get("dstate"),
                given.get("dgates"),
                given.get("dstates"),
                want("x", found.x) if n == 0 else None,
                [want(f"{name}0", array) for name, array in zip(spec.state_sizes, start, strict=False)],
                native.in_order({name: want(name, array) for name, array in found.arrays.items()}),
            )
        )
    native.backward(native.sequences(x, case["mask"], case["reset"], case["reverse"]), layers, asked, threads)
    return results


def backward(spec, arrays, out, *, threads=1, element=None, **given):
    return backward_stack([(spec, arrays)], [out], [given], threads=threads, element=element)[0]

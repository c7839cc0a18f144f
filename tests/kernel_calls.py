"""Calls of the native kernel with NumPy arrays, in the shapes of reference.py."""

from typing import Any, NamedTuple

import numpy as np

from cellstack import _kernel, native
from cellstack.spec import ARRAYS


class Out(NamedTuple):
    """What a pass leaves; `case` is what its backward pass needs of the call."""

    y: Any
    state: tuple
    gates: Any
    cells: Any
    case: dict[str, Any]


class Gradients(NamedTuple):
    x: Any
    state: tuple
    arrays: dict[str, Any]


def address(array):
    return 0 if array is None else array.ctypes.data


def addresses(arrays):
    return tuple(address(arrays.get(name)) for name in ARRAYS)


def pack(spec, arrays, copy=True, bits=32):
    return _kernel.Packed(arrays["kernel"].dtype == np.float64, native.description(spec), addresses(arrays), copy, bits)


def strides(x):
    return x.strides[0] // x.itemsize, x.strides[1] // x.itemsize


def pair(state):
    """The addresses of h and c."""
    return (0, 0) if state is None else tuple(map(address, (*state, None)[:2]))


def forward_stack(
    x, cells, states, *, drops=None, mask=None, reset=None, reverse=False, threads=1, save=True, copy=True
):
    """Run a stack of cells, `(spec, arrays)` each; of `drops`, `(recurrent_dropout, zoneout, zoneout_cell)` each."""
    batch, steps, _ = x.shape
    layers, outs, kept = [], [], []
    for n, ((spec, arrays), state) in enumerate(zip(cells, states, strict=True)):
        new = lambda *shape: np.full(shape, np.nan, x.dtype)  # noqa: E731
        end = tuple(new(batch, size) for size in spec.state_sizes.values())
        lstm = spec.kind == "lstm"
        drop = drops[n] if drops else (None, None, None)
        y = new(batch, steps, spec.output_size)
        gates = new(batch, steps, spec.planes, spec.units) if save else None
        memory = new(batch, steps, spec.units) if save and lstm else None
        norms = new(batch, steps, spec.norm_size) if save and spec.layer_norm else None
        packed = pack(spec, arrays, copy)
        ends = (*map(address, end), 0)[:2]
        layers.append((packed, *pair(state), *ends, *map(address, (y, gates, memory, norms, *drop))))
        case = {"spec": spec, "x": x, "state": state, "drop": drop, "mask": mask, "reset": reset, "reverse": reverse}
        outs.append(Out(y, end, gates, memory, {**case, "norms": norms}))
        kept.append(packed)
    masks = address(mask), address(reset)
    _kernel.forward(batch, steps, layers, address(x), *strides(x), *masks, reverse, threads)
    return outs


def forward(spec, arrays, x, state=None, *, recurrent_dropout=None, zoneout=None, zoneout_cell=None, **rest):
    drops = [(recurrent_dropout, zoneout, zoneout_cell)]
    return forward_stack(x, [(spec, arrays)], [state], drops=drops, **rest)[0]


def backward(spec, arrays, out, *, dy=None, dstate=None, dgates=None, dcells=None, threads=1):
    case = out.case
    x, state = case["x"], case["state"]
    batch, steps, _ = x.shape
    new = lambda like: np.full(like.shape, np.nan, x.dtype)  # noqa: E731
    dx, start = new(x), () if state is None else tuple(map(new, state))
    given = (None, None) if dstate is None else (*dstate, None)[:2]
    arrays_out = {name: new(array) for name, array in arrays.items()}
    saved = (*pair(state), *map(address, (out.y, out.gates, out.cells, case["norms"], *case["drop"])))
    _kernel.backward(
        x.dtype == np.float64, native.description(spec), batch, steps, addresses(arrays), address(x), *strides(x),
        address(case["mask"]), address(case["reset"]), case["reverse"], saved,
        tuple(map(address, (dy, *given, dgates, dcells))),
        (address(dx), *(pair(start) if start else (0, 0)), addresses(arrays_out)), threads,
    )  # fmt: skip
    return Gradients(dx, start, arrays_out)

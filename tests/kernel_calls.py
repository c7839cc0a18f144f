"""Calls of the native kernel with NumPy arrays, in the shapes of reference.py."""

import numpy as np

from cellstack import _kernel
from cellstack.reference import Forward, Gradients
from cellstack.spec import ACTIVATIONS


def address(array):
    return 0 if array is None else array.ctypes.data


def codes(activation, recurrent_activation):
    return ACTIVATIONS.index(activation), ACTIVATIONS.index(recurrent_activation)


def pack(kernel, recurrent_kernel, bias=None, activation="tanh", recurrent_activation="sigmoid", copy=True):
    return _kernel.Packed(
        kernel.dtype == np.float64,
        kernel.shape[0],
        recurrent_kernel.shape[0],
        address(kernel),
        address(recurrent_kernel),
        address(bias),
        *codes(activation, recurrent_activation),
        copy,
    )


def forward_stack(
    x, cells, states, *, mask=None, recurrent_dropout=None, reverse=False, threads=1, save=True, copy=True
):
    """Run a stack of cells, each `(kernel, recurrent_kernel, bias, activation, recurrent_activation)`."""
    batch, steps, _ = x.shape
    layers, outs = [], []
    for n, (cell, (h0, c0)) in enumerate(zip(cells, states, strict=True)):
        units, new = h0.shape[1], lambda *shape: np.full(shape, np.nan, x.dtype)
        out = Forward(
            y=new(batch, steps, units),
            h=new(batch, units),
            c=new(batch, units),
            gates=new(batch, steps, 4, units) if save else None,
            cells=new(batch, steps, units) if save else None,
        )
        dropout = recurrent_dropout[n] if recurrent_dropout else None
        arrays = (h0, c0, out.h, out.c, out.y, out.gates, out.cells, dropout)
        layers.append((pack(*cell, copy=copy), *map(address, arrays)))
        outs.append(out)
    item = x.itemsize
    _kernel.lstm_forward(
        batch, steps, layers, address(x), x.strides[0] // item, x.strides[1] // item, address(mask), reverse, threads
    )
    return outs


def forward(
    x, h0, c0, kernel, recurrent_kernel, bias=None, *, recurrent_dropout=None, activation="tanh",
    recurrent_activation="sigmoid", **rest,
):  # fmt: skip
    cell = (kernel, recurrent_kernel, bias, activation, recurrent_activation)
    dropout = None if recurrent_dropout is None else [recurrent_dropout]
    return forward_stack(x, [cell], [(h0, c0)], recurrent_dropout=dropout, **rest)[0]


def backward(
    out, x, h0, c0, kernel, recurrent_kernel, *, dy=None, dh=None, dc=None, dgates=None, dcells=None, mask=None,
    recurrent_dropout=None, activation="tanh", recurrent_activation="sigmoid", reverse=False, threads=1,
):  # fmt: skip
    batch, steps, width = x.shape
    grads = Gradients(
        *(np.full_like(a, np.nan) for a in (np.ascontiguousarray(x), h0, c0, kernel, recurrent_kernel, kernel[0]))
    )
    item = x.itemsize
    _kernel.lstm_backward(
        x.dtype == np.float64, batch, steps, width, h0.shape[1], address(kernel), address(recurrent_kernel),
        address(x), x.strides[0] // item, x.strides[1] // item, address(h0), address(c0), address(out.y),
        address(out.gates), address(out.cells), address(recurrent_dropout), address(mask),
        *map(address, (dy, dh, dc, dgates, dcells)), *map(address, grads),
        *codes(activation, recurrent_activation), reverse, threads,
    )  # fmt: skip
    return grads

"""The kernel's own calls without a network, for measurements below the network level."""

import numpy as np

from cellstack import CellSpec, native


def kernel_layer(spec, arrays, x, saved=False, y=True, **drops):
    """A layer for `native.forward`, from a state of zeros, and its outputs by name, see `native.results`."""
    batch, steps, _ = x.shape
    names = {"after", *(("y",) if y else ()), *(("gates", "states", "intermediate") if saved else ())}
    out = native.results(spec, batch, steps, lambda shape: np.empty(shape, np.float32), names)
    return native.Layer(native.weights(spec, arrays), **out, **drops), out


def cellstack(x, cells, threads):
    layers, out = [], {}
    for n, (kernel, recurrent, bias) in enumerate(cells):
        spec = CellSpec(kernel.shape[0], recurrent.shape[0])
        arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
        layer, out[n] = kernel_layer(spec, arrays, x, y=n + 1 == len(cells))
        layers.append(layer)
    sequences = native.sequences(x)

    def run():
        native.forward(sequences, layers, threads)
        return out[len(cells) - 1]["y"]

    return run

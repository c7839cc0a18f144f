"""All kinds of cell as Keras layers, with all flags of our cells.

They work with functional models, `fit`, `summary`, masks, `Bidirectional`, and files, which need `import
cellstack.keras` before they are loaded. They need the torch backend.
"""

from __future__ import annotations

from cellstack.keras.recurrent import Recurrent


class LSTM(Recurrent):
    """A long short-term memory for Keras, with flags that Keras's LSTM lacks.

    >>> import keras
    >>> y, h, c = LSTM(4, peepholes=True, proj_size=3, return_state=True)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape), tuple(h.shape), tuple(c.shape)
    ((2, 3), (2, 3), (2, 4))
    """

    kind = "lstm"


class GRU(Recurrent):
    """Gated recurrent units for Keras, with flags that Keras's GRU lacks.

    >>> import keras
    >>> y = GRU(4, layer_norm=True, zoneout=0.1, return_sequences=True)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 5, 4)
    """

    kind = "gru"


class SimpleRNN(Recurrent):
    """A fully connected recurrence for Keras, with flags that Keras's SimpleRNN lacks.

    >>> import keras
    >>> y = SimpleRNN(4, clip=3.0)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "rnn"


class MinGRU(Recurrent):
    """Minimal gated recurrent units for Keras, without a product with h.

    >>> import keras
    >>> y = MinGRU(4)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "mingru"


class MinLSTM(Recurrent):
    """A minimal long short-term memory for Keras, without a product with h.

    >>> import keras
    >>> y = MinLSTM(4)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "minlstm"


class LiGRU(Recurrent):
    """Light gated recurrent units for Keras.

    >>> import keras
    >>> y = LiGRU(4, return_sequences=True)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 5, 4)
    """

    kind = "ligru"


class SLSTM(Recurrent):
    """The sLSTM of the xLSTM for Keras.

    >>> import keras
    >>> y = SLSTM(4, heads=2)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "slstm"


class CfC(Recurrent):
    """A closed-form continuous-time network for Keras; with `timespans` the last column of x is a time.

    >>> import keras
    >>> y = CfC(4, timespans=True)(keras.ops.ones((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "cfc"

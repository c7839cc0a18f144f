"""The methods of `Network` that call parts which depend on networks, and so import them when they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cellstack.inspect.trace import NetworkTrace
    from cellstack.streaming.sessions import Sessions
    from cellstack.streaming.stream import Stream


class Delegated:
    """Traces, streams, predictions and files of a `Network`, the only subclass."""

    def trace(
        self: Any,
        x: Any,
        state: Any = None,
        mask: Any = None,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
        *,
        nodes: str | Iterable[str] | None = None,
        units: Any = None,
        steps: Any = None,
        pre: bool = False,
        in_memory: int = 1 << 30,
    ) -> NetworkTrace:
        """Run the network like `run`, and return all nodes' inputs and outputs and the cells' gates and states.

        `y` and the state have the same bits as with `run`.

        Args:
            x, state, mask, lengths, reset, threads: see `run`.
            nodes: the names of the nodes to keep; None: all.
            units: the units of the cells to keep, a slice or indices; None: all.
            steps: the steps to keep, a slice or indices, of all values with a time axis of T; None: all.
            pre: also keep the pre-activations of the gates; a trace of all units and steps can compute them later.
            in_memory: the size in bytes up to which gates and states are kept in memory; larger traces use a
                memory-mapped file, which is deleted with the trace.

        Returns:
            A mapping from the names of the nodes to their inputs, outputs, gates and states, such as `t["layer_0"].f`,
            each `[B, T, H]`; with the attributes `y` and `state`.

        Raises:
            ShapeError, TypeError, ValueError: see `run`; also an unknown node.
            IndexError: a unit or a step out of range.
        """
        run = {"mask": mask, "lengths": lengths, "reset": reset, "threads": threads}
        return _trace()(self, x, state, run, nodes, units, steps, pre, in_memory)

    def stream(self: Any, batch: int = 1, threads: int = 1, weights: str | None = None) -> Stream:
        """Return a `Stream` that runs this network step by step.

        Args:
            batch: the number of sequences that run in parallel.
            threads: the number of threads for calls with enough work.
            weights: the number format of the matrices, `"float32"`, `"bfloat16"` or `"int8"`: see `Stream`;
                None: the network's own.

        Returns:
            A stream with its own state, which starts as the cells' initial state. Streams share the network's weights.

        Raises:
            ValueError: a node needs the whole sequence (the message names it); unknown weights.
            TypeError: bfloat16 or int8 for a float64 network.

        >>> import numpy as np
        >>> from cellstack import CellSpec, Network
        >>> from cellstack.nodes import Cell, Recurrent
        >>> cell = Cell(CellSpec(3, 4, use_bias=False), np.ones((3, 16)), np.ones((4, 16)))
        >>> Network([Recurrent((cell,))]).stream().step([[1, 2, 3]]).shape
        (1, 4)
        """
        from cellstack.streaming.stream import Stream

        return Stream(self, batch, threads, weights)

    def pool(self: Any, capacity: int, threads: int = 1, weights: str | None = None) -> Sessions:
        """Return a `Sessions`: a pool of sessions that are opened and closed at any time, and stepped in batches.

        Args:
            capacity: the largest number of open sessions.
            threads: the number of threads that the kernel may use for a step.
            weights: the number format of the matrices, as for `stream`.

        Returns:
            A pool without open sessions. Pools and streams share the network's weights.

        Raises:
            ValueError: a node that can't be streamed (the message names it); a number out of range; unknown weights.
            TypeError: bfloat16 or int8 for a float64 network.
        """
        from cellstack.streaming.sessions import Sessions

        return Sessions(self, capacity, threads, weights)

    def summary(self: Any, print_fn: Callable[[str], Any] = print) -> None:
        """Print a table of the layers, the parameters and bytes of all arrays, and whether the network can be streamed.

        Each node has its name, its inputs unless they are the node before, its kind, what it computes, the shape of its
        output and its number of parameters. `plan()` has the cost of a step.

        Args:
            print_fn: called with the whole text, as in Keras.

        >>> import numpy as np
        >>> from cellstack import CellSpec, Network
        >>> from cellstack.nodes import Cell, Dense, Recurrent
        >>> cell = Cell(CellSpec(3, 4, use_bias=False), np.ones((3, 16), "f4"), np.ones((4, 16), "f4"))
        >>> Network([Recurrent((cell,)), Dense(np.ones((4, 2), "f4"))], names=["lstm", "scores"]).summary()
        Network of float32: [B, T, 3] -> [B, T, 2], 120 numbers
          layer   kind       computes               output shape  parameters
          lstm    Recurrent  LSTM 3 -> 4 (no bias)  [B, T, 4]            112
          scores  Dense      linear                 [B, T, 2]              8
        total: 120 parameters, 480 bytes
        can be streamed
        """
        from cellstack.network.description import summary_text
        from cellstack.streaming.eligibility import check_streamable

        streams = "can be streamed"
        try:
            check_streamable("can't be streamed", self)
        except ValueError as error:
            streams = str(error)
        print_fn(f"{summary_text(self)}\n{streams}")

    @property
    def channels(self: Any) -> tuple[str, ...]:
        """The names of the input's channels, as many as its width; () if they aren't known."""
        from cellstack.train.trained import channels

        return channels(self)

    def predict(
        self: Any,
        data: Any,
        y: Any = None,
        *,
        id: Any = None,
        time: Any = None,
        threads: int | None = None,
        **options: Any,
    ) -> Any:
        """Predict for new data what the network was trained for: classes, numbers, forecasts or a text's continuation.

        Needs no torch. The data is read as in training: missing values, the columns of a table and their format, the
        names of classes and the units of numbers. `task` determines what is predicted:

        - `"classify"`, `"regress"`: the class or the numbers of each sequence, or of each of its steps, as
          `Predictions`: a sequence of them with `probabilities`, `scores` and `to_frame`. The data is anything that
          `train.fit` takes; the columns of a table may be in another order.
        - `"forecast"`: the steps after the last rows of a table, or after the row `origin=`, as `Forecasts` with
          dates, ids, quantiles, `to_frame`, and `scores` if the table has later rows. The data is a pandas or polars
          frame, a table's file, or a `Table`.
        - `"text"`: the text that follows a prompt, without the prompt. A str is always a prompt; a `pathlib.Path` is a
          file that contains it.
        - None, for networks that `cellstack.train` didn't train: the outputs, `[N, …]`, for arrays, lists of sequences,
          or files of them; a list of arrays if the outputs have a time axis and the lengths differ.

        Args:
            data: see above.
            y: the true values, if known, in the form that `train.fit` takes; then `scores` compares them with the
                predictions. Of a frame it is the name of the column. None: what a file contains, or the column of the
                training's classes or numbers, if a table has it.
            id, time: columns of a table, as in `train.fit`; None: as in training.
            threads: the number of threads that the kernel may use.
            options: `origin`, and the options of `train.read_table`, for forecasts; `length`, `temperature`, `top_k`,
                `top_p`, `seed`, `stop` for texts, see `train.generate`; `day_first`, `date_format`, `decimal`,
                `encoding` of a file that is a table. Those of a table are as in training where they aren't given.

        Returns:
            See above.

        Raises:
            ValueError: data of another kind or width than the network takes, or an option that doesn't apply to it.
            TypeError: an unknown option.
            OSError: a file that can't be read.

        >>> import numpy as np
        >>> from cellstack import CellSpec, Network
        >>> from cellstack.nodes import Cell, Recurrent
        >>> cell = Cell(CellSpec(3, 4, use_bias=False), np.ones((3, 16)), np.ones((4, 16)))
        >>> net = Network([Recurrent((cell,), return_sequences=False)])
        >>> net.predict([np.ones((5, 3)), np.ones((7, 3))]).shape
        (2, 4)
        """
        from cellstack.train.predict import predict

        return predict(self, data, y, id=id, time=time, threads=threads, **options)

    def save(self: Any, path: str | PathLike[str]) -> None:
        """Write the network to a file atomically; the suffix determines the format.

        Args:
            path: the file, which is replaced if it exists; `.safetensors` is the native format.

        Raises:
            ValueError: an unknown suffix.
            OSError: the file can't be written.
        """
        from cellstack import formats

        formats.save(self, path)

    def export_c(
        self: Any, directory: str | PathLike[str], name: str = "model", weights: str | None = None
    ) -> tuple[Path, Path]:
        """Write the network as C code without dependencies: `name.h` and `name.c`, with init, reset and step.

        Args:
            directory: the directory, which is created if it doesn't exist.
            name: the name of the files, and the prefix of all names in them.
            weights: the number format of the matrices: `"float32"`, `"bfloat16"` or `"int8"`, with the rounding
                of a `Stream`; None: as the network stores them.

        Returns:
            The paths of the header and of the source.

        Raises:
            ValueError: a node that can't be streamed or written as C (the message names it); an invalid C identifier;
                an unknown format.
            TypeError: bfloat16 or int8 for a float64 network.
            OSError: the files can't be written.
        """
        from cellstack.formats import c

        return c.export(self, directory, name, weights)


@cache
def _trace() -> Callable[..., NetworkTrace]:
    """Return the trace function, imported on demand because it depends on networks, and cached to keep calls fast."""
    from cellstack.inspect.tracing import trace

    return trace

"""One step's inputs and outputs of a network as a record of numbers: the binary form of a frame on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cellstack import Network

Records = NDArray[Any]  # one-dimensional, of a structured dtype


class Rows:
    """The records of a network's steps.

    Attributes:
        inputs: the dtype of a record with one field per input, in the network's order: `[I]` numbers of the network's
            dtype, or one int64 for ids; little-endian, without padding.
        outputs: the same for outputs.
    """

    def __init__(self, network: Network) -> None:
        number = network.dtype.newbyteorder("<")

        def field(name: str) -> tuple[Any, ...]:
            if name in network.graph.ids:
                return name, "<i8"
            width = network.shapes[name][-1]
            if width is None:
                raise ValueError(f"expected a network whose {name} has a known width")
            return name, number, (width,)

        self._names, self._output_names = tuple(network.inputs), tuple(network.outputs)
        self._numbers = [name for name in network.inputs if name not in network.graph.ids]
        self.inputs = np.dtype([field(name) for name in network.inputs])
        self.outputs = np.dtype([field(name) for name in network.outputs])

    def as_inputs(self, rows: Records) -> Any:
        """Return records of inputs as the argument of `Sessions.step`."""
        names = self._names
        return rows[names[0]] if len(names) == 1 else {name: rows[name] for name in names}

    def finite(self, rows: Records) -> NDArray[np.bool_] | None:
        """Return which records of inputs have no NaN and no infinity, `[n]`; None: all."""
        finite = [np.isfinite(rows[name]) for name in self._numbers]
        for numbers in finite:
            if not numbers.all():
                return np.logical_and.reduce([numbers.all(axis=-1) for numbers in finite])
        return None

    def answers(self, results: Any) -> Records:
        """Return the result of `Sessions.step` as records of outputs, which may share its memory."""
        names = self._output_names
        if len(names) == 1 and self.outputs[0].base == results.dtype and results.flags.c_contiguous:
            return results.view(self.outputs).reshape(len(results))
        records = np.empty(len(results[0] if len(names) > 1 else results), self.outputs)
        for name, values in zip(names, results if len(names) > 1 else (results,), strict=True):
            records[name] = values
        return records

    def parse(self, values: Any) -> Records:
        """Convert steps in JSON to records.

        Args:
            values: one step: a list of `[I]` numbers or, for ids, a number; a dict by name if there are several inputs.

        Raises:
            ValueError: another structure, a wrong width, or values that aren't numbers.
        """
        row = np.zeros(1, self.inputs)
        names = self._names
        if isinstance(values, dict):
            if values.keys() != set(names):
                raise ValueError(f"expected the inputs {', '.join(names)}, got {', '.join(map(str, values)) or 'none'}")
        elif len(names) > 1:
            raise ValueError(f"expected an object with the inputs {', '.join(names)}, got {type(values).__name__}")
        else:
            values = dict.fromkeys(names, values)
        for name in names:
            of, given = self.inputs[name], values[name]
            try:
                array = np.asarray(given)
            except ValueError:
                array = np.empty(0, object)
            if isinstance(given, list) and bool in map(type, given):  # NumPy would take them as numbers
                array = array.astype(object)
            if array.dtype.kind not in ("iu" if of.base.kind == "i" else "iuf") or array.shape != of.shape:
                wanted = f"{of.shape[0]} numbers" if of.shape else "a whole number"
                got = f"shape {list(array.shape)}" if array.dtype.kind in "iufb" else "values that aren't numbers"
                raise ValueError(f"{name}: expected {wanted}, got {got}")
            with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which is refused
                row[name] = array
        return row

    def plain(self, answer: Records) -> Any:
        """Return one record of outputs as lists, for JSON: a list, or a dict by name if there are several outputs."""
        names = self._output_names
        lists = {name: answer[name].tolist() for name in names}
        return lists if len(names) > 1 else lists.popitem()[1]

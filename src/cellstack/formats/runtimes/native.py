"""Files in the native format, run by cellstack itself."""

from __future__ import annotations

from importlib import metadata

from cellstack.cells.errors import FormatError
from cellstack.formats import safetensors
from cellstack.formats.runtimes.answers import MODULE, Answers, CannotRunError, Inputs, by_name, named, says
from cellstack.network import Network


def run(net: Network, path: str, inputs: Inputs) -> Answers:
    """Load and run a file in the native format."""
    try:
        other = safetensors.load(path).unpadded
        y, states = other.run(by_name(other.inputs, list(inputs), list(inputs.values()), "inputs"))
    except FormatError as error:
        ordered = net.metadata.get("source", {}).get("order")
        raise CannotRunError(MODULE if ordered else str(error)) from None
    except ValueError as error:
        raise CannotRunError(says("the network in the file takes other inputs", error)) from None
    arrays = y if isinstance(y, tuple) else (y,)
    outputs = by_name(net.outputs, other.outputs, arrays, "outputs")
    return Answers("cellstack", metadata.version("cellstack"), outputs, named(states))

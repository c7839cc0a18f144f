"""State dicts of one recurrent module, run by PyTorch, which loads weights only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cellstack.formats.runtimes.answers import MODULE, Answers, CannotRunError, Inputs, package, says
from cellstack.network import Network


def _tensors(torch: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of nested dicts with their paths."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from _tensors(torch, value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(found, torch.Tensor):
        yield prefix, found


def run(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run the recurrent module whose state dict is in a file."""
    torch = package("torch", path)
    try:
        tensors = dict(_tensors(torch, torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # such as UnpicklingError: the file holds more than weights
        said = says("torch can't load it without running the file's own code", error)
        raise CannotRunError(f"{said}; {MODULE}") from None
    weights = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    weights = {f"{name}_l0" if re.search(r"_(ih|hh)$", name) else name: one for name, one in weights.items()}
    layers = [re.search(r"_l(\d+)(_reverse)?$", name) for name in weights]
    if len(weights) != len(tensors) or "weight_hh_l0" not in weights or len(inputs) != 1 or None in layers:
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name in tensors)
        raise CannotRunError(
            f"a state dict doesn't say how its modules run (found {', '.join(modules)[:200]}): {MODULE}"
        )
    cell = net.cells[0].spec
    if "torch" not in cell.of_kind.names:
        raise CannotRunError(f"torch.nn has no {cell.of_kind.title}")
    title = cell.of_kind.names["torch"].name
    flags = {"proj_size": cell.proj_size} if "proj_size" in cell.of_kind.settings else {}
    flags |= {} if cell.of_kind.gated else {"nonlinearity": cell.activation}
    module = getattr(torch.nn, title)(
        weights["weight_ih_l0"].shape[1],
        cell.units,
        num_layers=1 + max(int(found[1]) for found in layers if found is not None),
        bias="bias_ih_l0" in weights,
        bidirectional="weight_hh_l0_reverse" in weights,
        batch_first=True,
        dtype=getattr(torch, net.dtype.name),
        **flags,
    )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CannotRunError(says(f"torch.nn.{title} doesn't take the file's weights", error)) from None
    (x,) = inputs.values()
    with torch.no_grad():
        y, after = module(torch.from_numpy(np.array(x)))
    arrays = [array.numpy() for array in (after if isinstance(after, tuple) else (after,))]  # each [layers, B, H]
    states = {
        f"cell {number} {name}": array[number]
        for number in range(len(arrays[0]))
        for name, array in zip(cell.state_sizes, arrays, strict=False)
    }
    return Answers("torch", str(torch.__version__), {net.outputs[0]: y.numpy()}, states)

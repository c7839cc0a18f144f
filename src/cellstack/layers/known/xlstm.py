"""xlstm's cells: the sLSTM, and the mLSTM of both block stacks.

Ref: xlstm, xlstm/blocks/slstm/cell.py, xlstm/blocks/mlstm/cell.py and xlstm/xlstm_large/model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cellstack.cells.mlstm import MemorySpec
from cellstack.cells.slstm import SLSTMState
from cellstack.cells.spec import CellSpec
from cellstack.layers import forward, mlstm, op
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known.adapter import Adapter


def _slstm_spec(module: Any) -> CellSpec:
    """Return the cell of an `sLSTMCell_vanilla`, whose input is the sums over x of all gates."""
    config = module.config
    if config.num_states != len(SLSTMState._fields):  # those of its function
        raise ValueError(f"function={config.function!r} isn't supported, only 'slstm'")
    if config.input_shape != "BSGNH" or config.output_shape != "BNSH":
        found = f"{config.input_shape} and {config.output_shape}"
        raise ValueError(f"expected input_shape BSGNH and output_shape BNSH, got {found}")
    units = config.hidden_size
    return CellSpec(4 * units, units, kind="slstm", heads=config.num_heads, use_kernel=False)


class HeadedSLSTM(HandWritten):
    """An `sLSTMCell_vanilla`, the loop of an sLSTM with heads over its steps."""

    def forward(self, input: Any, state: Any = None, lengths: Any = None) -> Any:
        """Run like the module's own forward."""
        module: Any = self
        spec = _slstm_spec(module)
        # Stored are [heads, 4·D, D]; ours are [heads, D, 4·D]. The biases have the same order.
        recurrent = module._recurrent_kernel_.transpose(1, 2)
        arrays = [recurrent[0] if spec.heads == 1 else recurrent, module._bias_]
        before = [] if state is None else [*state]
        if input.ndim != 3 or not self.runs([input, *before], spec.input_size, arrays):
            return super().forward(input, state, lengths)
        found = forward.run_layers([CellRun(op.CellCall(spec), arrays, before)], input, None, None)
        y = found.y.unflatten(-1, (spec.heads, -1)).transpose(1, 2)  # [B, heads, T, D]
        return y, torch.stack([*found.states[0]])


def _slstm_text(module: Any) -> str:
    return f"sLSTM of {module.config.hidden_size} units, {_slstm_spec(module).heads} heads"


def _slstm_examples(module: Any) -> list[tuple[Any, ...]]:
    units = module.config.hidden_size
    state = torch.stack([torch.tanh(torch.randn(2, units)), torch.randn(2, units), 1 + torch.rand(2, units)])
    return [
        (torch.randn(3, 5, 4 * units),),
        (torch.randn(2, 1, 4 * units), torch.cat([state, torch.randn(1, 2, units)])),
    ]


def _memory_sizes(module: Any) -> MemorySpec:
    """Return the sizes of the memory of an `mLSTMCell`; its epsilon is the default of the package's functions."""
    heads, width = module.config.num_heads, module.config.embedding_dim
    return MemorySpec(heads, width // heads, width // heads, 1e-6)


class MatrixMemory(HandWritten):
    """An `mLSTMCell`: its gates and its norm stay in PyTorch."""

    def forward(self, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        """Run like the module's own forward."""
        found = self._remembered(q, k, v, [], keeps_state=False)
        return super().forward(q, k, v, **kwargs) if found is None else found[0]

    def step(self, q: Any, k: Any, v: Any, mlstm_state: Any = None, **kwargs: Any) -> Any:
        """Run like the module's own step, with its shapes of the state: C, n `[…, 1]` and m `[…, 1, 1]`."""
        state = mlstm_state
        before = [] if state is None else [state[0], state[1].squeeze(-1), state[2].flatten(1)]
        found = self._remembered(q, k, v, before, keeps_state=True)
        if found is None:
            return super().step(q, k, v, mlstm_state, **kwargs)  # type: ignore[misc]
        y, memory, normaliser, stabiliser = found
        return y, (memory, normaliser.unsqueeze(-1), stabiliser[..., None, None])

    def _remembered(self, q: Any, k: Any, v: Any, before: list[Any], keeps_state: bool) -> list[Any] | None:
        """Return the output and, if it is kept, the state, or None for a call that the kernel doesn't support."""
        module: Any = self
        sizes = _memory_sizes(module)
        parts = torch.cat([q, k, v], -1)
        x = torch.cat([parts, module.igate(parts), module.fgate(parts)], -1)
        if x.ndim != 3 or not self.runs([x], sizes.core, [module.igate.weight, module.fgate.weight]):
            return None
        h, *after = mlstm.run_memory(sizes, x, before, keeps_state)
        heads = h.unflatten(-1, (sizes.heads, -1)).transpose(1, 2)  # [B, heads, T, D]
        return [module.outnorm(heads).transpose(1, 2).flatten(2), *after]


def _memory_examples(module: Any) -> list[tuple[Any, ...]]:
    width = module.config.embedding_dim
    steps = [min(steps, module.config.context_length) for steps in (5, 1, 40)]
    return [tuple(torch.randn(2, count, width) for _ in range(3)) for count in steps]


def _large_sizes(module: Any) -> MemorySpec:
    """Return the sizes of the memory of an xLSTMLarge's `mLSTMLayer`."""
    config, backend = module.config, module._modules["mlstm_backend"].config
    if "siging" in backend.chunkwise_kernel:
        raise ValueError(f"chunkwise_kernel={backend.chunkwise_kernel!r}, with sigmoid input gates, isn't supported")
    if not backend.return_last_states and "inference" not in backend.mode:
        raise ValueError("return_last_states=False isn't supported, which xlstm's own layer doesn't support either")
    heads = config.num_heads
    return MemorySpec(heads, module.qk_dim // heads, module.v_dim // heads, backend.eps)


class LargeMemory(HandWritten):
    """An xLSTMLarge's `mLSTMLayer`: all but its memory, which its `mlstm_backend` computes, stays in PyTorch."""

    @property
    def mlstm_backend(self) -> Callable[..., Any]:
        """The function that the module calls for its memory."""
        return self._remembered

    def _remembered(self, q: Any, k: Any, v: Any, i: Any, f: Any, **state: Any) -> Any:
        """Return h `[B, heads, T, D]` and the state, from heads `[B, heads, T, …]` and gates `[B, heads, T]`."""
        module: Any = self
        sizes = _large_sizes(module)
        C, n, m = before = [state[f"{name}_initial"] for name in "cnm"]
        scale = sizes.key_size**0.5  # of our keys, which the module divides by it when they are retrieved
        given = [] if C is None else [C / scale, n / scale, m.flatten(1)]
        heads = [part.transpose(1, 2).flatten(2) for part in (q, k, v)]
        x = torch.cat([*heads, i.transpose(1, 2), f.transpose(1, 2)], -1)
        if not self.runs([x, *given], sizes.core, [module.out_proj.weight]):
            return self._modules["mlstm_backend"](q, k, v, i, f, *before)  # type: ignore[misc]
        h, C, n, m = mlstm.run_memory(sizes, x, given)
        return h.unflatten(-1, (sizes.heads, -1)).transpose(1, 2), (scale * C, scale * n, m.unsqueeze(-1))


def _large_examples(module: Any) -> list[tuple[Any, ...]]:
    sizes, chunk = _large_sizes(module), module._modules["mlstm_backend"].config.chunk_size
    state = [torch.randn(2, *shape) for shape in sizes.state_shapes.values()]
    state[1] = 1 + state[1].abs()
    width = module.config.embedding_dim
    return [(torch.randn(2, chunk, width),), (torch.randn(2, chunk, width), (*state[:2], state[2].unsqueeze(-1)))]


ADAPTERS = {
    "xlstm.blocks.mlstm.cell.mLSTMCell": Adapter(
        MatrixMemory,
        lambda module: f"mLSTM, {_memory_sizes(module).heads} heads",
        _memory_examples,
        growth=1e4,  # its epsilon has another scale for sequences than for steps; ours has that of its steps
    ),
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla": Adapter(HeadedSLSTM, _slstm_text, _slstm_examples),
    "xlstm.xlstm_large.model.mLSTMLayer": Adapter(
        LargeMemory, lambda module: f"mLSTM, {_large_sizes(module).heads} heads", _large_examples
    ),
}

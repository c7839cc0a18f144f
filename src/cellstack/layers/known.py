"""Classes of other libraries whose loops can't be recognised from a trace, each with a subclass for the kernel.

These loops write to tensors, take packed sequences, or draw random masks. A subclass here overrides the method with the
loop. Its results are compared with those of the library's class before a module is replaced.

Ref: SpeechBrain, speechbrain/nnet/RNN.py; DeepCTR-Torch, deepctr_torch/layers/sequence.py; xlstm,
xlstm/blocks/slstm/cell.py and xlstm/blocks/mlstm/cell.py; ncps, ncps/torch/cfc.py and wired_cfc_cell.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from cellstack.layers import forward, mlstm, op
from cellstack.layers.cell import NO_MASKS, Masks
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.sequences import pack
from cellstack.spec import CellSpec, SLSTMState


class Adapter(NamedTuple):
    """How a class of another library runs on the kernel.

    Args:
        base: the class that overrides the method with the loop.
        describe: returns a module's cells in words; `ValueError` if the kernel doesn't support it as it is configured.
        examples: returns the arguments of some calls, with random values.
        growth: a factor of the tolerance, for a class whose results differ for another reason than rounding.
    """

    base: type[HandWritten]
    describe: Callable[[Any], str]
    examples: Callable[[Any], list[tuple[Any, ...]]]
    growth: float = 1.0


# ── SpeechBrain's light GRU ───────────────────────────────────────────────────────────────────────────────────────────

_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.LeakyReLU: "leaky_relu(0.01)"}


def _light_spec(module: Any) -> CellSpec:
    """Return the cell of a `LiGRU_Layer`, whose input is the module's batch-normalised product with x `[B, T, 2H]`."""
    text = _ACTIVATIONS.get(type(module.act))
    if text is None or getattr(module.act, "negative_slope", 0.01) != 0.01:
        raise ValueError(f"its activation {getattr(module.act, '__name__', module.act)} isn't supported")
    units = module.hidden_size
    return CellSpec(2 * units, units, text, kind="ligru", use_bias=False)


class LightGRU(HandWritten):
    """A `LiGRU_Layer`. Its product with x, whose normalisation depends on the batch, stays in PyTorch."""

    def _ligru_cell(self, w: Any, ht: Any) -> Any:
        module: Any = self
        spec, units = _light_spec(module), module.hidden_size
        # The module's arrays begin with the rows of the candidate, ours with those of the gate.
        order = torch.arange(2 * units).roll(units)
        arrays = [torch.eye(2 * units, dtype=w.dtype)[:, order], module.u.weight[order].t()]
        start = ht if ht.shape[0] == w.shape[0] else ht.expand(w.shape[0], units)
        if w.ndim != 3 or not self.runs([w, start], spec.input_size, arrays):
            return super()._ligru_cell(w, ht)  # type: ignore[misc]
        drop = module._sample_drop_mask(w)
        masks = NO_MASKS
        if drop.shape != (1,) or drop.item() != 1.0:
            masks = Masks(recurrent=drop.to(w.dtype).expand(w.shape[0], units))
        y = forward.run([CellRun(op.CellCall(spec), arrays, [start], masks)], w, None, None).y
        return y.clone() if y.requires_grad else y


def _light_examples(module: Any) -> list[tuple[Any, ...]]:
    width, units = module.input_size, module.hidden_size
    rows = 2 if module.bidirectional else 1
    return [
        (torch.randn(3, 4, width),),
        (torch.randn(2, 7, width), torch.randn(2 * rows, units)),
        (torch.randn(1, 2, width),),
    ]


# ── DeepCTR's GRUs with attention ─────────────────────────────────────────────────────────────────────────────────────

_OPEN = 200.0  # a bias with which a gate is 1


class AttentionGRU(HandWritten):
    """A `DynamicGRU`: a GRU over packed rows; attention scales its update gate (AUGRU) or replaces it (AGRU)."""

    def forward(self, inputs: Any, att_scores: Any = None, hx: Any = None) -> Any:
        """Run like the module's own forward."""
        cell: Any = self.rnn
        ready = isinstance(inputs, PackedSequence) and isinstance(att_scores, PackedSequence)
        if not ready or not isinstance(cell.weight_ih, Tensor):
            return super().forward(inputs, att_scores, hx)
        arrays, spec = _attention_arrays(cell), _attention_spec(cell)
        tensors = [inputs.data, att_scores.data, *([] if hx is None else [hx])]
        fits = inputs.data.ndim == 2 and att_scores.data.numel() == inputs.data.shape[0]
        if not fits or not self.runs(tensors, cell.input_size, arrays):
            return super().forward(inputs, att_scores, hx)
        both = torch.cat([inputs.data, att_scores.data.reshape(-1, 1)], 1)
        sizes = inputs.batch_sizes
        x = pad_packed_sequence(PackedSequence(both, sizes))[0].transpose(0, 1)
        used = None if sizes[-1] == sizes[0] else torch.arange(len(x))[:, None] < sizes
        state = [] if hx is None else [hx[: len(x)]]
        y = forward.run([CellRun(op.CellCall(spec), arrays, state)], x, used, None).y
        return PackedSequence(pack(y, PackedSequence(inputs.data, inputs.batch_sizes)).data, *inputs[1:])


def _attention_spec(cell: Any) -> CellSpec:
    return CellSpec(cell.input_size + 1, cell.hidden_size, kind="gru", use_bias=bool(cell.bias), attention=True)


def _attention_arrays(cell: Any) -> list[Tensor]:
    """Return our arrays. The module's gate z weighs the candidate, ours h_prev, so the signs of its weights differ."""
    kernel, recurrent = (_gates(cell, weight) for weight in (cell.weight_ih, cell.weight_hh))
    if not cell.bias:
        return [kernel.t(), recurrent.t()]
    biases = [_gates(cell, bias) for bias in (cell.bias_ih, cell.bias_hh)]
    return [kernel.t(), recurrent.t(), torch.stack(biases)]


def _gates(cell: Any, weight: Tensor) -> Tensor:
    """Return the rows of an array in our order of gates, z r g; the module's is r z g."""
    r, z, g = weight.chunk(3)
    if type(cell).__name__ == "AGRUCell":
        z = torch.zeros_like(z) if z.ndim > 1 else torch.full_like(z, _OPEN)
    return torch.cat([-z, r, g])


def _attention_text(module: Any) -> str:
    kind = type(module.rnn).__name__.removesuffix("Cell")
    if kind not in ("AGRU", "AUGRU"):
        raise ValueError(f"its cell {type(module.rnn).__name__} isn't supported")
    if kind == "AGRU" and not module.rnn.bias:
        raise ValueError("an AGRU without biases isn't supported")
    return f"{kind} {module.input_size} -> {module.hidden_size}"


def _attention_examples(module: Any) -> list[tuple[Any, ...]]:
    def packed(width: int, lengths: list[int], of: Callable[..., Tensor]) -> PackedSequence:
        x = of(len(lengths), max(lengths), width)
        return nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)

    return [
        (packed(module.input_size, lengths, torch.randn), packed(1, lengths, torch.rand))
        for lengths in ([3, 5, 1], [4, 4], [1])
    ]


# ── xlstm's sLSTM ─────────────────────────────────────────────────────────────────────────────────────────────────────


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
        found = forward.run([CellRun(op.CellCall(spec), arrays, before)], input, None, None)
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


# ── xlstm's mLSTM ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _memory_sizes(module: Any) -> mlstm.Sizes:
    """Return the sizes of the memory of an `mLSTMCell`; its epsilon is the default of the package's functions."""
    heads, width = module.config.num_heads, module.config.embedding_dim
    return mlstm.Sizes(heads, width // heads, width // heads, 1e-6)


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
        h, *after = mlstm.run(sizes, x, before, keeps_state)
        heads = h.unflatten(-1, (sizes.heads, -1)).transpose(1, 2)  # [B, heads, T, D]
        return [module.outnorm(heads).transpose(1, 2).flatten(2), *after]


def _memory_examples(module: Any) -> list[tuple[Any, ...]]:
    width = module.config.embedding_dim
    steps = [min(steps, module.config.context_length) for steps in (5, 1, 40)]
    return [tuple(torch.randn(2, count, width) for _ in range(3)) for count in steps]


def _large_sizes(module: Any) -> mlstm.Sizes:
    """Return the sizes of the memory of an xLSTMLarge's `mLSTMLayer`."""
    config, backend = module.config, module._modules["mlstm_backend"].config
    if "siging" in backend.chunkwise_kernel:
        raise ValueError(f"chunkwise_kernel={backend.chunkwise_kernel!r}, with sigmoid input gates, isn't supported")
    if not backend.return_last_states and "inference" not in backend.mode:
        raise ValueError("return_last_states=False isn't supported, which xlstm's own layer doesn't support either")
    heads = config.num_heads
    return mlstm.Sizes(heads, module.qk_dim // heads, module.v_dim // heads, backend.eps)


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
        h, C, n, m = mlstm.run(sizes, x, given)
        return h.unflatten(-1, (sizes.heads, -1)).transpose(1, 2), (scale * C, scale * n, m.unsqueeze(-1))


def _large_examples(module: Any) -> list[tuple[Any, ...]]:
    sizes, chunk = _large_sizes(module), module._modules["mlstm_backend"].config.chunk_size
    state = [torch.randn(2, *shape) for shape in sizes.state_shapes.values()]
    state[1] = 1 + state[1].abs()
    width = module.config.embedding_dim
    return [(torch.randn(2, chunk, width),), (torch.randn(2, chunk, width), (*state[:2], state[2].unsqueeze(-1)))]


# ── ncps's CfC ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _closed_cells(module: Any) -> list[tuple[Any, CellSpec]]:
    """Return the cells of a `CfC`, bottom first, with our descriptions of them: several if it has a wiring."""
    if module.use_mixed:
        raise ValueError("mixed_memory isn't supported")
    found = []
    for cell in getattr(module.rnn_cell, "_layers", [module.rnn_cell]):
        if cell.backbone_layers:
            raise ValueError("a backbone isn't supported, only backbone_layers=0")
        if cell.mode == "pure":
            raise ValueError("mode='pure' isn't supported")
        found.append((cell, CellSpec(cell.input_size, cell.hidden_size, kind="cfc", mode=cell.mode)))
    return found


def _closed_arrays(cell: Any) -> list[Tensor]:
    """Return our arrays; a wiring multiplies the weights of two of the four products by a mask."""
    products = (cell.ff1, cell.ff2, cell.time_a, cell.time_b)
    masks = (cell.sparsity_mask, cell.sparsity_mask, None, None)
    pairs = zip(products, masks, strict=True)
    weights = torch.cat([one.weight if mask is None else one.weight * mask for one, mask in pairs])
    kernel, recurrent = weights.t().split([cell.input_size, cell.hidden_size])
    return [kernel, recurrent, torch.cat([one.bias for one in products])]


class ClosedForm(HandWritten):
    """A `CfC` without a backbone: one cell, or those of a wiring."""

    def forward(self, input: Any, hx: Any = None, timespans: Any = None) -> Any:
        """Run like the module's own forward."""
        module: Any = self
        cells = _closed_cells(module)
        arrays = [_closed_arrays(cell) for cell, _ in cells]
        given = [one for one in (input, hx, timespans) if one is not None]
        ready = self.runs(given, module.input_size, [array for each in arrays for array in each])
        if not ready or input.ndim != 3 or (hx is not None and hx.shape != (self._rows(input), module.state_size)):
            return super().forward(input, hx, timespans)
        x = input if module.batch_first else input.transpose(0, 1)
        # The module multiplies the times of several rows by units, not by rows, or refuses them.
        if timespans is not None and (len(x) > 1 or timespans.numel() != x.shape[1]):
            return super().forward(input, hx, timespans)
        sizes = [spec.units for _, spec in cells]
        starts = [[]] * len(cells) if hx is None else [[part] for part in hx.split(sizes, dim=1)]
        runs = [
            CellRun(op.CellCall(spec), own, start) for (_, spec), own, start in zip(cells, arrays, starts, strict=True)
        ]
        if timespans is None:
            y, _, states, _ = forward.run(runs, x, None, None)
        else:
            y, states, times = x, [], timespans.reshape(1, -1, 1)
            for (_, spec), each in zip(cells, runs, strict=True):
                timed = op.CellCall(replace(spec, input_size=spec.input_size + 1, timespans=True))
                found = forward.run([each._replace(call=timed)], torch.cat([y, times], -1), None, None)
                y, states = found.y, [*states, *found.states]
        read = module.fc(y if module.return_sequences else y[:, -1])
        if module.return_sequences and not module.batch_first:
            read = read.transpose(0, 1)
        read = read.clone() if read is y and y.requires_grad else read
        return read, torch.cat([state[0] for state in states], dim=1)

    def _rows(self, x: Tensor) -> int:
        module: Any = self
        return x.shape[0 if module.batch_first else 1]


def _closed_text(module: Any) -> str:
    return f"CfC {module.input_size} -> {', '.join(str(spec.units) for _, spec in _closed_cells(module))}"


def _closed_examples(module: Any) -> list[tuple[Any, ...]]:
    def shaped(x: Tensor) -> Tensor:
        return x if module.batch_first else x.transpose(0, 1)

    x, one = torch.randn(3, 5, module.input_size), torch.randn(1, 4, module.input_size)
    state = torch.tanh(torch.randn(1, module.state_size))
    return [(shaped(x),), (shaped(one), state), (shaped(one), state, shaped(3.0 * torch.rand(1, 4)))]


ADAPTERS = {
    "speechbrain.nnet.RNN.LiGRU_Layer": Adapter(
        LightGRU, lambda module: f"LiGRU {module.input_size} -> {_light_spec(module).units}", _light_examples
    ),
    "deepctr_torch.layers.sequence.DynamicGRU": Adapter(AttentionGRU, _attention_text, _attention_examples),
    "ncps.torch.cfc.CfC": Adapter(ClosedForm, _closed_text, _closed_examples),
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
"""The adapters, by the full names of the classes."""

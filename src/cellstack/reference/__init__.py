"""The reference implementation: the equations of all cells in NumPy, forward and backward, in float64.

Every other implementation is compared with this one. `CellSpec` documents the flags; the lines that a flag adds or
changes are marked with its name. Gates are in the order of `GATES`, a block of H columns each. `·` is a matrix product,
`⊙` is elementwise, h_in is m⊙h_prev with the mask m of recurrent dropout, and
LN(v) = (v - mean(v)) / sqrt(var(v) + norm_epsilon) over a row, with the biased variance. Vectors that are multiplied by
a bfloat16 matrix (`BFloat16Array`) are rounded to bfloat16 first. With several heads, h and the units of each gate
are divided into heads of equal size, and v·recurrent_kernel multiplies each head's part of v by the head's own matrix.
Without use_kernel, x·kernel is x itself.

LSTM, gates i f g o:
    a = x·kernel                               b = h_in·recurrent_kernel
    a = LN(a)⊙kernel_gain                      b = LN(b)⊙recurrent_gain                    layer_norm
    z = a + b + bias
    z_i += p_i⊙c_prev                          z_f += p_f⊙c_prev                           peepholes
    i = σ(z_i)    f = σ(z_f)    g = φ(z_g)     with the complete z clipped to ±clip        clip
    f = 1 - i                                                                              coupled
    c_new = f⊙c_prev + i⊙g
    c_new is clipped to ±cell_clip                                                         cell_clip
    z_o += p_o⊙c_new                                                                       peepholes
    o = σ(z_o)
    c_out = c_new
    c_out = LN(c_new)⊙cell_gain + cell_bias                                                layer_norm
    h_new = o⊙φ(c_out)
    h_new = (o⊙φ(c_out))·projection                                                        proj_size
    With layer_norm="joint", the lines of layer_norm are replaced by these:
    z = LN(x·kernel + h_in·recurrent_kernel)⊙kernel_gain + bias
    c_new = LN(c_new)⊙cell_gain + cell_bias, after its clip, before the peephole of o      c_out = c_new

GRU, gates z r g:
    a = x·kernel + bias                        q = h_in·recurrent_kernel
    a = x·kernel + bias[0]                     q = h_in·recurrent_kernel + bias[1]         reset_after
    both products normalised as above, before the bias, g's columns separately             layer_norm
    z = σ(a_z + q_z)                           r = σ(a_r + q_r)
    g = φ(a_g + (r⊙h_in)·recurrent_kernel_g)
    g = φ(a_g + r⊙q_g)                                                                     reset_after
    h_new = z⊙h_prev + (1 - z)⊙g               with the arguments of σ, φ clipped to ±clip clip
    h_new = (1 - w)⊙h_prev + w⊙g               with w = u·(1 - z); u is the last column of
                                               x, the other columns are multiplied         attention

SimpleRNN, gate g:
    h_new = g = φ(a + b + bias)                with a, b, layer_norm and clip as above

LiGRU, gates z g:
    h_new = z⊙h_prev + (1 - z)⊙(m⊙g)           with z = σ(a_z + b_z + bias_z), g = φ(a_g + b_g + bias_g), and b the
                                               product with h_prev itself; layer_norm and clip as above

minGRU, gates z g, and minLSTM, gates i f g; both without recurrent_kernel:
    a = x·kernel + bias, normalised as above, before the bias                              layer_norm
    h_new = (1 - z)⊙h_prev + z⊙g               with z = σ(a_z), g = φ(a_g)                 minGRU
    h_new = (f⊙h_prev + i⊙g) / (f + i)         with i = σ(a_i), f = σ(a_f), g = φ(a_g)     minLSTM

CfC, gates g k s t:
    z = a + b + bias                           with a, b, layer_norm and clip as for the LSTM, but no clip of s
    z = v·gate_kernel + gate_bias              with v = φ_b(a + b + bias)                  backbone_units
                                               and n times v = φ_b(v·backbone_kernel[n]
                                               + backbone_bias[n])                         backbone_layers
    g = φ(z_g)    k = φ(z_k)    s = z_s        t = σ(z_t + s⊙τ), with τ = 1
                                               τ is the last column of x, the other columns
                                               are multiplied                              timespans
    h_new = (1 - t)⊙g + t⊙k
    h_new = g + t⊙k                                                                        mode="no_gate"

CfS, gate g:
    h_new = limit⊙(1 - g⊙e^(-τ⊙(|decay| + |g|)))  with g = φ(z), and z and τ as for the CfC

sLSTM, gates i f g o, states h c n m:
    z = a + b + bias                           with a and b as for the LSTM
    l = log σ(z_f)
    l = z_f                                                                                exponential_forget
    m_new = max(l + m_prev, z_i)
    i = exp(z_i - m_new)      f = exp(l + m_prev - m_new)      g = φ(z_g)      o = σ(z_o)
    m_new = z_i and f = 0                      where n_prev is 0: nothing is stored yet, and m_prev has no meaning
    c_new = f⊙c_prev + i⊙g                     n_new = f⊙n_prev + i
    h_new = o⊙c_new / n_new

SRU, gates g f r s, states h c; without recurrent_kernel, v_f and v_r are the rows of cell_vectors:
    a = x·kernel + bias
    g = φ(a_g)    f = σ(a_f + v_f⊙c_prev)    r = σ(a_r + v_r⊙c_prev)    s = φ(a_s)
    c_new = f⊙c_prev + (1 - f)⊙g               h_new = r⊙φ(c_new) + (1 - r)⊙s

The slope of a clip is 0 at its bounds, as it is beyond them. For every kind, with k random masks in training and the
rates themselves in inference:
    h = k_h⊙h_prev + (1 - k_h)⊙h_new           c = k_c⊙c_prev + (1 - k_c)⊙c_new            zoneout, zoneout_cell

Backward: the chain rule on these lines, last to first, derived by hand. `dv` is the gradient of the loss w.r.t. v.

Ref, and where we differ:
    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", appendix A.1: i, o and the cell, without a forget gate.
    Gers, Schmidhuber and Cummins 2000, "Learning to Forget", sec. 2, and 3 for f: the LSTM; their φ are scaled
        sigmoids.
    Gers and Schmidhuber 2000, "Recurrent Nets that Time and Count"; Gers, Schraudolph and Schmidhuber 2002, "Learning
        Precise Timing with LSTM Recurrent Networks", sec. 2: peepholes. Their gradient is truncated at the gates, ours
        isn't.
    Sak, Senior and Beaufays 2014, "Long Short-Term Memory Based Recurrent Neural Network Architectures", eq. 7 to 12:
        proj_size, their r; always with peepholes there. Their non-recurrent projection p isn't supported.
    Greff et al. 2017, "LSTM: A Search Space Odyssey", CIFG: coupled.
    Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 15, 20 to 22 (LSTM), 26 to 28 (GRU): layer_norm. Their shifts
        before the sum are the one bias here, norm_epsilon is under the root, and their z is 1 - z here.
    Krueger et al. 2017, "Zoneout", sec. 3: zoneout. As there, h_new is computed from c_new, not from c.
    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", eq. 5 to 8: the GRU without
        reset_after, and without a bias. With it: Ba et al., eq. 24, and cuDNN, which has both biases.
    Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", sec. 4:
        recurrent dropout, one mask per sequence, shared by the gates. The h_prev that a GRU and zoneout carry over
        isn't dropped, as in Semeniuta, Severyn and Barth 2016, "Recurrent Dropout without Memory Loss", who drop g
        instead.
    Feng et al. 2024, "Were RNNs All We Needed?", sec. 3 and appendix B: minGRU and minLSTM with φ = `positive`, their
        g; our f and i are before their division by f + i.
    Elman 1990, "Finding Structure in Time": SimpleRNN.
    Ravanelli et al. 2018, "Light Gated Recurrent Units for Speech Recognition", sec. III: LiGRU, without their batch
        normalisation of x·kernel, which is a scale and a shift of kernel and bias in inference.
    Zhou et al. 2019, "Deep Interest Evolution Network for Click-Through Rate Prediction", interest evolving layer:
        attention, their AUGRU, with an update gate 1 - z. Their AGRU has z = 0 here, by the activation affine(0, 0).
    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 8 to 17: the sLSTM; their z is g here, and their
        initial m, minus infinity, follows from n = 0 here, for each row and unit. NX-AI's `xlstm` does this for a whole
        batch: if any n isn't 0, an m of 0 takes part in every maximum.
    Hasani et al. 2022, "Closed-form continuous-time neural networks": the CfC. Their f is s,
        their h is k, and our 1 - t is their σ(-f·τ), with an additional offset, -z_t, as in ncps. Their products with
        the state and x pass through a network first, the backbone: dense layers here, with backbone_units, or none, as
        in ncps's networks with wirings.
    Lei et al. 2018, "Simple Recurrent Units for Highly Parallelizable Recurrence", eq. 1 to 4: the SRU, without φ and
        a_s = x where x is as wide as the units.
    torchaudio's RNN-T (`torchaudio.models.RNNT`): layer_norm="joint".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.spec import STATES, CellSpec
from cellstack.reference.steps import ACTIVATIONS as ACTIVATIONS
from cellstack.reference.steps import CELLS, Array, Arrays

Mask = NDArray[np.bool_]


class Forward(NamedTuple):
    """Results of a forward pass. At masked steps the gates are zero, and `y` and `states` repeat the step before."""

    y: Array  # [B, T, P]
    state: Any  # after the last step, such as State(h, c): see `spec.STATES`
    gates: Array  # [B, T, planes, H], after the activations; then a GRU's q_g, with reset_after; an sLSTM's l
    states: tuple[Array, ...]  # [B, T, H], the states other than h, such as c of an LSTM
    tape: SimpleNamespace  # what `backward` needs

    @property
    def cells(self) -> Array | None:
        """The c of an LSTM `[B, T, H]`; None for kinds without it."""
        return dict(zip(self.state._fields[1:], self.states, strict=True)).get("c")


class Gradients(NamedTuple):
    """Gradients of a scalar loss; each has the shape of its argument."""

    x: Array
    state: Any  # w.r.t. the state before the first step, also if none was given
    arrays: Arrays


def _choose(rows: Mask, a: Sequence[Any], b: Sequence[Any]) -> list[Array]:
    """Return `a` where `rows [B, 1]` is True, else `b`, for each state."""
    return [np.where(rows, *pair) for pair in zip(a, b, strict=True)]


def _given(da: Any, a: Array) -> Array:
    return np.zeros_like(a) if da is None else np.asarray(da, np.float64)


def forward(
    spec: CellSpec,
    arrays: Mapping[str, Any],
    x: Any,
    state: Sequence[Any] | None = None,
    *,
    mask: Mask | None = None,
    reset: Mask | None = None,
    recurrent_dropout: Any = None,
    reverse: bool = False,
    patched: Callable[[str, int, Array, Any], Array] | None = None,
    **drawn: Any,
) -> Forward:
    """Run a cell over a sequence. Arguments of any dtype are converted to float64.

    Args:
        spec: the cell.
        arrays: its arrays by name, in the shapes of `spec.shapes`; matrices may be `BFloat16Array`.
        x: `[B, T, I]`.
        state: the state before the first step, h `[B, P]` and other states such as an LSTM's c `[B, H]`. None: the
            cell's initial state, `initial_h` and so on if it is learned, else zeros.
        mask: `[B, T]`, True where a step is used; at other steps the state keeps its value.
        reset: `[B, T]`, True where the state is set to the cell's initial state before the step (in the order of
            processing), also at masked steps.
        recurrent_dropout: `[B, P]`, factors of h_prev in the gates (0 or 1/(1-p)); of a LiGRU's candidate.
        reverse: run from the last step to the first; `y[:, t]` still belongs to `x[:, t]`.
        patched: a function that returns the new value of a gate or state, given its name, the step t, its value
            `[B, H]` and, for h and c, its value before the step. A gate is replaced right after its activation; c both
            before o and h use it, and after zoneout; h last. The backward pass doesn't support it.
        drawn: `zoneout` `[B, T, P]`, of an LSTM `zoneout_cell` `[B, T, H]`, and other masks of `Kind.zoneout`: 1 where
            the state keeps its value in a step, else 0. None: the cell's rate.

    Raises:
        TypeError: a mask that this kind doesn't have.

    >>> arrays = {"kernel": [[2.0]], "recurrent_kernel": [[1.0]], "bias": [0.0]}
    >>> forward(CellSpec(1, 1, "linear", kind="rnn"), arrays, [[[1.0], [1.0]]]).y.tolist()  # 2·1, then 2·1 + 2
    [[[2.0], [4.0]]]
    """
    cell, x = CELLS[spec.kind](spec, arrays), np.asarray(x, np.float64)
    rates, names = spec.zoneout_rates, spec.of_kind.zoneout
    for name in drawn.keys() - {*names.values()}:
        if drawn[name] is not None:
            raise TypeError(f"reference: {spec.of_kind.title} has no mask {name}")
    masks = {state: drawn.get(names.get(state, "")) for state in rates}
    batch, steps, _ = x.shape
    fresh = cell.initial_state(batch)
    now = fresh if state is None else [np.asarray(a, np.float64) for a in state]
    outs = [np.zeros((batch, steps, size)) for size in spec.state_sizes.values()]
    gates = np.zeros((batch, steps, spec.planes, spec.units))
    tape = SimpleNamespace(
        x=x,
        starts_fresh=state is None,
        order=range(steps)[:: -1 if reverse else 1],
        used=np.ones((batch, steps, 1), bool) if mask is None else np.asarray(mask, bool)[:, :, None],
        reset=np.zeros((batch, steps, 1), bool) if reset is None else np.asarray(reset, bool)[:, :, None],
        dropout=1.0 if recurrent_dropout is None else np.asarray(recurrent_dropout, np.float64),
        kept=[
            np.full((1, steps, 1), rate) if masks[state] is None else np.asarray(masks[state], np.float64)
            for state, rate in rates.items()
        ],
        steps=[_tape() for _ in range(steps)],
        patched=patched,
    )
    zeros = [0.0] * len(outs)
    cell.dropout = tape.dropout
    for t in tape.order:
        if patched is not None:
            cell.patched = lambda name, value, before, t=t: patched(name, t, value, before)
        s, used = tape.steps[t], tape.used[:, t]
        now = _choose(tape.reset[:, t], fresh, now)
        before = _choose(used, now, zeros)  # masked rows run on zeros, so that a NaN in them has no effect
        cell.step(s, cell.features(s, np.where(used, x[:, t], 0.0)), before[0] * tape.dropout, before)
        after = [k[:, t] * a + (1.0 - k[:, t]) * new for k, a, new in zip(tape.kept, before, s.state, strict=True)]
        after = [cell.patched(name, new, a) for name, new, a in zip(spec.state_sizes, after, before, strict=True)]
        now = _choose(used, after, now)
        for out, a in zip(outs, now, strict=True):
            out[:, t] = a
        gates[:, t] = np.where(used[:, None], np.stack(s.gates, axis=1), 0.0)
    return Forward(outs[0], STATES[spec.kind](*now), gates, tuple(outs[1:]), tape)


def pre_activations(
    spec: CellSpec,
    arrays: Mapping[str, Any],
    x: Any,
    before: Sequence[Any],
    patched: Callable[[str, Array, Any], Array] | None = None,
) -> dict[str, Array]:
    """Return the pre-activations of a step's gates, before any clip, each `[B, H]`, in the order of `spec.GATES`.

    A coupled forget gate, which is 1 - i, has none.

    Args:
        spec, arrays: the cell.
        x: `[B, I]`.
        before: the state before the step, h `[B, P]` and other states such as an LSTM's c `[B, H]`.
        patched: as for `forward`, without the argument t.

    >>> arrays = {"kernel": [[2.0]], "recurrent_kernel": [[1.0]], "bias": [0.5]}
    >>> pre_activations(CellSpec(1, 1, kind="rnn"), arrays, [[1.0]], [[[3.0]]])["g"].tolist()  # 2·1 + 1·3 + 0.5
    [[5.5]]
    """
    tape, state = _tape(), [np.asarray(a, np.float64) for a in before]
    cell = CELLS[spec.kind](spec, arrays)
    cell.patched = cell.patched if patched is None else patched
    cell.step(tape, cell.features(tape, np.asarray(x, np.float64)), state[0], state)
    return {gate: tape.sums[gate] for gate in spec.gates}


def _tape() -> SimpleNamespace:
    """Return an empty tape of one step."""
    return SimpleNamespace(factors={}, norms={}, slopes={}, sums={})


def backward(
    spec: CellSpec,
    arrays: Mapping[str, Any],
    out: Forward,
    *,
    dy: Any = None,
    dstate: Sequence[Any] | None = None,
    dgates: Any = None,
    dstates: Sequence[Any] | None = None,
) -> Gradients:
    """Backpropagate through `forward`.

    Args:
        spec, arrays: the cell of the forward pass.
        out: what `forward` returned.
        dy, dstate, dgates, dstates: gradients of the loss w.r.t. the fields `y`, `state`, `gates` and `states` of
            `out`; None, also as an entry: zeros. The gradient w.r.t. the planes after the gates is ignored.
    """
    cell, tape = CELLS[spec.kind](spec, arrays), out.tape
    cell.dropout = tape.dropout
    assert tape.patched is None, "the backward pass doesn't support patches"
    d = {name: np.zeros(shape) for name, shape in spec.shapes.items()}
    dx = np.zeros_like(tape.x)
    dgates = _given(dgates, out.gates)
    zeros, absent = [0.0] * len(out.state), [None] * len(out.state)
    given = [dy, *(absent[1:] if dstates is None else dstates)]
    douts = [_given(da, a) for da, a in zip(given, (out.y, *out.states), strict=True)]
    dnow = [_given(da, a) for da, a in zip(dstate or absent, out.state, strict=True)]
    for t in reversed(tape.order):
        used, kept = tape.used[:, t], [k[:, t] for k in tape.kept]
        dnow = [da + dout[:, t] for da, dout in zip(dnow, douts, strict=True)]
        dafter = _choose(used, dnow, zeros)
        dgate = np.moveaxis(np.where(used[:, None], dgates[:, t], 0.0), 1, 0)
        dnew = [(1.0 - k) * da for k, da in zip(kept, dafter, strict=True)]
        dx[:, t, : spec.features], dh_in, dbefore = cell.back(tape.steps[t], d, dnew, dgate)
        if spec.scalar:
            dx[:, t, -1:] = tape.steps[t].dscalar
        dbefore = [da + k * dkept for da, k, dkept in zip(dbefore, kept, dafter, strict=True)]
        dbefore[0] = dbefore[0] + dh_in * tape.dropout
        dnow = _choose(used, dbefore, dnow)
        cell.initial_state_back(d, _choose(tape.reset[:, t], dnow, zeros))
        dnow = _choose(tape.reset[:, t], zeros, dnow)
    if tape.starts_fresh:
        cell.initial_state_back(d, dnow)
    return Gradients(dx, STATES[spec.kind](*dnow), d)

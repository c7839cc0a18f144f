"""What the configurations of TiRex and TiRex-2 say about their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cellstack.cells.errors import FormatError

ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "GELU": "gelu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
ROUND_UP = 64  # the width of a feed-forward layer is a multiple of it
SLSTM, MLSTM = "bi-slstm", "bi-mlstm"  # the types of the blocks of TiRex-2; those of TiRex are of the first
SETTINGS = (  # of TiRex-2
    *("stack_config", "num_blocks", "embedding_dim", "h_expand", "input_ff_dim", "act_func", "stack_out_norm_config"),
    *("input_patch_size", "output_patch_size", "tokenizer_cfg", "scaler_cfg", "quantiles", "context_len", "future_len"),
    *("tta_diff", "tta_sign_flip"),
)
NO_EFFECT = ("dropout", "device", "matmul_precision", "postprocessor_cfg")  # on a forecast


@dataclass(frozen=True)
class Design:
    """What the configuration of a TiRex or a TiRex-2 says about its network.

    Attributes:
        version: 1 or 2.
        width: of the values between the blocks.
        blocks: `SLSTM` or `MLSTM`, one per block.
        heads: of each block.
        mixer_heads: of the attention between variates in each block; none in a TiRex.
        query_norm: whether this attention normalises its queries and keys.
        hidden: the widths of the hidden layers before and after the blocks.
        forward: the width of the feed-forward layers.
        activation: of the hidden layers before and after the blocks.
        out_epsilon: of the norm after the blocks; None: there is none.
        forecaster: what `TiRexForecaster` needs: see there.
    """

    version: int
    width: int
    blocks: tuple[str, ...]
    heads: tuple[int, ...]
    hidden: tuple[int, int]
    forward: int
    activation: str
    out_epsilon: float | None
    mixer_heads: tuple[int, ...] = ()
    query_norm: bool = True
    forecaster: dict[str, Any] = field(default_factory=dict)

    @property
    def patch(self) -> int:
        """The number of observations in a patch."""
        return self.forecaster["patch"]

    @property
    def outputs(self) -> int:
        """The width of the output: a patch for each quantile."""
        return self.patch * len(self.forecaster["quantiles"])


class Entries:
    """The entries of a configuration, which are checked when they are read."""

    def __init__(self, where: str, found: Any) -> None:
        if not isinstance(found, Mapping):
            raise FormatError(f"{where}: expected a dict, found {found!r:.80}")
        self.where, self.found = where, found

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return an entry of this type; `default` if there is none, unless that is None."""
        value = self.found.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(one.__name__ for one in kinds)
            raise FormatError(f"{self.where}: expected {key} to be of type {names}, found {value!r:.80}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise FormatError(f"{self.where}: expected {key} to be positive, found {value!r}")
        return value

    def inner(self, key: str) -> Entries:
        """Return an entry that is a dict."""
        return Entries(f"{self.where}: {key}", self.found.get(key))

    def only(self, known: Sequence[str]) -> None:
        """Refuse keys that aren't known: they might change the forecast."""
        for key in self.found:
            if key not in known:
                raise FormatError(f"{self.where}: {key!r} isn't supported; supported are {', '.join(known)}")

    def quantiles(self) -> list[float]:
        """Return the levels of the quantiles, in ascending order between 0 and 1, 0.5 among them."""
        levels = self.take("quantiles", (list, tuple))
        plain = all(isinstance(level, float) and 0 < level < 1 for level in levels)
        if not plain or sorted(set(levels)) != list(levels) or 0.5 not in levels:
            raise FormatError(f"{self.where}: expected ascending quantiles with 0.5, found {levels!r:.80}")
        return list(levels)


def design_of_first(where: str, settings: Any) -> Design:
    """Return the design of a TiRex.

    Args:
        where: the file, for messages.
        settings: the `hyper_parameters` of its checkpoint: `model_config` and `train_ctx_len`.

    Raises:
        FormatError: an entry is missing or has another type, or a value isn't supported.
    """
    top = Entries(f"{where}: hyper_parameters", settings)
    model = top.inner("model_config")
    blocks = model.inner("block_kwargs")
    patch, context = model.take("input_patch_size", int), top.take("train_ctx_len", int)
    if model.take("output_patch_size", int) != patch:
        raise FormatError(f"{model.where}: expected output_patch_size={patch}, as input_patch_size is")
    if context % patch:
        raise FormatError(f"{top.where}: expected train_ctx_len to be a multiple of {patch}, found {context}")
    for key in ("num_states", "num_gates"):
        if blocks.take(key, int, 4) != 4:
            raise FormatError(f"{blocks.where}: expected {key}=4, found {blocks.found[key]}")
    width, hidden = blocks.take("embedding_dim", int), model.take("input_ff_dim", int)
    count = blocks.take("num_blocks", int)
    return Design(
        1,
        width,
        (SLSTM,) * count,
        (_heads(blocks, "num_heads", width),) * count,
        (hidden, hidden),
        _rounded(width * blocks.take("ffn_proj_factor", (int, float), 2.6667)),
        "relu",
        1e-6,
        forecaster={"model": "TiRex", "patch": patch, "context": context, "quantiles": model.quantiles()},
    )


def design_of_second(where: str, settings: Any) -> Design:
    """Return the design of a TiRex-2 from its configuration, the content of `config.json`.

    Raises:
        FormatError: see `design_of_first`.
    """
    top = Entries(where, settings)
    top.only((*SETTINGS, "use_qk_norm", *NO_EFFECT))
    width, patch = top.take("embedding_dim", int), top.take("input_patch_size", int)
    context, future = top.take("context_len", int), top.take("future_len", int)
    tokens = top.inner("tokenizer_cfg")
    for key, value in {"output_patch_size": top.take("output_patch_size", int), **tokens.found}.items():
        if value != patch:
            raise FormatError(f"{where}: expected {key}={patch}, as input_patch_size is, found {value!r:.80}")
    for key, value in {"context_len": context, "future_len": future}.items():
        if value % patch:
            raise FormatError(f"{where}: expected {key} to be a multiple of {patch}, found {value}")
    blocks, heads, mixer_heads = _stack(top, width)
    scaler = top.inner("scaler_cfg")
    act = top.take("act_func", str).rpartition(".")[2]
    if act not in ACTIVATIONS:
        raise FormatError(f"{where}: expected act_func among {', '.join(ACTIVATIONS)}, found {act!r:.80}")
    norm = top.found.get("stack_out_norm_config")
    forecaster = {
        "model": "TiRex-2",
        "patch": patch,
        "context": context,
        "future": future,
        "quantiles": top.quantiles(),
        "epsilon": scaler.take("eps", (int, float), 1e-8),
        "arcsinh": scaler.take("use_arcsinh", bool, False),
        "binary": scaler.take("binaryaware", bool, False),
        "difference": top.take("tta_diff", bool, True),
        "sign_flip": top.take("tta_sign_flip", bool, False),
    }
    return Design(
        2,
        width,
        blocks,
        heads,
        (top.take("input_ff_dim", int), int(width * top.take("h_expand", (int, float)))),
        _rounded(width * 2.6667),
        ACTIVATIONS[act],
        None if norm is None else top.inner("stack_out_norm_config").take("eps", float, 1e-7),
        mixer_heads,
        top.take("use_qk_norm", bool, True),
        forecaster,
    )


def _stack(top: Entries, width: int) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """Return of each block of a TiRex-2 its kind, its number of heads, and that of its attention between variates."""
    stack = top.inner("stack_config")
    templates, recipe = stack.inner("templates"), stack.take("recipe", (list, tuple))
    if len(recipe) != top.take("num_blocks", int):
        raise FormatError(f"{stack.where}: expected a recipe of {top.found['num_blocks']} blocks, found {len(recipe)}")
    kinds, heads, mixer_heads = [], [], []
    for name in recipe:
        mixer = templates.inner(name).inner("time_mixer")
        mixer.only(("model_type", "embedding_dim", "num_heads", "num_slstm_heads", "device", "rnn_backend"))
        kind = mixer.take("model_type", str)
        if kind not in (SLSTM, MLSTM):
            raise FormatError(f"{mixer.where}: expected model_type {SLSTM} or {MLSTM}, found {kind!r:.80}")
        if mixer.take("embedding_dim", int) != width:
            raise FormatError(f"{mixer.where}: expected embedding_dim={width}, found {mixer.found['embedding_dim']}")
        own = kind == SLSTM and mixer.found.get("num_slstm_heads") is not None
        between = templates.inner(name).inner("variate_mixer")
        between.only(("embedding_dim", "num_heads", "use_flex_attention"))
        if between.take("embedding_dim", int) != width:
            raise FormatError(
                f"{between.where}: expected embedding_dim={width}, found {between.found['embedding_dim']}"
            )
        mixer_heads.append(_heads(between, "num_heads", width))
        kinds.append(kind)
        heads.append(_heads(mixer, "num_slstm_heads" if own else "num_heads", width))
    return tuple(kinds), tuple(heads), tuple(mixer_heads)


def _heads(entries: Entries, key: str, width: int) -> int:
    heads = entries.take(key, int)
    if width % heads:
        raise FormatError(f"{entries.where}: expected {key} to divide embedding_dim={width}, found {heads}")
    return heads


def _rounded(width: float) -> int:
    return int((width + ROUND_UP - 1) // ROUND_UP) * ROUND_UP

"""TiRex and TiRex-2 as networks: from their configuration and the tensors of their state dict.

The networks take patches of a scaled series, `[B, T, 2·patch]`: the values, with zeros where they are missing, then 1
for each value that is there and 0 for each that is missing. They return quantiles of the patch that follows each patch,
`[B, T, quantiles·patch]`, and each step depends on earlier steps only. Each row is a series by itself; the parts of a
TiRex-2 for series that are forecast together are `Skipped` nodes. `cellstack.train.TiRexForecaster` runs these, and
computes what comes before and after; `docs/tirex.md` describes it.

Ref: Auer et al. 2025, "TiRex: Zero-Shot Forecasting Across Long and Short Horizons with Enhanced In-Context Learning";
Podest et al. 2026, "TiRex-2: Generalizing TiRex to Multivariate Data and Streaming".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.formats.files import parse
from cellstack.formats.tirex.blocks import network
from cellstack.formats.tirex.design import design_of_first, design_of_second
from cellstack.network import Network

CONFIG = "config.json"


def of_checkpoint(path: str, root: Any) -> Network | None:
    """Return the network of a file of `torch.save` that holds a TiRex or a TiRex-2; None if it holds another model.

    Raises:
        FormatError: a configuration or tensors that aren't supported.
    """
    tensors = root.get("state_dict", root) if isinstance(root, Mapping) else {}
    if isinstance(tensors, Mapping) and is_second(tensors):
        return of_folder(path, tensors)
    settings = root.get("hyper_parameters") if isinstance(root, Mapping) else None
    model = settings.get("model_config") if isinstance(settings, Mapping) else None
    if not isinstance(model, Mapping) or "block_kwargs" not in model or not isinstance(tensors, Mapping):
        return None
    return network(path, design_of_first(path, settings), tensors)


def is_second(names: Iterable[Any]) -> bool:
    """Return whether tensors have the names of a TiRex-2."""
    return any(isinstance(name, str) and name.endswith(".time_mixer.norm_lstm.weight") for name in names)


def of_folder(path: str, tensors: Mapping[str, Any]) -> Network:
    """Return the network of a TiRex-2, whose configuration is next to its weights.

    Raises:
        FormatError: a configuration or tensors that aren't supported, or no configuration.
    """
    config = Path(path).with_name(CONFIG)
    if not config.is_file():
        raise FormatError(
            f"{path}: expected {CONFIG}, the configuration of this TiRex-2, next to it, found no such file; "
            "model-config.yaml, which older downloads have, isn't supported"
        )
    return of_config(str(config), parse(str(config), config.read_bytes()), tensors)


def of_config(where: str, settings: Any, tensors: Mapping[str, Any]) -> Network:
    """Return the network of a TiRex-2.

    Raises:
        FormatError: a configuration or tensors that aren't supported.
    """
    return network(where, design_of_second(where, settings), tensors)


def of_module(module: Any) -> Network | None:
    """Return the network of a model of the packages tirex-ts and tirex-2 in memory; None if it is another module.

    Args:
        module: a `TiRexZero`, a `TiRex2`, or the `ForecastModel` around a `TiRex2`.

    Raises:
        FormatError: a configuration that isn't supported.
    """
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__]
    if "tirex2.api_adapter.forecast.ForecastModel" in kinds:
        return of_module(module.model)
    if "tirex.models.tirex.TiRexZero" in kinds:
        settings = asdict(module.config)
        design = design_of_first("TiRexZero", {"model_config": settings, "train_ctx_len": settings["train_ctx_len"]})
    elif "tirex2.model.tirex2.TiRex2" in kinds:
        design = design_of_second("TiRex2", _settings(module))
    else:
        return None
    tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return network(type(module).__name__, design, tensors)


def _settings(model: Any) -> dict[str, Any]:
    """Return the configuration of a TiRex-2 in memory, as it would be in its file."""
    stack, norm = model.stack_config, model.stack_out_norm
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    kept, query_norms = {}, {template.variate_mixer.use_qk_norm for template in stack.templates.values()}
    for name, template in stack.templates.items():
        parts = {part: vars(getattr(template, part)) for part in ("time_mixer", "variate_mixer")}
        kept[name] = {
            part: {key: value for key, value in found.items() if key not in ("act_fn", "use_qk_norm")}
            for part, found in parts.items()
        }
    tokens = ("output_patch_size", "input_patch_size", "input_patch_stride")
    return {
        "stack_config": {
            "templates": kept,
            "recipe": list(stack.recipe),
        },
        "num_blocks": len(model.stack),
        **{name: getattr(model, name) for name in ("embedding_dim", "input_patch_size", "output_patch_size")},
        **{name: getattr(model, name) for name in ("h_expand", "context_len", "future_len", "input_ff_dim")},
        **{name: getattr(model, name) for name in ("tta_diff", "tta_sign_flip")},
        "quantiles": [round(float(level), 6) for level in model.quantiles],
        "tokenizer_cfg": {name: getattr(model.tokenizer, name) for name in tokens},
        "scaler_cfg": {name: getattr(model.scaler, name) for name in ("eps", "use_arcsinh", "binaryaware")},
        "act_func": type(model.act_func).__name__,
        "use_qk_norm": query_norms.pop() if len(query_norms) == 1 else "of some templates only",
        "stack_out_norm_config": None if epsilon is None else {"eps": epsilon},
    }

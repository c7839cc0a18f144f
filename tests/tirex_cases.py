"""Small TiRex models with random weights, and series: for the tests, and for the packages that they are compared with.

As a program, `python tests/tirex_cases.py OUT.npz` writes what the packages tirex-ts and tirex-2 return for them.
"""

import sys
import zlib

import numpy as np

WIDTH, HEADS, PATCH, CONTEXT, FUTURE, HIDDEN, FORWARD = 32, 4, 4, 32, 24, 24, 128
QUANTILES = [0.1, 0.3, 0.5, 0.7, 0.9]
HORIZON = 11

FIRST = {
    "model_config": {
        "input_patch_size": PATCH,
        "output_patch_size": PATCH,
        "quantiles": QUANTILES,
        "block_kwargs": {"num_blocks": 2, "embedding_dim": WIDTH, "num_heads": HEADS},
        "input_ff_dim": HIDDEN,
    },
    "train_ctx_len": CONTEXT,
}


def template(kind):
    """Return the configuration of a block of a TiRex-2."""
    mixer = {"embedding_dim": WIDTH, "num_heads": HEADS}
    return {"time_mixer": {"model_type": kind, **mixer}, "variate_mixer": mixer, "dropout": 0.0, "eps": 1e-6}


SECOND = {
    "stack_config": {
        "templates": {"s": template("bi-slstm"), "m": template("bi-mlstm")},
        "recipe": ["s", "m", "s"],
    },
    "num_blocks": 3,
    "embedding_dim": WIDTH,
    "input_patch_size": PATCH,
    "output_patch_size": PATCH,
    "quantiles": QUANTILES,
    "tokenizer_cfg": {"output_patch_size": PATCH, "input_patch_size": PATCH, "input_patch_stride": PATCH},
    "scaler_cfg": {"eps": 1e-8, "use_arcsinh": True, "binaryaware": True},
    "h_expand": 1.5,
    "context_len": CONTEXT,
    "future_len": FUTURE,
    "input_ff_dim": HIDDEN,
    "act_func": "torch.nn.SiLU",
    "dropout": 0.0,
    "stack_out_norm_config": {"eps": 1e-7, "use_rmsnorm": False},
    "tta_diff": True,
    "tta_sign_flip": False,
}


def shapes(first):
    """Return the shapes of a model's tensors by name, each weight once."""
    size, out = WIDTH // HEADS, len(QUANTILES) * PATCH
    found = {}

    def hidden_layer(name, inputs, hidden, outputs):
        layers = (("hidden", inputs, hidden), ("output", hidden, outputs), ("residual", inputs, outputs))
        for layer, before, after in layers:
            found[f"{name}.{layer}_layer.weight"], found[f"{name}.{layer}_layer.bias"] = (after, before), (after,)

    hidden_layer("input_patch_embedding", 2 * PATCH, HIDDEN, WIDTH)
    for number, kind in enumerate("ss" if first else SECOND["stack_config"]["recipe"]):
        block = f"blocks.{number}" if first else f"stack.{number}.time_mixer"
        layer = f"{block}.slstm_layer" if first else f"{block}.fwd_cell"
        found[f"{block}.{'norm_slstm' if first else 'norm_lstm'}.weight"] = found[f"{block}.norm_ffn.weight"] = (WIDTH,)
        found |= {f"{block}.ffn.{name}.weight": (FORWARD, WIDTH) for name in ("proj_up_gate", "proj_up")}
        found[f"{block}.ffn.proj_down.weight"] = (WIDTH, FORWARD)
        if kind == "s":
            found |= {f"{layer}.{gate}gate.weight": (HEADS, size, size) for gate in "fizo"}
            found[f"{layer}.group_norm.weight"] = (WIDTH,)
            cell = f"{layer}.slstm_cell" if first else layer
            found[f"{cell}._recurrent_kernel_"] = (HEADS, size, 4 * size) if first else (HEADS, size, 4, size)
            found[f"{cell}._bias_"] = (4 * WIDTH,) if first else (HEADS, 4, size)
        else:
            found |= {f"{layer}.{name}.weight": (WIDTH // 2, WIDTH) for name in "qk"}
            found |= {f"{layer}.{name}.weight": (WIDTH, WIDTH) for name in ("v", "ogate_preact", "out_proj")}
            found |= {f"{layer}.{gate}gate_preact.weight": (HEADS, WIDTH) for gate in "if"}
            found |= {f"{layer}.{gate}gate_preact.bias": (HEADS,) for gate in "if"}
            found[f"{layer}.multihead_norm.weight"] = (WIDTH,)
        if not first:  # for covariates and several series
            mixer = f"stack.{number}.variate_mixer"
            found[f"{block}.combination.weight"] = (WIDTH, 2 * WIDTH)
            found |= {f"{mixer}.{name}.weight": (WIDTH,) for name in ("norm_attn", "norm_ffn")}
            found |= {f"{mixer}.attn.W{name}.weight": (WIDTH, WIDTH) for name in "KQVO"}
            found |= {f"{mixer}.ffn.wi.weight": (4 * WIDTH, WIDTH), f"{mixer}.ffn.wo.weight": (WIDTH, 4 * WIDTH)}
    found["out_norm.weight" if first else "stack_out_norm.weight"] = (WIDTH,)
    hidden_layer("output_patch_embedding", WIDTH, HIDDEN if first else int(1.5 * WIDTH), out)
    return found


def weights(first):
    """Return random weights of a model by name: float32, the same for every caller."""
    found = {}
    for name, shape in shapes(first).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        inputs = shape[1] if "recurrent_kernel" in name else shape[-1]
        deviation = 0.3 if len(shape) == 1 or name.endswith("_bias_") else inputs**-0.5
        # The first TiRex adds 1 to the gain of the norm of a head.
        mean = 1.0 if "norm" in name.split(".")[-2] and not (first and "group_norm" in name) else 0.0
        found[name] = (mean + deviation * rng.normal(size=shape)).astype(np.float32)
    return found


def tokens():
    """Return an input of the networks, `[2, 10, 2·PATCH]`."""
    rng = np.random.default_rng(1)
    there = rng.random((2, 10, PATCH)) < 0.9
    return np.concatenate([np.where(there, rng.normal(size=there.shape), 0.0), there], axis=2).astype(np.float32)


def series(steps):
    """Return series `[4, steps]`: with a trend, a random walk, zeros and ones, with missing values."""
    rng = np.random.default_rng(2)
    x = 5 + rng.normal(size=(4, 100)).cumsum(axis=1)
    x[0] += 2 * np.arange(100)
    x[2] = rng.random(100) < 0.3
    x[3, rng.random(100) < 0.2] = np.nan
    return x[:, :steps].astype(np.float32)


def expected():
    """Return what the packages compute, by name."""
    import torch
    from tirex.models.slstm.cell import sLSTMCell
    from tirex.models.tirex import TiRexZero
    from tirex2.model import TiRex2
    from tirex2.model.types import TimeseriesType

    import cellstack as cs

    def recurrence(self, x, state):  # as in the package, but in float32 instead of bfloat16
        bias = self._bias_.reshape(HEADS, 4, -1).permute(1, 0, 2).reshape(-1)
        return self._impl_forward_torch(x.reshape(*x.shape[:2], -1), state, self._recurrent_kernel_, bias)

    def load(model, first):
        own = {name: torch.from_numpy(array) for name, array in weights(first).items()}
        left = set(model.state_dict()) - set(own)
        assert set(own) <= set(model.state_dict())
        assert all(first is False and (".rev_cell." in name or name.endswith("recurrent_kernel")) for name in left)
        model.load_state_dict(own, strict=False)
        return model.eval()

    def from_torch_agrees(model, expected):
        assert np.abs(cs.load(model)(tokens()) - expected).max() < 1e-3

    def alone(rows):
        return [TimeseriesType(torch.from_numpy(row[None]), None, None) for row in rows]

    found = {}
    first = load(TiRexZero(backend="torch", **FIRST), True)
    found["first rounded"] = first._forecast_quantiles(torch.from_numpy(series(40)), HORIZON)[0].numpy()
    sLSTMCell._impl_torch = recurrence
    with torch.no_grad():
        found["first"] = first._forward_model(torch.from_numpy(tokens())).numpy()
    from_torch_agrees(first, found["first"])
    for steps in (10, 40):
        for together in (1, 2):
            x = torch.from_numpy(series(steps))
            options = {"max_accelerated_rollout_steps": together}
            found[f"first {steps} {together}"] = first._forecast_quantiles(x, HORIZON, **options)[0].numpy()
    second = load(TiRex2(**SECOND, device="cpu"), False)
    with torch.no_grad():
        masks = {
            "target_mask": torch.ones(2, dtype=torch.bool),
            "known_covariate_mask": torch.zeros(2, dtype=torch.bool),
        }
        x = second.input_patch_embedding(torch.from_numpy(tokens()))
        for block in second.stack:
            x, _ = block(x, group_vector=torch.arange(2.0), **masks)
        found["second"] = second.output_patch_embedding(second.stack_out_norm(x)).numpy()
    from_torch_agrees(second, found["second"])
    for steps in (10, 40):
        for name, options in {"": {}, " short": {"pad_context": False}, " flip": {"tta_sign_flip": True}}.items():
            made = second.predict(alone(series(steps)), HORIZON, **options)
            found[f"second {steps}{name}"] = np.stack([one[0].numpy().T for one in made])
    # The forecast from 28 observations, with the differences and the scale of the first 20: what a stream returns.
    begun = second.postprocessor.transform_input(
        [row.target for row in alone(series(20))], 1, past_covariates=[None] * 4, past_future_covariates=[None] * 4
    )[0]["x"]
    state = second.scaler.scale(begun)[1]
    flags = second.postprocessor._detect_trends(torch.from_numpy(series(20)))

    def scale(x):
        loc, deviation, binary = state
        scaled = (x - loc) / deviation
        return torch.where(binary, scaled, torch.arcsinh(scaled)), state

    second.scaler.scale = scale
    rows = iter(flags)
    second.postprocessor._detect_trends = lambda row: [next(rows)]
    made = second.predict(alone(series(28)), HORIZON, pad_context=False)
    found["second stream"] = np.stack([one[0].numpy().T for one in made])
    return found


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **expected())

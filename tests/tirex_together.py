"""TiRex-2 forecasts of random groups with random covariates, by the package tirex-2 and by cellstack.

    python tests/tirex_together.py COUNT

prints the largest difference over COUNT configurations, relative to the largest value of each.
"""

import sys

import numpy as np
import tirex_cases as cases
import torch

import cellstack as cs
from cellstack.train import TiRexForecaster

TYPES = ("targets", "past", "known")


def drawn(seed):
    """Return a random configuration: the settings of a model, groups as dicts of arrays, a horizon, and `pad`."""
    rng = np.random.default_rng([7, seed])

    def choice(*values):
        return values[rng.integers(len(values))]

    settings = {
        **cases.SECOND,
        "use_qk_norm": choice(True, True, False),
        "tta_sign_flip": choice(False, False, True),
        "tta_diff": choice(True, True, False),
        "scaler_cfg": {"eps": 1e-8, "use_arcsinh": choice(True, True, False), "binaryaware": choice(True, False)},
        "act_func": choice("torch.nn.SiLU", "torch.nn.ReLU"),
        "stack_out_norm_config": choice(None, {"eps": 1e-7, "use_rmsnorm": False}, {"eps": 1e-6, "use_rmsnorm": True}),
    }
    recipe = [choice("s", "m") for _ in range(3)]
    settings["stack_config"] = {**cases.SECOND["stack_config"], "recipe": recipe}
    horizon, groups = int(rng.integers(1, cases.FUTURE + 1)), []

    def rows(count, steps):
        x = 5 * rng.normal() + rng.normal(size=(count, steps)).cumsum(axis=1)
        for row in x:
            kind = rng.integers(6)
            row += 2 * np.arange(steps) * (kind == 0)
            row[:] = rng.random(steps) < 0.3 if kind == 1 else row
            row[rng.random(steps) < choice(0.0, 0.2, 1.0 if kind == 2 else 0.1)] = np.nan
        return x.astype(np.float32)

    for _ in range(rng.integers(1, 4)):
        steps = int(choice(3, 10, 31, 32, 33, 50, 70))
        past, known = (int(choice(0, 0, 1, 3)) for _ in range(2))
        ahead = rows(known, steps + horizon)
        ahead[: int(rng.random() < 0.2), steps:] = np.nan  # known in name only
        groups.append({"targets": rows(rng.integers(1, 4), steps), "past": rows(past, steps), "known": ahead})
    return settings, groups, horizon, choice(True, False)


def model_of(settings):
    """Return the package's model with random weights."""
    from tirex2.model import TiRex2

    torch.manual_seed(0)
    model = TiRex2(**settings, device="cpu").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "bias" in name:
                weight.normal_(std=0.3 if "bias" in name else weight.shape[1 if "recurrent" in name else -1] ** -0.5)
            else:
                weight.normal_(1.0, 0.3)
    return model


def theirs(model, groups, horizon, pad):
    """Return the package's forecasts, `[V, horizon, Q]` of each group."""
    from tirex2.model.types import TimeseriesType

    given = [
        TimeseriesType(*(torch.from_numpy(group[name]) if len(group[name]) else None for name in TYPES))
        for group in groups
    ]
    return [made.numpy().swapaxes(1, 2) for made in model.predict(given, horizon, pad_context=pad)]


def ours(model, groups, horizon, pad):
    """Return cellstack's."""
    targets, past, known = ([group[name] for group in groups] for name in TYPES)
    return TiRexForecaster(cs.load(model)).forecast(targets, horizon, past=past, known=known, pad=pad)


def difference(seed):
    """Return the largest difference of a random configuration, relative to the largest value.

    The package computes with float64: with float32, it rounds the scaling of series whose spread is small.
    """
    settings, groups, horizon, pad = drawn(seed)
    model = model_of(settings)
    found = ours(model, groups, horizon, pad)
    wide = [{name: rows.astype(np.float64) for name, rows in group.items()} for group in groups]
    expected = theirs(model.double(), wide, horizon, pad)
    largest = [np.abs(one).max() for one in expected]
    return max(np.abs(a - b).max() / c for a, b, c in zip(found, expected, largest, strict=True))


if __name__ == "__main__":
    print(max(difference(seed) for seed in range(int(sys.argv[1]))))

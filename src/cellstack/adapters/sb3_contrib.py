"""sb3-contrib's `RecurrentPPO` on our kernel: one call per batch of sequences, even if episodes start within them.

Ref: sb3-contrib, `RecurrentActorCriticPolicy`, https://sb3-contrib.readthedocs.io/en/master/modules/ppo_recurrent.html
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import Tensor

from cellstack.layers.accelerate import accelerate as accelerate_modules
from cellstack.layers.accelerate import packed_weights
from cellstack.layers.accelerate import restore as restore_modules

__all__ = ["accelerate", "restore"]

_STEP = "_process_sequence"  # the method that runs the LSTMs of a recurrent policy
_ORIGINAL = "_cellstack_original"  # the attribute for a model's original class


def accelerate(model: Any) -> Any:
    """Make our kernel run a `RecurrentPPO` in rollouts and training; change the model in place.

    Its LSTMs are accelerated (`cellstack.accelerate`) and keep their parameters, and its policy runs a batch of
    sequences in one call with `reset=` instead of step by step. Training, saving and predicting work as before: saved
    models load without cellstack; call this function again for a loaded model.

    Args:
        model: a `RecurrentPPO`, or a `RecurrentActorCriticPolicy`; on the CPU.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a recurrent policy of sb3-contrib, or one that overrides `_process_sequence`.
        ValueError: the policy isn't on the CPU.

    >>> import gymnasium
    >>> from sb3_contrib import RecurrentPPO
    >>> model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), n_steps=32, device="cpu", seed=0)
    >>> accelerate(model).learn(64).num_timesteps
    64
    """
    policy = _policy_of("accelerate", model)
    if policy.device.type != "cpu":
        raise ValueError(f'accelerate: expected a policy on the CPU, got one on {policy.device}: pass device="cpu"')
    if getattr(type(policy), _STEP) is not RecurrentActorCriticPolicy._process_sequence:
        raise TypeError(
            f"accelerate: policies that override {_STEP} aren't supported, got {type(policy).__name__}: "
            "cellstack.accelerate(policy) accelerates only its LSTMs"
        )
    accelerate_modules(policy)
    policy._process_sequence = _process_sequence
    if model is not policy and not hasattr(model, _ORIGINAL):
        model.__class__ = _with_rollouts(type(model))
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate` in place.

    Args:
        model: the accelerated model.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a recurrent policy of sb3-contrib.
    """
    policy = _policy_of("restore", model)
    vars(policy).pop(_STEP, None)
    restore_modules(policy)
    if hasattr(model, _ORIGINAL):
        model.__class__ = getattr(model, _ORIGINAL)
    return model


@lru_cache(maxsize=64)
def _with_rollouts(kind: type[RecurrentPPO]) -> type[RecurrentPPO]:
    """Return a subclass that packs the weights once per rollout, during which they don't change."""

    def collect_rollouts(self: Any, *args: Any, **kwargs: Any) -> bool:
        with packed_weights(self.policy):
            return kind.collect_rollouts(self, *args, **kwargs)

    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**own, "collect_rollouts": collect_rollouts, _ORIGINAL: kind})


def _policy_of(owner: str, model: Any) -> Any:
    policy = model.policy if isinstance(model, RecurrentPPO) else model
    if not isinstance(policy, RecurrentActorCriticPolicy):
        raise TypeError(f"{owner}: expected a RecurrentPPO or its policy, got {type(model).__name__}")
    return policy


def _process_sequence(
    features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the LSTM's output `[rows · T, H]` and its states, for rows of T steps one after another.

    Where `episode_starts [rows · T]` is not zero, the states before that step are zeros.
    """
    rows = lstm_states[0].shape[1]
    x = features.reshape(rows, -1, lstm.input_size).swapaxes(0, 1)  # [T, rows, I]
    reset = episode_starts.reshape(rows, -1).swapaxes(0, 1) != 0
    y, states = lstm(x, lstm_states, reset=reset)
    return y.swapaxes(0, 1).flatten(0, 1), states

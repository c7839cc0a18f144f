"""sb3-contrib's `RecurrentPPO` on our kernel: a batch of episodes as one call, wherever in it an episode starts.

Ref: sb3-contrib, `RecurrentActorCriticPolicy`, https://sb3-contrib.readthedocs.io/en/master/modules/ppo_recurrent.html
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cellstack.layers.accelerate import accelerate as accelerate_modules
from cellstack.layers.accelerate import restore as restore_modules

__all__ = ["accelerate", "restore"]

_STEP = "_process_sequence"  # what every pass of a recurrent policy over its LSTMs goes through
_TAKES = ("features", "lstm_states", "episode_starts", "lstm")


def accelerate(model: Any) -> Any:
    """Let a `RecurrentPPO` collect and train on our kernel, in place.

    Its LSTMs become ours (`cellstack.accelerate`), with the same parameters, and its policy runs a batch of sequences
    in one call with `reset=` where it ran step by step. What it learns, saves and predicts stays its own: a saved model
    is loaded without cellstack, and a loaded one is given to this function again.

    Args:
        model: a `RecurrentPPO`, or a `RecurrentActorCriticPolicy` by itself; on the CPU.

    Returns:
        `model` itself.

    Raises:
        TypeError: no recurrent policy of sb3-contrib's, or one with another `_process_sequence` than its own.
        ValueError: a policy that isn't on the CPU.

    >>> import gymnasium
    >>> from sb3_contrib import RecurrentPPO
    >>> model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), n_steps=32, device="cpu", seed=0)
    >>> accelerate(model).learn(64).num_timesteps
    64
    """
    policy = _policy_of(model)
    if policy.device.type != "cpu":
        raise ValueError(f'accelerate: expected a policy on the CPU, got one on {policy.device}: give device="cpu"')
    accelerate_modules(policy)
    policy._process_sequence = _process_sequence
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`, in place.

    Args:
        model: what was given to `accelerate`.

    Returns:
        `model` itself.

    Raises:
        TypeError: no recurrent policy of sb3-contrib's.
    """
    policy = _policy_of(model)
    vars(policy).pop(_STEP, None)
    restore_modules(policy)
    return model


def _policy_of(model: Any) -> Any:
    policy = model if isinstance(model, nn.Module) else getattr(model, "policy", None)
    own = getattr(type(policy), _STEP, None)
    if own is None:
        raise TypeError(f"accelerate: expected a RecurrentPPO or its policy, got {type(model).__name__}")
    code = own.__code__
    if own.__module__.split(".")[0] != "sb3_contrib" or code.co_varnames[: code.co_argcount] != _TAKES:
        raise TypeError(
            f"accelerate: expected sb3-contrib's {_STEP}({', '.join(_TAKES)}), got another one, of {own.__module__}: "
            "cellstack.accelerate(model.policy) swaps the LSTMs alone"
        )
    return policy


def _process_sequence(
    features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the LSTM's output `[rows · T, H]` and its states, for rows of T steps that lie one after another.

    Where `episode_starts [rows · T]` is not zero, the states before that step are zeros.
    """
    rows = lstm_states[0].shape[1]
    x = features.reshape(rows, -1, lstm.input_size).swapaxes(0, 1)  # [T, rows, I]
    reset = episode_starts.reshape(rows, -1).swapaxes(0, 1) != 0
    y, states = lstm(x, lstm_states, reset=reset)
    return y.swapaxes(0, 1).flatten(0, 1), states

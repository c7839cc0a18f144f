"""Policies with a memory, from packages for reinforcement learning."""

import torch

from programs.harness import program, skip_init
from programs.needs import NEEDS

STEPS = ((2, 1), (1, 1), (5, 1))  # calls that take one step


@program("torchrl: LSTM", *NEEDS["torchrl"], cells=True, streams=True)
def torchrl_lstm():
    from torchrl.modules import LSTM

    return LSTM(6, 64, num_layers=2), lambda rows, steps: (torch.randn(rows, steps, 6),)


@program("torchrl: GRU", *NEEDS["torchrl"], cells=True, streams=True)
def torchrl_gru():
    from torchrl.modules import GRU

    return GRU(6, 64, num_layers=2), lambda rows, steps: (torch.randn(rows, steps, 6),)


def _rsl(kind):
    from rsl_rl.models import RNNModel
    from tensordict import TensorDict

    seen = TensorDict({"policy": torch.zeros(1, 6)}, batch_size=[1])
    return RNNModel(seen, {"actor": ["policy"]}, "actor", 3, [32], rnn_type=kind, rnn_hidden_dim=64, rnn_num_layers=1)


@program("rsl-rl: RNNModel.as_onnx", *NEEDS["rsl-rl"], sizes=STEPS, streams=True)
def rsl_exported():
    module = _rsl("lstm").as_onnx()
    return module, lambda rows, steps: (torch.randn(rows, 6), torch.randn(1, rows, 64), torch.randn(1, rows, 64))


@program("tianshou: Recurrent", *NEEDS["tianshou"], streams=True)
def tianshou_recurrent():
    from tianshou.utils.net.common import Recurrent

    module = Recurrent(layer_num=2, state_shape=6, action_shape=3, hidden_layer_size=64)
    return module, lambda rows, steps: (torch.randn(rows, steps, 6),)


@program("tianshou: RecurrentActorProb", *NEEDS["tianshou"], runtime=True)
def tianshou_actor():
    from tianshou.utils.net.continuous import RecurrentActorProb

    module = RecurrentActorProb(layer_num=1, state_shape=[6], action_shape=[3], hidden_layer_size=64)
    return module, lambda rows, steps: (torch.randn(rows, steps, 6),)


@program("tianshou: RecurrentCritic", *NEEDS["tianshou"])
def tianshou_critic():
    from tianshou.utils.net.continuous import RecurrentCritic

    module = RecurrentCritic(1, [6], [3], 64)
    return module, lambda rows, steps: (torch.randn(rows, steps, 6), torch.randn(rows, 3))


@program(
    "sb3-contrib: RecurrentActorCriticPolicy",
    *NEEDS["sb3-contrib"],
    sizes=STEPS,
    served=2,
    runtime=True,
)
def sb3_policy():
    import numpy as np
    from gymnasium import spaces
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    sides = spaces.Box(-1, 1, (6,), np.float32), spaces.Box(-1, 1, (3,), np.float32)
    module = RecurrentActorCriticPolicy(*sides, lambda _: 1e-3, lstm_hidden_size=64)

    def call(rows, steps):
        pairs = [tuple(torch.randn(1, rows, 64) for _ in "hc") for _ in range(2)]
        return torch.randn(rows, 6), RNNStates(*pairs), torch.zeros(rows), True

    return module, call


@program("rl_games: LSTMWithDones", *NEEDS["rl_games"], streams=True)
def rl_games_lstm():
    for package in ("rl_games", "rl_games.common", "rl_games.common.layers"):
        skip_init(package)
    from rl_games.common.layers.recurrent import LSTMWithDones

    def call(rows, steps):
        return torch.randn(steps, rows, 6), (torch.randn(1, rows, 64), torch.randn(1, rows, 64))

    return LSTMWithDones(6, 64), call

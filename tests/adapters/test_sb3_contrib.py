"""RecurrentPPO on our kernel compared with the original: batches of episodes, training, saved models."""

import copy
import zipfile

import gymnasium
import pytest
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.logger import Logger
from torch import nn

import cellstack as cs
from cellstack.adapters import sb3_contrib


def ppo(**settings):
    # Plain gradient descent, as Adam turns the rounding error of a gradient near zero into a full step.
    lstm = {"lstm_hidden_size": 16, "optimizer_class": torch.optim.SGD, **settings}
    env = gymnasium.make("CartPole-v1")
    model = RecurrentPPO(
        "MlpLstmPolicy", env, n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu", policy_kwargs=lstm
    )
    model.set_logger(Logger(None, []))  # its own logger makes a folder for temporary files
    return model


def pass_over(policy, lstm, given):
    """Return the output, the states and the gradients of one pass of a policy over one of its LSTMs."""
    features, states, starts = (one.clone() if isinstance(one, torch.Tensor) else one for one in given)
    features.requires_grad_()
    policy.zero_grad()
    y, ends = policy._process_sequence(features, states, starts, lstm)
    (y.square().sum() + ends[1].sum()).backward()
    return [y, *ends, features.grad, *(weight.grad.clone() for weight in lstm.parameters())]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("where", ["nowhere", "first step", "anywhere"])
def test_a_batch_of_episodes_equals_the_step_by_step_run(layers, where):
    model = ppo(n_lstm_layers=layers)
    model.policy.double()
    lstm, rows, steps = model.policy.lstm_actor, 5, 9
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    starts = torch.zeros(rows, steps, dtype=torch.float64)
    starts[:, 0] = where == "first step"
    if where == "anywhere":
        starts = (torch.rand(rows, steps, generator=generator) < 0.3).double()
        assert starts[:, 1:].sum() > 5
    given = draw(rows * steps, lstm.input_size), (draw(layers, rows, 16), draw(layers, rows, 16)), starts.flatten()
    expected = pass_over(model.policy, lstm, given)
    sb3_contrib.accelerate(model)
    for came, wanted in zip(pass_over(model.policy, lstm, given), expected, strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-10, atol=1e-12)
    if where == "anywhere":  # an episode start changes the results
        unlike = pass_over(model.policy, lstm, (*given[:2], torch.zeros_like(given[2])))
        assert (unlike[0] - expected[0]).abs().max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [{}, {"n_lstm_layers": 2}, {"enable_critic_lstm": False}, {"shared_lstm": True, "enable_critic_lstm": False}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_training_gives_the_same_weights(settings):
    theirs, ours = ppo(**settings), sb3_contrib.accelerate(ppo(**settings))
    initial = copy.deepcopy(theirs.policy.state_dict())
    for model in (theirs, ours):
        model.set_random_seed(0)
        model.learn(256)
    moved = max((a - b).abs().max() for a, b in zip(initial.values(), theirs.policy.state_dict().values(), strict=True))
    assert moved > 1e-4
    for name, wanted in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], wanted, rtol=0, atol=1e-6, msg=name)


def test_saved_models_load_without_cellstack(tmp_path):
    model = sb3_contrib.accelerate(ppo())
    model.learn(64)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as saved:
        assert not any(b"cellstack" in saved.read(name) for name in saved.namelist())
    loaded = RecurrentPPO.load(tmp_path / "model.zip", device="cpu")
    assert type(loaded.policy.lstm_actor) is nn.LSTM
    assert "_process_sequence" not in vars(loaded.policy)
    observation = model.observation_space.sample()
    (action, state), (other, other_state) = (one.predict(observation, deterministic=True) for one in (model, loaded))
    assert action == other
    torch.testing.assert_close(torch.from_numpy(state[1]), torch.from_numpy(other_state[1]), rtol=0, atol=1e-6)


def test_restoring_and_copying():
    model = ppo()
    assert sb3_contrib.accelerate(sb3_contrib.accelerate(model)) is model
    copied = copy.deepcopy(model.policy)
    assert type(copied.lstm_actor) is type(model.policy.lstm_actor) is not nn.LSTM
    assert copied._process_sequence is model.policy._process_sequence
    assert isinstance(model, RecurrentPPO)
    assert type(model) is not RecurrentPPO
    sb3_contrib.restore(sb3_contrib.restore(model))
    assert type(model) is RecurrentPPO
    assert type(model.policy.lstm_actor) is nn.LSTM
    assert model.policy._process_sequence is type(model.policy)._process_sequence
    assert "fused" in str(cs.plan(copied))
    assert "fused cpu kernel" not in str(cs.plan(model.policy))


def test_other_models_and_policies_are_refused():
    with pytest.raises(TypeError, match="expected a RecurrentPPO or its policy, got Linear"):
        sb3_contrib.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a RecurrentPPO or its policy, got dict"):
        sb3_contrib.restore({})
    model = ppo()

    class Own(type(model.policy)):
        @staticmethod
        def _process_sequence(features, lstm_states, episode_starts, lstm):
            return features, lstm_states

    model.policy.__class__ = Own
    with pytest.raises(TypeError, match="policies that override _process_sequence aren't supported, got Own: "):
        sb3_contrib.accelerate(model)
    assert type(model.policy.lstm_actor) is nn.LSTM
    elsewhere = ppo()
    elsewhere.policy.to("meta")
    with pytest.raises(ValueError, match="on the CPU, got one on meta"):
        sb3_contrib.accelerate(elsewhere)

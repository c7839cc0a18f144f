"""CustomLSTM on our kernel compared with a loop over days; test_recipes.py runs the original."""

import copy

import pytest
import torch
from torch import nn

from cellstack.adapters import neuralhydrology


class Cell(nn.Module):
    def __init__(self, width, units):
        super().__init__()
        self.input_size, self.hidden_size = width, units
        shapes = {"w_hh": (4 * units, units), "w_ih": (4 * units, width), "b_hh": (4 * units,), "b_ih": (4 * units,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.4 * torch.randn(shape)))


class Daily(nn.Module):
    def forward(self, data, concatenate_output):
        assert concatenate_output
        return data["x_d"].transpose(0, 1)  # [T, B, I]


class Head(nn.Linear):
    def forward(self, h):
        return {"y_hat": super().forward(h)}


class CustomLSTM(nn.Module):
    """A stand-in for NeuralHydrology's class: the same attributes, and an independent loop."""

    def __init__(self, width=3, units=5):
        super().__init__()
        self.embedding_net, self.cell, self.dropout, self.head = (
            Daily(),
            Cell(width, units),
            nn.Dropout(0.4),
            Head(units, 1),
        )

    def forward(self, data, h_0=None, c_0=None):
        x, cell = self.embedding_net(data, concatenate_output=True), self.cell
        h, c = (x.new_zeros(x.shape[1], cell.hidden_size) if s is None else s for s in (h_0, c_0))
        days = []
        for x_t in x:
            i, f, g, o = (x_t @ cell.w_ih.T + h @ cell.w_hh.T + cell.b_ih + cell.b_hh).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            days.append((h, c, i, f, g, o))
        found = dict(
            zip(("h_n", "c_n", *"ifgo"), (torch.stack(one, 1) for one in zip(*days, strict=True)), strict=True)
        )
        return {**found, **self.head(self.dropout(found["h_n"]))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CustomLSTM().double()


def given(days):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return {"x_d": 3 * draw(4, days, 3)}, draw(4, 5), draw(4, 5)


@pytest.mark.parametrize("days", [1, 2, 30])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", ["h_n", "c_n", "i", "f", "g", "o", "y_hat"])
def test_every_state_and_gate_and_its_gradients(model, days, started, name):
    data, h_0, c_0 = given(days)
    starts = {"h_0": h_0.requires_grad_(), "c_0": c_0.requires_grad_()} if started else {}
    data["x_d"].requires_grad_()
    ours = neuralhydrology.accelerate(copy.deepcopy(model))
    found = []
    for one in (model, ours):
        torch.manual_seed(2)  # for the dropout
        results = one(data, **starts)
        weights = dict(one.named_parameters())
        if name != "y_hat":
            weights = {key: weight for key, weight in weights.items() if not key.startswith("head")}
        given_to = [data["x_d"], *starts.values(), *weights.values()]
        asked = {"allow_unused": days == 1, "materialize_grads": days == 1}  # the first day's gates don't depend on c
        found.append((results, torch.autograd.grad(results[name].square().sum(), given_to, **asked)))
    (expected, slopes), (came, our_slopes) = found
    assert list(came) == list(expected)
    torch.testing.assert_close(came[name], expected[name], rtol=1e-10, atol=1e-12)
    for slope, wanted in zip(our_slopes, slopes, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-11)


def test_without_gradients_and_after_new_weights(model):
    data, *_ = given(6)
    ours = neuralhydrology.accelerate(copy.deepcopy(model)).eval()
    model.eval()
    other = CustomLSTM().double()
    with torch.no_grad():
        for weights in (None, other.state_dict()):
            if weights is not None:
                model.load_state_dict(weights)
                ours.load_state_dict(weights)
            expected, came = model(data), ours(data)
            for name in expected:
                torch.testing.assert_close(came[name], expected[name], rtol=1e-10, atol=1e-12)
        model.cell.w_hh.data = 2 * model.cell.w_hh.data  # as in `copy_weights`
        ours.cell.w_hh.data = 2 * ours.cell.w_hh.data
        torch.testing.assert_close(ours(data)["y_hat"], model(data)["y_hat"], rtol=1e-10, atol=1e-12)
        ours.cell = copy.deepcopy(other.cell)  # another cell instead
        model.cell = copy.deepcopy(other.cell)
        torch.testing.assert_close(ours(data)["y_hat"], model(data)["y_hat"], rtol=1e-10, atol=1e-12)


def test_parameters_do_not_change_and_restore_undoes_it(model):
    names, inside = list(model.state_dict()), list(model.modules())
    assert neuralhydrology.accelerate(model) is model
    assert list(model.state_dict()) == names
    assert list(model.modules()) == inside
    copied = copy.deepcopy(model).eval()
    data, *_ = given(4)
    with torch.no_grad():
        copied.cell.w_ih.zero_()
        assert (copied(data)["i"] - model.eval()(data)["i"]).abs().max() > 0.1  # a copy has separate weights
    neuralhydrology.restore(neuralhydrology.restore(model))
    assert model.forward.__func__ is CustomLSTM.forward
    assert list(vars(model)) == list(vars(CustomLSTM()))


def test_another_model_is_refused():
    for other in (nn.LSTM(3, 4), nn.Linear(2, 2), "CustomLSTM"):
        for change in (neuralhydrology.accelerate, neuralhydrology.restore):
            with pytest.raises(TypeError, match=f"{change.__name__}: expected a CustomLSTM of NeuralHydrology, got "):
                change(other)

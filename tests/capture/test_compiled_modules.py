"""Modules as people have them: kept tensors, locks, computed weights, nested inputs and outputs, scripted parts."""

import random
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import cellstack as cs
from cellstack import layers
from cellstack.capture import compile_network


class Net(nn.Module):
    """A convolution, an LSTM and a head, with whatever else a test adds.

    Args:
        ends: what it returns of the output and the state.
        takes: returns x from the inputs.
    """

    def __init__(self, ends=lambda y, state: y, takes=lambda *inputs: inputs[0]):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.lstm, self.head = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)
        self.ends, self.takes = ends, takes

    def forward(self, *inputs):
        y, state = self.lstm(self.front(self.takes(*inputs)))
        return self.ends(self.head(y), state)


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


def agrees(net, module, x=X):
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_tensors_of_a_graph_and_locks_are_copied():
    module = Net()
    with torch.no_grad():
        module.view = (
            module.head.weight.T
        )  # of which PyTorch refuses to say how it was computed, once its values change
        module.head.weight *= 2
    module.kept, module.lock = [module(X)], {"lock": threading.RLock(), "other": threading.Lock()}
    agrees(cs.compile(module, X), module)
    assert module.kept[0].grad_fn is not None


def test_a_part_that_cannot_be_copied_is_named():
    module = Net()
    module.lstm.steps = (n for n in range(3))
    with pytest.raises(cs.FormatError, match=r"Net can't be copied: set its attribute lstm\.steps to None"):
        compile_network(module, X)


def old(norm, part, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm(part, name)


def weight_norms(m):
    old(nn.utils.weight_norm, m.head, "weight")
    old(nn.utils.weight_norm, m.lstm, "weight_hh_l0")


def parametrizations(m):
    nn.utils.parametrizations.weight_norm(m.head)
    nn.utils.parametrizations.spectral_norm(m.front)


CHANGES = {
    "weight norm": weight_norms,
    "spectral norm": lambda m: old(nn.utils.spectral_norm, m.head, "weight"),
    "parametrizations": parametrizations,
    "pruned": lambda m: nn.utils.prune.random_unstructured(m.head, "weight", 0.5),
}


def state_of(module):
    """Return all that `compile` could change of a module."""
    return {
        "weights": {
            name: (value, value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()
        },
        "modes": [part.training for part in module.modules()],
        "classes": [type(part) for part in module.modules()],
        "hooks": [(dict(p._forward_pre_hooks), dict(p._forward_hooks)) for p in module.modules()],
        "attributes": [set(vars(part)) for part in module.modules()],
        "drawn": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),  # noqa: NPY002
    }


@pytest.mark.parametrize("name", CHANGES)
def test_weights_computed_before_each_call_are_folded_and_the_module_is_not_changed(name):
    module = Net()
    CHANGES[name](module)
    expected = state_of(module)
    net = cs.compile(module, X)
    same(state_of(module), expected)
    agrees(net, module.eval())
    with pytest.raises(ValueError, match="itself rejects the example"):
        compile_network(module, torch.randn(2, 5, 4))


def same(found, expected):
    for key, (value, then, version) in expected["weights"].items():
        now = found["weights"][key][0]
        assert now is value
        assert torch.equal(now, then)
        assert now._version == version
    for key in ("modes", "classes", "hooks", "attributes"):
        assert found[key] == expected[key]
    for one, other in zip(found["drawn"], expected["drawn"], strict=True):
        assert np.array_equal(one, other) if not isinstance(one, tuple) else one == other


@pytest.mark.long
def test_a_refused_module_is_not_changed_and_no_random_number_is_taken():
    module = Net(lambda y, state: torch.erfinv(y) + torch.rand(()))
    weight_norms(module)
    expected = state_of(module)
    with pytest.raises(cs.FormatError, match="a second call with the same input gives another output"):
        compile_network(module, X)
    same(state_of(module), expected)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Names(dict):
    """A dict with attributes, as transformers have it."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize(
    ("ends", "noted"),
    [
        (lambda y, state: {"y": y, "name": "net", "loss": None}, r"aren't tensors \(str\): .* the tensors only"),
        (lambda y, state: (None, 3, y, (0.5,)), r"aren't tensors \(int, float\)"),
        (lambda y, state: Output(y), None),
        (lambda y, state: Names(logits=y, past=None), None),
    ],
)
def test_outputs_that_are_not_tensors_are_left_out(ends, noted):
    module = Net(ends)
    if noted is None:
        net = cs.compile(module, X)
    else:
        with pytest.warns(UserWarning, match=noted):
            net = cs.compile(module, X)
    np.testing.assert_allclose(net(X.numpy()), Net()(X).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("takes", "example"),
    [
        (lambda batch: batch["x"], {"x": X}),
        (lambda batch, scale: batch["x"] if scale is None else scale, ({"x": X}, None)),
        (lambda batch: batch.x, Names(x=X)),
        (lambda out: out.logits, Output(X)),
        (lambda x, flag, parts: x if flag else parts[0], (X, True, [None, "a"])),
    ],
)
def test_examples_may_hold_dicts_and_settings(takes, example):
    net = cs.compile(Net(takes=takes), example)
    np.testing.assert_allclose(net(X.numpy()), Net()(X).detach().numpy(), atol=1e-5)


def test_what_a_module_itself_rejects_is_said():
    module = Net()
    module.ends = Ends()
    with pytest.raises(
        ValueError, match=r"rejects the example, in evaluation mode, but accepts it in training mode: R"
    ):
        compile_network(module, X)
    with pytest.raises(ValueError, match=r"rejects the example: RuntimeError: .*Float"):
        compile_network(Net(), X.long())
    with pytest.raises(ValueError, match=r"Net itself returns no tensor for the example, but str, NoneType"):
        compile_network(Net(lambda y, state: ("y", None)), X)


class Ends(nn.Module):
    """Works in training mode only."""

    def forward(self, y, state):
        if not self.training:
            raise RuntimeError("no targets")
        return y


class Backwards(nn.Module):
    """A layer over the steps in reverse order."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.layer = kind(8, heads=2, return_sequences=True, input_size=8)

    def forward(self, x):
        return self.layer(self.first(x).flip(1))


@pytest.mark.long
def test_layers_of_xlstm():
    with pytest.raises(cs.FormatError, match="found T T F"):  # its attention
        compile_network(Backwards(layers.MLSTM), X)
    torch.manual_seed(0)
    module, x = Backwards(layers.SLSTM).eval(), torch.randn(3, 9, 3)
    net = compile_network(module, X)
    np.testing.assert_allclose(net(x.numpy()), module(x).detach().numpy(), atol=1e-5)


class Scripted(nn.Module):
    """A layer, and a scripted function of its output."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.function = nn.LSTM(3, 4, batch_first=True), function

    def forward(self, x):
        return self.function(self.lstm(x)[0])


def rank(y):
    if y.dim() == 3:
        return torch.relu(y)
    return y


def long(y):
    if y.size(1) > 1000:
        return torch.relu(y)
    return y


def short(y):
    if y.size(1) > 3:
        return torch.relu(y)
    return y


def value(y):
    if bool(y.sum() > 0):
        return torch.relu(y)
    return y


@pytest.mark.long
def test_branches_on_ranks_and_sizes_are_resolved_and_those_on_values_refused(capfd):
    agrees(cs.compile(Scripted(torch.jit.script(rank)), X), Scripted(rank))
    with pytest.warns(UserWarning, match=r"compares sizes of its input \(.*\), and the network does what it did for"):
        net = cs.compile(Scripted(torch.jit.script(long)), X)
    agrees(net, Scripted(long))
    with pytest.raises(cs.FormatError, match=r"compares sizes of its input .*: with one step output 0 differs"):
        compile_network(Scripted(torch.jit.script(short)), X)
    line = value.__code__.co_firstlineno + 1
    with pytest.raises(cs.FormatError, match=rf"it reads values of tensors \(test_compiled_modules.py:{line}\)"):
        compile_network(Scripted(torch.jit.script(value)), X)
    with pytest.raises(
        cs.FormatError, match=r"branches on values, as in if .*: If '.*': a branch depends on the values of"
    ):
        compile_network(torch.jit.script(Scripted(torch.jit.script(value))), X)
    assert capfd.readouterr() == ("", "")


def test_a_scripted_module_compiles_silently_and_keeps_its_name(capfd):
    module = torch.jit.script(Scripted(torch.jit.script(long)))
    with pytest.warns(UserWarning, match=r"compile: Scripted compares sizes of its input"):
        net = cs.compile(module, X)
    agrees(net, module)
    assert capfd.readouterr() == ("", "")


def test_a_scripted_module_in_another_one_is_refused():
    module = Scripted(torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.Tanh())))
    with pytest.raises(cs.FormatError, match=r"can't record .*: pass the module from which torch\.jit"):
        cs.compile(module, X)


def test_refusals_name_the_line_of_an_operator():
    def ends(y, state):
        return torch.sort(y, 1)[0]

    line = Net.forward.__code__.co_firstlineno + 2  # of functions that forward calls, PyTorch records no lines
    with pytest.raises(
        cs.FormatError, match=rf"TopK '/TopK': the operator isn't supported \(test_compiled_modules.py:{line}\)"
    ):
        compile_network(Net(ends), X)


def test_a_size_that_is_changed_in_place_is_a_number():
    def takes(x):
        size = x.shape[1]
        double = size
        double *= 2
        if double - size != x.shape[1]:
            raise ValueError("the size was changed")
        return x

    agrees(cs.compile(Net(takes=takes), X), Net(takes=takes))


@pytest.mark.long
@pytest.mark.parametrize(
    "takes", [lambda x: x.diff(2, 1), lambda x: torch.diff(x, dim=-2, prepend=x[:, :1], append=x[:, 2:4])]
)
def test_differences_of_steps_are_nodes(takes):
    agrees(cs.compile(Net(takes=takes), X), Net(takes=takes))


class Called(nn.Module):
    """A module whose `__call__` doesn't take all of the arguments of `forward`."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def __call__(self, x, first=None, **options):
        return super().__call__(x, first=first, **options)

    def forward(self, x, first=None, second=None):
        return self.gru(x)[0]


class Conditioned(nn.Module):
    """A module that joins a vector of each row to every step."""

    def __init__(self, how):
        super().__init__()
        self.gru, self.how = nn.GRU(5, 4, batch_first=True), how

    def forward(self, x, constant):
        return self.gru(torch.cat([x, self.how(x, constant)], -1))[0]


class Ids(nn.Module):
    """A module that takes ids with an axis of length 1."""

    def __init__(self):
        super().__init__()
        self.table, self.gru = nn.Embedding(9, 3), nn.GRU(3, 4, batch_first=True)

    def forward(self, ids):
        return self.gru(self.table(ids.squeeze(2)))[0]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Called(), (torch.randn(2, 5, 3),)),
        (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), (torch.randn(2, 5, 3),)),
        (
            Conditioned(lambda x, c: c.unsqueeze(1).expand(-1, x.shape[1], -1)),
            (torch.randn(2, 5, 3), torch.randn(2, 2)),
        ),
        (Conditioned(lambda x, c: c[:, None].repeat(1, x.size(1), 1)), (torch.randn(2, 5, 3), torch.randn(2, 2))),
        (Ids(), (torch.randint(0, 9, (2, 5, 1)),)),
    ],
)
@pytest.mark.filterwarnings("ignore:compile. Ids has other axes")
def test_programs_take_calls_norms_constants_and_ids_of_other_shapes(module, inputs):
    net = cs.compile(module.eval(), inputs)
    longer = [torch.cat([x, x.flip(0)], 1) if x.ndim > 2 else x for x in inputs]
    given = [x.numpy()[..., 0] if x.dtype is torch.int64 else x.numpy() for x in longer]
    ours = net(given[0] if len(given) == 1 else tuple(given))
    np.testing.assert_allclose(ours, module(*longer).detach().numpy(), atol=1e-5)


def test_a_module_may_have_keyword_only_arguments():
    class Whole(Net):
        def forward(self, x, scale=None, *, every=False):
            y = super().forward(x)
            return y if every else y[:, -1]

    module = Whole().eval()
    agrees(cs.compile(module, X), module)
    assert "forward" not in vars(module)


def test_a_table_sliced_to_the_number_of_steps_is_refused_by_what_it_is():
    class Positions(Net):
        def forward(self, x):
            return super().forward(x + self.table[: x.shape[1]])

    module = Positions()
    module.table = nn.Parameter(torch.randn(99, 3))
    with pytest.raises(
        cs.FormatError, match="Slice '/Slice': expected constant integers, found some that are computed"
    ):
        compile_network(module, X)


class Answers(nn.Module):
    """Knowledge tracing: ids of questions and of answers become one id; an argument has a default."""

    def __init__(self, joined):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lstm, self.joined = nn.Embedding(14, 3), nn.LSTM(3, 4, batch_first=True), joined

    def forward(self, q, r, inner=False):
        y = self.lstm(self.table(self.joined(q, r)))[0]
        if not inner:
            return y.sigmoid()
        return y


@pytest.mark.parametrize("joined", [lambda q, r: q + 7 * r, lambda q, r: (q + 1) - (1 - r)])
def test_ids_are_computed_from_ids_of_any_number_of_steps(joined):
    module = Answers(joined).eval()
    q, r = torch.randint(7, (2, 5)), torch.randint(2, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the default of an argument is no value that the module reads
        net = cs.compile(module, (q, r))
    q, r = torch.randint(7, (3, 9)), torch.randint(2, (3, 9))
    np.testing.assert_allclose(net((q.numpy(), r.numpy())), module(q, r).detach().numpy(), atol=1e-5)


def test_a_division_of_ids_is_refused_with_its_line():
    line = Answers.forward.__code__.co_firstlineno + 1
    with pytest.raises(cs.FormatError, match=rf"it divides ids, .* ids outside the module.*_modules.py:{line}"):
        compile_network(Answers(lambda q, r: q // 2 + r), (torch.randint(7, (2, 5)), torch.randint(2, (2, 5))))


def test_samples_without_an_axis_of_features_are_refused_with_the_way_out():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(1, 4, batch_first=True)

        def forward(self, x):
            return self.lstm((x - x.mean(1, keepdim=True))[:, :, None])[0]

    with pytest.raises(cs.FormatError, match=r"let forward take \[B, T, 1\], without x\[:, :, None\]") as error:
        compile_network(Centred(), torch.randn(2, 9))
    assert "test_compiled_modules.py" in str(error.value)
    assert "cs.load" not in str(error.value)

"""Hand-written cells and loops: recognised by their equations, and run on the kernel with their own parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import cellstack as cs
from cellstack.capture import recognition
from cellstack.capture.recognition import comparison
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known import ADAPTERS

pytest.importorskip("onnx")


class Cell(nn.Module):
    """An LSTM cell with x·W, an unusual order of gates, and a forget bias of 1; `at`, `how`: a changed operation."""

    def __init__(self, width=3, units=4, at=-1, how=""):
        super().__init__()
        self.units, self.at, self.how = units, at, how
        self.w = nn.Parameter(0.4 * torch.randn(width, 4 * units))
        self.u = nn.Parameter(0.4 * torch.randn(units, 4 * units))
        self.b = nn.Parameter(torch.randn(4 * units))

    def change(self, place, value, other=None):
        if place != self.at:
            return value
        return {"sign": lambda: -value, "factor": lambda: 0.5 * value, "gate": lambda: other}[self.how]()

    def forward(self, x, state):
        h, c = state
        z = x @ self.w + h @ self.u + self.b
        f, o, g, i = z.split(self.units, dim=1)
        f, o = torch.sigmoid(self.change(0, f, o) + 1.0), torch.sigmoid(self.change(1, o))
        g, i = self.change(2, torch.tanh(g), i), torch.sigmoid(self.change(3, i, f))
        c = self.change(4, f * c, g * c) + self.change(5, i * g, i * h)
        h = o * self.change(6, torch.tanh(c), c)
        return h, (h, c)


class Loop(nn.Module):
    """A loop over a cell."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.cell, self.dropout = Cell(), nn.Dropout(dropout)

    def forward(self, x, state=None):
        if state is None:
            state = (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
        ys = []
        for t in range(x.shape[1]):
            y, state = self.cell(self.dropout(x[:, t]), state)
            ys.append(y)
        return torch.stack(ys, 1), state


class NormedLayers(nn.Module):
    """Two layers, time first, with layer normalisation of the sums and of c."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.ModuleList(nn.Linear(n, 16, bias=False) for n in (3, 4)), nn.ModuleList()
        self.h.extend(nn.Linear(4, 16, bias=False) for _ in range(2))
        self.z_norm = nn.ModuleList(nn.LayerNorm(16, eps=1e-3) for _ in range(2))
        self.c_norm = nn.ModuleList(nn.LayerNorm(4, eps=1e-3) for _ in range(2))
        for weights in self.parameters():
            nn.init.normal_(weights, 0.3, 0.4)

    def forward(self, x, h, c):
        h, c, ys = [*h], [*c], []
        for step in x:
            for n in range(2):
                z = self.z_norm[n](self.x[n](step) + self.h[n](h[n]))
                i, f, g, o = z.chunk(4, 1)
                c[n] = self.c_norm[n](f.sigmoid() * c[n] + i.sigmoid() * g.tanh())
                step = h[n] = o.sigmoid() * c[n].tanh()
            ys.append(step)
        return torch.stack(ys), torch.stack(h), torch.stack(c)


class GRULoop(nn.Module):
    """A GRU whose new state is n + z·(h - n); returns the last state."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(3, 12), nn.Linear(4, 12)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            a, b = self.x(step).chunk(3, 1), self.h(h).chunk(3, 1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            n = torch.tanh(a[2] + r * b[2])
            h = n + z * (h - n)
        return h


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [found for part in value for found in tensors(part)] if isinstance(value, (tuple, list)) else []


def run(module, *args):
    """Return the results of a call and the gradients of the parameters."""
    module.zero_grad()
    results = tensors(module(*args))
    sum((n + 1) * value.square().sum() for n, value in enumerate(results)).backward()
    return results, [weights.grad for weights in module.parameters()]


def check_same(one, other, *args):
    for ours, theirs in zip(run(one, *args), run(other, *args), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def calls(module, monkeypatch):
    """Return a list to which each call of a class's own forward is added."""
    kind, seen = type(module), []
    theirs = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, *args, **kwargs: seen.append(args) or theirs(self, *args, **kwargs)
    )
    return seen


LOOPS = {
    "loop": (Loop, lambda rows, steps: (torch.randn(rows, steps, 3), (torch.randn(rows, 4), torch.randn(rows, 4)))),
    "loop without state": (Loop, lambda rows, steps: (torch.randn(rows, steps, 3),)),
    "layers": (
        NormedLayers,
        lambda rows, steps: (torch.randn(steps, rows, 3), torch.randn(2, rows, 4), torch.randn(2, rows, 4)),
    ),
    "GRU": (GRULoop, lambda rows, steps: (torch.randn(rows, steps, 3),)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_runs_on_the_kernel_with_the_parameters_that_it_has(name, monkeypatch):
    torch.manual_seed(0)
    make, arguments = LOOPS[name]
    module = make()
    before, parameters, kind = copy.deepcopy(module), [*module.parameters()], type(module)
    assert cs.accelerate(module, cells=True, example=arguments(2, 5)) is module
    assert isinstance(module, kind)
    assert isinstance(module, HandWritten)
    assert type(module).__name__ == kind.__name__
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert module.state_dict().keys() == before.state_dict().keys()
    (line,) = str(cs.plan(module)).splitlines()
    assert line.startswith(f"{kind.__name__}, ")
    assert "fused cpu kernel" in line
    for rows, steps in ((1, 1), (3, 6)):
        check_same(module, before, *arguments(rows, steps))
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (module, before)]
    for optimiser in optimisers:  # the gradients of the last comparison
        optimiser.step()
    seen = calls(before, monkeypatch)
    args = arguments(2, 4)
    ours = run(module, *args)
    assert not seen
    for a, b in zip(ours, run(before, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert seen
    assert type(cs.restore(module)) is kind


@pytest.mark.long
def test_results_may_be_changed_in_place_before_the_backward_pass():
    module = cs.accelerate(Loop(), cells=True)
    y, _ = module(torch.randn(2, 3, 3))
    y *= 2.0
    y.sum().backward()
    assert all(weights.grad is not None for weights in module.parameters())


@pytest.mark.long
def test_copies_are_accelerated_and_pickles_hold_the_original_class():
    module = cs.accelerate(Loop(), cells=True)
    x = torch.randn(2, 3, 3)
    copied = copy.deepcopy(module)
    assert isinstance(copied, HandWritten)
    torch.testing.assert_close(copied(x)[0], module(x)[0])
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is Loop
    torch.testing.assert_close(loaded(x)[0], module(x)[0])


@pytest.mark.long
def test_calls_of_another_form_and_hooks_inside_run_the_modules_own_forward(monkeypatch):
    module = cs.accelerate(Loop(), cells=True)
    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        ours = module(x=x)[0]
    seen = calls(cs.restore(copy.deepcopy(module)), monkeypatch)
    torch.testing.assert_close(module(x.to(torch.float64).float(), state=None)[0], ours)
    assert not seen
    noted = []
    module.cell.register_forward_hook(lambda *_: noted.append(1))
    torch.testing.assert_close(module(x)[0], ours)
    assert len(noted) == 4
    assert len(seen) == 1
    with pytest.raises(RuntimeError):  # PyTorch's own error
        module(torch.randn(2, 3, 5))


@pytest.mark.long
def test_a_module_that_draws_random_numbers_in_training_is_accelerated_in_evaluation_only():
    module = Loop(dropout=0.5)
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    assert "in evaluation mode; PyTorch in training" in str(cs.plan(module))
    x = torch.randn(2, 3, 3)
    results = []
    for each in (module, before):
        torch.manual_seed(1)
        results.append(each.train()(x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(module.eval()(x)[0], before.eval()(x)[0])


def test_a_cell_runs_on_the_kernel_within_packed_weights(monkeypatch):
    module = Cell()
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    assert "within packed_weights()" in str(cs.plan(module))
    seen = calls(before, monkeypatch)
    x, state = torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4))
    check_same(module, before, x, state)
    assert len(seen) == 2
    with torch.no_grad(), cs.packed_weights(module):
        for _ in range(3):
            module.w += 0.1
            before.w += 0.1
            ours = module(x, state)
            assert len(seen) == 2
            torch.testing.assert_close(tensors(ours), tensors(before(x, state)), rtol=2e-5, atol=2e-5)
            seen.pop()
    assert "_packed" not in vars(module)


@pytest.mark.long
def test_a_module_that_is_passed_itself_is_refused_with_the_reason_whatever_its_name():
    class Step(Cell):
        def forward(self, x, state):
            h, (_, c) = super().forward(x, state)
            return h + x, (h + x, c)

    with pytest.raises(ValueError, match=r"hand-written modules: Step: the operator Add .* isn't that of a cell"):
        cs.accelerate(Step(4, 4), cells=True)


@pytest.mark.long
def test_other_modules_are_left_alone_and_the_plan_says_why():
    class ResidualLSTMCell(Cell):
        def forward(self, x, state):
            h, (_, c) = super().forward(x, state)
            return h + x, (h + x, c)

    model = nn.ModuleDict({"cell": ResidualLSTMCell(4, 4), "mlp": nn.Sequential(nn.Linear(3, 3), nn.Tanh())})
    with pytest.raises(ValueError, match=r"hand-written modules: ResidualLSTMCell: the operator Add .* isn't that of"):
        cs.accelerate(model, cells=True)
    assert str(cs.plan(model)).startswith("cell: ResidualLSTMCell: PyTorch: the operator Add")
    assert type(model["cell"]) is ResidualLSTMCell
    model["lstm"] = nn.LSTM(3, 4)
    cs.accelerate(model, cells=True)
    assert len(str(cs.plan(model)).splitlines()) == 2


MUTANTS = [
    (place, how) for place in range(7) for how in ("sign", "factor", "gate") if how != "gate" or place not in (1,)
]


@pytest.mark.long
@pytest.mark.parametrize(("place", "how"), [pytest.param(*one, marks=[pytest.mark.slow] if n % 3 else [])
                                            for n, one in enumerate(MUTANTS)])  # fmt: skip
def test_a_cell_with_one_changed_sign_factor_or_gate_is_not_replaced(place, how):
    module = Cell(4, 4, place, how)
    before = copy.deepcopy(module)
    try:
        cs.accelerate(module, cells=True)
    except ValueError:
        assert type(module) is Cell
        return
    x, state = torch.randn(2, 4), (torch.randn(2, 4), torch.randn(2, 4))
    with torch.no_grad(), cs.packed_weights(module):  # it is another cell
        torch.testing.assert_close(tensors(module(x, state)), tensors(before(x, state)), rtol=2e-5, atol=2e-5)


class OtherLoop(Loop):
    """A loop that does more than a cell, which a short call doesn't show in its results."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, state):
        if self.how == "buffer":
            self.count += 1
        if self.how == "attribute":
            self.last = x
        if (self.how == "branch" and bool((x > 50).any())) or (self.how == "long" and x.shape[1] > 20):
            x = -x
        y, after = super().forward(x, state)
        if self.how == "argument":
            state[0].copy_(after[0])
        if self.how == "draw":
            torch.rand(1)
        return y, after


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("buffer", "changes count in each call"),
        ("attribute", "changes last in each call"),
        ("branch", "branches on values"),
        ("argument", "writes to its arguments"),
        ("draw", "draws random numbers"),
        ("long", "outputs differ"),
    ],
)
def test_a_module_that_does_more_than_a_cell_is_not_replaced(how, why):
    module = OtherLoop(how)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(recognition.NotReplaced, match=why):
        recognition.recognise(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class SettingLoop(GRULoop):
    def __init__(self):
        super().__init__()
        self.negative = False

    def result(self, h):
        return -h if self.negative else h

    def forward(self, x):
        return self.result(super().forward(x))


CHANGES = {
    "another module": lambda module: setattr(module, "x", DoubledLinear(3, 12)),
    "without bias": lambda module: setattr(module.x, "bias", None),
    "a setting": lambda module: setattr(module, "negative", True),
    "a method": lambda module: setattr(module, "result", torch.exp),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changed_afterwards_runs_its_own_forward(change, monkeypatch):
    module, x = SettingLoop(), torch.randn(2, 6, 3)
    ours, seen = cs.accelerate(copy.deepcopy(module), cells=True), calls(module, monkeypatch)
    ours(x)
    assert not seen
    for one in (ours, module):
        torch.manual_seed(1)
        CHANGES[change](one)
    check_same(ours, module, x)
    assert len(seen) == 2


@pytest.mark.long
def test_a_buffer_may_change():
    class Buffer(GRULoop):
        def __init__(self):
            super().__init__()
            self.x = nn.Linear(3, 12, bias=False)
            self.register_buffer("bias", torch.ones(12))

        def forward(self, x):
            h = x.new_zeros(len(x), 4)
            for step in x.unbind(1):
                a, b = (self.x(step) + self.bias).chunk(3, 1), self.h(h).chunk(3, 1)
                r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
                n = torch.tanh(a[2] + r * b[2])
                h = n + z * (h - n)
            return h

    module = Buffer()
    ours = cs.accelerate(copy.deepcopy(module), cells=True)
    for one in (ours, module):
        one.bias.mul_(3)
    check_same(ours, module, torch.randn(2, 6, 3))


@pytest.mark.long
def test_a_difference_is_reported_with_its_size(monkeypatch):
    theirs = comparison.result_of
    monkeypatch.setattr(comparison, "result_of", lambda *args: theirs(*args) + 0.25)
    model = nn.ModuleDict({"loop": GRULoop(), "lstm": nn.LSTM(2, 3)})
    with pytest.warns(UserWarning, match=r"not replaced: loop: it looks like GRU .*, but its outputs differ by 2\.5e"):
        cs.accelerate(model, cells=True)
    assert type(model["loop"]) is GRULoop
    assert "loop: GRULoop: PyTorch: it looks like GRU" in str(cs.plan(model))


@pytest.mark.parametrize("call", [lambda m: cs.accelerate(m, example=1), lambda m: cs.accelerate(m, cells=True)])
def test_invalid_requests(call):
    with pytest.raises((TypeError, ValueError)):
        call(nn.Linear(2, 3))


# ── classes of other libraries, here with the same interface ──────────────────────────────────────────────────────────


class LightLayer(nn.Module):
    """A light GRU whose product with x is normalised over the batch, with a mask on the candidate in training."""

    def __init__(self, bidirectional=False):
        super().__init__()
        self.input_size, self.hidden_size, self.bidirectional = 3, 4, bidirectional
        self.w, self.u = nn.Linear(3, 8, bias=False), nn.Linear(4, 8, bias=False)
        self.norm, self.act = nn.BatchNorm1d(8), nn.ReLU()

    def _sample_drop_mask(self, w):
        return torch.bernoulli(torch.full((len(w), 4), 0.8)) if self.training else torch.ones(1)

    def forward(self, x, hx=None):
        x = torch.cat([x, x.flip(1)]) if self.bidirectional else x
        w = self.norm(self.w(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        h = self._ligru_cell(w, x.new_zeros(1, 4).expand(len(x), 4) if hx is None else hx)
        return torch.cat([h[: len(h) // 2], h[len(h) // 2 :].flip(1)], 2) if self.bidirectional else h

    def _ligru_cell(self, w, ht):
        mask, ys = self._sample_drop_mask(w), []
        for t in range(w.shape[1]):
            a, z = (w[:, t] + self.u(ht)).chunk(2, 1)
            z = z.sigmoid()
            ht = z * ht + (1 - z) * self.act(a) * mask
            ys.append(ht)
        return torch.stack(ys, 1)


class AUGRUCell(nn.GRUCell):
    def step(self, x, h, u):
        a = nn.functional.linear(x, self.weight_ih, self.bias_ih).chunk(3, 1)
        b = nn.functional.linear(h, self.weight_hh, self.bias_hh).chunk(3, 1)
        z = self.update(torch.sigmoid(a[1] + b[1]), u.view(-1, 1))
        return (1 - z) * h + z * torch.tanh(a[2] + torch.sigmoid(a[0] + b[0]) * b[2])

    def update(self, z, u):
        return u * z


class AGRUCell(AUGRUCell):
    def update(self, z, u):
        return u


class Attention(nn.Module):
    """A GRU over packed rows with attention."""

    def __init__(self, cell=AUGRUCell):
        super().__init__()
        self.input_size, self.hidden_size, self.rnn = 3, 4, cell(3, 4)

    def forward(self, inputs, att_scores=None, hx=None):
        x, sizes, *order = inputs
        h = x.new_zeros(int(sizes[0]), 4) if hx is None else hx
        ys, start = [], 0
        for n in sizes.tolist():
            h = self.rnn.step(x[start : start + n], h[:n], att_scores.data[start : start + n])
            ys.append(h)
            start += n
        return PackedSequence(torch.cat(ys), sizes, *order)


class LogSpace(nn.Module):
    """A minGRU, whose steps are a running sum of logarithms."""

    def __init__(self):
        super().__init__()
        self.to_hidden_and_gate, self.to_out = nn.Linear(3, 8, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x, prev_hidden=None, return_next_prev_hidden=False):
        g, z = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        added = (torch.where(g >= 0, g + 0.5, g.sigmoid()) * z.sigmoid()).log()
        kept = nn.functional.logsigmoid(-z).cumsum(1)
        before = added[:, :0] if prev_hidden is None else prev_hidden.log()
        total = torch.cat([before, added - kept], dim=1).logcumsumexp(1)[:, -x.shape[1] :]
        h = (kept + total).exp()
        y = self.to_out(h)
        return (y, h[:, -1:]) if return_next_prev_hidden else y


def packed(width, lengths, of=torch.randn):
    x = of(len(lengths), max(lengths), width)
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


KNOWN = {
    "light": (LightLayer, "speechbrain.nnet.RNN.LiGRU_Layer", lambda: (torch.randn(2, 5, 3), torch.randn(2, 4))),
    "light, both directions": (
        lambda: LightLayer(True),
        "speechbrain.nnet.RNN.LiGRU_Layer",
        lambda: (torch.randn(2, 5, 3),),
    ),
    "AUGRU": (
        Attention,
        "deepctr_torch.layers.sequence.DynamicGRU",
        lambda: (packed(3, [2, 5, 4]), packed(1, [2, 5, 4], torch.rand)),
    ),
    "AGRU": (
        lambda: Attention(AGRUCell),
        "deepctr_torch.layers.sequence.DynamicGRU",
        lambda: (packed(3, [2, 2]), packed(1, [2, 2], torch.rand), torch.randn(2, 4)),
    ),
    "minGRU": (LogSpace, "minGRU_pytorch.minGRU.minGRU", lambda: (torch.randn(2, 6, 3), torch.rand(2, 1, 4), True)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_classes_of_other_libraries(name, training, monkeypatch):
    make, path, arguments = KNOWN[name]
    module = make().train(training)
    kind = type(module)
    monkeypatch.setitem(ADAPTERS, f"{kind.__module__}.{kind.__qualname__}", ADAPTERS[path])
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    assert isinstance(module, HandWritten)
    args, results = arguments(), []
    loop = "_ligru_cell" if isinstance(module, LightLayer) else "forward"
    for each in (module, before):
        torch.manual_seed(3)
        results.append(run(each, *args))
        if each is module:
            monkeypatch.setattr(kind, loop, pytest.fail) if loop == "_ligru_cell" else None
            torch.manual_seed(3)
            run(each, *args)
            monkeypatch.undo()
    for ours, theirs in zip(*results, strict=True):
        filled = [torch.zeros_like(o) if t is None else t for o, t in zip(ours, theirs, strict=True) if o is not None]
        torch.testing.assert_close([o for o in ours if o is not None], filled, rtol=2e-5, atol=2e-5)
    assert type(cs.restore(module)) is kind


def test_a_state_of_other_rows_is_left_to_the_module(monkeypatch):
    monkeypatch.setitem(ADAPTERS, f"{LogSpace.__module__}.LogSpace", ADAPTERS["minGRU_pytorch.minGRU.minGRU"])
    module = cs.accelerate(LogSpace(), cells=True)
    for state in (torch.rand(1, 1, 4), torch.rand(3, 2, 4), torch.rand(2, 4)):
        with pytest.raises((RuntimeError, IndexError)) as theirs:
            LogSpace()(torch.randn(2, 6, 3), state[..., :3])
        with pytest.raises(theirs.type):
            module(torch.randn(2, 6, 3), state[..., :3])


def test_an_adapter_whose_numbers_differ_is_refused(monkeypatch):
    class Other(LightLayer):
        def _ligru_cell(self, w, ht):
            return 0.5 * super()._ligru_cell(w, ht)

    monkeypatch.setitem(ADAPTERS, f"{Other.__module__}.{Other.__qualname__}", ADAPTERS[KNOWN["light"][1]])
    model = nn.ModuleList([Other(), nn.LSTM(2, 3)])
    with pytest.warns(UserWarning, match="it looks like LiGRU 3 -> 4, but its outputs differ by"):
        cs.accelerate(model, cells=True)
    assert type(model[0]) is Other

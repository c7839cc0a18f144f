"""The CfC compared with the package ncps: layers, gradients also with respect to the times, and whole modules."""

import copy

import numpy as np
import pytest
import torch

import cellstack as cs
from cellstack import layers

I, H, B, T = 3, 6, 2, 7  # noqa: E741


U = 19
MODES = [(None, "default"), (None, "no_gate"), ("lecun_tanh", "default"), ("tanh", "no_gate"), ("relu", "default")]
MODES += [("silu", "default"), ("gelu", "no_gate")]


@pytest.fixture(params=MODES, ids=str)
def both(request):
    """Return ncps's cell, with or without a backbone, and a layer with its weights; in float64."""
    backbone, mode = request.param
    with_one = {"backbone_layers": 0} if backbone is None else {"backbone_activation": backbone, "backbone_units": U}
    cell = pytest.importorskip("ncps.torch").CfCCell(I, H, mode, **with_one).double()
    for name, one in cell.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(one)
    layer = layers.CfC(
        H,
        mode=mode,
        backbone_units=0 if backbone is None else U,
        **({} if backbone in (None, "lecun_tanh") else {"backbone_activation": backbone}),
        timespans=True,
        return_sequences=True,
        return_state=True,
        input_size=I + 1,
        dtype="float64",
    )
    parts = [cell.ff1, cell.ff2, cell.time_a, cell.time_b]
    weight, bias = torch.cat([part.weight for part in parts]).T, torch.cat([part.bias for part in parts])
    with torch.no_grad():
        if backbone is not None:
            layer.cell.gate_kernel.copy_(weight)
            layer.cell.gate_bias.copy_(bias)
            weight, bias = cell.backbone[0].weight.T, cell.backbone[0].bias
        of_x, of_h = weight.split([I, H])
        layer.cell.kernel.copy_(of_x)
        layer.cell.recurrent_kernel.copy_(of_h)
        layer.cell.bias.copy_(bias)
    return cell, layer


def slopes_of(cell, loss):
    """Return the gradients of a loss w.r.t. the weights of ncps's cell, in the order of our arrays."""
    parts = [cell.ff1, cell.ff2, cell.time_a, cell.time_b]
    last = [part.weight for part in parts], [part.bias for part in parts]
    first = [] if cell.backbone is None else [[cell.backbone[0].weight], [cell.backbone[0].bias]]
    groups = [*first, *last]
    found = iter(torch.autograd.grad(loss, [one for group in groups for one in group]))
    weight, bias, *rest = (torch.cat([next(found) for _ in group]) for group in groups)
    of_x, of_h = weight.T.split([I, H])
    return [of_x, of_h, bias, *(one.t() for one in rest)]


def theirs(cell, x, times, h):
    """Return the outputs of ncps's cell, step by step."""
    outs = []
    for step, elapsed in zip(x.unbind(1), times.unbind(1), strict=True):
        h, _ = cell(step, h, elapsed[:, None])
        outs.append(h)
    return torch.stack(outs, dim=1)


def test_a_cfc_is_that_of_ncps(both):
    cell, layer = both
    torch.manual_seed(0)
    x, h = torch.randn(B, T, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    times = torch.rand(B, T, dtype=torch.float64) * 4 - 1
    given = [one.requires_grad_() for one in (x, times, h)]
    expected = theirs(cell, *given)
    y, last = layer(torch.cat([x, times[..., None]], dim=-1), initial_state=h)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(last, expected[:, -1], rtol=0, atol=1e-14)
    weights = torch.randn_like(y)
    wanted = [*given, *layer.cell.arrays()]
    slopes = torch.autograd.grad((y * weights).sum(), wanted)
    loss = (expected * weights).sum()
    others = [*torch.autograd.grad(loss, given, retain_graph=True), *slopes_of(cell, loss)]
    for ours, other in zip(slopes, others, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def test_without_timespans_every_step_takes_a_time_of_1(both):
    cell, layer = both
    flags = {name: layer.cell._config[name] for name in ("mode", "backbone_units", "backbone_activation")}
    plain = layers.CfC(H, **flags, return_sequences=True, input_size=I, dtype="float64")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, I, dtype=torch.float64)
    expected = theirs(cell, x, torch.ones(B, T, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64))
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-14)


MODULES = {
    "backbone": lambda ncps, wirings: ncps.CfC(I, H),
    "backbone of 24 units, no gate": lambda ncps, wirings: ncps.CfC(
        I, H, 2, mode="no_gate", activation="tanh", backbone_units=24
    ),
    "three layers of silu": lambda ncps, wirings: ncps.CfC(
        I, H, activation="silu", backbone_units=U, backbone_layers=3, backbone_dropout=0.0
    ),
    "two layers of gelu": lambda ncps, wirings: ncps.CfC(
        I, H, 2, activation="gelu", backbone_units=37, backbone_layers=2
    ),
    "pure": lambda ncps, wirings: ncps.CfC(I, H, 2, mode="pure", backbone_units=U, backbone_layers=2),
    "pure, wiring": lambda ncps, wirings: ncps.CfC(I, wirings.AutoNCP(9, 2), mode="pure"),
    "one cell": lambda ncps, wirings: ncps.CfC(I, H, backbone_layers=0),
    "wiring": lambda ncps, wirings: ncps.CfC(I, wirings.AutoNCP(12, 2)),
    "wiring, linear layer": lambda ncps, wirings: ncps.CfC(I, wirings.AutoNCP(9, 2), 4, mode="no_gate"),
    "last step, time first": lambda ncps, wirings: ncps.CfC(I, H, 2, False, False, backbone_layers=0),
}


@pytest.fixture(params=MODULES)
def module(request):
    """Return a module of ncps in float64."""
    ncps, wirings = pytest.importorskip("ncps.torch"), pytest.importorskip("ncps.wirings")
    torch.manual_seed(1)
    return MODULES[request.param](ncps, wirings).double()


@pytest.mark.parametrize(("rows", "timed"), [(4, False), (1, True)])
def test_a_module_of_ncps_runs_on_the_kernel(module, rows, timed):
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    assert "fused cpu kernel" in str(cs.plan(module))
    given = [torch.randn(rows, T, I, dtype=torch.float64), 2.0 * torch.rand(rows, T, dtype=torch.float64)]
    x, times = given if module.batch_first else [one.transpose(0, 1) for one in given]
    state = torch.randn(rows, module.state_size, dtype=torch.float64)
    results = []
    for each in (module, before):
        leaves = [one.clone().requires_grad_() for one in (x, state, *([times] if timed else []))]
        y, after = each(*leaves)
        (y.square().sum() + after.sin().sum()).backward()
        results.append([y, after, *(leaf.grad for leaf in (*leaves, *each.parameters()))])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def drawn(rng):
    """Return a random module of ncps in float64, and its arguments for a call."""
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    units, layers = int(rng.integers(5, 20)), int(rng.integers(0, 4))
    given = {"mode": pick("default", "no_gate", "pure"), "batch_first": pick(True, False), "proj_size": pick(None, 3)}
    given["return_sequences"] = pick(True, True, False)
    if pick(True, True, False):
        given |= {"backbone_layers": layers, "backbone_units": int(rng.integers(1, 40))}
        given["activation"] = pick("silu", "relu", "tanh", "gelu", "lecun_tanh")
        given["backbone_dropout"] = pick(0.0, 0.5)
    else:
        units = AutoNCP(units + 3, int(rng.integers(1, 4)), seed=int(rng.integers(1000)))
    inputs, rows, steps = (int(rng.integers(1, 6)) for _ in range(3))
    torch.manual_seed(int(rng.integers(1 << 30)))
    module = CfC(inputs, units, **given).double().eval()
    timed = rows == 1
    x, state = torch.randn(rows, steps, inputs).double(), torch.randn(rows, module.state_size).double()
    times = [2.0 * torch.rand(rows, steps).double()] if timed else []
    shaped = [one if module.batch_first else one.transpose(0, 1) for one in (x, *times)]
    return module, [shaped[0], state, *shaped[1:]], x


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore:load. the module .CfC. has batch_first=False", "ignore:.*return_sequences")
def test_random_modules_of_ncps(seed):
    pytest.importorskip("ncps.torch")
    module, given, x = drawn(np.random.default_rng(seed))
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    results = []
    for each in (module, before):
        leaves = [one.clone().requires_grad_() for one in given]
        y, after = each(*leaves)
        (y.square().sum() + after.sin().sum()).backward()
        grads = [one.grad for one in (*leaves, *each.parameters()) if one.grad is not None]
        results.append([y.detach(), after.detach(), *grads])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        expected, _ = before(x if before.batch_first else x.transpose(0, 1))
    if before.return_sequences and not before.batch_first:
        expected = expected.transpose(0, 1)
    net = cs.load(before)
    np.testing.assert_allclose(net(x.numpy()), expected, rtol=1e-10, atol=1e-12)
    if before.return_sequences:
        stream = net.stream(len(x))
        stepped = np.stack([stream.step(x[:, n].numpy()) for n in range(x.shape[1])], axis=1)
        np.testing.assert_allclose(stepped, expected, rtol=1e-10, atol=1e-12)


def test_dropout_in_a_backbone_is_left_to_ncps():
    module = pytest.importorskip("ncps.torch").CfC(I, H, backbone_layers=2, backbone_units=16, backbone_dropout=0.5)
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)
    x, results = torch.randn(2, T, I), []
    for each in (module.train(), before.train()):
        torch.manual_seed(3)
        results.append(each(x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_times_of_several_rows_are_left_to_ncps(module):
    cs.accelerate(module, cells=True)
    with pytest.raises(RuntimeError, match="must match the size"):  # its own error
        module(torch.randn(4, T, I).double(), None, torch.rand(4, T).double())


def test_times_along_another_axis_are_left_to_ncps(module):
    cs.accelerate(module, cells=True)
    x, times = torch.randn(1, T, I).double(), torch.rand(T, 1).double()
    if not module.batch_first:
        x, times = x.transpose(0, 1), times.T
    with pytest.raises((RuntimeError, IndexError), match=r"size|out of bounds"):  # its own error
        module(x, None, times)


@pytest.mark.filterwarnings("ignore:load. the module .CfC. has batch_first=False")
def test_a_module_of_ncps_becomes_a_network(module, tmp_path):
    x = torch.randn(2, T, I, dtype=torch.float64)
    with torch.no_grad():
        expected, last = module(x if module.batch_first else x.transpose(0, 1))
    net = cs.load(module)
    net.save(tmp_path / "net.safetensors")
    y, states = cs.load(tmp_path / "net.safetensors").run(x.numpy())
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.concatenate([state.h for state in states], axis=1), last, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"mixed_memory": True}, "mixed_memory isn't supported: cs.compile"),
        ({"backbone_layers": 0, "mode": "pure", "mixed_memory": True}, "mixed_memory isn't supported: cs.compile"),
    ],
)
def test_what_of_ncps_is_refused(given, why):
    module = pytest.importorskip("ncps.torch").CfC(I, H, **given)
    with pytest.raises(TypeError, match=why):
        cs.load(module)


def test_mixed_memory_stays_correct():
    module = pytest.importorskip("ncps.torch").CfC(I, H, mixed_memory=True, backbone_layers=2, backbone_units=U)
    before = copy.deepcopy(module)
    cs.accelerate(module, cells=True)  # the kernel runs the memory, an LSTM, within packed_weights
    x = torch.randn(2, T, I)
    torch.testing.assert_close(module(x), before(x), rtol=0, atol=1e-6)

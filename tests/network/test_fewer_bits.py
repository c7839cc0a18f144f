"""Matrices in bfloat16 or int8: as an option of a run, or stored in the network, in memory and in its file."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
from networks import make_cell, make_network, make_stack

from cellstack import FormatError, Network, Patch, State, load
from cellstack.cells import bfloat16
from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.spec import GATES, MATRICES
from cellstack.cli import main as cli
from cellstack.formats.verify import verify
from cellstack.nodes import Bidirectional, Cell, Dense, Recurrent


def near(array):
    """Return the nearest bfloat16 values as float32, computed by torch."""
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.array(array)).bfloat16().float().numpy()


def rounded(cell):
    """Return the cell with its matrices rounded to bfloat16, as float32."""
    return Cell(cell.spec, *(near(a) if name in MATRICES else a for name, a in cell.arrays.items()))


def with_cells(net, change):
    """Return a chain of the network's nodes with `change` applied to the cells, and dense layers to bfloat16."""
    nodes = []
    for node in net.nodes:
        if isinstance(node, Bidirectional):
            ahead, back = (
                Recurrent(
                    tuple(change(cell) for cell in one.cells),
                    one.return_sequences,
                    one.go_backwards,
                    one.zero_output_for_mask,
                    one.residual,
                )
                for one in (node.forward, node.backward)
            )
            nodes.append(Bidirectional(ahead, back, node.merge_mode))
        elif isinstance(node, Recurrent):
            flags = node.return_sequences, node.go_backwards, node.zero_output_for_mask, node.residual
            nodes.append(Recurrent(tuple(change(cell) for cell in node.cells), *flags))
        elif isinstance(node, Dense):
            nodes.append(Dense(near(node.kernel), node.bias, node.activation))
        else:
            nodes.append(node)
    return Network(nodes)


def nets():
    rng = np.random.default_rng(5)
    wide = Network([Recurrent((make_cell(rng, 150, 70), make_cell(rng, 70, 70, kind="gru")), residual=True)])
    plain = Network([Recurrent((make_cell(rng, 9, 33), make_cell(rng, 33, 16)))])
    many = [make_network(seed) for seed in range(30)]
    cells = [net for net in many if net.cells and net.input_size and all(net.dtype == np.float32 for _ in net.cells)]
    stacks = [Network([make_stack(rng, 6, residual=True)]) for _ in range(12)]
    # a rounding error moves a value across the jump of a thresholded ReLU, and the outputs differ by any amount
    smooth = [net for net in stacks if "thresholded_relu" not in str(net)]
    return [plain, wide, *cells[:8], *smooth[:6]]


NETS = nets()


@pytest.mark.parametrize("number", range(len(NETS)))
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_bfloat16_rounds_matrices_and_what_they_are_multiplied_with(number, batch):
    net = NETS[number]
    rng = np.random.default_rng(number)
    shape = net.shapes[net.inputs[0]]
    x = rng.normal(size=(batch, *(7 if axis is None else axis for axis in shape))).astype(np.float32)
    more = {}
    if shape[0] is None:
        more = {"mask": rng.random(x.shape[:2]) < 0.8}
    small, exact = net.with_weights("bfloat16"), with_cells(net, rounded)
    (y, after), (wanted, ends) = net.run(x, weights="bfloat16", **more), exact.run(x, **more)
    np.testing.assert_array_equal(small.run(x, **more)[0], y)
    np.testing.assert_array_equal(small.run(x, threads=2, **more)[0], y)
    # x and h are rounded to 8 bits in products; some of these networks amplify the difference
    for a, b in [((y,), (wanted,)), *zip(after, ends, strict=True)]:
        for found, expected in zip(a, b, strict=True):
            assert np.abs(found - expected).mean() < 3e-2 * max(1.0, np.abs(expected).max(initial=0.0))
    assert small.weights == "bfloat16"
    np.testing.assert_array_equal(small.with_weights("float32")(x), exact(x))


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("kind", GATES)
def test_products_of_a_layer_in_bfloat16_are_exact(kind, batch):
    """One step from a state of zeros, so that only x and the kernel are rounded."""
    rng = np.random.default_rng(batch)
    net = Network([Recurrent((make_cell(rng, 70, 33, kind=kind),))])
    x = rng.normal(size=(batch, 1, 70)).astype(np.float32)
    wanted = with_cells(net, rounded)(near(x))
    np.testing.assert_array_equal(net.run(x, weights="bfloat16")[0], wanted)
    np.testing.assert_array_equal(net.stream(batch, weights="bfloat16").run(x), wanted)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize(("batch", "units"), [(1, 40), (7, 33), (100, 40), (13, 300)])
def test_runs_streams_and_stored_weights_give_the_same_bits(weights, batch, units):
    rng = np.random.default_rng(1)
    net = Network([Recurrent((make_cell(rng, 5, units), make_cell(rng, units, 17, kind="gru")))])
    x = rng.normal(size=(batch, 70, 5)).astype(np.float32)
    y, after = net.run(x, weights=weights, threads=1)
    np.testing.assert_array_equal(net.run(x, weights=weights, threads=2)[0], y)
    np.testing.assert_array_equal(net.stream(batch, weights=weights).run(x), y)
    state, parts = None, []
    for chunk in (x[:, :1], x[:, 1:40], x[:, 40:]):
        part, state = net.run(chunk, state, weights=weights)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), y)
    np.testing.assert_array_equal(state[0].c, after[0].c)
    row = batch // 2
    np.testing.assert_array_equal(net.run(x[row : row + 1], weights=weights)[0][0], y[row])
    pool = net.pool(batch, weights=weights)
    sessions = [pool.open() for _ in range(batch)]
    for t in range(3):
        np.testing.assert_array_equal(pool.step(sessions, x[:, t]), y[:, t])
    if weights == "bfloat16":
        small = net.with_weights("bfloat16")
        np.testing.assert_array_equal(small.stream(batch).run(x), y)
        wide = small.with_weights("float32").run(x)[0]
        np.testing.assert_array_equal(small.stream(batch, weights="float32").run(x), wide)
        pool = small.pool(1)
        np.testing.assert_array_equal(pool.step([pool.open()], x[:1, 0]), y[:1, 0])
    assert np.abs(y - net(x)).max() > 1e-5


def example(**settings):
    rng = np.random.default_rng(2)
    cells = (make_cell(rng, 6, 24, **settings), make_cell(rng, 24, 20, kind="gru", learn_initial_state=True))
    ahead, back = (make_cell(rng, 20, 9, proj_size=4) for _ in range(2))
    both = Bidirectional(Recurrent((ahead,)), Recurrent((back,), go_backwards=True))
    nodes = [Recurrent(cells), both, Dense(rng.normal(size=(8, 3)).astype(np.float32))]
    return Network(nodes, ["stack", "both", "head"], {"made": "here"})


X = np.random.default_rng(3).normal(size=(4, 12, 6)).astype(np.float32)


def test_a_file_of_bfloat16_is_half_the_size_and_comes_back_bit_for_bit(tmp_path):
    net = example()
    small = net.with_weights("bfloat16")
    net.save(tmp_path / "whole.safetensors")
    small.save(tmp_path / "small.safetensors")
    spared = 2 * sum(cell.arrays[name].size for cell in net.cells for name in MATRICES if name in cell.spec.shapes)
    sizes = [os.path.getsize(tmp_path / f"{name}.safetensors") for name in ("whole", "small")]
    assert abs(sizes[0] - sizes[1] - spared) < 64  # the headers differ in BF16 and F32
    again = load(tmp_path / "small.safetensors")
    assert (again.weights, again.metadata, repr(again)) == ("bfloat16", {"made": "here"}, repr(small))
    np.testing.assert_array_equal(again(X), small(X))
    for one, other in zip(again.cells, small.cells, strict=True):
        for name in one.spec.shapes:
            if name in MATRICES:
                np.testing.assert_array_equal(one.stored_arrays[name].bits, other.stored_arrays[name].bits)
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()


def test_other_readers_find_bfloat16_in_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    net = example().with_weights("bfloat16")
    net.save(tmp_path / "small.safetensors")
    tensors = load_file(tmp_path / "small.safetensors")
    assert tensors["stack/0/kernel"].dtype is torch.bfloat16
    assert tensors["stack/0/bias"].dtype is torch.float32
    np.testing.assert_array_equal(tensors["both/forward/0/projection"].float().numpy(), net.cells[2].projection)


def test_only_some_matrices_in_bfloat16_are_refused(tmp_path):
    cell = example().cells[0]
    small = cell.with_weights("bfloat16")
    with pytest.raises(TypeError, match="expected all of kernel, recurrent_kernel in bfloat16 or none, got kernel"):
        Cell(cell.spec, small.stored_arrays["kernel"], *list(cell.arrays.values())[1:])
    with pytest.raises(TypeError, match=r"expected all of kernel, recurrent_kernel in bfloat16 or none, got .*, bias"):
        Cell(cell.spec, *(BFloat16Array(bfloat16.rounded(array)) for array in cell.arrays.values()))
    doubles = [array if name in MATRICES else array.astype("f8") for name, array in small.stored_arrays.items()]
    with pytest.raises(TypeError, match="expected bias in float32, as matrices is, got float64"):
        Cell(cell.spec, *doubles)
    with pytest.raises(ValueError, match=r"expected kernel \[6, 96\]"):
        Cell(cell.spec, BFloat16Array(np.zeros((6, 95), "u2")), *list(small.stored_arrays.values())[1:])
    net = Network([Recurrent((small,))])
    net.save(tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["layer_0/0/kernel"]["dtype"] = "I16"
    text = json.dumps(header).encode()
    (tmp_path / "net.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(FormatError, match="kernel': expected dtype F32, F64 or BF16, found 'I16'"):
        load(tmp_path / "net.safetensors")


def test_weights_that_cannot_be_rounded_are_refused():
    double = Network([Recurrent((make_cell(np.random.default_rng(0), 6, 3, "float64"),))])
    with pytest.raises(TypeError, match="expected float32 arrays for weights='bfloat16', got float64"):
        double.with_weights("bfloat16")
    assert (double.with_weights("float32").dtype, double.weights) == (np.float64, "float64")  # it keeps float64
    with pytest.raises(TypeError, match="expected float32 arrays for weights='int8', got float64"):
        double.run(X, weights="int8")
    with pytest.raises(ValueError, match="Cell: expected weights to be one of float32, bfloat16, got 'int8'"):
        example().with_weights("int8")
    with pytest.raises(ValueError, match="Network: expected weights to be one of float32, bfloat16, int8, got 'int4'"):
        example().run(X, weights="int4")


def test_rounding_keeps_nan_and_infinity():
    odd = np.array([np.nan, -np.inf, np.inf, 0.0, -0.0, 3.4e38, 1e-45, 1.00390625, 1.01171875], np.float32)
    back = bfloat16.widened(bfloat16.rounded(odd))
    np.testing.assert_array_equal(back, np.array([np.nan, -np.inf, np.inf, 0, -0.0, np.inf, 0, 1.0, 1.015625], "f4"))
    assert np.signbit(back[4])
    bits = np.arange(1 << 16, dtype=np.uint16)  # all of them, with every NaN
    np.testing.assert_array_equal(bfloat16.rounded(bfloat16.widened(bits)), bits)
    low = np.array([0x7F800001], np.uint32).view(np.float32)  # the fraction is in the lower 16 bits
    assert np.isnan(bfloat16.widened(bfloat16.rounded(low))).all()


def test_copies_pickles_and_descriptions():
    net = example()
    small = net.with_weights("bfloat16")
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small), copy.copy(small.cells[0])):
        assert other.weights == "bfloat16"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(small))(X), small(X))
    assert len(pickle.dumps(small)) < 0.65 * len(pickle.dumps(net))
    assert "LSTM 6 -> 24 (matrices in bfloat16)" in repr(small)
    assert "float32, matrices in bfloat16): one call" in small.plan()[0]
    whole, rounded = (int(plan[-1].split(", ")[-1].split()[0].replace(",", "")) for plan in (net.plan(), small.plan()))
    assert 0.5 < rounded / whole < 0.65
    mixed = Network([Recurrent((net.cells[0], small.cells[1]))])
    assert "matrices of 1 cell in bfloat16" in mixed.plan()[0]
    np.testing.assert_array_equal(mixed(X).shape, (4, 12, 20))
    assert small.cells[0].kernel.dtype == np.float32
    assert not small.cells[0].kernel.flags.writeable
    with pytest.raises(AttributeError, match="no attribute 'kernels'"):
        small.cells[0].kernels  # noqa: B018
    assert small.with_weights("bfloat16").cells[0] is small.cells[0]


def test_traces_patches_and_streams_that_remember():
    small = example().with_weights("bfloat16")
    trace = small.trace(X)
    np.testing.assert_array_equal(trace.y, small(X))
    held = small.edit(Patch("stack", gate="f", cell=0, units=[3], value=1.0))
    assert (held.trace(X)["stack"].cells[0].f[..., 3] == 1).all()
    y, _ = example().edit(held.patches).run(X, weights="bfloat16")
    np.testing.assert_array_equal(held(X), y)
    stack = Network([small.nodes[0]])
    stream = stack.stream(4)
    assert (stream.weights, "weights" in repr(stream).split(" of ")[0]) == ("bfloat16", False)
    stream.remember(20)
    y = stream.run(X)
    np.testing.assert_array_equal(stream.trace().y, y)
    with pytest.raises(ValueError, match="expected weights='bfloat16' to trace, got 'int8'"):
        stack.stream(weights="int8").remember(3)
    state = State(np.ones((4, 24), "f4"), np.ones((4, 24), "f4"))
    assert stack.stream(4).fork().weights == "bfloat16"
    np.testing.assert_array_equal(stack.run(X, (state, None))[0].shape, (4, 12, 20))


@pytest.mark.parametrize("suffix", [".pt", ".onnx", ".keras"])
def test_other_formats_store_the_same_numbers_as_float32(tmp_path, suffix):
    pytest.importorskip({".pt": "torch", ".onnx": "onnx", ".keras": "keras"}[suffix])
    rng = np.random.default_rng(4)
    net = Network([Recurrent((make_cell(rng, 6, 24),))]).with_weights("bfloat16")
    net.save(tmp_path / f"net{suffix}")
    again = load(tmp_path / f"net{suffix}")
    assert again.weights == "float32"
    np.testing.assert_array_equal(again.cells[0].kernel, net.cells[0].kernel)
    np.testing.assert_array_equal(again(X), net.with_weights("float32")(X))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "module", "sequential"])
def test_checkpoints_of_bfloat16_stay_so(tmp_path, kind):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(6, 9, 2, batch_first=True)
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pt")
    narrow = copy.deepcopy(lstm).bfloat16()
    if kind == "safetensors":
        save_file(narrow.state_dict(), path)
    elif kind == "sequential":
        torch.save(torch.nn.Sequential(narrow), path)
    else:
        torch.save(narrow if kind == "module" else narrow.state_dict(), path)
    net = load(path)
    assert net.weights == "bfloat16"
    wide = narrow.float()
    np.testing.assert_array_equal(net.cells[1].recurrent_kernel, wide.weight_hh_l1.detach().numpy().T)
    with torch.no_grad():
        expected = wide(torch.from_numpy(X))[0].numpy()
        np.testing.assert_allclose(net.with_weights("float32")(X), expected, atol=1e-6)
        theirs = narrow.bfloat16()(torch.from_numpy(X).bfloat16())[0].float().numpy()
    assert np.abs(net(X) - expected).max() < min(2e-3, 0.5 * np.abs(theirs - expected).max())
    net.save(tmp_path / "again.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "again.safetensors")(X), net(X))


def test_verify_allows_for_rounding(tmp_path):
    net = example()
    net.save(tmp_path / "net.safetensors")
    small = net.with_weights("bfloat16")
    report = verify(small, tmp_path / "net.safetensors", X)
    assert (report.weights, report.tolerance, report.ok()) == ("bfloat16", 2e-2, True)
    assert 1e-4 < max(one.relative for one in report.differences) < 2e-2
    assert not report.ok(1e-4)
    assert "within 2.0e-02" in report.text()
    small.save(tmp_path / "small.safetensors")
    assert verify(small, tmp_path / "small.safetensors", X).ok(0.0)
    assert verify(net, tmp_path / "net.safetensors", X).tolerance == 1e-4


@pytest.mark.long
def test_the_command_line(tmp_path, capsys):
    example().save(tmp_path / "net.safetensors")
    source, target = str(tmp_path / "net.safetensors"), str(tmp_path / "small.safetensors")
    assert cli.main(["convert", source, target, "--weights", "bfloat16"]) == 0
    assert "pass: every relative difference is within 1.0e-04" in capsys.readouterr().out
    assert load(target).weights == "bfloat16"
    assert cli.main(["info", target]) == 0
    assert "matrices in bfloat16" in capsys.readouterr().out
    assert cli.main(["convert", target, str(tmp_path / "net.c")]) in (0, 1, 2)
    capsys.readouterr()
    stack = Network([Recurrent((make_cell(np.random.default_rng(0), 6, 24),))])
    stack.save(source)
    assert cli.main(["convert", source, str(tmp_path / "out.onnx"), "--weights", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16 matrices are written as float32" in out
    assert "pass: every relative difference is within 1.0e-04" in out
    np.save(tmp_path / "x.npy", X)
    assert cli.main(["run", source, str(tmp_path / "x.npy"), "--weights", "bfloat16", "--json"]) == 0
    y = json.loads(capsys.readouterr().out)["layer_0"]
    np.testing.assert_array_equal(np.array(y, np.float32), stack.run(X, weights="bfloat16")[0])

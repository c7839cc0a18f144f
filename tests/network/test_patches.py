"""Patches: their effect on gates and states, compared with the reference; run, traced, streamed, pooled and saved."""

import pickle
from dataclasses import replace

import numpy as np
import pairs
import pytest
import tolerances
from family import random_spec
from networks import fill, make_cell, make_stack, make_states

import cellstack as cs
from cellstack import CellSpec, FormatError, Network, Patch, ShapeError, reference
from cellstack.cells.base import MatrixState
from cellstack.cells.spec import GATES, TRACES
from cellstack.nodes import MLSTM, Bidirectional, Dense, Recurrent
from cellstack.reference import memory

HOWS = ("set", "add", "scale", "freeze")


def rng_of(seed):
    return np.random.default_rng(seed)


def random_patch(rng, spec, batch, steps, node="layer_0", cell=None):
    gate = str(rng.choice(TRACES[spec.kind]._fields))
    width = spec.output_size if gate == "h" else spec.units
    some = lambda n: None if rng.random() < 0.3 else sorted(rng.choice(n, rng.integers(1, n + 1), False).tolist())  # noqa: E731
    units, rows, chosen = some(width), some(batch), some(steps)
    if rng.random() < 0.5:
        start = int(rng.integers(0, steps))
        chosen = slice(start, int(rng.integers(start + 1, steps + 3)), int(rng.integers(1, 3)))
    how = str(rng.choice(HOWS))
    value = None if how == "freeze" else round(float(rng.normal()), 3)
    if how != "freeze" and rng.random() < 0.4:
        along = 1 if chosen is None else len(range(steps + 3)[chosen]) if isinstance(chosen, slice) else len(chosen)
        counts = (len(rows or range(batch)), along, len(units or range(width)))
        value = rng.normal(size=[n if rng.random() < 0.6 else 1 for n in counts])
    return Patch(node, gate, units, rows, chosen, value, how, cell)


class Patched:
    """Patches applied element by element, as documented in `Patch`, for `reference.forward`."""

    def __init__(self, patches, batch, used):
        self.patches, self.batch, self.used = patches, batch, used
        self.gates = {}

    def __call__(self, gate, t, value, before):
        value = value.copy()
        for patch in self.patches:
            if patch.gate != gate:
                continue
            steps = self.places(patch.steps, t)
            if steps is None:
                continue
            for row in range(self.batch):
                at = self.places(patch.rows, row)
                for unit in range(value.shape[1]) if at is not None else ():
                    which = self.places(patch.units, unit)
                    if which is None:
                        continue
                    if patch.how == "freeze":
                        last = self.gates.get((gate, row)) if before is None else before[row]
                        value[row, unit] = value[row, unit] if last is None else last[unit]
                        continue
                    numbers = patch.value.reshape((1,) * (3 - patch.value.ndim) + patch.value.shape)
                    places = zip((at, steps, which), numbers.shape, strict=True)
                    number, v = numbers[tuple(min(k, n - 1) for k, n in places)], value[row, unit]
                    value[row, unit] = {"set": number, "add": v + number, "scale": v * number if number else 0.0}[
                        patch.how
                    ]
        if before is None:
            for row in np.flatnonzero(self.used[:, t]):
                self.gates[gate, row] = value[row]
        return value

    @staticmethod
    def places(index, number):
        if index is None:
            return number
        if isinstance(index, slice):
            found = range(index.start or 0, index.stop if index.stop is not None else 10**9, index.step or 1)
            return found.index(number) if number in found else None
        return list(index).index(number) if number in index else None


@pairs.seeds(60, 150)
def test_a_patched_cell_matches_the_reference(seed):
    rng = rng_of(seed)
    spec = random_spec(rng, largest=20)
    if seed % 5 == 0:
        spec = CellSpec(spec.input_size, spec.units)  # the plain LSTM
    batch, steps = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    dtype = ("float64", "float32")[seed % 2]
    cell = fill(rng, spec, dtype)
    patches = [random_patch(rng, spec, batch, steps) for _ in range(rng.integers(1, 5))]
    reverse = bool(seed % 3 == 0)
    net = Network([Recurrent((cell,), go_backwards=reverse)]).edit(patches)
    x = rng.normal(size=(batch, steps, spec.input_size)).astype(dtype)
    mask = rng.random((batch, steps)) < 0.7 if seed % 4 == 0 else None
    used = np.ones((batch, steps), bool) if mask is None else mask
    state = make_states(rng, net, batch)
    patched = Patched(patches, batch, used)
    expected = reference.forward(spec, cell.arrays, x, state[0], mask=mask, reverse=reverse, patched=patched)
    t = net.trace(x, state, mask)
    seen = t["layer_0"]
    bound = {"rtol": tolerances.KERNEL[dtype], "atol": tolerances.KERNEL[dtype]}
    for plane, gate in enumerate(GATES[spec.kind]):
        np.testing.assert_allclose(getattr(seen, gate), expected.gates[:, :, plane], **bound)
    np.testing.assert_allclose(seen.h, expected.y, **bound)
    for name, array in zip(expected.state._fields[1:], expected.states, strict=True):
        np.testing.assert_allclose(getattr(seen, name), array, **bound)
    y, after = net.run(x, state, mask)
    assert np.array_equal(t.y, y)
    for one, other in zip(after[0], expected.state, strict=True):
        np.testing.assert_allclose(one, other, **bound)


def patched_stack(seed, dtype="float32", rows=2):
    """Return cell nodes, some with several cells, with dense layers between and above, and patches of some cells."""
    rng = rng_of(seed)
    below = make_stack(rng, 3, dtype, residual=bool(seed % 2))
    width = below.units
    dense = Dense(rng.normal(size=(width, 4)).astype(dtype), rng.normal(size=4).astype(dtype), activation="tanh")
    above = make_stack(rng, 4, dtype)
    net = Network([below, dense, above, Dense(rng.normal(size=(above.units, 2)).astype(dtype))])
    patches = []
    for _ in range(rng.integers(1, 5)):
        name, node = (("layer_0", below), ("layer_2", above))[rng.integers(2)]
        place = int(rng.integers(len(node.cells)))
        patches.append(random_patch(rng, node.cells[place].spec, rows, 9, name, place))
    return rng, net.edit(patches), rng.normal(size=(2, 9, 3)).astype(dtype)


@pytest.mark.parametrize("seed", range(60))
def test_streams_have_the_bits_of_the_run(seed):
    _, net, x = patched_stack(seed, ("float32", "float64")[seed % 2])
    y = net(x)
    assert np.array_equal(net.run(x, threads=2)[0], y)
    stream = net.stream(batch=2, threads=1 + seed % 2)
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(4)], axis=1), y[:, :4])
    other = stream.fork()
    assert np.array_equal(stream.run(x[:, 4:]), y[:, 4:])
    assert np.array_equal(np.concatenate([other.run(x[:, 4:7]), other.run(x[:, 7:])], axis=1), y[:, 4:])
    stream.reset(rows=[0])
    again = stream.run(x[:, :3])
    assert np.array_equal(again[0], y[0, :3])


@pytest.mark.parametrize("seed", range(30))
def test_sessions_have_the_bits_of_their_streams(seed):
    _, net, x = patched_stack(seed, rows=1)
    pool = net.pool(4)
    one, two = pool.open(), pool.open()
    streams = {one: net.stream(), two: net.stream()}
    for t in range(9):
        chosen = [one, two] if t % 3 else [two]
        y = pool.step(chosen, x[: len(chosen), t])
        for session, own, frame in zip(chosen, y, x[: len(chosen), t], strict=True):
            assert np.array_equal(streams[session].step(frame[None])[0], own)
    pool.close(two)
    anew = pool.open()
    assert np.array_equal(pool.step([anew], x[:1, 0]), net.stream().step(x[:1, 0]))


@pytest.mark.parametrize("seed", range(20))
def test_the_native_format_stores_patches(seed, tmp_path):
    _, net, x = patched_stack(seed)
    net.save(tmp_path / "net.safetensors")
    read = cs.load(tmp_path / "net.safetensors")
    assert [repr(patch) for patch in read.patches] == [repr(patch) for patch in net.patches]
    assert np.array_equal(read(x), net(x))
    assert np.array_equal(pickle.loads(pickle.dumps(net))(x), net(x))
    parts = cs.extract(tmp_path / "net.safetensors")
    assert sum(len(part.patches) for part in parts.values()) == len(net.patches)
    assert np.array_equal(read.unedited(x), Network(net.nodes)(x))


@pytest.mark.parametrize("seed", range(20))
def test_a_patch_that_changes_nothing_changes_no_bit(seed):
    rng = rng_of(seed)
    spec = random_spec(rng, largest=40) if seed % 2 else CellSpec(5, int(rng.integers(1, 40)))
    net = Network([Recurrent((fill(rng, spec),))])
    x = rng.normal(size=(3, 7, spec.input_size))
    gates = TRACES[spec.kind]._fields
    still = [Patch("layer_0", gate, value=1.0, how="scale") for gate in gates]
    still += [Patch("layer_0", gate, steps=6, rows=2, units=0, value=-0.0, how="add") for gate in gates]
    assert np.array_equal(net.edit(still)(x), net(x))
    late = net.edit(Patch("layer_0", "h", steps=slice(5, None), value=9.0))
    assert np.array_equal(late(x)[:, :5], net(x)[:, :5])
    assert (late(x)[:, 5:] == 9.0).all()


def test_steps_are_counted_in_the_order_of_time_in_both_directions():
    rng = rng_of(0)
    ahead, back = make_cell(rng, 3, 4, "float64"), make_cell(rng, 3, 4, "float64")
    both = Bidirectional(Recurrent((ahead,)), Recurrent((back,), go_backwards=True))
    x = rng.normal(size=(1, 8, 3))
    t = Network([both]).edit(Patch("layer_0", "h", steps=2, value=7.0, cell=1)).trace(x)
    assert (t["layer_0"].cells[1].h[0, 2] == 7.0).all()
    assert not (t["layer_0"].cells[1].h == 7.0)[0, 3:].any()
    # Above a node that reverses the sequence, steps are those of its output.
    above = Recurrent((make_cell(rng, 4, 4, "float64"),))
    net = Network([Recurrent((back,), go_backwards=True), above])
    y = net.edit(Patch("layer_1", "h", steps=2, value=7.0))(x)
    assert (y[0, 2] == 7.0).all()
    assert np.array_equal(y[:, :2], net(x)[:, :2])


def test_a_later_patch_is_applied_to_the_result_of_an_earlier_one():
    net = Network([Recurrent((make_cell(rng_of(1), 2, 3),))])
    x = np.ones((1, 4, 2))
    first, second = Patch("layer_0", "o", value=0.25), Patch("layer_0", "o", units=1, value=0.5)
    t = net.edit(first).edit(second).trace(x)
    assert (t["layer_0"].o[..., 1] == 0.5).all()
    assert (t["layer_0"].o[..., [0, 2]] == 0.25).all()
    t = net.edit(
        [second, Patch("layer_0", "o", value=2.0, how="scale"), Patch("layer_0", "o", value=0.5, how="add")]
    ).trace(x)
    assert (t["layer_0"].o[..., 1] == 1.5).all()


def test_patches_can_set_nan_and_replace_nan():
    cell = make_cell(rng_of(1), 2, 3)
    x = np.full((1, 4, 2), np.nan)
    held = Network([Recurrent((cell,))]).edit([Patch("layer_0", gate, value=0.5) for gate in "ifgo"])
    assert np.isfinite(held(x)).all()
    t = Network([Recurrent((cell,))]).edit(Patch("layer_0", "c", units=[1], value=np.inf)).trace(np.ones((1, 4, 2)))
    assert np.isposinf(t["layer_0"].c[..., 1]).all()
    assert np.isfinite(t["layer_0"].c[..., [0, 2]]).all()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_streams_with_bfloat16_and_int8_weights_support_patches(weights):
    net = Network([Recurrent((make_cell(rng_of(2), 6, 20), make_cell(rng_of(3), 20, 9)))])
    x = rng_of(4).normal(size=(1, 5, 6)).astype("float32")
    held = net.edit(Patch("layer_0", "h", [3], steps=slice(2, None), value=0.75, cell=1))
    y, plain = held.stream(weights=weights).run(x), net.stream(weights=weights).run(x)
    assert np.array_equal(y[:, :2], plain[:, :2])
    assert (y[:, 2:, 3] == 0.75).all()


def patched_memory(seed, dtype):
    """Return a network with an mLSTM and patches of it, its node, and the sizes of a run."""
    rng = rng_of(seed)
    heads, keys, values, batch, steps = (int(rng.integers(1, most)) for most in (4, 5, 5, 4, 9))
    node = MLSTM(heads, keys, values, output_gate=bool(seed % 2))
    net = Network(
        [Dense(rng.normal(size=(3, node.input_size)).astype(dtype)), node, Dense(np.ones((node.units, 2), dtype))]
    )
    patches = []
    while len(patches) < rng.integers(1, 4):
        spec = net.stateful[0].spec
        gate = str(rng.choice(spec.of_kind.trace._fields))
        width = int(np.prod(spec.trace_shapes[gate]))
        as_a_cell = CellSpec(1, width, kind="rnn")  # whose h is as wide as the field
        patches.append(replace(random_patch(rng, as_a_cell, batch, steps, "layer_1"), gate=gate))
    return rng, net.edit(patches), node, rng.normal(size=(batch, steps, 3)).astype(dtype)


def by_hand(net, node, x, before, mask=None):
    """Run an mLSTM's patches element by element, see `Patched`; return h, the state and every field."""
    projected = x.astype("f8") @ net.nodes[0].kernel
    apply, seen = Patched(net.patches, len(x), np.ones(x.shape[:2], bool) if mask is None else mask), {}

    def patched(name, t, value, before):
        flat = lambda array: None if array is None else array.reshape(len(x), -1)  # noqa: E731
        seen[name, t] = apply(name, t, flat(value), flat(before)).reshape(value.shape)
        return seen[name, t]

    o = (
        1 / (1 + np.exp(-projected[..., node.core_size :])).reshape(*x.shape[:2], node.heads, -1)
        if node.output_gate
        else None
    )
    inputs = memory.split(projected[..., : node.core_size], node.heads, node.key_size, node.value_size)
    return *memory.steps(inputs, before, node.epsilon, mask, None, patched, o), seen


@pytest.mark.parametrize("seed", range(40))
def test_a_patched_memory_matches_the_reference(seed):
    dtype = ("float64", "float32")[seed % 2]
    rng, net, node, x = patched_memory(seed, dtype)
    mask = rng.random(x.shape[:2]) < 0.7 if seed % 4 == 0 else None
    state = MatrixState(*(rng.normal(size=(len(x), *shape)) for shape in node.memory.state_shapes.values()))
    h, after, seen = by_hand(net, node, x, state, mask)
    t = net.trace(x, (state,), mask)
    bound = {"rtol": tolerances.KERNEL[dtype], "atol": tolerances.KERNEL[dtype]}
    np.testing.assert_allclose(t["layer_1"].y, h.reshape(t["layer_1"].y.shape), **bound)
    for one, other in zip(t.state[0], after, strict=True):
        np.testing.assert_allclose(one, other, **bound)
    for (name, step), value in seen.items():
        used = slice(None) if mask is None else mask[:, step]
        np.testing.assert_allclose(getattr(t["layer_1"], name)[used, step], value[used], **bound)
    assert np.array_equal(net.run(x, (state,), mask)[0], t.y)
    np.testing.assert_allclose(t["layer_1"].memory(), after.C, **bound)


@pytest.mark.parametrize("seed", range(40))
def test_streams_of_patched_memories_are_the_run(seed):
    _, net, _, x = patched_memory(seed, "float64")
    y = net(x)
    stream = net.stream(batch=len(x))
    first = np.concatenate([stream.step(x[:, t])[:, None] for t in range(min(2, x.shape[1]))], axis=1)
    other = stream.fork()
    bound = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(np.concatenate([first, stream.run(x[:, 2:])], axis=1), y, **bound)
    np.testing.assert_allclose(other.run(x[:, 2:]), y[:, 2:], **bound)
    stream.reset()
    np.testing.assert_allclose(stream.run(x), y, **bound)
    pool = net.unedited.edit([replace(patch, rows=None, value=1.0) for patch in net.patches if patch.how == "set"])
    sessions, alone = pool.pool(2), pool.stream()
    a, b = sessions.open(), sessions.open()
    sessions.step([a], x[:1, 0])
    for t in range(x.shape[1]):
        np.testing.assert_allclose(sessions.step([b], x[:1, t]), alone.step(x[:1, t]), **bound)


def test_what_patches_of_a_memory_do():
    rng = rng_of(0)
    node = MLSTM(2, 3, 2)
    net, x = Network([Dense(rng.normal(size=(4, node.input_size))), node]), rng.normal(size=(2, 9, 4))
    memory_of = lambda net, **given: net.trace(x, **given)["layer_1"]  # noqa: E731
    off = [Patch("layer_1", "i", rows=0, steps=[3, 4], value=0.0)]  # the memory keeps what it has
    held = memory_of(net.edit([*off, Patch("layer_1", "f", rows=0, steps=[3, 4], value=1.0)]))
    assert np.array_equal(held.memory(4)[0], held.memory(2)[0])
    assert np.array_equal(memory_of(net.edit(off)).memory(4)[1], memory_of(net).memory(4)[1])
    forgets = memory_of(net.edit(Patch("layer_1", "f", units=[1], steps=[5], value=0.0)))  # of head 1
    assert (forgets.shares(8)[:, 1, :5] == 0).all()
    np.testing.assert_allclose(forgets.shares(8)[:, 0], memory_of(net).shares(8)[:, 0])
    scaled = memory_of(
        net.edit(Patch("layer_1", "m", value=1.0, how="add"))
    )  # only a common factor, apart from epsilon
    np.testing.assert_allclose(scaled.h, memory_of(net).h, rtol=1e-3)
    clean, other = net.trace(x)["layer_1"], rng.normal(size=x.shape)
    values = clean.v.reshape(2, 9, -1)
    restored = net.edit([Patch("layer_1", name, steps=slice(9), value=clean.flat(name)) for name in "qkvifmn"])
    np.testing.assert_allclose(restored(other), clean.y)  # activation patching with all fields gives the other run
    assert np.array_equal(restored.trace(other)["layer_1"].v.reshape(2, 9, -1), values)
    assert "NumPy (float64), step by step, 1 patch" in repr(net.edit(off).plan())
    found = cs.ablate(net, x, "layer_1", "zero", lambda y: y.sum(), gate="v")
    assert found.effects["layer_1", 0].shape == (4,)
    one = net.edit(Patch("layer_1", "v", units=[2], value=0.0))
    np.testing.assert_allclose(found.effects["layer_1", 0][2], one(x).sum() - net(x).sum())
    with pytest.raises(ValueError, match="to be one of q, k, v, i, f, m, n, h"):
        net.edit(Patch("layer_1", "o", value=0.0))
    with pytest.raises(IndexError, match="units of 'layer_1' from 0 to 1"):
        net.edit(Patch("layer_1", "f", units=[2], value=0.0))


def test_files_keep_patches_of_a_memory(tmp_path):
    _, net, _, x = patched_memory(3, "float32")
    net.save(tmp_path / "net.safetensors")
    assert np.array_equal(cs.load(tmp_path / "net.safetensors")(x), net(x))


def test_patches_with_empty_batches_and_sequences():
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit(Patch("layer_0", "f", rows=1, steps=3, value=1.0))
    assert net(np.zeros((0, 5, 2))).shape == (0, 5, 3)
    assert net(np.zeros((2, 0, 2))).shape == (2, 0, 3)


def test_what_is_refused():
    net = Network(
        [Recurrent((make_cell(rng_of(2), 2, 3), make_cell(rng_of(2), 3, 3, kind="gru"))), Dense(np.ones((3, 1), "f"))]
    )
    for match, error, arguments in (
        ("gate to be one of", ValueError, ("layer_0", "y")),
        ("how", ValueError, ("layer_0", "f", None, None, None, 1.0, "hold")),
        ("how='freeze' takes no value", ValueError, ("layer_0", "f", None, None, None, 1.0, "freeze")),
        ("value as a number", ShapeError, ("layer_0", "f")),
        ("number or numbers", TypeError, ("layer_0", "f", None, None, None, "one")),
        ("number or numbers", TypeError, ("layer_0", "f", None, None, None, "1.0")),
        ("number or numbers", TypeError, ("layer_0", "f", None, None, None, [[1.0, 2.0], [3.0]])),
        ("number or numbers", TypeError, ("layer_0", "f", None, None, None, np.ma.masked_array([1.0], [True]))),
        ("0 or above", ValueError, ("layer_0", "f", [-1], None, None, 1.0)),
        ("without repetitions", ValueError, ("layer_0", "f", [1, 1], None, None, 1.0)),
        ("integer from 0", ValueError, ("layer_0", "f", None, None, slice(-3, None), 1.0)),
        ("1 or 2 along units", ShapeError, ("layer_0", "f", [0, 1], None, None, [1.0, 2.0, 3.0])),
        ("steps with an end", ShapeError, ("layer_0", "f", [0, 1], None, None, [[1.0], [2.0]])),
        ("a node's name", TypeError, (0, "f", None, None, None, 1.0)),
    ):
        with pytest.raises(error, match=match):
            Patch(*arguments)
    for match, error, patch in (
        ("patches of layer_0, layer_1, got one of 'lstm'", ValueError, Patch("lstm", "f", value=1.0)),
        ("node 'layer_1' has no cells", ValueError, Patch("layer_1", "h", value=1.0)),
        ("cell=0 to 1", ValueError, Patch("layer_0", "f", value=1.0)),
        ("cell=0 to 1", ValueError, Patch("layer_0", "f", value=1.0, cell=2)),
        ("to be one of z, r, g, h", ValueError, Patch("layer_0", "f", value=1.0, cell=1)),
        ("units of 'layer_0' from 0 to 2", IndexError, Patch("layer_0", "f", units=[3], value=1.0, cell=0)),
        ("along units", ShapeError, Patch("layer_0", "f", value=[1.0, 2.0], cell=0)),
        ("expected a Patch", TypeError, None),
    ):
        with pytest.raises(error, match=match):
            net.edit([patch])
    with pytest.raises(TypeError, match="a Patch or several, got NoneType"):
        net.edit(None)
    x = np.ones((2, 4, 2))
    for match, patch in (
        ("steps from 0 to 3", Patch("layer_0", "f", steps=slice(4, 9), value=1.0, cell=0)),
        ("steps from 0 to 3", Patch("layer_0", "f", steps=[1, 4], value=1.0, cell=0)),
        ("rows from 0 to 1", Patch("layer_0", "f", rows=2, value=1.0, cell=0)),
    ):
        with pytest.raises(IndexError, match=match):
            net.edit(patch)(x)
    with pytest.raises(ShapeError, match="along rows"):
        net.edit(Patch("layer_0", "f", value=np.ones((3, 1, 1)), cell=0))(x)


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".onnx", ".pt"])
def test_other_formats_refuse_patches_by_name(suffix, tmp_path):
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit(Patch("layer_0", "f", value=1.0))
    with pytest.raises(
        ValueError, match=r"can't store patches; the network has Patch\('layer_0', gate='f', value=1.0\): save it as"
    ):
        net.save(tmp_path / f"net{suffix}")
    with pytest.raises(ValueError, match="C can't store patches"):
        net.export_c(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_patches_in_a_file_are_refused(tmp_path):
    import json

    from safetensors.numpy import load_file, save_file

    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit(Patch("layer_0", "f", [1], value=1.0))
    net.save(tmp_path / "net.safetensors")
    raw = (tmp_path / "net.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    description, tensors = json.loads(header["__metadata__"]["cellstack"]), load_file(tmp_path / "net.safetensors")
    for change in (
        {"node": "other"}, {"node": 3}, {"gate": "q"}, {"how": "hold"}, {"units": [9]}, {"units": ["a"]},
        {"units": {"start": "a"}}, {"value": [4]}, {"value": ["a"]}, {"value": [-1]}, {"more": 1}, {"cell": 4},
        {"steps": [-1]}, {"rows": []},
    ):  # fmt: skip
        patches = [description["patches"][0] | change]
        text = json.dumps(description | {"patches": patches})
        save_file(tensors, tmp_path / "bad.safetensors", {"cellstack": text})
        with pytest.raises(FormatError, match=r"bad\.safetensors"):
            cs.load(tmp_path / "bad.safetensors")


def test_plan_and_repr_show_patches():
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit([Patch("layer_0", "f", value=1.0)] * 2)
    assert "2 patches" in str(net.plan())
    assert repr(net).endswith("Patch('layer_0', gate='f', value=1.0)")
    assert repr(Patch("a", "c", rows=0, steps=slice(1, 9, 2), how="freeze", cell=1)) == (
        "Patch('a', gate='c', rows=[0], steps=slice(1, 9, 2), how='freeze', cell=1)"
    )


def test_a_stream_and_a_pool_refuse_rows_that_they_lack():
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit(Patch("layer_0", "f", rows=1, value=1.0))
    assert net.stream(batch=2).step(np.ones((2, 2))).shape == (2, 3)
    for made in (net.stream, lambda: net.pool(3)):
        with pytest.raises(IndexError, match="rows from 0 to 0"):
            made()


def test_a_stream_of_a_patched_network_refuses_to_remember():
    stream = Network([Recurrent((make_cell(rng_of(2), 2, 3),))]).edit(Patch("layer_0", "f", value=1.0)).stream()
    with pytest.raises(ValueError, match="doesn't support patches"):
        stream.remember(5)


def test_calls_with_different_shapes_and_masks_are_independent():
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))])
    held = net.edit([Patch("layer_0", "f", steps=slice(1, 3), how="freeze"), Patch("layer_0", "h", [1], value=0.5)])
    x = rng_of(3).normal(size=(4, 6, 2)).astype("float32")
    mask = rng_of(4).random((4, 6)) < 0.5
    first = [held(x), held(x[:2]), held(x[:, :4]), held(x, mask)]
    again = [held(x), held(x[:2]), held(x[:, :4]), held(x, mask)]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert np.array_equal(first[0][:2], first[1])
    assert np.array_equal(first[0][:, :4], first[2])


def test_numbers_of_numpy_in_slices_are_stored(tmp_path):
    net = Network([Recurrent((make_cell(rng_of(2), 2, 3),))])
    steps = slice(np.int64(1), np.int32(3), np.uint8(1))
    net.edit(Patch("layer_0", "f", steps=steps, value=1.0)).save(tmp_path / "net.safetensors")
    assert cs.load(tmp_path / "net.safetensors").patches[0].steps == slice(1, 3, 1)


def test_a_factor_of_zero_replaces_nan_and_infinity():
    net = Network([Recurrent((make_cell(rng_of(1), 2, 3),))])
    t = net.edit(Patch("layer_0", "c", value=0.0, how="scale")).trace(np.full((1, 3, 2), np.nan))
    assert not t["layer_0"]["c"].any()


def test_a_long_stream_counts_steps_across_blocks_and_resets():
    net = Network([Recurrent((make_cell(rng_of(1), 2, 3),))])
    x = rng_of(2).normal(size=(2, 200, 2)).astype("float32")
    patches = [
        Patch("layer_0", "h", [1], steps=slice(60, 70), value=rng_of(3).normal(size=(10, 1))),
        Patch("layer_0", "f", steps=slice(130, None, 3), how="freeze"),
        Patch("layer_0", "o", rows=1, steps=[0, 64, 127, 128], value=0.5),
    ]
    held = net.edit(patches)
    y, stream = held(x), held.stream(batch=2)
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(200)], axis=1), y)
    stream.reset()
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(3)], axis=1), y[:, :3])
    other = stream.fork()
    assert np.array_equal(other.run(x[:, 3:150]), y[:, 3:150])
    assert np.array_equal(other.step(x[:, 150]), y[:, 150])

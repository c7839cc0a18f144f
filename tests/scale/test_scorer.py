"""`Scorer`: the bits of `Network.run`, however the rows are divided; columns that don't fit."""

import datetime
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from data import COLUMNS, FEATURES, expected, make_net, make_rows, outputs, same
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_cell, make_network

from cellstack import Network, Patch
from cellstack.nodes import MLSTM, Bidirectional, Conv1D, Dense, Embedding, Recurrent, Standardise
from cellstack.scale import Scorer
from cellstack.train import UsageError


@pytest.fixture
def scorer():
    return Scorer(make_net(), **COLUMNS)


def in_parts(scorer, table, cuts):
    state, parts = None, []
    for first, last in zip([0, *cuts], [*cuts, len(table)], strict=True):
        scored, state = scorer.score(table.slice(first, last - first), state)
        parts.append(scored)
    return pa.concat_tables(parts), state


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    by_id=st.booleans(),
)
def test_however_rows_are_divided_predictions_have_the_bits_of_a_run_of_each_whole_sequence(lengths, cuts, by_id):
    table, whole = make_rows(len(lengths), lengths)
    table = table.sort_by([("meter", "ascending"), ("hour", "ascending")]) if by_id else table
    scorer = Scorer(make_net(), **COLUMNS)
    scored, state = in_parts(scorer, table, sorted(min(cut, len(table)) for cut in cuts))
    same(outputs(scored), expected(scorer.network, whole))
    assert scored["meter"] == table["meter"]
    assert scored["hour"] == table["hour"]
    ends = dict(zip(state["meter"].to_pylist(), state["hour"].to_pylist(), strict=True))
    assert ends == {name: len(x) - 1 for name, x in whole.items()}


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    net = make_network(seed, streams=True)
    if len(net.shapes[net.outputs[0]]) != 2 or not net.cells:
        net = Network([*net.nodes[:0], Recurrent((make_cell(np.random.default_rng(seed), 4, 5),))])
    rng, width = np.random.default_rng(seed), net.input_size
    x = {name: rng.normal(size=(length, width)).astype(net.dtype) for name, length in (("a", 7), ("b", 3))}
    columns = [f"c{n}" for n in range(width)]
    rows = pd.concat([pd.DataFrame(values, columns=columns).assign(id=name) for name, values in x.items()])
    scorer = Scorer(net, "id", features=columns)
    scored, _ = in_parts(scorer, pa.Table.from_pandas(rows, preserve_index=False), [4])
    found = scored.drop_columns("id").to_pandas().to_numpy()
    np.testing.assert_array_equal(found, np.concatenate([net.run(values[None])[0][0] for values in x.values()]))


def test_a_convolution_keeps_its_steps_in_the_state(rng):
    kernel = rng.normal(size=(3, 3, 4)).astype("f4")
    net = Network([Conv1D(kernel, padding="causal"), Recurrent((make_cell(rng, 4, 5),))])
    table, whole = make_rows(1)
    scored, _ = in_parts(Scorer(net, **COLUMNS), table, [2, 3, 11])
    same(outputs(scored), expected(net, whole))


def test_an_mlstm_has_the_bits_of_a_stream(rng):
    """A run of the network computes several steps together."""
    memory = MLSTM(2, 3, 3)
    nodes = [Dense(rng.normal(size=(3, memory.input_size)).astype("f4")), memory]
    net = Network([*nodes, Dense(rng.normal(size=(6, 2)).astype("f4"))])
    table, whole = make_rows(lengths=(90, 7, 60))
    scored, _ = in_parts(Scorer(net, **COLUMNS), table, [2, 3, 70])
    stream = {name: net.stream().run(x[None])[0] for name, x in whole.items()}
    same(outputs(scored), stream)
    run = expected(net, whole)
    assert any((run[name] != y).any() for name, y in stream.items())
    assert all(np.abs(run[name] - y).max() < 1e-5 * max(1.0, np.abs(y).max()) for name, y in stream.items())


def test_ids_of_an_embedding(rng):
    net = Network([Embedding(rng.normal(size=(10, 3)).astype("f4")), Recurrent((make_cell(rng, 3, 4),))])
    table = pa.table({"user": [7, 7, 8, 7], "item": pa.array([1, 2, 3, 9], pa.int16())})
    scorer = Scorer(net, "user", features=["item"])
    scored, _ = in_parts(scorer, table, [1])
    found = scored.to_pandas().query("user == 7").filter(like="predicted").to_numpy()
    np.testing.assert_array_equal(found, net.run(np.array([[1, 2, 9]]))[0][0])
    with pytest.raises(UsageError, match=r"ids.* from 0 to 9.*10"):
        scorer.score(pa.table({"user": [1], "item": [10]}))
    with pytest.raises(UsageError, match="expected integers in column 'item', which the network looks up, got double"):
        scorer.score(pa.table({"user": [1], "item": [1.5]}))
    with pytest.raises(UsageError, match="row 1: column 'item' has no value"):
        scorer.score(pa.table({"user": [1, 1], "item": [1, None]}))


def test_frames_of_pandas_and_pickled_scorers(scorer):
    table, whole = make_rows()
    found, state = pickle.loads(pickle.dumps(scorer)).score(table.to_pandas().assign(more="text"))
    assert isinstance(found, pd.DataFrame)
    same(outputs(pa.Table.from_pandas(found)), expected(scorer.network, whole))
    assert state.equals(scorer.score(table)[1])


def test_the_same_arguments_give_the_same_results_and_stay_as_they_were(scorer):
    table, _ = make_rows()
    _, state = scorer.score(table.slice(0, 8))
    before = state.to_pylist()
    first, second = (scorer.score(table.slice(8), state) for _ in range(2))
    assert first[0].equals(second[0])
    assert first[1].equals(second[1])
    assert state.to_pylist() == before


def test_a_state_has_all_sequences_also_those_without_new_rows(scorer):
    table, whole = make_rows()
    _, state = scorer.score(table)
    _, after = scorer.score(make_rows(2, (2,), first=100)[0], state)
    assert sorted(after["meter"].to_pylist()) == sorted(whole)


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        (pa.array([3, 4], pa.uint8()), pa.int64()),
        (pa.array([0.5, 0.75]), pa.float64()),
        (pa.array([datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)]), pa.timestamp("ms")),
        (pa.array([1, 2], pa.timestamp("s", "Europe/Berlin")), pa.timestamp("s", "Europe/Berlin")),
    ],
)
def test_times_of_all_kinds(scorer, times, wanted):
    table = pa.table(
        {"meter": pa.array(["a", "a"]).dictionary_encode(), "hour": times} | {name: [1, 2] for name in FEATURES}
    )
    whole, after = scorer.score(table)
    _, state = scorer.score(table[:1])
    assert state.schema.field("hour").type == wanted
    rest, state = scorer.score(table[1:], state)
    assert whole[1:].equals(rest)
    assert after.equals(state)


# ── networks of cellstack.train ─────────────────────────────────────────────────────────────────────────────────────


def trained(task, **metadata):
    rng = np.random.default_rng(0)
    first = Standardise(rng.normal(size=4).astype("f4"), np.ones(4, "f4"))
    head = Dense(rng.normal(size=(5, 3)).astype("f4"), None, "softmax" if task == "classify" else "linear")
    metadata = {"task": task, "observed": [1], "columns": list(FEATURES), "per_step": True, "labels": [], **metadata}
    return Network([first, Recurrent((make_cell(rng, 4, 5),)), head], metadata=metadata)


def test_a_classifier_gives_classes_and_treats_missing_values_as_in_training():
    labels = ["calm", "busy", "odd"]
    net = trained("classify", labels=labels, table={"id": "meter", "time": "hour"})
    table, _ = make_rows()
    frame = table.to_pandas()
    frame.loc[3, "heat"] = np.nan
    frame.loc[7, list(FEATURES)] = np.nan
    found, _ = Scorer(net).score(frame)
    assert found.columns.to_list() == ["meter", "hour", "predicted", "p_calm", "p_busy", "p_odd"]
    assert found.drop(columns=["meter", "hour"]).isna().all(axis=1).to_list() == [n == 7 for n in range(len(found))]
    wanted = net.predict(frame).to_frame()
    frame["step"] = frame.groupby("meter").cumcount()
    both = found.assign(step=frame["step"]).merge(wanted, on=["meter", "step"])
    both = both[both["predicted_x"].notna()]
    assert len(both) == len(found) - 1
    assert (both["predicted_x"] == both["predicted_y"]).all()
    np.testing.assert_array_equal(both["p_odd_x"], both["p_odd_y"].astype("f4"))
    with pytest.raises(UsageError, match="missing has no effect: the network treats missing values as in training"):
        Scorer(net, missing="skip")


def test_skipped_rows_leave_the_sequence_as_it_was():
    net, (table, whole) = make_net(), make_rows(0, (6, 3))
    frame = table.to_pandas()
    frame.loc[4, "wind"] = np.nan  # meter-0 at hour 2
    with pytest.raises(UsageError, match=r"row 4: column 'wind' has no value: `missing='skip'` leaves"):
        Scorer(net, **COLUMNS).score(frame)
    scored, _ = Scorer(net, **COLUMNS, missing="skip").score(pa.Table.from_pandas(frame))
    assert scored["predicted_1"].is_null().to_pylist() == [n == 4 for n in range(9)]
    wanted = net.run(np.delete(whole["meter-0"], 2, axis=0)[None])[0][0]
    np.testing.assert_array_equal(np.delete(outputs(scored)["meter-0"], 2, axis=0), wanted)


# ── what doesn't fit ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wind": None}, "expected the column 'wind' once, found the columns meter, hour, load, heat"),
        ({"wind": ["1"] * 4}, "expected numbers in column 'wind', got string"),
        ({"hour": ["08:00"] * 4}, "expected numbers, dates or timestamps in column 'hour', got string"),
        ({"meter": [1.0, 2.0, 1.0, 2.0]}, "expected integers or text in column 'meter', got double"),
        ({"meter": ["a", None, "a", "b"]}, "row 1: column 'meter' has no value"),
        ({"hour": [0, 0, None, 1]}, "row 2: column 'hour' has no value"),
        ({"hour": [0.0, 0.0, float("nan"), 1.0]}, "row 2: column 'hour' has no value"),
        ({"hour": [1, 0, 0, 1]}, "row 2: meter 'a' at hour 0 comes after 1: sort the rows by hour, without duplicates"),
        ({"hour": [0, 0, 0, 1]}, "row 2: meter 'a' at hour 0 comes after 0: sort the rows by hour, without duplicates"),
        ({"heat": [1.0, None, 1.0, 1.0]}, "row 1: column 'heat' has no value"),
        ({"meter": pa.array([1, 2, 1, 2**63], pa.uint64())}, "expected column 'meter' as int64, got uint64"),
    ],
)
def test_rows_that_do_not_fit(scorer, changes, message):
    columns = {"meter": ["a", "b", "a", "b"], "hour": [0, 0, 1, 1], **{name: [1.0, 2.0, 3.0, 4.0] for name in FEATURES}}
    columns = {name: values for name, values in (columns | changes).items() if values is not None}
    with pytest.raises(UsageError, match=message):
        scorer.score(pa.table(columns))


def test_rows_before_the_state_and_states_of_other_networks(scorer):
    table, _ = make_rows()
    _, state = scorer.score(table)
    with pytest.raises(UsageError, match="row 0: meter 'meter-0' at hour 0 isn't after the last row of this meter"):
        scorer.score(table, state)
    with pytest.raises(UsageError, match="expected column 'hour' to be int64, as before, got timestamp"):
        scorer.score(table.set_column(1, "hour", table["hour"].cast(pa.timestamp("s"))), state)
    numbered = table.set_column(0, "meter", pa.array(range(len(table))))
    with pytest.raises(UsageError, match="expected column 'meter' to be string, as before, got int64"):
        scorer.score(numbered, state)
    with pytest.raises(
        UsageError, match=r"expected a state of this network, with meter, hour, network_state .*\[24\], found"
    ):
        scorer.score(table, Scorer(make_net(units=7), **COLUMNS).score(table)[1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"id": None}, r"expected `id=…`, the column that identifies the sequence"),
        ({"features": None}, r"give a list with `features=…`"),
        ({"features": "load"}, r"give a list with `features=…`"),
        ({"features": ("load", "heat")}, "expected 3 features, as the network has, got 2: load, heat"),
        ({"features": ("load", "heat", "hour")}, "expected different columns for id, time and features"),
        ({"missing": "drop"}, "expected missing to be refuse or skip, got 'drop'"),
    ],
)
def test_arguments_that_do_not_fit(how, message):
    with pytest.raises(UsageError, match=message):
        Scorer(make_net(), **COLUMNS | how)


def test_networks_that_can_not_be_scored(rng):
    net = make_net()
    with pytest.raises(ValueError, match="layer_0 can't run step by step"):
        Scorer(
            Network(
                [
                    Bidirectional(
                        Recurrent((make_cell(rng, 3, 4),)), Recurrent((make_cell(rng, 3, 4),), go_backwards=True)
                    )
                ]
            ),
            **COLUMNS,
        )
    with pytest.raises(UsageError, match="networks with patches aren't supported"):
        Scorer(net.edit(Patch("layer_0", cell=0, gate="h", value=0.0)), **COLUMNS)
    with pytest.raises(UsageError, match="expected a network for the task classify or regress, found 'forecast'"):
        Scorer(Network(net.nodes, metadata={"task": "forecast"}), **COLUMNS)
    two = Network(net.nodes, outputs=["layer_0", "layer_1"])
    with pytest.raises(UsageError, match="expected a network with one input and one output, found"):
        Scorer(two, **COLUMNS)
    with pytest.raises(ValueError, match="threads"):
        Scorer(net, **COLUMNS, threads=0)

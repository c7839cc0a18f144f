"""Reading .ts files, and errors that name the line."""

import numpy as np
import pytest

from cellstack import FormatError
from cellstack.train import read_ts
from cellstack.train.custom import Labelled, batches, split
from cellstack.train.examples import Inputs

HEADER = "@problemName Toy\n@timeStamps false\n@missing false\n@univariate false\n@dimensions 2\n@equalLength false\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_unequal_multivariate_with_classes(tmp_path):
    text = "# a comment\n" + HEADER + "@classLabel true one two\n@data\n1,2,3:4,5,6:two\n\n7:8:one\n"
    data = read_ts(write(tmp_path / "a.ts", text))
    assert data.labels == ("one", "two")
    assert data.name == "Toy"
    assert data.y.tolist() == [1, 0]
    assert data.lengths.tolist() == [3, 1]
    np.testing.assert_array_equal(data.x[0], np.array([[1, 4], [2, 5], [3, 6]], np.float32))
    assert data.x[0].dtype == np.float32


def test_header_in_any_case_and_univariate_of_equal_length(tmp_path):
    text = "@PROBLEMNAME u\n@UniVariate TRUE\n@EQUALLENGTH true\n@SeriesLength 2\n@ClassLabel True a b\n@DATA\n1,2:a\n"
    text += "3,4:b\n"
    data = read_ts(write(tmp_path / "a.ts", text))
    assert data.channels == 1
    assert data.y.tolist() == [0, 1]


def test_targets_and_neither(tmp_path):
    data = read_ts(write(tmp_path / "a.ts", HEADER + "@targetLabel true\n@data\n1:2:0.5\n3:4:-1e3\n"))
    assert data.labels == ()
    np.testing.assert_array_equal(data.y, np.array([0.5, -1000], np.float32))
    data = read_ts(write(tmp_path / "b.ts", HEADER + "@classLabel false\n@data\n1:2\n"))
    assert data.y is None


def test_missing_values_are_nan(tmp_path):
    text = HEADER.replace("@missing false", "@missing true") + "@classLabel true a\n@data\n1,?,NaN:4,5,?:a\n"
    x = read_ts(write(tmp_path / "a.ts", text)).x[0]
    np.testing.assert_array_equal(np.isnan(x), [[False, False], [True, False], [True, True]])


def test_the_order_of_a_trained_model_is_kept(tmp_path):
    path = write(tmp_path / "a.ts", HEADER + "@classLabel true one two\n@data\n7:8:one\n")
    assert read_ts(path, labels=("two", "one")).y.tolist() == [1]
    with pytest.raises(FormatError, match=r"line 9: expected one of the classes three, found 'one'"):
        read_ts(path, labels=("three",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected a line @data, found none"),
        ("1,2,3\n", r"line 1: expected a header line"),
        (HEADER + "@ \n@data\n1:2\n", r"line 7: expected a word after @, found none"),
        (HEADER.replace("@dimensions 2", "@dimensions \u00b2") + "@data\n1:1\n", r"an integer after @dimensions"),
        (HEADER + "@data\n", r"at least one sequence after @data"),
        (
            HEADER.replace("@timeStamps false", "@timeStamps true") + "@data\n(0,1):(0,1)\n",
            r"@timeStamps true isn't supported",
        ),
        (HEADER.replace("@timeStamps false", "@timeStamps maybe") + "@data\n1:1\n", r"true or false after @timestamps"),
        (HEADER.replace("@dimensions 2", "@dimensions two") + "@data\n1:1\n", r"an integer after @dimensions"),
        (HEADER + "@classLabel true a b a\n@data\n1:2:a\n", r"each class once after @classLabel, found 'a' 2 times"),
        (HEADER + "@classLabel true\n@data\n1:2:a\n", r"classes' names after @classLabel"),
        (HEADER + "@data\n1:2\n1:2:3\n", r"line 9: expected 2 channel\(s\).*found 3"),
        (HEADER + "@data\n1,2:3\n", r"line 8: expected channels of equal length, found lengths \[1, 2\]"),
        (HEADER + "@data\n1,x:3,4\n", r"line 8: expected a number, found 'x'"),
        (HEADER + "@data\n1,?:3,4\n", r"line 8: .*@missing false.*found '\?'"),
        (HEADER + "@data\n1,inf:3,4\n", r"finite number"),
        (HEADER + "@data\n1,1e39:3,4\n", r"finite number in float32's range"),
        (HEADER + "@data\n:3\n", r"at least one value"),
        (HEADER + "@classLabel true a b\n@data\n1:2:c\n", r"line 9: expected one of the classes a, b, found 'c'"),
        (HEADER + "@targetLabel true\n@data\n1:2:c\n", r"line 9: expected a number, found 'c'"),
        (
            HEADER.replace("@equalLength false", "@equalLength true") + "@data\n1:2\n1,2:3,4\n",
            r"line 9: expected 1 steps",
        ),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(FormatError, match=message) as error:
        read_ts(write(tmp_path / "bad.ts", text))
    assert "bad.ts" in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_aren_t_text(tmp_path):
    (tmp_path / "a.ts").write_bytes(b"@data\n\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read_ts(tmp_path / "a.ts")


def test_batches_have_one_length_and_contain_each_example_once(rng):
    lengths = rng.integers(1, 6, 100)
    chosen = np.sort(rng.permutation(100)[:80])
    groups = batches(lengths, chosen, 7, np.random.default_rng(1))
    assert all(len(np.unique(lengths[group])) == 1 and 1 <= len(group) <= 7 for group in groups)
    assert np.sort(np.concatenate(groups)).tolist() == chosen.tolist()
    again = batches(lengths, chosen, 7, np.random.default_rng(1))
    other = batches(lengths, chosen, 7, np.random.default_rng(2))
    assert all(np.array_equal(a, b) for a, b in zip(groups, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(groups, other, strict=True))


def test_batches_of_similar_lengths_are_few_and_mixed(rng):
    lengths = rng.integers(20, 201, 300)
    chosen = np.sort(rng.permutation(300)[:250])
    epochs = [batches(lengths, chosen, 16, np.random.default_rng(n), gap=2.0) for n in (1, 1, 2)]
    for groups in epochs:
        assert len(groups) == len(batches(lengths, chosen, 16, gap=2.0)) == 16  # 250 / 16
        assert {len(group) for group in groups} == {15, 16}
        assert np.sort(np.concatenate(groups)).tolist() == chosen.tolist()
        assert sum(len(group) * lengths[group].max() for group in groups) < 1.15 * lengths[chosen].sum()
        assert not all(np.diff([lengths[group].min() for group in groups]) >= 0)
    as_sets = [{frozenset(group.tolist()) for group in groups} for groups in epochs]
    assert all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not as_sets[0] & as_sets[2]  # each epoch has other companions, also among the shortest


def test_a_gap_between_lengths_is_not_padded(rng):
    lengths = rng.permutation([*[10] * 5, *range(15, 31), 61, 1000])
    groups = batches(lengths, np.arange(len(lengths)), 16, rng, gap=2.0)
    assert sorted(sorted(lengths[group].tolist()) for group in groups if lengths[group].max() > 30) == [[61], [1000]]
    assert len(groups) == 4  # and 21 of the others


@pytest.mark.parametrize("length", [1, 7, 12345])
def test_batches_of_one_length_do_not_depend_on_the_gap(length):
    """They are those of earlier versions, so that the same data gives the same weights bit for bit."""
    chosen, lengths = np.arange(3, 50), np.full(60, length)
    expected = np.array_split(np.random.default_rng(5).permutation(chosen), 6)
    rng = np.random.default_rng(5)
    rng.permutation(chosen)
    expected = [expected[n].tolist() for n in rng.permutation(6)]
    for gap in (1.0, 2.0):
        assert [g.tolist() for g in batches(lengths, chosen, 9, np.random.default_rng(5), gap)] == expected
        assert np.concatenate(batches(lengths, chosen, 9, gap=gap)).tolist() == chosen.tolist()
        assert batches(lengths, chosen[:0], 9, gap=gap) == []


def test_the_split_takes_its_share_of_every_class(rng):
    y = np.repeat(np.arange(4), 20)
    kept, held = split(y, 0.25, rng)
    assert np.bincount(y[held]).tolist() == [5] * 4
    assert sorted([*kept, *held]) == list(range(80))


def test_gaps_become_means_indicators_and_masks(tmp_path):
    text = (
        HEADER.replace("@missing false", "@missing true")
        + "@classLabel true a b\n@data\n1,?,?,3:4,6,?,8:a\n5,5:5,5:b\n"
    )
    examples = Labelled(read_ts(write(tmp_path / "a.ts", text)))
    inputs = Inputs.measure(examples, np.array([0]))
    np.testing.assert_allclose(inputs.mean, [2, 6])
    np.testing.assert_allclose(inputs.scale, [1, np.std([4, 6, 8])], rtol=1e-6)
    assert inputs.observed == (0,)  # channel 1 is missing only in empty steps, which are masked
    x, mask = inputs(examples.fetch(np.array([0])).x)
    np.testing.assert_array_equal(x[0], [[1, 4, 1], [2, 6, 0], [2, 6, 0], [3, 8, 1]])
    np.testing.assert_array_equal(mask, [[True, True, False, True]])
    x, mask = inputs(examples.fetch(np.array([1])).x)
    assert mask is None
    mean, scale = inputs.standardise
    assert mean[-1] == 0
    assert scale[-1] == 1


def test_a_channel_without_values_is_refused_and_a_constant_one_keeps_scale_one(tmp_path):
    text = HEADER.replace("@missing false", "@missing true") + "@classLabel true a b\n@data\n1,2:?,?:a\n1,2:7,7:b\n"
    examples = Labelled(read_ts(write(tmp_path / "a.ts", text)))
    with pytest.raises(ValueError, match="channel 1 has no values"):
        Inputs.measure(examples, np.array([0]))
    assert Inputs.measure(examples, np.array([1])).scale[1] == 1

"""The example of units that track properties of a text, in quick mode: its labels, its measures, its results."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "units_that_track.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("units_that_track", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quotes_are_distinguished_from_apostrophes(example):
    book = example.Book()
    text, closing = book.text, book.closing
    assert len(text) < 150_000
    assert "GUTENBERG" not in text.upper()
    inside = example.inside_quotes(text, closing)
    before = np.append(False, inside[:-1])
    assert text.count("`") == 1108
    assert before[closing].all()  # no closing quote without an open one
    assert (before & (np.array(list(text)) == "`")).sum() == 3  # quoted verse opens every stanza
    small = "She said, `I don't,'\n  and\nleft."
    truths = example.truths(small, example.closing_quotes(small))
    inside_quotes, _ = truths[example.QUOTES]
    assert "".join(np.array(list(small))[inside_quotes]) == "`I don't,"
    column, _ = truths[example.COLUMN]
    assert column[small.index("\n")] == 0
    assert column[small.index("left")] == 1
    first, counts = truths[example.PARAGRAPH]
    assert "".join(np.array(list(small))[first & counts]) == "and"


def test_tracking_is_auc_and_spearman_s_rho(example, rng):
    c, truth = rng.normal(size=(40, 3)).round(1), rng.random(40) < 0.3
    above = c[truth][:, None] > c[~truth]
    auc = (above + 0.5 * (c[truth][:, None] == c[~truth])).mean(axis=(0, 1))
    np.testing.assert_allclose(example.tracking(example.ranks(c), truth), 2 * auc - 1, atol=1e-12)
    column = rng.normal(size=40)
    rho = [np.corrcoef(example.ranks(unit), example.ranks(column))[0, 1] for unit in c.T]
    np.testing.assert_allclose(example.tracking(example.ranks(c), column), rho, atol=1e-12)


def test_marks_that_do_not_match_are_counted(example):
    assert example.unmatched(["`a' `b' c", "don't `x"]) == 0.0
    assert example.unmatched(["`a `b' c' "]) == pytest.approx(2 / 3)  # the first may follow an open quote


@pytest.mark.slow
def test_quick(example, tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLE, "--quick", "--html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unigram = float(re.search(r"1-gram ([\d.]+)", done.stdout)[1])
    loss = float(re.search(r"([\d.]+) nats per character held out$", done.stdout, re.MULTILINE)[1])
    assert loss < unigram - 0.5
    found = re.search(rf"^  {example.QUOTES} +(.*)$", done.stdout, re.MULTILINE)[1].replace(",", "").split()
    auc, untrained, most_by_chance = (float(found[at]) for at in (1, 4, 6))
    assert auc > max(untrained, most_by_chance)  # a small, briefly trained model that has begun to track quotes
    assert {path.name for path in tmp_path.iterdir()} == {"units-text.png", "units-ablated.png", "units.html"}

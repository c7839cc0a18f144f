"""The demo and its report: all parts there, nothing fetched from elsewhere."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cellstack import Trace, cli
from cellstack.inspect import report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refs, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        for value in values.values():
            self.refs += re.findall(r"url\(#([^)]+)\)", value or "")
        for name in ("href", "xlink:href", "src"):
            if name in values:
                assert values[name].startswith(("#", "data:")), values[name]
                if values[name].startswith("#"):
                    self.refs.append(values[name][1:])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(page):
    parsed = Balanced()
    parsed.feed(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.refs) <= set(parsed.ids)
    assert "<script" not in page
    assert "@import" not in page
    assert report.INK not in page
    assert report.FAINT not in page
    assert "prefers-color-scheme: dark" in page
    return " ".join(parsed.text)


def test_a_page_from_made_up_results(rng):
    labels = ["a", "<b>", "c"]
    so_far = rng.dirichlet(np.ones(3), size=5)
    score = {"accuracy": 0.5, "train_seconds": 1.0}
    result = {
        "seed": 1,
        "bidirectional": score,
        "forward": score,
        "replay": {
            "utterance": 3,
            "truth": "<b>",
            "labels": labels,
            "so_far": so_far.tolist(),
            "microseconds": [1.0] * 5,
        },
    }
    history = [{"epoch": n, "loss": 1.0 / n, "validation_loss": 2.0 / n} for n in range(1, 4)]
    trace = Trace(*(rng.normal(size=(5, 4)) for _ in range(6)))
    page = report.demo_page(result, history, history[:1], np.eye(3, dtype=int) * 4, [("layer 1", trace)])
    text = check_page(page)
    for part in ("training", "validation", "as told", "forget gate f", "candidate g", "speaker <b>"):
        assert part in text, part
    assert page == report.demo_page(result, history, history[:1], np.eye(3, dtype=int) * 4, [("layer 1", trace)])


@pytest.mark.slow
def test_the_demo_tells_the_whole_story(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert cli.main(["demo", "-o", str(folder), "--json"]) == 0
    out, said = capsys.readouterr()
    result = json.loads(out)
    check_page((folder / "report.html").read_text(encoding="utf-8"))
    for shape in ("[1 1 4]", "[2 3 5]", "[2 2 4]", "[2 2 5]"):
        assert shape in said
    assert result["bidirectional"]["accuracy"] > 0.965
    assert result["forward"]["accuracy"] > 0.94
    replay = result["replay"]
    assert replay["torch"] is False
    np.testing.assert_allclose(replay["so_far"][-1], replay["whole"], atol=1e-6)
    assert len(replay["microseconds"]) == len(replay["frame"])


def test_a_short_demo(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path), "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "median" in out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "bidirectional.safetensors",
        "forward.safetensors",
        "report.html",
    ]
    check_page((tmp_path / "report.html").read_text(encoding="utf-8"))

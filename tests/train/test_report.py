"""The demo and its report: complete, and without external resources."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from serving import WIDTH, lstm, wait_until

from cellstack.cells.lstm import Trace
from cellstack.cli import main as cli
from cellstack.inspect import LayerRecord, TrainingRecord, html
from cellstack.train import Sequences
from cellstack_demo import demo, pages, report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refs, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        for value in (value for name, value in values.items() if name != "srcdoc"):  # a separate page
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
    assert pages.INK not in page
    assert pages.FAINT not in page
    assert "prefers-color-scheme: dark" in page
    return " ".join(parsed.text)


def synthetic_report(rng, inside):
    labels = ["a", "<b>", "c"]
    so_far = rng.dirichlet(np.ones(3), size=5)
    score = {"accuracy": 0.5, "train_seconds": 1.0}
    result = {
        "seed": 1,
        "bidirectional": score,
        "forward": score,
        "replay": {
            "utterance": 3,
            "why": "picked <for> a reason",
            "truth": "<b>",
            "labels": labels,
            "so_far": so_far.tolist(),
            "microseconds": [1.0] * 5,
        },
    }
    history = [{"epoch": n, "loss": 1.0 / n, "validation_loss": 2.0 / n} for n in range(1, 4)]
    trace = Trace(*(rng.normal(size=(5, 4)) for _ in range(6)))
    return report.report(result, history, history[:1], np.eye(3, dtype=int) * 4, [("layer 1", trace)], inside)


@pytest.mark.long
def test_a_page_of_synthetic_results():
    page, again = (synthetic_report(np.random.default_rng(0), "<p>a &amp; b</p>") for _ in range(2))
    text = check_page(page)
    assert 'srcdoc="&lt;p&gt;a &amp;amp; b&lt;/p&gt;"' in page
    for part in (
        "training",
        "validation",
        "predicted speaker",
        "forget gate f",
        "candidate g",
        "speaker <b>",
        "picked <for> a reason",
        "The page contains the forward stack's weights",
    ):
        assert part in text, part
    assert page == again


DRAWN = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
FITS = """() => {
    const frame = document.querySelector("iframe.live");
    const inside = frame.contentDocument.getElementById("page").getBoundingClientRect().height;
    const { scrollHeight, clientHeight } = frame.contentDocument.documentElement;
    return scrollHeight === clientHeight && frame.clientHeight === Math.ceil(inside);
}"""


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 375])
def test_the_live_page_has_its_own_height_in_every_tab(browser, rng, tmp_path, width):
    trace = lstm().trace(rng.normal(size=(1, 12, WIDTH)))
    inside = b"".join(html.page(trace, "twelve steps", None, None, None)).decode()
    (tmp_path / "report.html").write_text(synthetic_report(rng, inside), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    live = page.frames[1]
    live.evaluate("document.getElementById('page').ready.then(() => null)")
    heights = set()
    for tab in live.get_by_role("tab").all():
        tab.click()
        live.evaluate(DRAWN)
        wait_until(lambda: page.evaluate(FITS), seconds=10)
        heights.add(page.locator("iframe.live").bounding_box()["height"])
    assert len(heights) > 4  # it also becomes smaller again
    page.close()


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 600, 585, 375])
def test_pictures_that_are_wider_than_the_screen_say_that_they_scroll(browser, rng, tmp_path, width):
    (tmp_path / "report.html").write_text(synthetic_report(rng, "<p></p>"), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    hints = page.locator("figure").evaluate_all(
        """(all) => all.map((one) => {
            const hint = getComputedStyle(one, "::before");
            return [one.scrollWidth > one.clientWidth, hint.content.includes("scroll it sideways")];
        })"""
    )
    assert hints == [[width < 590, width < 590]] * 4
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


@pytest.mark.slow
def test_the_demo_runs_and_reports(tmp_path, capsys):
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


@pytest.mark.long
def test_a_short_demo(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path), "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "median" in out
    assert "least certain" in out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "bidirectional.safetensors",
        "forward.safetensors",
        "report.html",
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "least certain" in check_page(page)
    assert "&lt;script type=&quot;module&quot;&gt;" in page  # the live page, within the report


def test_the_replayed_utterance_is_the_least_certain_correct_one():
    test = Sequences([np.zeros((n, 1), np.float32) for n in (5, 1, 5, 5)], np.array([0, 0, 0, 1]), ("a", "b"), "toy")
    answers = np.array([[0.9, 0.1], [0.55, 0.45], [0.4, 0.6], [0.3, 0.7]])
    assert demo._utterance_to_replay(answers, test) == (
        3,
        "the least certain of the correctly classified utterances of at least median length",
    )
    assert demo._utterance_to_replay(1 - answers, test)[0] == 2
    nothing = Sequences(test.x, 1 - answers.argmax(axis=1), test.labels, "toy")
    assert demo._utterance_to_replay(answers, nothing) == (
        2,
        "the least certain of the utterances of at least median length: none was correct",
    )


@pytest.mark.slow
def test_the_accuracy_that_the_documentation_states(tmp_path, capsys):
    """Medians of five seeds; the figures are in docs/training.md."""
    found = []
    for seed in range(5):
        assert cli.main(["demo", "-o", str(tmp_path), "--seed", str(seed), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        found.append([result[name]["accuracy"] for name in ("bidirectional", "forward")])
    both, forward = np.median(found, axis=0)
    assert both >= 0.965, found
    assert forward >= 0.95, found


@pytest.mark.long
def test_the_page_of_a_training_has_its_layers_and_findings():
    def record(epoch, left):
        figures = {"gates": {"f": 0.7}, "weights": {"all": 2.0}, "gradients": {"all": 0.0}, "reach": {"half": np.inf}}
        lags = {"h": np.array([1.0, left]), "carried": np.array([1.0, left])}
        layer = LayerRecord("lstm", figures, lags, 3)
        return TrainingRecord(epoch, {"<low>": layer}, ("<low>: the gradient vanishes",))

    history = [{"epoch": n, "lr": 1.0, "loss": 1.0 / n, "validation_loss": 0.5, "accuracy": 0.25} for n in (1, 2)]
    text = check_page(pages.training_page("a & b", history, [record(1, 0.5), record(2, 0.0)]))
    assert "a & b in training" in text
    assert "<low>: the gradient vanishes" in text  # shown as text
    assert "Layer <low>" in text
    assert "Findings in epoch 2" in text
    assert "No findings" in check_page(pages.training_page("one", history[:1], [TrainingRecord(1)]))

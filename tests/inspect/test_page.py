"""The page of a trace in a real browser: every control used, and the numbers on the screen compared with NumPy's."""

import itertools
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from kinds import named
from serving import wait_until

from cellstack import CellSpec, Network, Patch
from cellstack.cells import KINDS
from cellstack.cells.base import MatrixState
from cellstack.inspect import contents, html
from cellstack.nodes import (
    MLSTM,
    Bidirectional,
    Cell,
    Dense,
    Embedding,
    GlobalPool,
    Merge,
    Recurrent,
    Select,
    Standardise,
)

PAGE = Path(html.__file__).parent / "page"


def make_cell(rng, input_size, units, dtype=np.float64, **flags):
    spec = CellSpec(input_size, units, **flags)
    return Cell(spec, *((0.6 * rng.normal(size=shape)).astype(dtype) for shape in spec.shapes.values()))


def make_net(rng):
    """A small version of the tutorial's stack: 3 inputs, LSTMs of 4 and 5 units, and a head."""
    lower, upper = Recurrent((make_cell(rng, 3, 4),)), Recurrent((make_cell(rng, 4, 5),))
    return Network([lower, upper, Dense(rng.normal(size=(5, 2)))], ["lower", "upper", "head"])


SETTLED = """async () => {
    const { changes } = await document.getElementById("page").ready;
    const frame = () => new Promise(requestAnimationFrame);
    const computing = () => [...(changes?.rerun.runner.open.values() ?? [])].some(({ what }) => what !== "train");
    do {
        await frame();
        await frame();
        await new Promise((done) => setTimeout(done, 30));
    } while (computing());
}"""
FOUND = "[...document.getElementById('page').shadowRoot.querySelectorAll(selector)]"
TEXTS = f"(selector) => {FOUND}.map((one) => one.innerText ?? one.textContent)"  # drawings have only textContent
CHOICES = "(select) => [...select.options].map((one) => one.text)"
ROWS = f"(selector) => {FOUND}.map((row) => [...row.cells].map((cell) => cell.innerText))"


class Screen:
    """A page in the browser, with its messages and requests."""

    def __init__(self, page, path):
        self.page = page
        self.said, self.asked = [], []
        self.listeners = {
            "console": lambda message: self.said.append(message.text),
            "pageerror": lambda error: self.said.append(str(error)),
            "request": lambda request: self.asked.append(request.url),
        }
        for event, listener in self.listeners.items():
            page.on(event, listener)
        page.goto(Path(path).as_uri())
        page.evaluate("document.getElementById('page').ready.then(() => null)")

    def check(self):
        assert self.said == []
        others = [url for url in self.asked[1:] if not url.startswith("blob:null/")]  # a worker's own text
        assert others == []
        assert self.asked[0].startswith("file:")

    def leave(self):
        """Make the page in the browser ready for another test."""
        for event, listener in self.listeners.items():
            self.page.remove_listener(event, listener)
        self.page.mouse.move(0, 0)
        self.page.goto("about:blank")

    def tab(self, name):
        self.page.locator(f"#tab-{name}").click()

    def keys(self, *names):
        self.page.locator(".stack").focus()
        for name in names:
            self.page.keyboard.press(name)
        self.settle()

    def settle(self):
        """Wait until changes are on the screen: for the worker's answers, and two animation frames after them."""
        self.page.evaluate(SETTLED)

    def choose(self, label, value):
        self.page.get_by_role("combobox", name=label, exact=True).select_option(value)
        self.settle()

    def field(self, name):
        self.page.locator(f'.choice button[data-value="{name}"]').first.click()
        self.settle()

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    def texts(self, selector):
        """The texts of all these elements.

        They are found and read in one call: between two, the page could replace the elements.
        """
        return self.page.evaluate(TEXTS, selector)

    def rows(self, selector):
        """The texts of the cells of each of these table rows, found and read in one call too."""
        return self.page.evaluate(ROWS, selector)

    def number(self, selector):
        return parsed(self.text(selector))

    def looked_at(self, **changes):
        """Set the selection, where a click on a small map can't."""
        self.page.evaluate(
            "(changes) => document.getElementById('page').ready.then(({ view }) => view.set(changes))", changes
        )
        self.settle()


def parsed(text):
    text = text.replace("−", "-").replace("∞", "inf").strip()
    return float("nan") if text == "NaN" else float(text)


def numbers_in(text):
    return [parsed(found) for found in re.findall(r"−?(?:\d+\.?\d*(?:e−?\d+)?|∞)|NaN", text)]


def close(shown, true, digits=4):
    """Whether a number equals another, shown with so many digits."""
    return shown == pytest.approx(true, rel=0.6 * 10.0 ** (1 - digits), abs=1e-9)


def new_page(browser, touch=False):
    context = browser.new_context(has_touch=touch, is_mobile=touch)
    context.set_default_timeout(60_000)
    return context.new_page()


@pytest.fixture(scope="module")
def unused_pages():
    """Blank pages that earlier tests have left: a new one takes longer than loading a trace does."""
    return []


@pytest.fixture
def open_page(browser, unused_pages, tmp_path):
    shared, screens = [], []

    def opened(trace, *, width=1400, height=900, touch=False, scheme="light", before="", first=True, **options):
        """Open the page of a trace; `first` moves from the step where it opens to step 0 and unit 0."""
        path = tmp_path / f"page{len(screens)}.html"
        trace.save_html(path, **options)
        own = touch or before
        page = new_page(browser, touch) if own or not unused_pages else unused_pages.pop()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(media="screen", color_scheme=scheme)
        if before:
            page.add_init_script(before)
        screen = Screen(page, path)
        screens.append(screen)
        if not own:
            shared.append(screen)
        if first and screen.page.locator(".stack").count():
            screen.looked_at(step=0, unit=0)
        return screen

    yield opened
    for screen in screens:
        screen.check()
        if screen in shared:
            screen.leave()
            unused_pages.append(screen.page)
        else:
            screen.page.context.close()


@pytest.fixture
def net(rng):
    return make_net(rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 10, 3))


# ── the modules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_module_is_in_the_page_after_those_that_it_imports():
    assert {f"{name}.js" for name in html.MODULES} == {path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*.js")}
    for place, name in enumerate(html.MODULES):
        text = (PAGE / f"{name}.js").read_text(encoding="utf-8")
        imported = re.findall(r'^import \{[^}]*\} from "\./([\w/]+)\.js";$', text, re.MULTILINE)
        folder = "engine/" if name.startswith("engine/") else ""
        for other in imported:
            assert folder + other in html.MODULES[:place], f"{name} imports {other}"
        assert len(re.findall("^import ", text, re.MULTILINE)) == len(imported)


def test_the_joined_text_is_one_module_without_a_tag_or_an_address():
    text = html.module_text()
    assert not re.search(r"^(?:import|export) ", text, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    assert "</script" not in text.lower()
    assert "innerHTML" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched


# ── names, and the prediction ─────────────────────────────────────────────────────────────────────────────────────────

CHANNELS, CLASSES = ["temperature", "visits per hour", "rain"], ["calm", "lively", "closed early"]


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def make_classifier(rng, **metadata):
    """A network as training makes it: it takes raw channels, and gives a probability of each class."""
    first = Standardise(np.array([20.0, 50.0, 0.5]), np.array([5.0, 10.0, 0.5]))
    nodes = [
        first,
        Recurrent((make_cell(rng, 3, 4),)),
        GlobalPool("mean"),
        Dense(rng.normal(size=(4, 3)), None, "softmax"),
    ]
    return Network(nodes, ["standardise", "layer_0", "pool", "head"], metadata)


@pytest.mark.long
def test_channels_and_classes_have_their_names_everywhere(open_page, rng):
    net = make_classifier(rng, task="classify", labels=CLASSES, columns=CHANNELS, observed=[])
    x = rng.normal(size=(2, 10, 3)) * [5, 10, 0.5] + [20, 50, 0.5]
    screen = open_page(net.trace(x))
    page = screen.page
    page.locator(".inputs .titled").first.wait_for()
    assert screen.texts(".inputs .titled > span") == CHANNELS
    page.locator('.port[data-field="f"]').hover()
    assert [row[0] for row in screen.rows(".popover tr")][:4] == [*CHANNELS, "sum"]
    assert page.locator(".popover").evaluate("(one) => one.scrollWidth - one.clientWidth") == 0
    page.locator('.port[data-field="x"]').hover()
    assert "visits per hour = " in screen.text(".popover")
    screen.tab("whatif")
    page.get_by_label("Weight of temperature into").wait_for()
    assert page.get_by_role("slider", name="visits per hour").count() == 1
    assert screen.texts(".outcome tbody th") == CLASSES
    screen.tab("gradient")
    page.locator("#panel-gradient tbody tr").first.wait_for()
    options = [
        page.locator("#panel-gradient").get_by_label(label, exact=True).evaluate(CHOICES)
        for label in ("Output unit", "Feature")
    ]
    assert options == [CLASSES, ["all, their norm", *CHANNELS]]
    assert "output calm" in screen.text("#panel-gradient h3")
    screen.choose("Layer", "input x")
    screen.looked_at(unit=1, step=3)
    assert screen.text(".readout").startswith("step 3 · visits per hour · x = ")
    page.locator(".map summary").click()
    page.locator(".map .behind tbody th").first.wait_for()
    assert screen.texts(".map .behind tbody th") == CHANNELS
    left = page.evaluate("document.getElementById('page').ready.then(({ view }) => view.left)")
    assert left > 44  # wide enough for the names
    box = page.locator(".stack").bounding_box()
    page.mouse.click(box["x"] + left + 0.5 * (box["width"] - left - 6) / 10, box["y"] + 5)
    screen.settle()
    assert screen.text(".readout").startswith("step 0 · temperature · x = ")


@pytest.mark.long
def test_the_predicted_class_its_probability_and_the_true_class(open_page, rng):
    net = make_classifier(rng, task="classify", labels=CLASSES, columns=CHANNELS, observed=[])
    x = rng.normal(size=(2, 10, 3)) * [5, 10, 0.5] + [20, 50, 0.5]
    t = net.trace(x)
    screen = open_page(t, truth=["lively", "calm"])
    for row, true in enumerate(("lively", "calm")):
        screen.choose("Row", str(row))
        said, p = screen.text(".answer"), t.y[row]
        order = np.argsort(-p)
        assert said.startswith(f"Row {row}: predicted {CLASSES[order[0]]}, probability ")
        assert numbers_in(said)[1:] == [round(float(p[n]), 3) for n in order]
        assert said.endswith(f"; true: {true}")
    screen.tab("whatif")
    screen.page.get_by_role("slider", name="temperature").evaluate(
        "(slider) => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }"
    )
    screen.page.locator(".answer", has_text="after the changes").wait_for()
    changed = x[1:].copy()
    changed[0, 0, 0] = float(screen.page.get_by_role("slider", name="temperature").input_value())
    p = net.run(changed)[0][0]
    after = numbers_in(screen.text(".answer").split("after the changes")[1])
    assert after == [round(float(value), 3) for value in sorted(p)[::-1]]


@pytest.mark.long
def test_a_class_at_each_step_a_number_and_a_character(open_page, rng):
    nodes = [Recurrent((make_cell(rng, 3, 4),)), Dense(rng.normal(size=(4, 3)), None, "softmax")]
    t = Network(nodes, metadata={"task": "classify", "labels": [1, 2, 5], "columns": []}).trace(
        rng.normal(size=(1, 6, 3))
    )
    screen = open_page(t, truth=[[1, 1, 2, 2, 5, 5]])
    screen.looked_at(step=4)
    best = [1, 2, 5][int(t.y[0, 4].argmax())]
    assert screen.text(".answer").startswith(f"Step 4: predicted {best}, probability ")
    assert screen.text(".answer").endswith("; true: 5")
    text = {"characters": "a b"}
    t = Network(nodes, metadata=text).trace(rng.normal(size=(1, 6, 3)))
    screen = open_page(t, labels="ab aab")
    screen.looked_at(step=1)
    best = "a␣b"[int(t.y[0, 1].argmax())]
    assert screen.text(".answer").startswith(f"Step 1 “b”: next character “{best}”, probability ")
    assert screen.text(".answer").endswith("; true: “␣”")
    table = {"task": "regress", "labels": [], "table": {"label": "load in kW"}}
    nodes = [Recurrent((make_cell(rng, 3, 4),), return_sequences=False), Dense(rng.normal(size=(4, 1)))]
    t = Network(nodes, metadata=table).trace(rng.normal(size=(2, 6, 3)))
    screen = open_page(t, truth=[3.5, float("nan")])
    said = screen.text(".answer")
    assert said.startswith("Row 0: predicted load in kW: ")
    assert said.endswith("; true: 3.5")
    assert close(numbers_in(said)[1], t.y[0, 0], 5)
    screen.choose("Row", "1")
    assert "true" not in screen.text(".answer")


@pytest.mark.long
def test_a_forecast_in_its_units_at_the_steps_of_the_horizon(open_page, rng):
    recipe = {"targets": ["sales"], "quantiles": [0.1, 0.5, 0.9]}
    nodes = [Recurrent((make_cell(rng, 3, 4),)), Select(-4), Dense(rng.normal(size=(4, 3)))]
    net = Network(nodes, ["layer", "ahead", "head"], {"task": "forecast", "recipe": recipe})
    t = net.trace(rng.normal(size=(1, 10, 3)))
    days = np.arange("2024-02-25", "2024-03-06", dtype="datetime64[D]").astype("datetime64[s]")
    offset = 100.0 + np.arange(4)[:, None]
    screen = open_page(t, labels=days, rescale=(7.0, offset), names={"x": ["sales", "price", "holiday"]})
    for step, at in ((0, 0), (6, 0), (8, 2)):
        screen.looked_at(step=step)
        said = screen.text(".answer")
        assert said.startswith(f"Step {6 + at} ({days[6 + at].astype('datetime64[D]')}): forecast of sales: ")
        low, middle, high = sorted(t.y[0, at] * 7.0 + 100.0 + at)
        found = numbers_in(said.split("sales: ")[1])
        assert [close(found[n], value, 5) for n, value in ((0, middle), (2, low), (4, high))] == [True] * 3
        screen.tab("whatif")
        screen.settle()
        rows = screen.rows(".outcome tbody tr")
        assert [row[0] for row in rows] == [f"sales, quantile {q}" for q in (0.1, 0.5, 0.9)]
        for row, value in zip(rows, t.y[0, at] * 7.0 + 100.0 + at, strict=True):
            assert close(parsed(row[1]), value, 5)
        assert screen.text(".outcome caption").startswith(f"At step {6 + at} ")
        assert screen.page.locator("#panel-whatif").get_by_label("Output unit").input_value() == "1"  # the median


def test_rows_have_their_ids(open_page, net, x):
    screen = open_page(net.trace(x), names={"head": ["up", "down"]}, ids=["customer 17", ""])
    assert screen.page.get_by_role("combobox", name="Row", exact=True).evaluate(CHOICES) == ["0 (customer 17)", "1"]
    assert screen.text(".answer").startswith("Row 0 (customer 17), step 0: predicted up: ")


def test_names_that_do_not_fit_are_refused(net, x, tmp_path):
    t = net.trace(x)
    with pytest.raises(ValueError, match=r"expected 3 names for x, got \['a'\]"):
        t.save_html(tmp_path / "a.html", names={"x": ["a"]})
    with pytest.raises(ValueError, match="expected names of x, lower, upper, head, got 'y'"):
        t.save_html(tmp_path / "a.html", names={"y": ["a"]})
    for name in ("truth", "ids"):
        with pytest.raises(ValueError, match=f"expected {name} to be a list of 2, one for each row, got 'ab'"):
            t.save_html(tmp_path / "a.html", **{name: "ab"})
    with pytest.raises(ValueError, match=r"expected rescale as \(scale, offset\) for \[2, 10, 2\]"):
        t.save_html(tmp_path / "a.html", rescale=(np.ones(3), 0.0))
    assert list(tmp_path.iterdir()) == []


# ── where it opens, and how it fits ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reverse", [False, True])
def test_it_opens_where_h_changes_most(open_page, rng, reverse):
    x = rng.normal(size=(2, 30, 3)) * 0.05
    x[0, 17, 1] = 6.0
    x[0, 26] = 50.0  # masked
    mask = np.ones((2, 30), bool)
    mask[0, 24:] = False
    cell = make_cell(rng, 3, 4)
    t = Network([Recurrent((cell,), go_backwards=reverse)]).trace(x, mask=mask)
    screen = open_page(t, first=False)
    h = t["layer_0"].h[0]
    change = abs(np.diff(h[:24], axis=0)) if not reverse else abs(np.diff(h[23::-1], axis=0))
    step, unit = screen.page.evaluate(
        "document.getElementById('page').ready.then(({ view }) => [view.step, view.unit])"
    )
    norms = (change**2).sum(axis=1)
    at = 3 + int(norms[2:].argmax())  # the first eighth is left out
    assert step == (at if not reverse else 23 - at)
    assert unit == change[at - 1].argmax()
    assert f"unit {unit}, step {step}" in screen.text("#panel-cell h3")


def lone_controls(screen):
    """The controls above the map that have a line for themselves, though others precede them."""
    return screen.page.locator(".map .toolbar").evaluate(
        """(bar) => {
            const shown = [...bar.querySelectorAll(".field, .choice")].filter((one) => one.checkVisibility());
            const lines = new Map();
            for (const one of shown) {
                const line = Math.round(one.getBoundingClientRect().bottom / 8);
                lines.set(line, [...(lines.get(line) ?? []), one.innerText]);
            }
            return [...lines.values()].slice(1).filter((line) => line.length === 1).map(([text]) => text);
        }"""
    )


CUT_COLUMNS = """() => [...document.getElementById("page").shadowRoot.querySelectorAll(".scroll, .behind, .tabs")]
    .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1)
    .map((one) => `${one.className}: ${one.scrollWidth} in ${one.clientWidth}`)"""


@pytest.mark.long
def test_everything_fits_into_1280_pixels(open_page, rng):
    lower = make_cell(rng, 12, 48)
    lower = replace_arrays(lower, kernel=-abs(lower.kernel) / 400)  # small weights have long numbers: -0.001234
    net = Network(
        [Recurrent((lower, make_cell(rng, 48, 48))), Dense(rng.normal(size=(48, 2)))], ["recurrent_1", "head"]
    )
    days = np.arange("2024-02-25T12", "2024-03-16T12", 24, dtype="datetime64[h]")
    screen = open_page(net.trace(rng.normal(size=(2, 20, 12)) / 50), width=1280, labels=days, first=False)
    assert lone_controls(screen) == []
    screen.page.locator(".map summary").click()
    for tab in ("cell", "unit", "text", "memory", "gradient", "match", "playground"):
        screen.tab(tab)
        screen.settle()
        assert screen.page.evaluate(CUT_COLUMNS) == [], tab
    screen.tab("whatif")
    screen.page.get_by_role("slider", name="x 0").evaluate(
        "(slider) => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }"
    )
    screen.page.get_by_role("combobox", name="Show", exact=True).wait_for()
    assert lone_controls(screen) == []


@pytest.mark.long
def test_the_input_row_and_the_wires_are_visible_at_390_pixels(open_page, rng):
    layers = [Recurrent((make_cell(rng, 3, 3),)) for _ in range(24)]
    screen = open_page(Network(layers).trace(rng.normal(size=(2, 10, 3))), width=390, height=800, touch=True)
    inside = """(one) => {
        const [own, box] = [one.getBoundingClientRect(), one.closest(".scroll").getBoundingClientRect()];
        const across = own.left >= box.left - 1 && own.right <= box.right + 1;
        return across && own.top >= box.top - 1 && own.bottom <= box.bottom + 1;
    }"""
    assert screen.page.locator(".network .rowname", has_text="x").last.evaluate(inside)
    assert screen.page.locator(".network .stepname.now").evaluate(inside)
    for port in ("c_prev", "h_prev", "x", "f", "i", "g", "o", "c", "h"):
        assert screen.page.locator(f'.port[data-field="{port}"]').evaluate(inside), port
    assert lone_controls(screen) == [screen.text(".map .toolbar .choice")]  # seven buttons have their own line
    texts = screen.page.locator(".port .value").evaluate_all(
        """(all) => all.map((one) => [one, one.closest(".port").querySelector("rect")])
            .filter(([text, box]) => text.getBBox().width > box.getBBox().width)
            .map(([text]) => text.textContent)"""
    )
    assert texts == []


@pytest.mark.long
def test_nothing_is_cut_or_covered_at_390_pixels(open_page, net, x, rng):
    screen = open_page(net.trace(x), width=390, height=800, touch=True)
    inside = "(one) => one.scrollWidth - one.clientWidth"
    assert screen.page.locator(".tabs").evaluate(inside) == 0
    assert screen.page.locator(".numbers .scroll").evaluate(inside) == 0
    assert screen.texts(".steptable th")[:3] == ["unit", "c_prev", "h_prev"]
    weak = Network([Recurrent((make_cell(rng, 3, 4, use_bias=False),))])
    small = open_page(weak.trace(-3e-3 * np.abs(x)), width=390, height=800, touch=True)
    assert max(map(len, small.texts(".steptable .number"))) == len("−5e−4")  # not −0.0005
    assert small.page.locator(".numbers .scroll").evaluate(inside) == 0
    steps = [int(re.findall(r"\d+", name)[0]) for name in screen.texts(".network .stepname:not(.head)")]
    said = f"Steps {steps[0]} to {steps[-1]} of 10: move the cursor to see others."
    assert screen.text(".net .note") == said
    for port in ("c_prev", "f", "o"):
        screen.page.locator(f'.port[data-field="{port}"]').tap()
        drawing = screen.page.locator(".wires").bounding_box()
        formula = screen.page.locator(".popover").bounding_box()
        above = formula["y"] + formula["height"] <= drawing["y"]
        assert above or formula["y"] >= drawing["y"] + drawing["height"], port


@pytest.mark.long
def test_a_short_trace_fills_the_width_and_colours_are_explained(open_page, net, rng):
    screen = open_page(net.trace(rng.normal(size=(1, 5, 3))), width=1280)
    screen.settle()
    box = screen.page.locator(".stack").bounding_box()
    screen.page.locator(".stack").click(position={"x": box["width"] - 30, "y": 10})
    screen.settle()
    assert screen.text(".readout").startswith("step 4")
    assert screen.text(".net .note") == ""  # all steps are drawn
    gates, others = (text.split() for text in screen.texts("#panel-cell .legend .scale"))
    assert gates == ["gates:", "0,", "closed", "1,", "open"]
    assert others == ["other", "values:", f"−{others[-1]}", others[-1]]
    screen.tab("playground")
    screen.page.locator("#panel-playground h3", has_text="Logarithm of the loss, base 10").wait_for()
    screen.page.locator("#panel-playground .legend", has_text="1, open").wait_for()
    assert screen.text("#panel-playground .legend .extent") == "f: forget gate: how much of the cell state is kept"


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_says_what_each_gate_and_state_is(open_page, rng, kind):
    t = Network([Recurrent((make_cell(rng, 3, 4, kind=kind),))]).trace(rng.normal(size=(1, 4, 3)))
    screen = open_page(t)
    names = [*KINDS[kind].trace._fields]
    assert screen.texts(".meanings dt") == names
    assert screen.texts(".meanings dd") == [KINDS[kind].meaning(name) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_tab_goes_through_the_wiring_from_left_to_right(open_page, rng, kind):
    t = Network([Recurrent((make_cell(rng, 3, 4, kind=kind),))]).trace(rng.normal(size=(1, 4, 3)))
    screen = open_page(t)
    ports = screen.page.locator(".wires .port")
    ports.first.focus()
    middle = """() => {
        const own = document.activeElement.shadowRoot?.activeElement ?? document.activeElement;
        const box = own.matches(".port") ? own.querySelector("rect") : null;
        const at = (name) => Number(box.getAttribute(name));
        return box && [Math.round(at("x") + at("width") / 2), at("y")];
    }"""
    places = []
    for _ in range(ports.count()):
        places.append(screen.page.evaluate(middle))
        screen.page.keyboard.press("Tab")
    assert places == sorted(places)
    assert screen.page.evaluate(middle) is None


# ── traces ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("activation", "name"), [("tanh", "tanh"), ("sigmoid", "σ"), ("thresholded_relu(0.1)", "thresholded relu")]
)
def test_the_wiring_names_the_activation_of_the_state(open_page, rng, activation, name):
    net = Network([Recurrent((make_cell(rng, 2, 3, gate_activations={"cell": activation}),))])
    screen = open_page(net.trace(rng.normal(size=(1, 3, 2))), width=390, height=800)
    assert sorted(screen.texts(".wires .sign")) == sorted(["×", "×", "×", "+", name])
    inside = screen.page.locator(".wires .sign").evaluate_all(
        """(all) => all.map((one) => {
            const drawing = one.closest("svg").getBoundingClientRect();
            const [sign, text] = [one, one.querySelector("text")].map((part) => part.getBoundingClientRect());
            return text.width < sign.width && sign.left >= drawing.left && sign.right <= drawing.right;
        })"""
    )
    assert inside == [True] * 5


@pytest.mark.long
def test_the_numbers_of_a_step_are_numpys(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t, labels="a text of ")
    for row, step, name in ((0, 0, "lower"), (1, 7, "lower"), (1, 9, "upper")):
        screen.choose("Row", str(row))
        screen.choose("Layer", f"{name}/0")
        screen.keys("Home", *["ArrowRight"] * step)
        cell = t[name]
        for unit in range(cell.h.shape[2]):
            texts = screen.texts(f'.number[data-unit="{unit}"]:not([data-field="x"])')
            for field, text in zip("ifgoch", texts[2:], strict=True):
                assert close(parsed(text), cell.cells[0][field][row, step, unit])
            previous = cell.h[row, step - 1] if step else np.zeros(cell.h.shape[2])
            assert close(screen.number('.number[data-field="h_prev"][data-unit="1"]'), previous[1])
    assert "upper" in screen.text("#panel-cell h3")


FLAGS = named("flags") | {
    "heads": {"heads": 4},
    "gru, reset before, heads": {"kind": "gru", "reset_after": False, "heads": 4},
}
QUICK = (*KINDS, "lstm, all", "gru, layer norm")


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, marks=() if name in QUICK else pytest.mark.slow, id=name) for name, flags in FLAGS.items()],
)
def test_formulas_end_in_the_numbers_that_they_explain(open_page, rng, flags):
    t = Network([Recurrent((make_cell(rng, 3, 4, **flags),))]).trace(rng.normal(size=(1, 4, 3)))
    screen = open_page(t)
    for step in (0, 2):
        screen.keys("Home", *["ArrowRight"] * step)
        for field, array in t["layer_0"].cells[0].items():
            for unit in (0, array.shape[2] - 1):
                screen.page.locator(f'.number[data-field="{field}"][data-unit="{unit}"]').focus()
                last = screen.page.locator(".popover > div").last.inner_text()
                assert close(numbers_in(last)[-1], array[0, step, unit], 5), (field, unit, last)


def test_a_formula_goes_down_to_each_product(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.keys("ArrowRight", "ArrowRight", "ArrowDown")
    screen.page.locator('.port[data-field="f"]').hover()
    cell = net.cells[0]
    rows = screen.rows(".popover tr")
    named = [row for row in rows if row[0] != "sum"]
    h = t["lower"].h[0, 1]
    for k, row in enumerate(named[:3]):
        weight = cell.kernel[k, 4 + 1]
        assert row[0] == f"x[{k}]"
        assert close(parsed(row[1]), x[0, 2, k], 5)
        assert close(parsed(row[2].lstrip("· ")), weight, 5)
        assert close(parsed(row[3].lstrip("= ")), x[0, 2, k] * weight, 5)
    for k, row in enumerate(named[3:]):
        assert row[0] == f"h_prev[{k}]"
        assert close(parsed(row[3].lstrip("= ")), h[k] * cell.recurrent_kernel[k, 4 + 1], 5)
    sums = [parsed(row[-1]) for row in rows if row[0] == "sum"]
    assert close(sums[0], x[0, 2] @ cell.kernel[:, 5], 5)
    assert close(sums[1], h @ cell.recurrent_kernel[:, 5], 5)
    lines = screen.texts(".popover > div")
    assert close(numbers_in(lines[-2])[-1], t["lower"].pre["f"][0, 2, 1], 5)
    screen.page.keyboard.press("Escape")
    assert screen.page.locator(".popover").is_hidden()


def test_a_sum_has_only_the_products_of_its_head(open_page, rng):
    cell = make_cell(rng, 3, 6, heads=2)
    t = Network([Recurrent((cell,))]).trace(rng.normal(size=(1, 4, 3)))
    screen = open_page(t)
    screen.keys("End")
    screen.page.locator('.number[data-field="g"][data-unit="4"]').focus()
    rows = screen.rows(".popover tr")
    h, head = t["layer_0"].h[0, 2], cell.recurrent_kernel[1]
    products = {row[0]: parsed(row[3].lstrip("= ")) for row in rows if row[0].startswith("h_prev")}
    assert list(products) == ["h_prev[3]", "h_prev[4]", "h_prev[5]"]
    for k, product in enumerate(products.values()):
        assert close(product, h[3 + k] * head[k, 2 * 3 + 1], 5)  # the second unit of the head in the block of g


def test_long_sums_show_their_largest_products(open_page, rng):
    t = Network([Recurrent((make_cell(rng, 40, 30),))]).trace(rng.normal(size=(1, 3, 40)))
    screen = open_page(t)
    screen.keys("End")
    screen.page.locator('.number[data-field="i"][data-unit="0"]').focus()
    rows = screen.rows(".popover .sum:first-of-type tr")
    products = t["layer_0"].x[0, 2] * t["layer_0"].cell.kernel[:, 0]
    assert rows[12][0] == "the other 28"
    assert close(parsed(rows[0][3].lstrip("= ")), products[np.argmax(abs(products))], 5)
    assert close(parsed(rows[-1][-1]), products.sum(), 5)


@pytest.mark.long
def test_the_map_under_the_pointer_and_the_keys(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    box = screen.page.locator(".stack").bounding_box()
    width = (box["width"] - 50) / max(10, (box["width"] - 50) / 72)
    screen.field("o")
    screen.page.mouse.move(box["x"] + 44 + 3.5 * width, box["y"] + 2.5 * box["height"] / 4)
    screen.settle()
    assert screen.text(".readout").startswith("step 3 · unit 2 · o = ")
    assert close(numbers_in(screen.text(".readout"))[-1], t["lower"].o[0, 3, 2], 5)
    screen.page.mouse.click(box["x"] + 44 + 6.5 * width, box["y"] + 0.5 * box["height"] / 4)
    screen.settle()
    assert "unit 0, step 6" in screen.text("#panel-cell h3")
    screen.page.mouse.move(5, 5)
    screen.keys("ArrowDown", "ArrowLeft")
    assert close(numbers_in(screen.text(".readout"))[-1], t["lower"].o[0, 5, 1], 5)
    screen.keys("End")
    assert screen.text(".readout").startswith("step 9 ")
    screen.page.locator(".map summary").click()
    screen.settle()
    rows = screen.rows(".map .behind tbody tr")
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    at = screen.texts(".map .behind thead th").index("9")
    assert close(parsed(rows[2][at]), t["lower"].o[0, 9, 2])


def colour_at(screen, step, unit, of):
    """The colour of the map at a step, out of the number of shown steps, and a unit's row."""
    return screen.page.evaluate(
        """([step, unit, of]) => {
            const canvas = document.getElementById("page").shadowRoot.querySelector(".stack canvas");
            const ratio = window.devicePixelRatio;
            const wide = canvas.width - 50 * ratio;
            const x = Math.round(44 * ratio + ((step + 0.5) / of) * wide);
            const y = Math.round(((unit + 0.25) / 4) * canvas.height);
            const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            copy.drawImage(canvas, x, y, 1, 1, 0, 0, 1, 1);
            return [...copy.getImageData(0, 0, 1, 1).data];
        }""",
        [step, unit, of],
    )


@pytest.mark.long
def test_extremes_stay_visible_at_every_zoom(open_page, rng):
    cell = make_cell(rng, 1, 4, kind="rnn", activation="linear", use_bias=False)
    cell = replace_arrays(cell, kernel=np.ones((1, 4)), recurrent_kernel=np.zeros((4, 4)))
    x = np.zeros((1, 20_000, 1))
    x[0, 12_345] = 3.0  # one step in sixteen that a pixel covers
    screen = open_page(Network([Recurrent((cell,))]).trace(x))
    spike, floor = (colour_at(screen, at, 1, 20_000) for at in (12_345, 5_000))
    assert spike[:3] == [140, 60, 4]
    assert max(floor[:3]) - min(floor[:3]) <= 3
    assert min(floor[:3]) > 240
    screen.looked_at(window={"from": 12_300, "span": 100, "steps": list(range(20_000))})
    assert colour_at(screen, 45, 1, 100)[:3] == [140, 60, 4]
    assert min(colour_at(screen, 60, 1, 100)[:3]) > 240


def replace_arrays(cell, **arrays):
    return Cell(cell.spec, **{**cell.arrays, **arrays})


@pytest.mark.long
def test_nan_and_infinities_are_distinguished(open_page, net, x):
    x[0, 4, 1], x[1, 3, 0] = np.nan, np.inf
    t = net.trace(x)
    screen = open_page(t)
    assert "NaN" in screen.text(".legend")
    screen.keys(*["ArrowRight"] * 4)
    assert screen.text('.number[data-field="f"][data-unit="0"]') == "NaN"
    assert "NaN" in screen.text(".readout")
    screen.tab("unit")
    screen.settle()
    assert "c = NaN" in screen.text("#panel-unit .readout")
    screen.choose("Layer", "input x")
    screen.choose("Row", "1")
    screen.keys("Home", "ArrowRight", "ArrowRight", "ArrowRight")
    assert "x = ∞" in screen.text(".readout")


@pytest.mark.long
def test_units_in_the_order_of_memory_variance_and_likeness(open_page, rng):
    cell = make_cell(rng, 3, 9)
    bias = np.array(cell.bias)
    bias[9:18] += np.linspace(-3.0, 3.0, 9)[rng.permutation(9)]
    t = Network([Recurrent((replace_arrays(cell, bias=bias),))]).trace(rng.normal(size=(1, 60, 3)))
    screen = open_page(t)
    screen.page.locator(".map summary").click()

    def order():
        screen.settle()
        return [int(row[0]) for row in screen.rows(".map .behind tbody tr")]

    assert order() == list(range(9))
    screen.choose("Units by", "memory")
    assert order() == np.argsort(-t["layer_0"].half_lives()).tolist()
    screen.choose("Units by", "variance")
    assert order() == np.argsort(-t["layer_0"].h[0].var(axis=0)).tolist()
    screen.choose("Units by", "likeness")
    found = order()
    lines = np.corrcoef(t["layer_0"].h[0].T)
    likeness = sum(lines[a, b] for a, b in itertools.pairwise(found))
    drawn = [rng.permutation(9) for _ in range(200)]
    assert likeness > np.quantile([sum(lines[a, b] for a, b in itertools.pairwise(one)) for one in drawn], 0.95)
    assert sorted(found) == list(range(9))


def test_units_in_the_order_of_memory_where_gates_are_negative(open_page):
    keeps = np.array([-0.5, 0.2, -0.9, 0.7])
    bias = np.concatenate([np.full(4, 0.5), keeps, np.full(8, 0.5)])
    cell = Cell(CellSpec(1, 4, recurrent_activation="linear"), np.zeros((1, 16)), np.zeros((4, 16)), bias)
    t = Network([Recurrent((cell,))]).trace(np.zeros((1, 5, 1)))
    screen = open_page(t)
    screen.page.locator(".map summary").click()
    screen.choose("Units by", "memory")
    screen.settle()
    assert [int(row[0]) for row in screen.rows(".map .behind tbody tr")] == [2, 3, 0, 1]


@pytest.mark.long
def test_the_lines_of_a_unit(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("unit")
    screen.keys("ArrowRight", "ArrowDown", "ArrowDown")
    found = dict(re.findall(r"(\w) = (\S+)", screen.text("#panel-unit .readout")))
    assert {field: pytest.approx(parsed(text), rel=1e-3) for field, text in found.items()} == {
        field: t["lower"].cells[0][field][0, 1, 2] for field in "ifgoch"
    }
    screen.page.locator("#panel-unit .check").filter(has_text="c").click()
    chart = screen.page.locator("#panel-unit canvas").last
    chart.hover(position={"x": 500, "y": 60})
    pointed = screen.text("#panel-unit .readout")
    step = int(re.findall(r"\d+", pointed)[0])
    assert step > 1
    assert close(parsed(re.findall(r"o = (\S+)", pointed)[0]), t["lower"].o[0, step, 2])
    chart.click(position={"x": 500, "y": 60})
    screen.page.mouse.move(5, 5)
    screen.settle()
    assert screen.text("#panel-unit .readout") == pointed


@pytest.mark.long
def test_contributions_of_each_step(open_page, rng):
    for flags, name in (({"zoneout_cell": 0.2}, "c"), ({"kind": "gru", "zoneout": 0.1}, "h")):
        net = Network([Recurrent((make_cell(rng, 2, 3, learn_initial_state=True, **flags),), go_backwards=name == "h")])
        reset = np.zeros((1, 12), bool)
        reset[0, 4] = name == "c"
        t = net.trace(
            rng.normal(size=(1, 12, 2)), reset=reset if name == "c" else None, mask=[[True] * 10 + [False] * 2]
        )
        screen = open_page(t)
        screen.tab("memory")
        screen.keys(*["ArrowRight"] * 7, "ArrowDown")
        about = f"{name} is a sum: what each past step wrote, times the share that all later steps kept."
        assert screen.text("#panel-memory").startswith(about)
        assert "query" not in screen.text("#panel-memory")
        parts = t["layer_0"].contributions(7)[0, :, 1]
        total = float(screen.page.locator("#panel-memory [data-sum]").get_attribute("data-sum"))
        assert total == pytest.approx(t["layer_0"].cells[0][name][0, 7, 1], abs=1e-12)
        rows = screen.rows("#panel-memory tbody tr")
        by_step = {int(re.findall(r"\d+", row[0])[0]): parsed(row[3]) for row in rows}
        for step, value in by_step.items():
            assert close(value, parts[1 + (11 - step if name == "h" else step)])


@pytest.mark.long
def test_masks_and_resets_are_visible(open_page, net, x):
    reset = np.zeros((2, 10), bool)
    reset[:, 3] = True
    screen = open_page(net.trace(x, lengths=[7, 10], reset=reset))
    assert "the state was reset" in screen.text(".legend")
    assert "masked steps" in screen.text(".legend")
    screen.keys("End")
    assert "masked" in screen.text(".readout")
    screen.keys("Home", *["ArrowRight"] * 3)
    screen.page.locator('.number[data-field="h_prev"][data-unit="0"]').focus()
    assert "the state was reset before this step" in screen.text(".popover")
    screen.choose("Row", "1")
    assert "mask" not in screen.text(".legend")


@pytest.mark.long
def test_steps_and_units_are_selected_by_number(open_page, rng):
    t = Network([Recurrent((make_cell(rng, 2, 60),))]).trace(rng.normal(size=(1, 500, 2)))
    screen = open_page(t)
    for label, number in (("Step", 321), ("Unit", 47)):
        screen.page.get_by_label(label, exact=True).fill(str(number))
        screen.page.get_by_label(label, exact=True).press("Enter")
        screen.settle()
    assert screen.text(".readout").startswith("step 321 · unit 47 · h = ")
    assert close(numbers_in(screen.text(".readout"))[-1], t["layer_0"].h[0, 321, 47], 5)
    screen.page.get_by_label("Step", exact=True).fill("900")
    screen.page.get_by_label("Step", exact=True).press("Enter")
    screen.settle()
    assert screen.page.get_by_label("Step", exact=True).input_value() == "321"
    for name in ("Zoom in", "Zoom in", "Zoom out", "Taller rows", "Taller rows", "All"):
        screen.page.get_by_role("button", name=name, exact=True).click()
        screen.settle()
    screen.keys("+", "+", "PageDown", "-", "PageUp", "0", "Home")
    assert screen.text(".readout").startswith("step 0 ")
    screen.page.locator(".stack").hover()
    screen.page.keyboard.down("Control")
    screen.page.mouse.wheel(0, -300)
    screen.page.keyboard.up("Control")
    screen.settle()
    span = "document.getElementById('page').ready.then(({ view }) => view.window.span)"
    assert screen.page.evaluate(span) < 400
    before = screen.page.evaluate("document.getElementById('page').ready.then(({ view }) => view.window.from)")
    screen.page.mouse.wheel(120, 0)
    screen.settle()
    after = screen.page.evaluate("document.getElementById('page').ready.then(({ view }) => view.window.from)")
    assert after > before
    screen.page.locator(".whole").click(position={"x": 60, "y": 7})
    screen.settle()
    assert screen.page.evaluate("document.getElementById('page').ready.then(({ view }) => view.window.from)") == 0


@pytest.mark.long
def test_cells_without_contributions_give_the_reason(open_page, rng):
    for flags, why in (({"kind": "rnn"}, "no gate that keeps"), ({"cell_clip": 1.0}, "clipped")):
        screen = open_page(Network([Recurrent((make_cell(rng, 2, 3, **flags),))]).trace(rng.normal(size=(1, 5, 2))))
        screen.tab("memory")
        screen.settle()
        assert why in screen.text("#panel-memory [data-sum]")
        assert "is a sum" not in screen.text("#panel-memory")


@pytest.mark.long
def test_labels_as_coloured_text(open_page, net, x):
    labels = ["<b>bold</b>", "<img src=x onerror=alert(1)>", '"&amp;', "\n", "</script>", *"plain"]
    t = net.trace(x)
    screen = open_page(t, labels=labels, title="</title><script>alert(2)</script>")
    assert screen.text("h1") == "</title><script>alert(2)</script>"
    screen.tab("text")
    screen.settle()
    spans = screen.page.locator(".text span")
    assert screen.texts(".text span") == [*labels[:3], "↵", *labels[4:]]
    assert screen.page.locator(".text b, .text img").count() == 0
    before = spans.nth(6).evaluate("(span) => getComputedStyle(span).backgroundColor")
    screen.field("f")
    assert spans.nth(6).evaluate("(span) => getComputedStyle(span).backgroundColor") != before
    assert close(numbers_in(spans.nth(6).get_attribute("title"))[-1], t["lower"].f[0, 6, 0])
    spans.nth(8).click()
    screen.settle()
    assert "step 8 “i”" in screen.text(".readout")


def test_names_are_shown_unchanged(open_page, rng):
    names = ["<img src=x onerror=alert(1)>", "<script>alert(2)<script>"]
    cells = make_cell(rng, 3, 2), make_cell(rng, 2, 2)
    net = Network([Recurrent((cell,)) for cell in cells], names, inputs={"<b>x": (None, 3)})
    screen = open_page(net.trace(rng.normal(size=(1, 4, 3))))
    assert names[0] in screen.text(".summary")
    assert names[0] in screen.page.get_by_label("Layer", exact=True).inner_text()
    assert screen.page.locator("img, b").count() == 0
    screen.tab("whatif")
    screen.settle()
    screen.page.locator(".sliders").filter(has_text="<b>x[0]").wait_for()
    screen.page.get_by_role("button", name="Add patch").click()
    screen.settle()
    assert f'cs.Patch("{names[0]}", gate="f"' in screen.text("pre")


@pytest.mark.long
def test_find_similar_steps(open_page, rng):
    t = Network([Recurrent((make_cell(rng, 3, 8),))]).trace(rng.normal(size=(3, 50, 3)))
    h = t["layer_0"].h
    screen = open_page(t, labels=["abcde"[n % 5] for n in range(50)])
    screen.tab("match")
    screen.keys(*["ArrowRight"] * 20)
    screen.keys("Shift+ArrowRight", "Shift+ArrowRight")
    threshold = 0.3 * abs(h[0]).max()
    on = np.flatnonzero((h[0, 20:23] >= threshold).all(axis=0))
    assert [int(text) for text in screen.texts(".pills button")] == on.tolist()

    def expected(units):
        both = (h[:, :, units] >= threshold).all(axis=2) if len(units) else np.zeros(h.shape[:2], bool)
        edges = np.diff(np.pad(both.astype(int), ((0, 0), (1, 1))), axis=1)
        found = [
            (row, a, b)
            for row in range(3)
            for a, b in zip(*(np.flatnonzero(edges[row] == way) for way in (1, -1)), strict=True)
        ]
        return {one for one in found if one[0] != 0 or one[2] <= 20 or one[1] >= 23}

    def shown():
        found = set()
        for text in screen.texts(".found li button"):
            row, first, *last = map(int, re.findall(r"\d+", text))
            found.add((row, first, (last[0] if last else first) + 1))
        return found

    assert len(on)
    assert shown() == expected(on)
    screen.page.locator(".pills button").first.click()
    screen.settle()
    assert shown() == expected(on[1:])
    screen.page.locator(".pills button").first.click()
    screen.settle()
    screen.page.get_by_label("Threshold").evaluate(
        "(slider) => { slider.value = '0.9'; slider.dispatchEvent(new Event('input')); }"
    )
    screen.page.get_by_text("only units that are off just before and after").click()
    screen.settle()
    assert "No unit" in screen.text("#panel-match .note")
    screen.page.get_by_role("button", name="Clear").click()
    screen.settle()
    assert "Mark a range" in screen.text("#panel-match .note")
    step = int(screen.page.get_by_label("Step", exact=True).input_value())
    screen.page.get_by_role("button", name="Mark the steps around the cursor").click()
    screen.settle()
    assert f"from step {step - 1} " in screen.text("#panel-match .note")


@pytest.mark.long
def test_a_range_is_marked_with_the_mouse(open_page, net, x):
    screen = open_page(net.trace(x))
    box = screen.page.locator(".stack").bounding_box()
    screen.page.get_by_role("button", name="Mark a range").click()
    screen.page.mouse.move(box["x"] + 44 + 2.5 * 72, box["y"] + 20)
    screen.page.mouse.down()
    screen.page.mouse.move(box["x"] + 44 + 4 * 72, box["y"] + 20)
    screen.page.mouse.move(box["x"] + 44 + 5.5 * 72, box["y"] + 20)
    screen.page.mouse.up()
    screen.settle()
    assert screen.page.evaluate("document.getElementById('page').ready.then(({ view }) => view.range)") == [2, 6]


def test_a_wave_is_shown_above_the_map(open_page, rng):
    rate, seconds = 8000, 1.0
    samples = np.sin(2 * np.pi * 2000.0 * np.arange(int(rate * seconds)) / rate)
    net = Network([Recurrent((make_cell(rng, 80, 4),))])
    t = net.trace(samples.reshape(1, 100, 80))
    screen = open_page(t, labels=np.arange(100) * 0.01, audio=(samples, rate))
    assert screen.page.locator(".wave").is_visible()
    audio = contents.payload(t, audio=(samples, rate), packed=False)
    place = audio.description["audio"]["spectrum"]["array"]
    spectrum = np.frombuffer(audio.arrays[place], np.uint8).reshape(audio.description["arrays"][place]["shape"])
    assert spectrum[:, 5:-5].mean(axis=1).argmax() == pytest.approx(len(spectrum) / 2, abs=1)  # half of 4 kHz
    screen.keys("ArrowRight")
    assert screen.text(".readout").startswith("step 1 (label 0.01) · ")


# ── the page computes ─────────────────────────────────────────────────────────────────────────────────────────────────


def outputs_shown(screen):
    screen.settle()
    rows = screen.rows("#panel-whatif tbody tr")
    return np.array([[parsed(text) for text in row[1:]] for row in rows])


def wait_for_result(screen, sentence="changed; dashed"):
    screen.page.locator("#panel-whatif .status").filter(has_text=sentence).wait_for()
    screen.settle()


def patched_run(net, x, gate, unit, steps, value):
    """The stack's output with a patched gate of the lower LSTM, in plain NumPy."""
    cell = net.cells[0]
    out = np.zeros((len(x), x.shape[1], 4))
    h, c = np.zeros((2, len(x), 4))
    for step in range(x.shape[1]):
        z = x[:, step] @ cell.kernel + h @ cell.recurrent_kernel + cell.bias
        gates = dict(zip("ifgo", np.split(z, 4, axis=1), strict=True))
        gates = {name: np.tanh(part) if name == "g" else 1 / (1 + np.exp(-part)) for name, part in gates.items()}
        if step in steps:
            gates[gate][:, unit] = value
        c = gates["f"] * c + gates["i"] * gates["g"]
        h = gates["o"] * np.tanh(c)
        out[:, step] = h
    return Network(net.nodes[1:])(out)


@pytest.mark.long
def test_what_if_a_gate_is_patched(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("whatif")
    screen.keys("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown")
    assert screen.page.locator("#panel-whatif .status").inner_text().startswith("Without changes, this page reproduces")
    for _ in range(3):
        screen.page.keyboard.press("Shift+ArrowRight")
    screen.settle()
    screen.choose("at", "range")
    screen.page.get_by_label("Value", exact=True).fill("0.25")
    screen.page.get_by_role("button", name="Add patch").click()
    wait_for_result(screen)
    screen.keys("ArrowRight", "ArrowRight")
    y = patched_run(net, x, "f", 1, range(3, 7), 0.25)
    for unit, (before, after, change) in enumerate(outputs_shown(screen)):
        assert close(before, t.y[0, 8, unit], 5)
        assert close(after, y[0, 8, unit], 5)
        assert close(change, y[0, 8, unit] - t.y[0, 8, unit])
    assert 'cs.Patch("lower", gate="f", units=[1], steps=slice(3, 7), value=0.25)' in screen.text("pre")
    ran = {"net": net, "x": x}
    exec(screen.text("pre"), ran)  # the equivalent Python code
    assert np.allclose(ran["t"].y, y, rtol=0, atol=1e-12)
    # Drag the slider to another value: everything is updated.
    slider = screen.page.locator(".patches input[type=range]")
    slider.evaluate("(slider) => { slider.value = '0.9'; slider.dispatchEvent(new Event('input')); }")
    screen.settle()
    screen.page.wait_for_timeout(100)
    y = patched_run(net, x, "f", 1, range(3, 7), 0.9)
    assert close(outputs_shown(screen)[0, 1], y[0, 8, 0], 5)
    # All other views show the result: the map, the cell and its formula.
    screen.keys("ArrowLeft", "ArrowLeft")
    screen.field("f")
    assert close(numbers_in(screen.text(".readout"))[-1], 0.9, 5)
    screen.choose("Show", "difference")
    assert close(numbers_in(screen.text(".readout"))[-1], 0.9 - t["lower"].f[0, 6, 1], 4)
    screen.choose("Show", "after")
    screen.tab("cell")
    screen.settle()
    screen.page.locator('.number[data-field="f"][data-unit="1"]').focus()
    assert "It is patched: set 0.9" in screen.text(".popover")
    screen.tab("unit")
    screen.settle()
    assert "dashed: as traced" in screen.text("#panel-unit .readout")
    screen.tab("whatif")
    screen.page.get_by_role("button", name="Remove").click()
    screen.settle()
    assert screen.text("pre") == "No changes yet."
    assert screen.page.get_by_label("Show", exact=True).is_hidden()


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "value"),
    [("add", 0.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("scale", -2.0), ("freeze", None)))],
)
def test_what_if_a_state_is_changed_in_other_ways(open_page, net, x, how, value):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("whatif")
    screen.keys("ArrowRight", "ArrowRight")
    screen.choose("Patch", "c")
    screen.choose("at", "cursor")
    screen.choose("how", how)
    if value is not None:
        screen.page.get_by_label("Value", exact=True).fill(str(value))
    screen.page.get_by_role("button", name="Add patch").click()
    wait_for_result(screen)
    screen.field("c")
    c = t["lower"].c[0, :, 0]
    true = {"add": c[2] + 0.5, "scale": -2.0 * c[2], "freeze": c[1]}[how]
    assert close(numbers_in(screen.text(".readout"))[-1], true, 5)
    assert f'how="{how}"' in screen.text("pre")


@pytest.mark.long
def test_what_if_an_input_is_dragged(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("whatif")
    screen.choose("Row", "1")
    screen.keys("ArrowRight", "ArrowRight")
    slider = screen.page.get_by_label("x 2", exact=True)
    slider.evaluate("(slider) => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    wait_for_result(screen)
    changed = x.copy()
    changed[1, 2, 2] = float(slider.input_value())
    screen.keys("ArrowRight")
    assert close(outputs_shown(screen)[1, 1], net(changed)[1, 3, 1], 4)
    ran = {"net": net, "x": x.copy()}
    exec(screen.text("pre"), ran)
    assert np.array_equal(ran["x"], changed)
    assert np.array_equal(ran["t"].y, net(changed))
    screen.page.get_by_role("button", name="Undo all").click()
    screen.settle()
    assert close(outputs_shown(screen)[1, 1], t.y[1, 3, 1], 5)


@pytest.mark.long
def test_what_if_the_line_of_an_input_is_dragged(open_page, net, x):
    screen = open_page(net.trace(x))
    screen.tab("whatif")
    screen.page.locator(".sliders").filter(has_text="x[2]").wait_for()
    screen.page.locator(".dragged").scroll_into_view_if_needed()
    box = screen.page.locator(".dragged").bounding_box()
    across, down = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
    screen.page.mouse.move(across, down)
    screen.page.mouse.down()
    screen.page.mouse.move(across, box["y"] + 4)
    wait_for_result(screen)
    screen.page.mouse.up()
    screen.settle()
    ran = {"net": net, "x": x.copy()}
    exec(screen.text("pre"), ran)
    ((row, step, feature),) = np.argwhere(ran["x"] != x)
    assert (row, feature) == (0, 0)
    assert ran["x"][0, step, 0] > x.max()
    assert screen.text(".readout").startswith(f"step {step} ")
    assert close(outputs_shown(screen)[1, 1], ran["t"].y[0, step, 1], 5)


@pytest.mark.long
def test_what_if_the_state_is_reset_and_a_weight_edited(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("whatif")
    screen.keys(*["ArrowRight"] * 4)
    screen.page.get_by_role("button", name="Reset the state before").click()
    wait_for_result(screen)
    reset = np.zeros((2, 10), bool)
    reset[0, 4] = True
    screen.keys("ArrowRight")
    assert close(outputs_shown(screen)[0, 1], net.run(x, reset=reset)[0][0, 5, 0], 5)
    screen.choose("Weights into", "g")
    screen.page.get_by_label("Weight of h_prev[2] into g of unit 0").fill("0.75")
    screen.settle()
    screen.page.wait_for_timeout(100)
    kernel = np.array(net.cells[0].recurrent_kernel)
    kernel[2, 8] = 0.75
    edited = replace_arrays(net.cells[0], recurrent_kernel=kernel)
    edited = Network([replace(net.nodes[0], cells=(edited,)), *net.nodes[1:]])
    assert close(outputs_shown(screen)[0, 1], edited.run(x, reset=reset)[0][0, 5, 0], 5)
    ran = {"net": net, "x": x}
    exec(screen.text("pre"), ran)  # the equivalent Python code
    assert np.array_equal(ran["t"].y, edited.run(x, reset=reset)[0])
    # The cell's formula has the new weight.
    screen.tab("cell")
    screen.page.locator('.number[data-field="g"][data-unit="0"]').focus()
    assert "· 0.75" in screen.text(".popover")


@pytest.mark.long
def test_the_gradient_back_over_the_inputs(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("gradient")
    screen.page.locator("#panel-gradient .readout").filter(has_text="affects it most at step 0").wait_for()
    screen.keys(*["ArrowRight"] * 6)
    screen.choose("Output unit", "1")
    slopes = np.zeros((10, 3))
    for at in np.ndindex(7, 3):
        moved = x[:1].copy()
        moved[0, at[0], at[1]] += 1e-6
        slopes[at] = (net(moved)[0, 6, 1] - net(x[:1])[0, 6, 1]) / 1e-6
    screen.page.locator("#panel-gradient .readout").filter(has_text="affects it most").wait_for()

    def shown():
        screen.settle()
        rows = screen.rows("#panel-gradient tbody tr")
        return {int(re.findall(r"\d+", row[0])[0]): parsed(row[1]) for row in rows}

    norms = np.linalg.norm(slopes, axis=1)
    assert shown() == {step: pytest.approx(norms[step], rel=1e-3) for step in range(7)}
    screen.choose("Feature", "2")
    assert shown() == {step: pytest.approx(slopes[step, 2], rel=1e-3, abs=1e-6) for step in range(7)}
    screen.page.get_by_text("logarithm", exact=True).click()
    screen.settle()
    assert "powers of ten" in screen.text("#panel-gradient .readout")
    screen.choose("Gradient of", "shown")
    screen.settle()
    assert "h of unit 0 of lower" in screen.text("#panel-gradient h3")


@pytest.mark.long
@pytest.mark.parametrize(
    "before",
    [
        "delete window.Worker",
        "window.Worker = class { constructor() { setTimeout(() => this.onerror(new Event('error'))); } terminate() {}"
        " postMessage() {} }",
    ],
    ids=["none", "not started"],
)
def test_without_a_worker_the_page_computes_itself(open_page, net, x, before):
    screen = open_page(net.trace(x), before=before)
    screen.tab("whatif")
    screen.page.get_by_role("button", name="Add patch").click()
    wait_for_result(screen)
    screen.keys("End")
    patched = net.edit(Patch("lower", gate="f", units=[0], value=1.0))
    assert close(outputs_shown(screen)[0, 1], patched(x)[0, 9, 0], 5)


# ── an mLSTM ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_memory_net(rng, **flags):
    """Two heads with keys of 4 and values of 3 numbers, below a projection and a head."""
    memory = MLSTM(2, 4, 3, **flags)
    projection = Dense(rng.normal(size=(3, memory.input_size)), rng.normal(size=memory.input_size))
    return Network([projection, memory, Dense(rng.normal(size=(6, 2)))], ["projection", "memory", "head"])


def memory_trace(rng, net, x):
    """A run from a state, with masked steps and resets in the second row."""
    state = MatrixState(*(rng.normal(size=(len(x), *shape)) for shape in net.stateful[0].state_shapes.values()))
    mask, reset = np.ones(x.shape[:2], bool), np.zeros(x.shape[:2], bool)
    mask[1, [4, 9]] = False
    reset[1, 3] = True
    return net.trace(x, (state,), mask=mask, reset=reset)


@pytest.mark.long
def test_the_fields_of_an_mlstm_are_those_of_the_trace(open_page, rng, x):
    net = make_memory_net(rng, output_gate=True)
    t = memory_trace(rng, net, x)
    memory = t["memory"]
    screen = open_page(t)
    assert screen.page.locator(".choice button").all_inner_texts()[:9] == [*"qkvifomnh"]
    for row, step in ((0, 2), (1, 4)):  # used, and masked
        screen.choose("Row", str(row))
        for name in memory.fields._fields:
            array = memory.flat(name)
            unit = array.shape[-1] - 1
            screen.looked_at(field=name, step=step, unit=unit)
            said = screen.text(".readout")
            assert close(numbers_in(said.split(" = ")[1])[0], array[row, step, unit], 5)
            place = "" if name in "ifm" else " [3]" if name in "qkn" else " [2]"
            assert f" · head 1{place} · {name} = " in said
    screen.looked_at(field="h", unit=4)
    screen.field("f")
    assert "· head 1 · f = " in screen.text(".readout")  # still the same head
    screen.tab("unit")
    screen.settle()
    assert screen.text("#panel-unit h3") == "Unit, head 1 of memory"
    shown_values = dict(re.findall(r"(\w) = (\S+)", screen.text("#panel-unit .readout")))
    for name in memory.fields._fields:
        array = memory.flat(name)
        unit = array.shape[-1] // 2
        assert close(parsed(shown_values[name]), array[1, 4, unit], 4)


@pytest.mark.long
def test_the_formulas_of_an_mlstm(open_page, rng, x):
    net = make_memory_net(rng, output_gate=True)
    t = memory_trace(rng, net, x)
    memory, z = t["memory"], t["memory"].x[0, 5]
    screen = open_page(t)
    screen.looked_at(step=5, unit=4)  # h of head 1, number 1
    before = {name: memory.flat(name)[0, 4] for name in "mn"}
    log_f = -np.log1p(np.exp(-z[25]))
    expected = {
        "q": [z[5], 5],
        "i": [z[23], memory.m[0, 5, 1], memory.i[0, 5, 1]],
        "f": [log_f, before["m"][1], memory.m[0, 5, 1], memory.f[0, 5, 1]],
        "m": [z[23], log_f, before["m"][1], memory.m[0, 5, 1]],
        "n": [before["n"][5], memory.f[0, 5, 1], memory.k[0, 5, 1, 1] / 2, memory.n[0, 5, 1, 1]],
        "o": [z[30], memory.flat("o")[0, 5, 4]],
        "h": [memory.h[0, 5, 1, 1], memory.flat("o")[0, 5, 4]],
    }
    for name, values in expected.items():
        screen.page.locator(f'.port[data-field="{name}"]').hover()
        screen.settle()
        numbers = numbers_in(screen.text(".popover"))
        for value in values:
            assert any(close(number, value, 5) for number in numbers), (name, value, screen.text(".popover"))
        assert close(
            numbers_in(screen.text(".popover .result"))[-1],
            memory.flat(name)[0, 5].reshape(2, -1)[1][-1 if name in "ifm" else 1],
            5,
        )
    rows = [line.split("\t") for line in screen.page.locator(".popover tr").all_inner_texts()]
    terms = {row[0]: [numbers_in(cell)[0] for cell in row[1:]] for row in rows[:-1]}
    for step in range(6):
        value, weight, product = terms[f"step {step}"]
        assert close(value, memory.v[0, step, 1, 1], 5)
        assert close(weight, memory.weights(5)[0, 1, step], 5)
        assert close(product, value * weight, 4)
    rest = memory.h[0, 5, 1, 1] / memory.flat("o")[0, 5, 4] - memory.weights(5)[0, 1] @ memory.v[0, :, 1, 1]
    assert close(terms["initial state"][0], rest, 4)
    screen.page.locator('.port[data-field="C"]').hover()
    assert "C = f · C_prev + i · k · vᵀ / √4" in screen.text(".popover")
    assert screen.page.locator('.port[data-field="C"] .value').text_content() == "4 × 3"
    table = screen.page.locator(".steptable")
    assert table.locator("thead th").all_inner_texts() == ["", "n_prev", *"qkvonh"]
    for name in "qkvonh":
        unit = 3 + 1  # of the three of head 1, the second
        assert close(
            parsed(table.locator(f'[data-field="{name}"][data-unit="{unit}"]').inner_text()),
            memory.flat(name)[0, 5].reshape(2, -1)[1, 1],
            4,
        )
    table.get_by_role("button", name="head 1 [2]").click()
    screen.settle()
    assert "head 1 [2] · h = " in screen.text(".readout")
    screen.field("n")
    screen.looked_at(unit=7)  # a number of a key that a value doesn't have
    assert screen.text("#panel-cell h3").startswith("mLSTM cell of memory, head 1 [0]")
    screen.field("v")
    assert "head 1 [0] · v = " in screen.text(".readout")
    screen.choose("Row", "1")
    screen.looked_at(step=4)
    for name, said in (("C", "C stays as it is"), ("m", "m stays "), ("h", "its gates are 0")):
        screen.page.locator(f'.port[data-field="{name}"]').hover()
        screen.settle()
        assert f"This step is masked: {said}" in screen.text(".popover")


@pytest.mark.long
def test_the_weights_with_which_a_query_reads_earlier_steps(open_page, rng, x):
    net = make_memory_net(rng)
    t = memory_trace(rng, net, x)
    memory = t["memory"]
    screen = open_page(t)
    screen.tab("memory")
    panel = screen.page.locator("#panel-memory")
    panel.get_by_text("What a query reads is a sum of all earlier v; the bars are their weights.").wait_for()
    for row, step, head in ((0, 6, 1), (1, 8, 0), (1, 2, 1), (1, 4, 0)):
        screen.choose("Row", str(row))
        screen.looked_at(step=step, unit=3 * head + 1)
        weights, v = memory.weights(step)[row, head], memory.v[row, :, head, 1]
        order = [at for at in np.argsort(-np.abs(weights)) if weights[at]][:8]
        rows = [line.split("\t") for line in panel.locator("tbody tr").all_inner_texts()]
        assert [one[0] for one in rows] == [f"step {at}" for at in order]
        for one, at in zip(rows, order, strict=True):
            assert [close(parsed(one[1]), weights[at]), close(parsed(one[2]), v[at])] == [True, True]
        total, start, *_, h = numbers_in(panel.locator(".readout").inner_text())
        assert close(total, weights @ v, 5)
        assert close(h, memory.h[row, step, head, 1], 5)
        assert start == pytest.approx(memory.h[row, step, head, 1] - weights @ v, abs=1e-4)
        assert (start == 0) == (row == 1 and step >= 3)  # after the reset
    # Pointing at the map of all queries gives the weight of a step for a query; a click chooses the query.
    screen.looked_at(step=9, unit=1)
    screen.choose("Row", "0")
    panel.locator("canvas").nth(-1).scroll_into_view_if_needed()
    box = panel.locator("canvas").nth(-1).bounding_box()
    place = (box["x"] + 44 + 2.5 * (box["width"] - 50) / 10, box["y"] + 7.5 * box["height"] / 10)
    screen.page.mouse.move(*place)
    said = panel.locator(".readout").inner_text()
    assert said.startswith("query of step 7, step 2: ")
    assert close(numbers_in(said)[-1], memory.weights(7)[0, 0, 2], 5)
    screen.page.mouse.click(*place)
    screen.settle()
    assert "query of head 0 reads, step 7" in panel.locator("h3").inner_text()


@pytest.mark.long
def test_what_if_and_gradients_of_an_mlstm(open_page, rng, x):
    net = make_memory_net(rng, output_gate=True)
    t = net.trace(x)
    screen = open_page(t)
    screen.tab("gradient")
    screen.looked_at(step=9)
    screen.page.locator("#panel-gradient tbody tr").first.wait_for()
    norms = np.linalg.norm(t.gradient(unit=0)["x"][0], axis=-1)
    row = screen.page.locator("#panel-gradient tbody tr").first.inner_text().split("\t")
    assert row[0] == f"step {norms.argmax()}"
    assert close(parsed(row[1]), norms.max(), 4)
    screen.field("i")
    screen.choose("Gradient of", "shown")
    assert "i of head 0 of memory" in screen.text("#panel-gradient h3")
    screen.tab("whatif")
    assert "has no weights" in screen.text("#panel-whatif .note")
    screen.looked_at(step=4, field="h", unit=4)
    screen.choose("Patch", "f")
    assert "head 1 of memory" in screen.page.get_by_label("of", exact=True).inner_text()
    screen.choose("at", "on")
    screen.page.get_by_label("Value", exact=True).fill("0.5")
    screen.page.get_by_role("button", name="Add patch").click()
    wait_for_result(screen)
    patched = net.edit(Patch("memory", gate="f", units=[1], steps=slice(4, 10), value=0.5))(x)
    screen.looked_at(step=7, field="h", unit=4)
    assert close(outputs_shown(screen)[1, 1], patched[0, 7, 1], 5)
    screen.page.get_by_role("button", name="Undo all").click()
    screen.looked_at(step=4)
    screen.page.get_by_role("button", name="Reset the state before step 4").click()
    slider = screen.page.get_by_label("x 1", exact=True)
    slider.evaluate("(slider) => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    wait_for_result(screen)
    changed, reset = x[:1].copy(), np.zeros((1, 10), bool)
    changed[0, 4, 1], reset[0, 4] = float(slider.input_value()), True
    after = net.trace(changed, reset=reset)
    screen.looked_at(step=7, field="h", unit=5)
    assert close(outputs_shown(screen)[1, 1], after.y[0, 7, 1], 5)
    for name in ("h", "n", "i"):
        screen.field(name)
        screen.looked_at(unit=after["memory"].flat(name).shape[-1] - 1)
        assert close(numbers_in(screen.text(".readout").split(" = ")[1])[0], after["memory"].flat(name)[0, 7, -1], 5)
    screen.tab("memory")
    screen.settle()
    weights = after["memory"].weights(7)[0, 1]
    rows = [line.split("\t") for line in screen.page.locator("#panel-memory tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == [f"step {at}" for at in np.argsort(-np.abs(weights))[:4]]
    assert close(parsed(rows[0][1]), np.abs(weights).max() * np.sign(weights[np.abs(weights).argmax()]))
    ran = {"net": net, "x": x.copy()}
    exec(screen.page.locator("pre").first.text_content(), ran)
    assert np.allclose(ran["t"].y[:1], after.y, rtol=0, atol=1e-12)


@pytest.mark.long
def test_a_part_of_the_run_of_an_mlstm(open_page, rng, x):
    net = make_memory_net(rng)
    t = memory_trace(rng, net, x)
    screen = open_page(t.select(rows=slice(1, 2), steps=slice(2, 8)))
    screen.field("n")
    screen.looked_at(step=1, unit=7)
    assert close(numbers_in(screen.text(".readout").split(" = ")[1])[0], t["memory"].flat("n")[1, 3, 7], 5)
    screen.page.locator('.port[data-field="n"]').hover()
    assert "covers only part of the run" in screen.text(".popover")
    screen.tab("memory")
    assert "covers only part of the run" in screen.text("#panel-memory .readout")


BLUE = """(canvas) => {
    const { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, width, height);
    for (let n = 0; n < data.length; n += 4) if (data[n + 2] - data[n] > 100) return true;
    return false;
}"""


@pytest.mark.long
def test_the_playground_learns(open_page, net, x):
    screen = open_page(net.trace(x))
    screen.tab("playground")
    screen.choose("Task", "parity")
    screen.choose("Task", "echo")
    screen.page.get_by_label("Delay in steps").fill("1")
    screen.page.get_by_label("Delay in steps").press("Enter")
    screen.page.get_by_label("Units", exact=True).fill("8")
    screen.page.get_by_label("Units", exact=True).press("Enter")
    screen.choose("Learning rate", "0.03")
    screen.choose("Cell", "gru")
    said = screen.page.locator("#panel-playground .readout")
    said.filter(has_text="hasn't learned").wait_for()
    chart = screen.page.locator("#panel-playground canvas").first
    assert not chart.evaluate(BLUE)  # no cross, which marks a loss of NaN
    screen.page.get_by_role("button", name="One batch").click()
    said.filter(has_text="after 1 batch:").wait_for()
    assert chart.evaluate(BLUE)
    first = numbers_in(said.inner_text().split("loss")[1])[0]
    screen.page.get_by_role("button", name="Learn", exact=True).click()
    wait_until(lambda: int(said.get_attribute("data-batches")) > 150)
    screen.page.get_by_role("button", name="Pause").click()
    screen.settle()
    loss, right = numbers_in(said.inner_text().split("loss")[1])[:2]
    assert loss < 0.2 * first
    assert right > 95.0
    screen.page.locator('#panel-playground .choice button[data-value="z"]').click()
    screen.page.get_by_label("Show as a table: units over time").click()
    screen.settle()
    assert screen.page.locator("#panel-playground tbody tr").count() == 8
    screen.page.get_by_role("button", name="Restart").click()
    screen.settle()
    assert "hasn't learned" in said.inner_text()
    for task in ("adding", "wave", "brackets"):
        for kind in ("lstm", "rnn"):
            screen.choose("Task", task)
            screen.choose("Cell", kind)
            screen.page.get_by_role("button", name="One batch").click()
            said.filter(has_text="after 1 batch:").wait_for()


@pytest.mark.long
def test_a_graph_of_every_kind_of_layer(open_page, rng):
    ahead = Recurrent((make_cell(rng, 5, 6, kind="gru", reset_after=False),))
    back = Recurrent((make_cell(rng, 5, 6, kind="gru"),), go_backwards=True)
    stack = Recurrent((make_cell(rng, 16, 3, kind="rnn"), make_cell(rng, 3, 3, kind="rnn")), return_sequences=False)
    net = Network(
        [
            Embedding(rng.normal(size=(7, 5))),
            Bidirectional(ahead, back, "concat"),
            Recurrent((make_cell(rng, 12, 8, peepholes=True, proj_size=4),)),
            Merge("concat"),
            stack,
            GlobalPool("mean"),
            Merge("concat"),
            Dense(rng.normal(size=(19, 2))),
        ],
        ["table", "both", "lstm", "merged", "stack", "mean", "joined", "head"],
        wires=[
            ("x",),
            ("table",),
            ("both",),
            ("both", "lstm"),
            ("merged",),
            ("merged",),
            ("stack", "mean"),
            ("joined",),
        ],
        inputs={"x": (None,)},
    )
    t = net.trace(rng.integers(0, 7, size=(2, 15)), lengths=[15, 9])
    screen = open_page(t)
    screen.tab("whatif")
    wait_for_result(screen, "Without changes, this page reproduces the trace to")
    assert numbers_in(screen.text("#panel-whatif .status"))[-1] < 1e-12
    screen.page.get_by_label("Layer", exact=True).select_option("both/1")
    screen.tab("cell")
    screen.keys(*["ArrowRight"] * 5)
    for field in "zrgh":
        array = t["both"].cells[1][field]
        screen.page.locator(f'.number[data-field="{field}"][data-unit="2"]').focus()
        assert close(numbers_in(screen.page.locator(".popover > div").last.inner_text())[-1], array[0, 5, 2], 5)
    screen.choose("Row", "1")
    screen.keys("End")
    screen.page.locator('.number[data-field="h"][data-unit="2"]').focus()
    assert "This step is masked" in screen.text(".popover")
    boxes = screen.page.locator(".network .box")
    assert boxes.count() == 6 * 5 + 3  # five steps fit; three nodes have one output per row
    screen.page.locator('.network .box[aria-label^="lstm,"]').first.press("Enter")
    screen.settle()
    assert "LSTM cell of lstm" in screen.text("#panel-cell h3")
    for name in ("unit", "memory", "gradient", "whatif", "match"):
        screen.tab(name)
        screen.settle()


# ── what can't be shown, or can't be computed ─────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_part_of_a_run_is_shown_alone(open_page, net, x):
    t = net.trace(x).select(steps=slice(4, 9), units=[0, 2])
    screen = open_page(t)
    assert "part of a run" in screen.text(".warning")
    screen.keys("ArrowRight")
    assert screen.text(".readout").startswith("step 5 ")
    screen.choose("Layer", "lower/0")
    assert "unit 2" in screen.page.locator(".steptable").inner_text()
    assert "can't be shown" in screen.text("#panel-cell .note")
    for name in ("gradient", "whatif", "memory"):
        screen.tab(name)
        screen.settle()
    assert "whole" not in screen.text("#panel-memory h3")


@pytest.mark.parametrize(
    ("name", "most"),
    [("MOST_RUN", "1"), ("MOST_NUMBERS", "600"), pytest.param("MOST_NUMBERS", "100", marks=pytest.mark.slow)],
)
def test_expensive_runs_are_not_computed(open_page, net, x, monkeypatch, name, most):
    text = html.module_text()
    bounded, count = re.subn(rf"const {name} = [^;]+;", f"const {name} = {most};", text)
    assert count == 1
    monkeypatch.setattr(html, "module_text", lambda: bounded)
    screen = open_page(net.trace(x))
    screen.tab("gradient")
    screen.settle()
    assert ("too long to wait for" if name == "MOST_RUN" else "too many for a browser") in screen.text(".page")
    assert screen.page.locator("#panel-gradient canvas").is_hidden()
    alone = most != "600"  # 540 numbers of gates and states: one run fits, a gradient doesn't
    assert screen.page.locator(".warning").count() == alone
    screen.tab("whatif")
    screen.settle()
    assert screen.page.get_by_role("button", name="Add patch").is_visible() != alone


@pytest.mark.long
def test_a_network_with_patches_is_shown_with_them(open_page, net, x):
    patches = [
        Patch("lower", gate="f", units=[1], rows=[1], steps=slice(2, 6, 2), value=1.0),
        Patch(
            "upper",
            gate="c",
            units=[0],
            rows=[0, 1],
            steps=slice(0, 10),
            value=np.arange(20.0).reshape(2, 10, 1) / 10.0,
        ),
        Patch("upper", gate="h", units=slice(1, 3), rows=slice(1, None), steps=[3], how="freeze"),
    ]
    t = net.edit(patches).trace(x)
    for rows in (None, [1]):
        screen = open_page(t, rows=rows)
        assert "run with 3 patches: Patch('lower', gate='f'" in screen.text(".note")
        if rows is None:
            screen.choose("Row", "1")
        screen.tab("whatif")
        wait_for_result(screen, "Without changes, this page reproduces the trace to")
        assert numbers_in(screen.text("#panel-whatif .status"))[-1] < 1e-12
        screen.page.get_by_role("button", name="Add patch").click()
        wait_for_result(screen)
        patched = Patch("lower", gate="f", units=[0], value=1.0)
        screen.keys("End")
        assert close(outputs_shown(screen)[0, 1], net.edit([*patches, patched])(x)[1, 9, 0], 5)
        screen.tab("cell")
        screen.choose("Show", "trace")
        screen.keys("Home", *["ArrowRight"] * 4)
        screen.page.locator('.number[data-field="f"][data-unit="1"]').focus()
        assert "It is patched: Patch(" in screen.text(".popover")
        screen.keys("ArrowRight")
        screen.page.locator('.number[data-field="f"][data-unit="1"]').focus()
        assert "patched" not in screen.text(".popover")
    screen.choose("Layer", "upper/0")
    screen.tab("memory")
    screen.settle()
    assert "A patch changes this state" in screen.text("#panel-memory [data-sum]")


def test_a_node_that_the_engine_lacks_is_named(open_page, net, x, monkeypatch):
    found = contents.payload_of

    def payload_of(network, pack):
        payload = found(network, pack)
        payload["description"]["nodes"][2]["type"] = "unheard_of"
        return payload

    monkeypatch.setattr(contents, "payload_of", payload_of)
    screen = open_page(net.trace(x))
    assert "head: a node of the type unheard_of isn't supported." in screen.text(".warning")
    screen.keys("ArrowRight")
    assert screen.text(".readout").startswith("step 1 ")


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_traces_without_rows_or_steps(open_page, net, shape):
    screen = open_page(net.trace(np.zeros(shape)))
    assert ("no row" if shape[0] == 0 else "no step") in screen.text(".warning")
    screen.page.get_by_role("button", name="One batch").click()
    screen.page.locator(".readout").filter(has_text="after 1 batch:").wait_for()


@pytest.mark.long
def test_a_network_without_gates(open_page, rng):
    screen = open_page(Network([Dense(rng.normal(size=(3, 2)))]).trace(rng.normal(size=(1, 6, 3))))
    assert "No cell here" in screen.text("#panel-cell h3")
    screen.choose("Layer", "layer_0")
    assert "y = " in screen.text(".readout")
    for name in ("unit", "memory", "gradient", "whatif", "match"):
        screen.tab(name)
        screen.settle()


def test_invalid_arguments_are_refused_beforehand(net, x, tmp_path, monkeypatch):
    t = net.trace(x)
    path = tmp_path / "page.html"
    for labels, found in (("short", "got 5"), ([["a"] * 10], "got 1 lists of 10"), ([["a"] * 9] * 2, "lists of 9, 9")):
        with pytest.raises(ValueError, match=f"labels for 10 steps.*{found}"):
            t.save_html(path, labels)
    for audio in ((np.zeros((2, 5)), 8000), (np.zeros(5), 0), (np.zeros(0), 8000)):
        with pytest.raises(ValueError, match="expected audio as"):
            t.save_html(path, audio=audio)
    with pytest.raises(ValueError, match="expected audio as"):
        t.save_html(path, audio=5)
    with pytest.raises(IndexError, match="rows from 0 to 1"):
        t.save_html(path, rows=2)
    with pytest.raises(FileNotFoundError):
        t.save_html(tmp_path / "nowhere" / "page.html")
    monkeypatch.setattr(contents, "ROUNDED", ((100, np.float16),))
    with pytest.raises(ValueError, match=r"at most .* numbers, got 1,180: select rows"):
        t.save_html(path)
    assert not path.exists()


def test_valid_and_invalid_labels(net, x, tmp_path):
    t, (rows, steps, _) = net.trace(x), x.shape
    for labels in (np.ones((rows, steps)), np.full((rows, steps), np.nan), [list("a" * steps)] * rows):
        assert contents.payload(t, labels).description["labels"]["nested"]
    for labels in (5, np.array(3), np.zeros((rows, steps, 2)), [None, *[list("a" * steps)] * (rows - 1)]):
        with pytest.raises(ValueError, match="expected labels as a string or a list, one per step"):
            contents.payload(t, labels)
    for chosen in (True, np.array([[0, 1]])):
        with pytest.raises(IndexError, match="rows as a slice, a number or numbers"):
            contents.payload(t, rows=chosen)
    with pytest.raises(TypeError, match="title to be a string"):
        t.save_html(tmp_path / "x.html", title=5)
    t.save_html(tmp_path / "x.html", title="not a character: \udcff")  # file names may contain these


@pytest.mark.parametrize("most", [1e300, 1e38, 1e-300])
def test_waves_of_any_size_have_one_spectrum(net, x, most):
    wave = np.sin(np.arange(4000) * 0.3)
    pictures = [contents.payload(net.trace(x), audio=(size * wave, 8000), packed=False) for size in (1.0, most)]
    places = [made.description["audio"]["spectrum"]["array"] for made in pictures]
    one, other = (np.frombuffer(made.arrays[place], np.uint8) for made, place in zip(pictures, places, strict=True))
    assert one.std() > 20
    np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [pytest.param(np.float32, marks=pytest.mark.slow), np.float16])
def test_large_traces_are_rounded_and_labelled(open_page, rng, net, x, monkeypatch, dtype):
    monkeypatch.setattr(contents, "ROUNDED", ((1 << 20, dtype),))
    t = net.trace(x)
    screen = open_page(t)
    assert np.dtype(dtype).name in screen.text(".page")
    screen.keys("ArrowRight")
    shown = screen.number('.number[data-field="f"][data-unit="2"]')
    assert close(shown, t["lower"].f[0, 1, 2].astype(dtype))
    big = Network([Dense(np.full((1, 1), 1e6, "f4"))]).trace(np.ones((1, 3, 1)))
    assert close(numbers_in(open_page(big).text(".readout"))[-1], 1.0, 3)


# ── appearance and accessibility ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_light_and_dark(open_page, net, x):
    screen = open_page(net.trace(x), scheme="dark")
    ground = "(page) => getComputedStyle(page).backgroundColor"
    page = screen.page.locator(".page")
    assert page.evaluate(ground) == "rgb(20, 23, 29)"
    screen.page.get_by_role("button", name="Light", exact=True).click()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    screen.page.get_by_role("button", name="Dark", exact=True).click()
    assert page.evaluate(ground) == "rgb(20, 23, 29)"
    screen.page.emulate_media(media="print", color_scheme="dark")
    screen.settle()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert page.get_attribute("data-theme") == "light"  # the canvases too
    screen.page.emulate_media(media="screen", color_scheme="dark")
    screen.settle()
    assert page.get_attribute("data-theme") == "dark"


@pytest.mark.long
def test_on_a_phone(open_page, net, x):
    t = net.trace(x)
    screen = open_page(t, width=390, height=800, touch=True, labels="characters")
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390
    screen.page.locator(".stack").tap(position={"x": 200, "y": 40})
    screen.settle()
    step = int(re.findall(r"step (\d+)", screen.text(".readout"))[0])
    assert step > 0
    number = screen.page.locator('.number[data-field="o"][data-unit="0"]')
    number.scroll_into_view_if_needed()
    number.tap()
    assert "output gate" in screen.text(".popover")
    box = screen.page.locator(".popover").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    for tab in ("unit", "text", "memory", "gradient", "whatif", "match", "playground"):
        screen.tab(tab)
        screen.settle()
        assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390, tab


@pytest.mark.long
def test_an_embedded_page_does_not_scroll_the_page_around_it(browser, net, x, tmp_path):
    inside = b"".join(html.page(net.trace(x), None, None, None, None)).decode()
    around = tmp_path / "around.html"
    frame = f'<iframe style="width: 100%; height: 3000px" srcdoc="{escape(inside)}"></iframe>'
    around.write_text(f'<!doctype html><meta charset="utf-8"><div style="height: 3000px"></div>{frame}', "utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(around.as_uri())
    within = page.frames[1]
    within.evaluate("document.getElementById('page').ready.then(() => null)")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("scrollY") == 0
    tab = within.locator("#tab-playground")
    tab.evaluate("(one) => one.click()")  # unlike Playwright's click, without scrolling to it
    place, tabs = tab.bounding_box(), within.locator(".tabs").bounding_box()
    assert page.evaluate("scrollY") > 0
    assert 0 <= place["y"] <= 802 - place["height"]  # scrolled to fractions of a pixel
    assert tabs["x"] <= place["x"]
    assert place["x"] + place["width"] <= tabs["x"] + tabs["width"] + 1
    page.close()


def steps_drawn(screen):
    """The numbers of the steps in the drawing of the network; it must fit into its card."""
    screen.settle()
    assert screen.page.locator(".net .scroll").evaluate("(one) => one.scrollWidth - one.clientWidth") == 0
    names = screen.texts(".network .stepname:not(.head)")
    return [int(re.findall(r"\d+", name)[0]) for name in names]


@pytest.mark.long
def test_the_drawing_of_the_network_has_as_many_steps_as_fit(open_page, net, rng):
    t = net.trace(rng.normal(size=(1, 15, 3)))
    screen = open_page(t, width=890)
    assert steps_drawn(screen) == list(range(15))  # all of them
    assert screen.page.locator(".network .box").count() == 4 * 15
    screen.page.set_viewport_size({"width": 1400, "height": 900})
    some = steps_drawn(screen)
    assert 6 <= len(some) < 15
    screen.keys(*["ArrowRight"] * 10)
    shown = steps_drawn(screen)
    assert shown == list(range(shown[0], shown[0] + len(some)))
    assert 10 in shown
    assert screen.page.locator(".network .stepname.now").text_content() == "10"
    screen.page.set_viewport_size({"width": 390, "height": 800})
    assert 3 <= len(steps_drawn(screen)) < len(some)
    screen.page.locator(".network .rowname", has_text="upper").first.click()
    screen.settle()
    assert "LSTM cell of upper, unit 0, step 10" in screen.text("#panel-cell h3")


@pytest.mark.long
def test_steps_in_the_drawing_have_their_labels_if_they_fit(open_page, net, rng):
    t = net.trace(rng.normal(size=(1, 4, 3)))
    for width, labels, names in (
        (1400, "abcd", [f"step {n} “{label}”" for n, label in enumerate("abcd")]),
        (390, "abcd", [*(f"{n} “{label}”" for n, label in enumerate("abcd")), "step"]),
        (390, ["a long label"] * 4, [f"step {n}" for n in range(4)]),
    ):
        screen = open_page(t, width=width, labels=labels)
        assert screen.texts(".network .stepname") == names


CUT_OFF = """() => {
    const pen = document.createElement("canvas").getContext("2d");
    return [...document.getElementById("page").shadowRoot.querySelectorAll("select, input[type=number]")]
        .filter((one) => one.checkVisibility())
        .filter((one) => {
            const style = getComputedStyle(one);
            pen.font = style.font;
            const said = one.tagName === "SELECT" ? one.selectedOptions[0].text : one.value;
            const arrow = one.tagName === "SELECT" ? 18 : 0;
            const fits = one.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - arrow;
            return pen.measureText(said).width > fits;
        })
        .map((one) => one.tagName === "SELECT" ? one.selectedOptions[0].text : one.value);
}"""


@pytest.mark.long
def test_selections_and_numbers_are_not_cut_off(open_page, rng):
    lower = make_cell(rng, 12, 48)
    lower = replace_arrays(lower, kernel=-abs(lower.kernel) / 400)  # small weights have long numbers: -0.001234
    cells = lower, make_cell(rng, 48, 48)
    net = Network([Recurrent(cells), Dense(rng.normal(size=(48, 2)))], ["recurrent_1", "head"])
    screen = open_page(net.trace(rng.normal(size=(1, 20, 12)) / 50))
    table = screen.page.locator(".steptable")
    assert table.evaluate("(one) => one.parentElement.scrollWidth - one.parentElement.clientWidth") == 0
    for cell in ("0", "1"):
        screen.choose("Layer", f"recurrent_1/{cell}")
        assert screen.page.evaluate(CUT_OFF) == []
    screen.choose("Layer", "recurrent_1/0")
    screen.tab("whatif")
    screen.page.get_by_label("Weight of x[0] into i of unit 0").wait_for()
    assert screen.page.evaluate(CUT_OFF) == []


@pytest.mark.long
def test_the_keyboard_alone_reaches_everything(open_page, net, x):
    screen = open_page(net.trace(x))
    screen.page.locator("#tab-cell").focus()
    for name in ("unit", "memory", "gradient", "whatif", "match", "playground", "cell"):
        screen.page.keyboard.press("ArrowRight")
        assert screen.page.locator(f"#panel-{name}").is_visible()
        assert screen.page.locator(f"#tab-{name}").get_attribute("aria-selected") == "true"
    canvases = screen.page.locator("canvas:not([aria-hidden])")
    for number in range(canvases.count()):
        assert canvases.nth(number).get_attribute("role") == "img"
    unnamed = screen.page.evaluate(
        """() => [...document.getElementById("page").shadowRoot.querySelectorAll("button, input, select, pre")]
            .filter((one) => one.checkVisibility()
                && !(one.getAttribute("aria-label") || one.textContent.trim() || one.closest("label")))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.slow
def test_ten_thousand_steps_of_512_units_load_and_move(open_page, rng):
    net = Network([Recurrent((make_cell(rng, 16, 512, dtype=np.float32),))])
    t = net.trace(rng.normal(size=(1, 10_000, 16)).astype("f4"))
    screen = open_page(t)
    loaded = screen.page.evaluate("performance.getEntriesByName('cellstack: the map is drawn')[0].startTime / 1000")
    frames = screen.page.evaluate(
        """document.getElementById("page").ready.then(async ({ view, map }) => {
            const next = () => new Promise((done) => requestAnimationFrame(done));
            const moves = {
                scroll: (n) => view.move(20 * n, 8000, map.plotWidth()),
                zoom: (n) => view.move(30 * n, 10000 * 0.94 ** n, map.plotWidth()),
            };
            const rates = {};
            for (const [name, move] of Object.entries(moves)) {
                await next();
                const before = map.frames;
                const start = performance.now();
                for (let n = 0; n < 60; n += 1) {
                    move(n);
                    await next();
                }
                rates[name] = ((map.frames - before) * 1000) / (performance.now() - start);
            }
            return rates;
        })"""
    )
    print(f"loaded in {loaded:.2f} s; {frames['scroll']:.0f} and {frames['zoom']:.0f} frames per second")
    assert loaded < 2.0
    assert min(frames.values()) >= 30.0
    assert "too long to wait for" in screen.text(".warning")
    screen.choose("Units by", "likeness")
    screen.choose("Units by", "memory")
    screen.keys("End", "ArrowDown")
    assert screen.text(".readout").startswith("step 9999 ")

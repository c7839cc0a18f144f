"""The figures of the course in Chromium: every control is moved, and the numbers shown are the reference's."""

import json
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
from networks import by_reference

from cellstack import CellSpec, Network, Patch, reference
from cellstack.inspect.html import engine_text, script_text
from cellstack.nodes import Cell, Recurrent

pytestmark = pytest.mark.web

LEARN = Path(__file__).parents[2] / "docs" / "learn"
SCRIPTS = sorted((LEARN / "figures").glob("*.js"))
CHAPTERS = [path.stem for path in SCRIPTS if path.stem != "common"]
MOVE = """(element, value) => {
    element.value = value;
    element.dispatchEvent(new Event("input", { bubbles: true }));
}"""
ON_A_PHONE = 500  # pixels: of 667, less what the browser and the head of the site cover
SHOWN = 2e-3  # numbers are shown with four digits; in a drawing, where space is scarce, with fewer


def number(text):
    """Return a number as the page shows it."""
    return np.nan if text == "–" else float(text.replace("−", "-").replace("∞", "inf"))


class Shown:
    """A figure in the browser."""

    def __init__(self, page, path, size):
        self.page, self.said, self.asked, self.moved = page, [], [], set()
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.set_viewport_size({"width": size, "height": 900})
        page.goto(path.as_uri())
        page.locator(".figure").wait_for()
        self.settle()

    def settle(self):
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def move(self, label, value):
        """Set the slider whose label begins like this."""
        slider = self.page.locator(".sliders label").filter(has_text=re.compile(f"^{re.escape(label)}"))
        self.moved.add(slider.inner_text())
        self.page.locator(f"#{slider.get_attribute('for')}").evaluate(MOVE, str(value))

    def choose(self, label, value):
        self.moved.add(label)
        self.page.get_by_label(label, exact=True).select_option(str(value))

    def click(self, label):
        self.moved.add(label)
        self.page.get_by_role("button", name=label, exact=True).click()

    def tick(self, label, on):
        self.moved.add(label)
        self.page.get_by_label(label, exact=True).set_checked(on)

    def named(self):
        """The numbers with a name."""
        found = self.page.locator("[data-name]").all()
        return {one.get_attribute("data-name"): one.inner_text() for one in found}

    def table(self, which=0):
        """The numbers behind a drawing, by the name of their row."""
        rows = self.page.locator(".behind").nth(which).locator("tbody tr")
        texts = rows.evaluate_all("(rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent))")
        return {name: np.array([number(text) for text in cells]) for name, *cells in texts if name != "character"}

    def controls(self):
        """The labels of all controls."""
        labels = self.page.locator(".sliders label, .field > span, .check > span").all_inner_texts()
        return {*labels, *self.page.locator(".toolbar button, .choice button").all_inner_texts()}


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens the figure of a chapter; afterwards, all of its controls must have been used."""
    (tmp_path / "figures.js").write_text(script_text(*SCRIPTS), encoding="utf-8")
    figures = []

    def open_figure(name, given=None, size=1280):
        place = f'<div data-figure="{name}" data-given="{escape(json.dumps(given))}"></div>'
        head = '<!doctype html><html data-theme="light"><meta charset="utf-8"><script defer src="figures.js"></script>'
        (tmp_path / f"{name}.html").write_text(f"{head}<body>{place}", encoding="utf-8")
        figures.append(Shown(browser.new_page(), tmp_path / f"{name}.html", size))
        return figures[-1]

    yield open_figure
    for figure in figures:
        assert figure.said == []
        assert [url for url in figure.asked if not url.startswith(("file:", "blob:null/"))] == []
        assert figure.controls() - figure.moved == set()
        figure.page.close()


def given_in(chapter):
    """What the code of a chapter gives its figure, and the names that this code has defined."""
    names = {}
    for cell in re.findall(
        r"^```\{code-cell\}\n(?::tags:[^\n]*\n)?(.*?)^```$", text_of(chapter), re.MULTILINE | re.DOTALL
    ):
        exec(compile(cell, chapter, "exec"), names)
        if "given" in names:
            return names
    raise AssertionError(f"{chapter} gives its figure nothing")


def text_of(chapter):
    return (LEARN / f"{chapter}.md").read_text(encoding="utf-8")


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=SHOWN, atol=1e-4)


def test_each_chapter_has_its_figure_a_question_and_the_same_in_three_libraries():
    for chapter in CHAPTERS:
        text = text_of(chapter)
        for part in (
            f'data-figure="{chapter}"',
            "{admonition} Try it",
            "{dropdown} Answer",
            "import keras",
            "torch.nn.",
        ):
            assert part in text, chapter
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script_text(*SCRIPTS), re.MULTILINE)
    assert len(names) == len(set(names))


def test_figures_are_usable_by_keyboard_on_narrow_screens_and_in_the_dark(opened):
    figure = opened("gates", size=390)
    page = figure.page
    slider = page.get_by_label("T, the number of steps")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert len(figure.table()["LSTM"]) == 51
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    light = page.locator(".figure").evaluate("(one) => getComputedStyle(one).backgroundColor")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    figure.settle()
    assert page.locator(".figure").evaluate("(one) => getComputedStyle(one).backgroundColor") != light
    figure.moved = figure.controls()


def test_one_step(opened):
    figure = opened("one_step")
    weights = {
        "kernel": np.array([[1.5, -0.5, 2, 0.5]]),
        "recurrent_kernel": np.array([[0.4, 0.3, -0.6, 0.2]]),
        "bias": np.array([-0.2, 1, 0.1, -0.4]),
    }

    def check(x, h, c):
        out = reference.forward(CellSpec(1, 1), weights, [[[x]]], ([[h]], [[c]]))
        expected = dict(zip("ifgo", out.gates.ravel(), strict=True)) | {"c": out.cells.item(), "h": out.y.item()}
        for name, value in expected.items():
            near(number(figure.page.locator(f'.wires [data-field="{name}"] .value').text_content()), value)

    check(1, 0.2, 1.5)  # as in the chapter's code
    usual = {name: array.copy() for name, array in weights.items()}
    for label, value in (("x,", -2), ("h_prev,", 0.5), ("c_prev,", -1.2)):
        figure.move(label, value)
    check(-2, 0.5, -1.2)
    for column, gate in enumerate("ifgo"):
        figure.choose("Weights of", gate)
        for label, array, value in (
            ("weight of x", "kernel", 0.7),
            ("weight of h_prev", "recurrent_kernel", -1.1),
            ("bias", "bias", 0.3),
        ):
            weights[array][..., column] = value - column
            figure.move(label, value - column)
        check(-2, 0.5, -1.2)
    figure.click("Reset the weights")
    weights = usual
    check(-2, 0.5, -1.2)
    signs = figure.page.locator(".wires .sign").all_text_contents()
    assert sorted(signs) == ["+", "tanh", "×", "×", "×"]  # all of which the text before the figure explains
    figure.page.locator('.wires [data-field="f"]').focus()
    assert "f = σ(" in figure.page.locator(".popover").inner_text()


@pytest.mark.parametrize("chapter", ["one_step", "gates", "memory"])
def test_sliders_are_next_to_the_drawing_on_a_phone(opened, chapter):
    figure = opened(chapter, size=375)
    middle = "(all) => all.map((one) => one.getBoundingClientRect()).map(({ top, bottom }) => [top, bottom])"
    (top, bottom), *_ = figure.page.locator(".wires, canvas.chart").evaluate_all(middle)
    for upper, lower in figure.page.locator(".sliders input").evaluate_all(middle):
        assert max(bottom, lower) - min(top, upper) < ON_A_PHONE
    figure.moved = figure.controls()


def test_gates(opened):
    figure = opened("gates")
    cells = {"SimpleRNN": CellSpec(1, 1, kind="rnn"), "LSTM": CellSpec(1, 1)}

    def check(steps, weight, bias, size):
        x = size * np.sin(np.arange(steps) ** 2.0)[None, :, None]
        arrays = {
            "SimpleRNN": {"kernel": [[1.0]], "recurrent_kernel": [[weight]], "bias": [0.0]},
            "LSTM": {"kernel": [[0.0, 0, 1, 0]], "recurrent_kernel": np.zeros((1, 4)), "bias": [0.0, bias, 0, 2]},
        }
        last = np.zeros((1, steps, 1))
        last[0, -1] = 1
        shown, named, ratios = figure.table(), figure.named(), []
        for name, spec in cells.items():
            out = reference.forward(spec, arrays[name], x)
            slopes = reference.backward(spec, arrays[name], out, dy=last).x.ravel()
            near(shown[name], np.log10(abs(slopes)))
            near(number(named[f"{name}, gradient at the first input"]), slopes[0])
            near(number(named[f"{name}, gradient at the last input"]), slopes[-1])
            ratios.append(slopes[0] / slopes[-1])
        said = figure.page.locator(".readout").inner_text()
        assert said.endswith(": the gradient at the first input divided by that at the last.")
        found = re.search(r"counts (\S+) times .* and (\S+) times", said).groups()
        np.testing.assert_allclose([number(one) for one in found], ratios, rtol=5e-3)  # three digits

    check(50, 0.9, 4, 0)
    figure.move("T,", 30)
    figure.move("recurrent weight", 1.2)
    check(30, 1.2, 4, 0)
    figure.move("forget bias", -1)
    figure.move("size of", 1.5)
    check(30, 1.2, -1, 1.5)


def test_memory(opened):
    figure = opened("memory")

    def check(bias, mark, first, second, value):
        x = np.zeros((1, 40, 2))
        x[0, first] = 1, 1
        x[0, second] = value, 1
        arrays = {
            "kernel": [[0.0, 0, 1, 0], [10, mark, 0, 0]],
            "recurrent_kernel": np.zeros((1, 4)),
            "bias": [-5, bias, 0, 2],
        }
        cell = Cell(CellSpec(2, 1), *(np.array(array, float) for array in arrays.values()))
        trace = Network([Recurrent((cell,))]).trace(x)["layer_0"].cells[0]
        shown, named = [figure.table(0), figure.table(1)], figure.named()
        out = reference.forward(cell.spec, arrays, x)
        near(shown[0]["memory c"], out.cells.ravel())
        near(shown[0]["forget gate f"], out.gates[0, :, 1, 0])
        near(shown[1]["left of it"], trace.contributions()[0, 1:, 0])
        near(number(named["c at the end"]), out.cells[0, -1, 0])
        near(number(named["sum of the bars"]), out.cells[0, -1, 0])
        near(number(named["f without a mark"]), out.gates[0, 0, 1, 0])
        still = Network([Recurrent((cell,))]).trace(np.zeros((1, 3, 2)))["layer_0"].cells[0]
        near(number(named["half-life in steps"]), still.half_lives()[0])

    check(3, 0, 5, 20, -0.5)
    for label, given in (
        ("forget bias", 6),
        ("weight of", -8),
        ("step of the first", 2),
        ("step of the second", 33),
        ("value", 0.7),
    ):
        figure.move(label, given)
    check(6, -8, 2, 33, 0.7)


def test_shapes(opened):
    figure = opened("shapes")

    def waves(*shape):
        count = int(np.prod(shape))
        return 0.8 * np.sin(3 * np.arange(count) + count).reshape(shape)

    def check(rows, steps, features, units, cut=0, passed=True):
        row, step, feature = np.indices((rows, steps, features))
        y, states, left = 0.8 * np.sin(3 * (64 * row + 8 * step + feature)), [], []
        later = y[:, cut:]
        for width in units:
            spec = CellSpec(y.shape[2], width)
            arrays = {name: waves(*shape) if name != "bias" else np.zeros(shape) for name, shape in spec.shapes.items()}
            before = reference.forward(spec, arrays, y[:, :cut]).state if cut and passed else None
            y, state, *_ = reference.forward(spec, arrays, y)
            later, after, *_ = reference.forward(spec, arrays, later, before)
            states, left = [*states, *state], [*left, *after]
        named = figure.named()
        assert named["x"] == f"[{rows}, {steps}, {features}]"
        assert named["output"] == (
            str([*y.shape])
            if figure.page.get_by_label("return_sequences", exact=True).is_checked()
            else str([rows, units[-1]])
        )
        shapes = [value for name, value in named.items() if name[0] in "hc"]
        assert shapes == (
            [str([*state.shape]) for state in states]
            if figure.page.get_by_label("return_state", exact=True).is_checked()
            else []
        )
        whole = figure.page.get_by_label("return_sequences", exact=True).is_checked()
        near([*figure.table().values()], (y[0] if whole else y[0, -1:]).T)
        if cut:
            far = max(abs(a - b).max() for a, b in zip(states, left, strict=True))
            said = figure.page.locator(".readout").inner_text()
            assert said.endswith(f"by up to {far:.4f}." if far > 1e-9 else "to the last bit.")

    check(2, 3, 6, [4])
    for label, value in (
        ("rows", 3),
        ("steps, T", 7),
        ("features", 2),
        ("units, H", 5),
        ("units of a second", 6),
        ("steps in the first part", 4),
    ):
        figure.move(label, value)
    check(3, 7, 2, [5, 6], 4)
    for label in ("return_sequences", "return_state", "pass the state to the second part"):
        figure.tick(label, False)
    check(3, 7, 2, [5, 6], 4, passed=False)


def test_stack(opened):
    names = given_in("stack")
    figure, net, x = opened("stack", names["given"]), names["net"], np.array(names["given"]["x"])[None]
    plain = net.trace(x.astype("f4"))

    def check(step, by, pulse, layer, field):
        changed = x.copy()
        changed[0, step, 0] += by
        changed[0, step, 1] = max(changed[0, step, 1], pulse)
        after = net.trace(changed.astype("f4"))
        output, change, seen, units = (figure.table(n) for n in range(4))
        near(output["wave"], changed[0, :, 0])
        near(output["output before the change"], plain.y[0, :, 0])
        near(output["output"], by_reference(net, changed)[0][0, :, 0])
        lower, upper = (name for name in after if after[name].cells)
        for n, name in enumerate((lower, upper)):
            far = np.sqrt(np.square(after[name].h[0] - plain[name].h[0]).mean(axis=1))
            np.testing.assert_allclose(change[f"layer {n + 1}"], far, rtol=1e-2, atol=1e-4)  # differences of float32
            np.testing.assert_allclose(
                number(figure.named()[f"change of layer {n + 1} at the last step"]), far[-1], rtol=1e-2, atol=1e-4
            )
        near([*seen.values()], (after[lower].h if layer else changed)[0].T)
        near([*units.values()], getattr(after[(lower, upper)[layer]], field)[0].T)

    check(12, 1, 0, 0, "c")
    figure.choose("Layer", 1)
    figure.choose("Gate or state", "f")
    figure.tick("add a pulse at the changed step", True)
    figure.move("changed step", 15)
    figure.move("change of the wave", -0.8)
    check(15, -0.8, 1, 1, "f")


TRAINER = """async ([text, options, count]) => {
    const module = new Blob([text, "export { createTrainer };"], { type: "text/javascript" });
    const { createTrainer } = await import(URL.createObjectURL(module));
    const trainer = createTrainer(options);
    const losses = Array.from({ length: count }, () => trainer.step().loss);
    const [{ cells }, dense] = trainer.network.nodes;
    const plain = ([name, { data, shape }]) => [name, [[...data], shape]];
    const arrays = [cells[0], dense].map((one) => Object.fromEntries(Object.entries(one.arrays).map(plain)));
    return { losses, arrays, input: [...trainer.example().input.data] };
}"""


DOTS = """(canvas) => {
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    const colour = (x, y) => data.subarray(4 * (y * width + x), 4 * (y * width + x) + 3).join();
    const wanted = [92, 102, 117].join(); // of the target
    let found = 0;
    for (let y = 0; y < height - 20; y += 1) {
        if (colour(width / 2, y) === wanted) continue; // the line at 0
        for (let x = width - 30; x < width; x += 1) found += colour(x, y) === wanted;
    }
    return found;
}"""


def test_training(opened, browser):
    figure = opened("training")
    page = figure.page
    for label, value in (("Units", 5), ("Delay in steps", 4), ("Seed", 3)):
        figure.moved.add(label)
        page.get_by_label(label, exact=True).fill(str(value))
        page.get_by_label(label, exact=True).press("Enter")
    figure.choose("Cell", "gru")
    figure.choose("Cell", "lstm")
    figure.choose("Learning rate", "0.03")
    figure.choose("Task", "adding")
    figure.click("Learn")
    page.wait_for_function(
        "document.querySelector('[data-figure]').shadowRoot.querySelector('.readout').dataset.batches > 5"
    )
    page.get_by_role("button", name="Pause").click()
    figure.click("Restart")
    page.locator(".readout", has_text="It hasn't learned yet").wait_for()
    for title in ("the loss", "the sequence outside the training data", "units over time"):
        page.get_by_label(f"Show as a table: {title}", exact=True).click()
    for count in (1, 2, 3):
        figure.click("One batch")
        page.locator(f'.readout[data-batches="{count}"]').wait_for()
    other = browser.new_page()
    options = {"task": "adding", "kind": "lstm", "units": 5, "delay": 4, "rate": 0.03, "seed": 3}
    found = other.evaluate(TRAINER, [engine_text(), options, 3])
    other.close()
    loss = number(re.search(r"loss (\S+)", page.locator(".readout").inner_text())[1])
    np.testing.assert_allclose(loss, np.mean(found["losses"]), rtol=1e-2)  # three digits
    assert page.locator("canvas.chart").nth(1).evaluate(DOTS) > 0  # the only target, at the last step
    np.testing.assert_allclose([figure.table()[str(n)] for n in (1, 2, 3)], np.c_[found["losses"]], rtol=1e-2)
    x = np.reshape(found["input"], (1, 20, 2))
    arrays, dense = ({name: np.reshape(*array) for name, array in held.items()} for held in found["arrays"])
    out = reference.forward(CellSpec(2, 5), arrays, x)
    sequence = figure.table(1)
    np.testing.assert_allclose([sequence["number"], sequence["mark"]], x[0].T, rtol=1e-2)
    np.testing.assert_allclose(
        sequence["output"], (out.y[0] @ dense["kernel"] + dense["bias"])[:, 0], rtol=1e-2, atol=1e-3
    )
    assert np.isnan(sequence["target"][:-1]).all()
    np.testing.assert_allclose(sequence["target"][-1], x[0, :, 0] @ x[0, :, 1], rtol=1e-2)
    for field, planes in (
        ("i", out.gates[0, :, 0]),
        ("f", out.gates[0, :, 1]),
        ("g", out.gates[0, :, 2]),
        ("o", out.gates[0, :, 3]),
        ("c", out.cells[0]),
        ("h", out.y[0]),
    ):
        figure.click(field)
        shown = figure.table(2)
        np.testing.assert_allclose(
            [shown[f"{field} {unit}"] for unit in range(5)], planes.T, rtol=1e-2, atol=1e-3
        )  # three digits


def test_training_is_announced_at_its_start_and_end_and_now_and_then(opened):
    figure = opened("training")
    page = figure.page
    page.evaluate("""() => {
        const now = performance.now.bind(performance);
        window.later = 0;
        performance.now = () => now() / 1000 + window.later; // a second takes a millisecond
        window.inFigure = (what) => [...document.querySelector("[data-figure]").shadowRoot.querySelectorAll(what)];
        window.announced = [];
        for (const one of inFigure("[role=status], [aria-live]"))
            new MutationObserver(() => window.announced.push(one.textContent)).observe(one, { childList: true });
    }""")
    learnt = "(count) => inFigure('.readout')[0].dataset.batches > count"
    page.get_by_role("button", name="Learn", exact=True).click()
    page.wait_for_function(learnt, arg=20)
    assert page.evaluate("window.announced") == ["Learning: It hasn't learned yet."]
    page.evaluate("window.later = 10_001")
    page.wait_for_function("window.announced.length > 1")
    page.wait_for_function(learnt, arg=int(figure.page.locator(".readout").get_attribute("data-batches")) + 20)
    page.get_by_role("button", name="Pause").click()
    page.wait_for_function("window.announced.length > 2")
    figure.settle()
    _, between, end = page.evaluate("window.announced")
    assert re.fullmatch(r"Learning: after \d+ batches: loss .*", between)
    assert end == page.locator(".readout").inner_text()
    figure.moved = figure.controls()


def test_units(opened):
    names = given_in("units")
    assert names["ranks"].ranked[0][3] < -0.3 < names["ranks"].ranked[1][3]  # on one unit, as the chapter says
    figure, net, page_text = opened("units", names["given"]), names["net"], 'no "yes, 2" or "so'
    kinds = [0 if letter == '"' else 1 if letter == " " else 2 if letter.isalpha() else 3 for letter in page_text]
    x = np.eye(4, dtype="f4")[kinds][None]
    inside = np.cumsum(np.array(kinds) == 0) % 2 > 0
    text = "Text, at most 120 characters"
    figure.moved.add(text)
    figure.page.get_by_label(text, exact=True).fill(page_text)
    figure.choose("Unit", 2)

    def right(network):
        return f"{((network(x)[0, :, 0] > 0.5) == inside).sum()} of {len(page_text)}"

    for change, patch in (
        ("", None),
        ("f 1", ("f", 1.0)),
        ("c 0", ("c", 0.0)),
        ("f 0", ("f", 0.0)),
        ("i 0", ("i", 0.0)),
    ):
        figure.choose("What if", change)
        figure.move("from step", 5)
        edited = (
            net
            if patch is None
            else net.edit(Patch(net.names[0], patch[0], units=[2], steps=slice(5, None), value=patch[1]))
        )
        shown = figure.table()
        near(shown["inside"], inside)
        np.testing.assert_allclose(shown["output"], edited(x)[0, :, 0], rtol=SHOWN, atol=1e-3)
        np.testing.assert_allclose(shown["output, unchanged"], net(x)[0, :, 0], rtol=SHOWN, atol=1e-3)
        assert figure.page.locator(".readout").inner_text().startswith(f"{right(edited)} characters are right")
    trace = net.trace(x)[net.names[0]]
    figure.choose("What if", "")
    for field in "ifgohc":
        figure.choose("Gate or state", field)
        near(figure.table()[f"{field} of unit 2"], getattr(trace, field)[0, :, 2])
        spans = figure.page.locator(".text span").evaluate_all("(all) => all.map((one) => one.title)")
        np.testing.assert_allclose(
            [number(title.split("= ")[1]) for title in spans], getattr(trace, field)[0, :, 2], rtol=SHOWN, atol=1e-3
        )
    rows = figure.page.locator(".behind").last.locator("tbody tr").all_inner_texts()
    means = trace.h[0].mean(0)
    without = [net.edit(Patch(net.names[0], "h", units=[unit], value=float(means[unit]))) for unit in range(6)]
    assert set(rows) == {f"unit {unit}\t{right(edited)}" for unit, edited in enumerate(without)}


def test_use(opened):
    names = given_in("use")
    figure, net = opened("use", names["given"]), names["net"]
    x = np.array(names["given"]["x"])[None, :, None]
    whole = by_reference(net, x)[0][0, :, 0]
    figure.move("steps in a part", 7)
    figure.click("Next part")
    figure.click("Next part")
    near(figure.table()["in parts"], whole[:14])
    near(number(figure.named()["output of the last step"]), whole[13])
    assert figure.named()["numbers in the state"] == "16"
    assert (
        figure.page.locator(".readout").inner_text()
        == "14 of 80 steps. Every output is that of the whole sequence, to the last bit."
    )
    figure.click("Forget the state")
    assert figure.page.locator(".readout").inner_text().endswith("The next part starts from zeros.")
    figure.click("All others")
    parts = [by_reference(net, part)[0][0, :, 0] for part in (x[:, :14], x[:, 14:])]
    near(figure.table()["in parts"], np.concatenate(parts))
    near(figure.table()["whole sequence"], whole)
    far = abs(np.concatenate(parts) - whole).max()
    last = abs(parts[1] - whole[14:])[-1]
    np.testing.assert_allclose(
        number(figure.named()["its difference from the whole sequence"]), last, rtol=1e-2, atol=1e-6
    )
    assert figure.page.locator(".readout").inner_text().endswith(f"by up to {far:.4f}.")
    figure.click("Start again")
    assert figure.page.locator(".readout").inner_text().startswith("0 of 80 steps")

"""A trace at the end of a notebook cell: the page as a widget, or its text."""

import base64
import json
import sys

import numpy as np
import pytest

from cellstack import CellSpec, Network
from cellstack.inspect import widget as widgets
from cellstack.nodes import Cell, Recurrent


@pytest.fixture
def t(rng):
    spec = CellSpec(3, 4)
    cell = Cell(spec, *(rng.normal(size=shape).astype("f4") for shape in spec.shapes.values()))
    return Network([Recurrent((cell,))]).trace(rng.normal(size=(2, 6, 3)))


@pytest.fixture
def without_anywidget(monkeypatch):
    widgets._page_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    yield
    widgets._page_class.cache_clear()


def test_a_trace_shows_itself_as_its_page(t):
    pytest.importorskip("anywidget")
    data, _ = t._repr_mimebundle_(include=None, exclude=None)
    assert data["text/plain"] == repr(t)
    assert "model_id" in data["application/vnd.jupyter.widget-view+json"]


def test_the_widget_holds_the_payload_and_the_module(t):
    pytest.importorskip("anywidget")
    page = t.widget("abcdef", title="A title", rows=1)
    assert page.payload["description"]["title"] == "A title"
    assert page.payload["description"]["row_numbers"] == [1]
    entries = page.payload["description"]["arrays"]
    sizes = [int(np.prod(entry["shape"])) * int(entry["dtype"][1:]) for entry in entries]
    assert [len(data) for data in page.payload["arrays"]] == sizes
    assert str(page._esm).rstrip().endswith("export default { render };")


def test_without_anywidget_its_text_is_shown(t, without_anywidget):
    assert t._repr_mimebundle_() == {"text/plain": repr(t)}
    with pytest.raises(ImportError, match=r"pip install 'cellstack\[notebook\]'"):
        t.widget()


def test_a_large_trace_is_not_sent_at_the_end_of_every_cell(t, monkeypatch):
    pytest.importorskip("anywidget")
    monkeypatch.setattr(widgets, "MOST_SHOWN", 100)
    (text,) = t._repr_mimebundle_().values()
    assert text.startswith(repr(t))
    assert "save_html(path)" in text


@pytest.mark.long
def test_bytes_from_a_kernel_are_drawn_as_those_of_a_file(browser, t):
    """The front end gets the arrays as DataViews, as ipywidgets sends bytes, at nonzero offsets."""
    pytest.importorskip("anywidget")
    page = t.widget()
    arrays = [base64.b64encode(bytes(data)).decode() for data in page.payload["arrays"]]
    description = json.dumps(page.payload["description"])
    script = f"""
        const module = await import(URL.createObjectURL(new Blob([{json.dumps(str(page._esm))}],
            {{ type: "text/javascript" }})));
        const views = {json.dumps(arrays)}.map((text) => {{
            const bytes = Uint8Array.from("?" + atob(text), (letter) => letter.charCodeAt(0));
            return new DataView(bytes.buffer, 1);
        }});
        const payload = {{ description: {description}, arrays: views }};
        const el = document.createElement("div");
        document.body.append(el);
        const close = module.default.render({{ model: {{ get: () => payload }}, el }});
        await el.ready;
        const text = el.shadowRoot.querySelector(".readout").textContent;
        await close();
        return text;
    """
    context = browser.new_context()
    tab = context.new_page()
    tab.goto("about:blank")
    text = tab.evaluate(f"(async () => {{{script}}})()")
    step, unit = (int(text.split(word)[1].split()[0]) for word in ("step ", "unit "))
    shown = float(text.split("h = ")[1].replace("−", "-"))
    assert shown == pytest.approx(float(t["layer_0"].h[0, step, unit]), rel=1e-4)
    context.close()

"""The page of a trace as a widget, in Jupyter, VS Code and marimo: the same module as in a file, fed by the kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from cellstack.inspect import contents
from cellstack.inspect.html import module_text

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace

MOST_SHOWN = 1 << 22  # maximum size of a trace shown at the end of a notebook cell, sent to the browser each time


def widget(t: NetworkTrace, labels: Any, audio: Any, title: str | None, rows: Any, **meaning: Any) -> Any:
    """Return the page of a trace as a widget: see `NetworkTrace.widget`."""
    made = contents.payload(t, labels, audio, title, rows, packed=False, **meaning)
    return _page_class()(payload={"description": made.description, "arrays": made.arrays})


@cache
def _page_class() -> Any:
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError as error:
        raise ImportError(f"a widget needs {error.name}: pip install 'cellstack[notebook]'") from None

    class Page(anywidget.AnyWidget):
        """Draws the result of `cellstack.inspect.contents.payload` with the page's module."""

        _esm = f"{module_text()}\nexport default {{ render }};\n"
        payload = traitlets.Dict().tag(sync=True)

    return Page


def mimebundle(t: NetworkTrace, **options: Any) -> Any:
    """Return a notebook's view of a trace: the page; or its text, without anywidget or for large traces."""
    text = {"text/plain": repr(t)}
    try:
        _page_class()
    except ImportError:
        return text
    if contents.size_of(t) > MOST_SHOWN:
        more = f"too large to show as a page here, above {MOST_SHOWN:,} numbers: select(…) a part, or save_html(path)"
        return {"text/plain": f"{text['text/plain']}\n{more}"}
    bundle = widget(t, None, None, None, None)._repr_mimebundle_(**options)
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    return {**data, **text}, metadata

"""The page of a trace as a widget, in Jupyter, VS Code and marimo: the module that a file has, fed by the kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from cellstack.inspect import contents
from cellstack.inspect.html import module_text

if TYPE_CHECKING:
    from cellstack.inspect.trace import NetworkTrace

MOST_SHOWN = 1 << 22  # numbers of a trace that stands at the end of a cell: what is sent to the browser each time


def widget(t: NetworkTrace, labels: Any, audio: Any, title: str | None, rows: Any) -> Any:
    """Return the page of a trace as a widget: see `NetworkTrace.widget`."""
    made = contents.payload(t, labels, audio, title, rows, packed=False)
    return _page_class()(payload={"description": made.description, "arrays": made.arrays})


@cache
def _page_class() -> Any:
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError as error:
        raise ImportError(f"a widget needs {error.name}: install cellstack[notebook]") from None

    class Page(anywidget.AnyWidget):
        """What `cellstack.inspect.contents.payload` returns, drawn by the page's module."""

        _esm = f"{module_text()}\nexport default {{ render }};\n"
        payload = traitlets.Dict().tag(sync=True)

    return Page


def mimebundle(t: NetworkTrace, **options: Any) -> Any:
    """Return what a notebook shows of a trace: the page; its text without anywidget, or with too much to send."""
    text = {"text/plain": repr(t)}
    try:
        _page_class()
    except ImportError:
        return text
    if contents.size_of(t) > MOST_SHOWN:
        more = f"too large to be shown as a page here, above {MOST_SHOWN:,} numbers: select(…) some, or save_html(path)"
        return {"text/plain": f"{text['text/plain']}\n{more}"}
    bundle = widget(t, None, None, None, None)._repr_mimebundle_(**options)
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    return {**data, **text}, metadata

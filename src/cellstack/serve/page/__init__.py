"""The page at `/`, on which a user tries the models of a server."""

from __future__ import annotations

from functools import cache

from cellstack.inspect.html import POLICY, head, joinable

SHARED = ("style", "dom", "draw")  # of the trace page
MODULES = ("session", "sources", "plot", "trial", "models")
START = 'start(document.getElementById("page"));'


@cache
def page() -> str:
    """Return the page as HTML, whose scripts may send requests to this server only."""
    modules = [*map(joinable, SHARED), *(joinable(name, "cellstack.serve") for name in MODULES)]
    begin = head("cellstack serve", f"{POLICY}; connect-src 'self' blob:")
    return "\n".join([begin + '<script type="module">', *modules, START, "</script>\n</body>\n</html>\n"])

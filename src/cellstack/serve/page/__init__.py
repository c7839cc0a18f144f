"""The page at `/`, on which a user tries the models of a server."""

from __future__ import annotations

import html
from functools import cache

from cellstack.inspect.html import joinable

SHARED = ("style", "dom", "draw")  # of the trace page
MODULES = ("session", "sources", "plot", "trial")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' blob:; img-src data:; base-uri 'none'; form-action 'none'"
)
"""The content security policy: only the page's own scripts run, and requests go only to the server."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>cellstack serve</title>
<style>html {{ color-scheme: light dark; }} body {{ margin: 0; }} #page {{ --least: 100vh; }}</style>
</head>
<body>
<main id="page"></main>
<noscript>This page needs JavaScript, which is disabled in this browser.</noscript>
<script type="module">
{script}
start(document.getElementById("page"));
</script>
</body>
</html>
"""


@cache
def page() -> str:
    """Return the page as HTML."""
    own = [joinable(name, "cellstack.serve") for name in MODULES]
    return PAGE.format(policy=html.escape(POLICY), script="\n".join([*map(joinable, SHARED), *own]))

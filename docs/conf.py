"""The configuration of the documentation site, which `make site` builds: Sphinx, MyST notebooks, the pydata theme."""

import os
import re
import shutil
import sys
from hashlib import sha256
from importlib.metadata import distributions
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_cache import get_cache
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyXRefRole
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.inspect import signature, stringify_signature
from sphinx.util.nodes import make_refnode

from cellstack.inspect import html

os.environ["KERAS_BACKEND"] = "torch"  # which cellstack.keras needs
os.environ["OMP_NUM_THREADS"] = "1"  # several notebooks run at the same time


def outputs() -> Path:
    """Return the folder of the notebooks' outputs; outputs by other sources or versions of packages are deleted.

    jupyter-cache compares only the code of a notebook; its outputs also depend on the sources and data of the package,
    and on the packages that it runs with.
    """
    root = Path(__file__).parents[1]
    parts = [sys.version, *sorted({f"{one.name} {one.version}" for one in distributions()})]
    digest = sha256("\n".join(parts).encode())
    for path in sorted(path for folder in ("src", "kernel", "examples") for path in (root / folder).rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".so"):  # which follow from the sources
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    folder = root / "build/site-outputs" / digest.hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    _ = get_cache(folder).db  # creates it, which processes that read pages must not do at the same time
    return folder


project = "cellstack"
author = "the cellstack authors"
copyright = author
version = release = installed("cellstack")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "name"
highlight_language = "text"  # of fences without a language
root_doc = "index"

# Markdown and notebooks
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4  # links such as inspect.md#patches, as on GitHub
nb_execution_mode = "cache"
nb_execution_cache_path = str(outputs())
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_ipywidgets_js: dict[str, Any] = {}  # nothing is loaded from other hosts
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"

# The reference
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text under "Parameters" says what is accepted
autodoc_preserve_defaults = True
autodoc_mock_imports = ["pipecat"]  # large, and only base classes come from it
napoleon_numpy_docstring = False
napoleon_use_param = False  # "epochs, batch: see …" stays one entry
add_module_names = False
toc_object_entries_show_parents = "hide"

# The pages
html_theme = "pydata_sphinx_theme"
html_title = "cellstack"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_theme_options = {
    "logo": {"text": "cellstack", "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg"},
    "navbar_align": "left",
    "navigation_depth": 2,
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


OUTSIDE = {
    "CHANGELOG": "reference/changelog",
    "CONTRIBUTING": "explanation/contributing",
    "cellstack_demo/data/README": "reference/data",
}
"""The pages that include Markdown files from outside of this folder, by how links to these files end."""


class Name(PyXRefRole):
    """`name` in a docstring: a link, if the name is documented, and otherwise code."""

    def process_link(self, env: Any, node: Any, explicit: bool, title: str, target: str) -> tuple[str, str]:
        node["reftype"], node["refdomain"] = "obj", "py"
        if title.startswith("."):  # an attribute of what the text describes, not of any documented class
            return title, title
        return super().process_link(env, node, explicit, title, target)


def returned(self: Any, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
    """Read "Returns:" as a text: what precedes a colon isn't a type. Replaces a method of `GoogleDocstring`."""
    lines = self._dedent(self._consume_to_next_section())
    return [("", "", lines)] if lines else []


def property_text(self: Any) -> tuple[str, list[str]]:
    """Read the docstring of a property as a text likewise. Replaces a method of `GoogleDocstring`."""
    return "", GoogleDocstring(self._consume_to_end(), self._config).lines()  # with its sections


def not_ours(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a class inherits from another library, such as the methods of `torch.nn.Module`, and classes."""
    if isinstance(member, type) or (getattr(member, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    member = getattr(member, "fget", member)
    home = getattr(member, "__module__", None) or getattr(getattr(member, "__objclass__", None), "__module__", None)
    return True if home and not home.startswith("cellstack") else None


def of_constructor(app: Any, what: str, name: str, of: Any, options: Any, text: str, returns: Any) -> Any:
    """Show a class the base of which is mocked with the signature of its constructor, which autodoc doesn't find."""
    if what != "class" or text != "(*args, **kwargs)":
        return None
    return stringify_signature(signature(of.__init__, bound_method=True), show_annotation=False), returns


def to_included(app: Any, doctree: nodes.document) -> None:
    """Let links to files outside of this folder lead to the pages that include them."""
    for link in doctree.findall(pending_xref):
        target = link["reftarget"].removesuffix(".md")
        page = next((page for end, page in OUTSIDE.items() if target.endswith(end)), None)
        if page and link["reftype"] == "myst":
            link.update_all_atts({"refdomain": "doc", "reftarget": page}, replace=True)
            link.setdefault("reftargetid", None)


def named_elsewhere(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Find a class, or a member of one, that another module documents, if only one does."""
    name = node["reftarget"].removesuffix("()")
    if node["reftype"] != "obj" or not name[:1].isupper():
        return None
    known = env.domains.python_domain.objects.items()
    found = {(entry.docname, entry.node_id) for full, entry in known if full.endswith(f".{name}")}
    return make_refnode(app.builder, node["refdoc"], *found.pop(), content) if len(found) == 1 else None


def dealt(app: Any, env: Any, pages: list[str]) -> None:
    """Deal out the pages, of which neighbours are read by one process: the notebooks, which take longest, are such."""
    pages[:] = [page for first in range(9) for page in pages[first::9]]


def without_progress(app: Any, doctree: nodes.document) -> None:
    """Leave out the progress bars of the notebooks' outputs, of which a terminal shows only the last."""
    for block in doctree.findall(nodes.literal_block):
        if "stream" in block["classes"]:
            block.children = [nodes.Text(re.sub(r"^.*\d%\|.*\| \d\d:.*\n+", "", block.astext(), flags=re.MULTILINE))]


def described(app: Any, doctree: nodes.document, page: str) -> None:
    """Give the pictures that code draws a text for those who can't see them; in the gallery's index, a title has it."""
    for image in doctree.findall(nodes.image):
        image.setdefault("alt", "" if page.endswith("index") else "What the code above draws")


def with_figures(app: Any, page: str, template: str, context: Any, doctree: Any) -> None:
    """Load the script of the course's figures in the course."""
    if page.startswith("learn/"):
        app.add_js_file("figures.js", loading_method="defer")


def write_figures(app: Any, error: Exception | None) -> None:
    """Write this script: the page of a trace with its engine, and the figures."""
    if error is None and app.builder.format == "html":
        text = html.script_text(*sorted(Path(app.srcdir, "learn/figures").glob("*.js")))
        Path(app.outdir, "_static/figures.js").write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    """Add what Sphinx lacks: a role for docstrings, formulas as MathML, which browsers show without scripts."""
    GoogleDocstring._consume_returns_section = returned
    GoogleDocstring._consume_inline_attribute = property_text
    app.add_role("name", Name(innernodeclass=nodes.literal))
    app.connect("autodoc-skip-member", not_ours)
    app.connect("autodoc-process-signature", of_constructor)
    app.connect("env-before-read-docs", dealt)
    app.connect("doctree-read", to_included)
    app.connect("doctree-read", without_progress)
    app.connect("missing-reference", named_elsewhere)
    app.connect("doctree-resolved", described)
    app.connect("html-page-context", with_figures)
    app.connect("build-finished", write_figures)
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))

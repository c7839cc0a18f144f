"""What the documentation site is made of: pages, the reference's names, the gallery. `make site` builds and runs it."""

import ast
import re
from pathlib import Path

import pytest

from cellstack import layers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INDEXES = {path: path.read_text(encoding="utf-8") for path in [DOCS / "index.md", *DOCS.glob("*/index.md")]}
REFERENCE = {
    "networks": "__init__",
    "nodes": "nodes/__init__",
    "train": "train/__init__",
    "inspection": "inspect/__init__",
    "sklearn": "sklearn/__init__",
    "keras": "keras/__init__",
    "serve": "serve/__init__",
    "scale": "scale/__init__",
    "capture": "capture/__init__",
    "adapters": "adapters/voice/__init__",
}
"""The pages of the reference, and the modules whose public names they describe; `layers` collects its names."""


def listed(page):
    """Return what the toctrees of an index lead to, as paths without suffix."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```$", INDEXES[page], re.MULTILINE | re.DOTALL)
    entries = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    return [(page.parent / entry).resolve() for entry in entries]


def names_of(module):
    """Return `__all__` as written in a file: no library that an integration needs is imported."""
    tree = ast.parse((ROOT / "src" / "cellstack" / f"{module}.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body if ast.unparse(node).startswith("__all__ = "))


def described(page):
    """Return the names that a page of the reference describes, or mentions as code."""
    text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
    return set(re.findall(r"^   ([\w.]+)$", text, re.MULTILINE)) | set(re.findall(r"`(\w+)`", text))


def test_every_page_is_in_one_toctree():
    pages = [path.with_suffix("") for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"), *DOCS.glob("*/*.md"))]
    entries = [entry for page in INDEXES for entry in listed(page)]
    assert sorted(entries) == sorted(page for page in pages if page != DOCS / "index")


@pytest.mark.parametrize("page", REFERENCE)
def test_the_reference_has_every_public_name(page):
    elsewhere = set() if page == "networks" else set(names_of("__init__"))
    assert set(names_of(REFERENCE[page])) - elsewhere - described(page) == set()


def test_the_reference_has_every_layer():
    assert set(layers.__all__) - set(names_of("__init__")) - described("layers") == set()


def test_the_gallery_has_twelve_short_programs_and_their_pictures():
    index = INDEXES[DOCS / "gallery" / "index.md"]
    programs = listed(DOCS / "gallery" / "index.md")
    assert len(programs) == 12
    for program in programs:
        text = program.with_suffix(".md").read_text(encoding="utf-8")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
        assert f"grid-item-card}} {title}\n:link: {program.name}\n" in index
        line = re.search(rf":link: {program.name}\n:link-type: doc\n\n(.+)\n\n```", index)
        assert line, program.name
        assert len(line[1]) <= 72, program.name
        assert f"picture\n:doc: {program.name}.md\n" in index
        cells = re.findall(r"^```\{code-cell\}\n(?!:tags: \[remove-input)(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert 10 <= sum(bool(line.strip()) for cell in cells for line in cell.splitlines()) <= 40, program.name
        assert 'glue("picture", figure)' in text

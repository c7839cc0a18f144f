"""Each kind of node is in the tests of all nodes, and in the documentation; see CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest

from cellstack.nodes import NODES

ROOT = Path(__file__).parents[2]
PLACES = {
    "EVERY of tests/network/test_node_facts.py": r"\b{0}\b",
    "EVERY of tests/formats/test_safetensors_graph.py": r"\"{1}\": lambda|\b{0}\b",
    "every_node of tests/inspect/test_page_engine.py, or `refused` there": r"\b{0}\(|\"{1}\"",
    "docs/format.md": r"^\| `{1}` \|",
    "docs/semantics.md": r"`{0}`",
    "docs/reference/nodes.md": r"^   {0}$",
}
"""The places that have something of every node, and how to find it: by the names of its class and of its type."""


def lacking(kind):
    """Yield where a kind of node is still missing."""
    for place, pattern in PLACES.items():
        text = (ROOT / re.search(r"[\w/]+\.(py|md)", place)[0]).read_text(encoding="utf-8")
        if not re.search(pattern.format(kind.__name__, kind.file_type), text, re.MULTILINE):
            yield place


@pytest.mark.parametrize("kind", NODES.values(), ids=NODES)
def test_nothing_of_a_node_is_missing(kind):
    missing = list(lacking(kind))
    assert not missing, "\n".join([f"see CONTRIBUTING.md, A kind of node; {kind.__name__} is missing in:", *missing])


def test_a_node_that_is_only_declared_lacks_the_rest():
    class Unheard(NODES["clip"]):
        file_type = "unheard"

    assert list(lacking(Unheard)) == list(PLACES)

"""No part except the declarations and the reference implementation depends on the name of a kind of cell."""

import ast
import re
from pathlib import Path

import pytest

import cellstack
from cellstack.cells import KINDS

SOURCE = Path(cellstack.__file__).parent
OWN = {SOURCE / "reference" / "steps.py", *(SOURCE / "cells").rglob("*.py")}
PYTHON = sorted(set(SOURCE.rglob("*.py")) - OWN)
SCRIPTS = sorted(SOURCE.rglob("*.js"))
NAMES = "|".join(KINDS)
LOOKUPS = {"get", "pop", "index", "count", "startswith", "endswith"}
# In a script: the name as a string, as a key of an object, or as a property.
IN_SCRIPT = re.compile(rf"""(["'`])({NAMES})\1|[{{,]\s*({NAMES})\s*:|\.({NAMES})\b""")


def names(node):
    """Return whether an expression is the name of a kind, or a literal with one."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(names, node.elts))
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS


def comparisons(source):
    """Yield the lines of Python source that compare something with the name of a kind, or look one up."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found = any(map(names, (node.left, *node.comparators)))
        elif isinstance(node, ast.Dict):
            found = any(key is not None and names(key) for key in node.keys)
        elif isinstance(node, ast.Subscript):
            found = names(node.slice)
        elif isinstance(node, ast.MatchValue):
            found = names(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = node.func.attr in LOOKUPS and any(map(names, node.args))
        else:
            found = False
        if found:
            yield getattr(node, "lineno", 0)


def in_script(source):
    """Yield the lines of a script that name a kind, outside comments."""
    for number, line in enumerate(source.splitlines(), 1):
        if IN_SCRIPT.search(re.sub(r"(^|\s)//.*", "", line)):
            yield number


def test_no_other_file_compares_the_name_of_a_kind():
    found = []
    for path in [*PYTHON, *SCRIPTS]:
        lines = (in_script if path.suffix == ".js" else comparisons)(path.read_text(encoding="utf-8"))
        found += [f"{path}:{line}" for line in lines]
    assert found == [], "ask the kind for a state, a role, an array or a setting; see CONTRIBUTING.md"


@pytest.mark.parametrize(
    "source",
    [
        "a = spec.kind == 'lstm'",
        "if 'gru' != cell.spec.kind: pass",
        "a = kind in ('lstm', 'gru')",
        "a = kind not in {'minlstm'}",
        "a = [x for x in cells if x.kind in ['rnn']]",
        "TABLE = {'lstm': 1, **other}",
        "a = table['mingru']",
        "a = table.get('lstm')",
        "a = kind.startswith('lstm')",
        "match kind:\n    case 'gru' | 'rnn': pass",
    ],
)
def test_a_comparison_in_python_is_found(source):
    assert list(comparisons(source))


@pytest.mark.parametrize(
    "source", ["def fit(cell='lstm'): pass", "a = 'lstm'", "a = kind == other", "a = 'an lstm' in b"]
)
def test_other_uses_in_python_are_allowed(source):
    assert not list(comparisons(source))


@pytest.mark.parametrize(
    "source",
    [
        "if (cell.kind === 'lstm') run();",
        'case "gru":',
        "const table = { lstm: 1 };",
        "const table = { a: 2, minlstm : 1 };",
        "['rnn', 'gru'].includes(kind)",
        "table.mingru",
    ],
)
def test_a_name_in_a_script_is_found(source):
    assert list(in_script(source))


def test_the_word_in_a_comment_of_a_script_is_allowed():
    assert not list(in_script("// as in an 'lstm'\nrun(cell.kind, other); // of a 'gru'"))

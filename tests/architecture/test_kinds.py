"""No part except the declarations and the reference implementation depends on the name of a kind of cell."""

import ast
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from kinds import TESTED

import cellstack
from cellstack.cells import KINDS
from cellstack.cells.spec import ARRAYS
from cellstack.reference.steps import CELLS

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


@pytest.mark.long
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


DOCS = Path(__file__).parents[2] / "docs"


def lacking(kind):
    """Yield what a kind of cell still lacks outside its declaration."""
    tested = TESTED.get(kind.name)
    if kind.name not in CELLS:
        yield "its step in NumPy, in CELLS of src/cellstack/reference/steps.py"
    if not (DOCS.parent / "kernel" / f"{kind.name}.h").exists():
        yield f"its routines in the kernel, kernel/{kind.name}.h"
    if "::" not in kind.doc or "Ref: " not in kind.doc:
        yield "its equations and papers, in `doc` of its declaration"
    if tested is None:
        yield "an entry in TESTED of tests/kinds.py"
    else:
        used = {name for flags in tested.flags.values() for name in flags}
        own = [one.name for one in kind.flags if "spec" in one.of and one.name not in used]
        yield from (f"a cell with {name} in `flags` of tests/kinds.py" for name in own)
    for page, text in (
        ("family.md", kind.title),
        ("format.md", f"| `{kind.name}` |"),
        ("architecture.md", f"`{kind.name}.h`"),
        ("architecture.md", f"`{kind.name}.py`"),
        ("reference/layers.md", kind.title),
    ):
        if text not in (DOCS / page).read_text(encoding="utf-8"):
            yield f"{text} in docs/{page}"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_of_a_kind_is_missing(kind):
    missing = list(lacking(kind))
    assert not missing, "\n".join(["see CONTRIBUTING.md, A kind of cell; missing are:", *missing])


def test_a_kind_that_is_only_declared_lacks_the_rest():
    new = replace(KINDS["lstm"], name="new", title="New", doc="")
    assert len(list(lacking(new))) == 9


def test_the_generated_files_are_those_of_the_declarations():
    written = runpy.run_path(str(DOCS.parent / "kernel" / "declared.py"))["written"]()
    assert [path.name for path, text in written.items() if path.read_text(encoding="utf-8") != text] == [], "make stubs"


def test_the_kernel_was_compiled_from_these_declarations():
    kernel = pytest.importorskip("cellstack._kernel")
    assert tuple(name for name in ARRAYS if not name.startswith("initial_")) == kernel.ARRAYS

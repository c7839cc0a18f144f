"""Messages name arguments as in Python; the command line names its options instead."""

import ast
import re
from pathlib import Path

import pytest

import cellstack
from cellstack.cli.arguments import NAMED, as_flags
from cellstack.cli.main import parser

TOP = Path(cellstack.__file__).parent
BELOW = [
    path
    for folder in ("train", "sklearn", "scale", "streaming", "formats", "network", "nodes", "adapters")
    for path in (TOP / folder).rglob("*.py")
]


def texts(path):
    """The texts in a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node.value


def options(*words):
    return parser().parse_args(words)


@pytest.mark.long
def test_no_module_below_the_command_line_names_an_option():
    named = {(path.name, text) for path in BELOW for text in texts(path) if re.search(r"(?<![\w-])--[a-z]", text)}
    assert named == set()


@pytest.mark.long
def test_every_argument_that_a_message_names_has_an_option():
    args = options("train", "a.csv")
    found = {match[0] for path in BELOW for text in texts(path) for match in NAMED.finditer(text)}
    assert len(found) > 20
    assert {text for text in found if as_flags(text, args) == text} == set()


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["train", "a.csv"], "use `id='shop'`, or `id=['shop', 'item']`", "use --id shop, or --id shop,item"),
        (["train", "a.csv"], "name it with `time=…`, or `time=''`", "name it with --time, or --time ''"),
        (["train", "a.csv"], "use `day_first=True` or `day_first=False`", "use --day-first or --month-first"),
        (["train", "a.csv"], "`resume=True`; `y=…`; `sample_weight=…`", "--resume; --label; --sample-weight"),
        (["train", "a.csv"], "use `decimal=','` or `id='a shop'`", "use --decimal ',' or --id 'a shop'"),
        (["train", "a.csv"], "select columns with `features=…`", "select columns with --features"),
        (["score", "a", "b", "-o", "c"], "select columns with `features=…`", "select columns with --columns"),
        (["stream", "a"], "train with `pooling='last'`", "train with --pooling last"),
        # what isn't an argument with a value stays, such as names in data
        (
            ["train", "a.csv"],
            "`id=shop`, id='shop', `mood='a'`, `id='\\'`",
            "`id=shop`, id='shop', `mood='a'`, `id='\\'`",
        ),
    ],
)
def test_arguments_become_options(words, text, expected):
    args = options(*words)
    assert as_flags(text, args) == expected

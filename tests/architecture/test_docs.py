"""What is written down is run and looked up: code blocks, examples, links, commands, the table of files."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from cellstack import layers
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.errors import ShapeError
from cellstack.cli import main as cli
from cellstack.formats import safetensors
from cellstack.network.description import VERSION
from cellstack.nodes import NODES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path):
    return str(path.relative_to(ROOT))


def text_of(page):
    if page.suffix == ".ipynb":
        notebook = nbformat.read(page, as_version=4)
        return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return page.read_text(encoding="utf-8")


def blocks_of(page):
    """Each Python block as source that starts on the line on which it stands, so that a traceback points there."""
    text = text_of(page)
    return ["\n" * (text[: found.start()].count("\n") + 1) + found[1] for found in BLOCK.finditer(text)]


# ── code ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's with NumPy 2
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks_of(page)], ids=name_of)  # README: below
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the blocks of a page share a folder, and nothing else
    for block in blocks_of(page):
        exec(compile(block, name_of(page), "exec"), {"__name__": "block"})


@pytest.mark.long
def test_the_readme_is_short_and_its_code_runs_the_part_for_deployment_without_torch(tmp_path, monkeypatch, capfd):
    assert len(text_of(ROOT / "README.md").splitlines()) <= 100
    monkeypatch.chdir(tmp_path)
    first, deployed, training = blocks_of(ROOT / "README.md")  # the second reads what the first saves
    for block in (first, training):
        exec(compile(block, "README.md", "exec"), {"__name__": "block"})
    assert capfd.readouterr().err == ""
    assert run(["-c", deployed + "\nimport sys\nprint('torch' in sys.modules)"], tmp_path) == "False\n"


def run(arguments, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.long
def test_the_example_of_state_and_gates(tmp_path):
    said = run([ROOT / "examples" / "state_and_gates.py"], tmp_path)
    assert "cut in two, bit-identical: True" in said
    assert "has a gradient: True" in said


def test_the_example_of_a_stream(tmp_path):
    said = run([ROOT / "examples" / "stream_frames.py"], tmp_path)
    assert "chunks and steps give bit-identical results: True" in said
    assert "torch was imported: False" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_example_of_the_forget_bias_on_less(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "forget_bias.py"))
    small = {"BIASES": (0.0, 3.0), "DELAYS": (5, 9), "SEEDS": (0,), "STEPS": 30, "EVERY": 10}
    for name, value in small.items():
        monkeypatch.setitem(example["main"].__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["forget_bias.py", str(tmp_path / "drawn.png")])
    threads = torch.get_num_threads()
    try:
        example["main"]()
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "the symbol is 9 steps back" in said
    assert "learned, of 2 runs:" in said
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_example_of_the_forget_bias(tmp_path):
    said = run([ROOT / "examples" / "forget_bias.py"], tmp_path)
    learned = re.search(r"learned, of 6 runs: (.+)", said)
    assert learned is not None
    by_bias = {float(bias): int(count) for count, bias in re.findall(r"(\d) from (-?[\d.]+)", learned[1])}
    assert by_bias[-1.0] == by_bias[0.0] == 0
    assert by_bias[3.0] >= 4


def test_every_example_is_tested():
    assert [path.name for path in EXAMPLES] == [
        "forget_bias.py",
        "state_and_gates.py",
        "stream_frames.py",
        "units_that_track.py",  # tests/inspect/test_units_that_track.py
        "what_a_detector_remembers.py",  # tests/inspect/test_what_a_detector_remembers.py
    ]


# ── what a page refers to ───────────────────────────────────────────────────────────────────────────────────────────


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "tutorial.ipynb"], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        path, _, part = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", text_of(linked), re.MULTILINE)
            assert part in [anchor(heading) for heading in headings], target


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        if page.suffix == ".md":
            targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
            waiting += [path for name in targets if (path := (page.parent / name).resolve()).is_file()]
    unseen = {*PAGES, ROOT / "docs" / "tutorial.ipynb", ROOT / "LICENSE"} - seen
    assert not sorted(map(name_of, unseen))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    text = text_of(page)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for verb in re.findall(r"(?:^|`)cellstack ([a-z]+)", text, re.MULTILINE):
        with pytest.raises(SystemExit) as left:
            cli.parser().parse_args([verb, "--help"])
        assert left.value.code == 0, f"cellstack {verb}"


def test_the_command_lines_of_the_docs_can_be_parsed():
    lines = re.findall(
        r"^cellstack (.+?) {3,}", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(lines) == 15
    for line in lines:
        assert cli.parser().parse_args(line.split()).verb == line.split()[0]


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES, ROOT / "docs" / "tutorial.ipynb"], ids=name_of)
def test_no_path_of_anybodys_machine(page):
    assert not re.search(r"[\s\"'`(]/(?:home|root|tmp|work|Users)\b", page.read_text(encoding="utf-8"))


# ── what a page says of the code ────────────────────────────────────────────────────────────────────────────────────


IGNORED = (".pyc", ".safetensors")  # written by Python and by web/example/train.py


def test_the_map_has_every_file_and_no_other():
    folder, mapped = "", set()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for line in page.split("\n## Every file\n")[1].split("\n## ")[0].splitlines():
        if row := re.match(r"\| (.+?) \|", line):
            if heading := re.match(r"\*\*(.+/)\*\*", row[1]):
                folder = heading[1]
            mapped |= {folder + name for name in re.findall(r"`([^`]+)`", row[1])}
    found = [*(ROOT / "kernel").glob("*.*"), *(ROOT / "src" / "cellstack").rglob("*.py*")]
    found += (ROOT / "src" / "cellstack").rglob("*.js")
    found += [
        *(ROOT / "benchmarks" / "cellstack_bench").glob("*.py"),
        *(ROOT / "examples" / "cellstack_demo").glob("*.py"),
    ]
    found += [path for path in (ROOT / "web").rglob("*.*") if not path.is_relative_to(ROOT / "web" / "dist")]
    assert mapped == {name_of(path) for path in found if "__pycache__" not in path.parts and path.suffix not in IGNORED}


def test_the_recipes_name_files_that_are_there():
    page, package = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT / "src" / "cellstack"
    named = re.findall(r"`([\w*./]+(?:\.(?:py|h|md)|/))`", page)
    assert len(named) > 20
    places = (ROOT, ROOT / "kernel", ROOT / "benchmarks", package, package / "layers", package / "formats")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_format_page_knows_every_node_and_the_version():
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    table = text[text.index("| `type` |") :].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[1:]) == sorted(NODES)
    assert f"| `version` | integer | {VERSION} |" in text
    assert f"{safetensors.MAX_DESCRIPTION >> 20} MiB" in text


def test_the_right_column_of_where_we_part_from_keras():
    """Those rows that tests/layers/test_layers_traps.py has not."""
    cell = layers.LSTMCell(4, dropout=0.5)
    assert [len(cell(torch.ones(rows, 3), cell.get_initial_state(rows))[0]) for rows in (2, 5)] == [2, 5]
    lstm = layers.LSTM(4, return_sequences=True, input_size=3)
    assert lstm(torch.ones(2, 0, 3)).shape == (2, 0, 4)
    for state in ([torch.ones(1, 4)] * 2, [torch.ones(2, 3)] * 2, [torch.ones(2, 4)]):
        with pytest.raises(ShapeError, match="expected"):
            lstm(torch.ones(2, 5, 3), initial_state=state)


def test_the_semantics_page_names_the_kernels_activations():
    text = " ".join((ROOT / "docs" / "semantics.md").read_text(encoding="utf-8").split())
    assert f"{', '.join(ACTIVATIONS[:-1])} and {ACTIVATIONS[-1]} itself" in text


def test_the_changelog_starts_with_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == version[1]

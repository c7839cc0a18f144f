"""The tutorial notebook, run from top to bottom in a kernel of its own, and what it says on the way."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"

slow = pytest.mark.slow  # a kernel starts and runs for ten seconds


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Text and kinds of each code cell's outputs, by the cell's id."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("tutorial")
    client = NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": folder}})
    with pytest.MonkeyPatch.context() as patched:  # else IPython writes to the home, where there is one
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            patched.setenv(name, str(tmp_path_factory.mktemp(name)))
        client.execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(outputs):
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)


def test_it_is_committed_without_outputs_and_with_ids_that_are_words():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.id.replace("-", "").isalpha() for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


@slow
def test_nothing_goes_to_standard_error(outputs):
    said = {name: text(o for o in outs if o.get("name") == "stderr") for name, outs in outputs.items()}
    assert not {name: words for name, words in said.items() if words}


@slow
def test_the_shapes_are_those_of_the_steps_it_teaches(outputs):
    assert text(outputs["tiny-call"]).splitlines()[:3] == ["output [1, 1, 4]", "h      [1, 4]", "c      [1, 4]"]
    expected = ["output  [2, 3, 5]", "state_1 [2, 2, 4]", "state_2 [2, 2, 5]"]
    assert text(outputs["stack-call"]).splitlines() == expected
    assert "lower layer: h [2, 4], c [2, 4]\nupper layer: h [2, 5], c [2, 5]" in text(outputs["stack-states"])


@slow
def test_the_state_that_was_set_is_honoured(outputs):
    zeros, ours = (line.split(":")[1].split() for line in text(outputs["state-compare"]).splitlines())
    assert zeros != ours
    by_hand, layer, agree = (line.split(":")[1].strip() for line in text(outputs["state-by-hand"]).splitlines())
    assert by_hand == layer
    assert ours == layer.split()
    assert agree == "True"


@slow
def test_a_state_that_does_not_fit_is_named(outputs):
    assert text(outputs["state-wrong"]) == "RNN: expected h of state of layer 1 [B=2, H=5], got (2, 4)\n"


@slow
@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("tiny-call", 1),
        ("stack-states", 1),
        ("state-by-hand", 1),
        ("state-once", 2),
        ("state-stack", 1),
        ("memory-shares", 1),
        ("save-fresh", 1),
        ("stream-check", 3),
    ],
)
def test_every_check_it_makes_holds(outputs, cell, answers):
    said = [line.rsplit(":", 1)[1].strip() for line in text(outputs[cell]).splitlines() if ":" in line]
    truths = [ast.literal_eval(word) for word in said if word in ("True", "False")]
    assert truths == [True] * answers


@slow
def test_it_trains_a_model_that_tells_speakers(outputs):
    accuracy = float(text(outputs["train-fit"]).rsplit(":", 1)[1].strip().rstrip("%"))
    assert accuracy > 85  # of nine speakers, after some seconds; a model that learns nothing has 11 %
    assert "torch was not imported" in text(outputs["save-fresh"])


@slow
@pytest.mark.parametrize("cell", ["gates-plot", "memory-plot", "train-plot", "train-gates", "stream-plot"])
def test_it_draws(outputs, cell):
    assert any("image/png" in out.get("data", {}) for out in outputs[cell])


@slow
def test_the_network_is_looked_into_and_patched(outputs):
    assert "bit for bit: True" in text(outputs["inside-trace"])
    assert "contributions add up to the memory: True" in text(outputs["inside-report"])
    plain, kept, forgotten = text(outputs["what-if-patch"]).splitlines()[:3]
    assert all("with probability" in line for line in (plain, kept, forgotten))
    assert "from step 9 on" in text(outputs["what-if-patch"])
    assert text(outputs["ablation-ranks"]).startswith("Ablation of h by mean, 24 units")
    assert any("image/png" in output.get("data", {}) for output in outputs["ablation-plot"])

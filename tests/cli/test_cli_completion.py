"""`cellstack completion`: the script completes verbs, options, their values and file names in a real shell."""

import subprocess
import sys

import pytest
from tools import need

from cellstack.cli import main as cli

CALL = """
source completion
words() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
  $(complete -p cellstack | grep -o '_[a-z_]*cellstack') cellstack "${!#}"
  echo "${COMPREPLY[@]}"
}
"""


def test_bash_completes(capsys, tmp_path):
    need("bash")
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "data.csv").touch()
    (tmp_path / "folder").mkdir()
    cases = {
        "cellstack ''": " ".join(cli.VERBS),
        "cellstack tr": "train",
        "cellstack help con": "convert",
        "cellstack train --ep": "--epochs",
        "cellstack train --task ''": "classify regress forecast text",
        "cellstack train da": "data.csv",
        "cellstack run data.csv da": "data.csv",
        "cellstack train data.csv -o da": "data.csv",
        "cellstack demo -o ''": "folder",
        "cellstack completion ''": "bash zsh fish tcsh",
    }
    script = CALL + "\n".join(f"words {words}" for words in cases)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(cases, done.stdout.splitlines(), strict=True)) == cases


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_a_script_for_other_shells(capsys, shell):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "cellstack" in out
    assert "dry-run" in out or shell == "tcsh"


def test_a_missing_library_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    err = "cellstack completion: error: completion needs shtab: pip install 'cellstack[completion]'\n"
    assert capsys.readouterr() == ("", err)

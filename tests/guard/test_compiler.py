"""How the guard checks the compiler's memory, without compiling; `make guard` compiles."""

import json
import sys

import compiler
import pytest


@pytest.mark.long
def test_a_process_is_measured_and_its_exit_status_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    take = "import sys; memory = bytearray(300 << 20); sys.exit(7)"
    status = compiler.main(["--", sys.executable, "-c", take, "-DCELLSTACK_ISA=avx2", "kernel/simd.cpp"])
    (line,) = (tmp_path / compiler.LOG).read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert status == 7
    assert record["file"] == "simd.cpp avx2"
    assert record["megabytes"] > 300
    assert record["seconds"] > 0


def test_the_guard_fails_if_a_file_needs_too_much_memory(monkeypatch, capsys):
    records = [{"file": "small.cpp", "seconds": 1.0, "megabytes": 799.0}]
    monkeypatch.setattr(compiler, "measured", lambda build: records)
    assert compiler.main([]) == 0
    records.append({"file": "large.cpp", "seconds": 2.0, "megabytes": 801.0})
    assert compiler.main([]) == 1
    output = capsys.readouterr()
    assert "large.cpp: its compiler process uses 801 MB, more than 800: split the file" in output.err
    assert "small.cpp" not in output.err
    assert output.out.index("large.cpp") > output.out.index("seconds")

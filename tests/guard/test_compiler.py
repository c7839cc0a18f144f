"""What the guard makes of the compiler's memory; compiles nothing. The compiling itself is `make guard`."""

import json
import sys

import compiler


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


def test_the_guard_fails_where_a_file_takes_too_much_memory(monkeypatch, capsys):
    records = [{"file": "small.cpp", "seconds": 1.0, "megabytes": 799.0}]
    monkeypatch.setattr(compiler, "measured", lambda build: records)
    assert compiler.main([]) == 0
    records.append({"file": "large.cpp", "seconds": 2.0, "megabytes": 801.0})
    assert compiler.main([]) == 1
    said = capsys.readouterr()
    assert "large.cpp: a process of the compiler takes 801 MB, more than 800" in said.err
    assert "small.cpp" not in said.err
    assert said.out.index("large.cpp") > said.out.index("seconds")

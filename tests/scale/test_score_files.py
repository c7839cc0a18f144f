"""`score_files`: what is written, resumed and refused; every file is scored once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from data import COLUMNS, FEATURES, expected, make_net, make_rows, outputs, same, write

from cellstack.cells.errors import FormatError
from cellstack.scale import folder, job, score_files
from cellstack.train import UsageError


@pytest.fixture
def model(tmp_path):
    make_net().save(tmp_path / "model.safetensors")
    return tmp_path / "model"


@pytest.fixture
def score(model, tmp_path):
    """Score files of a folder `data` into a folder `out`."""

    def run(files="data/*", out="out", **how):
        return score_files(model, tmp_path / files, tmp_path / out, **COLUMNS | how)

    return run


def days(top, lengths=((4, 2, 1), (3, 3, 5), (2, 6, 1))):
    """Write a file per day, in each of which every sequence continues; return the whole sequences."""
    wholes, first = [], 0
    for day, steps in enumerate(lengths):
        table, whole = make_rows(day, steps, first)
        write(top / f"day-{day}.parquet", table)
        wholes.append(whole)
        first += max(steps)
    return {name: np.concatenate([whole[name] for whole in wholes]) for name in wholes[0]}


def read(*paths):
    return pa.concat_tables([pq.read_table(path) for path in paths])


def test_each_file_gets_an_output_with_the_same_rows(score, tmp_path):
    tables = {}
    for n in range(3):
        tables[n], whole = make_rows(n, names=f"meter-{n}-{{}}")
        write(tmp_path / f"data/{n}.parquet", tables[n])
    report = score(batch_rows=4)
    assert (report.files, report.rows, report.earlier, report.failed) == (3, 57, 0, {})
    for n, table in tables.items():
        found = read(tmp_path / f"out/{n}.parquet")
        assert found["meter"] == table["meter"]
        assert found["hour"] == table["hour"]
    same(outputs(found), expected(make_net(), whole))
    assert sorted(os.listdir(tmp_path / "out")) == ["0.parquet", "1.parquet", "2.parquet", "_cellstack"]
    assert len(pd.read_parquet(tmp_path / "out")) == 57  # readers of data sets skip _cellstack


def test_sequences_continue_in_the_next_file(score, tmp_path):
    whole = days(tmp_path / "data")
    score(across_files="continue", batch_rows=2)
    found = read(*(tmp_path / f"out/day-{n}.parquet" for n in range(3)))
    same(outputs(found), expected(make_net(), whole))
    assert os.listdir(tmp_path / "out/_cellstack/states") == ["day-2.parquet"]


def test_files_that_are_added_later_continue_too(score, tmp_path):
    whole = days(tmp_path / "later")
    (tmp_path / "data").mkdir()
    for n in range(3):
        os.rename(tmp_path / f"later/day-{n}.parquet", tmp_path / f"data/day-{n}.parquet")
        report = score(across_files="continue")
        assert (report.files, report.earlier) == (1, min(n, 1))
        if n == 1:  # files that are complete may be removed
            os.unlink(tmp_path / "data/day-0.parquet")
    same(outputs(read(*(tmp_path / f"out/day-{n}.parquet" for n in range(3)))), expected(make_net(), whole))


def test_folders_are_separate_chains(score, tmp_path):
    wholes = {}
    for site in "ab":
        for day in range(2):
            table, whole = make_rows(ord(site) + day, (3, 2), 10 * day, f"{site}-{{}}")
            write(tmp_path / f"data/site={site}/{day}.parquet", table)
            wholes[site, day] = whole
    score("data/*/*.parquet", across_files="continue")
    for site in "ab":
        both = {name: np.concatenate([wholes[site, day][name] for day in range(2)]) for name in wholes[site, 0]}
        same(outputs(read(*sorted((tmp_path / f"out/site={site}").iterdir()))), expected(make_net(), both))


def test_another_sequence_begins_in_each_file(score, tmp_path):
    days(tmp_path / "data")
    score(across_files="restart")
    _, whole = make_rows(1, (3, 3, 5), 4)
    same(outputs(read(tmp_path / "out/day-1.parquet")), expected(make_net(), whole))


def test_an_id_in_two_files_is_refused_before_anything_is_written(score, tmp_path):
    days(tmp_path / "data")
    message = "the id 'meter-0' occurs in day-0.parquet and in day-1.parquet: `across_files='continue'`"
    with pytest.raises(UsageError, match=message):
        score()
    assert os.listdir(tmp_path / "out") == ["_cellstack"]
    assert score(across_files="continue").files == 3  # in the same folder, which has no outputs yet


def test_an_id_that_reappears_late_is_refused_also_when_resumed(score, tmp_path, monkeypatch):
    monkeypatch.setattr("cellstack.scale.run.PEEK", 1)
    for n in range(3):
        names = "meter-{}" if n == 2 else f"meter-{n}-{{}}"
        write(tmp_path / f"data/{n}.parquet", make_rows(n, names=names)[0])
    table, _ = make_rows(0, (2, 2), names="x-{}")
    write(tmp_path / "data/3.parquet", pa.concat_tables([table, make_rows(0, (1,), 50)[0]]))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"the id 'meter-0' occurs in 2.parquet and in 3.parquet"):
            score()


def test_an_id_in_two_folders_is_refused(score, tmp_path):
    for site in "ab":
        write(tmp_path / f"data/{site}/0.parquet", make_rows()[0])
    for _ in range(2):
        with pytest.raises(UsageError, match=r"the id 'meter-0' occurs in a and in b"):
            score("data/*/*", across_files="continue")


# ── formats ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_gives_the_same_as_parquet(score, tmp_path):
    table, whole = make_rows(0, (4, 4, 2))
    write(tmp_path / "p/rows.parquet", table)
    for top, suffix, mark in (("c", "csv", ","), ("t", "tsv", "\t")):
        (tmp_path / top).mkdir()
        options = pyarrow.csv.WriteOptions(delimiter=mark)
        pyarrow.csv.write_csv(table, tmp_path / top / f"rows.{suffix}", options)
    for top in "pct":
        score(top, f"out-{top}")
        same(outputs(read(tmp_path / f"out-{top}/rows.parquet")), expected(make_net(), whole))


def test_csv_in_several_blocks(score, tmp_path, monkeypatch):
    monkeypatch.setattr("cellstack.scale.reading.BLOCK", 2000)
    table, whole = make_rows(0, (300, 200, 100))
    (tmp_path / "data").mkdir()
    pyarrow.csv.write_csv(table, tmp_path / "data/rows.csv")
    score()
    found = tmp_path / "out/rows.parquet"
    assert pq.read_metadata(found).num_row_groups > 5
    same(outputs(read(found)), expected(make_net(), whole))


def test_files_without_rows(score, tmp_path):
    write(tmp_path / "data/a.parquet", make_rows()[0][:0])
    (tmp_path / "data/b.csv").write_text("meter,hour,load,heat,wind\n")
    report = score()
    assert (report.files, report.rows, report.failed) == (2, 0, {})
    assert read(tmp_path / "out/b.parquet").column_names == ["meter", "hour", "predicted_1", "predicted_2"]


HEAD = "meter,hour,load,heat,wind\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", lambda good: good[:-1], "expected a complete Parquet file: .*magic bytes"),
        ("rows.parquet", lambda good: good[: len(good) // 2], "expected a complete Parquet file"),
        ("rows.parquet", lambda good: b"", "expected a complete Parquet file"),
        ("rows.parquet", lambda good: good[:4] + b"\0" * 400 + good[404:], "expected a complete Parquet file"),
        ("rows.csv", "", "expected names in the first line, found an empty file"),
        ("rows.csv", f"{HEAD}a,0,1,2,3\na,1,1", "expected a complete CSV file: .*Expected 5 columns, got 3"),
        ("rows.csv", f"{HEAD}a,0,1,2,x\n", "expected a complete CSV file: .*invalid value 'x'"),
        (
            "rows.csv",
            "meter,hour,load\na,0,1\n",
            "expected the column 'heat' once, found the columns meter, hour, load",
        ),
        ("rows.csv", f"{HEAD}a,8am,1,2,3\n", "expected numbers, dates or timestamps in column 'hour'"),
        ("rows.csv", f"{HEAD}NA,0,1,2,3\n", "row 0: column 'meter' has no value"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_and_the_others_are_scored(score, tmp_path, name, content, message):
    table, _ = make_rows(0, (200, 150))
    path = write(tmp_path / "data" / name, table, 100)
    path.write_bytes(content.encode() if isinstance(content, str) else content(path.read_bytes()))
    write(tmp_path / "data/z.parquet", make_rows(1, names="z-{}")[0])
    report = score()
    assert list(report.failed) == [str(path)]
    assert pd.Series(report.failed).str.contains(message).all(), report.failed
    assert report.files == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["_cellstack", "z.parquet"]


def test_a_type_that_changes_between_files(score, tmp_path):
    days(tmp_path / "data")
    table = read(tmp_path / "data/day-1.parquet")
    write(tmp_path / "data/day-1.parquet", table.set_column(2, "load", table["load"].cast(pa.string())))
    table = read(tmp_path / "data/day-2.parquet")
    report = score(across_files="continue")
    assert report.failed == {str(tmp_path / "data/day-1.parquet"): "expected numbers in column 'load', got string"}
    assert report.waiting == [str(tmp_path / "data/day-2.parquet")]
    assert report.files == 1


def test_rows_out_of_order_in_a_later_row_group(score, tmp_path):
    table, _ = make_rows(0, (6,))
    write(tmp_path / "data/a.parquet", pa.concat_tables([table, table[2:3]]), rows=2)
    report = score(batch_rows=2)
    said = "row 6: meter 'meter-0' at hour 2 isn't after the last row of this meter before: sort the rows by hour"
    assert report.failed == {str(tmp_path / "data/a.parquet"): said}


# ── the output folder ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_complete_run_does_nothing_again(score, tmp_path):
    days(tmp_path / "data")
    score(across_files="continue")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    report = score(across_files="continue")
    assert (report.files, report.earlier) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


def test_a_folder_of_another_model_or_other_options_is_refused(score, model, tmp_path):
    write(tmp_path / "data/a.parquet", make_rows()[0])
    score()
    for how, message in (
        ({"across_files": "restart"}, "it has the output for across_files 'refuse', not 'restart'"),
        ({"missing": "skip"}, "it has the output for missing 'refuse', not 'skip'"),
        ({"features": FEATURES[::-1]}, r"it has the output for features \['load', 'heat', 'wind'\], not \['wind'"),
    ):
        with pytest.raises(UsageError, match=message):
            score(**how)
    make_net(seed=1).save(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"it has the output of another model, model.safetensors \(SHA-256 \w{12}…\)"):
        score()
    os.rename(tmp_path / "out/_cellstack/manifest.json", tmp_path / "manifest.json")
    with pytest.raises(UsageError, match=r"expected a new or empty folder, or an earlier output, found a.parquet"):
        score()
    (tmp_path / "out/_cellstack/manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="expected the manifest of an earlier output, found other content"):
        score()


def test_a_file_that_has_changed_since_is_refused(score, tmp_path):
    write(tmp_path / "data/a.parquet", make_rows()[0])
    score()
    write(tmp_path / "data/a.parquet", make_rows(1)[0])
    with pytest.raises(UsageError, match=r"a.parquet: it has changed since it was scored: delete .*out/a.parquet"):
        score()
    os.unlink(tmp_path / "out/a.parquet")
    score()
    same(outputs(read(tmp_path / "out/a.parquet")), expected(make_net(), make_rows(1)[1]))


def test_a_file_before_those_that_are_complete_is_refused(score, tmp_path):
    days(tmp_path / "data")
    score("data/day-1.parquet", across_files="continue")
    with pytest.raises(UsageError, match=r"day-0.parquet: its name is before day-1.parquet, which is complete"):
        score(across_files="continue")


def test_damaged_states_are_an_error_of_the_file_that_needs_them(score, tmp_path):
    days(tmp_path / "data")
    score("data/day-0.parquet", across_files="continue")
    path = tmp_path / "out/_cellstack/states/day-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FormatError, match=r"day-0.parquet: expected a complete Parquet file"):
        score(across_files="continue")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("nothing/*.parquet", r"nothing/\*.parquet: found no file"),
        ("data/*.txt", "expected a file with one of the suffixes .parquet, .csv, .tsv"),
        ("**/*.parquet", "is in the output folder"),
        ("data/same.*", "have the same output, same.parquet"),
    ],
)
def test_patterns(score, tmp_path, files, message):
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "same.csv", "same.tsv"):
        (tmp_path / "data" / name).write_text("x")
    write(tmp_path / "more/a.parquet", make_rows()[0])
    score("more")
    with pytest.raises(UsageError, match=message):
        score(files)


def test_arguments(score, model, tmp_path):
    with pytest.raises(UsageError, match="expected across_files to be one of refuse, restart, continue, got 'carry'"):
        score(across_files="carry")
    with pytest.raises(UsageError, match="expected batch_rows of at least 1, got 0"):
        score(batch_rows=0)
    with pytest.raises(UsageError, match=r"model.safetensors: expected 3 features"):
        score(features=["load"])


# ── interrupted ─────────────────────────────────────────────────────────────────────────────────────────────────────


CHANGES = [("restart", step) for step in range(4)] + [("continue", step) for step in range(10)]


@pytest.mark.parametrize(("across_files", "step"), CHANGES)
def test_whatever_is_interrupted_a_second_run_completes_it(score, tmp_path, monkeypatch, across_files, step):
    whole = days(tmp_path / "data")
    left = [step]

    def interrupted(change):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return change(*args)

        return call

    monkeypatch.setattr(os, "replace", interrupted(os.replace))  # the manifest, outputs and states get their names
    monkeypatch.setattr(folder.Folder, "remove_states_but", interrupted(folder.Folder.remove_states_but))
    with pytest.raises(KeyboardInterrupt):
        score(across_files=across_files)
    monkeypatch.undo()
    report = score(across_files=across_files)
    assert report.files + report.earlier == 3
    found = read(*(tmp_path / f"out/day-{n}.parquet" for n in range(3)))
    assert len(found) == sum(map(len, whole.values()))
    if across_files == "continue":
        same(outputs(found), expected(make_net(), whole))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_killed_process_is_resumed_and_holds_no_lock(model, score, tmp_path):
    whole = days(tmp_path / "data")
    code = f"""
import os, signal, sys
from cellstack.scale import score_files, states
save = states.States.save
def killed(self, path):
    save(self, path)
    if path.name == "day-1.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
states.States.save = killed
score_files({str(model)!r}, "data", "out", across_files="continue", **{COLUMNS!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out").rglob("*.tmp"))) == 1
    report = score(across_files="continue")
    assert (report.files, report.earlier) == (2, 1)
    same(outputs(read(*(tmp_path / f"out/day-{n}.parquet" for n in range(3)))), expected(make_net(), whole))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_two_processes_do_not_write_to_one_folder(score, tmp_path, monkeypatch):
    write(tmp_path / "data/a.parquet", make_rows()[0])
    started = []

    class Job(job.Job):
        def run(self, chain, progress):
            with pytest.raises(UsageError, match=r"another process \(process \d+ on .*\) is writing to this file"):
                score()
            started.append(chain)
            return super().run(chain, progress)

    monkeypatch.setattr("cellstack.scale.run.Job", Job)
    score()
    assert len(started) == 1


def test_too_little_memory_is_named(score, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    write(tmp_path / "data/a.parquet", make_rows()[0])
    monkeypatch.setattr("cellstack.scale.states.States.update", fail)
    report = score()
    assert list(report.failed.values()) == ["not enough memory: use smaller batches (`batch_rows=…`)"]
    assert os.listdir(tmp_path / "out") == ["_cellstack"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_rows(model, tmp_path, suffix):
    steps, count = 20_000, 100
    rng, names = np.random.default_rng(0), [f"meter-{n}" for n in range(count)]
    (tmp_path / "data").mkdir()
    table = pa.table(
        {"meter": names * steps, "hour": np.repeat(np.arange(steps), count)}
        | {name: rng.normal(size=steps * count).astype("f4") for name in FEATURES}
    )
    for part, rows in (("first", table[: len(table) // 4]), ("whole", table)):
        if suffix == "csv":
            pyarrow.csv.write_csv(rows, tmp_path / f"data/{part}.csv")
        else:
            write(tmp_path / f"data/{part}.parquet", rows, 50_000)
    code = f"""
import re, sys
from cellstack.scale import score_files
for part in ("first", "whole"):
    score_files({str(model)!r}, f"data/{{part}}.{suffix}", f"out-{{part}}", **{COLUMNS!r})
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    first, whole = (int(line) / 1024 for line in done.stdout.split())
    assert table.nbytes / 2**20 > 50
    assert whole - first < 30, f"{first:.0f} MB after a quarter of the rows, {whole:.0f} MB after all"


def test_the_manifest_says_what_the_folder_belongs_to(score, tmp_path):
    write(tmp_path / "data/a.parquet", make_rows()[0])
    score()
    found = json.loads((Path(tmp_path) / "out/_cellstack/manifest.json").read_text())
    assert found["name"] == "model.safetensors"
    assert len(found["model"]) == 64
    metadata = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[b"cellstack"])
    assert metadata["source"] == "a.parquet"

"""`score_files`: scores files in one process or on Ray, and resumes where an earlier run ended."""

from __future__ import annotations

import glob
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from cellstack.cells.errors import FormatError
from cellstack.formats import load_network
from cellstack.formats.files import digest_of, existing_file
from cellstack.scale.folder import Folder, InputFile
from cellstack.scale.job import Chain, Job, Scored
from cellstack.scale.on_ray import run_on_ray
from cellstack.scale.reading import SUFFIXES, batches, check_file
from cellstack.scale.scorer import Scorer
from cellstack.train.checks import UsageError, is_count
from cellstack.train.progress import is_shown

ACROSS_FILES = ("refuse", "restart", "continue")
BATCH = 65_536  # rows
PEEK = 10_000  # rows


@dataclass
class Report:
    """The result of `score_files`.

    Attributes:
        files: the number of files that this run scored.
        rows: their rows.
        earlier: the number of files that were complete before.
        failed: why files couldn't be scored, by path.
        waiting: files that weren't scored because an earlier file of their sequences failed.
    """

    files: int = 0
    rows: int = 0
    earlier: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)


def score_files(
    model: str | os.PathLike[str],
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    id: str | None = None,
    time: str | None = None,
    features: Sequence[str] | None = None,
    missing: str = "refuse",
    across_files: str = "refuse",
    ray: str | None = None,
    threads: int = 1,
    batch_rows: int = BATCH,
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Score the rows of many files: for each file, write one with the same ids and times, and the predictions.

    Memory is needed for a batch of rows, and for the state of each sequence of a file. A run that was stopped, even
    killed, is resumed by calling the function again.

    Args:
        model: a network's file.
        files: paths, patterns such as `"data/**/*.parquet"`, or folders; see `batches` for the formats.
        output: the folder to write to. Its files are named after the input files, below the part of the pattern without
            wildcards.
        id, time, features, missing: see `Scorer`.
        across_files: what it means if an id occurs in several files. `"refuse"`: an error, which names them.
            `"restart"`: another sequence begins in each file. `"continue"`: the sequence continues in the next file of
            the same folder, in the order of names; files that are added later continue too.
        ray: the address of a Ray cluster, see `run_on_ray`; None: this process.
        threads: the number of threads that the kernel may use; on Ray, in each task.
        batch_rows: the largest number of rows in a batch, which doesn't change the results.
        progress: whether to show a progress bar; None: if standard error is a terminal.
        options: arguments of `cellstack.load`.

    Returns:
        What was scored, and what failed: a file that can't be scored doesn't stop the others.

    Raises:
        UsageError: columns or options that don't fit the network; an id in several files; files that were changed since
            they were scored; an output folder of another model or other options.
        FormatError: a model that can't be loaded.
        OSError: a file or folder that doesn't exist or can't be written.
    """
    if across_files not in ACROSS_FILES:
        raise UsageError(f"expected across_files to be one of {', '.join(ACROSS_FILES)}, got {across_files!r}")
    if not is_count(batch_rows):
        raise UsageError(f"expected batch_rows of at least 1, got {batch_rows!r}")
    path, options = Path(existing_file(model)), dict(options or {})
    try:
        scorer = Scorer(load_network(path, **options), id, time, features, missing=missing, threads=threads)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:  # a network that can't be streamed
        if isinstance(error, FormatError):
            raise
        raise UsageError(f"{path}: {error}; use `cellstack run` for whole sequences") from None
    folder = Folder(Path(output).absolute())
    sources = find([files] if isinstance(files, (str, os.PathLike)) else files, folder)
    carries = across_files == "continue"
    manifest = {"model": digest_of(path), "name": path.name, "options": options, "id": scorer.id, "time": scorer.time}
    manifest |= {"features": list(scorer.features), "missing": missing, "across_files": across_files}
    with folder.opened(manifest):
        owners, report = _Owners(), Report()
        chains = _chains(sources, folder, scorer, carries, report)
        if across_files == "refuse":
            for name in folder.outputs():
                owners.add(folder.ids(name, scorer.id), name)
        elif carries:
            for below, name in {_folder_of(name): name for name in folder.outputs()}.items():  # the last one of each
                owners.add(folder.ids(name, scorer.id, carried=True), below)
        chains, rows = _checked(chains, scorer, report)
        if across_files == "refuse":
            _peek(chains, scorer)
        job = Job(scorer, folder, carries, batch_rows)
        bar = tqdm(total=rows, unit=" rows", unit_scale=True, disable=not is_shown(progress), dynamic_ncols=True)
        with bar, closing(_results(job, chains, ray, threads, bar)) as results:
            for scored in results:
                if scored.error:
                    _fail(report, next(chain for chain in chains if scored.source in chain), scored)
                    continue
                report.files, report.rows = report.files + 1, report.rows + scored.rows
                name = scored.source.output
                if across_files != "restart":
                    owners.add(scored.ids, _folder_of(name) if carries else name)
                if ray is not None:
                    bar.update(scored.rows)
    return report


def _results(job: Job, chains: Sequence[Chain], ray: str | None, threads: int, bar: Any) -> Generator[Scored]:
    if not chains:
        return
    if ray is not None:
        yield from run_on_ray(job, chains, ray, threads)
        return
    for chain in chains:
        yield from job.run(chain, bar.update)


class _Owners:
    """Where each id occurs: its file or, if sequences continue, its folder."""

    def __init__(self) -> None:
        self._of: dict[Any, str] = {}

    def add(self, ids: Sequence[Any], owner: str) -> None:
        """Add the ids of a file or folder.

        Raises:
            UsageError: one of them occurs in another one.
        """
        for one in ids:
            if (other := self._of.setdefault(one, owner)) != owner:
                raise UsageError(_reappears(one, other, owner))


def _reappears(id: Any, first: str, second: str) -> str:
    return (
        f"the id {id!r} occurs in {first} and in {second}: `across_files='continue'` continues the sequence in the "
        "next file of the folder, `across_files='restart'` begins another one in each file"
    )


def _folder_of(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def find(patterns: Sequence[str | os.PathLike[str]], folder: Folder) -> list[InputFile]:
    """Return the input files of patterns in the order of their outputs.

    Raises:
        UsageError: no file, a file in the output folder or of another kind, two files with the same output.
    """
    sources: dict[str, InputFile] = {}
    for pattern in [os.fspath(pattern) for pattern in patterns]:
        if os.path.isdir(pattern):
            top, paths = Path(pattern), [path for path in Path(pattern).rglob("*") if path.suffix.lower() in SUFFIXES]
        else:
            parts = Path(pattern).parts
            fixed = next((n for n, part in enumerate(parts[:-1]) if glob.has_magic(part)), len(parts) - 1)
            top, paths = Path(*parts[:fixed]), [Path(path) for path in glob.glob(pattern, recursive=True)]
        paths = [path.absolute() for path in paths if path.is_file()]
        if not paths:
            raise UsageError(f"{pattern}: found no file")
        for path in paths:
            if path.suffix.lower() not in SUFFIXES:
                raise UsageError(f"{path}: expected a file with one of the suffixes {', '.join(SUFFIXES)}")
            if folder.path in path.parents:
                raise UsageError(
                    f"{path}: is in the output folder: name a folder (-o) that the pattern doesn't include"
                )
            name = path.relative_to(top.absolute()).with_suffix(".parquet").as_posix()
            other = sources.setdefault(name, InputFile(path, name))
            if other.path != path:
                raise UsageError(f"{other.path} and {path} have the same output, {name}")
    return [sources[name] for name in sorted(sources)]


def _chains(sources: Sequence[InputFile], folder: Folder, scorer: Scorer, carries: bool, report: Report) -> list[Chain]:
    """Return the files that aren't complete, as chains: one per folder if sequences continue, else one per file."""
    complete = set(folder.outputs())
    left = []
    for source in sources:
        if source.output in complete:
            folder.check_unchanged(source)
            report.earlier += 1
            continue
        last = folder.last_beside(source.output) if carries else None
        if last is not None and source.output < last:
            raise UsageError(
                f"{source.path}: its name is before {last}, which is complete: with `across_files='continue'`, new "
                "files follow those that are complete, in the order of their names"
            )
        left.append(source)
    chains: dict[str, list[InputFile]] = {}
    for source in left:
        chains.setdefault(_folder_of(source.output) if carries else source.output, []).append(source)
    return [tuple(chain) for chain in chains.values()]


def _checked(chains: Sequence[Chain], scorer: Scorer, report: Report) -> tuple[list[Chain], int | None]:
    """Return the chains up to a file that can't be opened or lacks columns, and all rows, None if that isn't known."""
    kept, total = [], 0
    for chain in chains:
        for n, source in enumerate(chain):
            try:
                rows = check_file(source.path, scorer)
            except (FormatError, UsageError, OSError) as error:
                _fail(report, chain, Scored(source, error=str(error)))
                chain = chain[:n]
                break
            total = None if rows is None or total is None else total + rows
        if chain:
            kept.append(chain)
    return kept, total


def _fail(report: Report, chain: Chain, scored: Scored) -> None:
    """Report a file that can't be scored, and those that follow it."""
    path = str(scored.source.path)
    report.failed[path] = scored.error.removeprefix(f"{path}: ")
    report.waiting += [str(source.path) for source in chain[chain.index(scored.source) + 1 :]]


def _peek(chains: Sequence[Chain], scorer: Scorer) -> None:
    """Raise `UsageError` at once if the first two files begin with the same ids, as files of one day each do."""
    owners = _Owners()
    for (source,) in chains[:2]:
        try:
            rows = next(batches(source.path, scorer, PEEK))
        except (FormatError, UsageError, OSError):  # reported when the file is scored
            continue
        owners.add(rows[scorer.id].slice(0, PEEK).unique().to_pylist(), source.output)

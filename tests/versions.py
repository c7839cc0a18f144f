"""Runs tests with other versions of Python and of the libraries, each set in an environment of its own.

    python tests/versions.py [NAME…]

uv finds Python on PATH or among those of pyenv, or downloads it. It chooses the libraries' versions anew in each run,
and lists them in .venv-versions/NAME.txt. An environment whose Python can't be had is reported as not run, which is an
error if it was named.
"""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-versions"


class Versions(NamedTuple):
    """A version of Python, which of the versions that pyproject.toml allows, and the version of torch."""

    python: str
    resolution: str = "highest"
    torch: str = "torch"


ENVIRONMENTS = {
    "newest": Versions("3.13"),
    "oldest": Versions("3.10", "lowest-direct", "torch==2.11.*"),
    "3.10": Versions("3.10"),
    "3.11": Versions("3.11", torch="torch==2.13.*"),
    "3.12": Versions("3.12", torch="torch==2.11.*"),
    "3.14": Versions("3.14"),
}
# What calls the libraries whose versions change.
TESTS = [
    "tests/kernel",
    "tests/layers",
    "tests/network",
    "tests/streaming",
    "tests/formats",
    "tests/capture",
    "tests/keras",
    "tests/train/test_train_entry.py",
    "tests/train/test_table.py",
    "tests/cli/test_cli.py",
]
PYTEST = ["-m", "pytest", "-m", "not slow and not models and not web and not clusters and not devices"]
PYTEST += ["-p", "no:cacheprovider", "-n", "auto", "--dist", "loadfile", *TESTS]


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def wheel(python: Path, version: str) -> Path:
    """Build the wheel, once for all versions of Python that share it."""
    folder = FOLDER / "wheels" / (version if version < "3.12" else "abi3")
    if not list(folder.glob("*.whl")):
        run("uv", "build", "--quiet", "--wheel", "--python", python, "--out-dir", folder)
    return next(folder.glob("*.whl"))


def test(name: str) -> str:
    """Test in the environment of this name, and return the outcome."""
    wanted = ENVIRONMENTS[name]
    python, asked, needs = FOLDER / name / "bin/python", FOLDER / f"{name}.in", FOLDER / f"{name}.txt"
    try:
        run("uv", "venv", "--quiet", "--clear", "--no-project", "--python", wanted.python, FOLDER / name)
    except subprocess.CalledProcessError:
        return f"not run: uv found no Python {wanted.python}"
    try:
        asked.write_text(f"{wanted.torch}\n", encoding="utf-8")
        limits = "--upgrade", "--resolution", wanted.resolution, "--constraint", asked, "--extra", "test"
        run("uv", "pip", "compile", "--quiet", "--python", python, *limits, "--output-file", needs, "pyproject.toml")
        run("uv", "pip", "sync", "--quiet", "--python", python, needs)
        run("uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel(python, wanted.python))
        run(python, *PYTEST)
    except subprocess.CalledProcessError as error:
        return f"failed: {Path(error.cmd[0]).name} {' '.join(error.cmd[1:3])}"
    return "passed"


def main(names: list[str]) -> int:
    if unknown := set(names) - set(ENVIRONMENTS):
        print(f"versions.py: expected names of {', '.join(ENVIRONMENTS)}, got {', '.join(sorted(unknown))}")
        return 2
    programs = [str(Path(sys.executable).parent), *glob(os.path.expanduser("~/.pyenv/versions/*/bin"))]
    os.environ["PATH"] = os.pathsep.join([*programs, os.environ["PATH"]])
    os.environ["PYTHONPATH"] = "tests"
    if folders := os.environ.get("PIP_FIND_LINKS"):  # pip's setting
        os.environ.setdefault("UV_FIND_LINKS", ",".join(folders.split()))
    for old in FOLDER.glob("wheels/*/*.whl"):
        old.unlink()
    outcomes = {}
    for name in names or ENVIRONMENTS:
        print(f"== {name}: {' '.join(ENVIRONMENTS[name])}", flush=True)
        outcomes[name] = test(name)
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    fine = ("passed",) if names else ("passed", "not run")
    return 0 if "passed" in outcomes.values() and all(o.startswith(fine) for o in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

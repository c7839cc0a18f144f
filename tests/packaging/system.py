"""Says in one line what the system lacks to build the package: make runs it before it creates the environment."""

import importlib.util
import os
import shutil
import sys
import sysconfig

OLDEST = (3, 10)  # as requires-python in pyproject.toml


def lacking():
    """Return what is missing, each with the package of Debian that contains it."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    missing = {}
    if not importlib.util.find_spec("ensurepip"):  # Debian's python3 has venv, but not what venv calls
        missing["Python's module ensurepip"] = f"{python}-venv"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing["Python's headers"] = f"{python}-dev"
    chosen = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, chosen or ["c++", "g++", "clang++"])):
        missing[f"a C++ compiler{f' (CXX={chosen[0]})' if chosen else ''}"] = "g++"
    return missing


def main():
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"make: expected Python 3.10 or newer, found {found}: choose one with `make demo PYTHON=python3.12`")
    missing = lacking()
    if missing:
        packages = " ".join(missing.values())
        sys.exit(f"make: expected {', '.join(missing)}: on Debian or Ubuntu, apt-get install {packages}")


if __name__ == "__main__":
    main()

"""A pytest plugin: runs tests under `cellstack.keras.patch`, and writes their outcomes to a file."""

import json
import os

import cellstack.keras

OUTCOMES = {}


def pytest_configure(config):
    if os.environ["PATCHED"] == "1":
        cellstack.keras.patch()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        file, _line, name = report.location  # the same name occurs in several files
        OUTCOMES[f"{os.path.basename(file)}::{name}"] = report.outcome


def pytest_unconfigure(config):
    calls = cellstack.keras.calls()
    with open(os.environ["WRITE_TO"], "w") as file:
        json.dump({"outcomes": OUTCOMES, "served": calls.served, "left": calls.left}, file)

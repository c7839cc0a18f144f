"""The estimators pass all checks that scikit-learn and sktime have for their own.

Each library runs in a separate process: both warn, and scikit-learn checks array APIs only if a variable
of SciPy is set before its import.
"""

import os
import subprocess
import sys

import pytest

SKLEARN = """
from sklearn.utils.estimator_checks import check_estimator
from cellstack.sklearn import {kind} as kind

# Tables of three to ten columns, each of which matters by itself, are no sequences: units that read one direction and
# answer from the last step learn them in the few steps that keep this short.
quick = dict(units=24, lr=0.03, dropout=0.0, bidirectional=False, pooling="last", batch=32)
quick |= dict(validation=0.0, noise=0.0, offset=0.0, epochs=20)
for result in check_estimator(kind(**quick), on_skip=None, on_fail=None, expected_failed_checks={expected}):
    print(result["status"], kind.__name__, result["check_name"], repr(result["exception"])[:500])
"""
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "a weight multiplies a sequence's loss, whereas one that is there "
    "twice is drawn into batches twice, by other draws",
}
SKTIME = """
from sktime.utils import check_estimator
from cellstack.adapters import sktime as adapters

for kind in ("SequenceClassifier", "SequenceRegressor", "SequenceForecaster"):
    for check, came in check_estimator(getattr(adapters, kind)).items():
        print(came.lower() if isinstance(came, str) else "failed", kind, check, came)
"""


def checked(code, folder, **environment):
    """Return what a process says: a line a check, its first word how it went."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.split()[0] in ("passed", "failed", "xfail", "skipped")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SequenceClassifier", "SequenceRegressor"])
def test_scikit_learn_s_checks(kind, tmp_path):
    lines = checked(SKLEARN.format(kind=kind, expected=EXPECTED), tmp_path, SCIPY_ARRAY_API="1")
    assert len(lines) > 50
    assert [line for line in lines if not line.startswith(("passed", "xfail"))] == []
    assert {line.split()[2] for line in lines if line.startswith("xfail")} == set(EXPECTED)


@pytest.mark.slow
def test_sktime_s_checks(tmp_path):
    lines = checked(SKTIME, tmp_path)
    assert len(lines) >= 1000
    assert [line for line in lines if not line.startswith("passed")] == []

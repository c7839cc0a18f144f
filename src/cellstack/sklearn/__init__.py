"""scikit-learn estimators for sequences and tables, trained like `cellstack train`; they predict without torch.

Ref: scikit-learn, "Developing scikit-learn estimators", https://scikit-learn.org/stable/developers/develop.html
"""

from cellstack.cells.errors import check_installed

for _package in ("sklearn", "torch"):
    check_installed("cellstack.sklearn", _package, "sklearn")

from cellstack.sklearn.forecaster import SequenceForecaster
from cellstack.sklearn.sequences import SequenceClassifier, SequenceRegressor

__all__ = ["SequenceClassifier", "SequenceForecaster", "SequenceRegressor"]


def __dir__() -> list[str]:
    return __all__

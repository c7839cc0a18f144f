"""The scikit-learn door: estimators over sequences and tables, fitted as `cellstack train` fits, run without torch.

Ref: scikit-learn, "Developing scikit-learn estimators", https://scikit-learn.org/stable/developers/develop.html
"""

from cellstack.sklearn.forecaster import SequenceForecaster
from cellstack.sklearn.sequences import SequenceClassifier, SequenceRegressor, with_changes

__all__ = ["SequenceClassifier", "SequenceForecaster", "SequenceRegressor", "with_changes"]

"""scikit-learn estimators for sequences and tables, trained like `cellstack train`; they predict without torch.

Ref: scikit-learn, "Developing scikit-learn estimators", https://scikit-learn.org/stable/developers/develop.html
"""

from cellstack.sklearn.forecaster import SequenceForecaster
from cellstack.sklearn.sequences import SequenceClassifier, SequenceRegressor, with_changes

__all__ = ["SequenceClassifier", "SequenceForecaster", "SequenceRegressor", "with_changes"]

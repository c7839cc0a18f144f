"""The parts of a training loop of your own: models, batches, the loop, its options and its results."""

from cellstack.train.data.sequences import as_sequences
from cellstack.train.examples import Batch, Data, Examples, Indexed, Inputs, Labelled, batches, split
from cellstack.train.learner import Epoch, Fit, Learner
from cellstack.train.loop import learn
from cellstack.train.model import Model
from cellstack.train.options import Architecture, FitOptions

__all__ = [
    "Architecture",
    "Batch",
    "Data",
    "Epoch",
    "Examples",
    "Fit",
    "FitOptions",
    "Indexed",
    "Inputs",
    "Labelled",
    "Learner",
    "Model",
    "as_sequences",
    "batches",
    "learn",
    "split",
]

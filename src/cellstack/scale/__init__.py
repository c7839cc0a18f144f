"""Scores many sequences in many files, in one process or on Ray; and the function that does so, for other engines."""

from cellstack.cells.errors import check_installed

check_installed("cellstack.scale", "pyarrow", "scale")
check_installed("cellstack.scale", "tqdm", "scale")

from cellstack.scale.run import Report, score_files
from cellstack.scale.scorer import Scorer

__all__ = ["Report", "Scorer", "score_files"]

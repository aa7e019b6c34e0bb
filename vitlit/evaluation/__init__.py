"""Numbers that say what features are worth: arrays in, numbers out."""

from vitlit.evaluation.knn import knn
from vitlit.evaluation.rank import deviation, effective_rank

__all__ = ["deviation", "effective_rank", "knn"]

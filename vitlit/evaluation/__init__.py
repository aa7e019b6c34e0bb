"""Numbers that say what features are worth: arrays in, numbers out."""

from vitlit.evaluation.calibration import reliability, temperature
from vitlit.evaluation.classify import classify
from vitlit.evaluation.duplicates import duplicates
from vitlit.evaluation.features import features, probe_inputs
from vitlit.evaluation.fewshot import fewshot
from vitlit.evaluation.knn import knn
from vitlit.evaluation.label_errors import LabelErrors, label_errors
from vitlit.evaluation.linear import linear
from vitlit.evaluation.logistic import logistic
from vitlit.evaluation.rank import deviation, effective_rank
from vitlit.evaluation.resampling import compare, folds, interval

__all__ = ["LabelErrors", "classify", "compare", "deviation", "duplicates", "effective_rank", "features", "fewshot"]
__all__ += ["folds", "interval", "knn", "label_errors", "linear", "logistic", "probe_inputs"]
__all__ += ["reliability", "temperature"]

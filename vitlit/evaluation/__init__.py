"""Numbers that say what features are worth: arrays in, numbers out."""

from vitlit.evaluation.calibration import reliability, temperature
from vitlit.evaluation.classify import classify
from vitlit.evaluation.features import features, probe_inputs
from vitlit.evaluation.fewshot import fewshot
from vitlit.evaluation.knn import knn
from vitlit.evaluation.linear import linear
from vitlit.evaluation.logistic import logistic
from vitlit.evaluation.rank import deviation, effective_rank
from vitlit.evaluation.resampling import compare, folds, interval

__all__ = ["classify", "compare", "deviation", "effective_rank", "features", "fewshot", "folds"]
__all__ += ["interval", "knn", "linear", "logistic", "probe_inputs", "reliability", "temperature"]

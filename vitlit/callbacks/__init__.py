"""Callbacks that watch training and store its results."""

from vitlit.callbacks.ema import EMA
from vitlit.callbacks.mistakes import Mistakes
from vitlit.callbacks.nonfinite import NonFinite
from vitlit.callbacks.pictures import Pictures
from vitlit.callbacks.predictions import Predictions
from vitlit.callbacks.probes import Probes
from vitlit.callbacks.progress import Bar, Lines
from vitlit.callbacks.throughput import Throughput

__all__ = ["EMA", "Bar", "Lines", "Mistakes", "NonFinite", "Pictures", "Predictions", "Probes", "Throughput"]

"""Read weights of any known format into a ViT, with a report, and write them."""

from vitlit.weights.door import LoadReport, load, load_weights, network, preprocess, read
from vitlit.weights.files import locate
from vitlit.weights.save import save_weights
from vitlit.weights.weights import Weights

__all__ = ["LoadReport", "Weights", "load", "load_weights", "locate", "network", "preprocess", "read", "save_weights"]

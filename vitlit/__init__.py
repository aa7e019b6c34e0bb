"""vitlit pretrains and finetunes Vision Transformers with PyTorch Lightning.

Nothing is imported until it is asked for: `import vitlit` loads neither torch nor Lightning nor W&B.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlit.errors import UserError
    from vitlit.model import ViT
    from vitlit.weights import LoadReport, load, load_weights, save_weights

__version__ = "0.1.0"
__all__ = ["LoadReport", "UserError", "ViT", "load", "load_weights", "save_weights"]

_HOMES = {
    "ViT": "vitlit.model",
    "LoadReport": "vitlit.weights",
    "load": "vitlit.weights",
    "load_weights": "vitlit.weights",
    "save_weights": "vitlit.weights",
    "UserError": "vitlit.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vitlit' has no attribute {name!r}")

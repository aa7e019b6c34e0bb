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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vitlit' has no attribute {name!r}")
    home = {"UserError": "errors", "ViT": "model"}.get(name, "weights")
    return getattr(import_module(f"vitlit.{home}"), name)

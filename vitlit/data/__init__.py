"""Folders of images as batches. Imported lazily: reading weights needs the transforms, but not Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlit.data.module import ImageFolderData

__all__ = ["ImageFolderData"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("vitlit.data.module"), name)
    raise AttributeError(f"module 'vitlit.data' has no attribute {name!r}")

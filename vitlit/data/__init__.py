"""Folders of images as batches. Imported lazily: reading weights needs the transforms, but not Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlit.data.module import ImageFolderData
    from vitlit.images.preprocess import Preprocess

__all__ = ["ImageFolderData", "Preprocess"]


def __getattr__(name: str) -> Any:
    if name == "ImageFolderData":
        return import_module("vitlit.data.module").ImageFolderData
    if name == "Preprocess":
        return import_module("vitlit.images.preprocess").Preprocess
    raise AttributeError(f"module 'vitlit.data' has no attribute {name!r}")

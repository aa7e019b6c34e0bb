"""Objects as plain values, from which a checkpoint rebuilds its stage without executing anything."""

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from vitlit.errors import UserError
from vitlit.model import ViT


def describe(value: Any) -> Any:
    """Turn an object into plain values: a ViT, a class or a `functools.partial` of one into {class_path, init_args}."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if type(value) is ViT:
        return {"class_path": "vitlit.model.ViT", "init_args": replace(value.config, num_classes=0).plain()}
    if inspect.isabstract(value):
        raise UserError(f"{path_of(value)} is a base class; name one that is derived from it")
    if inspect.isclass(value):
        return {"class_path": path_of(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return describe(asdict(value))
    if isinstance(value, functools.partial):
        # jsonargparse makes a partial of its own instantiator, with the class as an argument.
        classes = [item for item in (value.func, *value.args) if inspect.isclass(item)]
        if len(classes) == 1:
            return {**describe(classes[0]), "init_args": describe(dict(value.keywords))}
    raise UserError(f"{value!r} cannot be stored in a checkpoint; give a class or a functools.partial of one")


def path_of(cls: type) -> str:
    """The public path of a class, through the outermost package that has it, such as vitlit.stages.Finetune."""
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def subclasses(base: Any) -> Iterator[Any]:
    yield base
    for derived in base.__subclasses__():
        yield from subclasses(derived)

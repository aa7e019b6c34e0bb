"""Objects as plain values, from which a checkpoint rebuilds its stage without executing anything."""

import functools
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from vitlit.errors import UserError
from vitlit.model import ViT

# Packages whose classes a config or a checkpoint may name; VITLIT_TRUST adds your own.
TRUSTED = ("vitlit", "torch.optim", "torchvision.transforms", "torchmetrics", "lightning.pytorch", "lightning.fabric")


def trusted() -> list[str]:
    """Packages and modules whose classes a config or a checkpoint may name."""
    return [*TRUSTED, *os.environ.get("VITLIT_TRUST", "").replace(",", " ").split()]


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


def check_class_paths(value: Any, told: str = "") -> None:
    """Raise UserError if a class path is outside the trusted packages, of which the values' run was `told` some."""
    if isinstance(value, dict):
        for key in ("class_path", "_class_path", "_instantiator"):
            path = value.get(key)
            if path is not None and "." in str(path) and not str(path).startswith(tuple(f"{t}." for t in trusted())):
                asked = f"VITLIT_TRUST={told or str(path).partition('.')[0]}"
                remedy = f"its run was made with {asked}, so set that" if told else f"set {asked}"
                outside = f"class {path} is outside the packages that may be named ({' '.join(trusted())})"
                raise UserError(f"{outside}; if you trust its code, {remedy}")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            check_class_paths(item, told)


def path_of(cls: type) -> str:
    """The public path of a class, through the outermost package that has it, such as vitlit.stages.Finetune."""
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def subclasses(base: Any) -> Iterator[Any]:
    """A class and all that are derived from it."""
    yield base
    for derived in base.__subclasses__():
        yield from subclasses(derived)

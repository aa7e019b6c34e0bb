"""The errors a user sees as one line."""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import formatannotation
from math import inf
from os import PathLike
from shutil import which
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A user's mistake: `vitlit` prints the message on one line and exits with code 2.

    The message names the thing and the remedy. It is the only argument, since an exception from a data-loading worker
    is rebuilt from its text.
    """


class CommandParser(ArgumentParser):
    """An argument parser that raises `UserError`, and prints its description unchanged."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(command, None, about, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; {self.prog} --help says more")


def check_types(owner: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """UserError for the first value that is not of its type in `owner`: a dataclass, or a function with arguments."""
    for name, hint in get_type_hints(owner).items():
        if name in values and not fits(value := values[name], hint):
            given = " ".join(repr(value).split())[:80]
            raise UserError(f"{prefix}{name} is {given} ({type(value).__name__}); give {formatannotation(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; of lists and tuples the items too. A path is a text, and no bool is a number."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if kind is Literal:
        return value in inner
    if kind in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        each = inner if kind is tuple and inner[-1] is not ... else inner[:1] * len(value)
        return len(value) == len(each) and all(map(fits, value, each))
    wider: Any = {float: int | float, str: str | PathLike}.get(kind, kind)
    return kind is Any or (isinstance(value, wider) and (kind is bool or not isinstance(value, bool)))


def check_range(owner: str, least: float, most: float = inf, **options: float | None) -> None:
    """UserError for the first of an owner's options that is given and not from `least` to `most`."""
    for name, value in options.items():
        if value is not None and not least <= value <= most:
            takes = f"at least {least}" if most == inf else f"from {least} to {most}"
            raise UserError(f"{owner}: {name} is {value}; give {takes}")


def need(*packages: str) -> None:
    """UserError unless these optional packages can be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"this needs {package}: pip install {' '.join(packages)}") from error


def without_compiler(device: str) -> str:
    """What torch's compilers lack on this machine, with the remedy; else nothing. The device is cpu or cuda."""
    gpu = device == "cuda"
    if gpu and find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    compilers = [os.environ.get("CC"), "gcc", "clang"] if gpu else [os.environ.get("CXX", "g++")]  # as they look
    return "" if any(map(which, filter(None, compilers))) else "there is no C++ compiler; apt install g++"


def first_difference(theirs: list[str], ours: list[str]) -> str:
    """The first class name of weights that differs from the data's, in words; "" if one list begins the other."""
    pairs = zip(theirs, ours, strict=False)
    return next((f"{their!r} instead of {our!r}" for their, our in pairs if their != our), "")

"""The errors a user sees as one line."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn


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


def first_difference(theirs: list[str], ours: list[str]) -> str:
    """The first class name of weights that differs from the data's, in words; "" if one list begins the other."""
    pairs = zip(theirs, ours, strict=False)
    return next((f"{their!r} instead of {our!r}" for their, our in pairs if their != our), "")

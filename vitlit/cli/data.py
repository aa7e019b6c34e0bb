"""`vitlit data ...`: what is done to data before training."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from vitlit.errors import UserError

HELP = """\
vitlit data NAME OUT
    Write a public data set as OUT/{{train,val}}/CLASS/*. NAME: {names}

vitlit data imagenet TARS OUT
    Unpack ILSVRC 2012 from its archives, the validation images sorted into their classes.

vitlit data check ROOT
    Decode every image and report what would make training, or its numbers, wrong; exit code 1 where something does.

vitlit data shard ROOT OUT
    Pack a folder into tars (WebDataset's), which a run reads from disk, S3, GCS or HTTP as it would read the folder.

vitlit data show RUN --step N
    Print which images a step of a run was trained on.

check and shard have options: `vitlit data check --help`.
"""
COMMANDS = {"check": "vitlit.prepare.check", "shard": "vitlit.prepare.shard", "show": "vitlit.prepare.show"}


def run(arguments: list[str]) -> int:
    """Run a subcommand and return the exit code."""
    from vitlit.prepare import sources

    if not arguments or (arguments[0] not in COMMANDS and not {"-h", "--help"}.isdisjoint(arguments)):
        print(HELP.format(names=" ".join(sources.NAMES)), end="")
        return 0
    name, *rest = arguments
    if name in COMMANDS:
        command: Callable[[list[str]], int] = import_module(COMMANDS[name]).run
        return command(rest)
    if len(rest) == 2 and name == "imagenet":
        from vitlit.prepare import imagenet

        imagenet.unpack(Path(rest[0]), Path(rest[1]))
        return 0
    if len(rest) != 1 or name == "imagenet" or any(word.startswith("-") for word in arguments):
        names = " ".join(sources.NAMES)
        raise UserError(
            f"usage: vitlit data NAME OUT, check ROOT, shard ROOT OUT, show RUN or imagenet TARS OUT; NAME: {names}"
        )
    sources.write(name, Path(rest[0]))
    return 0

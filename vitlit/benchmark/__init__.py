"""`vitlit benchmark ...`: how fast this machine loads images, and how fast it trains a ViT."""

from importlib import import_module

from vitlit.errors import UserError

HELP = """\
vitlit benchmark data ROOT
    Time how a folder or shards are read, and say whether a model would have to wait for them.

vitlit benchmark model
    Time a ViT on this machine: the forward pass, a training step, their memory, the largest batch.

Both have options: see `vitlit benchmark data --help`.
"""


def run(arguments: list[str]) -> int:
    """Run a subcommand and return the exit code."""
    what = next(iter(arguments), "--help")
    if what in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if what not in ("data", "model"):
        raise UserError(f"vitlit benchmark: invalid choice: {what!r} (choose from data, model)")
    return int(import_module(f"vitlit.benchmark.{what}").run(arguments[1:]))

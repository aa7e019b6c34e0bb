"""`vitlit data ...`: commands that prepare data for training."""

from pathlib import Path

from vitlit.errors import UserError
from vitlit.prepare import imagenet, sources

HELP = """\
vitlit data NAME OUT
    Write a public data set as OUT/{{train,val}}/CLASS/*. NAME: {names}

vitlit data imagenet TARS OUT
    Unpack ILSVRC 2012 from its archives, the validation images sorted into their classes.

vitlit data check ROOT
    Decode every image and report what would make training, or its numbers, wrong; exit code 1 for a fault.

vitlit data shard ROOT OUT
    Pack a folder into tars (WebDataset's), which a run reads from disk, S3, GCS or HTTP like the folder itself.

vitlit data show RUN --step N
    Print the images that a step of a run is trained on.

check and shard have options: see `vitlit data check --help`.
"""


def run(arguments: list[str]) -> int:
    """Run a subcommand and return the exit code."""
    names = " ".join(sources.NAMES)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP.format(names=names), end="")
        return 0
    name, *paths = arguments
    if len(paths) != (2 if name == "imagenet" else 1) or any(word.startswith("-") for word in arguments):
        usage = "vitlit data NAME OUT, check ROOT, shard ROOT OUT, show RUN or imagenet TARS OUT"
        raise UserError(f"usage: {usage}; NAME: {names}")
    if name == "imagenet":
        imagenet.unpack(Path(paths[0]), Path(paths[1]))
    else:
        sources.write(name, Path(paths[0]))
    return 0

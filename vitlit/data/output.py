"""The folder that a command makes: whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitlit.errors import UserError


@contextmanager
def whole_folder(out: Path, resume: bool = False) -> Iterator[Path]:
    """A folder to write into, `OUT.partial` beside `out`, which takes its name after the block.

    Args:
        out: the folder to make; where it exists it must be empty.
        resume: leave what is in `OUT.partial`, there before the block or where the block fails, to the same command
            given again; else it is removed.

    Raises:
        UserError: `out` is not empty or cannot be made.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another folder, or remove it first")
    target = out.resolve()
    partial = target.with_name(f"{target.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=resume)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}): name another folder") from error
    try:
        yield partial
        partial.rename(target)
    finally:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)

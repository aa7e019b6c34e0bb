"""Which messages of Lightning a command shows."""

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch

QUIET = (
    r".*LeafSpec.*",  # lightning 2.6 with torch 2.15
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*exists and is not empty.*",
    r".*could not find the monitored key.*",  # the metric is known, so nothing was validated; the summary says so
    r".*The dirpath has changed.*",  # the run was moved
    r".*callbacks used to create the checkpoint.*",  # evaluation has no callbacks
    r".*WeightAveraging callback with a model that overrides.*",  # only fsdp2 needs the override
    r".*PyTorch Profiler default schedule will be overridden.*",  # of the sanity check
    r".*recommended to use `self.log\(.*sync_dist=True\)`.*",  # torchmetrics does that
)


def show_asked() -> None:
    """Print what callbacks and profilers of Lightning say, which were asked for; of the rest, warnings that help."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    asked, warned = logging.StreamHandler(sys.stdout), logging.StreamHandler()
    folders = tuple(str(Path(lightning.pytorch.__path__[0], name)) for name in ("callbacks", "profilers"))
    asked.addFilter(lambda record: record.levelno < logging.WARNING and record.pathname.startswith(folders))
    warned.setLevel(logging.WARNING)
    for library in (logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")):
        library.handlers, library.propagate = [asked, warned], False

"""TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files, to which a continued run adds; `tensorboard --logdir runs` shows all runs by name.

    Args:
        save_dir: the files go to `save_dir/name`; by default into the run's folder, else the working directory.
        name: the folder of the files.
        version: a folder below it; by default none.
        prefix: of the names of metrics.
    """

    def __init__(
        self, save_dir: str | Path | None = None, name: str = "tensorboard", version: str = "", prefix: str = ""
    ) -> None:
        super().__init__(save_dir or ".", name, version, default_hp_metric=False, prefix=prefix)

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """Show the resolved config under Text."""
        self.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int) -> None:
        for path in images:
            self.experiment.add_image(key, np.array(Image.open(path).convert("RGB")), step, dataformats="HWC")

"""TensorBoard."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger


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

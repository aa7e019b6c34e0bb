"""MLflow."""

from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only


class MLflow(MLFlowLogger):
    """Lightning's logger, whose run also gets the config and pictures, as artifacts; `pip install mlflow`."""

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        self.experiment.log_dict(self.run_id, config, "config.json")

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int) -> None:
        for path in images:
            self.experiment.log_artifact(self.run_id, path)

"""Trackio, a local tracker with a page of its own."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from vitlit.errors import need


class Trackio(Logger):
    """A run in Trackio's local database, with its config and pictures: `pip install trackio`, `trackio show`.

    Args:
        project: the runs that are shown together.
        name: of the run; one of this name is continued.
    """

    version = ""

    def __init__(self, project: str = "vitlit", name: str | None = None) -> None:
        super().__init__()
        need("trackio")
        self.project, self._name = project, name
        self._run: Any = None

    @property
    def name(self) -> str | None:
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, begun at the first use."""
        if self._run is None:
            import trackio

            self._run = trackio.init(project=self.project, name=self._name, resume="allow", embed=False)
        return self._run

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `log_config` stores the whole config."""

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        self.experiment.config.update(config)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_image(self, key: str, images: list[str], step: int) -> None:
        import trackio

        for path in images:
            self.experiment.log({key: trackio.Image(path)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

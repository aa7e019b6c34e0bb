"""Weights & Biases. wandb is imported where it is used: evaluation and other ranks have no use for it."""

import os
import secrets
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from vitlit.files import expand, from_here
from vitlit.loggers.wandb_mode import Mode, decide

ONLINE_WITHIN = 15  # seconds until a run without an answer from the server continues offline
UPLOAD_WITHIN = 300  # seconds that the end of a run may wait for uploads
MOST_PAIRS = 2500  # of label and prediction: the whole matrix of 50 classes, else the most frequent


class Wandb(WandbLogger):
    """A Weights & Biases run that never prompts or hangs, and says in one line where it logs.

    Without a key, or an answer from the server within 15 seconds, the run stays on disk, and `closing_line` uploads it.

    Args:
        project: by default `WANDB_PROJECT`, or "vitlit".
        entity: the user or team that owns the run.
        group: the group of runs that it belongs to.
        tags: its tags.
        name: its display name.
        id: its id; give the `version` of a run to continue it. By default a new one.
        save_dir: its files go to `save_dir/wandb`; by default in the working directory.
        mode: auto is `WANDB_MODE` if that is set, else online with a key and offline without.
        pictures: whether images go to W&B: those of `log_mistakes`, made small, and of `vitlit.callbacks.Pictures`.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        name: str | None = None,
        id: str | None = None,
        save_dir: str | Path | None = None,
        mode: Mode = "auto",
        pictures: bool = True,
    ) -> None:
        patience = {"init_timeout": ONLINE_WITHIN, "finish_timeout": UPLOAD_WITHIN, "finish_timeout_raises": True}
        super().__init__(
            project=project or os.environ.get("WANDB_PROJECT") or "vitlit",
            entity=entity,
            group=group,
            tags=tags,
            name=name,
            id=id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),  # a sweep's agent sets WANDB_RUN_ID
            save_dir=expand(save_dir or os.environ.get("WANDB_DIR") or "."),
            settings={"silent": True, **patience},
        )
        del self._wandb_init["anonymous"]  # its presence makes wandb warn
        self.mode, self.pictures = mode, pictures
        self.folder: Path | None = None  # the run's files, once it has begun
        self._url: str | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, begun at the first use; on ranks other than 0 a stand-in that does nothing."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        why = self._settle_mode() if wandb.run is None else ""
        run = super().experiment
        self._id = run.id
        if run.disabled:
            print("W&B: disabled")
            return run
        self.folder = Path(run.sync_dir).absolute()
        # Tables wait for `wandb sync` next to the run; by default in the home directory of this machine.
        os.environ.setdefault("WANDB_DATA_DIR", str(self.folder.parent))
        self._url = None if run.offline else run.url
        reason = f" ({why})" if why else ""
        print(f"W&B: offline{reason}; afterwards: {self.closing_line()}" if run.offline else f"W&B: online, {run.url}")
        return run

    def _settle_mode(self) -> str:
        """Begin online if that is wanted and works; return why not if it does not."""
        # Without a network wandb's own telemetry delays the end of the process by tens of seconds.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        Path(self.save_dir or ".").mkdir(parents=True, exist_ok=True)
        mode, why = decide(self.mode)
        if mode == "online":
            self._wandb_init.update(mode=mode, resume="allow")
            try:
                _ = super().experiment
                return ""
            except Exception as error:  # training continues, whatever is wrong with the network
                import wandb

                mode, why = "offline", str(error).partition("\n")[0]
                wandb.teardown()  # the failed attempt still holds the run's id
        self._wandb_init.update(mode=mode, resume=None)
        return why

    def closing_line(self) -> str | None:
        """The command that uploads an offline run (every part of one that was continued), or an online run's URL."""
        if self.folder is None or self._url is not None:
            return self._url
        return _sync(*sorted(self.folder.parent.glob(f"offline-run-*-{self.version}")))

    @rank_zero_only
    def close(self) -> None:
        """End the run: its files are complete, and another may begin in this process."""
        if self._experiment is None:
            return
        run, self._experiment = self._experiment, None
        try:
            run.finish()
        except TimeoutError:
            print(f"W&B: not all was uploaded; afterwards: {_sync(Path(run.sync_dir).absolute())}")
        if self._url is None:
            import wandb

            wandb.teardown()  # `finish` returns before an offline run's last rows are on disk

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """Store the resolved config under the key `config`."""
        self.experiment.config.update({"config": config}, allow_val_change=True)

    @rank_zero_only
    def log_classes(self, classes: list[str]) -> None:
        """Store the class names, in the order of their labels, under the key `classes`."""
        self.experiment.config.update({"classes": classes}, allow_val_change=True)

    @rank_zero_only
    def log_mistakes(
        self, worst: Sequence[Mapping[str, str]], counts: Counter[tuple[str, str]], images: Mapping[str, Any]
    ) -> None:
        """Log the tables `mistakes`, rows of validation.csv with `images` by path, and `confusion`, counts by pair."""
        import wandb

        columns: list[str | int] = ["path", "label", "prediction", "probability"]
        rows: list[list[Any]] = [
            [row["path"], row["label"], row["prediction"], float(row["probability"])] for row in worst
        ]
        if self.pictures:
            found = {path: wandb.Image(image, file_type="jpg") for path, image in images.items()}
            columns, rows = ["image", *columns], [[found.get(row[0]), *row] for row in rows]
        pairs = [[*pair, count] for pair, count in counts.most_common(MOST_PAIRS)]
        confusion = wandb.Table(columns=["label", "prediction", "count"], data=pairs)
        self.experiment.log({"mistakes": wandb.Table(columns=columns, data=rows), "confusion": confusion})


def _sync(*folders: Path) -> str:
    return shlex.join(["wandb", "sync", *map(from_here, folders)])

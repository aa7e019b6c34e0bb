"""What a ViT makes of the same images while it learns, as a picture."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from vitlit.data.stream import spread
from vitlit.errors import check_range
from vitlit.files import whole_file
from vitlit.images import raw
from vitlit.stages.stage import on_device


class Pictures(Callback):
    """In each validation, draw what the weights that go on make of the same images, into pictures.png and W&B.

    The file is that of the latest, W&B keeps all. A plain loader's dataset must support indexing; others, and several
    loaders, give no picture.

    Args:
        images: how many, spread over the validation images; 0 leaves pictures out.
    """

    def __init__(self, images: int = 8) -> None:
        check_range("Pictures", 0, images=images)
        self.images = images

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        # Not before: now an EMA has put its weights in place.
        if batch_idx or not self.images or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loader = trainer.val_dataloaders
        share = spread(loader, self.images)
        if share is None:
            return
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            chosen = DataLoader(loader.dataset, share.count, sampler=share, collate_fn=loader.collate_fn)
            few = on_device(trainer, next(iter(chosen)))
            shown = {"images": few.views[0], **pl_module.pictures(few)}  # on every rank: FSDP's compute together
        if not trainer.is_global_zero:
            return
        title = f"{type(pl_module.objective).__name__}, epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
        figure = draw(title, {name: row.float().cpu() for name, row in shown.items()}, pl_module.vit.preprocess)
        path = Path(trainer.default_root_dir) / "pictures.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                figure.savefig(partial, format="png")
        except OSError as error:  # training goes on all the same
            print(f"vitlit: warning: cannot write {path}: {error.strerror}", flush=True)
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image") and getattr(logger, "pictures", True):
                logger.log_image("pictures", [str(path)], trainer.global_step - 1)  # Lightning counts from 0


def draw(title: str, shown: dict[str, Tensor], preprocess: Any) -> Figure:
    """Rows of images and maps with their names; pixels of unknown preprocessing are stretched from least to most."""
    low, high = shown["images"].aminmax()
    moments = ([low], [high - low]) if preprocess is None else (preprocess.mean, preprocess.std)
    mean, std = (torch.tensor(moment).view(-1, 1, 1) for moment in moments)
    count, size = len(shown["images"]), shown["images"].shape[2:]
    figure = Figure((2 * count, 2.3 * len(shown) + 0.3), layout="constrained")
    figure.suptitle(title)
    for place, (name, row) in enumerate(shown.items(), start=1):
        flat = row.ndim == 3
        pixels = row[:, None] if flat else raw.shown(row * std + mean)
        pixels = F.interpolate(pixels, size, mode="bilinear" if flat else "nearest").clamp(0, 1)
        strip = make_grid(pixels, count, size[0] // 28, pad_value=torch.nan if flat else 1).permute(1, 2, 0).numpy()
        axes = figure.add_subplot(len(shown), 1, place, title=name, frame_on=False, xticks=[], yticks=[])
        axes.imshow(strip[..., 0] if flat else strip, "viridis", vmin=0, vmax=1)
    return figure

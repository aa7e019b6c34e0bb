"""Batches of images whose pixels a device holds, cut there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vitlit.data.dataset import Images
from vitlit.data.decoded import Decoded
from vitlit.data.stream import Sample
from vitlit.data.transforms import TrainTransform
from vitlit.data.workers import whole
from vitlit.images.resample import cut_all
from vitlit.seeds import sample_seed


@dataclass(eq=False)
class ImagesOnDevice(Dataset[Any]):
    """The batches of `images`, with the same draws and, within a level, the same pixels, made on a device."""

    images: Images
    kept: Decoded
    collate = staticmethod(whole)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[Any]) -> list[Any]:
        images, indices, training, views = self.images, items, [], []
        if isinstance(items[0], Sample):
            indices, training = [self._readable(item) for item in items], [items[0].position]
        for view, transform in enumerate((images.transform, *images.further)):
            seeds = [
                sample_seed(images.seed, item.epoch, item.index, item.repeat, view) if training else 0 for item in items
            ]
            views.append(self._cut(indices, transform, seeds))
        labels = default_collate([images.label(index) for index in indices])
        return [views[0], labels, torch.tensor(indices), *training, *views[1:]]

    def _readable(self, item: Sample) -> int:
        """The number of a training sample's image, or of the one that replaces it."""
        return next(index for index in self.images.candidates(item) if self.kept.sizes[index, 0])

    def _cut(self, indices: list[int], transform: Any, seeds: list[int]) -> Tensor:
        crop = transform.crop if isinstance(transform, TrainTransform) else transform
        sizes, cuts = self.kept.sizes[indices].tolist(), []
        with torch.random.fork_rng(devices=[]):
            for size, seed in zip(sizes, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                cuts.append(transform.plan(*size))
        places = zip(self.kept.starts[indices].tolist(), (width for _, width in sizes), strict=True)
        return cut_all(self.kept.pixels, list(places), cuts, crop)

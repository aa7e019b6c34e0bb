"""Images of an index as samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitlit.data.decode import decode_bytes
from vitlit.data.index import Index
from vitlit.data.stream import Sample, seed_sample


class Images(Dataset[tuple[Any, ...]]):
    """Images of an index, transformed: (uint8 (H, W, 3), label, index), and in training the position in the stream.

    The channels come last, as decoders and resizing leave them, so that a batch is stacked by plain copies.

    An item is an index, or a Sample in training, which seeds the transform's draws. A label is an int, or float
    (classes,) of zeros and ones where an image may have several.
    """

    def __init__(self, index: Index, transform: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        self.index, self.transform, self.seed = index, transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int | Sample) -> tuple[Any, ...]:
        if isinstance(item, int):
            return channels_last(self.transform(self._decode(item))), self._label(item), item
        image = self._decode(item.index)
        with torch.random.fork_rng(devices=[]):  # without workers this is the model's generator, too
            seed_sample(self.seed, item.epoch, item.index, item.repeat)
            image = self.transform(image)
        return channels_last(image), self._label(item.index), item.index, item.position

    def _decode(self, index: int) -> Tensor:
        return decode_bytes(self.index.read(index), self.index.path(index))

    def _label(self, index: int) -> int | Tensor:
        label = self.index.labels[index]
        return int(label) if label.ndim == 0 else torch.from_numpy(label).float()


def channels_last(image: Tensor) -> Tensor:
    """(3, H, W) -> (H, W, 3), dense."""
    return image.permute(1, 2, 0).contiguous()

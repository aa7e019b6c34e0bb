"""Images of an index as samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitlit.data.bad_images import BadImages
from vitlit.data.index import Index, StorageUserError
from vitlit.data.stream import Sample
from vitlit.data.transforms import Transform
from vitlit.errors import UserError
from vitlit.images.decode import decode_bytes
from vitlit.seeds import REPLACE, mix, seeded_sample


class Images(Dataset[tuple[Any, ...]]):
    """Images of an index, transformed: (uint8 (H, W, 3), label, index), in training (..., position, *further views).

    The channels come last, as decoders and resizing leave them, so that a batch is stacked by plain copies.

    An item is an index, or a Sample in training, which seeds the transform's draws. A label is an int, or float
    (classes,) of zeros and ones where an image may have several. The position is that in the training stream.

    Args:
        index: of the images.
        transform: uint8 (3, H, W) -> uint8 (3, height, width).
        seed: of the draws.
        bad: the list of images that cannot be read. In training, another of the same class comes in place of one,
            always the same for the same (seed, epoch, index, repeat); in prediction, a black image of the index -1.
            None for an error that names it.
        further: transforms that make further views of a training image, uint8 (height, width, 3) each.
        photos: whether the images are to be predicted, so that no metric needs them all.
    """

    def __init__(
        self,
        index: Index,
        transform: Transform,
        seed: int = 0,
        bad: BadImages | None = None,
        further: Sequence[Transform] = (),
        photos: bool = False,
    ) -> None:
        self.index, self.transform, self.seed, self.bad = index, transform, seed, bad
        self.further, self.photos = further, photos

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int | Sample) -> tuple[Any, ...]:
        if isinstance(item, int):
            image, index = self._eval_image(item)
            return channels_last(self.transform(image)), self._label(item), index
        image, index = self._sample(item)
        views = []
        for view, transform in enumerate((self.transform, *self.further)):
            with seeded_sample(self.seed, item.epoch, item.index, item.repeat, view):
                views.append(channels_last(transform(image)))
        return views[0], self._label(index), index, item.position, *views[1:]

    def _decode(self, index: int) -> Tensor:
        return decode_bytes(self.index.read(index), self.index.path(index))

    def _eval_image(self, index: int) -> tuple[Tensor, int]:
        try:
            return self._decode(index), index
        except StorageUserError:
            raise
        except UserError as error:
            if self.bad is None:
                needed = "evaluation takes every image: restore or remove it"
                remedy = "--data.on_bad_image skip leaves it out" if self.photos else needed
                raise UserError(f"{error}; {remedy}") from error
            self.bad.note(self.index.path(index), str(error))
            return torch.zeros(3, 8, 8, dtype=torch.uint8), -1

    def _sample(self, item: Sample) -> tuple[Tensor, int]:
        """An image for training, and its index: the item's where it can be read."""
        try:
            return self._decode(item.index), item.index
        except StorageUserError:
            raise
        except UserError as error:
            if self.bad is None:
                raise UserError(f"{error}; --data.on_bad_image skip trains without it") from error
            self.bad.note(self.index.path(item.index), str(error))
        labels = self.index.labels
        alike = labels == labels[item.index]
        others = np.flatnonzero(alike if labels.ndim == 1 else alike.all(1))
        drawn = np.argsort(mix(REPLACE, self.seed, item.epoch, item.index, item.repeat, others), kind="stable")
        for index in others[drawn].tolist():
            try:
                return self._decode(index), index
            except StorageUserError:
                raise
            except UserError as error:
                self.bad.note(self.index.path(index), str(error))
        raise UserError(f"no image can be read of the class of {self.index.path(item.index)}; see {self.bad.file}")

    def _label(self, index: int) -> int | Tensor:
        label = self.index.labels[index]
        return int(label) if label.ndim == 0 else torch.from_numpy(label).float()


def channels_last(image: Tensor) -> Tensor:
    """(3, H, W) -> (H, W, 3), dense."""
    return image.permute(1, 2, 0).contiguous()

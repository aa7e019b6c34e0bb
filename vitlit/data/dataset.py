"""Images of an index as samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vitlit.data.bad_images import BadImages
from vitlit.data.decoded import Decoded
from vitlit.data.index import Index, StorageUserError
from vitlit.data.stream import Sample
from vitlit.data.transforms import Transform
from vitlit.errors import UserError
from vitlit.images.decode import captured_stderr, reason
from vitlit.images.preprocess import Preprocess
from vitlit.images.resample import cut_all
from vitlit.seeds import PHOTOMETRIC, REPLACE, mix, mix_one, seeded_sample

REMOVE = "remove or replace it; `vitlit data check` names all such images"
SKIP = "--data.on_bad_image skip trains and predicts without it, but evaluates on every image"
AS_RGB = Preprocess((224, 224))


@dataclass(eq=False)
class Images(Dataset[tuple[Any, ...]]):
    """Images of an index, transformed: (pixels (H, W, C), label, index), in training (..., position, *further views).

    Channels come last, as decoding leaves them, so that a batch is stacked by plain copies. `bad` lists images that
    cannot be read, which are an error without it: in training another of the same class, always the same one, replaces
    each; else it is black, with the index -1. `preprocess` decodes files. `kept` images are not decoded again. `keyed`
    samples end with what their colours are drawn from.
    """

    index: Index
    transform: Transform
    seed: int = 0
    bad: BadImages | None = None
    further: Sequence[Transform] = ()
    keyed: bool = False
    preprocess: Preprocess = AS_RGB
    kept: Decoded | None = None
    remedy: str = SKIP
    _told: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool).share_memory_(), init=False)

    def __len__(self) -> int:
        return len(self.index)

    @staticmethod
    def collate(samples: list[Any]) -> list[Any]:
        """A batch, with the first sample's position alone. It and keys stay on the host: reading back would wait."""
        images, labels, indices, *training = default_collate(samples)
        further = [part.numpy() if part.ndim == 1 else part for part in training[1:]]
        return [images, labels, indices, *([int(training[0][0]), *further] if training else [])]

    def __getitem__(self, item: int | Sample) -> tuple[Any, ...]:
        if isinstance(item, int):
            image = self._image(item)
            pixels = self.preprocess.blank((8, 8)) if image is None else image
            return channels_last(self.transform(pixels)), self.label(item), -1 if image is None else item
        pairs = ((index, self._image(index)) for index in self.candidates(item))
        index, image = next((index, image) for index, image in pairs if image is not None)
        views = []
        for view, transform in enumerate((self.transform, *self.further)):
            with seeded_sample(self.seed, item.epoch, item.index, item.repeat, view):
                views.append(channels_last(transform(image)))
        key = [mix_one(PHOTOMETRIC, self.seed, *item[:3]) >> 1] if self.keyed else []
        return views[0], self.label(index), index, item.position, *views[1:], *key

    def _image(self, index: int) -> Tensor | None:
        return self.decode(index) if self.kept is None else self.kept[index]

    def decode(self, index: int) -> Tensor | None:
        """An image, or None after listing it as bad."""
        path = self.index.path(index)
        try:
            data = self.index.read(index)
            if not data.startswith(b"\xff\xd8"):
                return self.preprocess.decode(data, path)
            with captured_stderr() as said:  # libjpeg's words, without a name
                image = self.preprocess.decode(data, path)
            if said and not self._told:
                self._told.fill_(True)  # for all workers
                name_all = "`vitlit data check` names all such images"
                print(f"vitlit: warning: {path} is damaged, but was decoded ({said[0]}); {name_all}", flush=True)
            return image
        except StorageUserError:
            raise
        except UserError as error:
            if isinstance(error.__cause__, ImportError):  # a package is missing, nothing wrong with the image
                raise
            if self.bad is None:
                raise UserError(f"{error}; {self.remedy}") from error
            self.bad.note(path, reason(error, path))
            return None

    def candidates(self, item: Sample) -> Iterator[int]:
        """The image of a training sample, then those that replace it if it cannot be read."""
        yield item.index
        labels = self.index.labels.reshape(len(self), -1)
        alike = np.flatnonzero((labels == labels[item.index]).all(1) | (labels.dtype.kind == "f"))
        drawn = np.argsort(mix(REPLACE, self.seed, item.epoch, item.index, item.repeat, alike), kind="stable")
        yield from alike[drawn].tolist()
        assert self.bad is not None
        raise UserError(f"no image can be read of the class of {self.index.path(item.index)}; see {self.bad.file}")

    def label(self, index: int) -> int | Tensor:
        label = self.index.labels[index]
        if label.ndim == 0 and label.dtype.kind == "f":
            return torch.tensor(float(label))  # float32
        return int(label) if label.ndim == 0 else torch.from_numpy(label).float()


def channels_last(image: Tensor) -> Tensor:
    """(C, H, W) -> (H, W, C), dense."""
    return image.permute(1, 2, 0).contiguous()


@dataclass(eq=False)
class ImagesOnDevice(Dataset[Any]):
    """Batches of `images` whose pixels are kept on a device, made there: the same draws, and pixels within a level."""

    images: Images
    kept: Decoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[Any]) -> list[Any]:
        training = [items[0].position] if isinstance(items[0], Sample) else []
        samples = items if training else [Sample(0, item, 0, 0) for item in items]
        indices = [next(i for i in self.images.candidates(sample) if self.kept.sizes[i, 0]) for sample in samples]
        labels = default_collate([self.images.label(index) for index in indices])
        transforms = (self.images.transform, *self.images.further)
        views = [self._view(view, transform, indices, samples) for view, transform in enumerate(transforms)]
        drawn = [mix_one(PHOTOMETRIC, self.images.seed, *sample[:3]) >> 1 for sample in samples if self.images.keyed]
        if not training:  # of evaluation, none stands in for an unreadable image
            indices = [index if index == item else -1 for index, item in zip(indices, items, strict=True)]
        return [views[0], labels, torch.tensor(indices), *training, *views[1:], *([np.array(drawn)] if drawn else [])]

    def _view(self, view: int, transform: Any, indices: list[int], samples: list[Sample]) -> Tensor:
        sizes, cuts = self.kept.sizes[indices].tolist(), []
        for size, sample in zip(sizes, samples, strict=True):
            with seeded_sample(self.images.seed, sample.epoch, sample.index, sample.repeat, view):
                cuts.append(transform.plan(*size))
        places = zip(self.kept.starts[indices].tolist(), (width for _, width in sizes), strict=True)
        return cut_all(self.kept.pixels, list(places), cuts, getattr(transform, "crop", transform))

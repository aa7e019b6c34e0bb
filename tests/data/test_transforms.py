"""What training does to a sample: a function of seed, epoch and index."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from vitlit.data import ImageFolderData, Preprocess
from vitlit.data.augment import TimmRandAugment
from vitlit.data.dataset import Images
from vitlit.data.folder import scan_train
from vitlit.data.stream import Sample, TrainStream
from vitlit.data.transforms import train_transform
from vitlit.errors import UserError
from vitlit.images.crops import InceptionCrop, PadCrop, ResmallCrop, SimpleCrop


def samples(root: Path, workers: int, seed: int = 0, position: int = 0) -> tuple[Tensor, Tensor]:
    """One epoch's images and indices, sorted by the indices."""
    _, index, _ = scan_train(root)
    dataset = Images(
        index, train_transform(Preprocess((16, 16), interpolation="bicubic"), "random_resized", (0.3, 1.0), 0.5), seed
    )
    loader = DataLoader(dataset, 8, sampler=TrainStream(len(index), 8, 5, lambda: position), num_workers=workers)
    batches = list(loader)
    images, indices = torch.cat([b[0] for b in batches]), torch.cat([b[2] for b in batches])
    return images[indices.argsort()], indices.sort().values


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than there are cores
def test_a_training_sample_is_a_function_of_seed_epoch_and_index(few: Path) -> None:
    torch.manual_seed(1)
    images, indices = samples(few, workers=0)
    torch.manual_seed(2)
    assert indices.tolist() == list(range(40))
    for workers in (1, 2, 4):
        again, same_indices = samples(few, workers)
        assert indices.tolist() == same_indices.tolist()
        assert torch.equal(images, again)
    for other in (samples(few, 0, position=5)[0], samples(few, 0, seed=1)[0]):  # the next epoch, another seed
        assert (images != other).flatten(1).any(1).float().mean() > 0.9


def test_an_item_is_what_the_index_and_the_sample_say(few: Path) -> None:
    _, index, _ = scan_train(few)
    dataset = Images(index, v2.RandomCrop((4, 4)), 1)
    image, label, number = dataset[13]
    assert (image.shape, label, number) == ((4, 4, 3), 1, 13)
    image, label, number, position = dataset[Sample(2, 13, 0, 77)]
    assert (label, number, position) == (1, 13, 77)
    assert torch.equal(dataset[Sample(2, 13, 0, 99)][0], image)
    assert any((dataset[Sample(2, 13, repeat, 77)][0] != image).any() for repeat in (1, 2, 3))


def test_drawing_a_sample_leaves_the_models_generator_alone(few: Path) -> None:
    _, index, _ = scan_train(few)
    dataset = Images(
        index, train_transform(Preprocess((16, 16), interpolation="bicubic"), "random_resized", (0.3, 1.0), 0.5)
    )
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dataset[Sample(2, 7, 0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_training_crops_have_the_areas_asked_for_and_half_of_them_are_flipped() -> None:
    ramp = torch.arange(200).expand(3, 200, 200).to(torch.uint8)  # brightness is the column
    torch.manual_seed(0)
    transform = train_transform(Preprocess((40, 40), interpolation="bilinear"), "random_resized", (0.25, 0.25), 0.5)
    spans = torch.stack([transform(ramp)[0, 20].double()[[0, -1]] for _ in range(200)])
    widths = (spans[:, 1] - spans[:, 0]).abs() * 40 / 39
    assert 80 <= widths.min() <= widths.max() <= 122  # a quarter of the area, aspect 3/4 to 4/3: 87 to 115
    assert 0.4 < (spans[:, 1] < spans[:, 0]).double().mean() < 0.6
    never = train_transform(Preprocess((40, 40), interpolation="bilinear"), "random_resized", (0.25, 0.25), 0.0)
    assert all(never(ramp)[0, 20, -1] > never(ramp)[0, 20, 0] for _ in range(50))


def test_a_crop_by_name_is_the_one_that_it_names() -> None:
    image = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    size, how = (24, 32), InterpolationMode.BILINEAR
    preprocess = Preprocess(size, interpolation="bilinear")
    by_hand: dict[Any, Callable[[Tensor], Tensor]] = {
        "random_resized": v2.RandomResizedCrop(size, (0.2, 0.5), interpolation=how, antialias=True),
        "inception": InceptionCrop(size, (0.2, 0.5), how),
        "simple": SimpleCrop(size, how),
        "pad": PadCrop(size, interpolation=how),
        "resmall": ResmallCrop(size, how),
        "center": preprocess.crop,
    }
    for name, crop in by_hand.items():
        torch.manual_seed(1)
        found = train_transform(preprocess, name, (0.2, 0.5), 0.0)(image)
        torch.manual_seed(1)
        assert torch.equal(found, crop(image)), name
    with pytest.raises(UserError, match=r"data\.crop is 'middle' .*'random_resized', 'inception'"):
        ImageFolderData("FOLDER", crop="middle")  # type: ignore[arg-type]


def test_transforms_go_to_workers_of_any_start_method() -> None:
    transform = train_transform(Preprocess((16, 16)), "center", (1, 1), 0.0, [TimmRandAugment()])
    again = pickle.loads(pickle.dumps(transform))
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    torch.manual_seed(0)
    expected = transform(image)
    torch.manual_seed(0)
    assert torch.equal(again(image), expected)

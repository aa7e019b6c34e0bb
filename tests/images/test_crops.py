"""Crops: TensorFlow's and torchvision's own draws, and pixels by definition."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vitlit.images.crops import BoxCrop, InceptionCrop, PadCrop, RandomResizedCrop, ResmallCrop, SimpleCrop

CROPS: list[BoxCrop | PadCrop] = [InceptionCrop((8, 6)), SimpleCrop((8, 6)), PadCrop((8, 6))]

# Of 100,000 draws of tf.image.sample_distorted_bounding_box (tensorflow 2.21, area_range (0.05, 1), aspect_ratio_range
# (0.75, 1.33), min_object_covered 0): by the image's (height, width), which share of boxes is at most so large.
TENSORFLOW: dict[tuple[int, int], dict[str, dict[float, float]]] = {
    (375, 500): {
        "top": {5: 0.104, 24: 0.308, 51: 0.5, 93: 0.703, 164: 0.901},
        "left": {19: 0.101, 62: 0.301, 111: 0.501, 172: 0.703, 262: 0.901},
        "height": {124: 0.102, 179: 0.301, 235: 0.501, 291: 0.702, 347: 0.902},
        "width": {125: 0.103, 181: 0.303, 237: 0.502, 294: 0.703, 375: 0.9},
        "area": {15568: 0.1, 32548: 0.3, 56166: 0.5, 85729: 0.7, 125184: 0.9},
        "aspect": {0.85: 0.173, 0.95: 0.345, 1.05: 0.519, 1.15: 0.691, 1.25: 0.864},
    },
    (60, 240): {
        "top": {0: 0.148, 2: 0.315, 6: 0.541, 11: 0.727, 19: 0.903},
        "left": {19: 0.102, 58: 0.301, 97: 0.503, 136: 0.703, 175: 0.904},
        "height": {30: 0.124, 37: 0.329, 43: 0.504, 50: 0.708, 57: 0.913},
        "width": {30: 0.121, 37: 0.326, 43: 0.502, 51: 0.712, 63: 0.909},
        "area": {891: 0.103, 1344: 0.3, 1890: 0.5, 2548: 0.701, 3420: 0.901},
        "aspect": {0.85: 0.175, 0.95: 0.347, 1.05: 0.514, 1.15: 0.689, 1.25: 0.867},
    },
    (7, 5): {
        "top": {0: 0.315, 1: 0.577, 2: 0.782, 3: 0.918},
        "left": {0: 0.645, 1: 0.879, 2: 1.0},
        "height": {2: 0.412, 3: 0.623, 4: 0.833, 5: 0.942},
        "width": {2: 0.366, 3: 0.588, 4: 0.787, 5: 1.0},
        "area": {4: 0.342, 9: 0.552, 16: 0.744, 25: 0.942},
        "aspect": {0.85: 0.16, 0.95: 0.16, 1.05: 0.77, 1.15: 0.77, 1.25: 0.859},
    },
}


def noise(*size: int) -> Tensor:
    return torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def boxes(crop: BoxCrop, size: tuple[int, int], count: int) -> np.ndarray:
    """`count` draws for an image of a size: top, left, height and width of each, (4, count)."""
    torch.manual_seed(0)
    return np.array([crop.draw(*size) for _ in range(count)]).T


@pytest.mark.parametrize("size", list(TENSORFLOW))
def test_inception_boxes_are_distributed_as_tensorflows(size: tuple[int, int]) -> None:
    top, left, height, width = boxes(InceptionCrop((8, 8)), size, 10_000)
    drawn = {"top": top, "left": left, "height": height, "width": width}
    drawn |= {"area": height * width, "aspect": width / height}
    for name, shares in TENSORFLOW[size].items():
        for value, share in shares.items():
            assert np.mean(drawn[name] <= value) == pytest.approx(share, abs=0.02), (name, value)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 5), (60, 240)])
def test_inception_boxes_lie_in_the_image_and_keep_to_the_area(size: tuple[int, int]) -> None:
    crop = InceptionCrop((8, 8), scale=(0.2, 0.7))
    top, left, height, width = boxes(crop, size, 1_000)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]
    share = height * width / (size[0] * size[1])
    assert np.all((share == 1) | ((share >= 0.2) & (share <= 0.7)))


def test_inception_aspects_are_not_torchvisions() -> None:
    size = (400, 400)
    scale, ratio = (0.05, 0.5), (0.5, 2.0)
    _, _, height, width = boxes(InceptionCrop((8, 8), scale, ratio=ratio), size, 3_000)
    peers, image = v2.RandomResizedCrop(8, scale, ratio), torch.empty(3, *size)
    draws = [peers.make_params([image]) for _ in range(3_000)]
    rows, columns = (np.array([draw[side] for draw in draws]) for side in ("height", "width"))
    # Uniform in [0.5, 2] against uniform in the logarithm: a third and a half are below 1.
    assert np.mean(width < height) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean(columns < rows) == pytest.approx(1 / 2, abs=0.03)


def test_inception_takes_the_whole_image_where_no_box_will_do() -> None:
    crop = InceptionCrop((8, 8), scale=(0.9, 1.0))  # no box of these aspects covers 90 % of a strip
    assert crop.draw(10, 100) == (0, 0, 10, 100)


def test_inception_resizes_the_box_it_drew() -> None:
    image = noise(30, 40)
    crop = InceptionCrop((8, 6), interpolation=InterpolationMode.BICUBIC)
    pillow = (
        Image.fromarray(image.permute(1, 2, 0).numpy()).crop((5, 3, 30, 23)).resize((6, 8), Image.Resampling.BICUBIC)
    )
    off = crop.cut(image, (3, 5, 20, 25)).int() - F.pil_to_tensor(pillow).int()
    assert off.abs().max() <= 1


@pytest.mark.parametrize(("size", "resized"), [((31, 20), (12, 8)), ((20, 31), (8, 12)), ((8, 8), (8, 8))])
def test_simple_crop_is_deits(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image, crop = noise(*size), SimpleCrop((8, 8))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    whole = np.asarray(v2.Resize(8, InterpolationMode.BICUBIC)(pillow))
    assert whole.shape == (*resized, 3)
    mirrored = np.pad(whole, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    for top, left in ((0, 0), (3, 5), (8, 8)):
        cropped = crop.padded(image)[:, top : top + 8, left : left + 8]
        expected = torch.from_numpy(mirrored[top : top + 8, left : left + 8]).permute(2, 0, 1)
        assert (cropped.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(5, 3), (3, 5), (100, 7), (12, 8), (13, 8)])
def test_simple_crop_covers_a_size_that_is_not_square(size: tuple[int, int]) -> None:
    height, width = SimpleCrop((12, 8)).resized(*size)
    assert min(height - 12, width - 8) == 0
    assert height / width == pytest.approx(size[0] / size[1], rel=1 / 8)


def test_pad_crop_is_the_cifar_crop() -> None:
    image, crop = noise(32, 32), PadCrop((32, 32))
    pillow = ImageOps.expand(Image.fromarray(image.permute(1, 2, 0).numpy()), 4)
    for top, left in ((0, 0), (4, 4), (2, 7), (8, 8)):
        expected = F.pil_to_tensor(pillow.crop((left, top, left + 32, top + 32)))
        assert torch.equal(crop.padded(image)[:, top : top + 32, left : left + 32], expected)


def test_pad_crop_resizes_an_image_of_another_size() -> None:
    flat = torch.full((3, 50, 20), 9, dtype=torch.uint8)
    assert torch.equal(PadCrop((32, 32)).padded(flat)[:, 4:-4, 4:-4], flat.new_full((3, 32, 32), 9))


def test_resmall_resizes_as_evaluation_does() -> None:
    """`resize_small(448)|random_crop(384)`, or `resize(448)|random_crop(384)`, of big_vision's configs/transfer.py."""
    image = noise(60, 90)
    for squash, size in ((False, [448, 672]), (True, [448, 448])):
        found = ResmallCrop((384, 384), crop_ratio=6 / 7, squash=squash).padded(image)
        assert torch.equal(found, F.resize(image, size, InterpolationMode.BICUBIC, antialias=True))


@pytest.mark.parametrize(
    ("crop", "size", "positions"),
    [
        (PadCrop((6, 4), padding=1), (6, 4), (3, 3)),
        (PadCrop((6, 4), padding=0), (6, 4), (1, 1)),
        (SimpleCrop((4, 4), padding=1), (4, 10), (3, 9)),
        (ResmallCrop((6, 6), crop_ratio=0.75), (8, 11), (3, 6)),
        (ResmallCrop((6, 6), crop_ratio=0.75, squash=True), (8, 8), (3, 3)),
    ],
)
def test_positions_are_as_likely(crop: PadCrop, size: tuple[int, int], positions: tuple[int, int]) -> None:
    image, (height, width) = noise(*size), crop.size
    padded = crop.padded(image)
    places = {
        padded[:, top : top + height, left : left + width].numpy().tobytes(): (top, left)
        for top in range(positions[0])
        for left in range(positions[1])
    }
    assert len(places) == positions[0] * positions[1]
    torch.manual_seed(0)
    drawn = np.array([places[crop(image).numpy().tobytes()] for _ in range(3_000)])
    for axis, count in enumerate(positions):
        shares = np.bincount(drawn[:, axis], minlength=count) / len(drawn)
        assert np.abs(shares - 1 / count).max() < 0.04


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (8, 6), (33, 47)])
def test_crops_give_the_size_and_follow_the_seed(crop: BoxCrop | PadCrop, size: tuple[int, int]) -> None:
    image = noise(*size)
    results = []
    for seed in (1, 1):
        torch.manual_seed(seed)
        results.append(crop(image))
    assert results[0].shape == (3, 8, 6)
    assert results[0].dtype == torch.uint8
    assert torch.equal(*results)
    assert torch.equal(image, noise(*size))


def test_crops_differ_by_seed() -> None:
    image = noise(33, 47)
    for crop in CROPS:
        assert len({crop(image).numpy().tobytes() for _ in range(20)}) > 10


@pytest.mark.parametrize("how", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("shape", [(37, 50), (50, 37), (4, 60), (60, 4), (16, 12), (1, 1)])
def test_random_resized_crops_are_torchvisions_bit_for_bit(shape: tuple[int, int], how: InterpolationMode) -> None:
    """In draws, also where no box fits, in pixels, and in what is drawn afterwards.

    Without AVX2 torchvision resizes in floats, which may round to the next level.
    """
    apart = 0 if "AVX" in torch.backends.cpu.get_cpu_capability() else 1
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoders give them
    ours = RandomResizedCrop((16, 12), (0.3, 1.0), how)
    theirs = v2.RandomResizedCrop((16, 12), (0.3, 1.0), interpolation=how, antialias=True)
    for seed in range(50):
        torch.manual_seed(seed)
        expected, then = theirs(image), torch.rand(())
        for given in (image, channels_last):
            torch.manual_seed(seed)
            assert (ours(given).int() - expected.int()).abs().max() <= apart
            assert torch.rand(()) == then


def test_crops_leave_the_channels_last() -> None:
    """Also of the whole width, whose box is no copy of the image in torch's sense of its memory."""
    image = torch.zeros(60, 80, 3, dtype=torch.uint8).permute(2, 0, 1)
    for crop in (RandomResizedCrop((16, 12), (1.0, 1.0), InterpolationMode.BILINEAR), InceptionCrop((16, 12))):
        torch.manual_seed(0)
        for _ in range(20):
            assert crop(image).permute(1, 2, 0).is_contiguous()

"""Decoding, crops, folders and batches against Pillow, torchvision and what a user does."""

import gc
import importlib
import os
import pickle
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import forked
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from vitlit.data import ImageFolderData, Preprocess
from vitlit.data import workers as data_workers
from vitlit.data.augment import TimmRandAugment
from vitlit.data.dataset import Images
from vitlit.data.erasing import Erasing
from vitlit.data.folder import brief, find_classes, parse_share, scan_photos, scan_split, scan_train
from vitlit.data.mixing import Mixing
from vitlit.data.stream import Sample, TrainStream
from vitlit.data.transforms import train_transform
from vitlit.errors import UserError
from vitlit.images import codec
from vitlit.images.crops import InceptionCrop, PadCrop, SimpleCrop
from vitlit.images.decode import decode
from vitlit.images.preprocess import Interpolation
from vitlit.objectives import Batch


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two real photographs, 640 x 427."""
    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="module")
def photo(photos: list[Image.Image]) -> Image.Image:
    return photos[0].resize((161, 107))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def pillow(path: Path) -> np.ndarray:
    """What Pillow makes of a file: (H, W, 3), uint8."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1": lambda image: image.convert("1"),
    "L": lambda image: image.convert("L"),
    "LA": lambda image: with_alpha(image.convert("L")),
    "P": lambda image: image.convert("P"),
    "RGB": lambda image: image,
    "RGBA": with_alpha,
    "CMYK": lambda image: image.convert("CMYK"),
}
FORMATS = {
    "jpg": ("L", "RGB", "CMYK"),
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "ppm": ("L", "RGB"),
}


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two paths: with torchcodec, and without it."""
    if request.param == "Pillow":
        monkeypatch.setattr("vitlit.images.decode.DECODERS", {})


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(("extension", "mode"), [(e, mode) for e, modes in FORMATS.items() for mode in modes])
def test_every_format_and_mode_reads_as_pillow_reads_it(
    photo: Image.Image, tmp_path: Path, extension: str, mode: str
) -> None:
    path = tmp_path / f"image.{extension}"
    MODES[mode](photo).save(path)
    image = decode(path)
    assert image.dtype == torch.uint8
    assert np.array_equal(pixels(image), pillow(path))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_torchcodec_reads_the_usual_formats(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    photo.save(tmp_path / f"image.{extension}")
    expected = pillow(tmp_path / f"image.{extension}")
    monkeypatch.delattr(Image, "open")
    assert np.array_equal(pixels(decode(tmp_path / f"image.{extension}")), expected)


def test_a_torchcodec_that_does_not_load_says_why(tmp_path: Path) -> None:
    def child() -> int:
        sys.modules["torchcodec.decoders"] = None  # type: ignore[assignment]
        found = importlib.reload(codec)
        return int(bool(found.DECODERS) or found.DECODER != "Pillow" or "torchcodec.decoders" not in found.WHY_NOT)

    assert forked(child, tmp_path).code == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("progressive.jpg", {"progressive": True}),
        ("full_chroma.jpg", {"quality": 95, "subsampling": 0}),
        ("lossless.webp", {"lossless": True}),
        ("transparent.png", {"transparency": (0, 0, 0)}),
        ("compressed.tiff", {"compression": "tiff_lzw"}),
        ("wrong_name.png", {"format": "JPEG"}),
        ("wrong_name.jpg", {"format": "TIFF"}),
    ],
)
def test_variants_of_the_formats_read_as_pillow_reads_them(
    photo: Image.Image, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    photo.save(tmp_path / name, **options)
    assert np.array_equal(pixels(decode(tmp_path / name)), pillow(tmp_path / name))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["jpg", "tiff", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(photo: Image.Image, tmp_path: Path, orientation: int, extension: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    photo.save(path, exif=exif)
    image = decode(path)
    assert image.shape[1:] == ((161, 107) if orientation > 4 else (107, 161))
    assert np.array_equal(pixels(image), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, extension: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(values).save(path)
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(pixels(decode(path)), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_counts(photo: Image.Image, tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"film.{extension}"
    photo.save(path, save_all=True, append_images=[ImageOps.invert(photo)])
    assert np.array_equal(pixels(decode(path)), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, too
@pytest.mark.parametrize("extension", list(FORMATS))
def test_a_cut_off_file_is_an_error_that_names_it_in_one_line(
    photo: Image.Image, tmp_path: Path, extension: str
) -> None:
    path = tmp_path / f"cut off.{extension}"
    photo.save(path)
    whole = path.read_bytes()
    for length in (0, 20, len(whole) // 2, int(0.95 * len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            decode(path)
        message = str(caught.value)
        assert message.startswith(f"cannot read the image {path}: ")
        assert "\n" not in message
        assert "_core" not in message
        assert "BytesIO" not in message


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_whose_range_is_unknown_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.linspace(0, 255, 100, dtype=kind).reshape(10, 10)).save(tmp_path / "wide.tif")
    with pytest.raises(UserError, match=r"wide.tif: numbers of 32 bits, .*; convert it to 8 or 16 bits"):
        decode(tmp_path / "wide.tif")


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["png", "tiff", "pgm"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path, extension: str) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"deep.{extension}")
    assert np.array_equal(pixels(decode(tmp_path / f"deep.{extension}"))[..., 0], values // 257)


def test_sixteen_bits_of_colour_are_scaled_to_eight(tmp_path: Path) -> None:
    """Pillow, which cannot write them, cuts the lower byte off, so that the two decoders are a level apart."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "deep.png").write_bytes(png)
    assert np.array_equal(pixels(decode(tmp_path / "deep.png")), np.round(values / 257).astype(np.uint8))
    assert np.abs(pillow(tmp_path / "deep.png").astype(int) - values / 257).max() <= 1


def test_what_is_no_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>404</html>")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path in (page, folder, tmp_path / "missing.jpg"):
        with pytest.raises(UserError, match=str(path)):
            decode(path)


def test_an_unreadable_image_is_named_through_a_loaders_worker(few: Path, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    _, index, _ = scan_train(tmp_path, 0.1)
    loader = DataLoader(Images(index, Preprocess((8, 8)).crop), num_workers=1)
    with pytest.raises(UserError, match="broken"):
        next(iter(loader))


# Crops


def torchvisions(image: Tensor, size: int, ratio: float, interpolation: Interpolation) -> Tensor:
    """Resize and CenterCrop as torchvision's evaluation presets chain them."""
    resize = v2.Resize(int(size / ratio), InterpolationMode(interpolation), antialias=True)
    cropped: Tensor = v2.Compose([resize, v2.CenterCrop(size)])(image)
    return cropped


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (224, 1.0), (96, 0.9), (384, 1.0), (600, 0.875)])
def test_the_evaluation_crop_is_torchvisions_and_pillows_within_one_level(
    photos: list[Image.Image], size: int, ratio: float, interpolation: Interpolation
) -> None:
    preprocess = Preprocess((size, size), ratio, interpolation)
    for photo in (photos[0], photos[1].rotate(90, expand=True), photos[1].crop((7, 3, 340, 350))):
        image = v2.functional.pil_to_tensor(photo)
        crop = preprocess.crop(image)
        assert torch.equal(crop, torchvisions(image, size, ratio, interpolation))

        short = int(size / ratio)
        width, height = (int(short * side / min(photo.size)) for side in photo.size)
        resized = photo.resize((width, height), getattr(Image.Resampling, interpolation.upper()))
        left, top = round((width - size) / 2), round((height - size) / 2)
        expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
        # Both round between their two passes; a bicubic that enlarges overshoots, so that it adds up.
        assert np.abs(pixels(crop) - expected).max() <= (1 if short < min(photo.size) else 2)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 16), (16, 64)])
@pytest.mark.parametrize("ratio", [1.0, 0.875])
def test_a_crop_that_is_not_square_keeps_the_aspect_and_the_middle(size: tuple[int, int], ratio: float) -> None:
    # Brightness grows with the row in one channel and with the column in another.
    rows, columns = 200, 300
    image = torch.stack(
        [
            torch.arange(rows)[:, None].expand(rows, columns),
            torch.arange(columns)[None].expand(rows, columns) * 2 // 3,
            torch.zeros(rows, columns, dtype=torch.int64),
        ]
    ).to(torch.uint8)
    crop = Preprocess(size, ratio).crop(image).double()
    assert crop.shape == (3, *size)
    scale = max(size[0] / rows, size[1] / columns) / ratio  # it just covers the size over the ratio
    within = 0.75 / scale + 0.5  # half a pixel of the crop, where an odd rest is to be halved
    assert crop[0].mean().item() == pytest.approx((rows - 1) / 2, abs=within)
    assert crop[1].mean().item() == pytest.approx((columns - 1) / 3, abs=within)
    row_step = (crop[0, -5, 8] - crop[0, 4, 8]).item() / (size[0] - 9)
    column_step = (crop[1, 8, -5] - crop[1, 8, 4]).item() / (size[1] - 9)
    assert row_step == pytest.approx(1 / scale, rel=0.1)
    assert column_step == pytest.approx(2 / 3 / scale, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (8, 8), (3, 40), (1, 500), (500, 1), (31, 33), (427, 640)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_images_of_any_shape_give_the_size_wanted(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    for transform in (Preprocess(size).crop, train_transform(Preprocess(size), "random_resized", (0.05, 1.0), 0.5)):
        crop = transform(image)
        assert crop.shape == (3, *size)
        assert crop.dtype == torch.uint8
        assert bool((crop == 77).all())


def test_normalising_is_torchvisions(photo: Image.Image) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = v2.functional.pil_to_tensor(photo)[None]
    expected = v2.functional.normalize(images.double() / 255, list(mean), list(std))
    preprocess = Preprocess((8, 8), mean=mean, std=std)
    assert (preprocess.normalise(images) - expected).abs().max() < 1e-6
    assert preprocess.normalise(images, torch.bfloat16).dtype == torch.bfloat16
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert Preprocess((8, 8)).normalise(black_and_white).flatten().tolist() == [-1.0] * 3 + [1.0] * 3


def test_preprocess_takes_one_or_many_paths_and_tensors(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    preprocess = Preprocess((32, 48))
    batch = preprocess([path, str(path), decode(path)])
    assert batch.shape == (3, 3, 32, 48)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(preprocess(path), batch[:1])
    assert torch.equal(preprocess(decode(path)), batch[:1])


# Training samples


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


# Folders


def paint(*paths: Path) -> None:
    """Write a small image at each path."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 100, 200)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Class folders of 20, 10, 5, 2 and 1 images in the root itself."""
    root = tmp_path / "tree"
    for name, count in (("a", 20), ("b", 10), ("c", 5), ("d", 2), ("e", 1)):
        paint(*(root / name / f"{i:02d}.png" for i in range(count)))
    return root


def test_names_are_found_as_they_are_and_hidden_files_are_not(tmp_path: Path) -> None:
    wanted = ["a b.png", "été/größe 日本.JPG", "deep/er/x.jpeg", "y.TiFF", "z.webp"]
    paint(*(tmp_path / "train" / "Ünï code" / name for name in wanted))
    paint(tmp_path / "train" / "plain" / "1.png")
    paint(tmp_path / "train" / "plain" / "._1.png", tmp_path / "train" / ".cache" / "2.png")
    (tmp_path / "train" / "plain" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "list.csv").write_text("no class")
    classes, index, held = scan_train(tmp_path)
    assert classes == find_classes(tmp_path) == ["plain", "Ünï code"]
    assert held is None
    found = {str(Path(index.path(i)).relative_to(tmp_path / "train")) for i in range(len(index))}
    assert found == {"plain/1.png", *(f"Ünï code/{name}" for name in wanted)}
    assert all(decode(index.path(i)).shape == (3, 8, 8) for i in range(len(index)))
    assert [str(Path(index.path(i)).relative_to(tmp_path / "train")).split("/")[0] for i in range(len(index))] == [
        classes[label] for label in index.labels
    ]


def test_hidden_folders_within_a_class_are_left_alone(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "a" / ".thumbnails" / "1.png")
    _, index, _ = scan_train(tmp_path)
    assert len(index) == 1


def test_classes_may_be_links_to_folders_and_images_links_to_files(tmp_path: Path) -> None:
    paint(tmp_path / "store" / "cats" / "1.png", tmp_path / "store" / "cats" / "2.png", tmp_path / "store" / "dog.png")
    (tmp_path / "train" / "dog").mkdir(parents=True)
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "train" / "dog" / "1.png").symlink_to(tmp_path / "store" / "dog.png")
    classes, index, _ = scan_train(tmp_path)
    assert classes == ["cat", "dog"]
    assert index.labels.tolist() == [0, 0, 1]
    assert all(decode(index.path(i)).shape == (3, 8, 8) for i in range(3))


def test_of_links_to_one_folder_the_first_by_name_counts(tmp_path: Path) -> None:
    paint(tmp_path / "store" / "1.png")
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in (3, 7, 1, 5, 9, 2, 0, 8, 4, 6):
        (tmp_path / "train" / "a" / f"link{number}").symlink_to(tmp_path / "store")
    assert scan_train(tmp_path)[1].names() == [b"a/link0/1.png"]


def test_links_in_a_circle_neither_hang_nor_count_an_image_twice(tmp_path: Path) -> None:
    train, store = tmp_path / "train", tmp_path / "store"
    paint(train / "a" / "1.png", train / "a" / "deep" / "2.png", train / "b" / "3.png", store / "x" / "4.png")
    paint(store / "5.png")
    (train / "a" / "self").symlink_to(".")
    (train / "a" / "up").symlink_to("..")  # which has class b, too
    (train / "a" / "deep" / "top").symlink_to(tmp_path)
    (train / "a" / "slash").symlink_to("/")
    (train / "b" / "store").symlink_to(store / "x")
    (store / "x" / "back").symlink_to(train)
    (store / "x" / "up").symlink_to("..")
    (train / "b" / "loop").symlink_to("loop")
    (train / "loop").symlink_to("loop")
    classes, index, _ = scan_train(tmp_path)
    assert (classes, index.labels.tolist()) == (["a", "b"], [0, 0, 1, 1])
    assert index.names() == [b"a/1.png", b"a/deep/2.png", b"b/3.png", b"b/store/4.png"]
    photos = scan_photos([train])
    assert photos.names() == [bytes(train) + b"/" + name for name in index.names()]
    (train / "all").symlink_to(".")
    with pytest.raises(UserError, match=r"class folder .*/all holds no image"):
        scan_train(tmp_path)


def test_mistakes_in_the_layout_are_named_with_the_remedy(tmp_path: Path) -> None:
    def refused(pattern: str, call: Callable[[], object]) -> None:
        with pytest.raises(UserError, match=pattern):
            call()

    refused("is not a folder; give --data.root", lambda: scan_train(tmp_path / "nowhere"))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    refused("train holds no class folders; images belong in", lambda: scan_train(tmp_path / "flat"))
    paint(tmp_path / "root" / "a" / "1.png")
    refused(r"has no folder train; .*--data\.holdout 10%", lambda: scan_train(tmp_path / "root"))
    paint(tmp_path / "hole" / "train" / "a" / "1.png")
    (tmp_path / "hole" / "train" / "b").mkdir()
    refused("class folder .*/b holds no image", lambda: scan_train(tmp_path / "hole"))
    paint(tmp_path / "strange" / "val" / "z" / "1.png")
    refused("has the class 'z', which the training", lambda: scan_split(tmp_path / "strange" / "val", ["a", "b"]))
    paint(tmp_path / "loose" / "val" / "1.png")
    refused("holds images but no class folders", lambda: scan_split(tmp_path / "loose" / "val", ["a", "b"]))
    (tmp_path / "empty" / "val" / "a").mkdir(parents=True)
    refused("holds no image", lambda: scan_split(tmp_path / "empty" / "val", ["a"]))
    refused("does not exist; give images or folders", lambda: scan_photos([tmp_path / "nowhere"]))
    refused("no image under", lambda: scan_photos([tmp_path / "empty"]))


def test_photos_are_files_or_folders_searched_to_their_depth(tmp_path: Path) -> None:
    paint(tmp_path / "x" / "2.png", tmp_path / "x" / "y" / "1.png", tmp_path / "lone.png")
    index = scan_photos([tmp_path / "lone.png", tmp_path / "x"])
    assert [index.path(i) for i in range(3)] == [str(tmp_path / n) for n in ("lone.png", "x/2.png", "x/y/1.png")]
    assert index.labels.tolist() == [-1, -1, -1]


def test_the_holdout_is_stratified_disjoint_complete_and_always_the_same(tree: Path) -> None:
    classes, train, held = scan_train(tree, 0.2)
    assert held is not None
    assert classes == ["a", "b", "c", "d", "e"]
    assert np.bincount(held.labels, minlength=5).tolist() == [4, 2, 1, 1, 0]  # the last image of a class stays
    assert np.bincount(train.labels, minlength=5).tolist() == [16, 8, 4, 1, 1]
    paths = [Path(index.path(i)) for index in (train, held) for i in range(len(index))]
    assert sorted(paths) == sorted(tree.rglob("*.png"))
    for seed in (0, 1):
        data = ImageFolderData(str(tree), holdout="20%", batch_size=2, seed=seed)
        assert data.split("val").rows.tolist() == held.rows.tolist()
        assert data.split("train").rows.tolist() == train.rows.tolist()
    names = [Path(held.path(i)).name for i in range(4)]
    assert names != ["00.png", "01.png", "02.png", "03.png"]  # drawn, not the first
    assert names != ["16.png", "17.png", "18.png", "19.png"]


def test_a_holdout_leaves_the_val_folder_alone(few: Path) -> None:
    data = ImageFolderData(str(few), holdout=0.1)
    assert len(data.split("val")) == 4
    assert len(data.split("train")) == 36
    assert all("train" in str(data.split("val").path(i)) for i in range(4))


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), (" 12.5% ", 0.125), (0, 0.0)])
def test_a_share_is_read_in_each_of_its_forms(text: float | str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["10 percent", "", "100%", "1", 10, "-1%", "nan", "inf", "1e3%"])
def test_what_is_no_share_is_refused(text: float | str) -> None:
    with pytest.raises(UserError, match="is not a share"):
        parse_share(text)


def test_class_names_are_listed_in_brief() -> None:
    assert brief(["a", "b"]) == "a, b (2)"
    assert brief(list("abcdefg")) == "a, b, c, d, ... (7)"


# The data module


def flat(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and indices of a batch of one view."""
    [images] = batch.views
    return images, batch.labels, batch.indices


class Recorder(LightningModule):
    """Keeps what it is given, and trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(flat(batch))
        return self.number * batch.views[0].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(flat(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(flat(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["predict"].append(flat(batch))
        return batch.indices

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "num_sanity_val_steps": 0, **options},
    )


def small_data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, **options})


def test_a_plain_trainer_and_module_get_normalised_batches(few: Path) -> None:
    module, data = Recorder(), small_data(few, micro_batch=4, image_size=(16, 24))
    trainer(max_epochs=2).fit(module, data)
    assert data.classes == ["0", "1", "2", "3"]
    assert [len(batch[0]) for batch in module.seen["train"]] == [4] * 20
    images, labels, indices = module.seen["train"][0]
    assert images.shape == (4, 3, 16, 24)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.9
    assert 0.5 < images.max() <= 1
    assert labels.dtype == indices.dtype == torch.int64
    for epoch in range(2):
        batches = module.seen["train"][10 * epoch : 10 * epoch + 10]
        assert sorted(torch.cat([b[2] for b in batches]).tolist()) == list(range(40))
    order = [torch.cat([b[2] for b in module.seen["train"][i : i + 10]]).tolist() for i in (0, 10)]
    assert order[0] != order[1]
    index = data.split("train")
    assert all(index.labels[i] == label for b in module.seen["train"] for label, i in zip(b[1], b[2], strict=True))
    assert torch.cat([b[2] for b in module.seen["val"]]).tolist() == [*range(11), *range(11)]


def test_evaluation_images_are_the_preprocessed_files_in_order(few: Path) -> None:
    module, data = Recorder(), small_data(few)
    trainer().validate(module, data, verbose=False)
    index = data.split("val")
    images = torch.cat([batch[0] for batch in module.seen["val"]])
    assert torch.equal(images, data.preprocess([index.path(i) for i in range(11)]))
    assert torch.cat([batch[1] for batch in module.seen["val"]]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_prediction_takes_photos_in_their_order(few: Path, tmp_path: Path) -> None:
    paint(tmp_path / "b.png", tmp_path / "a.png")
    module, data = Recorder(), small_data(few)
    data.splits.photos = [tmp_path / "b.png", tmp_path / "a.png"]
    trainer().predict(module, data)
    [(images, labels, indices)] = module.seen["predict"]
    assert torch.equal(images, data.preprocess(data.splits.photos))
    assert labels.tolist() == [-1, -1]
    assert indices.tolist() == [0, 1]


def test_batches_follow_the_precision_of_the_module(few: Path) -> None:
    module = Recorder()
    trainer(precision="64-true").validate(module, small_data(few), verbose=False)
    assert module.seen["val"][0][0].dtype == torch.float64


def test_a_missing_torchcodec_is_said_once(
    few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitlit.data.module.DECODER", "Pillow")
    trainer().fit(Recorder(), small_data(few))
    assert capsys.readouterr().out.count("torchcodec is missing, so Pillow decodes") == 1


def test_a_val_folder_without_some_class_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(*(tmp_path / "train" / name / "1.png" for name in "abcd"), tmp_path / "val" / "b" / "1.png")
    data = small_data(tmp_path)
    assert data.split("val").labels.tolist() == [1]
    assert capsys.readouterr().out == f"{tmp_path / 'val'} has no image of 3 classes, 'a' among them\n"
    data.split("val")
    assert capsys.readouterr().out == ""


def test_what_the_data_lacks_is_refused_before_training(few: Path, tree: Path) -> None:
    for data, pattern in (
        (small_data(few, batch_size=41), "batch_size 41 is more than the 40 training images"),
        (small_data(few, batch_size=8, micro_batch=3), "batch_size 8 does not divide over 1 device x 3"),
        (small_data(tree), "has no folder train"),
    ):
        with pytest.raises(UserError, match=pattern):
            trainer().fit(Recorder(), data)
    with pytest.raises(UserError, match="has no folder test"):
        trainer().test(Recorder(), small_data(few))
    with pytest.raises(UserError, match="accumulate_grad_batches follows from"):
        trainer(accumulate_grad_batches=2).fit(Recorder(), small_data(few))
    (tree / "train").mkdir()
    for name in "ab":
        (tree / name).rename(tree / "train" / name)
    with pytest.raises(UserError, match=r"has no folder val; --data\.holdout 10%"):
        trainer().fit(Recorder(), small_data(tree))


def test_other_classes_than_the_weights_are_refused_with_both_lists(few: Path) -> None:
    data = small_data(few)
    data.splits.classes = ["cat", "dog"]
    with pytest.raises(UserError, match=r"has the classes 0, 1, 2, 3 \(4\), the weights cat, dog \(2\)"):
        data.split("train")


def test_a_signal_does_not_end_a_worker_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = data_workers.leave_signals

    def signalled(worker: int) -> None:  # in the worker, as late as it can come
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(worker)

    monkeypatch.setattr(data_workers, "leave_signals", signalled)
    numbers = TensorDataset(torch.arange(8))
    assert len(list(data_workers.loader(numbers, SequentialSampler(numbers), 2, 2))) == 4
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Bound:
    """Garbage that only its own process may collect, as what belongs to a GPU is."""

    def __init__(self) -> None:
        self.own, self.cycle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.own:
            os.abort()


class Collecting(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_a_worker_does_not_collect_what_the_main_process_left() -> None:
    gc.disable()  # as late as it can come
    try:
        Bound()
        assert len(list(data_workers.loader(Collecting(), range(4), 2, 2))) == 2  # type: ignore[arg-type]
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


def test_an_error_beside_data_workers_ends_the_process() -> None:
    """They ignore SIGTERM, with which Python would end them before it waits for them."""

    def fail() -> None:
        kept.append(iter(data_workers.loader(numbers, SequentialSampler(numbers), 2, 1)))
        next(kept[0])
        raise ValueError("on purpose")

    numbers, kept = TensorDataset(torch.arange(8)), list[Any]()
    process = get_context("fork").Process(target=fail)
    process.start()
    process.join()
    assert process.exitcode == 1


# Regularised batches

Batches = list[tuple[Tensor, Tensor, Tensor]]


def regularised(
    few: Path, split: str = "train", step: int = 0, rank: int = 0, world: int = 1, **options: Any
) -> Batches:
    """The batches of an epoch from a step on, as a trainer moves them, with everything on that a training can draw."""
    everything: dict[str, Any] = {
        "crop": "inception",
        "crop_scale": (0.3, 1.0),
        "augment": [TimmRandAugment()],
        "erasing": Erasing(0.5),
        "mixing": Mixing(0.8, 1.0),
        "repeats": 2,
        "balanced": True,
    }
    data = small_data(few, seed=3, **{**everything, **options})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step,
        global_rank=rank,
        world_size=world,
        num_devices=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(dtype=torch.float64),
    )
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    batches = [data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0) for batch in loader]
    return [flat(batch) for batch in batches]


def joined(batches: Batches, parts: int) -> Batches:
    """Every `parts` batches as one."""
    steps = [batches[i : i + parts] for i in range(0, len(batches), parts)]
    return [tuple(torch.cat(part) for part in zip(*step, strict=True)) for step in steps]  # type: ignore[misc]


def same(some: Batches, others: Batches) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_regularised_batches_are_the_same_however_they_are_dealt(few: Path) -> None:
    whole = regularised(few)
    assert [len(images) for images, *_ in whole] == [8] * 5
    assert all(labels.shape == (8, 4) and torch.allclose(labels.sum(1), torch.ones(8)) for _, labels, _ in whole)
    for micro in (4, 2):
        assert same(joined(regularised(few, micro_batch=micro), 8 // micro), whole)
    ranks = [regularised(few, rank=rank, world=2) for rank in range(2)]
    assert same([joined([one, other], 2)[0] for one, other in zip(*ranks, strict=True)], whole)
    assert same(regularised(few, step=2)[:3], whole[2:])
    assert same(regularised(few, step=2)[3:], regularised(few, step=5)[:2])


@pytest.mark.parametrize(
    "without", [{"erasing": Erasing()}, {"mixing": Mixing()}, {"repeats": 1}, {"balanced": False}, {"augment": None}]
)
def test_each_regulariser_has_its_effect_on_batches(without: dict[str, Any], few: Path) -> None:
    assert not same(
        [(images, labels.argmax(-1) if labels.ndim > 1 else labels, i) for images, labels, i in regularised(few)],
        [
            (images, labels.argmax(-1) if labels.ndim > 1 else labels, i)
            for images, labels, i in regularised(few, **without)
        ],
    )


def test_evaluation_batches_are_left_as_they_are(few: Path) -> None:
    data = small_data(few)
    paths = [data.split("val").path(i) for i in range(11)]
    images, labels, indices = joined(regularised(few, "val"), 2)[0]
    torch.testing.assert_close(images, data.preprocess(paths).double())
    assert labels.tolist() == data.split("val").labels.tolist()
    assert indices.tolist() == list(range(11))


def test_a_crop_by_name_is_the_one_that_it_names() -> None:
    image = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    size, how = (24, 32), InterpolationMode.BILINEAR
    preprocess = Preprocess(size, interpolation="bilinear")
    by_hand: dict[Any, Callable[[Tensor], Tensor]] = {
        "random_resized": v2.RandomResizedCrop(size, (0.2, 0.5), interpolation=how, antialias=True),
        "inception": InceptionCrop(size, (0.2, 0.5), how),
        "simple": SimpleCrop(size, how),
        "pad": PadCrop(size, interpolation=how),
        "center": preprocess.crop,
    }
    for name, crop in by_hand.items():
        torch.manual_seed(1)
        found = train_transform(preprocess, name, (0.2, 0.5), 0.0)(image)
        torch.manual_seed(1)
        assert torch.equal(found, crop(image)), name
    with pytest.raises(UserError, match=r"data\.crop middle is unknown; give one of random_resized inception"):
        train_transform(preprocess, "middle", (0.2, 0.5), 0.0)  # type: ignore[arg-type]


def test_transforms_go_to_workers_of_any_start_method() -> None:
    transform = train_transform(Preprocess((16, 16)), "center", (1, 1), 0.0, [TimmRandAugment()])
    again = pickle.loads(pickle.dumps(transform))
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    torch.manual_seed(0)
    expected = transform(image)
    torch.manual_seed(0)
    assert torch.equal(again(image), expected)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_holdout_leaves_an_image_of_every_class(share: float, few: Path) -> None:
    classes, index, held = scan_train(few, share)
    assert held is not None
    assert set(index.labels) == set(held.labels) == set(range(len(classes)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": [v2.ToDtype(torch.float32, scale=True)]}, r"data\.augment makes images .* of float32"),
        ({"augment": [v2.Resize((8, 8))]}, r"data\.augment makes images \[3, 8, 8\] of uint8"),
        ({"repeats": 9}, "too small for 9 repeats"),
    ],
)
def test_what_training_would_trip_over_is_refused_before(options: dict[str, Any], words: str, few: Path) -> None:
    with pytest.raises(UserError, match=words):
        small_data(few, **options).check("fit", 1)


def test_a_run_is_not_continued_with_other_draws(few: Path) -> None:
    before = small_data(few)
    before.trainer = SimpleNamespace(global_step=3)  # type: ignore[assignment]
    after = small_data(few, repeats=2)
    after.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    with pytest.raises(UserError, match="had repeats 1, this one has 2"):
        after.load_state_dict(before.state_dict())


def test_lightnings_own_sampler_is_refused(few: Path) -> None:
    with pytest.raises(UserError, match="overfit_batches"):
        trainer(overfit_batches=2).fit(Recorder(), small_data(few))

"""Augmentations: pixels of timm, Pillow and TensorFlow for the same draws, and what is drawn how often."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jsonargparse
import numpy as np
import pytest
import timm.data.auto_augment as peer
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitlit.data.augment import BigVisionRandAugment, ThreeAugment, TimmRandAugment, big_vision, timm
from vitlit.errors import UserError

AUGMENTS: list[v2.Transform] = [BigVisionRandAugment(), TimmRandAugment(), ThreeAugment()]
RESAMPLING = Image.Resampling


def picture(*size: int) -> Tensor:
    """Noise on a gradient of a limited range, so that every op has something to do."""
    noise = torch.randint(90, (3, *size), generator=torch.Generator().manual_seed(0))
    return (20 + noise + torch.linspace(0, 120, size[-1]).int()).to(torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def grey(*values: int) -> Tensor:
    """One row of grey pixels."""
    return torch.tensor(values, dtype=torch.uint8).expand(3, 1, -1).clone()


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples."""
    values = np.union1d(first, second)
    shares = [np.searchsorted(np.sort(sample), values, "right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


# timm


@pytest.mark.parametrize("name", list(timm.OPS))
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("size", [(24, 40), (1, 3)])
def test_timm_ops_give_timms_pixels(
    name: str, increasing: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, fill = picture(*size), (124, 116, 104)
    augment = TimmRandAugment(increasing=increasing)
    peers = peer._RAND_INCREASING_TRANSFORMS if increasing else peer._RAND_TRANSFORMS
    theirs = peers[list(timm.OPS).index(name)]
    assert theirs.removesuffix("Increasing") == name
    for magnitude in (0.0, 1.3, 2.5, 5.0, 8.7, 9.0, 9.99, 10.0):
        for sign, resample in ((1, RESAMPLING.BICUBIC), (-1, RESAMPLING.BICUBIC), (1, RESAMPLING.BILINEAR)):
            monkeypatch.setattr(peer, "_randomly_negate", lambda value, sign=sign: sign * value)
            to_arguments = cast(Any, peer.LEVEL_TO_ARG)[theirs]
            arguments = to_arguments(magnitude, {}) if to_arguments else ()
            ours = augment.transform(
                image, {"ops": [(name, timm.Draw(magnitude / 10, sign, resample, fill, increasing))]}
            )
            if name == "Posterize" and arguments == (0,):
                assert not ours.any()  # no bits are kept, which Pillow refuses to do
                continue
            expected = cast(Any, peer.NAME_TO_OP)[theirs](pillow(image), *arguments, fillcolor=fill, resample=resample)
            assert torch.equal(ours, F.pil_to_tensor(expected)), (magnitude, sign, resample)


@pytest.mark.parametrize("increasing", [True, False])
def test_timm_draws_are_distributed_as_timms(increasing: bool) -> None:
    count = 4_000
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    config = f"rand-m9-mstd0.5-inc{int(increasing)}"
    peers = peer.rand_augment_transform(config, {"interpolation": RESAMPLING.BICUBIC})
    seen: list[tuple[str, tuple[float, ...]]] = []

    def record(image: object, *arguments: float, name: str, **_: object) -> object:
        seen.append((name, arguments))
        return image

    for op in peers.ops:
        op.aug_fn = partial(record, name=op.name)
    lengths: Counter[int] = Counter()
    for _ in range(count):
        before = len(seen)
        peers(None)
        lengths[len(seen) - before] += 1

    augment = TimmRandAugment(increasing=increasing)
    draws = [augment.make_params([picture(4, 4)])["ops"] for _ in range(count)]
    ours = [(name, draw) for ops in draws for name, draw in ops]

    our_lengths = Counter(map(len, draws))
    for applied, share in enumerate((0.25, 0.5, 0.25)):
        assert our_lengths[applied] / count == pytest.approx(share, abs=0.03)
        assert lengths[applied] / count == pytest.approx(share, abs=0.03)
    our_names = Counter(name for name, _ in ours)
    their_names = Counter(name.removesuffix("Increasing") for name, _ in seen)
    assert list(timm.OPS) == [name.removesuffix("Increasing") for name in (op.name for op in peers.ops)]
    for name in timm.OPS:
        assert our_names[name] / len(ours) == pytest.approx(1 / 15, abs=0.015)
        assert their_names[name] / len(seen) == pytest.approx(1 / 15, abs=0.015)

    strongest = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
    theirs = np.array([arguments[0] / strongest[name] for name, arguments in seen if name in strongest])
    signed = np.array([draw.sign * draw.level for _, draw in ours])
    assert distance(signed, theirs) < 0.05
    assert np.mean(signed == 1) == pytest.approx(np.mean(theirs == 1), abs=0.01)  # clipped at 10
    assert 0 < np.mean(signed == 1) < 0.03


def test_timm_options_reach_the_draws() -> None:
    def draws(**options: Any) -> list[Any]:
        torch.manual_seed(0)
        augment = TimmRandAugment(ops=3, **options)
        return [op for _ in range(200) for op in augment.make_params([picture(4, 4)])["ops"]]

    assert not draws(prob=0)
    assert len(draws(prob=1)) == 600
    assert {draw.level for _, draw in draws(std=0, magnitude=7)} == {0.7}
    assert {draw.fill for _, draw in draws(fill=(1, 2, 3))} == {(1, 2, 3)}
    assert {draw.resample for _, draw in draws(interpolation="bilinear")} == {RESAMPLING.BILINEAR}
    modes = Counter(draw.resample for _, draw in draws(interpolation="random", prob=1))
    assert modes[RESAMPLING.BILINEAR] / 600 == pytest.approx(0.5, abs=0.1)
    assert len(modes) == 2


# big_vision


def apply(name: str, image: Tensor, magnitude: float, sign: int = 1, centre: tuple[int, int] = (0, 0)) -> Tensor:
    draw = big_vision.Draw(level=magnitude / 10, sign=sign, centre=centre)
    return BigVisionRandAugment().transform(image, {"ops": [(name, draw)]})


@pytest.mark.parametrize(
    ("name", "magnitude", "before", "after"),
    [
        ("AutoContrast", 10, (50, 100, 150), (0, 127, 255)),  # 127.5, rounded down
        ("AutoContrast", 10, (7, 7, 7), (7, 7, 7)),
        ("Invert", 10, (0, 1, 255), (255, 254, 0)),
        ("Brightness", 10, (0, 100, 200), (0, 190, 255)),  # x 1.9
        ("Brightness", 0, (0, 100, 199), (0, 10, 19)),  # x 0.1
        ("Brightness", 5, (0, 100, 199), (0, 100, 199)),
        ("SolarizeAdd", 10, (0, 100, 127, 128), (110, 210, 237, 128)),
        ("SolarizeAdd", 15, (0, 100, 127, 128), (165, 255, 255, 128)),
        # As tensorflow 2.21 has it, with the threshold and the shift of a byte out of its range.
        ("Solarize", 10, (0, 100, 127, 128, 200, 255), (255, 155, 128, 127, 55, 0)),
        ("Solarize", 15, (0, 100, 127, 128, 200, 255), (0, 100, 127, 127, 55, 0)),
        ("Solarize", 20, (0, 100, 127, 128, 200, 255), (255, 155, 128, 127, 55, 0)),
        ("Posterize", 0, (0, 100, 127, 128, 200, 255), (0, 0, 0, 128, 128, 128)),
        ("Posterize", 10, (0, 100, 127, 128, 200, 255), (0, 96, 112, 128, 192, 240)),
        ("Posterize", 15, (0, 100, 127, 128, 200, 255), (0, 100, 124, 128, 200, 252)),
        ("Posterize", 20, (0, 100, 127, 128, 200, 255), (0, 100, 127, 128, 200, 255)),
        ("Posterize", 30, (0, 100, 127, 128, 200, 255), (0, 100, 127, 128, 200, 255)),
    ],
)
def test_big_vision_changes_values(name: str, magnitude: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert torch.equal(apply(name, grey(*before), magnitude), grey(*after))


@pytest.mark.parametrize(
    ("magnitude", "after"),
    [
        # The luma of red is 0.2989 x 255.5 = 76.4, rounded down.
        (10, [255, 0, 0]),  # 76 + 1.9 x 179 and 76 - 1.9 x 76, clipped
        (0, [93, 68, 68]),  # 76 + 0.1 x 179 and 76 - 0.1 x 76
        (5, [255, 0, 0]),
    ],
)
def test_big_vision_color_blends_with_the_luma(magnitude: int, after: list[int]) -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    assert apply("Color", red, magnitude).flatten().tolist() == after
    greys = grey(*range(256))
    assert torch.equal(apply("Color", greys, magnitude), greys)


def test_big_vision_contrast_is_that_of_issue_109() -> None:
    """The numbers that google-research/big_vision issue 109 reports of a tile of 224 pixels."""
    colours = torch.tensor([[192, 64, 64], [64, 192, 192]], dtype=torch.uint8)
    tile = colours.T.view(3, 2, 1).repeat_interleave(112, 1).expand(3, 224, 224)
    after = apply("Contrast", tile, 10)
    assert after[:, 0, 0].tolist() == [188, 0, 0]
    assert after[:, 223, 0].tolist() == [0, 188, 188]
    small = picture(17, 15)  # blended with 255 / 256, rounded down to black
    assert torch.equal(apply("Contrast", small, 0), apply("Brightness", small, 0))


def test_big_vision_sharpness_is_pillows_kernel_inside_the_border() -> None:
    image = torch.zeros(3, 5, 5, dtype=torch.uint8)
    image[:, 2, 2] = 130  # smoothed to 5 / 13, its neighbours to 1 / 13: 50 and 10
    softer, sharper = apply("Sharpness", image, 0), apply("Sharpness", image, 10)
    assert softer[0].tolist() == [[0] * 5, [0, 9, 9, 9, 0], [0, 9, 58, 9, 0], [0, 9, 9, 9, 0], [0] * 5]
    assert sharper[0, 2].tolist() == [0, 0, 202, 0, 0]  # 50 + 1.9 x 80, and 10 - 1.9 x 10 clipped
    border = picture(9, 9)
    after = apply("Sharpness", border, 10)
    border[:, 1:-1, 1:-1], after[:, 1:-1, 1:-1] = 0, 0
    assert torch.equal(after, border)


def test_big_vision_equalize_is_pillows() -> None:
    image = picture(40, 30)
    assert torch.equal(apply("Equalize", image, 10), F.pil_to_tensor(ImageOps.equalize(pillow(image))))


@pytest.mark.parametrize("sign", [1, -1])
def test_big_vision_moves_by_pixels(sign: int) -> None:
    image = picture(30, 30)
    across = apply("TranslateX", image, 1, sign)
    down = apply("TranslateY", image, 1, sign)
    kept, new = (slice(0, 20), slice(20, 30)) if sign == 1 else (slice(10, 30), slice(0, 10))
    source = slice(10, 30) if sign == 1 else slice(0, 20)
    assert torch.equal(across[:, :, kept], image[:, :, source])
    assert torch.equal(down[:, kept], image[:, source])
    assert torch.all(across[:, :, new] == 128)
    assert torch.all(down[:, new] == 128)
    sheared = apply("ShearX", image, 10, sign)
    for row in range(30):
        columns = np.arange(30) + sign * int(0.3 * row + 0.5)
        expected = torch.full((3, 30), 128, dtype=torch.uint8)
        inside = (columns >= 0) & (columns < 30)
        expected[:, inside] = image[:, row, columns[inside]]
        if row % 10 != 5:  # halfway between two pixels but for the rounding of floats
            assert torch.equal(sheared[:, row], expected)
    assert torch.equal(apply("ShearY", image.mT, 10, sign), sheared.mT)


@pytest.mark.parametrize("size", [(8, 8), (9, 9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_big_vision_rotates_about_the_centre(size: tuple[int, int], sign: int) -> None:
    image = picture(*size)
    assert torch.equal(apply("Rotate", image, 30, sign), torch.rot90(image, sign, (1, 2)))
    image = picture(50, 80)
    turned = pillow(image).rotate(sign * 30, RESAMPLING.NEAREST, fillcolor=(128, 128, 128))
    assert (apply("Rotate", image, 10, sign) == F.pil_to_tensor(turned)).float().mean() > 0.98


@pytest.mark.parametrize(
    ("magnitude", "centre", "rows", "columns"),
    [
        (1, (13, 20), slice(9, 17), slice(16, 24)),
        (1, (0, 39), slice(0, 4), slice(35, 40)),
        (10, (0, 39), slice(0, 30), slice(0, 40)),
    ],
)
def test_big_vision_cutout(magnitude: int, centre: tuple[int, int], rows: slice, columns: slice) -> None:
    image = picture(30, 40)
    expected = image.clone()
    expected[:, rows, columns] = 128
    assert torch.equal(apply("Cutout", image, magnitude, centre=centre), expected)


def test_big_vision_draws_16_ops_uniformly_and_applies_each() -> None:
    torch.manual_seed(0)
    augment = BigVisionRandAugment(ops=3, magnitude=15)
    ops = [op for _ in range(3_000) for op in augment.make_params([picture(3, 5)])["ops"]]
    assert len(ops) == 9_000
    names = Counter(name for name, _ in ops)
    assert len(big_vision.OPS) == len(names) == 16
    assert all(number / len(ops) == pytest.approx(1 / 16, abs=0.012) for number in names.values())
    assert {draw.level for _, draw in ops} == {1.5}
    assert np.mean([draw.sign for _, draw in ops]) == pytest.approx(0, abs=0.05)
    centres = Counter(draw.centre for _, draw in ops)
    assert set(centres) == {(row, column) for row in range(3) for column in range(5)}
    assert all(number / len(ops) == pytest.approx(1 / 15, abs=0.015) for number in centres.values())


# 3-Augment


def test_three_augment_draws_one_of_three_and_deits_radius() -> None:
    torch.manual_seed(0)
    draws = [ThreeAugment().make_params([picture(4, 4)]) for _ in range(3_000)]
    names = Counter(draw["name"] for draw in draws)
    assert len(names) == 3
    assert all(number / 3_000 == pytest.approx(1 / 3, abs=0.03) for number in names.values())
    assert distance(np.array([draw["radius"] for draw in draws]), np.linspace(0.1, 2, 3_000)) < 0.03
    for factor in ("brightness", "contrast", "saturation"):
        jitters = np.array([draw["jitter"][f"{factor}_factor"] for draw in draws])
        assert distance(jitters, np.linspace(0.7, 1.3, 3_000)) < 0.03


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Grey", v1.Grayscale(3)),
        ("Solarize", ImageOps.solarize),
        ("Blur", lambda image: image.filter(ImageFilter.GaussianBlur(1.7))),
    ],
)
@pytest.mark.parametrize("size", [(24, 40), (1, 1)])
def test_three_augment_is_pillows(
    name: str, expected: Callable[[Image.Image], Image.Image], size: tuple[int, int]
) -> None:
    image, augment = picture(*size), ThreeAugment()
    params = augment.make_params([image]) | {"name": name, "radius": 1.7}
    params["jitter"] |= {"brightness_factor": 1.2, "contrast_factor": 0.8, "saturation_factor": 0.9}
    params["jitter"]["fn_idx"] = torch.tensor([2, 0, 1, 3])  # saturation, brightness, contrast
    result = expected(pillow(image))
    for enhancer, factor in ((ImageEnhance.Color, 0.9), (ImageEnhance.Brightness, 1.2), (ImageEnhance.Contrast, 0.8)):
        result = enhancer(result).enhance(factor)
    assert torch.equal(augment.transform(image, params), F.pil_to_tensor(result))


def test_three_augment_without_jitter_is_one_of_three() -> None:
    image = picture(24, 40)
    greys = v1.Grayscale(3)(pillow(image)), ImageOps.solarize(pillow(image))
    torch.manual_seed(0)
    results = {ThreeAugment(jitter=0)(image).numpy().tobytes() for _ in range(20)}
    assert {F.pil_to_tensor(expected).numpy().tobytes() for expected in greys} < results


# All


@pytest.mark.parametrize("augment", AUGMENTS, ids=lambda augment: type(augment).__name__)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (5, 3), (16, 24)])
def test_augments_keep_the_shape_and_follow_the_seed(augment: v2.Transform, size: tuple[int, int]) -> None:
    image = picture(*size)
    as_decoded = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    results = []
    for given in (image, as_decoded):
        for seed in range(40):
            torch.manual_seed(seed)
            results.append(augment(given))
    assert all(result.shape == image.shape and result.dtype == torch.uint8 for result in results)
    assert all(torch.equal(*pair) for pair in zip(results[:40], results[40:], strict=True))
    assert torch.equal(image, picture(*size))
    assert torch.equal(as_decoded, picture(*size))
    if size == (16, 24):
        assert len({result.numpy().tobytes() for result in results}) > 20


@pytest.mark.parametrize("name", list(big_vision.OPS))
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_big_vision_ops_take_tiny_images(name: str, size: tuple[int, int]) -> None:
    for magnitude in (0, 5, 10, 30):
        for sign in (1, -1):
            result = apply(name, picture(*size), magnitude, sign)
            assert result.shape == (3, *size)
            assert result.dtype == torch.uint8


@pytest.mark.parametrize("augment", AUGMENTS, ids=lambda augment: type(augment).__name__)
def test_augments_come_from_a_config(augment: v2.Transform) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--augment", type=v2.Transform)
    path = f"{type(augment).__module__}.{type(augment).__name__}"
    made = parser.instantiate(parser.parse_args([f"--augment={path}"])).augment
    assert type(made) is type(augment)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BigVisionRandAugment(ops=0), "ops is 0"),
        (lambda: BigVisionRandAugment(magnitude=-1), "magnitude is -1"),
        (lambda: TimmRandAugment(magnitude=11), "magnitude is 11"),
        (lambda: TimmRandAugment(ops=0), "ops is 0"),
        (lambda: TimmRandAugment(std=-1), "std is -1"),
        (lambda: TimmRandAugment(prob=1.5), "prob is 1.5"),
        (lambda: ThreeAugment(jitter=-0.1), "jitter is -0.1"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], v2.Transform], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

"""data.views: further views of an image, drawn from (seed, epoch, index, repeat, view) and nothing else."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_stage
import torch
import yaml
from conftest import SMALL, Result
from lightning.pytorch import Trainer
from PIL import Image
from small_stage import TINY
from torch import Tensor
from torchvision.transforms import InterpolationMode

from vitlit.data import ImageFolderData
from vitlit.data.augment import TimmRandAugment
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.views import Views
from vitlit.errors import UserError
from vitlit.images import preprocess
from vitlit.images.crops import RandomResizedCrop
from vitlit.images.decode import decode_bytes
from vitlit.model import ViT
from vitlit.objectives import Batch, Objective, Step, Supervised
from vitlit.seeds import mix_one
from vitlit.stages import Pretrain

pytestmark = pytest.mark.usefixtures("undrawn")

VIEWS = [Views(2, 16, (0.4, 1.0)), Views(3, (8, 24), (0.05, 0.4))]
SHAPES = [(16, 16), (16, 16), (16, 16), (8, 24), (8, 24), (8, 24)]


def folder_data(root: Path, **options: Any) -> ImageFolderData:
    return small_stage.data(root, **{"seed": 3, "views": VIEWS, **options})


def batches(root: Path, step: int = 0, rank: int = 0, world: int = 1, **options: Any) -> list[Batch]:
    """An epoch from a step on, as the Trainer of one of several ranks hands it on."""
    data = folder_data(root, **options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step,
        global_rank=rank,
        world_size=world,
        num_devices=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(dtype=torch.float32),
    )
    return [data.on_after_batch_transfer(data.on_before_batch_transfer(b, 0), 0) for b in data.train_dataloader()]


def same(one: Batch, other: Batch) -> bool:
    pairs = zip((*one.views, one.labels, one.indices), (*other.views, other.labels, other.indices), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_batch_has_its_views_in_order(few: Path) -> None:
    data = folder_data(few)
    assert data.num_views == 6
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch.views] == [(8, 3, *shape) for shape in SHAPES]
    assert all(view.dtype == torch.float32 for view in batch.views)
    assert all(-1 <= view.min() < view.max() <= 1 for view in batch.views)
    assert len(next(iter(data.val_dataloader())).views) == 1


def test_a_loader_collates_each_view_as_uint8_with_its_channels_last(few: Path) -> None:
    images, _, _, position, *further = next(iter(folder_data(few).train_dataloader().batches))  # type: ignore[union-attr]
    assert [view.shape for view in (images, *further)] == [(8, *shape, 3) for shape in SHAPES]
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in (images, *further))
    assert position == 0


def test_the_first_view_is_the_same_bits_with_and_without_others(few: Path) -> None:
    options: dict[str, Any] = {"augment": [TimmRandAugment()], "erasing": Erasing(0.5), "repeats": 2}
    alone, first = (list(folder_data(few, views=views, **options).train_dataloader()) for views in (None, VIEWS))
    for one, several in zip(alone, first, strict=True):
        assert len(one.views) == 1
        assert same(one, several._replace(views=several.views[:1]))


def test_views_are_the_same_however_they_are_dealt(few: Path) -> None:
    whole = batches(few)
    ranks = [batches(few, rank=rank, world=2) for rank in range(2)]
    for batch, one, other in zip(whole, *ranks, strict=True):
        views = [torch.cat(halves) for halves in zip(one.views, other.views, strict=True)]
        assert all(map(torch.equal, views, batch.views))
    assert all(map(same, batches(few, num_workers=2), whole))
    assert all(map(same, batches(few, step=2)[:3], whole[2:]))


def test_views_repeats_and_epochs_differ(tmp_path: Path) -> None:
    for number in range(8):
        path = tmp_path / "train" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((320, 200), 50).save(path)  # in small images two crops may be equal by chance
    data = folder_data(tmp_path, views=[Views(2, 16)], repeats=2, batch_size=8, flip=0.0)
    loader = data.train_dataloader()
    seen: dict[int, list[bytes]] = {}
    for _ in range(2):
        [batch] = loader
        for view in batch.views:
            for index, image in zip(batch.indices.tolist(), view, strict=True):
                seen.setdefault(index, []).append(image.numpy().tobytes())
    twice = [images for images in seen.values() if len(images) == 12]  # drawn in both epochs
    assert twice
    assert all(len(set(images)) == 12 for images in twice)


def test_a_view_is_a_random_resized_crop_drawn_from_its_own_seed(few: Path) -> None:
    data = folder_data(few, flip=0.0)
    index = data.split("train")
    batch = next(iter(data.train_dataloader()))
    crops = [partial(RandomResizedCrop, kind.pixels, kind.scale) for kind in VIEWS for _ in range(kind.count)]
    for number, crop in enumerate(crops, start=1):
        for row, item in enumerate(batch.indices.tolist()):
            torch.manual_seed(mix_one(7, 3, 0, item, 0, number))
            expected = crop(InterpolationMode.BICUBIC)(decode_bytes(index.read(item), ""))
            assert torch.equal(batch.views[number][row], data.preprocess.normalise(expected[None])[0])


def test_an_image_is_decoded_once(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(data: bytes, path: str, ground: str) -> Tensor:
        calls.append(path)
        return decode_bytes(data, path, ground)

    monkeypatch.setattr(preprocess, "decode_bytes", counted)
    assert len(list(folder_data(few).train_dataloader())) == 5
    assert len(calls) == len(set(calls)) == 40


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Views(0, 16), r"data\.views: count is 0"),
        (lambda: Views(1, (0, 16)), r"data\.views: size is 0"),
        (lambda: Views(1, 16, (0.5, 0.4)), r"data\.views: scale \[0\.5, 0\.4\] is not a range of shares"),
        (lambda: folder_data(Path(), mixing=Mixing(0.8)), r"data\.mixing .*data\.views .*leave one out"),
    ],
)
def test_views_that_cannot_be_are_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        wrong()


class Pair(Objective):
    """The distance between features of two views."""

    views = 2

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        features = [vit(view) for view in batch.views]
        return Step((features[0] - features[-1]).pow(2).mean())


def fit(data: ImageFolderData, objective: Callable[[ViT], Objective]) -> Trainer:
    trainer = small_stage.trainer(max_steps=2)
    trainer.fit(Pretrain(ViT(**TINY), objective, partial(torch.optim.SGD, lr=0.1)), data)
    return trainer


def test_an_objective_of_several_views_learns_from_them(few: Path) -> None:
    assert fit(folder_data(few), Pair).global_step == 2


@pytest.mark.parametrize(
    ("views", "objective", "words"),
    [
        (
            VIEWS,
            partial(Supervised, num_classes=4),
            r"learns from one view .* has 6; leave data\.views out",
        ),
        (None, Pair, r"Pair needs at least 2 views .* has 1; give data\.views"),
        ([Views(1, 20)], Pair, r"data\.views: patch size 8 does not divide the image size 20 x 20"),
    ],
)
def test_views_that_an_objective_does_not_take_are_refused(few: Path, views: Any, objective: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(folder_data(few, views=views), objective)


def test_a_config_describes_views(few: Path, vitlit: Callable[..., Result], tmp_path: Path) -> None:
    """They are parsed and printed; the one objective of labels refuses them."""
    views = [{"count": 2, "size": 24, "scale": [0.4, 1.0]}, {"count": 6, "size": [8, 16]}]
    (tmp_path / "views.yaml").write_text(yaml.safe_dump({"data": {"views": views}}))
    arguments = ["fit", *SMALL, "--config", "views.yaml", "--data.root", few]
    printed = vitlit(*arguments, "--print_config")
    assert printed.code == 0, printed.err
    found = yaml.safe_load(printed.out)["data"]["views"]
    assert [{name: view[name] for name in ("count", "size", "scale")} for view in found] == [
        views[0],
        {**views[1], "scale": [0.05, 1.0]},
    ]
    assert not any(view[name] for view in found for name in ("jitter", "grey", "blur", "solarise"))
    result = vitlit(*arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "Supervised learns from one view of an image, but the data has 9; leave data.views out" in result.err
    assert not (tmp_path / "runs").exists()
    result = vitlit(*arguments, "--data.views", "[{count: 0, size: 16}]")
    assert result.code == 2
    assert "data.views: count is 0" in result.err

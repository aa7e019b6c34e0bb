"""The data module: batches, what they hold, and what is refused before training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_stage
import torch
from conftest import paint
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vitlit.data import ImageFolderData
from vitlit.data.augment import TimmRandAugment
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.errors import UserError
from vitlit.objectives import Batch


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
    assert capsys.readouterr().out == f"{tmp_path / 'val'} lacks 3 of 4 classes, such as 'a'\n"
    data.split("val")
    assert capsys.readouterr().out == ""


def test_after_a_training_any_loader_is_evaluated(few: Path) -> None:
    stage, runner = small_stage.pretrain(), small_stage.trainer()
    runner.fit(stage, data := small_stage.data(few))
    predicted = runner.predict(stage, data.val_dataloader())
    assert len(torch.cat(predicted)) == len(data.split("val"))  # type: ignore[arg-type]
    pairs: Any = [(torch.randn(3, 16, 16), 1)] * 5
    assert set(runner.test(stage, DataLoader(pairs, 2), verbose=False)[0]) >= {"test/loss"}


def test_what_the_data_lacks_is_refused_before_training(few: Path, tree: Path) -> None:
    for data, pattern in (
        (small_data(few, batch_size=41), "batch_size 41 is more than the 40 training images"),
        (small_data(few, batch_size=8, micro_batch=3), "batch_size 8 does not divide over 1 devices x 3"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": [v2.ToDtype(torch.float32, scale=True)]}, r"data\.augment makes images float32 .* stay uint8"),
        ({"augment": [v2.Resize((8, 8))]}, r"data\.augment makes images uint8 \[3, 8, 8\]"),
        ({"repeats": 9}, "batch_size is 8; give at least 18, or fewer --data.repeats"),
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


def test_a_composition_of_transforms_is_one_more_transform(few: Path) -> None:
    invert = v2.RandomInvert(1.0)
    plain, one, composed, several = (
        regularised(few, mixing=Mixing(), erasing=Erasing(), augment=augment)[0][0]
        for augment in (None, invert, v2.Compose([invert]), [invert])
    )
    assert torch.equal(one, composed)
    assert torch.equal(one, several)
    torch.testing.assert_close(one, -plain)


def test_without_a_trainer_it_is_set_up_and_gives_batches(few: Path) -> None:
    data = small_data(few)
    data.prepare_data()
    data.setup("fit")
    assert [len(batch.labels) for batch in data.train_dataloader()] == [8] * 5
    data.setup("validate")
    assert sum(len(batch.labels) for batch in data.val_dataloader()) == 11
    with pytest.raises(UserError, match="has no folder test"):
        data.setup("test")

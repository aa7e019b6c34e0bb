"""A Python value of a wrong type is told where it is given, and not by whatever it meets first."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import user_error
from small_stage import TINY
from torch.optim import AdamW

from vitlit import ViT
from vitlit.data import ImageFolderData, Preprocess
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.views import Views
from vitlit.errors import fits
from vitlit.model.lora import LoRA
from vitlit.objectives import Supervised
from vitlit.optim import Groups, Schedule
from vitlit.stages import Finetune, Pretrain

DATA = partial(ImageFolderData, "FOLDER")
ADAM = partial(AdamW, lr=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ViT, {"width": "32"}, r"^width is '32' \(str\); give int$"),
        (ViT, {"depth": None}, "depth is None"),
        (ViT, {"dropout": "0.1"}, "dropout is '0.1'"),
        (ViT, {"image_size": "32"}, r"image_size is '32' \(str\); give int \| tuple\[int, int\]"),
        (ViT, {"image_size": (32, 32, 3)}, "image_size is"),
        (ViT.from_preset, {"preset": 16}, "preset 16"),
        (DATA, {"batch_size": "8"}, r"^data.batch_size is '8' \(str\); give int$"),
        (DATA, {"batch_size": 8.0}, "data.batch_size is 8.0"),
        (DATA, {"num_workers": "2"}, "data.num_workers"),
        (DATA, {"image_size": 32.0}, "data.image_size"),
        (DATA, {"crop_scale": 0.5}, r"data.crop_scale is 0.5 \(float\); give tuple\[float, float\]"),
        (DATA, {"mean": 0.5}, "data.mean"),
        (DATA, {"flip": "half"}, "data.flip"),
        (DATA, {"holdout": None}, "data.holdout"),
        (DATA, {"on_bad_image": "ignore"}, r"give Literal\['error', 'skip'\]"),
        (DATA, {"erasing": {"prob": 0.5}}, "data.erasing is .*give vitlit.data.erasing.Erasing"),
        (DATA, {"mixing": True}, "data.mixing"),
        (DATA, {"views": [2]}, "data.views"),
        (DATA, {"views": {"count": 2, "size": 16}}, "data.views"),
        (DATA, {"views": [{"count": "2", "size": 16}]}, "data.views: count is '2'"),
        (ImageFolderData, {"root": 5}, "data.root is 5"),
        (partial(Views, 1), {"size": "16"}, "data.views: size"),
        (Erasing, {"prob": "1"}, "data.erasing.prob"),
        (Mixing, {"mixup": "1"}, "data.mixing.mixup"),
        (Preprocess, {"image_size": 32}, "image_size is 32"),
        (LoRA, {"layers": "attn.qkv"}, "model.lora.layers"),
        (Groups, {"lr": 3}, "model.groups.lr"),
        (Schedule, {"warmup": 1.5}, "model.schedule.warmup"),
        (partial(Supervised, ViT(**TINY)), {"num_classes": "4"}, "model.objective.num_classes"),
        (Pretrain, {"vit": "B/16", "objective": Supervised, "optimizer": ADAM}, "model.vit is 'B/16'"),
        (
            partial(Pretrain, ViT(**TINY), partial(Supervised, num_classes=4), ADAM),
            {"schedule": "cosine"},
            "model.schedule is 'cosine'.*give vitlit.optim.schedule.Schedule",
        ),
        (partial(Finetune, vit=ViT(**TINY), optimizer=ADAM), {"lora": 8}, "model.lora is 8"),
        (partial(Finetune, vit=ViT(**TINY), optimizer=ADAM), {"num_classes": "4"}, "model.num_classes is '4'"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    user_error(message, partial(make, **options))


def test_views_may_be_given_as_in_a_config(few: Path) -> None:
    views: Any = [{"count": 2, "size": [8, 24]}]
    data = ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0, views=views)
    assert [tuple(view.shape[-2:]) for view in next(iter(data.train_dataloader())).views] == [
        (16, 16),
        (8, 24),
        (8, 24),
    ]


@pytest.mark.parametrize(
    ("value", "hint", "whether"),
    [
        (3, float, True),
        (torch.tensor(3), float, False),
        (True, int, False),
        (1, bool, False),
        (Path("a"), str, True),
        ([1, 2], tuple[int, int], True),
        ([1, 2.5], tuple[int, int], False),
        ((1, 2, 3), tuple[int, ...], True),
        ((), tuple[int, ...], True),
        ("ab", Sequence[str], False),
        (["a"], Sequence[str], True),
        (None, int | None, True),
        ("b", Literal["a", "b"], True),
        ({"a": 1}, dict[str, float], True),
        (len, Callable[[str], int], True),
        (object(), Any, True),
    ],
)
def test_what_is_of_a_type(value: Any, hint: Any, whether: bool) -> None:
    assert fits(value, hint) is whether

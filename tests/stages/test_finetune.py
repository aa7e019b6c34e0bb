"""Ways to finetune: what each of them trains, keeps in its checkpoint and refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomized
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vitlit
from vitlit.callbacks import EMA
from vitlit.data import ImageFolderData
from vitlit.data.mixing import Mixing
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.lora import LoRA
from vitlit.objectives import Batch, Distillation, Objective, Step, Supervised
from vitlit.optim import Groups, Schedule
from vitlit.stages import Finetune
from vitlit.weights import save_weights

SIZE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "heads": 2, "mlp_dim": 32}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    vit = randomized(ViT(**SIZE, num_classes=4), 0.2)
    vit.classes = list("0123")
    vit.preprocess = vitlit.data.Preprocess((16, 16))
    save_weights(vit, tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def made(weights: str, **options: Any) -> Finetune:
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return Finetune(**{"init_from": weights, "num_classes": 4, "optimizer": adamw, "schedule": Schedule(1), **options})


def fit(stage: Finetune, root: Path, path: Path | None = None, steps: int = 5, **options: Any) -> Trainer:
    data: dict[str, Any] = {"image_size": 16, "batch_size": 8, "num_workers": 0, **options.pop("data", {})}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_steps=steps, logger=False, num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(stage, ImageFolderData(str(root), **data), ckpt_path=path, weights_only=True)
    return trainer


def moved(stage: Finetune, before: dict[str, Tensor]) -> set[str]:
    """The first parts of the names of the parameters that training changed, blocks with their number."""
    names = {name for name, tensor in stage.vit.named_parameters() if not torch.equal(tensor, before[name])}
    return {".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in names}


def start(weights: str) -> dict[str, Tensor]:
    return vitlit.load(weights).state_dict()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"}),
        ({"freeze": True}, {"head"}),
        ({"last_blocks": 0}, {"norm", "head"}),
        ({"last_blocks": 2}, {"blocks.1", "blocks.2", "norm", "head"}),
        ({"freeze": ["*_token", "pos_embed", "patch_embed.*", "blocks.[01].*"]}, {"blocks.2", "norm", "head"}),
    ],
)
def test_frozen_parameters_do_not_change(options: dict[str, Any], parts: set[str], weights: str, few: Path) -> None:
    stage = made(weights, **options)
    fit(stage, few)
    before = start(weights)
    before["head.weight"], before["head.bias"] = torch.zeros(4, 16), torch.zeros(4)
    assert moved(stage, before) == parts


def test_frozen_parts_give_features_without_dropout(weights: str) -> None:
    vit = ViT(**SIZE, dropout=0.5, drop_path=0.5)
    stage = made(weights, vit=vit, last_blocks=1).train()
    assert not any(
        module.training for part in (vit.patch_embed, vit.pos_drop, *vit.blocks[:2]) for module in part.modules()
    )
    assert all(module.training for part in (vit.blocks[2], vit.norm, vit.head) for module in part.modules())
    assert not any(module.training for module in stage.eval().modules())


def test_a_run_with_adapters_saves_the_merged_network(weights: str, few: Path, tmp_path: Path) -> None:
    stage = made(weights, lora=LoRA(rank=2))
    trainer = fit(stage, few)
    before = start(weights)
    for name, tensor in stage.vit.named_parameters():
        if "lora" not in name and not name.startswith("head"):
            assert torch.equal(tensor, before[name])
    images = torch.randn(3, 3, 16, 16)
    expected = stage.eval()(images)
    for weights_only in (True, False):
        path = tmp_path / f"{weights_only}.ckpt"
        trainer.save_checkpoint(path, weights_only=weights_only)
        plain = vitlit.load(path)
        assert not any("lora" in name for name in plain.state_dict())
        assert (plain(images) - expected).abs().max() <= 1e-5
        again = Finetune.load_from_checkpoint(path)
        assert (again.eval()(images) - expected).abs().max() <= (1e-5 if weights_only else 0)
    assert not torch.equal(plain.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("average", [False, True])
def test_a_run_with_adapters_continues_bit_for_bit(average: bool, weights: str, few: Path, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [EMA(0.5)] if average else []

    torch.manual_seed(3)
    whole = made(weights, lora=LoRA(rank=2))
    fit(whole, few, steps=10, callbacks=callbacks())
    torch.manual_seed(3)
    first = made(weights, lora=LoRA(rank=2), schedule=Schedule(1, "constant"))
    first.schedule = Schedule(1)

    class Stop(vitlit_callback()):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, few, steps=10, callbacks=[*callbacks(), Stop()])
    after = made(weights, lora=LoRA(rank=2))
    fit(after, few, tmp_path / "half.ckpt", steps=10, callbacks=callbacks())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def vitlit_callback() -> Any:
    from lightning.pytorch import Callback

    return Callback


def test_layer_decay_and_rate_per_images_reach_the_optimizer(weights: str, few: Path) -> None:
    stage = made(weights, groups=Groups(layer_decay=0.5), schedule=Schedule(1, "constant", lr_per=256))
    trainer = fit(stage, few, steps=3)
    rates = {group["layers"][0]: group["lr"] for group in trainer.optimizers[0].param_groups}
    peak = 0.01 * 8 / 256
    assert rates == pytest.approx(
        {
            "embed": peak / 16,
            "blocks.0": peak / 8,
            "blocks.1": peak / 4,
            "blocks.2": peak / 2,
            "norm": peak,
            "head": peak,
        }
    )


def test_multiples_use_the_same_names_as_freeze(weights: str, few: Path) -> None:
    groups = Groups(lr={"blocks.2.*": 0.5, "head.*": 10.0}, weight_decay={"pos_embed": 1.0})
    trainer = fit(made(weights, groups=groups, schedule=Schedule(decay="constant")), few, steps=1)
    rates = {group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {0.005, 0.01, 0.1}
    with pytest.raises(UserError, match=r"'blokcs\.\*' matches no trainable parameter, such as head\."):
        fit(made(weights, groups=Groups(lr={"blokcs.*": 0.5})), few)


def test_a_learning_rate_of_zero_is_refused(weights: str, few: Path) -> None:
    with pytest.raises(UserError, match="every learning rate is 0, which trains nothing"):
        fit(made(weights, optimizer=partial(torch.optim.AdamW, lr=0.0)), few, steps=2)


def test_a_share_of_the_learning_rate_needs_a_global_batch(weights: str) -> None:
    stage = made(weights, schedule=Schedule(lr_per=256))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    stage._trainer = trainer
    with pytest.raises(UserError, match="lr_per needs a data module"):
        stage.lr_scale()


def test_a_finetuned_head_is_linear_whatever_the_objective(weights: str) -> None:
    for objective in (Supervised, partial(Supervised, label_smoothing=0.1), partial(Distillation, teacher=weights)):
        stage = made(weights, objective=objective)
        assert isinstance(stage.vit.head, nn.Linear)
        assert stage.vit.head.weight.abs().max() == 0


def test_an_objective_need_not_take_the_number_of_classes(weights: str, few: Path) -> None:
    class Margin(Objective):
        needs_labels = True

        def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
            logits = vit(batch.views[0])
            return Step(nn.functional.multi_margin_loss(logits, batch.labels), logits)

    stage = made(weights, objective=Margin)
    assert fit(stage, few, steps=2).global_step == 2
    assert stage.vit.config.num_classes == 4


def test_a_kept_head_continues_from_the_weights(weights: str, few: Path) -> None:
    """At another resolution, as in FixRes (1906.06423): without an update it is the weights' network, resampled."""
    still = {"optimizer": partial(torch.optim.SGD, lr=1e-30), "schedule": Schedule()}
    stage = made(weights, vit=ViT(**{**SIZE, "image_size": 24}), keep_head=True, **still)
    fit(stage, few, data={"image_size": 24}, steps=1)
    resized = ViT(**{**SIZE, "image_size": 24}, num_classes=4)
    vitlit.load_weights(resized, weights)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(stage.eval()(images), resized.eval()(images))
    assert isinstance(stage.vit.head, nn.Linear)
    assert stage.vit.head.weight.abs().max() > 0
    assert moved_by_training(weights, few) == {"norm", "head"}


def moved_by_training(weights: str, root: Path) -> set[str]:
    stage = made(weights, keep_head=True, last_blocks=0)
    fit(stage, root)
    return moved(stage, start(weights))


@pytest.mark.parametrize(
    ("head", "classes", "has"),
    [
        ({"num_classes": 0}, [], "no head"),
        ({"num_classes": 3}, [], "a head for 3 classes"),
        ({"num_classes": 4, "hidden_dim": 8}, [], "a head with a hidden layer"),
        ({"num_classes": 4}, list("3210"), "a head for 4 classes, '3' instead of '0'"),
        ({"num_classes": 4}, list("01x3"), "a head for 4 classes, 'x' instead of '2'"),
    ],
)
def test_a_head_that_does_not_fit_is_not_kept(
    head: dict[str, Any], classes: list[str], has: str, few: Path, tmp_path: Path
) -> None:
    vit = ViT(**SIZE, **head)
    vit.classes = classes
    save_weights(vit, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"keep_head needs one linear layer for the data's 4 classes, .* has {has}"):
        fit(made(str(tmp_path / "other.safetensors"), keep_head=True), few)


def test_mixed_and_distilled_training_steps_and_reloads(weights: str, few: Path, tmp_path: Path) -> None:
    objective = partial(Distillation, teacher=weights, kind="soft", label_smoothing=0.1)
    stage = made(weights, objective=objective)
    trainer = fit(stage, few, data={"mixing": Mixing(mixup=0.2, cutmix=1.0)})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    images = torch.randn(2, 3, 16, 16)
    Path(weights).unlink()  # neither the weights nor the teacher are needed any more
    assert torch.equal(Finetune.load_from_checkpoint(tmp_path / "a.ckpt").eval()(images), stage.eval()(images))
    assert {"train/loss_labels", "train/loss_teacher"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": True, "lora": LoRA()}, "exclude one another"),
        ({"freeze": ["a*"], "last_blocks": 1}, "exclude one another"),
        ({"freeze": True, "last_blocks": 0}, "exclude one another"),
        ({"lora": LoRA(rank=17)}, r"model\.lora\.rank 17 is more than attn\.qkv has, 16"),
        ({"lora": LoRA(), "last_blocks": 0}, "exclude one another"),
        ({"objective": partial(Supervised, num_classes=10)}, "num_classes 10, but the stage 4"),
        ({"freeze": ["blocs.*"]}, r"model\.freeze 'blocs\.\*' matches no parameter, such as"),
        ({"last_blocks": 4}, "model: last_blocks is 4; give from 0 to 3"),
        ({"num_classes": None}, "a supervised objective needs num_classes of at least 2, not 0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str, weights: str) -> None:
    with pytest.raises(UserError, match=message):
        made(weights, **options)


def test_dropout_is_not_taken_from_the_weights(few: Path, tmp_path: Path) -> None:
    save_weights(ViT(**SIZE, num_classes=4, dropout=0.5, drop_path=0.5), tmp_path / "dropped.safetensors")
    config = made(str(tmp_path / "dropped.safetensors")).vit.config
    assert (config.dropout, config.drop_path) == (0, 0)


def test_logs_are_means_over_the_micro_batches_of_a_step(weights: str, few: Path) -> None:
    objective = partial(Distillation, teacher=weights, share=0.5)
    trainer = fit(made(weights, objective=objective), few, data={"micro_batch": 2}, log_every_n_steps=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert trainer.accumulate_grad_batches == 4
    both = (logged["train/loss_labels"] + logged["train/loss_teacher"]) / 2
    assert logged["train/loss"] == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3)])
def test_a_stage_takes_plain_loaders(accumulate: int, steps: int, weights: str) -> None:
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(6)]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    quiet |= {"accelerator": "cpu", "accumulate_grad_batches": accumulate}
    trainer = Trainer(max_epochs=2, **quiet)
    trainer.fit(made(weights, schedule=Schedule("1 epoch", "constant")), loader, loader)
    factor: Any = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]  # type: ignore[union-attr]
    assert [factor(step) < 1 for step in (steps - 1, steps)] == [True, False]
    trainer = Trainer(max_steps=3, **quiet)  # whose epochs Lightning does not count beforehand
    trainer.fit(made(weights), loader, loader)
    assert trainer.global_step == 3

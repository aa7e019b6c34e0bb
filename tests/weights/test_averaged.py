"""Averaged and raw weights: one rule for every origin, named, with a way to the other; and what is beside a ViT."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import SMALL, Result, done, refused, user_error
from peers import shaken, vit_of
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer

import vitlit as package

Command = Callable[..., Result]
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head")}


def timms(raw: State, averaged: State) -> Any:
    return {"state_dict": raw, "state_dict_ema": averaged, "epoch": 3, "optimizer": {"state": {}}}


def deits(raw: State, averaged: State) -> Any:
    return {"model": raw, "model_ema": averaged}


def dinos(raw: State, averaged: State) -> Any:
    return {"student": below("module.backbone.", headless(raw)), "teacher": below("backbone.", headless(averaged))}


def dinov2s(raw: State, averaged: State) -> Any:
    whole = {**below("student.backbone.", headless(raw)), **below("teacher.backbone.", headless(averaged))}
    return {
        "model": {**whole, "student.dino_head.mlp.0.weight": torch.ones(2, 2), "teacher.dino_head.b": torch.ones(2)}
    }


def lightnings(raw: State, averaged: State) -> Any:
    counter = {"averaging_state": {"n_averaged": torch.tensor(3)}}
    return {"state_dict": below("model.", averaged), "current_model_state": below("model.", raw), **counter}


def modules(raw: State, averaged: State) -> Any:
    return {"state_dict": {**below("model.", raw), **below("model_ema.module.", averaged)}}


def jepas(raw: State, averaged: State) -> Any:
    return {"encoder": below("module.", headless(raw)), "target_encoder": below("module.", headless(averaged))}


NAMES = {
    timms: ("state_dict_ema", "state_dict"),
    deits: ("model_ema", "model"),
    dinos: ("teacher", "student"),
    dinov2s: ("teacher", "student"),
    lightnings: ("state_dict", "current_model_state"),
    modules: ("model_ema.module", "model"),
    jepas: ("target_encoder", "encoder"),
}


@pytest.mark.parametrize("content", NAMES, ids=lambda content: content.__name__)
def test_averaged_weights_go_before_raw_ones_whose_origin_ever(content: Any, vitlit: Command, tmp_path: Path) -> None:
    raw, averaged = vit_of(), vit_of()
    torch.save(content(raw.state_dict(), averaged.state_dict()), tmp_path / "both.pth")
    words = "{} (averaged; raw ones are in {})".format(*NAMES[content])
    other = "{1} (raw; averaged ones are in {0})".format(*NAMES[content])
    vit = package.load(tmp_path / "both.pth")
    assert torch.equal(vit.get_parameter("cls_token"), averaged.get_parameter("cls_token"))
    assert f"weights: {words}" in str(package.load_weights(vit, tmp_path / "both.pth"))
    report = package.load_weights(vit, tmp_path / "both.pth", weights="raw")
    assert torch.equal(vit.get_parameter("cls_token"), raw.get_parameter("cls_token"))
    assert f"weights: {other}" in str(report)
    again = package.load(tmp_path / "both.pth", weights="raw")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in vit.state_dict().items())


def test_the_command_shows_and_converts_either(vitlit: Command, tmp_path: Path) -> None:
    raw, averaged = vit_of(), vit_of()
    torch.save(deits(raw.state_dict(), averaged.state_dict()), tmp_path / "deit.pth")
    out = done(vitlit("weights", "show", "deit.pth"))
    assert "weights from model_ema (averaged; raw ones are in model)" in out
    assert "facebook deit" in out  # whichever is read
    out = done(vitlit("weights", "show", "--weights=raw", "deit.pth"))
    assert "weights from model (raw; averaged ones are in model_ema)" in out
    assert "facebook deit" in out
    done(vitlit("weights", "convert", "deit.pth", "raw.ckpt", "--format", "vitlit", "--weights", "raw"))
    assert torch.equal(package.load(tmp_path / "raw.ckpt").get_parameter("cls_token"), raw.get_parameter("cls_token"))
    refused(vitlit("weights", "show", "deit.pth", "--weights", "both"), "invalid choice: 'both' (choose from")


def test_raw_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    state = vit_of().state_dict()
    torch.save(state, tmp_path / "bare.pth")
    user_error("bare.pth has no raw weights beside averaged ones", package.load, tmp_path / "bare.pth", "raw")
    torch.save({"model_ema": state}, tmp_path / "ema.pth")
    user_error("ema.pth has no raw weights beside averaged ones", package.load, tmp_path / "ema.pth", "raw")


def test_an_average_of_torchvisions_script(tmp_path: Path) -> None:
    model = VisionTransformer(32, 8, 1, 3, 192, 64, num_classes=10)
    average = AveragedModel(model)
    average.get_parameter("module.class_token").data.add_(1)
    content = {"model": model.state_dict(), "model_ema": average.state_dict(), "optimizer": {}}
    torch.save(content, tmp_path / "model_9.pth")
    for weights, token in (("averaged", average.get_parameter("module.class_token")), ("raw", model.class_token)):
        vit = package.load(tmp_path / "model_9.pth", weights)  # type: ignore[arg-type]
        assert torch.equal(vit.get_parameter("cls_token"), token)
    assert package.load_weights(vit, tmp_path / "model_9.pth").format == "torchvision"


def test_a_run_with_an_average_gives_either(few: Path, vitlit: Command, tmp_path: Path) -> None:
    fit = ["--data.root", few, "--trainer.callbacks", "[{class_path: EMA, init_args: {decay: 0.9}}]"]
    assert vitlit("fit", *SMALL, *fit).code == 0
    last = tmp_path / "runs" / "pretrain" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    for weights, key in (("averaged", "state_dict"), ("raw", "current_model_state")):
        vit = package.load(last, weights)  # type: ignore[arg-type]
        assert torch.equal(vit.get_parameter("cls_token"), content[key]["vit.cls_token"])
    assert not torch.equal(content["state_dict"]["vit.cls_token"], content["current_model_state"]["vit.cls_token"])


EXTRA: dict[str, dict[str, Tensor]] = {
    "criterion.*": {"criterion.weight": torch.ones(5), "criterion.count": torch.tensor(3)},
    "model.queue.*": {"model.queue.features": torch.ones(5)},
    "model.pointer": {"model.pointer": torch.tensor(3)},
}


@pytest.mark.parametrize("pattern", EXTRA)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_what_is_beside_a_vit_is_refused_with_the_way_to_leave_it_out(
    pattern: str, kind: str, vitlit: Command, tmp_path: Path
) -> None:
    vit, file = vit_of(), tmp_path / f"mine.{kind}"
    content = {**below("model.", vit.state_dict()), **EXTRA[pattern]}
    save_file(content, file) if kind == "safetensors" else torch.save({"state_dict": content}, file)
    short = pattern.removeprefix("model.")
    hint = rf"skip=\['(model\.)?{re.escape(short)}'\] leaves it out, and so does `vitlit weights convert --skip '"
    user_error(hint, package.load, file)
    user_error(hint, package.load_weights, vit_of(), file)
    for skip in (pattern, [pattern], short):
        target = vit_of()
        package.load_weights(target, file, skip)
        loaded = package.load(file, skip=skip)
        assert loaded.config.num_classes == 10
        for read in (target, loaded):
            assert torch.equal(read.get_parameter("head.bias"), vit.get_parameter("head.bias"))
    done(vitlit("weights", "show", file.name, "--skip", pattern))
    done(vitlit("weights", "convert", file.name, "out.ckpt", "--format", "vitlit", f"--skip={pattern}"))
    refused(vitlit("weights", "show", file.name), "--skip")


def test_a_head_that_is_skipped_leaves_features(tmp_path: Path) -> None:
    torch.save(vit_of().state_dict(), tmp_path / "a.pth")
    assert package.load(tmp_path / "a.pth", skip="head*").config.num_classes == 0


def test_of_two_vits_one_is_skipped(tmp_path: Path) -> None:
    first, second = vit_of(), vit_of()
    torch.save({**below("a.", first.state_dict()), **below("b.", second.state_dict())}, tmp_path / "two.pth")
    user_error(r"b\.cls_token .* lies outside the ViT in a; skip=\['b\.\*'\]", package.load, tmp_path / "two.pth")
    for skip, vit in (("b.*", first), ("a.*", second)):
        loaded = package.load(tmp_path / "two.pth", skip=skip)
        assert torch.equal(loaded.get_parameter("cls_token"), vit.get_parameter("cls_token"))


SIZE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32}
SIZE |= {"patch_size": 8}
MLP = {"intermediate_size": 96}
SMALLEST: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 3, "mlp_dim": 96}
OWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the config, its options, and ours
    "ViTModel": ("ViT", MLP, {}),
    "ViTForImageClassification": ("ViT", MLP, {"num_classes": 2}),
    "DeiTForImageClassificationWithTeacher": ("DeiT", MLP, {"num_classes": 2, "distilled": True}),
    "Dinov2Model": ("Dinov2", {"use_swiglu_ffn": True}, {"layer_scale": 1.0, "mlp": "swiglu", "mlp_dim": 64}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", {}, {"layer_scale": 1.0, "registers": 4}),
    "DINOv3ViTModel": ("DINOv3ViT", MLP, {"layer_scale": 1.0, "position": "rope"}),
}


@pytest.mark.parametrize("prefix", ["backbone.", "model.backbone.", "module."])
@pytest.mark.parametrize("name", OWN)
def test_transformers_in_a_module_of_ones_own(name: str, prefix: str, tmp_path: Path) -> None:
    kind, options, ours = OWN[name]
    theirs = shaken(getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SIZE, **options)))
    torch.save({"state_dict": below(prefix, theirs.state_dict())}, tmp_path / "own.ckpt")
    vit = package.ViT(**{**SMALLEST, **ours}).eval()
    package.load_weights(vit, tmp_path / "own.ckpt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images)
        expected = expected.logits if "For" in name else expected.last_hidden_state[:, 0]
        assert expected.std() > 0.02
        assert (vit(images) - expected).abs().max() < 1e-5
    beside = {**below(prefix, theirs.state_dict()), "head.weight": torch.ones(7, 24), "head.bias": torch.ones(7)}
    torch.save({"state_dict": beside}, tmp_path / "headed.ckpt")
    user_error(r"head.weight \[7, 24\] lies outside the ViT", package.load_weights, vit, tmp_path / "headed.ckpt")
    assert package.load_weights(vit, tmp_path / "headed.ckpt", "head.*").format.startswith("hf ")


GUESSED: dict[str, Any] = {"norm_eps": 1e-5, "mlp": "gelu_tanh", "heads": 6, "resampling": "bicubic"}


def test_what_a_user_gives_goes_before_a_guess_and_not_before_the_file(tmp_path: Path) -> None:
    vit = vit_of(num_classes=0)
    package.save_weights(vit, tmp_path / "model", "hf")
    mine = vit_of(num_classes=0, **{**GUESSED, "heads": 3})
    report = package.load_weights(mine, tmp_path / "model")
    assert (mine.config.norm_eps, mine.config.mlp) == (1e-6, "gelu")
    assert report.settings == ["norm_eps 1e-06 (was 1e-05)", "mlp gelu (was gelu_tanh)"]
    (tmp_path / "model" / "config.json").unlink()
    mine = vit_of(num_classes=0, **GUESSED)
    report = package.load_weights(mine, tmp_path / "model")
    assert report.settings == []
    assert {name: getattr(mine.config, name) for name in GUESSED} == GUESSED
    usual = vit_of(num_classes=0)
    assert package.load_weights(usual, tmp_path / "model").settings == ["norm_eps 1e-12 (was 1e-06)"]
    assert "assuming what the file does not say: norm_eps 1e-12 (transformers' default for vit)" in str(report)


def test_the_flag_of_a_run_goes_before_a_guess(few: Path, vitlit: Command, tmp_path: Path) -> None:
    package.save_weights(vit_of(num_classes=0), tmp_path / "model", "hf")
    fit = ["fit", "--config", "finetune", "--data.root", few, "--data.image_size", 32, "--data.batch_size", 16]
    fit += [
        "--data.num_workers",
        0,
        "--trainer.max_steps",
        1,
        "--run.report",
        "false",
        "--trainer.logger",
        "false",
        "--model.init_from",
        "model",
    ]
    fit += ["--model.schedule.warmup", 0, "--model.vit.norm_eps", 1e-5, "--model.vit.mlp", "gelu_tanh"]
    refused(vitlit(*fit), "model.vit.mlp is gelu_tanh, but model/model.safetensors was made with gelu")
    (tmp_path / "model" / "config.json").unlink()
    done(vitlit(*fit))
    vit = package.load(tmp_path / "runs" / "finetune")
    assert (vit.config.norm_eps, vit.config.mlp) == (1e-5, "gelu_tanh")


@pytest.mark.parametrize("format", ["timm", "torchvision"])
def test_a_pth_keeps_what_no_tensor_tells(format: Any, tmp_path: Path) -> None:
    vit = vit_of(width=36, heads=6, **({"norm_eps": 0.1, "mlp": "gelu_tanh"} if format == "timm" else {}))
    vit.classes = [f"class {i}" for i in range(10)]
    file = package.save_weights(vit, tmp_path / "a.pth", format)
    again = package.load(file)
    assert (again.config, again.classes) == (vit.config, vit.classes)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(images), vit(images))
        if format == "torchvision":
            theirs: torch.nn.Module = VisionTransformer(32, 8, 2, 6, 36, 384, num_classes=10).eval()
            theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
        else:
            size = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 6, "mlp_ratio": 384 / 36}
            norm = partial(torch.nn.LayerNorm, eps=0.1)
            options: dict[str, Any] = {**size, "num_classes": 10, "act_layer": "gelu_tanh", "norm_layer": norm}
            theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), **options).eval()
        assert (theirs(images) - vit(images)).abs().max() < 1e-5


def test_a_pth_for_timm_without_a_head_is_not_taken_for_dinos(tmp_path: Path) -> None:
    vit = vit_of(width=36, heads=6, num_classes=0)
    file = package.save_weights(vit, tmp_path / "a.pth", "timm")
    assert package.load(file).config == vit.config

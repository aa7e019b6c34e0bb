"""`vitlit weights`, and what foreign weights bring to a run."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import SMALL, Result, done, refused, stranger
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitlit as package
from vitlit.data import Preprocess
from vitlit.model import ViT

Command = Callable[..., Result]
FLAGS = "--data.image_size 32 --data.batch_size 16 --data.num_workers 0 --trainer.max_steps 2 --trainer.logger false"
FLAGS += " --run.report false --model.schedule.warmup 1 --model.init_from"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """timm's Ti/8 of 2 blocks for 32 pixels, 3 classes."""
    path = tmp_path / "timm.safetensors"
    save_file(stranger().state_dict(), path)
    return path


def spoilt(path: Path, **changes: Tensor | None) -> Path:
    """The file with some tensors changed, or left out where None."""
    state: dict[str, Tensor | None] = {**load_file(path), **{n.replace("__", "."): t for n, t in changes.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def test_show_says_what_a_file_is(vitlit: Command, file: Path) -> None:
    out = done(vitlit("weights", "show", file))
    for words in ("timm", "no preset (width 192, depth 2, heads 3, mlp 768, patch 8)", "32 x 32 pixels, 4 x 4 patches"):
        assert words in out
    parameters = sum(tensor.numel() for tensor in load_file(file).values())
    assert f"{parameters:,}" in out
    assert "3 classes" in out
    with torch.device("meta"):
        whole = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0)
    save_file({name: torch.zeros(tensor.shape) for name, tensor in whole.state_dict().items()}, file)
    out = done(vitlit("weights", "show", file))
    for words in ("S/14 (", "518 x 518 pixels", "registers 4", "22,057,344", "(0.485, 0.456, 0.406)"):
        assert words in out


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("vitlit", "a.ckpt"),
        ("vitlit", "a.safetensors"),
        ("timm", "a.pth"),
        ("hf", "folder"),
        ("torchvision", "deep/a.pth"),
    ],
)
def test_convert_writes_and_compares(vitlit: Command, file: Path, tmp_path: Path, format: str, name: str) -> None:
    out = done(vitlit("weights", "convert", file, name, "--format", format))
    assert f": {format}, largest difference of the logits on a seeded batch: 0.0e+00" in out
    images = torch.randn(2, 3, 32, 32)
    expected = stranger()(images)
    assert (package.load(tmp_path / name)(images) - expected).abs().max() < 1e-5
    refused(vitlit("weights", "convert", file, name, "--format", format), f"{name} exists")


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(vitlit: Command, file: Path, tmp_path: Path) -> None:
    refused(vitlit("weights", "convert", file, "a.npz", "--format", "google"), "a.npz", "tanh", "mlp gelu")
    refused(vitlit("weights", "convert", file, "a.pth", "--format", "google"), "a.pth", ".npz")
    refused(vitlit("weights", "convert", file, "a.npz", "--format", "onnx"), "invalid choice: 'onnx'")
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {file.name}


@pytest.mark.parametrize("arguments", ["show", "show a b", "convert a b", "convert a --format timm", "list", "show -x"])
def test_wrong_usage_is_one_line(vitlit: Command, arguments: str) -> None:
    refused(vitlit("weights", *arguments.split()), "vitlit weights: ", "; vitlit weights --help says more")


def test_help_needs_no_file(vitlit: Command) -> None:
    for arguments in ((), ("--help",)):
        assert "torchvision" in done(vitlit("weights", *arguments))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"blocks__1__norm2__bias": None}, "blocks.1.norm2.bias [192] is missing from the file"),
    "extra": ({"blocks__1__norm3__bias": torch.ones(192)}, "the model has no blocks.1.norm3.bias [192]"),
    "gap": ({f"blocks__0__{n}": None for n in ("norm1__weight",)}, "blocks.0.norm1.weight [192] is missing"),
    "transposed": (
        {"blocks__1__mlp__fc1__weight": torch.ones(192, 768)},
        "blocks.1.mlp.fc1.weight is [192, 768] in the file and [768, 192] in the model",
    ),
    "wide": ({"norm__weight": torch.ones(193)}, "norm.weight is [193] in the file and [192] in the model"),
    "nan": ({"norm__weight": torch.full((192,), torch.nan)}, "holds NaN or infinity in norm.weight [192]"),
    "grid": ({"pos_embed": torch.ones(1, 12, 192)}, "pos_embed [1, 12, 192] is not a square grid"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_file_is_named_with_the_tensor(vitlit: Command, few: Path, file: Path, case: str) -> None:
    changes, words = WRONG[case]
    spoilt(file, **changes)
    refused(vitlit("weights", "convert", file, "out", "--format", "hf"), file, words)
    before = {path.name for path in file.parent.iterdir()}
    refused(vitlit("fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), file), file.name)
    assert {path.name for path in file.parent.iterdir()} - before <= {"runs"}


def test_the_wrong_kind_of_file_is_named(vitlit: Command, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(vitlit("weights", "show", "photo.png"), "photo.png is not a checkpoint")
    refused(vitlit("weights", "show", "nothing.pth"), "nothing.pth does not exist")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(vitlit("weights", "show", "lfs.pth"), "lfs.pth is a git-lfs pointer")
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html>Not found</html>")
    refused(vitlit("weights", "show", "page.pth"), "page.pth is an HTML page")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(vitlit("weights", "show", "script.pt"), "script.pt is a TorchScript program")
    if Path("/proc/self/mem").is_file():  # reading its first page fails, for root too
        refused(vitlit("weights", "show", "/proc/self/mem"), "/proc/self/mem cannot be read")
    (tmp_path / "empty.pth").write_bytes(b"")
    refused(vitlit("weights", "show", "empty.pth"), "empty.pth is not a checkpoint")


def test_finetuning_takes_the_network_and_the_preprocessing_from_the_file(
    vitlit: Command, few: Path, tmp_path: Path
) -> None:
    model = stranger("deit_tiny_distilled_patch16_224")
    torch.save({"model": model.state_dict()}, tmp_path / "deit.pth")
    out = done(vitlit("fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), "deit.pth"))
    assert "weights of deit.pth: facebook deit, assuming what the file does not say: " in out
    assert "4 skipped" in out  # both heads
    vit = package.load(tmp_path / "runs" / "finetune")
    assert isinstance(vit.preprocess, Preprocess)
    assert vit.preprocess.mean == (0.485, 0.456, 0.406)
    assert vit.config.distilled
    assert vit.classes == ["0", "1", "2", "3"]
    done(vitlit("validate", "runs/finetune"))


def test_a_value_that_contradicts_the_file_is_refused_with_both(vitlit: Command, few: Path, tmp_path: Path) -> None:
    vit = ViT(image_size=32, patch_size=8, width=24, depth=1, heads=3, mlp_dim=40, norm_eps=1e-12)
    package.save_weights(vit, tmp_path / "model", "hf")
    fit = ["fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), "model"]
    processor = tmp_path / "model" / "preprocessor_config.json"
    processor.write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    refused(vitlit(*fit, "--data.mean", "[0.1,0.2,0.3]"), "(0.1, 0.2, 0.3)", "(0.5, 0.5, 0.5)", processor.name)
    shape = "--model.vit ViT --model.vit.patch_size 8 --model.vit.width 24 --model.vit.depth 1 --model.vit.mlp_dim 40"
    shape += " --model.vit.heads"
    refused(vitlit(*fit, *shape.split(), 4), "model.vit.heads is 4", "was made with 3")
    refused(vitlit(*fit, *shape.split(), 3, "--model.vit.norm_eps", 1e-5), "norm_eps is 1e-05", "was made with 1e-12")
    done(vitlit(*fit, *shape.split(), 3))
    assert package.load(tmp_path / "runs" / "finetune").config.norm_eps == 1e-12


def test_what_the_file_does_not_tell_the_user_does(vitlit: Command, few: Path, file: Path) -> None:
    mean = ["--data.mean", "[0.485,0.456,0.406]", "--data.std", "[0.2,0.2,0.2]"]
    done(vitlit("fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), file, *mean))
    preprocess = package.load(file.parent / "runs" / "finetune").preprocess
    assert isinstance(preprocess, Preprocess)
    assert (preprocess.mean, preprocess.std) == ((0.485, 0.456, 0.406), (0.2, 0.2, 0.2))


@pytest.mark.parametrize(("name", "format"), [("a.safetensors", "timm"), ("a.pth", "timm"), ("folder", "hf")])
def test_an_export_whose_check_fails_leaves_no_file(
    vitlit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str
) -> None:
    vit = ViT(image_size=32, patch_size=8, width=24, depth=1, heads=3, mlp_dim=40)
    package.save_weights(vit, tmp_path / "a.ckpt")
    monkeypatch.setattr("vitlit.cli.weights.TOLERANCE", -1.0)
    refused(vitlit("weights", "convert", "a.ckpt", name, "--format", format), name)
    assert not (tmp_path / name).exists()


def test_a_file_has_the_permissions_of_the_umask(file: Path, tmp_path: Path) -> None:
    vit = package.load(file)
    before = os.umask(0o027)
    try:
        for name, format in (("a.safetensors", "vitlit"), ("a.ckpt", "vitlit"), ("b.safetensors", "timm")):
            assert package.save_weights(vit, tmp_path / name, format).stat().st_mode & 0o777 == 0o640  # type: ignore[arg-type]
    finally:
        os.umask(before)


def test_grey_images_for_one_channel(vitlit: Command, few: Path, file: Path, tmp_path: Path) -> None:
    grey = "--model.vit.in_channels 1 --run.name grey"
    done(vitlit("fit", *SMALL, "--data.root", few, *grey.split()))
    vit = package.load(tmp_path / "runs" / "grey")
    assert isinstance(vit.preprocess, Preprocess)
    assert vit.preprocess.mean == (0.5,)
    photo = next((few / "val" / "0").iterdir())
    assert vit(vit.preprocess(photo)).shape == (1, 4)
    wrong = ["--model.vit.in_channels", "4", "--run.name", "four"]
    refused(vitlit("fit", *SMALL, "--data.root", few, *wrong), "in_channels is 4", "3 channels, or 1 (grey)")


def test_one_flag_of_the_network_goes_beside_the_weights(vitlit: Command, few: Path, file: Path) -> None:
    fit = ["fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), file]
    done(vitlit(*fit, "--model.vit.drop_path", 0.1))
    vit = package.load(file.parent / "runs" / "finetune")
    assert (vit.config.drop_path, vit.config.width, vit.config.depth) == (0.1, 192, 2)


def test_a_run_continues_after_the_file_it_began_from_is_gone(vitlit: Command, few: Path, tmp_path: Path) -> None:
    vit = ViT(image_size=32, patch_size=8, width=24, depth=1, heads=3, mlp_dim=40, mlp="gelu_tanh")
    package.save_weights(vit, tmp_path / "google.npz", "google")
    fit = ["fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), "google.npz"]
    # The heads are the file's own, whatever the width.
    out = done(vitlit(*fit))
    assert "weights of google.npz: google, assuming what the file does not say: " in out
    (tmp_path / "google.npz").unlink()
    out = done(vitlit(*fit, "--trainer.max_steps", 4))
    assert "continuing runs/finetune" in out
    assert "weights of" not in out
    assert package.load(tmp_path / "runs" / "finetune").config.mlp == "gelu_tanh"


@pytest.mark.parametrize("out", ["file/a.safetensors", "file/a.npz", "file/folder"])
def test_an_output_that_cannot_be_written_is_one_line(vitlit: Command, tmp_path: Path, out: str) -> None:
    vit = ViT(image_size=32, patch_size=8, width=24, depth=1, heads=3, mlp_dim=40, mlp="gelu_tanh")
    package.save_weights(vit, tmp_path / "a.ckpt")
    (tmp_path / "file").write_text("")
    format = {"a.safetensors": "vitlit", "a.npz": "google", "folder": "hf"}[Path(out).name]
    refused(vitlit("weights", "convert", "a.ckpt", out, "--format", format), out, "cannot be written")


def stranger_like(**options: Any) -> ViT:
    """A ViT of the stranger's weights."""
    vit = ViT(image_size=32, patch_size=8, width=192, depth=2, heads=3, mlp_dim=768, num_classes=3, **options).eval()
    vit.load_state_dict(stranger().state_dict())
    return vit


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (
            {"architecture": "vit_small_patch16_rope_ape_224"},
            "rope_ape_224, which has rotary positions",
        ),
        ({"architecture": "vit_base_patch16_224", "model_args": {"block_fn": "x"}}, "model argument block_fn"),
        ({"architecture": "vit_base_patch16_224", "global_pool": "max"}, "global_pool max"),
    ],
)
def test_another_network_of_timms_is_refused(vitlit: Command, file: Path, about: dict[str, Any], words: str) -> None:
    (file.parent / "config.json").write_text(json.dumps(about))
    refused(vitlit("weights", "show", file), words)


def test_timms_config_tells_what_no_tensor_does(file: Path) -> None:
    args: dict[str, Any] = {"num_heads": 6, "act_layer": "gelu_tanh"}
    about = {"architecture": "vit_tiny_patch16_224", "model_args": args, "label_names": ["a", "b", "c"]}
    (file.parent / "config.json").write_text(json.dumps(about))
    save_file(stranger(**args).state_dict(), file)
    vit, images = package.load(file), torch.randn(2, 3, 32, 32)
    assert (vit(images) - stranger(**args)(images)).abs().max() < 1e-5
    assert vit.classes == ["a", "b", "c"]


def test_two_networks_in_a_file_are_refused(vitlit: Command, file: Path) -> None:
    state = stranger().state_dict()
    save_file({**state, **{f"ema.{name}": tensor + 1 for name, tensor in state.items()}}, file)
    result = vitlit("weights", "show", file)
    assert result.code == 2
    assert "ema" in result.err


def test_a_config_of_another_model_is_refused(vitlit: Command, tmp_path: Path) -> None:
    package.save_weights(stranger_like(norm_eps=1e-12), tmp_path / "model", "hf")
    path = tmp_path / "model" / "config.json"
    about = json.loads(path.read_text())
    for changes, words in (
        ({"hidden_size": 384}, "width 192, but config.json beside it has hidden_size 384"),
        ({"image_size": 320000}, "is not a whole ViT: pos_embed is [1, 17, 192] in the file"),
    ):
        path.write_text(json.dumps({**about, **changes}))
        refused(vitlit("weights", "convert", "model", "out", "--format", "hf"), words)
    path.write_text(json.dumps(about))
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5], "image_std": [0.5], "resample": 1}'
    )
    refused(vitlit("weights", "show", "model"), "resample 1")


def test_a_linear_probe_trains_the_head_alone(vitlit: Command, few: Path, file: Path) -> None:
    done(vitlit("fit", "--config", "finetune", "--data.root", few, *FLAGS.split(), file, "--model.freeze", "true"))
    probe, before = package.load(file.parent / "runs" / "finetune"), package.load(file)
    changed = [n for n, tensor in probe.state_dict().items() if n not in before.state_dict() or "head" in n]
    assert changed == ["head.weight", "head.bias"]
    assert probe.get_parameter("head.weight").any()
    for name, tensor in before.state_dict().items():
        assert "head" in name or torch.equal(probe.state_dict()[name], tensor)

"""The door for weights: strict, with a report, resampling as timm does, and running nothing."""

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_stage
import torch
from conftest import randomized, user_error
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

import vitlit
from vitlit.data import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.stages import Pretrain

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny(**options: Any) -> ViT:
    return randomized(ViT(**{**TINY, "num_classes": 5, **options}))


def write(vit: ViT, path: Path, **changes: Tensor | None) -> Path:
    """A checkpoint of a ViT's weights, some of them changed, or left out where None."""
    state: dict[str, Tensor | None] = {**vit.state_dict(), **{n.replace("__", "."): t for n, t in changes.items()}}
    about = {"vit": vit.config.plain(), "classes": [], "preprocess": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"vitlit": about, "state_dict": {f"vit.{n}": t for n, t in state.items() if t is not None}}, path)
    return path


def test_a_mask_token_is_in_no_file(tmp_path: Path) -> None:
    vit = tiny()
    plain = vit.state_dict()
    vit.add_mask_token()
    for name in ("a.safetensors", "a.ckpt"):
        loaded = vitlit.load(vitlit.save_weights(vit, tmp_path / name))
        assert loaded.state_dict().keys() == plain.keys()
    report = vitlit.load_weights(vit, tmp_path / "a.ckpt")
    assert report.new == ["mask_token"]
    pretrained = write(vit, tmp_path / "b.ckpt")  # of a pretraining, whose optimizer has it
    assert vitlit.load(pretrained).state_dict().keys() == plain.keys()
    assert vitlit.load_weights(tiny(), pretrained).unexpected == ["vit.mask_token"]


@pytest.fixture
def run(few: Path, tmp_path: Path) -> Path:
    """The folder of a short run."""
    stage = Pretrain(ViT(**TINY), partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=1e-3))
    randomized(stage.vit).train()
    data = {"image_size": 32, "crop_ratio": 0.9, "mean": (0.1, 0.2, 0.3)}
    trainer = small_stage.fit(stage, few, data, max_steps=1)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run"


def test_a_run_and_its_file_load_with_classes_and_preprocessing(run: Path, few: Path) -> None:
    file = run / "checkpoints" / "best.ckpt"
    photo = next((few / "val" / "0").iterdir())
    for source in (run, str(run), file, str(file)):
        vit = vitlit.load(source)
        assert vit.classes == ["0", "1", "2", "3"]
        assert vit.preprocess == Preprocess((32, 32), 0.9, mean=(0.1, 0.2, 0.3))
        assert not vit.training
        assert vit(vit.preprocess([photo])).shape == (1, 4)
    state = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[f"vit.{name}"]) for name, tensor in vit.state_dict().items())


def test_the_best_checkpoint_goes_before_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    last, best = tiny(), tiny()
    write(last, folder / "last.ckpt")
    assert torch.equal(vitlit.load(tmp_path / "run").get_parameter("cls_token"), last.get_parameter("cls_token"))
    write(best, folder / "best.ckpt")
    assert torch.equal(vitlit.load(tmp_path / "run").get_parameter("cls_token"), best.get_parameter("cls_token"))


def test_all_weights_are_taken_over_and_reported(tmp_path: Path) -> None:
    source, target = tiny(), tiny()
    report = vitlit.load_weights(target, write(source, tmp_path / "a.ckpt"))
    assert sorted(report.matched) == sorted(source.state_dict())
    assert report.resampled == report.new == report.skipped == []
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(images), source(images))
    assert str(report) == f"{len(source.state_dict())} matched"


def test_a_loaded_vit_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "a.ckpt")
    vit = vitlit.load(path)
    before = vit.get_parameter("cls_token").detach().clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(vit.get_parameter("cls_token"), before)


def unchanged_by(vit: ViT, path: Path, pattern: str, skip: Any = ()) -> str:
    """Assert that loading is refused with a line that matches, and leaves the ViT as it was; give the line."""
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    message = user_error(pattern, vitlit.load_weights, vit, path, skip)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert str(path) in message
    return message


def test_a_tensor_that_is_missing_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "a.ckpt", blocks__1__mlp__fc1__bias=None)
    unchanged_by(tiny(), path, r"does not fit the model: blocks\.1\.mlp\.fc1\.bias \[40\] is missing from the file$")


def test_a_tensor_that_the_model_lacks_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "a.ckpt", blocks__1__ls1__gamma=torch.ones(24))
    unchanged_by(
        tiny(),
        path,
        r"does not fit the model: the model has no blocks\.1\.ls1\.gamma \[24\]; skip=\['blocks\.1\.ls1\.\*'\]",
    )


def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "a.ckpt", norm__weight=torch.ones(25))
    unchanged_by(tiny(), path, r"norm\.weight is \[25\] in the file and \[24\] in the model$")


def test_a_larger_model_is_an_error_that_names_the_first_tensor_and_counts_the_others(tmp_path: Path) -> None:
    path = write(tiny(), tmp_path / "a.ckpt")
    line = unchanged_by(tiny(width=48), path, r"cls_token is \[1, 1, 24\] in the file and \[1, 1, 48\] in the model")
    assert line.endswith(
        f"(and {len([n for n in tiny().state_dict() if n != 'head.bias' and 'fc1.bias' not in n]) - 1} more)"
    )
    unchanged_by(tiny(depth=3), path, r"blocks\.2\.norm1\.weight \[24\] is missing from the file \(and 11 more\)")
    unchanged_by(tiny(depth=1), path, r"no blocks\.1\.norm1\.weight \[24\]; skip=.* \(and 11 more\)")


def test_another_number_of_classes_is_an_error_unless_the_head_is_skipped(tmp_path: Path) -> None:
    source, target = tiny(), tiny(num_classes=7)
    path = write(source, tmp_path / "a.ckpt")
    unchanged_by(target, path, r"head\.weight is \[5, 24\] in the file and \[7, 24\] in the model")
    head = target.head.weight.clone()  # type: ignore[operator]
    report = vitlit.load_weights(target, path, skip=["head*"])
    assert sorted(report.skipped) == ["head.bias", "head.weight"]
    assert report.new == []
    assert torch.equal(target.head.weight, head)  # type: ignore[arg-type]
    assert torch.equal(target.norm.weight, source.norm.weight)  # type: ignore[arg-type]


def test_skipped_and_new_tensors_are_told_apart(tmp_path: Path) -> None:
    source, target = tiny(num_classes=0), tiny()
    source.set_head("pretrain", 3, 16)
    path = write(source, tmp_path / "a.ckpt")
    report = vitlit.load_weights(target, path, skip=("head*", "pos_*"))
    assert report.new == ["head.bias", "head.weight"]
    assert report.skipped == [
        "head.out.bias",
        "head.out.weight",
        "head.pre_logits.bias",
        "head.pre_logits.weight",
        "pos_embed",
    ]
    assert not torch.equal(target.get_parameter("pos_embed"), source.get_parameter("pos_embed"))
    assert {*report.matched, *report.skipped} == set(source.state_dict())
    assert str(report) == f"{len(report.matched)} matched, 2 new, 5 skipped"
    unchanged_by(tiny(), path, "head", skip=["head.weight", "head.bias"])


def test_one_pattern_may_be_given_as_it_is(tmp_path: Path) -> None:
    source, target = tiny(), tiny(num_classes=7)
    report = vitlit.load_weights(target, write(source, tmp_path / "a.ckpt"), skip="head*")
    assert report.skipped == ["head.bias", "head.weight"]
    assert torch.equal(target.get_parameter("cls_token"), source.get_parameter("cls_token"))


@pytest.mark.parametrize(
    ("before", "after"), [(32, 48), (48, 32), (32, (16, 64)), ((16, 64), 32), ((64, 16), (24, 40))]
)
def test_positions_of_another_grid_are_resampled_as_timm_does(before: Any, after: Any, tmp_path: Path) -> None:
    source, target = tiny(image_size=before), tiny(image_size=after)
    report = vitlit.load_weights(target, write(source, tmp_path / "a.ckpt"))
    assert report.resampled == ["pos_embed"]
    assert "pos_embed" not in report.matched
    expected = resample_abs_pos_embed(source.get_parameter("pos_embed"), list(target.grid), list(source.grid))
    assert (target.get_parameter("pos_embed") - expected).abs().max() < 1e-6
    assert torch.equal(target.get_parameter("cls_token"), source.get_parameter("cls_token"))


def test_what_is_no_checkpoint_is_refused_in_a_line_that_names_it(tmp_path: Path) -> None:
    def unreadable(path: Path, pattern: str) -> None:
        for read in (vitlit.load, partial(vitlit.load_weights, tiny())):
            assert str(path) in user_error(pattern, read, path)

    unreadable(tmp_path / "missing.ckpt", "does not exist; name the folder of a run, or a checkpoint file")
    unreadable(tmp_path, r"holds no checkpoints/best\.ckpt")
    whole = write(tiny(), tmp_path / "whole.ckpt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        unreadable(tmp_path / "cut.ckpt", "is not a checkpoint, or a damaged one")
    for content in (b"hello", b"{}", b"\x80\x02}q\x00.", b"(lp0\n.", b"."):
        (tmp_path / "junk.ckpt").write_bytes(content)
        unreadable(tmp_path / "junk.ckpt", "is not a checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    unreadable(tmp_path / "state.pt", "is in no checkpoint format that vitlit knows; it holds weight")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    unreadable(tmp_path / "tensor.pt", "holds a Tensor instead of named tensors")
    torch.save(tiny(), tmp_path / "module.pt")
    unreadable(tmp_path / "module.pt", "is not a checkpoint")


def test_random_bytes_are_never_more_than_a_user_error(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        size = int(torch.randint(1, 40, (), generator=generator))
        junk = torch.randint(0, 128, (size,), generator=generator, dtype=torch.uint8)
        (tmp_path / "junk").write_bytes(b"\x80\x02" + bytes(junk.tolist()))
        with pytest.raises(UserError):
            vitlit.load(tmp_path / "junk")


def test_imports_are_as_light_as_they_say(run: Path) -> None:
    script = f"""
        import sys
        import vitlit
        def loaded(*names):
            return [name for name in names if name in sys.modules]
        assert vitlit.__version__
        assert not loaded("torch", "lightning", "wandb", "numpy", "torchvision"), sys.modules
        import vitlit.weights
        vit = vitlit.load({str(run)!r})
        assert vit.classes == ["0", "1", "2", "3"]
        assert loaded("torch") and not loaded("lightning", "wandb", "jsonargparse", "torchmetrics"), sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

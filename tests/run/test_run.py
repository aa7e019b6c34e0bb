"""The folder of a run: begun, continued, finished, refused."""

import csv
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Result, done, refused

from vitlit.errors import UserError
from vitlit.run.folder import Decision, RunFolder, RunOptions, flatten, longer, seconds
from vitlit.stages import Stage

Command = Callable[..., Result]
FIT = ("fit", *SMALL, "--model.vit.dropout", "0.1")  # 6 steps, 2 an epoch
SPEED = ("train/images_per_second", "train/data_wait", "train/memory_gib", "unix_seconds")


def signalled(step: int, *numbers: int, hook: str = "training_step", sanity: bool = False) -> Callable[[], None]:
    """Make a child send itself signals within a step, or within the validation after that many steps."""

    def before() -> None:
        original = getattr(Stage, hook)

        def patched(self: Stage, *arguments: Any) -> Any:
            if self.trainer.global_step == step and self.trainer.sanity_checking == sanity:
                for number in numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
            return original(self, *arguments)

        setattr(Stage, hook, patched)

    return before


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without time and speed."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in SPEED} for row in csv.DictReader(file)]


def steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in rows(run)]


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return loaded


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of tensors and values differ in any bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def files(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_is_said_to_be_complete_and_left_alone(vitlit: Command, few: Path, finished: Path) -> None:
    before = files(finished)
    result = vitlit(*FIT, "--data.root", few, "--data.num_workers", 1, "--data.micro_batch", 8)
    assert result.code == 0
    assert "runs/pretrain is complete" in result.out
    assert "--run.overwrite true" in result.out
    assert files(finished) == before


def test_another_config_is_refused_with_the_differences_and_the_ways_out(
    vitlit: Command, few: Path, finished: Path
) -> None:
    before = files(finished)
    result = vitlit(*FIT, "--data.root", few, "--model.optimizer.lr", 0.5, "--data.batch_size", 8)
    refused(result, "data.batch_size 16 -> 8", "optimizer.init_args.lr 0.001 -> 0.5", "--run.name", "--run.overwrite")
    assert "complete at step 6" in vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 4).out
    assert files(finished) == before


def test_overwriting_begins_again_in_an_empty_folder(vitlit: Command, few: Path, finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    result = vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 4, "--run.overwrite", "true")
    assert result.code == 0, result.err
    assert not (finished / "notes.txt").exists()
    assert steps(finished) == [0, 1, 2, 3]
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 4
    assert saved["run"]["overwrite"] is False


@pytest.mark.parametrize("ends", [(5, 6, 9), (4, 6)])
def test_more_steps_continue_a_finished_run(vitlit: Command, few: Path, run: Path, ends: tuple[int, ...]) -> None:
    head = ""
    for end in ends:
        result = vitlit(*FIT, "--data.root", few, "--trainer.max_steps", end, "--model.schedule.warmup", 1)
        assert result.code == 0, result.err
        assert ("continuing runs/pretrain" in result.out) == bool(head)
        assert not result.err
        assert steps(run) == list(range(end))
        assert rows(run)[-1]["val/top1"]
        assert (run / "metrics.csv").read_text().startswith(head)
        head = (run / "metrics.csv").read_text()
        assert checkpoint(run)["global_step"] == end


def test_more_epochs_continue_a_finished_run(vitlit: Command, few: Path, run: Path) -> None:
    endless = ("--trainer.max_steps", -1, "--model.schedule.warmup", 1)
    for epochs in (1, 3):
        result = vitlit(*FIT, "--data.root", few, *endless, "--trainer.max_epochs", epochs)
        assert result.code == 0, result.err
        assert [row["epoch"] for row in rows(run)] == [str(epoch) for epoch in range(epochs) for _ in range(2)]
        assert steps(run) == list(range(2 * epochs))


def test_a_folder_that_is_no_run_is_refused_even_if_told_to_overwrite(vitlit: Command, few: Path, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "thesis.tex").write_text("mine")
    refused(vitlit(*FIT, "--data.root", few, "--run.overwrite", "true"), "runs/pretrain", "--run.name")
    assert (run / "thesis.tex").read_text() == "mine"


def test_a_run_without_a_checkpoint_is_begun_again_with_another_config(vitlit: Command, few: Path, run: Path) -> None:
    refused(vitlit(*FIT, "--data.root", few, "--model.schedule.warmup", 6), "model.schedule.warmup is 6")
    assert not (run / "checkpoints").exists()
    assert vitlit(*FIT, "--data.root", few).code == 0


@pytest.mark.parametrize("place", ["runs", "runs/pretrain"])
def test_a_file_in_the_place_of_the_folder_is_refused(vitlit: Command, few: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    refused(vitlit(*FIT, "--data.root", few), "runs/pretrain", "give another")


def test_a_config_that_a_run_left_repeats_it_bit_for_bit(vitlit: Command, finished: Path) -> None:
    result = vitlit("fit", "--config", finished / "config.yaml", "--run.name", "again")
    assert result.code == 0, result.err
    again = finished.parent / "again"
    assert differences(checkpoint(finished)["state_dict"], checkpoint(again)["state_dict"]) == []
    assert rows(again) == rows(finished)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("01:30:00", 5400), ("1:02:03:04", 93784), ("1-02:03:04", 93784), (5400, 5400), ("90", 90)],
)
def test_a_time_limit_is_hours_minutes_and_seconds(limit: int | str, expected: int) -> None:
    assert seconds(limit) == expected


@pytest.mark.parametrize("limit", ["soon", "1:30", "-5", "0", "", "1:2:3:4:5", "1h"])
def test_a_time_limit_that_is_none_is_refused(limit: str) -> None:
    with pytest.raises(UserError, match="is not a time; give HH:MM:SS"):
        seconds(limit)


def test_a_run_may_be_renamed(vitlit: Command, few: Path, run: Path) -> None:
    assert vitlit(*FIT, "--data.root", few, before=signalled(4, signal.SIGTERM)).code == 143
    run.rename(run.parent / "renamed")
    result = vitlit(*FIT, "--data.root", few, "--run.name", "renamed")
    assert result.code == 0, result.err
    assert "continuing runs/renamed from runs/renamed/checkpoints/last.ckpt" in result.out


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", None, ["has no config.yaml", "--run.name"]),
        ("metrics.csv", b"step,\xff\n0,1\n", ["metrics.csv is damaged; move it away"]),
        ("metrics.csv", b"train/loss\n1\n", ["metrics.csv is damaged; move it away"]),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    file: str, content: bytes | None, words: list[str], vitlit: Command, few: Path, trained: Path, run: Path
) -> None:
    shutil.copytree(trained / "runs" / "pretrain", run)
    (run / file).unlink() if content is None else (run / file).write_bytes(content)
    longer = ["--trainer.max_steps", 7] if file == "metrics.csv" else []
    refused(vitlit(*FIT, "--data.root", few, *longer), *words)


def test_an_unfinished_run_takes_other_settings_of_how_it_is_computed_alone(
    vitlit: Command, few: Path, run: Path
) -> None:
    result = vitlit(*FIT, "--data.root", few, before=signalled(2, signal.SIGTERM))
    assert result.code == 143
    refused(vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 8), "trainer.max_steps 6 -> 8")
    free = ("--data.micro_batch", 8, "--data.prefetch", 1, "--trainer.enable_progress_bar", "false")
    result = vitlit(*FIT, "--data.root", few, "--data.num_workers", 1, *free, "--trainer.accelerator", "cpu")
    assert result.code == 0, result.err
    assert steps(run) == list(range(6))


def folder(tmp_path: Path, **options: Any) -> RunFolder:
    return RunFolder(RunOptions(root=str(tmp_path), **options), "configs/mine.yaml")


def begun(tmp_path: Path, config: dict[str, Any], finished: bool = False) -> RunFolder:
    made = folder(tmp_path)
    made.begin(config)
    made.last.parent.mkdir()
    torch.save({}, made.last)
    if finished:
        made.finish(6)
    return made


def test_a_run_is_named_by_itself_or_its_config(tmp_path: Path) -> None:
    assert folder(tmp_path).path == tmp_path / "mine"
    assert folder(tmp_path, name="yours").path == tmp_path / "yours"


def test_a_complete_run_stays_complete_without_its_last_checkpoint(tmp_path: Path) -> None:
    config = {"trainer": {"max_steps": 6}}
    made = begun(tmp_path, config, finished=True)
    made.last.unlink()
    assert made.decide(config) == Decision("finished", "")
    with pytest.raises(UserError, match=r"last\.ckpt is missing; --run\.overwrite true begins again"):
        made.decide({"trainer": {"max_steps": 7}})


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../up", "/", "/tmp/up", "a\0b", "a" * 300])
def test_a_name_that_leads_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"run\.root"):
        folder(tmp_path, name=name)


def test_runs_of_a_sweep_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert folder(tmp_path).name == "mine"  # WANDB_RUN_ID alone is no sweep
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert folder(tmp_path).name == "mine-abc123"


def test_an_empty_or_missing_folder_is_begun(tmp_path: Path) -> None:
    assert folder(tmp_path).decide({}) == Decision("begin", "")
    (tmp_path / "mine").mkdir()
    assert folder(tmp_path).decide({}) == Decision("begin", "")
    (tmp_path / "mine" / "tensorboard").mkdir()  # of a run that was refused before it began
    assert folder(tmp_path).decide({}) == Decision("begin", "")


def test_a_run_is_continued_until_it_is_finished(tmp_path: Path) -> None:
    config = {"model": {"depth": 2, "vit": None}}
    made = begun(tmp_path, config)
    assert made.decide({"model": {"depth": 2}}) == Decision("continue", str(made.last))
    made.finish(6)
    assert made.decide(config) == Decision("finished", "")
    assert folder(tmp_path, overwrite=True).decide(config) == Decision("begin", "")


@pytest.mark.parametrize(
    ("key", "value", "free"),
    [
        ("data.num_workers", 4, True),
        ("data.micro_batch", 4, True),
        ("trainer.devices", 4, True),
        ("trainer.logger.init_args.project", "p", True),
        ("run.root", "elsewhere", True),
        ("run.monitor", "val/loss", False),
        ("data.seed", 4, False),
        ("data.batch_size", 4, False),
        ("trainer.precision", "bf16-mixed", False),
        ("trainer.gradient_clip_val", 4, False),
    ],
)
def test_only_settings_of_how_a_run_is_computed_may_differ(tmp_path: Path, key: str, value: Any, free: bool) -> None:
    made = begun(tmp_path, {})
    config: Any = value
    for part in reversed(key.split(".")):
        config = {part: config}
    if free:
        assert made.decide(config).action == "continue"
    else:
        with pytest.raises(UserError, match=f"{key} None -> {value}"):
            made.decide(config)


def test_many_differences_are_counted_after_the_first_eight(tmp_path: Path) -> None:
    made = begun(tmp_path, {})
    with pytest.raises(UserError, match="and 3 more"):
        made.decide({f"key{i}": i + 1 for i in range(11)})


def test_only_a_finished_run_may_be_made_longer(tmp_path: Path) -> None:
    config, more = {"trainer": {"max_epochs": 2}}, {"trainer": {"max_epochs": 3}}
    made = begun(tmp_path, config)
    with pytest.raises(UserError, match="max_epochs 2 -> 3"):
        made.decide(more)
    made.finish(6)
    assert made.decide(more).action == "continue"
    with pytest.raises(UserError, match="lr None -> 1"):
        made.decide({**more, "lr": 1})


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [(2, 3, True), (3, 2, False), (2, 2, False), (2, -1, True), (2, None, True), (-1, 9, False), (None, 9, False)],
)
def test_a_limit_is_longer_if_it_allows_more(before: int | None, after: int | None, more: bool) -> None:
    assert longer(before, after) is more


def test_flattening_joins_keys_and_drops_what_is_none() -> None:
    nested = {"a": {"b": {"c": 1, "d": None}}, "e": [{"f": 2}], "g": {}, "h": False}
    assert flatten(nested) == {"a.b.c": 1, "e": [{"f": 2}], "h": False}


def test_a_run_that_was_made_longer_is_complete_for_the_first_command_too(
    vitlit: Callable[..., Result], few: Path, finished: Path
) -> None:
    assert vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 8).code == 0
    result = vitlit(*FIT, "--data.root", few)
    assert result.code == 0
    assert "is complete" in result.out


def older(run: Path, *keys: str) -> None:
    """Make a complete run one that an older version, which lacked these keys, has not finished."""
    (run / "finished.json").unlink()
    file = run / "config.yaml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if line.split(":")[0].strip() not in keys))
    state = checkpoint(run)
    for part in ("groups", "schedule"):
        state["hyper_parameters"][part] = {k: v for k, v in state["hyper_parameters"][part].items() if k not in keys}
    torch.save(state, run / "checkpoints" / "last.ckpt")


def test_a_run_of_an_older_version_has_the_defaults_of_what_is_new(vitlit: Command, few: Path, finished: Path) -> None:
    older(finished, "partial_patches", "drop_path_decay", "layer_decay", "repeats", "start")
    again = (*FIT, "--data.root", few)
    refused(vitlit(*again, "--data.repeats", 2), "another config (data.repeats 1 -> 2);")
    refused(vitlit(*again, "--model.groups.layer_decay", 0.5), "(model.init_args.groups.layer_decay 1.0 -> 0.5);")
    assert "continuing" in done(vitlit(*again))


def test_a_checkpoint_of_an_older_version_has_the_defaults_of_what_is_new(
    vitlit: Command, few: Path, finished: Path
) -> None:
    older(finished, "layer_decay")
    branch = (*FIT, "--data.root", few, "--ckpt_path", finished / "checkpoints" / "last.ckpt", "--run.name", "b")
    branch = (*branch, "--trainer.max_steps", 7)
    refused(vitlit(*branch, "--model.groups.layer_decay", 0.5), "model.groups.layer_decay 1.0 -> 0.5")
    done(vitlit(*branch))


def test_a_config_records_the_image_size_of_the_vit(vitlit: Command, few: Path, finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    vit = config["model"]["init_args"]["vit"]["init_args"]
    assert vit["image_size"] == config["data"]["image_size"] == 16
    another = ("fit", "--config", finished / "config.yaml", "--run.name", "b", "--trainer.max_steps", 3)
    done(vitlit(*another, "--data.image_size", 24))
    refused(vitlit(*another, "--model.vit.image_size", 24), "model.vit.image_size is 24 and data.image_size 16;")

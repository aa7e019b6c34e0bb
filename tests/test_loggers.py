import json
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from wandb_file import read_wandb

from vitlit.errors import UserError
from vitlit.loggers import CSV, TensorBoard, Trackio, Wandb
from vitlit.loggers.wandb_mode import decide

KEY = "a" * 40


class Terminal:
    """An interactive standard input that nothing may read."""

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"stdin.{name}")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, settings or run of this machine or of another test."""
    for name in ("API_KEY", "MODE", "PROJECT", "RUN_ID", "DIR", "DATA_DIR", "ERROR_REPORTING", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what a test sets is taken back
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def recorded(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history rows and the config of the one run in `folder`."""
    history, config = [], {}
    for record in read_wandb(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        for source in {"run": [record.run.config], "config": [record.config]}.get(kind, []):
            config.update({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in source.update})
    return history, config


def text(folder: Path) -> str:
    """metrics.csv without the times."""
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if name != "unix_seconds"]
    return "".join(",".join(row[i] for i in kept) + "\n" for row in rows)


def test_csv_has_the_time_at_which_a_row_was_last_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = CSV(tmp_path)
    for now, step, name in ((10.04, 0, "loss"), (20.0, 1, "loss"), (30.0, 1, "val/top1")):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        csv.log_metrics({name: 1.0}, step)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,unix_seconds,val/top1\n0,1.0,10.0,\n1,1.0,30.0,1.0\n"


def test_csv_merges_calls_of_one_step_into_one_row(tmp_path: Path) -> None:
    csv = CSV(tmp_path / "run")
    csv.log_metrics({"epoch": 0, "train/loss": 0.1}, 0)
    csv.log_metrics({"epoch": 0, "train/loss": 1 / 3}, 1)
    csv.log_metrics({"epoch": 0, "train/loss": 0.25}, 1)
    csv.log_metrics({"epoch": 1, "train/loss": float(torch.tensor(0.1))}, 2)
    assert text(tmp_path / "run") == (
        "step,epoch,train/loss\n0,0,0.1\n1,0,0.25\n2,1,0.10000000149011612\n"  # a shorter cell leaves no rest
    )


def test_csv_takes_new_columns_in_order_of_appearance(tmp_path: Path) -> None:
    csv = CSV(tmp_path)
    csv.log_metrics({"loss": 2.0}, 0)
    csv.log_metrics({"loss": 1.0}, 1)
    csv.log_metrics({"val/top1": torch.tensor(0.5), "epoch": 0}, 1)
    csv.log_metrics({"epoch": 1, "loss": float("nan")}, 2)
    assert text(tmp_path) == "step,loss,val/top1,epoch\n0,2.0,,\n1,1.0,0.5,0\n2,nan,,1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_appends_to_the_file_of_a_killed_run(tmp_path: Path) -> None:
    CSV(tmp_path).log_metrics({"loss": 2.0}, 0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,0.7")  # half a row
    CSV(tmp_path).log_metrics({"loss": 1.0}, 1)
    assert text(tmp_path) == "step,loss\n0,2.0\n1,1.0\n"


def test_csv_cut_drops_later_rows_and_the_columns_only_they_had(tmp_path: Path) -> None:
    CSV(tmp_path).cut(3)
    assert list(tmp_path.iterdir()) == []
    csv = CSV(tmp_path)
    for step in range(5):
        csv.log_metrics({"loss": float(step)}, step)
    csv.log_metrics({"val": 1.0}, 4)
    csv.cut(2)
    assert text(tmp_path) == "step,loss\n0,0.0\n1,1.0\n2,2.0\n"
    csv.cut(-1)
    assert text(tmp_path) == "step\n"


@pytest.mark.parametrize(("saved", "killed"), [(0, 2), (3, 4), (5, 5), (4, 9)])
def test_csv_of_a_continued_run_has_the_same_bytes(tmp_path: Path, saved: int, killed: int) -> None:
    def train(csv: CSV, first: int, last: int) -> None:
        for step in range(first, last):
            csv.log_metrics({"epoch": step // 4, "train/loss": 1 / (step + 3)}, step)
            if step % 4 == 3:
                csv.log_metrics({"epoch": step // 4, "val/top1": step / 7}, step)
        csv.finalize("success")

    train(CSV(tmp_path / "whole"), 0, 10)
    train(CSV(tmp_path / "parts"), 0, killed)
    rest = CSV(tmp_path / "parts")
    rest.cut(saved)
    train(rest, saved, 10)  # the row of the checkpoint's own step is logged again
    assert text(tmp_path / "parts") == text(tmp_path / "whole")


def test_csv_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # no folder
    with pytest.raises(UserError, match=r"cannot write .*metrics\.csv: .*; the checkpoints are whole"):
        CSV(tmp_path / "run").log_metrics({"loss": 1.0}, 0)


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    CSV(tmp_path).log_metrics({"loss": 2.0}, 0)
    run = Wandb(save_dir=tmp_path)
    run.experiment.log({"loss": 1.0})
    run.log_metrics({"loss": 1.0}, 0)
    run.log_config({})
    run.log_mistakes([], Counter(), {})
    run.close()
    assert run.closing_line() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_a_run_is_kept_on_disk(mode: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run = Wandb(save_dir="runs/my run", mode=mode, name="first", tags=["a"], group="g")
    run.log_config({"model": {"lr": 0.1}, "data": None})
    run.log_config({"model": {"lr": 0.2}, "data": None})
    run.log_classes(["cat", "dog"])
    for step in range(2):
        run.log_metrics({"train/loss": 1.5 - step, "train/lr": 0.1}, step)
    run.log_metrics({"val/top1": 0.75}, 1)
    run.finalize("success")
    line = run.closing_line()
    run.close()

    assert line == run.closing_line()
    assert line is not None
    assert run.folder is not None
    assert shlex.split(line) == ["wandb", "sync", str(run.folder.relative_to(Path.cwd()))]
    assert run.folder.is_dir()
    assert run.folder.parent == Path("runs/my run/wandb").absolute()
    out, err = capfd.readouterr()
    assert out == f"W&B: offline (no API key); afterwards: {line}\n"
    assert err == ""
    history, config = recorded(run.folder)
    assert [(row["trainer/global_step"], row["train/loss"], row["train/lr"]) for row in history[:2]] == [
        (0, 1.5, 0.1),
        (1, 0.5, 0.1),
    ]
    assert history[2]["val/top1"] == 0.75
    assert config["config"] == {"model": {"lr": 0.2}, "data": None}
    assert config["classes"] == ["cat", "dog"]
    assert set(config) <= {"config", "classes", "_wandb"}


def test_a_continued_offline_run_keeps_its_id_and_both_parts_are_named() -> None:
    first = Wandb(save_dir="runs/x", mode="offline")
    first.log_metrics({"loss": 1.0}, 0)
    first.close()
    assert first.version is not None
    time.sleep(1.1)  # the folders' names have seconds
    second = Wandb(save_dir="runs/x", mode="offline", id=first.version)
    assert second.version == first.version
    second.log_metrics({"loss": 0.5}, 1)
    second.close()
    parts = shlex.split(second.closing_line() or "")[2:]
    assert [Path(part).absolute() for part in parts] == [first.folder, second.folder]


@pytest.mark.parametrize("pictures", [True, False])
def test_mistakes_and_confusion(pictures: bool) -> None:
    rows = [("gone.png", "dog", "cat", "0.9"), ("big.png", "cat", "dog", "0.8")]
    worst = [dict(zip(("path", "label", "prediction", "probability"), row, strict=True)) for row in rows]
    run = Wandb(save_dir="runs/x", mode="offline", pictures=pictures)
    counts = Counter({("dog", "cat"): 1, ("cat", "dog"): 1, ("dog", "dog"): 3})
    run.log_mistakes(worst, counts, {"big.png": Image.new("RGB", (256, 85))} if pictures else {})
    run.close()

    assert run.folder is not None
    history, _ = recorded(run.folder)
    tables = {}
    for name in ("mistakes", "confusion"):
        tables[name] = json.loads((run.folder / "files" / history[0][f"{name}.path"]).read_text())
    assert tables["confusion"]["columns"] == ["label", "prediction", "count"]
    assert tables["confusion"]["data"] == [["dog", "dog", 3], ["dog", "cat", 1], ["cat", "dog", 1]]
    first = [None] * pictures
    assert tables["mistakes"]["columns"] == ["image"] * pictures + ["path", "label", "prediction", "probability"]
    assert tables["mistakes"]["data"][0] == [*first, "gone.png", "dog", "cat", 0.9]
    assert len(list(run.folder.rglob("media/images/*"))) == 0  # table pictures wait in the staging folder beside it
    staged = [path for path in (run.folder.parent / "artifacts").rglob("*") if path.is_file()]
    sizes = [Image.open(path).size for path in staged if path.read_bytes()[:2] == b"\xff\xd8"]
    assert sizes == [(256, 85)] * pictures
    assert not (Path.home() / ".local").exists()  # the tables wait beside the run


def test_the_mode_is_the_option_then_wandb_mode_then_whether_there_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide() == ("offline", "no API key")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert decide() == ("online", "")
    assert decide("disabled") == ("disabled", "")
    for given, mode in {"offline": "offline", "dryrun": "offline", "disabled": "disabled", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", given)
        assert decide() == (mode, "")
        assert decide("online") == ("online", "")
        assert decide("offline") == ("offline", "")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline"):
        decide()


def test_a_key_may_be_in_netrc_and_a_malformed_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    mode, why = decide()
    assert mode == "offline"
    assert "WANDB_API_KEY invalid" in why
    monkeypatch.delenv("WANDB_API_KEY")
    host = wandb.setup().settings.base_url.partition("://")[2]
    Path("home").mkdir(exist_ok=True)
    Path("home/.netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    assert decide() == ("online", "")


def test_disabled_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run = Wandb(save_dir="x", mode="disabled")
    run.log_config({"a": 1})
    run.log_metrics({"loss": 1.0}, 0)
    run.close()
    assert run.closing_line() is None
    assert not Path("x/wandb").exists()
    assert capfd.readouterr() == ("W&B: disabled\n", "")


def test_an_error_of_the_server_leaves_the_run_offline(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin, asked = wandb.init, []

    def init(**options: Any) -> Any:
        asked.append((options["mode"], options["resume"], options["id"]))
        if options["mode"] == "online":
            raise wandb.errors.CommError("no entity 'nobody'\nmore")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = Wandb(save_dir="x", id="abc")
    run.log_metrics({"loss": 1.0}, 0)
    run.close()
    assert asked == [("online", "allow", "abc"), ("offline", None, "abc")]
    line = run.closing_line()
    assert capfd.readouterr() == (f"W&B: offline (no entity 'nobody'); afterwards: {line}\n", "")


def test_a_server_that_never_answers_leaves_the_run_offline(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr("vitlit.loggers.wandb.ONLINE_WITHIN", 1)
        run = Wandb(save_dir="x", id="abc")
        began = time.monotonic()
        run.log_metrics({"loss": 1.0}, 0)
        run.close()
        assert time.monotonic() - began < 10
    assert run.folder is not None
    assert recorded(run.folder)[0][0]["loss"] == 1.0
    out, err = capfd.readouterr()
    assert out.startswith("W&B: offline (")
    assert out.count("\n") == 1
    assert err == ""


def test_project_and_id_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Wandb().name == "vitlit"
    assert Wandb().version != Wandb().version
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep")
    assert Wandb().name == "other"
    assert Wandb(project="own").name == "own"
    assert Wandb().version == "of-the-sweep"
    assert Wandb(id="own").version == "own"


def test_tensorboard_shows_the_config_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png")
    logger = TensorBoard(tmp_path)
    logger.log_config({"data": {"root": "digits"}})
    logger.log_image("pictures", [str(tmp_path / "a.png")], 7)
    logger.finalize("success")
    kept: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    kept.Reload()
    assert "root: digits" in kept.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    (picture,) = kept.Images("pictures")
    assert (picture.step, picture.width, picture.height) == (7, 9, 5)


def test_trackio_gets_metrics_config_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(
        config={},
        log=lambda values, step: logged.append((values, step)),
        finish=lambda: logged.append("finished"),
    )
    begun: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        begun.update(options)
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, Image=lambda path: f"image {path}"))
    logger = Trackio("digits", "first")
    logger.log_config({"data": {"root": "digits"}})
    logger.log_metrics({"train/loss": 0.5}, 3)
    logger.log_image("pictures", ["a.png", "b.png"], 7)
    logger.finalize("success")
    assert begun == {"project": "digits", "name": "first", "resume": "allow", "embed": False}
    assert run.config == {"data": {"root": "digits"}}
    pictures = [({"pictures": f"image {name}.png"}, 7) for name in "ab"]
    assert logged == [({"train/loss": 0.5}, 3), *pictures, "finished"]

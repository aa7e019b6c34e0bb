"""`vitlit tune`: which trials train how long, whatever kills the search, and what it ends with."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, done, refused

from vitlit.cli import tune
from vitlit.cli.main import main

Command = Callable[..., Result]


def options(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if "=" in word)


@pytest.fixture
def search(vitlit: Command, few: Path, tmp_path: Path) -> Command:
    """`vitlit tune` for 9 epochs, of which each takes `seconds`, where the accuracy is that of `value`."""

    def run(
        *flags: object, value: Callable[[str, float, int], float | None], stop: int = 99, seconds: int = 6
    ) -> Result:
        def fit(words: list[str], log: Path) -> int:
            given = options(words)
            name, epochs = given["run.name"], int(given["trainer.max_epochs"])
            log.touch()
            with (tmp_path / "trained").open("a") as file:
                file.write(f"{name} {epochs} {given.get('data.holdout', '-')}\n")
            if len((tmp_path / "trained").read_text().splitlines()) == stop:
                return 143
            flags = {"model.lora.rank": "lora", "model.last_blocks": "last", "model.freeze": "probe"}
            way = next((way for flag, way in flags.items() if flag in given), "all")
            found = value(way, float(given["model.optimizer.init_args.lr"]), epochs)
            log.write_text("vitlit: error: the loss of step 3 is not finite" if found is None else "complete")
            folder = Path(given["run.root"], name)
            folder.mkdir(exist_ok=True)
            best = {"metric": "val/top1", "value": found, "step": epochs}
            record = {"commands": [{"seconds": seconds * epochs}], "result": {"best": best}}
            (folder / "run.json").write_text(json.dumps(record))
            return 2 if found is None else 0

        def before() -> None:
            setattr(tune, "fit", fit)  # noqa: B010

        command = ("tune", "--config", "recipes/finetune_folder", "--root", few, "--trainer.max_epochs", 9)
        (tmp_path / "w.safetensors").touch()
        return vitlit(*command, "--model.init_from", "w.safetensors", *flags, before=before)

    return run


def begun(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "trained").read_text().splitlines()]


def value(way: str, lr: float, epochs: int) -> float | None:
    """LoRA at 1e-3 is best in the end, a probe at the beginning; everything diverges at a high rate."""
    if way == "all" and lr > 2e-4:
        return None
    return {"probe": 0.5, "last": 0.3, "lora": 0.3 + 0.07 * epochs, "all": 0.2}[way] + (
        0.05 if lr in (1e-3, 1e-2) else 0
    )


def test_a_third_goes_on_and_the_best_trains_on_all(search: Command, tmp_path: Path) -> None:
    out = done(search("--budget", "2h", value=value))
    runs = begun(tmp_path)
    assert [sum(run[1] == epochs for run in runs) for epochs in ("1", "3", "9")] == [12, 5, 4]
    assert runs[-1] == ["best", "9", "-"]
    assert ["all-0.0002", "9", "20%"] in runs  # the config's own, though it was never among the best
    assert {run[2] for run in runs[:-1]} == {"20%"}
    assert "runs/tune/best is lora-0.001" in out
    rows = list(csv.DictReader((tmp_path / "runs/tune/tune.csv").open()))
    assert rows[0]["run"] == "best"
    assert float(rows[0]["value"]) == pytest.approx(0.98)
    assert "diverged" in out
    assert sum(float(row["minutes"]) for row in rows) == pytest.approx(0.1 * (12 + 5 * 2 + 3 * 6 + 9))


def test_a_search_that_is_stopped_anywhere_ends_the_same(search: Command, tmp_path: Path) -> None:
    whole = done(search("--budget", "2h", "--out", "whole", value=value)).splitlines()
    runs = begun(tmp_path)
    (tmp_path / "trained").unlink()
    for stop in (5, 14, 19, 22):
        assert search("--budget", "2h", "--out", "parts", value=value, stop=stop).code == 143
    parts = done(search("--budget", "2h", "--out", "parts", value=value)).splitlines()
    assert [line.replace("parts", "whole") for line in parts[-14:]] == whole[-14:]
    again = begun(tmp_path)
    assert [run for i, run in enumerate(again) if i == 0 or run != again[i - 1]] == runs
    refused(search("--budget", "2h", "--out", "parts", "--holdout", "10%", value=value), "other settings")


def test_the_budget_leaves_time_for_the_last_training(search: Command, tmp_path: Path) -> None:
    out = done(search("--budget", "2m", value=value))  # 20 epochs, 9 of them the last one's
    assert "the budget ends the search before" in out
    runs = begun(tmp_path)
    assert sum(int(run[1]) for run in runs) <= 20
    assert runs[-1][0] == "best"


def test_mistakes_are_one_line(search: Command, tmp_path: Path) -> None:
    refused(search("--budget", "soon", value=value), "--budget 'soon'", "1h30m")
    refused(search("--budget", "1h", "--ways", "some", value=value), "all,lora,last,probe")
    refused(search("--budget", "1h", "--config", "pretrain", value=value), "no config of Finetune")
    refused(search("--budget", "1h", "--root", tmp_path, value=value), "val")
    refused(search("--budget", "0m", value=value), "--budget '0m'")
    refused(search("--budget", "1h", "--holdout", "0", value=value), "--holdout is 0")
    refused(search("--budget", "1h", "--model.init_from", "nowhere", value=value), "nowhere does not exist")
    assert not (tmp_path / "runs").exists()
    refused(search("--budget", "1h", "--ways", "all", value=lambda *_: None), "finite numbers")


def test_trials_are_runs(vitlit: Command, few: Path, work: Path, tmp_path: Path) -> None:
    def fit(words: list[str], log: Path) -> int:
        log.touch()
        if not (child := os.fork()):  # which needs no imports
            os._exit(main(["fit", *words]))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def before() -> None:
        setattr(tune, "fit", fit)  # noqa: B010

    small = ("--trainer.max_epochs", 2, "--data.image_size", 16, "--data.batch_size", 8, "--data.num_workers", 0)
    given = (
        "--ways",
        "probe",
        "--budget",
        "1h",
        "--model.init_from",
        "runs/pretrain",
        "--trainer.logger",
        "false",
        "--run.report",
        "false",
    )
    out = done(vitlit("tune", "--config", "recipes/finetune_folder", "--root", few, *given, *small, before=before))
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/tune/*/run.json")}
    assert runs.keys() == {"best", "probe-0.01", "probe-0.03", "probe-0.0033"}
    best = runs["best"]["result"]["best"]
    assert f"{best['value']:.4f}" in out

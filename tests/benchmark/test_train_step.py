"""benchmarks/train_step.py from end to end, with a tiny network."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from conftest import REPOSITORY, forked


def test_every_contender_takes_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    train_step = import_module("train_step")
    flags = ["--models", "Ti/16", "--image_size", "32", "--batch_size", "2", "--rounds", "2", "--peers", "timm"]
    result = forked(lambda: train_step.main([*flags, "--out", "result.json"]) or 0, tmp_path)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["vitlit", "vitlit through its Trainer", "timm"]
    for row in found["rows"]:
        low, middle, high = row["step_seconds"]
        assert 0 < low <= middle <= high
        assert row["step_images_per_second"] == pytest.approx(2 / middle, rel=0.02)
        assert 0 < row["memory_gib"] < 2
        assert ("inference_seconds" in row) == ("Trainer" not in row["name"])
    assert found["rows"][0]["step_time_over_vitlit"] == [1, 1, 1]
    assert found["peers"].keys() == {"timm"}

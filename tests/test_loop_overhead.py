"""benchmarks/loop_overhead.py: what a step of the loop costs."""

import json
import sys
from pathlib import Path
from runpy import run_path

import pytest
from conftest import REPOSITORY, forked


def test_the_loops_take_turns_and_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def main() -> int:
        sys.argv = ["loop_overhead.py", "--out", str(tmp_path / "out.json"), "--rounds", "2", "--steps", "100"]
        run_path(str(REPOSITORY / "benchmarks" / "loop_overhead.py"), run_name="__main__")
        return 0

    result = forked(main, tmp_path)
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["bare", "lightning", "vitlit"]
    for row in written["rows"]:
        assert len(row["us"]) == 4
        assert 0 < row["quartile_1_us"] <= row["median_us"] <= row["quartile_3_us"]
    assert set(written["ratios"]) == {"step", "overhead"}
    assert {"date", "machine", "versions"} <= set(written)

"""Hostile configs: only plain YAML is read, and no code runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitlit.errors import UserError
from vitlit.run.config import read_config


def test_a_config_is_plain_yaml_and_nothing_in_it_is_run(vitlit: Callable[..., Any], tmp_path: Path) -> None:
    for tag in ("python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"):
        (tmp_path / "evil.yaml").write_text(f"model: !!{tag} ['touch ran']\n")
        result = vitlit("fit", "--config", "evil.yaml")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert "config evil.yaml is not YAML" in result.err
    (tmp_path / "runs" / "evil").mkdir(parents=True)
    (tmp_path / "evil.yaml").rename(tmp_path / "runs" / "evil" / "config.yaml")
    for command in (["predict", "runs/evil", "."], ["validate", "runs/evil"]):
        result = vitlit(*command)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {name: 2026-13-01}", "is not YAML: month must be in 1..12"),
        ("run: {name: !!bool x}", "is not YAML"),
        ("run: !!map x", "is not YAML: line 1"),
        ("a: {class_path: EMA, init_args: }", "init_args of EMA holds no keys"),
        ("run: {name: a}\nrun: {name: b}", "is not YAML: line 2: the key run is there twice"),
    ],
)
def test_a_config_that_is_malformed_is_refused_in_a_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_config(tmp_path / "evil.yaml")
    assert "\n" not in str(caught.value)


def test_a_config_may_use_aliases_merges_and_keys_of_any_type(tmp_path: Path) -> None:
    # PyYAML 6.0.4 gives the wrong one where a key has one letter.
    (tmp_path / "a.yaml").write_text(
        "a: &a {lr: 1}\nb: {c: &b {<<: *a, lr: 2}}\nd: {<<: *b}\n"
        "e: {class_path: mylab.Steps, init_args: {rates: {3: 0.1}}}\n"
    )
    content = read_config(tmp_path / "a.yaml")
    assert (content["b"]["c"], content["d"]) == ({"lr": 2}, {"lr": 2})
    assert content["e"]["init_args"] == {"rates": {3: 0.1}}

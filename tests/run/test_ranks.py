"""All ranks receive what rank 0 decides, whoever launched them."""

import os
import shutil
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import SMALL, launched
from torch.distributed import TCPStore

from vitlit.errors import UserError
from vitlit.run.folder import Decision
from vitlit.run.ranks import share_decision


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher in the environment, and every change is undone."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name in ("VITLIT_DECISION", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def agreed(decision: Decision, run: Path) -> list[Decision]:
    """The decisions that a waiting rank receives and that rank 0 keeps."""
    heard: list[Decision] = []
    other = threading.Thread(target=lambda: heard.append(share_decision(None, run, {})), daemon=True)
    other.start()
    time.sleep(0.1)
    assert not heard
    own = share_decision(decision, run, {})
    other.join(10)
    del os.environ["VITLIT_DECISION"]
    return [told._replace(config="") for told in (*heard, own)]


@pytest.mark.usefixtures("alone")
def test_one_process_decides_for_those_that_lightning_launches(tmp_path: Path) -> None:
    decision = Decision("continue", "last.ckpt")
    assert share_decision(decision, tmp_path, {})[:2] == decision[:2]
    assert share_decision(None, tmp_path, {})[:2] == decision[:2]  # in the environment that they inherit


@pytest.mark.usefixtures("alone")
def test_under_torchrun_all_ranks_receive_the_decision_of_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first, second = Decision("begin", ""), Decision("continue", "last.ckpt")
    assert agreed(first, tmp_path) == [first, first]
    # The store outlives a restart, which agents may count differently. A rank asked and died.
    store.add(f"vitlit/{tmp_path}/asked", 1)
    store.set("default_pg/0/rank_0", "the address of a process that died")
    assert agreed(second, tmp_path) == [second, second]
    assert not any(name.startswith("default_pg") for name in store.list_keys())
    store.set_timeout(timedelta(seconds=0.2))
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *args, **kwargs: store)
    with pytest.raises(UserError, match="of 2 processes only 1 have come"):
        share_decision(first, tmp_path, {})
    monkeypatch.delenv("VITLIT_DECISION")
    with pytest.raises(UserError, match="rank 0 has not come"):
        share_decision(None, tmp_path / "other", {})


@pytest.mark.usefixtures("alone")
def test_under_slurm_all_ranks_receive_the_decision_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    first, second = Decision("begin", ""), Decision("continue", "last.ckpt")
    assert agreed(first, tmp_path / "runs" / "a") == [first, first]
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert agreed(second, tmp_path / "runs" / "a") == [second, second]


@pytest.mark.usefixtures("alone")
def test_processes_of_an_unknown_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        share_decision(Decision("begin", ""), tmp_path, {})


def test_ranks_with_different_configs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLIT_DECISION", "")  # forgotten afterwards
    decided = share_decision(Decision("begin", ""), tmp_path, {"model": {"lr": 1e-3}})
    assert decided.action == "begin"
    assert share_decision(None, tmp_path, {"model": {"lr": 1e-3}}) == decided
    with pytest.raises(UserError, match="different configs"):
        share_decision(None, tmp_path, {"model": {"lr": 1e-2}})


def test_what_rank_0_refuses_ends_the_others_in_silence(few: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    results = launched(2, "fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.5, cwd=tmp_path)
    assert [result.code for result in results] == [2, 2]
    assert "made with another config (model.init_args.vit.init_args.dropout 0.1 -> 0.5" in results[0].err
    assert results[1].err == ""

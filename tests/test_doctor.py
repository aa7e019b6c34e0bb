"""`vitlit doctor`: its facts equal the system's, and each warning names its remedy."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Result, command

from vitlit import doctor
from vitlit.data import workers

Doctor = Callable[..., Result]
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with a container's share of cores; absent unless a test writes it."""
    monkeypatch.setattr(workers, "QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


def warned(vitlit: Doctor, before: Callable[[], object]) -> str:
    """The warnings of a changed machine."""
    result = vitlit("doctor", "--json", before=before)
    assert (result.code, result.err) == (0, "")
    return "\n".join(json.loads(result.out)["warnings"])


def without_key() -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["HOME"] = str(Path("home").absolute())
    os.environ["NETRC"] = str(Path("home/.netrc").absolute())


def test_facts_equal_the_systems_without_lightning(tmp_path: Path) -> None:
    code = (
        "import sys; from vitlit.cli.main import main; main(['doctor', '--json']); print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    facts = json.loads(result.stdout)
    for package in (
        "vitlit",
        "torch",
        "torchvision",
        "torchcodec",
        "lightning",
        "torchmetrics",
        "jsonargparse",
        "wandb",
    ):
        assert facts["versions"][package] == metadata.version(package)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]["of"] == os.cpu_count()
    assert facts["cpu"]["cores"] <= len(os.sched_getaffinity(0))
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["decoder"] == {"name": "torchcodec", "why": ""}
    assert facts["determinism"]["OMP_NUM_THREADS"] == "1"
    assert facts["cpu"]["threads"] == 1
    assert facts["wandb"] == {"mode": "offline", "why": ""}  # the tests' WANDB_MODE
    for name in ("runs", "data"):
        assert facts["disk"][name]["folder"] == str(tmp_path / name)
        assert facts["disk"][name]["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    shared = os.statvfs("/dev/shm")
    assert facts["shared_memory"] == shared.f_blocks * shared.f_frsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert facts["open_files"] == {"soft": soft, "hard": hard}
    assert list(tmp_path.iterdir()) == []
    assert not {"lightning", "torchvision", "torchmetrics", "jsonargparse"} & set(result.stderr.split())


def test_the_report_agrees_with_the_json(vitlit: Doctor) -> None:
    result, facts = vitlit("doctor"), json.loads(vitlit("doctor", "--json").out)
    assert (result.code, result.err) == (0, "")
    for package in ("torch", "lightning", "wandb"):
        assert f"{package} {metadata.version(package)}" in result.out
    assert f"cores {len(os.sched_getaffinity(0))}  of {os.cpu_count()}" in result.out
    assert all(f"\n  {warning}\n" in f"{result.out}\n" for warning in facts["warnings"])
    assert result.out.endswith("\nwarnings\n  none\n") != bool(facts["warnings"])


def test_a_mistaken_flag_is_one_line(vitlit: Doctor) -> None:
    result = vitlit("doctor", "--jsn")
    assert result.code == 2
    assert result.err.startswith("vitlit: error: vitlit doctor: ")
    assert result.err.count("\n") == 1
    assert "--json" in vitlit("doctor", "--help").out


def few_files() -> None:
    os.closerange(3, 10_000)  # what tests before have left open
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class Disk(NamedTuple):
    total: int
    free: int


def full(total: int, free: int) -> Callable[[], None]:
    def before() -> None:
        setattr(shutil, "disk_usage", lambda path: Disk(total, free))  # noqa: B010

    return before


def environment(**variables: str) -> Callable[[], None]:
    return lambda: os.environ.update(variables)


HARMS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "files": (few_files, ["300 files may be open", "ulimit -n"]),
    "disk": (full(2**40, 2**30), ["1.0 GiB are free for", "/runs: ", "--run.root", "--data.root"]),
    "shared": (full(64 * 2**20, 2**40), ["/dev/shm has 64 MiB", "--shm-size", "--data.num_workers 0"]),
    "threads": (lambda: torch.set_num_threads(99), ["99 threads on", "OMP_NUM_THREADS="]),
    "mode": (environment(WANDB_MODE="ofline"), ["WANDB_MODE=ofline is not a mode; use online, offline or disabled"]),
    "wandb": (environment(WANDB_BASE_URL="nowhere"), ["WANDB_BASE_URL is invalid"]),
    "key": (environment(WANDB_MODE="online", WANDB_API_KEY="short"), ["WANDB_API_KEY invalid", "wandb login"]),
    "world": (environment(WORLD_SIZE="4"), ["WORLD_SIZE is 4", "torchrun nor SLURM"]),
    "slurm": (environment(SLURM_JOB_ID="7", SLURM_NTASKS="4"), ["has 4 tasks", "srun vitlit fit"]),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The warnings of this machine as it is."""
    return warned(partial(command, cwd=tmp_path_factory.mktemp("usual")), lambda: None)


@pytest.mark.parametrize("harm", HARMS)
def test_each_warning_names_its_remedy(vitlit: Doctor, usual: str, harm: str) -> None:
    before, words = HARMS[harm]
    text = warned(vitlit, before)
    assert all(word in text for word in words), text
    assert not any(word in usual for word in words[:1]), usual


def test_launchers_are_found_and_correct_ones_give_no_warning(vitlit: Doctor) -> None:
    torchrun = environment(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", RANK="2", KUBERNETES_SERVICE_HOST="10.0.0.1")
    facts = json.loads(vitlit("doctor", "--json", before=torchrun).out)
    assert facts["launcher"] == {
        "found": ["torchrun", "Kubernetes"],
        "environment": {"RANK": "2", "WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": ""},
    }
    assert "WORLD_SIZE" not in "".join(facts["warnings"])
    step = environment(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_STEP_ID="0")
    assert "SLURM" not in warned(vitlit, step)


@pytest.mark.parametrize(("cpu_max", "cores"), [("max 100000\n", None), ("150000 100000\n", 1), ("50000 100000\n", 1)])
def test_a_containers_share_of_cores_counts(vitlit: Doctor, quota: Path, cpu_max: str, cores: int | None) -> None:
    quota.write_text(cpu_max)
    expected = cores or len(os.sched_getaffinity(0))
    assert json.loads(vitlit("doctor", "--json").out)["cpu"]["cores"] == expected
    assert workers.count(1) == expected


def test_a_process_bound_to_a_core_has_one(vitlit: Doctor) -> None:
    one = {min(os.sched_getaffinity(0))}
    facts = json.loads(vitlit("doctor", "--json", before=lambda: os.sched_setaffinity(0, one)).out)
    assert facts["cpu"]["cores"] == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("key", [KEY, "too-short-a-secret"])
def test_a_key_is_found_and_never_shown_sent_or_stored(
    vitlit: Doctor, tmp_path: Path, key: str, options: list[str]
) -> None:
    def before() -> None:
        without_key()
        os.environ["WANDB_API_KEY"] = key

        def connect(*arguments: object) -> None:
            raise AssertionError("it went online")

        setattr(socket.socket, "connect", connect)  # noqa: B010

    result = vitlit("doctor", *options, before=before)
    assert (result.code, result.err) == (0, "")
    assert key not in result.out
    assert ("online" if key == KEY else "WANDB_API_KEY invalid") in result.out
    assert not (tmp_path / "home").exists()


def test_without_a_key_it_says_how_to_give_one(vitlit: Doctor) -> None:
    text, _, warnings = vitlit("doctor", before=without_key).out.partition("\nwarnings")
    assert "mode offline  why no API key  remedy `wandb login` or WANDB_API_KEY" in text
    assert "wandb login" not in warnings  # offline is no mistake


# Facts that this machine cannot be made to have


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor.examine()


GPU = {"name": "H100", "memory": 80 * 2**30, "capability": "9.0", "bf16": True}
OLD = {"name": "T4", "memory": 16 * 2**30, "capability": "7.5", "bf16": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": [], "nvidia_driver": True}, ["there is an NVIDIA driver, but torch finds no GPU", "pytorch.org"]),
        ({"gpus": [OLD]}, ["cuda:0 (T4) does not compute in bf16", "32-true"]),
        ({"decoder": {"name": "Pillow", "why": "no wheel"}}, ["torchcodec does not load (no wheel)", "pip install"]),
    ],
)
def test_devices_and_versions_give_warnings(facts: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    good = {**facts, "gpus": [GPU, GPU]}
    text = "\n".join(doctor.warnings({**good, **change}))
    assert all(word in text for word in words), text
    assert words[0] not in "\n".join(doctor.warnings(good))


def test_gpus_are_reported(facts: dict[str, Any]) -> None:
    text = doctor.report({**facts, "gpus": [GPU], "warnings": []})
    assert "\ncuda:0         name H100  memory 80.0 GiB  capability 9.0  bf16 True\n" in text
    assert text.endswith("\nwarnings\n  none")

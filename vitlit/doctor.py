"""`vitlit doctor`: what this machine has, and what would harm a run on it."""

import json
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vitlit
from vitlit.data import workers
from vitlit.errors import CommandParser, UserError
from vitlit.images.decode import DECODER, WHY_NOT
from vitlit.loggers import wandb_mode

HELP = """\
Report versions, GPUs, cores, limits and settings of this machine, and warn of what would harm a run started in this
folder. Nothing is sent and no key is shown: add the output of --json to an issue.
"""
PACKAGES = ("torch", "torchvision", "torchcodec", "lightning", "torchmetrics", "jsonargparse", "wandb")
SWITCHES = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
LAUNCHERS = {"torchrun": "TORCHELASTIC_RUN_ID", "SLURM": "SLURM_JOB_ID", "Kubernetes": "KUBERNETES_SERVICE_HOST"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID", "CUDA_VISIBLE_DEVICES")
SHARED, NVIDIA = Path("/dev/shm"), Path("/proc/driver/nvidia/version")
WORKER_BATCHES = 2 * 256 * 224 * 224 * 3  # bytes a data worker holds in shared memory: two batches at the defaults
FILES, WORKER_FILES = 512, 16  # open files: W&B, shards and pipes; and those of each data worker
LITTLE_SPACE = 5 * 2**30  # checkpoints take 44 bytes a parameter while one is written: 3.5 GiB for ViT-B/16
SIZES = ("memory", "free", "shared_memory")  # facts in bytes


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit doctor", HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    facts = examine()
    facts["warnings"] = list(warnings(facts))
    print(json.dumps(facts, indent=2) if as_json else report(facts))
    return 0


def examine() -> dict[str, Any]:
    """The facts as JSON values: sizes in bytes, None for what is missing."""
    try:
        mode, why = wandb_mode.decide()
    except UserError as error:
        mode, why = "refused", str(error)
    return {
        "platform": platform.platform(),
        "versions": {**versions(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "gpus": [gpu(number) for number in range(torch.cuda.device_count())],
        "nvidia_driver": NVIDIA.is_file(),
        "cpu": {"cores": workers.cores(), "of": os.cpu_count(), "threads": torch.get_num_threads()},
        "determinism": {name: os.environ.get(name) for name in SWITCHES},
        "decoder": {"name": DECODER, "why": WHY_NOT},
        "wandb": {"mode": mode, "why": why},
        "disk": {name: disk(Path(name).absolute()) for name in ("runs", "data")},
        "shared_memory": shutil.disk_usage(SHARED).total if SHARED.is_dir() else None,
        "open_files": dict(zip(("soft", "hard"), resource.getrlimit(resource.RLIMIT_NOFILE), strict=True)),
        "launcher": {
            "found": [name for name, variable in LAUNCHERS.items() if variable in os.environ],
            "environment": {name: os.environ[name] for name in LAUNCHED if name in os.environ},
        },
    }


def origin(command: list[str]) -> dict[str, Any]:
    """What a result was made with: command, date, host, working folder, versions, and commits where there are any."""
    folders = {"folder": Path.cwd(), "vitlit": Path(vitlit.__file__).parent.parent}
    if not (folders["vitlit"] / ".git").exists():  # an installed package, in whatever repository its .venv lies
        del folders["vitlit"]
    return {
        "command": shlex.join(command),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "versions": versions(),
        "commit": {name: found for name, folder in folders.items() if (found := commit(folder))},
    }


def versions() -> dict[str, str | None]:
    """The versions of Python, vitlit and the packages below it; None for what is missing."""
    found = {"python": platform.python_version(), "vitlit": vitlit.__version__, **dict.fromkeys(PACKAGES)}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit(folder: Path) -> str:
    """The commit checked out around a folder, with -dirty behind it if files differ; "" without one."""
    ask = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([*ask, "--exclude=*"], capture_output=True, text=True, timeout=5).stdout.strip()
    return ""


def gpu(number: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(number)
    capability = f"{gpu.major}.{gpu.minor}"
    return {"name": gpu.name, "memory": gpu.total_memory, "capability": capability, "bf16": gpu.major >= 8}


def disk(folder: Path) -> dict[str, Any]:
    """The free space of a folder that may not exist yet."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(place).free}


def warnings(facts: dict[str, Any]) -> Iterator[str]:
    """What would harm a run, each with its remedy."""
    if facts["decoder"]["name"] == "Pillow":
        yield f"torchcodec does not load ({facts['decoder']['why']}), and Pillow is slower: pip install torchcodec"
    if not facts["gpus"] and facts["nvidia_driver"]:
        lacks = f"there is an NVIDIA driver, but torch finds no GPU (built for CUDA {facts['versions']['cuda']})"
        yield f"{lacks}: unset CUDA_VISIBLE_DEVICES, or install pytorch.org's torch for the CUDA of `nvidia-smi`"
    for name in (f"cuda:{number} ({gpu['name']})" for number, gpu in enumerate(facts["gpus"]) if not gpu["bf16"]):
        yield f"{name} does not compute in bf16, only in fp16: if the loss becomes nan, --trainer.precision 32-true"
    cores, threads = facts["cpu"]["cores"], facts["cpu"]["threads"]
    if threads > cores:
        yield f"torch has {threads} threads on {cores} core(s): export OMP_NUM_THREADS={cores}"
    shared, needed = facts["shared_memory"], cores * WORKER_BATCHES
    if shared is not None and shared < needed:
        lacks = f"{SHARED} has {shared / 2**20:,.0f} MiB, but data workers may fill {needed / 2**20:,.0f}, and then die"
        yield f"{lacks}: docker run --shm-size 8g, in Kubernetes a Memory emptyDir, or --data.num_workers 0"
    soft, wanted = facts["open_files"]["soft"], FILES + WORKER_FILES * cores
    if 0 <= soft < wanted:  # -1 is no limit
        yield f"{soft} files may be open, training may need {wanted}: ulimit -n, or docker run --ulimit nofile={wanted}"
    for disk, flag in ((facts["disk"]["runs"], "--run.root"), (facts["disk"]["data"], "--data.root")):
        if disk["free"] < LITTLE_SPACE:
            yield f"{in_words('free', disk['free'])} are free for {disk['folder']}: make room, or give {flag}"
    mode, why = facts["wandb"]["mode"], facts["wandb"]["why"]
    if why not in ("", wandb_mode.NO_KEY):
        yield f"W&B is {mode} ({why}): correct the variable, or store another key with `wandb login`"
    found, variables = facts["launcher"]["found"], facts["launcher"]["environment"]
    tasks, processes = variables.get("SLURM_NTASKS", "1"), variables.get("WORLD_SIZE", "1")
    if "SLURM" in found and tasks != "1" and "SLURM_STEP_ID" not in variables:
        yield f"the SLURM job has {tasks} tasks, but srun did not start this one: srun vitlit fit ..."
    elif not {"torchrun", "SLURM"} & set(found) and processes != "1":
        yield f"WORLD_SIZE is {processes}, but there is neither torchrun nor SLURM: start with one, or unset it"


def report(facts: dict[str, Any]) -> str:
    rows = {**facts, **{f"cuda:{number}": gpu for number, gpu in enumerate(facts["gpus"])}}
    if facts["wandb"]["why"] == wandb_mode.NO_KEY:
        rows["wandb"] = {**facts["wandb"], "remedy": "`wandb login` or WANDB_API_KEY"}
    lines = [f"{name:<15}{in_words(name, rows[name])}" for name in rows if name not in ("gpus", "warnings")]
    return "\n".join([*lines, "\nwarnings", *(f"  {warning}" for warning in facts["warnings"] or ["none"])])


def in_words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {in_words(key, item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(value) or "-"
    if name in SIZES and value is not None:
        return f"{value / 2**30:,.1f} GiB"
    return "-" if value in (None, "") else str(value)

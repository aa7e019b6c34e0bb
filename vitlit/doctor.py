"""`vitlit doctor`: what this machine has, and what of it will bite."""

import json
import multiprocessing
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

import vitlit
from vitlit import wandb_mode
from vitlit.data import workers
from vitlit.data.decode import DECODER, PILLOW_SLOWER, WHY_NOT
from vitlit.errors import CommandParser, UserError

HELP = """\
Report on this machine: versions, devices, cores, determinism, decoder, W&B, disk, shared memory, launcher. Then what of
it will bite a training that is started in this folder, and what to do about it. Nothing is sent, and no key is shown;
give the output of --json with an issue.
"""
GIB = 2**30
PACKAGES = ("torch", "torchvision", "torchcodec", "lightning", "torchmetrics", "jsonargparse", "wandb")
SWITCHES = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
LAUNCHERS = {"torchrun": "TORCHELASTIC_RUN_ID", "SLURM": "SLURM_JOB_ID", "Kubernetes": "KUBERNETES_SERVICE_HOST"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID", "CUDA_VISIBLE_DEVICES")
SHARED, MEMORY_LIMIT = Path("/dev/shm"), Path("/sys/fs/cgroup/memory.max")
OVERCOMMIT, NVIDIA = Path("/proc/sys/vm/overcommit_memory"), Path("/proc/driver/nvidia/version")
HANDED_OVER = 2 * 256 * 224 * 224 * 3  # bytes of a data worker's two batches, with data.* as they are unless given
FILES, FILES_OF_WORKER = 512, 16  # open at a time: W&B's, shards and pipes; and those of each data worker
LITTLE = 5 * GIB  # of disk for runs
# 44 bytes a parameter: last.ckpt, previous.ckpt, best.ckpt, and the next of last and best while they are written.
CHECKPOINTS = "a ViT-B/16's checkpoints need 3.5 GiB, a ViT-L/16's 12.5"


def run(arguments: list[str]) -> int:
    """`vitlit doctor [--json]`; returns the exit code."""
    parser = CommandParser("vitlit doctor", HELP)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    as_json = parser.parse_args(arguments).json
    facts = examine()
    facts["warnings"] = warnings(facts)
    print(json.dumps(facts, indent=2) if as_json else report(facts))
    return 0


def examine() -> dict[str, Any]:
    """All that is looked at, as plain values: sizes in bytes, None for what there is not."""
    versions: dict[str, Any] = {"python": platform.python_version(), "vitlit": vitlit.__version__}
    versions |= {name: version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn
    versions |= {"cuda": torch.version.cuda, "cudnn": cudnn.version() if cudnn.is_available() else None}
    return {
        "platform": platform.platform(),
        "versions": versions,
        "unmet": unmet(),
        "gpus": gpus(),
        "mps": torch.backends.mps.is_available(),
        "nvidia_driver": NVIDIA.is_file(),
        "cpu": {
            "model": cpu_model(),
            "cores": workers.cores(),
            "of": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": memory(),
        },
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": cudnn.deterministic,
            "cudnn_benchmark": cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_tf32": cudnn.allow_tf32,
            **{name: os.environ.get(name) for name in SWITCHES},
        },
        "decoder": {"name": DECODER, "why": WHY_NOT},
        "wandb": tracking(),
        "disk": {name: disk(Path(name)) for name in ("runs", "data")},
        "shared_memory": shutil.disk_usage(SHARED).total if SHARED.is_dir() else None,
        "open_files": open_files(),
        "processes": {
            "start_method": multiprocessing.get_context().get_start_method(),
            "overcommit_memory": OVERCOMMIT.read_text().strip() if OVERCOMMIT.is_file() else None,
        },
        "launcher": {
            "found": [name for name, variable in LAUNCHERS.items() if variable in os.environ],
            "environment": {name: os.environ[name] for name in LAUNCHED if name in os.environ},
        },
    }


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet() -> list[dict[str, str | None]] | None:
    """What vitlit needs of other packages and what it has instead; None where vitlit itself is not installed."""
    if version("vitlit") is None:
        return None
    found: list[dict[str, str | None]] = []
    for need in map(Requirement, metadata.requires("vitlit") or []):
        has = version(need.name)
        needed = need.marker is None or need.marker.evaluate({"extra": ""})
        if needed and (has is None or not need.specifier.contains(has, prereleases=True)):
            found.append({"needs": str(need), "has": has})
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, memory, compute capability, and whether it computes in bf16 by itself, of each."""
    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        capability = f"{about.major}.{about.minor}"
        found.append({"name": about.name, "memory": about.total_memory, "capability": capability, "bf16": bf16})
    return found


def cpu_model() -> str:
    """As the system names it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def memory() -> int | None:
    """Bytes of the machine, or of its container where that has fewer; None on Windows."""
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return whole if limit == "max" else min(whole, int(limit))


def tracking() -> dict[str, str]:
    """The mode that W&B's logger would begin in, and why if it is not online."""
    try:
        mode, why = wandb_mode.decide()
    except UserError as error:
        return {"mode": "refused", "why": str(error)}
    return {"mode": mode, "why": why}


def disk(folder: Path) -> dict[str, Any]:
    """What is free where a folder is, or would be."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK)}


def open_files() -> dict[str, int] | None:
    """How many files this process may have open, and how many it may ask for; -1 for any, None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"soft": soft, "hard": hard}


def warnings(facts: dict[str, Any]) -> list[str]:
    """What of that which `examine` found will bite, each with its remedy."""
    parts = (of_versions, of_devices, of_cores, of_workers, of_disk, of_wandb, of_launcher)
    return [warning for part in parts for warning in part(facts)]


def of_versions(facts: dict[str, Any]) -> list[str]:
    if facts["unmet"] is None:
        return ["vitlit is not installed, so that the versions it needs could not be compared: pip install -e ."]
    found = [
        f"vitlit needs {lack['needs']}, but {lack['has'] or 'none'} is installed: pip install '{lack['needs']}'"
        for lack in facts["unmet"]
    ]
    if facts["decoder"]["name"] == "Pillow":
        found.append(
            f"torchcodec does not load ({facts['decoder']['why']}), so Pillow decodes, the same pixels in "
            f"{PILLOW_SLOWER} times the time: pip install torchcodec, in the version that fits torch's"
        )
    return found


def of_devices(facts: dict[str, Any]) -> list[str]:
    every, built = facts["gpus"], facts["versions"]["cuda"]
    found = []
    if not every and facts["nvidia_driver"]:
        why = f"the driver may be too old for CUDA {built}" if built else "this torch is built without CUDA"
        found.append(
            f"there is an NVIDIA driver, but torch finds no GPU: {why}, or CUDA_VISIBLE_DEVICES hides it; "
            "`nvidia-smi` tells the driver's CUDA, pytorch.org the torch for it"
        )
    elif not every and not facts["mps"]:
        found.append("there is no GPU: the CPU trains small ViTs on small images (configs/pretrain.yaml), no recipe")
    for number, gpu in enumerate(every):
        if not gpu["bf16"]:
            found.append(
                f"cuda:{number} ({gpu['name']}) does not compute in bf16: trainer.precision auto is 16-mixed on it; "
                "where that comes to nan, give --trainer.precision 32-true"
            )
    if len({(gpu["name"], gpu["memory"]) for gpu in every}) > 1:
        found.append("the GPUs differ, and all would wait for the slowest: choose equal ones by CUDA_VISIBLE_DEVICES")
    return found


def of_cores(facts: dict[str, Any]) -> list[str]:
    found = []
    cores, threads = facts["cpu"]["cores"], facts["cpu"]["threads"]
    if threads > cores:
        found.append(
            f"torch computes with {threads} threads on {cores} core{'s'[: cores > 1]}, which data workers use besides: "
            f"export OMP_NUM_THREADS={cores}"
        )
    if (facts["determinism"]["OMP_WAIT_POLICY"] or "").lower() == "active":
        found.append("OMP_WAIT_POLICY=active lets threads spin on the cores that data workers need: unset it")
    return found


def of_workers(facts: dict[str, Any]) -> list[str]:
    found = []
    cores, shared, files = facts["cpu"]["cores"], facts["shared_memory"], facts["open_files"]
    many = f"{cores} data worker{'s'[: cores > 1]}"
    if shared is not None and shared < cores * HANDED_OVER:
        found.append(
            f"{SHARED} has {shared / 2**20:,.0f} MiB, but {many} with 2 batches each of 256 images of 224 pixels hand "
            f"over {cores * HANDED_OVER / 2**20:,.0f} MiB in it, and die of a bus error where it is full: docker run "
            "--shm-size 8g, in Kubernetes an emptyDir of medium Memory mounted there, or --data.num_workers 0"
        )
    wanted = FILES + FILES_OF_WORKER * cores
    if files is not None and 0 <= files["soft"] < wanted:
        found.append(
            f"{files['soft']} files may be open, but training with {many} may need {wanted}: ulimit -n {wanted}, or "
            f"docker run --ulimit nofile={wanted}"
        )
    start = facts["processes"]["start_method"]
    if start != "fork":
        found.append(
            f"data workers are not forked but begun by {start}, and each takes seconds to import torch: for a small "
            "set --data.num_workers 0 is faster"
        )
    if facts["processes"]["overcommit_memory"] == "2":
        found.append(
            "vm.overcommit_memory is 2, and to fork data workers from a large process fails with 'Cannot allocate "
            "memory': sysctl vm.overcommit_memory=0, or --data.num_workers 0"
        )
    return found


def of_disk(facts: dict[str, Any]) -> list[str]:
    runs, data = facts["disk"]["runs"], facts["disk"]["data"]
    found = []
    if not runs["writable"]:
        found.append(f"{runs['folder']} cannot be written: give --run.root")
    if runs["free"] < LITTLE:
        found.append(
            f"{runs['free'] / GIB:.1f} GiB are free for {runs['folder']}, and {CHECKPOINTS}: make room, or give "
            "another --run.root"
        )
    if data["free"] < LITTLE:
        found.append(
            f"{data['free'] / GIB:.1f} GiB are free for {data['folder']}: before a set is written there, make room, or "
            "give another --data.root"
        )
    return found


def of_wandb(facts: dict[str, Any]) -> list[str]:
    mode, why = facts["wandb"]["mode"], facts["wandb"]["why"]
    if mode == "refused":
        return [f"{why}: until it is unset or right, a run with W&B's logger is refused"]
    if why not in ("", wandb_mode.NO_KEY):
        return [f"W&B stays offline ({why}): `wandb login` stores another key"]
    return []


def of_launcher(facts: dict[str, Any]) -> list[str]:
    found, given = facts["launcher"]["found"], facts["launcher"]["environment"]
    tasks, processes = given.get("SLURM_NTASKS", "1"), given.get("WORLD_SIZE", "1")
    if "SLURM" in found and tasks != "1" and "SLURM_STEP_ID" not in given:
        return [f"the SLURM job has {tasks} tasks, but this one was not started by srun: srun vitlit fit ..."]
    if not {"torchrun", "SLURM"} & set(found) and processes != "1":
        return [f"WORLD_SIZE is {processes}, but there is neither torchrun nor SLURM: start with one, or unset it"]
    return []


def report(facts: dict[str, Any]) -> str:
    """The facts and warnings as a person reads them."""

    def listed(values: dict[str, Any]) -> str:
        return "  ".join(f"{name} {'-' if value is None else value}" for name, value in values.items())

    def size(value: int | None) -> str:
        return "-" if value is None else f"{value / GIB:,.1f} GiB"

    cpu, files, decoder, tracked = facts["cpu"], facts["open_files"], facts["decoder"], facts["wandb"]
    login = "; `wandb login` or WANDB_API_KEY" if tracked["why"] == wandb_mode.NO_KEY else ""
    rows = {
        "platform": facts["platform"],
        "versions": listed(facts["versions"]),
        **{
            f"cuda:{number}": listed({**gpu, "memory": size(gpu["memory"])}) for number, gpu in enumerate(facts["gpus"])
        },
        **({"mps": "Apple's GPU"} if facts["mps"] else {}),
        "cpu": f"{cpu['model']}  cores {cpu['cores']} of {cpu['of']}  threads {cpu['threads']}  memory "
        + size(cpu["memory"]),
        "determinism": listed(facts["determinism"]),
        "decoder": decoder["name"] + (f" ({decoder['why']})" if decoder["why"] else ""),
        "W&B": tracked["mode"] + (f" ({tracked['why']}{login})" if tracked["why"] else ""),
        **{name: f"{size(place['free'])} free for {place['folder']}" for name, place in facts["disk"].items()},
        "shared memory": size(facts["shared_memory"]),
        "open files": f"{files['soft']}, up to {files['hard']}" if files else "-",
        "processes": listed(facts["processes"]),
        "launcher": "  ".join([*facts["launcher"]["found"], listed(facts["launcher"]["environment"])]).strip()
        or "none",
    }
    bites = [f"  {warning}" for warning in facts["warnings"]]
    head = "\nwhat will bite" if bites else "\nnothing of this will bite"
    return "\n".join([*(f"{name:<15}{value}" for name, value in rows.items()), head, *bites])

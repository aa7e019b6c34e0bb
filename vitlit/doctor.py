"""`vitlit doctor`: what this machine has, and what of it will bite."""

import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

import vitlit
from vitlit.data import workers
from vitlit.errors import CommandParser, UserError
from vitlit.images.decode import DECODER, PILLOW_SLOWER, WHY_NOT
from vitlit.loggers import wandb_mode

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
SHARED, NVIDIA, CPU = Path("/dev/shm"), Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")
OVERCOMMIT, MEMORY_LIMIT = Path("/proc/sys/vm/overcommit_memory"), Path("/sys/fs/cgroup/memory.max")
WORKER_BATCHES = 2 * 256 * 224 * 224 * 3  # bytes that a data worker holds in shared memory, two batches of the default
FILES, WORKER_FILES = 512, 16  # open at a time: W&B's, shards and pipes; those of each data worker
LITTLE_SPACE = 5 * GIB
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
    """The facts as plain values: sizes in bytes, None for what is missing."""
    cores, threads = workers.cores(), torch.get_num_threads()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # -1 for no limit
    versions: dict[str, Any] = {"python": platform.python_version(), "vitlit": vitlit.__version__}
    versions |= {name: version(name) for name in PACKAGES}
    return {
        "platform": platform.platform(),
        "versions": {**versions, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "unmet": unmet(),
        "gpus": [gpu(number) for number in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        "nvidia_driver": NVIDIA.is_file(),
        "cpu": {"model": cpu(), "cores": cores, "of": os.cpu_count(), "threads": threads, "memory": memory()},
        "determinism": {name: os.environ.get(name) for name in SWITCHES},
        "decoder": {"name": DECODER, "why": WHY_NOT},
        "wandb": tracking(),
        "disk": {name: disk(Path(name).absolute()) for name in ("runs", "data")},
        "shared_memory": shutil.disk_usage(SHARED).total if SHARED.is_dir() else None,
        "open_files": {"soft": soft, "hard": hard},
        "processes": {"start_method": multiprocessing.get_start_method(), "overcommit_memory": content(OVERCOMMIT)},
        "launcher": {
            "found": [name for name, variable in LAUNCHERS.items() if variable in os.environ],
            "environment": {name: os.environ[name] for name in LAUNCHED if name in os.environ},
        },
    }


def version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet() -> list[dict[str, str | None]] | None:
    """The requirements of vitlit that are not met, and what is installed; None where vitlit itself is not installed."""
    if version("vitlit") is None:
        return None
    needs = [Requirement(need) for need in metadata.requires("vitlit") or []]
    found = [(need, version(need.name)) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return [
        {"needs": str(need), "has": has}
        for need, has in found
        if has is None or not need.specifier.contains(has, prereleases=True)
    ]


def gpu(number: int) -> dict[str, Any]:
    """Name, memory and compute capability of a GPU, and whether its hardware computes in bf16."""
    about = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = f"{about.major}.{about.minor}"
    return {"name": about.name, "memory": about.total_memory, "capability": capability, "bf16": bf16}


def content(file: Path) -> str | None:
    """What a file of the system says, None where there is no such file."""
    return file.read_text().strip() if file.is_file() else None


def cpu() -> str:
    """The model of the CPU."""
    named = re.search(r"^model name\s*: (.+)", content(CPU) or "", re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def memory() -> int:
    """Bytes of the machine, or of its container where that has fewer."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = content(MEMORY_LIMIT) or "max"
    return machine if limit == "max" else min(machine, int(limit))


def tracking() -> dict[str, str]:
    """The mode in which the W&B logger would start, and why it is not online."""
    try:
        mode, why = wandb_mode.decide()
    except UserError as error:
        mode, why = "refused", str(error)
    return {"mode": mode, "why": why}


def disk(folder: Path) -> dict[str, Any]:
    """The free space where a folder is, or would be."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK)}


def warnings(facts: dict[str, Any]) -> list[str]:
    """What will bite, each with its remedy."""
    return [*of_versions(facts), *of_devices(facts), *of_workers(facts), *of_disk(facts), *of_environment(facts)]


def of_versions(facts: dict[str, Any]) -> Iterator[str]:
    if facts["unmet"] is None:
        yield "vitlit is not installed, so its requirements could not be checked: pip install -e ."
    for lack in facts["unmet"] or []:
        yield f"vitlit needs {lack['needs']}, but {lack['has'] or 'none'} is installed: pip install '{lack['needs']}'"
    if facts["decoder"]["name"] == "Pillow":
        yield (
            f"torchcodec does not load ({facts['decoder']['why']}), so Pillow decodes, which takes {PILLOW_SLOWER} "
            "times as long for the same pixels: pip install torchcodec, in the version that fits torch's"
        )


def of_devices(facts: dict[str, Any]) -> Iterator[str]:
    gpus, cuda = facts["gpus"], facts["versions"]["cuda"]
    if not gpus and facts["nvidia_driver"]:
        why = f"the driver may be too old for CUDA {cuda}" if cuda else "this torch is built without CUDA"
        yield (
            f"there is an NVIDIA driver, but torch finds no GPU: {why}, or CUDA_VISIBLE_DEVICES hides it; "
            "`nvidia-smi` shows the driver's CUDA, and pytorch.org the torch for it"
        )
    elif not gpus and not facts["mps"]:
        yield "there is no GPU: the CPU trains small ViTs on small images (configs/pretrain.yaml), no recipe"
    for name in (f"cuda:{number} ({gpu['name']})" for number, gpu in enumerate(gpus) if not gpu["bf16"]):
        yield f"{name} does not compute in bf16, only in fp16: if the loss becomes nan, --trainer.precision 32-true"
    if len({(gpu["name"], gpu["memory"]) for gpu in gpus}) > 1:
        yield "the GPUs differ, and all would wait for the slowest: choose equal ones by CUDA_VISIBLE_DEVICES"


def of_workers(facts: dict[str, Any]) -> Iterator[str]:
    cores, threads, processes = facts["cpu"]["cores"], facts["cpu"]["threads"], facts["processes"]
    if threads > cores:
        yield f"torch has {threads} threads on {cores} core(s), which workers need, too: export OMP_NUM_THREADS={cores}"
    if (facts["determinism"]["OMP_WAIT_POLICY"] or "").lower() == "active":
        yield "OMP_WAIT_POLICY=active lets threads spin on the cores that data workers need: unset it"
    shared, needed = facts["shared_memory"], cores * WORKER_BATCHES
    if shared is not None and shared < needed:
        yield (
            f"{SHARED} has {shared / 2**20:,.0f} MiB; with a data worker on each core, batches of 256 images of 224 "
            f"pixels fill {needed / 2**20:,.0f} MiB, and a worker dies of a bus error when it is full: docker run "
            "--shm-size 8g, in Kubernetes an emptyDir of medium Memory mounted there, or --data.num_workers 0"
        )
    soft, wanted = facts["open_files"]["soft"], FILES + WORKER_FILES * cores
    if 0 <= soft < wanted:
        yield f"{soft} files may be open, training may need {wanted}: ulimit -n, or docker run --ulimit nofile={wanted}"
    if processes["start_method"] != "fork":
        yield (
            f"data workers are started by {processes['start_method']}, not by fork, and each takes seconds to import "
            "torch: for a small data set --data.num_workers 0 is faster"
        )
    if processes["overcommit_memory"] == "2":
        yield (
            "vm.overcommit_memory is 2, so that a large process cannot fork data workers ('Cannot allocate memory'): "
            "sysctl vm.overcommit_memory=0, or --data.num_workers 0"
        )


def of_disk(facts: dict[str, Any]) -> Iterator[str]:
    runs, data = facts["disk"]["runs"], facts["disk"]["data"]
    if not runs["writable"]:
        yield f"{runs['folder']} cannot be written: give --run.root"
    if runs["free"] < LITTLE_SPACE:
        yield f"{size(runs['free'])} are free for {runs['folder']}, and {CHECKPOINTS}: make room, or give --run.root"
    if data["free"] < LITTLE_SPACE:
        yield f"{size(data['free'])} are free for {data['folder']}: make room for a data set, or give --data.root"


def of_environment(facts: dict[str, Any]) -> Iterator[str]:
    mode, why = facts["wandb"]["mode"], facts["wandb"]["why"]
    if mode == "refused":
        yield f"{why}: a run with the W&B logger is refused until it is unset or right"
    elif why not in ("", wandb_mode.NO_KEY):
        yield f"W&B stays offline ({why}): `wandb login` stores another key"
    found, given = facts["launcher"]["found"], facts["launcher"]["environment"]
    tasks, processes = given.get("SLURM_NTASKS", "1"), given.get("WORLD_SIZE", "1")
    if "SLURM" in found and tasks != "1" and "SLURM_STEP_ID" not in given:
        yield f"the SLURM job has {tasks} tasks, but this one was not started by srun: srun vitlit fit ..."
    elif not {"torchrun", "SLURM"} & set(found) and processes != "1":
        yield f"WORLD_SIZE is {processes}, but there is neither torchrun nor SLURM: start with one, or unset it"


def report(facts: dict[str, Any]) -> str:
    """The facts and warnings as text."""
    cpu, decoder, wandb, launcher = facts["cpu"], facts["decoder"], facts["wandb"], facts["launcher"]
    cores = f"cores {cpu['cores']} of {cpu['of']}  threads {cpu['threads']}"
    login = "; `wandb login` or WANDB_API_KEY" if wandb["why"] == wandb_mode.NO_KEY else ""
    rows = {"platform": facts["platform"], "versions": listed(facts["versions"])}
    rows |= {
        f"cuda:{number}": listed({**gpu, "memory": size(gpu["memory"])}) for number, gpu in enumerate(facts["gpus"])
    }
    rows |= {"mps": "Apple's GPU"} if facts["mps"] else {}
    rows |= {
        "cpu": f"{cpu['model']}  {cores}  memory {size(cpu['memory'])}",
        "determinism": listed(facts["determinism"]),
        "decoder": decoder["name"] + (f" ({decoder['why']})" if decoder["why"] else ""),
        "W&B": wandb["mode"] + (f" ({wandb['why']}{login})" if wandb["why"] else ""),
        **{name: f"{size(place['free'])} free for {place['folder']}" for name, place in facts["disk"].items()},
        "shared memory": "-" if facts["shared_memory"] is None else size(facts["shared_memory"]),
        "open files": listed(facts["open_files"]),
        "processes": listed(facts["processes"]),
        "launcher": "  ".join(launcher["found"] or ["none"]) + "  " + listed(launcher["environment"]),
    }
    head = "\nwhat will bite" if facts["warnings"] else "\nnothing of this will bite"
    lines = [f"{name:<15}{value}".rstrip() for name, value in rows.items()]
    return "\n".join([*lines, head, *(f"  {warning}" for warning in facts["warnings"])])


def listed(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {'-' if value is None else value}" for name, value in values.items())


def size(value: int) -> str:
    return f"{value / GIB:,.1f} GiB"

"""Many machines: the shipped scripts and sweep; two node groups that train one run though a process is killed."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, SMALL, Result, command, finish, start, stranger
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch.distributed import TCPStore
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch
from wandb import wandb_agent

from vitlit.cli.main import main

Command = Callable[..., Result]
KILLED = 3  # steps that were done when rank 1 dies: an epoch has two, so that the third is done again


class Notes(Callback):
    """Writes each step's samples, a line a step and a file a rank; rank 1 of two is killed in its first attempt."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.global_rank == 1 and trainer.global_step == KILLED and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"samples{trainer.global_rank}.csv", "a") as file:
            print(trainer.global_step, *batch[2].tolist(), sep=",", file=file)


def worker(*arguments: str) -> None:
    """What a process of torchrun's executes."""
    # Lightning reads it when it is imported.
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    code = main(list(arguments))
    if code:
        sys.exit(code)


def agent(*arguments: object) -> int:
    """`torchrun ARGUMENTS -m vitlit ...`, whose workers are forked rather than executed, which saves their imports."""
    options = torchrun.parse_args([str(argument) for argument in ("--start-method", "fork", *arguments)])
    config, _, line = torchrun.config_from_args(options)
    assert line[:3] == ["-u", "-m", "vitlit"]
    elastic_launch(config, worker)(*line[3:])
    return 0


def samples(folder: Path, rank: int) -> dict[int, list[str]]:
    """The samples of each step, which are the same where it was done twice."""
    steps: dict[int, list[str]] = {}
    for step, *indices in csv.reader((folder / f"samples{rank}.csv").open()):
        assert steps.setdefault(int(step), indices) == indices
    return steps


def losses(folder: Path) -> list[float]:
    """Of every row of a run's metrics: the step, and what of train/loss and val/loss it has."""
    rows = csv.DictReader((folder / "runs" / "pretrain" / "metrics.csv").open())
    return [float(row[name]) for row in rows for name in ("step", "train/loss", "val/loss") if row[name]]


@pytest.mark.parametrize("own_store", [pytest.param("0", marks=pytest.mark.long, id="agents_store"), "1"])
def test_two_nodes_train_the_run_of_one_process_though_a_rank_is_killed(
    own_store: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", own_store)
    for name in [name for name in os.environ if "RANK" in name or "MASTER" in name or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)  # of a test before
    monkeypatch.setenv("VITLIT_TRUST", "test_cluster")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    fit: list[Any] = ["fit", *SMALL, "--data.root", few, "--trainer.accelerator", "cpu"]
    fit += ["--trainer.callbacks.class_path", "test_cluster.Notes"]
    alone = command(*fit, cwd=one)
    assert alone.code == 0, alone.err

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch: list[Any] = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 1, "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=false", "-m", "vitlit"]
    devices = ["--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp"]
    nodes = [start(partial(agent, *launch, *fit, *devices), two, str(node)) for node in range(2)]
    results = [finish(child, two, str(node)) for node, child in enumerate(nodes)]
    assert [result.code for result in results] == [0, 0], "".join(result.err for result in results)

    printed = "".join(result.out for result in results)
    assert printed.count("continuing runs/pretrain from runs/pretrain/checkpoints/last.ckpt") == 1
    assert printed.count("runs/pretrain is complete") == 1
    assert (two / "runs" / "pretrain" / "finished.json").read_text() == '{"step": 6}\n'
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    assert len(losses(one)) == 6 * 2 + 3  # a step and its loss, and a loss of each epoch's validation
    first, second = samples(two, 0), samples(two, 1)
    assert {step: first[step] + second[step] for step in range(6)} == samples(one, 0)


# The scripts


CLUSTER = REPOSITORY / "configs" / "cluster"


def sbatch() -> dict[str, str]:
    """The options that slurm.sh gives to sbatch."""
    given = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (CLUSTER / "slurm.sh").read_text(), re.M)
    return dict(given)


def job() -> dict[str, Any]:
    return next(part for part in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()) if part["kind"] == "Job")


def executed(name: str, folder: Path) -> list[str]:
    """The last command of a script, as its shell, or Kubernetes, hands it over."""
    if name == "kubernetes":
        container = job()["spec"]["template"]["spec"]["containers"][0]
        line = "\n".join([*container["command"], *container["args"]])
        for variable in container["env"]:
            line = line.replace(f"$({variable['name']})", variable["value"])
        return line.split("\n")
    if name == "page":
        (line,) = re.findall(r"^torchrun --.*?[^\\]$", (REPOSITORY / "docs" / "cluster.md").read_text(), re.S | re.M)
        return shlex.split(line.replace("\\\n", ""))
    scripts = folder / "vitlit" / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text(f"PATH={scripts}:$PATH\n")
    for tool in ("srun", "torchrun"):
        (scripts / tool).write_text(f'#!/bin/sh\nprintf "%s\\n" {tool} "$@"\n')
        (scripts / tool).chmod(0o755)
    options = sbatch()
    given = {"NNODES": "nodes", "NTASKS_PER_NODE": "ntasks-per-node", "CPUS_PER_TASK": "cpus-per-task"}
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"]}
    environment |= {f"SLURM_{variable}": options[option] for variable, option in given.items()}
    done = subprocess.run(["bash", CLUSTER / f"{name}.sh"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["slurm", "torchrun", "kubernetes", "page"])
def test_a_script_starts_vitlit_with_flags_that_it_knows(name: str, vitlit: Command, tmp_path: Path) -> None:
    tool, *line = executed(name, tmp_path)
    flags = line[line.index("fit") :]
    result = vitlit(*flags, "--print_config=skip_default")
    assert result.code == 0, result.err
    trainer = yaml.safe_load(result.out)["trainer"]
    assert trainer["strategy"] == "ddp"
    if name == "slurm":
        assert tool == "srun"
        given = sbatch()
        assert [trainer["num_nodes"], int(trainer["devices"])] == [int(given["nodes"]), int(given["gpus-per-node"])]
        return
    options = torchrun.parse_args(line)  # which ends where it does not know a flag
    assert tool == "torchrun"
    assert options.module
    assert (options.training_script, options.training_script_args) == ("vitlit", flags)
    assert [options.nnodes, options.nproc_per_node] == [str(trainer["num_nodes"]), trainer["devices"]]
    source = REPOSITORY / "docs" / "cluster.md" if name == "page" else next(CLUSTER.glob(f"{name}.*"))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in source.read_text()  # or torch does not let a new node in
    config, _, _ = torchrun.config_from_args(options)
    assert config.max_restarts > 0
    assert config.rdzv_backend == "c10d"


def test_slurm_signals_the_tasks_in_time_and_requeues_the_job() -> None:
    options = sbatch()
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "USR1@300"
    assert options["open-mode"] == "append"
    assert "requeue" in options


def test_the_kubernetes_job_is_one_that_the_cluster_accepts() -> None:
    service, made = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert (made["apiVersion"], made["spec"]["completionMode"]) == ("batch/v1", "Indexed")
    spec = made["spec"]
    assert spec["completions"] == spec["parallelism"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy allows no other
    assert service["spec"]["selector"] == {"job-name": made["metadata"]["name"]}  # the label of a Job's pods
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in pod["volumes"]}
    assert claims["data"]["readOnly"]
    assert not claims["runs"].get("readOnly")
    resources = container["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]  # or it is refused
    options = torchrun.parse_args(executed("kubernetes", Path())[1:])
    assert int(options.nnodes) == spec["completions"]
    assert options.nproc_per_node == resources["limits"]["nvidia.com/gpu"]
    assert options.rdzv_endpoint.split(":")[0] == f"{made['metadata']['name']}-0.{pod['subdomain']}"
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def test_config_prints_and_lists_the_scripts(vitlit: Command) -> None:
    assert vitlit("config", "cluster/slurm").out == (CLUSTER / "slurm.sh").read_text()
    listed = vitlit("config").out.split()
    assert {f"cluster/{path.stem}" for path in CLUSTER.iterdir()} <= set(listed)


def test_a_trial_of_the_sweep_is_a_run_of_its_own(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own agent makes the command."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    save_file(stranger().state_dict(), tmp_path / "timm.safetensors")
    sweep = yaml.safe_load((CLUSTER / "sweep.yaml").read_text())
    rate, decays = sweep["parameters"]["model.optimizer.lr"], sweep["parameters"]["model.groups.layer_decay"]
    assert all(isinstance(value, float) for value in (rate["min"], rate["max"], *decays["values"]))
    assert sweep["early_terminate"]["min_iter"] < 10  # epochs of the recipe, each of which is validated
    started: list[dict[str, Any]] = []

    def process(**given: Any) -> Any:
        started.append(given)
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", process)
    wandb: Any = wandb_agent.Agent(None, None, sweep_id="sweep")
    wandb._sweep_command = sweep["command"]
    real = {"FOLDER": str(few), "FILE": "timm.safetensors"}
    small = ["--data.image_size=32", "--data.batch_size=8", "--data.num_workers=0", "--trainer.max_steps=2"]
    small += ["--model.schedule.warmup=1", "--trainer.accelerator=cpu", "--run.report=false"]
    values = (rate["min"], decays["values"][-1])  # Python prints the first as 3e-05
    drawn = {key: {"value": value} for key, value in zip(sweep["parameters"], values, strict=True)}
    told = {"type": "run", "run_id": "trial", "program": sweep["program"], "args": drawn}
    assert "exception" not in wandb._process_command(told)
    program, *words = [real.get(word, word) for word in started[0]["command"]]
    assert program == "vitlit"
    environment = {name: value for name, value in started[0]["env"].items() if name.startswith("WANDB_")}
    result = command(*words, *small, cwd=tmp_path, before=partial(os.environ.update, environment))
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "finetune_folder-trial"
    options = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert (options["optimizer"]["init_args"]["lr"], options["groups"]["layer_decay"]) == values
    assert sweep["metric"]["name"] in (run / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert list(run.glob("wandb/offline-run-*-trial"))

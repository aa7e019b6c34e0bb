"""The ranks of a run, and how they learn rank 0's decision before there is a process group."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.fabric.plugins.environments import SLURMEnvironment
from torch import distributed

from vitlit.errors import UserError
from vitlit.run.folder import Decision, flatten

LAUNCHERS = {"TORCHELASTIC_USE_AGENT_STORE", "SLURM_JOB_ID"}  # variables that they set
STORES: list[Any] = []  # keeps rank 0's server open, which torch's process group uses too


def rank() -> int:
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0))


def launched() -> bool:
    return not LAUNCHERS.isdisjoint(os.environ)


def check_environment() -> None:
    """Raise UserError for the number of a process that no launcher left in the environment."""
    if rank() and not launched() and "MASTER_PORT" not in os.environ:  # which Lightning sets for those that it starts
        raise UserError(f"by the environment this is process {rank()}, but none is 0; unset RANK and LOCAL_RANK")


def inherited() -> bool:
    """Whether Lightning started this process for rank 0, so that it inherited the decision."""
    return rank() != 0 and "VITLIT_DECISION" in os.environ


def share_decision(decision: Decision | None, run: Path, config: dict[str, Any]) -> Decision:
    """Give rank 0's decision to every rank; those that Lightning starts inherit it, the others ask a store."""
    digest = hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()
    others = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1))) - 1
    if decision is not None:
        decision = decision._replace(config=digest)
        os.environ["VITLIT_DECISION"] = json.dumps(decision)
    elif "VITLIT_DECISION" in os.environ:
        decision, others = Decision(*json.loads(os.environ["VITLIT_DECISION"])), 0
    try:
        if decision is None:
            decision = receive(f"vitlit/{run}")
        elif others:
            send(decision, f"vitlit/{run}", others)
    except RuntimeError as error:  # a store's
        reason = str(error).partition("\n")[0]
        raise UserError(f"rank 0 has not come, or is not reached ({reason}); see its message") from error
    if decision.action == "refused":
        raise UserError("rank 0 refuses the run; see its message")
    if decision.config != digest:
        raise UserError("the ranks were given different configs; launch them again")
    return decision


def connect(host: bool) -> Any:
    """A client of the store at which torch's process group will meet; torchrun's agent or else rank 0 is its server."""
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        host &= os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True"
    elif "SLURM_JOB_ID" in os.environ:
        address = SLURMEnvironment().main_address, SLURMEnvironment().main_port
    else:
        raise UserError("several processes need a launcher: use torchrun, SLURM or trainer.devices")
    STORES.append(distributed.TCPStore(*address, is_master=host, wait_for_workers=False, multi_tenant=True))
    return STORES[-1]


def receive(key: str) -> Decision:
    """Draw a number, under which rank 0 answers: torchrun's store outlives an attempt, a number is new in each."""
    store = connect(host=False)
    sender, decision = json.loads(store.get(f"{key}/{store.add(f'{key}/asked', 1)}"))
    store.add(f"{key}/received/{sender}", 1)
    return Decision(*decision)


def send(decision: Decision, key: str, others: int) -> None:
    """Answer every number that is drawn, until all other ranks have received the decision."""
    store, sender, answered = connect(host=True), uuid4().hex, 0
    for name in store.list_keys():  # or torch would connect to dead processes of the attempt before (its issue 135712)
        if name.startswith("default_pg/"):
            store.delete_key(name)
    deadline = time.monotonic() + store.timeout.total_seconds()
    while (received := store.add(f"{key}/received/{sender}", 0)) < others:
        if time.monotonic() > deadline:
            raise UserError(f"of {others + 1} processes only {received + 1} have come; see what the others say")
        while answered < store.add(f"{key}/asked", 0):
            answered += 1
            store.set(f"{key}/{answered}", json.dumps([sender, decision]))
        time.sleep(0.05)

"""The processes of a run: which one this is, and how all of them learn what rank 0 has decided."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from vitlit.errors import UserError
from vitlit.run.folder import Decision, flatten

HOSTED: list[Any] = []  # keeps the store open, which torch goes on to use


def rank() -> int:
    """This process's rank as its launcher gives it; rank 0 decides."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0))


def inherited() -> bool:
    """Whether Lightning started this process for rank 0, so that it has inherited the decision."""
    return rank() != 0 and "VITLIT_DECISION" in os.environ


def share_decision(decision: Decision | None, run: Path, config: dict[str, Any]) -> Decision:
    """Give rank 0's decision on a run to every rank; the others pass None and wait for it.

    It is needed before there is a process group, which Lightning makes as training begins. Ranks that Lightning starts
    inherit it. Under torchrun it goes through the agent's store, under SLURM through a file in the run's root.

    Raises:
        UserError: rank 0 refuses the run or has another config, or a rank has not come in the store's time.
    """
    digest = hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()
    if decision is None and "VITLIT_DECISION" in os.environ:
        decision = Decision(*json.loads(os.environ["VITLIT_DECISION"]))
    else:
        if decision is not None:
            decision = decision._replace(config=digest)
            os.environ["VITLIT_DECISION"] = json.dumps(decision)
        decision = send_or_receive(decision, run)
    if decision.action == "refused":
        raise UserError("rank 0 refuses the run; see its message")
    if decision.config != digest:
        raise UserError("the ranks were given different configs; launch them again")
    return decision


def send_or_receive(decision: Decision | None, run: Path) -> Decision:
    """Send rank 0's decision through the launcher's store, or receive it."""
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    if ranks == 1:
        assert decision is not None
        return decision
    from torch.distributed import FileStore, TCPStore

    store: Any
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        # With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 rank 0 holds the store, on a port that is new in each attempt.
        host = os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True" and decision is not None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store, file = TCPStore(*address, is_master=host, wait_for_workers=False, multi_tenant=True), None
        HOSTED.append(store)
        if decision is not None:
            forget_group(store)
    elif "SLURM_JOB_ID" in os.environ:
        run.parent.mkdir(parents=True, exist_ok=True)
        step = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        file = run.parent / f".launch-{'-'.join(step)}"
        store = FileStore(str(file), -1)
    else:
        raise UserError(
            "several processes were started by neither torchrun, SLURM nor trainer.devices; use one of them"
        )
    if decision is None:
        return receive(store, f"vitlit/{run}")
    try:
        return send(store, f"vitlit/{run}", decision, ranks - 1)
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


def forget_group(store: Any) -> None:
    """Delete the addresses of dead processes from a store: after a restart torch would connect to them.

    torchrun keeps its store over restarts, and torch gives each attempt the same keys in it (pytorch issue 135712).
    """
    for name in store.list_keys():
        if name.startswith("default_pg/"):
            store.delete_key(name)


def receive(store: Any, key: str) -> Decision:
    """Ask for rank 0's decision by drawing a number, under which it is then found.

    torchrun's store outlives restarts, which its agents count differently. A number is new in every attempt, so that
    what was said in an earlier one is never read.

    Raises:
        UserError: rank 0 has not answered in the store's time.
    """
    number = store.add(f"{key}/asked", 1)
    try:
        sender, decision = json.loads(store.get(f"{key}/{number}"))
    except RuntimeError as error:
        raise UserError("rank 0 has not come; see its message") from error
    store.add(f"{key}/received/{sender}", 1)
    return Decision(*decision)


def send(store: Any, key: str, decision: Decision, others: int) -> Decision:
    """Give a decision to all who ask, until as many as there are other ranks have received it.

    Raises:
        UserError: not all of them have asked in the store's time.
    """
    sender, answered = uuid4().hex, 0
    deadline = time.monotonic() + store.timeout.total_seconds()
    while (received := store.add(f"{key}/received/{sender}", 0)) < others:
        asked = store.add(f"{key}/asked", 0)
        for number in range(answered + 1, asked + 1):
            store.set(f"{key}/{number}", json.dumps([sender, decision]))
        answered = asked
        if time.monotonic() > deadline:
            raise UserError(f"of {others + 1} processes only {received + 1} have come; see what the others say")
        time.sleep(0.05)
    return decision

"""The processes of a run: which of them this is, and how they hear what the first has decided."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from vitlit.errors import UserError
from vitlit.run.folder import Decision, flatten

HOSTED: list[Any] = []  # the store that this process holds for the others, which torch goes on to use


def rank() -> int:
    """This process's rank as its launcher gives it, 0 for the one that decides."""
    return int(next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0))


def inherited() -> bool:
    """Whether Lightning started this process for rank 0, whose decision it inherits."""
    return rank() != 0 and "VITLIT_DECISION" in os.environ


def agree(decision: Decision | None, run: Path, config: dict[str, Any]) -> Decision:
    """Hand rank 0's decision on a run to every rank; the others pass None and wait for it.

    Raises:
        UserError: a rank has another config than rank 0, as where the file was changed during the launch.
    """
    digest = hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()
    decision = exchange(decision and decision._replace(config=digest), run)
    if decision.action == "refused":
        raise UserError("rank 0 refuses the run; see what it says")
    if decision.config != digest:
        raise UserError("the ranks were given different configs; launch them again")
    return decision


def exchange(decision: Decision | None, run: Path) -> Decision:
    """Hand rank 0's decision on a run to every rank; the others pass None and wait for it.

    Ranks that Lightning launches inherit it; under torchrun it goes through the agent's store, under SLURM through a
    file in the run's root, named by the job's step.
    """
    if decision is None and "VITLIT_DECISION" in os.environ:
        return Decision(*json.loads(os.environ["VITLIT_DECISION"]))
    if decision is not None:
        os.environ["VITLIT_DECISION"] = json.dumps(decision)
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    if ranks == 1:
        assert decision is not None
        return decision
    from torch.distributed import FileStore, Store, TCPStore

    store: Store
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        # With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 rank 0 holds the store, on a port that is new in each attempt.
        host = os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True" and decision is not None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=host, wait_for_workers=False, multi_tenant=True)
        if host:
            HOSTED.append(store)
        key = f"vitlit/{run}"
        if decision is not None:
            forget_group(store)
    elif "SLURM_JOB_ID" in os.environ:
        run.parent.mkdir(parents=True, exist_ok=True)
        step = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        file = run.parent / f".launch-{'-'.join(step)}"
        store, key = FileStore(str(file), -1), str(run)
    else:
        raise UserError(
            "several processes were started by neither torchrun, SLURM nor trainer.devices; use one of them"
        )
    if decision is None:
        return ask(store, key)
    try:
        return answer(store, key, decision, ranks - 1)
    finally:
        if isinstance(store, FileStore):
            file.unlink(missing_ok=True)


def forget_group(store: Any) -> None:
    """Delete the addresses that processes which died had left in a store: after a restart torch would connect to them.

    torchrun keeps its store over restarts, and torch gives each attempt the same keys in it (pytorch issue 135712).
    """
    for name in store.list_keys():
        if name.startswith("default_pg/"):
            store.delete_key(name)


def ask(store: Any, key: str) -> Decision:
    """Rank 0's decision, by way of a store in which there may be what processes that died had asked and been told.

    Raises:
        UserError: rank 0 has not answered in the store's time.
    """
    ticket = store.add(f"{key}/asked", 1)
    try:
        sender, decision = json.loads(store.get(f"{key}/{ticket}"))
    except RuntimeError as error:
        raise UserError("rank 0 has not come; see what it says") from error
    store.add(f"{key}/heard/{sender}", 1)
    return Decision(*decision)


def answer(store: Any, key: str, decision: Decision, others: int) -> Decision:
    """Tell a decision to the other ranks, until all have heard it.

    Raises:
        UserError: not all of them have asked in the store's time.
    """
    sender, answered = uuid4().hex, 0
    deadline = time.monotonic() + store.timeout.total_seconds()
    while (heard := store.add(f"{key}/heard/{sender}", 0)) < others:
        asked = store.add(f"{key}/asked", 0)
        for ticket in range(answered + 1, asked + 1):
            store.set(f"{key}/{ticket}", json.dumps([sender, decision]))
        answered = asked
        if time.monotonic() > deadline:
            raise UserError(f"of {others + 1} processes only {heard + 1} have come; see what the others say")
        time.sleep(0.05)
    return decision

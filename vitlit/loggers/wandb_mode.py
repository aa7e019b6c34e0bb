"""Whether a run goes to Weights & Biases online, and why not. To find out, nothing is sent, asked, begun or written."""

import os
from typing import Literal

import wandb
from pydantic import ValidationError
from wandb.sdk import wandb_setup

from vitlit.errors import UserError

Mode = Literal["auto", "online", "offline", "disabled"]
NO_KEY = "no API key"
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def decide(mode: Mode = "auto") -> tuple[str, str]:
    """The mode to begin a run in, and why if it is not the one that was asked for.

    Args:
        mode: auto is `WANDB_MODE` where that is set, else online with a key and offline without.

    Raises:
        UserError: `WANDB_MODE` is no mode, or another of W&B's variables is not as it must be.
    """
    given = os.environ.get("WANDB_MODE")
    if given is not None and given not in MODES:
        raise UserError(f"WANDB_MODE={given}: it is online, offline or disabled")
    try:
        settings = wandb_setup.singleton().settings  # wandb.setup would start a process
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"WANDB_{str(wrong['loc'][0]).upper()} is not as W&B wants it: {wrong['msg']}") from error
    settings.silent = True
    wandb.termsetup(settings, None)
    was = settings.mode  # without WANDB_MODE that of the command `wandb offline`
    decided = MODES.get(given or was, "online") if mode == "auto" else mode
    if decided != "online":
        return decided, ""
    settings.mode = "online"  # or a WANDB_MODE that was overruled would hide the key
    try:
        return ("online", "") if wandb.login(prompt=False, verify=False) else ("offline", NO_KEY)
    except wandb.Error as error:
        return "offline", str(error)
    finally:
        settings.mode = was

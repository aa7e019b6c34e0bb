"""Whether a run can log to Weights & Biases online, and why not, without a prompt, a request or a process."""

import os
from typing import Literal

from vitlit.errors import UserError

Mode = Literal["auto", "online", "offline", "disabled"]
NO_KEY = "no API key"
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def decide(mode: Mode = "auto") -> tuple[str, str]:
    """The mode to begin a run in, and why it is offline if online was asked for; UserError for an invalid WANDB_*."""
    import wandb
    from pydantic import ValidationError
    from wandb.sdk import wandb_setup

    variable = os.environ.get("WANDB_MODE")
    if variable is not None and variable not in MODES:
        raise UserError(f"WANDB_MODE={variable} is not a mode; use online, offline or disabled")
    try:
        settings = wandb_setup.singleton().settings  # wandb.setup would start a process
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"WANDB_{str(wrong['loc'][0]).upper()} is invalid: {wrong['msg']}") from error
    settings.silent = True
    wandb.termsetup(settings, None)
    default = settings.mode  # without WANDB_MODE, what the command `wandb offline` set
    decided = MODES.get(variable or default, "online") if mode == "auto" else mode
    if decided != "online":
        return decided, ""
    settings.mode = "online"  # or an overruled WANDB_MODE would hide the key
    try:
        return ("online", "") if wandb.login(prompt=False, verify=False) else ("offline", NO_KEY)
    except wandb.Error as error:
        return "offline", str(error)
    finally:
        settings.mode = default

"""Which of a file's weights are read: averaged ones if it has them, or the raw ones that they are the average of."""

from collections.abc import Collection
from typing import Literal

Choice = Literal["averaged", "raw"]
# Keys of torch files. Of each kind the first that is there counts.
AVERAGED = ("teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema", "target_encoder")
RAW = ("student", "model", "state_dict", "module", "encoder")
LIGHTNING = ("state_dict", "current_model_state")  # WeightAveraging's: averaged, raw
# What in the names of averaged tensors takes the place of what in those of raw ones.
PARTS = [("teacher", "student"), ("target_encoder.", "encoder.")]
PARTS += [(part, "model.") for part in ("model_ema.module.", "model_ema.", "ema_model.", "ema.")]


def pick_key(keys: Collection[str], weights: Choice) -> tuple[str, str]:
    """The key of a torch file to read, and where weights come from; both empty if no key tells which it has."""
    averaged, raw = (next((name for name in names if name in keys), "") for names in (AVERAGED, RAW))
    if set(LIGHTNING) <= set(keys):
        averaged, raw = LIGHTNING
    chosen = averaged if weights == "averaged" or not averaged else raw
    return chosen, origin(averaged, raw, weights) if chosen else ""


def pick_names(stems: Collection[str], weights: Choice) -> tuple[str, str] | None:
    """How names to leave begin, and where weights come from, by the names of patch embeddings; None for one network."""
    for averaged, raw in PARTS:
        for name in stems:
            before, part, rest = name.partition(averaged)
            if part and f"{before}{raw}{rest}" in stems:
                other = before + (raw if weights == "averaged" else averaged)
                return other, origin(before + averaged, before + raw, weights)
    return None


def origin(averaged: str, raw: str, weights: Choice) -> str:
    averaged, raw = averaged.rstrip("."), raw.rstrip(".")
    if weights == "raw":
        return f"{raw} (raw; averaged ones are in {averaged})"
    return f"{averaged} (averaged" + (f"; raw ones are in {raw})" if raw else ")")

"""What vitlit knows of a network beyond its tensors, in the metadata of the files that it writes in other formats."""

import json
from typing import Any, NamedTuple

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.checkpoint import about
from vitlit.weights.files import Contents

KEY, EXPORTED = "vitlit_export", "the file's metadata"
# The options that no tensor shows.
OPTIONS = (
    *("image_size", "heads", "pool", "pool_prefix", "mlp", "norm_eps"),
    *("position", "class_position", "partial_patches", "resampling"),
)


class Exported(NamedTuple):
    """What the metadata says, empty if there is none."""

    options: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]

    @property
    def stated(self) -> tuple[str, ...]:
        return (*self.options, *(["preprocess"] if self.preprocess else []))


def metadata(vit: ViT) -> dict[str, str]:
    return {"format": "pt", KEY: json.dumps(about(vit, vit.classes, vit.preprocess))}


def exported(contents: Contents) -> Exported:
    """What vitlit wrote into the metadata of a file of another format; UserError if it is damaged."""
    text = contents.rest.get(KEY)
    if text is None:
        return Exported({}, [], {})
    try:
        known = json.loads(text)
        options = {name: known["vit"][name] for name in OPTIONS if name in known["vit"]}
        return Exported(options, [str(name) for name in known["classes"]], dict(known["preprocess"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the {KEY} in its metadata is damaged") from error

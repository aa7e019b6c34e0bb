"""Starting from weights."""

from collections.abc import Sequence
from typing import Any

from vitlit.errors import UserError
from vitlit.model import ViT, ViTConfig
from vitlit.model.config import DROPOUTS
from vitlit.weights import LoadReport, Weights, load_weights, network, read

# Options that belong to a training run, not to the weights it starts from.
OF_THE_RUN = (*DROPOUTS, "drop_path_decay", "drop_path_subset", "init", "float32_head", "activation_checkpointing")
TRAINING: dict[str, Any] = {name: getattr(ViTConfig, name) for name in OF_THE_RUN}


def starting_vit(vit: ViT | None, init_from: str | None, image_size: int | tuple[int, int] | None = None) -> ViT:
    """The given ViT, or a headless one for the weights of `init_from`, without dropout."""
    if vit is not None and image_size is not None:
        raise UserError("model.image_size is for the weights' architecture; a model.vit has its own")
    if vit is not None:
        return vit
    if init_from is None:
        remedy = "give model.init_from (a run folder or a file of weights) or model.vit"
        raise UserError(f"there is no architecture: {remedy}")
    size = {} if image_size is None else {"image_size": image_size}
    return ViT(**network(read(init_from), num_classes=0, hidden_dim=None, **TRAINING, **size))


def start(vit: ViT, weights: Weights, fresh: Sequence[str]) -> LoadReport:
    """Load weights, all but the tensors that `fresh` names, the mask token, and norm and pool of another kind."""
    fresh = [*fresh]
    if weights.config.get("norm", "tokens") != vit.config.norm:
        fresh += ["norm.*", "fc_norm.*"]
    if weights.config.get("pool", "cls") != vit.config.pool:
        fresh += ["attn_pool.*"]
    report = load_weights(vit, weights, skip=fresh)
    return report._replace(new=[name for name in report.new if ".lora_" not in name])

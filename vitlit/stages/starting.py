"""Starting from weights, and what a stage adds to its checkpoints and takes from them to continue."""

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from vitlit.errors import UserError
from vitlit.model import ViT, ViTConfig
from vitlit.model.config import DROPOUTS
from vitlit.model.lora import merge, zero_adapters
from vitlit.weights import LoadReport, Weights, load_weights, network, preprocess, read
from vitlit.weights.adapt import set_numerics
from vitlit.weights.checkpoint import about

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
        raise UserError("there is no architecture: give model.init_from (a run folder or a weight file) or model.vit")
    size = {} if image_size is None else {"image_size": image_size}
    return ViT(**network(read(init_from), num_classes=0, hidden_dim=None, **TRAINING, **size))


def start(vit: ViT, weights: Weights, keep_head: bool = False) -> LoadReport:
    """Load weights, all but head, adapters, mask token, and norm and pool of another kind."""
    fresh = ["*.lora_*"] if keep_head else ["*.lora_*", "head*"]
    if weights.config.get("norm", "tokens") != vit.config.norm:
        fresh += ["norm.*", "fc_norm.*"]
    if weights.config.get("pool", "cls") != vit.config.pool:
        fresh += ["attn_pool.*"]
    report = load_weights(vit, weights, skip=fresh)
    return report._replace(new=[name for name in report.new if ".lora_" not in name])


def save(stage: Any, checkpoint: dict[str, Any]) -> None:
    """Add what weights need to be used, and merge adapters into them."""
    checkpoint["vitlit"] = about(stage.vit, stage.classes, getattr(stage.data, "preprocess", None))
    averaging = averaging_of(stage.trainer)
    if averaging is not None and "averaging_state" not in checkpoint:
        # A weights-only checkpoint skips callbacks, but must hold the averaged weights, which were validated.
        averaging.on_save_checkpoint(stage.trainer, stage, checkpoint)
        for name in ("current_model_state", "averaging_state"):
            checkpoint.pop(name, None)  # there are none before training
    checkpoint["state_dict"], adapters = merge(checkpoint["state_dict"])
    if adapters and "optimizer_states" in checkpoint:
        checkpoint["adapters"] = adapters


def restore(stage: Any, checkpoint: dict[str, Any]) -> None:
    """Take it back, before Lightning loads the rest; UserError if the training would be another."""
    made, vit = checkpoint["vitlit"], stage.vit
    set_numerics(vit, made["vit"])
    vit.preprocess = preprocess(made["preprocess"], vit)
    vit.classes = made["classes"] if len(made["classes"]) == vit.config.num_classes else []
    vit.temperature = float(made.get("temperature", 1.0))
    zeros = {f"vit.{name}": tensor for name, tensor in zero_adapters(vit).items()}
    checkpoint["state_dict"] |= checkpoint.get("adapters") or zeros
    if stage._trainer is None:
        return
    trainer = stage.trainer
    stage.lead(stage.data)
    if trainer.state.fn == TrainerFn.FITTING and "averaging_state" in checkpoint and averaging_of(trainer) is None:
        raise UserError("the checkpoint's run averages weights (EMA), this one does not; give its trainer.callbacks")
    if not checkpoint["global_step"]:
        return
    # Lightning counts the micro-batches of a device; a step may now have another number of them.
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    before = progress["total"]["processed"] // checkpoint["global_step"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        shift = ready // before * trainer.accumulate_grad_batches - ready
        counts.update({name: count + shift for name, count in counts.items()})


def averaging_of(trainer: Any) -> WeightAveraging | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)), None)

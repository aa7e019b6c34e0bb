"""The finetuning stage."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from vitlit.errors import UserError, first_difference
from vitlit.model import ViT
from vitlit.model.lora import LoRA, add_lora
from vitlit.objectives import Objective, Supervised
from vitlit.optim import Groups, OptimizerFactory, Schedule
from vitlit.stages.record import describe
from vitlit.stages.stage import Stage
from vitlit.weights import Weights, load_weights, network, read

# What is a training's, not its weights', as a new one begins with it.
TRAINING: dict[str, Any] = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "drop_path": 0.0,
    "activation_checkpointing": False,
}


class Finetune(Stage):
    """Train a ViT from given weights on classification, with a fresh head unless told (2010.11929, section 3.2).

    Args:
        vit: the architecture, without a head; that of the weights, without dropouts, unless given.
        image_size: pixels, an int or (height, width), where the architecture is that of the weights; theirs unless
            given. The command line takes data.image_size.
        init_from: the weights to start from: a run folder, a file of any known format, or hf:OWNER/NAME[@REVISION].
            Where the resolution differs the position table is resampled; the head is new, and so are the final norm and
            the attention pool where the weights have none in that place. It is read when training starts.
        keep_head: go on with the head of the weights, which must be one linear layer for the same classes; for another
            resolution (1906.06423) or more training.
        objective: makes the objective of the ViT, which by now has one zero-initialised linear layer for a head.
        num_classes: the command line fills it from the data.
        freeze: what is not trained: true for all but the head (linear probe), or shell patterns of parameter names, one
            or a list.
        last_blocks: train only so many blocks at the end, the final norm and the head.
        lora: train only low-rank adapters and the head; any one of its keys switches it on, with rank 8 unless given.
            Its learning rate is higher, 1e-3 with AdamW, and groups.layer_decay 1. Checkpoints hold the plain network
            with the adapters merged.
        optimizer: makes the optimizer of parameter groups, such as partial(SGD, lr=0.01, momentum=0.9); its lr is the
            peak.
        schedule: of the learning rate, by optimiser step.
        groups: how learning rate and weight decay differ between parameters, layer-wise decay among it.

    Attributes:
        weights: those of init_from, where they have been read already.

    Raises:
        UserError: neither vit nor init_from is given, or both vit and image_size are; more than one of freeze,
            last_blocks and lora; a pattern of freeze matches no parameter; the ViT has fewer blocks; at the start of
            training, the weights do not fit, or have no head to keep.
    """

    def __init__(
        self,
        *,
        vit: ViT | None = None,
        image_size: int | tuple[int, int] | None = None,
        init_from: str | None = None,
        keep_head: bool = False,
        objective: Callable[[ViT], Objective] = Supervised,
        num_classes: int | None = None,
        freeze: bool | Sequence[str] | str = False,
        last_blocks: int | None = None,
        lora: LoRA | None = None,
        optimizer: OptimizerFactory,
        schedule: Schedule = Schedule(),
        groups: Groups = Groups(),
    ) -> None:
        if vit is None:
            if init_from is None:
                raise UserError("finetuning needs model.init_from (a run folder or a file of weights) or model.vit")
            size = {} if image_size is None else {"image_size": image_size}
            vit = ViT(**network(read(init_from), num_classes=0, hidden_dim=None, **TRAINING, **size))
        elif image_size is not None:
            raise UserError("model.image_size is for the weights' architecture; a model.vit has its own")
        if sum([bool(freeze), last_blocks is not None, lora is not None]) > 1:
            raise UserError("model.freeze, model.last_blocks and model.lora exclude one another; give one")
        if num_classes is None or num_classes < 2:
            raise UserError(f"finetuning needs num_classes of at least 2, not {num_classes}")
        given = getattr(objective, "keywords", {}).get("num_classes")
        if given not in (None, num_classes):
            raise UserError(
                f"the objective has num_classes {given}, but the stage {num_classes}; give the latter alone"
            )
        vit.set_head("finetune", num_classes)
        ways = {"freeze": freeze, "last_blocks": last_blocks, "lora": lora}
        arguments = {"objective": objective, "num_classes": num_classes, **ways}
        super().__init__(vit, objective, optimizer, schedule, groups, arguments)
        self.init_from, self.keep_head = init_from, keep_head
        self.weights: Weights | None = None
        if lora is not None:
            add_lora(self.vit, lora)
        elif last_blocks is not None:
            freeze_below(self.vit, last_blocks)
        elif freeze:
            freeze_matching(self.vit, freeze)
        if not keep_head and frozen(self.vit.head):
            raise UserError(
                f"model.freeze {freeze} leaves the new head as it begins, at zero; leave the head out of it"
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
            weights = self.weights or read(self.init_from)
            fresh = ["*.lora_*"]
            if self.keep_head:
                self.check_head(weights)
            else:
                fresh.append("head*")
            if weights.config.get("norm", "tokens") != self.vit.config.norm:
                fresh += ["norm.*", "fc_norm.*"]
            if weights.config.get("pool", "cls") != self.vit.config.pool:
                fresh += ["attn_pool.*"]
            report = load_weights(self.vit, weights, skip=fresh)
            fixed = not all(p.requires_grad for name, p in self.vit.named_parameters() if name.startswith("attn_pool"))
            if fixed and "attn_pool.latent" in report.new:
                raise UserError(f"{self.init_from} has no attention pool, and model.freeze would leave a random one")
            self.hparams["vit"] = describe(self.vit)  # with what the weights set on it
            report = report._replace(new=[name for name in report.new if ".lora_" not in name])
            rank_zero_only(print)(f"weights of {self.init_from}: {report}")
            self.init_from = self.weights = None  # a second fit goes on

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        head = {id(parameter) for parameter in self.vit.head.parameters()}
        groups = [g for g in made["optimizer"].param_groups if any(id(parameter) in head for parameter in g["params"])]
        if not self.keep_head and not any(group["initial_lr"] for group in groups):
            raise UserError(
                f"model.groups.lr {self.groups.lr} leaves the new head as it begins, at zero; give it more than 0"
            )
        return made

    def check_head(self, weights: Weights) -> None:
        """Refuse to keep a head of other classes or of another kind."""
        known = list(getattr(self.data, "classes", []))
        count, hidden = weights.config.get("num_classes"), weights.config.get("hidden_dim")
        others = bool(weights.classes and known) and weights.classes != known
        if count != self.vit.config.num_classes or hidden or others:
            has = "no head" if not count else "a head with a hidden layer" if hidden else f"a head for {count} classes"
            if others and (name := first_difference(weights.classes, known)):
                has += f", {name}"
            raise UserError(
                f"model.keep_head needs one linear layer for the data's {self.vit.config.num_classes} classes, in "
                f"their order, but {weights.path} has {has}; leave it out"
            )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:  # what is frozen gives features: no dropout in it
            for part in (self.vit, *self.vit.children(), *self.vit.blocks):
                if frozen(part) or (part is self.vit.pos_drop and frozen(self.vit.patch_embed)):
                    part.eval()
        return self


def frozen(part: nn.Module) -> bool:
    """Whether a part of the network has parameters, and none that is trained."""
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def freeze_matching(vit: ViT, freeze: bool | Sequence[str] | str) -> None:
    """Freeze all but the head, or the parameters whose names match these shell patterns."""
    names = [name for name, _ in vit.named_parameters()]
    patterns = [freeze] if isinstance(freeze, str) else [] if isinstance(freeze, bool) else list(freeze)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"model.freeze {pattern!r} matches no parameter of the ViT, such as {names[0]}")
    for name, parameter in vit.named_parameters():
        if patterns:
            parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
        else:
            parameter.requires_grad_(name.startswith("head"))


def freeze_below(vit: ViT, last_blocks: int) -> None:
    """Freeze the embedding and all but the last blocks."""
    if not 0 <= last_blocks <= len(vit.blocks):
        raise UserError(f"model.last_blocks is {last_blocks}, but the ViT has {len(vit.blocks)} blocks")
    layers = vit.layers()
    for layer in ["embed", *(f"blocks.{i}" for i in range(len(vit.blocks) - last_blocks))]:
        for parameter in layers[layer].values():
            parameter.requires_grad_(False)

"""The finetuning stage."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Self

from torch import nn

from vitlit.errors import UserError, check_range, check_types, first_difference
from vitlit.model import ViT
from vitlit.model.lora import LoRA, add_lora
from vitlit.objectives import Objective, Supervised
from vitlit.optim import Groups, OptimizerFactory, Schedule
from vitlit.stages.compiling import Compile
from vitlit.stages.record import describe
from vitlit.stages.stage import Stage
from vitlit.stages.starting import start, starting_vit
from vitlit.weights import LoadReport, Weights


class Finetune(Stage):
    """Train a ViT from pretrained weights on classification, by default with a new head (2010.11929, section 3.2).

    UserError if options contradict each other or do not fit the ViT, and, as training starts, if the weights do not.

    Args:
        vit: the headless architecture; by default that of the weights, without dropout.
        image_size: pixels, an int or (height, width), if there is no vit; by default that of the weights. The command
            line takes data.image_size.
        init_from: the weights: a run folder, a file of any known format, or hf:OWNER/NAME[@REVISION]. They are read
            when training starts. For another resolution the position table is resampled. The head is new, and so are
            the final norm and the attention pool if the weights have none in that place.
        keep_head: keep the weights' head, one linear layer for the same classes, e.g. at a new resolution (1906.06423).
        objective: makes the objective from the ViT, which already has one zero-initialised linear layer as its head.
        num_classes: outputs of the head; the command line fills it from the data. None where the objective knows them.
        freeze: true for everything but the head (linear probe), or shell patterns of parameter names, one or a list.
        last_blocks: train only this many blocks at the end, the final norm and the head.
        lora: train only low-rank adapters and the head. Any of its keys turns it on; the rank is 8 by default. It needs
            a higher learning rate, 1e-3 with AdamW, and groups.layer_decay 1. Checkpoints hold the merged network.
        optimizer: makes the optimizer from parameter groups, as partial(SGD, lr=0.01, momentum=0.9); lr is the peak.
        schedule: the learning rate by optimiser step.
        groups: how learning rate and weight decay differ between parameters, such as layer-wise decay.
        compile: how training is compiled; see `Stage`.

    Attributes:
        weights: the weights of init_from, if they have been read already.
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
        compile: Compile = "auto",
    ) -> None:
        check_types(Finetune.__init__, locals(), "model.")
        vit = starting_vit(vit, init_from, image_size)
        if sum([bool(freeze), last_blocks is not None, lora is not None]) > 1:
            raise UserError("model.freeze, model.last_blocks and model.lora exclude one another; give one")
        given = getattr(objective, "keywords", {}).get("num_classes")
        if given not in (None, num_classes):
            raise UserError(f"the objective has num_classes {given}, but the stage {num_classes}; drop the former")
        vit.set_head("finetune", num_classes or 0)
        super().__init__(vit, objective, optimizer, schedule, groups, compile, init_from)
        ways = {"freeze": freeze, "last_blocks": last_blocks, "lora": lora}
        self.hparams.update(describe({"num_classes": num_classes, **ways}))
        self.keep_head = keep_head
        if lora is not None:
            add_lora(self.vit, lora)
        elif last_blocks is not None:
            freeze_below(self.vit, last_blocks)
        elif freeze:
            freeze_matching(self.vit, freeze)

    def start(self, weights: Weights) -> LoadReport:
        if self.keep_head:
            self.check_head(weights)
        return start(self.vit, weights, self.keep_head)

    def check_head(self, weights: Weights) -> None:
        """UserError unless the weights' head is one linear layer for the data's classes."""
        if self.objective.numbers:
            raise UserError("model.keep_head is for classes: a head of numbers learns in units of its own labels")
        classes = self.vit.config.num_classes
        count, hidden = weights.config.get("num_classes"), weights.config.get("hidden_dim")
        difference = first_difference(weights.classes, list(getattr(self.data, "classes", [])))
        if count != classes or hidden or difference:
            has = "no head" if not count else "a head with a hidden layer" if hidden else f"a head for {count} classes"
            has += f", {difference}" if difference else ""
            needs = f"needs one linear layer for the data's {classes} classes, in their order"
            raise UserError(f"model.keep_head {needs}, but {weights.path} has {has}; leave it out")

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:  # no dropout in what is frozen
            for part in (self.vit, *self.vit.children(), *self.vit.blocks):
                if frozen(part) or (part is self.vit.pos_drop and frozen(self.vit.patch_embed)):
                    part.eval()
        return self


def frozen(part: nn.Module) -> bool:
    """Whether a part of the network has parameters, and none is trained."""
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def freeze_matching(vit: ViT, freeze: bool | Sequence[str] | str) -> None:
    """Freeze everything but the head, or the parameters whose names match shell patterns."""
    parameters = dict(vit.named_parameters())
    patterns = [freeze] if isinstance(freeze, str) else [] if isinstance(freeze, bool) else list(freeze)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UserError(f"model.freeze {pattern!r} matches no parameter, such as {next(iter(parameters))}")
    for name, parameter in parameters.items():
        trained = not any(fnmatchcase(name, p) for p in patterns) if patterns else name.startswith("head")
        parameter.requires_grad_(trained)


def freeze_below(vit: ViT, last_blocks: int) -> None:
    check_range("model", 0, len(vit.blocks), last_blocks=last_blocks)
    for layer in list(vit.layers().values())[: 1 + len(vit.blocks) - last_blocks]:  # embed, then the blocks
        for parameter in layer.values():
            parameter.requires_grad_(False)

"""The finetuning stage."""

from functools import partial
from typing import Self

from lightning.pytorch.utilities import rank_zero_only

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import OptimizerFactory, Schedule
from vitlit.stages.record import describe
from vitlit.stages.stage import Stage
from vitlit.weights import load_weights, network, read


class Finetune(Stage):
    """Train a ViT from given weights, with a fresh head, on classification (2010.11929, section 3.2).

    Args:
        vit: the architecture, without a head; that of the weights unless given.
        image_size: pixels, an int or (height, width), where the architecture is that of the weights; theirs unless
            given. The command line takes data.image_size.
        init_from: the weights to start from: a run folder, a file of any known format, or hf:OWNER/NAME[@REVISION].
            Where the resolution differs the position table is resampled; the head is new, and so are the final norm and
            the attention pool where the weights have none in that place. It is read when training starts.
        num_classes: the command line fills it from the data.
        freeze: train the head alone (linear probe).
        optimizer: makes the optimizer of parameter groups, such as partial(SGD, lr=0.01, momentum=0.9); its lr is the
            peak.
        schedule: of the learning rate, by optimiser step.

    Raises:
        UserError: neither vit nor init_from is given, or both vit and image_size are.
    """

    def __init__(
        self,
        *,
        vit: ViT | None = None,
        image_size: int | tuple[int, int] | None = None,
        init_from: str | None = None,
        num_classes: int | None = None,
        freeze: bool = False,
        optimizer: OptimizerFactory,
        schedule: Schedule = Schedule(),
    ) -> None:
        if vit is None:
            if init_from is None:
                raise UserError("finetuning needs model.init_from (a run folder or a file of weights) or model.vit")
            size = {} if image_size is None else {"image_size": image_size}
            vit = ViT(**network(read(init_from), num_classes=0, hidden_dim=None, **size))
        elif image_size is not None:
            raise UserError("model.image_size is for the weights' architecture; a model.vit has its own")
        head = partial(Supervised, num_classes=num_classes, head="finetune")
        super().__init__(vit, head, optimizer, schedule, {"num_classes": num_classes, "freeze": freeze})
        self.init_from, self.freeze_encoder = init_from, freeze
        if freeze:
            for name, parameter in self.vit.named_parameters():
                parameter.requires_grad_(name.startswith("head"))

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
            weights = read(self.init_from)
            fresh = ["head*"]
            if weights.config.get("norm", "tokens") != self.vit.config["norm"]:
                fresh += ["norm.*", "fc_norm.*"]
            if weights.config.get("pool", "cls") != self.vit.config["pool"]:
                fresh += ["attn_pool.*"]
            report = load_weights(self.vit, weights, skip=fresh)
            if self.freeze_encoder and "attn_pool.latent" in report.new:
                raise UserError(f"{self.init_from} has no attention pool, and model.freeze would leave a random one")
            self.hparams["vit"] = describe(self.vit)  # with what the weights set on it
            rank_zero_only(print)(f"weights of {self.init_from}: {report}")
            self.init_from = None  # a second fit goes on

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_encoder:  # a frozen encoder gives features: no dropout in it
            self.vit.eval()
        return self

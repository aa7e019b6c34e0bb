"""Self-distillation without labels: DINO (2104.14294), iBOT (2111.07832) and the objective of DINOv2 (2304.07193).

B is the batch, V the views, G of them global, M masked, N the patches of a global view, D the width, K the prototypes.
"""

import copy
import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitlit.errors import UserError, check_range, check_types
from vitlit.model import ViT
from vitlit.objectives.global_batch import device_mean, gather
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32, grouped, without_autocast
from vitlit.seeds import image_noise, uniform

STUDENT_TEMPERATURE, CENTRE_MOMENTUM = 0.1, 0.9
MASK_RATIO = 0.1, 0.5  # of a masked view
BLOCKS = 8  # of a mask, of which few are needed


class DINO(Objective):
    """A student learns what a teacher, the moving average of its weights, says of other views (2104.14294, section 3).

    Views of the first view's size are global, and the teacher sees only these. The loss is the mean cross entropy over
    all pairs of a teacher's and a student's view that are not the same. Of an image with `masked`, the student sees
    half of the global views with blocks of patches masked, and learns the teacher's patches there. DINOv2's objective
    has masked 1, koleo 0.1 and centring sinkhorn. Finetuning and `vitlit.load` take the teacher from a checkpoint. In
    validation, which has one view, both see the same one, without KoLeo, and sinkhorn is over a device's batch. Options
    out of range raise UserError, and so do, in a step, weights of half precision, too coarse for a moving average.

    Logged are `loss_image`, `loss_patch`, `loss_koleo`, without their weights, and in training `teacher_entropy`, of
    the mean of its predictions: log K if all prototypes are used equally often, 0 if it is one. Less the mean of their
    own entropies it is `teacher_information`: what they tell of the image.

    Args:
        vit: the student; its head is removed.
        prototypes: K, outputs of a head.
        hidden_dim: hidden units of a head's MLP, which has three layers.
        bottleneck: outputs of this MLP, whose cosines with the prototypes are the head's.
        centring: mean subtracts the outputs' moving average; sinkhorn uses all prototypes equally often (2006.09882).
        momentum: the teacher's at the beginning; a cosine raises it to 1.
        temperature: the teacher's after a linear warm-up.
        temperature_start: where this begins.
        temperature_warmup: its share of the training.
        freeze_prototypes: the share of the training in which at first the heads' last layers do not change.
        masked: weight of the loss of masked patches (2111.07832, equation 2); 0 masks nothing.
        shared_head: whether patches use the head of the pooled features; by default they have their own.
        koleo: weight of KoLeo (1806.03198) on the student's features, summed over the global views.
    """

    views, whole_batch, loss_ranks = 2, True, False

    def __init__(
        self,
        vit: ViT,
        prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck: int = 256,
        centring: Literal["mean", "sinkhorn"] = "mean",
        momentum: float = 0.996,
        temperature: float = 0.07,
        temperature_start: float = 0.04,
        temperature_warmup: float = 0.3,
        freeze_prototypes: float = 0.01,
        masked: float = 0.0,
        shared_head: bool = False,
        koleo: float = 0.0,
    ) -> None:
        super().__init__(vit)
        check_types(DINO.__init__, locals(), "model.objective.")
        check_range("DINO", 1, prototypes=prototypes, hidden_dim=hidden_dim, bottleneck=bottleneck)
        check_range("DINO", 0, 1, momentum=momentum)
        check_range("DINO", 0, 1, temperature_warmup=temperature_warmup, freeze_prototypes=freeze_prototypes)
        check_range("DINO", 1e-6, temperature=temperature, temperature_start=temperature_start)
        check_range("DINO", 0, masked=masked, koleo=koleo)
        if shared_head and not masked:
            raise UserError("shared_head is for masked patches; give masked 1, or leave it out")
        if vit.config.patch_dropout:
            raise UserError("DINO compares crops as they are; leave model.vit.patch_dropout out")
        vit.set_head("finetune", 0)
        self.centring, self.momentum, self.masked, self.koleo = centring, momentum, masked, koleo
        self.temperatures, self.warmup = (temperature_start, temperature), temperature_warmup
        self.frozen, heads = freeze_prototypes, 2 if masked and not shared_head else 1
        self.heads = nn.ModuleList(Head(vit.width, hidden_dim, bottleneck, prototypes) for _ in range(heads))
        self.teacher_vit = copy.deepcopy(vit).requires_grad_(False)
        self.teacher_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.centres = nn.Buffer(torch.zeros(2 if masked else 1, prototypes))  # of features and of patches
        if masked:
            vit.add_mask_token()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher_vit.eval()  # no dropout
        return self

    def begin(self, vit: ViT) -> None:
        self.teacher_vit.load_state_dict({name: t for name, t in vit.state_dict().items() if name != "mask_token"})

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        if self.centres.dtype in (torch.bfloat16, torch.float16):
            raise UserError("DINO's teacher cannot be an average of half-precision weights; use precision bf16-mixed")
        same_size, *others = grouped(batch.views)
        first, count, temperature, mask = torch.cat(same_size), len(same_size), self.temperature(progress), None
        if self.masked:
            rows, blocks = masked_views(batch.draws, count, vit.grid)
            mask = blocks.new_zeros(len(first), blocks.shape[1]).index_copy(0, rows, blocks)
        with torch.no_grad():
            teacher_tokens = self.teacher_vit.features(first, pooled=not self.masked)
            teacher_features = self.teacher_vit.pool(teacher_tokens)
            targets = self.targets(0, self.teacher_heads[0](teacher_features), temperature)
        tokens = vit.encode(vit.embed(first, mask), vit.grid, pooled=not self.masked)
        features = vit.pool(tokens)
        pooled = torch.cat([features, *(vit.pool(vit.features(torch.cat(views), pooled=True)) for views in others)])
        predicted = log_softmax(self.heads[0](pooled))
        loss = pair_loss(targets.unflatten(0, (count, -1)), predicted.unflatten(0, (len(batch.views), -1)))
        logs = {"loss_image": loss}
        if self.training:
            mean, own = device_mean(targets.mean(0)), torch.special.entr(targets).sum(1).mean()
            logs["teacher_entropy"] = torch.special.entr(mean).sum()
            logs["teacher_information"] = logs["teacher_entropy"] - device_mean(own)
        if self.masked:
            most = max(1, int(blocks.shape[1] * MASK_RATIO[1]))
            positions = blocks.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            used = blocks.gather(1, positions)
            with torch.no_grad():
                outputs = self.teacher_heads[-1](patches_at(self.teacher_vit, teacher_tokens, rows, positions))
                targets = self.targets(-1, outputs.flatten(0, 1), temperature, used.flatten()).view(outputs.shape)
            predicted = log_softmax(self.heads[-1](patches_at(vit, tokens, rows, positions)))
            errors = -(targets * predicted).sum(-1) * used
            logs["loss_patch"] = (errors.sum(1) / used.sum(1)).sum() / len(first)
            loss = loss + self.masked * logs["loss_patch"]
        if self.koleo and self.training:
            logs["loss_koleo"] = sum((koleo(view) for view in features.chunk(count)), loss.new_zeros(()))
            loss = loss + self.koleo * logs["loss_koleo"]
        return Step(loss, logs=logs, features=teacher_features[: len(batch.indices)])

    def collapse(self, logs: dict[str, float]) -> str:
        information = logs.get("teacher_information", math.inf)
        certainty = math.log(self.centres.shape[1]) - logs.get("teacher_entropy", 0.0) + information
        if information < max(1e-3, 0.05 * certainty):
            return "the teacher says the same of every image; try centring sinkhorn or a lower learning rate"
        return ""

    def temperature(self, progress: Any) -> Any:
        """The teacher's temperature at a progress, a float or a tensor."""
        start, end = self.temperatures
        left = 1 - progress / self.warmup if self.warmup else 0.0
        return end - (end - start) * left * (left > 0)

    def targets(self, part: int, outputs: Tensor, temperature: float, used: Tensor | None = None) -> Tensor:
        """The teacher's predictions (rows, K) from a head's outputs (rows, K), of which only those `used` count."""
        outputs = at_least_float32(outputs)
        used = outputs.new_ones(len(outputs)) if used is None else used.to(outputs.dtype)
        if self.centring == "sinkhorn":
            return sinkhorn(outputs, temperature, used, self.training)
        targets = ((outputs - self.centres[part]) / temperature).softmax(-1)
        if self.training:
            total = device_mean((outputs * used[:, None]).sum(0))
            self.centres[part].lerp_(total / device_mean(used.sum()), 1 - CENTRE_MOMENTUM)
        return targets

    @torch.no_grad()
    def after_step(self, vit: ViT, progress: float) -> None:
        """Move the teacher: teacher <- momentum x teacher + (1 - momentum) x student."""
        own = dict(vit.named_parameters())
        students = [own[name] for name, _ in self.teacher_vit.named_parameters()] + list(self.heads.parameters())
        teachers = [*self.teacher_vit.parameters(), *self.teacher_heads.parameters()]
        if progress < self.frozen:
            # Undone, not left without a gradient: every parameter is used, and Adam knows its gradients' size by then.
            for head, teacher in zip(self.heads, self.teacher_heads, strict=True):
                head.get_parameter("last.weight").copy_(teacher.get_parameter("last.weight"))
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        get_ema_multi_avg_fn(momentum)(teachers, students, 0)


class Head(nn.Module):
    """An MLP of three layers, then cosines with prototypes: (..., D) -> (..., K) (2104.14294, appendix C)."""

    def __init__(self, width: int, hidden_dim: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        layers = nn.Linear(width, hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, bottleneck)
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.last = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(at_least_float32(self.mlp(x)), dim=-1), F.normalize(self.last.weight, dim=-1))


def log_softmax(outputs: Tensor) -> Tensor:
    return F.log_softmax(at_least_float32(outputs) / STUDENT_TEMPERATURE, dim=-1)


def pair_loss(targets: Tensor, predicted: Tensor) -> Tensor:
    """The mean cross entropy of targets (G, B, K) and log-probabilities (V, B, K) over all pairs of different views.

    The first G of the V views are the targets'. A single view is its own pair.
    """
    (count, batch, _), views = targets.shape, len(predicted)
    same = (targets * predicted[:count]).sum()
    if views == 1:
        return -same / batch
    return (same - (targets.sum(0) * predicted.sum(0)).sum()) / (batch * count * (views - 1))


def patches_at(vit: ViT, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Patches at positions (M, most) of rows (M,) of tokens (G x B, prefix + N, D): (M, most, D)."""
    patches = vit.fc_norm(tokens.index_select(0, rows)[:, vit.prefix :])
    return patches.gather(1, positions[..., None].expand(-1, -1, vit.width))


def sinkhorn(outputs: Tensor, temperature: float, used: Tensor, of_all_devices: bool = False) -> Tensor:
    """Shares of prototypes, all used equally often, by three steps of Sinkhorn-Knopp (2006.09882, section 3.1).

    From cosines (rows, K), of which those count whose `used` (rows,) is 1; the others' shares are 0.
    """
    shares = ((outputs - 1) / temperature).exp() * used[:, None]
    tiny = torch.finfo(shares.dtype).tiny
    for _ in range(3):
        total = shares.sum(0)
        shares = shares / (device_mean(total) if of_all_devices else total).clamp(min=tiny)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=tiny)
    return shares


def koleo(features: Tensor) -> Tensor:
    """Minus the mean log distance of normalised features (B, D) from the nearest others (1806.03198, equation 2)."""
    with without_autocast(features):
        features = gather(F.normalize(at_least_float32(features), dim=-1))
        nearest = (features @ features.T).detach().fill_diagonal_(-2).argmax(1)
        return -(F.pairwise_distance(features, features[nearest], eps=1e-8) + 1e-8).log().mean()


def masked_views(draws: Tensor, count: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (M,) of half of each image's global views, at least of one, in (G x B), and their masks (M, N)."""
    chosen = max(1, count // 2)
    order, own = image_noise(draws, count + chosen).split([count, chosen], dim=1)
    rows = order.argsort(dim=1)[:, :chosen] * len(draws) + torch.arange(len(draws), device=draws.device)[:, None]
    return rows.flatten(), block_masks(own.flatten(), grid)


def block_masks(draws: Tensor, grid: tuple[int, int]) -> Tensor:
    """Unions of random blocks, a share in MASK_RATIO of the patches: (B,) -> (B, N), bool (2106.08254, algorithm 1).

    As in iBOT's code, a block has at least the area of a square of a third of the grid. The last is cut to the share.
    """
    share, (low, high), patches = uniform(image_noise(draws, 1 + 4 * BLOCKS)), MASK_RATIO, math.prod(grid)
    wanted = ((low + (high - low) * share[:, 0]) * patches).long().clamp(min=1)
    least = max(1, (min(grid) // 3) ** 2)
    mask = torch.zeros(len(draws), patches, dtype=torch.bool, device=draws.device)
    for size, shape, *places in share[:, 1:].T.unflatten(0, (BLOCKS, 4)):
        left = wanted - mask.sum(1)
        area, aspect = least + size * (left - least).clamp(min=0), (math.log(0.3) * (2 * shape - 1)).exp()
        inside = []
        for side, place, most in zip(((area * aspect).sqrt(), (area / aspect).sqrt()), places, grid, strict=True):
            length = side.round().clamp(1, most)[:, None]
            start = (place[:, None] * (most - length + 1)).floor()
            line = torch.arange(most, device=draws.device)
            inside.append((line >= start) & (line < start + length))
        new = (inside[0][:, :, None] & inside[1][:, None]).flatten(1) & ~mask
        mask = mask | (new & (new.cumsum(1) <= left[:, None]))
    return mask

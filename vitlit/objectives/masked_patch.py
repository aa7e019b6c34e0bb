"""Masked patch prediction (2010.11929, appendix B.1.2): corrupt half of the patches and predict their mean colours."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.init import xavier
from vitlit.objectives.mae import patchify, unpatchify
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32
from vitlit.seeds import image_noise, uniform

MASKED, OTHER = 0.8, 0.1  # shares of the corrupted patches; the rest is kept
LEVELS = 8  # of a channel: 3 bits
MOST_CHANNELS = 4  # whose colours are 4,096 classes


class MaskedPatch(Objective):
    """Cross entropy on the 3-bit mean colours of corrupted patches, one of 512 (2010.11929, appendix B.1.2).

    `Batch.draws` says which half of an image's patches is corrupted: of these, 80 % become the mask token, 10 % another
    patch, 10 % stay. A linear layer predicts the colours of all, 8 for grey images; its `accuracy` is logged. A ViT
    with an attention pool raises UserError, and so do, in a step, images whose mean and std neither a data module nor
    `vit.preprocess` has.

    Args:
        vit: the encoder; its head is removed.
    """

    def __init__(self, vit: ViT) -> None:
        super().__init__(vit)
        if vit.config.pool == "map":
            raise UserError("MaskedPatch does not train with model.vit.pool map; set it when you finetune")
        if vit.config.patch_dropout:
            raise UserError("MaskedPatch predicts patches from all others; leave model.vit.patch_dropout out")
        if vit.config.in_channels > MOST_CHANNELS:
            raise UserError(f"MaskedPatch tells colours of at most {MOST_CHANNELS} channels; give another objective")
        vit.set_head("finetune", 0)
        vit.add_mask_token()
        self.head = nn.Linear(vit.width, LEVELS**vit.config.in_channels)
        xavier(self.head)
        self._preprocess: Any = None

    def prepare(self, data: Any) -> None:
        self._preprocess = getattr(data, "preprocess", None)

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        images, preprocess = batch.views[0], self._preprocess or cast(Any, vit.preprocess)
        if preprocess is None:
            raise UserError("MaskedPatch must know the images' mean and std: set vit.preprocess, or use a data module")
        corrupted, mask, source = corruption(batch.draws, math.prod(vit.grid))
        colours = mean_colours(images, vit.patch_size, preprocess.mean, preprocess.std).gather(1, corrupted)
        tokens = vit.encode(vit.embed(rearranged(images, source, vit.patch_size), mask), vit.grid)
        patches = vit.fc_norm(tokens[:, vit.prefix :]).gather(1, corrupted[..., None].expand(-1, -1, vit.width))
        logits = at_least_float32(self.head(patches)).flatten(0, 1)
        accuracy = (logits.argmax(-1) == colours.flatten()).float().mean()
        features = vit.pool(tokens).detach() if self.training else None  # else of whole images
        return Step(F.cross_entropy(logits, colours.flatten()), None, {"accuracy": accuracy}, features)

    def pictures(self, vit: ViT, batch: Batch) -> dict[str, Tensor]:
        preprocess, patch = self._preprocess or cast(Any, vit.preprocess), vit.patch_size
        _, mask, source = corruption(batch.draws, math.prod(vit.grid))
        seen = rearranged(batch.views[0], source, patch)
        tokens = vit.fc_norm(vit.encode(vit.embed(seen, mask), vit.grid))[:, vit.prefix :]
        colours, powers = self.head(tokens).argmax(-1), range(len(preprocess.mean))
        levels = torch.stack([colours // LEVELS**power % LEVELS for power in reversed(powers)], -1)
        mean, std = (seen.new_tensor(moment) for moment in (preprocess.mean, preprocess.std))
        predicted = unpatchify(((levels + 0.5) / LEVELS - mean) / std, vit.grid, 1)
        seen = unpatchify(patchify(seen, patch) * ~mask[..., None], vit.grid, patch)
        return {"corrupted patches": seen, "predicted mean colours": predicted}


def corruption(draws: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """By the images' draws (B,), of N patches: which to corrupt, indices (B, N // 2); which of these to mask, (B, N),
    bool; and whose pixels each one shows, indices (B, N)."""
    order, kind, other = image_noise(draws, 3 * patches).chunk(3, dim=1)
    corrupted, share = order.argsort(dim=1)[:, : patches // 2], uniform(kind)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, corrupted, True)
    own = torch.arange(patches, device=draws.device)
    another = (own + 1 + (uniform(other) * (patches - 1)).long()) % patches
    replaced = chosen & (share >= MASKED) & (share < MASKED + OTHER)
    return corrupted, chosen & (share < MASKED), torch.where(replaced, another, own)


def rearranged(images: Tensor, source: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W) whose patch n shows the pixels of patch source[:, n]."""
    patches, grid = patchify(images, patch_size), (images.shape[2] // patch_size, images.shape[3] // patch_size)
    return unpatchify(patches.gather(1, source[..., None].expand_as(patches)), grid, patch_size)


def mean_colours(images: Tensor, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The three highest bits of the patches' mean colours, (B, C, H, W) normalised -> (B, N); of red the highest."""
    means = patchify(at_least_float32(images), patch_size).unflatten(-1, (-1, images.shape[1])).mean(2)
    colours = torch.zeros_like(means[..., 0], dtype=torch.long)
    for channel in range(images.shape[1]):
        level = (means[..., channel] * std[channel] + mean[channel]) * 255
        # Rounding must not make 127.9999 of 128.
        colours = colours * LEVELS + ((level + 1e-3) / (256 // LEVELS)).long().clamp(0, LEVELS - 1)
    return colours

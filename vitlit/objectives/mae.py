"""Masked autoencoding (2111.06377): hide most patches and predict their pixels from the rest.

B is the batch, N the number of patches, K of them visible, S the prefix tokens, P the patch size, C the channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT, ViTConfig
from vitlit.model.block import Block
from vitlit.model.init import init_layers, xavier
from vitlit.model.position import sincos2d
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32
from vitlit.seeds import image_noise


class MAE(Objective):
    """Mean squared error of the pixels of hidden patches (2111.06377, section 3).

    The ViT encodes only the visible patches. A smaller transformer, the decoder, fills their gaps with mask tokens and
    predicts pixels. The paper's encoder has `position: sincos2d_mae`. Which patches are hidden follows `Batch.draws`;
    in validation, an image always has the same. Parameter names are those of facebookresearch/mae. Options out of range
    raise UserError, and so does a ViT with parts that MAE does not train.

    Args:
        vit: the encoder; its head is removed.
        mask_ratio: the share of patches to hide.
        decoder_width: size of the decoder's tokens.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder; must divide its width.
        normalize_pixels: whether the target is each patch's pixels normalised by their own mean and variance.
    """

    def __init__(
        self,
        vit: ViT,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_pixels: bool = True,
    ) -> None:
        super().__init__(vit)
        patches = math.prod(vit.grid)
        if not 0 < mask_ratio < 1 or not 0 < int(patches * (1 - mask_ratio)) < patches:
            raise UserError(f"mask_ratio {mask_ratio} must hide some of {patches} patches and leave others visible")
        if vit.config.pool == "map" or vit.config.norm == "pooled":
            raise UserError("MAE does not train with model.vit.pool map or norm pooled; set them when you finetune")
        if vit.config.patch_dropout:
            raise UserError("MAE hides patches itself, by its mask_ratio; leave model.vit.patch_dropout out")
        vit.set_head("finetune", 0)
        self.kept, self.normalize_pixels = int(patches * (1 - mask_ratio)), normalize_pixels
        try:
            config = ViTConfig(
                width=decoder_width,
                depth=decoder_depth,
                heads=decoder_heads,
                mlp_dim=4 * decoder_width,
                position="sincos2d_mae",
                norm_eps=vit.config.norm_eps,
            )
        except UserError as error:
            raise UserError(f"MAE's decoder: {error}") from error
        self.decoder_embed = nn.Linear(vit.width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Buffer(sincos2d(vit.grid, decoder_width, "sincos2d_mae"), persistent=False)
        self.decoder_blocks = nn.ModuleList(Block(config) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=config.norm_eps)
        self.decoder_pred = nn.Linear(decoder_width, vit.patch_size**2 * vit.config.in_channels)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        init_layers(self.decoder_blocks)
        for layer in (self.decoder_embed, self.decoder_pred):
            xavier(layer)

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        noise = image_noise(batch.draws, math.prod(vit.grid))
        loss, _, _, tokens = self.reconstruct(vit, batch.views[0], noise)
        return Step(loss, features=vit.pool(tokens).detach() if self.training else None)  # else of whole images

    def collapse(self, logs: dict[str, float]) -> str:
        few = self.kept > 0.8 * self.decoder_pos_embed.shape[1]
        return "so few patches are hidden that the others give them away; raise mask_ratio, to 0.75" if few else ""

    def pictures(self, vit: ViT, batch: Batch) -> dict[str, Tensor]:
        noise = image_noise(batch.draws, math.prod(vit.grid))
        _, predicted, hidden, _ = self.reconstruct(vit, batch.views[0], noise)
        patches, hidden = patchify(at_least_float32(batch.views[0]), vit.patch_size), hidden[..., None]
        if self.normalize_pixels:  # mean and variance, which it does not predict, are the hidden patch's own
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        shown = {"visible patches": patches * ~hidden, "reconstruction": torch.where(hidden, predicted, patches)}
        return {name: unpatchify(patches, vit.grid, vit.patch_size) for name, patches in shown.items()}

    def reconstruct(self, vit: ViT, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Hide patches of images of the ViT's own size, predict their pixels and compare.

        The K patches with the lowest noise (B, N) stay visible.

        Returns:
            the loss, a scalar; predicted pixels, (B, N, P * P * C); what is hidden, (B, N), bool; tokens (B, S + K, D).
        """
        target = patchify(at_least_float32(images), vit.patch_size)
        if self.normalize_pixels:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        keep = noise.argsort(dim=1)[:, : self.kept]
        hidden = torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)
        predicted = self.decode(tokens := vit.encode(vit.embed(images, keep=keep), vit.grid, keep), keep)
        error = (at_least_float32(predicted) - target).square().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum(), predicted, hidden, tokens

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Predict all patches, (B, N, P * P * C), from encoded tokens (B, S + K, D) and the patches' indices (B, K)."""
        tokens = self.decoder_embed(tokens)
        prefix, visible = tokens.split([tokens.shape[1] - self.kept, self.kept], dim=1)
        patches = self.mask_token.to(tokens.dtype).expand(len(tokens), self.decoder_pos_embed.shape[1], -1)
        patches = patches.scatter(1, keep[..., None].expand_as(visible), visible) + self.decoder_pos_embed
        tokens = torch.cat([prefix, patches], dim=1)  # the class token has no position
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, prefix.shape[1] :]))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """The pixels of each patch, ordered by row, column, channel: (B, C, H, W) -> (B, N, P * P * C)."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # none that the edge cuts
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The images of patches: (B, N, P * P * C) -> (B, C, rows * P, columns * P)."""
    channels = patches.unflatten(2, (patch_size**2, -1)).mT.flatten(2).mT
    return F.pixel_shuffle(channels.unflatten(2, grid), patch_size).contiguous()

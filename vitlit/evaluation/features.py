"""A ViT's features of images, the same whatever batches the images come in."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError

BLOCK = 64  # images of every forward pass


def features(vit: Any, batches: Iterable[Tensor], names: Sequence[str] = ("pooled",)) -> dict[str, Tensor]:
    """Features by name of a ViT's input, batches (B, C, H, W) of any sizes: float32 on the CPU, a row an image.

    pooled (N, D) is what the head sees, logits (N, classes) what it gives. class (N, 4, D) has the class token, or
    without one the mean of the patches, after each of the last four blocks (all, of fewer), and patches (N, D) the mean
    of the last block's patches, both after the final norm. Products may round by their size, so each forward pass has
    64 images, and zeros fill up the last: an image's features, to the last bit, depend on its place in the data and not
    on the batches. UserError in training mode.
    """
    if vit.training:
        raise UserError("features are those of evaluation: call vit.eval() first")
    device = next(vit.parameters()).device
    found: list[dict[str, Tensor]] = []
    images = (image for batch in batches for image in batch)
    while block := list(islice(images, BLOCK)):
        filled = torch.stack(block + [torch.zeros_like(block[0])] * (BLOCK - len(block)))
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            of_block = forward(vit, filled.to(device, torch.float32))
        found.append({name: of_block[name][: len(block)].to("cpu", copy=True) for name in names})
    return {name: torch.cat([each[name] for each in found]) for name in names}


def forward(vit: Any, images: Tensor) -> dict[str, Tensor]:
    after = vit.features(images, layers=range(-min(4, len(vit.blocks)), 0))
    logits, pooled = vit.outputs_of(after[-1])
    tokens = vit.fc_norm(after)  # which does nothing where the final norm is that of `features`
    means = tokens[:, :, vit.prefix :].mean(2)
    of_blocks = means if vit.cls_token is None else tokens[:, :, 0]
    return {"pooled": pooled, "logits": logits, "class": torch.stack([*of_blocks], 1), "patches": means[-1]}


def probe_inputs(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What DINOv2's linear probe sees: class tokens of the last or of four blocks, with or without mean patches."""
    inputs = {"1 block": found["class"][:, -1], "4 blocks": found["class"].flatten(1)}
    return inputs | {f"{name}, patches": torch.cat([each, found["patches"]], 1) for name, each in inputs.items()}

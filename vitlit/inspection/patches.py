"""The patches of a ViT: the filters that embed them, their positions, their features, their worth to the prediction."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT


def filter_components(vit: ViT, count: int = 28) -> Tensor:
    """The first principal components of the patch embedding's filters, (count, C, P, P) (2010.11929, figure 7)."""
    filters = vit.patch_embed.proj.weight.detach().float()
    return principal_components(filters.flatten(1), count).unflatten(1, filters.shape[1:])


def position_similarity(vit: ViT) -> Tensor:
    """The cosine of all position embeddings, (rows, columns, rows, columns) (figure 7); UserError if there are none."""
    if vit.pos_embed is None:
        raise UserError(f"this ViT adds no positions to its patches (position: {vit.position})")
    positions = F.normalize(vit.pos_embed[0, vit.positioned :].detach().float(), dim=-1)
    return (positions @ positions.T).view(*vit.grid, *vit.grid)


@torch.no_grad()
def patch_components(vit: ViT, images: Tensor, count: int = 3) -> Tensor:
    """Components of the features of all patches (2304.07193, figure 1): (B, C, H, W) -> (B, rows, columns, count)."""
    features = torch.cat([vit.features(image)[:, vit.prefix :] for image in images.split(1)]).float()
    found = (features - features.mean((0, 1))) @ principal_components(features.flatten(0, 1), count).T
    return found.unflatten(1, vit.grid_of(*images.shape[-2:]))


def principal_components(rows: Tensor, count: int) -> Tensor:
    """Orthonormal directions in which rows (R, D) vary most, (count, D); the largest entry of each is positive."""
    found = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:count]
    return found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()


@torch.no_grad()
def occlusion(vit: ViT, images: Tensor, window: int = 3, stride: int = 1) -> tuple[Tensor, Tensor]:
    """How much probability the predicted class loses by a grey square around every stride-th patch (1311.2901, 4.2).

    It is `window` patches wide. (B, C, H, W) -> what is lost, (B, rows / stride, columns / stride), rounded up, and the
    predicted classes (B,). UserError: there is no head that tells classes apart.
    """
    if vit.config.num_classes < 2:
        raise UserError("this ViT has no head that tells classes apart")
    before, classes = vit(images).softmax(-1).max(-1)
    (rows, columns), side, lost = vit.grid_of(*images.shape[-2:]), window * vit.patch_size, []
    for row in range(0, rows, stride):
        for column in range(0, columns, stride):
            top, left = ((place - window // 2) * vit.patch_size for place in (row, column))
            covered = images.clone()  # 0 is the mean colour
            covered[..., max(top, 0) : top + side, max(left, 0) : left + side] = 0
            lost.append(before - vit(covered).softmax(-1).gather(1, classes[:, None])[:, 0])
    return torch.stack(lost, 1).unflatten(1, (-1, -(-columns // stride))), classes

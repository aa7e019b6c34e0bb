"""Pictures of what a ViT looks at and has learned, from the ViT and normalised images (B, C, H, W)."""

from collections.abc import Mapping
from itertools import cycle, repeat
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from vitlit.evaluation.calibration import Reliability
from vitlit.images.preprocess import Preprocess
from vitlit.images.raw import shown
from vitlit.inspection.attention import as_map, attention, attention_distance, attentions, pooled, rollout
from vitlit.inspection.patches import filter_components, occlusion, patch_components, position_similarity
from vitlit.model import ViT

POSITIONS, SQUARES = 8, 14  # drawn on each axis, of a larger grid
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's, for the colour-blind


def draw_filters(vit: ViT, images: Tensor | None = None) -> Figure:
    """2010.11929, figure 7, left. Each component is scaled by its largest value, and grey is 0."""
    found = filter_components(vit)
    rows = coloured(shown(found / found.abs().amax((1, 2, 3), keepdim=True)), Preprocess((1, 1))).split(7)
    return draw_grid(f"First {len(found)} principal components of the patch filters", rows)


def draw_positions(vit: ViT, images: Tensor | None = None) -> Figure:
    """2010.11929, figure 7, centre. Each map shows how similar the position of one patch is to those of all."""
    rows, columns = (torch.linspace(0, side - 1, min(side, POSITIONS)).round().long() for side in vit.grid)
    labels = [f"row {row + 1}" for row in rows], [f"col. {column + 1}" for column in columns]
    similarity = position_similarity(vit).cpu()[rows][:, columns]
    return draw_grid("Position embeddings", similarity, *labels, bar="Cosine similarity", vmin=-1, vmax=1)


def draw_distance(vit: ViT, images: Tensor) -> Figure:
    """2010.11929, figure 7, right. A point is a head, the line their mean."""
    found = torch.stack([attention_distance(vit, image) for image in images.split(1)]).mean(0).cpu().numpy()
    depth, figure = range(1, len(found) + 1), Figure((5, 4), 200, layout="constrained")
    axes = figure.subplots()
    axes.plot(depth, found, "C0o", depth, found.mean(1), "k-", alpha=0.7)
    axes.set(title="Heads, and their mean", xlabel="Network depth (block)", ylabel="Mean attention distance (pixels)")
    axes.set(xticks=depth[:: -(-len(depth) // 12)], ylim=(0, 1.05 * found.max()))
    return figure


def draw_images(vit: ViT, images: Tensor) -> Figure:
    """The images, darker where less attention goes (2010.11929, figure 6: rollout); features (2304.07193, figure 1)."""
    name, tokens = pooled(vit)
    last = [attention(vit, image, tokens=tokens).mean((1, 2)) for image in images.split(1)]
    through = [rollout(vit, image)[:, tokens].mean(1) for image in images.split(1)]
    maps = [as_map(vit, images, torch.cat(weights)).cpu()[:, None] for weights in (last, through)]
    light = [0.15 + 0.85 * F.interpolate(each, images.shape[-2:], mode="bilinear") for each in maps]
    inputs, found = coloured(images, vit.preprocess), patch_components(vit, images).cpu()
    low, high = found.flatten(0, 2).quantile(torch.tensor([0.01, 0.99]), 0)
    rows = [inputs, *(inputs * each.permute(0, 2, 3, 1) for each in light), ((found - low) / (high - low)).clamp(0, 1)]
    labels = ["input", "last block", "rollout", "patch features"]
    return draw_grid(f"Attention of the {name}, and principal components", rows, labels, inches=2)


def draw_occlusion(vit: ViT, images: Tensor) -> Figure:
    """1311.2901, section 4.2. What the predicted class loses where a square of the image is grey."""
    stride = -(-max(vit.grid_of(*images.shape[-2:])) // SQUARES)
    lost, classes = occlusion(vit, images, 2 * stride + 1, stride)
    names = [vit.classes[i][:20] if vit.classes else f"class {i}" for i in classes.tolist()]
    rows, scale = [coloured(images, vit.preprocess), lost.cpu()], {"vmin": lost.min(), "vmax": lost.max()}
    return draw_grid("Occlusion", rows, ["input", "hidden at"], names, 2, "Lost probability", **scale)


def draw_heads(vit: ViT, images: Tensor) -> Figure:
    """What each head of each block attends to in the first image. Each map is scaled by itself."""
    name, tokens = pooled(vit)
    rows = [as_map(vit, images, weights[0].mean(1)).cpu() for weights in attentions(vit, images[:1], tokens)]
    blocks, heads = [f"block {i + 1}" for i in range(len(rows))], [f"head {i + 1}" for i in range(len(rows[0]))]
    return draw_grid(f"Attention of the {name}", rows, blocks, heads, vmin=0, vmax=1)


FIGURES = (draw_filters, draw_positions, draw_distance, draw_images, draw_occlusion, draw_heads)


def draw_reliability(curves: Mapping[str, Reliability]) -> Figure:
    """1706.04599, figure 1, as lines by name: how often predictions are right, and how many of them there are."""
    figure = Figure((5, 6 + 0.2 * len(curves)), 200, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], "k:", label="as often right as sure")
    for (name, found), colour, mark in zip(curves.items(), cycle(COLOURS), cycle("osD^v*"), strict=False):
        upper.plot(found.confidence, found.accuracy, f"-{mark}", color=colour, label=name, clip_on=False)
        lower.stairs(found.images / found.images.sum(), np.linspace(0, 1, len(found.images) + 1), color=colour)
    upper.set(title="Reliability", ylabel="Share that is right", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center", fontsize="small")
    lower.set(xlabel="Confidence (probability of the predicted class)", ylabel="Share of images", ylim=(0, None))
    return figure


def draw_grid(
    title: str, rows: Any, left: Any = (), below: Any = (), inches: float = 0.8, bar: str = "", **scale: Any
) -> Figure:
    """Rows of pictures (H, W, 3) and maps (rows, columns), labelled; `bar` says what the numbers of the maps are."""
    figure = Figure((inches * len(rows[0]) + (2 if bar else 1), inches * len(rows) + 0.8), 200, layout="constrained")
    figure.suptitle(title)
    blank = {"xticks": [], "yticks": [], "frame_on": False}
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, subplot_kw=blank)
    for line, row, label in zip(grid, rows, left or repeat(""), strict=False):
        for axes, picture, caption in zip(line, row, below or repeat(""), strict=False):
            drawn = axes.imshow(picture.numpy(), "viridis", **scale)
            axes.set(xlabel=caption, ylabel=label)
            axes.label_outer()
    if bar:
        figure.colorbar(drawn, ax=grid, label=bar, shrink=0.8)
    return figure


def coloured(images: Tensor, preprocess: Any) -> Tensor:
    """Normalised images (B, C, H, W) as red, green and blue from 0 to 1, (B, H, W, 3)."""
    mean, std = (torch.tensor(moment).view(-1, 1, 1) for moment in (preprocess.mean, preprocess.std))
    return shown(images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)

"""facebookresearch's DINO, DINOv2, MAE and DeiT `.pth` files, whose names are nearly timm's."""

import re

from torch import Tensor

from vitlit.errors import UserError
from vitlit.weights.files import Contents
from vitlit.weights.timm import canonical, prefix_of
from vitlit.weights.weights import IMAGENET, STEM, Weights, architecture

# What such a file holds beside the ViT.
UNUSED = re.compile(
    r"mask_token|decoder_.*|(?:module\.)?(?:dino_head|ibot_head)\..*|(?:module\.)?head\.(?:mlp|last_layer)\..*"
)
NAMES = (
    (r"^register_tokens$", "reg_token"),
    (r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),  # DeiT III
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2's training keeps its blocks in chunks
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def read(contents: Contents) -> Weights | None:
    if contents.kind != "torch":
        return None
    tensors, prefix = contents.tensors, prefix_of(contents)
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    kind = recognise(contents, state)
    if kind is None:
        return None
    if len(state) < len(tensors):
        raise UserError(f"{contents.path} holds two networks, one of them in {prefix.rstrip('.')}")
    unused = [name for name in state if UNUSED.fullmatch(name)]
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in unused:
            for pattern, ours in NAMES:
                name = re.sub(pattern, ours, name)
            kept[name] = tensor
    kept = canonical(kept)
    config = architecture(kept, contents.path, class_position=None if kind == "deit" else True)
    if kind == "dino" or (kind == "dinov2" and not config["registers"]):
        config["resampling"] = "offset"
    told = frozenset({"class_position"} if kind != "deit" else ())
    preprocess = {**IMAGENET, "crop_ratio": 0.875}
    origins = {"preprocess": kind}
    return Weights(contents.path, f"facebook {kind}", kept, config, [], preprocess, unused, origins=origins, told=told)


def recognise(contents: Contents, state: dict[str, Tensor]) -> str | None:
    """Which of the models a file of timm's names is, None for none."""
    if STEM not in state:
        return None
    if "register_tokens" in state or ("mask_token" in state and "decoder_embed.weight" not in state):
        return "dinov2"
    if "decoder_embed.weight" in state:
        return "mae"
    if contents.wrapper == "teacher":
        return "dinov2" if any("ls1" in name for name in state) else "dino"
    head = "head.weight" in state
    if contents.wrapper == "model":
        return "deit" if head and "fc_norm.weight" not in state else "mae"
    plain = not head and not contents.wrapper and "norm.weight" in state and "cls_token" in state
    return "dino" if plain and "blocks.0.ls1.gamma" not in state and "reg_token" not in state else None

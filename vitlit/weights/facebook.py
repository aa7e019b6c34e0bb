"""facebookresearch's DINO, DINOv2, MAE and DeiT `.pth` files, which almost have timm's names."""

import re

from vitlit.weights.checkpoint import KEY
from vitlit.weights.files import Contents
from vitlit.weights.names import prefix_of, strip
from vitlit.weights.timm import place
from vitlit.weights.weights import IMAGENET, STEM, Weights, architecture

# Tensors in such a file that are not part of the ViT.
UNUSED = r"mask_token|decoder_.*|(?:.+\.)?(?:dino_head|ibot_head)\..*|(?:.+\.)?head\.(?:mlp|last_layer)\..*"
NAMES = (
    (r"^register_tokens$", "reg_token"),
    (r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),  # DeiT III
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2 trains with its blocks in chunks
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def read(contents: Contents) -> Weights | None:
    prefix = prefix_of(contents, STEM)
    if contents.kind != "torch" or prefix is None or KEY in contents.rest:
        return None
    wrapper = "teacher" if re.search("teacher|student", prefix) else contents.wrapper
    kind = model_of({name.removeprefix(prefix) for name in contents.tensors}, wrapper)
    if kind is None:
        return None
    named, unused = strip(contents, prefix, UNUSED)
    state = {}
    for name, tensor in named.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    place(state, None)
    stated = frozenset() if kind == "deit" else frozenset({"class_position"})
    config = architecture(state, class_position=True if stated else None)
    if kind == "dino" or (kind == "dinov2" and not config["registers"]):
        config["resampling"] = "offset"
    origins, unused = {"preprocess": kind}, [name.removeprefix(prefix) for name in unused]
    return Weights(contents.path, f"facebook {kind}", state, config, [], IMAGENET, unused, stated, origins)


def model_of(names: set[str], wrapper: str) -> str | None:
    """Which of the models a file with timm's names is; None if it is none of them."""
    if "decoder_embed.weight" in names:
        return "mae"
    if "register_tokens" in names or "mask_token" in names:
        return "dinov2"
    if wrapper in ("teacher", "student"):
        return "dinov2" if any("ls1" in name for name in names) else "dino"
    head = "head.weight" in names
    if wrapper in ("model", "model_ema"):
        return "deit" if head and "fc_norm.weight" not in names else "mae"
    plain = not (head or wrapper or names & {"blocks.0.ls1.gamma", "reg_token"})
    return "dino" if plain and {"norm.weight", "cls_token"} <= names else None

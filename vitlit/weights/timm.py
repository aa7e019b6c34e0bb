"""timm's `vision_transformer` and `deit` models: their names are the ViT's own."""

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.position import sincos2d
from vitlit.weights.checkpoint import EXPORTED, exported
from vitlit.weights.files import Contents
from vitlit.weights.hub import CONFIG
from vitlit.weights.names import fuse, prefix_of, strip
from vitlit.weights.weights import HALF, IMAGENET, NOT_SAID, STEM, Weights, architecture, require, square, tensors

POSITIONS = ("learned", "sincos2d", "sincos2d_mae")
POOLS = {"token": "cls", "avg": "gap", "map": "map"}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
# What timm's names tell and no tensor shows: the models with gelu_tanh, those with an epsilon of 1e-5, and the heads;
# the first that matches counts.
TANH = re.compile(r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip|vit_large_patch16_siglip(_gap)?_512")
EPS5 = re.compile("_clip_|aimv2|beit3")
HEADS = {
    "giant_.*(dinov2|tipsv2|radio)|aimv2_3b": 24,
    "aimv2_huge": 12,
    "aimv2_large": 8,
    "base_patch16_gap|large|huge|giant|gigantic|so400m|aimv2_1b|intern300m": 16,
    "_plus_": 14,
    "test_vit2?$": 2,
    "tiny|test_vit[34]$": 3,
    "xsmall|wee": 4,
    "little": 5,
    "small": 6,
    "medium": 8,
    "betwixt": 10,
    "base": 12,
    "so150m2": 13,
    "so150m_": 14,
}
# Networks with a ViT's tensor names, or almost, that compute something else: by timm's name, by the name of a tensor.
OTHERS = {
    "_rope": "rotary positions of another kind",
    "_rpn": "norms after attention and MLP",
    "qwen": "Qwen's blocks",
    "eva(?!_large)": "EVA-02's blocks",
}
PARTS = {
    r"\.attn\.lambda_": "differential attention",
    r"\.attns\.|\.in_proj\.|\.in_norm\.": "parallel blocks",
    "rel_pos|relative_position": "relative positions",
}
# Arguments of timm's models that have no effect, are shown by the tensors, or are read by `stated_by`.
KNOWN = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "final_norm", "global_pool", "pre_norm"),
    *("dynamic_img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("num_heads", "act_layer", "norm_layer", "proj_bias", "scale_attn_norm", "scale_mlp_norm", "pool_include_prefix"),
    *("patch_drop_rate", "weight_init", "fix_init", "pos_embed"),
)

NAMED = {192: "tiny", 384: "small", 1024: "large"}  # by width; the arguments say the rest
ARGUMENTS = {"in_chans": "in_channels", "embed_dim": "width", "num_heads": "heads", "reg_tokens": "registers"}
ARGUMENTS |= {"init_values": "layer_scale", "pool_include_prefix": "pool_prefix"}
ARGUMENTS |= dict.fromkeys(("scale_attn_norm", "scale_mlp_norm"), "sub_norm")
ARGUMENTS |= {name: name for name in ("patch_size", "depth", "class_token", "qkv_bias", "qk_norm", "proj_bias")}
ARGUMENTS |= {name: name for name in ("pre_norm", "final_norm")}


def read(contents: Contents) -> Weights | None:
    prefix = prefix_of(contents, STEM)
    if prefix is None:
        return None
    state, unused = strip(contents, prefix)
    for pattern, part in PARTS.items():
        if name := next((name for name in state if re.search(pattern, name)), None):
            raise UserError(f"it has {part} ({name}), which vitlit does not have")
    if "blocks.0.mlp.fc1_g.weight" in state:
        state = fuse(state, ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc1")
    about, (options, classes, preprocess) = contents.beside(CONFIG), exported(contents)
    cfg = about["pretrained_cfg"] if isinstance(about.get("pretrained_cfg"), dict) else {}
    stated = dict(options) or stated_by(about)
    size = cfg["input_size"][1:] if cfg.get("input_size") else None
    seen = place(state, stated.get("image_size", size))
    position = stated.pop("position", "learned")
    if position.startswith("sincos2d"):
        if holds(state, seen, position):
            seen.pop("class_position")
        else:
            position = "learned"  # changed since it was exported
    config = architecture(state, position, seen.get("class_position"))
    if config.get("mlp") == "swiglu":
        stated.pop("mlp", None)
    stated |= seen
    config |= stated
    origins = dict.fromkeys(stated, EXPORTED if options else CONFIG)
    config.setdefault("norm_eps", 1e-5 if config["pre_norm"] else 1e-6)  # CLIP's is the former
    for name in ("mlp", "norm_eps", "pool"):
        if name not in stated and config.get(name) != "swiglu":
            origins[name] = f"{config.get(name, 'gelu')} (timm's default); {NOT_SAID}"
    if preprocess:
        origins["preprocess"] = EXPORTED
    elif "mean" in cfg:
        preprocess = {name: tuple(cfg[name]) for name in ("mean", "std")}
        preprocess["interpolation"] = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        preprocess["crop_ratio"] = float(cfg.get("crop_pct", 0.875))
        preprocess["squash"] = cfg.get("crop_mode") == "squash"
        origins["preprocess"] = CONFIG
    else:
        imagenet = config["distilled"] or config["layer_scale"] is not None
        preprocess = {**(IMAGENET if imagenet else HALF), "crop_ratio": 0.9}
        models = "DeiT and DINOv2" if imagenet else "AugReg and SigLIP"
        origins["preprocess"] = f"{models}; {NOT_SAID}"
    names = about.get("label_names")
    if not classes and isinstance(names, list) and len(names) == config["num_classes"]:
        classes = [str(name) for name in names]
    said = {*stated} if origins["preprocess"].endswith(NOT_SAID) else {*stated, "preprocess"}
    return Weights(contents.path, "timm", state, config, classes, preprocess, unused, frozenset(said), origins)


def stated_by(about: dict[str, Any]) -> dict[str, Any]:
    """The options that timm's config.json states; UserError if it describes a network that vitlit does not have."""
    name, arguments = str(about.get("architecture", "")), about.get("model_args") or {}
    if not name:
        return {}
    other = next((part for pattern, part in OTHERS.items() if re.search(pattern, name)), None)
    if other:
        raise UserError(f"{CONFIG} is of timm's {name}, which has {other}; vitlit has plain ViTs")
    unknown = next((key for key in arguments if key not in KNOWN), None)
    if unknown is not None:
        raise UserError(f"{CONFIG} has the model argument {unknown}, which vitlit does not know")
    usual = "gelu_tanh" if TANH.search(name) else "quick_gelu" if "quickgelu" in name else "gelu"
    pool, activation = arguments.get("global_pool", about.get("global_pool")), arguments.get("act_layer", usual)
    if (pool and pool not in POOLS) or activation not in (*ACTIVATIONS, "silu"):
        raise UserError(f"{CONFIG} has global_pool {pool} and act_layer {activation}; vitlit does not have both")
    norm = arguments.get("norm_layer")
    if norm not in (None, "layernorm", "rmsnorm"):
        raise UserError(f"{CONFIG} has norm_layer {norm}; vitlit has layernorm and rmsnorm")
    stated: dict[str, Any] = {"mlp": activation, "norm_eps": 1e-5 if EPS5.search(name) and norm is None else 1e-6}
    stated["pool_prefix"] = bool(arguments.get("pool_include_prefix", name == "test_vit3"))
    if pool:
        stated["pool"] = POOLS[pool]
    of_name = next((count for pattern, count in HEADS.items() if re.search(pattern, name)), None)
    if heads := arguments.get("num_heads", of_name):
        stated["heads"] = int(heads)
    if "img_size" in arguments:
        stated["image_size"] = arguments["img_size"]
    return stated


def place(state: dict[str, Tensor], size: Any) -> dict[str, Any]:
    """Take the registers' positions off the table and add them to the tokens; what the image size tells of the rest."""
    table, registers, patch = state.get("pos_embed"), state.get("reg_token"), state[STEM].shape[-1]
    if table is None or table.ndim != 3:
        return {}
    special = sum(name in state for name in ("cls_token", "dist_token"))
    count = 0 if registers is None else registers.shape[1]
    sides: Any = [size, size] if isinstance(size, int) else size or ()
    patches = math.prod(side // patch for side in sides) if sides else 0
    length = table.shape[1] - special
    covered = length - count == patches
    if not patches or length not in (patches - special, patches, patches + count):  # of another size than is stated
        patches = 0
        covered = square(length - count) is not None and not square(length) and not square(table.shape[1])
    if registers is not None and covered:
        state["reg_token"] = registers + table[:, special : special + count]
        state["pos_embed"] = table = torch.cat([table[:, :special], table[:, special + count :]], dim=1)
    if not patches:
        return {}
    seen: dict[str, Any] = {"image_size": size, "class_position": special > 0 and table.shape[1] != patches}
    if any(side % patch for side in sides):
        seen["partial_patches"] = "drop"
    return seen


def holds(state: dict[str, Tensor], seen: dict[str, Any], position: str) -> bool:
    """Whether a table is fixed positions and zeros for the tokens before them; if so, take it away."""
    table, size, patch = state.get("pos_embed"), seen.get("image_size"), state[STEM].shape[-1]
    if table is None or size is None:
        return False
    height, width = (side // patch for side in ([size, size] if isinstance(size, int) else size))
    fixed = sincos2d((height, width), table.shape[2], position)
    if not torch.equal(table.float(), F.pad(fixed, (0, 0, table.shape[1] - fixed.shape[1], 0))):
        return False
    del state["pos_embed"]
    return True


def write(vit: ViT) -> dict[str, Tensor]:
    options = {"patch_bias": not vit.config.pre_norm, "hidden_dim": None}
    require(vit, "timm's vit", **options, position=POSITIONS)
    state, registers = tensors(vit), vit.config.registers
    if vit.position.startswith("sincos2d"):
        assert vit.pos_embed is not None
        special = 0 if registers else vit.prefix  # timm's table covers the whole prefix or nothing of it
        state["pos_embed"] = F.pad(vit.pos_embed, (0, 0, special, 0))
    if registers and vit.positioned:
        table = state["pos_embed"]
        state["pos_embed"] = table[:, vit.positioned :]
        for i, name in enumerate(name for name in ("cls_token", "dist_token") if name in state):
            state[name] = state[name] + table[:, i : i + 1]
    return state


def config(vit: Any) -> dict[str, Any]:
    """The config.json of timm's model, which transformers reads too; UserError if timm has none such."""
    config, preprocess, swiglu = vit.config, vit.preprocess, vit.config.mlp == "swiglu"
    name, eps = f"vit_{NAMED.get(config.width, 'base')}_patch16_224", min(config.norm_eps, 1e-6)
    # What no argument chooses is of a model that has it.
    if config.distilled:
        require(vit, "timm's deit", mlp=ACTIVATIONS, registers=0, class_position=True)
        name = "deit_base_distilled_patch16_224"
    elif swiglu:
        name = "vit_giant_patch14_dinov2"
    elif config.norm_eps == 1e-5 and config.norm_kind == "layernorm":
        name, eps = "vit_base_patch16_clip_224", 1e-5
    require(vit, f"timm's {name}", norm_eps=eps, patch_norm=False, hidden_dim=None, position=POSITIONS)
    hidden = config.mlp_dim * (2 if swiglu else 1)
    ratio = hidden / config.width
    arguments = {theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()} | {
        "img_size": list(config.sides),
        "mlp_ratio": ratio if int(config.width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "global_pool": next(theirs for theirs, ours in POOLS.items() if ours == config.pool),
        "no_embed_class": bool(config.registers) or not config.class_position,
        "fc_norm": config.norm == "pooled",
        "act_layer": "silu" if swiglu else config.mlp,
    }
    arguments |= {"norm_layer": config.norm_kind} if eps != 1e-5 else {}
    cfg = {"input_size": [config.in_channels, *config.sides], "fixed_input_size": True}
    cfg |= {"interpolation": preprocess.interpolation, "mean": list(preprocess.mean), "std": list(preprocess.std)}
    cfg |= {"crop_pct": preprocess.crop_ratio, "crop_mode": "squash" if preprocess.squash else "center"}
    cfg |= {"first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"] if config.distilled else "head"}
    about = {"architecture": name, "num_classes": config.num_classes, "model_args": arguments, "pretrained_cfg": cfg}
    return about | ({"label_names": vit.classes} if vit.classes else {})

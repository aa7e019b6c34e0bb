"""transformers: ViT, DeiT, ViTMAE, DINOv2 (with registers) and DINOv3, as `save_pretrained` writes them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights.files import CONFIG, PREPROCESSOR, Contents
from vitlit.weights.names import Table, backwards, fuse, split, translate
from vitlit.weights.weights import HALF, IMAGENET, PLAIN, Weights, architecture, require, tensors

QKV = ("attn.q", "attn.k", "attn.v")
GATED = ("mlp.gate", "mlp.up")

LAYER, BLOCK = "encoder.layer.{}.", "blocks.{}."
EMBEDDINGS: Table = [
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm", "norm"),
]
ATTENTION: Table = [
    *((f"{LAYER}attention.attention.{name}", f"{BLOCK}attn.{name[0]}") for name in ("query", "key", "value")),
    (f"{LAYER}attention.output.dense", f"{BLOCK}attn.proj"),
]
VIT: Table = [
    *EMBEDDINGS,
    *ATTENTION,
    (f"{LAYER}layernorm_before", f"{BLOCK}norm1"),
    (f"{LAYER}layernorm_after", f"{BLOCK}norm2"),
    (f"{LAYER}intermediate.dense", f"{BLOCK}mlp.fc1"),
    (f"{LAYER}output.dense", f"{BLOCK}mlp.fc2"),
]
SCALES: Table = [(f"layer_scale{i}.lambda1", f"ls{i}.gamma") for i in (1, 2)]
DINOV2: Table = [
    *EMBEDDINGS,
    *ATTENTION,
    ("embeddings.register_tokens", "reg_token"),
    *((f"{LAYER}{theirs}", f"{BLOCK}{ours}") for theirs, ours in SCALES),
    *((f"{LAYER}{name}", f"{BLOCK}{name}") for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")),
]
GATED_DINOV2: Table = [(f"{LAYER}mlp.weights_in", f"{BLOCK}mlp.fc1"), (f"{LAYER}mlp.weights_out", f"{BLOCK}mlp.fc2")]
DINOV3: Table = [
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.patch_embeddings", "patch_embed.proj"),
    *((f"layer.{{}}.attention.{name}_proj", f"{BLOCK}attn.{name}") for name in "qkv"),
    ("layer.{}.attention.o_proj", f"{BLOCK}attn.proj"),
    *((f"layer.{{}}.{theirs}", f"{BLOCK}{ours}") for theirs, ours in SCALES),
    *((f"layer.{{}}.{name}", f"{BLOCK}{name}") for name in ("norm1", "norm2")),
    ("layer.{}.mlp.gate_proj", f"{BLOCK}mlp.gate"),
    ("layer.{}.mlp.up_proj", f"{BLOCK}mlp.up"),
    ("layer.{}.mlp.down_proj", f"{BLOCK}mlp.fc2"),
    ("norm", "norm"),
]
TABLES: dict[str, Table] = {
    "vit": [*VIT, ("classifier", "head")],
    "vit_mae": VIT,
    "deit": [
        *VIT,
        ("embeddings.distillation_token", "dist_token"),
        ("cls_classifier", "head"),
        ("classifier", "head"),
        ("distillation_classifier", "head_dist"),
    ],
    "dinov2": [*DINOV2, *GATED_DINOV2, ("classifier", "head")],
    "dinov2_with_registers": [*DINOV2, *GATED_DINOV2, ("classifier", "head")],
    "dinov3_vit": DINOV3,
}
EPS = {"vit": 1e-12, "vit_mae": 1e-12, "deit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
# What config.json and tensors both tell: (theirs, ours).
TOLD_TWICE = (
    ("hidden_size", "width"),
    ("num_hidden_layers", "depth"),
    ("patch_size", "patch_size"),
    ("num_channels", "in_channels"),
    ("num_register_tokens", "registers"),
)
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def read(contents: Contents) -> Weights | None:
    path = contents.path
    prefix = next(
        (n.removesuffix("embeddings.cls_token") for n in contents.tensors if n.endswith("embeddings.cls_token")), None
    )
    if prefix is None:
        return None
    named = {name.removeprefix(prefix): tensor for name, tensor in contents.tensors.items()}
    about = contents.beside(CONFIG)
    about = about if "model_type" in about else {}
    kind = str(about.get("model_type") or recognise(named))
    if kind not in TABLES:
        raise UserError(f"{path} is of transformers' model type {kind}; vitlit reads {' '.join(TABLES)}")

    beside = ("embeddings.mask_token", "pooler.", "decoder.")
    unused = [name for name in contents.tensors if name.removeprefix(prefix).startswith(beside)]
    named = {n: t for n, t in named.items() if not n.startswith(beside) and t.numel()}  # DINOv3 may have 0 registers
    state, others = translate(named, TABLES[kind])
    beyond = ""
    state |= {name: named[name] for name in others}
    state = fuse(state, QKV, "attn.qkv", path, optional=["attn.k.bias"] if kind == "dinov3_vit" else [])
    if "blocks.0.mlp.gate.weight" in state:
        state = fuse(state, GATED, "mlp.fc1", path)
    state = {name.replace(".mlp.up.", ".mlp.fc1."): tensor for name, tensor in state.items()}
    classifier = state.get("head.weight")
    if (
        kind.startswith("dinov2")
        and classifier is not None
        and classifier.shape[-1] == 2 * state["norm.weight"].shape[0]
    ):
        unused += [name for name in contents.tensors if name.startswith("classifier.")]
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        beyond = "left out: it reads the class token and the patches' mean"
    if "dist_token" in state and "head.weight" in state and "head_dist.weight" not in state:
        state = undistilled(state)
    position = "rope" if kind == "dinov3_vit" else "learned"
    config = {"mlp": "gelu", **architecture(state, path, position, class_position=True), "norm_eps": EPS[kind]}
    origins = {"norm_eps": f"transformers' defaults for {kind}"} | ({"head": beyond} if beyond else {})
    if kind == "dinov2":
        config["resampling"] = "offset"
    told_by_file = {"class_position"}
    if about:
        patches = state["pos_embed"].shape[1] - 1 - config["distilled"] if "pos_embed" in state else 0
        more = told(about, config, patches, path)
        config |= more
        told_by_file |= more.keys()
        origins |= dict.fromkeys(("norm_eps", "heads"), CONFIG)
    named_classes = about.get("id2label") or {}
    classes = [str(named_classes[str(i)]) for i in range(len(named_classes)) if str(i) in named_classes]
    if len(classes) != config["num_classes"] or classes == [f"LABEL_{i}" for i in range(len(classes))]:
        classes = []
    preprocess, origins["preprocess"] = preprocessing(contents.beside(PREPROCESSOR), kind)
    return Weights(
        path, f"hf {kind}", state, config, classes, preprocess, unused, origins=origins, told=frozenset(told_by_file)
    )


def recognise(named: dict[str, Tensor]) -> str:
    """The model type of a file without a config.json."""
    if "embeddings.patch_embeddings.weight" in named:
        return "dinov3_vit"
    if "encoder.layer.0.layer_scale1.lambda1" in named:
        return "dinov2_with_registers" if "embeddings.register_tokens" in named else "dinov2"
    if "embeddings.distillation_token" in named:
        return "deit"
    return "vit_mae" if any(name.startswith("decoder.") for name in named) else "vit"


def undistilled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A distillation token without a head is a register: DeiTForImageClassification looks at the class token alone."""
    table = state["pos_embed"]
    register = state["dist_token"] + table[:, 1:2]
    state = {**state, "reg_token": register, "pos_embed": torch.cat([table[:, :1], table[:, 2:]], dim=1)}
    del state["dist_token"]
    return state


def told(about: dict[str, Any], config: dict[str, Any], positions: int, path: Path) -> dict[str, Any]:
    """What config.json says and the tensors do not; UserError where it is nothing that the ViT has."""
    told: dict[str, Any] = {}
    if config["mlp"] != "swiglu":
        act = about.get("hidden_act", "gelu")
        if act not in ACTIVATIONS:
            raise UserError(f"{path.parent / CONFIG} has hidden_act {act}; vitlit has {' '.join(ACTIVATIONS)}")
        told["mlp"] = ACTIVATIONS[act]
    elif about.get("model_type") == "dinov3_vit" and about.get("hidden_act") not in ("silu", "swish"):
        raise UserError(
            f"{path.parent / CONFIG} has hidden_act {about.get('hidden_act')} in a gated MLP; vitlit has silu"
        )
    if about.get("rope_theta", 100.0) != 100.0:
        raise UserError(f"{path.parent / CONFIG} has rope_theta {about['rope_theta']}; vitlit has 100")
    for theirs, ours, kind in (
        ("layer_norm_eps", "norm_eps", float),
        ("num_attention_heads", "heads", int),
    ):
        if theirs in about:
            told[ours] = kind(about[theirs])
    for theirs, ours in TOLD_TWICE:
        if theirs in about and about[theirs] != config[ours]:
            raise UserError(f"{path} has {ours} {config[ours]}, but {CONFIG} beside it has {theirs} {about[theirs]}")
    size = about.get("image_size")
    if isinstance(size, int | list | tuple):
        told["image_size"] = size if isinstance(size, int) else list(size)
        height, breadth = (side // config["patch_size"] for side in ([size, size] if isinstance(size, int) else size))
        if config["position"] == "learned" and positions != height * breadth:
            raise UserError(
                f"{path} has {positions} positions of patches, but {CONFIG} beside it has image_size {size}"
            )
    return told


def preprocessing(about: dict[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """Preprocessing from preprocessor_config.json, else the model type's, and where it comes from."""
    known = {**(HALF if kind == "vit" else IMAGENET), "crop_ratio": 1.0 if kind in ("vit", "dinov3_vit") else 0.875}
    if kind in ("vit", "dinov3_vit"):
        known["interpolation"] = "bilinear"
    if "image_mean" not in about:
        return known, f"transformers' defaults for {kind}"
    known |= {"mean": tuple(about["image_mean"]), "std": tuple(about["image_std"])}
    for name, wanted in (("do_rescale", True), ("do_normalize", True), ("rescale_factor", 1 / 255)):
        if abs(about.get(name, wanted) - wanted) > 1e-6:
            raise UserError(f"{PREPROCESSOR} has {name} {about[name]}; vitlit scales by 1 / 255 and normalises")
    resample = about.get("resample", {"bilinear": 2, "bicubic": 3}[str(known["interpolation"])])
    if resample not in (2, 3):
        raise UserError(f"{PREPROCESSOR} has resample {resample}; vitlit has 2 (bilinear) and 3 (bicubic)")
    known |= {"interpolation": "bilinear" if resample == 2 else "bicubic", "crop_ratio": 1.0}
    crop, size = about.get("crop_size"), about.get("size")
    if about.get("do_center_crop") and crop and size:
        sides = [x if isinstance(x, int) else x.get("shortest_edge") or x.get("height") for x in (crop, size)]
        known["crop_ratio"] = min(1.0, sides[0] / sides[1])
        return known, PREPROCESSOR
    return known, f"{PREPROCESSOR}, but vitlit keeps the aspect"


def write(vit: ViT, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config.json of a transformers model of the same network.

    Raises:
        UserError: transformers has no such network.
    """
    config = vit.config
    common = {"pool": "cls", "qk_norm": False, "final_norm": True, "norm": "tokens", "hidden_dim": None}
    head = bool(config.num_classes)
    whose = "transformers' {}".format
    about: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu_pytorch_tanh" if config.mlp == "gelu_tanh" else "gelu",
        "torch_dtype": "float32",
    }
    state = split(tensors(vit), "attn.qkv", QKV)
    if config.position == "rope":
        kind, name = "dinov3_vit", "DINOv3ViTModel"
        require(vit, path, whose(name), **common, num_classes=0, distilled=False, class_token=True)
        state, more = dinov3(vit, state, path)
    elif config.layer_scale is not None or config.registers or config.mlp == "swiglu":
        kind = "dinov2_with_registers" if config.registers else "dinov2"
        name = "Dinov2WithRegistersModel" if config.registers else "Dinov2Model"
        require(vit, path, whose(name), **common, num_classes=0, distilled=False, position="learned")
        state, more = dinov2(vit, state, path)
    else:
        kind = "deit" if config.distilled else "vit"
        name = {"deit": "DeiTForImageClassificationWithTeacher", "vit": "ViTForImageClassification"}[kind]
        name = name if head else f"{'DeiT' if kind == 'deit' else 'ViT'}Model"
        require(vit, path, whose(name), **{**PLAIN, "distilled": config.distilled}, hidden_dim=None)
        more = {}
    table = dict(backwards(TABLES[kind]))
    if config.mlp == "swiglu" and kind.startswith("dinov2"):
        table |= dict(backwards(GATED_DINOV2))
    if kind == "deit":
        table["head"] = "cls_classifier"
    translated, others = translate(state, list(table.items()))
    assert all(name == "embeddings.mask_token" for name in others), others
    state = translated | {name: state[name] for name in others}
    if head:
        state = {n if "classifier" in n else f"{kind}.{n}": tensor for n, tensor in state.items()}
        labels = vit.classes or [f"LABEL_{i}" for i in range(config.num_classes)]
        more |= {
            "id2label": {str(i): n for i, n in enumerate(labels)},
            "label2id": {n: i for i, n in enumerate(labels)},
        }
    return state, {"architectures": [name], "model_type": kind, **about, **more}


def dinov2(vit: ViT, state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DINOv2 has positions for the class token, and its layer scales and mask token always."""
    width, mlp_dim = vit.width, vit.config.mlp_dim
    ratio = 4 if vit.config.mlp == "swiglu" else mlp_dim // width
    hidden = (width * ratio * 2 // 3 + 7) // 8 * 8 if vit.config.mlp == "swiglu" else width * ratio
    if hidden != mlp_dim:
        raise UserError(f"{path} was not written: transformers' DINOv2 has no mlp_dim {mlp_dim} at width {width}")
    if not vit.positioned:
        state["pos_embed"] = torch.cat([state["pos_embed"].new_zeros(1, 1, width), state["pos_embed"]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # which transformers has always
    if vit.config.layer_scale is None:
        ones = torch.ones(width)
        state |= {f"blocks.{i}.ls{j}.gamma": ones.clone() for i in range(vit.config.depth) for j in (1, 2)}
    more = {"mlp_ratio": ratio, "use_swiglu_ffn": vit.config.mlp == "swiglu", "use_mask_token": True}
    if vit.config.registers:
        more["num_register_tokens"] = vit.config.registers
    return state, more


def dinov3(vit: ViT, state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DINOv3 has no bias of the keys, and the halves of a gated MLP apart."""
    if vit.config.layer_scale is None:
        raise UserError(f"{path} was not written: transformers' DINOv3ViTModel has no layer_scale None")
    keys = [name for name in state if name.endswith("attn.k.bias")]
    if any(state[name].any() for name in keys):
        raise UserError(f"{path} was not written: transformers' DINOv3ViTModel as published has no bias of the keys")
    state = {name: tensor for name, tensor in state.items() if name not in keys}
    gated = vit.config.mlp == "swiglu"
    if gated:
        state = split(state, "mlp.fc1", GATED)
    else:
        state = {name.replace(".mlp.fc1.", ".mlp.up."): tensor for name, tensor in state.items()}
    bias = vit.config.qkv_bias
    state["embeddings.mask_token"] = torch.zeros(1, 1, vit.width)
    state.setdefault("reg_token", torch.zeros(1, 0, vit.width))
    more: dict[str, Any] = {"query_bias": bias, "key_bias": False, "value_bias": bias, "use_gated_mlp": gated}
    more |= {"num_register_tokens": vit.config.registers, "rope_theta": 100.0}
    return state, more | ({"hidden_act": "silu"} if gated else {})


def save_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def processor(preprocess: Preprocess) -> dict[str, Any]:
    """preprocessor_config.json for a preprocessing, as ViTImageProcessor reads it."""
    height, width = preprocess.image_size
    short = math.floor(min(height, width) / preprocess.crop_ratio + 1e-6)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short},
        "resample": 2 if preprocess.interpolation == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }

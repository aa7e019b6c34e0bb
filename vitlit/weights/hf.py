"""transformers: ViT, DeiT, ViTMAE, DINOv2 (with registers) and DINOv3, as `save_pretrained` writes them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT, ViTConfig
from vitlit.weights.files import Contents
from vitlit.weights.hub import CONFIG, PREPROCESSOR
from vitlit.weights.names import Table, backwards, blocks, fuse, prefix_of, split, strip, translate
from vitlit.weights.weights import HALF, IMAGENET, NOT_SAID, PLAIN, Weights, architecture, require, tensors

QKV = ("attn.q", "attn.k", "attn.v")
GATED = ("mlp.gate", "mlp.up")
UNUSED = ("embeddings.mask_token", "pooler.", "decoder.")  # names that begin so are not part of the ViT
BESIDE = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")  # the base model, such as vit.

LAYER = "encoder.layer.{}"
PROJECTIONS = [(f"attention.attention.{name}", f"attn.{name[0]}") for name in ("query", "key", "value")]
CLS_TOKEN = "embeddings.cls_token"
ENCODER: Table = [
    (CLS_TOKEN, "cls_token"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm", "norm"),
    *blocks(LAYER, ("attention.output.dense", "attn.proj"), *PROJECTIONS),
]
VIT: Table = [
    *ENCODER,
    *blocks(LAYER, ("layernorm_before", "norm1"), ("layernorm_after", "norm2")),
    *blocks(LAYER, ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")),
]
SCALES = [(f"layer_scale{i}.lambda1", f"ls{i}.gamma") for i in (1, 2)]
NORMS = [(name, name) for name in ("norm1", "norm2")]
DINOV2: Table = [
    *ENCODER,
    ("embeddings.register_tokens", "reg_token"),
    ("classifier", "head"),
    *blocks(LAYER, *SCALES, *NORMS, ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
]
GATED_DINOV2: Table = blocks(LAYER, ("mlp.weights_in", "mlp.fc1"), ("mlp.weights_out", "mlp.fc2"))
ATTENTION = (*((f"attention.{name}_proj", f"attn.{name}") for name in "qkv"), ("attention.o_proj", "attn.proj"))
SPLIT = (("mlp.gate_proj", "mlp.gate"), ("mlp.up_proj", "mlp.up"), ("mlp.down_proj", "mlp.fc2"))
DINOV3: Table = [
    (CLS_TOKEN, "cls_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.patch_embeddings", "patch_embed.proj"),
    ("norm", "norm"),
    *blocks("layer.{}", *ATTENTION, *SCALES, *NORMS, *SPLIT),
]
IN_MEMORY: Table = [  # the names of transformers 5 before it saves a model, as in a checkpoint of a module of one's own
    *blocks("layers.{}", *ATTENTION, ("layernorm_before", "norm1"), ("layernorm_after", "norm2")),
    *blocks("layers.{}", ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
    *blocks(LAYER, *ATTENTION, *SPLIT),
    *blocks("model.layer.{}", *ATTENTION, *SCALES, *NORMS, *SPLIT),
]
DISTILLED = [("embeddings.distillation_token", "dist_token"), ("distillation_classifier", "head_dist")]
TABLES: dict[str, Table] = {
    "vit": [*VIT, ("classifier", "head")],
    "vit_mae": VIT,
    "deit": [*VIT, *DISTILLED, ("cls_classifier", "head"), ("classifier", "head")],
    "dinov2": [*DINOV2, *GATED_DINOV2],
    "dinov2_with_registers": [*DINOV2, *GATED_DINOV2],
    "dinov3_vit": DINOV3,
}
EPS = {"vit": 1e-12, "vit_mae": 1e-12, "deit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
SHOWN_TWICE = {  # by config.json and by the tensors: (theirs, ours)
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "num_register_tokens": "registers",
}
RESAMPLE = {"bilinear": 2, "bicubic": 3}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def read(contents: Contents) -> Weights | None:
    prefix = prefix_of(contents, CLS_TOKEN)
    if prefix is None:
        return None
    base = next((f"{kind}." for kind in TABLES if f".{prefix}".endswith(f".{kind}.")), "")
    outer = prefix.removesuffix(base)  # of a module of one's own
    beside = tuple(outer + head for head in BESIDE if base)
    moved = {prefix + n.removeprefix(outer) if n.startswith(beside) else n: t for n, t in contents.tensors.items()}
    named, left = strip(contents._replace(tensors=moved), prefix)
    about = contents.beside(CONFIG)
    about = about if "model_type" in about else {}
    kind = str(about.get("model_type") or model_type_of(named))
    if kind not in TABLES:
        raise UserError(f"transformers' model type {kind}; vitlit reads {' '.join(TABLES)}")
    origins: dict[str, str] = {}
    unused = left + [n for n in contents.tensors if n.removeprefix(prefix).removeprefix(outer).startswith(UNUSED)]
    state = {n: t for n, t in named.items() if not n.startswith(UNUSED) and t.numel()}  # DINOv3 may have 0 registers
    state = translate(state, [*TABLES[kind], *IN_MEMORY])
    if kind == "dinov3_vit":  # its keys have no bias
        biases = {n.replace(".q.", ".k."): torch.zeros_like(t) for n, t in state.items() if n.endswith("attn.q.bias")}
        state = biases | state
    state = fuse(state, QKV, "attn.qkv")
    if "blocks.0.mlp.gate.weight" in state:
        state = fuse(state, GATED, "mlp.fc1")
    state = {name.replace(".mlp.up.", ".mlp.fc1."): tensor for name, tensor in state.items()}
    head = state.get("head.weight")
    width = state["norm.weight"].shape[0]
    if kind.startswith("dinov2") and head is not None and not head[:, width:].any():
        state["head.weight"] = head[:, :width]  # which reads the class token alone
    elif kind.startswith("dinov2") and head is not None and head.shape[-1] == 2 * width:
        unused += [name for name in contents.tensors if name.startswith(f"{outer}classifier.")]
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        origins["head"] = "left out: it reads the class token and the patches' mean"
    if "dist_token" in state and "head_dist.weight" not in state:
        # DeiTModel and DeiTForImageClassification ignore the token's output: it is a register.
        origins["distilled"] = f"a register, whose output transformers' {kind} without its second head leaves alone"
        table = state["pos_embed"]
        state["reg_token"] = state.pop("dist_token") + table[:, 1:2]
        state["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    position = "rope" if kind == "dinov3_vit" else "learned"
    config = {"mlp": "gelu", **architecture(state, position, class_position=True), "norm_eps": EPS[kind]}
    if kind == "dinov2":
        config["resampling"] = "offset"
    stated = stated_by(about, config) if about else {}
    config |= stated
    origins |= dict.fromkeys(stated.keys() & {"norm_eps", "heads"}, CONFIG)
    guessed = [name for name in ("norm_eps", "mlp") if name not in stated and config[name] != "swiglu"]
    origins |= {name: f"{config[name]} (transformers' default for {kind}); {NOT_SAID}" for name in guessed}
    labels = about.get("id2label") or {}
    classes = [str(labels[str(i)]) for i in range(len(labels)) if str(i) in labels]
    if len(classes) != config["num_classes"] or classes == [f"LABEL_{i}" for i in range(len(classes))]:
        classes = []
    processor = contents.beside(PREPROCESSOR)
    preprocess, origins["preprocess"] = preprocessing(processor, kind)
    known = frozenset({"class_position", *stated, *(["preprocess"] if "image_mean" in processor else [])})
    return Weights(contents.path, f"hf {kind}", state, config, classes, preprocess, unused, known, origins)


def model_type_of(named: dict[str, Tensor]) -> str:
    """The model type of a file without a config.json."""
    if "embeddings.patch_embeddings.weight" in named:
        return "dinov3_vit"
    if "encoder.layer.0.layer_scale1.lambda1" in named:
        return "dinov2_with_registers" if "embeddings.register_tokens" in named else "dinov2"
    if "embeddings.distillation_token" in named:
        return "deit"
    return "vit_mae" if any(name.startswith("decoder.") for name in named) else "vit"


def stated_by(about: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The options that config.json states; UserError if the tensors contradict it or vitlit does not have them."""
    stated: dict[str, Any] = {}
    activation = about.get("hidden_act", "gelu")
    if config["mlp"] != "swiglu":
        if activation not in ACTIVATIONS:
            raise UserError(f"{CONFIG} has hidden_act {activation}; vitlit has {' '.join(ACTIVATIONS)}")
        stated["mlp"] = ACTIVATIONS[activation]
    elif about.get("model_type") == "dinov3_vit" and activation not in ("silu", "swish"):
        raise UserError(f"{CONFIG} has hidden_act {activation} in a gated MLP; vitlit supports only silu")
    if about.get("rope_theta", 100.0) != 100.0:
        raise UserError(f"{CONFIG} has rope_theta {about['rope_theta']}; vitlit has 100")
    if "layer_norm_eps" in about:
        stated["norm_eps"] = float(about["layer_norm_eps"])
    if "num_attention_heads" in about:
        stated["heads"] = int(about["num_attention_heads"])
    for theirs, ours in SHOWN_TWICE.items():
        if theirs in about and about[theirs] != config[ours]:
            raise UserError(f"{ours} {config[ours]}, but {CONFIG} beside it has {theirs} {about[theirs]}")
    size = about.get("image_size")
    if isinstance(size, int | list):
        stated["image_size"] = size
        if isinstance(size, list) and size[0] != size[1] and about["model_type"].startswith("dinov2"):
            raise UserError(f"{CONFIG} has image_size {size}; transformers' DINOv2 takes every table as a square")
    return stated


def preprocessing(about: dict[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """Preprocessing from preprocessor_config.json, else that of the model type, and where it comes from."""
    known = {**(HALF if kind == "vit" else IMAGENET)}
    if kind in ("vit", "dinov3_vit"):
        known |= {"interpolation": "bilinear", "crop_ratio": 1.0, "squash": True}
    if "image_mean" not in about:
        return known, f"transformers' defaults for {kind}; {NOT_SAID}"
    for name, only in (("do_rescale", True), ("do_normalize", True), ("rescale_factor", 1 / 255)):
        if abs(about.get(name, only) - only) > 1e-6:
            raise UserError(f"{PREPROCESSOR} has {name} {about[name]}; vitlit scales by 1 / 255 and normalises")
    resample = about.get("resample", RESAMPLE[known["interpolation"]])
    if resample not in RESAMPLE.values():
        raise UserError(f"{PREPROCESSOR} has resample {resample}; vitlit has 2 (bilinear) and 3 (bicubic)")
    known |= {"mean": tuple(about["image_mean"]), "std": tuple(about["image_std"]), "crop_ratio": 1.0}
    known["interpolation"] = "bilinear" if resample == 2 else "bicubic"
    crop, size = about.get("crop_size"), about.get("size")
    # One number is the shortest edge for some processors, and both sides for ViT's and DeiT's.
    known["squash"] = "height" in size if isinstance(size, dict) else kind in ("vit", "deit")
    if about.get("do_center_crop") and crop and size:
        sides = [x if isinstance(x, int) else x.get("shortest_edge") or x.get("height") for x in (crop, size)]
        known["crop_ratio"] = min(1.0, sides[0] / sides[1])
    return known, PREPROCESSOR


def type_of(config: ViTConfig) -> tuple[str, str]:
    """The model type and the class in transformers of a network."""
    task = "ForImageClassification" if config.num_classes else "Model"
    if config.position == "rope":
        return "dinov3_vit", "DINOv3ViTModel"
    if config.registers:
        return "dinov2_with_registers", f"Dinov2WithRegisters{task}"
    if config.layer_scale is not None or config.mlp == "swiglu":
        return "dinov2", f"Dinov2{task}"
    if config.distilled:
        return "deit", "DeiTForImageClassificationWithTeacher"
    return "vit", f"ViT{task}"


def write(vit: ViT) -> dict[str, Tensor]:
    config, (kind, name) = vit.config, type_of(vit.config)
    state, table = split(tensors(vit), "attn.qkv", QKV), TABLES[kind]
    if kind in ("vit", "deit"):
        options = {**PLAIN, "distilled": config.distilled, "hidden_dim": None, "mlp": ("gelu", "gelu_tanh")}
        require(vit, f"transformers' {name}", **options)
        if config.distilled and not config.num_classes:
            raise UserError("transformers' DeiTModel has no mean of the class and the distillation token's features")
    else:
        free = ("position", "class_position", "registers", "layer_scale")
        options = {name: value for name, value in PLAIN.items() if name not in free}
        options |= {"mlp": ("gelu", "gelu_tanh", "swiglu"), "hidden_dim": None}
        if kind == "dinov3_vit":
            options["num_classes"] = 0
        if vit.grid[0] != vit.grid[1] and kind != "dinov3_vit":
            raise UserError(f"transformers' {name} takes the positions as a square, which {vit.grid} patches are not")
        require(vit, f"transformers' {name}", **options, position=("learned", "rope"))
        state = (to_dinov3 if kind == "dinov3_vit" else to_dinov2)(vit, state)
        if config.mlp == "swiglu" and kind != "dinov3_vit":
            table = [*GATED_DINOV2, *table]  # the first name wins
    state = translate(state, backwards(table))
    if config.num_classes:
        state = {n if "classifier" in n else f"{kind}.{n}": tensor for n, tensor in state.items()}
    return state


def to_dinov2(vit: ViT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add DINOv2's position of the class token, layer scales, mask token, and head over the class token and patches."""
    width, mlp_dim, swiglu = vit.width, vit.config.mlp_dim, vit.config.mlp == "swiglu"
    if mlp_dim != ((width * 4 * 2 // 3 + 7) // 8 * 8 if swiglu else mlp_dim // width * width):
        raise UserError(f"transformers' DINOv2 has no mlp_dim {mlp_dim} at width {width}")
    if not vit.positioned:
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    if "head.weight" in state:
        state["head.weight"] = F.pad(state["head.weight"], (0, width))
    ones = {f"blocks.{i}.ls{j}.gamma": torch.ones(width) for i in range(vit.config.depth) for j in (1, 2)}
    return {**ones, **state, "embeddings.mask_token": torch.zeros(1, width)}


def to_dinov3(vit: ViT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the bias of the keys, split a gated MLP, add registers, if only none, and a mask token."""
    if vit.config.layer_scale is None:
        raise UserError("transformers' DINOv3ViTModel has no layer_scale None")
    if any(tensor.any() for name, tensor in state.items() if name.endswith("attn.k.bias")):
        raise UserError("transformers' DINOv3ViTModel as published has no bias of the keys")
    state = {name: tensor for name, tensor in state.items() if not name.endswith("attn.k.bias")}
    state = split(state, "mlp.fc1", GATED if vit.config.mlp == "swiglu" else ["mlp.up"])
    no_registers, mask_token = torch.zeros(1, 0, vit.width), torch.zeros(1, 1, vit.width)
    return {"reg_token": no_registers, **state, "embeddings.mask_token": mask_token}


def config(vit: ViT) -> dict[str, Any]:
    config, (kind, name), swiglu = vit.config, type_of(vit.config), vit.config.mlp == "swiglu"
    about: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        **{theirs: value for theirs, ours in SHOWN_TWICE.items() if (value := getattr(config, ours))},
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "image_size": config.image_size,
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu_pytorch_tanh" if config.mlp == "gelu_tanh" else "gelu",
        "torch_dtype": "float32",
    }
    if kind.startswith("dinov2"):
        ratio = 4 if swiglu else config.mlp_dim // config.width
        about |= {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu, "use_mask_token": True}
    if kind == "dinov3_vit":
        about |= {"query_bias": config.qkv_bias, "key_bias": False, "value_bias": config.qkv_bias}
        about |= {"use_gated_mlp": swiglu, "rope_theta": 100.0} | ({"hidden_act": "silu"} if swiglu else {})
    if config.num_classes:
        labels = vit.classes or [f"LABEL_{i}" for i in range(config.num_classes)]
        about["id2label"] = {str(i): label for i, label in enumerate(labels)}
        about["label2id"] = {label: i for i, label in enumerate(labels)}
    return about


def processor(preprocess: Preprocess) -> dict[str, Any]:
    """The preprocessor_config.json of a preprocessing, as ViTImageProcessor reads it."""
    if preprocess.range:
        raise UserError("transformers' image processors read RGB of 8 bits, but the weights are of data.range")
    height, width = preprocess.image_size
    tall, broad = (math.floor(side / preprocess.crop_ratio + 1e-6) for side in (height, width))
    return {
        "image_processor_type": "BitImageProcessor",
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
        "size": {"height": tall, "width": broad} if preprocess.squash else {"shortest_edge": min(tall, broad)},
        "resample": RESAMPLE[preprocess.interpolation],
        "crop_size": {"height": height, "width": width},
        "rescale_factor": 1 / 255,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }

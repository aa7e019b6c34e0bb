"""torchvision's `VisionTransformer`."""

from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.checkpoint import EXPORTED, exported
from vitlit.weights.files import Contents
from vitlit.weights.names import Table, backwards, blocks, prefix_of, strip, translate
from vitlit.weights.weights import IMAGENET, PLAIN, Weights, architecture, require, tensors

LAYER = "encoder.layers.encoder_layer_{}"
TABLE: Table = [
    ("class_token", "cls_token"),
    ("conv_proj", "patch_embed.proj"),
    ("encoder.pos_embedding", "pos_embed"),
    *blocks(LAYER, *((f"self_attention.in_proj_{part}", f"attn.qkv.{part}") for part in ("weight", "bias"))),
    *blocks(LAYER, ("self_attention.out_proj", "attn.proj"), ("ln_1", "norm1"), ("ln_2", "norm2")),
    *blocks(LAYER, ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")),
    *blocks(LAYER, ("mlp.linear_1", "mlp.fc1"), ("mlp.linear_2", "mlp.fc2")),  # before torchvision 0.12
    ("encoder.ln", "norm"),
]
LINEAR: Table = [("heads.head", "head")]
TANH: Table = [("heads.pre_logits", "head.pre_logits"), ("heads.head", "head.out")]


def read(contents: Contents) -> Weights | None:
    prefix = prefix_of(contents, "conv_proj.weight")
    if prefix is None or f"{prefix}class_token" not in contents.tensors:
        return None
    named, unused = strip(contents, prefix)
    state = translate(named, [*TABLE, *(TANH if "heads.pre_logits.weight" in named else LINEAR)])
    options, classes, known = exported(contents)
    config = {**architecture(state, class_position=True), "mlp": "gelu", "norm_eps": 1e-6, **options}
    preprocess = known or {**IMAGENET, "interpolation": "bilinear"}
    told = [*options, *(["preprocess"] if known else [])]
    origins = {"preprocess": "torchvision's IMAGENET1K_V1 weights", **dict.fromkeys(told, EXPORTED)}
    stated = frozenset({"class_position", "mlp", "norm_eps", *told})
    return Weights(contents.path, "torchvision", state, config, classes, preprocess, unused, frozenset(stated), origins)


def write(vit: ViT) -> dict[str, Tensor]:
    model = "torchvision's VisionTransformer"
    require(vit, model, **PLAIN, mlp="gelu", norm_eps=1e-6, qkv_bias=True, in_channels=3)
    if vit.grid[0] != vit.grid[1]:
        raise UserError(f"{model} takes only square images")
    return translate(tensors(vit), backwards([*TABLE, *(TANH if vit.config.hidden_dim else LINEAR)]))

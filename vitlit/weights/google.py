"""Google's `.npz` files: google-research/vision_transformer's layout, and big_vision's."""

import re

from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.files import Contents
from vitlit.weights.names import Table, backwards, blocks, fuse, split, strip, translate
from vitlit.weights.weights import HALF, PLAIN, Weights, architecture, require, tensors

QKV, KV = ("attn.q", "attn.k", "attn.v"), ("k", "v")
BLOCK = "Transformer.encoderblock_{}"
PREFIXES = ("opt/target/", "params/img/", "params/", "img/", "")
UNUSED = r"(opt|params)/.*|step|chrono.*|extra.*|states.*|t|b|txt/.*"  # optimizer, counters, text tower
PER_HEAD = re.compile(r"(attn|pool)\.[qkv]\.(weight|bias)")
MERGING = re.compile(r"(attn|pool)\.proj\.weight")


def table(big_vision: bool, tanh_head: bool) -> Table:
    """(theirs, ours), with dots for slashes, and weight for kernel and scale."""
    attention, norm2, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    parts = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj"))
    pool = "MAPHead_0."
    return [
        ("embedding", "patch_embed.proj"),
        ("cls", "cls_token"),
        ("pos_embedding" if big_vision else "Transformer.posembed_input.pos_embedding", "pos_embed"),
        *blocks(BLOCK, *((f"MultiHeadDotProductAttention_{attention}.{t}", f"attn.{o}") for t, o in parts)),
        *blocks(BLOCK, ("LayerNorm_0", "norm1"), (f"LayerNorm_{norm2}", "norm2")),
        *blocks(BLOCK, *((f"MlpBlock_{mlp}.Dense_{i}", f"mlp.fc{i + 1}") for i in (0, 1))),
        ("Transformer.encoder_norm", "norm"),
        (f"{pool}probe", "attn_pool.latent"),
        *((f"{pool}MultiHeadDotProductAttention_0.{theirs}", f"attn_pool.{ours}") for theirs, ours in parts),
        (f"{pool}LayerNorm_0", "attn_pool.norm"),
        *((f"{pool}MlpBlock_0.Dense_{i}", f"attn_pool.mlp.fc{i + 1}") for i in (0, 1)),
        ("pre_logits", "head.pre_logits"),
        ("head", "head.out" if tanh_head else "head"),
    ]


def read(contents: Contents) -> Weights | None:
    prefix = next((p for p in PREFIXES if f"{p}embedding/kernel" in contents.tensors), None)
    if contents.kind != "npz" or prefix is None:
        return None
    named, unused = strip(contents, prefix, UNUSED)
    named = {re.sub("(kernel|scale)$", "weight", n).replace("/", "."): t for n, t in unstacked(named).items()}
    big_vision = "Transformer.encoderblock_0.MultiHeadDotProductAttention_0.query.weight" in named
    state = translate(named, table(big_vision, "pre_logits.weight" in named))
    heads = state["blocks.0.attn.q.weight"].shape[1]
    state = {name: from_jax(name, t.float() if t.is_floating_point() else t) for name, t in state.items()}
    state = fuse(fuse(state, QKV, "attn.qkv"), KV, "kv")
    learned = "pos_embed" in state or not big_vision
    config = architecture(state, "learned" if learned else "sincos2d")
    config |= {"mlp": "gelu_tanh", "norm_eps": 1e-6, "heads": heads, "resampling": "bilinear"}
    origins = {"mlp": "JAX's default", "preprocess": "AugReg and SigLIP"}
    if not learned:
        origins["position"] = "big_vision, if a file has no table"
    known = frozenset({"heads", "mlp", "norm_eps"})
    return Weights(contents.path, "google", state, config, [], HALF, unused, known, origins)


def unstacked(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split what big_vision scans over, one array for all blocks with the block's number first."""
    apart: dict[str, Tensor] = {}
    for name, tensor in named.items():
        start, scanned, rest = name.partition("Transformer/encoderblock/")
        if scanned and not start:
            apart |= {f"Transformer/encoderblock_{i}/{rest}": block for i, block in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def from_jax(name: str, tensor: Tensor) -> Tensor:
    """JAX's (..., in, out) as (out, in, ...), with heads and their channels as one axis."""
    if PER_HEAD.search(name):
        tensor = tensor.flatten(-2)
    elif MERGING.search(name) and tensor.ndim == 3:
        tensor = tensor.flatten(0, 1)
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.T if tensor.ndim == 2 and name.endswith("weight") else tensor


def to_jax(name: str, tensor: Tensor, heads: int) -> Tensor:
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    if tensor.ndim == 2:
        tensor = tensor.T
    if PER_HEAD.search(name):
        return tensor.unflatten(-1, (heads, -1))
    return tensor.unflatten(0, (heads, -1)) if MERGING.search(name) else tensor


def write(vit: ViT) -> dict[str, Tensor]:
    """The arrays of a ViT, in vision_transformer's layout if that has the network, else big_vision's; or UserError."""
    config = vit.config
    free = {"pool": config.pool, "position": ("learned", "sincos2d"), "class_position": config.class_position}
    require(vit, "Google's ViT", **{**PLAIN, **free}, class_token=config.pool == "cls", qkv_bias=True, norm_eps=1e-6)
    if config.mlp != "gelu_tanh":
        raise UserError(f"Google's ViT computes gelu_tanh, not mlp {config.mlp}: train with --model.vit.mlp gelu_tanh")
    if vit.grid[0] != vit.grid[1] and config.position == "learned":
        raise UserError("Google's ViT takes only square images")
    big_vision = config.pool != "cls" or config.position != "learned" or not config.class_position
    state = split(split(tensors(vit), "attn.qkv", QKV), "kv", KV)
    state = {name: to_jax(name, tensor.float(), config.heads) for name, tensor in state.items()}
    arrays = {}
    for name, tensor in translate(state, backwards(table(big_vision, bool(config.hidden_dim)))).items():
        name = re.sub("weight$", "scale" if tensor.ndim == 1 else "kernel", name).replace(".", "/")
        arrays[("params/" if big_vision else "") + name] = tensor
    return arrays

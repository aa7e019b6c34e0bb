"""Google's `.npz` files: google-research/vision_transformer's layout, and big_vision's."""

import re
from pathlib import Path

import numpy as np
from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.files import Contents
from vitlit.weights.names import Table, fuse, split, translate
from vitlit.weights.weights import HALF, Weights, architecture, require, tensors

QKV, KV = ("attn.q", "attn.k", "attn.v"), ("k", "v")
PREFIXES = ("opt/target/", "params/img/", "params/", "img/", "")
UNUSED = re.compile(r"(opt|params)/.*|step|chrono.*|extra.*|states.*|t|b|txt/.*")  # optimizer, counters, text tower


def table(big_vision: bool, tanh_head: bool) -> Table:
    """(theirs, ours), their slashes as dots and their kernel and scale as weight."""
    block = "Transformer.encoderblock_{}."
    attention, norm2, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    parts = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj"))
    pool = "MAPHead_0."
    return [
        ("embedding", "patch_embed.proj"),
        ("cls", "cls_token"),
        ("pos_embedding" if big_vision else "Transformer.posembed_input.pos_embedding", "pos_embed"),
        *((f"{block}MultiHeadDotProductAttention_{attention}.{t}", f"blocks.{{}}.attn.{o}") for t, o in parts),
        (f"{block}LayerNorm_0", "blocks.{}.norm1"),
        (f"{block}LayerNorm_{norm2}", "blocks.{}.norm2"),
        *((f"{block}MlpBlock_{mlp}.Dense_{i}", f"blocks.{{}}.mlp.fc{i + 1}") for i in (0, 1)),
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
    named = {n.removeprefix(prefix): t for n, t in contents.tensors.items() if n.startswith(prefix)}
    unused = [n for n in contents.tensors if not n.startswith(prefix)]
    unused += [prefix + n for n in named if UNUSED.fullmatch(n)]
    if prefix:
        strange = [n for n in unused if not UNUSED.fullmatch(n) and not UNUSED.fullmatch(n.removeprefix(prefix))]
        if strange:
            raise UserError(
                f"{contents.path} holds {strange[0]} {list(contents.tensors[strange[0]].shape)} beside a ViT"
            )
    named = unstacked({n: t.float() for n, t in named.items() if not UNUSED.fullmatch(n) and t.is_floating_point()})
    big_vision = any("MultiHeadDotProductAttention_0/" in name and "encoderblock" in name for name in named)
    dotted = {re.sub("(kernel|scale)$", "weight", name).replace("/", "."): t for name, t in named.items()}
    state, others = translate(dotted, table(big_vision, "pre_logits.weight" in dotted))
    state |= {name: dotted[name] for name in others}
    heads = heads_of(state, contents.path)
    state = {name: turned(name, tensor) for name, tensor in state.items()}
    state = fuse(fuse(state, QKV, "attn.qkv", contents.path), KV, "kv", contents.path)
    learned = "pos_embed" in state or not big_vision
    config = {
        **architecture(state, contents.path, "learned" if learned else "sincos2d"),
        "mlp": "gelu_tanh",
        "norm_eps": 1e-6,
        "heads": heads,
    }
    origins = {"mlp": "JAX's default", "preprocess": "AugReg and SigLIP"}
    if not learned:
        origins["position"] = "big_vision's files without a table"
    preprocess = {**HALF, "crop_ratio": 0.875}
    return Weights(
        contents.path,
        "google",
        state,
        config,
        [],
        preprocess,
        unused,
        origins=origins,
        told=frozenset({"heads"}),
    )


def heads_of(state: dict[str, Tensor], path: Path) -> int:
    """The number of heads, in which every projection must agree; UserError where one does not."""
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if re.search(r"(attn|pool)\.[qkv]\.", name)}
    first = shapes.get("blocks.0.attn.q.weight", [])
    if len(first) != 3:
        raise UserError(f"{path} is no whole ViT: query/kernel of the first block is {first} in the file, not 3-D")
    for name, shape in shapes.items():
        wanted = first if name.endswith("weight") else first[1:]
        if shape != wanted:
            raise UserError(f"{path}: {name} is {shape} in the file, and {wanted} by the first block's query")
    return first[1]


def unstacked(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that big_vision scans over are one array with the block's number first: apart."""
    stacked = "Transformer/encoderblock/"
    apart = {name: tensor for name, tensor in named.items() if not name.startswith(stacked)}
    for name, tensor in named.items():
        if name.startswith(stacked):
            rest = name.removeprefix(stacked)
            apart |= {f"Transformer/encoderblock_{i}/{rest}": layer for i, layer in enumerate(tensor)}
    return apart


def turned(name: str, tensor: Tensor) -> Tensor:
    """An array of JAX's in torch's order: (..., in, out) -> (out, in), heads and their channels as one."""
    if tensor.ndim == 2 and re.search(r"(attn|pool)\.[qkv]\.bias$", name):
        return tensor.flatten()
    if not name.endswith("weight"):
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    if tensor.ndim == 3:  # (D, heads, channels), or (heads, channels, D) on the way out
        return (tensor.flatten(0, 1) if name.endswith("proj.weight") else tensor.flatten(1)).T
    return tensor.T if tensor.ndim == 2 else tensor


def write(vit: ViT, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ViT, in vision_transformer's layout where it has one for it, else in big_vision's.

    Raises:
        UserError: neither has such a network.
    """
    config = vit.config
    wanted = {"layer_scale": None, "qk_norm": False, "registers": 0, "distilled": False, "final_norm": True}
    require(vit, path, "Google's ViT", **wanted, norm="tokens", qkv_bias=True, norm_eps=1e-6)
    require(vit, path, "Google's ViT", position=("learned", "sincos2d"))
    if config.mlp != "gelu_tanh":
        raise UserError(
            f"{path} was not written: Google's ViT computes gelu_tanh, and this one has mlp {config.mlp}; its "
            "readers would get other numbers. Train with --model.vit.mlp gelu_tanh, or write another format"
        )
    require(vit, path, "Google's ViT", class_token=config.pool == "cls")
    if vit.grid[0] != vit.grid[1] and config.position == "learned":
        raise UserError(f"{path} was not written: Google's ViT takes square images alone")
    big_vision = config.pool != "cls" or config.position != "learned" or not config.class_position
    state = split(split(tensors(vit), "attn.qkv", QKV), "kv", KV)
    names = [(ours, theirs) for theirs, ours in table(big_vision, bool(config.hidden_dim))]
    renamed, others = translate(state, names)
    assert not others, others
    arrays = {}
    for name, tensor in renamed.items():
        array = tensor.detach().float().cpu()
        kind = "scale" if "Norm_" in name or "encoder_norm" in name else "kernel"
        name = re.sub("weight$", kind, name).replace(".", "/")
        arrays[("params/" if big_vision else "") + name] = returned(name, array, config.heads).contiguous().numpy()
    return arrays


def returned(name: str, tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `turned`."""
    attention = re.search(r"Attention_\d/(query|key|value|out)/(kernel|bias)$", name)
    if attention and attention[1] != "out":
        if attention[2] == "bias":
            return tensor.unflatten(0, (heads, -1))
        return tensor.T.unflatten(1, (heads, -1))
    if attention and attention[2] == "kernel":
        return tensor.T.unflatten(0, (heads, -1))
    if name.endswith("kernel"):
        return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor


def save(arrays: dict[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]

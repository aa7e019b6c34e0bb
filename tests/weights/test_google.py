"""Weights of Google, in and out, as timm reads and writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import assert_same, images_of, shaken, timm_model, vit_of
from torch import Tensor, nn

import vitlit
from vitlit.model import ViT


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


TANH: dict[str, Any] = {"act_layer": "gelu_tanh"}
MAP: dict[str, Any] = {"class_token": False, "global_pool": "map"}
GAP: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def arrays(model: Any, big_vision: bool, scanned: bool = False) -> dict[str, np.ndarray]:
    """A timm model's parameters as JAX has them: (in, out), with the heads apart."""

    def linear(name: str, layer: Any) -> None:
        found[f"{name}/kernel"], found[f"{name}/bias"] = layer.weight.T, layer.bias

    def norm(name: str, layer: Any) -> None:
        found[f"{name}/scale"], found[f"{name}/bias"] = layer.weight, layer.bias

    def attention(name: str, heads: int, out: Any, *layers: tuple[Tensor, Tensor]) -> None:
        for part, (weight, bias) in zip(("query", "key", "value"), layers, strict=True):
            found[f"{name}/{part}/kernel"] = weight.T.reshape(weight.shape[1], heads, -1)
            found[f"{name}/{part}/bias"] = bias.reshape(heads, -1)
        found[f"{name}/out/kernel"] = out.weight.T.reshape(heads, -1, out.weight.shape[0])
        found[f"{name}/out/bias"] = out.bias

    found: dict[str, Tensor] = {}
    where, second, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    for i, block in enumerate(model.blocks):
        name, heads = f"Transformer/encoderblock_{i}", block.attn.num_heads
        norm(f"{name}/LayerNorm_0", block.norm1)
        parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        attention(f"{name}/MultiHeadDotProductAttention_{where}", heads, block.attn.proj, *parts)
        norm(f"{name}/LayerNorm_{second}", block.norm2)
        linear(f"{name}/MlpBlock_{mlp}/Dense_0", block.mlp.fc1)
        linear(f"{name}/MlpBlock_{mlp}/Dense_1", block.mlp.fc2)
    if scanned:
        first, depth = "Transformer/encoderblock_0/", len(model.blocks)
        stacks = {
            name.replace("_0/", "/", 1): torch.stack([found[name.replace("_0/", f"_{i}/", 1)] for i in range(depth)])
            for name in found
            if name.startswith(first)
        }
        found.clear()
        found |= stacks
    found["embedding/kernel"] = model.patch_embed.proj.weight.permute(2, 3, 1, 0)
    found["embedding/bias"] = model.patch_embed.proj.bias
    if model.cls_token is not None:
        found["cls"] = model.cls_token
    if model.pos_embed is not None:
        found["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = model.pos_embed
    norm("Transformer/encoder_norm", model.norm)
    if model.attn_pool is not None:
        pool, name = model.attn_pool, "MAPHead_0"
        found[f"{name}/probe"] = pool.latent
        parts = zip(pool.kv.weight.chunk(2), pool.kv.bias.chunk(2), strict=True)
        query = (pool.q.weight, pool.q.bias)
        attention(f"{name}/MultiHeadDotProductAttention_0", pool.num_heads, pool.proj, query, *parts)
        norm(f"{name}/LayerNorm_0", pool.norm)
        linear(f"{name}/MlpBlock_0/Dense_0", pool.mlp.fc1)
        linear(f"{name}/MlpBlock_0/Dense_1", pool.mlp.fc2)
    if isinstance(model.head, nn.Linear):
        linear("head", model.head)
    return {name: tensor.detach().contiguous().numpy() for name, tensor in found.items()}


def prefixed(prefix: str, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in named.items()}


def save_npz(path: Path, named: dict[str, Any]) -> Path:
    np.savez(path, **named)
    return path


TEXT = {"params/txt/head/kernel": np.ones((4, 4)), "params/t": np.ones(1), "params/b": np.ones(1)}
OPTIMIZER = {"opt/state/step": np.ones((), np.int64), "opt/state/param_states/cls/momentum": np.ones((1, 1, 192))}


@pytest.mark.parametrize(
    ("big_vision", "scanned", "prefix", "beside", "options"),
    [
        (False, False, "", {}, {}),
        (False, False, "opt/target/", OPTIMIZER, {}),
        (True, False, "params/", {}, {}),
        (True, False, "", {}, {"no_embed_class": True}),
        (True, True, "params/", {}, GAP),
        (True, False, "params/img/", TEXT, MAP),
        (True, True, "params/img/", TEXT, MAP),
    ],
)
def test_google_as_timm_reads_it(
    big_vision: bool, scanned: bool, prefix: str, beside: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    peer = {**TANH, **options}
    named = prefixed(prefix, arrays(shaken(timm_model("vit_tiny_patch16_224", **peer)), big_vision, scanned))
    file, images = save_npz(tmp_path / "theirs.npz", {**named, **beside}), images_of(64)
    theirs: Any = timm_model("vit_tiny_patch16_224", **peer)
    theirs.load_pretrained(str(file))
    vit = vitlit.load(file)
    assert_same(vit(images), theirs(images))
    report = vitlit.load_weights(ViT(**vit.config.plain()), file)
    assert report.format == "google"
    assert {*report.unexpected} == {*beside}


def test_bfloat16_of_jax_is_read(tmp_path: Path) -> None:
    named = arrays(shaken(timm_model("vit_tiny_patch16_224", **TANH)), True)
    halves = {name: torch.from_numpy(array).bfloat16() for name, array in named.items()}
    save_npz(tmp_path / "single.npz", {f"params/{name}": half.float().numpy() for name, half in halves.items()})
    stored = {f"params/{name}": half.view(torch.int16).numpy().view("V2") for name, half in halves.items()}
    save_npz(tmp_path / "half.npz", stored)
    theirs: Any = timm_model("vit_tiny_patch16_224", **TANH)
    theirs.load_pretrained(str(tmp_path / "single.npz"))
    images = images_of(64)
    assert_same(vitlit.load(tmp_path / "half.npz")(images), theirs(images))


def test_google_without_a_table_has_sines_and_cosines(tmp_path: Path) -> None:
    y, x = np.mgrid[:4, :4]  # big_vision's models/vit.py, posemb_sincos_2d
    omega = 1.0 / (10_000.0 ** (np.arange(48) / 47))
    y, x = (np.einsum("m,d->md", axis.flatten(), omega) for axis in (y, x))
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype(np.float32)
    theirs: Any = shaken(timm_model("vit_tiny_patch16_224", **TANH, **GAP))
    named = prefixed("params/", arrays(theirs, True))
    theirs.load_pretrained(str(save_npz(tmp_path / "timm.npz", {**named, "params/pos_embedding": table})))
    del named["params/pos_embedding"]
    vit, images = vitlit.load(save_npz(tmp_path / "theirs.npz", named)), images_of(64)
    assert vit.config.position == "sincos2d"
    assert_same(vit(images), theirs(images))

    written = np.load(vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.npz", "google"))
    assert not any("pos" in name for name in written)
    assert_same(vitlit.load(tmp_path / "ours.npz")(images), vit(images))
    theirs.load_pretrained(str(save_npz(tmp_path / "back.npz", {**written, "params/pos_embedding": table})))
    assert_same(theirs(images), vit(images))
    learned = ViT(**{**vit.config.plain(), "position": "learned", "image_size": 64}).eval()
    vitlit.load_weights(learned, tmp_path / "theirs.npz")
    vitlit.load_weights(vit, tmp_path / "theirs.npz")
    assert_same(learned(images), vit(images))


def test_the_tanh_head_of_google_in_and_out(tmp_path: Path) -> None:
    theirs: Any = shaken(timm_model("vit_tiny_patch16_224", **TANH, num_classes=0))
    rng = np.random.default_rng(0)
    head = {"pre_logits/kernel": (192, 24), "pre_logits/bias": (24,), "head/kernel": (24, 10), "head/bias": (10,)}
    named = {name: rng.normal(size=shape).astype(np.float32) / 9 for name, shape in head.items()}
    file, images = save_npz(tmp_path / "theirs.npz", {**arrays(theirs, False), **named}), images_of(64)
    hidden = np.tanh(theirs(images).numpy() @ named["pre_logits/kernel"] + named["pre_logits/bias"])
    vit = vitlit.load(file)
    assert_same(vit(images), torch.from_numpy(hidden @ named["head/kernel"] + named["head/bias"]))
    written = np.load(vitlit.save_weights(vit, tmp_path / "ours.npz", "google"))
    assert {name: array.shape for name, array in written.items() if name in head} == head
    assert all(np.array_equal(written[name], named[name]) for name in head)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"image_size": 32, "patch_size": 8, "in_channels": 3, "num_classes": 0}, {"num_classes": 0}),
        ({"class_position": False}, {"no_embed_class": True}),
        ({"pool": "gap", "class_position": False}, GAP),
        ({"pool": "map", "class_position": False}, MAP),
    ],
)
def test_timm_reads_the_npz_that_is_written(ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path) -> None:
    vit, images = vit_of(mlp="gelu_tanh", mlp_dim=768, resampling="bilinear", **ours), images_of(32)
    file = vitlit.save_weights(vit, tmp_path / "ours.npz", "google")
    model: Any = timm_model("vit_tiny_patch16_224", 32, patch_size=8, **TANH, **theirs)
    model.load_pretrained(str(file))
    assert_same(model(images), vit(images))
    assert vitlit.load(file).config == vit.config
    assert_same(vitlit.load(file)(images), vit(images))

"""The options of the ViT: published counts, parity with timm, the papers' formulas, and every combination."""

import math
import random
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import randomized
from test_vit import COUNTS, count, same_network
from timm.layers import AttentionPoolLatent, LayerNorm, RmsNorm, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitlit.errors import UserError
from vitlit.model import ViT, ViTConfig
from vitlit.model.init import init_weights

CHOICES = {name: get_args(kind) for name, kind in get_type_hints(ViTConfig).items() if get_origin(kind) is Literal}
TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 48}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


shaken = partial(randomized, scale=0.2)


def tiny(**options: Any) -> ViT:
    return shaken(ViT(**{**TINY, "num_classes": 5, **options}))


def images_for(vit: ViT, batch: int = 2) -> Tensor:
    """Random images of the network's own size."""
    return torch.randn(batch, vit.config.in_channels, *vit.config.sides)


GAP: dict[str, Any] = {"pool": "gap", "position": "sincos2d"}
DEIT3: dict[str, Any] = {"layer_scale": 1e-4, "class_position": False, "num_classes": 1000}
DINOV2: dict[str, Any] = {"image_size": 518, "layer_scale": 1e-5}
DINOV3: dict[str, Any] = {"position": "rope", "registers": 4, "layer_scale": 1e-5, "qkv_bias": False}
VARIANTS: list[tuple[str, dict[str, Any], int]] = [
    ("S/16", {**GAP, "num_classes": 1000}, 21_974_632),
    ("B/16", {**GAP, "num_classes": 1000}, 86_415_592),
    ("Ti/16", {"distilled": True, "num_classes": 1000}, 5_910_800),
    ("S/16", {"distilled": True, "num_classes": 1000}, 22_436_432),
    ("B/16", {"distilled": True, "num_classes": 1000}, 87_338_192),
    ("S/16", DEIT3, 22_059_496),
    ("M/16", DEIT3, 38_849_512),
    ("B/16", DEIT3, 86_585_320),
    ("L/16", DEIT3, 304_374_760),
    ("H/14", DEIT3, 632_126_440),
    ("S/14", DINOV2, 22_056_192),
    ("B/14", DINOV2, 86_579_712),
    ("L/14", DINOV2, 304_367_616),
    ("S/14", {**DINOV2, "registers": 4, "class_position": False}, 22_057_344),
    ("B/14", {**DINOV2, "registers": 4, "class_position": False}, 86_582_016),
    ("S/16", DINOV3, 21_586_944),
    ("B/16", DINOV3, 85_641_216),
    ("L/16", DINOV3, 303_079_424),
]


@pytest.mark.parametrize(("preset", "options", "parameters"), VARIANTS)
def test_published_counts_of_the_family(preset: str, options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        vit = ViT.from_preset(preset, **options)
    assert count(vit) == parameters


@pytest.mark.parametrize(("options", "parameters"), [(GAP, 22_122_472), ({}, 22_198_504)])
def test_counts_of_small_16_with_the_pretraining_head(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        vit = ViT.from_preset("S/16", **options)
        vit.set_head("pretrain", 1000)
    assert count(vit) == parameters


def test_counts_of_the_giants_that_are_no_preset() -> None:
    with torch.device("meta"):
        dinov2 = ViT(patch_size=14, width=1536, depth=40, heads=24, mlp_dim=4096, mlp="swiglu", **DINOV2)
        dinov3 = ViT(patch_size=16, width=4096, depth=40, heads=32, mlp_dim=8192, mlp="swiglu", **DINOV3)
    assert count(dinov2) == 1_136_479_232
    assert count(dinov3) == 6_716_030_976


@pytest.mark.parametrize(("preset", "parameters"), [("S/16", 21_596_544), ("B/16", 85_660_416), ("L/16", 303_129_600)])
def test_counts_of_dinov3_in_hugging_face(preset: str, parameters: int) -> None:
    """It has biases for queries and values but not for keys, and a mask token."""
    with torch.device("meta"):
        vit = ViT.from_preset(preset, **{**DINOV3, "qkv_bias": True})
    assert count(vit) - len(vit.blocks) * vit.width + vit.width == parameters


GMACS = {
    ("Ti/16", 224): 1.254,
    ("Ti/16", 384): 4.682,
    ("S/32", 224): 1.143,
    ("S/16", 224): 4.599,
    ("S/16", 384): 15.490,
    ("S/8", 224): 22.406,
    ("M/16", 224): 7.991,
    ("B/32", 224): 4.409,
    ("B/16", 224): 17.564,
    ("B/16", 384): 55.484,
    ("B/8", 224): 78.148,
    ("L/32", 224): 15.378,
    ("L/16", 224): 61.555,
    ("L/16", 384): 191.066,
    ("L/14", 224): 81.013,
    ("H/14", 224): 167.295,
    ("H/14", 518): 1016.717,
    ("g/14", 224): 267.031,
    ("So400m/14", 224): 109.928,
    ("G/14", 224): 483.748,
}


@pytest.mark.parametrize(("preset", "image_size"), [row[:2] for row in COUNTS])
def test_multiply_accumulates(preset: str, image_size: int) -> None:
    with torch.device("meta"):
        vit = ViT.from_preset(preset, image_size, num_classes=1000)
        images = torch.empty(1, 3, image_size, image_size)
    counter = FlopCounterMode(display=False)
    with counter:
        vit.heads(vit.features(images))  # of all tokens, as published
    n = (image_size // vit.patch_size) ** 2
    width, mlp_dim, tokens = vit.width, vit.config.mlp_dim, n + 1
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    expected = n * 3 * vit.patch_size**2 * width + len(vit.blocks) * block + width * 1000
    assert counter.get_total_flops() == 2 * expected
    assert round(expected / 1e9, 3) == GMACS[preset, image_size]


def timm_vit(kind: type[nn.Module] = VisionTransformer, **options: Any) -> Any:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    return shaken(kind(**{**shape, "num_classes": 5, **options}))


SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4}
TANH = partial(nn.GELU, approximate="tanh")
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gap over patches, norm after it": (
        {"pool": "gap", "class_token": True, "norm": "pooled"},
        {"global_pool": "avg"},
    ),
    "gap without a class token": (
        {"pool": "gap"},
        {"global_pool": "avg", "class_token": False, "fc_norm": False},
    ),
    "gap without a norm": (
        {"pool": "gap", "norm": "pooled", "final_norm": False},
        {"global_pool": "avg", "class_token": False, "final_norm": False},
    ),
    "class token, norm after the pool": ({"norm": "pooled"}, {"fc_norm": True}),
    "map": ({"pool": "map"}, {"global_pool": "map", "class_token": False}),
    "map beside a class token": (
        {"pool": "map", "class_token": True, "mlp": "gelu_tanh"},
        {"global_pool": "map", "act_layer": TANH},
    ),
    "LayerScale": ({"layer_scale": 0.1}, {"init_values": 0.1}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": True}),
    "no qkv bias": ({"qkv_bias": False}, {"qkv_bias": False}),
    "registers": ({"registers": 3, "class_position": False}, {"reg_tokens": 3, "no_embed_class": True}),
    "no class position": ({"class_position": False}, {"no_embed_class": True}),
    "no position": ({"position": "none"}, {"pos_embed": "none"}),
    "SwiGLU": ({"mlp": "swiglu"}, SWIGLU),
    "tanh GELU": ({"mlp": "gelu_tanh"}, {"act_layer": TANH}),
    "quick GELU": ({"mlp": "quick_gelu"}, {"act_layer": "quick_gelu"}),
    "CLIP": (
        {"pre_norm": True, "patch_bias": False, "norm_eps": 0.1},
        {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=0.1)},
    ),
    "AIMv2": (
        {
            "pool": "gap",
            "norm_kind": "rmsnorm",
            "norm_eps": 0.1,
            "patch_norm": True,
            "qk_norm": True,
            "qkv_bias": False,
            "proj_bias": False,
            "mlp": "swiglu",
        },
        {
            **SWIGLU,
            "global_pool": "avg",
            "class_token": False,
            "fc_norm": False,
            "qkv_bias": False,
            "qk_norm": True,
            "proj_bias": False,
            "norm_layer": partial(RmsNorm, eps=0.1),
            "embed_norm_layer": partial(RmsNorm, eps=0.1),
        },
    ),
    "BEiT-3": ({"sub_norm": True}, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "gap over all tokens": (
        {"pool": "gap", "class_token": True, "norm": "pooled", "pool_prefix": True},
        {"global_pool": "avg", "pool_include_prefix": True},
    ),
    "map over all tokens": (
        {"pool": "map", "class_token": True, "pool_prefix": True},
        {"global_pool": "map", "pool_include_prefix": True},
    ),
    "an image that the patches do not cover": (
        {"image_size": (35, 44), "partial_patches": "drop"},
        {"img_size": (35, 44)},
    ),
    "one channel": ({"in_channels": 1}, {"in_chans": 1}),
    "norm_eps": ({"norm_eps": 0.1, "qk_norm": True}, {"norm_layer": partial(LayerNorm, eps=0.1), "qk_norm": True}),
    "gap, registers, LayerScale, SwiGLU, qk_norm, two channels": (
        {
            "pool": "gap",
            "class_token": True,
            "norm": "pooled",
            "registers": 2,
            "class_position": False,
            "layer_scale": 0.3,
            "mlp": "swiglu",
            "qk_norm": True,
            "in_channels": 2,
        },
        {
            "global_pool": "avg",
            "reg_tokens": 2,
            "no_embed_class": True,
            "init_values": 0.3,
            "qk_norm": True,
            "in_chans": 2,
            **SWIGLU,
        },
    ),
    "map, registers, no qkv bias, LayerScale, wide": (
        {
            "pool": "map",
            "registers": 2,
            "class_position": False,
            "qkv_bias": False,
            "layer_scale": 0.3,
            "image_size": (16, 40),
        },
        {
            "global_pool": "map",
            "class_token": False,
            "reg_tokens": 2,
            "no_embed_class": True,
            "qkv_bias": False,
            "init_values": 0.3,
            "img_size": (16, 40),
        },
    ),
}
DISTILLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "distilled": ({}, {}),
    "distilled, LayerScale, tanh GELU, qk_norm": (
        {"layer_scale": 0.3, "mlp": "gelu_tanh", "qk_norm": True},
        {"init_values": 0.3, "act_layer": TANH, "qk_norm": True},
    ),
}


def equal(ours: ViT, theirs: Any) -> None:
    """Assert that two networks of the same parameter names are one function, whosever the parameters are."""
    images = images_for(ours, batch=3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(2):
        logits, features = theirs(images), theirs.forward_features(images)
        assert logits.std() > 0.1
        torch.testing.assert_close(ours(images), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.features(images), features, rtol=0, atol=1e-5)
        theirs.load_state_dict(shaken(ours).state_dict(), strict=True)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_options_equal_timm(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    equal(tiny(**ours), timm_vit(**theirs))


@pytest.mark.parametrize(("ours", "theirs"), DISTILLED.values(), ids=DISTILLED)
def test_distillation_equals_timm(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    equal(tiny(distilled=True, **ours), timm_vit(VisionTransformerDistilled, **theirs))


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        (VisionTransformer, {"pool": "gap"}, {"global_pool": "avg", "class_token": False, "fc_norm": False}),
        (VisionTransformer, *PAIRS["registers"]),
        (VisionTransformerDistilled, {"distilled": True}, {}),
    ],
)
def test_positions_of_any_prefix_resample_as_in_timm(
    kind: type[nn.Module], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    vit, reference = tiny(**ours), timm_vit(kind, dynamic_img_size=True, **theirs)
    vit.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 24, 56)
    torch.testing.assert_close(vit(images), reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [(32, 32), (48, 16), (16, 40)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"qkv_bias": False, "registers": 4}, {"qkv_bias": False, "num_reg_tokens": 4}),
        ({"qk_norm": True}, {"attn_type": "rope", "qk_norm": True}),
        ({"qkv_bias": False, "mlp": "swiglu", "layer_scale": 0.2}, {"qkv_bias": False, "swiglu_mlp": True}),
    ],
)
def test_rope_equals_timms_dinov3(ours: dict[str, Any], theirs: dict[str, Any], image_size: tuple[int, int]) -> None:
    rope: dict[str, Any] = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100.0}
    rope |= {"rope_rotate_half": True, "use_abs_pos_emb": False, "dynamic_img_size": True, "global_pool": "token"}
    layer_scale = ours.get("layer_scale")
    reference = timm_vit(Eva, **rope, **theirs, init_values=layer_scale)
    vit = tiny(position="rope", **ours)
    values = reference.state_dict()
    vit.load_state_dict(
        {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in values.items()}
    )
    images = torch.randn(2, 3, *image_size)
    assert reference(images).std() > 0.1
    torch.testing.assert_close(vit(images), reference(images), rtol=0, atol=1e-5)


def test_the_attention_pool_is_timms_beside_any_mlp() -> None:
    vit = tiny(pool="map", mlp="swiglu")
    pool = AttentionPoolLatent(24, num_heads=3, mlp_ratio=2, norm_layer=LayerNorm).eval()
    assert vit.attn_pool is not None
    pool.load_state_dict(vit.attn_pool.state_dict(), strict=True)
    tokens = torch.randn(3, 16, 24)
    torch.testing.assert_close(vit.pool(tokens), pool(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"distilled": True}, {"distilled": True, "registers": 2}])
def test_positions_of_the_prefix_can_be_folded_into_its_tokens(options: dict[str, Any]) -> None:
    """As big_vision does with older checkpoints."""
    vit, folded = tiny(**options), tiny(class_position=False, **options)
    values = vit.state_dict()
    tokens = [name for name in ("cls_token", "dist_token") if name in values]
    *positions, values["pos_embed"] = values["pos_embed"].split([1] * len(tokens) + [16], dim=1)
    values |= {name: values[name] + position for name, position in zip(tokens, positions, strict=True)}
    folded.load_state_dict(values, strict=True)
    images = torch.randn(2, 3, 24, 48)
    torch.testing.assert_close(folded(images), vit(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_token_is_the_same_normed_before_and_after_it_is_pooled(distilled: bool) -> None:
    before, after = tiny(distilled=distilled), tiny(distilled=distilled, norm="pooled")
    values = {f"fc_{name}" if name.startswith("norm.") else name: v for name, v in before.state_dict().items()}
    after.load_state_dict(values, strict=True)
    images = images_for(before)
    torch.testing.assert_close(after(images), before(images))


def test_fused_matrices_are_xavier_uniform_one_by_one() -> None:
    vit = ViT.from_preset("Ti/16", pool="map", mlp="swiglu")
    values = vit.state_dict()
    matrices = [(values["attn_pool.q.weight"], 192), (values["attn_pool.proj.weight"], 192)]
    matrices += [(matrix, 192) for matrix in values["attn_pool.kv.weight"].split(192)]
    matrices += [(matrix, 768) for matrix in values["blocks.0.mlp.fc1.weight"].split(768)]
    for matrix, fan_out in matrices:
        bound = math.sqrt(6 / (192 + fan_out))
        assert 0.99 * bound < matrix.abs().max() <= bound * (1 + 1e-6)
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_pools_query_begins_as_in_big_vision() -> None:
    """Its probe is flax's Xavier-uniform of shape (1, 1, D): fan_in 1, fan_out D."""
    vit = ViT(**{**TINY, "width": 480, "depth": 1}, pool="map")
    latent = vit.get_parameter("attn_pool.latent")
    bound = math.sqrt(6 / (1 + 480))
    assert 0.95 * bound < latent.abs().max() <= bound * (1 + 1e-6)


def test_layer_scale_begins_at_its_value() -> None:
    vit = ViT(**TINY, layer_scale=0.25)
    gammas = [value for name, value in vit.state_dict().items() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(torch.equal(gamma, torch.full((24,), 0.25)) for gamma in gammas)


ALONE: list[dict[str, Any]] = [
    {},
    {"pool": "gap"},
    {"pool": "map"},
    {"pool": "gap", "class_token": True},
    {"pool": "map", "class_token": True},
    {"position": "sincos2d"},
    {"position": "sincos2d_mae"},
    {"position": "rope"},
    {"position": "none"},
    {"class_position": False},
    {"distilled": True},
    {"distilled": True, "class_position": False},
    {"registers": 3},
    {"mlp": "gelu_tanh"},
    {"mlp": "swiglu"},
    {"layer_scale": 0.1},
    {"mlp": "quick_gelu"},
    {"qkv_bias": False},
    {"proj_bias": False},
    {"qk_norm": True},
    {"norm_kind": "rmsnorm"},
    {"patch_bias": False},
    {"patch_norm": True},
    {"pre_norm": True},
    {"sub_norm": True},
    {"sub_norm": True, "mlp": "swiglu"},
    {"pool": "map", "class_token": True, "pool_prefix": True},
    {"image_size": (35, 44), "partial_patches": "drop"},
    {"dropout": 0.1},
    {"attention_dropout": 0.1},
    {"drop_path": 0.1},
    {"norm_eps": 1e-5},
    {"norm": "pooled"},
    {"final_norm": False},
    {"resampling": "bicubic"},
    {"resampling": "offset"},
    {"resampling": "bilinear"},
    {"drop_path": 0.1, "drop_path_decay": "constant"},
    {"init": "timm"},
    {"float32_head": True},
    {"drop_path": 0.1, "drop_path_subset": True},
    {"patch_dropout": 0.2},
    {"activation_checkpointing": True},
    {"activation_checkpointing": 2},
    {"in_channels": 1},
    {"image_size": (16, 40)},
    {"hidden_dim": 7},
]


def combination(draw: random.Random) -> dict[str, Any]:
    """Options at random that do not contradict each other."""
    options: dict[str, Any] = {name: draw.choice(choices) for name, choices in CHOICES.items()}
    options["class_token"] = True if options["pool"] == "cls" else draw.choice([None, False, True])
    options["distilled"] = options["pool"] == "cls" and draw.random() < 0.4
    options |= {name: draw.random() < 0.5 for name in ("class_position", "qkv_bias", "qk_norm", "final_norm")}
    options |= {name: draw.random() < 0.5 for name in ("proj_bias", "patch_bias", "patch_norm", "pre_norm", "sub_norm")}
    options["pool_prefix"] = options["pool"] != "cls" and draw.random() < 0.5
    options["registers"] = draw.choice([0, 1, 4])
    options["layer_scale"] = draw.choice([None, 0.1])
    options["in_channels"] = draw.choice([1, 3, 5])
    options["image_size"] = draw.choice([32, (16, 40), (40, 8)])
    options["hidden_dim"] = draw.choice([None, 7])
    return options


COMBINATIONS = ALONE + [combination(random.Random(seed)) for seed in range(40)]
combined = pytest.mark.parametrize("options", COMBINATIONS, ids=[str(i) for i in range(len(COMBINATIONS))])


def test_the_combinations_hold_every_choice() -> None:
    for name, choices in CHOICES.items():
        assert {options.get(name) for options in COMBINATIONS} >= set(choices)


@combined
def test_config_of_any_options_builds_the_same_network(options: dict[str, Any]) -> None:
    same_network(tiny(**options))


@combined
def test_every_parameter_of_any_options_is_trained(options: dict[str, Any]) -> None:
    vit = tiny(**options).train()
    F.cross_entropy(vit(images_for(vit, batch=4)), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("k_norm.bias"):  # adds the same to every score of a query, unless rope turns it
            assert parameter.grad.abs().max() > 1e-7, name


@combined
def test_any_options_run_at_another_resolution(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    images = torch.randn(2, vit.config.in_channels, 24, 48)
    prefix = bool(vit.config.class_token) + vit.config.distilled + vit.config.registers
    features = vit.features(images)
    assert features.shape == (2, prefix + 18, 24)
    assert vit(images).shape == (2, 5)
    assert vit(images).isfinite().all()


@combined
def test_any_options_build_on_the_meta_device(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    with torch.device("meta"):
        again = ViT(**vit.config.plain()).eval()
    images = images_for(vit)
    assert again(images.to("meta")).shape == (2, 5)
    again.to_empty(device="cpu")
    init_weights(again)
    again.load_state_dict(vit.state_dict(), strict=True)
    assert torch.equal(again(images), vit(images))


@combined
def test_weights_of_any_options_load_strictly(options: dict[str, Any]) -> None:
    vit, again = tiny(**options), tiny(**options)
    images = torch.randn(2, vit.config.in_channels, 24, 48)
    assert not torch.equal(again(images), vit(images))
    again.load_state_dict(vit.state_dict(), strict=True)
    assert torch.equal(again(images), vit(images))


@combined
def test_any_options_run_in_other_precisions(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    images = torch.randn(2, vit.config.in_channels, 24, 48)
    expected = vit(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(vit(images).float(), expected, rtol=0.2, atol=0.3)
    torch.testing.assert_close(vit.double()(images.double()).float(), expected, rtol=0, atol=1e-4)
    assert vit.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "cls", "class_token": False}, "needs a class token"),
        ({"pool": "gap", "distilled": True}, "distillation token"),
        ({"pool": "map", "distilled": True}, "distillation token"),
        ({"pool": "gap", "class_token": True, "distilled": True}, "distillation token"),
        ({"position": "rope", "heads": 4}, "multiple of 4"),
        ({"position": "sincos2d", "width": 6}, "divisible by 4"),
        ({"position": "sincos2d_mae", "width": 6}, "divisible by 4"),
        ({"registers": -1}, "registers is -1"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"drop_path": -0.1}, "drop_path -0.1"),
        ({"patch_dropout": 1.0}, "patch_dropout 1.0"),
        ({"activation_checkpointing": -1}, "activation_checkpointing is -1"),
        *(
            ({name: "other"}, rf"{name} is 'other' .*{', '.join(map(repr, choices))}")
            for name, choices in CHOICES.items()
        ),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(**{**TINY, **options})


def test_the_class_token_is_there_where_it_is_pooled() -> None:
    assert [tiny(pool=pool).config.class_token for pool in ("cls", "gap", "map")] == [True, False, False]


COMPILED: list[dict[str, Any]] = [
    {},
    {"position": "rope", "registers": 2, "qk_norm": True, "mlp": "swiglu"},
    {"pool": "map", "position": "sincos2d", "mlp": "gelu_tanh"},
    {"pool": "gap", "position": "sincos2d_mae", "class_token": True, "norm": "pooled", "layer_scale": 0.1},
    {"distilled": True, "resampling": "offset"},
]


@pytest.mark.parametrize("options", COMPILED)
def test_compiles_in_one_graph(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    torch._dynamo.reset()
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    for size in ((32, 32), (24, 48)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images), vit(images), rtol=0, atol=1e-6)


def test_training_compiles_in_one_graph() -> None:
    vit = tiny(position="rope", dropout=0.1, drop_path=0.5, activation_checkpointing=True).train()
    torch._dynamo.reset()
    logits = torch.compile(vit, fullgraph=True, backend="eager")(images_for(vit))
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())


@pytest.mark.parametrize("options", COMPILED)
def test_exports_at_another_resolution(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    program = torch.export.export(vit, (torch.randn(2, 3, 24, 48),))
    images = torch.randn(2, 3, 24, 48)
    torch.testing.assert_close(program.module()(images), vit(images), rtol=0, atol=1e-6)


def step(vit: ViT, images: Tensor) -> list[Tensor]:
    """The loss and the gradients of a training step with dropout."""
    torch.manual_seed(1)
    loss = F.cross_entropy(vit.train()(images), torch.tensor([0, 1, 2, 3]))
    return [loss, *torch.autograd.grad(loss, list(vit.parameters()))]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_activation_checkpointing_changes_no_bit(position: str) -> None:
    options = {"dropout": 0.3, "attention_dropout": 0.2, "drop_path": 0.4, "position": position}
    plain, saving = tiny(**options), tiny(**options, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images = images_for(plain, batch=4)
    for gradient, expected in zip(step(saving, images), step(plain, images), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("saving", "calls"), [(False, 1), (True, 2)])
def test_activation_checkpointing_computes_every_block_twice(saving: bool, calls: int) -> None:
    vit = tiny(activation_checkpointing=saving)
    seen: list[nn.Module] = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda module, _: seen.append(module))
    step(vit, images_for(vit, batch=4))
    assert [seen.count(block) for block in vit.blocks] == [calls, calls]
    seen.clear()
    vit.eval()(images_for(vit)).sum().backward()
    assert [seen.count(block) for block in vit.blocks] == [1, 1]

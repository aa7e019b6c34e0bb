"""The Vision Transformer against published counts, timm and an independent implementation."""

import itertools
import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import timm
import torch
from conftest import randomized
from docstring_parser import parse_from_object
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import SIZES, ViT, ViTConfig

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}

# (preset, image size, parameters with 1000 classes, parameters without a head), checked against timm, torchvision and
# Hugging Face.
COUNTS = [
    ("Ti/16", 224, 5_717_416, 5_524_416),
    ("Ti/16", 384, 5_790_376, 5_597_376),
    ("S/32", 224, 22_878_952, 22_493_952),
    ("S/16", 224, 22_050_664, 21_665_664),
    ("S/16", 384, 22_196_584, 21_811_584),
    ("S/8", 224, 22_055_272, 21_670_272),
    ("M/16", 224, 38_837_736, 38_324_736),
    ("B/32", 224, 88_224_232, 87_455_232),
    ("B/16", 224, 86_567_656, 85_798_656),
    ("B/16", 384, 86_859_496, 86_090_496),
    ("B/8", 224, 86_576_872, 85_807_872),
    ("L/32", 224, 306_535_400, 305_510_400),
    ("L/16", 224, 304_326_632, 303_301_632),
    ("L/16", 384, 304_715_752, 303_690_752),
    ("L/14", 224, 304_203_752, 303_178_752),
    ("So400m/14", 224, 413_597_656, 412_444_656),
    ("H/14", 224, 632_045_800, 630_764_800),
    ("H/14", 518, 633_470_440, 632_189_440),
    ("g/14", 224, 1_012_611_432, 1_011_202_432),
    ("G/14", 224, 1_844_440_680, 1_842_775_680),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny(**options: Any) -> ViT:
    return randomized(ViT(**{**TINY, "num_classes": 5, **options}))


def count(vit: ViT) -> int:
    return sum(parameter.numel() for parameter in vit.parameters())


@pytest.mark.parametrize(("preset", "image_size", "with_head", "without_head"), COUNTS)
def test_parameter_counts(preset: str, image_size: int, with_head: int, without_head: int) -> None:
    with torch.device("meta"):
        vit = ViT.from_preset(preset, image_size, num_classes=1000)
        assert count(vit) == with_head
        vit.set_head("finetune", 0)
        assert count(vit) == without_head
        assert count(ViT.from_preset(preset, image_size)) == without_head


def test_every_preset_is_counted() -> None:
    assert {preset.split("/")[0] for preset, *_ in COUNTS} == set(SIZES)


def test_pretraining_head_count() -> None:
    with torch.device("meta"):
        vit = ViT.from_preset("S/16", num_classes=1000)
        vit.set_head("pretrain", 1000)
    assert count(vit) == 22_198_504


class ArticleBlock(nn.Module):
    """A pre-norm encoder block of PyTorch's own parts."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ArticleViT(nn.Module):
    """The network of the article this project began from: its encoder ends without a norm."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(ArticleBlock(width, heads, mlp_dim) for _ in range(depth)))
        self.classifier = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.repeat(x.shape[0], 1, 1), x], dim=1) + self.positions
        return self.classifier(self.blocks(x)[:, 0])


def from_article(name: str) -> str:
    """The vitlit name of an ArticleViT parameter."""
    for theirs, ours in (
        ("patches", "patch_embed.proj"),
        ("class_token", "cls_token"),
        ("positions", "pos_embed"),
        ("classifier", "head"),
        ("attention.in_proj_", "attn.qkv."),
        ("attention.out_proj", "attn.proj"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.2", "mlp.fc2"),
    ):
        name = name.replace(theirs, ours)
    return name


def test_equals_the_articles_network() -> None:
    article = randomized(ArticleViT(**TINY))
    vit = ViT(**TINY, num_classes=5, final_norm=False, norm_eps=1e-5).eval()
    vit.load_state_dict({from_article(name): value for name, value in article.state_dict().items()})
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    labels = torch.tensor([0, 3, 4])

    logits, expected = vit(images), article(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1

    theirs = torch.autograd.grad(F.cross_entropy(expected, labels), [images, *article.parameters()])
    ours = torch.autograd.grad(
        F.cross_entropy(logits, labels),
        [images, *(vit.get_parameter(from_article(name)) for name, _ in article.named_parameters())],
    )
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def timm_tiny(**options: Any) -> Any:
    return randomized(timm.create_model("vit_tiny_patch16_224", num_classes=10, **options))


@pytest.mark.parametrize("image_size", [64, (48, 80)])
def test_equals_timm(image_size: int | tuple[int, int]) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.randn(2, 3, height, width)
    theirs = timm_tiny(img_size=image_size)
    ours = ViT.from_preset("Ti/16", image_size, num_classes=10).eval()

    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.features(images), theirs.forward_features(images), rtol=0, atol=1e-5)
    between = theirs.forward_intermediates(images, [2, 11], return_prefix_tokens=True, norm=True, output_fmt="NLC")[1]
    for tokens, (patches, prefix) in zip(ours.features(images, layers=[2, -1]), between, strict=True):
        torch.testing.assert_close(tokens, torch.cat([prefix, patches], dim=1), rtol=0, atol=1e-5)

    theirs.load_state_dict(randomized(ours).state_dict(), strict=True)
    torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("height", [32, 64])
@pytest.mark.parametrize("width", [48, 96])
def test_other_resolutions_equal_timm(height: int, width: int) -> None:
    theirs = timm_tiny(img_size=64, dynamic_img_size=True)
    ours = ViT.from_preset("Ti/16", 64, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, height, width)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_forward_is_its_parts() -> None:
    vit = tiny()
    images = torch.randn(3, 3, 32, 32)
    tokens = vit.embed(images)
    assert tokens.shape == (3, 17, 24)
    assert vit.encode(tokens).shape == (3, 17, 24)
    assert vit.pool(vit.encode(tokens)).shape == (3, 24)
    assert torch.equal(vit.features(images), vit.encode(tokens))
    torch.testing.assert_close(vit(images), vit.head(vit.pool(vit.encode(tokens))))
    assert vit(images).shape == (3, 5)


def test_without_a_head_the_output_is_the_class_token() -> None:
    vit = tiny(num_classes=0)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(vit(images), vit.features(images)[:, 0])
    assert not [name for name in vit.state_dict() if name.startswith("head")]


def test_patch_order_matters_only_through_the_positions() -> None:
    vit = tiny()
    images = torch.randn(2, 3, 32, 32)
    order = torch.randperm(16)
    patches = F.unfold(images, 8, stride=8)
    shuffled = F.fold(patches[:, :, order], (32, 32), 8, stride=8)
    logits = vit(images)
    assert (vit(shuffled) - logits).abs().max() > 1e-2
    with torch.no_grad():
        positions = vit.get_parameter("pos_embed")
        positions.copy_(torch.cat([positions[:, :1], positions[:, 1:][:, order]], dim=1))
    torch.testing.assert_close(vit(shuffled), logits)


def test_images_of_a_batch_do_not_touch() -> None:
    vit = tiny()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(vit(images)[1:2], vit(images[1:2]))


def test_image_size_must_be_divisible() -> None:
    with pytest.raises(UserError, match="patch size 16 does not divide the image size 224 x 230"):
        ViT(image_size=(224, 230), patch_size=16)
    with pytest.raises(UserError, match="patch size 8 does not divide the image size 36 x 32"):
        tiny()(torch.randn(1, 3, 36, 32))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads 5 do not divide the width 24"):
        ViT(**{**TINY, "heads": 5})


@pytest.mark.parametrize("preset", ["B16", "B/", "/16", "b/16", "XL/16", "B/16/2", "B/x", "B/-16", "B/0", ""])
def test_wrong_preset(preset: str) -> None:
    with pytest.raises(UserError, match=f"preset '{preset}' is not SIZE/PATCH with SIZE one of Ti S M B L"):
        ViT.from_preset(preset)


def test_wrong_head() -> None:
    vit = tiny()
    for num_classes in (0, 6):
        with pytest.raises(UserError, match="head 'linear' is neither 'pretrain' nor 'finetune'"):
            vit.set_head("linear", num_classes)  # type: ignore[arg-type]
        same_network(vit)


def test_misspelt_option() -> None:
    with pytest.raises(TypeError, match="droput"):
        ViT.from_preset("Ti/16", droput=0.1)
    with pytest.raises(TypeError, match="droput"):
        ViT(droput=0.1)


def test_every_option_has_a_docstring_which_is_its_help() -> None:
    documented = {param.arg_name: param.description for param in parse_from_object(ViTConfig).params}
    assert list(documented) == [field.name for field in fields(ViTConfig)]
    assert all(documented.values())


def test_a_config_cannot_be_changed_but_replaced() -> None:
    vit = tiny()
    with pytest.raises(FrozenInstanceError):
        vit.config.depth = 3  # type: ignore[misc]
    with pytest.raises(UserError, match="depth is 0; give at least 1"):
        replace(vit.config, depth=0)
    assert ViT(**replace(vit.config, depth=3).plain()).config == ViTConfig(**TINY | {"depth": 3, "num_classes": 5})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"image_size": (32, 48), "in_channels": 1, "qkv_bias": False},
    {"num_classes": 0, "final_norm": False, "norm_eps": 1e-5},
    {"hidden_dim": 7, "dropout": 0.1, "attention_dropout": 0.2},
]


def same_network(vit: ViT) -> None:
    """Assert that a network of the config, which a JSON file may have held, is the same in every respect."""
    again = ViT(**json.loads(json.dumps(vit.config.plain()))).eval()
    assert again.config == vit.config
    assert str(again) == str(vit)
    again.load_state_dict(vit.state_dict())
    height, width = (vit.grid[0] * vit.patch_size, vit.grid[1] * vit.patch_size)
    images = torch.randn(2, vit.config.in_channels, height, width)
    assert torch.equal(again(images), vit(images))


@pytest.mark.parametrize("options", OPTIONS)
def test_config_builds_the_same_network(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    same_network(vit)


def test_config_follows_the_head() -> None:
    vit = tiny()
    vit.set_head("pretrain", 6)
    same_network(vit)
    vit.set_head("pretrain", 6, hidden_dim=11)
    same_network(vit)
    vit.set_head("finetune", 4)
    same_network(vit)
    vit.set_head("pretrain", 0)
    same_network(vit)


def test_norm_eps_reaches_every_norm() -> None:
    assert {norm.eps for norm in tiny().modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert [norm.eps for norm in tiny(norm_eps=0.1).modules() if isinstance(norm, nn.LayerNorm)] == [0.1] * 5


def test_dropout_acts_in_training_only() -> None:
    images = torch.randn(2, 3, 32, 32)
    reference = tiny()
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        vit = tiny(**options)
        vit.load_state_dict(reference.state_dict())
        assert torch.equal(vit(images), reference(images))
        vit.train()
        assert not torch.equal(vit(images), vit(images))
    reference.train()
    assert torch.equal(reference(images), reference(images))


def test_dropout_follows_the_positions_and_every_linear_layer_but_qkv() -> None:
    vit = tiny(dropout=0.25)
    calls: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, output: calls.append((name, output if name else inputs[0])))

    for name, module in vit.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            record("", module)
        elif isinstance(module, nn.Linear):
            record(name, module)
    images = torch.randn(2, 3, 32, 32)
    vit(images)

    names = [name for name, _ in calls]
    block = ["attn.qkv", "attn.proj", "", "mlp.fc1", "", "mlp.fc2", ""]
    assert names == ["", *(name and f"blocks.{i}.{name}" for i in range(2) for name in block), "head"]
    patches = torch.cat([vit.get_parameter("cls_token").expand(2, -1, -1), vit.patch_embed(images)], dim=1)
    assert torch.equal(calls[0][1], patches + vit.get_parameter("pos_embed"))
    for (name, output), (following, dropped) in itertools.pairwise(calls):
        if following == "":
            assert torch.equal(dropped, F.gelu(output) if name.endswith("fc1") else output)


def test_attention_dropout_is_on_the_attention_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        seen.append(dropout_p)
        return attention(q, k, v, dropout_p=dropout_p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    vit = tiny(attention_dropout=0.3, dropout=0.1)
    vit(torch.randn(1, 3, 32, 32))
    vit.train()(torch.randn(1, 3, 32, 32))
    assert seen == [0.0, 0.0, 0.3, 0.3]


def test_finetuning_head_starts_at_zero_and_learns() -> None:
    vit = tiny()
    vit.set_head("finetune", 7)
    logits = vit(torch.randn(4, 3, 32, 32))
    assert torch.equal(logits, torch.zeros(4, 7))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert isinstance(vit.head, nn.Linear)
    assert vit.head.weight.grad is not None
    assert vit.head.weight.grad.abs().max() > 0


def test_pretraining_head_is_linear_tanh_linear() -> None:
    vit = tiny()
    vit.set_head("pretrain", 7, hidden_dim=9)
    shapes = {name: tuple(value.shape) for name, value in vit.head.state_dict(prefix="head.").items()}
    assert shapes == {
        "head.pre_logits.weight": (9, 24),
        "head.pre_logits.bias": (9,),
        "head.out.weight": (7, 9),
        "head.out.bias": (7,),
    }
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(images), torch.zeros(2, 7))
    randomized(vit)
    w = vit.state_dict()
    hidden = F.linear(vit.pool(vit.features(images)), w["head.pre_logits.weight"], w["head.pre_logits.bias"])
    torch.testing.assert_close(vit(images), F.linear(hidden.tanh(), w["head.out.weight"], w["head.out.bias"]))

    vit.set_head("pretrain", 7)
    assert vit.state_dict()["head.pre_logits.weight"].shape == (24, 24)
    assert vit.config.hidden_dim == 24


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_new_head_has_the_networks_dtype(kind: Any) -> None:
    vit = tiny().double()
    vit.set_head(kind, 3)
    assert vit(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 3)


def test_initial_values() -> None:
    vit = ViT.from_preset("Ti/16", num_classes=10)
    vit.set_head("pretrain", 10)
    values = vit.state_dict()
    width, mlp_dim = 192, 768

    def uniform(matrix: Tensor, fan_in: int, fan_out: int) -> None:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < matrix.abs().max() <= bound * (1 + 1e-6)
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)

    for i in range(12):
        for matrix in values[f"blocks.{i}.attn.qkv.weight"].split(width):
            uniform(matrix, width, width)
        uniform(values[f"blocks.{i}.attn.proj.weight"], width, width)
        uniform(values[f"blocks.{i}.mlp.fc1.weight"], width, mlp_dim)
        uniform(values[f"blocks.{i}.mlp.fc2.weight"], mlp_dim, width)
        assert 0 < values[f"blocks.{i}.mlp.fc1.bias"].abs().max() < 1e-5
    uniform(values["head.pre_logits.weight"], width, width)

    assert values["pos_embed"].std().item() == pytest.approx(0.02, rel=0.02)
    fan_in = 3 * 16 * 16
    patches = values["patch_embed.proj.weight"]
    assert patches.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.02)
    assert patches.abs().max() <= 2 * math.sqrt(1 / fan_in) / 0.8796

    zero = [name for name, value in values.items() if not value.any()]
    norms = [f"{norm}.bias" for norm in ("norm", *(f"blocks.{i}.norm{j}" for i in range(12) for j in (1, 2)))]
    biases = [f"blocks.{i}.attn.{layer}.bias" for i in range(12) for layer in ("qkv", "proj")]
    heads = ["head.pre_logits.bias", "head.out.weight", "head.out.bias"]
    assert set(zero) == {"cls_token", "patch_embed.proj.bias", *norms, *biases, *heads}


def test_the_head_alone_computes_in_float32_under_mixed_precision() -> None:
    images = torch.randn(4, 3, 32, 32)
    for pool in ("cls", "gap", "map"):
        vit = tiny(pool=pool, float32_head=True).eval()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            tokens, logits = vit.features(images), vit(images)
            vit.config = replace(vit.config, float32_head=False)
            halved = vit(images)
        assert (logits.dtype, halved.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(logits, vit.head(vit.pool(tokens.float())))
        assert (tokens - vit.features(images)).abs().max() > 1e-3  # the blocks are not in float32
        assert torch.equal(vit(images), replaced(vit, float32_head=True)(images))  # nothing without autocast


def replaced(vit: ViT, **options: Any) -> ViT:
    """A copy with other options."""
    copy = ViT(**{**vit.config.plain(), **options}).eval()
    copy.load_state_dict(vit.state_dict())
    return copy


def test_meta_device() -> None:
    with torch.device("meta"):
        vit = ViT(**TINY, num_classes=5)
    vit.set_head("pretrain", 3)
    assert {parameter.device.type for parameter in vit.parameters()} == {"meta"}
    assert vit(torch.randn(2, 3, 32, 32, device="meta")).shape == (2, 3)


def test_export_with_any_batch_size() -> None:
    vit = tiny()
    batch = torch.export.Dim("batch")
    program = torch.export.export(vit, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), vit(images))


@pytest.mark.parametrize(
    "options", [{"heads": 0}, {"depth": -1}, {"patch_size": 0}, {"dropout": 2.0}, {"image_size": 0}, {"in_channels": 0}]
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"at least 1|not a probability"):
        ViT(**{"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 16, **options})


def kept(batch: int, patches: int, count: int) -> Tensor:
    """Other patches for each image, in no order."""
    return torch.stack([torch.randperm(patches)[:count] for _ in range(batch)])


def rows(tokens: Tensor, keep: Tensor, prefix: int) -> Tensor:
    """The prefix tokens and the kept patches of all tokens."""
    images = [torch.cat([image[:prefix], image[prefix:][chosen]]) for image, chosen in zip(tokens, keep, strict=True)]
    return torch.stack(images)


@pytest.mark.parametrize("options", [{}, {"registers": 2, "class_position": False}, {"position": "sincos2d"}])
def test_embedding_kept_patches_is_a_part_of_embedding_all(options: dict[str, Any]) -> None:
    vit = tiny(**options)
    images, keep = torch.randn(3, 3, 32, 48), kept(3, 24, 5)
    tokens = vit.embed(images, keep=keep)
    assert tokens.shape == (3, vit.prefix + 5, 24)
    assert torch.equal(tokens, rows(vit.embed(images), keep, vit.prefix))
    assert vit.pool(vit.encode(tokens, (4, 6), keep)).shape == (3, 24)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("registers", [0, 2])
def test_encoding_kept_patches_is_encoding_all_with_the_others_hidden(
    position: str, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = tiny(position=position, registers=registers, heads=2)
    images, keep = torch.randn(3, 3, 32, 48), kept(3, 24, 5)
    encoded = vit.encode(vit.embed(images, keep=keep), (4, 6), keep)

    seen = torch.zeros(3, 1, 1, vit.prefix + 24, dtype=torch.bool)
    seen[..., : vit.prefix] = True
    seen.scatter_(-1, vit.prefix + keep[:, None, None], True)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, dropout_p: attention(q, k, v, attn_mask=seen)
    )
    everything = vit.encode(vit.embed(images), (4, 6))
    torch.testing.assert_close(encoded, rows(everything, keep, vit.prefix))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_keeping_every_patch_changes_nothing(position: str) -> None:
    vit = tiny(position=position, heads=2)
    images, keep = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, 16)
    torch.testing.assert_close(vit.encode(vit.embed(images, keep=keep), keep=keep), vit.features(images))


def test_a_mask_puts_the_mask_token_in_place_of_patches_before_their_positions() -> None:
    vit = tiny()
    names = set(vit.state_dict())
    images, mask = torch.randn(3, 3, 32, 32), torch.rand(3, 16) < 0.5
    with pytest.raises(AssertionError, match="add_mask_token"):
        vit.embed(images, mask)
    before = vit.embed(images)
    vit.add_mask_token()
    assert set(vit.state_dict()) - names == {"mask_token"}
    assert set(vit.layers()["embed"]) >= {"mask_token"}
    tokens = vit.embed(images, mask)
    hidden = (vit.get_parameter("mask_token") + vit.get_parameter("pos_embed")[:, 1:]).expand(3, -1, -1)
    assert torch.equal(tokens[:, 1:][mask], hidden[mask])
    assert torch.equal(tokens[:, 1:][~mask], before[:, 1:][~mask])
    keep = kept(3, 16, 4)
    assert torch.equal(vit.embed(images, mask, keep), rows(tokens, keep, 1))
    assert torch.equal(vit.embed(images), before)


def test_masks_and_kept_patches_of_a_batch_compile_in_one_graph() -> None:
    vit = tiny(position="rope", heads=2)
    vit.add_mask_token()
    torch._dynamo.reset()

    def encode(images: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        return vit.encode(vit.embed(images, mask, keep), keep=keep)

    given = (torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5, kept(2, 16, 6))
    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), encode(*given))


def test_an_option_of_the_preset_is_refused() -> None:
    with pytest.raises(TypeError, match="multiple values for keyword argument 'patch_size'"):
        ViT.from_preset("Ti/16", patch_size=8)

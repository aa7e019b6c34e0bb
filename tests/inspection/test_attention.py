"""What a ViT looks at, against timm's attention without the fused kernel."""

from typing import Any

import pytest
import torch
from conftest import randomized
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitlit.inspection import attended, attention
from vitlit.model import ViT

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "heads": 3, "mlp_dim": 48}
THEIRS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100.0}
ROPE |= {"rope_rotate_half": True, "use_abs_pos_emb": False, "global_pool": "token"}
REGISTERS: dict[str, Any] = {"reg_tokens": 2, "no_embed_class": True}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        (VisionTransformer, {}, {}),
        (VisionTransformer, {"qk_norm": True}, {"qk_norm": True}),
        (VisionTransformer, REGISTERS, {"registers": 2, "class_position": False}),
        (VisionTransformerDistilled, {}, {"distilled": True}),
        (Eva, {**ROPE, "attn_type": "rope", "qk_norm": True}, {"position": "rope", "qk_norm": True}),
        (
            Eva,
            {**ROPE, "qkv_bias": False, "num_reg_tokens": 2},
            {"position": "rope", "qkv_bias": False, "registers": 2},
        ),
    ],
)
def test_attention_is_the_softmax_of_the_unfused_computation(kind: Any, theirs: Any, ours: Any) -> None:
    stranger = randomized(kind(**{**THEIRS, "num_classes": 0, **theirs}), 0.2)
    vit = ViT(**{**TINY, **ours}).eval()
    vit.load_state_dict(stranger.state_dict())
    images, seen = torch.randn(2, 3, 32, 32), []
    for block in stranger.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        stranger(images)
    assert len(seen) == 3
    for block, expected in enumerate(seen):
        assert expected.std() > 0.005
        torch.testing.assert_close(attention(vit, images, block), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(attention(vit, images), seen[-1], rtol=0, atol=1e-6)
    with pytest.raises(IndexError):
        attention(vit, images, 3)


def test_attention_of_another_size_and_a_compiled_block() -> None:
    vit, images = randomized(ViT(**TINY)), torch.randn(1, 3, 16, 48)
    expected = attention(vit, images)
    assert expected.shape == (1, 3, 13, 13)
    for block in vit.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(attention(vit, images), expected, rtol=0, atol=0)


def planted(vit: ViT, patch: int) -> Tensor:
    """Images of which one patch has the only key that the queries like."""
    last: Any = vit.blocks[-1]
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        last.norm1.weight.fill_(1)
        vit.patch_embed.proj.weight[0] = 1
        last.attn.qkv.bias[:24] = 1
        last.attn.qkv.weight[24:48, 0] = 1
    images = torch.zeros(1, 3, 32, 32)
    rows, columns = divmod(patch, 4)
    images[:, :, rows * 8 : rows * 8 + 8, columns * 8 : columns * 8 + 8] = 1
    return images


@pytest.mark.parametrize("options", [{}, {"registers": 3}, {"pool": "gap", "class_token": False}])
def test_the_map_shows_where_the_pooled_tokens_look(options: dict[str, Any]) -> None:
    vit = ViT(**{**TINY, **options}).eval()
    (maps,) = attended(vit, planted(vit, 6)).values()
    assert maps.shape == (1, 4, 4)
    assert maps.flatten().argmax() == 6
    assert maps[0, 1, 2] == 1
    last: Any = vit.blocks[-1]
    with torch.no_grad():
        last.attn.qkv.bias.zero_()  # looks nowhere in particular
    (maps,) = attended(vit, torch.randn(1, 3, 32, 32)).values()
    torch.testing.assert_close(maps, torch.ones(1, 4, 4))

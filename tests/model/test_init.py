"""Initial weights of other programs: timm's, from its own networks, and big_vision's."""

from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp  # type: ignore[import-untyped]
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitlit.model import ViT

SIZES: dict[str, Any] = {"image_size": 64, "patch_size": 8, "width": 96, "depth": 2, "heads": 3, "mlp_dim": 384}
TIMMS = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}


def made(init: str, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(ViT(**SIZES, **options, init=init).named_parameters())


@pytest.mark.parametrize(
    ("options", "theirs", "kind"),
    [
        ({"distilled": True}, {}, VisionTransformerDistilled),
        ({"pool": "map"}, {"global_pool": "map", "class_token": False}, VisionTransformer),
        ({"layer_scale": 1e-4, "registers": 4}, {"init_values": 1e-4, "reg_tokens": 4}, VisionTransformer),
    ],
)
def test_timms_is_timms(options: dict[str, Any], theirs: dict[str, Any], kind: type[nn.Module]) -> None:
    """Every tensor is drawn from timm's distribution (Kolmogorov and Smirnov's test), or is the same constant."""
    ours = made("timm", **options)
    torch.manual_seed(1)
    expected = dict(kind(**TIMMS, **theirs, num_classes=0).named_parameters())
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if name in ("cls_token", "reg_token"):  # since timm 0.4 they begin at 1e-6; DeiT and DeiT III keep 0.02
            assert tensor.std().item() == pytest.approx(0.02, rel=0.3)
        elif tensor.std() == 0:
            assert torch.equal(tensor, expected[name]), name
        else:
            difference = ks_2samp(tensor.detach().flatten().numpy(), expected[name].detach().flatten().numpy())
            assert difference.pvalue > 1e-4, name


@pytest.mark.parametrize("options", [{}, {"class_position": False}, {"pool": "map"}])
def test_big_visions_differs_from_googles_first_in_the_positions(options: dict[str, Any]) -> None:
    """`get_posemb` of big_vision, models/vit.py: normal(stddev=1/np.sqrt(width))."""
    ours, first = made("big_vision", **options), made("vision_transformer", **options)
    assert ours["pos_embed"].std().item() == pytest.approx(96**-0.5, rel=0.03)
    assert first["pos_embed"].std().item() == pytest.approx(0.02, rel=0.03)
    assert [name for name in ours if not torch.equal(ours[name], first[name])] == ["pos_embed"]

"""Weights of timm, transformers, torchvision, Google and facebookresearch, in and out: the peer's output is ours."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import vitlit
from vitlit.data import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

Module = TypeVar("Module", bound=nn.Module)
State = dict[str, Any]

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3, "mlp_dim": 384}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def shaken(module: Module, scale: float = 0.05) -> Module:
    """Move every parameter, so that neither a zero nor a one hides it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def vit_of(**options: Any) -> ViT:
    return shaken(ViT(**{**SMALL, "num_classes": 10, **options}), 0.1)


def images_of(size: int | tuple[int, int], channels: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, channels, height, width)


def assert_same(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    assert theirs.std() > 0.05  # nothing vanished, so that a difference would show
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        vitlit.load(path)


# timm.


def timm_model(name: str, size: Any = 64, **options: Any) -> nn.Module:
    return timm.create_model(name, **{"img_size": size, "depth": 2, "num_classes": 10, **options}).eval()


TIMM: list[tuple[str, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", 64, {}),
    ("vit_small_patch16_224", 64, {}),
    ("vit_base_patch16_224", 64, {"depth": 1}),
    ("vit_base_patch32_224", 64, {"depth": 1}),
    ("vit_small_patch8_224", 32, {}),
    ("vit_small_patch14_dinov2", 70, {"num_classes": 0}),
    ("vit_small_patch14_reg4_dinov2", 70, {"num_classes": 0}),
    ("vit_giant_patch14_dinov2", 28, {"embed_dim": 384, "num_heads": 6}),
    ("vit_giant_patch14_dinov2", 28, {"mlp_ratio": 0.25, "depth": 1, "num_classes": 0}),  # its own width
    ("deit_tiny_patch16_224", 64, {}),
    ("deit_tiny_distilled_patch16_224", 64, {}),
    ("deit_tiny_distilled_patch16_224", 64, {"num_classes": 0}),
    ("deit3_small_patch16_224", 64, {}),
    ("vit_small_patch16_224", 64, {"global_pool": "avg"}),
    ("vit_base_patch16_siglip_224", 64, {"depth": 1}),
    ("vit_base_patch16_siglip_224", 64, {"depth": 1, "num_classes": 0}),
    ("vit_base_patch16_siglip_gap_224", 64, {"depth": 1}),
    ("vit_tiny_patch16_224", 64, {"qk_norm": True, "qkv_bias": False, "in_chans": 1}),
]


@pytest.mark.parametrize(("name", "size", "options"), TIMM)
def test_timm_in_and_out(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, images = shaken(timm_model(name, size, **options)), images_of(size, options.get("in_chans", 3))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    assert_same(vit(images), theirs(images))
    for ending in ("safetensors", "pth"):
        file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / f"ours.{ending}", "timm")
        back = timm_model(name, size, **options, checkpoint_path=str(file))
        assert_same(back(images), vit(images))


def ti16(size: int | tuple[int, int], **options: Any) -> ViT:
    return ViT(size, 16, 192, 2, 3, 768, num_classes=10, **options).eval()


# The number of positions in the file, the class token's included: 13; 16, as many as a square without; 17, with.
@pytest.mark.parametrize("size", [(48, 64), (48, 80), (32, 128)])
def test_timm_of_no_square_in_and_out(size: tuple[int, int], tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224", size)), images_of(size)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = ti16(size)
    assert vitlit.load_weights(vit, tmp_path / "theirs.safetensors").resampled == []
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", size, checkpoint_path=str(file))(images), vit(images))


def test_what_no_square_tells_is_asked_for(tmp_path: Path) -> None:
    save_file(timm_model("vit_tiny_patch16_224", (48, 64)).state_dict(), tmp_path / "theirs.safetensors")
    refused(tmp_path / "theirs.safetensors", "build the ViT with its image_size")
    save_file(timm_model("vit_tiny_patch16_224", pos_embed="none").state_dict(), tmp_path / "theirs.safetensors")
    refused(tmp_path / "theirs.safetensors", "pos_embed is missing")


def test_timm_registers_with_positions_in_the_table_fold_them(tmp_path: Path) -> None:
    theirs = shaken(timm_model("vit_small_patch14_reg4_dinov2", 70, no_embed_class=False))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit, images = vitlit.load(tmp_path / "theirs.safetensors"), images_of(70)
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(vit, tmp_path / "ours.pth", "timm")
    assert_same(timm_model("vit_small_patch14_reg4_dinov2", 70, checkpoint_path=str(file))(images), theirs(images))


@pytest.mark.parametrize("position", ["sincos2d", "sincos2d_mae"])
def test_fixed_positions_are_written_out_for_timm(position: Any, tmp_path: Path) -> None:
    vit, images = vit_of(patch_size=16, image_size=64, mlp_dim=768, position=position), images_of(64)
    file = vitlit.save_weights(vit, tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", checkpoint_path=str(file))(images), vit(images))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod.", "backbone."])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "state_dict_ema"])
def test_prefixes_and_wrappers_are_taken_off(prefix: str, wrapper: str, tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224", depth=1)), images_of(64)
    state: State = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    if wrapper:
        state = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(3)}}}
    else:
        save_file(state, tmp_path / "theirs.safetensors")
        assert_same(vitlit.load(tmp_path / "theirs.safetensors")(images), theirs(images))
    for new in (True, False):  # a zip archive, or a pickle of before torch 1.6
        torch.save(state, tmp_path / "theirs.pth", _use_new_zipfile_serialization=new)
        assert_same(vitlit.load(tmp_path / "theirs.pth")(images), theirs(images))


def test_averaged_weights_go_before_the_others(tmp_path: Path) -> None:
    one, averaged = (shaken(timm_model("vit_tiny_patch16_224", depth=1)) for _ in range(2))
    torch.save({"state_dict": one.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "a.pth")
    images = images_of(64)
    assert_same(vitlit.load(tmp_path / "a.pth")(images), averaged(images))


def test_half_precision_loads_as_single(tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224")).bfloat16(), images_of(64)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    assert {tensor.dtype for tensor in vit.state_dict().values()} == {torch.float32}
    assert_same(vit(images), theirs.float()(images))


# transformers.

WIDTH: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
HF: list[tuple[str, str, dict[str, Any]]] = [
    ("ViT", "ViTForImageClassification", {}),
    ("ViT", "ViTForImageClassification", {"qkv_bias": False, "num_channels": 1, "num_attention_heads": 6}),
    ("ViT", "ViTForImageClassification", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 0.1}),
    ("ViT", "ViTModel", {}),
    ("ViT", "ViTModel", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1000}),
    ("ViT", "ViTModel", {"image_size": [16, 48]}),
    ("ViT", "ViTModel", {"image_size": [16, 64]}),
    ("ViT", "ViTModel", {"image_size": [24, 40]}),
    ("DeiT", "DeiTForImageClassificationWithTeacher", {}),
    ("DeiT", "DeiTModel", {}),
    ("DeiT", "DeiTForImageClassification", {}),
    ("ViTMAE", "ViTMAEModel", {"mask_ratio": 0.0}),
    ("Dinov2", "Dinov2Model", {}),
    ("Dinov2", "Dinov2Model", {"mlp_ratio": 2, "qkv_bias": False}),
    ("Dinov2", "Dinov2Model", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", "Dinov2WithRegistersModel", {}),
    ("Dinov2WithRegisters", "Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "num_register_tokens": 2}),
    ("DINOv3ViT", "DINOv3ViTModel", {}),
    ("DINOv3ViT", "DINOv3ViTModel", {"num_register_tokens": 4, "image_size": 224}),
    ("DINOv3ViT", "DINOv3ViTModel", {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}),
    ("DINOv3ViT", "DINOv3ViTModel", {"key_bias": True}),
]
# What vitlit writes them as, where it is not the same class; None: it has no such class to write.
BACK: dict[str, str | None] = {"ViTMAEModel": "ViTModel", "DeiTForImageClassification": None}
POOLERS = ("ViTModel", "DeiTModel")


def hf_model(family: str, name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**WIDTH, **options})
    return shaken(getattr(transformers, name)(config), 0.1)


def hf_output(model: Any, images: Tensor, **options: Any) -> Tensor:
    """Logits, or normed tokens without a head."""
    if model.config.model_type == "vit_mae":
        patches = images.shape[2] * images.shape[3] // model.config.patch_size**2
        options["noise"] = torch.arange(float(patches)).expand(len(images), -1)
    output = model(pixel_values=images, **options)
    return output.logits if "logits" in output else output.last_hidden_state


def our_output(vit: ViT, images: Tensor) -> Tensor:
    return vit(images) if vit.config.num_classes else vit.features(images)


def hf_loaded(name: str, folder: Path) -> Any:
    """A model by transformers' own loader, which must know every tensor and miss none but the mask token."""
    options = {"add_pooling_layer": False} if name in POOLERS else {}
    loaded = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    missing = set(info["missing_keys"]) - {"embeddings.mask_token"}
    assert not [name for name in missing if model.get_parameter(name).numel()]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(("family", "name", "options"), HF)
def test_transformers_in_and_out(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = hf_model(family, name, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    size = options.get("image_size", 32)
    images = images_of(tuple(size) if isinstance(size, list) else size, options.get("num_channels", 3))
    vit = vitlit.load(tmp_path / "theirs")
    assert_same(our_output(vit, images), hf_output(theirs, images))
    if not vit.config.num_classes and not vit.config.distilled:  # where it is the mean of two tokens, as in timm
        assert_same(vit(images), hf_output(theirs, images)[:, 0])

    out, back = tmp_path / "ours", BACK.get(name, name)
    if back is None or options.get("key_bias"):
        with pytest.raises(UserError, match=r"no num_classes 10|no bias of the keys"):
            vitlit.save_weights(vit, out, "hf")
        assert not out.exists()
        return
    if family != "DINOv3ViT":  # whose missing bias of the keys is a zero
        shaken(vit, 0.01)
    file = vitlit.save_weights(vit, out, "hf")
    assert file == out / "model.safetensors"
    assert_same(hf_output(hf_loaded(back, out), images), our_output(vit, images))
    assert vitlit.load(out).config == vit.config


BARE: list[tuple[str, str, dict[str, Any]]] = [
    ("ViT", "ViTForImageClassification", {}),
    ("ViT", "ViTModel", {"hidden_size": 384, "num_attention_heads": 6}),
    ("DeiT", "DeiTForImageClassificationWithTeacher", {}),
    ("ViTMAE", "ViTMAEModel", {"mask_ratio": 0.0}),
    ("Dinov2", "Dinov2Model", {}),
    ("Dinov2", "Dinov2Model", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", "Dinov2WithRegistersModel", {}),
    ("DINOv3ViT", "DINOv3ViTModel", {"num_register_tokens": 4}),
    ("DINOv3ViT", "DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu"}),
]


@pytest.mark.parametrize(("family", "name", "options"), BARE)
def test_without_its_config_the_heads_follow_from_the_width(
    family: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs, images = hf_model(family, name, **options), images_of(32)
    theirs.save_pretrained(tmp_path / "theirs")
    moved = tmp_path / "elsewhere" / "weights.safetensors"
    moved.parent.mkdir()
    (tmp_path / "theirs" / "model.safetensors").rename(moved)
    vit = vitlit.load(moved)
    assert vit.config.heads == theirs.config.num_attention_heads
    assert vit.config.norm_eps == theirs.config.layer_norm_eps
    assert_same(our_output(vit, images), hf_output(theirs, images))


def test_a_width_of_no_name_needs_a_vit_that_tells_its_heads(tmp_path: Path) -> None:
    theirs, images = hf_model("ViT", "ViTModel", hidden_size=240, num_attention_heads=5), images_of(32)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    refused(tmp_path / "theirs", "does not tell how many heads a ViT of width 240 has")
    vit = ViT(**{**SMALL, "width": 240, "heads": 5, "mlp_dim": 768}).eval()
    vitlit.load_weights(vit, tmp_path / "theirs")
    assert_same(vit.features(images), hf_output(theirs, images))


def test_heads_that_the_config_tells_must_be_the_models(tmp_path: Path) -> None:
    hf_model("ViT", "ViTModel").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="heads is 3 in the file and 6 in the model"):
        vitlit.load_weights(ViT(**{**SMALL, "heads": 6, "mlp_dim": 768}), tmp_path / "theirs")


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_the_decoder_of_an_mae_is_reported_and_left(mask_ratio: float, tmp_path: Path) -> None:
    small = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 64, "decoder_num_attention_heads": 2}
    small |= {"decoder_intermediate_size": 64}
    theirs, images = hf_model("ViTMAE", "ViTMAEForPreTraining", mask_ratio=mask_ratio, **small), images_of(32)
    theirs.save_pretrained(tmp_path / "theirs")
    vit = ViT(**{**SMALL, "mlp_dim": 768}).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / "model.safetensors")
    assert report.format == "hf vit_mae"
    assert sorted(report.unexpected) == sorted(name for name in names if name.startswith("decoder."))
    assert report.unexpected
    theirs.vit.config.mask_ratio = 0.0
    assert_same(vit.features(images), hf_output(theirs.vit, images))
    assert_same(vitlit.load(tmp_path / "theirs")(images), vit(images))


def test_shards_are_put_together(tmp_path: Path) -> None:
    theirs, images = hf_model("ViT", "ViTForImageClassification"), images_of(32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same(vitlit.load(tmp_path / "theirs")(images), hf_output(theirs, images))
    shards[-1].unlink()
    refused(tmp_path / "theirs", f"names a shard {shards[-1].name} that is missing")


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_epsilon_and_gelu_are_set_on_the_vit(eps: float, tmp_path: Path) -> None:
    theirs = hf_model("ViT", "ViTForImageClassification", layer_norm_eps=eps, hidden_act="gelu_pytorch_tanh")
    theirs.save_pretrained(tmp_path / "theirs")
    vit, images = ViT(**{**SMALL, "mlp_dim": 768, "num_classes": 10}).eval(), images_of(32)
    report = vitlit.load_weights(vit, tmp_path / "theirs")
    assert report.settings == [f"norm_eps {eps} (was 1e-06)", "mlp gelu_tanh (was gelu)"]
    assert f"set norm_eps {eps} (was 1e-06)" in str(report)
    assert_same(vit(images), hf_output(theirs, images))
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {eps}
    assert (vit.config.norm_eps, vit.config.mlp) == (eps, "gelu_tanh")


def test_labels_are_the_classes_and_go_out_again(tmp_path: Path) -> None:
    labels = [f"kind {i}" for i in range(10)]
    theirs = hf_model("ViT", "ViTForImageClassification", id2label=dict(enumerate(labels)))
    theirs.save_pretrained(tmp_path / "theirs")
    vit = vitlit.load(tmp_path / "theirs")
    assert vit.classes == labels
    vitlit.save_weights(vit, tmp_path / "ours", "hf")
    config = hf_loaded("ViTForImageClassification", tmp_path / "ours").config
    assert [config.id2label[i] for i in range(10)] == labels
    assert config.label2id == {name: i for i, name in enumerate(labels)}
    hf_model("ViT", "ViTForImageClassification").save_pretrained(tmp_path / "unnamed")
    assert vitlit.load(tmp_path / "unnamed").classes == []


PICTURE = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("processor", "options", "expected"),
    [
        (
            "ViTImageProcessor",
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2},
            {"crop_ratio": 1.0, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"},
        ),
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3]},
            {"crop_ratio": 0.8, "mean": (0.1, 0.2, 0.3), "std": (0.26862954, 0.26130258, 0.27577711)},
        ),
    ],
)
def test_preprocessor_config_is_the_preprocessing(
    processor: str, options: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    hf_model("ViT", "ViTForImageClassification").save_pretrained(tmp_path / "theirs")
    getattr(transformers, processor)(**options).save_pretrained(tmp_path / "theirs")
    vit = vitlit.load(tmp_path / "theirs")
    assert vit.preprocess == Preprocess((32, 32), **expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_written_preprocessor_makes_the_same_input(interpolation: Any, tmp_path: Path) -> None:
    vit = vit_of()
    vit.preprocess = Preprocess((32, 32), 0.8, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    vitlit.save_weights(vit, tmp_path / "ours", "hf")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    made = theirs(images=PICTURE, return_tensors="pt")["pixel_values"]
    assert_same(vit.preprocess([PICTURE]), made, 1e-6)
    assert vitlit.load(tmp_path / "ours").preprocess == vit.preprocess


@pytest.mark.parametrize(
    ("family", "name", "options", "message"),
    [
        ("ViT", "ViTModel", {"hidden_act": "relu"}, r"hidden_act relu"),
        ("DINOv3ViT", "DINOv3ViTModel", {"use_gated_mlp": True}, r"hidden_act gelu in a gated MLP"),
        ("DINOv3ViT", "DINOv3ViTModel", {"rope_theta": 10.0}, r"rope_theta 10"),
        ("DINOv3ViT", "DINOv3ViTModel", {"mlp_bias": False}, r"mlp\.fc1\.bias"),
    ],
)
def test_what_a_vit_is_not_is_refused(
    family: str, name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf_model(family, name, **options).save_pretrained(tmp_path / "theirs")
    refused(tmp_path / "theirs", message)


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    hf_model("ViT", "ViTModel").save_pretrained(tmp_path / "theirs")
    about = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**about, "model_type": "beit"}))
    refused(tmp_path / "theirs", "model type beit")


def test_a_dinov2_classifier_gives_a_headless_vit_its_features(tmp_path: Path) -> None:
    theirs, images = hf_model("Dinov2", "Dinov2ForImageClassification"), images_of(32)
    theirs.save_pretrained(tmp_path / "theirs")
    vit = ViT(**{**SMALL, "mlp_dim": 768, "layer_scale": 1.0}).eval()
    vitlit.load_weights(vit, tmp_path / "theirs")
    assert_same(vit.features(images), theirs.dinov2(images).last_hidden_state)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (24, 40)])
@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("Dinov2", "Dinov2Model", {}),
        ("Dinov2WithRegisters", "Dinov2WithRegistersModel", {}),
        ("DINOv3ViT", "DINOv3ViTModel", {"num_register_tokens": 4}),
    ],
)
def test_transformers_at_another_resolution(
    family: str, name: str, options: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    theirs, images = hf_model(family, name, **options), images_of(size)
    theirs.save_pretrained(tmp_path / "theirs")
    vit = vitlit.load(tmp_path / "theirs")
    if family == "Dinov2":
        assert vit.resampling == "offset"  # facebookresearch's, which transformers leaves out
        vit.resampling = "bicubic"
    assert_same(vit.features(images), hf_output(theirs, images))


def test_fixed_positions_take_the_table_of_a_transformers_mae(tmp_path: Path) -> None:
    theirs = hf_model("ViTMAE", "ViTMAEModel", mask_ratio=0.0)
    images, table = images_of(32), theirs.embeddings.position_embeddings
    fixed = {**SMALL, "mlp_dim": 768, "position": "sincos2d_mae"}
    theirs.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="position is learned in the file and sincos2d_mae in it"):
        vitlit.load_weights(ViT(**fixed), tmp_path / "moved")
    for part in (table, theirs.embeddings.patch_embeddings.projection):
        part._is_hf_initialized = False
    theirs.embeddings.initialize_weights()  # its own sines and cosines
    assert table[0, 1:].std() > 0.4
    theirs.save_pretrained(tmp_path / "theirs")
    vit = ViT(**fixed).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs")
    assert report.resampled == ["pos_embed"]
    assert_same(vit.features(images), hf_output(theirs, images))
    with pytest.raises(UserError, match="position is learned in the file and sincos2d in it"):
        vitlit.load_weights(ViT(**{**fixed, "position": "sincos2d"}), tmp_path / "theirs")


# torchvision.


@pytest.mark.parametrize("representation", [None, 24])
@pytest.mark.parametrize(
    ("patch", "depth", "heads", "width", "mlp_dim"),
    [(16, 2, 12, 768, 3072), (32, 1, 16, 1024, 4096), (14, 1, 16, 1280, 5120)],
    ids=["b_16", "l_32", "h_14"],
)
def test_torchvision_in_and_out(
    patch: int, depth: int, heads: int, width: int, mlp_dim: int, representation: int | None, tmp_path: Path
) -> None:
    def peer() -> nn.Module:
        size = {"num_layers": depth, "num_heads": heads, "hidden_dim": width, "mlp_dim": mlp_dim}
        return VisionTransformer(2 * patch, patch, **size, num_classes=10, representation_size=representation).eval()

    theirs, images = shaken(peer()), images_of(2 * patch)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    vit = vitlit.load(tmp_path / "theirs.pth")
    assert vit.config.hidden_dim == representation
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.safetensors", "torchvision")
    back = peer()
    back.load_state_dict(load_file(file), strict=True)
    assert_same(back(images), vit(images))


def test_torchvision_of_before_0_12_and_of_ddp(tmp_path: Path) -> None:
    theirs, images = shaken(VisionTransformer(32, 8, 2, 3, 192, 384, num_classes=10)), images_of(32)
    state = {
        f"module.{name}".replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "theirs.pth")
    assert_same(vitlit.load(tmp_path / "theirs.pth")(images), theirs(images))


# Google.

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
    vit, images = vit_of(mlp="gelu_tanh", mlp_dim=768, **ours), images_of(32)
    file = vitlit.save_weights(vit, tmp_path / "ours.npz", "google")
    model: Any = timm_model("vit_tiny_patch16_224", 32, patch_size=8, **TANH, **theirs)
    model.load_pretrained(str(file))
    assert_same(model(images), vit(images))
    assert vitlit.load(file).config == vit.config
    assert_same(vitlit.load(file)(images), vit(images))


# facebookresearch.


def headless(name: str, **options: Any) -> Any:
    return shaken(timm_model(name, num_classes=0, **options))


def facebook(path: Path, content: Any, name: str, theirs: nn.Module, size: int = 64) -> vitlit.LoadReport:
    """Assert that a file is of that kind and gives the peer's output; give the report."""
    torch.save(content, path)
    vit, images = vitlit.load(path), images_of(size)
    assert_same(vit(images), theirs(images))
    fresh = ViT(**{**vit.config.plain(), "resampling": "antialias"}).eval()
    report = vitlit.load_weights(fresh, path)
    assert report.format == f"facebook {name}"
    assert_same(fresh(images), theirs(images))
    return report


DECODER: State = {
    "mask_token": torch.ones(1, 1, 64),
    "decoder_pos_embed": torch.ones(1, 17, 64),
    "decoder_embed.weight": torch.ones(64, 192),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(192, 64),
    "decoder_norm.weight": torch.ones(64),
    "decoder_pred.weight": torch.ones(768, 64),
}


def test_facebooks_mae(tmp_path: Path) -> None:
    theirs = headless("vit_tiny_patch16_224")
    content = {"model": {**theirs.state_dict(), **DECODER}, "epoch": 1, "args": Namespace(lr=1e-3, seed=0)}
    report = facebook(tmp_path / "mae.pth", content, "mae", theirs)
    assert sorted(report.unexpected) == sorted(DECODER)
    report = facebook(tmp_path / "encoder.pth", {"model": theirs.state_dict()}, "mae", theirs)
    assert report.unexpected == []
    theirs = shaken(timm_model("vit_tiny_patch16_224", global_pool="avg"))
    facebook(tmp_path / "finetuned.pth", {"model": theirs.state_dict()}, "mae", theirs)


def test_facebooks_dino(tmp_path: Path) -> None:
    theirs, student = (headless("vit_tiny_patch16_224").state_dict() for _ in range(2))
    model = timm_model("vit_tiny_patch16_224", num_classes=0)
    model.load_state_dict(theirs)
    assert facebook(tmp_path / "dino.pth", theirs, "dino", model).unexpected == []
    head = {"head.mlp.0.weight": torch.ones(8, 192), "head.last_layer.weight_v": torch.ones(8, 8)}

    def whole(prefix: str, state: State) -> State:
        return {prefix + n: t for n, t in {**{f"backbone.{n}": t for n, t in state.items()}, **head}.items()}

    for prefix in ("module.", ""):
        content = {"student": whole("module.", student), "teacher": whole(prefix, theirs), "epoch": 100}
        content |= {"args": Namespace(arch="vit_tiny", global_crops_scale=(0.4, 1.0)), "fp16_scaler": None}
        report = facebook(tmp_path / "full.pth", content, "dino", model)
        assert sorted(report.unexpected) == sorted(prefix + name for name in head)


def chunked(state: State, size: int = 2) -> State:
    """Names as DINOv2 has them in training: blocks.{chunk}.{block}."""
    names = {}
    for name in state:
        first, *rest = name.split(".", 2)
        names[name] = f"blocks.{int(rest[0]) // size}.{rest[0]}.{rest[1]}" if first == "blocks" else name
    return {names[name]: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 384, "num_heads": 6}),
    ],
)
def test_facebooks_dinov2(name: str, options: dict[str, Any], chunks: bool, tmp_path: Path) -> None:
    theirs = headless(name, size=70, depth=3, **options)
    state = {**{n: t.clone() for n, t in theirs.state_dict().items()}, "mask_token": torch.ones(1, 384)}
    if "reg4" in name:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 384), state["pos_embed"]], dim=1)
    if "giant" in name:
        state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs), strict=True)
    state = chunked(state) if chunks else state
    report = facebook(tmp_path / "dinov2.pth", state, "dinov2", theirs, 70)
    assert report.unexpected == ["mask_token"]
    assert report.settings == ([] if "reg4" in name else ["resampling offset (was antialias)"])
    heads = {"dino_head.mlp.0.weight": torch.ones(8, 384), "ibot_head.last_layer.weight_v": torch.ones(8, 8)}
    content = {"teacher": {**{f"backbone.{n}": t for n, t in state.items()}, **heads}}
    report = facebook(tmp_path / "teacher.pth", content, "dinov2", theirs, 70)
    assert sorted(report.unexpected) == sorted(["mask_token", *heads])


@pytest.mark.parametrize("size", [28, 42, 140])
def test_facebooks_dinov2_at_another_resolution(size: int, tmp_path: Path) -> None:
    theirs = headless("vit_small_patch14_dinov2", size=70)
    torch.save({**theirs.state_dict(), "mask_token": torch.ones(1, 384)}, tmp_path / "dinov2.pth")
    # dinov2/models/vision_transformer.py, interpolate_pos_encoding, with its offset of 0.1
    positions, scale = theirs.pos_embed, (size // 14 + 0.1) / 5
    grid = positions[:, 1:].reshape(1, 5, 5, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", antialias=False, scale_factor=(scale, scale))
    theirs = headless("vit_small_patch14_dinov2", size=size)
    state = torch.load(tmp_path / "dinov2.pth")
    del state["mask_token"]
    state["pos_embed"] = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    theirs.load_state_dict(state)
    vit, images = vitlit.load(tmp_path / "dinov2.pth"), images_of(size)
    assert_same(vit(images), theirs(images))
    other = ViT(**{**vit.config.plain(), "image_size": size, "resampling": "antialias"}).eval()
    vitlit.load_weights(other, tmp_path / "dinov2.pth")
    assert_same(other(images), theirs(images))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_facebooks_deit(name: str, tmp_path: Path) -> None:
    theirs = shaken(timm_model(name))
    state = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in theirs.state_dict().items()
    }
    assert any("gamma_1" in n for n in state) == ("deit3" in name)
    facebook(tmp_path / "deit.pth", {"model": state}, "deit", theirs)


# What a format has no network for.

ROPE: dict[str, Any] = {"position": "rope", "num_classes": 0}


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("timm", ROPE, "position rope"),
        ("timm", {"hidden_dim": 24}, "hidden_dim 24"),
        ("timm", {"position": "none"}, "position none"),
        ("hf", {"qk_norm": True}, "qk_norm True"),
        ("hf", {"pool": "gap"}, "pool gap"),
        ("hf", {"pool": "map", "layer_scale": 0.1, "num_classes": 0}, "pool map"),
        ("hf", {"hidden_dim": 24}, "hidden_dim 24"),
        ("hf", {"norm": "pooled"}, "norm pooled"),
        ("hf", {"final_norm": False}, "final_norm False"),
        ("hf", {"position": "none"}, "position none"),
        ("hf", {"position": "sincos2d"}, "position sincos2d"),
        ("hf", {"class_position": False}, "class_position False"),
        ("hf", {"registers": 2}, "num_classes 10"),
        ("hf", {"layer_scale": 0.1}, "num_classes 10"),
        ("hf", {"distilled": True, "registers": 2, "num_classes": 0}, "distilled True"),
        ("hf", {"mlp": "swiglu", "num_classes": 0}, "mlp_dim 384"),
        ("hf", {"mlp_dim": 200, "layer_scale": 0.1, "num_classes": 0}, "mlp_dim 200"),
        ("hf", ROPE, "layer_scale None"),
        ("hf", {**ROPE, "layer_scale": 0.1}, "bias of the keys"),
        ("hf", {**ROPE, "layer_scale": 0.1, "num_classes": 10}, "num_classes 10"),
        ("hf", {**ROPE, "layer_scale": 0.1, "qk_norm": True}, "qk_norm True"),
        ("torchvision", {"registers": 2}, "registers 2"),
        ("torchvision", {"distilled": True}, "distilled True"),
        ("torchvision", {"layer_scale": 0.1}, "layer_scale 0.1"),
        ("torchvision", {"qk_norm": True}, "qk_norm True"),
        ("torchvision", {"qkv_bias": False}, "qkv_bias False"),
        ("torchvision", {"pool": "gap"}, "pool gap"),
        ("torchvision", {"position": "sincos2d_mae"}, "position sincos2d_mae"),
        ("torchvision", {"class_position": False}, "class_position False"),
        ("torchvision", {"mlp": "gelu_tanh"}, "mlp gelu_tanh"),
        ("torchvision", {"mlp": "swiglu"}, "mlp swiglu"),
        ("torchvision", {"norm_eps": 1e-5}, "norm_eps 1e-05"),
        ("torchvision", {"in_channels": 1}, "in_channels 1"),
        ("torchvision", {"image_size": (16, 64)}, "square images"),
        ("google", {}, "mlp gelu"),
        ("google", {"mlp": "swiglu"}, "mlp swiglu"),
        ("google", {"mlp": "gelu_tanh", "layer_scale": 0.1}, "layer_scale 0.1"),
        ("google", {"mlp": "gelu_tanh", "registers": 2}, "registers 2"),
        ("google", {"mlp": "gelu_tanh", "distilled": True}, "distilled True"),
        ("google", {"mlp": "gelu_tanh", "qk_norm": True}, "qk_norm True"),
        ("google", {"mlp": "gelu_tanh", "qkv_bias": False}, "qkv_bias False"),
        ("google", {"mlp": "gelu_tanh", "norm": "pooled"}, "norm pooled"),
        ("google", {"mlp": "gelu_tanh", "final_norm": False}, "final_norm False"),
        ("google", {"mlp": "gelu_tanh", "norm_eps": 1e-5}, "norm_eps 1e-05"),
        ("google", {"mlp": "gelu_tanh", "position": "none"}, "position none"),
        ("google", {"mlp": "gelu_tanh", "position": "rope"}, "position rope"),
        ("google", {"mlp": "gelu_tanh", "position": "sincos2d_mae"}, "position sincos2d_mae"),
    ],
)
def test_what_a_format_has_not_is_refused_by_name(
    format: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / {"hf": "out", "google": "out.npz"}.get(format, "out.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        vitlit.save_weights(vit_of(**options), path, format)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"pool": "gap", "class_token": True}, {"pool": "map"}, {"image_size": (16, 64)}], ids=str
)
def test_an_npz_is_read_back_as_the_same_network_or_refused(options: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of(mlp="gelu_tanh", **options)
    try:
        read = vitlit.load(vitlit.save_weights(vit, tmp_path / "a.npz", "google"))
    except UserError:
        return
    images = images_of(options.get("image_size", 32))
    assert_same(read(images), vit(images))


@pytest.mark.parametrize(
    ("format", "name"), [("vitlit", "a.pth"), ("timm", "a.ckpt"), ("torchvision", "a.npz"), ("google", "a.pth")]
)
def test_an_ending_of_another_format_is_refused(format: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"ends in none of .*which the format {format} has"):
        vitlit.save_weights(vit_of(), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


# vitlit's own.

OWN: list[dict[str, Any]] = [
    {},
    {"image_size": (16, 48), "registers": 2, "mlp": "swiglu", "layer_scale": 0.1, "qk_norm": True, "in_channels": 1},
    {"pool": "map", "position": "sincos2d", "norm_eps": 1e-5, "dropout": 0.1, "num_classes": 0},
    {"distilled": True, "class_position": False, "qkv_bias": False, "drop_path": 0.1},
    {"pool": "gap", "class_token": True, "norm": "pooled", "position": "rope"},
    {"hidden_dim": 24, "mlp": "gelu_tanh", "resampling": "offset", "position": "none", "final_norm": False},
]


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("options", OWN)
def test_vitlits_own_files_keep_everything(options: dict[str, Any], ending: str, tmp_path: Path) -> None:
    vit = vit_of(**options)
    vit.classes = [f"Klasse {i} é ☃" for i in range(vit.config.num_classes)]
    colours = (0.1, 0.2, 0.3)[: vit.config.in_channels]
    sides = tuple(side * vit.patch_size for side in vit.grid)
    vit.preprocess = Preprocess(sides, 0.7, "bilinear", colours, colours)  # type: ignore[arg-type]
    loaded = vitlit.load(vitlit.save_weights(vit, tmp_path / f"a.{ending}"))
    assert loaded.config == vit.config
    assert loaded.classes == vit.classes
    assert loaded.preprocess == vit.preprocess
    assert loaded.state_dict().keys() == vit.state_dict().keys()
    assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    images = torch.randn(2, vit.config.in_channels, *sides)
    assert torch.equal(loaded(images), vit(images))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"a.{ending}"]


def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    vit = shaken(ViT(image_size=16, patch_size=8, width=192, depth=1, heads=3, mlp_dim=8, num_classes=2))
    vit.classes = ["a", "b"]
    whole = vitlit.save_weights(vit, tmp_path / "whole.safetensors").read_bytes()
    header, damaged = 8 + int.from_bytes(whole[:8], "little"), tmp_path / "damaged.safetensors"
    metadata = whole.index(b'"},"')
    assert 500 < metadata < header
    harmless = set()
    for place in (*range(metadata), *range(metadata, header, 7), *range(header, len(whole), 7919)):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            read = vitlit.load(damaged)
        except UserError:
            continue
        harmless.add(place)
        assert (read.config, read.classes, read.preprocess) == (vit.config, vit.classes, None), place
        assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in read.state_dict().items()), place
    first = whole.index(b'format":"pt"')  # which says nothing of the content
    assert harmless <= {*range(first, first + len(b'format":"pt'))}


# What may differ between a file and the ViT.


TI, S, B = (192, 1, 3, 768), (384, 1, 6, 1536), (768, 1, 12, 3072)


@pytest.mark.parametrize("size", [32, 96, (48, 64), (48, 80)])
@pytest.mark.parametrize(
    ("name", "shape", "ours", "theirs"),
    [
        ("vit_tiny_patch16_224", TI, {}, {}),
        ("deit_tiny_distilled_patch16_224", TI, {"distilled": True}, {}),
        ("deit3_small_patch16_224", S, {"layer_scale": 0.1, "class_position": False}, {}),
        ("vit_small_patch16_224", S, {"pool": "gap", "norm": "pooled", "class_token": True}, {"global_pool": "avg"}),
        ("vit_base_patch16_siglip_224", B, {"pool": "map"}, {}),
    ],
)
def test_another_size_is_resampled_as_timm_does(
    name: str, shape: tuple[int, ...], ours: dict[str, Any], theirs: dict[str, Any], size: Any, tmp_path: Path
) -> None:
    source, target = (shaken(timm_model(name, side, depth=1, **theirs)) for side in (64, size))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    state = checkpoint_filter_fn(source.state_dict(), target)  # type: ignore[arg-type]
    target.load_state_dict(state, strict=True)
    width, depth, heads, mlp_dim = shape
    vit = ViT(size, 16, width, depth, heads, mlp_dim, num_classes=10, **ours).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == ["pos_embed"]
    assert (vit.get_parameter("pos_embed") - state["pos_embed"]).abs().max() <= 1e-6
    images = images_of(size)
    assert_same(vit(images), target(images))


def test_a_size_that_the_file_tells_is_resampled_to_as_many_patches(tmp_path: Path) -> None:
    theirs = hf_model("ViT", "ViTModel")
    theirs.save_pretrained(tmp_path / "theirs")
    vit = ViT(**{**SMALL, "image_size": (16, 64), "mlp_dim": 768}).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs")
    assert report.resampled == ["pos_embed"]
    expected = resample_abs_pos_embed(theirs.embeddings.position_embeddings, [2, 8], [4, 4])
    assert (vit.get_parameter("pos_embed") - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_are_made_as_timm_does(channels: int, tmp_path: Path) -> None:
    source, target = (shaken(timm_model("vit_tiny_patch16_224", in_chans=count)) for count in (3, channels))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    stem = "patch_embed.proj.weight"
    state = {**source.state_dict(), stem: adapt_input_conv(channels, source.state_dict()[stem])}
    target.load_state_dict(state, strict=True)
    vit = ti16(64, in_channels=channels)
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == [stem]
    assert (vit.get_parameter(stem) - state[stem]).abs().max() <= 1e-6
    images = images_of(64, channels)
    assert_same(vit(images), target(images))


@pytest.mark.parametrize(
    ("name", "before", "changed"),
    [
        ("vit_tiny_patch16_224", True, ["cls_token", "pos_embed"]),
        ("vit_tiny_patch16_224", False, ["pos_embed"]),
        ("deit_tiny_distilled_patch16_224", True, ["cls_token", "dist_token", "pos_embed"]),
    ],
)
@pytest.mark.parametrize("size", [64, 96])
def test_the_class_position_folds_both_ways(
    name: str, before: bool, changed: list[str], size: int, tmp_path: Path
) -> None:
    options = {} if before else {"no_embed_class": True}
    source, target = (shaken(timm_model(name, side, **options)) for side in (64, size))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)  # type: ignore[arg-type]
    vit, images = ti16(size, class_position=not before, distilled="distilled" in name), images_of(size)
    assert sorted(vitlit.load_weights(vit, tmp_path / "theirs.safetensors").resampled) == changed
    assert_same(vit(images), target(images))

"""Weights of transformers, in and out: its output is ours."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import user_error
from peers import SMALL, assert_same, images_of, shaken, vit_of
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

import vitlit
from vitlit.data import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


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
BACK = {
    "ViTMAEModel": "ViTModel",
    "DeiTForImageClassification": "Dinov2WithRegistersForImageClassification",  # whose layer scale of 1 changes nothing
    "DeiTModel": "Dinov2WithRegistersModel",
}
POOLERS = ("ViTModel",)


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
    if not vit.config.num_classes:
        assert_same(vit(images), hf_output(theirs, images)[:, 0])

    out, back = tmp_path / "ours", BACK.get(name, name)
    if options.get("key_bias"):
        with pytest.raises(UserError, match=r"no bias of the keys"):
            vitlit.save_weights(vit, out, "hf")
        assert not out.exists()
        return
    if family != "DINOv3ViT":  # whose missing bias of the keys is a zero
        shaken(vit, 0.01)
    file = vitlit.save_weights(vit, out, "hf")
    assert file == out / "model.safetensors"
    assert_same(hf_output(hf_loaded(back, out), images), our_output(vit, images))
    again = vitlit.load(out).config
    assert again == replace(vit.config, layer_scale=again.layer_scale)


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
    user_error("does not show how many heads a ViT of width 240 has", vitlit.load, tmp_path / "theirs")
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
    user_error(f"names a shard {shards[-1].name} that is missing", vitlit.load, tmp_path / "theirs")


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
            {
                "crop_ratio": 1.0,
                "mean": (0.5, 0.4, 0.3),
                "std": (0.2, 0.3, 0.4),
                "interpolation": "bilinear",
                "squash": True,
            },
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


@pytest.mark.parametrize(
    ("processor", "about"),
    [
        ("ViTImageProcessor", {"size": 32}),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
        ("DeiTImageProcessor", {"size": 40, "crop_size": 32}),
        ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32}),
        ("BitImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": 32}),
    ],
)
def test_images_are_prepared_as_transformers_does(processor: str, about: dict[str, Any], tmp_path: Path) -> None:
    """Squashed to a square where transformers does so: the picture has 50 x 70 pixels."""
    family = "DeiT" if processor.startswith("DeiT") else "ViT"
    hf_model(family, f"{family}ForImageClassification").save_pretrained(tmp_path)
    theirs = getattr(transformers, processor)(**about)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**saved, **about}))  # a number, as older files have
    made = theirs(images=PICTURE, return_tensors="pt")["pixel_values"]
    prepare = vitlit.load(tmp_path).preprocess
    assert prepare is not None
    assert_same(prepare([PICTURE]), made, 1e-6)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_written_preprocessor_makes_the_same_input(interpolation: Any, squash: bool, tmp_path: Path) -> None:
    vit = vit_of()
    vit.preprocess = Preprocess((32, 32), 0.8, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), squash)
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
    user_error(message, vitlit.load, tmp_path / "theirs")


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    hf_model("ViT", "ViTModel").save_pretrained(tmp_path / "theirs")
    about = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**about, "model_type": "beit"}))
    user_error("model type beit", vitlit.load, tmp_path / "theirs")


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


@pytest.mark.parametrize(
    ("family", "name"), [("Dinov2", "Dinov2Model"), ("Dinov2WithRegisters", "Dinov2WithRegistersModel")]
)
def test_a_dinov2_of_no_square_is_refused_since_transformers_takes_its_table_as_one(
    family: str, name: str, tmp_path: Path
) -> None:
    hf_model(family, name, image_size=[32, 72]).save_pretrained(tmp_path / "theirs")
    user_error("takes every table as a square", vitlit.load, tmp_path / "theirs")
    vit = ViT(**{**SMALL, "image_size": (32, 72), "layer_scale": 1.0})
    user_error("takes the positions as a square", vitlit.save_weights, vit, tmp_path / "ours", "hf")


def test_fixed_positions_take_the_table_of_a_transformers_mae(tmp_path: Path) -> None:
    theirs = hf_model("ViTMAE", "ViTMAEModel", mask_ratio=0.0)
    images, table = images_of(32), theirs.embeddings.position_embeddings
    fixed = {**SMALL, "mlp_dim": 768, "position": "sincos2d_mae"}
    theirs.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="position is learned in the file and sincos2d_mae in the model"):
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
    with pytest.raises(UserError, match="position is learned in the file and sincos2d in the model"):
        vitlit.load_weights(ViT(**{**fixed, "position": "sincos2d"}), tmp_path / "theirs")


def test_a_size_that_the_file_tells_is_resampled_to_as_many_patches(tmp_path: Path) -> None:
    theirs = hf_model("ViT", "ViTModel")
    theirs.save_pretrained(tmp_path / "theirs")
    vit = ViT(**{**SMALL, "image_size": (16, 64), "mlp_dim": 768}).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs")
    assert report.resampled == ["pos_embed"]
    expected = resample_abs_pos_embed(theirs.embeddings.position_embeddings, [2, 8], [4, 4])
    assert (vit.get_parameter("pos_embed") - expected).abs().max() <= 1e-6


def test_a_dinov2_classifier_of_the_class_token_comes_back(tmp_path: Path) -> None:
    vit = vit_of(layer_scale=0.5, registers=2)
    vitlit.save_weights(vit, tmp_path / "ours", "hf")
    theirs, images = hf_loaded("Dinov2WithRegistersForImageClassification", tmp_path / "ours"), images_of(32)
    assert_same(vit(images), theirs(images).logits)
    assert_same(vitlit.load(tmp_path / "ours")(images), theirs(images).logits)

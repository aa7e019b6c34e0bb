"""Weights of timm, in and out: its output is ours."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import user_error
from peers import assert_same, images_of, shaken, ti16, timm_model, vit_of
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torchvision.transforms.v2.functional import to_pil_image

import vitlit
from vitlit.data import Preprocess
from vitlit.weights.timm import config

State = dict[str, Any]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


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


# The number of positions in the file, the class token's included: 13; 16, as many as a square without; 17, with.
@pytest.mark.parametrize("size", [(48, 64), (48, 80), (32, 128)])
def test_timm_of_no_square_in_and_out(size: tuple[int, int], tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224", size)), images_of(size)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = ti16(size)
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == []
    assert "square" not in str(report)
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", size, checkpoint_path=str(file))(images), vit(images))


def test_what_no_square_tells_is_asked_for(tmp_path: Path) -> None:
    save_file(timm_model("vit_tiny_patch16_224", (48, 64)).state_dict(), tmp_path / "theirs.safetensors")
    user_error("build the ViT with its image_size", vitlit.load, tmp_path / "theirs.safetensors")
    save_file(timm_model("vit_tiny_patch16_224", pos_embed="none").state_dict(), tmp_path / "theirs.safetensors")
    user_error("pos_embed is missing", vitlit.load, tmp_path / "theirs.safetensors")


def test_timm_registers_with_positions_in_the_table_fold_them(tmp_path: Path) -> None:
    theirs = shaken(timm_model("vit_small_patch14_reg4_dinov2", 70, no_embed_class=False))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit, images = vitlit.load(tmp_path / "theirs.safetensors"), images_of(70)
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(vit, tmp_path / "ours.pth", "timm")
    assert_same(timm_model("vit_small_patch14_reg4_dinov2", 70, checkpoint_path=str(file))(images), theirs(images))


@pytest.mark.parametrize("mode", ["squash", "center"])
def test_images_are_prepared_as_timm_does(mode: str, tmp_path: Path) -> None:
    """crop_mode squash, as SigLIP's models have it, of a picture that is not square."""
    cfg: dict[str, Any] = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": mode,
    }
    save_file(timm_model("vit_tiny_patch16_224", 64).state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(about))
    prepare: Any = vitlit.load(tmp_path).preprocess
    ramps = torch.linspace(0, 255, 300).expand(3, 200, 300).byte()
    theirs = create_transform((3, 64, 64), is_training=False, **cfg)(to_pil_image(ramps))
    assert (prepare(ramps)[0] - theirs).abs().max() < 3 / 127.5  # timm resizes with Pillow


@pytest.mark.parametrize("position", ["sincos2d", "sincos2d_mae"])
def test_fixed_positions_are_written_out_for_timm(position: Any, tmp_path: Path) -> None:
    vit, images = vit_of(patch_size=16, image_size=64, mlp_dim=768, position=position), images_of(64)
    file = vitlit.save_weights(vit, tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", checkpoint_path=str(file))(images), vit(images))


CONFIGS: list[dict[str, Any]] = [
    {"width": 384, "heads": 6, "mlp_dim": 1000},
    {"image_size": (48, 32), "mlp_dim": 717},
    {"pool": "gap", "class_token": True, "pool_prefix": True, "norm": "pooled", "class_position": False},
    {"pool": "map", "mlp": "gelu_tanh", "in_channels": 1},
    {"registers": 3, "mlp": "swiglu", "layer_scale": 0.1},
    {"distilled": True, "mlp": "quick_gelu"},
    {"distilled": True, "num_classes": 0},
    {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "qk_norm": True},  # on which a wrong epsilon shows
    {"sub_norm": True, "norm_kind": "rmsnorm", "qkv_bias": False, "proj_bias": False},
    {"image_size": (36, 20), "partial_patches": "drop", "final_norm": False, "position": "sincos2d"},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_the_config_builds_the_same_network_in_timm(options: dict[str, Any], tmp_path: Path) -> None:
    vit: Any = vit_of(**options)
    channels, sides = vit.config.in_channels, vit.config.sides
    vit.preprocess = Preprocess(sides, 0.8, "bilinear", (0.4,) * channels, (0.3,) * channels, squash=True)
    (tmp_path / "config.json").write_text(json.dumps(config(vit)))
    vitlit.save_weights(vit, tmp_path / "model.safetensors", "timm")
    theirs, images = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), images_of(sides, channels)
    assert_same(theirs(images), vit(images))
    assert_same(vitlit.load(tmp_path)(images), vit(images))
    known = resolve_data_config(model=theirs)
    assert (known["input_size"], known["interpolation"]) == ((channels, *sides), "bilinear")
    assert (known["crop_pct"], known["crop_mode"], known["std"]) == (0.8, "squash", [0.3] * channels)
    if vit.config.num_classes:  # another head is made, as for any model of timm's
        assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)(images).shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"hidden_dim": 20}, "hidden_dim 20"),
        ({"position": "rope"}, "position rope"),
        ({"norm_eps": 1e-3}, "norm_eps 0.001"),
        ({"norm_eps": 1e-5, "mlp": "swiglu"}, "norm_eps 1e-05"),
        ({"distilled": True, "registers": 1}, "registers 1"),
    ],
)
def test_a_network_that_timm_lacks_has_no_config(options: dict[str, Any], what: str) -> None:
    user_error(f"timm's .*{what}", config, vit_of(**options))


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
    images = images_of(64)
    for raw, ema in (("state_dict", "state_dict_ema"), ("model", "model_ema")):  # timm's names, DeiT's
        torch.save({raw: one.state_dict(), ema: averaged.state_dict()}, tmp_path / "a.pth")
        assert_same(vitlit.load(tmp_path / "a.pth")(images), averaged(images))


def test_half_precision_loads_as_single(tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224")).bfloat16(), images_of(64)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    assert {tensor.dtype for tensor in vit.state_dict().values()} == {torch.float32}
    assert_same(vit(images), theirs.float()(images))


# timm's models that are refused, with the word that the error says.
REFUSED = {
    "vit_base_patch16_18x2_224": "parallel blocks",
    "vit_base_patch16_rpn_224": "norms after attention and MLP",
    "vit_base_patch16_xp_224": "parallel blocks",
    "vit_dlittle_patch16_reg1_gap_256": "differential attention",
    "vit_dpwee_patch16_reg1_gap_256": "parallel blocks",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_huge_patch14_xp_224": "parallel blocks",
    "vit_large_patch14_xp_224": "parallel blocks",
    "vit_pwee_patch16_reg1_gap_256": "parallel blocks",
    "vit_small_patch16_18x2_224": "parallel blocks",
}
ALL = [n for module in ("vision_transformer", "deit") for n in timm.list_models(module=module)]


def test_there_are_as_many_models_as_the_table_in_the_docs_says() -> None:
    assert (len(ALL), len(REFUSED), len(set(REFUSED) - set(ALL))) == (179, 10, 0)


@pytest.mark.parametrize("name", ALL)
def test_every_vit_of_timm_from_its_folder_is_equal_or_refused(name: str, tmp_path: Path) -> None:
    """Narrow, with the heads that its name tells, of an image that no patch divides where the model takes one."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, depth=1)
    block = model.blocks[0]
    patch = int((re.findall(r"patch(\d+)", name) or [16])[0])
    heads = getattr(getattr(block, "attn", block), "num_heads", 12)
    options: dict[str, Any] = {"embed_dim": 8 * heads, "img_size": (2 * patch, 3 * patch + 2)}
    try:
        theirs, images = shaken(timm_model(name, **options), 0.1), images_of(options["img_size"])
        expected = theirs(images)
    except AssertionError:  # dynamic_img_size
        options["img_size"] = (2 * patch, 3 * patch)
        theirs, images = shaken(timm_model(name, **options), 0.1), images_of(options["img_size"])
        expected = theirs(images)
    save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    if name in REFUSED:
        user_error(REFUSED[name], vitlit.load, tmp_path)
    else:
        assert_same(vitlit.load(tmp_path)(images), expected)


def test_config_json_without_a_size_tells_that_of_its_preprocessing(tmp_path: Path) -> None:
    """SigLIP's 384 pixels with patches of 14: 27 x 27, and 6 pixels left."""
    theirs = shaken(timm.create_model("vit_so400m_patch14_siglip_384", embed_dim=64, depth=1, num_classes=10)).eval()
    save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    vit, images = vitlit.load(tmp_path), images_of(384)
    assert (vit.config.image_size, vit.grid) == ((384, 384), (27, 27))
    assert_same(vit(images), theirs(images))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"norm_layer": "batchnorm2d"}, "norm_layer batchnorm2d"),
        ({"act_layer": "relu"}, "act_layer relu"),
        ({"global_pool": "avgmax"}, "global_pool avgmax"),
        ({"attn_layer": "diff"}, "model argument attn_layer"),
    ],
)
def test_arguments_that_vitlit_has_not_are_refused(argument: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file(timm_model("vit_tiny_patch16_224").state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "model_args": argument}
    (tmp_path / "config.json").write_text(json.dumps(about))
    user_error(message, vitlit.load, tmp_path)


def test_what_a_bare_file_does_not_say_is_in_the_reports_first_line(tmp_path: Path) -> None:
    save_file(timm_model("vit_base_patch16_clip_224", depth=1).state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    first = str(vitlit.load_weights(vit, tmp_path / "theirs.safetensors")).splitlines()[0].split("; ")[0]
    assert first.startswith("timm, assuming what the file does not say: ")
    for assumed in ("mlp gelu", "norm_eps 1e-05", "pool cls", "heads 12", "image_size a square grid"):
        assert assumed in first
    assert vit.config.norm_eps == 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"width": 36, "heads": 4, "norm_eps": 1e-3, "mlp": "gelu_tanh", "image_size": (16, 72)},
        {"width": 36, "heads": 2, "position": "sincos2d", "image_size": (24, 32), "pool": "gap", "class_token": True},
        {"width": 36, "heads": 2, "position": "sincos2d_mae", "registers": 2},
        {"width": 24, "heads": 6, "class_position": False, "image_size": (24, 40)},  # 15 + 1 positions are a square
        {"width": 24, "heads": 6, "class_position": True, "image_size": (24, 40), "mlp": "quick_gelu"},
        {"width": 24, "heads": 6, "pre_norm": True, "patch_bias": False, "image_size": 35, "partial_patches": "drop"},
        {"width": 24, "heads": 2, "pool": "map", "class_token": True, "pool_prefix": True, "resampling": "bicubic"},
    ],
    ids=str,
)
def test_an_export_for_timm_reads_back_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of(**options)
    vit.classes = [f"class {i}" for i in range(10)]
    vit.preprocess = Preprocess(vit.config.sides, 0.7, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    again = vitlit.load(vitlit.save_weights(vit, tmp_path / "a.safetensors", "timm"))
    assert again.config == vit.config
    assert (again.classes, again.preprocess) == (vit.classes, vit.preprocess)
    images = images_of(vit.config.sides)
    assert_same(again(images), vit(images))


def test_an_exported_table_that_was_trained_on_is_learned(tmp_path: Path) -> None:
    file = vitlit.save_weights(vit_of(position="sincos2d"), tmp_path / "a.safetensors", "timm")
    with safe_open(file, framework="pt") as opened:
        state, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    state["pos_embed"][0, 3] += 0.1
    save_file(state, file, metadata)
    vit = vitlit.load(file)
    assert vit.position == "learned"
    assert torch.equal(vit.state_dict()["pos_embed"], state["pos_embed"])
    save_file(state, file, {**metadata, "vitlit_export": "{"})
    user_error("looks like a file of timm, but is not whole", vitlit.load, file)

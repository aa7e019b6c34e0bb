"""`vitlit export`: what other runtimes give for its files is what the ViT gives, and what differs is not kept."""

import csv
import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import Result, done, refused, user_error
from peers import vit_of
from PIL import Image
from torch import Tensor

import vitlit as package
from vitlit.export import Exported, bake, check, export, load, probabilities
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT

Command = Callable[..., Result]
NAMES = [f"Klasse {i} é" for i in range(10)]
MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
# Most options at once: each leaves a trace in the logits.
RICH: dict[str, Any] = {
    "position": "rope",
    "registers": 2,
    "mlp": "swiglu",
    "qk_norm": True,
    "pool": "gap",
    "norm": "pooled",
}
DROPPED: dict[str, Any] = {"image_size": (36, 20), "partial_patches": "drop"}
PIXELS = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def ready(**options: Any) -> Any:
    """A ViT of 10 named classes with its preprocessing."""
    torch.manual_seed(0)
    vit = vit_of(**{"depth": 1, **options})
    grey = vit.config.in_channels == 1
    vit.preprocess = Preprocess(vit.config.sides, 0.8, mean=MEAN[: 1 if grey else 3], std=STD[: 1 if grey else 3])
    vit.classes = NAMES[: vit.config.num_classes]
    return vit


def normalised(pixels: Tensor) -> np.ndarray:
    """By numpy: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)."""
    scaled = (pixels.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    return scaled.transpose(0, 3, 1, 2).astype(np.float32)


@torch.no_grad()
def logits_of(vit: ViT, pixels: Tensor = PIXELS) -> Tensor:
    return vit(torch.from_numpy(normalised(pixels)))


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A ViT with a temperature, and its ONNX file, from pixels to probabilities."""
    vit, file = ready(**RICH), tmp_path_factory.mktemp("rich") / "rich.onnx"
    vit.temperature = 1.7
    export(vit, file, softmax=True, opset=18)
    return vit, file


def test_onnxruntime_gives_the_probabilities_of_any_batch(rich: tuple[Any, Path]) -> None:
    vit, file = rich
    session = onnxruntime.InferenceSession(file)
    expected = (logits_of(vit) / 1.7).softmax(-1).numpy()
    assert expected.max() - expected.min() > 0.2
    ends = session.get_inputs() + session.get_outputs()
    assert [(each.name, each.shape) for each in ends] == [("images", ["batch", 32, 32, 3]), ("outputs", ["batch", 10])]
    for count in (1, 5):
        (found,) = session.run(["outputs"], {"images": PIXELS[:count].numpy()})
        np.testing.assert_allclose(found, expected[:count], atol=1e-5)
    with pytest.raises(Exception, match=r"images(?s:.*)Got: 48 Expected: 32"):
        session.run(None, {"images": np.zeros((1, 48, 48, 3), np.uint8)})


def test_the_file_and_the_json_beside_it_say_all_that_its_use_needs(rich: tuple[Any, Path]) -> None:
    vit, file = rich
    about = json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map["vitlit"])
    assert about["classes"] == NAMES
    assert about["preprocess"] == {
        **vars(vit.preprocess),
        **{n: list(getattr(vit.preprocess, n)) for n in ("image_size", "mean", "std")},
    }
    expected = {"temperature": 1.7, "input": "uint8", "shape": ["batch", 32, 32, 3], "opset": 18}
    assert {name: about[name] for name in expected} == expected
    assert ViT(**about["vit"]).config == vit.config
    beside = json.loads(file.with_name("rich.onnx.json").read_text())
    checked = beside.pop("checked")
    assert beside == about
    assert checked["largest_difference"] < 1e-4
    assert "scikit-learn" in checked["of"]


def test_predict_reads_it_and_writes_what_the_run_would(
    vitlit: Command, rich: tuple[Any, Path], few: Path, tmp_path: Path
) -> None:
    vit, file = rich
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    given = ("predict", file, few / "val", tmp_path / "broken.png", "--out", "out/found.csv")
    refused(vitlit(*given), "broken.png", "--data.on_bad_image skip")
    assert "11 images; 1 could not be read" in done(vitlit(*given, "--data.on_bad_image", "skip"))
    rows = list(csv.DictReader((tmp_path / "out" / "found.csv").open()))
    paths = sorted((few / "val").glob("*/*"))
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert list(rows[0])[:5] == ["path", "class", "probability", "class_2", "probability_2"]
    assert list(rows[0])[-1] == "probability_5"
    with torch.no_grad():
        found = (vit(vit.preprocess(paths)) / 1.7).softmax(-1).sort(descending=True)
    for row, values, classes in zip(rows, *(part.tolist() for part in found), strict=True):
        assert row["class"] == NAMES[classes[0]]
        assert float(row["probability_5"]) == pytest.approx(values[4], abs=2e-5)
    refused(vitlit(*given), "out/found.csv exists: name another")
    (tmp_path / "bad.onnx").write_bytes(b"none")
    refused(vitlit("predict", "bad.onnx", few / "val", "--out", "a.csv"), "bad.onnx", "onnxruntime")


def test_pixels_and_normalised_images_give_the_same(rich: tuple[Any, Path], tmp_path: Path) -> None:
    vit, file = rich
    export(vit, tmp_path / "a.pt2", input="float")
    files = {"vitlit.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files)
    about = json.loads(files["vitlit.json"])
    assert (about["classes"], about["temperature"], about["shape"]) == (NAMES, 1.7, ["batch", 3, 32, 32])
    images = torch.from_numpy(normalised(PIXELS))
    logits = program.module()(images)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, logits_of(vit), atol=1e-5, rtol=0)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"images": PIXELS.numpy()})
    np.testing.assert_allclose((logits / 1.7).softmax(-1).numpy(), found, atol=1e-5)
    torch.testing.assert_close(program.module()(images[:1]), logits[:1], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match=r"images.*32"):
        program.module()(torch.zeros(1, 3, 48, 48))


@pytest.mark.long
@pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_aotinductor_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    vit, file = ready(registers=1), tmp_path / "a.pt2"
    vit.temperature = 1.7
    export(vit, file, softmax=True, aot=True)
    network: Any = torch._inductor.aoti_load_package(file)
    about = json.loads(network.get_metadata()["vitlit"])
    assert (about["classes"], about["temperature"], about["shape"]) == (NAMES, 1.7, ["batch", 32, 32, 3])
    expected = (logits_of(vit) / 1.7).softmax(-1)
    for count in (1, 5):
        torch.testing.assert_close(network(PIXELS[:count]), expected[:count], atol=1e-5, rtol=0)
    with zipfile.ZipFile(file) as archive:
        assert any(name.endswith(".so") for name in archive.namelist())


def test_values_of_a_range_come_in_as_floats(vitlit: Command, tmp_path: Path) -> None:
    vit, file, colours = ready(in_channels=4), tmp_path / "four.onnx", (0.1, 0.2, 0.3, 0.4)
    vit.preprocess = Preprocess(vit.config.sides, mean=colours, std=colours, range=(0, 4095))
    for made in (partial(export, vit, file), partial(export, vit, tmp_path / "folder", input="float")):
        user_error(r"of data\.range, .*; export to \.onnx or \.pt2 with --input float", made)
    assert export(vit, file, input="float")["shape"] == ["batch", 4, 32, 32]
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{i}.npy" for i in range(3)]
    for path in paths:
        np.save(path, np.random.default_rng(len(path.name)).integers(0, 4096, (40, 50, 4), np.uint16))
    done(vitlit("predict", file, tmp_path / "images", "--out", "found.csv"))
    with torch.no_grad():
        expected = vit(vit.preprocess(paths)).softmax(-1).max(-1).values.tolist()
    rows = csv.DictReader((tmp_path / "found.csv").open())
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("options", "half"),
    [
        ({"distilled": True, "pre_norm": True, "norm_kind": "rmsnorm", "sub_norm": True, "patch_norm": True}, True),
        (
            {"pool": "map", "position": "sincos2d", "mlp": "quick_gelu", "in_channels": 1, **DROPPED, "num_classes": 0},
            False,
        ),
    ],
)
def test_what_a_vit_may_have_is_exported(options: dict[str, Any], half: bool, tmp_path: Path) -> None:
    vit = ready(**options)
    checked = export(vit, tmp_path / "a.pt2", half=half)["checked"]
    pixels = torch.randint(0, 256, (3, *vit.config.sides, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = vit(vit.preprocess.normalise(pixels.permute(0, 3, 1, 2)))
    found = torch.export.load(tmp_path / "a.pt2").module()(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if half else 1e-5)
    assert (checked["largest_difference"] > 1e-5) == half


@pytest.mark.parametrize(
    "options", [{}, {"registers": 2, "layer_scale": 0.5}, {"layer_scale": 0.5}, {"distilled": True}], ids=str
)
def test_transformers_pipeline_gives_names_and_probabilities(
    options: dict[str, Any], photo: Image.Image, tmp_path: Path
) -> None:
    vit = ready(**options)
    vit.temperature = 2.0
    export(vit, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vitlit.json").read_text())["temperature"] == 2.0
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    found = {each["label"]: each["score"] for each in classify(photo, top_k=10)}
    with torch.no_grad():
        expected = (vit(vit.preprocess(photo)) / 2).softmax(-1)[0].tolist()
    assert found == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-3)
    again = package.load(tmp_path / "out")
    torch.testing.assert_close(logits_of(again), logits_of(vit) / 2, atol=1e-5, rtol=0)


def test_a_file_whose_outputs_differ_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vit, right = ready(), Exported.forward
    monkeypatch.setattr(Exported, "forward", lambda self, images: right(self, images.flip(0)))
    user_error(r"differ from the ViT's by .*a\.pt2 was not written", export, vit, tmp_path / "a.pt2")
    monkeypatch.setattr("vitlit.export.save_weights", lambda vit, *rest: package.save_weights(vit.apply(spoil), *rest))
    user_error(r"differ from the ViT's.*out was not written", export, vit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def spoil(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data[0] += 0.01


def test_int8_that_costs_more_than_a_point_is_refused() -> None:
    vit = ready()
    about = {"input": "uint8", "softmax": False, "half": False, "int8": True, "activation": "softmax"}
    pixels = PIXELS.repeat(20, 1, 1, 1)
    labels = logits_of(vit, pixels).argmax(1)

    def wrong(count: int) -> Callable[[Tensor], Tensor]:
        """A network that is right except on the first images."""
        return lambda _: torch.where(torch.arange(100)[:, None] < count, -1, 1) * logits_of(vit, pixels)

    kept = check(vit, wrong(1), [(pixels, labels)], about, Path("a.onnx"))
    assert (kept["top1_before"], kept["top1_after"]) == (1, pytest.approx(0.99))
    user_error(r"from 100\.00 to 98\.00 %", check, vit, wrong(2), [(pixels, labels)], about, Path("a.onnx"))


def test_positions_are_those_of_the_size() -> None:
    for position in ("learned", "sincos2d", "rope"):
        vit = ready(position=position)
        images = torch.randn(2, 3, 48, 16)
        with torch.no_grad():
            expected = vit(images)
            bake(vit, (48, 16))
            torch.testing.assert_close(vit(images), expected)
        assert (vit.grid, vit.config.sides) == ((6, 2), (48, 16))


def test_the_command_exports_a_run_and_refuses_in_a_line(vitlit: Command, work: Path, few: Path) -> None:
    start = ("export", "runs/pretrain")
    said = done(vitlit(*start, "a.pt2", "--input", "float", "--image_size", "32", "--root", few))
    assert "on 11 images, val of" in said
    about = json.loads((work / "a.pt2.json").read_text())
    assert (about["shape"], about["classes"]) == (["batch", 3, 32, 32], ["0", "1", "2", "3"])
    before = sorted(work.iterdir())
    for arguments, words in (
        (["a.tflite"], "neither .onnx nor .pt2"),
        (["b.pt2", "--int8", "true"], "b.pt2 takes no int8"),
        (["b.onnx", "--int8", "true"], "--root FOLDER"),
        (["b.onnx", "--half", "true", "--int8", "true"], "two precisions"),
        (["b.onnx", "--opset", "9"], "opset is 9; give from 18 to 23"),
        (["b", "--softmax", "true"], "b takes no softmax"),
        (["b.onnx", "--aot", "true"], "b.onnx takes no aot"),
        (["b.pt2", "--image_size", "30"], "does not divide"),
        (["b.pt2", "--root", "nowhere"], "nowhere"),
        (["a.pt2"], "a.pt2 exists: name another"),
    ):
        refused(vitlit(*start, *arguments), words)
    assert sorted(work.iterdir()) == before


def test_a_missing_compiler_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    user_error(
        r"aot: there is no C\+\+ compiler; apt install g\+\+", partial(export, aot=True), ready(), tmp_path / "a.pt2"
    )


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    user_error("this needs onnxscript: pip install onnx onnxscript onnxruntime", export, ready(), tmp_path / "a.onnx")


def test_a_run_and_its_copies_tell_what_makes_its_logits_probabilities(
    finished: Path, vitlit: Command, tmp_path: Path
) -> None:
    file = finished / "checkpoints" / "best.ckpt"
    assert load(finished)[1] == "softmax"
    for loss in ("sigmoid", "bce"):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["hyper_parameters"]["objective"]["init_args"] = {"loss": loss}
        torch.save(checkpoint, file)
        assert load(finished)[1] == "sigmoid"
    assert "lost" not in done(vitlit("weights", "convert", finished, "a.safetensors", "--format", "vitlit"))
    assert load(tmp_path / "a.safetensors")[1] == "sigmoid"
    vit = ready()
    vit.activation = "sigmoid"
    package.save_weights(vit, tmp_path / "b.safetensors")
    said = done(vitlit("weights", "convert", "b.safetensors", "b.pth", "--format", "timm"))
    assert "a sigmoid of each logit is lost" in said
    assert load(tmp_path / "b.pth")[1] == "softmax"
    logits = torch.tensor([[1.0, -2.0]])
    about = {"activation": "sigmoid", "temperature": 2.0}
    torch.testing.assert_close(probabilities(logits, about), 1 / (1 + torch.exp(-logits / 2)))
    assert probabilities(logits, {**about, "activation": None}) is logits

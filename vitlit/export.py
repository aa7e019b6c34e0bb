"""Export a ViT to ONNX, torch.export or transformers. What is written is kept only if its outputs are the ViT's."""

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitlit.errors import UserError, check_range, need, without_compiler
from vitlit.files import whole_file, whole_folder, write_text, writing
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights import door
from vitlit.weights.hub import CONFIG
from vitlit.weights.save import save_weights

PACKAGES = {".onnx": ["onnx", "onnxscript", "onnxruntime"], ".pt2": [], "": ["transformers"]}  # by what is written
OPTIONS = {".onnx": ["input", "softmax", "half", "int8", "opset"], ".pt2": ["input", "softmax", "half", "aot"], "": []}
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of the largest output, or of 1 if that is less
HALF_AGREEMENT = 0.95  # the least share of images whose first class float16 leaves as it is
INT8_LOSS = 0.01  # the most of the top-1 accuracy that int8 may cost
TASKS = {"softmax": "single_label_classification", "sigmoid": "multi_label_classification", None: "regression"}
ABOUT = "vitlit"  # the key of what is known of a network in ONNX's metadata, and with .json in a .pt2

Activation = Literal["softmax", "sigmoid"] | None
Batches = Iterable[tuple[Tensor, Tensor]]  # cropped images (B, H, W, C), and labels (B,), -1 where there are none


def load(source: str | Path, image_size: int | None = None) -> tuple[Any, Activation]:
    """The ViT of a run or file at the size of its preprocessing or another, and what makes its logits probabilities."""
    vit = door.load_prepared(source, image_size)
    bake(vit, vit.preprocess.image_size)
    return vit, vit.activation if vit.config.num_classes > 1 else None


def bake(vit: ViT, size: tuple[int, int]) -> None:
    """Make a size (height, width) the ViT's own, with the positions that it has there."""
    grid = vit.grid_of(*size)
    if (table := vit.positions(grid)) is not None:
        vit.pos_embed = nn.Parameter(table.detach()) if vit.position == "learned" else table
    vit.grid, vit.config = grid, replace(vit.config, image_size=size)


class Exported(nn.Module):
    """A ViT with what `about` has before and after it: images -> (B, classes) or (B, D), float32."""

    def __init__(self, vit: Any, about: dict[str, Any]) -> None:
        super().__init__()
        self.about, self.normalise = about, vit.preprocess.normalise
        self.dtype = torch.float16 if about["half"] else torch.float32
        self.vit = deepcopy(vit).to(self.dtype).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.about["input"] == "uint8":
            images = self.normalise(images.permute(0, 3, 1, 2))
        outputs = self.vit(images.to(self.dtype)).float()
        return probabilities(outputs, self.about) if self.about["softmax"] else outputs

    def program(self) -> torch.export.ExportedProgram:
        """The computation for any batch, but one size of images: the positions are those of its patches."""
        pixels = torch.uint8 if self.about["input"] == "uint8" else torch.float32
        images = torch.zeros(2, *self.about["shape"][1:], dtype=pixels)
        return torch.export.export(self.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def probabilities(logits: Tensor, about: dict[str, Any]) -> Tensor:
    """Class probabilities, at the temperature; what regresses numbers gives them as they are."""
    if about["activation"] is None:
        return logits
    logits = logits / about["temperature"]
    return logits.softmax(-1) if about["activation"] == "softmax" else logits.sigmoid()


def export(
    vit: Any,
    out: Path,
    batches: Batches | None = None,
    of: str = "scikit-learn's two photographs",
    activation: Activation = "softmax",
    input: Literal["uint8", "float"] = "uint8",
    softmax: bool = False,
    half: bool = False,
    int8: bool = False,
    opset: int | None = None,
    aot: bool = False,
) -> dict[str, Any]:
    """Write OUT.onnx, OUT.pt2 or a folder for transformers, and a JSON beside or in it, whose content it returns.

    UserError, and nothing is written, if a network cannot be exported so, or its outputs differ from the ViT's: by 1e-4
    of the largest; in float16 by 2 %, or in the first class of one image in 20; in int8 if top-1 falls by over a point.

    Args:
        vit: of the size of its `preprocess`; see `load`.
        out: what is written, by its ending; a name without one is a folder.
        batches: images to compare outputs on, by default `photographs`; for int8 with labels.
        of: whose images these are, for the JSON.
        activation: what makes probabilities of the logits; None for numbers.
        input: uint8 takes pixels (B, H, W, 3) and normalises them, float takes what `Preprocess` gives, (B, C, H, W).
        softmax: whether probabilities come out: the activation, after the temperature if there is one.
        half: whether the weights are float16.
        int8: whether onnxruntime quantises the weights to 8 bits, and activations as they come.
        opset: of ONNX, 18 to 23; by default torch's.
        aot: whether AOTInductor compiles a .pt2, which C++ then runs without Python.
    """
    options = {"input": input, "softmax": softmax, "half": half, "int8": int8, "opset": opset, "aot": aot}
    sides, pixels = vit.config.sides, input == "uint8"
    about: dict[str, Any] = options | {
        "vitlit": version("vitlit"),
        "shape": ["batch", *sides, 3] if pixels else ["batch", vit.config.in_channels, *sides],
        "layout": "NHWC, RGB" if pixels else "NCHW",
        "activation": activation if vit.config.num_classes else None,
        "temperature": vit.temperature,
        "classes": vit.classes,
        "preprocess": asdict(vit.preprocess),
        "vit": vit.config.plain(),
    }
    check_options(vit, out, about, batches is not None)
    with writing(out, "name another"):
        out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    with writing(out, "name another"), whole_file(out, partial) if out.suffix else whole_folder(out) as target:
        network = {".onnx": onnx, ".pt2": pt2, "": folder}[out.suffix](Exported(vit, about), target)
        about["checked"] = {"of": of, **check(vit, network, batches or photographs(vit.preprocess), about, out)}
        beside = out.with_name(f"{out.name}.json") if out.suffix else target / f"{ABOUT}.json"
        write_text(beside, json.dumps(about, indent=1) + "\n")
    return about


def check_options(vit: Any, out: Path, about: dict[str, Any], measured: bool) -> None:
    """UserError for what cannot be exported so, or a package that is missing."""
    if out.suffix not in OPTIONS:
        raise UserError(f"{out} ends in neither .onnx nor .pt2; give it one of these, or no ending for a folder")
    need(*PACKAGES[out.suffix])
    check_range("vitlit export", 18, 23, opset=about["opset"])
    given = {name for name in ("softmax", "half", "int8", "opset", "aot") if about[name]}
    given |= {"input"} if about["input"] == "float" else set()
    classes = vit.config.num_classes if about["activation"] else 0
    size = sum(p.numel() for p in vit.parameters()) * (2 if about["half"] else 4)
    refusals = {
        f"{out} has no name before its ending; give it one": out.name in OPTIONS,
        "the weights are of data.range, not of pixels of 8 bits; export to .onnx or .pt2 with --input float": bool(
            vit.preprocess.range
        )
        and (not out.suffix or about["input"] == "uint8"),
        f"{out} takes no {' '.join(sorted(given))}; leave out what is not for it": given - {*OPTIONS[out.suffix]},
        f"{out}: transformers has no pretraining head; finetune the weights first": not out.suffix
        and vit.config.hidden_dim is not None,
        f"aot: {without_compiler('cpu')}": given >= {"aot"} and without_compiler("cpu"),
        "half and int8 are two precisions; give one of them": given >= {"half", "int8"},
        "int8 is kept for its accuracy; give --root FOLDER to measure it on val": "int8" in given and not measured,
        "softmax and int8 are for classifiers, which these weights are not": given & {"softmax", "int8"}
        and not classes,
        f"{out}: a folder is for transformers' classifiers of RGB images, which these weights are not; `vitlit weights "
        "convert` writes others": not out.suffix and not (classes and vit.config.in_channels == 3),
        "an ONNX file is below 2 GiB, unlike these weights; export half, or to .pt2": out.suffix == ".onnx"
        and size >= 2**31,
    }
    for why, wrong in refusals.items():
        if wrong:
            raise UserError(why)


def onnx(module: Exported, file: Path) -> Callable[[Tensor], Tensor]:
    """Write ONNX, and run it."""
    about = module.about
    ends: dict[str, Any] = {"input_names": ["images"], "output_names": ["outputs"]}
    ends["dynamic_shapes"] = ({0: "batch"},)  # a program of torch.export calls it s34
    program = torch.onnx.export(module.program(), (), **ends, opset_version=about["opset"], verbose=False)
    assert program is not None
    about["opset"] = program.model.opset_imports[""]
    program.model.metadata_props[ABOUT] = json.dumps(about)
    # torch has inferred the shapes, as the step before quantisation does that onnxruntime would recommend in a warning.
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
    program.save(file)
    if about["int8"]:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(file, file, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    session = open_onnx(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_onnx(file: Path) -> Any:
    """An onnxruntime session on the CPU; UserError if it cannot read the file."""
    need("onnxruntime")
    import onnxruntime

    if not file.is_file():
        raise UserError(f"{file} does not exist; give a file that `vitlit export` made, or the folder of a run")
    try:
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise UserError(f"{file} is not a file that onnxruntime runs: {' '.join(str(error).split())[:200]}") from error


def pt2(module: Exported, file: Path) -> Callable[[Tensor], Tensor]:
    """Write a program of torch.export, or what AOTInductor compiles of it, and run it."""
    program, about = module.program(), json.dumps(module.about)
    if not module.about["aot"]:
        torch.export.save(program, file, extra_files={f"{ABOUT}.json": about})
        return torch.export.load(file).module()
    # Were inputs checked (AOTI_RUNTIME_CHECK_INPUTS=1), a batch of one would be refused.
    options = {"aot_inductor.metadata": {ABOUT: about}, "aot_inductor.check_lowerbound": False}
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    network: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(file))
    return network


def calibrated(vit: Any) -> Any:
    """A copy that has its temperature in the head, for formats without one."""
    vit = deepcopy(vit)
    for name, parameter in vit.named_parameters():
        if name.startswith("head"):
            parameter.data /= vit.temperature
    vit.temperature = 1.0
    return vit


def folder(module: Exported, folder: Path) -> Callable[[Tensor], Tensor]:
    """Write a folder for transformers, which has no temperature, with that in the head; and run it."""
    from transformers import AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    save_weights(calibrated(module.vit), folder, "hf")
    config = json.loads((folder / CONFIG).read_text()) | {"problem_type": TASKS[module.about["activation"]]}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda pixels: model(module.normalise(pixels.permute(0, 3, 1, 2))).logits


def photographs(preprocess: Preprocess) -> Batches:
    """scikit-learn's two photographs, each whole, mirrored and in two halves."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    if preprocess.range:  # its channels, repeated
        photos = [photo[[i % 3 for i in range(len(preprocess.mean))]] / 255 for photo in photos]
    images = [part for photo in photos for part in (photo, photo.flip(-1), *photo.chunk(2, -1))]
    yield torch.stack([preprocess.crop(image).permute(1, 2, 0) for image in images]), torch.full((len(images),), -1)


@torch.inference_mode()
def check(
    vit: Any, network: Callable[[Tensor], Tensor], batches: Batches, about: dict[str, Any], out: Path
) -> dict[str, Any]:
    """How a network's outputs differ from those of the ViT in float32; UserError if by too much."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for pixels, labels in batches:
        images = vit.preprocess.normalise(pixels.permute(0, 3, 1, 2)).contiguous()
        ours = vit(images) if out.suffix else vit(images) / about["temperature"]
        theirs = network(pixels if about["input"] == "uint8" else images)
        found.append((probabilities(ours, about) if about["softmax"] else ours, theirs, labels))
    ours, theirs, labels = map(torch.cat, zip(*found, strict=True))
    firsts = ours.argmax(1), theirs.argmax(1)
    difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    same = (firsts[0] == firsts[1]).double().mean().item() if about["activation"] else None
    before, after = ((first == labels).double().mean().item() for first in firsts)
    result = {"images": len(ours), "largest_difference": difference, "largest_output": largest, "same_first": same}
    tolerance, least = (HALF_TOLERANCE, HALF_AGREEMENT) if about["half"] else (TOLERANCE, 0.0)
    if about["int8"]:
        result |= {"top1_before": before, "top1_after": after}
        if not before - after <= INT8_LOSS + 1e-9:  # exactly a point is kept
            raise UserError(f"int8 takes top-1 from {100 * before:.2f} to {100 * after:.2f} %; {out} was not written")
    elif not (difference <= tolerance * max(1.0, largest) and (same is None or same >= least)):
        alike = "features" if same is None else f"the first class is the same for {100 * same:.1f} % of images"
        raise UserError(
            f"outputs differ from the ViT's by {difference:.1e} of {largest:.2g}, {alike}; {out} was not written"
        )
    return result

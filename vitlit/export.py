"""Export a ViT to ONNX, torch.export or transformers. A file is kept only if it gives the ViT's own outputs."""

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vitlit
from vitlit.errors import UserError, check_range
from vitlit.files import whole_file, whole_folder, write_text, writing
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights.checkpoint import open_checkpoint
from vitlit.weights.files import locate
from vitlit.weights.save import save_weights

NEEDS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": (), "": ("transformers",)}  # by a file's ending
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of the largest output, or of 1 if that is less
HALF_AGREEMENT = 0.95  # the least share of images whose first class float16 leaves as it is
INT8_LOSS = 0.01  # the most of the top-1 accuracy that int8 may cost
LARGEST = 2**31  # bytes of an ONNX file
ABOUT = "vitlit"  # the key of what is known of a network, in the metadata of ONNX and in a .pt2 (.json)

Activation = Literal["softmax", "sigmoid"] | None
Batches = Iterable[tuple[Tensor, Tensor]]  # pixels, uint8 (B, H, W, 3), and labels (B,), -1 where there are none
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What is inside an exported network, and in which numbers."""

    input: Literal["uint8", "float"] = "uint8"
    """uint8 takes pixels (B, H, W, 3) and normalises them; float takes what `Preprocess` gives, (B, C, H, W)."""
    softmax: bool = False
    """Whether probabilities come out: the softmax, after the temperature if there is one. A run that was trained with
    a sigmoid per class gets that."""
    opset: int | None = None
    """Of ONNX; None for torch's default."""
    half: bool = False
    """Whether weights are float16. Input and output stay as they are."""
    int8: bool = False
    """Whether onnxruntime quantises the weights to 8 bits, and activations as they come."""


class Exported(nn.Module):
    """A ViT between the input and the output of the options: images -> (B, classes) or (B, D), float32."""

    def __init__(self, vit: ViT, about: dict[str, Any]) -> None:
        super().__init__()
        self.about, self.preprocess = about, vit.preprocess
        self.vit = deepcopy(vit).half() if about["half"] else vit
        self.dtype = torch.float16 if about["half"] else torch.float32

    def forward(self, images: Tensor) -> Tensor:
        if self.about["input"] == "uint8":
            assert isinstance(self.preprocess, Preprocess)
            images = self.preprocess.normalise(images.permute(0, 3, 1, 2))
        outputs = self.vit(images.to(self.dtype)).float()
        return probabilities(outputs, self.about) if self.about["softmax"] else outputs


def probabilities(logits: Tensor, about: dict[str, Any]) -> Tensor:
    """Class probabilities, at the temperature; what regresses numbers gives them as they are."""
    if about["activation"] is None:
        return logits
    logits = logits / (about["temperature"] or 1.0)
    return logits.softmax(-1) if about["activation"] == "softmax" else logits.sigmoid()


def load(source: str | Path, image_size: int | None = None) -> tuple[ViT, Activation]:
    """The ViT of a run or file at the size of its preprocessing or another, and what makes its logits probabilities."""
    vit, path = vitlit.load(source), locate(source)
    if isinstance(vit.preprocess, Preprocess):
        if image_size is not None:
            vit.preprocess = replace(vit.preprocess, image_size=(image_size, image_size))
        bake(vit, vit.preprocess.image_size)
    if vit.config.num_classes < 2:
        return vit, None
    made_with = open_checkpoint(path).get("hyper_parameters", {}) if path.suffix == ".ckpt" else {}
    loss = ((made_with.get("objective") or {}).get("init_args") or {}).get("loss")
    return vit, "sigmoid" if loss in ("sigmoid", "bce") else "softmax"


def bake(vit: ViT, size: tuple[int, int]) -> None:
    """Make a size (height, width) the ViT's own, with the positions that it has there."""
    grid = vit.grid_of(*size)
    if (table := vit.positions(grid)) is not None:
        vit.pos_embed = nn.Parameter(table.detach()) if vit.position == "learned" else table
    vit.grid, vit.config = grid, replace(vit.config, image_size=size)


def describe(vit: ViT, options: Options, activation: Activation = "softmax") -> dict[str, Any]:
    """What a user of an exported file must know, as values that JSON can hold."""
    assert isinstance(vit.preprocess, Preprocess)
    height, width = vit.config.sides
    pixels = options.input == "uint8"
    return {
        "vitlit": vitlit.__version__,
        **asdict(options),
        "shape": ["batch", height, width, 3] if pixels else ["batch", vit.config.in_channels, height, width],
        "layout": "NHWC, RGB" if pixels else "NCHW",
        "output": "probabilities" if options.softmax else "logits" if vit.config.num_classes else "features",
        "activation": activation if vit.config.num_classes else None,
        "temperature": getattr(vit, "temperature", None),
        "classes": vit.classes,
        "preprocess": asdict(vit.preprocess),
        "vit": vit.config.plain(),
    }


def export(
    vit: ViT,
    out: Path,
    batches: Batches | None = None,
    options: Options = Options(),
    activation: Activation = "softmax",
    of: str = "scikit-learn's two photographs",
) -> dict[str, Any]:
    """Write OUT.onnx, OUT.pt2 or a folder for transformers, with a JSON; returns its content.

    UserError, and nothing is written, if the network cannot be exported so, or its outputs differ from the ViT's: by
    1e-4 of the largest; in float16 by 2 %, or in the first class of an image in 20; in int8 if the top-1 accuracy falls
    by more than a point.

    Args:
        vit: at the size of its `preprocess`.
        out: what is written, by its ending; a name without one is a folder.
        batches: images to compare the outputs on, and for int8 to measure the accuracy on.
        activation: what makes probabilities of the logits; None for numbers.
        of: whose images these are, for the JSON.
    """
    beside = out.with_name(f"{out.name}.json") if out.suffix else out / "vitlit.json"
    check_options(vit, out, options, activation, batches is not None)
    for path in (out, beside) if out.suffix else ():
        if path.exists():
            raise UserError(f"{path} exists; give another name")
    about = describe(vit, options, activation)
    with writing(out, "name another"):
        out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    with whole_file(out, partial) if out.suffix else whole_folder(out) as target:
        WRITERS[out.suffix](Exported(vit, about), target, about)
        about["checked"] = {"of": of, **check(vit, OPENERS[out.suffix](target), batches, about, out)}
        write_text(target / beside.name if target.is_dir() else beside, json.dumps(about, indent=1) + "\n")
    return about


def check_options(vit: ViT, out: Path, options: Options, activation: Activation, measured: bool) -> None:
    """UserError for what cannot be exported as asked, or a package that is missing."""
    if out.suffix not in NEEDS:
        raise UserError(f"{out} ends in neither .onnx nor .pt2, and has an ending unlike a folder; give one of these")
    need(*NEEDS[out.suffix])
    if not isinstance(vit.preprocess, Preprocess):
        raise UserError("the weights do not say how to preprocess images; set vit.preprocess, and save_weights")
    check_range("vitlit export", 18, 23, opset=options.opset)
    if out.suffix != ".onnx" and (options.int8 or options.opset):
        raise UserError(f"int8 and opset are for .onnx; leave them out, or name {out.with_suffix('.onnx')}")
    if options.half and options.int8:
        raise UserError("half and int8 are two precisions; give one of them")
    if options.int8 and not measured:
        raise UserError("int8 is kept if its accuracy is; give --root FOLDER with the images of val to measure it")
    if (options.softmax or options.int8) and activation is None:
        raise UserError("softmax and int8 are for classifiers, and these weights have no classes; leave them out")
    if not out.suffix and (options.half or options.softmax or options.input == "float"):
        raise UserError("half, softmax and input are not for a folder: transformers' pipeline sees to them")
    if not out.suffix and (not vit.config.num_classes or vit.config.in_channels != 3):
        raise UserError(
            "a folder is for transformers' classifiers of RGB images; `vitlit weights convert` writes others"
        )
    size = sum(p.numel() for p in vit.parameters()) * (2 if options.half else 4)
    if out.suffix == ".onnx" and size >= LARGEST:
        raise UserError(f"an ONNX file holds 2 GiB, these weights have {size / 2**30:.1f}; export half, or to .pt2")


def need(*packages: str) -> None:
    """UserError unless these optional packages can be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"this needs {package}: pip install {' '.join(packages)}") from error


def captured(module: Exported) -> torch.export.ExportedProgram:
    """A program for any batch, but one image size: the positions are those of its patches."""
    shape = module.about["shape"][1:]
    images = torch.zeros(2, *shape, dtype=torch.uint8 if module.about["input"] == "uint8" else torch.float32)
    with torch.no_grad():
        return torch.export.export(module.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(module: Exported, file: Path, about: dict[str, Any]) -> None:
    ends: dict[str, Any] = {"input_names": ["images"], "output_names": [about["output"]]}
    program = torch.onnx.export(captured(module), (), **ends, opset_version=about["opset"], verbose=False)
    assert program is not None
    about["opset"] = program.model.opset_imports[""]
    program.model.metadata_props[ABOUT] = json.dumps(about)
    program.save(file)
    if about["int8"]:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(file, file, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])


def write_pt2(module: Exported, file: Path, about: dict[str, Any]) -> None:
    torch.export.save(captured(module), file, extra_files={f"{ABOUT}.json": json.dumps(about)})


def write_folder(module: Exported, folder: Path, about: dict[str, Any]) -> None:
    """With the temperature in the head, since transformers has none."""
    vit = deepcopy(module.vit)
    for head in (vit.head, vit.head_dist):
        for parameter in head.parameters() if isinstance(head, nn.Module) else ():
            parameter.data /= about["temperature"] or 1.0
    save_weights(vit, folder, "hf")


def open_onnx(file: Path) -> Any:
    """An onnxruntime session on the CPU; UserError if it cannot read the file."""
    need("onnxruntime")
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise UserError(f"{file} is not a file that onnxruntime runs: {' '.join(str(error).split())[:200]}") from error


def run_onnx(file: Path) -> Network:
    session = open_onnx(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_pt2(file: Path) -> Network:
    return torch.export.load(file).module()


def run_folder(folder: Path) -> Network:
    from transformers import AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda images: model(pixel_values=images).logits


WRITERS = {".onnx": write_onnx, ".pt2": write_pt2, "": write_folder}
OPENERS = {".onnx": run_onnx, ".pt2": run_pt2, "": run_folder}


def photographs(preprocess: Preprocess) -> Batches:
    """scikit-learn's two photographs, each whole, mirrored and in two halves."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    images = [part for photo in photos for part in (photo, photo.flip(-1), *photo.chunk(2, -1))]
    yield torch.stack([preprocess.crop(image).permute(1, 2, 0) for image in images]), torch.full((len(images),), -1)


@torch.inference_mode()
def check(
    vit: ViT, network: Network, batches: Batches | None, about: dict[str, Any], out: Path
) -> dict[str, float | None]:
    """How a network's outputs differ from those of the ViT in float32; UserError if by too much."""
    assert isinstance(vit.preprocess, Preprocess)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for pixels, labels in batches or photographs(vit.preprocess):
        images = vit.preprocess.normalise(pixels.permute(0, 3, 1, 2)).contiguous()
        ours = vit(images) if out.suffix else vit(images) / (about["temperature"] or 1.0)
        theirs = network(pixels if about["input"] == "uint8" and out.suffix else images)
        found.append((probabilities(ours, about) if about["softmax"] else ours, theirs, labels))
    ours, theirs, labels = map(torch.cat, zip(*found, strict=True))
    firsts = ours.argmax(1), theirs.argmax(1)
    difference, largest = (ours - theirs).abs().max().item(), max(1.0, ours.abs().max().item())
    same = (firsts[0] == firsts[1]).double().mean().item() if about["activation"] else None
    result = {"images": len(ours), "largest_difference": difference, "largest_output": largest, "same_first": same}
    if about["int8"]:
        before, after = ((first == labels).double().mean().item() for first in firsts)
        if not before - after <= INT8_LOSS:
            raise UserError(f"int8 takes top-1 from {100 * before:.2f} to {100 * after:.2f} %; {out} was not written")
        return result | {"top1_before": before, "top1_after": after}
    tolerance, least = (HALF_TOLERANCE, HALF_AGREEMENT) if about["half"] else (TOLERANCE, 0.0)
    if not difference <= tolerance * largest or not (same is None or same >= least):
        alike = "" if same is None else f", and the first class of {100 * (1 - same):.1f} % of images"
        raise UserError(
            f"outputs differ from the ViT's by {difference:.1e} of {largest:.1f}{alike}; {out} was not written"
        )
    return result

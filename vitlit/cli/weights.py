"""`vitlit weights show FILE` and `vitlit weights convert FILE OUT --format FORMAT`."""

import shutil
from pathlib import Path
from typing import get_args

import torch

from vitlit.errors import CommandParser, UserError
from vitlit.files import check_new
from vitlit.model import SIZES, ViTConfig
from vitlit.weights.averaged import Choice
from vitlit.weights.door import empty, load, read
from vitlit.weights.save import Format, save_weights
from vitlit.weights.weights import Weights, in_words

HELP = """\
vitlit weights show FILE [--weights raw] [--skip PATTERN]
    Print its format, network, resolution, tensors, classes and preprocessing.

vitlit weights convert FILE OUT --format FORMAT [--weights raw] [--skip PATTERN]
    Write the weights for another tool, read them back, and compare the outputs on a seeded batch. OUT must not exist.
    FORMAT: vitlit      .safetensors or .ckpt
            timm        .safetensors or .pth, for timm.create_model(..., checkpoint_path=OUT)
            hf          a folder, for transformers' from_pretrained(OUT)
            torchvision .safetensors or .pth
            google      .npz

FILE is a file of vitlit, timm, transformers, torchvision, Google (.npz) or facebookresearch (DINO, DINOv2, MAE, DeiT),
the folder of a run or of a transformers model, or hf:OWNER/NAME[@REVISION].
"""
TOLERANCE = 1e-4  # of the largest output
SIZE = ("image_size", "patch_size", "width", "depth", "heads", "mlp_dim", "num_classes")  # rows of their own


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit weights", HELP)
    parser.add_argument("what", choices=("show", "convert"))
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?")
    parser.add_argument("--format", choices=get_args(Format))
    parser.add_argument("--weights", choices=get_args(Choice), default="averaged", help="of a file that has both")
    parser.add_argument("--skip", metavar="PATTERN", action="append", default=[], help="leave tensors out; repeatable")
    given = parser.parse_intermixed_args(arguments or ["--help"])
    if {given.out is not None, given.format is not None} != {given.what == "convert"}:
        parser.error("give show FILE, or convert FILE OUT --format FORMAT")
    if given.what == "convert":
        convert(given.file, given.out, given.format, given.weights, given.skip)
        return 0
    for name, value in describe(read(given.file, given.weights, given.skip)).items():
        print(f"{name:<13}{value}")
    return 0


def describe(weights: Weights) -> dict[str, str]:
    """What is in a weight file: rows of text by name."""
    config = weights.config
    complete = "heads" in config and config.get("image_size") is not None
    if complete or "pos_embed" not in weights.state:
        vit = empty(weights)
        config, size = vit.config.plain(), "{} x {} pixels, {} x {} patches".format(*vit.config.sides, *vit.grid)
    else:
        size = "unknown"
    shape = (config["width"], config["depth"], config["mlp_dim"])
    preset = next((f"{name}/{config['patch_size']}" for name, row in SIZES.items() if row[:3] == shape), "no preset")
    shape_words = "width {}, depth {}, heads {}, mlp {}".format(*shape[:2], config.get("heads", "unknown"), shape[2])
    defaults = ViTConfig().plain()
    options = [f"{name} {value}" for name, value in config.items() if name not in SIZE and value != defaults[name]]
    assumed, known = in_words(weights.origins)
    return {
        "file": str(weights.path),
        "format": weights.format + assumed,
        "preset": f"{preset} ({shape_words}, patch {config['patch_size']})",
        "options": ", ".join(options) or "all at their defaults",
        "resolution": size,
        "tensors": f"{len(weights.state):,} in the ViT; {len(weights.unused + weights.skipped):,} others in the file",
        "parameters": f"{sum(tensor.numel() for tensor in weights.state.values()):,}",
        "head": f"{config['num_classes']:,} classes" if config["num_classes"] else "none",
        "classes": ", ".join(weights.classes[:5]) + (", ..." if len(weights.classes) > 5 else "") or "unnamed",
        "temperature": f"{weights.temperature:.4g}",
        "preprocess": ", ".join(f"{name} {value}" for name, value in weights.preprocess.items()) or "unknown",
        "settings": "; ".join(f"{', '.join(names)} from {origin}" for origin, names in known.items()) or "none stated",
    }


def convert(source: str, out: Path, format: Format, choice: Choice, skip: list[str]) -> None:
    check_new(out)
    vit = load(source, choice, skip)
    images = torch.randn(2, vit.config.in_channels, *vit.config.sides, generator=torch.Generator().manual_seed(0))
    what = "logits" if vit.config.num_classes else "features"
    try:
        written = save_weights(vit, out, format)
        with torch.inference_mode():
            before, after = vit(images), (again := load(written))(images)
        difference = (before - after).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, before.abs().max().item()):
            raise UserError(f"{what} read back from {out} differ by {difference:.1e}; it was removed")
    except BaseException:  # whatever stopped the check, what it did not pass is not kept
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        raise
    print(f"{written}: {format}, largest difference of the {what} on a seeded batch: {difference:.1e}")
    lost = [f"the temperature {vit.temperature:.4g}"] if again.temperature != vit.temperature else []
    lost += ["that probabilities are a sigmoid of each logit"] if again.activation != vit.activation else []
    if lost:
        print(f"{' and '.join(lost)} is lost, since the format {format} has no place for it")

"""`vitlit export WEIGHTS OUT`."""

from pathlib import Path
from typing import Any

import numpy as np

from vitlit.data.dataset import REMOVE, Images
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits, other_classes
from vitlit.data.workers import count, loader
from vitlit.errors import CommandParser
from vitlit.export import Batches, export, load
from vitlit.files import check_new, expand

HELP = """\
Write weights (a file, a run, hf:OWNER/NAME) for use without vitlit: OUT.onnx for onnxruntime, OUT.pt2 for torch.export,
or a folder for transformers' AutoModelForImageClassification. Class names, preprocessing and temperature are in it, and
in a JSON beside it. It is kept only if its outputs are those of the ViT.
"""
IMAGES = 64  # of val, to compare outputs on
SWITCHES = {
    "softmax": "give probabilities, at the temperature if there is one; of a run with a sigmoid loss the sigmoid",
    "half": "weights in float16",
    "int8": "weights in 8 bits, kept if top-1 on val falls by at most a point; needs --root",
    "aot": "compile OUT.pt2 by AOTInductor for this machine's kind of CPU: C++ runs it without Python; needs g++",
}


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit export", HELP)
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("out", metavar="OUT.onnx|OUT.pt2|OUT_DIR", type=expand)
    about = "uint8: pixels (B, H, W, 3), normalised inside; float: normalised (B, C, H, W); default uint8"
    parser.add_argument("--input", choices=("uint8", "float"), default="uint8", help=about)
    for name, about in SWITCHES.items():
        parser.add_argument(f"--{name}", choices=("true", "false"), default="false", help=about)
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 to 23; by default torch's")
    parser.add_argument("--image_size", type=int, metavar="N", help="pixels; by default the weights'")
    about = f"as --data.root: compare on {IMAGES} images of its val, not on scikit-learn's two photographs"
    parser.add_argument("--root", metavar="ROOT", help=about)
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    given = parser.parse_args(arguments or ["--help"])
    if given.holdout != "0" and not given.root:
        parser.error("--holdout is about --root; give that too")
    check_new(given.out)
    vit, activation = load(given.weights, given.image_size)
    options = {name: getattr(given, name) == "true" for name in SWITCHES} | {"input": given.input, "opset": given.opset}
    if given.root:
        splits = Splits(given.root, parse_share(given.holdout), None)
        options |= {"of": f"val of {given.root}", "batches": images(vit, splits, options["int8"])}
    checked = export(vit, Path(given.out), activation=activation, **options)["checked"]
    line = "{}: outputs differ by at most {largest_difference:.1e} of {largest_output:.2g} on {images} images, {of}"
    print(line.format(given.out, **checked))
    if not vit.config.num_classes:
        print("the outputs are pooled features, as the weights have no head")
    if options["int8"]:
        print("top-1 {top1_before:.2%} before, {top1_after:.2%} after".format(**checked))
    return 0


def images(vit: Any, splits: Splits, labelled: bool) -> Batches:
    """Images of val as the network sees them before normalisation: all with their labels, or some."""
    index = splits["val"]
    if labelled and (len(splits.classes) != vit.config.num_classes or vit.classes not in ([], splits.classes)):
        raise other_classes(splits.root, splits.classes, vit.classes)
    if not labelled:
        index = index.take(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).astype(int))
    dataset = Images(index, vit.preprocess.crop, preprocess=vit.preprocess, remedy=REMOVE)
    return ((batch[0], batch[1]) for batch in loader(dataset, range(len(index)), 32, count(1)))

"""`vitlit export WEIGHTS OUT`."""

from argparse import Namespace
from pathlib import Path

import numpy as np

from vitlit.data.dataset import Images
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits, other_classes
from vitlit.data.workers import count, loader
from vitlit.errors import CommandParser
from vitlit.export import Batches, Options, export, load
from vitlit.files import expand
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT

HELP = """\
Write weights (a file, a run, hf:OWNER/NAME) for use without vitlit: OUT.onnx for onnxruntime, OUT.pt2 for torch.export,
or a folder for transformers' AutoModelForImageClassification. Class names, preprocessing and temperature are in it, and
in a JSON beside it. It is kept only if its outputs are those of the ViT.
"""
IMAGES = 64  # of val, to compare outputs on


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit export", HELP)
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("out", metavar="OUT.onnx|OUT.pt2|OUT_DIR", type=expand)
    about = "uint8: pixels (B, H, W, 3), normalised inside; float: normalised (B, C, H, W); default uint8"
    parser.add_argument("--input", choices=("uint8", "float"), default="uint8", help=about)
    switches = {"softmax": "give probabilities, at the temperature if there is one", "half": "weights in float16"}
    switches["int8"] = "weights in 8 bits, if the top-1 accuracy on val falls by at most a point; needs --root"
    for name, about in switches.items():
        parser.add_argument(f"--{name}", choices=("true", "false"), default="false", help=about)
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 to 23; by default torch's")
    parser.add_argument("--image_size", type=int, metavar="N", help="pixels; by default the weights'")
    about = f"as --data.root: compare on {IMAGES} images of its val, not on scikit-learn's two photographs"
    parser.add_argument("--root", metavar="ROOT", help=about)
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest")
    given = parser.parse_args(arguments or ["--help"])
    truths = {name: getattr(given, name) == "true" for name in switches}
    options = Options(given.input, opset=given.opset, **truths)
    vit, activation = load(given.weights, given.image_size)
    known = {"of": f"val of {given.root}"} if given.root else {}
    batches = images(vit, given, options.int8) if given.root and vit.preprocess else None
    checked = export(vit, Path(given.out), batches, options, activation, **known)["checked"]
    same = checked["same_first"]
    line = "{}: outputs differ by at most {largest_difference:.1e} on {images} images, {of}".format(
        given.out, **checked
    )
    print(line + ("" if same is None else f"; the first class is the same for {100 * same:.1f} %"))
    if options.int8:
        print("top-1 {:.2%} before, {:.2%} after".format(checked["top1_before"], checked["top1_after"]))
    return 0


def images(vit: ViT, given: Namespace, labelled: bool) -> Batches:
    """Images of val as the network sees them before normalisation: all with their labels, or some."""
    splits = Splits(given.root, parse_share(given.holdout), given.manifest)
    index = splits["val"]
    if labelled and (len(splits.classes) != vit.config.num_classes or vit.classes not in ([], splits.classes)):
        raise other_classes(splits.root, splits.classes, vit.classes)
    if not labelled:
        index = index.take(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).astype(int))
    assert isinstance(vit.preprocess, Preprocess)
    dataset = Images(index, vit.preprocess.crop, ground=vit.preprocess.ground)
    return ((batch[0], batch[1]) for batch in loader(dataset, range(len(index)), 32, count(1)))

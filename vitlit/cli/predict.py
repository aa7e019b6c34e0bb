"""`vitlit predict FILE.onnx PHOTOS...`, with onnxruntime in a ViT's place."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vitlit.callbacks import Predictions
from vitlit.data.bad_images import BadImages
from vitlit.data.dataset import Images
from vitlit.data.folder import scan_photos
from vitlit.data.standalone import NoTrainer
from vitlit.data.workers import count, loader
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.export import ABOUT, open_onnx, probabilities
from vitlit.files import check_new, expand
from vitlit.images.preprocess import Preprocess


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit predict", "Classify photos by a file of `vitlit export`, as a run would.")
    parser.add_argument("file", metavar="FILE.onnx", type=expand)
    parser.add_argument("photos", metavar="PHOTOS", type=expand, nargs="+", help="images, or folders of any depth")
    parser.add_argument("--out", metavar="FILE.csv", type=expand, required=True)
    parser.add_argument("--data.batch_size", dest="batch", type=int, metavar="N", default=64)
    parser.add_argument("--data.on_bad_image", dest="bad", choices=("error", "skip"), default="error")
    given = parser.parse_args(arguments)
    check_range("vitlit predict", 1, batch_size=given.batch)
    check_new(given.out)
    session = open_onnx(Path(given.file))
    known = session.get_modelmeta().custom_metadata_map.get(ABOUT)
    about = json.loads(known) if known else {}
    if not about.get("vit", {}).get("num_classes"):
        raise UserError(f"{given.file} is no classifier of `vitlit export`: its metadata tells no classes")
    made_with: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in about["preprocess"].items()}
    preprocess = Preprocess(**made_with)
    index = scan_photos([Path(photo) for photo in given.photos])
    names = about["classes"] or [str(label) for label in range(about["vit"]["num_classes"])]
    writer = Predictions(Path(given.out), index, names)
    alone: Any = NoTrainer()
    writer.on_predict_start(alone, SimpleNamespace(vit=SimpleNamespace(temperature=about["temperature"])))
    writer.bad.unlink(missing_ok=True)
    bad = BadImages(writer.bad, len(index)) if given.bad == "skip" else None
    images = Images(index, preprocess.crop, bad=bad, preprocess=preprocess)
    for pixels, _, indices in loader(images, range(len(index)), given.batch, count(1)):
        inputs = pixels if about["input"] == "uint8" else preprocess.normalise(pixels.permute(0, 3, 1, 2)).contiguous()
        outputs: Any = torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])
        outputs = outputs if about["softmax"] else probabilities(outputs, about)
        outputs = outputs if about["activation"] else outputs[:, 0]  # numbers
        writer.on_predict_batch_end(alone, None, outputs, SimpleNamespace(indices=indices), 0)
    writer.on_predict_end(alone, None)
    return 0

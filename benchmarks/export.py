"""The genuine DINOv2 S/14 exported: the same logits and top-5 on 200 photographs, int8's accuracy, and latency.

    python benchmarks/export.py --photos FOLDER --emoji FOLDER --weights FILE --finetuned RUN --work WORK --out FILE

The head over 1,000 classes is drawn at random, from a seed; images have 224 pixels. transformers' pipeline reads the
photographs itself, with its own preprocessing: where the crop leaves an odd margin it rounds down, and torchvision and
vitlit to an even number, so that some crops lie a pixel beside. int8's accuracy is that of a ViT finetuned on Google's
emoji (recipes/finetune_folder at 70 pixels for 3 epochs), tested on Twitter's. Latency is of one image on one core and
one thread. In a round each takes its turn; seconds are CPU time, so that other work on the machine changes little. Read
the ratios, each from one round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from runs import write
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from vitlit.cli.export import images as images_of
from vitlit.data.folder import scan_photos
from vitlit.data.splits import Splits
from vitlit.export import export, load
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT

PHOTOS, SIZE, ROUNDS, WARM_UP = 200, 224, 31, 3
Network = Callable[[Tensor], Tensor]


def headed(weights: Path) -> ViT:
    """The ViT with a head that is drawn at random."""
    vit, _ = load(weights, SIZE)
    vit.set_head("finetune", 1000)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(vit.head.weight, std=0.05, generator=generator)
    vit.classes = [f"class {number}" for number in range(1000)]
    return vit


def one_core(file: Path) -> Network:
    """An ONNX file on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def agreement(name: str, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How far logits (N, classes) differ, and on how many images the five first classes are the same, in order."""
    five, other = (logits.topk(5).indices for logits in (ours, theirs))
    found = {"name": name, "images": len(ours), "largest_difference": (ours - theirs).abs().max().item()}
    return found | {"largest_logit": ours.abs().max().item(), "same_top5": int((five == other).all(1).sum())}


def piped(folder: Path, paths: list[str], prepare: Preprocess, ours: Tensor) -> dict[str, Any]:
    """On how many images transformers' pipeline, from the file on, sees the same pixels and has the same top-5."""
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    processor = AutoImageProcessor.from_pretrained(folder)
    five, pixels = [], []
    for path, logits in zip(paths, ours, strict=True):
        found = [int(each["label"].split()[1]) for each in classify(path, top_k=5)]
        five.append(found == logits.topk(5).indices.tolist())
        theirs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        pixels.append(bool((theirs - prepare(path)).abs().max() < 1e-4))
    both = sum(alike and same for alike, same in zip(pixels, five, strict=True))
    counts = {"same_top5": sum(five), "same_pixels": sum(pixels), "same_top5_of_these": both}
    return {"name": "transformers' pipeline, from the files on", "images": len(paths), **counts}


def latency(networks: dict[str, Network], images: Tensor) -> list[dict[str, Any]]:
    """CPU seconds for one image of each network in turn, and over those of the first."""
    rounds: list[dict[str, float]] = []
    for number in range(WARM_UP + ROUNDS):
        image, took = images[number : number + 1], {}
        for name, network in networks.items():
            start = time.process_time()
            network(image)
            took[name] = time.process_time() - start
        rounds.append(took)
    first, rows = next(iter(networks)), []
    for name in networks:
        seconds = [took[name] for took in rounds[WARM_UP:]]
        ratio = statistics.median(took[name] / took[first] for took in rounds[WARM_UP:])
        rows.append({"name": f"latency, {name}", "ms": 1000 * statistics.median(seconds), "over_torch": ratio})
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("photos", "emoji", "weights", "finetuned", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    vit, work = headed(given.weights), given.work
    prepare = vit.preprocess
    assert isinstance(prepare, Preprocess)
    index = scan_photos([given.photos])
    paths = [index.path(row) for row in range(0, len(index), len(index) // PHOTOS)][:PHOTOS]
    images = torch.cat([prepare(path) for path in paths])
    ours = torch.cat([vit(image[None]) for image in images])
    export(vit, work / "s14.onnx", input="float")
    export(vit, work / "s14.pt2", input="float")
    export(vit, work / "s14-aot.pt2", input="float", aot=True)
    export(vit, work / "s14")
    eight = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    quantize_dynamic(work / "s14.onnx", work / "s14-int8.onnx", **eight)  # as export does, whose accuracy is below
    networks: dict[str, Network] = {
        "torch": vit,
        "ONNX": one_core(work / "s14.onnx"),
        "pt2": torch.export.load(work / "s14.pt2").module(),
        "pt2, AOTInductor": torch._inductor.aoti_load_package(str(work / "s14-aot.pt2")),
        "ONNX, int8": one_core(work / "s14-int8.onnx"),
    }
    folder = AutoModelForImageClassification.from_pretrained(work / "s14").eval()
    rows: list[dict[str, Any]] = []
    peers: dict[str, Network] = {"folder": lambda image: folder(image).logits}
    for name, network in (networks | peers).items():
        if network is vit:
            continue
        rows.append(agreement(name, ours, torch.cat([network(image[None]) for image in images])))
        print(rows[-1], flush=True)
    rows.append(piped(work / "s14", paths, prepare, ours))
    print(rows[-1], flush=True)
    rows += latency(networks, images)
    finetuned, _ = load(given.finetuned)
    val = images_of(finetuned, Splits(str(given.emoji), 0.0, None), labelled=True)
    checked = export(finetuned, work / "emoji-int8.onnx", val, "val of emoji", int8=True)["checked"]
    rows.append({"name": "int8, finetuned", "size": list(finetuned.config.sides), **checked})
    print(rows[-1], flush=True)
    more = {"onnxruntime": onnxruntime.__version__, "transformers": transformers.__version__}
    write(given.out, (__doc__ or "").splitlines()[0], rows, more_versions=more)


if __name__ == "__main__":
    main()

"""Each regulariser of vitlit on its own: trained on 2,000 images of MNIST, tested on the 10,000 test digits.

    python benchmarks/ablations.py --mnist FOLDER --work WORK --out benchmarks/results/ablations_mnist.json --at-once 2

FOLDER is MNIST as an image folder, FOLDER/{train,val}/DIGIT/*.png. Every row trains on the same 2,000 images, 200 per
class. The last three rows train on 300 to 12 images per class instead; their metric is the classes' mean accuracy.
"""

import csv
import sys
from pathlib import Path

from runs import Run, arguments, fit_all, summary, write

BASE = """
--config pretrain --data.image_size 28 --data.crop center --data.batch_size 50 --data.micro_batch null
--model.vit.patch_size 7 --model.vit.width 96 --model.vit.depth 4 --model.vit.mlp_dim 192
--model.optimizer.init_args.lr 2e-3 --model.optimizer.init_args.weight_decay 0 --model.schedule.warmup 5%
--trainer.max_epochs 24 --trainer.check_val_every_n_epoch 24
"""
AFFINE = (
    "{class_path: torchvision.transforms.v2.RandomAffine, init_args: "
    "{degrees: [-10, 10], translate: [0.1, 0.1], scale: [0.9, 1.1], interpolation: bilinear}}"
)
RAND_AUGMENT = "{class_path: vitlit.data.augment.%s, init_args: {magnitude: %d}}"


def augment(*steps: str) -> list[str]:
    return ["--data.augment", f"[{', '.join(steps)}]"]


def flags(**values: object) -> list[str]:
    """Flags from keyword arguments; a double underscore stands for a dot."""
    return [part for key, value in values.items() for part in (f"--{key.replace('__', '.')}", str(value))]


ROWS: dict[str, list[str]] = {
    "nothing": [],
    "sincos position": flags(model__vit__position="sincos2d"),
    "sincos position, pooled tokens": flags(model__vit__position="sincos2d", model__vit__pool="gap"),
    "affine": augment(AFFINE),
    "timm RandAugment 9": augment(RAND_AUGMENT % ("TimmRandAugment", 9)),
    "big_vision RandAugment 10": augment(RAND_AUGMENT % ("BigVisionRandAugment", 10)),
    "weight decay 0.3": flags(model__optimizer__init_args__weight_decay=0.3),
    "dropout 0.1": flags(model__vit__dropout=0.1),
    "stochastic depth 0.1": flags(model__vit__drop_path=0.1),
    "label smoothing 0.1": flags(model__objective__label_smoothing=0.1),
    "sigmoid loss": flags(model__objective__loss="sigmoid", model__objective__head_bias=-2.3),
    "bce loss": flags(model__objective__loss="bce", model__objective__head_bias=-2.3),
    "mixup 0.2": flags(data__mixing__mixup=0.2),
    "cutmix 1.0": flags(data__mixing__cutmix=1.0),
    "random erasing 0.25": flags(data__erasing__prob=0.25),
    "EMA 0.99": flags(trainer__callbacks="[{class_path: vitlit.callbacks.EMA, init_args: {decay: 0.99}}]"),
    "affine, repeated 3 times": [*augment(AFFINE), *flags(data__repeats=3)],
}
UNEVEN = {
    "uneven": [],
    "uneven, class weights": flags(model__objective__class_weights="balanced"),
    "uneven, balanced sampling": flags(data__balanced="true"),
}


def manifest(root: Path, out: Path, counts: list[int]) -> Path:
    """Write a manifest of the first `counts[digit]` training images of each digit, by name, and of all test images."""
    with out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for split in ("train", "val"):
            for label, count in enumerate(counts):
                images = sorted((root / split / str(label)).iterdir())[: count if split == "train" else None]
                table.writerows([image.relative_to(root), label, split] for image in images)
    return out


def main() -> None:
    parser = arguments(__doc__ or "", "mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    root = given.mnist.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    even = manifest(root, given.work / "even.csv", [200] * 10)
    uneven = manifest(root, given.work / "uneven.csv", [round(300 * 0.7**label) for label in range(10)])
    base = [*BASE.split(), "--data.root", str(root), "--data.manifest"]
    runs = [Run(name, seed, [*base, str(even), *more]) for name, more in ROWS.items() for seed in given.seeds]
    made = fit_all(runs, given.work, given.at_once)
    runs = [Run(name, seed, [*base, str(uneven), *more]) for name, more in UNEVEN.items() for seed in given.seeds]
    more = fit_all(runs, given.work, given.at_once)
    rows = summary(made, "val/top1") + summary(more, "val/top1_macro")
    for row in rows:  # the result holds no paths of this machine
        row["flags"] = row["flags"][len(base) + 1 :]
    write(given.out, (__doc__ or "").splitlines()[0], rows, base=BASE.split())


if __name__ == "__main__":
    sys.exit(main())

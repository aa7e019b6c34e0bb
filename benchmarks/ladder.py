"""Two rungs on real data: overfit 256 digits, and train on 1,438 digits from scratch, tested on the other 359.

    python benchmarks/ladder.py --work WORK --out benchmarks/results/digits.json --at-once 2

The digits are scikit-learn's, 8 x 8 pixels. The next rung, MNIST, is recipes/small_mnist.
"""

import shutil
import sys
from pathlib import Path

from runs import Run, arguments, fit_all, summary, write

from vitlit.prepare import sources

HEART = "--config pretrain --data.crop center --data.image_size 16 --data.batch_size 64 --model.schedule.warmup 10%"
HEART += " --model.optimizer.init_args.weight_decay 0 --trainer.max_epochs 60 --trainer.check_val_every_n_epoch 60"
# 1,438 images of 8 x 8 pixels are too few to learn positions: fixed ones gain a point.
DIGITS = "--config pretrain --model.vit.position sincos2d --model.vit.pool gap --model.objective.label_smoothing 0.1"
DIGITS += (
    " --model.optimizer.init_args.weight_decay 0.05 --data.crop center --data.batch_size 64 --trainer.max_epochs 40"
)
AFFINE = (
    "[{class_path: torchvision.transforms.v2.RandomAffine, init_args: "
    "{degrees: [-8, 8], translate: [0.06, 0.06], scale: [0.9, 1.1], interpolation: bilinear}}]"
)


def few(digits: Path, out: Path, count: int) -> Path:
    """Write a folder of the first `count` training images, evenly over the classes, for training and validation."""
    images = zip(*(sorted(folder.iterdir()) for folder in sorted((digits / "train").iterdir())), strict=False)
    for image in [image for turn in images for image in turn][:count]:
        for split in ("train", "val"):
            folder = out / split / image.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)
    return out


def main() -> None:
    given = arguments(__doc__ or "").parse_args()
    digits = given.work / "digits"
    if not digits.exists():
        sources.write("digits", digits)
    heart = few(digits, given.work / "few", 256)
    runs = [Run("256 digits by heart", 0, [*HEART.split(), "--data.root", str(heart)])]
    runs += [
        Run("digits", seed, [*DIGITS.split(), "--data.augment", AFFINE, "--data.root", str(digits)])
        for seed in range(5)
    ]
    rows = summary(fit_all(runs, given.work, given.at_once), "val/top1")
    for row in rows:
        row["flags"] = row["flags"][:-2]
    write(given.out, (__doc__ or "").splitlines()[0], rows)


if __name__ == "__main__":
    sys.exit(main())

"""Ways to finetune the real DINOv2 ViT-S/14 on emoji: train on Google's drawings, test on Twitter's.

    python benchmarks/finetuning.py --emoji FOLDER --weights FILE --work WORK --out RESULT.json

Class-balanced accuracy at 70 pixels after 3 epochs of recipes/finetune_folder, on a CPU. Each row gives its learning
rate; no search was done. The cost is the CPU time of training on 1,000 images.
"""

import sys
from pathlib import Path

from runs import Run, arguments, fit_all, summary, write

BASE = """
--config recipes/finetune_folder --data.image_size 70 --model.objective.init_args.class_weights balanced
--trainer.max_epochs 3 --trainer.check_val_every_n_epoch 3 --run.monitor val/top1_macro --trainer.accelerator cpu
"""
ROWS = {
    "all, layer decay 0.7": "",
    "LoRA, rank 8": "--model.lora.rank 8 --model.groups.layer_decay 1 --model.optimizer.init_args.lr 1e-3",
    "last 2 blocks": "--model.last_blocks 2 --model.optimizer.init_args.lr 3e-4",
    "linear probe": "--model.freeze true --model.optimizer.init_args.lr 1e-2",
}
SEED = 0
STEPS = (4, 16)  # the difference of two trainings' costs is that of the steps alone
BATCH = 64


def costs(where: list[str], work: Path) -> dict[str, float]:
    """CPU seconds that each way takes to train on 1,000 images."""
    short = [
        "--trainer.limit_val_batches",
        "0",
        "--trainer.log_every_n_steps",
        "1",
        "--data.batch_size",
        str(BATCH),
        *BASE.split(),
        *where,
    ]
    runs = [
        Run(f"{name}, {steps} steps", SEED, [*short, *flags.split(), "--trainer.max_steps", str(steps)])
        for name, flags in ROWS.items()
        for steps in STEPS
    ]
    seconds = [made.seconds for made in fit_all(runs, work, 1)]
    images = (STEPS[1] - STEPS[0]) * BATCH / 1000
    return {name: round((seconds[2 * i + 1] - seconds[2 * i]) / images, 1) for i, name in enumerate(ROWS)}


def main() -> None:
    given = arguments(__doc__ or "", "emoji", "weights").parse_args()
    where = ["--data.root", str(given.emoji), "--model.init_from", str(given.weights)]
    runs = [Run(name, SEED, [*BASE.split(), *flags.split(), *where]) for name, flags in ROWS.items()]
    rows = summary(fit_all(runs, given.work, given.at_once), "val/top1_macro")
    cost = costs(where, given.work)
    for row in rows:
        row["cpu_seconds_per_1000_images"] = cost[row["name"]]
        row["flags"] = ROWS[row["name"]].split()
    write(given.out, (__doc__ or "").splitlines()[0], rows, base=BASE.split())


if __name__ == "__main__":
    sys.exit(main())

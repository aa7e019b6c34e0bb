"""Ways to finetune the genuine DINOv2 ViT-S/14 on emoji: Google's drawings train, Twitter's are the test.

    python benchmarks/finetuning.py --emoji FOLDER --weights FILE --work WORK --out RESULT.json

Class-balanced accuracy at 70 pixels after 3 epochs of recipes/finetune_folder, on a CPU. Each way has the learning
rate that its row says; none was searched for.
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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    given = parser.parse_args()
    where = ["--data.root", str(given.emoji), "--model.init_from", str(given.weights)]
    runs = [Run(name, SEED, [*BASE.split(), *flags.split(), *where]) for name, flags in ROWS.items()]
    rows = summary(fit_all(runs, given.work, given.at_once), "val/top1_macro")
    for row in rows:
        row["flags"] = ROWS[row["name"]].split()
    write(given.out, (__doc__ or "").splitlines()[0], rows, base=BASE.split())


if __name__ == "__main__":
    sys.exit(main())

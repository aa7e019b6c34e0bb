"""DINOv2's ViT-S/14 continued on emoji without labels: nearest neighbours before and after.

    python benchmarks/continuing.py --emoji FOLDER --weights FILE --work WORK --out RESULT.json

Trained on Google's drawings by recipes/continue_dinov2, on a CPU at 56 pixels for an epoch; `val/knn` of Twitter's
drawings among Google's.
"""

import sys

from pretraining import baselines
from runs import Run, arguments, fit_all, summary, write

SIZE, SEEDS = 56, (0, 1, 2)
FLAGS = f"""
--config recipes/continue_dinov2 --data.image_size {SIZE} --data.local_views 2 --trainer.max_epochs 1
--trainer.accelerator cpu
"""


def main() -> None:
    given = arguments(__doc__ or "", "emoji", "weights").parse_args()
    where = ["--data.root", str(given.emoji), "--model.init_from", str(given.weights)]
    before = baselines(given.emoji, given.weights, SIZE)["weights"]
    print(f"before: {before}")
    runs = [Run("continue_dinov2", seed, [*FLAGS.split(), *where]) for seed in SEEDS]
    rows = summary(fit_all(runs, given.work, given.at_once), "val/knn")
    rows[0]["flags"] = FLAGS.split()
    write(given.out, (__doc__ or "").splitlines()[0], rows, before=before)


if __name__ == "__main__":
    sys.exit(main())

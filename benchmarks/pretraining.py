"""Pretraining without labels on small folders: digits (MNIST) and emoji, trained on Google's and tested on Twitter's.

    python benchmarks/pretraining.py --mnist FOLDER --emoji FOLDER --work WORK --out RESULT.json --at-once 2

`val/knn` at 32 pixels of each objective, of raw pixels and of the same ViT untrained; then the accuracy after
finetuning on 1 % of MNIST's labels, against the same ViT from scratch.
"""

import shutil
import sys
from pathlib import Path

import torch
from runs import Run, arguments, fit_all, summary, write

import vitlit
from vitlit.data import ImageFolderData
from vitlit.evaluation import knn

# The recipe, its flags, and how many epochs on MNIST's 60,000 digits and on 3,600 emoji.
OBJECTIVES = {
    "LeJEPA": ("small_lejepa", "", 10, 90),
    "DINO": ("small_dino", "", 20, 90),
    "MAE": ("small_mae", "", 12, 40),
    "MaskedPatch": ("small_mae", "--model.objective MaskedPatch", 6, 60),
}
PRETRAIN = "--trainer.accelerator cpu"
FINETUNED = ("MAE", "DINO", "LeJEPA")
FINETUNE = """
--config recipes/finetune_folder --data.image_size 32 --data.flip 0 --data.crop_scale [0.6,1.0] --data.batch_size 32
--data.cache memory --model.groups.layer_decay 1 --model.optimizer.init_args.lr 1e-3 --trainer.max_epochs 100
--trainer.check_val_every_n_epoch 100 --trainer.accelerator cpu
"""
SEEDS = (0, 1, 2)
BANK = 10_000  # as many training images as val/knn compares with


def baselines(root: Path, weights: Path, size: int) -> dict[str, float]:
    """The accuracy (%) of nearest neighbours among raw pixels, from -1 or from 0, and features."""
    vit = vitlit.load(weights)
    vit.set_head("finetune", 0)
    data = ImageFolderData(str(root), image_size=size, batch_size=100, num_workers=0)
    data.follow(vit)
    loaders, found = (data.eval_loader("train", BANK), data.val_dataloader()), {}
    with torch.inference_mode():
        looks = {"pixels": lambda x: x.flatten(1), "pixels from 0": lambda x: x.flatten(1) + 1, "weights": vit}
        for name, look in looks.items():
            arrays = [
                torch.cat(parts)
                for loader in loaders
                for parts in zip(*((look(batch.views[0]), batch.labels) for batch in loader), strict=True)
            ]
            found[name] = round(100 * knn(*arrays), 2)
    return found


def few(root: Path, work: Path) -> Path:
    """MNIST with every hundredth training digit of each class, and all test digits."""
    out = work / "mnist_1_percent"
    for folder in sorted((root / "train").iterdir()):
        (out / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[::100]:
            shutil.copy(file, out / "train" / folder.name)
    if not (out / "val").exists():
        (out / "val").symlink_to((root / "val").resolve())
    return out


def main() -> None:
    given = arguments(__doc__ or "", "mnist", "emoji").parse_args()
    roots = {"mnist": given.mnist, "emoji": given.emoji}
    flags = {"mnist": "--data.flip 0", "emoji": ""}
    runs = [
        Run(
            f"{name} {where}",
            0,
            [
                *f"--config recipes/{recipe} --data.root {root} --trainer.max_epochs {epochs[i]} {PRETRAIN}".split(),
                *f"--trainer.check_val_every_n_epoch {epochs[i] // 3 or 1} {own} {flags[where]}".split(),
            ],
        )
        for i, (where, root) in enumerate(roots.items())
        for name, (recipe, own, *epochs) in OBJECTIVES.items()
    ]
    rows = summary(fit_all(runs, given.work, given.at_once), "val/knn")
    untrained = {}
    for name in ("MAE", "DINO"):  # LeJEPA's ViT is DINO's, and MaskedPatch's MAE's
        torch.manual_seed(0)
        untrained[name] = given.work / f"untrained_{name}.safetensors"
        vit = vitlit.load(given.work / f"{name}_mnist-0")
        vitlit.save_weights(vitlit.ViT(**vars(vit.config)), untrained[name])
    references = {
        f"{name} {where}": baselines(root, file, 32)
        for where, root in roots.items()
        for name, file in untrained.items()
    }
    print(references)

    data = few(given.mnist, given.work)
    starts = {name: given.work / f"{name}_mnist-0" for name in FINETUNED}
    starts |= {f"the ViT of {name} from scratch": file for name, file in untrained.items()}
    finetunes = [
        Run(f"1 percent {name}", seed, [*FINETUNE.split(), "--data.root", str(data), "--model.init_from", str(start)])
        for name, start in starts.items()
        for seed in SEEDS
    ]
    labels = summary(fit_all(finetunes, given.work, given.at_once), "val/top1")
    for row in (*rows, *labels):  # of the machine
        row["flags"] = [Path(flag).name if flag.startswith("/") else flag for flag in row["flags"]]
    write(given.out, (__doc__ or "").splitlines()[0], rows, finetuned=labels, references=references)


if __name__ == "__main__":
    sys.exit(main())

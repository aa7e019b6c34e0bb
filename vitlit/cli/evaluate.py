"""`vitlit evaluate WEIGHTS... --root ROOT`: what weights are worth on a folder, and how sure that is."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlit.callbacks.predictions import write_csv
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits, other_classes
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.evaluation import compare, fewshot, folds, interval, linear, probe_inputs
from vitlit.evaluation.classify import balanced, measures, per_class
from vitlit.evaluation.knn import nearest, normalised
from vitlit.files import write_text, writing
from vitlit.prepare.features import extract, ranks, ready

HELP = """\
Measure weights (files, runs, hf:OWNER/NAME) on a folder's val split, by probes that learn from train; classify is their
own head. Intervals are of 95 %, over images, deviations over seeds, differences to the first weights.
"""
NEEDS = {"knn": ["pooled"], "fewshot": ["pooled"], "linear": ["class", "patches"], "classify": ["logits"]}
ROW = ("weights", "method", "metric", "value", "low", "high", "deviation", "difference", "from", "to")
Found = dict[tuple[str, str], Any]  # a statistic, its values for each image, and its value for each seed


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit evaluate", HELP)
    parser.add_argument("weights", metavar="WEIGHTS", nargs="+")
    parser.add_argument("--root", required=True, help="as --data.root: a folder, or shards")
    parser.add_argument("--with", dest="methods", metavar="LIST", default="knn,fewshot,linear", help=",".join(NEEDS))
    parser.add_argument("--shots", type=int, default=5, metavar="N", help="images of each class for fewshot; default 5")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of probes and folds; default 3")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="of train, measured in place of val")
    parser.add_argument("--image_size", type=int, default=0, metavar="N", help="pixels; by default the weights'")
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest; folds keep its groups together")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table.csv, and table.json with each class")
    given = parser.parse_args(arguments)
    methods = given.methods.split(",")
    if wrong := set(methods) - NEEDS.keys():
        parser.error(f"--with has {min(wrong)!r}; give some of {','.join(NEEDS)}")
    if given.folds == 1 or (given.folds and "classify" in methods):
        parser.error("--folds must be at least 2, and without classify, which learns nothing")
    check_range("vitlit evaluate", 1, shots=given.shots, seeds=given.seeds)
    splits = Splits(given.root, parse_share(given.holdout), given.manifest)
    splits.scan()
    if splits.multi_label or splits.numbers or not splits.classes:
        raise UserError(f"{given.root} must have one class for each image; `vitlit test` measures other labels")
    indices = [splits["train"]] if given.folds else [splits["train"], splits["val"]]
    names = sorted({name for method in methods for name in NEEDS[method]})
    first, rows, classes = Found(), [], {}
    line = ("{:<24} {:<8} {:<8}" + " {:>10}" * 7).format
    rank, _ = ranks()
    if rank == 0:
        print(line(*ROW))
    for source in given.weights:
        vit, found = ready(source, given.image_size), Found()
        parts = [(extract(vit, index, names), index.labels) for index in indices]
        if rank:
            continue
        for method in methods:
            found |= measured(method, vit, parts, splits, given)
        for (method, metric), (statistic, values, of_seeds) in found.items():
            spread = np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else None
            against = compare(statistic, first[method, metric][1], values) if first else [None] * 3
            rows.append([source, method, metric, np.mean(of_seeds), *interval(statistic, *values), spread, *against])
            print(line(*(cell if type(cell) is str else "-" if cell is None else f"{cell:.4f}" for cell in rows[-1])))
            if metric == "balanced":
                shares = enumerate(per_class(*values).tolist())  # NaN for a class without images
                classes[f"{source}, {method}"] = {splits.classes[i]: share for i, share in shares if share == share}
        first = first or found
    if given.out and rank == 0:
        with writing(given.out, "give another --out"):
            given.out.mkdir(parents=True, exist_ok=True)
            write_csv(given.out / "table.csv", ROW, rows)
            content = {"settings": vars(given), "table": [dict(zip(ROW, row, strict=True)) for row in rows]}
            write_text(given.out / "table.json", json.dumps(content | {"classes": classes}, indent=1, default=str))
    return 0


def measured(method: str, vit: Any, parts: list[Any], splits: Splits, given: Namespace) -> Found:
    """What the weights' own head, or in the mean over seeds a probe, is worth on val, or on the folds of train."""
    labels, groups = np.concatenate([labels for _, labels in parts]), splits["train"].groups
    if method == "classify":
        if not vit.config.num_classes:
            raise UserError("classify measures the weights' own head, and these have none; finetune them first")
        if vit.config.num_classes != len(splits.classes) or vit.classes not in ([], splits.classes):
            raise other_classes(splits.root, splits.classes, vit.classes)
        numbers = measures(parts[-1][0]["logits"], parts[-1][1])
        return {(method, name): (*each, [each[0](*each[1])]) for name, each in numbers.items()}
    both = {name: torch.cat([part[name] for part, _ in parts]) for name in NEEDS[method]}
    right: dict[str, np.ndarray] = {}
    fold = np.concatenate([np.full(len(labels), part - 1) for part, (_, labels) in enumerate(parts)])  # train: -1
    draws = given.folds or method != "knn"  # else all seeds find the same
    for seed in range(given.seeds if draws else 1):
        if given.folds:
            fold = folds(labels, given.folds, groups, seed)
        for test in (fold == part for part in range(fold.max() + 1)):
            bank, seen = ({name: each[rows] for name, each in both.items()} for rows in (~test, test))
            own = groups if groups is None else groups[~test[: len(groups)]]
            for name, found in classes_by(method, bank, labels[~test], seen, seed, own, given.shots).items():
                of_seeds = right.setdefault(name, np.zeros((given.seeds, len(labels))))
                of_seeds[seed if draws else slice(None), test] = found == labels[test]
    worth, truth = Found(), labels[fold >= 0]
    for name, each in right.items():
        of_seeds = each[:, fold >= 0]
        worth[name, "top1"] = np.mean, (of_seeds.mean(0),), of_seeds.mean(1)
        balances = [balanced(of_seed, truth) for of_seed in of_seeds]
        worth[name, "balanced"] = balanced, (of_seeds.mean(0), truth), balances
    return worth


def classes_by(method: str, bank: Any, labels: np.ndarray, seen: Any, seed: int, groups: Any, shots: int) -> Any:
    """The classes (M,) that each probe of a method gives to features, by name."""
    if method == "linear":
        return {"linear": linear(probe_inputs(bank), labels, probe_inputs(seen), seed, groups).numpy()}
    train, test = normalised(bank["pooled"]), seen["pooled"]
    if method == "knn":
        return {f"knn {k}": nearest(train, torch.from_numpy(labels), test, k).numpy() for k in (10, 20, 100, 200)}
    return {f"{shots}-shot": fewshot(bank["pooled"], labels, test, shots, seed)}

"""`vitlit evaluate WEIGHTS... --root ROOT`: what weights are worth on a folder, and how sure that is."""

import json
import re
from argparse import Namespace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlit.data.folder import parse_share
from vitlit.data.index import Index
from vitlit.data.splits import Splits
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.evaluation import compare, fewshot, folds, interval, linear, logistic, probe_inputs, temperature
from vitlit.evaluation.calibration import binned
from vitlit.evaluation.classify import balanced, measures, per_class, precisions
from vitlit.evaluation.fewshot import check_shots
from vitlit.evaluation.knn import nearest, normalised
from vitlit.evaluation.variants import outputs, read_real
from vitlit.files import check_new, write_csv, write_text, writing
from vitlit.inspection.figures import draw_reliability
from vitlit.prepare.features import extract, ranks, ready
from vitlit.weights.calibrated import check_storable, store_temperature

HELP = """\
Measure weights (files, runs, hf:OWNER/NAME) on a folder's val split, by probes that learn from train; classify is their
own head. Intervals are of 95 %, over images, deviations over seeds, differences to the first weights.
"""
NEEDS = {"knn": ["pooled"], "fewshot": ["pooled"], "linear": ["class", "patches"]}
NEEDS |= {"logistic": ["pooled"], "classify": ["logits"]}
NEIGHBOURS = (10, 20, 100, 200)
ROW = ("weights", "method", "metric", "value", "low", "high", "deviation", "difference", "from", "to")
Found = dict[tuple[str, str], Any]  # a statistic, its values for each image, and its value for each seed


def parse(arguments: list[str]) -> Namespace:
    """The settings; `methods` and `shots` are lists."""
    parser = CommandParser("vitlit evaluate", HELP)
    parser.add_argument("weights", metavar="WEIGHTS", nargs="+")
    parser.add_argument("--root", required=True, help="as --data.root: a folder, or shards; for classify val will do")
    parser.add_argument("--with", dest="methods", metavar="LIST", default="knn,fewshot,linear", help=",".join(NEEDS))
    parser.add_argument("--shots", default="5", metavar="LIST", help="images of each class for fewshot; default 5")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of probes and folds; default 3")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="of train, measured in place of val")
    parser.add_argument("--image_size", type=int, metavar="N", help="pixels; by default the weights'")
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest; folds keep its groups together")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="CSV for classify: folder, the head's class")
    parser.add_argument("--real", type=Path, metavar="FILE", help="ImageNet's ReaL labels, real.json, for classify")
    calibrate = "fit a temperature on half of val, show what it does on the other, and store it with the weights"
    parser.add_argument("--calibrate", action="store_true", help=calibrate)
    about = "write table.csv, table.json with each class, and reliability.png of classify"
    parser.add_argument("--out", type=Path, metavar="DIR", help=about)
    given = parser.parse_args(arguments)
    given.methods, head = given.methods.split(","), given.calibrate or given.classes or given.real
    if wrong := set(given.methods) - NEEDS.keys():
        parser.error(f"--with has {min(wrong)!r}; give some of {','.join(NEEDS)}")
    if given.folds == 1 or (given.folds and "classify" in given.methods):
        parser.error("--folds must be at least 2, and without classify, which learns nothing")
    if head and "classify" not in given.methods:
        parser.error("--calibrate, --classes and --real are about the weights' own head; add classify to --with")
    if given.calibrate and given.image_size:
        parser.error("--calibrate is for the weights' own size of images; leave --image_size out")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given.shots):
        parser.error(f"--shots is {given.shots!r}; give numbers such as 1,5,10,25")
    given.shots = [int(number) for number in given.shots.split(",")]
    check_range("vitlit evaluate", 1, seeds=given.seeds)
    check_new(given.out)
    if given.out:
        with writing(given.out, "give --out a folder"):  # now, not when all is measured
            given.out.mkdir(parents=True, exist_ok=True)
    return given


def run(arguments: list[str]) -> int:
    given = parse(arguments)
    splits, indices = scan(given)
    paths = (indices[-1].path(row) for row in range(len(indices[-1])))
    real = read_real(given.real, list(paths), splits.classes) if given.real else None
    load = lru_cache(1)(partial(ready, image_size=given.image_size))  # one at a time; the only one, once
    heads = [check(source, load(source), splits, given) for source in given.weights]  # before the first is measured
    names, first = sorted({name for method in given.methods for name in NEEDS[method]}), Found()
    widest = max(map(len, given.weights))
    line, rows, every = (f"{{:<{widest}}} {{:<12}} {{:<8}}" + " {:>10}" * 7).format, [], {}
    rank, _ = ranks()
    if rank == 0:
        print(line(*ROW))
    for source, head in zip(given.weights, heads, strict=True):
        vit, found = load(source), Found()
        parts = [(extract(vit, index, names), index.labels) for index in indices]
        if rank:
            continue
        for method in given.methods:
            if method != "classify":
                found |= probed(method, parts, indices[0].groups, given)
                continue
            logits = parts[-1][0]["logits"][:, head]
            found |= of_head(method, measures(logits / vit.temperature, parts[-1][1], real))
            found |= calibrated(source, logits, indices[-1]) if given.calibrate else {}
        for (method, metric), (statistic, values, of_seeds) in found.items():
            spread = np.std(of_seeds, ddof=1) if len(of_seeds) > 1 else None
            # Images drawn anew add to a calibration error, which chance can only raise: no interval of it holds.
            sure = metric != "ece"
            against = compare(statistic, first[method, metric][1], values) if first and sure else [None] * 3
            low, high = interval(statistic, *values) if sure else (None, None)
            rows.append([source, method, metric, np.mean(of_seeds), low, high, spread, *against])
            print(line(*(cell if type(cell) is str else "-" if cell is None else f"{cell:.4f}" for cell in rows[-1])))
            every[f"{source}, {method}", metric] = values
        first = first or found
    if given.out and rank == 0:
        with writing(given.out, "give another --out"):
            write(given, rows, every, splits.classes)
    return 0


def scan(given: Namespace) -> tuple[Splits, list[Index]]:
    """The classes, and the images to learn from and to measure; for classify alone those of val, or of ROOT itself."""
    splits, alone = Splits(given.root, parse_share(given.holdout), given.manifest), given.methods == ["classify"]
    if alone:
        wanted = ["" if "" in splits.present() else "val"]
    else:
        wanted = ["train"] if given.folds else ["train", "val"]
        splits.scan()
    if splits.numbers:
        raise UserError(f"{given.root} has numbers, not classes; `vitlit test RUN` measures what a run makes of them")
    if not splits.classes:
        raise UserError(f"{given.root} has images without classes; sort them into class folders, or give --manifest")
    if len(splits.classes) == 1 and not alone:
        raise UserError(f"{given.root} has one class, so that there is nothing to tell apart")
    if splits.multi_label and (not alone or given.calibrate or given.real):
        raise UserError(f"{given.root} has several classes an image, of which classify alone measures the map")
    if "fewshot" in given.methods:  # now, not after other methods
        check_shots(splits["train"].labels, max(given.shots))
    if "knn" in given.methods:
        images = len(splits["train"]) * max(1, given.folds - 1) // max(1, given.folds)
        given.neighbours = [k for k in NEIGHBOURS if k <= images] or [images]
        if len(given.neighbours) < len(NEIGHBOURS) and ranks()[0] == 0:
            print(f"knn: k of at most {given.neighbours[-1]}, as there are {images} images to learn from")
    return splits, [splits[name] for name in wanted]


def check(source: str, vit: Any, splits: Splits, given: Namespace) -> list[int]:
    """The outputs of a head for the folder's classes; UserError unless all that is asked of the weights can be done."""
    if "classify" not in given.methods:
        return []
    count, metric = vit.config.num_classes, "map" if splits.multi_label else "top1"
    if not count:
        raise UserError(f"classify measures the weights' own head, and {source} has none; finetune it first")
    try:
        head = outputs(splits.classes, vit.classes, count, given.classes)
    except UserError as error:
        raise UserError(f"{source} on {given.root}: {error}") from error
    if given.calibrate:
        check_storable(source)
        if vit.activation != "softmax":
            raise UserError(f"{source} predicts by a sigmoid for each class; a temperature is of a softmax")
    if len(head) < count and given.calibrate:
        raise UserError(f"--calibrate needs all {count} classes of {source}; {given.root} has {len(head)}")
    rank, _ = ranks()
    if len(head) < count and rank == 0:
        print(f"{source}: {metric} among {len(head)} of {count} classes")
    if vit.temperature != 1 and rank == 0:
        print(f"{source}: probabilities are softmax(logits / {vit.temperature:.4g}), as in `vitlit predict`")
    return head


def of_head(method: str, numbers: dict[str, Any]) -> Found:
    return {(method, name): (*each, [each[0](*each[1])]) for name, each in numbers.items()}


def calibrated(source: str, logits: torch.Tensor, val: Index) -> Found:
    """Fit a temperature on a half of val, store it if it is better on the other, and tell what that one gives."""
    half, names = folds(val.labels, 2, val.groups) == 0, ("top1", "nll", "brier", "ece")
    fitted, found = temperature(logits[half], val.labels[half]), Found()
    for method, each in (("uncalibrated", logits[~half]), ("calibrated", logits[~half] / fitted)):
        numbers = measures(each, val.labels[~half])
        found |= of_head(method, {name: numbers[name] for name in names})
    stored = "is not stored, since the other half's nll rises"
    if found["calibrated", "nll"][2] < found["uncalibrated", "nll"][2]:
        stored = f"is stored in {store_temperature(source, fitted)}"
    print(f"{source}: temperature {fitted:.4g}, fitted on {half.sum():,} of {len(half):,} images, {stored}")
    return found


def probed(method: str, parts: list[Any], groups: Any, given: Namespace) -> Found:
    """What probes are worth in the mean over seeds, on val, or on the folds of train, whose groups are given."""
    labels = np.concatenate([labels for _, labels in parts])
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
            for name, found in classes_by(method, bank, labels[~test], seen, seed, own, given).items():
                of_seeds = right.setdefault(name, np.zeros((given.seeds, len(labels))))
                of_seeds[seed if draws else slice(None), test] = found == labels[test]
    worth, truth = Found(), labels[fold >= 0]
    for name, each in right.items():
        of_seeds = each[:, fold >= 0]
        worth[name, "top1"] = np.mean, (of_seeds.mean(0),), of_seeds.mean(1)
        balances = [balanced(of_seed, truth) for of_seed in of_seeds]
        worth[name, "balanced"] = balanced, (of_seeds.mean(0), truth), balances
    return worth


def classes_by(
    method: str, bank: Any, labels: np.ndarray, seen: Any, seed: int, groups: Any, given: Namespace
) -> dict[str, np.ndarray]:
    """The classes (M,) that each probe of a method gives to features, by name."""
    if method == "linear":
        return {method: linear(probe_inputs(bank), labels, probe_inputs(seen), seed, groups).numpy()}
    train, test = bank["pooled"], seen["pooled"]
    if method == "logistic":
        return {method: logistic(train, labels, test, seed, groups)}
    if method == "fewshot":
        return {f"{number}-shot": fewshot(train, labels, test, number, seed) for number in given.shots}
    # Features of a ViT that has learned nothing are alike to seven digits: float32 would draw lots among them.
    found = nearest(normalised(train.double()), torch.from_numpy(labels), test.double(), given.neighbours)
    return {f"knn {k}": each.numpy() for k, each in zip(given.neighbours, found, strict=True)}


def write(given: Namespace, rows: list[Any], every: dict[Any, Any], classes: list[str]) -> None:
    """Write the tables, and the diagram of what classify finds, from the values for each image by method and metric."""
    write_csv(given.out / "table.csv", ROW, rows)
    of_class: dict[str, dict[str, float]] = {}
    for (name, metric), values in every.items():
        if metric in ("balanced", "map"):
            shares = (per_class if metric == "balanced" else precisions)(*values).tolist()
            pairs = zip(classes, shares, strict=False)
            of_class[name] = {each: share for each, share in pairs if share == share}  # NaN: no images
    table = [dict(zip(ROW, row, strict=True)) for row in rows]
    content = {"settings": vars(given), "table": table, "classes": of_class}
    write_text(given.out / "table.json", json.dumps(content, indent=1, default=str))
    curves = {name: binned(*values) for (name, metric), values in every.items() if metric == "ece"}
    if given.calibrate:  # of the same images
        curves = {name: curve for name, curve in curves.items() if name.endswith("calibrated")}
    if curves:
        draw_reliability(curves).savefig(given.out / "reliability.png")

"""Wrong labels and copies that were planted among emoji, and how many of them `vitlit embed --neighbours` lists.

    python benchmarks/suspects.py --emoji FOLDER --weights FILE --work WORK --out RESULT.json

FOLDER/{train,val}/CLASS/* holds two vendors' drawings. In a draw 3 % of the images move to another class, and 5 % are
copied into the other split: resized, as JPEG, mirrored, or several of these. `labels` is the share of the moved ones
among the first 6 % of the list; `copies` is the share of copies that are listed beside their original; `false` is the
share of listed pairs with a copy in which neither is that: neither its original, nor what the original, which emoji
have twins of, is listed beside in the folder as it was.
"""

import csv
import json
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageOps
from runs import arguments, write

from vitlit.cli.main import main as vitlit

SIZE, DRAWS = 56, 3
WRONG, LISTED, COPIED = 0.03, 0.06, 0.05  # shares of the images
KINDS = ("resize", "jpeg", "mirror", "resize jpeg", "mirror jpeg", "mirror resize jpeg")
OTHER = {"train": "val", "val": "train"}


def copy(file: Path, kind: str, out: Path, draw: random.Random) -> Path:
    """An image as it comes back from elsewhere."""
    image = Image.open(file).convert("RGB")
    if "mirror" in kind:
        image = ImageOps.mirror(image)
    if "resize" in kind:
        share = draw.choice([0.5, 0.75, 1.5])
        image = image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)
    out = out.with_suffix(".jpg" if "jpeg" in kind else ".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, **({"quality": draw.choice([50, 75, 90])} if "jpeg" in kind else {}))
    return out


def plant(root: Path, out: Path, seed: int) -> tuple[set[str], dict[str, str]]:
    """A folder with planted faults: the paths of the moved images, and by the copies' paths their originals'."""
    draw, classes = random.Random(seed), sorted(path.name for path in (root / "train").iterdir())
    files = sorted(path for path in root.rglob("*") if path.is_file())
    moved, copied = set(draw.sample(files, round(WRONG * len(files)))), draw.sample(files, round(COPIED * len(files)))
    places = {}
    for file in files:
        split, name, _ = file.relative_to(root).parts
        wrong = draw.choice([other for other in classes if other != name]) if file in moved else name
        places[file] = out / split / wrong / f"{name}-{file.name}"
        places[file].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, places[file])
    copies = {}
    for number, file in enumerate(copied):
        split, name, _ = file.relative_to(root).parts
        made = copy(file, KINDS[number % len(KINDS)], out / OTHER[split] / name / f"copy-{number}", draw)
        copies[str(made.relative_to(out))] = str(places[file].relative_to(out))
    return {str(places[file].relative_to(out)) for file in moved}, copies


def listed(root: Path, weights: Path, work: Path, name: str) -> tuple[list[str], list[set[str]]]:
    """What the command lists of a folder: paths of likely wrong labels, the likeliest first, and pairs of paths."""
    given = [str(weights), str(root), str(work / f"{name}.npz"), "--image_size", str(SIZE), "--neighbours", "10"]
    if not (work / f"{name}.npz").exists() and vitlit(["embed", *given]):
        sys.exit(1)
    tables = [
        list(csv.DictReader((work / f"{name}-{part}.csv").open())) for part in ("label_errors", "near_duplicates")
    ]
    return [row["path"] for row in tables[0]], [{row["path"], row["other"]} for row in tables[1]]


def main() -> None:
    given = arguments(__doc__ or "", "emoji", "weights").parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(DRAWS):
        root, known = given.work / f"planted-{seed}", given.work / f"planted-{seed}.json"
        if not known.exists():
            moved, copies = plant(given.emoji, root, seed)
            known.write_text(json.dumps([sorted(moved), copies]))
        moved, copies = json.loads(known.read_text())
        wrong, pairs = listed(root, given.weights, given.work, f"seed-{seed}")
        twins = defaultdict(set)
        for pair in pairs:
            if not pair & copies.keys():
                for path in pair:
                    twins[path] |= pair
        found, false, of_copies = 0, 0, 0
        for pair in pairs:
            of_copies += bool(pair & copies.keys())
            for path in pair & copies.keys():
                other = next(iter(pair - {path}))
                found += other == copies[path]
            origins = {copies.get(path, path) for path in pair}
            false += bool(pair & copies.keys()) and len(origins) == 2 and not any(origins <= twins[p] for p in origins)
        images = sum(1 for path in root.rglob("*") if path.is_file())
        first = set(wrong[: round(LISTED * images)])
        rows.append({"name": f"draw {seed}", "images": images, "moved": len(moved), "copied": len(copies)})
        rows[-1] |= {"labels": round(len(first & set(moved)) / len(moved), 4), "copies": round(found / len(copies), 4)}
        rows[-1] |= {"pairs": len(pairs), "pairs_with_copies": of_copies, "false": round(false / of_copies, 4)}
        print(rows[-1], flush=True)
    write(given.out, (__doc__ or "").splitlines()[0], rows, image_size=SIZE)


if __name__ == "__main__":
    main()

"""`vitlit embed WEIGHTS ROOT OUT`: features as a table, and what they make suspect."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vitlit.callbacks.predictions import write_csv
from vitlit.data.folder import SPELLINGS, scan_classes
from vitlit.data.index import Index
from vitlit.data.shards import is_shards
from vitlit.data.splits import Splits
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.files import expand, save_arrays, whole_file, writing
from vitlit.prepare.features import ready
from vitlit.prepare.suspects import COLUMNS, Table, embed, suspects

HELP = """\
Write each image's path (relative to ROOT), split, class and features, float32, as a table (OUT.parquet) or as arrays of
these names (OUT.npz). A folder of images without classes will do. --neighbours K also writes OUT-near_duplicates.csv,
of images that show the same picture, and OUT-label_errors.csv, of labels that are likely wrong, likeliest first.
"""


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit embed", HELP)
    parser.add_argument("weights", metavar="WEIGHTS", help="a run's folder, a weight file, or hf:OWNER/NAME")
    parser.add_argument("root", metavar="ROOT", help="as --data.root: a folder, or shards")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--split", choices=list(SPELLINGS), help="this alone; by default all that there are")
    parser.add_argument("--image_size", type=int, default=0, metavar="N", help="pixels; by default the weights'")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest; its groups stay in one fold")
    parser.add_argument("--neighbours", type=int, metavar="K", help="nearest images to compare each with, such as 10")
    given = parser.parse_args(arguments or ["--help"])
    check_range("vitlit embed", 1, neighbours=given.neighbours)
    if given.out.suffix not in (".parquet", ".npz"):
        parser.error(f"OUT is {given.out}; name a file that ends in .parquet or .npz")
    if given.out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"{given.out} needs pyarrow: pip install pyarrow, or name an .npz file")
    lists = {name: given.out.with_name(f"{given.out.stem}-{name}.csv") for name in COLUMNS if given.neighbours}
    if there := next((file for file in (given.out, *lists.values()) if file.exists()), None):
        raise UserError(f"{there} exists: name another file, or remove it first")
    with writing(given.out, "name another file"):  # now, not when all is computed
        given.out.parent.mkdir(parents=True, exist_ok=True)
    splits, classes = images(given.root, given.split, given.manifest)
    vit = ready(given.weights, given.image_size)
    table = embed(vit, splits, classes, expand(given.root))
    found = {}
    if lists:
        found = suspects(table, list(splits.values()), classes, vit.preprocess.ground, given.neighbours)
    with writing(given.out, "name another file"):
        write_table(given.out, table)
        print(f"{given.out}: {len(table.path):,} images, {table.features.shape[1]:,} features")
        for name, rows in found.items():
            write_csv(
                lists[name], COLUMNS[name], [[f"{x:.4f}" if type(x) is float else x for x in row] for row in rows]
            )
            print(f"{lists[name]}: {len(rows):,} rows")
    for name in lists.keys() - found.keys():
        print(f"{lists[name]}: not written, as the images do not have one of several classes each")
    return 0


def images(root: str, split: str | None, manifest: str | None) -> tuple[dict[str, Index], list[str]]:
    """The images of a split, or of each that there is, and the classes; without folders of splits the split is ""."""
    splits, here = Splits(root, 0.0, manifest), Path(expand(root))
    listed = manifest is not None or is_shards(splits.root)
    present = [name for name in SPELLINGS if (here / name).is_dir()]
    if not (listed or present or split) and here.is_dir():
        classes, index = scan_classes(here)
        return {"": index}, classes
    splits.scan()
    names = [split] if split else [name for name in SPELLINGS if splits.has(name)]
    return {name: splits[name] for name in names}, splits.classes


def write_table(out: Path, table: Table) -> None:
    """Write a table in the format of OUT's ending."""
    columns = {"path": table.path, "split": table.split, "class": table.label}
    if out.suffix == ".npz":
        save_arrays(out, {name: np.array(column) for name, column in columns.items()} | {"features": table.features})
        return
    import pyarrow
    from pyarrow import parquet

    flat, width = table.features.ravel(), table.features.shape[1]
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), width)
    try:
        whole = pyarrow.table(columns | {"features": vectors})
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object!r} is no UTF-8 text, which is all that parquet holds; name an .npz") from error
    with whole_file(out) as partial:
        parquet.write_table(whole, partial)

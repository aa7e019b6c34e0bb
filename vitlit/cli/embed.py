"""`vitlit embed WEIGHTS ROOT OUT`: features as a table, and what they make suspect."""

from pathlib import Path

import numpy as np

from vitlit.data.folder import SPELLINGS
from vitlit.data.splits import Splits
from vitlit.errors import CommandParser, UserError, check_range, need
from vitlit.files import check_new, save_arrays, whole_file, write_csv, writing
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
    parser.add_argument("--image_size", type=int, metavar="N", help="pixels; by default the weights'")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest; its groups stay in one fold")
    parser.add_argument("--neighbours", type=int, metavar="K", help="nearest images to compare each with, such as 10")
    given = parser.parse_args(arguments or ["--help"])
    check_range("vitlit embed", 1, neighbours=given.neighbours)
    if given.out.suffix not in (".parquet", ".npz"):
        parser.error(f"OUT is {given.out}; name a file that ends in .parquet or .npz")
    if given.out.suffix == ".parquet":
        need("pyarrow")
    lists = {name: given.out.with_name(f"{given.out.stem}-{name}.csv") for name in COLUMNS if given.neighbours}
    check_new(given.out, *lists.values())
    with writing(given.out, "name another file"):  # now, not when all is computed
        given.out.parent.mkdir(parents=True, exist_ok=True)
    splits = Splits(given.root, 0.0, given.manifest)
    present = splits.present()
    indices = {name: splits[name] for name in ([given.split] if given.split else present)}
    vit = ready(given.weights, given.image_size)
    table = embed(vit, indices, splits.classes, splits.root)
    found = suspects(table, indices, splits.classes, vit.preprocess, given.neighbours) if lists else {}
    with writing(given.out, "name another file"):
        write_table(given.out, table)
        print(f"{given.out}: {len(table.path):,} images, {table.features.shape[1]:,} features")
        for name, rows in found.items():
            write_csv(lists[name], COLUMNS[name], rows)
            print(f"{lists[name]}: {len(rows):,} rows")
    for name in lists.keys() - found.keys():
        print(f"{lists[name]}: not written, as the images do not have one of several classes each")
    return 0


def write_table(out: Path, table: Table) -> None:
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

"""`vitlit inspect WEIGHTS IMAGE... --out DIR`."""

from pathlib import Path

from vitlit.errors import CommandParser, UserError

ABOUT = """\
Draw what a ViT attends to in images, and what it has learned, as PNG files in a new folder: filters (of the patches),
positions (their similarity), distance (of attention, by depth), images (their attention and features), occlusion (what
the class loses where a grey square is) and heads (of each block, in the first image). What does not apply is said.
"""
MOST = 8  # of a folder's images


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit inspect", ABOUT)
    parser.add_argument("weights", metavar="WEIGHTS", help="a run's folder, a weight file, or hf:OWNER/NAME")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=f"a file, or a folder: at most {MOST} of its images")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    given = parser.parse_args(arguments or ["--help"])
    from vitlit.data.folder import scan_photos
    from vitlit.files import whole_folder
    from vitlit.inspection.attention import pooled  # loads torch, which a mistake need not wait for
    from vitlit.inspection.figures import FIGURES
    from vitlit.weights.door import load_prepared

    found = [scan_photos([Path(image)]) for image in given.images]
    paths = [each.path(row) for each in found for row in range(0, len(each), -(-len(each) // MOST))]
    with whole_folder(given.out) as folder:
        vit = load_prepared(given.weights)
        images = vit.preprocess(paths)
        print(f"images and heads: attention of the {pooled(vit)[0]} (pool: {vit.config.pool})")
        for draw in FIGURES:
            name = draw.__name__.removeprefix("draw_")
            try:
                draw(vit, images).savefig(folder / f"{name}.png")
                print(f"{name}: {given.out / name}.png")
            except UserError as reason:
                print(f"{name}: not drawn, {reason}")
    return 0

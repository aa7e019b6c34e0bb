"""`vitlit data imagenet TARS OUT`: ImageNet's 1,000 classes (ILSVRC 2012) from the archives of its site."""

import tarfile
import tempfile
from pathlib import Path

from vitlit.data.progress import Progress
from vitlit.errors import CommandParser, UserError
from vitlit.files import whole_folder
from vitlit.prepare.sources import print_counts

PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
HELP = "Unpack ILSVRC 2012 from the archives in the folder TARS, the validation images sorted into their classes."


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit data imagenet", HELP)
    parser.add_argument("tars", metavar="TARS", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    given = parser.parse_args(arguments or ["--help"])
    unpack(given.tars, given.out)
    return 0


def unpack(tars: Path, out: Path) -> None:
    """Unpack the archives as `out/{train,val}/WNID/*.JPEG`, byte for byte; once interrupted, keep what is complete."""
    from torchvision.datasets import imagenet

    tars = tars.absolute()
    archives = {split: (tars / name, md5) for split, (name, md5) in imagenet.ARCHIVE_META.items()}
    if missing := [file.name for file, _ in archives.values() if not file.is_file()]:
        raise UserError(f"{tars} lacks {', '.join(missing)}: download from {PAGE}, which needs a login")
    with whole_folder(out, resume=True) as partial, tempfile.TemporaryDirectory() as kit:
        try:
            print("comparing the archives with their MD5, which takes minutes", flush=True)
            for file, md5 in archives.values():
                if not imagenet.check_integrity(file, md5):
                    raise UserError(f"{file} is cut short or damaged: download it again from {PAGE} (MD5 {md5})")
            if not (partial / "val").is_dir():
                imagenet.parse_devkit_archive(kit, str(archives["devkit"][0]))
                with whole_folder(partial / "val") as val:
                    imagenet.parse_val_archive(tars, wnids=imagenet.load_meta_file(kit)[1], folder=str(val.absolute()))
            _unpack_train(archives["train"][0], partial / "train")
        except OSError as error:
            again = "correct that, and the same command continues"
            raise UserError(f"{tars} could not be unpacked ({error}); {again}") from error
    print_counts(out, ("train", "val"))


def _unpack_train(file: Path, folder: Path) -> None:
    """Class by class: torchvision would first write the archives of all classes, and begin again once interrupted."""
    show = Progress()
    with tarfile.open(file) as archive:
        for done, member in enumerate(archive, start=1):
            target = folder / Path(member.name).stem
            if not target.is_dir():
                with whole_folder(target) as partial, tarfile.open(fileobj=archive.extractfile(member)) as inner:
                    inner.extractall(partial, filter="data")
            show(f"train: {done:,} classes")

"""`vitlit data NAME OUT`. The downloads are real ones, of archives in the real format, from a local server."""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from sklearn.datasets import load_digits
from torchvision import datasets

from vitlit.errors import UserError
from vitlit.prepare import sources


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Web:
    """A web server of one folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{port}/"

    def archive(self, name: str, files: dict[str, bytes]) -> tuple[str, str]:
        """Serve a .tar.gz of the files; returns (its address, its md5)."""
        with tarfile.open(self.folder / name, "w:gz") as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return self.address + name, md5((self.folder / name).read_bytes())


@pytest.fixture
def web(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path_factory.mktemp("web")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield Web(folder, server.server_port)
        server.shutdown()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sources") / "digits"
    sources.write("digits", out)
    return out


def test_digits_are_scikit_learns(digits: Path) -> None:
    source = load_digits()
    expected = Counter(
        (str(label), tuple(round(value * 255 / 16) for value in image.ravel()))
        for image, label in zip(source.images, source.target, strict=True)
    )
    written: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for path in digits.glob("*/*/*.png"):
        image = Image.open(path)
        assert (image.mode, image.size) == ("L", (8, 8))
        written[path.parent.name, tuple(np.asarray(image).ravel().tolist())] += 1
    assert written == expected  # as multisets, so train and val share nothing and miss nothing
    assert written.total() == 1797


def test_digits_split_is_stratified_and_fixed(digits: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in digits.iterdir()) == ["train", "val"]
    assert len(list(digits.glob("val/*/*"))) == 359
    for label in map(str, range(10)):
        train, val = (len(list((digits / split / label).iterdir())) for split in ("train", "val"))
        assert val == round((train + val) / 5)
    sources.write("digits", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits)


def test_prints_a_line_for_each_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources.write("digits", Path("data/digits"))
    assert capsys.readouterr().out.splitlines() == [
        "data/digits/train: 1,438 images, 10 classes",
        "data/digits/val: 359 images, 10 classes",
    ]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]


def test_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mine exists and is not empty: name another"):
        sources.write("digits", tmp_path / "mine")
    assert contents(tmp_path) == {"mine/photo.jpg": b"mine"}
    with pytest.raises(UserError, match=r"photo\.jpg exists"):
        sources.write("digits", tmp_path / "mine/photo.jpg")
    with pytest.raises(UserError, match="cannot write"):
        sources.write("digits", tmp_path / "mine/photo.jpg/digits")
    (tmp_path / "empty").mkdir()
    sources.write("digits", tmp_path / "empty")
    assert (tmp_path / "empty/val/9").is_dir()


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"NAME: invalid choice: 'minst' .*digits.*cifar10.*imagenette"):
        sources.run(["minst", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sources.write("digits", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_command_are_not_mixed_in(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial/train/7").mkdir(parents=True)
    (tmp_path / "out.partial/train/7/stale.png").write_bytes(b"cut short")
    sources.write("digits", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_download(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", web.address + "missing.tar.gz")
    with pytest.raises(UserError) as caught:
        sources.write("cifar10", tmp_path / "data/out")
    message = str(caught.value)
    assert "404" in message
    assert message.startswith("cifar10 could not be downloaded from www.cs.toronto.edu (")
    assert "vitlit data digits OUT" in message
    assert "\n" not in message
    assert not list((tmp_path / "data").iterdir())


def test_damaged_download(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = web.archive("imagenette2-320.tgz", {"imagenette2-320/train/readme": b""})
    monkeypatch.setitem(datasets.Imagenette._ARCHIVES, "320px", (url, md5(b"another file")))
    with pytest.raises(UserError, match=r"imagenette could not be downloaded .*corrupted"):
        sources.write("imagenette", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sources.HOSTS)
def test_hosts_are_torchvisions(name: str) -> None:
    addresses = {
        "cifar10": datasets.CIFAR10.url,
        "cifar100": datasets.CIFAR100.url,
        "imagenette": datasets.Imagenette._ARCHIVES["320px"][0],
        "flowers102": datasets.Flowers102._download_url_prefix,
        "pets": datasets.OxfordIIITPet._RESOURCES[0][0],
    }
    assert addresses[name].startswith(f"https://{sources.HOSTS[name]}/")


@pytest.mark.parametrize(
    ("name", "kind", "label_key", "names_key"),
    [
        ("cifar10", datasets.CIFAR10, "labels", "label_names"),
        ("cifar100", datasets.CIFAR100, "fine_labels", "fine_label_names"),
    ],
)
def test_cifar(
    name: str, kind: Any, label_key: str, names_key: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    batches = {
        file: {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), label_key: [0, 1, 1, 2]}
        for file, _ in kind.train_list + kind.test_list
    }
    pickled = {file: pickle.dumps(batch) for file, batch in batches.items()}
    meta = pickle.dumps({names_key: ["airplane", "aquarium fish", "bird"]})
    files = {f"{kind.base_folder}/{file}": data for file, data in (pickled | {kind.meta["filename"]: meta}).items()}
    url, checksum = web.archive(kind.filename, files)
    monkeypatch.setattr(kind, "url", url)
    monkeypatch.setattr(kind, "tgz_md5", checksum)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(kind, listed, [[file, md5(pickled[file])] for file, _ in getattr(kind, listed)])

    sources.write(name, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for split, listed in (("train", kind.train_list), ("val", kind.test_list)):
        rows = np.concatenate([batches[file]["data"] for file, _ in listed])
        assert len(list((tmp_path / "out" / split).glob("*/*"))) == len(rows)
        for i, row in enumerate(rows):
            folder = ["airplane", "aquarium_fish", "aquarium_fish", "bird"][i % 4]
            image = np.asarray(Image.open(tmp_path / "out" / split / folder / f"{i:05d}.png"))
            np.testing.assert_array_equal(image, row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_imagenette_keeps_the_jpeg_bytes(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"imagenette2-320/{split}/{wnid}/{wnid}_{i}.JPEG": jpeg(10 * c + i)
        for c, wnid in enumerate(datasets.Imagenette._WNID_TO_CLASS)
        for split, numbers in (("train", range(2)), ("val", range(2, 3)))
        for i in numbers
    }
    archive = web.archive("imagenette2-320.tgz", files)
    monkeypatch.setitem(datasets.Imagenette._ARCHIVES, "320px", archive)

    sources.write("imagenette", tmp_path / "out")

    written = contents(tmp_path / "out")
    folders = {"n01440764": "tench", "n02102040": "English_springer", "n02979186": "cassette_player"}
    for wnid, folder in folders.items():
        assert written[f"train/{folder}/{wnid}_1.JPEG"] == files[f"imagenette2-320/train/{wnid}/{wnid}_1.JPEG"]
    assert Counter(path.split("/")[0] for path in written) == {"train": 20, "val": 10}
    assert Counter(written.values()) == Counter(files.values())


def test_pets(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"images/{name}_{i}.jpg": jpeg(i) for name in ("Abyssinian", "american_bulldog") for i in (1, 2, 10)}
    annotations = {
        "annotations/trainval.txt": b"Abyssinian_1 1 1 1\nAbyssinian_10 1 1 1\namerican_bulldog_10 2 2 1\n",
        "annotations/test.txt": b"Abyssinian_2 1 1 1\namerican_bulldog_1 2 2 1\namerican_bulldog_2 2 2 1\n",
    }
    resources = (
        web.archive("images.tar.gz", images),
        web.archive("annotations.tar.gz", annotations),
    )
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", resources)

    sources.write("pets", tmp_path / "out")

    assert contents(tmp_path / "out") == {
        "train/Abyssinian/Abyssinian_1.jpg": images["images/Abyssinian_1.jpg"],
        "train/Abyssinian/Abyssinian_10.jpg": images["images/Abyssinian_10.jpg"],
        "train/American_Bulldog/american_bulldog_10.jpg": images["images/american_bulldog_10.jpg"],
        "val/Abyssinian/Abyssinian_2.jpg": images["images/Abyssinian_2.jpg"],
        "val/American_Bulldog/american_bulldog_1.jpg": images["images/american_bulldog_1.jpg"],
        "val/American_Bulldog/american_bulldog_2.jpg": images["images/american_bulldog_2.jpg"],
    }


def test_flowers102(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"jpg/image_{i:05d}.jpg": jpeg(i) for i in range(1, 307)}
    kind = datasets.Flowers102
    _, checksum = web.archive("102flowers.tgz", images)
    labels, splits = np.tile(np.arange(1, 103), 3), np.arange(1, 307).reshape(3, 102)
    savemat(web.folder / "imagelabels.mat", {"labels": labels})
    savemat(web.folder / "setid.mat", {"trnid": splits[1], "valid": splits[2], "tstid": splits[0]})
    named = {"label": "imagelabels.mat", "setid": "setid.mat"}
    checksums = {key: (file, md5((web.folder / file).read_bytes())) for key, file in named.items()}
    monkeypatch.setattr(kind, "_download_url_prefix", web.address)
    monkeypatch.setattr(kind, "_file_dict", {"image": ("102flowers.tgz", checksum), **checksums})

    sources.write("flowers102", tmp_path / "out")

    written = contents(tmp_path / "out")
    assert Counter(path.split("/")[0] for path in written) == {"train": 102, "val": 102, "test": 102}
    for split in ("train", "val", "test"):
        names = [folder.name for folder in (tmp_path / "out" / split).iterdir()]
        assert len({name.lower() for name in names}) == 102  # distinct also where the file system ignores case
        assert all(name.replace("_", "").replace("-", "").isalnum() for name in names)
    assert written["test/pink_primrose/image_00001.jpg"] == images["jpg/image_00001.jpg"]
    assert written["train/colt_s_foot/image_00114.jpg"] == images["jpg/image_00114.jpg"]


def test_importing_is_light() -> None:
    code = "import sys, vitlit.prepare.sources; print({'torch', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

"""Images made to harm: they are refused in one line, and nothing in them is run."""

import io
import os
import resource
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, forked, user_error
from PIL import EpsImagePlugin, Image

from vitlit.data.folder import scan_photos
from vitlit.errors import UserError
from vitlit.images.decode import decode
from vitlit.prepare.report import look

SIDE = 50_000
HUGE = "more than 178,956,970 pixels; scale it down"
DAMAGED = "it is no JPEG PNG .*; convert or remove it"
MOST_MEMORY = 64 << 20  # bytes that a refusal may take: a refused image has 7.5 GB


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width: int, height: int, bits: int = 1) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A whole PNG, black, 50,000 x 50,000 of one bit: 300 kB of which a decoder makes 7.5 GB."""
    rows, times = bytes(100 * (1 + SIDE // 8)), SIDE // 100
    packer, check = zlib.compressobj(1, wbits=-15), 1
    block = packer.compress(rows) + packer.flush(zlib.Z_FULL_FLUSH)  # which may be repeated
    for _ in range(times):
        check = zlib.adler32(rows, check)
    pixels = b"\x78\x01" + block * times + packer.flush() + struct.pack(">I", check)
    return b"\x89PNG\r\n\x1a\n" + header(SIDE, SIDE) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 9, 9)).save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(before: bytes = b"", after: bytes = b"", **options: Any) -> bytes:
    """A JPEG whose header tells 50,000 x 50,000, with something before that and behind it."""
    data = saved("JPEG", **options)
    place = data.index(b"\xff\xc2" if options else b"\xff\xc0")
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    frame = data[place : place + 5] + struct.pack(">HH", SIDE, SIDE) + data[place + 9 : end]
    return data[:place] + before + frame + after + data[end:]


def small_frame() -> bytes:
    """The part of a JPEG that tells 40 x 30."""
    data = saved("JPEG")
    place = data.index(b"\xff\xc0")
    return data[place : place + 19]


def film(format: str) -> bytes:
    """Two frames of 40 x 30."""
    return saved(format, save_all=True, append_images=[Image.new("RGB", (40, 30), (200, 9, 9))])


def webp(kind: bytes, content: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(flags: int) -> bytes:
    size = (SIDE - 1).to_bytes(3, "little")
    return webp(b"VP8X", bytes([flags, 0, 0, 0]) + size + size)


def screen(data: bytes) -> bytes:
    """A GIF with a larger screen."""
    return data[:6] + struct.pack("<HH", SIDE, SIDE) + data[10:]


def frame_beyond(data: bytes) -> bytes:
    """A GIF whose screen is small, but not its first frame."""
    place = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 40, 30)) + 5
    return data[:place] + struct.pack("<HH", SIDE, SIDE) + data[place + 4 :]


def large_tiff(data: bytes) -> bytes:
    """A TIFF of another width and height."""
    for tag in (256, 257):
        place = data.index(struct.pack("<HHI", tag, 4, 1))
        data = data[: place + 8] + struct.pack("<I", SIDE) + data[place + 12 :]
    return data


# By name: the content, and what is said of it. Where two headers contradict each other, the one that counts is huge.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg": (jpeg, HUGE),
    "progressive jpeg": (lambda: jpeg(progressive=True), HUGE),
    "jpeg, then a small frame": (lambda: jpeg(after=small_frame()), "two SOF markers|broken data stream"),
    "jpeg behind filling and restarts": (lambda: jpeg(b"\xff\xff\xff\x00junk\xff\xd0\xff"), HUGE),
    "jpeg behind a reserved marker": (lambda: jpeg(b"\xff\x01"), DAMAGED),
    "jpeg behind a preview": (lambda: jpeg(b"\xff\xe2" + struct.pack(">H", 2 + 19) + small_frame()), HUGE),
    "jpeg of endless segments": (lambda: b"\xff\xd8" + b"\xff\xe0\0\x02" * 20_000, DAMAGED),
    "gif": (lambda: screen(saved("GIF")), HUGE),
    "animated gif": (lambda: screen(film("GIF")), HUGE),
    "gif with a huge frame": (lambda: frame_beyond(saved("GIF")), HUGE),
    "webp canvas": (lambda: canvas(0), HUGE),
    "animated webp canvas": (lambda: canvas(2), HUGE),
    "webp": (lambda: webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + b"\xff\x3f" * 2 + bytes(40)), HUGE),
    "lossless webp": (lambda: webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(40)), HUGE),
    "webp without a name": (lambda: webp(b"JUNK", canvas(0)), DAMAGED),
    "png behind another chunk": (
        lambda: b"\x89PNG\r\n\x1a\n" + header(1, 1).replace(b"IHDR", b"juNK") + header(SIDE, SIDE),
        DAMAGED,
    ),
    "png, then a small header": (lambda: b"\x89PNG\r\n\x1a\n" + header(SIDE, SIDE) + header(1, 1), DAMAGED),
    "bmp": (
        lambda: (lambda d: d[:18] + struct.pack("<II", SIDE, SIDE) + d[26:])(saved("BMP")),
        HUGE,
    ),
    "ppm": (lambda: b"P6 50000 50000 255\n", HUGE),
    "tiff": (lambda: large_tiff(saved("TIFF")), HUGE),
}


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two paths: with torchcodec, and without it."""
    if request.param == "Pillow":
        monkeypatch.setattr("vitlit.images.decode.DECODERS", {})


def undecodable(path: Path, words: str, cwd: Path) -> None:
    """Decoding fails in one line with these words, and has taken little memory."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def child() -> int:
        before = peak()
        user_error(rf"cannot read the image {path}: .*{words}", decode, path)
        assert peak() - before < MOST_MEMORY
        return 0

    result = forked(child, cwd)
    assert result.code == 0, result.err


@pytest.mark.usefixtures("decoder")
def test_an_image_of_too_many_pixels_is_refused_undecoded(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb)
    undecodable(tmp_path / "bomb.png", HUGE, tmp_path)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_of_too_many_pixels_or_one_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    content, words = BOMBS[name]
    (tmp_path / "bomb.jpg").write_bytes(content())
    undecodable(tmp_path / "bomb.jpg", words, tmp_path)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_an_animation_no_frame_but_the_first_is_decoded(format: str, tmp_path: Path) -> None:
    frames = [Image.new("L", (1000, 1000)) for _ in range(40)]  # 120 MB together
    for number, frame in enumerate(frames):
        frame.paste(200, (10 * number, 0, 500, 500))
    path = tmp_path / "film.bin"
    frames[0].save(path, format, save_all=True, append_images=frames[1:])

    def child() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert decode(path).shape == (3, 1000, 1000)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
        return 0

    result = forked(child, tmp_path)
    assert result.code == 0, result.err


def test_of_two_png_headers_torchcodec_decodes_neither(tmp_path: Path) -> None:
    """Pillow, which judges the size, takes the second one, and libpng the first."""
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header(SIDE, SIDE) + saved("PNG")[8:])
    undecodable(tmp_path / "bomb.png", "IHDR", tmp_path)


@pytest.mark.usefixtures("decoder")
@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's, of a TIFF of more than half as many
def test_as_many_pixels_as_are_allowed_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlit.images.decode.MOST_PIXELS", 1200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"):
        (tmp_path / "image").write_bytes(saved(format))
        assert decode(tmp_path / "image").shape == (3, 30, 40)
    monkeypatch.setattr("vitlit.images.decode.MOST_PIXELS", 1199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"):
        (tmp_path / "image").write_bytes(saved(format))
        with pytest.raises(UserError, match="more than 1,199 pixels; scale it down"):
            decode(tmp_path / "image")


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_what_begins_but_almost_as_an_image_is_none_to_either_decoder(format: str, tmp_path: Path) -> None:
    data = saved(format)
    broken = data[:2] + b"\0" + data[2:] if format == "JPEG" else data[:4] + b"\n\n" + data[6:]
    (tmp_path / "image").write_bytes(broken)
    with pytest.raises(UserError, match="cannot read the image"):
        decode(tmp_path / "image")


def test_postscript_is_no_image_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript."""
    marker, program = tmp_path / "ran", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as picture:
        assert picture.format == "EPS"
    with pytest.raises(UserError, match="it is no JPEG PNG"):
        decode(path)
    assert look(str(path)).kind == "unreadable"
    assert not marker.exists()


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    index = scan_photos([tmp_path])
    assert len(index) == 3
    said = {"pipe.jpg": "it is no file", "zeros.jpg": "it is no file", "loop.jpg": "symbolic links"}
    for row in range(3):
        path = Path(index.path(row))
        for read in (partial(index.read, row), partial(decode, path)):
            with pytest.raises(UserError, match=rf"cannot read the image {path}: .*{said[path.name]}"):
                read()
        assert look(str(path)).kind == "unreadable"


def test_every_command_refuses_a_bomb_in_a_line(
    vitlit: Callable[..., Any], bomb: bytes, few: Path, trained: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for path in few.rglob("*.png"):
        target = root / path.relative_to(few)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (root / "train/1/bomb.png").write_bytes(bomb)
    for place in (root, tmp_path / "shards"):
        result = vitlit("fit", *SMALL, "--data.root", place, "--run.name", f"stops at {place.name}")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert f"bomb.png: {HUGE}" in result.err
        skipped = vitlit("fit", *SMALL, "--data.root", place, "--data.on_bad_image", "skip", "--run.name", place.name)
        assert skipped.code == 0, skipped.err
        assert HUGE in (tmp_path / "runs" / place.name / "bad_images.csv").read_text()
        if place == root:
            assert vitlit("data", "shard", root, "shards").code == 0
    predicted = vitlit("predict", trained / "runs" / "pretrain", root / "train" / "1")
    assert (predicted.code, predicted.err.count("\n")) == (2, 1), predicted.err
    assert f"bomb.png: {HUGE}" in predicted.err
    checked = vitlit("data", "check", root, "--workers", 1)
    assert checked.code == 1
    assert "images of more than 178,956,970 pixels" in checked.out

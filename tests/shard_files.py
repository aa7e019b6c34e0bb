"""Shards for the tests: tars and images in them, and a web server that gives parts of files."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vitlit.data.folder import scan_split, scan_train
from vitlit.data.index import Index
from vitlit.data.manifest import Manifest

SERVER = """
import http.server, os, re, sys, time
folder, log, port, mode = sys.argv[1], open(sys.argv[2], "a", buffering=1), int(sys.argv[3]), sys.argv[4]
failing = int(mode.partition(":")[2] or 0)

class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def __init__(self, *arguments):
        super().__init__(*arguments, directory=folder)
    def do_GET(self):
        global failing
        asked = re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range") or "")
        log.write(f"{self.command} {self.path} {asked[0] if asked else ''}\\n")
        path = self.translate_path(self.path)
        if asked is None or mode == "whole" or not os.path.isfile(path):
            return super().do_GET()
        if failing > 0:
            failing -= 1
            return self.send_error(503)
        if mode == "silent":
            time.sleep(5)
        start, end = int(asked[1]), min(int(asked[2]) + 1, os.path.getsize(path))
        if start >= end:
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{os.path.getsize(path)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(start)
            self.wfile.write(file.read(end - start))
    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Server:
    """A web server in a process of its own, which can be killed and started again at its address."""

    def __init__(self, folder: Path, log: Path, mode: str) -> None:
        self.folder, self.log, self.mode, self.port = folder, log, mode, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [self.folder, self.log, self.port, self.mode]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def requests(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def _of_folder(root: Path) -> Manifest:
    classes, train, _ = scan_train(root)
    return Manifest(classes, {"train": train, "val": scan_split(root / "val", classes)}, False)


def tar(file: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, level).save(buffer, "PNG")
    return buffer.getvalue()


def levels(index: Index) -> list[int]:
    """The grey of each image."""
    return [int(np.asarray(Image.open(io.BytesIO(index.read(i))))[0, 0]) for i in range(len(index))]

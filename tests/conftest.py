"""What the tests share: real digits, a small ViT's flags, and the command line in a forked child."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a child forked from a process with OpenMP threads would hang
# Their numbers are a CPU's, and a process that has looked at a GPU cannot be forked; tests/test_gpu.py has its own.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import gc
import math
import shutil
import signal
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache, partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

# First, as in the command: typing keeps one order of int and float for all that ask later, and with the other order
# --trainer.limit_val_batches 1 would be taken for 1.0, all batches.
import lightning.pytorch  # noqa: F401
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed import TCPStore

torch.set_num_threads(1)
# Autograd's engine starts with the first backward. Were that after a torch.compile, which pretends that there is a GPU,
# the engine would start that GPU's thread, and refuse every backward of a forked child.
torch.zeros((), requires_grad=True).backward()

REPOSITORY = Path(__file__).parent.parent

# configs/pretrain.yaml made small: 6 steps of a ViT that computes in no time.
SMALL = (
    "--config",
    str(REPOSITORY / "configs" / "pretrain.yaml"),
    *["--model.vit.width", "16", "--model.vit.depth", "2", "--model.vit.heads", "2", "--model.vit.mlp_dim", "32"],
    *["--model.schedule.warmup", "2", "--data.batch_size", "16", "--data.num_workers", "0", "--data.image_size", "16"],
    *["--trainer.logger", "false", "--trainer.max_steps", "6", "--trainer.log_every_n_steps", "1"],
    *["--run.report", "false"],  # which takes longer than the training
)

# What learns beside the ViT, made small: at full size its checkpoints take seconds to write.
HEADS: dict[str, dict[str, int]] = {
    "DINO": {"prototypes": 16, "hidden_dim": 8, "bottleneck": 8},
    "LeJEPA": {"hidden_dim": 8},
    "MAE": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
}

Module = TypeVar("Module", bound=nn.Module)


def randomized(module: Module, scale: float = 0.1) -> Module:
    """Move every parameter, zeros and ones included, so that none can be missed unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def stranger(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """A timm model, by default a small one for 32 pixels and 3 classes, whose every parameter has a value."""
    import timm

    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 3}
    return randomized(timm.create_model(name, **{**small, **options}))


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits and 1 to 4 channels, uint16 (H, W, C), which Pillow writes for one channel alone."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def paint(*paths: Path) -> None:
    """Write a small image at each path."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 100, 200)).save(path)


class Result(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def refused(result: Result, *words: object, code: int = 2) -> None:
    """It is one line, with these words in it, and exit code 2."""
    assert result.code == code, result.err
    assert result.err.startswith("vitlit: error: ")
    assert result.err.count("\n") == 1, result.err
    for word in words:
        assert str(word) in result.err


def user_error(pattern: str, function: Callable[..., object], *arguments: Any) -> str:
    """What a call says that ends in a UserError: one line, in which the pattern is found."""
    from vitlit.errors import UserError

    with pytest.raises(UserError, match=pattern) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def done(result: Result) -> str:
    """It worked, and nothing was complained about; what it printed."""
    assert result.code == 0, result.err
    assert not result.err
    return result.out


def start(function: Callable[[], int], cwd: Path, name: str = "") -> int:
    """Begin a function in a forked child, in a folder, with its own output: an import costs seconds, a fork nothing."""
    files = [cwd / f".stdout{name}", cwd / f".stderr{name}"]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        gc.freeze()  # the garbage of earlier tests may hold threads, for whose end a fork would wait for ever
        try:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            # A test before may have asked for a GPU, which torch holds against forked children that never use one.
            setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # noqa: B010
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = function()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # in any case, or the child would go on with the tests
    return child


def finish(child: int, cwd: Path, name: str = "") -> Result:
    """Wait for a child that was started."""
    _, status = os.waitpid(child, 0)
    output = ((cwd / f".{stream}{name}").read_text() for stream in ("stdout", "stderr"))
    return Result(os.waitstatus_to_exitcode(status), *output)


def forked(function: Callable[[], int], cwd: Path) -> Result:
    """Run a function in a forked child."""
    return finish(start(function, cwd), cwd)


@cache
def prepare() -> None:
    """Import here what a command imports, and let jsonargparse read the classes' sources: each child would do it."""
    from vitlit.cli.arguments import CommandLine
    from vitlit.cli.fit import CLI

    for name in ("attrs", "fsspec.implementations.chained", "torch.utils.serialization.config", "wandb"):
        with suppress(ModuleNotFoundError):  # the second, in an old fsspec
            import_module(name)
    with redirect_stdout(StringIO()), suppress(SystemExit):
        CLI(CommandLine("fit", [*SMALL, "--print_config"]))


def launched(
    ranks: int,
    *arguments: object,
    cwd: Path,
    before: Callable[[], object] = lambda: None,
    meanwhile: Callable[[list[int]], object] = lambda children: None,
) -> list[Result]:
    """`vitlit ARGUMENTS` as torchrun launches it, on so many processes, of which a dead one ends the others.

    `before` is called in each, and `meanwhile` here, with their process ids. Of one rank, it is the command alone.
    """
    from vitlit.cli.main import main

    prepare()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank: int) -> int:
        if ranks > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            numbers |= {"GROUP_RANK": 0, "MASTER_PORT": store.port, "TORCHELASTIC_RESTART_COUNT": 0}
            words = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
            os.environ.update({name: str(value) for name, value in (numbers | words).items()})
        os.setpgid(0, 0)
        before()
        devices = (
            ["--trainer.devices", ranks, "--trainer.accelerator", "cpu"] if ranks > 1 and arguments[0] == "fit" else []
        )
        return main([str(argument) for argument in (*arguments, *devices)])

    names = [str(rank) for rank in range(ranks)]
    children = [start(partial(run, rank), cwd, name) for rank, name in enumerate(names)]
    meanwhile(children)
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < ranks:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                # As torchrun does, which lets others end by themselves for a while where they can.
                deadline = time.monotonic() + (0 if codes[child] < 0 else 30) if codes[child] else deadline
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    files = [[(cwd / f".{stream}{name}").read_text() for stream in ("stdout", "stderr")] for name in names]
    return [Result(codes[child], *output) for child, output in zip(children, files, strict=True)]


def command(*arguments: object, cwd: Path, before: Callable[[], object] = lambda: None) -> Result:
    """`vitlit ARGUMENTS` in a child and a folder, where `before` may change the code or the environment."""
    from vitlit.cli.main import main

    def run() -> int:
        before()
        return main([str(argument) for argument in arguments])

    prepare()
    return forked(run, cwd)


@pytest.fixture
def vitlit(tmp_path: Path) -> Callable[..., Result]:
    """`vitlit ARGUMENTS` in a child and a folder of its own."""
    return partial(command, cwd=tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a training are computed, but their files empty: to draw one takes as long as an epoch."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("vitlit.callbacks.pictures.draw", lambda *_: Figure((1, 1)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real handwritten digits as an image folder, 1,438 for training and 359 for validation."""
    from vitlit.prepare import sources

    root = tmp_path_factory.mktemp("data") / "digits"
    sources.write("digits", root)
    return root


@pytest.fixture(scope="session")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the digits: 40 training images in 4 classes, 11 validation images, one class of them with 2."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, counts in (("train", (10, 10, 10, 10)), ("val", (3, 3, 3, 2))):
        for label, count in enumerate(counts):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for image in sorted((digits / split / str(label)).iterdir())[:count]:
                (folder / image.name).write_bytes(image.read_bytes())
    return root


@pytest.fixture(scope="session")
def trained(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/pretrain` is complete. A test reads it, or copies it first."""
    folder = tmp_path_factory.mktemp("trained")
    result = command("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1, cwd=folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A folder of one's own in which runs/pretrain is complete."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of the run that SMALL makes."""
    return tmp_path / "runs" / "pretrain"


@pytest.fixture
def finished(trained: Path, run: Path) -> Path:
    """The folder of a run that is complete."""
    shutil.copytree(trained / "runs", run.parent)
    return run


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two real photographs, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="session")
def photo(photos: list[Image.Image]) -> Image.Image:
    return photos[0].resize((161, 107))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Class folders of 20, 10, 5, 2 and 1 images in the root itself."""
    root = tmp_path / "tree"
    for name, count in (("a", 20), ("b", 10), ("c", 5), ("d", 2), ("e", 1)):
        paint(*(root / name / f"{i:02d}.png" for i in range(count)))
    return root


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a web server of a folder, which ends with the test."""
    from shard_files import Server

    servers: list[Server] = []

    def start(folder: Path, mode: str = "parts") -> Server:
        servers.append(Server(folder, tmp_path / f"requests{len(servers)}.log", mode))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def packed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits of `few` in four shards, three of them of train."""
    from shard_files import _of_folder

    from vitlit.prepare.shard import write

    out = tmp_path_factory.mktemp("packed") / "shards"
    write(_of_folder(few), out, 30_000)
    return out


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards to damage."""
    return Path(shutil.copytree(packed, tmp_path / "own"))

"""Weight files that were damaged: each loads what it says, or ends in one line."""

import json
import os
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitlit
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.checkpoint import open_checkpoint

SHAPE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 192, "depth": 2, "heads": 3, "mlp_dim": 64}
Named = dict[str, Tensor]


def network(**options: Any) -> ViT:
    torch.manual_seed(0)
    vit = ViT(**SHAPE, num_classes=3, **options).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return vit


def facebook(vit: ViT, path: Path) -> None:
    """A DINOv2 file: facebookresearch's names for what timm has too."""
    vit.set_head("finetune", 0)
    state = {"mask_token": torch.zeros(1, vit.width), **vit.state_dict()}
    torch.save(state, path)


def written(format: str, file: str, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / file
        if format == "facebook":
            facebook(network(**options), path)
            return path
        return vitlit.save_weights(network(**options), path, format)  # type: ignore[arg-type]

    return write


FORMATS: dict[str, Callable[[Path], Path]] = {
    "vitlit.ckpt": written("vitlit", "a.ckpt"),
    "vitlit.safetensors": written("vitlit", "a.safetensors"),
    "timm.safetensors": written("timm", "a.safetensors"),
    "timm.pth": written("timm", "a.pth"),
    "hf": written("hf", "folder"),
    "torchvision": written("torchvision", "a.pth"),
    "google.npz": written("google", "a.npz", mlp="gelu_tanh"),
    "facebook": written("facebook", "a.pth", layer_scale=1e-5),
}


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of each format."""
    return FORMATS[request.param](tmp_path_factory.mktemp("whole"))


def read_tensors(path: Path) -> tuple[Named, Callable[[Named], None]]:
    """A file's tensors, and what writes others in their place, with everything else as it was."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return load_file(path), lambda tensors: save_file(tensors, path, metadata)
    if path.suffix == ".npz":
        arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        return arrays, lambda tensors: np.savez(path, **{n: t.numpy() for n, t in tensors.items()})
    content = torch.load(path, weights_only=True)
    if "state_dict" in content:
        return content["state_dict"], lambda tensors: torch.save({**content, "state_dict": tensors}, path)
    return content, lambda tensors: torch.save(tensors, path)


def flip(path: Path, draw: random.Random) -> int:
    """Flip one to three bytes anywhere; how many."""
    data = bytearray(path.read_bytes())
    count = draw.randint(1, 3)
    for _ in range(count):
        # Half of them where the structure is: at the beginning or the end.
        place = draw.choice([draw.randrange(len(data)), draw.randrange(600), len(data) - 1 - draw.randrange(2000)])
        data[place] ^= draw.randint(1, 255)
    path.write_bytes(data)
    return count


def cut(path: Path, draw: random.Random) -> int:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])
    return 0


def mutate(change: Callable[[Named, str, random.Random], None]) -> Callable[[Path, random.Random], int]:
    """A change of one tensor, drawn among those that a ViT needs."""

    def mutation(path: Path, draw: random.Random) -> int:
        tensors, write = read_tensors(path)
        name = draw.choice(sorted(name for name in tensors if "mask_token" not in name))
        change(tensors, name, draw)
        write(tensors)
        return 0

    return mutation


def rename(tensors: Named, name: str, draw: random.Random) -> None:
    place = draw.randrange(len(name))
    tensors[name[:place] + draw.choice("xyz9._") + name[place + 1 :]] = tensors.pop(name)


def drop(tensors: Named, name: str, draw: random.Random) -> None:
    del tensors[name]


def reshape(tensors: Named, name: str, draw: random.Random) -> None:
    tensor = tensors[name]
    others = [tensor.unsqueeze(0), torch.cat([tensor, tensor]), tensor[..., :-1].contiguous()]
    tensors[name] = draw.choice(others)


def poison(tensors: Named, name: str, draw: random.Random) -> None:
    tensor = tensors[name] = tensors[name].clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])


def whole_numbers(tensors: Named, name: str, draw: random.Random) -> None:
    tensors[name] = tensors[name].to(torch.int32)


MUTATIONS: list[Callable[[Path, random.Random], int]] = [
    flip,
    flip,
    cut,
    *map(mutate, (rename, drop, reshape, poison, whole_numbers)),
]


def check(whole: Path, mutation: Callable[[Path, random.Random], int], draw: random.Random, folder: Path) -> None:
    """The mutated file loads as what it says, or is refused in one line; the ViT it was for stays as it was."""
    for old in folder.iterdir():
        old.unlink()
    for file in whole.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / whole.name
    right = vitlit.load(whole)
    flips = mutation(path, draw)
    target = ViT(**right.config.plain())
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for load in (vitlit.load, lambda path: vitlit.load_weights(target, path)):
        try:
            load(path)
            line = None
        except UserError as error:
            line = str(error)
        if line is not None:
            assert "\n" not in line
            assert str(folder) in line
        else:
            loaded = vitlit.load(path)
            assert loaded.config == right.config
            changed = sum(int((a != b).sum()) for a, b in pairs(loaded, right))
            assert changed <= flips, "a wrong load"
            before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def pairs(one: ViT, other: ViT) -> list[tuple[Tensor, Tensor]]:
    named = other.state_dict()
    return [(tensor, named[name]) for name, tensor in one.state_dict().items()]


def test_damaged_files_are_refused_or_right(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for i in range(24):
        check(whole, MUTATIONS[i % len(MUTATIONS)], draw, tmp_path)


@pytest.mark.long
def test_many_damaged_files_are_refused_or_right(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    for i in range(300):
        check(whole, MUTATIONS[i % len(MUTATIONS)], draw, tmp_path)


class Harmful:
    """What a pickle would run when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_in_a_line_and_not_run(wrapped: bool, legacy: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    content: Any = {**network().state_dict(), "extra": Harmful(marker)}
    torch.save({"model": content} if wrapped else content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"evil\.pth .* it wants to run \w+\.system, and nothing in a file is run"):
        vitlit.load(path)
    assert not marker.exists()


def test_a_malicious_npz_is_refused_in_a_line_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.npz"
    np.savez(path, **{"embedding/kernel": np.array([Harmful(marker)], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evil\.npz .* numpy refuses it"):
        vitlit.load(path)
    assert not marker.exists()


def unloadable(path: Path, words: str) -> None:
    """Loading fails in one line that names the file, and has taken little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(path) in user_error(words, vitlit.load, path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 << 20


def test_a_malicious_checkpoint_is_not_run_where_a_run_is_continued(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "last.ckpt"
    torch.save({"vitlit": {}, "callbacks": Harmful(marker)}, path)
    with pytest.raises(UserError, match=r"last\.ckpt is not a checkpoint, or a damaged one"):
        open_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["pt", "npz"])
def test_a_zip_bomb_is_refused_unpacked(ending: str, tmp_path: Path) -> None:
    whole, path = FORMATS["vitlit.ckpt"](tmp_path), tmp_path / f"bomb.{ending}"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for member in old.infolist() if ending == "pt" else ():
            new.writestr(member.filename, old.read(member))
        with new.open("a/data/99" if ending == "pt" else "embedding/kernel.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (200 << 20,)})
            for _ in range(200):
                file.write(bytes(1 << 20))
    unloadable(path, r"2\d\d,.* bytes packed into .*, unlike any weights")


def test_packed_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    whole, path = FORMATS["vitlit.ckpt"](tmp_path), tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    unloadable(path, r"data\.pkl in it is compressed, which torch\.save never does")


def test_an_npz_of_fewer_numbers_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lies.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("embedding/kernel.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
    unloadable(path, "numpy refuses it")


def tensor(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": tensor(0, 4, [1])}, 2**60),
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, None),  # they overlap
        ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, None),
        ({"a": tensor(0, 12, [2**32, 2**32])}, None),
        ({"a": tensor(0, 4 * 10**12, [10**12])}, None),
    ],
)
def test_safetensors_whose_header_lies_is_refused(header: dict[str, Any], size: int | None, tmp_path: Path) -> None:
    text, path = json.dumps(header).encode(), tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", size or len(text)) + text + bytes(12))
    unloadable(path, "safetensors refuses it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 3}, "is not a whole ViT: blocks.2.norm1.weight .* is missing from the file"),
        ({"depth": "2"}, "of no ViT that this version builds"),
        ({"mlp_dim": 10**30}, "of no ViT that this version builds"),
        ({"image_size": "large"}, "of no ViT that this version builds"),
        ({"heads": 0}, "of no ViT that this version builds: ViT: heads is 0; give at least 1"),
        ({"mlp": "os.system"}, "of no ViT that this version builds"),
    ],
)
def test_a_config_that_asks_for_the_impossible_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    vit, path = network(position="sincos2d"), tmp_path / "a.ckpt"
    about = {"vit": {**vit.config.plain(), **change}, "classes": [], "preprocess": {}}
    torch.save({"vitlit": about, "state_dict": {f"vit.{n}": t for n, t in vit.state_dict().items()}}, path)
    unloadable(path, words)


def test_an_index_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    unloadable(tmp_path / "model.safetensors.index.json", "is not JSON")

"""The one door for weights: any known file into a ViT."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.model.init import fill_positions
from vitlit.weights import checkpoint, facebook, google, hf, hub, timm, torchvision
from vitlit.weights.adapt import adapt, set_numerics
from vitlit.weights.files import locate, open_file
from vitlit.weights.weights import Weights, usual_heads

MOST_PATCHES = 1 << 18  # of an image: sin-cos tables are in no file, so that its image_size alone could ask for any
READERS = (checkpoint.read, google.read, hf.read, torchvision.read, facebook.read, timm.read)


class LoadReport(NamedTuple):
    """What `load_weights` did, by tensor names.

    Attributes:
        matched: taken over as they are.
        resampled: taken over at another resolution, for other channels, or with the class position folded.
        new: in the ViT alone and skipped: left as they were.
        skipped: in the file alone and skipped, or skipped in both.
        unexpected: in the file and known to be no part of a ViT (mask token, decoder).
        format: whose file it is.
        settings: what was set on the ViT since the file was made with it, such as norm_eps.
        origins: where what the tensors do not tell comes from, by setting.
    """

    matched: list[str]
    resampled: list[str]
    new: list[str]
    skipped: list[str]
    unexpected: list[str]
    format: str
    settings: list[str]
    origins: dict[str, str]

    def __str__(self) -> str:
        counts = [f"{len(names)} {kind}" for kind, names in zip(self._fields[:5], self[:5], strict=True) if names]
        rest = [f"set {setting}" for setting in self.settings]
        rest += [f"{name}: {origin}" for name, origin in self.origins.items()]
        whose = [] if self.format == "vitlit" else [self.format]
        return "; ".join([*whose, ", ".join(counts), *rest])


def read(source: str | Path) -> Weights:
    """The weights of a run's or model's folder, a file of any known format, or hf:OWNER/NAME[@REVISION].

    Raises:
        UserError: there is no such file, or it is damaged or of no known format.
    """
    path = hub.fetch(str(source)) if str(source).startswith("hf:") else locate(source)
    contents = open_file(path)
    for reader in READERS:
        try:
            weights = reader(contents)
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            whose = reader.__module__.rsplit(".", 1)[-1]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{path} looks like a file of {whose}, but is not whole ({why})") from error
        if weights is not None:
            break
    else:
        some = ", ".join(list(contents.tensors)[:3]) or "no tensor"
        raise UserError(f"{path} is a checkpoint of no format that vitlit knows; it holds {some}")
    used = [name for name in contents.tensors if name not in weights.unused]
    hollow = next((n for n in used if contents.tensors[n].layout != torch.strided or contents.tensors[n].is_meta), None)
    if hollow is not None:
        raise UserError(f"{path} holds {hollow} without its numbers, or sparse; a ViT has dense tensors")
    strange = next((name for name in used if not contents.tensors[name].is_floating_point()), None)
    if strange is not None and weights.format != "vitlit":
        what = str(contents.tensors[strange].dtype).removeprefix("torch.")
        raise UserError(f"{path} holds {what} numbers in {strange}; a ViT has floating-point ones")
    weights.count = len(contents.tensors)
    config = weights.config
    blocks = len({name.split(".")[1] for name in weights.state if name.startswith("blocks.")})
    if config.get("depth", blocks) != blocks:  # before so many are built
        raise UserError(f"{path} tells {config['depth']!r} blocks, but holds {blocks}")
    if "heads" not in config:
        heads = usual_heads(config)
        if heads is not None:
            config["heads"], weights.origins["heads"] = heads, "the usual of its width"
    if config.get("position", "learned") == "learned" and "image_size" not in weights.told:
        weights.origins["image_size"] = "a square grid, since the file does not tell"
    return weights


def load_weights(vit: ViT, path: str | Path | Weights, skip: str | Sequence[str] = ()) -> LoadReport:
    """Load weights into a ViT. Whatever is not allowed by `skip` must match.

    What may differ: the image size (2010.11929, section 3.2), the number of channels, and whether the class token has
    a position. A ViT without a head takes none. What the weights were made with and no tensor shows (epsilon of the
    norms, kind of GELU, convention of resampling) is set on the ViT.

    Args:
        vit: changed in place, unless an error is raised.
        path: a run folder, a file of any known format, or hf:OWNER/NAME[@REVISION]; or what `read` gave.
        skip: shell patterns of tensor names that are left alone, one or several, such as `head*`.

    Raises:
        UserError: the file cannot be read, or a tensor is missing, unexpected, of another shape or not finite; the
            first is named with both shapes.
    """
    weights = path if isinstance(path, Weights) else read(path)
    own = vit.state_dict()
    globs = ["mask_token", *([skip] if isinstance(skip, str) else skip)]
    if not vit.config.num_classes:
        globs.append("head*")
    skipped = {name for name in own.keys() | weights.state if any(fnmatchcase(name, glob) for glob in globs)}
    state = dict(weights.state)
    adapted = adapt(state, weights, vit, skipped)
    state = {name: tensor for name, tensor in state.items() if name not in skipped}
    problems = differences(own, state, weights, vit, skipped)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        head = all(
            problem.removeprefix("the model has no ").startswith(("head.", "head_dist.")) for problem in problems
        )
        hint = "; skip=['head*'] leaves the head alone" if head else ""
        raise UserError(f"{weights.path} does not fit the model: {problems[0]}{more}{hint}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            what = "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{weights.path} holds {what} in {name} {list(tensor.shape)}")

    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    fill_positions(vit)
    return LoadReport(
        matched=[name for name in state if name not in adapted],
        resampled=[name for name in adapted if name not in skipped],
        new=sorted(skipped & own.keys() - weights.state.keys()),
        skipped=sorted(skipped & weights.state.keys()),
        unexpected=weights.unused,
        format=weights.format,
        settings=set_numerics(vit, weights.config),
        origins=weights.origins,
    )


def differences(
    own: dict[str, Tensor], state: dict[str, Tensor], weights: Weights, vit: ViT, skipped: set[str]
) -> list[str]:
    """What keeps a file's tensors from going into a ViT, in words."""
    wanted = own.keys() - skipped
    problems = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and name in wanted and state[name].shape != own[name].shape
    ]
    problems += [
        f"{name} {list(own[name].shape)} is missing from the file" for name in own if name in wanted - state.keys()
    ]
    problems += [f"the model has no {name} {list(tensor.shape)}" for name, tensor in state.items() if name not in own]
    for name in ("heads", "pool"):
        theirs, ours = weights.config.get(name), getattr(vit.config, name)
        matters = name == "heads" or "head.weight" in state or "head.out.weight" in state  # a new head takes any pool
        if not problems and matters and name in weights.told and theirs != ours:
            problems.append(f"{name} is {theirs} in the file and {ours} in the model")
    return problems


def load(source: str | Path) -> ViT:
    """The ViT of a run (its best checkpoint), of a file of any known format or of hf:OWNER/NAME, in evaluation mode.

    `vit.classes` are the class names in the order of the logits; `vit.preprocess(paths)` makes its input.

        vit = vitlit.load("runs/finetune")
        probabilities = vit(vit.preprocess(["a.png", "b.png"])).softmax(-1)
        names = [vit.classes[i] for i in probabilities.argmax(-1)]

    Raises:
        UserError: there is no such run or file, it cannot be read, or it does not tell the whole architecture.
    """
    weights = read(source)
    vit = empty(weights)
    vit.to_empty(device="cpu")
    load_weights(vit, weights)
    vit.classes = weights.classes
    known = preprocess(weights)
    vit.preprocess = Preprocess(**known) if known else None
    return vit.eval()


def empty(weights: Weights) -> ViT:
    """The ViT for these weights on the meta device, since every value comes from the file.

    Raises:
        UserError: they are not the tensors of any ViT.
    """
    config = network(weights)
    try:
        with torch.device("meta"):
            vit = ViT(**config)
    except (TypeError, ValueError, RuntimeError) as error:  # over whatever a file may say in place of a number
        why = str(error).partition("\n")[0]
        raise UserError(f"{weights.path} is of no ViT that this version builds: {why}") from error
    if math.prod(vit.grid) > MOST_PATCHES:
        raise UserError(f"{weights.path} is of no ViT: its images have {math.prod(vit.grid):,} patches")
    problems = differences(vit.state_dict(), weights.state, weights, vit, set())
    if problems:
        raise UserError(f"{weights.path} is no whole ViT: {problems[0]}")
    return vit


def network(weights: Weights, **changes: Any) -> dict[str, Any]:
    """The arguments of a ViT for these weights, some of them changed; UserError where not all of them are known."""
    config = {**weights.config, **changes}
    if "heads" not in config:
        raise UserError(
            f"{weights.path} does not tell how many heads a ViT of width {config['width']} has; build it, and "
            "vitlit.load_weights(vit, path) fills it"
        )
    if config.get("image_size") is None:
        if "pos_embed" in weights.state:
            shape = list(weights.state["pos_embed"].shape)
            raise UserError(
                f"{weights.path}: pos_embed {shape} is of no square grid; build the ViT with its image_size, and "
                "vitlit.load_weights(vit, path) fills it"
            )
        config["image_size"] = 224 // config["patch_size"] * config["patch_size"] or config["patch_size"]
    return config


def preprocess(weights: Weights) -> dict[str, Any]:
    """The arguments of `Preprocess` for these weights at their own resolution, empty where nothing is known."""
    channels, known = weights.config.get("in_channels", 3), dict(weights.preprocess)
    for name in ("mean", "std"):
        if channels == 1 and len(known.get(name, ())) > 1:
            known[name] = [sum(known[name]) / len(known[name])]
    if len(known.get("mean", ())) != channels:
        return {}
    size = network(weights)["image_size"]
    known["image_size"] = known.get("image_size") or ([size, size] if isinstance(size, int) else size)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}

"""Read weights of any known format into a ViT."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlit.errors import UserError, check_range
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT, ViTConfig
from vitlit.model.init import fill_positions
from vitlit.weights import checkpoint, facebook, google, hf, timm, torchvision
from vitlit.weights.adapt import adapt, set_numerics
from vitlit.weights.averaged import Choice
from vitlit.weights.files import locate, open_file, skips
from vitlit.weights.names import how_to_skip
from vitlit.weights.weights import ASSUMED, NOT_SAID, Weights, in_words, usual_heads

READERS = (checkpoint.read, google.read, hf.read, torchvision.read, facebook.read, timm.read)
BUILD = "build the ViT with its image_size and heads, and call load_weights"


class LoadReport(NamedTuple):
    """What `load_weights` did with each tensor, by name, and what it set on the ViT."""

    matched: list[str]  # loaded unchanged
    resampled: list[str]  # loaded after a change of resolution, channels or class position
    new: list[str]  # skipped, and only the ViT has them; they stay as they were
    skipped: list[str]  # skipped, and the file has them
    unexpected: list[str]  # in the file, but not part of a ViT, such as a decoder
    format: str  # of the file
    settings: list[str]  # what was set on the ViT because the weights were made with it, such as norm_eps
    origins: dict[str, str]  # where settings that no tensor shows come from, by name

    def __str__(self) -> str:
        counts = [f"{len(names)} {kind}" for kind, names in zip(self._fields[:5], self[:5], strict=True) if names]
        rest = [f"set {setting}" for setting in self.settings]
        assumed, known = in_words(self.origins)
        rest += [f"{', '.join(names)}: {origin}" for origin, names in known.items()]
        format = [] if self.format == "vitlit" else [self.format + assumed]
        return "; ".join([*format, ", ".join(counts), *rest])


def read(source: str | Path, weights: Choice = "averaged", skip: str | Sequence[str] = ()) -> Weights:
    """The weights of a run's or model's folder, of a file of any known format or of hf:OWNER/NAME[@REVISION]."""
    path = locate(source)
    contents, found = open_file(path, weights, [skip] if isinstance(skip, str) else skip), None
    for reader in READERS:
        try:
            found = reader(contents)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            format, why = reader.__module__.rsplit(".", 1)[-1], " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{path} looks like a file of {format}, but is not whole ({why})") from error
        if found is not None:
            break
    else:
        some = ", ".join(list(contents.tensors)[:3]) or "no tensor"
        raise UserError(f"{path} is in no checkpoint format that vitlit knows; it holds {some}")
    found.skipped = [name for name in found.state if skips(contents.skip, name)]
    found.state = {name: tensor for name, tensor in found.state.items() if name not in found.skipped}
    config, used = found.config, found.state
    if found.skipped and not any(name.startswith("head.") for name in found.state):
        config |= {"num_classes": 0, "hidden_dim": None}
        found.classes, found.temperature, found.activation = [], 1.0, "softmax"
    if found.format != "vitlit":  # before `fuse` makes float32 of a layer with one part of integers
        left = [*found.unused, *(f"*{pattern}" for pattern in contents.skip)]
        used = {name: tensor for name, tensor in contents.tensors.items() if not skips(left, name)}
    for name, tensor in used.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path} holds {tensor.dtype} in {name}, unlike a ViT; {how_to_skip(name, used)}")
    if "heads" not in config and (heads := usual_heads(config)) is not None:
        config["heads"], found.origins["heads"] = heads, f"{heads} (usual for its width); {NOT_SAID}"
    if config.get("position", "learned") == "learned" and "image_size" not in found.stated:
        found.origins["image_size"] = f"a square grid; {NOT_SAID}"
    if contents.origin:
        found.origins["weights"] = contents.origin
    return found


def load_weights(
    vit: ViT, path: str | Path | Weights, skip: str | Sequence[str] = (), weights: Choice = "averaged"
) -> LoadReport:
    """Load weights into a ViT. Every tensor must match, except those that `skip` names.

    The image size (2010.11929, section 3.2), the number of channels and the class token's position may differ. A ViT
    without a head ignores the file's. Settings of the weights that no tensor shows (epsilon of the norms, kind of GELU,
    resampling) are set on the ViT, except that a guess does not replace what is not ViTConfig's default. UserError if
    the file cannot be read, or the named tensor is missing, unexpected, not finite or of another shape.

    Args:
        vit: changed in place, or unchanged if an error is raised.
        path: the folder of a run, a file of any known format, hf:OWNER/NAME[@REVISION], or the result of `read`.
        skip: shell patterns of tensor names to leave alone, one or several, such as `head*`: names of the ViT or, for
            what is beside it, of the file.
        weights: averaged or raw, for a file with both, as `load` has it; `read` has chosen already.
    """
    found = path if isinstance(path, Weights) else read(path, weights, skip)
    own = vit.state_dict()
    globs = ["mask_token", *([skip] if isinstance(skip, str) else skip), *([] if vit.config.num_classes else ["head*"])]
    skipped = {name for name in (*own, *found.state, *found.skipped) if skips(globs, name)}
    # What the file does not state does not replace what a user gives.
    given = {name for name in ASSUMED if getattr(vit.config, name) != getattr(ViTConfig, name)} - found.stated
    found = replace(found, config={name: value for name, value in found.config.items() if name not in given})
    state = dict(found.state)
    adapt(state, found, vit, skipped)
    adapted = {name for name in state.keys() | found.state if state.get(name) is not found.state.get(name)}
    state = {name: tensor for name, tensor in state.items() if name not in skipped}
    wanted = {name: tensor for name, tensor in own.items() if name not in skipped}
    problems = differences(vit, wanted, state, found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        head = all(name.startswith(("head.", "head_dist.")) for name in problems)
        hint = "; skip=['head*'] leaves the head alone" if head else ""
        raise UserError(f"{found.path} does not fit the model: {next(iter(problems.values()))}{more}{hint}")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{found.path} holds NaN or infinity in {name} {list(tensor.shape)}")

    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    fill_positions(vit)
    origins = dict(found.origins)
    if "image_size" in origins and vit.grid[0] != vit.grid[1] and "pos_embed" in state and "pos_embed" not in adapted:
        origins["image_size"] = "the model's grid of {} x {}; ".format(*vit.grid) + NOT_SAID
    return LoadReport(
        matched=[name for name in state if name not in adapted],
        resampled=sorted(adapted - skipped),
        new=sorted(skipped & own.keys() - {*found.state, *found.skipped}),
        skipped=sorted(skipped & {*found.state, *found.skipped}),
        unexpected=found.unused,
        format=found.format,
        settings=set_numerics(vit, found.config),
        origins=origins,
    )


def differences(vit: ViT, own: Mapping[str, Tensor], state: Mapping[str, Tensor], weights: Weights) -> dict[str, str]:
    """Why the tensors of a file do not fit those of a ViT, by the name of a tensor or an option."""
    problems = {}
    for name in {**own, **state}:
        ours, theirs = (list(tensors[name].shape) if name in tensors else None for tensors in (own, state))
        if theirs is None:
            problems[name] = f"{name} {ours} is missing from the file"
        elif ours is None:
            problems[name] = f"the model has no {name} {theirs}; {how_to_skip(name, own)}"
        elif ours != theirs:
            problems[name] = f"{name} is {theirs} in the file and {ours} in the model"
    if problems:
        return problems
    headed = "head.weight" in state or "head.out.weight" in state  # a new head takes any pool
    for name in ("heads", "pool") if headed else ("heads",):
        theirs, ours = weights.config.get(name), getattr(vit.config, name)
        if name in weights.stated and theirs != ours:
            problems[name] = f"{name} is {theirs} in the file and {ours} in the model"
    return problems


def load(source: str | Path, weights: Choice = "averaged", skip: str | Sequence[str] = ()) -> ViT:
    """The ViT of a run (its best checkpoint), of a file of any known format or of hf:OWNER/NAME, in evaluation mode.

    `vit.classes` are the class names in the order of the logits, and `vit(vit.preprocess(paths))` the logits of images,
    to be divided by `vit.temperature` (1 unless one was fitted) before `vit.activation`, softmax or sigmoid.

    `weights` are the averaged ones (an EMA, a teacher) or the raw ones, where the file has both; `skip` has shell
    patterns, one or several, of the names of tensors to leave out: those that are not the ViT's, or `head*`. UserError
    if there is no such run or file, it cannot be read, or it does not show the whole architecture.
    """
    found = read(source, weights, skip)
    vit = empty(found)
    vit.to_empty(device="cpu")
    load_weights(vit, found)
    vit.classes, vit.preprocess = found.classes, preprocess(found.preprocess, vit)
    vit.temperature, vit.activation = found.temperature, found.activation
    return vit.eval()


def load_prepared(source: str | Path, image_size: int | None = None) -> Any:
    """`load`, whose `preprocess` is for images of its own size or another; UserError if the weights do not tell it."""
    check_range("vitlit", 1, image_size=image_size)
    vit: Any = load(source)
    if vit.preprocess is None:
        raise UserError(f"{source} does not say how to preprocess images; set vit.preprocess, and save_weights")
    if image_size is not None:
        vit.preprocess = replace(vit.preprocess, image_size=(image_size, image_size))
    return vit


def empty(weights: Weights) -> ViT:
    """The ViT for these weights on the meta device; UserError if they are not the tensors of any ViT."""
    config = network(weights)
    try:
        with torch.device("meta"):
            vit = ViT(**config)
    except (TypeError, ValueError, RuntimeError) as error:  # a file may state anything instead of a number
        why = str(error).partition("\n")[0]
        raise UserError(f"{weights.path} is of no ViT that this version builds: {why}") from error
    problems = differences(vit, vit.state_dict(), weights.state, weights)
    if problems:
        raise UserError(f"{weights.path} is not a whole ViT: {next(iter(problems.values()))}")
    return vit


def network(weights: Weights, **changes: Any) -> dict[str, Any]:
    """The options of a ViT for these weights, with changes; UserError if not all of them are known."""
    config, patch = {**weights.config, **changes}, weights.config["patch_size"]
    if "heads" not in config:
        raise UserError(f"{weights.path} does not show how many heads a ViT of width {config['width']} has; {BUILD}")
    if config.get("image_size") is None:
        if "pos_embed" in weights.state:
            shape = list(weights.state["pos_embed"].shape)
            raise UserError(f"{weights.path}: pos_embed {shape} is not a square grid; {BUILD}")
        config["image_size"] = 224 // patch * patch or patch
    return config


def preprocess(made_with: Mapping[str, Any], vit: ViT) -> Preprocess | None:
    """The preprocessing that weights were made with, for a ViT's channels and by default its size; None if unknown."""
    known, channels = {"image_size": vit.config.sides, **made_with}, vit.config.in_channels
    for name in () if known.get("range") else ("mean", "std"):
        if len(known.get(name) or ()) not in (0, channels):
            known[name] = [sum(known[name]) / len(known[name])] * channels
    if not known.get("mean") or len(known["mean"]) != channels or not (channels in (1, 3) or known.get("range")):
        return None
    options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
    return Preprocess(**options)

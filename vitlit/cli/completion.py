"""What a config leaves out since it follows from the data or the weights: filled in, and contradictions refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.splits import Splits
from vitlit.errors import UserError
from vitlit.model import Size, ViT, ViTConfig
from vitlit.run.folder import flatten
from vitlit.stages.finetune import TRAINING
from vitlit.weights import Weights, network, read
from vitlit.weights.checkpoint import open_checkpoint


def starting_weights(config: Namespace, fitting: bool) -> Weights | None:
    """The weights that a command begins with: a checkpoint's of its own stage, else those of model.init_from.

    Args:
        config: the command's.
        fitting: whether training goes on from the checkpoint, for which it needs the optimizer's state.

    Raises:
        UserError: the checkpoint is another stage's, or a finetuning has no weights to start from.
    """
    arguments = config.model.init_args
    if config.ckpt_path:
        path = Path(config.ckpt_path)
        checkpoint = open_checkpoint(path)
        made_by = checkpoint.get("hyper_parameters", {}).get("_class_path", "").rsplit(".", 1)[-1]
        wanted = config.model.class_path.rsplit(".", 1)[-1]
        if made_by != wanted:
            remedy = "give --model.init_from to start from its weights" if wanted == "Finetune" else "give another"
            raise UserError(f"{path} holds a {made_by}, but the config asks for a {wanted}; {remedy}")
        if fitting and "optimizer_states" not in checkpoint:
            raise UserError(f"{path} holds weights alone; continue from last.ckpt, or start from it (model.init_from)")
        if fitting:
            check_settings(config.model.init_args, checkpoint["hyper_parameters"], path)
        return read(path)
    if "init_from" not in arguments:
        return None
    if arguments.init_from is None:
        raise UserError("finetuning starts from weights: give --model.init_from a run folder or a checkpoint file")
    return read(arguments.init_from)


def check_settings(arguments: Namespace, before: dict[str, Any], path: Path) -> None:
    """Refuse to continue with other settings than those of a checkpoint's optimizer state, which would win."""
    now, then = flatten(plain(arguments.as_dict())), flatten(plain(before))
    differing = []
    for key in sorted(now.keys() | then.keys()):
        part = key.split(".")[0]
        if part not in before or part not in ("lora", "freeze", "last_blocks", "groups", "optimizer", "schedule"):
            continue
        if part == "schedule" and key != "schedule.lr_per":  # the rest of it is not in the state: the config wins
            continue
        if part == "optimizer" and not (key in now and key in then):  # in Python only some are given
            continue
        values = [side.get(key) for side in (then, now)]
        if key.endswith(".class_path"):  # torch.optim.AdamW is torch.optim.adamw.AdamW
            values = [str(value).rsplit(".", 1)[-1] for value in values]
        if values[0] != values[1]:
            differing.append(f"model.{key.replace('.init_args', '')} {values[0]} -> {values[1]}")
    if differing:
        raise UserError(
            f"{path} was trained with other settings ({', '.join(differing)}), which its optimizer state has and which "
            "would win; leave them as they were, or start from its weights (model.init_from)"
        )


def plain(value: Any) -> Any:
    """A value with its tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def complete(config: Namespace, weights: Weights | None, splits: Splits) -> list[str]:
    """Fill in preprocessing, seed, architecture and the number of classes.

    Args:
        config: the command's.
        weights: that it begins with.
        splits: of the config's data.

    Returns:
        The class names of the checkpoint, none where the head is new.

    Raises:
        UserError: a value that is given contradicts the data or the weights.
    """
    model, data = config.model.init_args, config.data
    new = not config.ckpt_path
    classes = weights.classes if weights is not None and config.ckpt_path else []
    if data.seed is None:
        data.seed = int(config.seed_everything)
    complete_vit(model, data.image_size, weights, new)
    complete_preprocess(data, weights, model.vit.init_args.get("in_channels", 3), new)
    for part in (model.objective, model.optimizer):
        if "init_args" not in part:  # a class without arguments
            part.init_args = Namespace()
    objective = model.objective.init_args
    if classes:  # what they were made from need not be there any more
        made_with = open_checkpoint(Path(config.ckpt_path))["hyper_parameters"]["objective"]
        count, several = len(classes), made_with.get("init_args", {}).get("multi_label", False)
    else:
        found, several = splits.labels()
        count = len(found)
    complete_classes(model.objective, "model.objective", count)
    complete_classes(config.model, "model", count)
    if "multi_label" in objective:
        if objective.multi_label and not several:
            raise UserError("model.objective.multi_label is true, but the data has one label an image; leave it out")
        objective.multi_label = several
    return classes


def doubts(config: Namespace, source: dict[str, Any]) -> list[str]:
    """What of a config is likely a mistake, though it could be meant: a line each.

    Args:
        config: the command's, completed.
        source: the content of the file that it came from, before flags.
    """
    found = []
    batch = config.data.batch_size
    made_for = int(given_in(source, "data.batch_size") or batch)
    before = given_in(source, "model.init_args.optimizer.init_args.lr")
    now = config.model.init_args.optimizer.init_args.get("lr")
    given = before is not None and float(before) == now  # YAML reads 1e-3 as text
    if made_for != batch and given and config.model.init_args.schedule.lr_per is None:
        found.append(
            f"data.batch_size is {batch}, but the config's learning rate {now:g} is for {made_for}; in proportion it "
            f"would be {now * batch / made_for:.3g} (--model.schedule.lr_per {made_for})"
        )
    decay = config.model.init_args.groups.layer_decay
    if config.model.init_args.get("lora") is not None and decay < 1:
        found.append(
            f"model.groups.layer_decay {decay:g} leaves LoRA's adapters near the image almost still; give "
            "--model.groups.layer_decay 1, with which 1e-3 is a learning rate to begin with"
        )
    if config.data.balanced and config.model.init_args.objective.init_args.get("class_weights"):
        found.append("data.balanced draws rare classes more often, and class_weights weigh them more besides; give one")
    return found


# The other settings of a group do nothing while these are all 0.
SWITCHES = {"mixing": (Mixing, ("mixup", "cutmix")), "erasing": (Erasing, ("prob",))}


def check_idle(data: Namespace, source: dict[str, Any]) -> None:
    """Refuse settings of what is off, unless the config file has it on: then a flag switched it off.

    `--data.mixing.prob 0.5` alone mixes nothing, though `--data.erasing.prob 0.5` erases.

    Raises:
        UserError: a setting other than the default would do nothing.
    """
    for group, (kind, switches) in SWITCHES.items():
        names = [f"data.{group}.{switch}" for switch in switches]
        if any(data[group][switch] for switch in switches) or any(given_in(source, name) for name in names):
            continue
        for key, value in data[group].as_dict().items():
            if plain(value) != plain(getattr(kind, key)):
                raise UserError(
                    f"data.{group}.{key} does nothing without {' or '.join(names)}; give it, or leave it out"
                )


def given_in(source: Any, key: str) -> Any:
    """What the content of a file has at a dotted key, None for nothing."""
    for name in key.split("."):
        source = source.get(name) if isinstance(source, dict) else None
    return source


def complete_preprocess(data: Namespace, weights: Weights | None, channels: int, new: bool) -> None:
    """Take mean, std, interpolation and crop ratio from the weights, for as many channels as the ViT has."""
    if channels not in (1, 3):
        raise UserError(f"model.vit.in_channels is {channels}, but image folders give 3 channels, or 1 (grey)")
    known = dict(weights.preprocess) if weights is not None else {}
    for name in ("mean", "std"):
        if name in known and len(known[name]) != channels:
            known[name] = (sum(known[name]) / len(known[name]),) * channels
        known.setdefault(name, (0.5,) * channels)
    for name in ("mean", "std", "interpolation", "crop_ratio"):
        made_with = tuple(known[name]) if isinstance(known.get(name), list) else known.get(name)
        given = tuple(data[name]) if isinstance(data[name], list) else data[name]
        if name in ("mean", "std") and given is not None and len(given) != channels:
            raise UserError(f"data.{name} has {len(given)} numbers, but model.vit.in_channels is {channels}")
        told = weights is not None and name in weights.preprocess and name != "crop_ratio"
        if told and given is not None and given != made_with:
            assert weights is not None
            source = f" ({weights.origins['preprocess']})" if "preprocess" in weights.origins else ""
            raise UserError(
                f"data.{name} is {given}, but {weights.path} was made with {made_with}{source}; leave it out"
            )
        data[name] = made_with if given is None else given


# What a config leaves at its default comes from the weights, but for what the data says.
SIZE = ("image_size", "num_classes", "hidden_dim")
DEFAULTS = {field.name: field.default for field in fields(ViTConfig)}
# What a config may give otherwise than the weights had it, and what a new run may besides.
FREE = {"num_classes", "hidden_dim", *TRAINING}
NEW = {"image_size", "in_channels", "class_position", "pool", "norm"}


def complete_vit(model: Namespace, image_size: Any, weights: Weights | None, new: bool) -> None:
    """Give the ViT the data's image size; compare its architecture with the weights', or take theirs."""
    size = list(image_size) if isinstance(image_size, list | tuple) else image_size
    if model.get("image_size") is not None:
        raise UserError("model.image_size follows from data.image_size; leave it out")
    if model.vit is None:
        assert weights is not None  # only Finetune may leave it out
        begins = TRAINING if new else {}
        config = network(weights, num_classes=0, hidden_dim=None, image_size=size, **begins)
        model.vit = Namespace(class_path="vitlit.model.ViT", init_args=Namespace(**config))
    vit = model.vit.init_args
    if vit.image_size not in (224, size):  # 224 is the constructor's default
        raise UserError(f"model.vit.image_size is {vit.image_size} and data.image_size {size}; give the latter alone")
    if vit.get("num_classes"):
        raise UserError("model.vit.num_classes is the head's, which follows from the data; leave it out")
    vit.image_size = size
    preset = model.vit.class_path.endswith("from_preset")
    for name, value in weights.config.items() if weights is not None and (new or "init_from" in model) else ():
        if (
            name not in (*SIZE, *TRAINING)
            and not (preset and name in Size._fields)
            and vit.get(name) in (None, DEFAULTS[name])
        ):
            vit[name] = value
    build = ViT.from_preset if preset else ViT
    with torch.device("meta"):
        built = build(**vit.as_dict()).config.plain()
    if weights is None:
        return
    free = FREE | NEW if new else FREE
    for name, value in weights.config.items():
        if name == "heads" and name not in weights.told:
            continue
        if name == "layer_scale" and None not in (value, built[name]):
            continue
        if name not in free and pair(built.get(name)) != pair(value):
            key = "data.image_size" if name == "image_size" else f"model.vit.{name}"
            raise UserError(
                f"{key} is {built.get(name)}, but {weights.path} was made with {value}; leave it out or give {value}"
            )


def pair(value: Any) -> Any:
    """An image size of either form as [height, width]; other values as they are."""
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


def complete_classes(part: Namespace, key: str, count: int) -> None:
    """Fill in num_classes of a stage or an objective, where it has such an argument."""
    given = part.init_args
    if "num_classes" not in given:
        return
    if not count:
        name = part.class_path.rsplit(".", 1)[-1]
        remedy = "sort the images into class folders, or give data.manifest"
        raise UserError(f"the data has no classes, which {name} needs; {remedy}")
    if given.num_classes not in (None, count):
        raise UserError(f"{key}.num_classes is {given.num_classes}, but the data has {count} classes; leave it out")
    given.num_classes = count

"""Fill in what follows from the data or the weights, and refuse contradictions."""

import json
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from jsonargparse import Namespace

from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.splits import Splits
from vitlit.errors import UserError
from vitlit.images.decode import FORMATS, open_picture
from vitlit.model import Size, ViT, ViTConfig
from vitlit.model.lora import LoRA
from vitlit.optim import Groups, Schedule
from vitlit.run.folder import RunFolder, flatten
from vitlit.stages.matching import no_classes
from vitlit.stages.starting import TRAINING
from vitlit.weights import Weights, network, read
from vitlit.weights.checkpoint import open_checkpoint
from vitlit.weights.weights import ASSUMED

# Settings that a checkpoint's optimizer state was made with; of the rest of the schedule it holds nothing.
STATEFUL = ("lora", "freeze", "last_blocks", "groups", "optimizer", "schedule.lr_per")


def starting_weights(config: Namespace, fitting: bool) -> Weights | None:
    """The weights to start from: of a checkpoint of the same stage, which `fitting` continues, or model.init_from."""
    if config.ckpt_path:
        path = Path(config.ckpt_path)
        checkpoint = open_checkpoint(path)
        made_by = checkpoint.get("hyper_parameters", {}).get("_class_path", "").rsplit(".", 1)[-1]
        wanted = config.model.class_path.rsplit(".", 1)[-1]
        if made_by != wanted:
            raise UserError(f"{path} holds a {made_by}, not a {wanted}; start from its weights with --model.init_from")
        if fitting and "optimizer_states" not in checkpoint:
            raise UserError(f"{path} holds only weights; continue from last.ckpt, or start from it (model.init_from)")
        if fitting:
            check_resumed_settings(config.model.init_args, checkpoint["hyper_parameters"], path)
        return read(path)
    init_from = config.model.init_args.init_from
    if init_from is None and config.model.class_path.endswith("Finetune"):
        raise UserError("finetuning starts from weights: give --model.init_from a run folder or a checkpoint file")
    return None if init_from is None else read(init_from)


def check_resumed_settings(arguments: Namespace, before: dict[str, Any], path: Path) -> None:
    """Refuse to continue with other settings than the optimizer state holds, because the state's would win."""
    kinds = {"groups": Groups, "lora": LoRA, "schedule": Schedule}
    whole = {part: {**asdict(kind()), **before[part]} for part, kind in kinds.items() if before.get(part)}
    # An older version's checkpoint lacks keys, for which today's defaults stand.
    now, then = flatten(as_lists(arguments.as_dict())), flatten(as_lists({**before, **whole}))
    differing = []
    for key in sorted(now.keys() | then.keys()):
        part = key.partition(".")[0]
        if part not in before or not key.startswith(STATEFUL):
            continue
        if part == "optimizer" and not (key in now and key in then):  # Python code may give only some
            continue
        values = [side.get(key) for side in (then, now)]
        if key.endswith(".class_path"):  # AdamW, torch.optim.AdamW and torch.optim.adamw.AdamW are one
            values = [str(value).rsplit(".", 1)[-1] for value in values]
        if values[0] != values[1]:
            differing.append(f"model.{key.replace('.init_args', '')} {values[0]} -> {values[1]}")
    if differing:
        others = f"{path} was trained with other settings ({', '.join(differing)}), and its optimizer state's would win"
        raise UserError(f"{others}; restore them, or start from its weights (model.init_from)")


def as_lists(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def fill_size(config: Namespace, source: dict[str, Any]) -> None:
    """Give a ViT that the config names the data's image size; `source` is the config file's content, before flags."""
    vit, written = config.model.init_args.get("vit"), (source.get("data") or {}).get("image_size")
    if vit is None:
        return
    given, size, written = as_lists([vit.init_args.image_size, config.data.image_size, written])
    if given not in (ViTConfig.image_size, size, written):
        raise UserError(f"model.vit.image_size is {given} and data.image_size {size}; give the latter alone")
    vit.init_args.image_size = size


def fill_labels(config: Namespace) -> None:
    """Read a manifest's labels as numbers where the objective learns numbers."""
    module, _, name = config.model.init_args.objective.class_path.rpartition(".")
    if config.data.manifest is not None and getattr(getattr(import_module(module), name), "numbers", False):
        config.data.labels = config.data.labels or "numbers"


def fill_config(config: Namespace, weights: Weights | None, splits: Splits) -> None:
    """Fill in seed, architecture and number of classes; `splits` gets a checkpoint's class names."""
    model, data = config.model.init_args, config.data
    new = not config.ckpt_path
    if data.seed is None:
        data.seed = int(config.seed_everything)
    fill_vit(model, data, weights, new)
    for part in (model.objective, model.optimizer):
        if "init_args" not in part:  # a class without arguments
            part.init_args = Namespace()
    # The data that a checkpoint was made from may be gone.
    if weights is not None and not new and (weights.classes or "num_classes" not in model.objective.init_args):
        splits.classes = weights.classes
        made_with = open_checkpoint(Path(config.ckpt_path))["hyper_parameters"]["objective"]
        several = made_with.get("init_args", {}).get("multi_label", False)
    else:
        splits.scan()
        several = splits.multi_label
    classes, objective = splits.classes, model.objective.init_args
    if "num_classes" in objective and not classes:
        raise no_classes(model.objective.class_path.rsplit(".", 1)[-1], splits.numbers)
    if "num_classes" in model and model.num_classes is None:
        model.num_classes = len(classes) or None
    if "num_classes" in objective and objective.num_classes is None:
        objective.num_classes = model.get("num_classes", len(classes))
    if "multi_label" in objective:
        objective.multi_label = objective.multi_label or several


def config_warnings(config: Namespace, source: dict[str, Any], data: Any) -> list[str]:
    """Likely mistakes in a filled config and its data module; `source` is the config file's content, before flags."""
    found, written = [], flatten(source)
    batch = config.data.batch_size
    made_for = int(written.get("data.batch_size") or batch)
    before = written.get("model.init_args.optimizer.init_args.lr")
    now = config.model.init_args.optimizer.init_args.get("lr")
    kept = before is not None and float(before) == now  # YAML reads 1e-3 as text
    if made_for != batch and kept and config.model.init_args.schedule.lr_per is None:
        fits = f"{now * batch / made_for:.3g} fits it (--model.schedule.lr_per {made_for})"
        found.append(f"data.batch_size is {batch}, but the config's learning rate {now:g} is for {made_for}; {fits}")
    decay = config.model.init_args.groups.layer_decay
    if config.model.init_args.get("lora") is not None and decay < 1:
        found.append("layer decay hardly trains LoRA's first adapters; give --model.groups.layer_decay 1 and lr 1e-3")
    if config.data.balanced and config.model.init_args.objective.init_args.get("class_weights"):
        found.append("data.balanced and class_weights both favour rare classes; give one")
    index, sides, size = data.split("train"), [], min(data.preprocess.image_size)
    for row in range(0, len(index), -(-len(index) // 10)):  # a few headers
        with suppress(Exception):  # what is no image is named when it is decoded
            sides.append(min(open_picture(index.read(row), FORMATS).size))
    if 4 * (side := median_low(sides or [size])) < size:
        found.append(
            f"training images are enlarged from {side} pixels to data.image_size {size}; a smaller one is faster"
        )
    return found


def check_idle(data: Namespace, source: dict[str, Any]) -> None:
    """Refuse settings of what is off: `--data.mixing.prob 0.5` alone mixes nothing."""
    written = flatten(source)  # without flags, of which one may switch off what the file has on
    for group, kind, switches in (("mixing", Mixing, ("mixup", "cutmix")), ("erasing", Erasing, ("prob",))):
        names = [f"data.{group}.{switch}" for switch in switches]
        if any(data[group][switch] for switch in switches) or any(written.get(name) for name in names):
            continue
        for key, value in data[group].as_dict().items():
            if as_lists(value) != as_lists(getattr(kind, key)):
                raise UserError(f"data.{group}.{key} does nothing without {' or '.join(names)}; give it, or drop both")


# Options of the ViT that follow from the data and the head.
SIZE = ("image_size", "num_classes", "hidden_dim")
# Options in which a config may differ from its weights, and in which a new run may besides.
FREE = {"num_classes", "hidden_dim", *TRAINING}
NEW = {"image_size", "in_channels", "class_position", "pool", "pool_prefix", "norm", "partial_patches"}


def fill_vit(model: Namespace, data: Namespace, weights: Weights | None, new: bool) -> None:
    """Give the ViT what the config leaves at its default from the weights, and the channels from the data."""
    if model.get("image_size") is not None:
        raise UserError("model.image_size follows from data.image_size; leave it out")
    if model.vit is None:
        if weights is None:
            raise UserError("model.vit null is the network of weights: give --model.init_from too, or a model.vit")
        size = as_lists(data.image_size)
        config = network(weights, num_classes=0, hidden_dim=None, image_size=size, **(TRAINING if new else {}))
        model.vit = Namespace(class_path="vitlit.ViT", init_args=Namespace(**config))
    vit = model.vit.init_args
    if vit.get("num_classes"):
        raise UserError("model.vit.num_classes is the head's, which follows from the data; leave it out")
    preset = model.vit.class_path.endswith("from_preset")
    if weights is not None and model.init_from is not None:
        kept = (*SIZE, *TRAINING, *((*Size._fields, "patch_size") if preset else ()))
        for name, value in weights.config.items():
            if name not in kept and vit.get(name) in (None, getattr(ViTConfig, name)):
                vit[name] = value
    theirs = ViTConfig.in_channels if weights is None else weights.config["in_channels"]
    if data.range and data.mean and vit.get("in_channels") in (None, ViTConfig.in_channels, theirs):
        vit.in_channels = len(data.mean)
    with torch.device("meta"):
        built = (ViT.from_preset if preset else ViT)(**vit.as_dict()).config
    if built.drop_path_subset and not built.drop_path:
        raise UserError("model.vit.drop_path_subset does nothing without model.vit.drop_path; give both or none")
    if weights is not None:
        check_vit(built, weights, FREE | NEW if new else FREE)


def check_vit(built: ViTConfig, weights: Weights, free: set[str]) -> None:
    """Refuse a network that differs from its weights in more than the `free` options."""
    config = built.plain()
    for name, value in weights.config.items():
        if name in free or (name in ASSUMED and name not in weights.stated and value != "swiglu"):
            continue
        if name == "layer_scale" and None not in (value, config[name]):
            continue
        if name == "image_size" and ViTConfig(image_size=value).sides == built.sides:
            continue
        if config.get(name) != value:
            key = "data.image_size" if name == "image_size" else f"model.vit.{name}"
            raise UserError(f"{key} is {config.get(name)}, but {weights.path} was made with {value}; leave it out")


def fill_loggers(config: Namespace, folder: RunFolder) -> None:
    """Make trainer.logger a list, by default of one W&B logger; each logs under the run's name, files in its folder."""
    given = config.trainer.logger
    if given in (None, True):
        given = Namespace(class_path="vitlit.loggers.Wandb", init_args=Namespace())
    config.trainer.logger = given if isinstance(given, list) else [given] if given else []
    name, path = folder.name, str(folder.path)
    wandb = {"save_dir": path, "name": name, "id": folder.wandb_id() if config.ckpt_path else None}
    of_run: dict[str, dict[str, Any]] = {"Wandb": wandb, "WandbLogger": wandb, "TensorBoard": {"save_dir": path}}
    of_run |= {"MLflow": {"run_name": name}, "Trackio": {"name": name}}
    for logger in config.trainer.logger:
        logger.init_args = logger.get("init_args") or Namespace()
        for key, value in of_run.get(logger.class_path.rpartition(".")[2], {}).items():
            if logger.init_args.get(key) in (None, "."):  # the working folder, where Lightning's would log
                logger.init_args[key] = value

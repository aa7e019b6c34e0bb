"""Reading a config file: plain values only."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vitlit.errors import UserError

# Packages whose classes a config or a checkpoint may name; VITLIT_TRUST adds your own.
TRUSTED = ("vitlit", "torch.optim", "torchvision.transforms", "torchmetrics", "lightning.pytorch", "lightning.fabric")

# Lightning's log neither config nor pictures, and TensorBoard's needs a save_dir, which here is the run's folder.
OWN = {"TensorBoardLogger": "TensorBoard", "MLFlowLogger": "MLflow"}
RENAMED = {
    f"{place}{name}": f"vitlit.loggers.{OWN[name]}" for name in OWN for place in ("", "lightning.pytorch.loggers.")
}


def with_public_paths(value: Any) -> Any:
    """Plain values, with vitlit's own classes in the place of Lightning's."""
    if isinstance(value, dict):
        return {key: with_public_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_public_paths(item) for item in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value


class Loader(yaml.SafeLoader):
    """Builds plain values only, and refuses a repeated key."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value} is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a config file; UserError if it is not YAML of plain values and {class_path, init_args}."""
    try:
        content = yaml.load(Path(path).read_text(), Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except Exception as error:  # the loader raises anything where a tag does not fit its value
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else " ".join(str(error).split())
        raise UserError(f"config {path} is not YAML: {reason or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; `vitlit config pretrain` prints one to start from")
    check_classes(f"config {path}", content)
    return dict(with_public_paths(content))


def groups(value: Any) -> Iterator[dict[str, Any]]:
    """The groups of keys in plain values, at any depth."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        yield from groups(item)


def check_classes(name: str, value: Any) -> None:
    """Raise UserError for a class_path that is no name, a key next to it, or init_args without keys."""
    for group in (group for group in groups(value) if "class_path" in group):
        path = group["class_path"]
        if not isinstance(path, str):
            raise UserError(f"{name}: class_path is {path!r}, not the name of a class")
        for key in group.keys() - {"class_path", "init_args", "dict_kwargs"}:
            raise UserError(f"{name}: {key} stands next to class_path {path}; put it under init_args")
        if not isinstance(group.get("init_args", {}), dict):
            raise UserError(f"{name}: init_args of {path} holds no keys; give some, or leave it out")


def trusted() -> list[str]:
    """Packages and modules whose classes a config or a checkpoint may name."""
    return [*TRUSTED, *os.environ.get("VITLIT_TRUST", "").replace(",", " ").split()]


def check_class_paths(value: Any) -> None:
    """Raise UserError if a class path is outside the trusted packages."""
    for group in groups(value):
        for path in (str(group[key]) for key in ("class_path", "_class_path", "_instantiator") if group.get(key)):
            if "." in path and not path.startswith(tuple(f"{package}." for package in trusted())):
                outside = f"class {path} is outside the packages that may be named ({' '.join(trusted())})"
                raise UserError(f"{outside}; if you trust its code, set VITLIT_TRUST={path.partition('.')[0]}")

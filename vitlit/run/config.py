"""The content of a config file."""

from pathlib import Path
from typing import Any

import yaml

from vitlit.errors import UserError

MOST_VALUES = 100_000  # in a config: those shipped have a hundred
MERGE = "tag:yaml.org,2002:merge"

# The public paths of classes that configs and checkpoints of earlier versions name otherwise.
RENAMED = {
    "vitlit.averaging.EMA": "vitlit.callbacks.EMA",
    "vitlit.objectives.distillation.Distillation": "vitlit.objectives.Distillation",
    "vitlit.objectives.supervised.Supervised": "vitlit.objectives.Supervised",
    "vitlit.optim.lamb.LAMB": "vitlit.optim.LAMB",
    "vitlit.stages.finetune.Finetune": "vitlit.stages.Finetune",
    "vitlit.stages.pretrain.Pretrain": "vitlit.stages.Pretrain",
}


def with_public_paths(value: Any) -> Any:
    """Plain values whose class paths of earlier versions are today's."""
    if isinstance(value, dict):
        return {key: with_public_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_public_paths(item) for item in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value


class Loader(yaml.SafeLoader):
    """Reads plain values alone, no key twice, and no more keys than a config may have."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # by merges of merges, before the next would multiply them
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST_VALUES:,} keys", node.start_mark)


def read_config(path: str | Path) -> dict[str, Any]:
    """A config's content; UserError where it is no YAML, or no mapping of names to plain values."""
    try:
        content = yaml.load(Path(path).read_text(), Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except Exception as error:  # over a tag that does not fit its value the loader raises anything
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else " ".join(str(error).split())
        raise UserError(f"config {path} is not YAML: {reason or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; `vitlit config pretrain` prints one to start from")
    if _count(content, {}) > MOST_VALUES:
        raise UserError(f"config {path} has more than {MOST_VALUES:,} values, with those that aliases repeat")
    check_form(f"config {path}", content)
    renamed: dict[str, Any] = with_public_paths(content)
    return renamed


def _count(value: Any, known: dict[int, int]) -> int:
    """The values in a value, each as often as aliases repeat it: ten lines can stand for more than memory holds."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # of what holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


def check_form(name: str, value: Any, ours: bool = True) -> None:
    """Raise UserError where a key is no text, or a class is not {class_path, init_args}.

    What a class outside vitlit takes may have keys of any kind.
    """
    if isinstance(value, list):
        for item in value:
            check_form(name, item, ours)
    if not isinstance(value, dict):
        return
    for key in value:
        if ours and not isinstance(key, str):
            raise UserError(f"{name}: the key {key!r} is no text")
    if "class_path" in value:
        path = value["class_path"]
        if not isinstance(path, str):
            raise UserError(f"{name}: class_path is {path!r}, not the name of a class")
        for beside in value.keys() - {"class_path", "init_args", "dict_kwargs"}:
            raise UserError(f"{name}: {beside} stands beside class_path {path}; put it under init_args")
        if not isinstance(value.get("init_args", {}), dict):
            raise UserError(f"{name}: init_args of {path} holds no keys; give some, or leave it out")
        ours = "." not in path or path.startswith("vitlit.")
    for item in value.values():
        check_form(name, item, ours)

"""The content of a config file."""

from pathlib import Path
from typing import Any

import yaml

from vitlit.errors import UserError

MOST_VALUES = 100_000  # in a config: those shipped have a hundred


class Loader(yaml.SafeLoader):
    """Reads plain values alone, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_config(path: str | Path) -> dict[str, Any]:
    """A config's content; UserError where it is no YAML, or no mapping of names to plain values."""
    try:
        content = yaml.load(Path(path).read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else " ".join(str(error).split())
        raise UserError(f"config {path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; `vitlit config pretrain` prints one to start from")
    if _count(content, {}) > MOST_VALUES:
        raise UserError(
            f"config {path} has more than {MOST_VALUES:,} values, by anchors that repeat them; write it out"
        )
    check_form(f"config {path}", content)
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """The values in a value, each as often as anchors repeat it: ten lines can stand for more than memory holds."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # of what holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


def check_form(name: str, value: Any) -> None:
    """Raise UserError where a key is no text, or a class is not {class_path, init_args}."""
    if not isinstance(value, dict | list):
        return
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{name}: the key {key!r} is no text")
        if not isinstance(value.get("class_path", ""), str):
            raise UserError(f"{name}: class_path is {value['class_path']!r}, not the name of a class")
        for beside in value.keys() - {"class_path", "init_args", "dict_kwargs"} if "class_path" in value else ():
            raise UserError(f"{name}: {beside} stands beside class_path {value['class_path']}; put it under init_args")
        if not isinstance(value.get("init_args", {}), dict):
            raise UserError(f"{name}: init_args is {value['init_args']!r}, not keys and values")
    for item in value.values() if isinstance(value, dict) else value:
        check_form(name, item)

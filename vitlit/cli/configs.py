"""`vitlit config [NAME]`, and where the shipped configs are."""

from difflib import get_close_matches
from pathlib import Path

import vitlit
from vitlit.errors import UserError
from vitlit.files import expand

CLUSTER = "cluster"  # the folder of scripts among the configs


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        about = "vitlit config NAME prints a shipped config; --config NAME uses it. NAME is one of\n"
        print(about, *shipped(), sep="\n  ")
        print("\nor of a script for many machines\n", *scripts(), sep="\n  ")
        return 0
    path = scripts().get(arguments[0]) or find_config(arguments[0])
    print(path.read_text(), end="")
    return 0


def configs() -> Path:
    """The folder of the shipped configs: in the package, or beside it in a checkout."""
    package = Path(vitlit.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped() -> list[str]:
    found = (path.relative_to(configs()).with_suffix("") for path in configs().rglob("*.yaml"))
    return sorted(str(name) for name in found if name.parts[0] != CLUSTER)


def scripts() -> dict[str, Path]:
    return {f"{CLUSTER}/{path.stem}": path for path in sorted((configs() / CLUSTER).iterdir())}


def find_config(name: str) -> Path:
    """The path of a config: a file, with or without .yaml, else a shipped one; `configs/NAME.yaml` is a name too."""
    name = expand(name)
    known = name.removeprefix("configs/").removesuffix(".yaml")
    for path in (Path(name), Path(f"{name}.yaml"), configs() / f"{known}.yaml"):
        if path.is_file():
            return path
    near = get_close_matches(known, shipped(), 1)
    hint = f"; did you mean {near[0]}?" if near else "; `vitlit config` lists the shipped ones"
    raise UserError(f"config {name} does not exist{hint}")

"""The private names of other packages that vitlit touches: each is listed, with why and what to do when it goes."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vitlit

PACKAGE = Path(vitlit.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
PRIVATE = re.compile(r"_[A-Za-z]\w*")  # and no __dunder__
OF_METACLASSES = {"_abc_impl", "_backward_cls"}
PUBLIC = {"_asdict", "_fields", "_replace"}  # documented, of a NamedTuple


class Name(NamedTuple):
    """Private names that a file touches: of which object of the library, why, and what to do when they go."""

    file: str
    names: str
    owner: str
    why: str
    remedy: str


CLI, STAGE = "lightning.pytorch.cli:LightningCLI", "lightning.pytorch:LightningModule"
NAMES = [
    Name(
        "cli/parser.py",
        "_actions _check_value_key",
        "lightning.pytorch.cli:LightningArgumentParser",
        "jsonargparse accepts null for every type",
        "validate(skip_unset=False), if it reports missing keys first; else drop the check",
    ),
    Name(
        "cli/fit.py",
        "_parse_ckpt_path",
        CLI,
        "Lightning lets the settings of a checkpoint win over the config, silently",
        "look for a switch of LightningCLI; without one, test that --ckpt_path leaves the config alone",
    ),
    Name(
        "cli/fit.py",
        "_prepare_subcommand_kwargs",
        CLI,
        "weights_only is passed on, so nothing in a checkpoint is run",
        "set weights_only in the parsed config",
    ),
    Name(
        "run/interrupt.py",
        "_signal_connector",
        "lightning.pytorch:Trainer",
        "Lightning's handler of SIGTERM hangs if not every rank is signalled, and a barrier follows its registration",
        "set the handlers in on_sanity_check_start and on_train_start too",
    ),
    Name(
        "run/interrupt.py",
        "_broadcast_sigterm_tensor",
        "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
        "it waits for the GPU at every step",
        "measure the step; drop the patch if the wait is gone",
    ),
    Name(
        "loggers/wandb.py",
        "_wandb_init",
        "lightning.pytorch.loggers:WandbLogger",
        "the mode is known only as the run begins, and anonymous=None makes wandb warn",
        "call wandb.init and pass the run as experiment=",
    ),
    Name(
        "optim/lamb.py",
        "_foreach_add_ _foreach_addcmul_ _foreach_div _foreach_div_ _foreach_lerp_ _foreach_mul_ _foreach_norm "
        "_foreach_sqrt",
        "torch",
        "one kernel for all parameters, as torch's own optimisers have; there is no public name",
        "a loop over the parameters",
    ),
    Name(
        "callbacks/nonfinite.py",
        "_amp_foreach_non_finite_check_and_unscale_",
        "torch",
        "one kernel for all gradients, or weights",
        "a loop over the gradients",
    ),
    Name(
        "callbacks/nonfinite.py",
        "_local_tensor",
        "torch.distributed.tensor:DTensor",
        "the part of a sharded tensor on this rank, without an import of torch.distributed.tensor",
        "DTensor.to_local()",
    ),
    Name(
        "stages/starting.py",
        "_trainer",
        STAGE,
        "LightningModule.trainer raises where there is none",
        "catch its RuntimeError",
    ),
    Name(
        "stages/compiling.py",
        "_compiled_call_impl",
        "torch.nn:Module",
        "what Module.compile sets, and nothing public takes back",
        "compile a function that calls the module, and keep it beside the module",
    ),
    Name(
        "stages/compiling.py",
        "_inductor",
        "torch",
        "list_mode_options, which torch.compile's documentation names: it takes a mode or options, not both",
        "write the modes' options out",
    ),
    Name(
        "stages/compiling.py",
        "_dynamo",
        "torch",
        "config.recompile_limit: deep networks have more blocks than it allows graphs",
        "pass recompile_limit to Module.compile, from torch 2.15 on",
    ),
    Name(
        "export.py",
        "_inductor",
        "torch",
        "aoti_compile_and_package and aoti_load_package, which torch's documentation of AOTInductor names",
        "look for their public names",
    ),
    Name(
        "stages/stage.py",
        "_class_path _instantiator",
        CLI,
        "the keys by which Lightning builds a stage from its checkpoint (load_from_checkpoint)",
        "follow the keys of the new Lightning, and read the old ones too",
    ),
    *(
        Name(
            f"weights/{file}.py",
            "_metadata",
            "torch.nn:Module",
            "what torch keeps beside the tensors of a state dict: loaders ignore it, weights_only reads it",
            "write no metadata: the report says what was assumed",
        )
        for file in ("save", "files")
    ),
    Name("cli/completion.py", "_class_path", CLI, "as in stages/stage.py", "as in stages/stage.py"),
    Name(
        "cli/trainer.py",
        "_PRECISION_INPUT",
        "lightning.pytorch.trainer.connectors.accelerator_connector",
        "the precisions that Lightning's Trainer takes, for the parser",
        "write the Literal out",
    ),
    Name(
        "prepare/sources.py",
        "_images _labels",
        "torchvision.datasets:OxfordIIITPet",
        "the files of the images; the public access decodes them",
        "read annotations/*.txt",
    ),
]
LISTED = {(row.file, name) for row in NAMES for name in row.names.split()}


def touched(source: str, inherited: set[str]) -> Iterator[str]:
    """The private names in a source that neither it nor, of its own attributes, the package defines."""
    tree = ast.parse(source)
    own = set(defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names, known = [node.attr], own | (inherited if of_self else set())
        elif isinstance(node, ast.ImportFrom):
            names, known = [*(node.module or "").split("."), *(alias.name for alias in node.names)], set()
        elif isinstance(node, ast.Call):
            names = [keyword.arg or "" for keyword in node.keywords]
            names += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            known = own
        else:
            continue
        yield from (name for name in names if PRIVATE.fullmatch(name) and name not in known | PUBLIC)


def defined(tree: ast.AST) -> Iterator[str]:
    """The private names that a source defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else ""


def overridden(file: str) -> Iterator[str]:
    """The private names by which the classes of a file override what another package's base class has."""
    name = ".".join(Path("vitlit", file).with_suffix("").parts).removesuffix(".__init__")
    for cls in vars(importlib.import_module(name)).values():
        if inspect.isclass(cls) and cls.__module__ == name:
            bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith(("vitlit", "abc", "typing"))]
            names = [name for name in vars(cls) if PRIVATE.fullmatch(name) and name not in OF_METACLASSES]
            yield from (name for name in names if any(name in vars(base) for base in bases))


def test_every_private_name_of_another_package_is_listed() -> None:
    inherited = {name for source in SOURCES.values() for name in defined(ast.parse(source))}
    found = {(file, name) for file, source in SOURCES.items() for name in touched(source, inherited)}
    found |= {(file, name) for file in SOURCES if file != "__main__.py" for name in overridden(file)}
    assert found - LISTED == set(), "use a public name, or list it with a reason"
    assert LISTED - found == set(), "listed, but no longer touched"


@pytest.mark.parametrize("row", NAMES, ids=lambda row: f"{row.file} {row.names.split()[0]}")
def test_the_library_still_has_the_name(row: Name) -> None:
    module, _, attribute = row.owner.partition(":")
    owner: Any = importlib.import_module(module)
    modules = [owner]
    if attribute:
        owner = getattr(owner, attribute)
        modules = [importlib.import_module(base.__module__) for base in owner.__mro__]
    files = [Path(m.__file__) for m in modules if str(getattr(m, "__file__", None)).endswith(".py")]
    source = "".join(file.read_text() for file in files)  # for attributes of instances
    for name in row.names.split():
        assert hasattr(owner, name) or re.search(rf"\b{name}\b", source), f"{name} is gone: {row.remedy}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_new()",
        "from lightning.pytorch._hidden import thing",
        "from lightning.pytorch import _hidden",
        "getattr(trainer, '_hidden', None)",
        "trainer._hidden = 3",
        "class A(Base):\n    def go(self):\n        self._hidden()",
    ],
)
def test_a_new_private_name_is_found(source: str) -> None:
    assert len(list(touched(source, {"_other"}))) == 1

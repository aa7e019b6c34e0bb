"""`vitlit push RUN OWNER/NAME`: the weights of a run on the Hugging Face hub, with a card of what is known of them."""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vitlit.cli.report import Report
from vitlit.errors import CommandParser, UserError, need
from vitlit.export import TASKS, calibrated, check, load, photographs
from vitlit.files import from_here, whole_folder, write_text
from vitlit.run.history import History
from vitlit.weights import timm
from vitlit.weights.hub import CONFIG, FILES
from vitlit.weights.save import save_weights, write

ABOUT = """\
Publish the best weights of a run on the Hugging Face hub: a folder that timm, transformers and
vitlit.load("hf:OWNER/NAME") read, with a model card filled from the run. --to DIR writes it without a network.
"""
# In a word, what begins like a path or an address (hf:OWNER/NAME does not), and how that goes on.
PATH = re.compile(r"(^|[=\s'\"\[{(,])((?:~\w*|\.\.|\$\{?\w+\}?|\w+:/)?/(?=[^\s/])[^'\",\]})\n]*)")
USE = """\
```python
import vitlit

vit = vitlit.load("hf:{name}")  # vit(vit.preprocess(["photo.jpg"])){after}
```"""
# Where images are RGB of 8 bits.
ELSEWHERE = """

```python
import timm
from transformers import pipeline  # needs timm for these weights

model = timm.create_model("hf_hub:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
network = pipeline("{task}", "{name}")
```"""
PROBABILITIES = {"softmax": ".softmax(-1)", "sigmoid": ".sigmoid()", None: ""}


def run(arguments: list[str]) -> int:
    from huggingface_hub import HfApi, errors, get_token

    parser = CommandParser("vitlit push", ABOUT)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository; one that exists gets a commit")
    parser.add_argument("--license", required=True, help="of the weights, in the hub's words: apache-2.0, mit, other")
    parser.add_argument("--to", metavar="DIR", type=Path, help="write the folder here, and upload nothing")
    given = parser.parse_intermixed_args(arguments or ["--help"])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given.name):
        parser.error(f"{given.name} is not of the form OWNER/NAME")
    if given.to is None and get_token() is None:
        raise UserError("the hub takes uploads with a token only: `hf auth login`, or --to DIR to write a folder")
    with TemporaryDirectory() if given.to is None else whole_folder(given.to) as folder:
        publish(given.run, Path(folder), given.name, given.license)
        if given.to is None:
            try:
                HfApi().create_repo(given.name, exist_ok=True)
                HfApi().upload_folder(repo_id=given.name, folder_path=folder, commit_message="vitlit push")
            except (OSError, ValueError, errors.HTTPError) as error:
                raise UserError(f"{given.name} was not uploaded: {error}; see --to, and `hf upload`") from error
    print(from_here(given.to) if given.to else f"https://huggingface.co/{given.name}")
    return 0


def publish(path: Path, folder: Path, name: str, license: str) -> None:
    """Write the best weights of a run, as a model of timm's, and their card; UserError if timm has none such."""
    need("timm")
    from timm import create_model

    run, best = History(path), path / "checkpoints" / "best.ckpt"
    if run.state == "running":
        raise UserError(f"{path} is being trained; push it when that has ended")
    if not best.is_file():
        raise UserError(f"{path} has no checkpoints/best.ckpt: nothing was validated, so there is nothing to say of it")
    vit, activation = load(best)
    temperature, vit = vit.temperature, calibrated(vit)
    if vit.config.hidden_dim is not None:
        raise UserError(f"{path} has the pretraining head, which timm has not; finetune it first")
    try:
        config = timm.config(vit)
    except UserError as error:
        raise UserError(f"{path} is no model of timm's: {error}; finetune it, or convert the weights") from error
    config |= {"problem_type": TASKS[activation]} if vit.config.num_classes else {}  # for transformers' pipeline
    write(folder / CONFIG, config)
    save_weights(vit, folder / FILES[0], "timm")
    network = create_model(f"local-dir:{folder}", pretrained=True).eval()
    about = dict.fromkeys(("softmax", "half", "int8")) | {"input": "float", "activation": activation, "temperature": 1}
    found = check(vit, network, photographs(vit.preprocess), about, folder)
    notes = "timm's outputs, of up to {largest_output:.2g}, are the run's to {largest_difference:.1e}.".format(**found)
    if temperature != 1:
        notes += f" The head is divided by the temperature {temperature:.4g}, which calibrates the probabilities."
    if vit.preprocess.range:
        notes += f" Files are read with data.range {list(vit.preprocess.range)}, which is for vitlit alone."
    elif vit.config.in_channels == 1:
        notes += " Its images are grey, and neither timm nor transformers makes them so."
    use = USE + ("" if vit.preprocess.range or vit.config.in_channels == 1 else ELSEWHERE)
    text = card(Report(run), name, license, bool(vit.config.num_classes), PROBABILITIES[activation], notes, use)
    write_text(folder / "README.md", text.encode(errors="replace").decode())  # a class's name may be no text


def card(report: Report, name: str, license: str, classifies: bool, after: str, notes: str, use: str) -> str:
    """The model card of a run, without the folders of the machine that trained it."""
    run, start = report.run, report.run.config["model"]["init_args"].get("init_from") or ""
    root = run.config["data"]["root"]
    data = root if root.startswith("hf:") else PurePath(root).name or root

    def public(text: object) -> str:
        return PATH.sub(lambda found: found[1] + PurePath(found[2]).name, str(text).replace(root, data))

    task = "image-classification" if classifies else "image-feature-extraction"
    results, confusion, trained = map(report.section, ("Results", "Confusion matrix", "Trained"))
    rows = {row: public(value) for row, value in trained.rows if row != "In"}
    rows["Command"] = f"`{shlex.join(map(public, shlex.split(report.last.get('command', ''))))}`"
    rows |= {"Ended": run.state, "vitlit": report.last.get("versions", {}).get("vitlit", "not known")}
    rows |= {f"Commit of {what}": commit for what, commit in report.last.get("commit", {}).items()}
    settings = public(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True, width=1e9))
    base = f"of {public(start)}, from which training began, and " if start else ""
    parts = [
        f"---\n{metadata(run, name, license, task, start, data)}\n---\n\n# {name}",
        f"A [Vision Transformer](https://arxiv.org/abs/2010.11929), trained with vitlit. {notes}",
        use.format(name=name, task=task, after=after),
        table("Results", results.text.replace("best.ckpt has", "These are"), results.head, results.rows),
        *([table("Confusion", "What was confused most.", confusion.head, confusion.rows)] if confusion.rows else []),
        table("Training", "How these weights came about.", ("", ""), rows.items()),
        f"<details><summary>All settings</summary>\n\n```yaml\n{settings}```\n\n</details>",
        f"## License\n\n{license}. The license {base}of the data may apply too.\n",
    ]
    return "\n\n".join(parts)


def table(title: str, text: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A section in Markdown."""
    lines = [" | ".join(str(cell).replace("|", "&#124;") for cell in row) for row in (head, ["---"] * len(head), *rows)]
    return "\n\n".join([f"## {title}", text, "\n".join(f"| {line} |" for line in lines if line)])


def metadata(run: History, name: str, license: str, task: str, start: str, data: str) -> str:
    """What the hub reads of a card: the task, the origins and the numbers."""
    from huggingface_hub import EvalResult, ModelCardData

    origins = {"base_model": start, "datasets": data}.items()
    about: dict[str, Any] = {key: origin[3:].partition("@")[0] for key, origin in origins if origin.startswith("hf:")}
    kind, types = about.get("datasets", "imagefolder"), {"top1": "accuracy"}  # in the hub's words
    best = {each[4:]: value for each, value in (run.best.row if run.best else {}).items() if each.startswith("val/")}
    results = [
        EvalResult(task, kind, data, types.get(name, name), round(value, 4), dataset_split="val", metric_name=name)
        for name, value in best.items()
    ]
    about |= {"license": license, "library_name": "timm", "pipeline_tag": task, "model_name": name}
    about |= {"tags": ["timm", "transformers", "vitlit", "vision-transformer"], "eval_results": results or None}
    return ModelCardData(**about).to_yaml()

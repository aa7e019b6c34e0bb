"""`vitlit push RUN OWNER/NAME`: others read the folder, and the card tells of the run, but not of the machine."""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
import yaml
from conftest import REPOSITORY, SMALL, command, done
from huggingface_hub import ModelCard, constants
from PIL import Image

import vitlit
from vitlit.cli.main import main
from vitlit.weights.calibrated import store_temperature

NAME, SECRET = "me/vit-digits", "Jane Doe"
FLAGS = "--data.image_size 16 --data.batch_size 16 --data.num_workers 0 --trainer.max_steps 6 --trainer.logger false"
FLAGS += " --model.schedule.warmup 0 --run.report false --seed_everything 3"
Push = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(few: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name nobody else is to know, with data and two runs: of classes, and of features."""
    home = tmp_path_factory.mktemp("home") / SECRET
    shutil.copytree(few, home / "few")
    shutil.copytree(trained / "runs" / "pretrain", home / "base")
    config, base = REPOSITORY / "configs" / "finetune.yaml", ("--model.init_from", home / "base")
    for name, flags in {
        "classes": ("--config", config, *base, *FLAGS.split(), "--data.root", home / "few"),
        "features": (
            *SMALL,
            "--model.objective",
            "MAE",
            "--data.holdout",
            "20%",
            "--data.root",
            home / "few" / "train",
        ),
    }.items():
        done(command("fit", *flags, "--run.root", home / "runs", "--run.name", name, cwd=home))
    return home


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run of classes."""
    return Path(shutil.copytree(place / "runs" / "classes", tmp_path / "run"))


@pytest.fixture
def push(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Push:
    """The command, without a token, and what it ended with and printed."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["push", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def published(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "published"
    assert main(["push", str(place / "runs" / "classes"), NAME, "--license", "mit", "--to", str(out)]) == 0
    return out


@pytest.fixture
def photos(few: Path) -> list[str]:
    return [str(path) for path in sorted((few / "val").glob("*/*"))]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_upload_is_read_by_timm_and_vitlit(
    push: Push, place: Path, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's stand-in puts what it gets where huggingface_hub keeps what it has downloaded."""
    snapshot, asked = tmp_path / "models--me--vit-digits" / "snapshots" / ("0" * 40), []

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            asked.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Any, commit_message: str) -> None:
            asked.append((repo_id, True))
            shutil.copytree(folder_path, snapshot)
            (snapshot.parent.parent / "refs").mkdir()
            (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = push(place / "runs" / "classes", NAME, "--license", "mit")
    assert found == (0, f"https://huggingface.co/{NAME}\n", "")
    assert asked == [(NAME, True)] * 2
    assert sorted(path.name for path in snapshot.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    run: Any = vitlit.load(place / "runs" / "classes")
    back: Any = vitlit.load(f"hf:{NAME}")
    theirs: Any = timm.create_model(f"hf_hub:{NAME}", pretrained=True).eval()
    assert (back.classes, back.preprocess) == (run.classes, run.preprocess) != ([], None)
    with torch.no_grad():
        images = run.preprocess(photos)
        assert torch.equal(back(images), run(images))
        torch.testing.assert_close(theirs(images), run(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.forward_features(images), run.features(images), rtol=0, atol=1e-5)


def test_transformers_gives_the_same_probabilities_with_names(published: Path, place: Path, photos: list[str]) -> None:
    classify = transformers.pipeline("image-classification", str(published), top_k=10)
    vit: Any = vitlit.load(place / "runs" / "classes")
    with torch.no_grad():
        expected = vit(vit.preprocess(photos[:3])).softmax(-1)
    for photo, ours in zip(photos[:3], expected.tolist(), strict=True):
        theirs = {each["label"]: each["score"] for each in classify(Image.open(photo).convert("RGB"))}
        assert theirs == pytest.approx(dict(zip(vit.classes, ours, strict=True)), abs=1e-3)


def test_a_temperature_reaches_all_readers(push: Push, run: Path, photos: list[str], tmp_path: Path) -> None:
    vit: Any = vitlit.load(run)
    store_temperature(str(run), 0.25)
    assert push(run, NAME, "--license", "mit", "--to", tmp_path / "out")[0] == 0
    images = vit.preprocess(photos)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        for network in (vitlit.load(tmp_path / "out"), theirs):
            torch.testing.assert_close(network(images), vit(images) / 0.25, rtol=0, atol=1e-5)
    assert vitlit.load(tmp_path / "out").temperature == 1
    assert "divided by the temperature 0.25," in (tmp_path / "out" / "README.md").read_text()


def test_the_card_tells_what_the_runs_files_do(published: Path, place: Path, few: Path) -> None:
    card: Any = ModelCard((published / "README.md").read_text())
    run = place / "runs" / "classes"
    images = table(run / "validation.csv")
    right = sum(row["label"] == row["prediction"] for row in images)
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("mit", "timm", "image-classification")
    measured = {each.metric_type: each for each in card.data.eval_results}
    assert measured["accuracy"].metric_value == pytest.approx(right / len(images), abs=1e-4)
    assert (measured["accuracy"].dataset_name, measured["accuracy"].dataset_split) == ("few", "val")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["val/top1"][0] == f"{100 * right / len(images):.2f} %"
    low, high = (float(end.removesuffix(" %")) for end in rows["val/top1"][1].split(" to "))
    assert low <= 100 * right / len(images) <= high
    assert f"over {len(images)} validation images, which chose the weights" in card.text
    wrong = Counter((row["label"], row["prediction"]) for row in images if row["label"] != row["prediction"])
    written = {(row[0], row[1]): int(row[2]) for row in cells if len(row) == 4 and row[2].isdecimal()}
    assert written == dict(wrong)
    step = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    assert rows["Seen"] == [f"{step * 16} images up to the best weights"]
    assert rows["Images"] == ["40 train, 11 val; 4 classes"]
    assert (rows["Seed"], rows["vitlit"], rows["Ended"]) == (["3"], [vitlit.__version__], ["finished"])
    made_with = json.loads((run / "run.json").read_text())["commands"][0]
    assert all(rows[f"Commit of {what}"] == [commit] for what, commit in made_with["commit"].items())
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["data.image_size"] == 16


def test_no_folder_of_the_machine_is_published(published: Path, place: Path, push: Push, run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["init_from"] = f"/home/{SECRET}/a, b/base.safetensors"
    config["data"]["manifest"] = f"~jane/{SECRET}/list.csv"
    config["data"]["root"] = f"../{SECRET}/few"
    config["trainer"]["callbacks"] = [{"class_path": "a.B", "init_args": {"to": f"s3://{SECRET}/there"}}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "run.json").read_text())
    about["commands"][-1]["command"] += (
        f" '--data.root=/x/{SECRET}/few' \"--a={{'b': '/x/{SECRET}/c'}}\" '--e=$HOME/{SECRET}/f'"
    )
    (run / "run.json").write_text(json.dumps(about))
    assert push(run, NAME, "--license", "mit", "--to", run / "out")[0] == 0
    for folder in (published, run / "out"):
        for path in folder.iterdir():
            content = path.read_bytes().decode(errors="replace")
            for word in (SECRET, "/home", "/tmp", place.parent.name):
                assert word not in content, content[max(0, content.find(word) - 80) :][:200]
    text = (run / "out" / "README.md").read_text()
    assert "data.root: few\n" in text
    assert "base.safetensors, from which training began" in text
    assert "--config finetune.yaml" in text


def test_the_hubs_names_are_metadata(push: Push, run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["init_from"] = "hf:facebook/dinov2-small@v1"
    config["data"]["root"] = "hf:uoft-cs/cifar10"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert push(run, NAME, "--license", "cc-by-nc-4.0", "--to", tmp_path / "out")[0] == 0
    card: Any = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert (card.data.base_model, card.data.datasets) == ("facebook/dinov2-small", "uoft-cs/cifar10")
    assert "cc-by-nc-4.0. The license of hf:facebook/dinov2-small@v1, from which training began" in card.text


def test_features_are_published_as_such(push: Push, place: Path, photos: list[str], tmp_path: Path) -> None:
    assert push(place / "runs" / "features", NAME, "--license", "mit", "--to", tmp_path / "out")[0] == 0
    card: Any = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "(held out, 20% of train)" in card.text
    assert "## Confusion" not in card.text
    vit: Any = vitlit.load(place / "runs" / "features")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        images = vit.preprocess(photos)
        torch.testing.assert_close(theirs(images).pooler_output, vit(images), rtol=0, atol=1e-5)


def test_what_cannot_be_pushed_is_one_line(
    push: Push, run: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str, given: tuple[object, ...]) -> None:
        code, out, err = push(*given)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert all(word in err for word in words), err

    out = tmp_path / "out"
    to = ("--license", "mit", "--to", out)
    refused("--license", given=(run, NAME, "--to", out))
    refused("OWNER/NAME", "digits is not", given=(run, "digits", *to))
    refused("`hf auth login`", "--to DIR", given=(run, NAME, "--license", "mit"))
    refused("pretraining head, which timm has not", "finetune", given=(trained / "runs" / "pretrain", NAME, *to))
    refused("not the folder of a run", given=(run / "checkpoints" / "best.ckpt", NAME, *to))
    (run / "finished.json").unlink()
    (run / ".lock").touch()
    refused("is being trained", given=(run, NAME, *to))
    (run / ".lock").unlink()

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to\nhost")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    refused(f"{NAME} was not uploaded: no route to host", given=(run, NAME, "--license", "mit"))
    (run / "checkpoints" / "best.ckpt").unlink()
    refused("no checkpoints/best.ckpt", given=(run, NAME, *to))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    refused("is not empty", given=(run, NAME, *to))

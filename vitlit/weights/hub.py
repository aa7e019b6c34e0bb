"""Models on the Hugging Face hub, as `hf:OWNER/NAME[@REVISION]`: only safetensors and JSON."""

from pathlib import Path

from vitlit.errors import UserError

FILES = ("model.safetensors", "model.safetensors.index.json")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PATTERNS = [*FILES, "model-*.safetensors", CONFIG, PREPROCESSOR]


def fetch(name: str) -> Path:
    """The weight file of a model in huggingface_hub's cache, downloaded if it is not there; or UserError."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix("hf:").partition("@")
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS))
    except errors.RepositoryNotFoundError as error:
        remedy = "accept its terms on huggingface.co, and log in with `hf auth login`"
        raise UserError(f"{name} does not exist, or is private or gated: {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the model has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION") from error
    except OSError as error:
        raise UserError(f"{name} is not cached and the hub cannot be reached: `{command}` downloads it") from error
    for file in FILES:
        if (folder / file).is_file():
            return folder / file
    raise UserError(f"{name} has no model.safetensors in the cache; vitlit takes only safetensors: `{command}`")

"""Models on the Hugging Face hub, by `hf:OWNER/NAME[@REVISION]`: safetensors and JSON only."""

from pathlib import Path

from vitlit.errors import UserError

PATTERNS = ["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"]
SHARDS = "model-*.safetensors"


def fetch(name: str) -> Path:
    """The folder of a model in huggingface_hub's cache, downloaded where it is not there.

    Raises:
        UserError: there is no such model, the hub cannot be reached, or the model has no safetensors file.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix("hf:").partition("@")
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=[*PATTERNS, SHARDS])
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{name} does not exist, or is private: then log in with `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the model has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached; where there is a network, "
            f"`{command}` fetches it"
        ) from error
    for weights in PATTERNS[2:]:
        if (Path(folder) / weights).is_file():
            return Path(folder) / weights
    raise UserError(
        f"{name} has no model.safetensors in the cache; only safetensors are taken from the hub: `{command}`"
    )

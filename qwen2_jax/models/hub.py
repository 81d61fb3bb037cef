"""From what a user calls a model (a path, an embedded model's name, or a hub id) to a path on this machine."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.embedded import EMBEDDED_MODELS, embedded_model

# Never *.bin, *.pt or *.pth, which are pickles; a GGUF file is named, since a repository may hold dozens.
_TEXTS = ["*.json", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors", "params/**"]


def resolve(
    model: str | Path, *, revision: str | None = None, token: str | bool | None = None, weights: bool = True
) -> Path:
    """Return the local folder or GGUF file of `model`, downloading it where it is not cached.

    `model` is a path that exists, the name of an embedded model (`smollm2`), a hub id (`owner/name`), or a GGUF file on
    the hub (`owner/name/file.gguf`). The hub client's cache, offline mode and stored token apply; `token` overrides the
    last. Without `weights` the config and the tokenizer are enough. Raises `CheckpointError`, which says what to do.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if str(model) in EMBEDDED_MODELS:
        return embedded_model(str(model))
    name = str(model)
    if path.is_absolute() or name.startswith((".", "~")) or (name.count("/") > 1 and not name.endswith(".gguf")):
        raise CheckpointError(f"there is no file or folder {name!r}")
    return _download(name, revision, token, _TEXTS + _WEIGHTS if weights else _TEXTS)


def _download(name: str, revision: str | None, token: str | bool | None, patterns: list[str]) -> Path:
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    at = f"revision {revision!r} of {name!r}" if revision else repr(name)
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{repo}", file, revision=revision, token=token))
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except GatedRepoError as error:
        advice = "accept its conditions on huggingface.co, then pass hf_token or set HF_TOKEN"
        raise CheckpointError(f"{at} is gated: {advice}") from error
    except RepositoryNotFoundError as error:
        advice = "check the spelling; a private model needs hf_token or HF_TOKEN"
        raise CheckpointError(f"{at} is neither a local path nor on the hub: {advice}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{at} is not on the hub; leave revision out for the main branch") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        advice = "go online, unset HF_HUB_OFFLINE, set HF_HOME to the cache that has it, or pass a local folder"
        raise CheckpointError(f"{at} is not in the local cache and the hub cannot be reached: {advice}") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{at} is not on the hub: that repository has no file {file!r}") from error
    except HFValidationError as error:
        advice = "pass a folder that exists, a hub id owner/name, or one of " + ", ".join(EMBEDDED_MODELS)
        raise CheckpointError(f"{at} is neither a local path nor a hub id: {advice}") from error
    # The hub's client lets its HTTP library's own errors through.
    except Exception as error:
        raise CheckpointError(f"{at} cannot be downloaded ({error}); try again, or pass a local folder") from error

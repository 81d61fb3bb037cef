"""From what a user calls a model (a path, an embedded model's name, or a hub id) or an adapter to a path here."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

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
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


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
    patterns = _TEXTS + _WEIGHTS if weights else _TEXTS
    return _download(name, revision, token, patterns, embedded=list(EMBEDDED_MODELS))


def resolve_adapter(
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the local folder of `adapter`, downloading its config and its safetensors file where they are not cached.

    `adapter` is a folder that exists or a hub id (`owner/name`), `subfolder` the adapter's folder within it. Whether
    the files are there and are an adapter is for the caller to see. Raises `CheckpointError`, which says what to do.
    """
    name, inside = str(adapter), PurePosixPath(subfolder or "")
    try:
        path = Path(adapter).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name[:80]!r} is neither a path nor a hub id owner/name: {error}") from error
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"subfolder={subfolder!r} leaves {name!r}; give a folder within it")
    if exists:
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for the hub, but {name!r} is a local path; leave it out")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        advice = "pass a folder that exists or a hub id owner/name, and a folder within that as subfolder"
        raise CheckpointError(f"there is no adapter {name!r}: {advice}")
    else:
        path = _download(name, revision, token, [str(inside / file) for file in _ADAPTER])
    if not (path / inside).is_dir():
        raise CheckpointError(f"there is no folder {subfolder or name!r} for an adapter in {str(path)!r}")
    return path / inside


def _download(
    name: str, revision: str | None, token: str | bool | None, patterns: list[str], *, embedded: Sequence[str] = ()
) -> Path:
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
        advice = "pass " + ", or ".join(["a folder that exists", "a hub id owner/name", *embedded])
        raise CheckpointError(f"{at} is neither a local path nor a hub id: {advice}") from error
    # The hub's client lets its HTTP library's own errors through.
    except Exception as error:
        raise CheckpointError(f"{at} cannot be downloaded ({error}); try again, or pass a local folder") from error

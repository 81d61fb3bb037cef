"""From what a user calls an adapter to its folder, and from the folder to a checked config and tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen2_jax.errors import AdapterError, CheckpointError
from qwen2_jax.lora.config import AdapterConfig, parse_config
from qwen2_jax.models import hub
from qwen2_jax.models.checkpoint import TensorEntry, read_json
from qwen2_jax.models.safetensors_reader import read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def resolve_adapter(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the local folder of an adapter: a folder, or a hub id `owner/name`, downloaded where it is not cached.

    `subfolder` is the adapter's folder within either. Raises `AdapterError`, which says what to do.
    """
    with as_adapter_error():
        return hub.resolve_adapter(name, revision=revision, token=token, subfolder=subfolder)


def is_local(name: str | Path) -> bool:
    """Return whether what a user calls an adapter is a path here, and not a hub id."""
    return Path(name).expanduser().exists()


def file_signature(path: Path) -> tuple[tuple[int, int, int], ...]:
    """Return what changes when the files of the adapter in `path` are written anew; raises `AdapterError`."""
    if not (path / CONFIG).is_file():
        read_config(path)  # says what the folder is instead
    try:
        stats = [file.stat() for file in (path / CONFIG, weights_file(path))]
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def read_config(folder: Path) -> AdapterConfig:
    """Return the config of the adapter in `folder`; raises `AdapterError`."""
    file = folder / CONFIG
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; pass the folder that holds {CONFIG}")
    if not file.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}: {_where_else(folder)}")
    with as_adapter_error():
        return parse_config(file, read_json(file))


def weights_file(folder: Path) -> Path:
    """Return the safetensors file of the adapter in `folder`; raises `AdapterError` where there is none."""
    file = folder / WEIGHTS
    if file.is_file():
        return file
    pickles = sorted(path.name for path in folder.glob("adapter_model.*") if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise AdapterError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is opened and is refused; if you trust it, "
            f"load it with PEFT, and save_pretrained() writes {WEIGHTS}"
        )
    raise AdapterError(
        f"{folder} has no {WEIGHTS}; is the download complete? A repository with adapter_model.bin alone must be saved "
        "again with PEFT's save_pretrained()"
    )


def read_entries(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of `file` by name, none of them loaded; raises `AdapterError` for a damaged file."""
    with as_adapter_error():
        return read_tensors([file])


@contextmanager
def as_adapter_error() -> Iterator[None]:
    """Turn the `CheckpointError` of a helper for models into an `AdapterError` with its message."""
    try:
        yield
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _where_else(folder: Path) -> str:
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"pass subfolder={below[0]!r}, or another of {', '.join(below)}"
    if (folder / "config.json").is_file():
        return "it is a model, not an adapter"
    return "is it a PEFT adapter, and is the download complete?"

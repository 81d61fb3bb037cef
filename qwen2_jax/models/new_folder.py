"""Folders that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen2_jax.errors import CheckpointError


def check_new(path: str | Path) -> None:
    """Raise `CheckpointError` unless `path` is an empty folder, or does not exist and can be made."""
    target = Path(path).expanduser()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} is not empty; name a new folder")
        target.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.resolve().parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error}); name another folder") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, whose content becomes that of `path` at the end; an error leaves nothing behind.

    Raises `CheckpointError` unless `path` is an empty folder or does not exist.
    """
    check_new(path)
    target = Path(path).expanduser().resolve()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        folder = Path(beside) / "content"
        folder.mkdir()
        yield folder
        if not target.exists():
            folder.rename(target)
            return
        for written in folder.iterdir():  # the folder itself may be a process's own, or a link's
            written.rename(target / written.name)

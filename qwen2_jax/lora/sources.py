"""Where an adapter comes from: the files of a folder, or a merge of several folders' adapters."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.files import file_signature, is_local, resolve_adapter
from qwen2_jax.lora.merge import merge_adapters, merged_rank
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.lora.vocab import vocab_ranks
from qwen2_jax.lora_requests import AdapterRequest, LoRARequest, MergedLoRARequest, MergeOptions

CheckRank = Callable[[int], None]
"""Raises `AdapterError` for a rank that is not served."""
GoOn = Callable[[], None]
"""Raises `AdapterError` where nobody waits for the adapter any more."""


class AdapterSource(Hashable, Protocol):
    """Reads an adapter; equal sources read the same files in the same way. As a string it names the files."""

    def signature(self) -> Hashable:
        """Return what changes when the files are written anew; raises `AdapterError`."""
        ...

    def read(self, base: ModelConfig, check_rank: CheckRank, go_on: GoOn) -> Adapter:
        """Return the adapter for a model with the sizes of `base`; raises `AdapterError`.

        `check_rank` is told its rank, in which a replaced token counts as one, as soon as that is known. What takes
        longer than reading files calls `go_on` now and then.
        """
        ...

    def advice_for_rank(self, rank: int) -> str:
        """Return how a user gets an adapter of at most `rank` from here, as an error's last words; may be empty."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """An adapter's local folder."""

    path: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def signature(self) -> Hashable:
        """See `AdapterSource`."""
        return file_signature(self.path)

    def read(self, base: ModelConfig, check_rank: CheckRank, go_on: GoOn) -> Adapter:
        """See `AdapterSource`."""
        adapter = read_adapter(self.path, base)
        check_rank(max(adapter.max_rank, vocab_ranks(adapter)))
        return adapter

    def advice_for_rank(self, rank: int) -> str:
        """See `AdapterSource`."""
        return ""


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """The adapters of several folders, and how they become one."""

    folders: tuple[FolderSource, ...]
    weights: tuple[float, ...]
    options: MergeOptions

    def __str__(self) -> str:
        """Return which folders are merged."""
        return f"the merge of {' and '.join(map(str, self.folders))}"

    def signature(self) -> Hashable:
        """See `AdapterSource`."""
        return tuple(folder.signature() for folder in self.folders)

    def read(self, base: ModelConfig, check_rank: CheckRank, go_on: GoOn) -> Adapter:
        """See `AdapterSource`; what cannot be merged is an `AdapterError` too. The rank is checked before the merge."""
        read = {folder: read_adapter(folder.path, base) for folder in dict.fromkeys(self.folders)}
        adapters = [read[folder] for folder in self.folders]
        check_rank(merged_rank(adapters, self.options))
        return merge_adapters(adapters, self.weights, self.options, go_on=go_on).adapter

    def advice_for_rank(self, rank: int) -> str:
        """See `AdapterSource`."""
        return f", or merge with MergeOptions(rank={rank}), which cuts it"


class HubFolders:
    """The folders of adapters from the hub, which is asked once for each: an answer takes a network's time."""

    def __init__(self, token: str | bool | None = None) -> None:
        """`token` is the hub's."""
        self._token = token
        self._folders: dict[tuple[str, str | None, str | None], Path] = {}

    def folder(self, request: LoRARequest, *, ask: bool) -> Path:
        """Return an adapter's local folder, downloaded where it is not cached; `ask` looks for a newer one.

        Raises `AdapterError`, which says what to do.
        """
        key = (request.lora_path, request.revision, request.subfolder)
        found = None if ask else self._folders.get(key)
        if found is not None and found.is_dir():
            return found
        path = resolve_adapter(
            request.lora_path, revision=request.revision, token=self._token, subfolder=request.subfolder
        )
        if not is_local(request.lora_path):
            self._folders[key] = path
        return path

    def forget(self, request: AdapterRequest) -> None:
        """Ask the hub again for the adapters of `request`."""
        for each in request.adapters if isinstance(request, MergedLoRARequest) else (request,):
            self._folders.pop((each.lora_path, each.revision, each.subfolder), None)


def source_of(request: AdapterRequest, hub: HubFolders, *, ask_hub: bool = False) -> AdapterSource:
    """Return where the adapter of `request` comes from; raises `AdapterError`, which says what to do."""
    if isinstance(request, MergedLoRARequest):
        folders = tuple(FolderSource(hub.folder(each, ask=ask_hub)) for each in request.adapters)
        return MergeSource(folders=folders, weights=tuple(request.weights), options=request.options)
    return FolderSource(hub.folder(request, ask=ask_hub))

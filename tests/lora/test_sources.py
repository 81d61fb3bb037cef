"""Where adapters come from: revisions and subfolders of the hub, folders, and merges of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.merge import merge_adapters
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.lora.sources import FolderSource, HubFolders, MergeSource, source_of
from qwen2_jax.models import hub
from qwen2_jax.types import LoRARequest, MergedLoRARequest, MergeOptions
from tests.lora.adapters import base_config, small_tensors, write_adapter


def write(folder: Path, factor: float = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_adapter(folder, {name: np.float32(factor) * array for name, array in small_tensors().items()})


def any_rank(rank: int) -> None:
    """Let every rank pass."""


def read_now(source: MergeSource, base: ModelConfig) -> Adapter:
    return source.read(base, any_rank, lambda: None)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The downloads that were asked for; each revision is a folder of its own, with two adapters."""
    asked: list[tuple[Any, ...]] = []

    def download(name: str, *, revision: str | None, token: Any, allow_patterns: list[str]) -> str:
        asked.append((name, revision, token, allow_patterns))
        for number, subfolder in enumerate(("", "second"), 1):
            write(tmp_path / str(revision) / subfolder, number * len(str(revision)))
        return str(tmp_path / str(revision))

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def test_revision_and_subfolder_reach_the_hub(downloads: list[tuple[Any, ...]], tmp_path: Path) -> None:
    request = LoRARequest("a", 1, "owner/name", revision="v1.2", subfolder="second")
    assert source_of(request, HubFolders("secret")) == FolderSource(tmp_path / "v1.2" / "second")
    assert source_of(LoRARequest("a", 1, "owner/name"), HubFolders()) == FolderSource(tmp_path / "None")
    (name, revision, token, patterns), (_, default, _, _) = downloads
    assert (name, revision, token, default) == ("owner/name", "v1.2", "secret", None)
    assert patterns and all(pattern.startswith("second/") for pattern in patterns)


def test_the_hub_is_asked_once(downloads: list[tuple[Any, ...]], tmp_path: Path) -> None:
    hub_folders, request = HubFolders(), LoRARequest("a", 1, "owner/name", revision="v1")
    merged = MergedLoRARequest("ab", 3, [request], [1])
    for _ in range(3):
        assert source_of(request, hub_folders) == FolderSource(tmp_path / "v1")
        source_of(merged, hub_folders)
    assert len(downloads) == 1
    source_of(request, hub_folders, ask_hub=True)
    hub_folders.forget(merged)
    source_of(request, hub_folders)
    assert len(downloads) == 3


def test_a_merge_resolves_each_of_its_adapters(downloads: list[tuple[Any, ...]], tmp_path: Path) -> None:
    local = write(tmp_path / "local" / "inner").parent
    adapters = [LoRARequest("a", 1, "owner/name", revision="v1"), LoRARequest("b", 2, str(local), subfolder="inner")]
    source = source_of(MergedLoRARequest("ab", 3, adapters, [1, 2], MergeOptions(rank=3)), HubFolders())
    folders = (FolderSource(tmp_path / "v1"), FolderSource(local / "inner"))
    assert source == MergeSource(folders=folders, weights=(1, 2), options=MergeOptions(rank=3))
    assert str(source) == f"the merge of {tmp_path / 'v1'} and {local / 'inner'}"


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(AdapterError, match="revision='v1' is for the hub, but"):
        source_of(LoRARequest("a", 1, str(tmp_path), revision="v1"), HubFolders())
    with pytest.raises(AdapterError, match="there is no folder 'absent' for an adapter"):
        source_of(LoRARequest("a", 1, str(tmp_path), subfolder="absent"), HubFolders())


def test_a_merge_reads_what_its_folders_hold_now(tmp_path: Path) -> None:
    base, paths = base_config(), [write(tmp_path / "a"), write(tmp_path / "b", -2)]
    folders = tuple(map(FolderSource, paths))
    source = MergeSource(folders=(*folders, folders[0]), weights=(1.0, 0.5, 0.25), options=MergeOptions())
    before = source.signature(), read_now(source, base).digest
    assert (source.signature(), read_now(source, base).digest) == before
    write(tmp_path / "b", -3)
    assert source.signature() != before[0] and read_now(source, base).digest != before[1]
    read = [read_adapter(path, base) for path in (*paths, paths[0])]
    expected = merge_adapters(read, [1.0, 0.5, 0.25]).adapter
    found = read_now(source, base)
    assert found.digest == expected.digest and found.linear.keys() == expected.linear.keys()
    for module, update in expected.linear.items():
        np.testing.assert_array_equal(found.linear[module].a, update.a)
        np.testing.assert_array_equal(found.linear[module].b, update.b)

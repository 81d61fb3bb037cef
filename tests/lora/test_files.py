"""Folders of adapters: what is missing or refused says so, and the digest is the adapter's identity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.files import read_config, read_entries, resolve_adapter, weights_file
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.lora.tensors import read_weights
from qwen2_jax.models import hub
from tests.lora.adapters import GOLDEN, Q_PROJ, base_config, small_tensors, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def digest_adapter(folder: Path) -> str:
    file = weights_file(folder)
    return read_weights(read_config(folder), file, read_entries(file)).digest


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def in_a_subfolder(folder: Path) -> None:
    (folder / "checkpoint-100").mkdir()
    (folder / CONFIG).rename(folder / "checkpoint-100" / CONFIG)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(CONFIG), f"has no {CONFIG}"),
        (without(WEIGHTS), f"has no {WEIGHTS}; is the download complete"),
        (pickled, "adapter_model.bin is a pickle, which can run code"),
        (cut, f"{WEIGHTS} is not a whole safetensors file"),
        (in_a_subfolder, "pass subfolder='checkpoint-100'"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG} cannot be read as JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG} holds a JSON list, not an object"),
    ],
    ids=["no config", "no weights", "pickle", "half", "subfolder", "not JSON", "not an object"],
)
def test_a_bad_folder_says_what_is_wrong(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    damage(write_adapter(tmp_path))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, base_config())
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "nowhere", base_config())


def test_a_model_is_not_an_adapter() -> None:
    with pytest.raises(AdapterError, match="it is a model, not an adapter"):
        read_adapter(GOLDEN / "tied", base_config("tied"))


def test_a_folder_resolves_to_itself_and_its_subfolder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    assert resolve_adapter(tmp_path) == tmp_path
    assert resolve_adapter(str(tmp_path), subfolder="inner") == tmp_path / "inner"


def test_the_errors_of_the_hub_are_errors_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("reset")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(AdapterError, match=r"'owner/name' cannot be downloaded \(reset\)"):
        resolve_adapter("owner/name")


@pytest.fixture
def digest(tmp_path: Path) -> str:
    return digest_adapter(write_adapter(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3},
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"down_proj": 3, "q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
    ],
)
def test_the_digest_changes_with_a_field_that_counts(fields: dict[str, Any], digest: str, tmp_path: Path) -> None:
    assert digest_adapter(write_adapter(tmp_path, **fields)) != digest


def test_the_digest_changes_with_the_order_of_patterns(tmp_path: Path) -> None:
    first, second = {"q_proj": 3, ".*": 4}, {".*": 4, "q_proj": 3}
    digests = [digest_adapter(write_adapter(tmp_path, alpha_pattern=pattern)) for pattern in (first, second)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("at", [-1, -2000])
def test_the_digest_changes_with_any_byte_of_the_weights(at: int, digest: str, tmp_path: Path) -> None:
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[at] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    assert digest_adapter(tmp_path) != digest


def test_a_changed_byte_of_the_header_changes_the_digest_or_is_an_error(digest: str, tmp_path: Path) -> None:
    content = (tmp_path / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = set[str]()
    for at in range(header):
        (tmp_path / WEIGHTS).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            outcomes.add(digest_adapter(tmp_path))
        except AdapterError:
            outcomes.add("error")
    assert digest not in outcomes and "error" in outcomes and len(outcomes) > 10


def test_the_digest_changes_with_a_tensors_name(digest: str, tmp_path: Path) -> None:
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content.replace(b"base_model", b"base_modem", 1))
    assert digest_adapter(tmp_path) != digest


@pytest.mark.parametrize("change", [lambda content: content[:-100], lambda _: b"", lambda _: b"\x20" + b"\0" * 99])
def test_a_file_that_changes_while_it_is_read_says_so(
    change: Callable[[bytes], bytes], digest: str, tmp_path: Path
) -> None:
    config, file = read_config(tmp_path), weights_file(tmp_path)
    entries = read_entries(file)
    assert read_weights(config, file, entries).digest == digest
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(AdapterError, match="has changed while it was read"):
        read_weights(config, file, entries)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 4.0},
        {"lora_dropout": 0.1, "inference_mode": True, "task_type": "CAUSAL_LM", "peft_version": "0.21.2"},
        {"base_model_name_or_path": "elsewhere", "revision": "v2"},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "layers_to_transform": [0]},
        {"rank_pattern": {}, "alpha_pattern": None, "unknown": None, "use_qalora": False},
    ],
)
def test_the_digest_ignores_what_changes_nothing(fields: dict[str, Any], digest: str, tmp_path: Path) -> None:
    assert digest_adapter(write_adapter(tmp_path, **fields)) == digest


def test_the_adapter_that_is_read_has_the_digest(digest: str, tmp_path: Path) -> None:
    assert read_adapter(tmp_path, base_config()).digest == digest
    np.testing.assert_array_equal(
        read_adapter(tmp_path, base_config()).linear[0, "q_proj"].a, small_tensors()[f"{Q_PROJ}.lora_A.weight"]
    )

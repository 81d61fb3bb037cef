"""Random damage to an adapter's config and to its safetensors file: it is read, or an `AdapterError` comes out."""

import contextlib
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.reader import read_adapter
from tests.lora.adapters import ADAPTERS, base_config
from tests.models.test_fuzz import mutate_bytes, mutate_json

CASES = ("dora_patterns", "tokens_both", "bias_all", "embeddings", "save_both")


def attempt(folder: Path) -> bool:
    """Return whether the adapter can be read; anything but `AdapterError` fails the test."""
    with contextlib.suppress(AdapterError):
        adapter = read_adapter(folder, base_config())
        assert all(np.isfinite(update.scaling) for update in adapter.linear.values())
        return True
    return False


@pytest.fixture(params=enumerate(CASES), ids=CASES)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, random.Random]:
    """A copy of a golden adapter, and a generator of its own."""
    seed, case = request.param
    return shutil.copytree(ADAPTERS / "untied" / case, tmp_path / case), random.Random(seed)


def test_config(damaged: tuple[Path, random.Random]) -> None:
    folder, rng = damaged
    file = folder / "adapter_config.json"
    whole = json.loads(file.read_text())
    read = 0
    for _ in range(50):
        config = whole
        for _ in range(rng.randint(1, 3)):
            config = mutate_json(config, rng)
        text = json.dumps(config)
        if rng.random() < 0.2:
            text = mutate_bytes(text.encode(), rng, within=len(text)).decode("latin-1")
        file.write_text(text)
        read += attempt(folder)
    assert 0 < read < 50


def test_weights(damaged: tuple[Path, random.Random]) -> None:
    folder, rng = damaged
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    failed = 0
    for _ in range(50):
        if rng.random() < 0.5:
            text = json.dumps(mutate_json(header, rng)).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        else:
            file.write_bytes(mutate_bytes(content, rng, within=8 + size))
        failed += not attempt(folder)
    assert failed > 25

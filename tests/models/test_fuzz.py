"""Random damage to a config, to safetensors headers and to GGUF files: only our own errors come out."""

import contextlib
import copy
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import Qwen2JaxError
from qwen2_jax.models.weights import load_weights, open_checkpoint
from scripts.make_tiny_gguf import write_gguf
from scripts.make_tiny_model import make_tiny_model, tiny_config, tiny_tensors

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, "", "yarn",
    "silu", "float16", "bfloat16", [], [1], [[]], ["yarn"], [None, {}], {}, {"type": "yarn"}, {"factor": 2.0},
    {"rope_type": "llama3", "factor": math.nan}, {"rope_type": {}, "type": []}, ["Qwen2Model"], ["LlamaForCausalLM"],
]  # fmt: skip
KEYS = [
    "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "head_dim", "dtype", "embedding_dim", "is_causal", "quantization_config", "num_experts",
]  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return `value` with one random thing in it replaced, removed, added or doubled."""
    value = copy.deepcopy(value)
    here = value
    while isinstance(here, dict | list) and here and rng.random() < 0.6:
        below = rng.choice(list(here.values()) if isinstance(here, dict) else here)
        if not isinstance(below, dict | list) or not below:
            break
        here = below
    if isinstance(here, dict):
        key = rng.choice([*here, rng.choice(KEYS)])
        if key in here and rng.random() < 0.3:
            here[rng.choice([key + "x", key.replace("model.", ""), key.upper()])] = here.pop(key)
        elif key in here and rng.random() < 0.2:
            del here[key]
        else:
            here[key] = rng.choice(VALUES)
    elif isinstance(here, list) and here:
        here[rng.randrange(len(here))] = rng.choice(VALUES)
    return value


def mutate_bytes(content: bytes, rng: random.Random, *, within: int) -> bytes:
    """Return `content` with a few random bytes of its first `within` changed, or cut short, or with a part doubled."""
    damaged = bytearray(content)
    kind = rng.random()
    at = rng.randrange(min(within, len(damaged)))
    if kind < 0.7:
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(within, len(damaged)))] = rng.choice([0, 1, 0x22, 0x7F, 0xFF, rng.randrange(256)])
    elif kind < 0.85:
        del damaged[at:]
    else:
        damaged[at:at] = damaged[at : at + rng.randint(1, 9)]
    return bytes(damaged)


def attempt(path: Path) -> bool:
    """Load `path` whole; return whether it loaded. Anything but `Qwen2JaxError` fails the test."""
    with contextlib.suppress(Qwen2JaxError):
        checkpoint = open_checkpoint(path)
        config = ModelConfig.from_hf(checkpoint.config)
        load_weights(checkpoint, config, dtype=np.float32, put=lambda _, array: array, use_tqdm=False)
        return True
    return False


@pytest.fixture(params=range(5))
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
class TestFuzz:
    """Each of the five seeds makes fifty mutations of the config, fifty of headers and twenty of GGUF files."""

    def test_config(self, tmp_path: Path, rng: random.Random) -> None:
        base = tiny_config(
            rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
        make_tiny_model(tmp_path)
        loaded = 0
        for _ in range(50):
            config = base
            for _ in range(rng.randint(1, 3)):
                config = mutate_json(config, rng)
            text = json.dumps(config)
            if rng.random() < 0.2:
                text = mutate_bytes(text.encode(), rng, within=len(text)).decode("latin-1")
            (tmp_path / "config.json").write_text(text)
            loaded += attempt(tmp_path)
        assert 0 < loaded < 50

    def test_safetensors_header(self, tmp_path: Path, rng: random.Random) -> None:
        file = make_tiny_model(tmp_path) / "model.safetensors"
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
            failed += not attempt(tmp_path)
        assert failed > 25

    def test_gguf(self, tmp_path: Path, rng: random.Random) -> None:
        config = tiny_config()
        content = write_gguf(tmp_path / "whole.gguf", config, tiny_tensors(config)).read_bytes()
        damaged = tmp_path / "damaged.gguf"
        for _ in range(20):
            damaged.write_bytes(mutate_bytes(content, rng, within=2500))
            attempt(damaged)
        damaged.write_bytes(content)
        assert attempt(damaged)

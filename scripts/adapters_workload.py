"""What the measurements of adapters share: engines with random weights, adapters on disk, prompts of random tokens."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax import LLM, LoRARequest, SamplingParams

RANK = 16
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_workload(path: Path) -> Any:
    """Return the module that knows the geometries and writes models and adapters."""
    spec = importlib.util.spec_from_file_location("workload", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start_engine(workload: Any, geometry: str, folder: Path, **options: Any) -> LLM:
    """Start an engine with random weights and adapters of rank 16; `options` are `LLM`'s."""
    workload.write_model(folder / "model", geometry)
    return LLM(
        str(folder / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=RANK,
        **options,
    )


def write_linked_adapters(folder: Path, workload: Any, geometry: str, count: int) -> list[LoRARequest]:
    """Write one adapter, and `count` that share its weights and differ in `lora_alpha`: little disk, many adapters."""
    workload.write_adapter(folder / "shared", geometry, RANK, 0)
    config = json.loads((folder / "shared" / CONFIG).read_text())
    requests = []
    for index in range(count):
        path = folder / str(index)
        path.mkdir()
        (path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 16 + index / 1000}))
        (path / WEIGHTS).symlink_to(folder / "shared" / WEIGHTS)
        requests.append(_request(path, index))
    return requests


def write_separate_adapters(folder: Path, workload: Any, geometry: str, count: int) -> list[LoRARequest]:
    """Write `count` adapters with files of their own, which differ in their last number."""
    workload.write_adapter(folder / "0", geometry, RANK, 0)
    config, weights = ((folder / "0" / name).read_bytes() for name in (CONFIG, WEIGHTS))
    for index in range(1, count):
        path = folder / str(index)
        path.mkdir()
        (path / CONFIG).write_bytes(config)
        (path / WEIGHTS).write_bytes(weights[:-2] + index.to_bytes(2, "little"))
    return [_request(folder / str(index), index) for index in range(count)]


def _request(path: Path, index: int) -> LoRARequest:
    return LoRARequest(f"adapter{index}", index + 1, str(path))


def draw_prompts(rng: np.random.Generator, count: int, length: int) -> list[Any]:
    """Return prompts of `length` random tokens."""
    return [{"prompt_token_ids": rng.integers(1000, 90000, length).tolist()} for _ in range(count)]


def greedy(new_tokens: int, **options: Any) -> SamplingParams:
    """Return parameters for exactly `new_tokens`, the likeliest each; `options` are `SamplingParams`'."""
    return SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.0, detokenize=False, **options)


def generate(llm: LLM, prompts: Sequence[Any], adapters: Sequence[LoRARequest | None], new_tokens: int) -> None:
    """Generate `new_tokens` for each prompt, with its adapter."""
    llm.generate(list(prompts), greedy(new_tokens), lora_request=list(adapters), use_tqdm=False)

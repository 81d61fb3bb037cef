"""The golden adapters, and small adapters with something changed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # bfloat16 for safetensors
import numpy as np
from safetensors.numpy import load_file, save_file

from qwen2_jax.config import ModelConfig

GOLDEN = Path(__file__).parent.parent / "golden"
ADAPTERS = GOLDEN / "adapters"
CASES = sorted(str(path.parent.relative_to(ADAPTERS)) for path in ADAPTERS.glob("*/*/golden.npz"))
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN_PROJ = "base_model.model.model.layers.2.mlp.down_proj"


def base_config(base: str = "untied", **overrides: Any) -> ModelConfig:
    """Return the config of a golden checkpoint: hidden 64, inner 96, 3 layers, vocabulary 384."""
    content = json.loads((GOLDEN / base / "config.json").read_text())
    return ModelConfig.from_hf(content, hf_overrides=overrides)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of an adapter's or a checkpoint's single file."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def small_tensors() -> dict[str, np.ndarray]:
    """Return an adapter of rank 2 for two projections."""
    rng = np.random.default_rng(0)
    shapes = {
        f"{Q_PROJ}.lora_A.weight": (2, 64),
        f"{Q_PROJ}.lora_B.weight": (64, 2),
        f"{DOWN_PROJ}.lora_A.weight": (2, 96),
        f"{DOWN_PROJ}.lora_B.weight": (64, 2),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray | None] | None = None, **fields: Any) -> Path:
    """Write `small_tensors` with the changes of `tensors` (None removes one), and a config with `fields`."""
    changed = {name: array for name, array in (small_tensors() | dict(tensors or {})).items() if array is not None}
    save_file(changed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Return zeros of `shape`."""
    return np.zeros(shape, dtype)

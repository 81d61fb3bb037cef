"""Random adapters for the golden base, and what is computed from them in float64."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.targets import targets
from tests.lora.adapters import base_config

TARGETS = targets(base_config())


def low_rank(rng: np.random.Generator, name: str, rank: int, **fields: Any) -> LowRank:
    """Return a random update of the projection `name`."""
    target = TARGETS[name]
    arrays: dict[str, Any] = {
        "a": rng.standard_normal((rank, target.in_features), dtype=np.float32),
        "b": rng.standard_normal((target.out_features, rank), dtype=np.float32),
    }
    return LowRank(**(arrays | {"scaling": 0.5, "bias": None, "magnitude": None} | fields))


def make_adapter(seed: int, ranks: Mapping[tuple[int, str], int], **fields: Any) -> Adapter:
    """Return an adapter with random updates of the given ranks; its digest is its seed."""
    rng = np.random.default_rng(seed)
    linear = {module: low_rank(rng, module[1], rank) for module, rank in ranks.items()}
    nothing = Adapter(
        linear=linear,
        embed_tokens=None,
        lm_head=None,
        biases={},
        full_embed_tokens=None,
        full_lm_head=None,
        embed_token_rows=None,
        lm_head_token_rows=None,
        digest=str(seed),
    )
    return replace(nothing, **fields)


def product(update: LowRank | None) -> np.ndarray:
    """Return the update's `scaling * b @ a` in float64."""
    assert update is not None
    return update.scaling * update.b.astype(np.float64) @ update.a.astype(np.float64)

"""What `test_on_gpu.py` runs of sampling: rows of 7B's vocabulary, some of which ask for nothing."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import (
    gumbel_argmax,
    token_ranks,
    top_k_threshold,
    top_k_top_p_threshold,
    top_logits,
    top_p_threshold,
)
from qwen2_kernels.gumbel_argmax.api import IMPLEMENTATIONS as GUMBEL
from qwen2_kernels.specs import QWEN2_5
from qwen2_kernels.thresholds.api import BOTH_IMPLEMENTATIONS, TOP_K_IMPLEMENTATIONS, TOP_P_IMPLEMENTATIONS
from qwen2_kernels.token_ranks.api import IMPLEMENTATIONS as RANKS
from qwen2_kernels.top_logits.api import IMPLEMENTATIONS as TOP

from tests.kernels.gpu_case import MAX_SEEDS, GpuCase, normal

SIZE = QWEN2_5["7b"].vocab_size
COLUMNS = 129
"""Tokens whose ranks a row may ask for."""


def sampling_cases() -> Iterator[GpuCase]:
    """Each op for one row and for several."""
    make_k, make_p = partial(_cut, jnp.int32, 1, 5000, 0), partial(_cut, jnp.float32, 0.05, 0.95, 1)
    for rows in (1, 33):
        for op, run, implementations, make, tolerance in (
            ("top_k_threshold", top_k_threshold, TOP_K_IMPLEMENTATIONS, make_k, 1e-6),
            ("top_p_threshold", top_p_threshold, TOP_P_IMPLEMENTATIONS, make_p, 0.003),
            ("top_k_top_p_threshold", top_k_top_p_threshold, BOTH_IMPLEMENTATIONS, _cut_twice, 0.003),
            ("gumbel_argmax", gumbel_argmax, GUMBEL, _drawn, 0.0),
            ("token_ranks", token_ranks, RANKS, _ranked, 0.0),
            ("top_logits", partial(top_logits, count=20), TOP, _listed, 1e-5),
        ):
            for implementation in sorted(implementations.keys() - {"reference"}):
                yield GpuCase(
                    op=op,
                    implementation=implementation,
                    label=f"{rows}",
                    run=run,
                    make=partial(make, rows),
                    seeds=MAX_SEEDS,
                    tolerance=tolerance,
                )


def _logits(rows: int, seed: int) -> Array:
    """Normal ones, a third of which are cut already; what is likely is dense, so that neighbours are close."""
    logits = normal(seed, (rows, SIZE), 3.0, jnp.float32)
    return jnp.where(logits < -1, -jnp.inf, logits)


def _cut(dtype: Any, low: float, high: float, nothing: int, rows: int, seed: int) -> tuple[Array, ...]:
    """What a threshold is asked for; every fourth row asks for `nothing` and holds NaN."""
    logits, temperature = _logits(rows, seed), jnp.linspace(0.7, 1.5, rows)
    is_padding = jnp.arange(rows) % 4 == 3
    asked = jnp.where(is_padding, nothing, jnp.linspace(low, high, rows)).astype(dtype)
    floor = jnp.where(jnp.arange(rows) % 2 == 1, logits.max(axis=-1) / temperature - 8, -jnp.inf)
    return jnp.where(is_padding[:, None], jnp.nan, logits), asked, temperature, floor


def _cut_twice(rows: int, seed: int) -> tuple[Array, ...]:
    """Rows that keep few tokens and rows that keep many; of some, top-p or top-k asks for nothing."""
    logits, p, temperature, floor = _cut(jnp.float32, 0.05, 0.95, 1, rows, seed)
    k = jnp.asarray(np.resize([20, 0, 5000, 0, 50, 64, 1], rows), jnp.int32)
    k = jnp.where(jnp.arange(rows) % 4 == 3, 0, k)
    return logits, k, p.at[::5].set(1), temperature, floor


def _drawn(rows: int, seed: int) -> tuple[Array, ...]:
    """Greedy rows, rows that keep all, and rows of which a threshold leaves few; two tokens are equally likely."""
    logits, temperature = _logits(rows, seed), jnp.linspace(0.7, 1.5, rows)
    logits = logits.at[:, 7].set(logits.max(axis=-1))
    threshold = jnp.where(jnp.arange(rows) % 2 == 1, logits.max(axis=-1) / temperature - 2, -jnp.inf)
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (3, rows)).astype(np.int32)
    temperature = jnp.where(jnp.arange(rows) % 3 == 2, 0.0, temperature)
    return logits, temperature, threshold, *(jnp.asarray(array) for array in words)


def _ranked(rows: int, seed: int) -> tuple[Array, ...]:
    """Tokens of every rank; some rows ask for one, some for none."""
    logits = _logits(rows, seed)
    tokens = np.random.default_rng(seed).integers(0, SIZE, (rows, COLUMNS)).astype(np.int32)
    tokens[1::3, 1:] = -1
    tokens[2::3] = -1
    return logits, jnp.asarray(tokens)


def _listed(rows: int, seed: int) -> tuple[Array, ...]:
    """Rows with ties, which are in order; some rows are not wanted."""
    return jnp.round(_logits(rows, seed), 2), jnp.arange(rows) % 5 != 4

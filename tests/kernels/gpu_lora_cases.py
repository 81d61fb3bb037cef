"""What `test_lora_on_gpu.py` runs: the ops of `lora` at Qwen2.5's sizes, for steps of many adapters."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels.lora import api, linear_gated
from qwen2_kernels.lora.batch import (
    DOWN_PROJECTION,
    GATE_UP_PROJECTION,
    O_PROJECTION,
    RANKS,
    LoRAProjection,
    qkv_projection,
)
from qwen2_kernels.lora.segments import PageUse
from qwen2_kernels.specs import QWEN2_5, Geometry

from tests.kernels.gpu_case import GpuCase, normal, tokens_with_nan
from tests.kernels.lora_steps import ALL, StepSpec, column_modules, make_batch, make_groups, place_adapters

lora_delta: Any = api.lora_delta
lora_gated: Any = api.lora_gated
lora_linear_gated: Any = linear_gated.lora_linear_gated
ADAPTERS = StepSpec(
    token_groups=(),
    ranks=(8, 16, 40, 64, 16, 8),
    modules=(ALL, ALL, 0b0101101, ALL, 0b1010010, ALL),
)
"""Of a step; one has no key, gate and down projection, another only those."""
GATED_TOLERANCE = 0.15
"""Up and the activated gate each carry what rounding 64 ranks to bfloat16 leaves, about 0.002 of a deviation, and
multiply each other's, up to nine deviations large: one element in 100,000 is off by more than 0.03."""
SHAPES = (
    *(("7b", "qkv", tokens) for tokens in (1, 33, 2048)),
    *(("7b", "o", tokens) for tokens in (3, 200)),
    *(("7b", "gate_up", tokens) for tokens in (1, 33, 2048)),
    *(("7b", "down", tokens) for tokens in (3, 33)),
    *(("0.5b", "qkv", tokens) for tokens in (3, 200)),
    ("0.5b", "o", 33),
    *(("0.5b", "gate_up", tokens) for tokens in (1, 200)),
    ("0.5b", "down", 2048),
)
"""Geometry, projection and tokens: each projection with one token, a few, a decode step and a prefill among them."""


def lora_cases(shapes: tuple[tuple[str, str, int], ...] = SHAPES) -> Iterator[GpuCase]:
    """Return every implementation at every shape."""
    for model, name, tokens in shapes:
        geometry = QWEN2_5[model]
        projection = projection_of(geometry, name)
        for implementation in sorted(api.DELTA_IMPLEMENTATIONS.keys() - {"reference"}):
            yield GpuCase(
                op="lora",
                implementation=implementation,
                label=f"{model}_{name}_{tokens}",
                run=_run_gated if name == "gate_up" else partial(_run_delta, projection),
                make=partial(_lora_arrays, projection, geometry.projections[name], tokens),
                seeds=2,
                tolerance=GATED_TOLERANCE if name == "gate_up" else 0.03,
            )


def fused_cases(shapes: tuple[tuple[str, int], ...] = (("7b", 2048), ("7b", 512), ("0.5b", 8192))) -> Iterator[GpuCase]:
    """Return gated projections with adapters, of geometries and numbers of tokens."""
    for model, tokens in shapes:
        for implementation in ("mosaic", "separate"):
            yield GpuCase(
                op="lora_linear_gated",
                implementation=implementation,
                label=f"{model}_{tokens}",
                run=partial(lora_linear_gated, activation="silu"),
                make=partial(_fused_arrays, QWEN2_5[model].projections["gate_up"], tokens),
                seeds=2,
                tolerance=GATED_TOLERANCE,
            )
            yield GpuCase(
                op="lora_linear_gated",
                implementation=implementation,
                label=f"{model}_{tokens}_a_third",
                run=partial(_run_fused, tokens // 3),
                make=partial(_fused_arrays, QWEN2_5[model].projections["gate_up"], tokens),
                tolerance=GATED_TOLERANCE,
            )


def projection_of(geometry: Geometry, name: str) -> LoRAProjection:
    """Return what a model's projection called `name` is to the ops."""
    qkv = qkv_projection(geometry.group, geometry.head_dim)
    return {"qkv": qkv, "o": O_PROJECTION, "gate_up": GATE_UP_PROJECTION, "down": DOWN_PROJECTION}[name]


def _run_delta(projection: LoRAProjection, *arrays: Any, **options: Any) -> Array:
    x, a_bank, b_bank, bias_bank, batch = arrays
    return lora_delta(x, a_bank, b_bank, batch, projection=projection, bias_bank=bias_bank, **options)


def _run_fused(some: int, *arrays: Any, **options: Any) -> Array:
    return lora_linear_gated(*arrays, activation="silu", num_tokens=jnp.int32(some), **options)[:some]


def _run_gated(*arrays: Any, **options: Any) -> Array:
    x, base, a_bank, b_bank, bias_bank, scale_bank, batch = arrays
    banks = {"bias_bank": bias_bank, "scale_bank": scale_bank}
    return lora_gated(x, base, a_bank, b_bank, batch, activation="silu", **banks, **options)


def _lora_arrays(projection: LoRAProjection, kernel: tuple[int, ...], tokens: int, seed: int) -> tuple[Any, ...]:
    """Draw a step: a token of NaN, and NaN in pages and vectors that no token uses."""
    *columns, size = kernel
    rng = np.random.default_rng(seed)
    token_groups = rng.integers(-1, len(ADAPTERS.ranks), tokens)
    token_groups[0] = 3 - seed  # a single one has an adapter, too
    spec = replace(ADAPTERS, token_groups=tuple(token_groups.tolist()))
    uses = place_adapters(spec, rng)
    groups = make_groups(spec, uses)
    a_mask, b_mask = _masks(spec, projection, columns, uses)
    a_bank = normal(seed + 1, (*a_mask.shape, size), size**-0.5) * a_mask[..., None]
    b_bank = normal(seed + 2, b_mask.shape, RANKS**-0.5) * b_mask
    vectors = np.full((len(groups) + 2, *columns), np.nan, np.float32)
    used = [group.vector for group in groups if group.vector >= 0]
    vectors[used] = rng.uniform(0.5, 2, (len(used), *columns))
    x = tokens_with_nan(seed + 3, tokens, size)
    batch = make_batch(token_groups, groups, tile=None)
    bias_bank = jnp.asarray(vectors)
    if projection is not GATE_UP_PROJECTION:
        return x, a_bank, b_bank, bias_bank, batch
    return x, normal(seed + 4, (tokens, *columns)), a_bank, b_bank, bias_bank, bias_bank[:, ::-1], batch


def _fused_arrays(kernel: tuple[int, ...], tokens: int, seed: int) -> tuple[Any, ...]:
    """Draw a step in which rows of some tokens have an adapter or none."""
    x, _, a_bank, b_bank, _, _, batch = _lora_arrays(GATE_UP_PROJECTION, kernel, tokens, seed)
    return x, normal(seed + 5, kernel, kernel[-1] ** -0.5), a_bank, b_bank, batch


def _masks(
    spec: StepSpec, projection: LoRAProjection, columns: list[int], uses: list[list[PageUse]]
) -> tuple[Array, Array]:
    """Return [P, C, RANKS] and [P, RANKS, *N]: 1 where an adapter has values, 0 in the rest of its pages, else NaN."""
    modules = column_modules(projection, int(np.prod(columns)))
    a_mask = np.full((spec.num_pages, len(projection.modules), RANKS), np.nan, np.float32)
    b_mask = np.full((spec.num_pages, RANKS, len(modules)), np.nan, np.float32)
    for rank, pages in zip(spec.ranks, uses, strict=True):
        for index, use in enumerate(pages):
            has_rank = np.arange(RANKS) < rank - index * RANKS
            a_mask[use.page] = np.array([[use.modules >> module & 1] for module in projection.modules]) * has_rank
            b_mask[use.page] = has_rank[:, None] * (use.modules >> modules & 1)
    banks = a_mask, b_mask.reshape(*b_mask.shape[:2], *columns)
    masks = tuple(jnp.asarray(mask, jnp.bfloat16) for mask in banks)
    return masks[0], masks[1]

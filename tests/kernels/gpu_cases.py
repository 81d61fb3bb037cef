"""What `test_on_gpu.py` and `test_linear_on_gpu.py` run: ops at Qwen2.5's sizes, with NaN in what may not be read."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import (
    Adapted,
    flash_attention,
    linear,
    norm_linear,
    paged_attention,
    rms_norm,
    write_kv,
)
from qwen2_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH
from qwen2_kernels.linear.api import IMPLEMENTATIONS as LINEAR
from qwen2_kernels.norm_linear.api import IMPLEMENTATIONS as NORM_LINEAR
from qwen2_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED
from qwen2_kernels.rms_norm.api import IMPLEMENTATIONS as RMS_NORM
from qwen2_kernels.specs import QWEN2_5, Geometry, RaggedSpec, Row
from qwen2_kernels.write_kv.api import IMPLEMENTATIONS as WRITE_KV

from tests.kernels.gpu_case import MAX_SEEDS, GpuCase, normal, tokens_with_nan
from tests.kernels.ragged import Ragged, make_ragged, random_rows

BF16, FP16, E4M3 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn
SCALE = 0.03
"""Of pools in 8 bits: normal values lie in the middle of e4m3's range."""
EPS = 1e-6


def attention_cases() -> list[GpuCase]:
    """Return the cases of attention."""
    return [*_flash_cases(), *_paged_cases()]


def elementwise_cases() -> list[GpuCase]:
    """Return those of what stands between products and attention, with and without adapters."""
    return [*_rms_norm_cases(), *_write_kv_cases()]


def product_cases() -> list[GpuCase]:
    """Return those of products with the model's own kernels."""
    return [*_linear_cases(), *_norm_linear_cases()]


def _spec(kind: str, head_dim: int) -> RaggedSpec:
    is_decode = kind == "decode"
    return RaggedSpec(
        name=f"{kind}_{head_dim}",
        num_tokens=24 if is_decode else 512,
        num_rows=24 if is_decode else 7,
        max_context=1024,
        batches=(),
        group=7,
        head_dim=head_dim,
        block_size=64,
        is_decode=is_decode,
        window=150 if kind in ("window", "decode_window") else None,
        causal=kind != "bidirectional",
    )


def _options(spec: RaggedSpec) -> dict[str, Any]:
    return {"scale": spec.head_dim**-0.5, "window": spec.window, "causal": spec.causal}


def _paged_cases() -> Iterator[GpuCase]:
    for kind, head_dim, (dtype, pool) in product(
        ("decode", "mixed", "window", "bidirectional"), (64, 128), ((BF16, BF16), (BF16, E4M3), (FP16, FP16))
    ):
        if dtype == FP16 and kind != "mixed":
            continue
        spec = _spec(kind, head_dim)
        scale = SCALE if pool == E4M3 else 1.0
        for implementation in PAGED.keys() - {"reference"}:
            yield GpuCase(
                op="paged_attention",
                implementation=implementation,
                label=f"{spec.name}-{jnp.dtype(dtype).name}-{jnp.dtype(pool).name}",
                run=partial(paged_attention, **_options(spec), k_scale=scale, v_scale=scale),
                make=partial(_paged_arrays, spec, dtype, pool, scale),
                seeds=MAX_SEEDS,
            )


def _paged_arrays(spec: RaggedSpec, dtype: Any, pool: Any, scale: float, seed: int) -> tuple[Any, ...]:
    batch = make_ragged(spec, random_rows(spec, seed), seed)
    pools = (jnp.asarray(array / scale, pool) for array in (batch.k_pool, batch.v_pool))
    starts = () if spec.is_decode else (jnp.asarray(batch.query_start_loc),)
    tables, lengths = jnp.asarray(batch.block_tables), jnp.asarray(batch.context_lens)
    return jnp.asarray(batch.q, dtype), *pools, tables, lengths, *starts


def _flash_cases() -> Iterator[GpuCase]:
    for kind, head_dim in product(("mixed", "window", "bidirectional"), (64, 128)):
        spec = _spec(kind, head_dim)
        for implementation in FLASH.keys() - {"reference"}:
            yield GpuCase(
                op="flash_attention",
                implementation=implementation,
                label=spec.name,
                run=partial(flash_attention, **_options(spec)),
                make=partial(_flash_arrays, spec),
                seeds=MAX_SEEDS,
            )


def _flash_arrays(spec: RaggedSpec, seed: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, spec.num_tokens + 1, spec.num_rows))
    rows: tuple[Row, ...] = tuple((int(n), int(n)) for n in np.diff(cuts))
    batch = make_ragged(spec, rows, seed)
    k, v = (flat(batch, arrays) for arrays in (batch.keys, batch.values))
    return *(jnp.asarray(array, BF16) for array in (batch.q, k, v)), jnp.asarray(batch.query_start_loc)


def flat(batch: Ragged, rows: list[np.ndarray]) -> np.ndarray:
    """The rows behind one another on T, and NaN for the padding."""
    out = np.full((*batch.q.shape[:2], batch.spec.head_dim), np.nan, np.float32)
    for start, tokens in zip(batch.query_start_loc, rows, strict=False):
        out[start : start + len(tokens)] = tokens
    return out


def _linear_cases() -> Iterator[GpuCase]:
    shapes = [("0.5b", name, tokens) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 3, 33, 100, 256)]
    shapes += [("0.5b", "lm_head", tokens) for tokens in (1, 33)]
    shapes += [("7b", "down", 2048), ("0.5b", "gate_up", 2047), ("7b", "gate_up", 1025), ("7b", "gate_up", 8000)]
    shapes += [("7b", name, 33) for name in ("qkv", "o", "gate_up", "down")]
    for (model, name, tokens), implementation in product(shapes, sorted(LINEAR.keys() - {"reference"})):
        kernel = QWEN2_5[model].projections[name]

        def make(
            seed: int, name: str = name, tokens: int = tokens, kernel: tuple[int, ...] = kernel
        ) -> tuple[Array | None, ...]:
            return (
                tokens_with_nan(seed, tokens, kernel[-1]),
                normal(seed + 1, kernel, kernel[-1] ** -0.5),
                normal(seed + 2, kernel[-2:-1]) if name == "qkv" else None,
                normal(seed + 3, (tokens, kernel[-2])) if name == "o" else None,
            )

        def run(x: Array, kernel: Array, bias: Any, residual: Any, name: str = name, **options: Any) -> Array:
            activation = "silu" if name == "gate_up" else None
            out_dtype = jnp.dtype(jnp.float32 if name == "lm_head" else BF16)
            return linear(
                x, kernel, bias=bias, residual=residual, activation=activation, out_dtype=out_dtype, **options
            )

        label = f"{model}_{name}_{tokens}"
        yield GpuCase(op="linear", implementation=implementation, label=label, run=run, make=make)
        if tokens >= 1024:

            def run_some(*arrays: Any, run: Any = run, some: int = tokens // 3, **options: Any) -> Array:
                return run(*arrays, num_tokens=jnp.int32(some), **options)[:some]

            label += "_a_third"
            yield GpuCase(op="linear", implementation=implementation, label=label, run=run_some, make=make)


def _norm_linear_cases() -> Iterator[GpuCase]:
    for model, name in product(("0.5b", "7b"), ("qkv", "gate_up")):
        kernel = QWEN2_5[model].projections[name]

        def make(seed: int, kernel: tuple[int, ...] = kernel) -> tuple[Array, ...]:
            token, residual = (normal(seed + i, (1, kernel[-1])) for i in range(2))
            return token, normal(seed + 2, kernel[-1:]), normal(seed + 3, kernel, kernel[-1] ** -0.5), residual

        run = partial(norm_linear, eps=EPS, activation="silu" if name == "gate_up" else None)
        for implementation in NORM_LINEAR.keys() - {"reference"}:
            label = f"{model}_{name}"
            yield GpuCase(op="norm_linear", implementation=implementation, label=label, run=run, make=make)


def _rms_norm_cases() -> Iterator[GpuCase]:
    shapes = [(model, tokens, False) for model, tokens in product(("0.5b", "7b"), (1, 33, 2048))]
    for model, tokens, is_adapted in [*shapes, ("0.5b", 1, True), ("7b", 33, True), ("7b", 2048, True)]:
        size = QWEN2_5[model].hidden_size

        def make(seed: int, tokens: int = tokens, size: int = size, is_adapted: bool = is_adapted) -> tuple[Any, ...]:
            x, residual = tokens_with_nan(seed, tokens, size), normal(seed + 2, (tokens, size))
            adapted = _adapted(seed + 3, (tokens, size)) if is_adapted else None
            return x, normal(seed + 1, (size,)), residual, adapted

        def run(x: Array, weight: Array, residual: Array, adapted: Adapted | None, **options: Any) -> Any:
            return rms_norm(x, weight, residual, adapted=adapted, eps=EPS, **options)

        for implementation in RMS_NORM.keys() - {"reference"}:
            yield GpuCase(
                op="rms_norm",
                implementation=implementation,
                label=f"{model}_{tokens}" + "_adapted" * is_adapted,
                run=run,
                make=make,
                tolerance=0.01,
            )


def _adapted(seed: int, shape: tuple[int, ...]) -> Adapted:
    """A change of a result of `shape`: some tokens are scaled; a row that none names is NaN, and so is a delta."""
    bank = np.random.default_rng(seed).uniform(0.5, 2, (4, *shape[1:])).astype(np.float32)
    rows = np.random.default_rng(seed + 1).integers(-1, 3, shape[0]).astype(np.int32)
    rows[0], bank[3] = 2, np.nan
    delta = np.array(normal(seed + 2, shape))
    delta[shape[0] // 2 : shape[0] // 2 + (shape[0] > 1)] = np.nan  # where `tokens_with_nan` has it too
    return Adapted(delta=jnp.asarray(delta), scale_bank=jnp.asarray(bank), scale_rows=jnp.asarray(rows))


def _write_kv_cases() -> Iterator[GpuCase]:
    shapes = [(*shape, False) for shape in product(("0.5b", "7b"), (1, 33, 2048), (BF16, E4M3))]
    for model, tokens, pool, is_adapted in [
        *shapes,
        ("0.5b", 1, BF16, True),
        ("7b", 33, BF16, True),
        ("7b", 2048, E4M3, True),
    ]:
        geometry = QWEN2_5[model]
        scale = SCALE if pool == E4M3 else 1.0

        def run(*arrays: Any, scale: float = scale, **options: Any) -> Any:
            *given, bias, adapted = arrays
            return write_kv(*given, bias=bias, adapted=adapted, k_scale=scale, v_scale=scale, **options)

        for implementation in WRITE_KV.keys() - {"reference"}:
            yield GpuCase(
                op="write_kv",
                implementation=implementation,
                label=f"{model}_{tokens}_{jnp.dtype(pool).name}" + "_adapted" * is_adapted,
                run=run,
                make=partial(_write_kv_arrays, geometry, tokens, pool, is_adapted),
                tolerance=0.13 if pool == E4M3 else 0.01,  # a value between two of e4m3's may become either
            )


def _write_kv_arrays(geometry: Geometry, tokens: int, pool: Any, is_adapted: bool, seed: int) -> tuple[Any, ...]:
    kv_heads, group, head_dim = geometry.num_key_value_heads, geometry.group, geometry.head_dim
    rng = np.random.default_rng(seed)
    slots = rng.permutation(48 * 64)[:tokens].astype(np.int32)
    slots[tokens // 2 :: 7] = -1 if tokens > 1 else slots[0]
    qkv = np.array(normal(seed, (tokens, kv_heads, group + 2, head_dim)))
    qkv[slots < 0] = np.nan  # padding
    angles = rng.uniform(0, 6.3, (tokens, head_dim // 2)).astype(np.float32)
    pools = (jnp.zeros((48, 64, kv_heads, head_dim), pool) for _ in range(2))
    bias = normal(seed + 1, qkv.shape[1:])
    adapted = _adapted(seed + 2, qkv.shape) if is_adapted else None
    return jnp.asarray(qkv), np.cos(angles), np.sin(angles), *pools, slots, bias, adapted

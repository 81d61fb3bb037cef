"""What `test_on_gpu.py` runs: each op at Qwen2.5's sizes, in the dtypes it serves, with NaN in what may not be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from qwen2_kernels import flash_attention, linear, norm_linear, paged_attention, rms_norm, write_kv
from qwen2_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH
from qwen2_kernels.linear.api import IMPLEMENTATIONS as LINEAR
from qwen2_kernels.norm_linear.api import IMPLEMENTATIONS as NORM_LINEAR
from qwen2_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED
from qwen2_kernels.rms_norm.api import IMPLEMENTATIONS as RMS_NORM
from qwen2_kernels.specs import QWEN2_5, RaggedSpec, Row
from qwen2_kernels.write_kv.api import IMPLEMENTATIONS as WRITE_KV

from tests.kernels.ragged import Ragged, make_ragged, random_rows

BF16, FP16, E4M3 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn
SCALE = 0.03
"""Of pools in 8 bits: normal values lie in the middle of e4m3's range."""
EPS = 1e-6
BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class GpuCase:
    """An op that is compiled once and runs on several inputs."""

    op: str
    implementation: str
    label: str
    run: Callable[..., Any]
    """The op without its implementation."""
    make: Callable[[int], tuple[Any, ...]]
    """Draws the op's arrays from a seed; their shapes are always the same."""
    seeds: int = 1
    tolerance: float = 0.03
    """Absolute, and relative to values above 1."""

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.op}-{self.implementation}-{self.label}"


def gpu_cases() -> list[GpuCase]:
    """Return all of them, those that take longest to compile first."""
    cases = [*_flash_cases(), *_paged_cases(), *_linear_cases(), *_norm_linear_cases(), *_rms_norm_cases()]
    return sorted([*cases, *_write_kv_cases()], key=lambda case: case.implementation != "mosaic")


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
                seeds=BATCHES,
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
                seeds=BATCHES,
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


def _normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = BF16) -> Array:
    """Normal numbers; the same million after another in large arrays, whose axes it does not divide."""
    numbers = scale * np.random.default_rng(seed).standard_normal(997 * 1009, np.float32)
    return jnp.asarray(np.resize(numbers, shape), dtype)


def _tokens(seed: int, tokens: int, size: int) -> Array:
    """Tokens, one of which is NaN where there are several."""
    x = _normal(seed, (tokens, size))
    return x.at[tokens // 2].set(jnp.nan) if tokens > 1 else x


def _linear_cases() -> Iterator[GpuCase]:
    shapes = [("0.5b", name, tokens) for name in ("qkv", "o", "gate_up", "down") for tokens in (1, 3, 33, 100, 256)]
    shapes += [("0.5b", "lm_head", tokens) for tokens in (1, 33)]
    shapes += [("0.5b", "gate_up", 2047), ("7b", "gate_up", 1025), ("7b", "gate_up", 8000)]
    shapes += [("7b", name, 33) for name in ("qkv", "o", "gate_up", "down")]
    for (model, name, tokens), implementation in product(shapes, sorted(LINEAR.keys() - {"reference"})):
        kernel = QWEN2_5[model].projections[name]

        def make(
            seed: int, name: str = name, tokens: int = tokens, kernel: tuple[int, ...] = kernel
        ) -> tuple[Array | None, ...]:
            return (
                _tokens(seed, tokens, kernel[-1]),
                _normal(seed + 1, kernel, kernel[-1] ** -0.5),
                _normal(seed + 2, kernel[-2:-1]) if name == "qkv" else None,
                _normal(seed + 3, (tokens, kernel[-2])) if name == "o" else None,
            )

        def run(x: Array, kernel: Array, bias: Any, residual: Any, name: str = name, **options: Any) -> Array:
            activation = "silu" if name == "gate_up" else None
            out_dtype = jnp.dtype(jnp.float32 if name == "lm_head" else BF16)
            return linear(
                x, kernel, bias=bias, residual=residual, activation=activation, out_dtype=out_dtype, **options
            )

        label = f"{model}_{name}_{tokens}"
        yield GpuCase(op="linear", implementation=implementation, label=label, run=run, make=make)


def _norm_linear_cases() -> Iterator[GpuCase]:
    for model, name in product(("0.5b", "7b"), ("qkv", "gate_up")):
        kernel = QWEN2_5[model].projections[name]

        def make(seed: int, kernel: tuple[int, ...] = kernel) -> tuple[Array, ...]:
            token, residual = (_normal(seed + i, (1, kernel[-1])) for i in range(2))
            return token, _normal(seed + 2, kernel[-1:]), _normal(seed + 3, kernel, kernel[-1] ** -0.5), residual

        run = partial(norm_linear, eps=EPS, activation="silu" if name == "gate_up" else None)
        for implementation in NORM_LINEAR.keys() - {"reference"}:
            label = f"{model}_{name}"
            yield GpuCase(op="norm_linear", implementation=implementation, label=label, run=run, make=make)


def _rms_norm_cases() -> Iterator[GpuCase]:
    for model, tokens in product(("0.5b", "7b"), (1, 33, 2048)):
        size = QWEN2_5[model].hidden_size

        def make(seed: int, tokens: int = tokens, size: int = size) -> tuple[Array, ...]:
            return _tokens(seed, tokens, size), _normal(seed + 1, (size,)), _normal(seed + 2, (tokens, size))

        for implementation in RMS_NORM.keys() - {"reference"}:
            yield GpuCase(
                op="rms_norm",
                implementation=implementation,
                label=f"{model}_{tokens}",
                run=partial(rms_norm, eps=EPS),
                make=make,
                tolerance=0.01,
            )


def _write_kv_cases() -> Iterator[GpuCase]:
    for model, tokens, pool in product(("0.5b", "7b"), (1, 33, 2048), (BF16, E4M3)):
        geometry = QWEN2_5[model]
        kv_heads, group, head_dim = geometry.num_key_value_heads, geometry.group, geometry.head_dim
        scale = SCALE if pool == E4M3 else 1.0

        def make(seed: int, tokens: int = tokens, pool: Any = pool, heads: Any = (kv_heads, group, head_dim)) -> Any:
            kv_heads, group, head_dim = heads
            rng = np.random.default_rng(seed)
            slots = rng.permutation(48 * 64)[:tokens].astype(np.int32)
            slots[tokens // 2 :: 7] = -1 if tokens > 1 else slots[0]
            qkv = np.array(_normal(seed, (tokens, kv_heads, group + 2, head_dim), dtype=jnp.float32))
            qkv[slots < 0] = np.nan  # padding
            angles = rng.uniform(0, 6.3, (tokens, head_dim // 2)).astype(np.float32)
            pools = (jnp.zeros((48, 64, kv_heads, head_dim), pool) for _ in range(2))
            bias = _normal(seed + 1, (kv_heads, group + 2, head_dim))
            return jnp.asarray(qkv, BF16), np.cos(angles), np.sin(angles), *pools, slots, bias

        def run(*arrays: Any, scale: float = scale, **options: Any) -> Any:
            return write_kv(*arrays[:-1], bias=arrays[-1], k_scale=scale, v_scale=scale, **options)

        for implementation in WRITE_KV.keys() - {"reference"}:
            yield GpuCase(
                op="write_kv",
                implementation=implementation,
                label=f"{model}_{tokens}_{jnp.dtype(pool).name}",
                run=run,
                make=make,
                tolerance=0.13 if pool == E4M3 else 0.01,  # a value between two of e4m3's may become either
            )

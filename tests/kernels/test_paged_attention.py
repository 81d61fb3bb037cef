"""`paged_attention`: its reference against numpy, every implementation against its reference, and no NaN leaks."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_kernels import paged_attention
from qwen2_kernels.paged_attention.api import IMPLEMENTATIONS
from qwen2_kernels.specs import RAGGED_SPECS, RaggedSpec, Row

from tests.kernels.interpreter import triton_interpreter
from tests.kernels.ragged import CASES, IDS, Ragged, make_ragged, random_rows

TESTED = sorted(IMPLEMENTATIONS.keys() - {"reference", "mosaic"})  # test_mosaic.py lowers that one
BY_NAME = {spec.name: spec for spec in RAGGED_SPECS}
HALF = [BY_NAME[name] for name in ("decode_14_2", "mixed_7_1", "mixed_window")]
ON_GPU = jax.default_backend() != "cpu"
ATOL = 1e-5 if ON_GPU else 2e-6  # of float32 results around 1: a GPU's exponential is an approximation
K_SCALE, V_SCALE = 0.03, 0.04  # of pools in 8 bits: normal values lie in the middle of e4m3's range


@functools.cache
def program(spec: RaggedSpec, implementation: str, **scales: float) -> Callable[..., jax.Array]:
    run = functools.partial(
        paged_attention,
        scale=spec.head_dim**-0.5,
        window=spec.window,
        causal=spec.causal,
        implementation=implementation,
        **scales,
    )
    return jax.jit(run)


def attend(
    batch: Ragged, implementation: str, dtype: Any = jnp.float32, *, pool: Any = None, **scales: float
) -> np.ndarray:
    """Run the op with queries of `dtype` and pools of `pool` (None: `dtype`, too)."""
    starts = None if batch.spec.is_decode else batch.query_start_loc
    pools = [jnp.asarray(array, pool or dtype) for array in (batch.k_pool, batch.v_pool)]
    arguments = (jnp.asarray(batch.q, dtype), *pools, batch.block_tables, batch.context_lens, starts)
    if implementation == "triton" and not ON_GPU:
        with triton_interpreter():
            out = inspect.unwrap(program(batch.spec, implementation, **scales))(*map(as_array, arguments))
    else:
        out = program(batch.spec, implementation, **scales)(*arguments)
    assert out.dtype == dtype and jnp.isfinite(out).all()
    return np.asarray(out, np.float32)


def as_array(array: Any) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)


def rounded(array: np.ndarray, dtype: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(array, dtype), np.float32)


@pytest.mark.parametrize("spec, rows", CASES, ids=IDS)
def test_reference_is_the_formula(spec: RaggedSpec, rows: tuple[Row, ...]) -> None:
    batch = make_ragged(spec, rows)
    np.testing.assert_allclose(attend(batch, "reference"), batch.attention(), atol=ATOL)


@pytest.mark.parametrize("implementation", TESTED)
@pytest.mark.parametrize("spec, rows", CASES, ids=IDS)
def test_float32(spec: RaggedSpec, rows: tuple[Row, ...], implementation: str) -> None:
    batch = make_ragged(spec, rows)
    np.testing.assert_allclose(attend(batch, implementation), attend(batch, "reference"), atol=ATOL)


@pytest.mark.parametrize("implementation", TESTED)
@pytest.mark.parametrize("spec", RAGGED_SPECS, ids=BY_NAME)
def test_random_lengths(spec: RaggedSpec, implementation: str) -> None:
    for seed in range(8 if implementation != "triton" or ON_GPU else 2):  # the interpreter takes its time
        batch = make_ragged(spec, random_rows(spec, seed), seed)
        np.testing.assert_allclose(attend(batch, implementation), attend(batch, "reference"), atol=ATOL)


@pytest.mark.parametrize("implementation", TESTED)
@pytest.mark.parametrize("spec", HALF, ids=lambda spec: spec.name)
def test_bfloat16(spec: RaggedSpec, implementation: str) -> None:
    if implementation == "triton" and not ON_GPU:
        pytest.skip("Triton's interpreter has no bfloat16")
    for rows in spec.batches:
        batch = make_ragged(spec, rows)
        exact = {name: rounded(getattr(batch, name), jnp.bfloat16) for name in ("q", "k_pool", "v_pool")}
        expected = attend(replace(batch, **exact), "reference")
        np.testing.assert_allclose(attend(batch, implementation, jnp.bfloat16), expected, atol=0.03)


@pytest.mark.parametrize("implementation", TESTED)
@pytest.mark.parametrize("spec", [BY_NAME["decode_14_2"], BY_NAME["mixed_window"]], ids=lambda spec: spec.name)
def test_pools_in_8_bits(spec: RaggedSpec, implementation: str) -> None:
    e4m3 = jnp.float8_e4m3fn
    for rows in spec.batches:
        batch = make_ragged(spec, rows)
        stored = {"k_pool": batch.k_pool / K_SCALE, "v_pool": batch.v_pool / V_SCALE}
        scales = {"k_pool": K_SCALE, "v_pool": V_SCALE}
        exact = {name: rounded(array, e4m3) * scales[name] for name, array in stored.items()}
        expected = attend(replace(batch, **exact), "reference")
        quantised = replace(batch, **stored)
        for name in (implementation, "reference"):
            out = attend(quantised, name, pool=e4m3, k_scale=K_SCALE, v_scale=V_SCALE)
            np.testing.assert_allclose(out, expected, atol=max(ATOL, 5e-6))


def test_auto_is_a_tested_implementation() -> None:
    batch = make_ragged(BY_NAME["decode"], BY_NAME["decode"].batches[1])
    np.testing.assert_array_equal(attend(batch, "auto"), attend(batch, "triton" if ON_GPU else "xla"))


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="no implementation 'cuda'; use one of auto, reference, xla"):
        attend(make_ragged(BY_NAME["decode"], ()), "cuda")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("q", (6, 2, 2, 8), r"q \(6, 2, 2, 8\), k_pool \(9, 8, 2, 16\)"),
        ("q", (5, 2, 2, 16), "decode has one query a row, not 5 for 6"),
        ("v_pool", (9, 8, 2, 8), r"v_pool \(9, 8, 2, 8\)"),
        ("context_lens", (5,), r"context_lens \(5,\), query_start_loc None"),
        ("query_start_loc", (6,), r"query_start_loc \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    pool = jnp.zeros((9, 8, 2, 16))
    fitting = {"q": jnp.zeros((6, 2, 2, 16)), "k_pool": pool, "v_pool": pool}
    fitting |= {"block_tables": jnp.zeros((6, 3), jnp.int32), "context_lens": jnp.zeros(6, jnp.int32)}
    run: Any = functools.partial(paged_attention, scale=1.0)
    run(**fitting)
    with pytest.raises(ValueError, match=message):
        run(**(fitting | {name: jnp.zeros(shape, fitting[name].dtype if name in fitting else jnp.int32)}))

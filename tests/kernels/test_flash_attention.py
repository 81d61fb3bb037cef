"""`flash_attention` against numpy and against `paged_attention` on whole prompts, with NaN in its padding."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_kernels import flash_attention
from qwen2_kernels.flash_attention.api import IMPLEMENTATIONS
from qwen2_kernels.specs import RaggedSpec, Row

from tests.kernels.ragged import CASES, IDS, Ragged, make_ragged

FRESH = [
    pytest.param(spec, rows, id=name)
    for (spec, rows), name in zip(CASES, IDS, strict=True)
    if not spec.is_decode and all(queries == length for queries, length in rows)
]


@functools.cache
def program(spec: RaggedSpec, implementation: str) -> Callable[..., jax.Array]:
    run = functools.partial(
        flash_attention,
        scale=spec.head_dim**-0.5,
        window=spec.window,
        causal=spec.causal,
        implementation=implementation,
    )
    return jax.jit(run)


def flat(batch: Ragged, rows: list[np.ndarray]) -> np.ndarray:
    """The rows behind one another, and NaN for the padding."""
    out = np.full((*batch.q.shape[:2], batch.spec.head_dim), np.nan, np.float32)
    for start, tokens in zip(batch.query_start_loc, rows, strict=False):
        out[start : start + len(tokens)] = tokens
    return out


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS.keys() - {"mosaic"}))  # see test_mosaic.py
@pytest.mark.parametrize("spec, rows", FRESH)
def test_prompts(spec: RaggedSpec, rows: tuple[Row, ...], implementation: str) -> None:
    batch = make_ragged(spec, rows)
    q, k, v = batch.q, flat(batch, batch.keys), flat(batch, batch.values)
    expected = batch.attention()
    out = program(spec, implementation)(q, k, v, batch.query_start_loc)
    np.testing.assert_allclose(out, expected, atol=2e-6 if jax.default_backend() == "cpu" else 1e-5)
    half = [jnp.asarray(array, jnp.bfloat16) for array in (q, k, v)]
    out = program(spec, implementation)(*half, batch.query_start_loc)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, starts = jnp.zeros((5, 2, 3, 8)), jnp.zeros((5, 2, 8)), jnp.zeros(2, jnp.int32)
    for wrong in (jnp.zeros((5, 3, 8)), jnp.zeros((4, 2, 8)), jnp.zeros((5, 2, 4))):
        with pytest.raises(ValueError, match="flash_attention: shapes do not fit"):
            flash_attention(q, wrong, k, starts, scale=1.0)
        with pytest.raises(ValueError, match="flash_attention: shapes do not fit"):
            flash_attention(q, k, wrong, starts, scale=1.0)


def test_an_unknown_implementation_is_refused() -> None:
    q, k = jnp.zeros((5, 2, 3, 8)), jnp.zeros((5, 2, 8))
    with pytest.raises(
        ValueError, match="flash_attention has no implementation 'xla'; use one of auto, reference, mosaic"
    ):
        flash_attention(q, k, k, jnp.zeros(2, jnp.int32), scale=1.0, implementation="xla")

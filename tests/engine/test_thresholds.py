"""The cuts that top-k and top-p make, exactly as sorting makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.engine.thresholds import top_k_threshold, top_p_threshold

WIDTH = 24
INF = float("inf")
TINY = 1e-45  # the smallest float32, which is not normal

top_k = jax.jit(top_k_threshold)
top_p = jax.jit(top_p_threshold)

# Few distinct values, so that ties are common, beside any float32 there is.
logit = st.one_of(
    st.sampled_from([-INF, -3.0, -1.5, -0.0, 0.0, 1.5, 3.0]),
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
)
row = st.lists(logit, min_size=WIDTH, max_size=WIDTH)


def of(values: list[float]) -> np.ndarray:
    return np.asarray(values + [-INF] * (WIDTH - len(values)), np.float32)


@given(st.tuples(row, row), st.tuples(st.integers(1, WIDTH), st.integers(1, WIDTH)))
def test_top_k_is_the_kth_of_a_sorted_row(rows: tuple[list[float], list[float]], ks: tuple[int, int]) -> None:
    logits = np.stack([of(values) for values in rows])
    expected = [-np.sort(-values)[k - 1] for values, k in zip(logits, ks, strict=True)]
    np.testing.assert_array_equal(top_k(logits, np.asarray(ks, np.int32)), expected)


@pytest.mark.parametrize(
    "values, k, expected",
    [
        ([5, 4, 3], 1, 5),
        ([-5, -4, -3], 2, -4),
        ([2, 7, 7, 7, 1], 2, 7),
        ([2, 7, 7, 7, 1], 4, 2),
        ([-1, 0, 1], 3, -1),
        ([-1, 0, 1], 4, -INF),
        ([0.5] * WIDTH, WIDTH, 0.5),
        ([0.5] * WIDTH, WIDTH + 1, -INF),
        ([0.5], 1_000_000, -INF),
        ([1e38, -1e38, 1e-38, -1e-38], 4, -1e38),
        ([], 3, -INF),
        ([-TINY, TINY, 0.0], 3, -TINY),
        ([INF, 1.0], 1, INF),
    ],
)
def test_top_k_literally(values: list[float], k: int, expected: float) -> None:
    found = top_k(of([float(value) for value in values])[None], np.asarray([k], np.int32))
    np.testing.assert_array_equal(found, np.asarray([expected], np.float32))


@given(row.filter(lambda values: max(values) > -INF), st.floats(2**-20, 1, exclude_max=True, width=32))
def test_top_p_is_the_smallest_likeliest_set_that_reaches_p(values: list[float], p: float) -> None:
    logits = of(values)
    cut = float(top_p(logits[None], np.asarray([p], np.float32))[0])
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = weights / weights.sum()
    assert cut in logits
    assert probabilities[logits >= cut].sum() >= p - 1e-6
    assert probabilities[logits > cut].sum() < p + 1e-6


@pytest.mark.parametrize(
    "probabilities, p, kept",
    [
        ([0.5, 0.3, 0.2], 0.4, [0.5]),
        ([0.5, 0.3, 0.2], 0.6, [0.5, 0.3]),
        ([0.2, 0.5, 0.3], 0.81, [0.2, 0.5, 0.3]),
        ([0.4, 0.2, 0.2, 0.2], 0.5, [0.4, 0.2, 0.2, 0.2]),  # ties at the cut stay together
        ([0.5, 0.5], 1e-6, [0.5, 0.5]),
        ([0.9, 0.1], 0.89, [0.9]),
    ],
)
def test_top_p_literally(probabilities: list[float], p: float, kept: list[float]) -> None:
    logits = of(np.log(np.asarray(probabilities, np.float32)).tolist())
    cut = np.asarray(top_p(logits[None], np.asarray([p], np.float32)))[0]
    assert [q for q, value in zip(probabilities, logits, strict=False) if value >= cut] == kept


def test_rows_do_not_look_at_each_other() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 50), np.float32)
    ks, ps = np.arange(1, 9, dtype=np.int32), np.linspace(0.1, 0.9, 8, dtype=np.float32)
    together = np.asarray(top_k(logits, ks)), np.asarray(top_p(logits, ps))
    for i in range(8):
        assert together[0][i] == top_k(logits[i : i + 1], ks[i : i + 1])[0]
        assert together[1][i] == top_p(logits[i : i + 1], ps[i : i + 1])[0]
    assert jnp.isfinite(together[1]).all()

"""The cuts that top-k and top-p make, exactly as sorting makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_kernels import top_k_threshold, top_p_threshold

from tests.kernels.interpreter import triton_interpreter

WIDTH = 24
INF = float("inf")
TINY = 1e-45  # the smallest float32, which is not normal
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])

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


LITERAL_TOP_K: list[tuple[list[float], int, float]] = [
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
    ([INF, 1.0], 1, INF),
]


@IMPLEMENTATIONS
def test_top_k_literally(implementation: str) -> None:
    logits = np.stack([of([float(value) for value in values]) for values, _, _ in LITERAL_TOP_K])
    ks = np.asarray([k for _, k, _ in LITERAL_TOP_K], np.int32)
    with triton_interpreter():
        found = top_k_threshold(jnp.asarray(logits), jnp.asarray(ks), implementation=implementation)
    np.testing.assert_array_equal(found, np.asarray([cut for _, _, cut in LITERAL_TOP_K], np.float32))


def test_the_smallest_numbers_have_an_order() -> None:
    """Those that are not normal: sorting takes them for zeros, and so may a GPU."""
    np.testing.assert_array_equal(top_k(of([-TINY, TINY, 0.0])[None], np.asarray([3], np.int32)), [np.float32(-TINY)])


@given(row.filter(lambda values: max(values) > -INF), st.floats(2**-20, 1, exclude_max=True, width=32))
def test_top_p_is_the_smallest_likeliest_set_that_reaches_p(values: list[float], p: float) -> None:
    logits = of(values)
    cut = float(top_p(logits[None], np.asarray([p], np.float32))[0])
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = weights / weights.sum()
    assert cut in logits
    assert probabilities[logits >= cut].sum() >= p - 1e-6
    assert probabilities[logits > cut].sum() < p + 1e-6


LITERAL_TOP_P: list[tuple[list[float], float, list[float]]] = [
    ([0.5, 0.3, 0.2], 0.4, [0.5]),
    ([0.5, 0.3, 0.2], 0.6, [0.5, 0.3]),
    ([0.2, 0.5, 0.3], 0.81, [0.2, 0.5, 0.3]),
    ([0.4, 0.2, 0.2, 0.2], 0.5, [0.4, 0.2, 0.2, 0.2]),  # ties at the cut stay together
    ([0.5, 0.5], 1e-6, [0.5, 0.5]),
    ([0.9, 0.1], 0.89, [0.9]),
]


@IMPLEMENTATIONS
def test_top_p_literally(implementation: str) -> None:
    logits = np.stack([of(np.log(np.asarray(chances, np.float32)).tolist()) for chances, _, _ in LITERAL_TOP_P])
    ps = np.asarray([p for _, p, _ in LITERAL_TOP_P], np.float32)
    with triton_interpreter():
        cuts = np.asarray(top_p_threshold(jnp.asarray(logits), jnp.asarray(ps), implementation=implementation))
    for (chances, _, kept), values, cut in zip(LITERAL_TOP_P, logits, cuts, strict=True):
        assert [q for q, value in zip(chances, values, strict=False) if value >= cut] == kept


@pytest.mark.parametrize("size", [4096, 9001])
def test_rows_of_several_chunks(size: int) -> None:
    """Padding of a row's last chunk counts for nothing, and a row's cut does not depend on the others'."""
    rng = np.random.default_rng(size)
    logits = jnp.asarray(
        np.where(rng.random((3, size)) < 0.2, -np.inf, 3 * rng.standard_normal((3, size))), jnp.float32
    )
    ks, ps = jnp.asarray([1, 50, size]), jnp.asarray([0.1, 0.8, 0.999], jnp.float32)
    with triton_interpreter():
        cuts = [
            top_k_threshold(logits, ks, implementation="triton"),
            top_p_threshold(logits, ps, implementation="triton"),
            top_p_threshold(logits[1:2], ps[1:2], implementation="triton"),
        ]
    np.testing.assert_array_equal(cuts[0], top_k_threshold(logits, ks, implementation="reference"))
    np.testing.assert_array_equal(cuts[1], top_p_threshold(logits, ps, implementation="reference"))
    assert cuts[1][1] == cuts[2][0]


def test_rows_do_not_look_at_each_other() -> None:
    logits = np.random.default_rng(0).standard_normal((8, 50), np.float32)
    ks, ps = np.arange(1, 9, dtype=np.int32), np.linspace(0.1, 0.9, 8, dtype=np.float32)
    together = np.asarray(top_k(logits, ks)), np.asarray(top_p(logits, ps))
    for i in range(8):
        assert together[0][i] == top_k(logits[i : i + 1], ks[i : i + 1])[0]
        assert together[1][i] == top_p(logits[i : i + 1], ps[i : i + 1])[0]
    assert jnp.isfinite(together[1]).all()


@pytest.mark.parametrize(
    "logits, asked, message",
    [
        (jnp.zeros((2, 5)), jnp.zeros(3, jnp.int32), r"logits \(2, 5\) float32 and \(3,\) do not fit"),
        (jnp.zeros(5), jnp.zeros(5, jnp.int32), r"logits \(5,\)"),
        (jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32), "bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(logits: jax.Array, asked: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_threshold(logits, asked)

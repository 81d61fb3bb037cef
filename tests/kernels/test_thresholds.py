"""The cuts that top-k and top-p make, exactly as sorting makes them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from qwen2_kernels import top_k_threshold, top_k_top_p_threshold, top_p_threshold
from qwen2_kernels.specs import QWEN2_5
from qwen2_kernels.thresholds import triton_few
from qwen2_kernels.thresholds.triton_few import MOST_TILES, TILE
from qwen2_kernels.thresholds.triton_thresholds import BLOCK

from tests.kernels.interpreter import triton_interpreter

WIDTH = 24
INF = float("inf")
TINY = float(np.finfo(np.float32).tiny)
H100 = AbstractMesh(
    (1,),
    ("tp",),
    axis_types=(AxisType.Explicit,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])


def _plainly(run: Any) -> Any:
    """Return `run` for logits as they are, of which none is cut."""

    def plain(logits: Any, asked: Any, **options: Any) -> jax.Array:
        rows = len(logits)
        return run(jnp.asarray(logits), jnp.asarray(asked), jnp.ones(rows), jnp.full(rows, -INF), **options)

    return plain


@contextmanager
def eager_interpreter(implementation: str) -> Iterator[None]:
    """Interpret Triton's kernels where they are in a conditional, too."""
    with triton_interpreter(), jax.disable_jit() if implementation == "triton" else nullcontext():
        yield


plain_top_k, plain_top_p = _plainly(top_k_threshold), _plainly(top_p_threshold)
top_k, top_p = jax.jit(plain_top_k), jax.jit(plain_top_p)

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
        found = plain_top_k(logits, ks, implementation=implementation)
    np.testing.assert_array_equal(found, np.asarray([cut for _, _, cut in LITERAL_TOP_K], np.float32))


def test_the_smallest_numbers_have_an_order() -> None:
    """Those that are not normal may become zeros where they are scaled."""
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
        cuts = np.asarray(plain_top_p(logits, ps, implementation=implementation))
    for (chances, _, kept), values, cut in zip(LITERAL_TOP_P, logits, cuts, strict=True):
        assert [q for q, value in zip(chances, values, strict=False) if value >= cut] == kept


@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK + 809])
def test_rows_of_several_chunks(size: int) -> None:
    """Padding of a row's last chunk counts for nothing, and a row's cut does not depend on the others'."""
    logits, ks, ps, temperature, floor = _rows_of_every_kind(6, size)
    with triton_interpreter():
        cuts = [
            top_k_threshold(logits, ks, temperature, floor, implementation="triton"),
            top_p_threshold(logits, ps, temperature, floor, implementation="triton"),
            top_p_threshold(logits[1:2], ps[1:2], temperature[1:2], floor[1:2], implementation="triton"),
        ]
    np.testing.assert_array_equal(cuts[0], top_k_threshold(logits, ks, temperature, floor, implementation="reference"))
    np.testing.assert_array_equal(cuts[1], top_p_threshold(logits, ps, temperature, floor, implementation="reference"))
    assert cuts[1][1] == cuts[2][0]


@pytest.mark.parametrize("size", [1, 50, 999])
def test_xla_finds_the_same_cuts(size: int) -> None:
    arrays = _rows_of_every_kind(12, size)
    for run, asked in ((top_k_threshold, 1), (top_p_threshold, 2)):
        given = arrays[0], arrays[asked], *arrays[3:]
        np.testing.assert_array_equal(run(*given, implementation="xla"), run(*given, implementation="reference"))


def _rows_of_every_kind(rows: int, size: int) -> tuple[jax.Array, ...]:
    """Logits, k, p, temperatures and floors: rows that ask for nothing, are hot or cold, or are cut already."""
    rng = np.random.default_rng(rows * size)
    logits = np.where(rng.random((rows, size)) < 0.2, -np.inf, 3 * rng.standard_normal((rows, size)))
    logits[:, 0] = 1
    ks = np.resize([1, min(50, size), size, 0, 7, -1], rows)
    ps = np.resize([0.1, 0.8, 0.999, 0.3, 1, 1.5], rows)
    temperature = np.resize(np.asarray([1, 0.3, 2.5, 0.9], np.float32), rows)
    floor = np.where(np.arange(rows) % 3, -np.inf, logits.max(axis=1) / temperature - 2)
    ints, *floats = jnp.asarray(ks), *(jnp.asarray(array, jnp.float32) for array in (logits, ps, temperature, floor))
    return floats[0], ints, *floats[1:]


@IMPLEMENTATIONS
def test_what_is_below_the_floor_has_no_probability_and_is_not_counted(implementation: str) -> None:
    logits = jnp.log(jnp.asarray([[0.3, 0.2, 0.4, 0.1]] * 4))
    temperature = jnp.asarray([1.0, 1.0, 2.0, 2.0])
    floor = jnp.asarray([-INF, np.log(0.2) - 1e-3, np.log(0.2) / 2 - 1e-3, np.log(0.3) / 2 - 1e-3], jnp.float32)
    with triton_interpreter():
        third = top_k_threshold(logits, jnp.full(4, 3), temperature, floor, implementation=implementation)
        cut = top_p_threshold(logits, jnp.full(4, 0.75), temperature, floor, implementation=implementation)
    np.testing.assert_allclose(third, [np.log(0.2), np.log(0.2), np.log(0.2) / 2, -INF], rtol=1e-6)
    # Of the first row 0.4 and 0.3 are not enough; of 0.9, they are; square roots are closer to one another.
    np.testing.assert_allclose(cut, [np.log(0.2), np.log(0.3), np.log(0.2) / 2, np.log(0.3) / 2], rtol=1e-6)


@IMPLEMENTATIONS
def test_rows_that_ask_for_nothing_are_not_looked_at(implementation: str) -> None:
    logits = jnp.asarray([[1.0, 2.0, 3.0], [np.nan] * 3, [np.nan] * 3])
    scale, floor = jnp.asarray([1.0, 0.0, 1.0]), jnp.full(3, -INF)
    with triton_interpreter():
        second = top_k_threshold(logits, jnp.asarray([2, 0, -1]), scale, floor, implementation=implementation)
        likeliest = top_p_threshold(logits, jnp.asarray([0.1, 1.0, 1.5]), scale, floor, implementation=implementation)
    assert second.tolist() == [2, -INF, -INF] and likeliest.tolist() == [3, -INF, -INF]
    with eager_interpreter(implementation):
        asked = jnp.asarray([2, 0, -1]), jnp.asarray([0.99, 1.0, 1.5])
        both = top_k_top_p_threshold(logits, *asked, scale, floor, implementation=implementation)
    assert both.tolist() == [2, -INF, -INF]


@IMPLEMENTATIONS
def test_top_p_is_of_what_top_k_leaves(implementation: str) -> None:
    chances = [0.4, 0.3, 0.2, 0.1]
    # Of 0.4 and 0.3, 0.4 is 57 %; of all four 40 %, and of those above the floor 44 %.
    asked = [(2, 0.5, 0.4), (2, 0.6, 0.3), (0, 0.5, 0.3), (3, 1.0, 0.2), (0, 1.0, -INF), (0, 0.44, 0.4), (9, 0.9, 0.2)]
    logits = jnp.log(jnp.asarray([chances] * len(asked)))
    ks, ps, kept = (jnp.asarray(values) for values in zip(*asked, strict=True))
    floor = jnp.where(jnp.arange(len(asked)) < 5, -INF, jnp.log(0.15))
    with eager_interpreter(implementation):
        cut = top_k_top_p_threshold(logits, ks, ps, jnp.ones(len(asked)), floor, implementation=implementation)
    np.testing.assert_allclose(jnp.exp(cut), jnp.maximum(kept, 0), rtol=1e-6)


@pytest.mark.parametrize("size", [50, 999, BLOCK, 2 * BLOCK + 809])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_both_cuts_are_one_after_the_other(implementation: str, size: int) -> None:
    """Of rows that keep few tokens, many, or all of them."""
    arrays = _rows_of_every_kind(12, size)
    with eager_interpreter(implementation):
        cuts = top_k_top_p_threshold(*arrays, implementation=implementation)
    np.testing.assert_array_equal(cuts, top_k_top_p_threshold(*arrays, implementation="reference"))


def test_rows_that_keep_few_are_not_searched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those that ask for nothing; one row with top-p alone is."""

    def refuse(*_: Any) -> jax.Array:
        raise AssertionError("searched as a whole")

    monkeypatch.setattr(triton_few, "top_k_threshold_triton", refuse)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2 * BLOCK)), jnp.float32)
    k, p, rest = jnp.asarray([20, 0, 64]), jnp.asarray([0.8, 1.0, 1.0]), (jnp.ones(3), jnp.full(3, -INF))
    with eager_interpreter("triton"):
        cuts = top_k_top_p_threshold(logits, k, p, *rest, implementation="triton")
        with pytest.raises(AssertionError, match="searched as a whole"):
            top_k_top_p_threshold(logits, k, p.at[1].set(0.5), *rest, implementation="triton")
    np.testing.assert_array_equal(cuts, top_k_top_p_threshold(logits, k, p, *rest, implementation="reference"))


@pytest.mark.parametrize("ties", [1, MOST_TILES - 8, MOST_TILES + 8])
def test_ties_at_the_cut_are_all_kept(ties: int) -> None:
    """As many tiles have them as a program holds, or more: then rows are searched as a whole."""
    size = (MOST_TILES + 16) * TILE
    logits = jnp.zeros((1, size)).at[0, : 4 * TILE : TILE].set(3).at[0, 5 * TILE : (5 + ties) * TILE : TILE].set(2)
    for p in (1.0, 0.999):
        arrays = logits, jnp.asarray([5]), jnp.asarray([p]), jnp.ones(1), jnp.full(1, -INF)
        with eager_interpreter("triton"):
            assert top_k_top_p_threshold(*arrays, implementation="triton").tolist() == [2]
        assert top_k_top_p_threshold(*arrays, implementation="reference").tolist() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 256])
def test_compiles_for_an_h100(rows: int) -> None:
    logits = jax.ShapeDtypeStruct((rows, QWEN2_5["7b"].vocab_size), jnp.float32)
    numbers, ints = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    for run, asked, launches in (
        (top_k_threshold, (ints,), 8),
        (top_p_threshold, (numbers,), 8),
        (top_k_top_p_threshold, (ints, numbers), 2 + 16),
    ):
        with jax.sharding.use_abstract_mesh(H100):
            lowered = jax.jit(run).trace(logits, *asked, numbers, numbers).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("triton_kernel_call") == launches


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
        (jnp.zeros((2, 5)), jnp.zeros(3, jnp.int32), r"logits \(2, 5\) float32 and \(3,\), \(3,\), \(3,\) do not fit"),
        (jnp.zeros(5), jnp.zeros(5, jnp.int32), r"logits \(5,\)"),
        (jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32), "bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(logits: jax.Array, asked: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_threshold(logits, asked, jnp.ones(len(asked)), jnp.zeros(len(asked)))

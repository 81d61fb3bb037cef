"""The largest logits of a row, as sorting finds them, and the sum of its exponentials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from qwen2_kernels import top_logits
from qwen2_kernels.specs import QWEN2_5
from qwen2_kernels.top_logits.api import IMPLEMENTATIONS, MOST
from qwen2_kernels.top_logits.triton_top import PROGRAM_TILES, TILE

from tests.kernels.interpreter import triton_interpreter

EVERY = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
BLOCK = PROGRAM_TILES * TILE
H100 = AbstractMesh(
    (1,),
    ("tp",),
    axis_types=(AxisType.Explicit,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
)


def run(implementation: str, logits: np.ndarray, count: int, wanted: list[bool] | None = None) -> list[np.ndarray]:
    asked = jnp.ones(len(logits), bool) if wanted is None else jnp.asarray(wanted)
    with triton_interpreter():
        found = top_logits(jnp.asarray(logits), asked, count=count, implementation=implementation)
    assert [array.dtype for array in found] == [jnp.float32, jnp.int32, jnp.float32]
    return [np.asarray(array) for array in found]


@EVERY
@pytest.mark.parametrize(
    "size, count", [(1, 1), (40, 5), (640, 5), (641, 5), (BLOCK, 1), (BLOCK + 99, 20), (20_000, 20), (20_000, MOST)]
)
def test_the_largest_are_those_of_a_sorted_row(implementation: str, size: int, count: int) -> None:
    """With few distinct values, so that the order of equal ones shows, and rows that forbid nearly everything."""
    rng = np.random.default_rng(size + count)
    logits = rng.integers(-6, 3, (6, size)).astype(np.float32)
    logits[1, 3:] = -np.inf
    logits[2, :-1] = -np.inf
    logits[3] = 1
    logits[4] = np.where(np.arange(size) < size - 2, -np.inf, 1)
    logits[5] = 9 * rng.standard_normal(size)
    values, columns, log_sum = run(implementation, logits, count)
    expected = jax.lax.top_k(logits, count)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(columns, expected[1])
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(log_sum, np.log(exact), rtol=2e-6, atol=1e-6)


@EVERY
def test_rows_that_are_not_wanted_get_zeros(implementation: str) -> None:
    logits = np.asarray([[1, 3, 2], [np.nan] * 3, [5, 5, 4]], np.float32)
    values, columns, log_sum = run(implementation, logits, 2, [True, False, True])
    assert values.tolist() == [[3, 2], [0, 0], [5, 5]] and columns.tolist() == [[1, 2], [0, 0], [0, 1]]
    np.testing.assert_allclose(log_sum, [np.log(1 + np.exp(-1) + np.exp(-2)), 0, np.log(2 + np.exp(-1))], rtol=1e-6)


def test_more_than_triton_finds() -> None:
    logits = jnp.zeros((1, MOST + 1))
    with pytest.raises(NotImplementedError, match=f"{MOST} logits of a row at most, not {MOST + 1}"):
        top_logits(logits, jnp.ones(1, bool), count=MOST + 1, implementation="triton")
    assert run("auto", np.zeros((1, MOST + 1), np.float32), MOST + 1)[1].tolist() == [list(range(MOST + 1))]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 256])
def test_compiles_for_an_h100(rows: int) -> None:
    logits = jax.ShapeDtypeStruct((rows, QWEN2_5["7b"].vocab_size), jnp.float32)
    wanted = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(top_logits, static_argnames="count").trace(logits, wanted, count=20)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 2


@pytest.mark.parametrize(
    "logits, wanted, count, message",
    [
        (jnp.zeros((2, 5)), jnp.ones(3, bool), 1, r"logits \(2, 5\) float32 and is_wanted \(3,\) bool do not fit"),
        (jnp.zeros(5), jnp.ones(5, bool), 1, r"logits \(5,\)"),
        (jnp.zeros((2, 5), jnp.bfloat16), jnp.ones(2, bool), 1, "bfloat16"),
        (jnp.zeros((2, 5)), jnp.ones(2, jnp.int32), 1, r"is_wanted \(2,\) int32"),
        (jnp.zeros((2, 5)), jnp.ones(2, bool), 6, "count=6 is not one of 1 to 5"),
        (jnp.zeros((2, 5)), jnp.ones(2, bool), 0, "count=0 is not one of 1 to 5"),
    ],
)
def test_what_does_not_fit_is_refused(logits: jax.Array, wanted: jax.Array, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_logits(logits, wanted, count=count)

"""Ranks of tokens by falling logits, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from qwen2_kernels import token_ranks
from qwen2_kernels.specs import QWEN2_5
from qwen2_kernels.token_ranks.api import IMPLEMENTATIONS
from qwen2_kernels.token_ranks.triton_ranks import BLOCK

from tests.kernels.interpreter import triton_interpreter

EVERY = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
H100 = AbstractMesh(
    (1,),
    ("tp",),
    axis_types=(AxisType.Explicit,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
)


def run(implementation: str, logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    with triton_interpreter():
        found = token_ranks(jnp.asarray(logits), jnp.asarray(token_ids, jnp.int32), implementation=implementation)
    assert found.dtype == jnp.int32
    return np.asarray(found)


@EVERY
@pytest.mark.parametrize("rows, size, columns", [(1, 1, 1), (1, 50, 9), (4, BLOCK, 2), (3, 2 * BLOCK + 99, 6)])
def test_ranks_are_places_in_a_sorted_row(implementation: str, rows: int, size: int, columns: int) -> None:
    """With ties and logits of minus infinity, and rows that ask for some columns or for none."""
    rng = np.random.default_rng(size)
    logits = rng.standard_normal((rows, size)).astype(np.float32)
    logits[::2] = np.round(logits[::2], 1)
    logits[:, rng.random(size) < 0.2] = -np.inf
    token_ids = rng.integers(0, size, (rows, columns))
    token_ids[rng.random((rows, columns)) < 0.3] = -1
    token_ids[2:3] = -1
    token_ids[0, 0] = logits[0].argmax()
    found = run(implementation, logits, token_ids)
    falling = np.sort(logits, axis=1)
    for row, column in np.ndindex(rows, columns):
        token = token_ids[row, column]
        rank = size - np.searchsorted(falling[row], logits[row, token], side="right") + 1
        assert found[row, column] == (rank if token >= 0 else 0)
    assert found[0, 0] == 1


@EVERY
def test_a_row_of_nan_harms_no_other(implementation: str) -> None:
    logits = np.asarray([[1, 3, 2], [np.nan] * 3, [5, 4, 6]], np.float32)
    found = run(implementation, logits, np.asarray([[0, 2], [1, 1], [-1, 1]]))
    assert found[0].tolist() == [3, 2] and found[2].tolist() == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("rows, columns", [(1, 129), (256, 129), (128, 2)])
def test_compiles_for_an_h100(rows: int, columns: int) -> None:
    logits = jax.ShapeDtypeStruct((rows, QWEN2_5["7b"].vocab_size), jnp.float32)
    token_ids = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    with jax.sharding.use_abstract_mesh(H100):
        text = jax.jit(token_ranks).trace(logits, token_ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@pytest.mark.parametrize(
    "logits, token_ids, message",
    [
        (jnp.zeros((2, 5)), jnp.zeros((3, 1), jnp.int32), r"logits \(2, 5\) float32 and token_ids \(3, 1\) int32"),
        (jnp.zeros((2, 5)), jnp.zeros(2, jnp.int32), r"token_ids \(2,\)"),
        (jnp.zeros((2, 5)), jnp.zeros((2, 0), jnp.int32), r"token_ids \(2, 0\)"),
        (jnp.zeros((2, 5), jnp.bfloat16), jnp.zeros((2, 1), jnp.int32), "bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(logits: jax.Array, token_ids: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_ranks(logits, token_ids)

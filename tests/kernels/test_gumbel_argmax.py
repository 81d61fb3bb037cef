"""Tokens drawn by the Gumbel-max trick: the same on every platform, and as often as their softmax says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from qwen2_kernels import gumbel_argmax
from qwen2_kernels.gumbel_argmax.api import IMPLEMENTATIONS
from qwen2_kernels.gumbel_argmax.triton_gumbel import BLOCK, threefry
from qwen2_kernels.launch import triton_call
from qwen2_kernels.specs import QWEN2_5

from tests.kernels.interpreter import triton_interpreter

INF = float("inf")
EVERY = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
OTHERS = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS.keys() - {"reference"}))
H100 = AbstractMesh(
    (1,),
    ("tp",),
    axis_types=(AxisType.Explicit,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132),
)


def draw(rows: int, size: int, seed: int = 0) -> dict[str, jax.Array]:
    """Logits of every kind, of which each row keeps all, some or one; every third row is greedy."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((rows, size))).astype(np.float32)
    logits[:, rng.random(size) < 0.2] = -np.inf
    logits[::4] = np.round(logits[::4])  # ties
    temperature = rng.choice([0.3, 1.0, 1.7], rows).astype(np.float32)
    temperature[2::3] = 0
    largest = (logits * (np.float32(1) / np.where(temperature == 0, 1, temperature))[:, None]).max(axis=1)
    threshold = np.where(np.arange(rows) % 2, largest - rng.choice([0, 0.5, 4], rows), -np.inf)
    words = rng.integers(-(2**31), 2**31, (3, rows)).astype(np.int32)
    words[2] %= 5000
    names = ("seeds_high", "seeds_low", "indices")
    arrays = {"logits": logits, "temperature": temperature, "threshold": threshold.astype(np.float32)}
    return {name: jnp.asarray(array) for name, array in (arrays | dict(zip(names, words, strict=True))).items()}


def run(implementation: str, arrays: dict[str, jax.Array]) -> list[int]:
    with triton_interpreter():
        found = gumbel_argmax(**arrays, implementation=implementation)
    assert found.dtype == jnp.int32
    return found.tolist()


@OTHERS
@pytest.mark.parametrize(
    "rows, size", [(1, 1), (1, 40), (3, BLOCK), (5, 3 * BLOCK + 17), (12, 2 * BLOCK - 1), (48, 100)]
)
def test_every_implementation_draws_the_same(implementation: str, rows: int, size: int) -> None:
    arrays = draw(rows, size, seed=rows + size)
    assert run(implementation, arrays) == run("reference", arrays)


@EVERY
def test_a_row_draws_the_same_alone(implementation: str) -> None:
    arrays = draw(6, 300)
    together = run(implementation, arrays)
    for row in range(6):
        alone = {name: array[row : row + 1] for name, array in arrays.items()}
        assert run(implementation, alone) == together[row : row + 1]


@EVERY
def test_greedy_rows_take_the_first_of_the_largest(implementation: str) -> None:
    size = 2 * BLOCK + 3
    logits = np.full((5, size), -1.0, np.float32)
    logits[0, [7, 2000]] = 5
    logits[1, BLOCK:] = 2
    logits[2] = -np.inf
    logits[3, size - 1] = np.inf
    logits[4, [9, 1500]] = np.nan, np.inf
    arrays = draw(5, size) | {"logits": jnp.asarray(logits), "temperature": jnp.zeros(5)}
    arrays["threshold"] = jnp.full(5, -INF)
    assert run(implementation, arrays) == [7, BLOCK, 0, size - 1, 9]


@EVERY
def test_what_is_cut_is_never_drawn(implementation: str) -> None:
    """A threshold is compared with scaled logits, and is kept itself; one token may be all that is left."""
    arrays = draw(60, 50) | {"logits": jnp.tile(jnp.arange(50.0), (60, 1)), "temperature": jnp.full(60, 3.0)}
    third = np.float32(1) / np.float32(3)
    arrays["threshold"] = jnp.where(jnp.arange(60) < 40, 47 * third, 49 * third)
    found = run(implementation, arrays)
    assert set(found[:40]) == {47, 48, 49} and set(found[40:]) == {49}


@EVERY
def test_a_row_of_nan_harms_no_other(implementation: str) -> None:
    arrays = draw(4, 200)
    poisoned = arrays | {"logits": arrays["logits"].at[1].set(jnp.nan)}
    found, clean = run(implementation, poisoned), run(implementation, arrays)
    assert found[1] == 0
    assert [found[i] for i in (0, 2, 3)] == [clean[i] for i in (0, 2, 3)]


def test_draws_follow_the_softmax() -> None:
    """Chi-square over seeds and indices; 4.5 standard deviations, and the seeds are fixed."""
    count, size, temperature = 4000, 12, 0.7
    logits = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    numbers = jnp.arange(count, dtype=jnp.int32)
    found = run(
        "auto",
        {
            "logits": jnp.tile(logits, (count, 1)),
            "temperature": jnp.full(count, temperature),
            "threshold": jnp.full(count, -INF),
            "seeds_high": jnp.zeros(count, jnp.int32),
            "seeds_low": numbers // 50,
            "indices": numbers % 50,
        },
    )
    weights = np.exp(logits / temperature)
    expected = count * weights / weights.sum()
    statistic = ((np.bincount(found, minlength=size) - expected) ** 2 / expected).sum()
    assert statistic < size - 1 + 4.5 * np.sqrt(2 * (size - 1))


@triton.jit
def _bits_kernel(words_ptr, bits_ptr, SIZE: tl.constexpr):
    key_x = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    key_y = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    index = tl.load(words_ptr + 2).to(tl.uint32, bitcast=True)
    counts = tl.arange(0, SIZE).to(tl.uint32)
    x, y = threefry(key_x, key_y, 0, index)  # pyright: ignore[reportGeneralTypeIssues]
    x, y = threefry(x, y, 0, counts)
    tl.store(bits_ptr + tl.arange(0, SIZE), (x ^ y).to(tl.int32, bitcast=True))


@pytest.mark.parametrize("words", [(0, 0, 0), (1, 2, 3), (-1, -(2**31), 4095), (77, -5, 2**31 - 1)])
def test_bits_are_those_of_jax_random(words: tuple[int, int, int]) -> None:
    key = jax.random.wrap_key_data(jnp.asarray(words[:2]).astype(jnp.uint32), impl="threefry2x32")
    expected = jax.random.bits(jax.random.fold_in(key, jnp.int32(words[2])), (64,))
    with triton_interpreter():
        bits: Any = triton_call(
            jnp.asarray(words, jnp.int32),
            kernel=_bits_kernel,
            out_type=jax.ShapeDtypeStruct((64,), jnp.int32),
            grid=(1,),
            num_warps=1,
            num_stages=1,
            SIZE=64,
        )
    np.testing.assert_array_equal(np.asarray(bits).view(np.uint32), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_compiles_for_an_h100(model: str, rows: int) -> None:
    numbers, ints = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    logits = jax.ShapeDtypeStruct((rows, QWEN2_5[model].vocab_size), jnp.float32)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(gumbel_argmax).trace(logits, numbers, numbers, ints, ints, ints)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("logits", jnp.zeros((3, 0)), r"logits \(3, 0\) float32"),
        ("logits", jnp.zeros((3, 5), jnp.bfloat16), "bfloat16"),
        ("temperature", jnp.zeros(2), r"\(2,\) float32, \(3,\)"),
        ("indices", jnp.zeros(3, jnp.uint32), "uint32"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, array: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("auto", draw(3, 5) | {name: array})

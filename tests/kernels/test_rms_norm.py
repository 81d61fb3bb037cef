"""`rms_norm`: its formula, every implementation against the reference, and what Triton makes of it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels import Adapted
from qwen2_kernels.rms_norm import api
from qwen2_kernels.specs import QWEN2_5

from tests.kernels.interpreter import triton_interpreter

rms_norm: Any = api.rms_norm
EPS = 1e-5
RESIDUAL = pytest.mark.parametrize("residual", [False, True])
H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)


def draw(tokens: int, size: int, *, residual: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    arrays = {
        "x": 3 * rng.standard_normal((tokens, size), np.float32),
        "weight": rng.uniform(0.5, 2, size).astype(np.float32),
    }
    return arrays | ({"residual": rng.standard_normal((tokens, size), np.float32)} if residual else {})


def formula(x: np.ndarray, weight: np.ndarray, residual: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
    total = x + residual
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * weight, total


def run(implementation: str, arrays: dict[str, np.ndarray], dtype: Any = jnp.float32) -> list[np.ndarray]:
    with triton_interpreter():
        results = rms_norm(
            **{name: jnp.asarray(array, dtype) for name, array in arrays.items()},
            eps=EPS,
            implementation=implementation,
        )
    assert all(result.dtype == dtype for result in results)
    return [np.asarray(result.astype(jnp.float32)) for result in results]


@pytest.mark.parametrize("implementation", ["auto", *api.IMPLEMENTATIONS])
@pytest.mark.parametrize("tokens, size", [(1, 64), (5, 96), (3, 7), (2, 1)])
@RESIDUAL
def test_is_the_formula(residual: bool, tokens: int, size: int, implementation: str) -> None:
    arrays = draw(tokens, size, residual=residual)
    for result, expected in zip(run(implementation, arrays), formula(**arrays), strict=True):
        np.testing.assert_allclose(result, expected, rtol=2e-6)


@pytest.mark.parametrize("implementation", sorted(api.IMPLEMENTATIONS))
@pytest.mark.parametrize("parts", [1, 3])
def test_what_adapters_change_comes_first(parts: int, implementation: str) -> None:
    tokens, size, rng = 4, 96, np.random.default_rng(2)
    arrays = draw(tokens, size, residual=True)
    delta = rng.standard_normal((tokens, size), np.float32)
    bank = rng.uniform(0.5, 2, (3, size)).astype(np.float32)
    bank[0] = np.nan  # a row that no token names
    rows = np.array([2, -1, -1, 1], np.int32)
    scale = np.where(rows[:, None] >= 0, bank[rows], 1)
    expected = formula(arrays["x"] * scale + delta, arrays["weight"], arrays["residual"])
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    given["x"] = given["x"] if parts == 1 else jnp.stack([given["x"] / parts] * parts)
    adapted = Adapted(delta=jnp.asarray(delta), scale_bank=jnp.asarray(bank), scale_rows=jnp.asarray(rows))
    with triton_interpreter():
        results = rms_norm(**given, adapted=adapted, eps=EPS, implementation=implementation)
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@RESIDUAL
def test_bfloat16_is_rounded_once(residual: bool, implementation: str) -> None:
    arrays = {
        name: np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)
        for name, array in draw(4, 96, residual=residual).items()
    }
    for result, expected in zip(run(implementation, arrays, jnp.bfloat16), formula(**arrays), strict=True):
        np.testing.assert_allclose(result, expected, rtol=2**-8)


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
def test_nan_stays_in_its_token(implementation: str) -> None:
    arrays = draw(4, 96, residual=True)
    clean = formula(**arrays)
    arrays["x"][2, 5] = np.nan
    for result, expected in zip(run(implementation, arrays), clean, strict=True):
        np.testing.assert_allclose(np.delete(result, 2, 0), np.delete(expected, 2, 0), rtol=2e-6)
    assert np.isnan(run(implementation, arrays)[0][2]).all()


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
def test_a_token_of_zeros_is_zeros(implementation: str) -> None:
    arrays = draw(2, 96, residual=False)
    arrays["x"][1] = 0
    for result in run(implementation, arrays):
        np.testing.assert_array_equal(result[1], 0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8192])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
@RESIDUAL
def test_compiles_for_an_h100(residual: bool, model: str, tokens: int) -> None:
    size = QWEN2_5[model].hidden_size
    x = jax.ShapeDtypeStruct((tokens, size), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((size,), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(rms_norm, static_argnames="eps").trace(x, weight, x if residual else None, eps=EPS)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@pytest.mark.parametrize("name, shape", [("x", (3, 95)), ("x", (96,)), ("weight", (95,)), ("residual", (2, 96))])
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arrays = {"x": jnp.zeros((3, 96)), "weight": jnp.zeros(96), "residual": jnp.zeros((3, 96))}
    with pytest.raises(ValueError, match=re.escape(f"{name} {shape}")):
        rms_norm(**(arrays | {name: jnp.zeros(shape)}), eps=EPS)


def test_what_is_not_there_is_refused() -> None:
    x, weight = jnp.zeros((3, 96), jnp.float8_e4m3fn), jnp.zeros(96)
    with pytest.raises(NotImplementedError, match="not float8_e4m3fn"):
        rms_norm(x, weight, eps=EPS, implementation="triton")
    with pytest.raises(ValueError, match="no implementation 'cuda'; use one of auto, reference, xla, triton"):
        rms_norm(x, weight, eps=EPS, implementation="cuda")


@RESIDUAL
@pytest.mark.parametrize("implementation", sorted(api.IMPLEMENTATIONS))
def test_partial_sums_are_added_first(implementation: str, residual: bool) -> None:
    arrays = {name: jnp.asarray(array) for name, array in draw(5, 96, residual=residual).items()}
    parts = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 96), np.float32))
    arguments = arrays | {"x": parts.at[0].set(arrays["x"] - parts[1] - parts[2])}
    with triton_interpreter():
        found = rms_norm(**arguments, eps=EPS, implementation=implementation)
    for one, other in zip(found, rms_norm(**arrays, eps=EPS, implementation="reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_results_of_partial_sums_have_the_weights_dtype() -> None:
    normed, total = rms_norm(jnp.ones((2, 3, 8)), jnp.ones(8, jnp.bfloat16), eps=EPS)
    assert normed.dtype == total.dtype == jnp.bfloat16
    assert normed.shape == total.shape == (3, 8)

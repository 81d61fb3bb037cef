"""`norm_linear`: its formula, every implementation against it, and refusals."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_kernels.norm_linear import api

from tests.kernels.interpreter import triton_interpreter

norm_linear: Any = api.norm_linear
EPS = 1e-5
RESIDUAL = pytest.mark.parametrize("residual", [False, True])
KIND = pytest.mark.parametrize("kind", ["plain", "bias", "gated"])


def draw(tokens: int, kind: str, *, residual: bool) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    size, features = 96, 40
    arrays = {
        "x": 3 * rng.standard_normal((tokens, size), np.float32),
        "norm_weight": rng.uniform(0.5, 2, size).astype(np.float32),
        "kernel": rng.standard_normal((*((2,) if kind == "gated" else ()), features, size), np.float32) / size**0.5,
    }
    if residual:
        arrays["residual"] = rng.standard_normal((tokens, size), np.float32)
    if kind == "bias":
        arrays["bias"] = rng.standard_normal(features, np.float32)
    return arrays | ({"activation": "silu"} if kind == "gated" else {})


def formula(
    x: np.ndarray,
    norm_weight: np.ndarray,
    kernel: np.ndarray,
    residual: float | np.ndarray = 0.0,
    bias: float | np.ndarray = 0.0,
    activation: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    total = x + residual
    normed = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * norm_weight
    if activation is None:
        return normed @ kernel.T + bias, total
    gate, up = normed @ kernel[0].T, normed @ kernel[1].T
    return gate / (1 + np.exp(-gate)) * up, total


@RESIDUAL
@KIND
@pytest.mark.parametrize("implementation", ["auto", "reference", "separate"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_formula(tokens: int, implementation: str, kind: str, residual: bool) -> None:
    arguments = draw(tokens, kind, residual=residual)
    out = norm_linear(**to_arrays(arguments), eps=EPS, implementation=implementation)
    for found, expected in zip(out, formula(**arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@RESIDUAL
@KIND
def test_one_launch(kind: str, residual: bool) -> None:
    arguments = draw(1, kind, residual=residual)
    with triton_interpreter():
        out = norm_linear(**to_arrays(arguments), eps=EPS, implementation="triton")
    for found, expected in zip(out, formula(**arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_the_only_part_of_one_token_needs_no_launch_to_add_it() -> None:
    """A layer's projections give [1, 1, D] for one token; its norms must not cost a launch each for that."""
    arguments = draw(1, "plain", residual=True)
    given = to_arrays(arguments | {"x": arguments["x"][None]})
    with triton_interpreter():
        out, total = norm_linear(**given, eps=EPS, partial=True, implementation="triton")
    expected = formula(**arguments)
    np.testing.assert_allclose(out.sum(axis=0), expected[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(total, expected[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["auto", "reference", "separate"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_partial_sums_in_and_out(tokens: int, implementation: str) -> None:
    arguments = draw(tokens, "plain", residual=True)
    parts = np.stack([arguments["x"] - 1, np.ones_like(arguments["x"])])
    given = to_arrays(arguments | {"x": parts})
    out, total = norm_linear(**given, eps=EPS, partial=True, implementation=implementation)
    expected = formula(**arguments)
    np.testing.assert_allclose(out.sum(axis=0), expected[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(total, expected[1], rtol=1e-5, atol=2e-5)


def test_partial_sums_have_no_epilogue() -> None:
    with pytest.raises(ValueError, match="partial sums have neither bias nor activation"):
        norm_linear(**to_arrays(draw(2, "bias", residual=True)), eps=EPS, partial=True)


def test_one_launch_is_for_one_token() -> None:
    arguments = to_arrays(draw(2, "plain", residual=True))
    with pytest.raises(NotImplementedError, match=r"'triton' takes one token, not \(2, 96\)"):
        norm_linear(**arguments, eps=EPS, implementation="triton")


@pytest.mark.parametrize(
    "name, shape", [("norm_weight", (40,)), ("residual", (4, 96)), ("bias", (41,)), ("kernel", (40, 95)), ("x", (96,))]
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arguments = to_arrays(draw(5, "bias", residual=True)) | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=re.escape(f"norm_linear: shapes do not fit: x {arguments['x'].shape}")):
        norm_linear(**arguments, eps=EPS)


def to_arrays(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else jnp.asarray(value) for name, value in arguments.items()}

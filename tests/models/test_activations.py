"""Every activation that a config may name, on the grid that transformers computed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config.model import HIDDEN_ACTS
from qwen2_jax.models.activations import ACTIVATIONS

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "functions.json").read_text())
X = np.asarray(GOLDEN["x"], np.float32)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_is_transformers(name: str) -> None:
    y = jax.jit(ACTIVATIONS[name])(X)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, GOLDEN["activations"][name], atol=1e-6, rtol=1e-6)


def test_a_config_may_name_exactly_these() -> None:
    assert set(HIDDEN_ACTS) == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_bfloat16_stays_bfloat16(name: str) -> None:
    y = ACTIVATIONS[name](jnp.asarray(X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), GOLDEN["activations"][name], atol=0.04, rtol=0.03)

"""Rotary frequencies and attention factors as transformers computes them, and the angles at far positions."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import RopeConfig
from qwen2_jax.models.rope import rope_cos_sin, rope_frequencies

CASES = json.loads((Path(__file__).parent.parent / "golden" / "functions.json").read_text())["ropes"]


def describe(case: dict[str, Any]) -> str:
    config = case["config"]
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return "-".join(f"{key}={value}" for key, value in scaling.items()) or f"theta={config['rope_theta']:.0f}"


def frequencies_of(config: dict[str, Any]) -> tuple[np.ndarray, float]:
    context = config["max_position_embeddings"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return rope_frequencies(RopeConfig.from_hf(config, context), head_dim, context)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_frequencies_are_transformers(case: dict[str, Any]) -> None:
    frequencies, scaling = frequencies_of(case["config"])
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, case["inv_freq"], rtol=2e-6)
    assert scaling == pytest.approx(case["attention_factor"], rel=1e-6)


def test_the_golden_cases_cover_every_type() -> None:
    types = {RopeConfig.from_hf(case["config"], case["config"]["max_position_embeddings"]).rope_type for case in CASES}
    assert types == {"default", "linear", "yarn", "llama3"}
    assert any(case["attention_factor"] != 1 for case in CASES)


@pytest.mark.parametrize("jit", [False, True])
def test_angles_are_positions_times_frequencies_up_to_the_longest_context(jit: bool) -> None:
    frequencies, _ = frequencies_of(CASES[1]["config"])
    positions = np.asarray([0, 1, 2, 100, 32767, 131071], np.int32)
    run = jax.jit(rope_cos_sin, static_argnums=2) if jit else rope_cos_sin
    cos, sin = run(jnp.asarray(positions), frequencies, 1.0)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == sin.shape == (6, len(frequencies))
    angles = (positions.astype(np.float32)[:, None] * frequencies[None, :]).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_the_attention_factor_scales_both() -> None:
    frequencies = np.asarray([1.0, 0.1], np.float32)
    plain, scaled = (rope_cos_sin(jnp.arange(4), frequencies, scaling) for scaling in (1.0, 1.25))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other, 1.25 * one, rtol=1e-6)


def test_the_original_context_defaults_to_the_longest() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    base = {"rope_theta": 1e4, "max_position_embeddings": 64}
    given, left_out = (
        rope_frequencies(RopeConfig.from_hf(base | {"rope_scaling": scaling | extra}, 64), 32, 64)
        for extra in ({"original_max_position_embeddings": 64}, {})
    )
    np.testing.assert_array_equal(given[0], left_out[0])
    assert given[1] == left_out[1] == pytest.approx(0.1 * np.log(4) + 1)

"""`lora_delta` and `lora_gated`: every implementation against dense factors, and what may not reach a result."""

import re
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_kernels.lora import api
from qwen2_kernels.lora.batch import O_PROJECTION, qkv_projection
from qwen2_kernels.lora.config import Config, ExpandConfig, ShrinkConfig

from tests.kernels.interpreter import triton_interpreter
from tests.kernels.lora_steps import PROJECTIONS, STEPS, Step, StepSpec, make_step

lora_delta: Any = api.lora_delta
lora_gated: Any = api.lora_gated
VECTOR = Config(shrink=ShrinkConfig(kind="vector", block_k=64), expand=ExpandConfig(kind="vector", block_n=32))
DOT = Config(
    shrink=ShrinkConfig(kind="dot", block_k=16, num_blocks=2),
    expand=ExpandConfig(kind="dot", block_n=16, num_tiles=2),
)
CONFIGS = {
    "vector": VECTOR,
    "vector_loop": Config(
        shrink=replace(VECTOR.shrink, max_programs=3), expand=replace(VECTOR.expand, block_n=128, max_programs=2)
    ),
    "dot": DOT,
    "dot_loop": Config(
        shrink=replace(DOT.shrink, all_slices=True, max_programs=2),
        expand=replace(DOT.expand, block_n=64, num_tiles=1, max_programs=3),
    ),
}
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"implementation": name} for name in ("auto", *api.DELTA_IMPLEMENTATIONS)},
    **{name: {"implementation": "triton", "config": config} for name, config in CONFIGS.items()},
}
COMBINATIONS = [
    (run, spec)
    for run in RUNS
    for spec in STEPS
    if run in ("reference", "xla") or (run in ("vector", "dot") and spec != "ranks") or spec in ("ranks", "base")
]
"""Every step with every kernel, and two with what differs in the number of programs."""
MIX = StepSpec(token_groups=(0, -1, 2, 1, 0, 2, 2, 0), ranks=(20, 16, 8))


def run_delta(step: Step, name: str, run: str, **options: Any) -> np.ndarray:
    arrays = (jnp.asarray(array) for array in (step.x, step.a_bank, step.b_bank))
    with triton_interpreter():
        return np.asarray(lora_delta(*arrays, step.batch, projection=PROJECTIONS[name][0], **(RUNS[run] | options)))


def run_gated(step: Step, base: np.ndarray, run: str, activation: str = "silu", **options: Any) -> np.ndarray:
    b_bank = step.b_bank.reshape(*step.b_bank.shape[:2], 2, -1)
    arrays = (jnp.asarray(array) for array in (step.x, base, step.a_bank, b_bank))
    with triton_interpreter():
        return np.asarray(lora_gated(*arrays, step.batch, activation=activation, **(RUNS[run] | options)))


def draw_base(step: Step) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((len(step.x), 2, step.b_bank.shape[2] // 2), np.float32)


def vector_rows(step: Step, otherwise: float) -> np.ndarray:
    """Each token's row of the vector bank, [T, N], or what it has without one."""
    used = (step.token_vectors >= 0)[:, None]
    return np.where(used, step.vectors[step.token_vectors], np.float32(otherwise))


def gated_formula(total: np.ndarray) -> np.ndarray:
    return total[:, 0] / (1 + np.exp(-total[:, 0])) * total[:, 1]


@pytest.mark.parametrize(
    "name, run, spec", [("qkv", *both) for both in COMBINATIONS] + [("o", "xla", "modules"), ("down", "dot", "ranks")]
)
def test_delta_is_the_adapters_product(name: str, run: str, spec: str) -> None:
    step = make_step(STEPS[spec], name)
    np.testing.assert_allclose(run_delta(step, name, run), step.delta, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run, spec", COMBINATIONS)
def test_gated_adds_before_the_activation(run: str, spec: str) -> None:
    step = make_step(STEPS[spec], "gate_up")
    base = draw_base(step)
    expected = gated_formula(base + step.delta.reshape(base.shape))
    np.testing.assert_allclose(run_gated(step, base, run), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run", RUNS)
def test_vectors_are_those_of_the_segment(run: str) -> None:
    step = make_step(STEPS["ranks"], "qkv")
    found = run_delta(step, "qkv", run, bias_bank=jnp.asarray(step.vectors))
    np.testing.assert_allclose(found, step.delta + vector_rows(step, 0), rtol=1e-4, atol=2e-5)

    step = make_step(STEPS["ranks"], "gate_up")
    base = draw_base(step)
    bank = jnp.asarray(step.vectors.reshape(len(step.vectors), *base.shape[1:]))
    bias, scale = (vector_rows(step, otherwise).reshape(base.shape) for otherwise in (0, 1))
    delta = step.delta.reshape(base.shape)
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"bias_bank": bank}, base + delta + bias),
        ({"scale_bank": bank}, base * scale + delta),
        ({"bias_bank": bank, "scale_bank": bank}, base * scale + delta + bias),
    ]
    for banks, total in cases:
        found = run_gated(step, base, run, **banks)
        np.testing.assert_allclose(found, gated_formula(total), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    step = make_step(STEPS["ranks"], "gate_up")
    base = draw_base(step)
    expected = run_gated(step, base, "reference", activation)
    assert not np.allclose(expected, run_gated(step, base, "reference"), atol=1e-3)
    for run in ("xla", "vector", "dot"):
        np.testing.assert_allclose(run_gated(step, base, run, activation), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16_is_rounded_once(implementation: str) -> None:
    step = make_step(MIX, "o")
    x, a_bank, b_bank = (jnp.asarray(array, jnp.bfloat16) for array in (step.x, step.a_bank, step.b_bank))
    run = {"batch": step.batch, "projection": O_PROJECTION, "implementation": implementation}
    found = lora_delta(x, a_bank, b_bank, **run)
    exact = lora_delta(*(array.astype(jnp.float32) for array in (x, a_bank, b_bank)), **run)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_nan_stays_in_its_token(run: str) -> None:
    step = make_step(MIX, "gate_up")
    base = draw_base(step)
    clean = run_gated(step, base, run)
    step.x[[1, 4], 5] = np.nan
    base[7, 0] = np.nan
    found = run_gated(step, base, run)
    np.testing.assert_array_equal(np.delete(found, [4, 7], 0), np.delete(clean, [4, 7], 0))
    assert np.isnan(found[[4, 7]]).all()


@pytest.mark.parametrize("run", ["xla", *CONFIGS])
@pytest.mark.parametrize("name", ["o"])
def test_a_token_does_not_see_the_others(name: str, run: str) -> None:
    mixed = make_step(MIX, name)
    found = run_delta(mixed, name, run)
    np.testing.assert_array_equal(found, run_delta(mixed, name, run))
    for token in (3, 5):
        alone = tuple(group if t == token else -1 for t, group in enumerate(MIX.token_groups))
        step = make_step(replace(MIX, token_groups=alone), name)
        np.testing.assert_array_equal(run_delta(step, name, run)[token], found[token])


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (8, 63)),
        ("x", (7, 64)),
        ("a_bank", (6, 2, 16, 64)),
        ("a_bank", (6, 1, 8, 64)),
        ("b_bank", (5, 16, 40)),
        ("b_bank", (6, 16, 2, 20)),
        ("bias_bank", (3, 41)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    batch = make_step(MIX, "o").batch
    arrays = {"x": (8, 64), "a_bank": (6, 1, 16, 64), "b_bank": (6, 16, 40), "bias_bank": (3, 40)} | {name: shape}
    with pytest.raises(ValueError, match=re.escape(f"{name} {shape}")):
        lora_delta(**{n: jnp.zeros(s) for n, s in arrays.items()}, batch=batch, projection=O_PROJECTION)


def test_what_is_not_there_is_refused() -> None:
    step = make_step(MIX, "gate_up")
    base = draw_base(step)
    with pytest.raises(ValueError, match="lora: shapes do not fit 2 modules"):
        run_gated(step, base[:, :, 1:], "auto")
    with pytest.raises(ValueError, match="activation 'tanh' is not one of silu, gelu, gelu_tanh"):
        run_gated(step, base, "auto", "tanh")
    with pytest.raises(ValueError, match="no implementation 'cuda'; use one of auto, reference, xla, triton"):
        run_gated(step, base, "auto", implementation="cuda")
    with pytest.raises(ValueError, match="config is for implementation='triton', not 'xla'"):
        run_gated(step, base, "xla", config=VECTOR)
    with pytest.raises(ValueError, match="40 columns are not a multiple of 16 x 4"):
        qkv_projection(2, 16).blocks(40)
    step = replace(step, x=step.x.astype(np.float16))
    with pytest.raises(NotImplementedError, match="not x float16 with float32 and float32"):
        run_gated(step, base.astype(np.float16), "triton")


@pytest.mark.parametrize(
    "make, wrong, message",
    [
        (ShrinkConfig, {"kind": "gemv", "block_k": 64}, "kind is 'vector' or 'dot', not 'gemv'"),
        (ShrinkConfig, {"kind": "dot", "block_k": 48}, r"powers of two for block_k, num_warps; not \{'block_k': 48\}"),
        (ShrinkConfig, {"kind": "dot", "block_k": 64, "num_stages": 0}, r"not \{'num_stages': 0\}"),
        (ShrinkConfig, {"kind": "vector", "block_k": 64, "all_slices": True}, "all_slices belong to kind='dot'"),
        (ExpandConfig, {"kind": "vector", "block_n": 64, "num_tiles": 2}, "num_tiles belongs to kind='dot'"),
    ],
)
def test_impossible_configs_are_refused(make: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**wrong)

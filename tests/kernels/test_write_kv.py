"""`write_kv` against numpy: rotation, where tokens go, 8 bits, and pools that are written in place."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_kernels import Adapted, write_kv
from qwen2_kernels.write_kv.api import IMPLEMENTATIONS

from tests.kernels.interpreter import triton_interpreter

POOL = (5, 4, 2, 8)  # P, B, K, H: 20 slots
E4M3 = jnp.float8_e4m3fn
IMPLEMENTATION = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
SLOTS = [
    pytest.param([7], id="one"),
    pytest.param([-1], id="one_skipped"),
    pytest.param([19, 0, -1, 6, 5, -1, 12], id="several"),
    pytest.param([-1, -1, -1], id="all_skipped"),
]


@functools.cache
def program(implementation: str, **scales: float) -> Any:
    return jax.jit(functools.partial(write_kv, implementation=implementation, **scales), donate_argnums=(3, 4))


def draw(tokens: int, group: int = 3, *, size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A step's fused projection, and the cosine and sine of random angles."""
    rng = np.random.default_rng(tokens)
    angles = rng.uniform(0, 6.3, (tokens, POOL[3] // 2)).astype(np.float32)
    qkv = size * rng.standard_normal((tokens, POOL[2], group + 2, POOL[3]), np.float32)
    return qkv, np.cos(angles), np.sin(angles)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Hugging Face's `x * cos + rotate_half(x) * sin`, for x of [T, K, G, H]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = (np.concatenate([half, half], axis=-1)[:, None, None, :] for half in (cos, sin))
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def write(
    implementation: str,
    inputs: tuple[Any, ...],
    slots: list[int],
    pool: Any = jnp.float32,
    bias: np.ndarray | None = None,
    adapted: Adapted | None = None,
    **scales: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write into pools full of 9."""
    pools = [jnp.full(POOL, 9, pool) for _ in range(2)]
    arguments = (*inputs, *pools, np.asarray(slots, np.int32))
    extra = {} if bias is None else {"bias": jnp.asarray(bias)}
    extra |= {} if adapted is None else {"adapted": adapted}
    if implementation == "triton" and jax.default_backend() == "cpu":
        with triton_interpreter():
            q, k, v = program(implementation, **scales).__wrapped__(*map(jnp.asarray, arguments), **extra)
    else:
        q, k, v = program(implementation, **scales)(*arguments, **extra)
    assert q.dtype == inputs[0].dtype and k.dtype == v.dtype == pool
    return np.asarray(q, np.float32), np.asarray(k, np.float32), np.asarray(v, np.float32)


def written(slots: list[int], tokens: np.ndarray) -> np.ndarray:
    pool = np.full((POOL[0] * POOL[1], *POOL[2:]), 9, np.float32)
    for slot, token in zip(slots, tokens, strict=True):
        if slot >= 0:
            pool[slot] = token
    return pool.reshape(POOL)


@IMPLEMENTATION
@pytest.mark.parametrize("slots", SLOTS)
def test_float32(slots: list[int], implementation: str) -> None:
    qkv, cos, sin = inputs = draw(len(slots))
    rotated = rotate(qkv[:, :, :-1], cos, sin)
    q, k, v = write(implementation, inputs, slots)
    np.testing.assert_allclose(q, rotated[:, :, :-1], atol=1e-6)
    np.testing.assert_allclose(k, written(slots, rotated[:, :, -1]), atol=1e-6)
    np.testing.assert_array_equal(v, written(slots, qkv[:, :, -1]))


@IMPLEMENTATION
@pytest.mark.parametrize("slots", SLOTS)
def test_bfloat16_is_rounded_once(slots: list[int], implementation: str) -> None:
    if implementation == "triton" and jax.default_backend() == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")
    qkv, cos, sin = draw(len(slots))
    half = jnp.asarray(qkv, jnp.bfloat16)
    q, k, v = write(implementation, (half, cos, sin), slots, jnp.bfloat16)
    exact = rotate(np.asarray(half, np.float32)[:, :, :-1], cos, sin)
    np.testing.assert_allclose(q, exact[:, :, :-1], rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(k, written(slots, exact[:, :, -1]), rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(v, written(slots, np.asarray(half[:, :, -1], np.float32)))


@IMPLEMENTATION
@pytest.mark.parametrize("slots", [[7], [19, 0, -1, 6]])
def test_8_bits_are_scaled_and_clipped(slots: list[int], implementation: str) -> None:
    if implementation == "triton" and jax.default_backend() == "cpu":
        pytest.skip("Triton's interpreter does not round to 8 bits")
    qkv, cos, sin = inputs = draw(len(slots), size=100.0)
    _, k, v = write(implementation, inputs, slots, E4M3, k_scale=0.5, v_scale=0.125)
    keys, values = rotate(qkv[:, :, -2:-1], cos, sin)[:, :, 0] / 0.5, qkv[:, :, -1] / 0.125
    assert (abs(values) > 448).any(), "nothing to clip"
    np.testing.assert_allclose(k, written(slots, np.clip(keys, -448, 448)), rtol=2**-4, atol=2**-9)
    rounded = np.asarray(jnp.asarray(np.clip(values, -448, 448), E4M3), np.float32)
    np.testing.assert_array_equal(v, written(slots, rounded))


@IMPLEMENTATION
def test_scales_hold_for_every_dtype(implementation: str) -> None:
    qkv, _, _ = inputs = draw(2)
    _, _, v = write(implementation, inputs, [3, 8], k_scale=0.5, v_scale=0.25)
    np.testing.assert_array_equal(v, written([3, 8], qkv[:, :, -1] * 4))


@IMPLEMENTATION
def test_a_bias_is_added_first(implementation: str) -> None:
    qkv, cos, sin = draw(3)
    bias = np.random.default_rng(0).standard_normal(qkv.shape[1:]).astype(np.float32)
    slots = [7, -1, 0]
    found = write(implementation, (qkv, cos, sin), slots, bias=bias)
    for one, other in zip(found, write("reference", (qkv + bias, cos, sin), slots), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@IMPLEMENTATION
def test_partial_sums_are_added_first(implementation: str) -> None:
    qkv, cos, sin = draw(3)
    rng = np.random.default_rng(0)
    bias, parts = (
        rng.standard_normal(qkv.shape[1:]).astype(np.float32),
        rng.standard_normal((3, *qkv.shape), np.float32),
    )
    parts[0] = qkv - parts[1] - parts[2]
    slots = [7, -1, 0]
    found = write(implementation, (parts, cos, sin), slots, bias=bias)
    for one, other in zip(found, write("reference", (qkv, cos, sin), slots, bias=bias), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@IMPLEMENTATION
def test_what_adapters_change_comes_before_the_bias(implementation: str) -> None:
    slots, rng = [19, 0, -1, 6], np.random.default_rng(1)
    qkv, cos, sin = draw(len(slots))
    bias, delta = (rng.standard_normal(shape).astype(np.float32) for shape in (qkv.shape[1:], qkv.shape))
    bank = rng.uniform(0.5, 2, (3, *qkv.shape[1:])).astype(np.float32)
    bank[0] = np.nan  # a row that no token names
    rows = np.array([2, -1, 1, -1], np.int32)
    scale = np.where((rows >= 0)[:, None, None, None], bank[rows], 1)
    adapted = Adapted(delta=jnp.asarray(delta), scale_bank=jnp.asarray(bank), scale_rows=jnp.asarray(rows))
    parts = np.stack([0.25 * qkv, 0.75 * qkv])
    expected = write("reference", (qkv * scale + delta + bias, cos, sin), slots)
    for source in (qkv, parts):
        found = write(implementation, (source, cos, sin), slots, bias=bias, adapted=adapted)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-6)


@IMPLEMENTATION
@pytest.mark.parametrize("slots", [[-1], [4, -1]])
def test_padding_is_never_written(slots: list[int], implementation: str) -> None:
    qkv, cos, sin = draw(len(slots))
    qkv[-1], cos[-1] = np.nan, np.nan
    q, k, v = write(implementation, (qkv, cos, sin), slots)
    assert np.isfinite(q[:-1]).all() and np.isfinite(k).all() and np.isfinite(v).all()


@pytest.mark.parametrize("slots", [[7], [-1], [19, 0, -1]])
def test_donated_pools_are_written_in_place(slots: list[int]) -> None:
    shape = (64, 16, 2, 8)
    pools = [jnp.zeros(shape), jnp.zeros(shape)]
    arguments = (*draw(len(slots)), *pools, jnp.asarray(slots, jnp.int32))
    compiled = program("xla").lower(*arguments).compile()
    addresses = [pool.unsafe_buffer_pointer() for pool in pools]
    _, k, v = compiled(*arguments)
    assert [k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()] == addresses
    size = np.prod(shape)
    for result, opcode in re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", compiled.as_text()):
        if opcode in ("copy", "select", "concatenate", "broadcast") and result:
            assert np.prod([int(axis) for axis in result.split(",")]) < size, f"{opcode} of a whole pool"


@pytest.mark.parametrize(
    "name, shape",
    [
        ("qkv", (3, 2, 2, 8)),
        ("qkv", (3, 2, 5, 7)),
        ("cos", (3, 8)),
        ("sin", (2, 4)),
        ("k_pool", (5, 4, 1, 8)),
        ("v_pool", (5, 2, 2, 8)),
        ("slot_mapping", (4,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    shapes = {"qkv": (3, 2, 5, 8), "cos": (3, 4), "sin": (3, 4), "k_pool": POOL, "v_pool": POOL, "slot_mapping": (3,)}
    arrays = {key: jnp.zeros(value, jnp.int32 if key == "slot_mapping" else None) for key, value in shapes.items()}
    run: Any = write_kv
    run(**arrays)
    with pytest.raises(ValueError, match=re.escape(f"{name} {shape}")):
        run(**(arrays | {name: jnp.zeros(shape, arrays[name].dtype)}))


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="write_kv has no implementation 'cuda'; use one of auto, reference, xla"):
        write("cuda", draw(1), [0])

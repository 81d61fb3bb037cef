"""What is timed: a chain of calls of one op, with the bytes and operations of each, and random arrays for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from qwen2_kernels.specs import Geometry

COLD_BYTES = 200 << 20
"""What a chain reads before it comes back to the same array: four times an H100's second-level cache."""
CHAIN_SECONDS = 500e-6
"""How long a chain takes at least where so many calls fit it: the host needs about a fifth of that to launch it."""
MAX_CALLS = 64
SPEED = {"bandwidth": 3.1e12, "flops": 7.6e14, "launch": 1.5e-6}
"""What an H100 does in a second, and the seconds of a launch: how long a call takes at least."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A chain of calls: `function(*make(seed))` returns new values for the first of the arrays, which are donated."""

    op: str
    implementation: str
    geometry: str
    dtype: str
    """Of what the op reads most of: weights, activations or pools."""
    shape: str
    make: Callable[[Array], tuple[Any, ...]]
    function: Callable[..., tuple[Any, ...]]
    calls: int
    """Calls of the op in a chain."""
    num_bytes: float
    """Bytes that a call reads and writes at least."""
    flops: float = 0.0
    """Operations that a call needs at least."""
    headline: bool = False
    """One of the few that tell how the op does."""
    key: str = ""
    """What `config` would be stored under, where tiles are tuned."""
    config: Any = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which cases to make."""

    name: str
    """The geometry's."""
    geometry: Geometry
    dtypes: tuple[str, ...] = ("bfloat16", "float8_e4m3fn")
    """Of the pools."""
    tune: bool = False
    """Every tile size worth trying, instead of every implementation."""


def num_arrays(num_bytes: float, *, least: int = 1, most: int = MAX_CALLS) -> int:
    """Return how many arrays of `num_bytes` a chain goes through, so that no cache holds them."""
    return min(max(least, math.ceil(COLD_BYTES / num_bytes)), most)


def num_calls(num_bytes: float, flops: float = 0.0, *, least: int = 4, most: int = MAX_CALLS) -> int:
    """Return how many calls a chain has."""
    seconds = max(num_bytes / SPEED["bandwidth"], flops / SPEED["flops"], SPEED["launch"])
    return min(max(least, math.ceil(CHAIN_SECONDS / seconds)), max(most, least))


def noise(seed: Array, stream: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Array:
    """Return numbers spread evenly over [-1, 1): hashed indices, one elementwise fusion for each array."""
    bits = lax.iota(jnp.uint32, math.prod(shape)) ^ (seed + jnp.uint32(stream * 0x9E3779B9 & 0xFFFFFFFF))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
    return ((bits >> 8).astype(jnp.float32) / 2**23 - 1).reshape(shape).astype(dtype)


def after(array: Array, result: Any) -> tuple[Array, Any]:
    """Return both; what uses `array` now waits for `result`, at no cost, and is no common subexpression of it."""
    return jax.lax.optimization_barrier((array, result))

"""How the attention kernel for NVIDIA Hopper is laid out, and what it does not do: see `hopper_attention`."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

ROWS = 64
"""Queries of a warpgroup: the height of a wgmma."""
ALIGNMENT = 8
"""TMA reads and writes the tiles of shared memory in groups of 8 tokens: tiles start at multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the GPU. The defaults are the fastest measured on an H100 with Qwen2.5-7B."""

    consumers: int = 2
    """Warpgroups that attend, of 64 queries each: 2 or 3."""
    kv_tile: int = 128
    """Keys in one step of the softmax, a multiple of 64."""
    stages: int = 2
    """Blocks of keys, and of values, in shared memory."""
    query_buffers: int = 1
    """Tiles of queries in shared memory: with 2, the next tile's are copied while this one's are in use."""
    programs: int | None = 132
    """Programs of the grid, each of which works off many tiles; None gives each tile and head its own."""
    qk_first: bool = True
    """Issue the next block's QK^T before the last block's PV, not after it."""
    take_turns: bool = True
    """Let one consumer at a time issue products."""

    @property
    def query_tile(self) -> int:
        """Queries of a program at a time."""
        return ROWS * self.consumers


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees."""

    causal: bool
    """A query sees no key behind its own position."""
    window: int | None
    """A query at position i sees no key at or before i - window."""
    bounded: bool
    """Keys of a tile's first block may lie before `Tile.key_low`, and are not seen."""


def unsupported(
    q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct, v: Array | jax.ShapeDtypeStruct | None = None
) -> str | None:
    """Return why the kernel cannot attend with these arrays, or None if it can.

    Args:
        q: queries [T, ..., H].
        k, v: keys and values [..., H].
    """
    dtypes = {array.dtype for array in (q, k, v) if array is not None}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        names = " and ".join(sorted(dtype.name for dtype in dtypes))
        return f"mosaic: bfloat16 or float16 throughout, not {names}"
    if q.shape[-1] not in (64, 128):
        return f"mosaic: head dimensions 64 and 128, not {q.shape[-1]}"
    if q.shape[0] % ALIGNMENT:
        return f"mosaic: a number of tokens that {ALIGNMENT} divides, not {q.shape[0]}"
    return unsupported_gpu()


def unsupported_gpu() -> str | None:
    """Return why the GPUs cannot run it. Without any, nothing speaks against lowering for one that is elsewhere."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:  # Its model's name is all that is known: H100, H200, GH200 and the like.
        is_hopper = re.search(r"\bG?H\d", described.device_kind) is not None
        return None if is_hopper else f"mosaic: GPUs of compute capability 9.0, not {described.device_kind}"
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return None
    others = {device.device_kind for device in devices if device.compute_capability != "9.0"}
    return f"mosaic: GPUs of compute capability 9.0, not {', '.join(sorted(others))}" if others else None

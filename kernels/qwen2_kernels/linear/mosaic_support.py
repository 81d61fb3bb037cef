"""What `linear`'s Mosaic kernel takes, said without importing Mosaic."""

import jax
import jax.numpy as jnp
from jax import Array

from qwen2_kernels.hopper_config import unsupported_gpu


def supported(
    x: Array | jax.ShapeDtypeStruct, kernel: Array | jax.ShapeDtypeStruct, activation: str | None = None
) -> str | None:
    """Return why the kernel cannot multiply x [T, D] and kernel [N, D] or [2, N, D], or None if it can."""
    if not x.dtype == kernel.dtype == jnp.bfloat16:
        return f"mosaic: bfloat16 throughout, not x {x.dtype} with kernel {kernel.dtype}"
    if kernel.shape[-1] % 64 or kernel.shape[-2] % 16:
        return f"mosaic: N a multiple of 16 and D of 64, not a kernel of {kernel.shape}"
    if activation not in (None, "silu"):
        return f"mosaic: the activation 'silu', not {activation!r}"
    return unsupported_gpu()

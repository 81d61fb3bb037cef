"""`write_kv`: rotate queries and keys, and write keys and values into the paged pools."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.adapted import Adapted
from qwen2_kernels.dispatch import select
from qwen2_kernels.write_kv.reference import write_kv_reference
from qwen2_kernels.write_kv.xla import write_kv_xla


def _triton(*arrays: Any, **options: Any) -> tuple[Array, Array, Array]:
    from qwen2_kernels.write_kv.triton_write import write_kv_triton

    return write_kv_triton(*arrays, **options)


IMPLEMENTATIONS = {"reference": write_kv_reference, "xla": write_kv_xla, "triton": _triton}


def write_kv(
    qkv: Float[Array, "T K G+2 H"] | Float[Array, "S T K G+2 H"],
    cos: Float[Array, "T H/2"],
    sin: Float[Array, "T H/2"],
    k_pool: Float[Array, "P B K H"],
    v_pool: Float[Array, "P B K H"],
    slot_mapping: Int[Array, " T"],
    *,
    bias: Float[Array, "K G+2 H"] | None = None,
    adapted: Adapted | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    implementation: str = "auto",
) -> tuple[Float[Array, "T K G H"], Float[Array, "P B K H"], Float[Array, "P B K H"]]:
    """Rotate a step's queries and keys, and write its keys and values into the pools.

    Args:
        qkv: the fused projection, per KV head its G query heads, then its key, then its value; or partial sums of it
            over S (`linear_partial`), which need a `bias`, whose dtype the queries then have.
        cos, sin: the rotary angles' cosine and sine at each token's position, float32.
        k_pool, v_pool: P blocks of B slots; donate them, so that the write is in place. A value is divided by its
            scale, and in 8 bits (float8_e4m3fn) clipped to the type's range.
        slot_mapping: where each token goes, `block * B + offset`; -1 writes nothing.
        bias: the projection's, added to each token first.
        adapted: what adapters change in the projection before `bias`, which is needed, is added.
        k_scale, v_scale: what a stored value is multiplied by to give the real one.

    Returns:
        The rotated queries in `qkv`'s dtype, and the two pools.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: a named implementation that cannot do what is asked.

    The rotation is the half-split one of Hugging Face's `apply_rotary_pos_emb`, in float32 with one rounding.
    """
    tokens, kv_heads, slots, head_dim = qkv.shape[-4:]
    shapes = {"qkv": qkv, "cos": cos, "sin": sin, "k_pool": k_pool, "v_pool": v_pool, "slot_mapping": slot_mapping}
    shapes |= {} if bias is None else {"bias": bias}
    shapes |= {} if adapted is None else {name: getattr(adapted, name) for name in adapted.__dataclass_fields__}
    if (
        slots < 3
        or (bias is None and (qkv.ndim == 5 or adapted is not None))
        or (adapted is not None and not adapted.fits(qkv.shape[-4:]))
        or head_dim % 2
        or not cos.shape == sin.shape == (tokens, head_dim // 2)
        or k_pool.shape[2:] != (kv_heads, head_dim)
        or k_pool.shape != v_pool.shape
        or slot_mapping.shape != (tokens,)
        or (bias is not None and bias.shape != qkv.shape[-3:])
    ):
        raise ValueError(f"write_kv: shapes do not fit: {', '.join(f'{n} {a.shape}' for n, a in shapes.items())}")
    gpu, reason = "triton", "one launch that writes in place"
    if head_dim & (head_dim - 1):
        gpu, reason = "xla", f"a head dim of {head_dim} is not a power of two"
    run = select("write_kv", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    return run(qkv, cos, sin, k_pool, v_pool, slot_mapping, bias, adapted, k_scale=k_scale, v_scale=v_scale)

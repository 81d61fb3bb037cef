"""`flash_attention` by NVIDIA's cuDNN, through JAX's binding (`jax._src`: the public one takes no packed prompts)."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as binding


def flash_attention_cudnn(
    q: Array, k: Array, v: Array, query_start_loc: Array, *, scale: float, window: int | None, causal: bool
) -> Array:
    """See `api.flash_attention`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 and float16, a head dimension over 256 or no multiple of 8, or a
            window without causality.
        RuntimeError: there is no cuDNN.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"cudnn: bfloat16 or float16 throughout, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise NotImplementedError(f"cudnn: head dimensions up to 256 that 8 divides, not {q.shape[-1]}")
    if window is not None and not causal:
        raise NotImplementedError("cudnn: windows of causal attention only")
    tokens, kv_heads, group, head_dim = q.shape
    starts = query_start_loc.astype(jnp.int32)
    is_real = (jnp.arange(tokens) < starts[-1])[:, None, None]
    lens, offsets = jnp.diff(starts)[None], starts[None]
    if lens.shape[1] == 1:  # The binding takes one prompt for a batch of one that is not packed.
        lens, offsets = lens[0], None
    out: Any = binding.dot_product_attention(  # an array, as no residuals are asked for
        q.reshape(1, tokens, kv_heads * group, head_dim),
        k[None],
        jnp.where(is_real, v, 0)[None],  # A weight of 0 does not hide a NaN.
        q_seqlen=lens,
        kv_seqlen=lens,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=binding.MaskType.PADDING_CAUSAL if causal else binding.MaskType.PADDING,
        sliding_window_length=window,
    )
    return jnp.where(is_real[..., None], out.reshape(q.shape), 0)

"""`paged_attention` on Hopper: Mosaic's kernel for rows with several queries, Triton's for rows with one."""

from typing import Any

from jax import Array

from qwen2_kernels.paged_attention.mosaic import paged_attention_mosaic
from qwen2_kernels.paged_attention.triton_attention import decode_config
from qwen2_kernels.paged_attention.triton_decode import decode_attention


def paged_attention_hopper(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    query_start_loc: Array | None,
    *,
    scale: float,
    window: int | None,
    causal: bool,
    k_scale: float,
    v_scale: float,
) -> Array:
    """See `api.paged_attention`.

    Raises:
        NotImplementedError: decode, or what `mosaic.supported` gives a reason for.
    """
    if query_start_loc is None:
        raise NotImplementedError("paged_attention: mosaic attends for steps with prefills; use triton to decode")
    options: dict[str, Any] = {"scale": scale, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    arguments = (k_pool, v_pool, block_tables, context_lens, query_start_loc)
    out = paged_attention_mosaic(q, *arguments, **options, causal=causal, skip_single=True)
    return decode_attention(q, *arguments, out, **options, config=decode_config(q, k_pool, block_tables))

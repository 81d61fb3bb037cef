"""`paged_attention`: attention of a step's queries over keys and values in paged pools."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import select
from qwen2_kernels.launch import has_triton
from qwen2_kernels.paged_attention.reference import paged_attention_reference
from qwen2_kernels.paged_attention.xla import paged_attention_xla


def _triton(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.paged_attention.triton_attention import paged_attention_triton

    return paged_attention_triton(*arrays, **options)


def _mosaic(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.paged_attention.hopper import paged_attention_hopper

    return paged_attention_hopper(*arrays, **options)


IMPLEMENTATIONS = {
    "reference": paged_attention_reference,
    "xla": paged_attention_xla,
    "triton": _triton,
    "mosaic": _mosaic,
}


def paged_attention(
    q: Float[Array, "T K G H"],
    k_pool: Float[Array, "P B K H"],
    v_pool: Float[Array, "P B K H"],
    block_tables: Int[Array, "R M"],
    context_lens: Int[Array, " R"],
    query_start_loc: Int[Array, " R+1"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    implementation: str = "auto",
) -> Float[Array, "T K G H"]:
    """Attend from each query to its own row's tokens in the pools.

    Row r's queries are the last `query_start_loc[r+1] - query_start_loc[r]` of its `context_lens[r]` tokens, all of
    which lie in the pools already: a fresh prompt, a chunk of one, and a decode step are the same operation.

    Args:
        q: the step's queries, grouped by the KV head that they read; rows lie one behind another on T.
        k_pool, v_pool: P blocks of B tokens.
        block_tables: the blocks of each row, in order. Entries past a row's context, or before every query's window,
            are never used.
        context_lens: tokens of each row in the pools, this step's included; 0 for a row that is padding.
        query_start_loc: where each row's queries start on T, and the end. None in decode: T = R, one query a row.
        scale: what the logits are multiplied by, usually H ** -0.5.
        window: a query at position i sees positions j with i - window < j <= i (Hugging Face's `sliding_window`).
        causal: False lets each query see its row's whole context.
        k_scale, v_scale: what a stored key or value is multiplied by to give the real one.

    Returns:
        The attended values in `q`'s dtype; zeros for queries that belong to no row.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: a named implementation that cannot do what is asked.
    """
    if q.shape[1:2] + q.shape[3:] != k_pool.shape[2:] or k_pool.shape != v_pool.shape:
        raise ValueError(
            f"paged_attention: shapes do not fit: q {q.shape}, k_pool {k_pool.shape}, v_pool {v_pool.shape}"
        )
    rows = block_tables.shape[0]
    if context_lens.shape != (rows,) or (query_start_loc is not None and query_start_loc.shape != (rows + 1,)):
        starts = None if query_start_loc is None else query_start_loc.shape
        raise ValueError(
            f"paged_attention: shapes do not fit: block_tables {block_tables.shape}, "
            f"context_lens {context_lens.shape}, query_start_loc {starts}"
        )
    if query_start_loc is None and q.shape[0] != rows:
        raise ValueError(f"paged_attention: decode has one query a row, not {q.shape[0]} for {rows}")
    gpu, reason = _choice_on_gpu(q, k_pool, is_decode=query_start_loc is None)
    run = select("paged_attention", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    return run(
        q,
        k_pool,
        v_pool,
        block_tables,
        context_lens,
        query_start_loc,
        scale=scale,
        window=window,
        causal=causal,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _choice_on_gpu(q: Array, k_pool: Array, *, is_decode: bool) -> tuple[str, str]:
    """Return the implementation for a GPU, and why."""
    head_dim = q.shape[-1]
    if head_dim < 16 or head_dim & (head_dim - 1):
        return "xla", f"a head dim of {head_dim} is not a power of two of at least 16"
    if is_decode or not has_triton():
        return "triton", "it reads each block once for all heads of a group"
    from qwen2_kernels.paged_attention.mosaic import supported

    unsupported = supported(q, k_pool)
    return ("mosaic", "Hopper's tensor cores") if unsupported is None else ("triton", unsupported)

"""`flash_attention`: attention within prompts that lie one behind another."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import select
from qwen2_kernels.flash_attention.reference import flash_attention_reference
from qwen2_kernels.hopper_config import unsupported


def _mosaic(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.flash_attention.mosaic import flash_attention_mosaic

    return flash_attention_mosaic(*arrays, **options)


IMPLEMENTATIONS = {"reference": flash_attention_reference, "mosaic": _mosaic}


def flash_attention(
    q: Float[Array, "T K G H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    query_start_loc: Int[Array, " R+1"],
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    implementation: str = "auto",
) -> Float[Array, "T K G H"]:
    """Attend from each token to the tokens of its own prompt.

    Args:
        q, k, v: the step's rotated queries and keys, and its values; prompts lie one behind another on T.
        query_start_loc: where each prompt starts on T, and the end; tokens past it are padding.
        scale, window, causal: as in `paged_attention`.
        implementation: `"reference"`, `"mosaic"` (Hopper, bfloat16 or float16) or `"auto"`: `"mosaic"` where it can do
            what is asked. The engine's prompts go through `paged_attention`, whose Mosaic kernel is this over pools.

    Returns:
        The attended values in `q`'s dtype; zeros for padding.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: `"mosaic"` where it cannot do what is asked.
    """
    if q.shape[:2] + q.shape[3:] != k.shape or k.shape != v.shape:
        raise ValueError(f"flash_attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    reason = unsupported(q, k, v)
    gpu = "reference" if reason else "mosaic"
    reason = reason or "Hopper's tensor cores"
    run = select("flash_attention", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="reference", reason=reason)
    return run(q, k, v, query_start_loc, scale=scale, window=window, causal=causal)

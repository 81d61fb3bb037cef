"""`flash_attention`: attention within prompts that lie one behind another."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import select
from qwen2_kernels.flash_attention.reference import flash_attention_reference


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

    Returns:
        The attended values in `q`'s dtype; zeros for padding.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: `"mosaic"` (Hopper, bfloat16 or float16) where it cannot do what is asked.
    """
    if q.shape[:2] + q.shape[3:] != k.shape or k.shape != v.shape:
        raise ValueError(f"flash_attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    run = select(
        "flash_attention",
        IMPLEMENTATIONS,
        implementation,
        gpu="reference",
        elsewhere="reference",
        reason="one there is",
    )
    return run(q, k, v, query_start_loc, scale=scale, window=window, causal=causal)

"""The least logit of each row that top-k sampling, top-p sampling, or one after the other keeps."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import Implementation, select
from qwen2_kernels.thresholds.reference import top_k_threshold_reference, top_p_threshold_reference
from qwen2_kernels.thresholds.xla import top_k_threshold_xla, top_p_threshold_xla


def _top_k_triton(*arrays: Any) -> Array:
    from qwen2_kernels.thresholds.triton_thresholds import top_k_threshold_triton

    return top_k_threshold_triton(*arrays)


def _top_p_triton(*arrays: Any) -> Array:
    from qwen2_kernels.thresholds.triton_thresholds import top_p_threshold_triton

    return top_p_threshold_triton(*arrays)


def _both_triton(*arrays: Any) -> Array:
    from qwen2_kernels.thresholds.triton_few import top_k_top_p_threshold_triton

    return top_k_top_p_threshold_triton(*arrays)


def _one_after_the_other(top_k: Implementation, top_p: Implementation) -> Implementation:
    """Return `top_k_top_p_threshold` made of two implementations."""

    def both(logits: Array, k: Array, p: Array, temperature: Array, floor: Array) -> Array:
        floor = jnp.maximum(floor, top_k(logits, k, temperature, floor))
        return jnp.maximum(floor, top_p(logits, p, temperature, floor))

    return both


TOP_K_IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": top_k_threshold_reference,
    "xla": top_k_threshold_xla,
    "triton": _top_k_triton,
}
TOP_P_IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": top_p_threshold_reference,
    "xla": top_p_threshold_xla,
    "triton": _top_p_triton,
}
BOTH_IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": _one_after_the_other(top_k_threshold_reference, top_p_threshold_reference),
    "xla": _one_after_the_other(top_k_threshold_xla, top_p_threshold_xla),
    "triton": _both_triton,
}


def top_k_threshold(
    logits: Float[Array, "R V"],
    k: Int[Array, " R"],
    temperature: Float[Array, " R"],
    floor: Float[Array, " R"],
    *,
    implementation: str = "auto",
) -> Float[Array, " R"]:
    """Return each row's k-th largest scaled logit, which is `logits * (1 / temperature)`.

    Args:
        logits: float32; equal ones count one by one.
        k: minus infinity is returned where it is below 1, or more than there are.
        temperature: more than 0 where k is.
        floor: scaled logits below it count as minus infinity; minus infinity leaves all as they are.
        implementation: `"reference"` (sorts), `"xla"`, `"triton"` (CUDA) or `"auto"`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    return _run("top_k_threshold", TOP_K_IMPLEMENTATIONS, implementation, logits, k, temperature, floor)


def top_p_threshold(
    logits: Float[Array, "R V"],
    p: Float[Array, " R"],
    temperature: Float[Array, " R"],
    floor: Float[Array, " R"],
    *,
    implementation: str = "auto",
) -> Float[Array, " R"]:
    """Return the smallest scaled logit of each row's smallest set of likeliest tokens whose probability reaches `p`.

    Nucleus sampling (Holtzman et al. 2020). Equal logits at the cut are all in the set. Sums are in float32, so that a
    set whose probability is `p` within rounding may be taken or left.

    Args:
        logits: float32, of which minus infinity has no probability.
        p: more than 0; minus infinity is returned from 1 on.
        temperature: more than 0 where p is below 1.
        floor: see `top_k_threshold`; at most the row's largest.
        implementation: see `top_k_threshold`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    return _run("top_p_threshold", TOP_P_IMPLEMENTATIONS, implementation, logits, p, temperature, floor)


def top_k_top_p_threshold(
    logits: Float[Array, "R V"],
    k: Int[Array, " R"],
    p: Float[Array, " R"],
    temperature: Float[Array, " R"],
    floor: Float[Array, " R"],
    *,
    implementation: str = "auto",
) -> Float[Array, " R"]:
    """Return the least scaled logit of each row that `floor`, top-k and then top-p keep.

    Args:
        logits: float32, of which minus infinity has no probability.
        k: see `top_k_threshold`.
        p: see `top_p_threshold`; of the probability that top-k leaves.
        temperature: more than 0 where `k` or `p` asks for something.
        floor: see `top_p_threshold`.
        implementation: see `top_k_threshold`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    return _run("top_k_top_p_threshold", BOTH_IMPLEMENTATIONS, implementation, logits, k, p, temperature, floor)


def _run(
    op: str, implementations: Mapping[str, Implementation], implementation: str, logits: Array, *of_rows: Array
) -> Array:
    shapes = ", ".join(str(array.shape) for array in of_rows)
    fits = logits.ndim == 2 and all(array.shape == logits.shape[:1] for array in of_rows)
    if not fits or 0 in logits.shape or logits.dtype != jnp.float32:
        raise ValueError(f"{op}: logits {logits.shape} {logits.dtype} and {shapes} do not fit: use float32 [R, V]")
    reason = "a few launches find what takes XLA's loop 32 passes of four kernels each"
    run = select(op, implementations, implementation, gpu="triton", elsewhere="xla", reason=reason)
    return run(logits, *of_rows)

"""`top_logits`: the likeliest tokens of each row, and the logarithm that makes log-probabilities of logits."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from qwen2_kernels.dispatch import Implementation, select
from qwen2_kernels.top_logits.reference import top_logits_reference
from qwen2_kernels.top_logits.xla import top_logits_xla

MOST = 64
"""Logits of a row that the Triton kernel finds at most."""


def _top_logits_triton(logits: Array, is_wanted: Array, count: int) -> tuple[Array, ...]:
    from qwen2_kernels.top_logits.triton_top import top_logits_triton

    if count > MOST:
        raise NotImplementedError(f"top_logits: triton finds {MOST} logits of a row at most, not {count}")
    return top_logits_triton(logits, is_wanted, count)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": top_logits_reference,
    "xla": top_logits_xla,
    "triton": _top_logits_triton,
}


def top_logits(
    logits: Float[Array, "R V"], is_wanted: Bool[Array, " R"], *, count: int, implementation: str = "auto"
) -> tuple[Float[Array, "R K"], Int[Array, "R K"], Float[Array, " R"]]:
    """Return each row's K largest logits, falling, their places, and `log(sum(exp(logits - largest)))`.

    Args:
        logits: float32; of equal ones the first come first, as with `jax.lax.top_k`.
        is_wanted: rows that are not get zeros.
        count: K, 1 to V.
        implementation: `"reference"` (sorts), `"xla"`, `"triton"` (CUDA, K up to 64) or `"auto"`.

    Raises:
        ValueError: shapes, dtypes or a count that do not fit, or an unknown implementation.
        NotImplementedError: a count that the named implementation does not serve.
    """
    fits = logits.ndim == 2 and is_wanted.shape == logits.shape[:1] and 0 not in logits.shape
    if not fits or logits.dtype != jnp.float32 or is_wanted.dtype != jnp.bool_:
        raise ValueError(
            f"top_logits: logits {logits.shape} {logits.dtype} and is_wanted {is_wanted.shape} {is_wanted.dtype} do "
            "not fit: use float32 [R, V] and bool [R]"
        )
    if not 1 <= count <= logits.shape[1]:
        raise ValueError(f"top_logits: count={count} is not one of 1 to {logits.shape[1]}, the number of logits")
    gpu, reason = "triton", "two launches read the logits once, where XLA reads them four times and sorts"
    if count > MOST:
        gpu, reason = "xla", f"{count} logits of a row are more than the {MOST} that the Triton kernel finds"
    run = select("top_logits", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    return run(logits, is_wanted, count=count)

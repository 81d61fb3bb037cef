"""`token_ranks`: where tokens stand among all of their row's, by falling probability."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import Implementation, select
from qwen2_kernels.token_ranks.reference import token_ranks_reference
from qwen2_kernels.token_ranks.xla import token_ranks_xla


def _token_ranks_triton(*arrays: Any) -> Array:
    from qwen2_kernels.token_ranks.triton_ranks import token_ranks_triton

    return token_ranks_triton(*arrays)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": token_ranks_reference,
    "xla": token_ranks_xla,
    "triton": _token_ranks_triton,
}


def token_ranks(
    logits: Float[Array, "R V"], token_ids: Int[Array, "R C"], *, implementation: str = "auto"
) -> Int[Array, "R C"]:
    """Return the ranks of tokens of each row: 1 for the likeliest, and one more for each with a larger logit.

    Args:
        logits: float32.
        token_ids: -1 asks for nothing and gets 0. Time depends on each row's last column that asks.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA) or `"auto"`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    fits = logits.ndim == token_ids.ndim == 2 and len(token_ids) == len(logits) and 0 not in logits.shape
    if not fits or 0 in token_ids.shape or logits.dtype != jnp.float32 or token_ids.dtype != jnp.int32:
        raise ValueError(
            f"token_ranks: logits {logits.shape} {logits.dtype} and token_ids {token_ids.shape} {token_ids.dtype} do "
            "not fit: use float32 [R, V] and int32 [R, C]"
        )
    reason = "one launch reads the logits once for all columns, where XLA's loop reads them for each"
    run = select("token_ranks", IMPLEMENTATIONS, implementation, gpu="triton", elsewhere="xla", reason=reason)
    return run(logits, token_ids)

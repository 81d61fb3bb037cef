"""`gumbel_argmax`: one token of each row, drawn by the softmax of its logits or the likeliest."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import Implementation, select
from qwen2_kernels.gumbel_argmax.reference import gumbel_argmax_reference
from qwen2_kernels.gumbel_argmax.xla import gumbel_argmax_xla


def _gumbel_argmax_triton(*arrays: Any) -> Array:
    from qwen2_kernels.gumbel_argmax.triton_gumbel import gumbel_argmax_triton

    return gumbel_argmax_triton(*arrays)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "reference": gumbel_argmax_reference,
    "xla": gumbel_argmax_xla,
    "triton": _gumbel_argmax_triton,
}


def gumbel_argmax(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    threshold: Float[Array, " R"],
    seeds_high: Int[Array, " R"],
    seeds_low: Int[Array, " R"],
    indices: Int[Array, " R"],
    *,
    implementation: str = "auto",
) -> Int[Array, " R"]:
    """Return the first place of each row's largest `logits * (1 / temperature) + noise`, the Gumbel-max trick.

    That draws from the softmax of what is kept (Gumbel 1954; Maddison et al. 2014). The noise depends on the seed and
    the index alone: its bits are those of `jax.random.gumbel` with the key `fold_in(seed, index)`, threefry2x32.

    Args:
        logits: float32; minus infinity is never drawn where there is anything else, NaN counts as the largest.
        temperature: 0 takes the logits as they are, without noise. Its inverse is rounded before it multiplies,
            which is what XLA makes of a division.
        threshold: what is below it after the product counts as minus infinity; minus infinity keeps all.
        seeds_high: the upper 32 bits of each row's seed, as int32.
        seeds_low: the lower ones.
        indices: which of a seed's draws this is, int32.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA) or `"auto"`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    floats, ints = (temperature, threshold), (seeds_high, seeds_low, indices)
    fits = logits.ndim == 2 and 0 not in logits.shape and logits.dtype == jnp.float32
    fits = fits and all(array.shape == logits.shape[:1] for array in (*floats, *ints))
    fits = fits and all(array.dtype == jnp.float32 for array in floats)
    if not (fits and all(array.dtype == jnp.int32 for array in ints)):
        given = ", ".join(f"{array.shape} {array.dtype}" for array in (*floats, *ints))
        raise ValueError(
            f"gumbel_argmax: logits {logits.shape} {logits.dtype} and {given} do not fit: use float32 [R, V], "
            "float32 [R] twice and int32 [R] three times"
        )
    reason = "one launch reads the logits once and draws the noise on the way, where XLA writes both out"
    run = select("gumbel_argmax", IMPLEMENTATIONS, implementation, gpu="triton", elsewhere="xla", reason=reason)
    return run(logits, temperature, threshold, seeds_high, seeds_low, indices)

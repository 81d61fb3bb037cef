"""`rms_norm`: add to the residual stream, and normalise it."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qwen2_kernels.adapted import Adapted
from qwen2_kernels.dispatch import select
from qwen2_kernels.rms_norm.reference import rms_norm_reference
from qwen2_kernels.rms_norm.xla import rms_norm_xla


def _triton(*arrays: Any, **options: Any) -> tuple[Array, Array]:
    from qwen2_kernels.rms_norm.triton_norm import rms_norm_triton

    return rms_norm_triton(*arrays, **options)


IMPLEMENTATIONS = {"reference": rms_norm_reference, "xla": rms_norm_xla, "triton": _triton}


def rms_norm(
    x: Float[Array, "T D"] | Float[Array, "S T D"],
    weight: Float[Array, " D"],
    residual: Float[Array, "T D"] | None = None,
    *,
    eps: float,
    adapted: Adapted | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Return `(normed, total)`: `total` is `x + residual`, and `normed` its root-mean-square norm times `weight`.

    The sum, the norm and the product are in float32; each result is rounded once, to `x`'s dtype, and `normed` comes
    from the sum as it was before it was rounded. This is Qwen2RMSNorm of Hugging Face's Qwen2, with the addition of the
    layer before it (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").

    Args:
        x: the tokens, or partial sums over S of them (`linear_partial`), whose results have `weight`'s dtype. NaN in
            one token (padding) reaches no other.
        weight: what each feature is multiplied by.
        residual: added to `x` first; None leaves `x` as `total`.
        eps: what the norm adds to the mean square.
        adapted: what adapters change in `x` first.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA, bfloat16, float16 or float32) or `"auto"`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: `"triton"` where it cannot do what is asked.
    """
    arrays = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    tokens = x.shape[-2:]
    fits = x.ndim in (2, 3) and 0 not in x.shape and weight.shape == tokens[1:]
    fits = fits and (adapted is None or adapted.fits(tokens))
    if not fits or arrays.get("residual", x).shape[-2:] != tokens or (residual is not None and residual.ndim != 2):
        arrays |= {} if adapted is None else {name: getattr(adapted, name) for name in adapted.__dataclass_fields__}
        raise ValueError(f"rms_norm: shapes do not fit: {', '.join(f'{n} {a.shape}' for n, a in arrays.items())}")
    known = x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    gpu, reason = ("triton", "one launch for sum and norm") if known else ("xla", f"{x.dtype} is not for Triton")
    run = select("rms_norm", IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    return run(x, weight, residual, adapted, eps=eps)

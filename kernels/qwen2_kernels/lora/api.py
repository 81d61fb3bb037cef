"""`lora_delta` and `lora_gated`: what a step's adapters add to a projection, each token its own adapters'."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qwen2_kernels.dispatch import select
from qwen2_kernels.linear.activations import ACTIVATIONS
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, RANKS, LoRABatch, LoRAProjection
from qwen2_kernels.lora.config import Config
from qwen2_kernels.lora.reference import lora_delta_reference, lora_gated_reference
from qwen2_kernels.lora.xla import lora_delta_xla, lora_gated_xla


def _delta_triton(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.lora.triton_lora import lora_delta_triton

    return lora_delta_triton(*arrays, **options)


def _gated_triton(*arrays: Any, **options: Any) -> Array:
    from qwen2_kernels.lora.triton_lora import lora_gated_triton

    return lora_gated_triton(*arrays, **options)


DELTA_IMPLEMENTATIONS = {"reference": lora_delta_reference, "xla": lora_delta_xla, "triton": _delta_triton}
GATED_IMPLEMENTATIONS = {"reference": lora_gated_reference, "xla": lora_gated_xla, "triton": _gated_triton}


def lora_delta(
    x: Float[Array, "T K"],
    a_bank: Float[Array, "P C 16 K"],
    b_bank: Float[Array, "P 16 N"],
    batch: LoRABatch,
    *,
    projection: LoRAProjection,
    bias_bank: Float[Array, "V N"] | None = None,
    implementation: str = "auto",
    config: Config | None = None,
) -> Float[Array, "T N"]:
    """Return what adapters add to a projection of `x`: the sum of weight * (x a^T) b over each token's pages.

    Sums are in float32 and rounded once, to `x`'s dtype; in bfloat16 on a GPU `x a^T` is rounded once more before it is
    multiplied by b. A token without pages gets zeros. A token's result does not depend on who else is in the step.

    Args:
        x: the tokens that the projection multiplies, all of them; NaN in one of them (padding) reaches no other.
        a_bank: pages of first factors, for each of the projection's C modules.
        b_bank: pages of second factors, the scaling folded in; columns as the projection's own output has them.
        batch: which tokens use which pages.
        projection: `O_PROJECTION`, `DOWN_PROJECTION` or `qkv_projection(group, head_dim)`.
        bias_bank: float32 rows of which a token adds the one its segment names in `segment_vectors`.
        implementation: `"reference"`, `"xla"`, `"triton"` (CUDA, bfloat16 or float32) or `"auto"`: Triton on a GPU.
        config: the Triton kernels' tiles, for tuning.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
        NotImplementedError: `"triton"` where it cannot do what is asked.
    """
    arrays = {"x": x, "a_bank": a_bank, "b_bank": b_bank} | ({} if bias_bank is None else {"bias_bank": bias_bank})
    columns = b_bank.shape[2:]
    _check_shapes(arrays, columns, len(projection.modules), batch, fits=len(columns) == 1)
    projection.blocks(columns[0])
    gpu, reason = _choice_on_gpu(x, a_bank, b_bank)
    run = select("lora_delta", DELTA_IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    extra = _options(implementation, config)
    return run(x, a_bank, b_bank, bias_bank, batch, projection=projection, **extra)


def lora_gated(
    x: Float[Array, "T D"],
    base: Float[Array, "T 2 F"],
    a_bank: Float[Array, "P 2 16 D"],
    b_bank: Float[Array, "P 16 2 F"],
    batch: LoRABatch,
    *,
    activation: str,
    bias_bank: Float[Array, "V 2 F"] | None = None,
    scale_bank: Float[Array, "V 2 F"] | None = None,
    implementation: str = "auto",
    config: Config | None = None,
) -> Float[Array, "T F"]:
    """Return `act(gate) * up` of a gated projection with adapters: of `base * scale + delta + bias`.

    `delta` is what `lora_delta` computes; here it is not rounded before it is used.

    Args:
        x: the tokens that the projection multiplies.
        base: the products with the model's own gate and up kernels, in `x`'s dtype. NaN in a token reaches no other.
        a_bank, b_bank, batch: see `lora_delta`; slices and columns are gate's, then up's.
        activation: `"silu"`, `"gelu"` or `"gelu_tanh"`.
        bias_bank: float32 rows of which a token adds the one its segment names in `segment_vectors`.
        scale_bank: float32 rows, of which that row multiplies a token's `base` (DoRA, Liu et al. 2024); tokens without
            a row keep `base` as it is.
        implementation, config: see `lora_delta`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation or implementation.
        NotImplementedError: `"triton"` where it cannot do what is asked.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"lora_gated: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    banks = {"bias_bank": bias_bank, "scale_bank": scale_bank}
    arrays = {"x": x, "base": base, "a_bank": a_bank, "b_bank": b_bank}
    arrays |= {name: bank for name, bank in banks.items() if bank is not None}
    columns = b_bank.shape[2:]
    is_gated = (
        len(columns) == 2 and columns[0] == 2 and base.shape == (*x.shape[:1], *columns) and base.dtype == x.dtype
    )
    _check_shapes(arrays, columns, len(GATE_UP_PROJECTION.modules), batch, fits=is_gated)
    gpu, reason = _choice_on_gpu(x, a_bank, b_bank)
    run = select("lora_gated", GATED_IMPLEMENTATIONS, implementation, gpu=gpu, elsewhere="xla", reason=reason)
    extra = _options(implementation, config)
    return run(x, base, a_bank, b_bank, bias_bank, scale_bank, batch, activation=activation, **extra)


def _options(implementation: str, config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    if implementation != "triton":
        raise ValueError(f"lora: config is for implementation='triton', not {implementation!r}")
    return {"config": config}


def _choice_on_gpu(x: Array, a_bank: Array, b_bank: Array) -> tuple[str, str]:
    """Return the implementation for a GPU and why."""
    if x.dtype == a_bank.dtype == b_bank.dtype and x.dtype in (jnp.bfloat16, jnp.float32):
        return "triton", "each page is read once"
    return "xla", f"x {x.dtype} with banks {a_bank.dtype} and {b_bank.dtype}"


def _check_shapes(
    arrays: dict[str, Array], columns: tuple[int, ...], num_slices: int, batch: LoRABatch, *, fits: bool
) -> None:
    x, a_bank, b_bank = arrays["x"], arrays["a_bank"], arrays["b_bank"]
    fits = fits and x.ndim == 2 and a_bank.ndim == 4 and 0 not in x.shape
    fits = fits and a_bank.shape[1:] == (num_slices, RANKS, x.shape[1])
    fits = fits and b_bank.shape[:2] == (a_bank.shape[0], RANKS)
    for name in ("bias_bank", "scale_bank"):
        fits = fits and (name not in arrays or arrays[name].shape[1:] == columns)
    if not fits or batch.token_order.shape != x.shape[:1]:
        listed = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in arrays.items())
        raise ValueError(f"lora: shapes do not fit {num_slices} modules: {listed}, tokens {batch.token_order.shape}")

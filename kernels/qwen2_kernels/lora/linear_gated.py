"""A gated projection with its adapters, in one op: in one kernel where that is faster, else as `linear` and
`lora_gated` after it."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_kernels.dispatch import log_once, mesh_platform
from qwen2_kernels.linear.api import linear
from qwen2_kernels.linear.mosaic_config import MosaicConfig
from qwen2_kernels.linear.mosaic_support import supported
from qwen2_kernels.lora.api import lora_gated
from qwen2_kernels.lora.batch import LoRABatch
from qwen2_kernels.lora.reference import lora_gated_reference
from qwen2_kernels.lora.segments import WINDOW

IMPLEMENTATIONS = ("auto", "reference", "mosaic", "separate")


def lora_linear_gated(
    x: Float[Array, "T D"],
    kernel: Float[Array, "2 F D"],
    a_bank: Float[Array, "P 2 16 D"],
    b_bank: Float[Array, "P 16 2 F"],
    batch: LoRABatch,
    *,
    activation: str,
    bias_bank: Float[Array, "V 2 F"] | None = None,
    scale_bank: Float[Array, "V 2 F"] | None = None,
    num_tokens: Int[Array, ""] | None = None,
    implementation: str = "auto",
    config: MosaicConfig | None = None,
) -> Float[Array, "T F"]:
    """Return `act(gate) * up` of a gated projection with adapters, of `x @ kernel.T * scale + delta + bias`.

    Args:
        x: the tokens. NaN in one of them (padding) reaches no other.
        kernel: gate's and up's weights, [out, in].
        a_bank, b_bank, batch, activation, bias_bank, scale_bank: see `lora_gated`.
        num_tokens: see `linear`.
        implementation: `"reference"`, `"mosaic"` (Hopper, bfloat16, silu, windows of 128 tokens, no `bias_bank` and
            `scale_bank`), `"separate"` (`linear`, then `lora_gated`), or `"auto"`: `"mosaic"` where it can do what is
            asked, in a program that is traced for a mesh of such GPUs.
        config: the Mosaic kernel's tiles, for tuning, with `implementation="mosaic"`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation or implementation.
        NotImplementedError: `"mosaic"` where it cannot do what is asked.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"lora_linear_gated has no implementation {implementation!r}; use one of {IMPLEMENTATIONS}")
    if config is not None and implementation != "mosaic":
        raise ValueError(f"lora_linear_gated: config is for implementation='mosaic', not {implementation!r}")
    if implementation == "reference":
        base = jnp.einsum("td,pfd->tpf", x, kernel, preferred_element_type=jnp.float32)
        return lora_gated_reference(x, base, a_bank, b_bank, bias_bank, scale_bank, batch, activation=activation)
    has_vectors = bias_bank is not None or scale_bank is not None
    reason = _unsupported(x, kernel, b_bank, batch, activation, has_vectors=has_vectors)
    if implementation == "mosaic" and reason is not None:
        raise NotImplementedError(f"lora_linear_gated: {reason}")
    if implementation == "auto":
        reason = reason if mesh_platform() == "gpu" else "not traced for a mesh of GPUs"
        implementation = "mosaic" if reason is None else "separate"
        log_once("lora_linear_gated", implementation, reason or "on Hopper")
    if implementation == "separate":
        base = linear(x, kernel.reshape(-1, kernel.shape[-1]), num_tokens=num_tokens)
        base = base.reshape(x.shape[0], *kernel.shape[:2])
        vectors: dict[str, Any] = {"bias_bank": bias_bank, "scale_bank": scale_bank}
        return lora_gated(x, base, a_bank, b_bank, batch, activation=activation, **vectors)
    from qwen2_kernels.lora.mosaic_gated import lora_linear_gated_mosaic

    return lora_linear_gated_mosaic(x, kernel, a_bank, b_bank, batch, num_tokens, activation=activation, config=config)


def _unsupported(
    x: Array, kernel: Array, b_bank: Array, batch: LoRABatch, activation: str, *, has_vectors: bool
) -> str | None:
    """Return why the Mosaic kernel cannot do what is asked, or None if it can."""
    if has_vectors:
        return "mosaic: no biases and magnitudes"
    if batch.window != WINDOW:
        return f"mosaic: tables with windows of {WINDOW} tokens, not {batch.window}"
    if b_bank.dtype != jnp.bfloat16:
        return f"mosaic: banks in bfloat16, not {b_bank.dtype}"
    return supported(x, kernel, activation)

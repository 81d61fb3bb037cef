"""Rotary position embeddings: frequencies as Hugging Face's `modeling_rope_utils` computes them, angles in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position_embeddings: int) -> tuple[np.ndarray, float]:
    """Return the inverse frequencies [H/2] in radians per position, float32, and what cosine and sine are scaled by."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(rope.rope_theta), exponents, dtype=np.float32)).astype(np.float32)
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, max_position_embeddings, frequencies)
    if rope.rope_type == "llama3":
        return _llama3(rope, max_position_embeddings, frequencies), 1.0
    return frequencies, 1.0


def rope_cos_sin(
    position_ids: Int[Array, " T"], frequencies: np.ndarray, scaling: float
) -> tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]:
    """Return cosine and sine of each token's rotary angles, float32."""
    angles = position_ids.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def _yarn(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, frequencies: np.ndarray
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): low frequencies are interpolated, high ones kept, with a linear ramp between."""
    original = rope.original_max_position_embeddings or max_position_embeddings

    def dimension(rotations: float) -> float:
        """The dimension whose angle turns `rotations` times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / np.float32(width), 0, 1)
    scaled = frequencies / np.float32(rope.factor) * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), _yarn_scaling(rope)


def _yarn_scaling(rope: RopeConfig) -> float:
    def scale(strength: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * strength * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _llama3(rope: RopeConfig, max_position_embeddings: int, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended."""
    original = rope.original_max_position_embeddings or max_position_embeddings
    wavelengths = 2 * np.pi / frequencies
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)

"""What adapters make of a projection's result, for the ops that read it: scaled, and with a delta added."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A change of a projection's result [T, ...]: `result * scale + delta`, before its bias and what else is added.

    Tokens whose row of the scale bank is negative are not scaled.
    """

    delta: Float[Array, "T *N"]
    scale_bank: Float[Array, "V *N"]
    """Float32 rows, what a magnitude makes of each output feature (DoRA, Liu et al. 2024)."""
    scale_rows: Int[Array, " T"]

    def __call__(self, result: Float[Array, "T *N"]) -> Float[Array, "T *N"]:
        """Return the changed `result`, which is float32."""
        rows = self.scale_rows.reshape(-1, *[1] * (result.ndim - 1))
        scale = jnp.where(rows >= 0, self.scale_bank[jnp.maximum(self.scale_rows, 0)], 1.0)
        return result * scale + self.delta.astype(jnp.float32)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the change is one of a result of `shape`."""
        same = self.delta.shape == shape and self.scale_bank.shape[1:] == shape[1:]
        return same and self.scale_rows.shape == shape[:1] and self.scale_bank.dtype == jnp.float32

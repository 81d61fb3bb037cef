"""The pieces of a Qwen2 layer that hold weights. Each weight's sharding over `"tp"` stands beside its shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.models import adapter_ops, ops
from qwen2_jax.models.adapters import LayerAdapters
from qwen2_jax.models.vocab_adapters import VocabAdapters
from qwen2_jax.parallel import TP, out_sharding

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


def param(value: Array, axes: Axes) -> nnx.Param[Array]:
    """Return a parameter whose axes are sharded over the mesh axes named in `axes`; as it is where no mesh is set."""
    return nnx.Param(value) if out_sharding() is None else nnx.Param(value, out_sharding=axes)


def weight(rngs: nnx.Rngs, shape: Shape, axes: Axes, std: float, dtype: jnp.dtype) -> nnx.Param[Array]:
    """Return a normally distributed weight; see `param` for `axes`."""
    return param(nnx.initializers.normal(std)(rngs.params(), shape, dtype), axes)


class Qwen2RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) of the sum of its input and the residual."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype) -> None:
        self.weight = param(jnp.ones((size,), dtype), (None,))
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "*S T D"],
        residual: Float[Array, "T D"] | None = None,
        adapted: ops.Adapted | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        """Return `(normed, new_residual)`; `new_residual` is `x + residual`. Float32 inside, rounded once each.

        `x` may be partial sums over S; `adapted` is what adapters change in it first.
        """
        return ops.rms_norm(x, residual, self.weight[...], self.eps, adapted)

    def before(
        self, x: Float[Array, "*S T D"], residual: Float[Array, "T D"] | None, num_tokens: Int[Array, ""] | None
    ) -> ops.PendingNorm:
        """Return the norm of `x + residual`, of which `num_tokens` tokens matter, for a projection to carry out."""
        return ops.PendingNorm(x=x, residual=residual, weight=self.weight[...], num_tokens=num_tokens, eps=self.eps)


class VocabEmbedding(nnx.Module):
    """Token embeddings with the vocabulary's rows split over the devices; also the LM head, tied or on its own."""

    def __init__(self, vocab_size: int, size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.embedding = weight(rngs, (vocab_size, size), (TP, None), std, dtype)

    def __call__(self, input_ids: Int[Array, " T"], adapters: VocabAdapters | None = None) -> Float[Array, "T D"]:
        """Look tokens up, as adapters change them; one all-reduce."""
        x = self.embedding[...].at[input_ids].get(out_sharding=out_sharding(None, None))
        return x if adapters is None else adapter_ops.adapted_embedding(x, input_ids, adapters)

    def attend(self, x: Float[Array, "T D"], adapters: VocabAdapters | None = None) -> Float[Array, "T V"]:
        """Return each token's logits in float32, whole on every device, as adapters change them."""
        logits = ops.project_vocab(x, self.embedding[...])
        if adapters is not None:
            logits = adapter_ops.adapted_logits(logits, x, adapters)
        sharding = out_sharding(None, None)
        return logits if sharding is None else jax.sharding.reshard(logits, sharding)


class QKVProj(nnx.Module):
    """The fused query, key and value projection, grouped by KV head: its G query heads, its key, its value."""

    def __init__(
        self, size: int, kv_heads: int, group: int, head_dim: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.kernel = weight(rngs, (kv_heads, group + 2, head_dim, size), (TP, None, None, None), std, dtype)
        self.bias = param(jnp.zeros((kv_heads, group + 2, head_dim), dtype), (TP, None, None))

    def __call__(self, norm: ops.PendingNorm, o_proj: OProj) -> tuple[Float[Array, "T K G+2 H"], Float[Array, "T D"]]:
        """Project, without the bias, and return the residual; no communication. `o_proj` is what follows."""
        return ops.project_qkv(norm, self.kernel[...], o_proj.kernel[...])

    def adapted(
        self, x: Float[Array, "T D"], num_tokens: Int[Array, ""] | None, o_proj: OProj, adapters: LayerAdapters
    ) -> tuple[Float[Array, "S T K G+2 H"], ops.Adapted]:
        """Project normed tokens, and return what adapters change; no communication."""
        return adapter_ops.adapted_qkv(x, num_tokens, self.kernel[...], o_proj.kernel[...], adapters)


class OProj(nnx.Module):
    """The attention's output projection, row-parallel."""

    def __init__(
        self, size: int, kv_heads: int, group: int, head_dim: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.kernel = weight(rngs, (size, kv_heads, group, head_dim), (None, TP, None, None), std, dtype)

    def __call__(
        self, x: Float[Array, "T K G H"], num_tokens: Int[Array, ""] | None, gate_up_proj: GateUpProj
    ) -> Float[Array, "S T D"]:
        """Project, partial sums; one all-reduce. `gate_up_proj` is what follows."""
        return ops.project_rows(x, self.kernel[...], num_tokens, gate_up_proj.kernel[...])

    def adapted(
        self, x: Float[Array, "T K G H"], num_tokens: Int[Array, ""] | None, adapters: LayerAdapters
    ) -> tuple[Float[Array, "S T D"], ops.Adapted | None]:
        """Project, partial sums, and return what adapters change; one all-reduce."""
        return adapter_ops.adapted_rows(x, num_tokens, self.kernel[...], adapters, "o")


class GateUpProj(nnx.Module):
    """The MLP's fused gate (index 0) and up (index 1) projections; the kernel is [2, F, D]."""

    def __init__(self, size: int, intermediate: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kernel = weight(rngs, (2, intermediate, size), (None, TP, None), std, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T 2 F"]:
        """Project; no communication."""
        return jnp.einsum("td,cfd->tcf", x, self.kernel[...])

    def gated(
        self, norm: ops.PendingNorm, down_proj: DownProj, activation: str
    ) -> tuple[Float[Array, "T F"], Float[Array, "T D"]]:
        """Return `act(gate) * up` and the residual; no communication. `down_proj` is what follows."""
        return ops.project_gated(norm, self.kernel[...], down_proj.kernel[...], activation)

    def adapted(
        self, x: Float[Array, "T D"], num_tokens: Int[Array, ""] | None, adapters: LayerAdapters, activation: str
    ) -> Float[Array, "T F"]:
        """Return `act(gate) * up` of normed tokens with their adapters; no communication."""
        return adapter_ops.adapted_gated(x, num_tokens, self.kernel[...], adapters, activation)

    def features_first(self, x: Float[Array, "T D"]) -> Float[Array, "2 F T"]:
        """Project with the kernel as the left operand."""
        return jnp.einsum("cfd,td->cft", self.kernel[...], x)


class DownProj(nnx.Module):
    """The MLP's output projection, row-parallel; the kernel is [D, F]."""

    def __init__(self, intermediate: int, size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kernel = weight(rngs, (size, intermediate), (None, TP), std, dtype)

    def __call__(self, x: Float[Array, "T F"], num_tokens: Int[Array, ""] | None) -> Float[Array, "S T D"]:
        """Project, partial sums; one all-reduce."""
        return ops.project_rows(x, self.kernel[...], num_tokens)

    def adapted(
        self, x: Float[Array, "T F"], num_tokens: Int[Array, ""] | None, adapters: LayerAdapters
    ) -> tuple[Float[Array, "S T D"], ops.Adapted | None]:
        """Project, partial sums, and return what adapters change; one all-reduce."""
        return adapter_ops.adapted_rows(x, num_tokens, self.kernel[...], adapters, "down")

    def features_first(self, x: Float[Array, "F T"]) -> Float[Array, "1 T D"]:
        """Project with the kernel as the left operand; one all-reduce."""
        out = jnp.einsum("df,ft->dt", self.kernel[...], x, out_sharding=out_sharding(None, None))
        # Without the barrier XLA turns the transposed product back into one with the kernel on the right.
        return jax.lax.optimization_barrier(out).T[None]


class Linear(nnx.Module):
    """A dense layer that every device holds whole."""

    def __init__(self, size: int, out_size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kernel = weight(rngs, (size, out_size), (None, None), std, dtype)
        self.bias = param(jnp.zeros((out_size,), dtype), (None,))

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R E"]:
        """Return `x @ kernel + bias`."""
        return jnp.einsum("rd,de->re", x, self.kernel[...]) + self.bias[...][None]

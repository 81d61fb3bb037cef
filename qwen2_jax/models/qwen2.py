"""Qwen2 and Qwen2.5: the decoder, the language model and the embeddings model.

Everything is a pure function of its arguments: the cache goes in and comes out, and the step's metadata is one
`StepBatch`. Under a mesh the weights are sharded over its axis `"tp"`; with none set the modules run as they are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.config import ModelConfig
from qwen2_jax.models.activations import ACTIVATIONS, FUSED_ACTIVATIONS
from qwen2_jax.models.adapters import LayerAdapters, StepAdapters
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.layers import DownProj, GateUpProj, Linear, OProj, QKVProj, Qwen2RMSNorm, VocabEmbedding
from qwen2_jax.models.ops import Adapted, KVPair, PendingNorm, attention, by_platform, rms_norm, write_kv_cache
from qwen2_jax.models.rope import rope_cos_sin, rope_frequencies
from qwen2_jax.models.vocab_adapters import VocabAdapters
from qwen2_jax.parallel import HeadLayout, pad_to_multiple

KVCache = tuple[KVPair, ...]


class FlashQwen2Attention(nnx.Module):
    """Grouped-query attention over the paged cache, with biases on q, k and v and an optional sliding window."""

    def __init__(
        self, config: ModelConfig, layer: int, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        heads = HeadLayout(config.num_attention_heads, config.num_key_value_heads, tp)
        sizes = (config.hidden_size, heads.padded_kv_heads, heads.padded_group, config.head_dim)
        self.qkv_proj = QKVProj(*sizes, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.o_proj = OProj(*sizes, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.window = config.layer_windows[layer]
        self.causal = config.is_causal

    def __call__(
        self, norm: PendingNorm, mlp: "Qwen2MLP", rope: tuple[Array, Array], batch: StepBatch, kv_cache: KVPair
    ) -> tuple[Float[Array, "S T D"], Float[Array, "T D"], KVPair]:
        """Attend; return partial sums of the result, and the residual.

        `mlp` follows. `rope` is cosine and sine at the tokens' positions, [T, H/2] each.
        """
        qkv, residual = self.qkv_proj(norm, self.o_proj)
        q, kv_cache = write_kv_cache(qkv, self.qkv_proj.bias[...], rope, kv_cache, batch)
        attended = attention(q, kv_cache, batch, window=self.window, causal=self.causal)
        return self.o_proj(attended, batch.num_tokens, mlp.gate_up_proj), residual, kv_cache

    def adapted(
        self,
        x: Float[Array, "T D"],
        rope: tuple[Array, Array],
        batch: StepBatch,
        kv_cache: KVPair,
        adapters: LayerAdapters,
    ) -> tuple[Float[Array, "S T D"], Adapted | None, KVPair]:
        """Attend with adapters, from normed tokens; return partial sums of the result and what adapters change."""
        qkv, change = self.qkv_proj.adapted(x, batch.num_tokens, self.o_proj, adapters)
        q, kv_cache = write_kv_cache(qkv, self.qkv_proj.bias[...], rope, kv_cache, batch, change)
        attended = attention(q, kv_cache, batch, window=self.window, causal=self.causal)
        return *self.o_proj.adapted(attended, batch.num_tokens, adapters), kv_cache


class Qwen2MLP(nnx.Module):
    """The gated MLP, down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        intermediate = pad_to_multiple(config.intermediate_size, tp)
        std = config.initializer_range
        self.gate_up_proj = GateUpProj(config.hidden_size, intermediate, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = DownProj(intermediate, config.hidden_size, std=std, dtype=dtype, rngs=rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, norm: PendingNorm) -> tuple[Float[Array, "S T D"], Float[Array, "T D"]]:
        """Apply the MLP to each token; return partial sums of the result, and the residual."""
        act = ACTIVATIONS[self.hidden_act]

        def tokens_first(norm: PendingNorm) -> tuple[Array, Array]:
            if self.hidden_act in FUSED_ACTIVATIONS:
                gated, residual = self.gate_up_proj.gated(norm, self.down_proj, FUSED_ACTIVATIONS[self.hidden_act])
                return self.down_proj(gated, norm.num_tokens), residual
            x, residual = rms_norm(norm.x, norm.residual, norm.weight, norm.eps)
            gate_up = self.gate_up_proj(x)
            return self.down_proj(act(gate_up[:, 0]) * gate_up[:, 1], norm.num_tokens), residual

        def features_first(norm: PendingNorm) -> tuple[Array, Array]:
            x, residual = rms_norm(norm.x, norm.residual, norm.weight, norm.eps)
            gate, up = self.gate_up_proj.features_first(x)
            return self.down_proj.features_first(act(gate) * up), residual

        # On a CPU a large left operand is multiplied about twice as fast as a large right one (docs/architecture.md).
        return by_platform(norm, gpu=tokens_first, elsewhere=features_first)

    def adapted(
        self, x: Float[Array, "T D"], num_tokens: Int[Array, ""] | None, adapters: LayerAdapters
    ) -> tuple[Float[Array, "S T D"], Adapted | None]:
        """Apply the MLP with adapters to normed tokens; return partial sums and what adapters change in them."""
        gated = self.gate_up_proj.adapted(x, num_tokens, adapters, FUSED_ACTIVATIONS[self.hidden_act])
        return self.down_proj.adapted(gated, num_tokens, adapters)


class FlashQwen2Layer(nnx.Module):
    """One decoder layer. The residual addition after the MLP is left to the next norm."""

    def __init__(
        self, config: ModelConfig, layer: int, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = FlashQwen2Attention(config, layer, tp=tp, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = Qwen2MLP(config, tp=tp, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*S T D"],
        residual: Float[Array, "T D"] | None,
        rope: tuple[Array, Array],
        batch: StepBatch,
        kv_cache: KVPair,
    ) -> tuple[Float[Array, "S T D"], Float[Array, "T D"], KVPair]:
        """Return partial sums of the MLP's output, the residual to add to it, and the layer's cache."""
        norm = self.input_layernorm.before(x, residual, batch.num_tokens)
        x, residual, kv_cache = self.self_attn(norm, self.mlp, rope, batch, kv_cache)
        x, residual = self.mlp(self.post_attention_layernorm.before(x, residual, batch.num_tokens))
        return x, residual, kv_cache

    def adapted(
        self,
        x: Float[Array, "*S T D"],
        residual: Float[Array, "T D"] | None,
        change: Adapted | None,
        rope: tuple[Array, Array],
        batch: StepBatch,
        kv_cache: KVPair,
        adapters: LayerAdapters,
    ) -> tuple[Float[Array, "S T D"], Float[Array, "T D"], Adapted | None, KVPair]:
        """Run the layer with adapters; `change` is what those of the layer before change in `x`, and one comes back."""
        normed, residual = self.input_layernorm(x, residual, change)
        x, change, kv_cache = self.self_attn.adapted(normed, rope, batch, kv_cache, adapters)
        normed, residual = self.post_attention_layernorm(x, residual, change)
        x, change = self.mlp.adapted(normed, batch.num_tokens, adapters)
        return x, residual, change, kv_cache


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: nnx.GraphDef[FlashQwen2Layer], weights: nnx.State, *inputs: Any) -> Any:
    """Run one layer; layers of one kind are traced and lowered once, and XLA inlines the calls."""
    return nnx.merge(graphdef, weights)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
def _run_adapted_layer(graphdef: nnx.GraphDef[FlashQwen2Layer], weights: nnx.State, *inputs: Any) -> Any:
    """Run one layer with adapters; see `_run_layer`."""
    return nnx.merge(graphdef, weights).adapted(*inputs)


class FlashQwen2Model(nnx.Module):
    """Token embeddings, the decoder layers and the final norm."""

    def __init__(
        self, config: ModelConfig, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs | None = None
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        vocab_size = pad_to_multiple(config.vocab_size, tp)
        std = config.initializer_range
        self.embed_tokens = VocabEmbedding(vocab_size, config.hidden_size, std=std, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [FlashQwen2Layer(config, i, tp=tp, dtype=dtype, rngs=rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.config = config

    def __call__(
        self, batch: StepBatch, kv_cache: KVCache, adapters: StepAdapters | None = None
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """Return each token's final hidden state, and the cache with the step's keys and values in it."""
        config = self.config
        frequencies, scaling = rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings)
        rope = rope_cos_sin(batch.position_ids, frequencies, scaling)
        vocab = None if adapters is None else adapters.vocab
        x, residual, change, caches = self.embed_tokens(batch.input_ids, vocab), None, None, []
        for index, (layer, layer_cache) in enumerate(zip(self.layers, kv_cache, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                parts = nnx.split(layer)
                if adapters is None:
                    x, residual, layer_cache = _run_layer(*parts, x, residual, rope, batch, layer_cache)
                else:
                    inputs = (x, residual, change, rope, batch, layer_cache, adapters.of_layer(index))
                    x, residual, change, layer_cache = _run_adapted_layer(*parts, *inputs)
            caches.append(layer_cache)
        x, _ = self.norm(x, residual, change)
        return x, tuple(caches)


class FlashQwen2ForCausalLM(nnx.Module):
    """The language model."""

    def __init__(
        self, config: ModelConfig, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs | None = None
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.model = FlashQwen2Model(config, tp=tp, dtype=dtype, rngs=rngs)
        if config.has_lm_head:
            vocab_size, std = pad_to_multiple(config.vocab_size, tp), config.initializer_range
            self.lm_head = VocabEmbedding(vocab_size, config.hidden_size, std=std, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        batch: StepBatch,
        kv_cache: KVCache,
        *,
        adapters: StepAdapters | None = None,
        lm_head_indices: Int[Array, " Q"] | None = None,
        skip_lm_head: bool = False,
    ) -> tuple[tuple[Float[Array, "Q V"], None], KVCache]:
        """Run one step.

        Args:
            batch: the step's tokens and rows.
            kv_cache: one pair of pools per layer; donate it.
            adapters: the adapters that the step's tokens use; None is a program without any.
            lm_head_indices: the tokens of T whose logits are wanted; None means all.
            skip_lm_head: return the hidden states [Q, D] instead of logits.

        Returns:
            `((logits, speculative_logits), kv_cache)`: logits in float32 over the true vocabulary, and None, since
            there is no speculative head.
        """
        hidden, kv_cache = self.model(batch, kv_cache, adapters)
        if lm_head_indices is not None:
            hidden = hidden[lm_head_indices]
        vocab = None if adapters is None else adapters.vocab
        return (hidden if skip_lm_head else self.compute_logits(hidden, vocab), None), kv_cache

    def compute_logits(self, hidden: Float[Array, "Q D"], adapters: VocabAdapters | None = None) -> Float[Array, "Q V"]:
        """Return the logits of final hidden states, float32, without the vocabulary's padding.

        `adapters` are those that change the head, by the rows of `hidden`.
        """
        head = self.lm_head if self.config.has_lm_head else self.model.embed_tokens
        return head.attend(hidden, adapters)[:, : self.config.vocab_size]


class FlashQwen2ForEmbeddings(nnx.Module):
    """The embeddings model: the decoder, a mean over each sequence's tokens, and a dense layer."""

    def __init__(
        self, config: ModelConfig, *, tp: int = 1, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs | None = None
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.model = FlashQwen2Model(config, tp=tp, dtype=dtype, rngs=rngs)
        if config.embedding_dim is not None:
            std = config.initializer_range
            self.linear = Linear(config.hidden_size, config.embedding_dim, std=std, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(
        self, batch: StepBatch, kv_cache: KVCache, adapters: StepAdapters | None = None
    ) -> tuple[tuple[Float[Array, "R E"], None], KVCache]:
        """Return `((embeddings, None), kv_cache)` for rows that are whole sequences; float32, not normalised."""
        hidden, kv_cache = self.model(batch, kv_cache, adapters)
        return (self.project(pool_sum(hidden, batch), batch.context_lens), None), kv_cache

    def project(self, total: Float[Array, "R D"], lengths: Int[Array, " R"]) -> Float[Array, "R E"]:
        """Return embeddings from each sequence's summed hidden states and its length in tokens."""
        mean = total / jnp.maximum(lengths, 1)[:, None].astype(jnp.float32)
        return mean if self.config.embedding_dim is None else self.linear(mean).astype(jnp.float32)


def pool_sum(hidden: Float[Array, "T D"], batch: StepBatch) -> Float[Array, "R D"]:
    """Return the sum of each row's hidden states in float32; tokens past the last row's end count for none."""
    if batch.query_start_loc is None:
        return hidden.astype(jnp.float32)
    rows = batch.query_start_loc.shape[0] - 1
    row = jnp.searchsorted(batch.query_start_loc, jnp.arange(hidden.shape[0]), side="right") - 1
    return jax.ops.segment_sum(hidden.astype(jnp.float32), row, num_segments=rows + 1)[:rows]

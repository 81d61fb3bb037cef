"""The functions that become device programs: decode steps, prefill steps, and what goes with them.

Each is pure: parameters, caches and per-request state in, caches and state (donated) and results out. `Programs` closes
over what is static; everything that changes from step to step arrives in one packed vector.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.engine.sampler import likeliest, logprobs_of, sample
from qwen2_jax.engine.step_inputs import decode_layout, prefill_layout, unpack
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.qwen2 import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings, KVCache, pool_sum
from qwen2_jax.parallel import pad_to_multiple
from qwen2_jax.sampling_params import MAX_LOGPROB_TOKEN_IDS

PROMPT_LOGPROBS_CHUNK = 128
"""Tokens that one call of `prompt_logprobs` looks at: their logits have the vocabulary's width."""

Params = dict[str, Any]
State = dict[str, Array]
Outputs = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The step functions of one model; `graphdef` is its NNX structure, whose weights are the argument `params`."""

    graphdef: nnx.GraphDef
    vocab_size: int
    hidden_size: int
    block_size: int
    blocks_per_sequence: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    dtype: str

    def initial_state(self) -> State:
        """Return the per-request state, one row per running request and a spare one for padding.

        `token_ids` [S, L]: what the sampler wrote and, for requests that need their history, all tokens; `logit_bias`
        [S, V] and `logprob_token_ids` [S, C] (-1: none) are set by `set_row` for requests that use them. `hidden`
        [T, D] holds the last prefill step's final hidden states, for `prompt_logprobs`.
        """
        rows, length = self.max_num_seqs + 1, self.blocks_per_sequence * self.block_size + 1
        return {
            "token_ids": jnp.zeros((rows, length), jnp.int32),
            "logit_bias": jnp.zeros((rows, self.vocab_size), jnp.float32),
            "logprob_token_ids": jnp.full((rows, MAX_LOGPROB_TOKEN_IDS), -1, jnp.int32),
            "hidden": jnp.zeros(
                (pad_to_multiple(self.max_num_batched_tokens, PROMPT_LOGPROBS_CHUNK), self.hidden_size), self.dtype
            ),
        }

    def initial_pooled(self) -> State:
        """Return the per-request state of an embeddings model: sums of hidden states, float32 [S, D]."""
        return {"pooled": jnp.zeros((self.max_num_seqs + 1, self.hidden_size), jnp.float32)}

    def decode(
        self,
        params: Params,
        kv_cache: KVCache,
        state: State,
        packed: Int[Array, " W"],
        step: Int[Array, ""],
        *,
        rows: int,
        greedy: bool,
    ) -> tuple[KVCache, State, Outputs]:
        """Run step number `step` of a call of R rows, each one token further than the step before.

        A call is so many launches of one program on the same inputs: what changes is in the per-request state. With
        `greedy` every row takes its likeliest token and `token_ids` are all that comes back; no conditional then breaks
        the step's CUDA graph.
        """
        inputs = unpack(packed, decode_layout(rows, self.blocks_per_sequence))
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        is_row = inputs["position_ids"] >= 0
        positions = jnp.where(is_row, inputs["position_ids"] + step, 0)
        sampled_before = state["token_ids"][inputs["row_indices"], positions]
        input_ids = jnp.where((step == 0) & (inputs["input_ids"] >= 0), inputs["input_ids"], sampled_before)
        block = jnp.take_along_axis(inputs["block_tables"], positions[:, None] // self.block_size, axis=1)[:, 0]
        batch = StepBatch(
            input_ids=input_ids,
            position_ids=positions,
            block_tables=inputs["block_tables"],
            slot_mapping=jnp.where(is_row, block * self.block_size + positions % self.block_size, -1),
            context_lens=jnp.where(is_row, positions + 1, 0),
        )
        (logits, _), kv_cache = model(batch, kv_cache)
        at_step = inputs | {name: inputs[name] + step for name in ("sample_positions", "output_indices")}
        outputs = {"token_ids": likeliest(logits)} if greedy else sample(logits, at_step, state, self.max_logprobs)
        return kv_cache, self._remember(state, at_step, outputs), outputs

    def prefill(
        self, params: Params, kv_cache: KVCache, state: State, packed: Int[Array, " W"], *, tokens: int, rows: int
    ) -> tuple[KVCache, State, Outputs]:
        """Run one step of T tokens in R rows."""
        inputs = unpack(packed, prefill_layout(tokens, rows, self.blocks_per_sequence))
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        (hidden, _), kv_cache = model(self._prefill_batch(inputs, state), kv_cache, skip_lm_head=True)
        logits = model.compute_logits(hidden[inputs["lm_head_indices"]])
        outputs = sample(logits, inputs, state, self.max_logprobs)
        state = self._remember(state, inputs, outputs)
        state |= {"hidden": jax.lax.dynamic_update_slice(state["hidden"], hidden, (0, 0))}
        return kv_cache, state, outputs

    def embed(
        self, params: Params, kv_cache: KVCache, state: State, packed: Int[Array, " W"], *, tokens: int, rows: int
    ) -> tuple[KVCache, State, Float[Array, "R E"]]:
        """Run one step of T tokens in R rows; returns the embeddings of rows that this step completes."""
        inputs = unpack(packed, prefill_layout(tokens, rows, self.blocks_per_sequence))
        model: FlashQwen2ForEmbeddings = nnx.merge(self.graphdef, params)
        batch = self._prefill_batch(inputs, None)
        hidden, kv_cache = model.model(batch, kv_cache)
        starts = batch.context_lens == jnp.diff(inputs["query_start_loc"])
        before = jnp.where(starts[:, None], 0.0, state["pooled"][inputs["row_indices"]])
        total = before + pool_sum(hidden, batch)
        state = {"pooled": state["pooled"].at[inputs["row_indices"]].set(total)}
        return kv_cache, state, model.project(total, batch.context_lens)

    def prompt_logprobs(self, params: Params, state: State, packed: Int[Array, " 1+C"]) -> Outputs:
        """Report log-probabilities of the tokens `packed[1:]`, which follow those from `packed[0]` of the last step."""
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        start, targets = packed[0], packed[1:]
        hidden = jax.lax.dynamic_slice_in_dim(state["hidden"], start, targets.shape[0])
        none = jnp.full((targets.shape[0], 1), -1, jnp.int32)
        return logprobs_of(model.compute_logits(hidden), targets, none, self.max_logprobs)

    def set_row(self, state: State, packed: Int[Array, " W"], *, name: str) -> State:
        """Set row `packed[0]` of the state array `name` to the rest of `packed` (float32 as its bits)."""
        array = state[name]
        row = packed[1:]
        if array.dtype == jnp.float32:
            row = jax.lax.bitcast_convert_type(row, jnp.float32)
        return state | {name: jax.lax.dynamic_update_slice(array, row[None], (packed[0], 0))}

    def _prefill_batch(self, inputs: dict[str, Array], state: State | None) -> StepBatch:
        input_ids = inputs["input_ids"]
        if state is not None:
            sampled_before = state["token_ids"][inputs["token_rows"], inputs["position_ids"]]
            input_ids = jnp.where(input_ids < 0, sampled_before, input_ids)
        return StepBatch(
            input_ids=input_ids,
            position_ids=inputs["position_ids"],
            block_tables=inputs["block_tables"],
            slot_mapping=inputs["slot_mapping"],
            context_lens=inputs["context_lens"],
            query_start_loc=inputs["query_start_loc"],
        )

    def _remember(self, state: State, rows: dict[str, Array], outputs: Outputs) -> State:
        """Write each sampled token behind its row's others; a row that does not sample has a position out of range."""
        token_ids = state["token_ids"].at[rows["row_indices"], rows["sample_positions"]]
        return state | {"token_ids": token_ids.set(outputs["token_ids"], mode="drop")}

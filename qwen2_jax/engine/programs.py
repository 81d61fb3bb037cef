"""The functions that become device programs: decode steps, prefill steps, and what goes with them.

Each is pure: parameters, caches and per-request state in, caches and state (donated) and results out. `Programs` closes
over what is static; everything that changes from call to call arrives in one packed vector.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.engine.sampler import empty_samples, likeliest, logprobs_of, sample, sample_step
from qwen2_jax.engine.step_inputs import (
    NOWHERE,
    VOCAB,
    StepLoRA,
    decode_layout,
    prefill_layout,
    prompt_logprobs_layout,
    sample_layout,
    tables_layout,
    unpack,
)
from qwen2_jax.models.adapters import Banks, LoRABatch, StepAdapters, TableSizes
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.qwen2 import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings, KVCache, pool_sum
from qwen2_jax.models.vocab_adapters import VocabAdapters, VocabTables
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

    def decode_greedy(
        self,
        params: Params,
        kv_cache: KVCache,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        rows: int,
        steps: int,
        lora: StepLoRA | None = None,
    ) -> tuple[KVCache, State, Outputs]:
        """Run `steps` steps of R rows that each take their likeliest token; `token_ids` [steps, R] come back.

        The number of steps is fixed and nothing is conditional: each step is one CUDA graph, and the host waits for
        none of them. Rows have adapters in programs with `banks` and the sizes of their tables, `lora`.
        """
        inputs = unpack(packed, decode_layout(rows, self.blocks_per_sequence, lora))
        adapters = _adapters(inputs, banks, lora)
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)

        def run_step(step: Array, carry: tuple[KVCache, State, Array]) -> tuple[KVCache, State, Array]:
            kv_cache, state, token_ids = carry
            (logits, _), kv_cache = model(self._decode_batch(inputs, state, step), kv_cache, adapters=adapters)
            sampled = likeliest(logits)
            return kv_cache, self._remember(state, at_step(inputs, step), sampled), token_ids.at[step].set(sampled)

        carry = (kv_cache, state, jnp.zeros((steps, rows), jnp.int32))
        kv_cache, state, token_ids = jax.lax.fori_loop(0, steps, run_step, carry)
        return kv_cache, state, {"token_ids": token_ids}

    def decode(
        self,
        params: Params,
        kv_cache: KVCache,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        rows: int,
        steps: int,
        lora: StepLoRA | None = None,
    ) -> tuple[KVCache, State, Outputs]:
        """Run `num_steps` of at most `steps` steps of R rows, sampled as each row asks; outputs are [steps, R, ...]."""
        inputs = unpack(packed, decode_layout(rows, self.blocks_per_sequence, lora))
        adapters = _adapters(inputs, banks, lora)
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)

        def run_step(step: Array, carry: tuple[KVCache, State, Outputs]) -> tuple[KVCache, State, Outputs]:
            kv_cache, state, outputs = carry
            (logits, _), kv_cache = model(self._decode_batch(inputs, state, step), kv_cache, adapters=adapters)
            now = at_step(inputs, step)
            outputs = sample_step(logits, now, state, outputs, step)
            return kv_cache, self._remember(state, now, outputs["token_ids"][step]), outputs

        empty = empty_samples(rows, self.max_logprobs, state["logprob_token_ids"].shape[1])
        outputs = {name: jnp.zeros((steps, *value.shape), value.dtype) for name, value in empty.items()}
        return jax.lax.fori_loop(0, inputs["num_steps"][0], run_step, (kv_cache, state, outputs))

    def prefill(
        self,
        params: Params,
        kv_cache: KVCache,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        tokens: int,
        rows: int,
        lora: StepLoRA | None = None,
    ) -> tuple[KVCache, State]:
        """Run one step of T tokens in R rows; the final hidden states go to the state, for `sample`."""
        inputs = unpack(packed, prefill_layout(tokens, rows, self.blocks_per_sequence, lora))
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        batch, adapters = self._prefill_batch(inputs, state), _adapters(inputs, banks, lora)
        (hidden, _), kv_cache = model(batch, kv_cache, adapters=adapters, skip_lm_head=True)
        return kv_cache, state | {"hidden": jax.lax.dynamic_update_slice(state["hidden"], hidden, (0, 0))}

    def sample(
        self,
        params: Params,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        rows: int,
        greedy: bool,
        lora: StepLoRA | None = None,
    ) -> tuple[State, Outputs]:
        """Sample from the last prefill step's hidden states for R rows; outputs are [1, R, ...].

        With `greedy` every row takes its likeliest token, and `token_ids` are all that comes back.
        """
        inputs = unpack(packed, sample_layout(rows, lora))
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        adapters = _vocab_adapters(inputs, banks, lora)
        logits = model.compute_logits(state["hidden"][inputs["lm_head_indices"]], adapters)
        outputs = {"token_ids": likeliest(logits)} if greedy else sample(logits, inputs, state, self.max_logprobs)
        state = self._remember(state, inputs, outputs["token_ids"])
        return state, {name: value[None] for name, value in outputs.items()}

    def embed(
        self,
        params: Params,
        kv_cache: KVCache,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        tokens: int,
        rows: int,
        lora: StepLoRA | None = None,
    ) -> tuple[KVCache, State, Float[Array, "R E"]]:
        """Run one step of T tokens in R rows; returns the embeddings of rows that this step completes."""
        inputs = unpack(packed, prefill_layout(tokens, rows, self.blocks_per_sequence, lora))
        model: FlashQwen2ForEmbeddings = nnx.merge(self.graphdef, params)
        batch = self._prefill_batch(inputs, None)
        hidden, kv_cache = model.model(batch, kv_cache, _adapters(inputs, banks, lora))
        starts = batch.context_lens == jnp.diff(inputs["query_start_loc"])
        before = jnp.where(starts[:, None], 0.0, state["pooled"][inputs["row_indices"]])
        total = before + pool_sum(hidden, batch)
        state = {"pooled": state["pooled"].at[inputs["row_indices"]].set(total)}
        return kv_cache, state, model.project(total, batch.context_lens)

    def prompt_logprobs(
        self,
        params: Params,
        state: State,
        packed: Int[Array, " W"],
        banks: Banks | None = None,
        *,
        lora: StepLoRA | None = None,
    ) -> Outputs:
        """Report log-probabilities of a chunk of tokens, which follow those from `start` of the last step."""
        inputs = unpack(packed, prompt_logprobs_layout(PROMPT_LOGPROBS_CHUNK, lora))
        model: FlashQwen2ForCausalLM = nnx.merge(self.graphdef, params)
        targets = inputs["targets"]
        hidden = jax.lax.dynamic_slice_in_dim(state["hidden"], inputs["start"][0], targets.shape[0])
        none = jnp.full((targets.shape[0], 1), -1, jnp.int32)
        logits = model.compute_logits(hidden, _vocab_adapters(inputs, banks, lora))
        return logprobs_of(logits, targets, none, self.max_logprobs)

    def last_hidden(self, state: State, packed: Int[Array, " R"]) -> Float[Array, "R D"]:
        """Return the last prefill step's final hidden states of the tokens `packed`, for classification heads."""
        return state["hidden"][packed]

    def set_row(self, state: State, packed: Int[Array, " W"], *, name: str) -> State:
        """Set row `packed[0]` of the state array `name` to the rest of `packed` (float32 as its bits)."""
        array = state[name]
        row = packed[1:]
        if array.dtype == jnp.float32:
            row = jax.lax.bitcast_convert_type(row, jnp.float32)
        return state | {name: jax.lax.dynamic_update_slice(array, row[None], (packed[0], 0))}

    def _decode_batch(self, inputs: dict[str, Array], state: State, step: Array) -> StepBatch:
        """The step `step` steps behind the one that `inputs` describe; rows that have got all their tokens rest."""
        positions = inputs["position_ids"] + step
        is_active = positions < inputs["last_positions"]
        positions = jnp.where(is_active, positions, 0)
        sampled_before = state["token_ids"][inputs["row_indices"], positions]
        block = jnp.take_along_axis(inputs["block_tables"], positions[:, None] // self.block_size, axis=1)[:, 0]
        return StepBatch(
            input_ids=jnp.where((step == 0) & (inputs["input_ids"] >= 0), inputs["input_ids"], sampled_before),
            position_ids=positions,
            block_tables=inputs["block_tables"],
            slot_mapping=jnp.where(is_active, block * self.block_size + positions % self.block_size, -1),
            context_lens=jnp.where(is_active, positions + 1, 0),
        )

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

    def _remember(self, state: State, rows: dict[str, Array], sampled: Int[Array, " R"]) -> State:
        """Write each sampled token behind its row's others; a row that does not sample has a position out of range."""
        token_ids = state["token_ids"].at[rows["row_indices"], rows["sample_positions"]]
        return state | {"token_ids": token_ids.set(sampled, mode="drop")}


def _adapters(inputs: dict[str, Array], banks: Banks | None, lora: StepLoRA | None) -> StepAdapters | None:
    """Return what a step takes of adapters."""
    if banks is None or lora is None:
        return None
    tables, vocab = _tables(inputs, lora.tables), _vocab_adapters(inputs, banks, lora)
    return StepAdapters(
        layers=banks.layers,
        tables=tables,
        scale_rows=inputs["scale_rows"],
        vocab=vocab,
        has_vectors=lora.has_vectors,
    )


def _vocab_adapters(inputs: dict[str, Array], banks: Banks | None, lora: StepLoRA | None) -> VocabAdapters | None:
    if banks is None or lora is None or banks.vocab is None or lora.vocab is None:
        return None
    rest = ("token_pages", "full_embed_rows", "full_head_rows", "vector_rows")
    tables = VocabTables(tables=_tables(inputs, lora.vocab, VOCAB), **{name: inputs[name] for name in rest})
    return VocabAdapters(banks=banks.vocab, tables=tables)


def _tables(inputs: dict[str, Array], sizes: TableSizes, prefix: str = "") -> LoRABatch:
    tables = {name: inputs[prefix + name] for name in tables_layout(0, sizes)}
    return LoRABatch(**tables, tile=sizes.tile, window=sizes.window, max_pages=sizes.max_pages)


def at_step(inputs: dict[str, Array], step: Array) -> dict[str, Array]:
    """Return the sampler's inputs `step` steps on; what a row samples behind its last position goes nowhere."""
    positions = inputs["sample_positions"] + step
    positions = jnp.where(positions <= inputs["last_positions"], positions, NOWHERE)
    return inputs | {"sample_positions": positions, "output_indices": inputs["output_indices"] + step}

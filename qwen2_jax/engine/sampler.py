"""Sampling on the device, row by row: a row's token depends on its logits, its parameters and its seed alone.

The order is vLLM's: logit bias and allowed tokens, penalties, temperature, min-p, top-k, top-p. Log-probabilities are
the log-softmax of the raw logits. Work that no row of the step asks for is skipped by conditionals on the device, so
that one program serves every mix. None of them gives logits out: that would copy them in every step.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.models.ops import gumbel_argmax, token_ranks, top_k_top_p_threshold, top_logits

State = dict[str, Array]
Rows = dict[str, Array]


def sample(logits: Float[Array, "R V"], rows: Rows, state: State, max_logprobs: int) -> dict[str, Array]:
    """Sample one token per row.

    Args:
        logits: raw logits, float32.
        rows: the arrays of `step_inputs.sampling_layout`.
        state: the per-request state of `programs.initial_state`; `token_ids` holds each row's tokens so far.
        max_logprobs: K, how many top log-probabilities a row may ask for.

    Returns:
        `token_ids` [R], and where some row wants them (zeros otherwise) `logprobs` [R] of the sampled token, its
        `ranks` [R], `top_logprobs` and `top_ids` [R, K], and `chosen_logprobs` and `chosen_ranks` [R, C] of the
        state's `logprob_token_ids`.
    """
    empty = empty_samples(logits.shape[0], max_logprobs, state["logprob_token_ids"].shape[1])
    outputs = sample_step(logits, rows, state, {name: value[None] for name, value in empty.items()}, 0)
    return {name: value[0] for name, value in outputs.items()}


def sample_step(
    logits: Float[Array, "R V"], rows: Rows, state: State, outputs: dict[str, Array], step: Array | int
) -> dict[str, Array]:
    """Return `outputs`, arrays [steps, R, ...] of what `sample` returns, with what step `step` samples in its place.

    Of the log-probabilities nothing is written where no row wants any.
    """
    is_changed = jnp.any((rows["has_logit_bias"] != 0) | _has_penalty(rows))
    token_ids = jax.lax.cond(
        is_changed, lambda: _choose(_processed(logits, rows, state), rows), lambda: _choose(logits, rows)
    )
    wants = rows["num_logprobs"] >= 0

    def report(reports: dict[str, Array]) -> dict[str, Array]:
        chosen = jnp.where(wants[:, None], state["logprob_token_ids"][rows["row_indices"]], -1)
        asked = jnp.where(wants, token_ids, -1)
        found = logprobs_of(logits, asked, chosen, outputs["top_ids"].shape[2])
        return {name: reports[name].at[step].set(value) for name, value in found.items()}

    reports = {name: value for name, value in outputs.items() if name != "token_ids"}
    reports = jax.lax.cond(jnp.any(wants), report, lambda reports: reports, reports)
    return {"token_ids": outputs["token_ids"].at[step].set(token_ids)} | reports


def likeliest(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Return each row's likeliest token, the first of several."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def empty_samples(rows: int, max_logprobs: int, chosen: int) -> dict[str, Array]:
    """Return what `sample` returns, all zeros."""
    return {
        "token_ids": jnp.zeros(rows, jnp.int32),
        "logprobs": jnp.zeros(rows),
        "ranks": jnp.zeros(rows, jnp.int32),
        "top_logprobs": jnp.zeros((rows, max_logprobs)),
        "top_ids": jnp.zeros((rows, max_logprobs), jnp.int32),
        "chosen_logprobs": jnp.zeros((rows, chosen)),
        "chosen_ranks": jnp.zeros((rows, chosen), jnp.int32),
    }


def logprobs_of(
    logits: Float[Array, "R V"], token_ids: Int[Array, " R"], chosen: Int[Array, "R C"], max_logprobs: int
) -> dict[str, Array]:
    """Report log-probabilities of one token per row, of the K likeliest ones, and of the `chosen` ones.

    A token of -1 has rank 0, and a log-probability that means nothing.
    """
    is_wanted = (token_ids >= 0) | (chosen >= 0).any(axis=-1)
    top, top_ids, log_sum = top_logits(logits, is_wanted, max(max_logprobs, 1))  # the largest in any case
    asked = jnp.concatenate([token_ids[:, None], chosen], axis=1)
    given = jnp.take_along_axis(logits, jnp.maximum(asked, 0), axis=-1)
    logprobs, top_logprobs = (x - top[:, :1] - log_sum[:, None] for x in (given, top))
    ranks = token_ranks(logits, asked)
    return {
        "logprobs": logprobs[:, 0],
        "ranks": ranks[:, 0],
        "top_logprobs": top_logprobs[:, :max_logprobs],
        "top_ids": top_ids[:, :max_logprobs],
        "chosen_logprobs": logprobs[:, 1:],
        "chosen_ranks": ranks[:, 1:],
    }


def _has_penalty(rows: Rows) -> Array:
    return (rows["presence_penalty"] != 0) | (rows["frequency_penalty"] != 0) | (rows["repetition_penalty"] != 1)


def _processed(logits: Array, rows: Rows, state: State) -> Array:
    """Apply logit bias (allowed and forbidden tokens are infinite ones) and penalties."""

    def biased(logits: Array) -> Array:
        bias = state["logit_bias"][rows["row_indices"]]
        return jnp.where(rows["has_logit_bias"][:, None] != 0, logits + bias, logits)

    def penalised(logits: Array) -> Array:
        in_prompt, output_counts = _token_counts(rows, state["token_ids"], logits.shape[1])
        seen = in_prompt | (output_counts > 0)
        repetition = jnp.where(seen, rows["repetition_penalty"][:, None], 1.0)
        logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits -= rows["frequency_penalty"][:, None] * output_counts
        return logits - rows["presence_penalty"][:, None] * (output_counts > 0)

    logits = jax.lax.cond(jnp.any(rows["has_logit_bias"] != 0), biased, lambda x: x, logits)
    return jax.lax.cond(jnp.any(_has_penalty(rows)), penalised, lambda x: x, logits)


def _token_counts(rows: Rows, token_ids: Array, vocab_size: int) -> tuple[Array, Array]:
    """Return which tokens each row's prompt holds, and how often its output holds each; both [R, V]."""
    history = token_ids[rows["row_indices"]]
    positions = jnp.arange(history.shape[1])[None, :]
    in_prompt = positions < rows["prompt_lens"][:, None]
    in_output = ~in_prompt & (positions < rows["sample_positions"][:, None])
    shape, row = (history.shape[0], vocab_size), jnp.arange(history.shape[0])[:, None]
    prompt = jnp.zeros(shape, bool).at[row, jnp.where(in_prompt, history, vocab_size)].set(True, mode="drop")
    counts = jnp.zeros(shape, jnp.float32).at[row, jnp.where(in_output, history, vocab_size)].add(1.0, mode="drop")
    return prompt, counts


def _choose(logits: Array, rows: Rows) -> Array:
    """Return the likeliest token of greedy rows and a random one of the others."""
    is_cut = (rows["min_p"] > 0) | (rows["top_k"] > 0) | (rows["top_p"] < 1)
    threshold = jax.lax.cond(
        jnp.any(is_cut & (rows["temperature"] != 0)),
        lambda: _threshold(logits, rows),
        lambda: jnp.full(logits.shape[0], -jnp.inf),
    )
    seeds = rows["seeds_high"], rows["seeds_low"], rows["output_indices"]
    return gumbel_argmax(logits, rows["temperature"], threshold, *seeds)


def _threshold(logits: Array, rows: Rows) -> Array:
    """Return the least scaled logit that min-p, top-k and top-p keep, each of what the one before has left."""
    is_random = rows["temperature"] != 0
    temperature = jnp.where(is_random, rows["temperature"], 1.0)
    least = logits.max(axis=-1) * (1 / temperature) + jnp.log(rows["min_p"])
    floor = jnp.where(is_random & (rows["min_p"] > 0), least, -jnp.inf)
    k, p = jnp.where(is_random, rows["top_k"], 0), jnp.where(is_random, rows["top_p"], 1.0)
    return top_k_top_p_threshold(logits, k, p, temperature, floor)

"""Sampling on the device, row by row: a row's token depends on its logits, its parameters and its seed alone.

The order is vLLM's: logit bias and allowed tokens, penalties, temperature, min-p, top-k, top-p. Log-probabilities are
the log-softmax of the raw logits. Work that no row of the step asks for is skipped by conditionals on the device, so
that one program serves every mix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qwen2_jax.models.ops import top_k_threshold, top_p_threshold

State = dict[str, Array]
Rows = dict[str, Array]
_CHUNK = 128
"""Values of a row that `likeliest_few` looks at together."""


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
    plain = (
        (rows["temperature"] == 0) & (rows["has_logit_bias"] == 0) & (rows["num_logprobs"] < 0) & ~_has_penalty(rows)
    )
    empty = empty_samples(logits.shape[0], max_logprobs, state["logprob_token_ids"].shape[1])

    def greedy(logits: Array) -> dict[str, Array]:
        return empty | {"token_ids": likeliest(logits)}

    def full(logits: Array) -> dict[str, Array]:
        token_ids = _choose(_processed(logits, rows, state), rows)
        wanted = state["logprob_token_ids"][rows["row_indices"]]
        report = jax.lax.cond(
            jnp.any(rows["num_logprobs"] >= 0),
            lambda: logprobs_of(logits, token_ids, wanted, max_logprobs),
            lambda: {name: value for name, value in empty.items() if name != "token_ids"},
        )
        return {"token_ids": token_ids} | report

    return jax.lax.cond(jnp.all(plain), greedy, full, logits)


def likeliest(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Return each row's likeliest token, the first of several."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def likeliest_few(values: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """Return what `jax.lax.top_k` does for `count` values, equal ones in their order, without sorting rows as a whole.

    A value that is among the K largest lies in one of the K chunks that have the largest values: where it did not, each
    of those would have a larger one, or an equal one before it.
    """
    rows, size = values.shape
    chunks = -(-size // _CHUNK)
    if chunks <= count:
        return jax.lax.top_k(values, count)
    padding = ((0, 0), (0, chunks * _CHUNK - size))
    chunked = jnp.pad(values, padding, constant_values=-jnp.inf).reshape(rows, chunks, _CHUNK)
    best = jnp.sort(jax.lax.top_k(chunked.max(axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(chunked, best[:, :, None], axis=1).reshape(rows, -1)
    found, places = jax.lax.top_k(candidates, count)
    return found, jnp.take_along_axis(best, places // _CHUNK, axis=1) * _CHUNK + places % _CHUNK


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
    """Report log-probabilities of one token per row, of the K likeliest ones, and of the `chosen` ones."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = likeliest_few(logprobs, max_logprobs)
    asked = jnp.concatenate([token_ids[:, None], chosen], axis=1)
    values = jnp.take_along_axis(logprobs, jnp.maximum(asked, 0), axis=-1)

    def add_rank(column: Array, ranks: Array) -> Array:
        """1 for the likeliest; one column at a time, because the comparison has the vocabulary's width."""
        better = jnp.sum(logprobs > values[:, column, None], axis=-1)
        return ranks.at[:, column].set(better.astype(jnp.int32) + 1)

    columns = jnp.max(jnp.sum(asked >= 0, axis=-1))
    ranks = jax.lax.fori_loop(0, columns, add_rank, jnp.zeros(asked.shape, jnp.int32))
    return {
        "logprobs": values[:, 0],
        "ranks": ranks[:, 0],
        "top_logprobs": top_logprobs,
        "top_ids": top_ids.astype(jnp.int32),
        "chosen_logprobs": values[:, 1:],
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
    greedy = likeliest(logits)

    def random() -> Array:
        temperature = jnp.where(rows["temperature"] == 0, 1.0, rows["temperature"])
        kept = _keep(logits / temperature[:, None], rows)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))(
            rows["seeds_low"], rows["seeds_high"], rows["output_indices"], logits.shape[1]
        )
        return jnp.where(rows["temperature"] == 0, greedy, jnp.argmax(kept + noise, axis=-1))

    return jax.lax.cond(jnp.any(rows["temperature"] != 0), random, lambda: greedy).astype(jnp.int32)


def _gumbel(seed_low: Array, seed_high: Array, output_index: Array, size: int) -> Array:
    """Noise that depends on the request's seed and how many tokens it has sampled, and on nothing else."""
    words = jnp.stack([seed_high, seed_low]).astype(jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), output_index)
    return jax.random.gumbel(key, (size,))


def _keep(logits: Array, rows: Rows) -> Array:
    """Set the logits of tokens that min-p, top-k or top-p leave out to minus infinity."""

    def cut(logits: Array, threshold: Array) -> Array:
        return jnp.where(logits < threshold[:, None], -jnp.inf, logits)

    def min_p(logits: Array) -> Array:
        return cut(logits, logits.max(axis=-1) + jnp.log(rows["min_p"]))

    def top_k(logits: Array) -> Array:
        k = rows["top_k"]
        return jnp.where((k > 0)[:, None], cut(logits, top_k_threshold(logits, k)), logits)

    def top_p(logits: Array) -> Array:
        p = rows["top_p"]
        return jnp.where((p < 1)[:, None], cut(logits, top_p_threshold(logits, p)), logits)

    steps: list[tuple[Array, Any]] = [
        (rows["min_p"] > 0, min_p),
        (rows["top_k"] > 0, top_k),
        (rows["top_p"] < 1, top_p),
    ]
    for wanted, step in steps:
        logits = jax.lax.cond(jnp.any(wanted), step, lambda x: x, logits)
    return logits

"""What the sampler calls for a decode step's rows of logits: cuts, draws and ranks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from qwen2_kernels import (
    gumbel_argmax,
    token_ranks,
    top_k_threshold,
    top_k_top_p_threshold,
    top_logits,
    top_p_threshold,
)
from qwen2_kernels.thresholds.api import TOP_K_IMPLEMENTATIONS

from benchmarking.case import Case, Selection, after, noise, num_arrays, num_calls

ROWS = (1, 32, 256)
TOP_K, TOP_P, SPREAD = 20, 0.8, 12.0
"""Qwen2.5's own; logits lie that far around 0."""


def threshold_cases(selection: Selection) -> Iterator[Case]:
    """Each cut, and both, of each number of rows."""
    for rows in ROWS:
        plain = jnp.ones(rows), jnp.full(rows, -jnp.inf)
        k, p = jnp.full(rows, TOP_K, jnp.int32), jnp.full(rows, TOP_P)
        yield from _cases(selection, "top_k_threshold", rows, top_k_threshold, (k, *plain))
        yield from _cases(selection, "top_p_threshold", rows, top_p_threshold, (p, *plain))
        yield from _cases(selection, "top_k_top_p_threshold", rows, top_k_top_p_threshold, (k, p, *plain))


def gumbel_cases(selection: Selection) -> Iterator[Case]:
    """Draws from all tokens, from those that lie in the upper quarter (`cut`), and the likeliest tokens (`greedy`)."""
    for rows in ROWS:
        seeds = [jnp.arange(rows, dtype=jnp.int32) + i for i in range(3)]
        for kind, temperature, least in (("", 1.0, -jnp.inf), (", cut", 1.0, SPREAD / 2), (", greedy", 0.0, -jnp.inf)):
            of_rows = jnp.full(rows, temperature), jnp.full(rows, least), *seeds
            yield from _cases(selection, "gumbel_argmax", rows, gumbel_argmax, of_rows, kind)


def rank_cases(selection: Selection) -> Iterator[Case]:
    """Ranks of one token a row, and of 128 more."""
    for rows in ROWS:
        tokens = jnp.arange(129, dtype=jnp.int32)[None] * 997 % selection.geometry.vocab_size
        for count in (1, 129):
            asked = jnp.where(jnp.arange(129) < count, jnp.tile(tokens, (rows, 1)), -1)
            yield from _cases(selection, "token_ranks", rows, token_ranks, (asked,), f", {count} tokens")


def top_cases(selection: Selection) -> Iterator[Case]:
    """As many log-probabilities as a request may ask for by default."""

    def run(logits: Array, is_wanted: Array, **options: Any) -> Array:
        values, _, log_sum = top_logits(logits, is_wanted, count=20, **options)
        return values - values[:, :1] - log_sum[:, None]

    for rows in ROWS:
        yield from _cases(selection, "top_logits", rows, run, (jnp.ones(rows, bool),))


def _cases(
    selection: Selection, op: str, rows: int, run: Callable[..., Array], of_rows: tuple[Array, ...], kind: str = ""
) -> Iterator[Case]:
    """A case for each implementation. At least, logits are read once."""
    size = selection.geometry.vocab_size
    num_bytes = 4 * rows * size
    arrays = num_arrays(num_bytes, most=8)
    calls = num_calls(num_bytes, least=arrays, most=8)

    def make(seed: Array) -> tuple[Any, ...]:
        logits = [SPREAD * noise(seed, i, (rows, size), jnp.float32) for i in range(arrays)]
        return [jnp.zeros(result.shape, result.dtype) for _ in range(calls)], logits

    result = jax.eval_shape(run, jax.ShapeDtypeStruct((rows, size), jnp.float32), *of_rows)
    for implementation in () if selection.tune else sorted(TOP_K_IMPLEMENTATIONS.keys() - {"reference"}):
        yield Case(
            op=op,
            implementation=implementation,
            geometry=selection.name,
            dtype="float32",
            shape=f"{rows} rows{kind}",
            make=make,
            function=partial(_chain, partial(run, implementation=implementation), of_rows),
            calls=calls,
            num_bytes=num_bytes,
            headline=rows in (1, 256) and kind in ("", ", 1 tokens"),
        )


def _chain(run: Any, of_rows: tuple[Array, ...], results: list[Array], logits: list[Array]) -> tuple[list[Array]]:
    outputs: list[Array] = []
    for index in range(len(results)):
        row = logits[index % len(logits)]
        if outputs:
            row, outputs[-1] = after(row, outputs[-1])
        outputs.append(run(row, *of_rows))
    return (outputs,)

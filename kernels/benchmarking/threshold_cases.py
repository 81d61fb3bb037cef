"""`top_k_threshold` and `top_p_threshold` as the sampler calls them: a decode step's rows of logits."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from qwen2_kernels import top_k_threshold, top_p_threshold
from qwen2_kernels.thresholds.api import TOP_K_IMPLEMENTATIONS

from benchmarking.case import Case, Selection, after, noise, num_arrays, num_calls

ROWS = (1, 32, 256)
TOP_K, TOP_P, SPREAD = 20, 0.8, 12.0
"""Qwen2.5's own; logits lie that far around 0."""


def threshold_cases(selection: Selection) -> Iterator[Case]:
    """Both cuts, of each number of rows. At least, logits are read once."""
    size = selection.geometry.vocab_size
    for rows in () if selection.tune else ROWS:
        num_bytes = 4 * rows * size
        arrays = num_arrays(num_bytes, most=8)
        calls = num_calls(num_bytes, least=arrays, most=8)

        def make(seed: Array, rows: int = rows, arrays: int = arrays, calls: int = calls) -> tuple[Any, ...]:
            logits = [SPREAD * noise(seed, i, (rows, size), jnp.float32) for i in range(arrays)]
            return [jnp.zeros(rows) for _ in range(calls)], logits

        for op, run, asked in (
            ("top_k_threshold", top_k_threshold, jnp.full(rows, TOP_K, jnp.int32)),
            ("top_p_threshold", top_p_threshold, jnp.full(rows, TOP_P, jnp.float32)),
        ):
            for implementation in TOP_K_IMPLEMENTATIONS.keys() - {"reference"}:
                yield Case(
                    op=op,
                    implementation=implementation,
                    geometry=selection.name,
                    dtype="float32",
                    shape=f"{rows} rows",
                    make=make,
                    function=partial(_find, partial(run, implementation=implementation), asked),
                    calls=calls,
                    num_bytes=num_bytes,
                    headline=rows in (1, 256),
                )


def _find(run: Any, asked: Array, results: list[Array], logits: list[Array]) -> tuple[list[Array]]:
    outputs: list[Array] = []
    for index in range(len(results)):
        row = logits[index % len(logits)]
        if outputs:
            row, outputs[-1] = after(row, outputs[-1])
        outputs.append(run(row, asked))
    return (outputs,)
